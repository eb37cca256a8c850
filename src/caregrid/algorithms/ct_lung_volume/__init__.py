"""Lung volume on chest CT, by classical segmentation. A model package: see algorithm.toml and README.md."""

#: Studies the slot's tests run it on: files of pydicom and pydicom-data, or of the shared data, one study an entry.
SAMPLES = ("pydicom:eCT_Supplemental.dcm", "shared:ct-chest/CT00008[2-9].dcm")

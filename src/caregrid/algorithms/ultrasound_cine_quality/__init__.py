"""Technical quality of ultrasound cines. A model package: see algorithm.toml and README.md."""

#: Studies the slot's tests run it on: files of pydicom and pydicom-data, or of the shared data, one study an entry.
SAMPLES = ("pydicom:color3d_jpeg_baseline.dcm", "pydicom:examples_ybr_color.dcm")

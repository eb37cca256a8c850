"""MR phantom quality with hazen, unchanged, in an environment of its own. A model package: see algorithm.toml and README.md."""

#: Studies the slot's tests run it on: files of pydicom and pydicom-data, or of the shared data, one study an entry.
SAMPLES = ("shared:mr-acr-phantom/GE/*.dcm",)

"""Technical quality of frontal chest X-rays: turned, mirrored, negative, flat. A model package: see algorithm.toml, README.md."""

#: Studies the slot's tests run it on: files of pydicom and pydicom-data, or of the shared data, one study an entry.
SAMPLES = ("pydicom:RG1_UNCR.dcm",)

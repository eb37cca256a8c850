"""Technical quality of ultrasound cines. A model package: see algorithm.toml and README.md."""

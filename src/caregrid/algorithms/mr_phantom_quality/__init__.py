"""MR phantom quality with hazen, unchanged, in an environment of its own. A model package: see algorithm.toml and README.md."""

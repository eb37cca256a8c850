"""Lung volume on chest CT, by classical segmentation. A model package: see algorithm.toml and README.md."""

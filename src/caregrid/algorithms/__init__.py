"""Slot: one folder per clinical algorithm, each a model package."""

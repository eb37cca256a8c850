"""A hospital site and a small PACS on one machine, on real data."""

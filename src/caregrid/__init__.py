"""caregrid: AI in everyday hospital care, run and improved together, with no patient data leaving the hospital."""

__version__ = "0.1.0"

"""The words of caregrid: plain data and decisions, no input or output. Read this folder first."""

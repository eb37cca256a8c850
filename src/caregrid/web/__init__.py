"""The web app of a site: clinician, operator and governance pages."""

"""Structured logs, one JSON object a line on standard error. What may identify a person is never handed to them."""

from __future__ import annotations

import logging
import sys

import pydicom
import pydicom.config
import structlog


def set_up(level: int = logging.INFO) -> None:
    """Send structlog's and warnings' output to standard error as JSON lines."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    # pydicom's warnings quote the values they complain of: neither its logger nor its warnings may reach a log.
    logging.captureWarnings(True)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for noisy in ("py.warnings", "pydicom", "pynetdicom", "highdicom", "dbos"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)

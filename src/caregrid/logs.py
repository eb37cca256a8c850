"""Structured logs, one JSON object a line on standard error. What may identify a person is never handed to them."""

from __future__ import annotations

import logging
import sys

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
    # Libraries that quote values in their messages (pydicom names elements with their content) are kept quiet.
    logging.captureWarnings(True)
    for noisy in ("py.warnings", "pydicom", "pynetdicom", "highdicom", "dbos"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)

"""What monitoring asks: is the site well (/health), and its numbers (/metrics, Prometheus text). Neither holds patient data."""

from __future__ import annotations

import sqlalchemy as sa
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse

from caregrid.store import views_operations
from caregrid.web._page import Parts

router = APIRouter()


@router.get("/health")
def health(web: Parts) -> JSONResponse:
    """200 while the database answers, 503 otherwise."""
    try:
        views_operations.alive(web.engine)
    except sa.exc.SQLAlchemyError:
        return JSONResponse({"ok": False, "reason": "the database does not answer"}, status_code=503)
    return JSONResponse({"ok": True})


@router.get("/metrics")
def metrics(web: Parts) -> PlainTextResponse:
    """Gauges computed from the database, so that they hold whichever process answers and survive restarts."""
    lines: list[str] = []
    for name, labels, value in views_operations.gauges(web.engine, web.settings.engine.dead_after_seconds):
        header = f"# TYPE caregrid_{name} gauge"
        if header not in lines:
            lines.append(header)
        inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        lines.append(f"caregrid_{name}{'{' + inside + '}' if inside else ''} {value:g}")
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

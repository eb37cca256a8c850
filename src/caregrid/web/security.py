"""Headers every answer carries, and the checks every form passes."""

from __future__ import annotations

import hmac

from fastapi import Request
from starlette.datastructures import FormData, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caregrid.errors import FormRefused

#: No inline script or style, nothing from another origin, never inside a frame.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # "no-referrer" would make browsers send "Origin: null" with our own forms.
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

MAX_FORM_BYTES = 256 * 1024


class SecurityHeaders:
    """ASGI middleware: adds the headers to every answer; a part that set its own policy (the image viewer) keeps it."""

    def __init__(self, app: ASGIApp, tls: bool) -> None:
        self.app = app
        self.tls = tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and dress the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._dress(MutableHeaders(scope=message), str(scope["path"]))
            await send(message)

        await self.app(scope, receive, dressed)

    def _dress(self, headers: MutableHeaders, path: str) -> None:
        headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        # Pages hold patient data: nothing of them stays in a shared computer's cache.
        headers.setdefault("Cache-Control", "max-age=3600" if path.startswith("/static/") else "no-store")
        if self.tls:
            headers.setdefault("Strict-Transport-Security", "max-age=31536000")


async def read_form(request: Request, expected_token: str) -> FormData:
    """The posted form; FormRefused unless it is small, comes from one of our pages and carries the expected token."""
    check_origin(request)
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > MAX_FORM_BYTES:
        raise FormRefused
    form = await request.form(max_files=0, max_fields=2000)
    if not expected_token or not hmac.compare_digest(text(form, "csrf").encode(), expected_token.encode()):
        raise FormRefused
    return form


def check_origin(request: Request) -> None:
    """FormRefused when the browser says another site's page sent the request."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise FormRefused


def text(form: FormData, name: str) -> str:
    """A field's text without surrounding space; empty when it is missing or a file."""
    value = form.get(name, "")
    return value.strip() if isinstance(value, str) else ""

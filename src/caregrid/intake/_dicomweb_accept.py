"""What a DICOMweb client says it accepts (PS3.18 8.7.4, 8.7.5): media types with parameters, best first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastapi import Request

from caregrid.intake._dicomweb_multipart import boundary_of

#: A comma that separates media ranges, not one within quotes.
_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')


@dataclass(frozen=True)
class Acceptable:
    """One media range. media is the type of a part when ``multipart``; transfer_syntax is a UID, ``*`` or empty."""

    media: str
    multipart: bool = False
    transfer_syntax: str = ""
    quality: float = field(default=1.0, compare=False)

    def takes(self, media: str) -> bool:
        """Whether a media type falls in the range."""
        kind = self.media.partition("/")
        return self.media in (media, "*/*") or (kind[2] == "*" and media.startswith(f"{kind[0]}/"))


ANYTHING = Acceptable("*/*", multipart=True, transfer_syntax="*")


def accepted(request: Request) -> list[Acceptable]:
    """What the request accepts, by its ``accept`` query parameter or header; anything when it does not say."""
    text = request.query_params.get("accept") or ", ".join(request.headers.getlist("accept"))
    ranges = [_range(each) for each in _COMMA.split(text[:4096]) if each.strip()]
    return sorted(ranges, key=lambda each: -each.quality) or [ANYTHING]


def _range(text: str) -> Acceptable:
    media, options = boundary_of(text.strip())
    quality = _quality(options.get("q", "1"))
    syntax = options.get("transfer-syntax", "")
    if media == "*/*":
        return Acceptable("*/*", True, syntax or "*", quality)
    if media == "multipart/related":
        return Acceptable(options.get("type", "*/*").lower(), True, syntax, quality)
    return Acceptable(media, False, syntax, quality)


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0

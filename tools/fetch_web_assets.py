"""Fetch the web pages' style and script files from npm, pinned by version and SHA-512, and put the few needed into web/static.

usage: python tools/fetch_web_assets.py            (needs npm; run only to change a version, the files are committed)
"""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

STATIC = Path(__file__).parents[1] / "src" / "caregrid" / "web" / "static"

PACKAGES = {
    "nhsuk-frontend@10.6.1": "PZorqQZjZx/A26yJoskCL9z0ib6AtkAyF0o4K/RHr8zRrJyXrUOCnMbjy0VNXsGO4tfTNMwqlkwATKs4a0xayw==",
    "htmx.org@4.0.1": "oF7JgXhDW9UXCy/k1ZYFUQgzu/rm19ORWPSPNL91vPluB2PB9+MV55tyQdH/w7o2EAbTYUG5SDW1R60mdkdqGg==",
}

#: file in the package → file under web/static
NHSUK = {
    "dist/nhsuk/nhsuk-frontend.min.css": "nhsuk/nhsuk-frontend.min.css",
    "dist/nhsuk/nhsuk-frontend.min.js": "nhsuk/nhsuk-frontend.min.js",
}
HTMX = {"dist/htmx.min.js": "htmx/htmx.min.js", "LICENSE": "htmx/LICENSE"}

MIT = """nhsuk-frontend 10.6.1 (https://github.com/nhsuk/nhsuk-frontend), taken from npm.
Changed: @font-face rules removed (they load fonts from another server), icon addresses made relative, source map removed.

The MIT License (MIT)

Copyright (c) NHS England

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE
FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def fetch(package: str, integrity: str, folder: Path) -> Path:
    """The package's unpacked folder; SystemExit when its bytes are not the pinned ones."""
    name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    tarball = folder / name.stdout.strip().splitlines()[-1]
    found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != integrity:
        sys.exit(f"{package}: sha512 {found} is not the pinned one")
    target = folder / re.sub(r"\W", "-", package)
    with tarfile.open(tarball) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def copy(source: Path, names: dict[str, str]) -> None:
    """Copy the named files below web/static."""
    for old, new in names.items():
        (STATIC / new).parent.mkdir(parents=True, exist_ok=True)
        (STATIC / new).write_bytes((source / old).read_bytes())


def localise(css: str) -> str:
    """The style sheet without remote fonts and with icons beside it."""
    css = re.sub(r"@font-face\{[^}]*\}", "", css)
    css = re.sub(r"/\*# sourceMappingURL=.*?\*/", "", css)
    return css.replace("url(/assets/images/", "url(images/")


def main() -> None:
    """Fetch, check, copy, clean."""
    with tempfile.TemporaryDirectory() as temporary:
        nhsuk, htmx = (fetch(package, integrity, Path(temporary)) for package, integrity in PACKAGES.items())
        copy(nhsuk, NHSUK)
        copy(htmx, HTMX)
        sheet = STATIC / "nhsuk/nhsuk-frontend.min.css"
        css = localise(sheet.read_text(encoding="utf-8"))
        sheet.write_text(css, encoding="utf-8")
        icons = set(re.findall(r"url\(images/([^)]+)\)", css))
        copy(nhsuk, {f"dist/nhsuk/assets/images/{icon}": f"nhsuk/images/{icon}" for icon in sorted(icons)})
    script = STATIC / "nhsuk/nhsuk-frontend.min.js"
    script.write_text(re.sub(r"//# sourceMappingURL=.*", "", script.read_text(encoding="utf-8")), encoding="utf-8")
    (STATIC / "nhsuk/LICENSE").write_text(MIT, encoding="utf-8")
    remote = re.findall(r"https?://[^)\"' ]+", css)
    if remote:
        sys.exit(f"the style sheet still names other servers: {remote}")


if __name__ == "__main__":
    main()

"""Make src/caregrid/web/viewer/ohif.zip from the pinned OHIF release on npm. Run it when the pin below changes.

The archive's members are already gzip-compressed, so that the site sends them as they lie; the same release gives the
same archive, byte for byte. Needs npm; nothing of this runs at a site.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGE = "@ohif/app@3.12.10"
#: As a package-lock.json states it for this release.
INTEGRITY = "sha512-0kuF66Mq9c9dMD++bUsTjMrJpXJwaZhz9B4uS244DawAjSkTwIYFU93pxPuRUQixaRi7QAHlF3Fe1qudBlZrmA=="
TARGET = Path(__file__).parents[1] / "src/caregrid/web/viewer/ohif.zip"

#: Left out: what we replace, what calls other hosts, demo settings, an ONNX runtime (136 MB) and start-up pictures for phones.
LEFT_OUT = {
    "_headers", "_redirects", "app-config.js", "es6-shim.min.js", "google.js", "index.html", "init-service-worker.js",
    "manifest.json", "oidc-client.min.js", "polyfill.min.js", "serve.json", "silent-refresh.html", "sw.js",
}  # fmt: skip
LEFT_OUT_FOLDERS = {"ort"}
KEPT_ASSETS = {"favicon.ico", "favicon-16x16.png", "favicon-32x32.png"}

#: The release is built to lie at the root of a host. Ours lies where it is mounted: next to the script that is running.
ROOT = b'__webpack_require__.p = "/";'
BESIDE = (
    b'__webpack_require__.p = new URL("./", (self.document && self.document.currentScript || {}).src || self.location.href).href;'
)

#: A fixed moment, so that the archive depends on the release alone.
MOMENT = (1980, 1, 1, 0, 0, 0)


def main() -> int:
    """Fetch (or take the given package file), check, prune, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, help="an already downloaded ohif-app-….tgz")
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package = options.package or fetch(Path(folder))
        check_integrity(package)
        write_archive(package, options.target)
    sys.stdout.write(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB\n")
    return 0


def fetch(folder: Path) -> Path:
    """Download the pinned package with npm into ``folder``."""
    subprocess.run(["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tgz"))


def check_integrity(package: Path) -> None:
    """Exit unless the file is the pinned one."""
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != INTEGRITY:
        raise SystemExit(f"{package.name} is not the pinned {PACKAGE}: sha512-{digest}")


def write_archive(package: Path, target: Path) -> None:
    """Write what is kept of the release, sorted by name."""
    files = dict(sorted(kept_files(package)))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, MOMENT), gzip.compress(content, 9, mtime=0))


def kept_files(package: Path) -> Iterator[tuple[str, bytes]]:
    """(name below the viewer's root, content) of every file a site needs, the licence among them."""
    with tarfile.open(package) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            name = "LICENSE" if path.name == "LICENSE" and len(path.parts) == 2 else wanted_name(path)
            content = archive.extractfile(member) if name and member.isfile() else None
            if name and content:
                yield name, relocated(name, content.read())


def relocated(name: str, content: bytes) -> bytes:
    """A script or style that finds what it loads beside itself. Exits when the release is built another way."""
    if name.startswith("app.bundle.") and name.endswith(".js") and ROOT not in content:
        raise SystemExit(f"{name} does not set its root as expected; look at how this release is built")
    if name.endswith(".css"):
        return content.replace(b"url(/", b"url(")
    return content.replace(ROOT, BESIDE) if name.endswith(".js") else content


def wanted_name(path: PurePosixPath) -> str | None:
    """The name of a file of ``package/dist``, or None when it is left out."""
    if path.parts[:2] != ("package", "dist"):
        return None
    parts = path.parts[2:]
    if path.suffix == ".map" or parts[0] in LEFT_OUT_FOLDERS or "/".join(parts) in LEFT_OUT:
        return None
    if parts[0] == "assets" and parts[-1] not in KEPT_ASSETS and path.suffix in (".png", ".ico", ".xml", ".json"):
        return None
    return "/".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())

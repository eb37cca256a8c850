"""Orthanc as the PACS a test talks to: a real server on free ports, gone with the test."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import pytest

from tests.support.ports import free_port

ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Orthanc:
    """``with Orthanc(folder) as pacs``: started and answering inside the block, ended after it; stop and start keep the data.

    modalities: name → (AE title, host, port), whom it sends to and reports storage commitment to.
    settings: more of Orthanc's own configuration. Skips the test where Orthanc is not installed.
    """

    def __init__(
        self,
        folder: Path,
        aet: str = "ORTHANC",
        modalities: Mapping[str, tuple[str, str, int]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not Path(ORTHANC).exists():
            pytest.skip("Orthanc is not on this machine (apt-get install orthanc)")
        self.folder = Path(folder) / f"orthanc-{aet.lower()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.aet = aet
        self.dicom_port = free_port()
        self.http_port = free_port()
        self._modalities = {name: list(peer) for name, peer in (modalities or {}).items()}
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its REST interface."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def dicomweb_url(self) -> str:
        """Its DICOMweb root; skips the test where the plugin is not installed."""
        if not DICOMWEB_PLUGIN.exists():
            pytest.skip("Orthanc has no DICOMweb plugin here (apt-get install orthanc-dicomweb)")
        return f"{self.url}/dicom-web"

    def start(self, timeout: float = 60.0) -> None:
        """Start it and return once it answers by HTTP and by DIMSE."""
        configuration = self.folder / "orthanc.json"
        configuration.write_text(json.dumps(self._configuration()))
        log = (self.folder / "orthanc.log").open("ab")
        with log:
            self._process = subprocess.Popen([ORTHANC, str(configuration)], stdout=log, stderr=log)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            if self._answers():
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"Orthanc did not start: {(self.folder / 'orthanc.log').read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """End it; what it stored stays, and it can be started again on the same ports."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Orthanc:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            answer = httpx.get(f"{self.url}/system", timeout=2)
            with socket.create_connection(("127.0.0.1", self.dicom_port), timeout=2):
                return answer.status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    def _configuration(self) -> dict[str, Any]:
        plugins = [str(DICOMWEB_PLUGIN)] if DICOMWEB_PLUGIN.exists() else []
        return {
            "Name": self.aet,
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "Plugins": plugins,
            "DicomAet": self.aet,
            "DicomPort": self.dicom_port,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowFind": True,
            "DicomCheckCalledAet": False,
            "DicomModalities": self._modalities,
            "OverwriteInstances": False,
            "ConcurrentJobs": 2,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            **self._settings,
        }

    def instances(self, sop_instance_uid: str = "") -> list[str]:
        """Orthanc's own ids of what it stores; with a SOP Instance UID only that one."""
        if not sop_instance_uid:
            return list(httpx.get(f"{self.url}/instances", timeout=30).json())
        found = httpx.post(f"{self.url}/tools/lookup", content=sop_instance_uid, timeout=30).json()
        return [entry["ID"] for entry in found if entry["Type"] == "Instance"]

    def dicom(self, identifier: str) -> bytes:
        """The stored file: by Orthanc's id, or by SOP Instance UID. KeyError when it is not there."""
        if "." in identifier:
            ids = self.instances(identifier)
            if not ids:
                raise KeyError(identifier)
            identifier = ids[0]
        answer = httpx.get(f"{self.url}/instances/{identifier}/file", timeout=60)
        if answer.status_code == 404:
            raise KeyError(identifier)
        return answer.content

    def sop_instance_uids(self) -> set[str]:
        """The SOP Instance UIDs of everything stored."""
        answer = httpx.get(f"{self.url}/instances", params={"expand": ""}, timeout=60).json()
        return {entry["MainDicomTags"]["SOPInstanceUID"] for entry in answer}

    def upload(self, path: Path) -> None:
        """Store a file by REST."""
        httpx.post(f"{self.url}/instances", content=Path(path).read_bytes(), timeout=60).raise_for_status()

"""A site's settings as plain data, handed down by ``caregrid.site``. ``caregrid.config`` reads them from site.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """DICOM or web TLS: PEM files. ca: who may connect; with require_client_certificate both sides prove themselves (BCP 195)."""

    certificate: Path
    key: Path
    ca: Path | None = None
    require_client_certificate: bool = False


@dataclass(frozen=True)
class AllowedSender:
    """Who may open an association. calling_ae may be ``*``; address is an IP or network in CIDR form."""

    calling_ae: str
    address: str


@dataclass(frozen=True)
class DimseSettings:
    """The DIMSE door. Times in seconds, sizes in bytes. allow empty: nobody but loopback."""

    host: str = "0.0.0.0"  # noqa: S104 - a scanner is on another machine
    port: int = 11112
    tls_port: int | None = None
    tls: Tls | None = None
    ae_titles: tuple[str, ...] = ("CAREGRID",)
    allow: tuple[AllowedSender, ...] = ()
    max_associations: int = 100
    idle_seconds: float = 60.0
    artim_seconds: float = 30.0
    max_pdu: int = 262144
    max_object_bytes: int = 4 << 30
    processes: int = 1


@dataclass(frozen=True)
class FolderSettings:
    """The folder door: files put under ``path`` are taken in and removed once kept. Absent path: door closed."""

    path: Path | None = None
    poll_seconds: float = 1.0
    settle_seconds: float = 2.0
    calling_ae: str = "FOLDER"
    called_ae: str = "CAREGRID"


@dataclass(frozen=True)
class WebSettings:
    """The web app and the DICOMweb door. api_tokens: name → sha256 (hex) of a bearer token for DICOMweb clients."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls: Tls | None = None
    session_hours: float = 10.0
    api_tokens: dict[str, str] = field(default_factory=dict)
    max_part_bytes: int = 4 << 30
    dicomweb: bool = True


@dataclass(frozen=True)
class RequiredSeries:
    """A series that must have arrived: DICOM keyword → value (``*`` and ``?`` match as in C-FIND)."""

    match: dict[str, str]
    minimum_instances: int = 1


@dataclass(frozen=True)
class CompletionPolicy:
    """When a study from a source is complete. Times in seconds.

    Complete once it was quiet for quiet_seconds, every required series is there and, when expected_from names a
    destination that answers C-FIND, the number of instances matches. After ceiling_seconds: at_ceiling proceed or hold.
    late: what instances after completion do — rerun (new generation), ignore (kept, flagged), ask (held for an operator).
    """

    source: str = "*"
    quiet_seconds: float = 30.0
    ceiling_seconds: float = 3600.0
    at_ceiling: str = "proceed"
    late: str = "rerun"
    required_series: tuple[RequiredSeries, ...] = ()
    expected_from: str | None = None


@dataclass(frozen=True)
class Destination:
    """Where results go. kind: cstore, stow or folder. Back-off doubles from first to longest; parked after give_up_seconds.

    storage_commitment: ask for it after each delivery (cstore). Most archives report on an association of their own, to
    commitment_host:commitment_port; without a port the report is awaited on ours.
    """

    name: str
    kind: str
    host: str = ""
    port: int = 0
    ae_title: str = ""
    calling_ae: str = "CAREGRID"
    tls: Tls | None = None
    url: str = ""
    token_file: Path | None = None
    path: Path | None = None
    timeout_seconds: float = 30.0
    first_backoff_seconds: float = 5.0
    longest_backoff_seconds: float = 3600.0
    give_up_seconds: float = 259200.0
    storage_commitment: bool = False
    commitment_host: str = "0.0.0.0"  # noqa: S104 - the archive is on another machine
    commitment_port: int | None = None


@dataclass(frozen=True)
class EngineSettings:
    """Workers and the engine's own rhythm."""

    workers: int = 1
    slots: int = 2
    poll_seconds: float = 0.25
    heartbeat_seconds: float = 2.0
    dead_after_seconds: float = 10.0
    max_attempts: int = 5
    off_peak: tuple[int, int] = (19, 7)  # local hours, from–to
    free_bytes_floor: int = 500 << 20


@dataclass(frozen=True)
class SiteSettings:
    """Everything site.toml says. home holds site.toml; paths are absolute."""

    name: str
    home: Path
    data: Path
    database_url: str
    institution: str = ""
    station_name: str = "CAREGRID"
    dimse: DimseSettings = DimseSettings()
    folder: FolderSettings = FolderSettings()
    web: WebSettings = WebSettings()
    engine: EngineSettings = EngineSettings()
    completion: tuple[CompletionPolicy, ...] = (CompletionPolicy(),)
    destinations: tuple[Destination, ...] = ()
    sandbox: str = "bubblewrap"

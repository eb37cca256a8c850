"""Which transfer syntax an object is in, and the error that names it."""

from __future__ import annotations

from pydicom.dataset import Dataset
from pydicom.uid import UID, ImplicitVRLittleEndian

from caregrid.errors import PixelsUndecodable


def transfer_syntax(dataset: Dataset) -> UID:
    """The transfer syntax its file meta states; implicit little endian, DICOM's default (PS3.5 10.1), where there is none."""
    meta = getattr(dataset, "file_meta", None)
    stated = meta.get("TransferSyntaxUID") if meta is not None else None
    return UID(stated) if stated else ImplicitVRLittleEndian


def undecodable(syntax: UID, code: str, reason: str) -> PixelsUndecodable:
    """The refusal, with the transfer syntax by name and UID. code: truncated, no-pixels, syntax or broken."""
    name = f"{syntax.name} ({syntax})" if syntax.name != str(syntax) else str(syntax)
    return PixelsUndecodable(transfer_syntax=name, code=code, reason=reason)

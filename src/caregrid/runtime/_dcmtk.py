"""JPEG processes that no permissive Python decoder reads (12-bit Extended, retired progressive), decoded by dcmtk's dcmdjpeg."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, SecondaryCaptureImageStorage

from caregrid.runtime._syntax import undecodable

TIMEOUT_SECONDS = 60.0

#: What describes the pixels. Nothing about the patient is written into the temporary file.
_PIXEL_KEYWORDS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
)


def decompress(dataset: Dataset, syntax: UID) -> Dataset:
    """A copy of ``dataset``'s pixel attributes with native pixels. Raises PixelsUndecodable."""
    program = shutil.which("dcmdjpeg")
    if program is None:
        raise undecodable(syntax, "syntax", "only dcmtk's dcmdjpeg reads it, and it is not installed")
    with tempfile.TemporaryDirectory(prefix="caregrid-jpeg-") as folder:
        coded, native = Path(folder, "coded.dcm"), Path(folder, "native.dcm")
        _pixels_only(dataset, syntax).save_as(coded, enforce_file_format=True)
        failure = _run([program, "+te", str(coded), str(native)])
        if failure or not native.exists():
            raise undecodable(syntax, "broken", failure or "dcmdjpeg wrote nothing")
        return dcmread(native)


def _run(command: list[str]) -> str:
    """Why the command failed; empty when it did not."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"dcmdjpeg did not finish in {TIMEOUT_SECONDS:.0f} s"
    return "" if done.returncode == 0 else f"dcmdjpeg ended with status {done.returncode}"


def _pixels_only(dataset: Dataset, syntax: UID) -> Dataset:
    bare = Dataset()
    for keyword in _PIXEL_KEYWORDS:
        if keyword in dataset:
            bare[keyword] = dataset[keyword]
    bare.SOPClassUID = SecondaryCaptureImageStorage
    bare.SOPInstanceUID = "2.25.1"
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    bare.file_meta.MediaStorageSOPClassUID = bare.SOPClassUID
    bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPInstanceUID
    return bare

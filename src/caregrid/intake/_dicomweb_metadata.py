"""Objects as DICOM JSON without their bulk (PS3.18 10.4.1.1.2 and F), and the bulk by address."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from caregrid.errors import NoFrames
from caregrid.intake._dicomweb_pixels import PixelFile

_BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})

#: Binary values up to this stay in the JSON (as InlineBinary); look-up tables, overlays and documents are above it.
INLINE_BYTES = 1024

_PIXELS = {"FloatPixelData": "7FE00008", "DoubleFloatPixelData": "7FE00009", "PixelData": "7FE00010"}


@lru_cache(maxsize=4096)
def as_json(path: Path, address: str) -> bytes:
    """The object at ``path`` as a JSON object, bulk by BulkDataURI below ``address``. Files never change, so it is kept."""
    with path.open("rb") as file:
        dataset = pydicom.dcmread(file, stop_before_pixels=True)
        pixels = _pixels_there(path, dataset)
    content = _content(dataset, address)
    for tag, vr in pixels.items():
        content[tag] = {"vr": vr, "BulkDataURI": f"{address}/bulkdata/{tag}"}
    content["00083002"] = {"vr": "UI", "Value": [str(dataset.file_meta.TransferSyntaxUID)]}
    return _dump(dict(sorted(content.items()))).encode()


def _pixels_there(path: Path, dataset: Dataset) -> dict[str, str]:
    """Tag and VR of the pixel data of an object, without reading it."""
    if "Rows" not in dataset:
        return {}
    try:
        with PixelFile(path) as pixels:
            return {pixels.tag: pixels.vr}
    except NoFrames:
        return {}


def _content(dataset: Dataset, address: str) -> dict[str, Any]:
    places = {id(element): place for place, element in _bulk(dataset, "")}
    content: dict[str, Any] = dataset.to_json_dict(
        bulk_data_threshold=INLINE_BYTES,
        bulk_data_element_handler=lambda element: f"{address}/bulkdata/{places[id(element)]}",
        suppress_invalid_tags=True,
    )
    return content


def _bulk(dataset: Dataset, above: str) -> Iterator[tuple[str, DataElement]]:
    """(place, element) of every binary value; a place is ``tag`` or ``tag/item/tag`` with items from 1."""
    for element in _elements(dataset):
        place = f"{above}{element.tag:08X}"
        if element.VR == "SQ":
            for number, item in enumerate(element.value, 1):
                yield from _bulk(item, f"{place}/{number}/")
        else:
            yield place, element


def _elements(dataset: Dataset) -> Iterator[DataElement]:
    for tag in list(dataset.keys()):
        try:
            yield dataset[tag]
        except (ValueError, TypeError, KeyError, NotImplementedError):
            # One value nobody can read costs the viewer that value, not the object.
            del dataset[tag]


def _dump(content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(content), separators=(",", ":"))


def _finite(value: Any) -> Any:
    """``value`` with the numbers JSON does not know written as text (PS3.18 F.2.3)."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def bulk_value(path: Path, place: str) -> bytes | None:
    """The value of the binary element at ``place`` (see ``_bulk``), or None when there is none. Not for pixel data."""
    parts = place.split("/")
    dataset: Dataset = pydicom.dcmread(path, stop_before_pixels=True)
    try:
        for tag, number in zip(parts[:-1:2], parts[1:-1:2], strict=True):
            dataset = dataset[int(tag, 16)].value[int(number) - 1]
        value = dataset[int(parts[-1], 16)].value
    except (KeyError, ValueError, IndexError, TypeError):
        return None
    return bytes(value) if isinstance(value, bytes | bytearray) else None

"""A DICOM header as plain Python values, so that an algorithm needs no DICOM library to read it."""

from __future__ import annotations

from typing import Any

from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import IS, DSfloat

from caregrid.runtime._damage import DAMAGE

#: Pixels, waveforms and other bulk are not header; unknown encodings cannot be plain values.
_BULK = ("OB", "OW", "OD", "OF", "OL", "OV", "UN", "OB or OW")


def plain_header(dataset: Dataset) -> dict[str, Any]:
    """DICOM keyword → number, string, list of them, or list of dicts for sequences. Private attributes and bulk are left out."""
    header: dict[str, Any] = {}
    for element in _elements(dataset):
        keyword = keyword_for_tag(element.tag)
        if keyword and element.VR not in _BULK:
            header[keyword] = plain_value(element)
    return header


def plain_value(element: DataElement) -> Any:
    """The element's value; None where it is empty."""
    if element.VR == "SQ":
        return [plain_header(item) for item in element.value or []]
    if element.is_empty:
        return None
    value = element.value
    if isinstance(value, MultiValue | list | tuple):
        return [_scalar(part) for part in value]
    return _scalar(value)


def _elements(dataset: Dataset) -> list[DataElement]:
    found = []
    for tag in dataset.keys():  # noqa: SIM118  (a data set yields elements, and one bad value must not hide the others)
        try:
            found.append(dataset[tag])
        except DAMAGE:
            continue
    return found


def _scalar(value: Any) -> Any:
    if isinstance(value, DSfloat | float):
        return float(value)
    if isinstance(value, IS | int):
        return int(value)
    if isinstance(value, bytes):
        return None
    return str(value)

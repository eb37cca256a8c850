"""Key Object Selection (PS3.3 A.35.4) as a rejection note: withdraws results from a PACS (IHE RAD TF-2, IOCM)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
from highdicom import sr
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from caregrid.domain.codes import Code
from caregrid.errors import ResultInvalid
from caregrid.results._common import (
    MANUFACTURER,
    MODEL_NAME,
    ResultContext,
    blank_identity,
    coded,
    finish,
    series_arguments,
)

KIND = "dicom_kos"

QUALITY = Code("113001", "DCM", "Rejected for Quality Reasons")
PATIENT_SAFETY = Code("113037", "DCM", "Rejected for Patient Safety Reasons")
WRONG_WORKLIST_ENTRY = Code("113038", "DCM", "Incorrect Modality Worklist Entry")
RETENTION_EXPIRED = Code("113039", "DCM", "Data Retention Policy Expired")

#: The rejection notes a PACS that follows IOCM acts on, by code value.
REASONS = {code.value: code for code in (QUALITY, PATIENT_SAFETY, WRONG_WORKLIST_ENTRY, RETENTION_EXPIRED)}


def withdraw(context: ResultContext, results: Sequence[Dataset | Path], reason: Code = QUALITY, description: str = "") -> Dataset:
    """A rejection note that names ``results``, all of the context's study. Raises ResultInvalid when one is not.

    The same results and reason give the same SOP Instance UID.
    """
    if reason.value not in REASONS or reason.scheme != "DCM":
        raise ResultInvalid(kind=KIND, reason=f"{reason.value} is not a rejection note; use one of {', '.join(REASONS)}")
    headers = [_header(result) for result in results]
    if not headers:
        raise ResultInvalid(kind=KIND, reason="there is no result to withdraw")
    if any(header.StudyInstanceUID != context.identity.StudyInstanceUID for header in headers):
        raise ResultInvalid(kind=KIND, reason="a result of another study cannot be withdrawn here")
    part = "|".join([reason.value, *(str(header.SOPInstanceUID) for header in headers)])
    dataset = hd.ko.KeyObjectSelectionDocument(
        evidence=headers,
        content=_content(context, headers, reason, description),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **series_arguments(context, KIND, part=part),
    )
    dataset.SeriesDescription = f"AI withdrawn: {context.manifest.reference}"[:64]
    return finish(dataset, context)


def _content(context: ResultContext, headers: list[Dataset], reason: Code, description: str) -> hd.ko.KeyObjectSelection:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=context.engine_uid,
        name=context.station_name,
        manufacturer_name=MANUFACTURER,
        model_name=MODEL_NAME,
        serial_number=context.device_serial,
    )
    return hd.ko.KeyObjectSelection(
        document_title=coded(reason),
        referenced_objects=headers,
        observer_device_context=sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device),
        description=description or f"AI result of {context.manifest.reference} withdrawn",
    )


def _header(result: Dataset | Path) -> Dataset:
    """The result's header without identity (``finish`` puts on the source's); the caller's data set stays as it is."""
    header = Dataset()
    read = dcmread(result, stop_before_pixels=True) if isinstance(result, Path) else result
    for element in read:
        if element.keyword != "PixelData":
            header[element.tag] = element
    blank_identity(header)
    return header

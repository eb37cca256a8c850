"""Secondary Capture (PS3.3 A.8.1): pictures for people. Never the only carrier of a finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DA, TM

from caregrid.domain.findings import Findings, Picture
from caregrid.errors import ResultInvalid
from caregrid.results._common import ResultContext, finish, put_laterality, series_arguments

FORMAT = "dicom_sc"

WARNING_TEXT = "AI result, not for primary diagnosis"
_MINIMUM_WIDTH = 320


def write(context: ResultContext, findings: Findings) -> list[Dataset]:
    """One RGB image per picture, with the algorithm, its version and a warning burned in below it; [] without pictures."""
    return [_capture(context, findings, picture, number) for number, picture in enumerate(findings.pictures, start=1)]


def _capture(context: ResultContext, findings: Findings, picture: Picture, number: int) -> Dataset:
    pixels = burn_in(picture, label_lines(context, picture))
    arguments: dict[str, Any] = series_arguments(context, FORMAT, number)
    dataset = hd.sc.SCImage(
        pixel_array=pixels,
        photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=hd.CoordinateSystemNames.PATIENT,
        patient_orientation=("L", "P"),
        study_instance_uid=str(context.identity.StudyInstanceUID),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **arguments,
    )
    # A picture for people may be a montage or a plot: it has no orientation of its own (type 2C, empty).
    dataset.PatientOrientation = []
    put_laterality(dataset, context.used(findings))
    dataset.ConversionType = "WSD"
    dataset.BurnedInAnnotation = "YES"
    dataset.ImageComments = WARNING_TEXT
    dataset.DerivationDescription = f"{picture.title}. {context.manifest.reference}. {WARNING_TEXT}"[:1024]
    dataset.SourceImageSequence = _sources(context, findings, picture)
    started = context.started_at.astimezone(context.zone)
    dataset.DateOfSecondaryCapture, dataset.TimeOfSecondaryCapture = DA(started.date()), TM(started.time())
    _carry_lossy(dataset, context.used(findings))
    return finish(dataset, context)


def label_lines(context: ResultContext, picture: Picture) -> tuple[str, ...]:
    """What is burned in: title, algorithm and version, warning; and the decision when a clinician confirmed."""
    lines = [picture.title, f"{context.manifest.title} ({context.manifest.reference})", WARNING_TEXT]
    return tuple(line for line in lines if line)


def burn_in(picture: Picture, lines: Sequence[str]) -> NDArray[np.uint8]:
    """The picture with a band of text below it, so that no pixel of it is covered. (rows, columns, 3) uint8."""
    array = picture.array
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ResultInvalid(kind=FORMAT, reason=f"a picture is (rows, columns, 3) uint8, not {array.shape} {array.dtype}")
    width = max(array.shape[1], _MINIMUM_WIDTH)
    size = max(12, min(24, width // 36))
    font = ImageFont.load_default(size)
    wrapped = [part for line in lines for part in _wrap(line, font, width - 2 * size)]
    step = round(size * 1.3)
    canvas = Image.new("RGB", (width, array.shape[0] + step * len(wrapped) + size), "black")
    canvas.paste(Image.fromarray(array), ((width - array.shape[1]) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for index, line in enumerate(wrapped):
        pen.text((size, array.shape[0] + size // 2 + index * step), line, font=font, fill="white")
    return np.asarray(canvas)


def _wrap(line: str, font: Any, width: int) -> list[str]:
    """Break a line at spaces so that it fits in ``width`` pixels."""
    rows, row = [], ""
    for word in line.split():
        longer = f"{row} {word}".strip()
        if row and font.getlength(longer) > width:
            rows.append(row)
            longer = word
        row = longer
    return [*rows, row]


def _sources(context: ResultContext, findings: Findings, picture: Picture) -> list[Dataset]:
    wanted = set(picture.source_instances)
    items = []
    for header in context.used(findings):
        if "Rows" not in header or (wanted and str(header.SOPInstanceUID) not in wanted):
            continue
        item = Dataset()
        item.ReferencedSOPClassUID = header.SOPClassUID
        item.ReferencedSOPInstanceUID = header.SOPInstanceUID
        item.PurposeOfReferenceCodeSequence = [hd.sr.CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)]
        items.append(item)
    return items


def _carry_lossy(dataset: Dataset, sources: Sequence[Dataset]) -> None:
    """Lossy once is lossy for ever (PS3.3 C.7.6.1.1.5)."""
    lossy = [header for header in sources if str(header.get("LossyImageCompression", "")) == "01"]
    dataset.LossyImageCompression = "01" if lossy else "00"
    if lossy and lossy[0].get("LossyImageCompressionRatio"):
        dataset.LossyImageCompressionRatio = lossy[0].LossyImageCompressionRatio
    if lossy and lossy[0].get("LossyImageCompressionMethod"):
        dataset.LossyImageCompressionMethod = lossy[0].LossyImageCompressionMethod

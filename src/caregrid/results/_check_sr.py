"""Section 6.3 of the checklist: the measurement report."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.dataset import Dataset

from caregrid.results._subject import SEG, SR, Check, Subject, children, code, first, name

LANGUAGE, OBSERVER_TYPE, DEVICE, PROCEDURE = "121049", "121005", "121007", "121058"
DEVICE_ROWS = {
    "121012": "Device Observer UID",
    "121013": "Device Observer Name",
    "121014": "Device Observer Manufacturer",
    "121015": "Device Observer Model Name",
}
LIBRARY, LIBRARY_GROUP, MEASUREMENTS, GROUP = "111028", "126200", "126010", "125007"
TRACKING_ID, TRACKING_UID, FINDING = "112039", "112040", "121071"
ALGORITHM_NAME, ALGORITHM_VERSION = "111001", "111003"
REFERENCED_SEGMENT, REFERENCED_FRAME = "121191", "121214"


def groups(dataset: Dataset) -> list[Dataset]:
    """The measurement groups of a report."""
    container = first(dataset, MEASUREMENTS)
    return children(container, GROUP) if container is not None else []


def check_root(subject: Subject) -> Iterator[str]:
    """Title, language, device observer, procedure (6.3.1)."""
    dataset = subject.dataset
    if code(dataset, "ConceptNameCodeSequence") != ("126000", "DCM"):
        yield "the title is not Imaging Measurement Report (126000)"
    templates = dataset.get("ContentTemplateSequence") or []
    if not templates or templates[0].get("TemplateIdentifier") != "1500":
        yield "the root template is not TID 1500"
    if first(dataset, LANGUAGE) is None:
        yield "Language (121049) is missing"
    observer = first(dataset, OBSERVER_TYPE)
    if observer is None or code(observer, "ConceptCodeSequence")[0] != DEVICE:
        yield "there is no device observer"
    yield from (f"{meaning} ({value}) is missing" for value, meaning in DEVICE_ROWS.items() if first(dataset, value) is None)
    if first(dataset, PROCEDURE) is None:
        yield "Procedure reported (121058) is missing"


def check_library(subject: Subject) -> Iterator[str]:
    """The image library lists the images used (6.3.2)."""
    library = first(subject.dataset, LIBRARY)
    if library is None:
        yield "Image Library (111028) is missing"
        return
    images = [item for group in children(library, LIBRARY_GROUP) for item in children(group) if item.ValueType == "IMAGE"]
    entries = {str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in images}
    used = {str(header.SOPInstanceUID) for header in subject.sources if "Rows" in header}
    if not entries:
        yield "the image library is empty"
    elif used and entries != used:
        yield "the image library does not list exactly the images used"


def check_groups(subject: Subject) -> Iterator[str]:
    """Every measurement group says what it is and which algorithm said so (6.3.3); nothing found is a group too (6.3.5)."""
    found = groups(subject.dataset)
    if not found:
        yield "there is no measurement group; a negative result is coded, not missing"
    for number, group in enumerate(found, start=1):
        wanted = {
            TRACKING_ID: "Tracking Identifier",
            TRACKING_UID: "Tracking Unique Identifier",
            FINDING: "Finding",
            ALGORITHM_NAME: "Algorithm Name",
            ALGORITHM_VERSION: "Algorithm Version",
        }
        for value, meaning in wanted.items():
            if first(group, value) is None:
                yield f"group {number}: {meaning} ({value}) is missing"


def check_values(subject: Subject) -> Iterator[str]:
    """A number has a UCUM unit, or else a qualifier; a qualitative answer is a code (6.3.4, 6.3.5)."""
    for number, group in enumerate(groups(subject.dataset), start=1):
        for item in children(group):
            if item.ValueType == "NUM":
                yield from (f"group {number}: {fault}" for fault in _number_faults(item))
            if item.ValueType == "CODE" and not all(code(item, "ConceptCodeSequence")):
                yield f"group {number}: {name(item)} has no coded answer"


def _number_faults(item: Dataset) -> Iterator[str]:
    values = item.get("MeasuredValueSequence") or []
    if not values and not all(code(item, "NumericValueQualifierCodeSequence")):
        yield f"{name(item)} has neither a value nor a qualifier"
    if values and (code(values[0], "MeasurementUnitsCodeSequence")[1] != "UCUM" or values[0].get("NumericValue") is None):
        yield f"{name(item)} has no value with a UCUM unit"


def check_flags(subject: Subject) -> Iterator[str]:
    """Complete; verified only with the observer who verified (6.3.6)."""
    dataset = subject.dataset
    if dataset.get("CompletionFlag") != "COMPLETE":
        yield "CompletionFlag is not COMPLETE"
    observers = dataset.get("VerifyingObserverSequence") or []
    if dataset.get("VerificationFlag") == "VERIFIED":
        if not observers or not observers[0].get("VerifyingObserverName") or not observers[0].get("VerificationDateTime"):
            yield "VERIFIED without a verifying observer"
    elif dataset.get("VerificationFlag") != "UNVERIFIED" or observers:
        yield "VerificationFlag is not UNVERIFIED though nobody verified"


def check_evidence(subject: Subject) -> Iterator[str]:
    """The evidence sequences are there (6.3.7)."""
    if not subject.dataset.get("CurrentRequestedProcedureEvidenceSequence"):
        yield "CurrentRequestedProcedureEvidenceSequence is missing"
    for keyword in ("ReferencedPerformedProcedureStepSequence", "PerformedProcedureCodeSequence"):
        if keyword not in subject.dataset:
            yield f"{keyword} is missing"


def check_same_tracking(subject: Subject) -> Iterator[str]:
    """A finding has the same Tracking ID and UID here and in the SEG it references (6.2.6)."""
    segmentations = {str(item.SOPInstanceUID): item for item in subject.companions if item.SOPClassUID == SEG}
    here: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for group in groups(subject.dataset):
        shown = first(group, REFERENCED_SEGMENT) or first(group, REFERENCED_FRAME)
        if shown is None or not segmentations:
            continue
        reference = shown.ReferencedSOPSequence[0]
        dataset = segmentations.get(str(reference.ReferencedSOPInstanceUID))
        if dataset is None:
            yield "a group references a SEG that the run did not make"
            continue
        here.setdefault((str(dataset.SOPInstanceUID), _segment_number(reference, dataset)), set()).add(_tracking(group))
    for (uid, number), trackings in here.items():
        segment = next((item for item in segmentations[uid].SegmentSequence if int(item.SegmentNumber) == number), Dataset())
        if (str(segment.get("TrackingID", "")), str(segment.get("TrackingUID", ""))) not in trackings:
            yield f"segment {number} is tracked otherwise in the SEG"


def _segment_number(reference: Dataset, segmentation: Dataset) -> int:
    """The segment a reference is to, named itself or by a frame of it."""
    if "ReferencedSegmentNumber" in reference:
        numbers = reference.ReferencedSegmentNumber
        return int(numbers if isinstance(numbers, int) else numbers[0])
    frames = reference.get("ReferencedFrameNumber")
    frame = int(frames if isinstance(frames, int | str) else frames[0]) if frames else 0
    shared, per_frame = segmentation.SharedFunctionalGroupsSequence[0], segmentation.PerFrameFunctionalGroupsSequence
    if not 1 <= frame <= len(per_frame):
        return 0
    group = per_frame[frame - 1]
    named = group if "SegmentIdentificationSequence" in group else shared
    return int(named.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _tracking(group: Dataset) -> tuple[str, str]:
    identifier, uid = first(group, TRACKING_ID) or Dataset(), first(group, TRACKING_UID) or Dataset()
    return (str(identifier.get("TextValue", "")), str(uid.get("UID", "")))


def _only_sr(check: Check) -> Check:
    def checked(subject: Subject) -> Iterator[str]:
        if subject.sop_class == SR:
            yield from check(subject)

    return checked


CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("A", "6.3.1", _only_sr(check_root)),
    ("A", "6.3.2", _only_sr(check_library)),
    ("A", "6.3.3", _only_sr(check_groups)),
    ("A", "6.3.4", _only_sr(check_values)),
    ("A", "6.3.6", _only_sr(check_flags)),
    ("A", "6.3.7", _only_sr(check_evidence)),
    ("A", "6.2.6", _only_sr(check_same_tracking)),
)

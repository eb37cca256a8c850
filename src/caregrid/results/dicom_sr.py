"""Comprehensive 3D SR (PS3.3 A.35.13), root template TID 1500 Imaging Measurement Report (PS3.16)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DT, PersonName

from caregrid.domain.codes import ABSENT, PERCENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Segment
from caregrid.results._common import MANUFACTURER, MODEL_NAME, ResultContext, coded, finish, series_arguments, tracking_uid

FORMAT = "dicom_sr"

PRESENCE = Code("705057003", "SCT", "Presence")
ENGLISH = Code("en", "RFC5646", "English")
SOURCE = Code("260753009", "SCT", "Source")
CLINICAL_FINDING = Code("404684003", "SCT", "Clinical finding")
IMAGING_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
MEASUREMENT_FAILURE = Code("114006", "DCM", "Measurement failure")

_PLANAR_FRAMES = 1


@dataclass(frozen=True)
class _Region:
    """Where a finding's segment is: its SEG object, its number and frames there, and the instances it lies on."""

    segmentation: Dataset
    number: int
    frames: tuple[int, ...]
    sources: tuple[Dataset, ...]
    site: Code | None


def write(context: ResultContext, findings: Findings, segmentations: Sequence[Dataset] = ()) -> list[Dataset]:
    """One SR, always: a study without a finding gets an SR that says so by code.

    segmentations: SEG objects of the same run (from dicom_seg), which the measurement groups then reference.
    """
    used = context.used(findings)
    regions = _regions(findings, segmentations, used)
    groups = [_group(context, finding, regions) for finding in findings.findings] or _nothing_found(context)
    valueless, planar = _valueless(groups, findings), _planar(groups)
    report = sr.MeasurementReport(
        observation_context=_observer(context),
        procedure_reported=coded(procedure_reported(context)),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(coded(ENGLISH)),
    )
    dataset = sr.Comprehensive3DSR(
        evidence=[*used, *_referenced(regions)],
        content=report,
        is_complete=True,
        is_final=_verified(context),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **series_arguments(context, FORMAT),
    )
    _add_image_library(dataset, used)
    for finding, group in zip(findings.findings, groups, strict=False):
        if _region(finding, regions) is None:
            # After highdicom has made the report, like the image library: it would copy hundreds of pictures three times.
            group[0].ContentSequence.extend(_source_images(finding, used))
    for item in valueless:
        item.MeasuredValueSequence = []
    for item in planar:
        # Type 1C: not allowed beside the frame number, which says the segment already (PS3.3 C.17.14).
        del item.ReferencedSOPSequence[0].ReferencedSegmentNumber
    _put_verification(dataset, context)
    _put_predecessors(dataset, context)
    return [finish(dataset, context)]


def procedure_reported(context: ResultContext) -> Code:
    """The imaging procedure: what the source says was done, else what the manifest reads, else just imaging."""
    for item in context.identity.get("ProcedureCodeSequence", []):
        if item.get("CodeValue") and item.get("CodingSchemeDesignator"):
            return Code(str(item.CodeValue), str(item.CodingSchemeDesignator), str(item.get("CodeMeaning", "")) or "procedure")
    return context.manifest.procedure or IMAGING_PROCEDURE


def _observer(context: ResultContext) -> sr.ObservationContext:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=context.engine_uid,
        name=context.station_name,
        manufacturer_name=MANUFACTURER,
        model_name=MODEL_NAME,
        serial_number=context.device_serial,
    )
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    )


def _regions(findings: Findings, segmentations: Sequence[Dataset], used: Sequence[Dataset]) -> dict[str, _Region]:
    """Label of a segment → where it is."""
    sites = {segment.label[:64]: segment for segment in findings.segments}
    regions: dict[str, _Region] = {}
    for dataset in segmentations:
        frames = _frames_by_segment(dataset)
        referenced = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        uids = {item.ReferencedSOPInstanceUID for item in referenced}
        sources = tuple(header for header in used if header.SOPInstanceUID in uids)
        for item in dataset.SegmentSequence:
            label = str(item.SegmentLabel)
            segment: Segment | None = sites.get(label)
            number = int(item.SegmentNumber)
            regions.setdefault(label, _Region(dataset, number, tuple(frames[number]), sources, segment.site if segment else None))
    return regions


def _frames_by_segment(dataset: Dataset) -> dict[int, list[int]]:
    """Segment number → its frames; a SEG with one segment keeps the number in the shared groups."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    frames: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(dataset.PerFrameFunctionalGroupsSequence, start=1):
        named = group if "SegmentIdentificationSequence" in group else shared
        frames[int(named.SegmentIdentificationSequence[0].ReferencedSegmentNumber)].append(number)
    return frames


def _referenced(regions: dict[str, _Region]) -> list[Dataset]:
    return list({str(region.segmentation.SOPInstanceUID): region.segmentation for region in regions.values()}.values())


Group = (
    sr.VolumetricROIMeasurementsAndQualitativeEvaluations
    | sr.PlanarROIMeasurementsAndQualitativeEvaluations
    | sr.MeasurementsAndQualitativeEvaluations
)


def _region(finding: Finding, regions: dict[str, _Region]) -> _Region | None:
    return regions.get(finding.segment[:64]) if finding.segment else None


def _group(context: ResultContext, finding: Finding, regions: dict[str, _Region]) -> Group:
    """TID 1411 (a volume), TID 1410 (one picture) when the finding has a segment in a SEG, else TID 1501."""
    region = _region(finding, regions)
    arguments = _group_arguments(context, finding, region)
    if region is None:
        return sr.MeasurementsAndQualitativeEvaluations(**arguments)
    if len(region.sources) == 1 and len(region.frames) == _PLANAR_FRAMES:
        return sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=_segment_frame(region), **arguments)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=region.segmentation.SOPClassUID,
            sop_instance_uid=region.segmentation.SOPInstanceUID,
            segment_number=region.number,
            source_series=sr.SourceSeriesForSegmentation(region.sources[0].SeriesInstanceUID),
        ),
        **arguments,
    )


def _segment_frame(region: _Region) -> sr.ReferencedSegmentationFrame:
    source = region.sources[0]
    return sr.ReferencedSegmentationFrame(
        sop_class_uid=region.segmentation.SOPClassUID,
        sop_instance_uid=region.segmentation.SOPInstanceUID,
        frame_number=list(region.frames),
        segment_number=region.number,
        source_image=sr.SourceImageForSegmentation(source.SOPClassUID, source.SOPInstanceUID),
    )


def _group_arguments(context: ResultContext, finding: Finding, region: _Region | None) -> dict[str, Any]:
    site = finding.site or (region.site if region else None)
    study = str(context.identity.StudyInstanceUID)
    manifest = context.manifest
    return {
        "tracking_identifier": sr.TrackingIdentifier(
            uid=tracking_uid(study, manifest.name, finding.tracking_id), identifier=finding.tracking_id
        ),
        "finding_type": coded(finding.concept),
        "algorithm_id": sr.AlgorithmIdentification(
            name=manifest.name,
            version=manifest.version,
            parameters=[f"{key}={value}" for key, value in manifest.parameters.items()] or None,
            manufacturer=manifest.manufacturer,
            family=coded(manifest.algorithm_family),
        ),
        "finding_sites": [sr.FindingSite(coded(site), laterality=coded(finding.laterality) if finding.laterality else None)]
        if site
        else None,
        "measurements": [_measurement(item) for item in (*finding.measurements, *_certainty(finding))] or None,
        "qualitative_evaluations": [_evaluation(item) for item in finding.evaluations] or None,
    }


def _certainty(finding: Finding) -> tuple[Measurement, ...]:
    if finding.confidence is None:
        return ()
    return (Measurement(CERTAINTY, round(100 * finding.confidence, 6), PERCENT),)


def _measurement(item: Measurement) -> sr.Measurement:
    """A NUM item. One without a value gets 0 for now and a qualifier; ``write`` empties it once highdicom has read it."""
    qualifier = item.qualifier or (MEASUREMENT_FAILURE if item.value is None else None)
    return sr.Measurement(
        name=coded(item.concept),
        value=float(item.value) if item.value is not None else 0.0,
        unit=coded(item.unit),
        qualifier=coded(qualifier) if qualifier else None,
    )


def _valueless(groups: Sequence[Group], findings: Findings) -> list[Dataset]:
    """The NUM items whose measurement has no value."""
    found = []
    for group, finding in zip(groups, findings.findings, strict=False):
        numbers = [item for item in group[0].ContentSequence if item.ValueType == "NUM"]
        found += [number for number, item in zip(numbers, finding.measurements, strict=False) if item.value is None]
    return found


def _planar(groups: Sequence[Group]) -> list[Dataset]:
    """The references to a frame of a SEG."""
    items = [item for group in groups for item in group[0].ContentSequence if item.ValueType == "IMAGE"]
    references = [(item, item.ReferencedSOPSequence[0]) for item in items]
    return [item for item, to in references if "ReferencedFrameNumber" in to and "ReferencedSegmentNumber" in to]


def _evaluation(item: Evaluation) -> sr.QualitativeEvaluation:
    return sr.QualitativeEvaluation(name=coded(item.concept), value=coded(item.value))


def _source_images(finding: Finding, used: Sequence[Dataset]) -> list[sr.SourceImageForMeasurementGroup]:
    """The pictures a finding without a segment was seen in."""
    chosen = [header for header in used if str(header.SOPInstanceUID) in finding.source_instances and "Rows" in header]
    frames = list(finding.frames) or None
    return [
        sr.SourceImageForMeasurementGroup(
            header.SOPClassUID, header.SOPInstanceUID, frames if "NumberOfFrames" in header else None
        )
        for header in chosen
    ]


def _nothing_found(context: ResultContext) -> list[Group]:
    """One group that says absent, by code, of everything the algorithm looks for."""
    looked_for = [output for output in context.manifest.outputs if output.kind in ("segment", "evaluation", "finding")]
    concepts = [output.concept for output in looked_for] or [CLINICAL_FINDING]
    return [
        _group(
            context,
            Finding(tracking_id=f"absent-{number}", concept=concept, evaluations=(Evaluation(PRESENCE, ABSENT),)),
            {},
        )
        for number, concept in enumerate(concepts, start=1)
    ]


def _add_image_library(dataset: Dataset, used: Sequence[Dataset]) -> None:
    """TID 1600, one group per series, put before Imaging Measurements as TID 1500 orders its rows.

    After highdicom has made the report: it copies and searches the whole tree, which for long series takes longer than the rest.
    """
    series: dict[str, list[Dataset]] = defaultdict(list)
    for header in used:
        if "Rows" in header:
            series[str(header.SeriesInstanceUID)].append(header)
    contains = sr.RelationshipTypeValues.CONTAINS
    library = sr.ContainerContentItem(codes.DCM.ImageLibrary, template_id="1600", relationship_type=contains)
    library.ContentSequence = sr.ContentSequence([_library_group(headers) for headers in series.values()])
    content = dataset.ContentSequence
    content.insert(len(content) - 1, library)


def _library_group(headers: Sequence[Dataset]) -> sr.ContainerContentItem:
    contains, context = sr.RelationshipTypeValues.CONTAINS, sr.RelationshipTypeValues.HAS_ACQ_CONTEXT
    items: list[sr.ContentItem] = []
    modality = _modality_code(str(headers[0].get("Modality", "")))
    if modality:
        items.append(sr.CodeContentItem(codes.DCM.Modality, modality, relationship_type=context))
    if headers[0].get("FrameOfReferenceUID"):
        frame = headers[0].FrameOfReferenceUID
        items.append(sr.UIDRefContentItem(codes.DCM.FrameOfReferenceUID, frame, relationship_type=context))
    items += [
        sr.ImageContentItem(coded(SOURCE), header.SOPClassUID, header.SOPInstanceUID, relationship_type=contains)
        for header in headers
    ]
    group = sr.ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=contains)
    group.ContentSequence = sr.ContentSequence(items)
    return group


def _modality_code(modality: str) -> sr.CodedConcept | None:
    """The code of CID 29 for a Modality value: DCM uses the value itself."""
    for name in dir(codes.cid29):
        code = getattr(codes.cid29, name)
        if getattr(code, "value", None) == modality:
            return sr.CodedConcept.from_code(code)
    return None


def _verified(context: ResultContext) -> bool:
    return context.reviewed is not None and context.reviewed.decision in ("accepted", "corrected")


def _put_verification(dataset: Dataset, context: ResultContext) -> None:
    """VERIFIED with the observer and the time of the decision; UNVERIFIED until a clinician confirmed (PS3.3 C.17.2)."""
    if not _verified(context) or context.reviewed is None:
        return
    observer = Dataset()
    observer.VerifyingObserverName = PersonName(context.reviewed.name)
    observer.VerifyingOrganization = context.reviewed.organisation[:64]
    observer.VerificationDateTime = DT(context.reviewed.at.astimezone(context.zone))
    observer.VerifyingObserverIdentificationCodeSequence = []
    dataset.VerificationFlag = "VERIFIED"
    dataset.VerifyingObserverSequence = [observer]


def _put_predecessors(dataset: Dataset, context: ResultContext) -> None:
    by_series: dict[str, list[Dataset]] = defaultdict(list)
    for earlier in context.supersedes:
        item = Dataset()
        item.ReferencedSOPClassUID = earlier.sop_class_uid
        item.ReferencedSOPInstanceUID = earlier.sop_instance_uid
        by_series[earlier.series_instance_uid].append(item)
    if not by_series:
        return
    study = Dataset()
    study.StudyInstanceUID = context.identity.StudyInstanceUID
    study.ReferencedSeriesSequence = []
    for uid, items in by_series.items():
        series = Dataset()
        series.SeriesInstanceUID, series.ReferencedSOPSequence = uid, items
        study.ReferencedSeriesSequence.append(series)
    dataset.PredecessorDocumentsSequence = [study]

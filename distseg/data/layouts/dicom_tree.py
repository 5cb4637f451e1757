"""CT series with DICOM-SEG files that refer to them, in folders of any name, as TCIA lays them out (LIDC-IDRI and others)."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pydicom

from distseg.data.file_kinds import is_dicom, left_out_in_words, series_files
from distseg.data.label_names import Names, as_label, numbered
from distseg.data.layouts.source import CaseSource, MaskSource, Source, kept_apart, mask_of_label
from distseg.data.layouts.tree import Tree
from distseg.data.volume import parsing
from distseg.errors import DistsegError

RULE = "folders of CT series with DICOM-SEG files that refer to them"
# LIDC-IDRI names a segment "Nodule 1 - Annotation 55383": one reader's drawing of one finding.
READING = re.compile(r"(?P<finding>.+ \d+) - Annotation .+")
TAGS = ("Modality", "PatientID", "SeriesInstanceUID", "ReferencedSeriesSequence", "SegmentSequence")


@dataclass(frozen=True)
class Segment:
    name: str
    """as the file has it"""
    label: str
    finding: str
    """what its readers draw; the label where the file names none"""


@dataclass(frozen=True)
class SegFile:
    path: Path
    series: str
    """UID of the one it refers to"""
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Series:
    folder: Path
    patient: str


def fits(tree: Tree) -> bool:
    return any(header.get("Modality") == "SEG" for _, header in _headers(tree))


def read(tree: Tree, declared: Mapping[str, int] | None) -> Source:
    """A case a CT series that a segmentation refers to. Readers of one finding are parts of one mask.

    Raises:
        DistsegError: a segmentation of a series that is not there, or labels that no segment has.
    """
    series, segmentations, others = _sorted(tree)
    of_series: dict[str, list[SegFile]] = {}
    for one in segmentations:
        of_series.setdefault(one.series, []).append(one)
    if lost := sorted(of_series.keys() - series.keys()):
        raise DistsegError(
            f"mask: got {of_series[lost[0]][0].path}, which refers to series {lost[0]} ({len(lost)} so); that is not there; add it, or "
            "move the mask away"
        )
    found = {segment.label for one in segmentations for segment in one.segments}
    names = Names(declared, "from --labels") if declared else Names(numbered(found), "names of segments")
    if missing := sorted(names.labels.keys() - found - {"background"}):
        raise DistsegError(f"--labels: got {missing[0]}; segments are {', '.join(sorted(found))}; choose from them")
    annotated = {uid: series[uid] for uid in series if uid in of_series}
    scans = Counter(scan.patient for scan in annotated.values())
    cases, beside = [], list[Path]()
    for uid, scan in sorted(annotated.items(), key=lambda item: (item[1].patient, item[1].folder)):
        case_id = f"{scan.patient}_{scan.folder.name}" if scans[scan.patient] > 1 else scan.patient
        files, left = series_files(scan.folder)
        beside += left
        masks = _masks(of_series[uid], names.labels)
        masks = masks if declared else kept_apart(masks, names.labels)
        cases.append(CaseSource(case_id, scan.patient, files, tuple(masks)))
    left_out = (
        [f"{len(series) - len(annotated)} CT series without a segmentation"] if len(series) > len(annotated) else []
    )
    left_out += [f"{len(others)} folders of other modalities ({', '.join(sorted(set(others)))})"] if others else []
    if dropped := sorted(found - names.labels.keys()):
        left_out.append(f"segments that --labels does not name: {', '.join(dropped)}")
    plain = {*beside, *(name.path for name in tree.files if name.suffix != ".dcm" and not is_dicom(name.path))}
    left_out += filter(None, [left_out_in_words(sorted(plain), tree.root)])
    return Source(
        tree.root, "dicom-seg", names.labels, tuple(cases), told_by="DICOM PatientID", names_from=names.come_from,
        left_out=tuple(left_out),
    )  # fmt: skip


def _masks(files: list[SegFile], labels: Mapping[str, int]) -> tuple[MaskSource, ...]:
    """Of one segment a file: a mask a finding, of all its readers. Of several segments: a map a file."""
    findings: dict[tuple[str, str], list[Path]] = {}
    masks = []
    for one in files:
        if len(one.segments) > 1:
            masks.append(MaskSource((one.path,), {}, {s.name: labels.get(s.label, 0) for s in one.segments}))
        elif one.segments and one.segments[0].label in labels:
            findings.setdefault((one.segments[0].label, one.segments[0].finding), []).append(one.path)
    ordered = sorted(findings.items(), key=lambda item: (labels[item[0][0]], item[0]))
    return (*masks, *(mask_of_label(label, labels, sorted(paths)) for (label, _), paths in ordered))


def _sorted(tree: Tree) -> tuple[dict[str, Series], list[SegFile], list[str]]:
    """CT series by UID, segmentations, and the modalities of other folders."""
    series: dict[str, Series] = {}
    segmentations: list[SegFile] = []
    others: list[str] = []
    for path, header in _headers(tree):
        modality = str(header.get("Modality"))
        if modality == "SEG":
            segmentations += [_segmentation(file) for file in sorted(path.parent.iterdir()) if is_dicom(file)]
        elif modality == "CT":
            patient = str(header.get("PatientID") or "").strip() or path.parent.name
            series[str(header.SeriesInstanceUID)] = Series(path.parent, patient)
        else:
            others.append(modality)
    return series, segmentations, others


def _headers(tree: Tree) -> Iterator[tuple[Path, pydicom.Dataset]]:
    """The first DICOM file of each folder, and its header."""
    folders: set[Path] = set()
    for name in tree.files:
        if name.path.parent not in folders and is_dicom(name.path):
            folders.add(name.path.parent)
            with parsing("dicom", name.path):
                yield name.path, pydicom.dcmread(name.path, stop_before_pixels=True, specific_tags=list(TAGS))


def _segmentation(path: Path) -> SegFile:
    with parsing("mask", path):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        segments = tuple(map(_segment, header.get("SegmentSequence", ())))
        (referred, *_) = header.get("ReferencedSeriesSequence") or [pydicom.Dataset()]
        return SegFile(path, str(referred.get("SeriesInstanceUID", "none")), segments)


def _segment(one: pydicom.Dataset) -> Segment:
    text = str(one.SegmentLabel)
    if reading := READING.fullmatch(text):
        (kind, *_) = one.SegmentedPropertyTypeCodeSequence
        return Segment(as_label(text), as_label(str(kind.CodeMeaning)), reading["finding"])
    return Segment(as_label(text), as_label(text), as_label(text))

"""What a source holds, whatever its layout: which files are a volume, which its masks, which patient it is of."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from distseg.config import IGNORED_LABEL
from distseg.data.dicom import read_patient_id
from distseg.data.file_kinds import is_picture, is_volume, number_of_picture, series_files
from distseg.data.label_names import KNOWN, as_label
from distseg.errors import DistsegError

SPLITS = ("train", "val", "test")
BY_NAME = "the case's name"  # nobody said which cases are of one patient
BY_FILE = "what stands before the number of a picture"
OF_THE_SET = "as the set describes them"


@dataclass(frozen=True)
class MaskSource:
    files: tuple[Path, ...]
    """files of whole masks or DICOM-SEG files, several of which are parts or readers; or pictures in the order of the volume's"""
    label_of_value: Mapping[int, int]
    """value 0 is always background"""
    label_of_segment: Mapping[str, int]
    """the same for segments, by their names; "*": any"""
    apart_from: Mapping[int, str] = field(default_factory=dict)
    """labels that it may not overlap, since nobody has said which lies over which"""
    name: str = ""
    """of its label, as the folder or file has it; "": it is a map of several"""


@dataclass(frozen=True)
class CaseSource:
    id: str
    patient: str
    files: tuple[Path, ...]
    """one file of the whole volume, its slices as pictures from the lowest up, or the DICOM files of a series"""
    masks: tuple[MaskSource, ...]
    slice_index: int | None = None
    """only this slice of a stack whose slices are of different patients"""
    is_annotated: bool = True
    """False: nobody has looked for anything; its pixels count nowhere"""


@dataclass(frozen=True)
class Source:
    """All that a folder or CSV holds."""

    root: Path
    layout: str
    labels: Mapping[str, int]
    cases: tuple[CaseSource, ...]
    split_of_patient: Mapping[str, str] = field(default_factory=dict)
    """train, val or test where the source says so"""
    fold_of_patient: Mapping[str, int] = field(default_factory=dict)
    """in which a patient validates, where the source says so"""
    splits_from: str = ""
    """what says either"""
    notes: tuple[str, ...] = ()
    """what a user should know"""
    told_by: str = BY_NAME
    """what patients are told apart by"""
    names_from: str = OF_THE_SET
    """where the labels' names come from"""
    left_out: tuple[str, ...] = ()
    """what was seen and not taken, in words"""
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """unions of labels that the source names; none: a region a label"""


def patient_of(case_id: str) -> str:
    """`radiopaedia_<case>_...` are series of one patient; any other case is a patient of its own."""
    match = re.match(r"radiopaedia_\d+", case_id)
    return match.group() if match else case_id


def patient_of_files(case_id: str, files: Sequence[Path]) -> tuple[str, str]:
    """A case's patient, and what says so."""
    if not is_volume(files[0]) and not is_picture(files[0]) and (patient := read_patient_id(files[0])):
        return patient, "DICOM PatientID"
    if len(files) == 1 and is_picture(files[0]) and (match := re.fullmatch(r"(.+?)[-_. ]\d+", case_id)):
        return match[1], BY_FILE  # p1-0001: slices of one patient stay together
    return patient_of(case_id), BY_NAME


def relative_name(files: Sequence[Path], root: Path) -> str:
    """How store.json names the files of a volume or a mask: the file, or the folder and the first of its files."""
    name = os.path.relpath(files[0], root)
    return name if len(files) == 1 else f"{name} and {len(files) - 1} more"


def ignoring(source: Source, value: int) -> Source:
    """The source whose label maps may hold a value that counts in no loss and in no score."""

    def with_ignored(mask: MaskSource) -> MaskSource:
        is_map = "*" not in mask.label_of_segment
        return replace(mask, label_of_value={**mask.label_of_value, value: IGNORED_LABEL}) if is_map else mask

    cases = (replace(case, masks=tuple(map(with_ignored, case.masks))) for case in source.cases)
    return replace(source, cases=tuple(cases))


# Masks


def mask_of_label(name: str, labels: Mapping[str, int], files: Iterable[Path]) -> MaskSource:
    """A mask of one label: 0 and 1, or 0 and 255; left and right lung may be 1 and 2."""
    label = labels[as_label(name)]
    label_of_value = {1: label, 255: label} | ({2: label} if as_label(name) == "lung" else {})
    return MaskSource(tuple(files), label_of_value, {"*": label}, name=name)


def label_map(labels: Mapping[str, int], files: Iterable[Path]) -> MaskSource:
    """A mask of all labels by their numbers, or by the names of segments; pictures of one label may be 0 and 255."""
    files = tuple(files)
    numbers = {number: number for number in labels.values() if number}
    if len(numbers) == 1 and is_picture(files[0]):
        numbers |= {255: next(iter(numbers))}
    return MaskSource(files, numbers, {name: number for name, number in labels.items() if number})


def kept_apart(masks: Sequence[MaskSource], labels: Mapping[str, int]) -> tuple[MaskSource, ...]:
    """Masks of one label each that may not overlap, where nobody has said which lies over which; distseg knows it of some."""
    before: dict[int, str] = {}
    apart = []
    for mask in masks:
        if not mask.name:
            apart.append(mask)
            continue
        label = as_label(mask.name)
        apart.append(mask if label in KNOWN else replace(mask, apart_from=dict(before)))
        if label != "lung":  # all else lies in the lung
            before[labels[label]] = label
    return tuple(apart)


# Files of cases


def by_case(volumes: Iterable[tuple[str, tuple[Path, ...]]]) -> dict[str, tuple[Path, ...]]:
    """Files of each case; refuses two volumes of one name (x.nii beside x.nii.gz), of which one would be lost."""
    cases: dict[str, tuple[Path, ...]] = {}
    for name, files in volumes:
        case_id = unicodedata.normalize("NFC", name)  # a Mac writes ü as two characters
        if (other := cases.setdefault(case_id, files)) is not files:
            raise DistsegError(
                f"case: got {case_id} twice ({other[0]} and {files[0]}); ids are unique; rename one, or move it away"
            )
    return cases


def files_of_folder(folder: Path, left_out: list[Path]) -> tuple[Path, ...]:
    """Pictures in the order of their numbers, or a DICOM series; `left_out` gets what lies beside either."""
    pictures = tuple(sorted((path for path in folder.iterdir() if is_picture(path)), key=number_of_picture))
    files, beside = series_files(folder)
    if files or not pictures:
        left_out += beside if files else ()
        return files
    left_out += [path for path in beside if path not in pictures]
    return pictures


def in_order_of(images: Sequence[Path], masks: Sequence[Path]) -> tuple[Path, ...]:
    """Masks as pictures in the order of the image files, by stem; masks in one file are as they are."""
    if not is_picture(masks[0]) or len(images) == len(masks) == 1:
        return tuple(masks)
    by_stem = {unicodedata.normalize("NFC", path.stem): path for path in masks}
    stems = {unicodedata.normalize("NFC", path.stem): path for path in images}
    if missing := [path for stem, path in stems.items() if stem not in by_stem]:
        raise DistsegError(
            f"mask: got none for slice {missing[0]} ({len(missing)} without); {masks[0].parent} must hold "
            f"{missing[0].stem}{masks[0].suffix}; add the mask or move the slice away"
        )
    if orphans := sorted(by_stem.keys() - stems.keys()):
        raise DistsegError(
            f"mask: got {by_stem[orphans[0]]} without a slice ({len(orphans)} so); every mask needs a slice of the same "
            "name; add the slice or move the mask away"
        )
    return tuple(by_stem[stem] for stem in stems)


def check_images(images: Mapping[str, Sequence[Path]], masks: Mapping[str, Sequence[Path]]) -> None:
    """Refuses a mask without a volume."""
    if orphans := sorted(masks.keys() - images.keys()):
        raise DistsegError(
            f"mask: got {masks[orphans[0]][0]} without a volume ({len(orphans)} so); every mask needs a volume of the "
            "same name; add the volume or move the mask away"
        )


def check_pairs(folder: Path, images: Mapping[str, Sequence[Path]], masks: Mapping[str, Sequence[Path]]) -> None:
    """Refuses a volume without a mask too."""
    if missing := sorted(images.keys() - masks.keys()):
        raise DistsegError(
            f"mask: got none for volume {images[missing[0]][0]} ({len(missing)} without); every volume needs "
            f"{folder}/{missing[0]}...; add the mask or move the volume away"
        )
    check_images(images, masks)

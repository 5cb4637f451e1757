"""Which layout a source has, and what is checked of any: `find_source` is the door to all of them."""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from distseg.config import IGNORED_LABEL
from distseg.data.file_kinds import is_picture
from distseg.data.layouts import cases_csv, dicom_tree, medseg, nnunet, paired
from distseg.data.layouts.source import BY_NAME, CaseSource, Source, ignoring
from distseg.data.layouts.templates import TEMPLATES, read_set, read_template
from distseg.data.layouts.tree import Tree
from distseg.errors import DistsegError

LONGEST_ID = 240  # bytes; a digest stands behind it, and file systems take 255
WITH_MAPS = ("paired", "csv", "nnunet", "decathlon", "template")  # have label maps of one's own
MOST_LOOKED_INTO = 50  # folders of a source that has no layout itself


@dataclass(frozen=True)
class Layout:
    fits: Callable[[Tree], bool]
    read: Callable[[Tree, Mapping[str, int] | None], Source]
    rule: str
    """what a source must hold"""


LAYOUTS: Mapping[str, Layout] = {
    "nnunet": Layout(nnunet.fits_v2, nnunet.read, nnunet.RULE),
    "decathlon": Layout(nnunet.fits_listed, nnunet.read, nnunet.RULE_LISTED),
    **{name: Layout(t.fits, functools.partial(read_set, name), t.rule()) for name, t in TEMPLATES.items()},
    "medseg": Layout(medseg.fits, medseg.read, medseg.RULE),
    "paired": Layout(paired.fits, paired.read, paired.RULE),
    "csv": Layout(cases_csv.fits, cases_csv.read, cases_csv.RULE),
}
# Known by headers of files, which is slow: tried where no names fit.
BY_HEADER: Mapping[str, Layout] = {"dicom-seg": Layout(dicom_tree.fits, dicom_tree.read, dicom_tree.RULE)}


@dataclass(frozen=True)
class Asked:
    """What a user says of a source."""

    layout: str = "auto"
    """one of `LAYOUTS` or `BY_HEADER`, or whichever it looks like"""
    images: str | None = None
    """a pattern of the volumes' paths, in place of a layout; `masks` too"""
    masks: str | None = None
    labels: Mapping[str, int] | None = None
    """names and numbers of labels, background too; None: those of the data"""
    ignore: int | None = None
    """value of label maps that says "not annotated"; None: there is none, or dataset.json says it"""
    patients: str | None = None
    """regular expression on a case's name, or else its file's path, whose first group (or whole match) is the patient"""


def find_source(src: Path, asked: Asked = Asked()) -> Source:
    """The annotated volumes of a folder (or CSV file), sorted by name.

    Raises:
        DistsegError: no such source, no known layout or several, a volume without a mask or a mask without a volume.
    """
    if not src.exists():
        raise DistsegError(f"source: got {src}; no such folder; check the path")
    tree = Tree(src)
    if asked.images is not None and asked.masks is not None:
        source = read_template(tree, asked.images, asked.masks, asked.labels)
    elif asked.images is not None or asked.masks is not None:
        raise DistsegError("--images: got one of --images and --masks; both say where the files are; give both")
    else:
        source = _layout(tree, asked.layout).read(tree, asked.labels)
    _check_labels(source)
    _check_ids(source)
    if asked.patients is not None:
        source = _with_patients(source, asked.patients)
    _check_patients(source)
    return source if asked.ignore is None else _ignoring(source, asked.ignore)


def source_in_words(source: Source, each_patient_has: str = "") -> str:
    """One line: what was taken for what."""
    labels = ", ".join(f"{name}={number}" for name, number in source.labels.items() if number)
    n_patients = len({case.patient for case in source.cases})
    parts = [
        f"layout {source.layout}: {len(source.cases)} volumes with masks",
        f"labels: {labels} ({source.names_from})",
        f"patients: {n_patients}, told apart by {source.told_by}{each_patient_has and f'; each has {each_patient_has}'}",
        f"splits: {_splits_in_words(source)}",
        *(f"left out: {what.removeprefix('left out: ')}" for what in source.left_out),
    ]
    return "; ".join(parts)


def _splits_in_words(source: Source) -> str:
    folds = set(source.fold_of_patient.values())
    named = list(source.split_of_patient.values())
    counts = [f"{n} {split}" for split in ("train", "val", "test") if (n := named.count(split))]
    said = [f"{len(folds)} folds"] if folds else []
    if not said and not counts:
        return "none named, folds are made"
    return f"{', '.join(said + (counts if 'val' in named or 'test' in named else []))} ({source.splits_from})"


def _layout(tree: Tree, name: str) -> Layout:
    """The layout of that name, or the only one that fits."""
    every = {**LAYOUTS, **BY_HEADER}
    if name != "auto":
        if not every[name].fits(tree):
            raise DistsegError(f"source: got {tree.root}, declared {name}; it must hold {every[name].rule}")
        return every[name]
    fitting = _fitting(tree)
    if len(fitting) == 1:
        return every[fitting[0]]
    if fitting:
        raise DistsegError(f"source: got {tree.root} that fits {' and '.join(fitting)}; choose one with --layout")
    raise DistsegError(
        f"source: got {tree.root} of no known layout ({', '.join(every)}); seen: {', '.join(tree.shapes()) or 'no file'}"
        f"{_inside(tree)}; say where the files are, such as distseg prepare {tree.root} STORE --images 'Train/{{case}}_ct.nii.gz' "
        "--masks 'Train/{case}_seg.nii.gz', see docs/layouts.md"
    )


def _fitting(tree: Tree) -> list[str]:
    by_name = [name for name, layout in LAYOUTS.items() if layout.fits(tree)]
    return by_name or [name for name, layout in BY_HEADER.items() if layout.fits(tree)]


def _inside(tree: Tree) -> str:
    """Folders of the source that have a layout, which may be what was meant."""
    folders = [name.path for name in tree.folders if name.stem.count("/") < 2][:MOST_LOOKED_INTO]
    for inner in map(Tree, folders):
        for name, layout in LAYOUTS.items():
            if layout.fits(inner):
                return f"; {inner.root} fits {name}, give that"
    return ""


def _with_patients(source: Source, pattern: str) -> Source:
    """The source with each case's patient as a regular expression finds it in the case's name, or else in its file's path."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DistsegError(f"--patients: got {pattern}; not a regular expression ({error}); correct it") from None
    if source.split_of_patient or source.fold_of_patient:
        raise DistsegError(
            f"--patients: got {pattern}; {source.splits_from} of {source.root} names splits of patients; leave it out, or move that away"
        )
    found = {
        case.id: expression.search(case.id) or expression.search(os.path.relpath(case.files[0], source.root))
        for case in source.cases
    }
    if missing := [name for name, match in found.items() if not match or not match[min(1, expression.groups)]]:
        raise DistsegError(
            f"--patients: got {pattern}, which finds no patient in the name or path of case {missing[0]} ({len(missing)} so); each case has one; correct it"
        )
    cases = tuple(replace(case, patient=found[case.id][min(1, expression.groups)]) for case in source.cases)  # type: ignore[index]
    return replace(source, cases=cases, told_by=f"--patients {pattern}")


def _check_patients(source: Source) -> None:
    """Refuses two spellings of one patient, who would train and validate at once."""
    seen: dict[str, str] = {}
    for case in source.cases:
        key = " ".join(case.patient.split()).casefold()
        if (other := seen.setdefault(key, case.patient)) != case.patient:
            raise DistsegError(
                f"patients: got {other!r} and {case.patient!r}, one patient in two spellings; folds would part them; write them alike, "
                "or tell patients apart with --patients 'REGEX'"
            )


def notes_on_source(source: Source) -> Iterator[str]:
    """What a user should know of it."""
    yield from source.notes
    alone = [
        case for case in source.cases if case.patient == case.id and len(case.files) == 1 and is_picture(case.files[0])
    ]
    if alone and BY_NAME in source.told_by:
        yield (
            f"{len(alone)} pictures count as a patient each, so slices of one patient may lie on both sides of a split; tell patients "
            "apart with --patients 'REGEX'"
        )


def _ignoring(source: Source, value: int) -> Source:
    if source.layout not in WITH_MAPS:
        raise DistsegError(f"--ignore: got {value}; layout {source.layout} has no label maps of your own; leave it out")
    if value in source.labels.values():
        raise DistsegError(f"--ignore: got {value}; {value} is the number of a label; choose another value")
    return ignoring(source, value)


def _check_labels(source: Source) -> None:
    if wrong := [name for name, number in source.labels.items() if not 0 <= number < IGNORED_LABEL]:
        raise DistsegError(
            f"labels: got {wrong[0]}={source.labels[wrong[0]]} ({source.names_from}); numbers go from 1 to {IGNORED_LABEL - 1}; change it there"
        )


def _check_ids(source: Source) -> None:
    seen: dict[str, CaseSource] = {}
    for case in source.cases:
        length = len(os.fsencode(case.id))
        if not re.fullmatch(r"[^/\0]+", case.id) or case.id.startswith(".") or length > LONGEST_ID:
            raise DistsegError(
                f"case: got id {case.id!r} ({case.files[0]}), {length} bytes long; it must do as a folder's name, at most {LONGEST_ID} "
                "bytes; rename it"
            )
        if case.id in seen:
            raise DistsegError(
                f"case: got {case.id} twice ({seen[case.id].files[0]} and {case.files[0]}); ids are unique; rename one"
            )
        seen[case.id] = case

"""Sets with a dataset.json: nnU-Net v2 and v1, the Medical Segmentation Decathlon, AMOS."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distseg.data.file_kinds import left_out_in_words
from distseg.data.label_names import DATASET, Names, names_in_dataset
from distseg.data.layouts.source import (
    CaseSource,
    Source,
    by_case,
    check_pairs,
    ignoring,
    label_map,
    patient_of_files,
)
from distseg.data.layouts.tree import Tree, parted
from distseg.errors import DistsegError

SPLITS = "splits_final.json"
PREPROCESSED = "nnUNet_preprocessed"  # a folder beside nnUNet_raw, and the variable that names it
RULE = f"{DATASET} with imagesTr/ and labelsTr/, as nnU-Net v2 has it"
RULE_LISTED = f"{DATASET} with the list training, as the Decathlon, AMOS and nnU-Net v1 have it"

Pairs = dict[str, tuple[Path, Path]]  # image and label map of each case


def fits_v2(tree: Tree) -> bool:
    described = _described(tree.root)
    return "training" not in described and (
        "dataset" in described or (tree.root / "labelsTr").is_dir() and bool(described)
    )


def fits_listed(tree: Tree) -> bool:
    return "training" in _described(tree.root)


def read(tree: Tree, declared: Mapping[str, int] | None) -> Source:
    """The training cases, with the folds that somebody has made of them.

    Raises:
        DistsegError: several channels, a file that is not there, or folds that part a patient.
    """
    src, described = tree.root, _described(tree.root)
    _check_channels(described, src)
    names = names_in_dataset(src / DATASET)
    if declared is not None or names is None:
        names = Names(declared or {}, "from --labels")
    pairs, split_of_case = _pairs(src, described)
    cases, told = [], set()
    for case_id, (image, mask) in sorted(pairs.items()):
        patient, how = patient_of_files(case_id, (image,))
        told.add(how)
        cases.append(CaseSource(case_id, patient, (image,), (label_map(names.labels, (mask,)),)))
    patient_of_case = {case.id: case.patient for case in cases}
    folds, splits_from, notes = _folds(src, patient_of_case)
    if (count := described.get("numTraining")) not in (None, len(cases)):
        notes.append(f"{DATASET} says numTraining {count}; {len(cases)} cases are there")
    source = Source(
        src, "nnunet" if "training" not in described else "decathlon", names.labels, tuple(cases),
        {patient_of_case[case]: split for case, split in split_of_case.items()} if "val" in split_of_case.values() else {},
        folds, splits_from=splits_from or f"{DATASET}", notes=tuple(notes), told_by=" and ".join(sorted(told)),
        names_from=names.come_from, left_out=tuple(_left_out(tree, pairs)), regions=names.regions,
    )  # fmt: skip
    return source if names.ignore is None else ignoring(source, names.ignore)


def _described(src: Path) -> dict[str, Any]:
    """What dataset.json says; nothing where there is none that can be read, which `names_in_dataset` tells of."""
    try:
        described = json.loads((src / DATASET).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def _check_channels(described: Mapping[str, Any], src: Path) -> None:
    channels = described.get("channel_names") or described.get("modality") or {}
    if len(channels) > 1:
        raise DistsegError(
            f"{src / DATASET}: got channels {', '.join(map(str, channels.values()))}; one is trained on; choose it, such as distseg prepare {src} "
            "STORE --images 'imagesTr/{case}_0000"
            + _ending(described)
            + "' --masks 'labelsTr/{case}"
            + _ending(described)
            + "'"
        )


def _ending(described: Mapping[str, Any]) -> str:
    return str(described.get("file_ending", ".nii.gz"))


def _pairs(src: Path, described: Mapping[str, Any]) -> tuple[Pairs, dict[str, str]]:
    """Image and mask of each case, and the split of each where lists name it."""
    if "training" in described:
        return _listed(src, described)
    if isinstance(described.get("dataset"), dict):
        listed = {case: (one["images"][0], one["label"]) for case, one in described["dataset"].items()}
        return {case: (_there(src, image), _there(src, mask)) for case, (image, mask) in listed.items()}, {}
    ending = _ending(described)
    images = _named(src / "imagesTr", f"_0000{ending}")
    masks = _named(src / "labelsTr", ending)
    check_pairs(src / "labelsTr", images, masks)
    return {case: (images[case][0], masks[case][0]) for case in masks}, {}


def _listed(src: Path, described: Mapping[str, Any]) -> tuple[Pairs, dict[str, str]]:
    pairs: list[tuple[str, tuple[Path, ...]]] = []
    split_of_case: dict[str, str] = {}
    for key, split in (("training", "train"), ("validation", "val")):
        for one in described.get(key) or ():
            if not isinstance(one, dict) or "label" not in one:
                continue
            image, mask = _there(src, one["image"]), _there(src, one["label"])
            case = parted(mask.name)[0]
            pairs.append((case, (image, mask)))
            split_of_case[case] = split
    return {case: (files[0], files[1]) for case, files in by_case(pairs).items()}, split_of_case


def _there(src: Path, name: object) -> Path:
    """A file that dataset.json names; v1 leaves the channel out of the names of images."""
    path = src / os.path.expandvars(str(name))
    stem, suffix = parted(path.name)
    for candidate in (path, path.with_name(f"{stem}_0000{suffix}")):
        if candidate.is_file():
            return candidate
    raise DistsegError(f"{src / DATASET}: got {name}; no such file; mend the path, or remove the case")


def _named(folder: Path, ending: str) -> dict[str, tuple[Path, ...]]:
    if not folder.is_dir():
        raise DistsegError(
            f"source: got {folder.parent} without {folder.name}/; {RULE}; add it, or say --images and --masks"
        )
    paths = [path for path in sorted(folder.iterdir()) if path.name.endswith(ending) and not path.name.startswith(".")]
    return by_case((path.name[: -len(ending)], (path,)) for path in paths)


def _folds(src: Path, patient_of_case: Mapping[str, str]) -> tuple[dict[str, int], str, list[str]]:
    """The fold that each patient validates in, by splits_final.json; which file that is; and why it was not taken."""
    preprocessed = [src.parent.parent / PREPROCESSED, *map(Path, filter(None, [os.environ.get(PREPROCESSED)]))]
    path = next(
        (p for p in (src / SPLITS, *(folder / src.name / SPLITS for folder in preprocessed)) if p.is_file()), None
    )
    if path is None:
        return {}, "", []
    try:
        folds: list[Sequence[str]] = [fold["val"] for fold in json.loads(path.read_text(encoding="utf-8-sig"))]
    except (ValueError, KeyError, TypeError) as error:
        raise DistsegError(
            f"{path}: got no readable folds ({error!r}); it is a list of train and val; mend it, or move it away"
        ) from None
    named = [case for fold in folds for case in fold]
    if sorted(named) != sorted(patient_of_case):
        return (
            {},
            "",
            [
                f"{path} is not taken: a fold of distseg validates each case once, and these are not so; folds are made anew"
            ],
        )
    fold_of: dict[str, int] = {}
    for number, fold in enumerate(folds):
        for case in fold:
            if fold_of.setdefault(patient_of_case[case], number) != number:
                raise DistsegError(
                    f"{path}: got patient {patient_of_case[case]} in fold {fold_of[patient_of_case[case]]} and {number}; a patient "
                    "belongs to one; move the file away for folds of patients"
                )
    return fold_of, path.name, []


def _left_out(tree: Tree, pairs: Pairs) -> list[str]:
    """Volumes without annotation by their folder, counted; other files by name."""
    used = {path for pair in pairs.values() for path in pair}
    described = {tree.root / DATASET, tree.root / SPLITS}
    rest = [name.path for name in tree.files if name.path not in used | described]
    in_folders: dict[str, int] = {}
    for path in rest:
        folder = path.relative_to(tree.root).parts[0]
        if folder.endswith(("Ts", "Va")):
            in_folders[folder] = in_folders.get(folder, 0) + 1
    named = [path for path in rest if path.relative_to(tree.root).parts[0] not in in_folders]
    counted = [f"{folder}/ ({n} file{'s' if n > 1 else ''})" for folder, n in in_folders.items()]
    return [*counted, *filter(None, [left_out_in_words(named, tree.root)])]

"""A folder of images beside one folder a label, or beside a folder of label maps: volumes, pictures of slices or DICOM series."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from distseg.data.file_kinds import is_dicom, is_picture, is_volume, left_out_in_words, number_of_picture
from distseg.data.label_names import DATASET, Names, as_label, names_of_maps, numbered
from distseg.data.layouts.source import (
    CaseSource,
    Source,
    by_case,
    check_pairs,
    files_of_folder,
    ignoring,
    in_order_of,
    kept_apart,
    label_map,
    mask_of_label,
    patient_of_files,
)
from distseg.data.layouts.tree import STORE_JSON, Tree, parted
from distseg.errors import DistsegError

IMAGES = ("images", "image", "imgs", "img")
MAPS = ("labels", "label")  # hold label maps
MASKS = ("masks", "mask")  # hold label maps, or masks of one label that has no other name
# What tools put behind the names of images and masks of one case.
IMAGE_ENDINGS = ("_0000", "_ct", "_image", "_img")
MASK_ENDINGS = ("_mask", "_seg", "_label", "_segmentation", "_gt")
RULE = f"images/ with a folder a label, or {MAPS[0]}/ or {MASKS[0]}/"

Files = dict[str, tuple[Path, ...]]


def fits(tree: Tree) -> bool:
    return _images(tree.root) is not None


def _images(src: Path) -> Path | None:
    return next((src / name for name in IMAGES if (src / name).is_dir()), None)


def read(tree: Tree, declared: Mapping[str, int] | None) -> Source:
    """Pairs of equal names.

    Raises:
        DistsegError: a volume without a mask, a mask without a volume, or masks that nothing names.
    """
    src, left_out = tree.root, list[Path]()
    of_images = _images(src) or src / IMAGES[0]
    images = _cases_in(of_images, left_out, IMAGE_ENDINGS)
    if not images:
        raise DistsegError(
            f"source: got {of_images} without a volume; it must hold files of volumes, pictures of slices "
            "<case>_<number>.png, or a folder a case of pictures or of DICOM files"
            + (f"; {left_out_in_words(left_out, src)}" if left_out else "")
        )
    folders = [path for path in sorted(src.iterdir()) if path.is_dir() and _is_of_masks(path, of_images)]
    if not folders:
        raise DistsegError(
            f"source: got {src} without masks; it must hold a folder a label, such as lung/, or {MAPS[0]}/"
        )
    found = {path.name: _cases_in(path, left_out, MASK_ENDINGS) for path in folders}
    for name, of_cases in found.items():
        check_pairs(src / name, images, of_cases)
    of_maps = [name for name in found if name in MAPS or name in MASKS and _are_maps(src, found[name], name, declared)]
    own = [name for name in found if name not in of_maps]
    names = _names(src, found, of_maps, own, declared)
    for name in own:
        if as_label(name) not in names.labels:
            raise DistsegError(
                f"label folder: got {src / name}; labels are {dict(names.labels)}; rename it, or name it with --labels"
            )
    own.sort(key=lambda name: names.labels[as_label(name)])
    cases, told = [], set()
    for case_id, files in images.items():
        masks = [label_map(names.labels, in_order_of(files, found[name][case_id])) for name in of_maps]
        of_labels = [mask_of_label(name, names.labels, in_order_of(files, found[name][case_id])) for name in own]
        masks += of_labels if declared is not None else kept_apart(of_labels, names.labels)
        patient, how = patient_of_files(case_id, files)
        told.add(how)
        cases.append(CaseSource(case_id, patient, files, tuple(masks)))
    held = names.labels if of_maps else {n: v for n, v in names.labels.items() if n in map(as_label, own) or v == 0}
    source = Source(
        src, "paired", held, tuple(cases), told_by=" and ".join(sorted(told)), names_from=names.come_from, regions=names.regions,
        left_out=tuple(filter(None, [left_out_in_words(left_out, src)])),
    )  # fmt: skip
    return source if names.ignore is None else ignoring(source, names.ignore)


def _is_of_masks(path: Path, of_images: Path) -> bool:
    return path != of_images and path.name[0] != "." and not (path / STORE_JSON).is_file()


def _are_maps(src: Path, files: Files, name: str, declared: Mapping[str, int] | None) -> bool:
    """Whether a folder called `masks` holds label maps: somebody names their values, or they are segmentations with names."""
    if declared is not None:
        return as_label(name) not in declared
    path = next(iter(files.values()))[0]
    return (src / DATASET).is_file() or not (is_volume(path) or is_picture(path))


def _names(
    src: Path,
    found: Mapping[str, Files],
    of_maps: Sequence[str],
    own: Sequence[str],
    declared: Mapping[str, int] | None,
) -> Names:
    if declared is not None:
        return Names(declared, "from --labels")
    if not of_maps:
        return Names(numbered(map(as_label, own)), "names of folders")
    return names_of_maps(src, [path for name in of_maps for files in found[name].values() for path in files], own)


def _cases_in(folder: Path, left_out: list[Path], endings: Sequence[str]) -> Files:
    """The files of each case of a folder: one file, the pictures in the order of their numbers, or a DICOM series.

    Args:
        folder: to look into.
        left_out: gets what is none of these.
        endings: one of them is no part of the cases' names where all have it.
    """
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    stems = {path: path.name if path.is_dir() else parted(path.name)[0] for path in paths}
    files = [path for path in paths if path.is_file() and (is_volume(path) or is_picture(path))]
    ending = next((e for e in endings if files and all(stems[path].lower().endswith(e) for path in files)), "")
    volumes: list[tuple[str, tuple[Path, ...]]] = []
    slices: dict[str, list[Path]] = {}
    for path, stem in stems.items():
        name = stem[: len(stem) - len(ending)] if path in files else stem
        if path.is_dir() and (inside := files_of_folder(path, left_out)):
            volumes.append((name, inside))
        elif is_volume(path):
            volumes.append((name, (path,)))
        elif is_picture(path):
            slices.setdefault(re.sub(r"_\d+$", "", name), []).append(path)
        elif is_dicom(path):
            volumes.append((name, (path,)))
        else:
            left_out.append(path)
    volumes += [(case_id, tuple(sorted(files, key=number_of_picture))) for case_id, files in slices.items()]
    return by_case(volumes)

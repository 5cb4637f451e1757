"""A case's files, whatever their format, into one volume and one label map on the same grid."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from distseg.config import IGNORED_LABEL
from distseg.data.dicom import axial_order, on_grid, read_segmentation
from distseg.data.file_kinds import is_dicom, is_picture, is_segmentation, is_volume
from distseg.data.layouts.source import CaseSource, MaskSource
from distseg.data.nrrd import read_segments, segment_names
from distseg.data.volume import GRID_TOLERANCE, Volume
from distseg.data.volume_files import read_label_map, read_volume
from distseg.errors import DistsegError

Readers = Literal["union", "majority", "first"]


def read_image(source: CaseSource) -> Volume:
    """The volume of a case, in its own intensities.

    Raises:
        DistsegError: see the readers.
    """
    if source.slice_index is not None:
        return _one_slice(_read_stack(source.files[0]), source.slice_index)
    return read_volume(source.files)


def read_labels(source: CaseSource, volume: Volume, readers: Readers = "union") -> np.ndarray:
    """One uint8 label map [Z, Y, X] from masks in order, later ones over earlier ones.

    Args:
        source: of the case; one that nobody annotated is `IGNORED_LABEL` everywhere.
        volume: its image.
        readers: what several files of one mask become: all that any has, what more than half of them have, or the first.

    Raises:
        DistsegError: a mask's shape or grid is not the volume's, it holds a value that is not declared, or it overlaps another one
            and nobody has said which lies over which.
    """
    label_ZYX = np.zeros(volume.values_ZYX.shape, np.uint8)
    if not source.is_annotated:
        label_ZYX[:] = IGNORED_LABEL
    for mask in source.masks:
        parts = [replace(mask, files=files) for files in _parts(mask)]
        own_ZYX = _combined([_labels_of(part, source, volume) for part in parts], readers)
        if overlapped := set(np.unique(label_ZYX[own_ZYX > 0]).tolist()) & mask.apart_from.keys():
            other, own = mask.apart_from[min(overlapped)], mask.name
            raise DistsegError(
                f"mask {mask.files[0]}: overlaps label {other}; which of {other} and {own} lies over the other is not guessed; number them, "
                f"higher ones win, such as --labels {other}=1,{own}=2"
            )
        label_ZYX[own_ZYX > 0] = own_ZYX[own_ZYX > 0]
    return label_ZYX


def _parts(mask: MaskSource) -> list[tuple[Path, ...]]:
    """The files of each reader, or each part, of a mask; PNG slices are one."""
    return [mask.files] if is_picture(mask.files[0]) else [(path,) for path in mask.files]


def _combined(parts: Sequence[np.ndarray], readers: Readers) -> np.ndarray:
    """One label map from those of several files; where labels overlap, the higher number is kept."""
    if readers == "first" or len(parts) == 1:
        return parts[0]
    if readers == "union":
        return np.maximum.reduce(parts)
    label_ZYX = np.zeros_like(parts[0])
    for label in np.unique(parts):
        label_ZYX[2 * np.sum([part == label for part in parts], axis=0) > len(parts)] = label
    return label_ZYX


def _labels_of(mask: MaskSource, source: CaseSource, volume: Volume) -> np.ndarray:
    """Labels on the volume's grid, uint8 [Z, Y, X]."""
    values_ZYX, label_of_value = _read_mask(mask, source, volume)
    declared = {0, *label_of_value}
    if unknown := sorted(set(np.unique(values_ZYX).tolist()) - declared):
        raise DistsegError(
            f"mask {mask.files[0]}: got value {unknown[0]}; declared are {sorted(declared)}; remove or remap the value"
        )
    label_ZYX = np.zeros(values_ZYX.shape, np.uint8)
    for value, label in label_of_value.items():
        label_ZYX[values_ZYX == value] = label
    return label_ZYX


def _read_mask(mask: MaskSource, source: CaseSource, volume: Volume) -> tuple[np.ndarray, dict[int, int]]:
    """Values on the volume's grid, and what they stand for."""
    path = mask.files[0]
    if not is_volume(path) and not is_picture(path):
        labels = mask.label_of_segment
        segmentation, names = read_segmentation(path, lambda name: labels.get(name, labels.get("*", 0)))
        return on_grid(segmentation, volume), _label_of_segment(mask, names)
    if is_segmentation(path) and (names := segment_names(path)):
        label_of_segment = _label_of_segment(mask, names)
        return on_grid(read_segments(path, label_of_segment), volume), {n: n for n in label_of_segment.values()}
    if source.slice_index is not None:
        read = _one_slice(_read_mask_stack(path), source.slice_index)
    elif is_picture(path) and is_dicom(source.files[0]):
        mask_of_stem = {file.stem: file for file in mask.files}
        read = read_label_map([mask_of_stem[file.stem] for file in axial_order(source.files)])
    else:
        read = read_label_map(mask.files)
    _check_grid(path, read, volume)
    return read.values_ZYX, dict(mask.label_of_value)


@functools.lru_cache(maxsize=1)  # its slices are asked for one after the other
def _read_stack(path: Path) -> Volume:
    return read_volume([path])


@functools.lru_cache(maxsize=2)  # lungs and findings
def _read_mask_stack(path: Path) -> Volume:
    return read_label_map([path])


def _one_slice(stack: Volume, index: int) -> Volume:
    return replace(stack, values_ZYX=stack.values_ZYX[index : index + 1])


def _label_of_segment(mask: MaskSource, names: dict[int, str]) -> dict[int, int]:
    labels = mask.label_of_segment
    label_of_value = {number: labels.get(name, labels.get("*", -1)) for number, name in names.items()}
    for number, label in label_of_value.items():
        if label < 0:
            raise DistsegError(
                f"mask {mask.files[0]}: got segment {names[number]!r}; segments of a joint mask are named after labels "
                f"({', '.join(labels)}); rename it, or name yours with --labels"
            )
    return label_of_value


def _check_grid(path: Path, mask: Volume, volume: Volume) -> None:
    if mask.values_ZYX.shape != volume.values_ZYX.shape:
        raise DistsegError(
            f"mask {path}: got shape {mask.values_ZYX.shape[::-1]}; it must be that of {volume.path}, "
            f"{volume.values_ZYX.shape[::-1]}; redraw or resample the mask"
        )
    if mask.affine is None or volume.affine is None:
        return  # PNG slices lie where their names say
    ends = [(0, n - 1) for n in volume.values_ZYX.shape[::-1]]
    corners = np.array([[x, y, z, 1] for x in ends[0] for y in ends[1] for z in ends[2]]).T
    offset = (np.linalg.inv(volume.affine) @ mask.affine @ corners - corners)[:3]
    if np.abs(offset).max() > GRID_TOLERANCE:
        raise DistsegError(
            f"mask {path}: got another affine than {volume.path} (up to {np.abs(offset).max():.1f} voxels apart); image and "
            "mask must lie on one grid; resample the mask or mend its header"
        )

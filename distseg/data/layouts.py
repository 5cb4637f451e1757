"""What lies where in a source folder: which volume, which masks, which patient."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distseg.data.nifti import is_nifti, nifti_stem
from distseg.errors import DistsegError

LABELS = {"background": 0, "lung": 1, "infection": 2}

IMAGES = "COVID-19-CT-Seg_20cases"
# Mask folder -> {value in the file: label}; later folders overwrite earlier ones. Left and right lung become one label.
SEPARATE_MASKS = {"Lung_Mask": {1: 1, 2: 1}, "Infection_Mask": {1: 2}}
JOINT_MASK = {"Lung_and_Infection_Mask": {1: 1, 2: 1, 3: 2}}


@dataclass(frozen=True)
class MaskSource:
    path: Path
    label_of_value: Mapping[int, int]  # value 0 is always background


@dataclass(frozen=True)
class CaseSource:
    id: str
    patient: str
    image: Path
    masks: tuple[MaskSource, ...]


def patient_of(case_id: str) -> str:
    """`radiopaedia_<case>_...` are series of one patient; any other case is a patient of its own."""
    match = re.match(r"radiopaedia_\d+", case_id)
    return match.group() if match else case_id


def find_cases(src: Path) -> list[CaseSource]:
    """The annotated volumes of a folder in the layout of Zenodo 3757476, sorted by name.

    Raises:
        DistsegError: no such folder, another layout, no volume, a volume without a mask or a mask without a volume.
    """
    if not src.is_dir():
        raise DistsegError(f"source: got {src}; no such folder; give the folder that holds {IMAGES}/")
    if not (src / IMAGES).is_dir():
        raise DistsegError(f"source: got {src} without {IMAGES}/; the layout must be that of Zenodo 3757476")
    images = {nifti_stem(path): path for path in sorted((src / IMAGES).iterdir()) if is_nifti(path)}
    if not images:
        raise DistsegError(f"source: got {src / IMAGES} without a .nii or .nii.gz file; at least one volume is needed")
    masks = _mask_folders(src)
    for folder in masks:
        _check_pairs(src / folder, images)
    return [
        CaseSource(
            case_id, patient_of(case_id), image, tuple(MaskSource(_mask(src / f, case_id), masks[f]) for f in masks)
        )
        for case_id, image in images.items()
    ]


def _mask_folders(src: Path) -> dict[str, dict[int, int]]:
    for masks in (SEPARATE_MASKS, JOINT_MASK):
        if all((src / folder).is_dir() for folder in masks):
            return masks
    needed = " and ".join(SEPARATE_MASKS)
    raise DistsegError(f"source: got {src} without masks; it must hold {needed}, or {', '.join(JOINT_MASK)}")


def _check_pairs(folder: Path, images: Mapping[str, Path]) -> None:
    masks = {nifti_stem(path) for path in folder.iterdir() if is_nifti(path)}
    if missing := sorted(images.keys() - masks):
        raise DistsegError(
            f"mask: got none for volume {images[missing[0]]} ({len(missing)} without); every volume needs "
            f"{folder}/{missing[0]}.nii.gz; add the mask or move the volume away"
        )
    if orphans := sorted(masks - images.keys()):
        raise DistsegError(
            f"mask: got {folder}/{orphans[0]} without a volume ({len(orphans)} so); every mask needs a volume of the "
            f"same name in {IMAGES}/; add the volume or move the mask away"
        )


def _mask(folder: Path, case_id: str) -> Path:
    return next(path for path in sorted(folder.iterdir()) if is_nifti(path) and nifti_stem(path) == case_id)

"""The phantom with other labels than lung and infection: lobes, sides, one nodule, three classes of lesions."""

from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import label as components

from distseg.phantoms.case import PhantomCase, make_case


def lobes(case: PhantomCase) -> np.ndarray:
    """Five parts of the lung, from front to back: two of the left one, three of the right one."""
    lung = case.label_ZYX > 0
    y, is_left = np.arange(lung.shape[1])[:, None], np.arange(lung.shape[2]) >= lung.shape[2] // 2
    middle = np.average(np.broadcast_to(y, lung.shape)[lung])
    spread = np.broadcast_to(y, lung.shape)[lung].std()
    left = np.where(y < middle, 1, 2)
    right = np.select([y < middle - spread / 2, y < middle + spread / 2], [3, 4], 5)
    return np.where(lung, np.where(is_left, left, right), 0)


def sides(case: PhantomCase) -> np.ndarray:
    """Left and right lung, and the infection of both."""
    is_left = np.arange(case.label_ZYX.shape[2]) >= case.label_ZYX.shape[2] // 2
    return np.where(case.label_ZYX == 2, 3, np.where(case.label_ZYX == 1, np.where(is_left, 1, 2), 0))


def nodule(case: PhantomCase) -> np.ndarray:
    return case.label_ZYX == 2


def classes(case: PhantomCase) -> np.ndarray:
    """Each lesion is of one class, by its mean HU: glass, part solid, solid."""
    number_ZYX, count = components(case.label_ZYX == 2)
    of_lesion = [0]
    for number in range(1, count + 1):
        of_lesion.append(3 - int(np.searchsorted([-500, -300], case.hu_ZYX[number_ZYX == number].mean())))
    return np.array(of_lesion)[number_ZYX]


LABELS: Mapping[str, dict[str, int]] = {
    "lobes": {"left_upper": 1, "left_lower": 2, "right_upper": 3, "right_middle": 4, "right_lower": 5},
    "sides": {"left": 1, "right": 2, "infection": 3},
    "nodule": {"nodule": 1},
    "classes": {"solid": 1, "part_solid": 2, "glass": 3},
}
PAINTERS: Mapping[str, Callable[[PhantomCase], np.ndarray]] = {
    "lobes": lobes, "sides": sides, "nodule": nodule, "classes": classes,
}  # fmt: skip


def write_labelled(out: Path, kind: str, cases: int, size: int, n_slices: int, seed: int = 0) -> None:
    """Writes a set in the layout `paired`, images/ and labels/, whose label maps are those of a kind."""
    for index in range(cases):
        case = make_case(seed, index, size, n_slices)
        z_mm, y_mm, x_mm = case.spacing_mm
        for folder, values_ZYX in (("images", case.hu_ZYX), ("labels", PAINTERS[kind](case).astype(np.uint8))):
            path = out / folder / f"case_{index}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values_ZYX.T, np.diag([-x_mm, -y_mm, z_mm, 1.0])), path)

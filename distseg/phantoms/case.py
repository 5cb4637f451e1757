"""A procedural chest CT in HU: the embedded sample that needs no download and no patient's consent.

Every structure is an implicit shape in millimetres, so another image size is the same patient at another sampling.
Coordinates: x to the patient's Left, y to Posterior (both 0 at the image centre), z to Superior (0 at the bottom).
`d` is a signed distance in mm, negative inside; `side` is -1 for the right lung and +1 for the left.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from distseg.bars import counted
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, is_free
from distseg.phantoms.lungs import draw_lesions, draw_parenchyma, paint_vessels
from distseg.phantoms.shapes import Patient, draw_patient, lungs_and_dome
from distseg.phantoms.trunk import draw_trunk, great_vessel_tubes
from distseg.phantoms.voxels import FIELD_OF_VIEW_MM, Grid, paint

ONE_FIELD = (FIELD_OF_VIEW_MM, FIELD_OF_VIEW_MM)
OPACITY_THRESHOLD = 0.4  # a voxel is infection where a lesion hides at least this much of the lung


@dataclass(frozen=True)
class PhantomCase:
    """One patient; labels are 0 background, 1 lung, 2 infection."""

    hu_ZYX: np.ndarray  # int16
    label_ZYX: np.ndarray  # uint8
    spacing_mm: tuple[float, float, float]  # z, y, x


def make_case(
    seed: int, index: int, size: int = 256, n_slices: int = 28, fields_mm: tuple[float, float] = ONE_FIELD
) -> PhantomCase:
    """Patient number `index` of the set `seed`: a function of the arguments alone, the same bits in every run.

    Args:
        seed: of the set, 0 or more.
        index: of the patient, from 0.
        size: pixels a side of a square slice.
        n_slices: over 280 mm.
        fields_mm: what the patient's field of view lies between; so pixels have many sizes, as those of real scanners.
    """
    rng = np.random.default_rng([seed, index])
    patient = draw_patient(rng, seed, index)
    low, high = fields_mm
    # From a stream of its own: the patient is the same in any field.
    field_mm = low + (high - low) * float(np.random.default_rng([seed, index, 1]).uniform())
    grid = Grid(rng, size, n_slices, field_mm)
    great_vessels = grid.tubes(great_vessel_tubes())
    d_lung, dome = lungs_and_dome(patient, grid, great_vessels)
    hu = draw_trunk(patient, grid, rng, dome, great_vessels)
    label = ((d_lung < 0) & (grid.z > dome)).astype(np.uint8)
    opacity, lesion_hu = draw_lesions(patient, grid, rng)
    lung_hu = draw_parenchyma(patient, grid, rng, d_lung)
    lung_hu += (lesion_hu - lung_hu) * opacity
    airway = paint_vessels(patient, grid, rng, lung_hu)
    inside = np.clip(0.5 - d_lung / grid.pixel_mm, 0, 1) * np.clip(0.5 + (grid.z - dome) / patient.dome_blur, 0, 1)
    hu += (lung_hu - hu) * inside
    paint(hu, airway - 1.5, -50, grid)
    paint(hu, airway, -990, grid)
    label[(opacity > OPACITY_THRESHOLD) & (label == 1)] = 2
    return PhantomCase(_scan(patient, grid, rng, hu), label, (grid.slice_mm, grid.pixel_mm, grid.pixel_mm))


def write_phantom(
    out: Path, cases: int, seed: int, size: int, n_slices: int, fields_mm: tuple[float, float] = ONE_FIELD
) -> None:
    """Writes a set in the layout of Zenodo 3757476; the same arguments give the same bytes.

    Every fourth case is stored in RAS voxel order and the others in LPS, so that a reader must respect the affine.

    Raises:
        DistsegError: `out` is a file or a folder that is not empty.
    """
    if not is_free(out):
        raise DistsegError(f"phantom: got {out}, which is not empty; it must be new or empty; choose another")
    with folder_written_aside(out) as aside:
        for index in counted(range(cases), "phantom", cases, "case"):
            _write_case(aside, index, make_case(seed, index, size, n_slices, fields_mm))


def _write_case(folder: Path, index: int, case: PhantomCase) -> None:
    label = case.label_ZYX
    is_left = np.arange(label.shape[2]) >= label.shape[2] // 2
    lung = np.where(is_left, 1, 2) * (label > 0)
    volumes = {
        "COVID-19-CT-Seg_20cases": case.hu_ZYX,
        "Lung_Mask": lung.astype(np.uint8),
        "Infection_Mask": (label == 2).astype(np.uint8),
        "Lung_and_Infection_Mask": np.where(label == 2, 3, lung).astype(np.uint8),
    }
    for name, values_ZYX in volumes.items():
        path = folder / name / f"phantom_{index + 1:03d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        image = _nifti(values_ZYX, case.spacing_mm, ras=index % 4 == 3)
        path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))  # no time stamp: same bytes


def _nifti(values_ZYX: np.ndarray, spacing_mm: tuple[float, float, float], ras: bool) -> nib.Nifti1Image:
    values_XYZ = values_ZYX.T
    spacing_xyz = np.array(spacing_mm[::-1])
    direction = np.array([1, 1, 1]) if ras else np.array([-1, -1, 1])
    if ras:
        values_XYZ = values_XYZ[::-1, ::-1]
    affine = np.diag([*(direction * spacing_xyz), 1.0])
    affine[:2, 3] = -affine.diagonal()[:2] * (np.array(values_XYZ.shape[:2]) - 1) / 2  # the image centre is x = y = 0
    image = nib.Nifti1Image(values_XYZ, affine)
    image.header.set_xyzt_units("mm")
    return image


def _scan(p: Patient, grid: Grid, rng: np.random.Generator, hu: np.ndarray) -> np.ndarray:
    """The scanner's blur and its correlated noise: int16 HU."""
    sigma = p.blur / grid.pixel_mm
    noise = ndimage.gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), (0, 0.7, 0.7))
    hu = ndimage.gaussian_filter(hu, (0, sigma, sigma)) + noise * (p.noise_hu / noise.std())
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)

"""A procedural chest CT in HU: the embedded sample that needs no download and no patient's consent.

Every structure is an implicit shape in millimetres, so another image size is the same patient at another sampling.
Coordinates: x to the patient's Left, y to Posterior (both 0 at the image centre), z to Superior (0 at the bottom).
`d` is a signed distance in mm, negative inside; `side` is -1 for the right lung and +1 for the left.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from distseg.errors import DistsegError
from distseg.files import folder_written_aside, is_free

FIELD_OF_VIEW_MM = 360.0
HEIGHT_MM = 280.0
INFECTED_SHARE = 0.72
BURDEN_RANGE = (0.003, 0.6)  # of the lung volume
LUNG_VOLUME_MM3 = 4e6
OPACITY_THRESHOLD = 0.4  # a voxel is infection where a lesion hides at least this much of the lung
SPINE_Y_MM = 58.0
CARINA = np.array([0.0, 12.0, 168.0])
HILUM = np.array([36.0, 8.0, 150.0])  # x is times the side
FAR_MM = 99.0
WARP_LIMIT_MM = 7.0
CUBIC_NOISE_SD = 0.33  # of a cubic B-spline sum of unit normals in three dimensions: 0.479 ** 1.5


@dataclass(frozen=True)
class PhantomCase:
    """One patient; labels are 0 background, 1 lung, 2 infection."""

    hu_ZYX: np.ndarray  # int16
    label_ZYX: np.ndarray  # uint8
    spacing_mm: tuple[float, float, float]  # z, y, x


@dataclass(frozen=True)
class _Patient:
    """What differs between patients: lengths in mm, intensities in HU."""

    lung_x: float
    lung_y: float
    wall: float
    fat: float
    breast: float
    dome: dict[int, float]
    dome_blur: float
    heart: float
    lung_hu: float
    gravity_hu: float
    dependent_hu: float
    noise_hu: float
    blur: float
    burden: float  # 0 in a patient without infection


class _Grid:
    """Where the voxels are, after a smooth warp that makes the ideal shapes a little irregular."""

    def __init__(self, rng: np.random.Generator, size: int, n_slices: int):
        self.pixel_mm, self.slice_mm = FIELD_OF_VIEW_MM / size, HEIGHT_MM / n_slices
        self.shape = (n_slices, size, size)
        in_plane = (np.arange(size, dtype=np.float32) + 0.5) * self.pixel_mm - FIELD_OF_VIEW_MM / 2
        self.z = ((np.arange(n_slices, dtype=np.float32) + 0.5) * self.slice_mm)[:, None, None]
        self.x = in_plane + np.clip(2.5 * self.noise(rng, 50), -WARP_LIMIT_MM, WARP_LIMIT_MM)
        self.y = in_plane[:, None] + np.clip(2.5 * self.noise(rng, 50), -WARP_LIMIT_MM, WARP_LIMIT_MM)
        self.table_x, self.table_y = in_plane, in_plane[:, None]  # a table is not warped

    def noise(self, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
        """Smooth Gaussian noise, mean 0, variance 1, whose knots lie in mm and not in pixels: float32 [Z, Y, X]."""
        extents = (HEIGHT_MM, FIELD_OF_VIEW_MM, FIELD_OF_VIEW_MM)
        field: np.ndarray = rng.standard_normal([int(mm / scale_mm) + 5 for mm in extents], dtype=np.float32)
        for axis, (mm, count) in enumerate(zip(extents, self.shape, strict=True)):
            at = (np.arange(count, dtype=np.float32) + 0.5) * (mm / count / scale_mm)
            left, t = at.astype(int), at % 1
            weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (1 - t) ** 3 - 6 * (1 - t) ** 2 + 4, t**3)
            along: list[int] = [1, 1, 1]
            along[axis] = count
            # Four gathers and not a matrix product: BLAS may sum in another order with other thread counts.
            terms = [np.take(field, left + k, axis) * (w / 6).reshape(along) for k, w in enumerate(weights)]
            field = terms[0] + terms[1] + terms[2] + terms[3]
        return field / CUBIC_NOISE_SD

    def box(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, slice]:
        """Index ranges of the voxels within two corners (x, y, z in mm), the warp allowed for."""
        reach = np.array([WARP_LIMIT_MM, WARP_LIMIT_MM, 3.0])
        origin = np.array([FIELD_OF_VIEW_MM / 2, FIELD_OF_VIEW_MM / 2, 0])
        step = np.array([self.pixel_mm, self.pixel_mm, self.slice_mm])
        start = np.maximum((low - reach + origin) / step - 0.5, 0).astype(int)
        stop = np.maximum((high + reach + origin) / step + 1.5, 0).astype(int)
        x, y, z = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        return z, y, x

    def add_tube(self, d: np.ndarray, start: np.ndarray, end: np.ndarray, r0: float, r1: float) -> None:
        """Unites a straight tapered tube with `d`, in place."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        reach = max(r0, r1) + 1.5 * self.pixel_mm
        box = self.box(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        x, y, z = self.x[box] - start[0], self.y[box] - start[1], self.z[box[0]] - start[2]
        ux, uy, uz = (float(u) for u in end - start)
        t = np.clip((x * ux + y * uy + z * uz) / max(ux * ux + uy * uy + uz * uz, 1e-6), 0, 1)
        # A slice shows what lies within its thickness, not only what crosses its middle.
        dz = np.maximum(np.abs(z - t * uz) - min(self.slice_mm, 4) / 2, 0)
        tube = np.sqrt((x - t * ux) ** 2 + (y - t * uy) ** 2 + dz**2) - (r0 + (r1 - r0) * t)
        np.minimum(d[box], tube, out=d[box])

    def tubes(self, segments: list[tuple]) -> np.ndarray:
        """Distance to the union of tubes (start, end, radius at start, radius at end), far away elsewhere."""
        d = np.full(self.shape, FAR_MM, np.float32)
        for start, end, r0, r1 in segments:
            self.add_tube(d, start, end, r0, r1)
        return d


def make_case(seed: int, index: int, size: int = 256, n_slices: int = 28) -> PhantomCase:
    """Patient number `index` of the set `seed`: a function of the arguments alone, the same bits in every run.

    Args:
        seed: of the set, 0 or more.
        index: of the patient, from 0.
        size: pixels a side of a square slice of 360 mm.
        n_slices: over 280 mm.
    """
    rng = np.random.default_rng([seed, index])
    patient = _draw_patient(rng, seed, index)
    grid = _Grid(rng, size, n_slices)
    great_vessels = grid.tubes(_great_vessels())
    d_lung, dome = _lungs(patient, grid, great_vessels)
    hu = _trunk(patient, grid, rng, dome, great_vessels)
    label = ((d_lung < 0) & (grid.z > dome)).astype(np.uint8)
    opacity, lesion_hu = _lesions(patient, grid, rng)
    lung_hu = _parenchyma(patient, grid, rng, d_lung)
    lung_hu += (lesion_hu - lung_hu) * opacity
    airway = _paint_vessels(patient, grid, rng, lung_hu)
    inside = np.clip(0.5 - d_lung / grid.pixel_mm, 0, 1) * np.clip(0.5 + (grid.z - dome) / patient.dome_blur, 0, 1)
    hu += (lung_hu - hu) * inside
    _paint(hu, airway - 1.5, -50, grid)
    _paint(hu, airway, -990, grid)
    label[(opacity > OPACITY_THRESHOLD) & (label == 1)] = 2
    return PhantomCase(_scan(patient, grid, rng, hu), label, (grid.slice_mm, grid.pixel_mm, grid.pixel_mm))


def write_phantom(out: Path, cases: int, seed: int, size: int, n_slices: int) -> None:
    """Writes a set in the layout of Zenodo 3757476; the same arguments give the same bytes.

    Every fourth case is stored in RAS voxel order and the others in LPS, so that a reader must respect the affine.

    Raises:
        DistsegError: `out` is a file or a folder that is not empty.
    """
    if not is_free(out):
        raise DistsegError(f"phantom: got {out}, which is not empty; it must be new or empty; choose another")
    with folder_written_aside(out) as aside:
        for index in tqdm(range(cases), desc="phantom", unit="case"):
            _write_case(aside, index, make_case(seed, index, size, n_slices))


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


def _draw_patient(rng: np.random.Generator, seed: int, index: int) -> _Patient:
    # An additive (R2) sequence over the patients: any few in a row hold healthy, mild and severe ones.
    infected, severity = (np.random.default_rng([seed]).random(2) + index * np.array([0.5698402910, 0.7548776662])) % 1
    low, high = BURDEN_RANGE
    dome_right = rng.uniform(84, 104)
    return _Patient(
        lung_x=rng.uniform(61, 68),
        lung_y=rng.uniform(82, 95),
        wall=rng.uniform(16, 22),
        fat=rng.uniform(5, 20),
        breast=rng.uniform(25, 45) * (rng.random() < 0.5),
        dome={-1: dome_right, 1: dome_right - rng.uniform(4, 14)},
        dome_blur=rng.uniform(4, 14),
        heart=rng.uniform(0.85, 1.1),
        lung_hu=rng.uniform(-870, -810),
        gravity_hu=rng.uniform(10, 45),
        dependent_hu=rng.choice([0, rng.uniform(60, 220)]),
        noise_hu=rng.uniform(12, 38),
        blur=rng.uniform(0.5, 1.0),
        burden=float(low * (high / low) ** severity) if infected < INFECTED_SHARE else 0.0,
    )


def _apex(z):
    """0 up to the middle of the lungs, 1 at their top."""
    return np.clip((z - 100) / 168, 0, 1.5)


def _lung_ellipse(p: _Patient, side: int, x, y, z):
    u = _apex(z)
    centre_x = side * (p.lung_x * 0.97 - 20 * u**2 + 0.1 * y)
    wide = p.lung_x * (1.0 if side < 0 else 0.96)
    return (np.sqrt(((x - centre_x) / wide) ** 2 + ((y - 8 * u) / p.lung_y) ** 2 + u**3) - 1) * p.lung_x


def _heart(p: _Patient, x, y, z):
    along, across = 0.8 * (x - 18) - 0.6 * (y + 30), 0.6 * (x - 18) + 0.8 * (y + 30)
    return (np.sqrt((along / 64) ** 2 + (across / 46) ** 2 + ((z - 108) / 52) ** 2) - p.heart) * 46


def _dome(p: _Patient, side: int, x, y):
    """Height of the diaphragm: the lung hangs down around the dome, lowest behind."""
    return np.maximum(p.dome[side] - 50 * ((x - side * 55) / 68) ** 2 - 64 * ((y + 20) / 90) ** 2, 16)


def _spine_muscle(x, y):
    return (np.sqrt((x / 31) ** 2 + ((y - SPINE_Y_MM - 30) / 48) ** 2) - 1) * 31


def _lung_distance(p: _Patient, side: int, x, y, z):
    """Distance to one lung, the diaphragm left out: for arrays of voxels and of points alike."""
    wide = 20 + 13 * np.exp(-(((z - 155) / 22) ** 2))
    column = (np.sqrt((x / wide) ** 2 + ((y - 4) / 88) ** 2) - 1) * wide
    carved = np.minimum(np.minimum(column, _heart(p, x, y, z) - 4), _spine_muscle(x, y))
    return np.maximum(_lung_ellipse(p, side, x, y, z), -carved)


def _lungs(p: _Patient, grid: _Grid, great_vessels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the lungs, the diaphragm left out, and the height of the diaphragm, both [Z, Y, X]."""
    x, y, z = grid.x, grid.y, grid.z
    right, left = (_lung_distance(p, side, x, y, z) for side in (-1, 1))
    dome = np.where(x < 0, _dome(p, -1, x, y), _dome(p, 1, x, y)) + 2 * np.sin(x / 9 + y / 14)
    return np.maximum(np.minimum(right, left), 2.5 - great_vessels), dome


def _points_in_lung(p: _Patient, rng: np.random.Generator, side: int, count: int) -> np.ndarray:
    """Uniform random points [count, 3] (x, y, z in mm) well inside one lung."""
    points = rng.uniform((4, -100, 20), (140, 100, 268), (count * 8 + 200, 3)) * (side, 1, 1)
    x, y, z = points.T
    inside = (_lung_distance(p, side, x, y, z) < -4) & (z > _dome(p, side, x, y) + 4)
    return points[inside][:count]


def _paint(hu: np.ndarray, d: np.ndarray, value, grid: _Grid) -> None:
    """Lays a structure over what is there, in place, with the partial-volume edge of one pixel."""
    hu += (value - hu) * np.clip(0.5 - d / grid.pixel_mm, 0, 1)


def _smooth_min(a, b, width_mm: float):
    """Union of two shapes with the crease between them filled."""
    t = np.clip(0.5 + (b - a) / (2 * width_mm), 0, 1)
    return b + (a - b) * t - width_mm * t * (1 - t)


def _superellipse(x, y, wide: float, deep: float, shrink=0.0):
    """Radial distance to an oval a little squarer than an ellipse."""
    r = (np.abs(x / wide) ** 2.25 + np.abs(y / deep) ** 2.25 + shrink) ** (1 / 2.25)
    return np.hypot(x, y) * (1 - 1 / np.maximum(r, 0.05))


def _trunk(
    p: _Patient, grid: _Grid, rng: np.random.Generator, dome: np.ndarray, great_vessels: np.ndarray
) -> np.ndarray:
    """Everything but the lungs, which are laid over it: float32 HU [Z, Y, X]."""
    x, y, z = grid.x, grid.y, grid.z
    u = _apex(z)
    cage = _superellipse(x, y - 8 * u, 2 * p.lung_x, p.lung_y + 2, u**3)
    cage = np.minimum(cage, np.minimum(_lung_ellipse(p, -1, x, y, z), _lung_ellipse(p, 1, x, y, z)))
    deep = p.lung_y + p.wall + 0.7 * p.fat + 6
    body = _superellipse(x, y - 6, 2 * p.lung_x + p.wall + p.fat, deep, 0.3 * np.clip((z - 220) / 60, 0, 1) ** 2)
    muscle = np.minimum(body + p.fat, cage - 0.8 * p.wall)
    for side in (-1, 1):
        chest = (x - side * 72) ** 2 + (y + p.lung_y + 12) ** 2 * 1.6 + (z - 135) ** 2
        body = _smooth_min(body, np.sqrt(chest) - p.breast, 14)
    hu = np.full(grid.shape, -1000, np.float32)
    _paint_table(hu, grid, 6 + deep + 9)
    streaks = grid.noise(rng, 8)
    _paint(hu, body, 15, grid)
    _paint(hu, body + 2, -105 + 8 * streaks, grid)
    _paint(hu, muscle, 52 - 130 * np.clip(streaks - 0.9, 0, 1), grid)
    _paint(hu, np.maximum(muscle, np.abs(cage - 14) - 1.2), -70, grid)  # fat between the ribs and the outer muscles
    _paint(hu, cage, -90 + 110 * np.clip(streaks, 0, 1), grid)
    _paint_abdomen(hu, grid, np.maximum(cage + 2, z - dome), streaks, gas_y=rng.uniform(-75, -15))
    _paint(hu, np.maximum(_spine_muscle(x, y), body + 0.6 * p.fat), 50 - 110 * np.clip(streaks - 1.1, 0, 1), grid)
    heart = _heart(p, x, y, z)
    _paint(hu, heart - 4, -90, grid)
    _paint(hu, heart, 42 + 4 * streaks, grid)
    _paint(hu, great_vessels, 44, grid)
    _paint_bones(p, hu, grid)
    return hu


def _paint_table(hu: np.ndarray, grid: _Grid, top_mm: float) -> None:
    upper = grid.table_y - (top_mm - grid.table_x**2 / 1300)
    lower = grid.table_y - (top_mm + 24)
    _paint(hu, np.maximum(-upper, lower), -955, grid)  # foam
    for shell in (upper, lower):
        _paint(hu, np.abs(shell) - 1.5, -250, grid)


def _paint_abdomen(hu: np.ndarray, grid: _Grid, below: np.ndarray, streaks: np.ndarray, gas_y: float) -> None:
    x, y, z = grid.x, grid.y, grid.z
    _paint(hu, np.maximum(below, x - 22 + y / 5), 58, grid)  # liver
    spleen = (np.sqrt(((x - 95) / 34) ** 2 + ((y - 38) / 44) ** 2 + ((z - 30) / 60) ** 2) - 1) * 34
    _paint(hu, np.maximum(below, spleen), 50, grid)
    stomach = (np.sqrt(((x - 62) / 44) ** 2 + ((y + 18) / 50) ** 2 + ((z - 25) / 42) ** 2) - 1) * 42
    _paint(hu, np.maximum(below, stomach), 45, grid)
    fluid = np.where(y < gas_y, -970, 18 + 6 * streaks)  # gas collects in front
    _paint(hu, np.maximum(below + 4, stomach + 5), fluid, grid)


def _great_vessels() -> list[tuple]:
    """Aorta with its arch, superior vena cava, pulmonary trunk and arteries, oesophagus, neck vessels."""
    arch = [(-14, -28, 125), (-16, -30, 180), (-8, -20, 196), (8, 5, 202), (20, 28, 196), (24, 40, 180), (22, 40, 0)]
    vessels: list[tuple] = [(a, b, 15 - i * 0.7, 14.3 - i * 0.7) for i, (a, b) in enumerate(pairwise(arch))]
    vessels += [((-32, -16, 130), (-30, -14, 215), 9, 8), ((16, -42, 135), (14, -22, 160), 13, 12)]
    vessels += [((12, -18, 160), side * HILUM * (1, side, side), 10, 7) for side in (-1, 1)]
    vessels += [((6, 32, 0), (2, 30, 280), 7, 7)]
    neck = ((-14, -10), (2, -8), (14, 4), (-17, 6), (16, -14))
    return vessels + [((x, y, 200), (1.3 * x, y, 280), 5, 4) for x, y in neck]


def _ribs(p: _Patient, side: int) -> tuple[list[tuple], list[tuple]]:
    """Twelve slanted arcs, behind high and in front low, and the cartilage that joins them to the sternum."""
    bone, cartilage = [], []
    for z_back in range(20, 284, 22):
        angles = np.radians(np.arange(-12, 145, 12))
        z = z_back - 95 * (angles / angles[-1]).clip(0) ** 1.2
        u = _apex(z)
        wide, deep = ((r + 7) * np.sqrt(np.clip(1 - u**3, 0.12, 1)) for r in (p.lung_x, p.lung_y))
        y = 8 * u + deep * np.cos(angles)
        x = side * (p.lung_x * 0.97 - 20 * u**2 + 0.1 * y + wide * np.sin(angles))
        points = [np.array([side * 22, SPINE_Y_MM + 20, z_back + 4.0]), *np.stack([x, y, z], 1)]
        bone += [(a, b, 4.2, 4.2) for a, b in pairwise(points)]
        sternum = np.array([side * 14, -p.lung_y - 5, max(points[-1][2] + 14, 100)])
        cartilage.append((points[-1], sternum, 4.2, 4.2))
    return bone, cartilage


def _paint_bones(p: _Patient, hu: np.ndarray, grid: _Grid) -> None:
    bone, cartilage = ([*a, *b] for a, b in zip(_ribs(p, -1), _ribs(p, 1), strict=True))
    front = -p.lung_y - 6
    for side in (-1, 1):
        bone.append(((side * 7, front, 105), (side * 7, front + 2, 190), 5.5, 5.5))
        bone.append(((side * 7, front + 2, 190), (side * 14, front + 22, 228), 6, 7))
        bone.append(((side * 20, front + 28, 236), (side * 105, front + 62, 268), 6, 5))  # clavicle
        for z in range(165, 262, 6):
            tip = side * (p.lung_x + 62), p.lung_y - 32, z
            bone.append(((side * (p.lung_x + 14), p.lung_y + 14, z), tip, 3.2, 4))  # scapula
    for z in range(4, 300, 24):
        bone.append(((0, SPINE_Y_MM + 36, z), (0, SPINE_Y_MM + 56, z - 16), 4, 4))
        bone += [((s * 14, SPINE_Y_MM + 22, z), (s * 36, SPINE_Y_MM + 30, z + 4), 4.5, 3.5) for s in (-1, 1)]
    canal = np.hypot(grid.x, grid.y - SPINE_Y_MM - 25)
    body = (np.sqrt((grid.x / 19) ** 2 + ((grid.y - SPINE_Y_MM) / 15) ** 2) - 1) * 17
    in_disc = (grid.z % 24) < 5
    _paint(hu, grid.tubes(cartilage), 110, grid)
    bones = np.minimum(grid.tubes(bone), np.minimum(np.where(in_disc, body + 3, body), np.abs(canal - 12) - 2.5))
    _paint(hu, bones, 560, grid)
    _paint(hu, bones + 2.4, 190, grid)
    _paint(hu, np.where(in_disc, body, FAR_MM), 85, grid)
    _paint(hu, canal - 9, 30, grid)


def _tree(rng: np.random.Generator, root: np.ndarray, targets: np.ndarray, radius_mm: float) -> Iterator[tuple]:
    """Branches from the root towards targets, halving them at each fork; radius ~ cube root of what is fed (Murray)."""
    stack = [(root, targets)]
    while stack:
        start, fed = stack.pop()
        end = start + (fed.mean(axis=0) - start) * rng.uniform(0.4, 0.6) if len(fed) > 1 else fed[0]
        radius = radius_mm * len(fed) ** (1 / 3)
        yield start, end, radius, radius * 0.85
        if len(fed) > 1:
            axis = np.eye(3)[fed.std(axis=0).argmax()] + rng.normal(0, 0.3, 3)  # across the widest spread
            order = np.argsort((fed * axis).sum(axis=1))
            stack += [(end, fed[half]) for half in np.array_split(order, 2)]


def _paint_vessels(p: _Patient, grid: _Grid, rng: np.random.Generator, lung_hu: np.ndarray) -> np.ndarray:
    """Paints arteries and veins into the lung; returns the distance to the lumen of trachea, bronchi and airways."""
    vessels: list[tuple] = []
    airways: list[tuple] = [((0, 8, 290), CARINA, 8.5, 8.5)]
    for side in (-1, 1):
        hilum = HILUM * (side, 1, 1)
        for drop, count in ((0, 400), (24, 300)):
            targets = _points_in_lung(p, rng, side, count)
            vessels += _tree(rng, hilum - (side * 4, drop / 2, drop), targets, 0.72)
        bronchus = hilum + np.array([0, 6, 6])
        branches = _tree(rng, bronchus, _points_in_lung(p, rng, side, 40), 0.9)
        airways += [(CARINA, bronchus, 6.5, 5), *(branch for branch in branches if branch[2] > 1.2)]
    _paint(lung_hu, grid.tubes(vessels), 42, grid)
    return grid.tubes(airways)


def _parenchyma(p: _Patient, grid: _Grid, rng: np.random.Generator, d_lung: np.ndarray) -> np.ndarray:
    """Aerated lung with what looks like disease and is not: dependent density, calcified nodules, fibrous bands."""
    hu = p.lung_hu + p.gravity_hu * grid.y / 90 + 14 * grid.noise(rng, 20) + 14 * grid.noise(rng, 3.5)
    hu += p.dependent_hu * np.exp(np.minimum(d_lung, 0) / 7) * np.clip((grid.y - 15) / 50, 0, 1)
    for side in (-1, 1):
        if rng.random() < 0.4:
            a, b, c = _points_in_lung(p, rng, side, 3)
            _paint(hu, grid.tubes([(a, a + (b - a) * 0.3, 1.2, 1.2), (b, b + (c - b) * 0.2, 1.0, 1.4)]), -220, grid)
        if rng.random() < 0.4:
            radius = rng.uniform(1.5, 3.5)
            _paint(hu, grid.tubes([(a, a, radius, radius) for a in _points_in_lung(p, rng, side, 3)]), 420, grid)
    return hu


def _lesions(p: _Patient, grid: _Grid, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Opacity 0..1 of the infection and its HU: ground glass, consolidation, and ground glass with a dense core."""
    opacity, hu = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.float32)
    left_mm3 = p.burden * LUNG_VOLUME_MM3
    if left_mm3 == 0:
        return opacity, hu
    border, texture = 0.8 * grid.noise(rng, 15) + 0.5 * grid.noise(rng, 6), grid.noise(rng, 4)
    largest = min(np.cbrt(left_mm3 * 0.3), 48)
    while left_mm3 > 0:
        radius = np.exp(rng.uniform(np.log(4), np.log(max(largest, 5))))
        _add_lesion(p, grid, rng, radius, border, texture, opacity, hu)
        left_mm3 -= 2 * radius**3  # half a ball: the rest falls on other lesions or out of the lung
    return opacity, hu


def _add_lesion(
    p: _Patient,
    grid: _Grid,
    rng: np.random.Generator,
    radius: float,
    border: np.ndarray,
    texture: np.ndarray,
    opacity: np.ndarray,
    hu: np.ndarray,
) -> None:
    """Adds one lesion in place, by preference peripheral, posterior and low."""
    side = int(rng.choice([-1, 1]))
    points = _points_in_lung(p, rng, side, 60)
    x, y, z = points.T
    weight = np.exp(_lung_distance(p, side, x, y, z) / 10 + y / 70 - z / 150)
    centre = points[rng.choice(len(points), p=weight / weight.sum())]
    radii = radius * rng.uniform((0.8, 0.8, 0.7), (1.3, 1.3, 1.2))
    box = grid.box(centre - 1.5 * radii, centre + 1.5 * radii)
    offsets = (grid.x[box] - centre[0], grid.y[box] - centre[1], grid.z[box[0]] - centre[2])
    r = np.sqrt(sum((offset / mm) ** 2 for offset, mm in zip(offsets, radii, strict=True))) + 0.22 * border[box]
    edge, kind = rng.uniform(0.2, 0.6), rng.random()
    haze, dense = rng.uniform(-660, -400), rng.uniform(-130, 35)
    core = np.clip((rng.uniform(0.4, 0.75) - r) / 0.25, 0, 1) if 0.5 < kind < 0.75 else float(kind > 0.75)
    value = haze + 40 * texture[box] + (dense - haze) * core
    mine = np.clip((1 - r) / edge, 0, 1) * (grid.x[box] * side > 0)
    hu[box] = np.where(mine > opacity[box], value, hu[box])
    np.maximum(opacity[box], mine, out=opacity[box])


def _scan(p: _Patient, grid: _Grid, rng: np.random.Generator, hu: np.ndarray) -> np.ndarray:
    """The scanner's blur and its correlated noise: int16 HU."""
    sigma = p.blur / grid.pixel_mm
    noise = ndimage.gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), (0, 0.7, 0.7))
    hu = ndimage.gaussian_filter(hu, (0, sigma, sigma)) + noise * (p.noise_hu / noise.std())
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)

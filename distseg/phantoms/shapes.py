"""A patient of the phantom, and the shapes of lungs, heart, diaphragm and spine: signed distances in mm, negative inside."""

from dataclasses import dataclass

import numpy as np

from distseg.phantoms.voxels import Grid

SPINE_Y_MM = 58.0
INFECTED_SHARE = 0.72
BURDEN_RANGE = (0.003, 0.6)  # of the lung volume
HILUM = np.array([36.0, 8.0, 150.0])  # x is times the side


@dataclass(frozen=True)
class Patient:
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


def draw_patient(rng: np.random.Generator, seed: int, index: int) -> Patient:
    # An additive (R2) sequence over the patients: any few in a row hold healthy, mild and severe ones.
    infected, severity = (np.random.default_rng([seed]).random(2) + index * np.array([0.5698402910, 0.7548776662])) % 1
    low, high = BURDEN_RANGE
    dome_right = rng.uniform(84, 104)
    return Patient(
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


def apex(z: np.ndarray) -> np.ndarray:
    """0 up to the middle of the lungs, 1 at their top."""
    return np.clip((z - 100) / 168, 0, 1.5)


def lung_ellipse_distance(p: Patient, side: int, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    u = apex(z)
    centre_x = side * (p.lung_x * 0.97 - 20 * u**2 + 0.1 * y)
    wide = p.lung_x * (1.0 if side < 0 else 0.96)
    return (np.sqrt(((x - centre_x) / wide) ** 2 + ((y - 8 * u) / p.lung_y) ** 2 + u**3) - 1) * p.lung_x


def heart_distance(p: Patient, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    along, across = 0.8 * (x - 18) - 0.6 * (y + 30), 0.6 * (x - 18) + 0.8 * (y + 30)
    return (np.sqrt((along / 64) ** 2 + (across / 46) ** 2 + ((z - 108) / 52) ** 2) - p.heart) * 46


def _dome(p: Patient, side: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the diaphragm: the lung hangs down around the dome, lowest behind."""
    return np.maximum(p.dome[side] - 50 * ((x - side * 55) / 68) ** 2 - 64 * ((y + 20) / 90) ** 2, 16)


def spine_muscle_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.sqrt((x / 31) ** 2 + ((y - SPINE_Y_MM - 30) / 48) ** 2) - 1) * 31


def lung_distance(p: Patient, side: int, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Distance to one lung, the diaphragm left out: for arrays of voxels and of points alike."""
    wide = 20 + 13 * np.exp(-(((z - 155) / 22) ** 2))
    column = (np.sqrt((x / wide) ** 2 + ((y - 4) / 88) ** 2) - 1) * wide
    carved = np.minimum(np.minimum(column, heart_distance(p, x, y, z) - 4), spine_muscle_distance(x, y))
    return np.maximum(lung_ellipse_distance(p, side, x, y, z), -carved)


def lungs_and_dome(p: Patient, grid: Grid, great_vessels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the lungs, the diaphragm left out, and the height of the diaphragm, both [Z, Y, X]."""
    x, y, z = grid.x, grid.y, grid.z
    right, left = (lung_distance(p, side, x, y, z) for side in (-1, 1))
    dome = np.where(x < 0, _dome(p, -1, x, y), _dome(p, 1, x, y)) + 2 * np.sin(x / 9 + y / 14)
    return np.maximum(np.minimum(right, left), 2.5 - great_vessels), dome


def points_in_lung(p: Patient, rng: np.random.Generator, side: int, count: int) -> np.ndarray:
    """Uniform random points [count, 3] (x, y, z in mm) well inside one lung."""
    points = rng.uniform((4, -100, 20), (140, 100, 268), (count * 8 + 200, 3)) * (side, 1, 1)
    x, y, z = points.T
    inside = (lung_distance(p, side, x, y, z) < -4) & (z > _dome(p, side, x, y) + 4)
    return points[inside][:count]


def superellipse(
    x: np.ndarray, y: np.ndarray, wide: float, deep: float, shrink: np.ndarray | float = 0.0
) -> np.ndarray:
    """Radial distance to an oval a little squarer than an ellipse."""
    r = (np.abs(x / wide) ** 2.25 + np.abs(y / deep) ** 2.25 + shrink) ** (1 / 2.25)
    return np.hypot(x, y) * (1 - 1 / np.maximum(r, 0.05))

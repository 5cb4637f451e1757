"""Inside the phantom's lungs: vessels and airways, parenchyma, lesions."""

from collections.abc import Iterator

import numpy as np

from distseg.phantoms.shapes import HILUM, Patient, lung_distance, points_in_lung
from distseg.phantoms.voxels import Grid, paint

CARINA = np.array([0.0, 12.0, 168.0])
LUNG_VOLUME_MM3 = 4e6


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


def paint_vessels(p: Patient, grid: Grid, rng: np.random.Generator, lung_hu: np.ndarray) -> np.ndarray:
    """Paints arteries and veins into the lung; returns the distance to the lumen of trachea, bronchi and airways."""
    vessels: list[tuple] = []
    airways: list[tuple] = [((0, 8, 290), CARINA, 8.5, 8.5)]
    for side in (-1, 1):
        hilum = HILUM * (side, 1, 1)
        for drop, count in ((0, 400), (24, 300)):
            targets = points_in_lung(p, rng, side, count)
            vessels += _tree(rng, hilum - (side * 4, drop / 2, drop), targets, 0.72)
        bronchus = hilum + np.array([0, 6, 6])
        branches = _tree(rng, bronchus, points_in_lung(p, rng, side, 40), 0.9)
        airways += [(CARINA, bronchus, 6.5, 5), *(branch for branch in branches if branch[2] > 1.2)]
    paint(lung_hu, grid.tubes(vessels), 42, grid)
    return grid.tubes(airways)


def draw_parenchyma(p: Patient, grid: Grid, rng: np.random.Generator, d_lung: np.ndarray) -> np.ndarray:
    """Aerated lung with what looks like disease and is not: dependent density, calcified nodules, fibrous bands."""
    hu = p.lung_hu + p.gravity_hu * grid.y / 90 + 14 * grid.noise(rng, 20) + 14 * grid.noise(rng, 3.5)
    hu += p.dependent_hu * np.exp(np.minimum(d_lung, 0) / 7) * np.clip((grid.y - 15) / 50, 0, 1)
    for side in (-1, 1):
        if rng.random() < 0.4:
            a, b, c = points_in_lung(p, rng, side, 3)
            paint(hu, grid.tubes([(a, a + (b - a) * 0.3, 1.2, 1.2), (b, b + (c - b) * 0.2, 1.0, 1.4)]), -220, grid)
        if rng.random() < 0.4:
            radius = rng.uniform(1.5, 3.5)
            paint(hu, grid.tubes([(a, a, radius, radius) for a in points_in_lung(p, rng, side, 3)]), 420, grid)
    return hu


def draw_lesions(p: Patient, grid: Grid, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
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
    p: Patient,
    grid: Grid,
    rng: np.random.Generator,
    radius: float,
    border: np.ndarray,
    texture: np.ndarray,
    opacity: np.ndarray,
    hu: np.ndarray,
) -> None:
    """Adds one lesion in place, by preference peripheral, posterior and low."""
    side = int(rng.choice([-1, 1]))
    points = points_in_lung(p, rng, side, 60)
    x, y, z = points.T
    weight = np.exp(lung_distance(p, side, x, y, z) / 10 + y / 70 - z / 150)
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

"""Everything of the phantom but the lungs: body wall, abdomen, great vessels, bones, the table."""

from itertools import pairwise

import numpy as np

from distseg.phantoms.shapes import (
    HILUM,
    SPINE_Y_MM,
    Patient,
    apex,
    heart_distance,
    lung_ellipse_distance,
    spine_muscle_distance,
    superellipse,
)
from distseg.phantoms.voxels import FAR_MM, Grid, paint, smooth_min


def draw_trunk(
    p: Patient, grid: Grid, rng: np.random.Generator, dome: np.ndarray, great_vessels: np.ndarray
) -> np.ndarray:
    """Everything but the lungs, which are laid over it: float32 HU [Z, Y, X]."""
    x, y, z = grid.x, grid.y, grid.z
    u = apex(z)
    cage = superellipse(x, y - 8 * u, 2 * p.lung_x, p.lung_y + 2, u**3)
    cage = np.minimum(cage, np.minimum(lung_ellipse_distance(p, -1, x, y, z), lung_ellipse_distance(p, 1, x, y, z)))
    deep = p.lung_y + p.wall + 0.7 * p.fat + 6
    body = superellipse(x, y - 6, 2 * p.lung_x + p.wall + p.fat, deep, 0.3 * np.clip((z - 220) / 60, 0, 1) ** 2)
    muscle = np.minimum(body + p.fat, cage - 0.8 * p.wall)
    for side in (-1, 1):
        chest = (x - side * 72) ** 2 + (y + p.lung_y + 12) ** 2 * 1.6 + (z - 135) ** 2
        body = smooth_min(body, np.sqrt(chest) - p.breast, 14)
    hu = np.full(grid.shape, -1000, np.float32)
    _paint_table(hu, grid, 6 + deep + 9)
    streaks = grid.noise(rng, 8)
    paint(hu, body, 15, grid)
    paint(hu, body + 2, -105 + 8 * streaks, grid)
    paint(hu, muscle, 52 - 130 * np.clip(streaks - 0.9, 0, 1), grid)
    paint(hu, np.maximum(muscle, np.abs(cage - 14) - 1.2), -70, grid)  # fat between the ribs and the outer muscles
    paint(hu, cage, -90 + 110 * np.clip(streaks, 0, 1), grid)
    _paint_abdomen(hu, grid, np.maximum(cage + 2, z - dome), streaks, gas_y=rng.uniform(-75, -15))
    paint(
        hu, np.maximum(spine_muscle_distance(x, y), body + 0.6 * p.fat), 50 - 110 * np.clip(streaks - 1.1, 0, 1), grid
    )
    heart = heart_distance(p, x, y, z)
    paint(hu, heart - 4, -90, grid)
    paint(hu, heart, 42 + 4 * streaks, grid)
    paint(hu, great_vessels, 44, grid)
    _paint_bones(p, hu, grid)
    return hu


def _paint_table(hu: np.ndarray, grid: Grid, top_mm: float) -> None:
    upper = grid.table_y - (top_mm - grid.table_x**2 / 1300)
    lower = grid.table_y - (top_mm + 24)
    paint(hu, np.maximum(-upper, lower), -955, grid)  # foam
    for shell in (upper, lower):
        paint(hu, np.abs(shell) - 1.5, -250, grid)


def _paint_abdomen(hu: np.ndarray, grid: Grid, below: np.ndarray, streaks: np.ndarray, gas_y: float) -> None:
    x, y, z = grid.x, grid.y, grid.z
    paint(hu, np.maximum(below, x - 22 + y / 5), 58, grid)  # liver
    spleen = (np.sqrt(((x - 95) / 34) ** 2 + ((y - 38) / 44) ** 2 + ((z - 30) / 60) ** 2) - 1) * 34
    paint(hu, np.maximum(below, spleen), 50, grid)
    stomach = (np.sqrt(((x - 62) / 44) ** 2 + ((y + 18) / 50) ** 2 + ((z - 25) / 42) ** 2) - 1) * 42
    paint(hu, np.maximum(below, stomach), 45, grid)
    fluid = np.where(y < gas_y, -970, 18 + 6 * streaks)  # gas collects in front
    paint(hu, np.maximum(below + 4, stomach + 5), fluid, grid)


def great_vessel_tubes() -> list[tuple]:
    """Aorta with its arch, superior vena cava, pulmonary trunk and arteries, oesophagus, neck vessels."""
    arch = [(-14, -28, 125), (-16, -30, 180), (-8, -20, 196), (8, 5, 202), (20, 28, 196), (24, 40, 180), (22, 40, 0)]
    vessels: list[tuple] = [(a, b, 15 - i * 0.7, 14.3 - i * 0.7) for i, (a, b) in enumerate(pairwise(arch))]
    vessels += [((-32, -16, 130), (-30, -14, 215), 9, 8), ((16, -42, 135), (14, -22, 160), 13, 12)]
    vessels += [((12, -18, 160), side * HILUM * (1, side, side), 10, 7) for side in (-1, 1)]
    vessels += [((6, 32, 0), (2, 30, 280), 7, 7)]
    neck = ((-14, -10), (2, -8), (14, 4), (-17, 6), (16, -14))
    return vessels + [((x, y, 200), (1.3 * x, y, 280), 5, 4) for x, y in neck]


def _ribs(p: Patient, side: int) -> tuple[list[tuple], list[tuple]]:
    """Twelve slanted arcs, behind high and in front low, and the cartilage that joins them to the sternum."""
    bone, cartilage = [], []
    for z_back in range(20, 284, 22):
        angles = np.radians(np.arange(-12, 145, 12))
        z = z_back - 95 * (angles / angles[-1]).clip(0) ** 1.2
        u = apex(z)
        wide, deep = ((r + 7) * np.sqrt(np.clip(1 - u**3, 0.12, 1)) for r in (p.lung_x, p.lung_y))
        y = 8 * u + deep * np.cos(angles)
        x = side * (p.lung_x * 0.97 - 20 * u**2 + 0.1 * y + wide * np.sin(angles))
        points = [np.array([side * 22, SPINE_Y_MM + 20, z_back + 4.0]), *np.stack([x, y, z], 1)]
        bone += [(a, b, 4.2, 4.2) for a, b in pairwise(points)]
        sternum = np.array([side * 14, -p.lung_y - 5, max(points[-1][2] + 14, 100)])
        cartilage.append((points[-1], sternum, 4.2, 4.2))
    return bone, cartilage


def _paint_bones(p: Patient, hu: np.ndarray, grid: Grid) -> None:
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
    paint(hu, grid.tubes(cartilage), 110, grid)
    bones = np.minimum(grid.tubes(bone), np.minimum(np.where(in_disc, body + 3, body), np.abs(canal - 12) - 2.5))
    paint(hu, bones, 560, grid)
    paint(hu, bones + 2.4, 190, grid)
    paint(hu, np.where(in_disc, body, FAR_MM), 85, grid)
    paint(hu, canal - 9, 30, grid)

"""Where the voxels of a phantom are, in millimetres, and how a shape is laid over them."""

import numpy as np

FIELD_OF_VIEW_MM = 360.0
HEIGHT_MM = 280.0
FAR_MM = 99.0
WARP_LIMIT_MM = 7.0
CUBIC_NOISE_SD = 0.33  # of a cubic B-spline sum of unit normals in three dimensions: 0.479 ** 1.5


class Grid:
    """Where the voxels are, after a smooth warp that makes the ideal shapes a little irregular."""

    def __init__(self, rng: np.random.Generator, size: int, n_slices: int, field_mm: float = FIELD_OF_VIEW_MM):
        self.field_mm, self.pixel_mm, self.slice_mm = field_mm, field_mm / size, HEIGHT_MM / n_slices
        self.shape = (n_slices, size, size)
        in_plane = (np.arange(size, dtype=np.float32) + 0.5) * self.pixel_mm - field_mm / 2
        self.z = ((np.arange(n_slices, dtype=np.float32) + 0.5) * self.slice_mm)[:, None, None]
        self.x = in_plane + np.clip(2.5 * self.noise(rng, 50), -WARP_LIMIT_MM, WARP_LIMIT_MM)
        self.y = in_plane[:, None] + np.clip(2.5 * self.noise(rng, 50), -WARP_LIMIT_MM, WARP_LIMIT_MM)
        self.table_x, self.table_y = in_plane, in_plane[:, None]  # a table is not warped

    def noise(self, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
        """Smooth Gaussian noise, mean 0, variance 1, whose knots lie in mm and not in pixels: float32 [Z, Y, X]."""
        # As many knots in any smaller field, so that it shows the same patient.
        across = max(self.field_mm, FIELD_OF_VIEW_MM)
        extents, seen = (HEIGHT_MM, across, across), (HEIGHT_MM, self.field_mm, self.field_mm)
        field: np.ndarray = rng.standard_normal([int(mm / scale_mm) + 5 for mm in extents], dtype=np.float32)
        for axis, (extent, mm, count) in enumerate(zip(extents, seen, self.shape, strict=True)):
            at = (np.arange(count, dtype=np.float32) + 0.5) * (mm / count / scale_mm)
            at += np.float32((extent - mm) / 2 / scale_mm)
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
        origin = np.array([self.field_mm / 2, self.field_mm / 2, 0])
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


def paint(hu: np.ndarray, d: np.ndarray, value: np.ndarray | float, grid: Grid) -> None:
    """Lays a structure over what is there, in place, with the partial-volume edge of one pixel."""
    hu += (value - hu) * np.clip(0.5 - d / grid.pixel_mm, 0, 1)


def smooth_min(a: np.ndarray, b: np.ndarray, width_mm: float) -> np.ndarray:
    """Union of two shapes with the crease between them filled."""
    t = np.clip(0.5 + (b - a) / (2 * width_mm), 0, 1)
    return b + (a - b) * t - width_mm * t * (1 - t)

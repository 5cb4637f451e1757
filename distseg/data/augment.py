"""How a sample is changed: all randomness of the input pipeline, drawn as a pure function of (seed, epoch, sample).

The numbers go to DALI as arguments (pipeline.py); nothing random is left there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from distseg.config import AugmentConfig
from distseg.data.plan import AUGMENT_STREAM, ELASTIC_STREAM, philox
from distseg.geometry import working_size


@dataclass(frozen=True)
class Draw:
    """One sample's random changes; the defaults change nothing."""

    linear: np.ndarray  # (2, 2), output to source, around the centre
    shift: tuple[float, float] = (0.0, 0.0)  # x, y, fractions of the image
    crop: tuple[float, float] = (0.0, 0.0)  # x, y in [-1, 1]: where in the room that a crop has
    focus: float | None = None  # in [0, 1): which of the focus pixels a crop lies around; None: it is not focused
    resolution: float = 1.0  # side that the image is sampled at, as a fraction of its size
    blur_sigma: float = 0.0  # pixels; 0: none
    noise_hu: float = 0.0  # standard deviation; 0: none
    noise_at: tuple[float, float] = (0.0, 0.0)  # y, x in [0, 1): where in the noise tile
    contrast: float = 1.0
    brightness: float = 0.0  # fraction of the window
    gamma: float = 1.0
    cutout: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # y, x, height, width, fractions of the image
    elastic: bool = False


def draw_augmentation(augment: AugmentConfig, seed: int, epoch: int, sample: int) -> Draw:
    """The random changes of a sample in an epoch: a function of the arguments alone."""
    # Always the same number of draws in the same places, so that a probability changes nothing but its own change.
    u = philox(seed, AUGMENT_STREAM, epoch, sample).uniform(size=32)
    flip, gate, angle, zoom, shear_x, shear_y = u[:6]
    linear, shift = np.eye(2), np.zeros(2)
    if gate < augment.affine_probability:
        radians = math.radians(augment.rotate_deg) * (2 * angle - 1)
        rotation = np.array([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]])
        shear = np.array([[1, augment.shear * (2 * shear_x - 1)], [augment.shear * (2 * shear_y - 1), 1]])
        linear = rotation @ shear / _log_between(augment.scale, zoom)
        shift = augment.shift * (2 * u[6:8] - 1)
    if flip < augment.flips:
        linear = linear @ np.diag([-1.0, 1.0])
    crop = 2 * u[8:10] - 1
    draw = Draw(linear, (shift[0], shift[1]), (crop[0], crop[1]))
    if u[10] < augment.focus_probability:
        draw = replace(draw, focus=u[11])
    if u[12] < augment.low_resolution_probability:
        draw = replace(draw, resolution=_between(augment.low_resolution, u[13]))
    if u[14] < augment.blur_probability:
        draw = replace(draw, blur_sigma=_between(augment.blur_sigma, u[15]))
    if u[16] < augment.noise_probability:
        draw = replace(draw, noise_hu=augment.noise_hu * u[17], noise_at=(u[18], u[19]))
    if u[20] < augment.contrast_probability:
        draw = replace(
            draw, contrast=_between(augment.contrast, u[21]), brightness=augment.brightness * (2 * u[22] - 1)
        )
    if u[23] < augment.gamma_probability:
        draw = replace(draw, gamma=_log_between(augment.gamma, u[24]))
    if u[25] < augment.cutout_probability:
        height, width = augment.cutout * u[26], augment.cutout * u[27]
        draw = replace(draw, cutout=(u[28] * (1 - height), u[29] * (1 - width), height, width))
    return replace(draw, elastic=bool(u[30] < augment.elastic_probability))


def sampling_matrix(
    shape: tuple[int, int],
    image_size: int,
    fit: Literal["resize", "crop"],
    draw: Draw | None = None,
    focus_yx: tuple[int, int] | None = None,
    pixel_mm: tuple[float, float] = (0.0, 0.0),
    spacing_mm: float = 0.0,
) -> np.ndarray:
    """The affine map from output pixels to source pixels: fit, flip, rotation, scale, shear and shift in one resampling.

    Coordinates are (x, y) with the origin at the corner of the first pixel; the slice's centre maps to the image's.

    Args:
        shape: rows, columns of the slice.
        image_size: side of the output, pixels.
        fit: "resize" scales the longer side to image_size, "crop" keeps the native scale, or takes that of `spacing_mm`.
        draw: augmentation; None: none, and a crop is the central one.
        focus_yx: pixel that a crop lies around: anywhere in its middle half, as far as the slice has room.
        pixel_mm: of the slice, down and across.
        spacing_mm: of the image; 0: sizes in mm do not count.

    Returns:
        float32 (2, 3).
    """
    rows, columns = shape
    height, width = working_size(rows, columns, *pixel_mm, image_size if fit == "resize" else 0, spacing_mm)
    # Resized images keep their shape to the last bit of a pixel; rounded sizes would stretch the shorter side.
    scale = (
        np.full(2, max(rows, columns) / image_size) if fit == "resize" else np.array([columns / width, rows / height])
    )
    linear = np.diag(scale)
    centre_source = np.array([columns, rows]) / 2
    if draw is not None:
        linear = linear @ draw.linear
        room = np.maximum(0, centre_source - scale * image_size / 2) if fit == "crop" else np.zeros(2)
        away = room * draw.crop
        if focus_yx is not None:
            around = np.array(focus_yx[::-1]) + 0.5 + np.array(draw.crop) * scale * image_size / 4
            away = np.clip(around - centre_source, -room, room)
        centre_source = centre_source + away + np.array(draw.shift) * image_size * scale
    offset = centre_source - linear @ np.full(2, image_size / 2)
    return np.concatenate([linear, offset[:, None]], axis=1).astype(np.float32)


def draw_displacement(augment: AugmentConfig, seed: int, epoch: int, sample: int) -> np.ndarray:
    """Displacement at the knots of a sample's elastic deformation.

    Returns:
        float32 (2, knots, knots): x and y, in units of half an image (as `grid_sample` has them).
    """
    knots = augment.elastic_knots
    normal = philox(seed, ELASTIC_STREAM, epoch, sample).standard_normal((2, knots, knots), dtype=np.float32)
    return 2 * augment.elastic_shift * normal


def deform(
    image_BCHW: torch.Tensor, label_BHW: torch.Tensor, knots_B2KK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Elastic deformation: pixels move by a bicubic field through the knots; the edge repeats outside.

    DALI deforms on the GPU only (experimental.remap, 2.4), so torch does it, on either device.

    Returns:
        image (bilinear) and label (nearest), of the given shapes and types.
    """
    rows_HK, columns_WK = (_cubic_weights(n, knots_B2KK.shape[-1]).to(knots_B2KK.device) for n in image_BCHW.shape[-2:])
    grid_BHW2 = torch.einsum("hk,bckl,wl->bhwc", rows_HK, knots_B2KK, columns_WK)
    grid_BHW2[..., 0] += _pixel_centres(image_BCHW.shape[-1], grid_BHW2.device)
    grid_BHW2[..., 1] += _pixel_centres(image_BCHW.shape[-2], grid_BHW2.device)[:, None]
    image = F.grid_sample(image_BCHW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)
    label = F.grid_sample(
        label_BHW.unsqueeze(1).float(), grid_BHW2, mode="nearest", padding_mode="border", align_corners=False
    )
    return image, label.squeeze(1).to(label_BHW.dtype)


def _cubic_weights(n_pixels: int, knots: int) -> torch.Tensor:
    """Weight of each knot at each pixel of a line: (pixels, knots). The field is separable, which makes it cheap."""
    lines = F.interpolate(torch.eye(knots)[None, None], (knots, n_pixels), mode="bicubic", align_corners=True)
    return lines[0, 0].T


def _pixel_centres(n_pixels: int, device: torch.device) -> torch.Tensor:
    """Places of pixel centres when the line runs from -1 to 1."""
    return (2 * torch.arange(n_pixels, device=device) + 1) / n_pixels - 1


def windowing(windows_hu: Sequence[tuple[float, float]], draw: Draw | None) -> np.ndarray:
    """Gain and offset that map HU to [0, 1] in each window, contrast and brightness included.

    Returns:
        float32 (windows, 2): image = gain * HU + offset, to be clipped.
    """
    contrast, brightness = (draw.contrast, draw.brightness) if draw else (1.0, 0.0)
    low, high = np.array(windows_hu, dtype=np.float64).T
    gain = contrast / (high - low)
    # contrast * (x - 0.5) + 0.5 + brightness for x = (HU - low) / (high - low)
    offset = 0.5 + brightness - 0.5 * contrast - gain * low
    return np.stack([gain, offset], axis=1).astype(np.float32)


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _log_between(bounds: tuple[float, float], u: float) -> float:
    return math.exp(_between((math.log(bounds[0]), math.log(bounds[1])), u))

"""The served model: int16 HU in, label mask and region probabilities out; everything between is inside.

The same module scores a run, predicts a volume and is exported, so what is measured is what is served. Scriptable.
Shapes: B batch, R regions, H rows, W columns.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from distseg.config import AIR_HU
from distseg.geometry import working_size
from distseg.models.label_map import LabelMap

LARGEST_SIDE = 8192  # of a slice that the network sees: wrong sizes of pixels ask for no terabytes


class HuSegmenter(nn.Module):
    """HU slices of any size to labels at the same size.

    Each slice is scaled so that its longer side is `image_size` (0: kept) or its pixels have `spacing_mm`, padded with air at the
    right and bottom to what the network's stride divides, windowed, segmented; the logits are cropped and scaled back.

    Args:
        network: image (B, C, h, w) in [0, 1] -> logits (B, R, h, w); scripted, traced or eager.
        windows_hu: HU mapped to 0 and to 1; each makes channels of its own.
        n_slices: of the input; the labels are those of the middle one.
        image_size: longer side the network works at, pixels; 0 for the slice's own.
        stride: what h and w are multiples of.
        label_map: probabilities of regions -> labels.
        spacing_mm: of a pixel that the network sees; 0: sizes in mm do not count.
        pixel_mm: that all slices have, down and across, where sizes in mm count.
    """

    def __init__(
        self,
        network: nn.Module,
        windows_hu: Sequence[tuple[float, float]],
        n_slices: int,
        image_size: int,
        stride: int,
        label_map: LabelMap,
        spacing_mm: float = 0.0,
        pixel_mm: tuple[float, float] = (0.0, 0.0),
    ):
        super().__init__()
        self.network = network
        self.low_hu = [float(low) for low, _ in windows_hu]
        self.high_hu = [float(high) for _, high in windows_hu]
        self.n_slices = n_slices
        self.air_hu = AIR_HU
        self.image_size = image_size
        self.stride = stride
        self.label_map = label_map
        self.spacing_mm = spacing_mm
        self.largest_side = LARGEST_SIDE
        self.pixel_y_mm, self.pixel_x_mm = pixel_mm

    def forward(self, hu_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments slices.

        Args:
            hu_BCHW: int16, Hounsfield units; C = n_slices: the slice between its neighbours, from below to above.

        Returns:
            mask: uint8 labels (B, 1, H, W).
            probability: float32 (B, R, H, W).
        """
        self.check(hu_BCHW)
        h, w = working_size(
            hu_BCHW.shape[2], hu_BCHW.shape[3], self.pixel_y_mm, self.pixel_x_mm, self.image_size, self.spacing_mm
        )
        return self.segment(hu_BCHW, h, w)

    def check(self, hu_BCHW: torch.Tensor) -> None:
        if hu_BCHW.dtype != torch.int16:
            raise ValueError("input: must be int16 Hounsfield units; cast it")
        if hu_BCHW.dim() != 4 or hu_BCHW.shape[1] != self.n_slices or hu_BCHW.numel() == 0:
            raise ValueError(f"input: must have shape (N, {self.n_slices}, H, W), none of them 0; reshape it")

    def segment(
        self, hu_BCHW: torch.Tensor, working_height: int, working_width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices that become one size."""
        height, width = hu_BCHW.shape[2], hu_BCHW.shape[3]
        is_resized = self.image_size > 0 or self.spacing_mm > 0
        hu = hu_BCHW.float().clamp(min=self.air_hu)  # what scanners pad with, -2048 and the like, is air
        if is_resized:
            hu = F.interpolate(hu, size=[working_height, working_width], mode="bilinear", align_corners=False)
        h, w = hu.shape[2], hu.shape[3]
        hu = F.pad(hu, [0, -w % self.stride, 0, -h % self.stride], value=self.air_hu)
        channels = [
            ((hu - low) * (1.0 / (high - low))).clamp(0.0, 1.0)
            for low, high in zip(self.low_hu, self.high_hu)  # noqa: B905 (scripting knows no strict=)
        ]
        logits = self.network(torch.cat(channels, dim=1))[:, :, :h, :w].float()
        if is_resized:
            logits = F.interpolate(logits, size=[height, width], mode="bilinear", align_corners=False)
        probability = torch.sigmoid(logits)
        return self.label_map(probability), probability


class SpacedSegmenter(HuSegmenter):
    """The same for slices of any pixel size, which the network sees at `spacing_mm`.

    A class of its own, since Triton's backend counts the inputs of `forward`.
    """

    def forward(  # type: ignore[override]
        self, hu_BCHW: torch.Tensor, pixel_mm_B2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments slices; those that become one size together.

        Args:
            hu_BCHW: see `HuSegmenter`.
            pixel_mm_B2: float32, sizes of each slice's pixels, down and across.
        """
        self.check(hu_BCHW)
        if pixel_mm_B2.dim() != 2 or pixel_mm_B2.shape[0] != hu_BCHW.shape[0] or pixel_mm_B2.shape[1] != 2:
            raise ValueError("PIXEL_MM: must have shape (N, 2), as many as slices; reshape it")
        if not bool((pixel_mm_B2 > 0).all()):  # NaN too
            raise ValueError("PIXEL_MM: must be above 0; send mm")
        height, width = hu_BCHW.shape[2], hu_BCHW.shape[3]
        sizes: list[list[int]] = []
        for mm in pixel_mm_B2.cpu():
            h, w = working_size(height, width, float(mm[0]), float(mm[1]), 0, self.spacing_mm)
            if max(h, w) > self.largest_side:
                raise ValueError("PIXEL_MM: so large that the network would see more than 8192 pixels a side; send mm")
            sizes.append([h, w])
        size_B2 = torch.tensor(sizes)
        masks, probabilities, places = [], [], []
        for size in torch.unique(size_B2, dim=0):
            place = (size_B2 == size).all(dim=1).nonzero()[:, 0].to(hu_BCHW.device)
            mask, probability = self.segment(hu_BCHW[place], int(size[0]), int(size[1]))
            masks.append(mask)
            probabilities.append(probability)
            places.append(place)
        back = torch.argsort(torch.cat(places))
        return torch.cat(masks)[back], torch.cat(probabilities)[back]


def build_segmenter(
    network: nn.Module,
    *,
    stride: int,
    windows_hu: Sequence[tuple[float, float]],
    n_slices: int,
    image_size: int,
    fit: str,
    threshold: float,
    regions: Mapping[str, Sequence[int]],
    spacing_mm: float | None = None,
) -> HuSegmenter:
    """The segmenter of a network trained on whole slices (`fit` resize), on windows at native scale (crop), or at one pixel size."""
    side = image_size if fit == "resize" else 0
    kind = HuSegmenter if spacing_mm is None else SpacedSegmenter
    return kind(network, windows_hu, n_slices, side, stride, LabelMap(regions, threshold), spacing_mm or 0.0)


def at_pixel_size(segmenter: HuSegmenter, pixel_mm: tuple[float, float]) -> HuSegmenter:
    """A segmenter of slices of all sizes, for slices of one."""
    windows_hu = list(zip(segmenter.low_hu, segmenter.high_hu, strict=True))
    fixed = HuSegmenter(
        segmenter.network,
        windows_hu,
        segmenter.n_slices,
        0,
        segmenter.stride,
        segmenter.label_map,
        segmenter.spacing_mm,
        pixel_mm,
    )
    return fixed.train(segmenter.training)

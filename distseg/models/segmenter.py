"""The served model: int16 HU in, label mask and region probabilities out; everything between is inside.

The same module scores a run, predicts a volume and is exported, so what is measured is what is served. Scriptable.
Shapes: B batch, R regions, H rows, W columns.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from distseg.config import AIR_HU
from distseg.models.label_map import LabelMap


class HuSegmenter(nn.Module):
    """HU slices of any size to labels at the same size.

    Each slice is scaled so that its longer side is `image_size` (0: kept), padded with air at the right and bottom to
    what the network's stride divides, windowed, segmented; the logits are cropped and scaled back.

    Args:
        network: image (B, C, h, w) in [0, 1] -> logits (B, R, h, w); scripted, traced or eager.
        windows_hu: HU mapped to 0 and to 1; each makes channels of its own.
        n_slices: of the input; the labels are those of the middle one.
        image_size: longer side the network works at, pixels; 0 for the slice's own.
        stride: what h and w are multiples of.
        label_map: probabilities of regions -> labels.
    """

    def __init__(
        self,
        network: nn.Module,
        windows_hu: Sequence[tuple[float, float]],
        n_slices: int,
        image_size: int,
        stride: int,
        label_map: LabelMap,
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

    def forward(self, hu_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments slices.

        Args:
            hu_BCHW: int16, Hounsfield units; C = n_slices: the slice between its neighbours, from below to above.

        Returns:
            mask: uint8 labels (B, 1, H, W).
            probability: float32 (B, R, H, W).
        """
        if hu_BCHW.dtype != torch.int16:
            raise ValueError("input: must be int16 Hounsfield units; cast it")
        if hu_BCHW.dim() != 4 or hu_BCHW.shape[1] != self.n_slices or hu_BCHW.numel() == 0:
            raise ValueError(f"input: must have shape (N, {self.n_slices}, H, W), none of them 0; reshape it")
        height, width = hu_BCHW.shape[2], hu_BCHW.shape[3]
        hu = hu_BCHW.float().clamp(min=self.air_hu)  # what scanners pad with, -2048 and the like, is air
        if self.image_size > 0:
            longer = max(height, width)
            size = [
                max(1, (height * self.image_size + longer // 2) // longer),
                max(1, (width * self.image_size + longer // 2) // longer),
            ]
            hu = F.interpolate(hu, size=size, mode="bilinear", align_corners=False)
        h, w = hu.shape[2], hu.shape[3]
        hu = F.pad(hu, [0, -w % self.stride, 0, -h % self.stride], value=self.air_hu)
        channels = [
            ((hu - low) * (1.0 / (high - low))).clamp(0.0, 1.0)
            for low, high in zip(self.low_hu, self.high_hu)  # noqa: B905 (scripting knows no strict=)
        ]
        logits = self.network(torch.cat(channels, dim=1))[:, :, :h, :w].float()
        if self.image_size > 0:
            logits = F.interpolate(logits, size=[height, width], mode="bilinear", align_corners=False)
        probability = torch.sigmoid(logits)
        return self.label_map(probability), probability


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
) -> HuSegmenter:
    """The segmenter of a network trained on whole slices (`fit` resize) or on windows at native scale (crop)."""
    side = image_size if fit == "resize" else 0
    return HuSegmenter(network, windows_hu, n_slices, side, stride, LabelMap(regions, threshold))

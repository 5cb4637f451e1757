"""One label a pixel from the regions' probabilities: the same for validation, scores, `distseg predict` and the exported file.

Shape letters: B images, R regions, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distseg.regions import exclusive, write_order


class LabelMap(nn.Module):
    """Probabilities of regions to labels. Scriptable.

    A region is found where its probability is at least its threshold. Of found regions that share no label, the most probable
    one stays (of equals the first). Those that stay are written, wide ones first, narrower ones over them.

    Args:
        regions: region -> numbers of its labels, in the order of the probabilities.
        threshold: of every region.

    Attributes:
        thresholds: of each region.
        outer: for each region the one it must lie inside, written before it; -1: anywhere.
    """

    excludes_RR: Tensor

    def __init__(self, regions: Mapping[str, Sequence[int]], threshold: float):
        super().__init__()
        self.thresholds = [threshold] * len(regions)
        self.outer = [-1] * len(regions)
        written = write_order(regions)
        self.region_order = [region for region, _ in written]
        self.label_order = [label for _, label in written]
        excludes_RR = torch.zeros(len(regions), len(regions), dtype=torch.bool)
        for one, other in exclusive(regions):
            excludes_RR[one, other] = excludes_RR[other, one] = True
        self.register_buffer("excludes_RR", excludes_RR, persistent=False)
        self.rounds = _rounds(excludes_RR)

    def forward(self, probability_BRHW: Tensor) -> Tensor:
        """Gives labels, uint8 (B, 1, H, W)."""
        found_BRHW = self.found(probability_BRHW)
        mask = torch.zeros_like(found_BRHW[:, :1], dtype=torch.uint8)
        written = [found_BRHW[:, region : region + 1] for region in range(len(self.outer))]
        for region, label in zip(self.region_order, self.label_order):  # noqa: B905 (scripting knows no strict=)
            if self.outer[region] >= 0:
                written[region] = written[region] & written[self.outer[region]]
            mask = mask.masked_fill(written[region], label)
        return mask

    def found(self, probability_BRHW: Tensor) -> Tensor:
        """Which regions a pixel is in, bool (B, R, H, W): those found, without what a more probable one excludes."""
        parts = [
            probability_BRHW[:, region : region + 1] >= threshold for region, threshold in enumerate(self.thresholds)
        ]
        found = torch.cat(parts, dim=1)
        undecided = found
        for _ in range(self.rounds):
            # The most probable of those that are left stays; what it excludes is out.
            highest, best = torch.where(undecided, probability_BRHW, -1.0).max(dim=1)
            beaten = self.excludes_RR[best].permute(0, 3, 1, 2) & (highest >= 0).unsqueeze(1)
            found = found & ~beaten
            regions = torch.arange(len(self.outer), device=best.device).reshape(1, -1, 1, 1)
            undecided = undecided & ~beaten & (best.unsqueeze(1) != regions)
        return found


def _rounds(excludes_RR: Tensor) -> int:
    """After so many decisions none is left: as many regions as may be in one pixel together; 0 where none excludes another."""
    if not bool(excludes_RR.any()):
        return 0
    together_R = (~excludes_RR).sum(dim=1)  # with itself: an upper bound, and exact where regions lie inside each other
    return int(together_R.max())

"""The arithmetic that everything above relies on: region sums of BCE + Dice, and sums over ranks."""

from distseg.kernels.bce_dice import region_bits, region_sums, region_targets
from distseg.kernels.collectives import sum_over_ranks

__all__ = ["region_bits", "region_sums", "region_targets", "sum_over_ranks"]

"""The arithmetic that everything above relies on: region sums of BCE + Dice, and sums over ranks."""

from distseg.kernels.bce_dice import region_bits, region_targets
from distseg.kernels.collectives import sum_over_ranks
from distseg.kernels.dispatch import kernel_for, region_sums

__all__ = ["kernel_for", "region_bits", "region_sums", "region_targets", "sum_over_ranks"]

"""The region sums on a CPU in plain torch, a few rows at a time: what lies between the logits and the sums stays in cache.

Formulas: `distseg.kernels.bce_dice`. The logarithm is what costs most there, and a product of pixels needs only one:

    log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)) = max(z, 0) - log s,   z = t ? -x : x,   s = sigmoid(|x|) = max(p, 1 - p)
    B = sum max(z, 0) - sum over groups of pixels of log(product of s)

    dL/dx = p (1 - p) (dL/dP + t dL/dI) + (p - t) dL/dB

A pixel's part of B is right to 6e-8, the rounding of s. Ignored pixels are read as minus infinity outside all regions,
where p, max(z, 0), log s and the gradient are zero.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from distseg.config import IGNORED_LABEL
from distseg.kernels.bce_dice import SUMS, labels_of

# Of a block: enough for torch to share it out to its threads (from 32,768 on), few enough for five float32 arrays of it
# to stay in cache. A quarter of it took twice as long; threads of our own took four times: they wait for Python's lock.
PIXELS = 131_072
GROUP = 64  # factors of one product: it is at least 2^-64, far from float32's smallest


class Block(NamedTuple):
    """Some rows of one sample."""

    sample: int
    rows: slice


def forward(logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """The sums (B, R, 5), float32, as `bce_dice.region_sums` gives them; blocks are added up in float64, in order."""
    regions = [_runs(mask) for mask in bits]
    sums = []
    for block in _blocks(label_BHW):
        label, ignored = _labels(label_BHW, block)
        n_valid = label.new_tensor(len(label) if ignored is None else len(label) - int(ignored.count_nonzero()))
        for r, runs in enumerate(regions):
            x = _logits(logits_BRHW, block, r, ignored)
            t = _in_region(label, runs)
            p = torch.sigmoid(x)
            z_positive = torch.rsub(t, 1, alpha=2).mul_(x).relu_()
            bce = _total(z_positive, block) - _log_product(torch.maximum(p, 1 - p))
            sums += [_total(p, block), _total(t, block), _total(p.mul_(t), block), bce, n_valid]
    shape = (len(label_BHW), -1, len(bits), len(SUMS))
    return torch.stack(sums).view(shape).double().sum(dim=1).float()


def backward(
    logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int], grad_BR5: torch.Tensor
) -> torch.Tensor:
    """The gradient in the logits, in their dtype and layout, for that in the sums."""
    grad_BRHW = torch.empty_like(logits_BRHW)
    regions = [_runs(mask) for mask in bits]
    weights = grad_BR5.tolist()
    for block in _blocks(label_BHW):
        label, ignored = _labels(label_BHW, block)
        for r, runs in enumerate(regions):
            by_p, _, by_overlap, by_bce, _ = weights[block.sample][r]
            t = _in_region(label, runs)
            p = torch.sigmoid(_logits(logits_BRHW, block, r, ignored))
            grad = torch.ops.aten.sigmoid_backward((t * by_overlap).add_(by_p), p)
            grad.add_(p.sub_(t), alpha=by_bce)
            out = grad_BRHW[block.sample, r, block.rows]
            out.copy_(grad.view_as(out))
    return grad_BRHW


def _blocks(label_BHW: torch.Tensor) -> list[Block]:
    """All rows of all samples, in equally many blocks a sample."""
    batch, height, width = label_BHW.shape
    n_blocks = min(height, -(-height * width // PIXELS))
    bounds = [height * i // n_blocks for i in range(n_blocks + 1)]
    return [Block(b, slice(top, bottom)) for b in range(batch) for top, bottom in zip(bounds, bounds[1:], strict=False)]


def _labels(label_BHW: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels of a block in one row as float32 (whose comparisons are vectorised, those of bytes are not); what is ignored."""
    label = label_BHW[block.sample, block.rows].flatten()
    ignored = label == IGNORED_LABEL if label.amax() == IGNORED_LABEL else None
    return label.float(), ignored


def _logits(logits_BRHW: torch.Tensor, block: Block, r: int, ignored: torch.Tensor | None) -> torch.Tensor:
    """Logits of a block and region in one row, float32, minus infinity where ignored."""
    x = logits_BRHW[block.sample, r, block.rows].float().flatten()
    return x if ignored is None else x.masked_fill(ignored, -torch.inf)


def _in_region(label: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """1 where a label is in one of a region's runs, else 0: float32, one comparison a run."""
    inside = None
    for first, last in runs:
        middle, half = (first + last) / 2, (last - first) / 2
        in_run = torch.sub(label, middle).abs_().le_(half) if half else label.clone().eq_(first)
        inside = in_run if inside is None else inside.add_(in_run)
    return torch.zeros_like(label) if inside is None else inside


def _runs(mask: int) -> list[tuple[int, int]]:
    """First and last label of every run of adjacent labels in a bit mask."""
    runs = [list(run) for _, run in groupby(enumerate(labels_of(mask)), key=lambda pair: pair[1] - pair[0])]
    return [(run[0][1], run[-1][1]) for run in runs]


def _total(x: torch.Tensor, block: Block) -> torch.Tensor:
    """The sum of a block in one row; by image rows, as torch splits a sum of all differently for each number of threads."""
    return x.view(block.rows.stop - block.rows.start, -1).sum(dim=1).sum()


def _log_product(factors: torch.Tensor) -> torch.Tensor:
    """Sum of the logarithms of factors in [0.5, 1]."""
    whole = len(factors) // GROUP * GROUP
    products = factors[:whole].view(GROUP, -1).prod(dim=0)
    return products.log_().sum() + factors[whole:].log().sum()

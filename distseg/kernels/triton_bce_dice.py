"""The region sums in Triton: logits and labels are read once forward and once backward, nothing but sums lies between.

Formulas: `distseg.kernels.bce_dice`, arranged so that a pixel costs one exponential and one division:

    e = exp(-|x|),   p = x >= 0 ? 1 / (1 + e) : e / (1 + e),   z = t ? -x : x
    B = sum max(z, 0) + sum over groups of pixels of log(product of (1 + e))

    dL/dx = p (1 - p) (dL/dP + t dL/dI) + (p - t) dL/dB,   p (1 - p) = e / (1 + e)^2

A pixel's part of B is right to 6e-8, the rounding of 1 + e. Ignored pixels, and those past the end, are read as minus
infinity outside all regions: e, p, max(z, 0), log(1 + e) and the gradient are zero there.

Bytes a pixel, for R regions of s bytes a logit: forward R s + 1, backward 2 R s + 1, the least that such a loss can move.
Shapes: B batch, R regions (R2: the next power of two), H rows, W columns; P pixels of a block.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from distseg.config import IGNORED_LABEL
from distseg.kernels.bce_dice import SUMS

IGNORED = tl.constexpr(IGNORED_LABEL)
N_SUMS = tl.constexpr(len(SUMS))
LOG2_E = tl.constexpr(1.4426950408889634)
# Blocks count logits of all regions: 8 or 16 a thread, so that every load of contiguous logits has 128 bits. The forward
# kernel is not tuned, since another block is another order of additions and a run would no longer repeat another's bits.
FORWARD_BLOCK, FORWARD_WARPS = 2048, 8
SPAN = 4096  # logits that a program of the forward kernel adds up; a product has SPAN / FORWARD_BLOCK factors in [1, 2]
BACKWARD_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps, maxnreg=64)
    for block, warps in ((2048, 8), (1024, 4), (2048, 4), (4096, 8), (1024, 8))
]
if triton.knobs.runtime.interpret:  # has nothing to time
    del BACKWARD_CONFIGS[1:]


@triton.constexpr_function
def _is_wide(bits):
    """Whether bit masks need 64 bits."""
    return max(bits) >= 2**31


@triton.jit
def _place(n_pixels, start, PIXELS: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of the logits at `PIXELS` pixels from `start` in their sample, and which of them exist.

    The shape is (P, R2), or (P * R2) where they lie in one piece, since loads are as wide as the last axis is long.
    64 bits, as the regions of a sample may lie 2^31 apart.
    """
    left = n_pixels - start
    IN_ONE_PIECE: tl.constexpr = CHANNELS_LAST and R == R2
    if IN_ONE_PIECE:
        i = tl.arange(0, PIXELS * R2)
        place, there = start * R + i, i < left * R
    else:
        p, r = tl.arange(0, PIXELS)[:, None], tl.arange(0, R2)[None, :]
        there = p < left
        if R2 != R:
            there = there & (r < R)
        place = start * R + (p * R + r) if CHANNELS_LAST else start + r.to(tl.int64) * n_pixels + p
    return place, there


@triton.jit
def _read(logits, there, label, left, BITS: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, PIXELS: tl.constexpr):
    """Logits x, exp(-|x|), membership t, all (P, R2), and validity (P) of a block's pixels.

    Args:
        logits, there: pointers and their mask, from `_place`.
        label: pointer to the first pixel's label.
        left: number of pixels from there to the end of the sample.
    """
    p, r = tl.arange(0, PIXELS), tl.arange(0, R2)[None, :]
    label = tl.load(label + p, mask=p < left, other=IGNORED)
    valid = label != IGNORED
    x = tl.reshape(tl.load(logits, mask=there, other=0.0), (PIXELS, R2)).to(tl.float32)
    x = tl.where(valid[:, None] & (r < R), x, float("-inf"))
    WIDE: tl.constexpr = _is_wide(BITS)
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    masks = tl.zeros([1, R2], INT)
    for i in tl.static_range(R):
        masks = tl.where(r == i, tl.full([1, R2], BITS[i], INT), masks)
    # Labels above those of masks shift by the sign bit's place, and there is none.
    t = (masks >> tl.minimum(label.to(INT), 63 if WIDE else 31)[:, None]) & 1 != 0
    return x, tl.exp2(-tl.abs(x) * LOG2_E), t, valid


@triton.jit
def _forward_kernel(
    logits, label, sums, n_pixels,
    BITS: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up one span of one sample: `sums` is (B, spans, R, 5)."""
    PIXELS: tl.constexpr = BLOCK // R2
    program = tl.program_id(0).to(tl.int64)
    n_pixels = tl.full((), n_pixels, tl.int64)
    n_spans = tl.cdiv(n_pixels, SPAN // R2)
    sample = program // n_spans
    start = program % n_spans * (SPAN // R2)
    logits += sample * n_pixels * R
    label += sample * n_pixels
    p_sum = tl.zeros([PIXELS, R2], tl.float32)
    t_sum = tl.zeros([PIXELS, R2], tl.float32)
    overlap = tl.zeros([PIXELS, R2], tl.float32)
    z_sum = tl.zeros([PIXELS, R2], tl.float32)
    product = tl.full([PIXELS, R2], 1.0, tl.float32)
    n_valid = tl.zeros([PIXELS], tl.float32)
    for _ in tl.static_range(SPAN // BLOCK):
        place, there = _place(n_pixels, start, PIXELS, R, R2, CHANNELS_LAST)
        x, e, t, valid = _read(logits + place, there, label + start, n_pixels - start, BITS, R, R2, PIXELS)
        probability = tl.where(x >= 0, 1.0, e) / (1 + e)
        p_sum += probability
        t_sum += tl.where(t, 1.0, 0.0)
        overlap += tl.where(t, probability, 0.0)
        z_sum += tl.maximum(tl.where(t, -x, x), 0.0)
        product *= 1 + e
        n_valid += tl.where(valid, 1.0, 0.0)
        start += PIXELS
    r = tl.arange(0, R2)
    sums += (program * R + r) * N_SUMS
    tl.store(sums, tl.sum(p_sum, 0), mask=r < R)
    tl.store(sums + 1, tl.sum(t_sum, 0), mask=r < R)
    tl.store(sums + 2, tl.sum(overlap, 0), mask=r < R)
    tl.store(sums + 3, tl.sum(z_sum + tl.log(product), 0), mask=r < R)
    tl.store(sums + 4, tl.zeros([R2], tl.float32) + tl.sum(n_valid, 0), mask=r < R)


@triton.autotune(BACKWARD_CONFIGS, key=["n_pixels", "R", "CHANNELS_LAST"])
@triton.jit
def _backward_kernel(
    logits, label, grad_sums, grad_logits, n_pixels,
    BITS: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient in one block of one sample's logits; `grad_sums` is (B, R, 5)."""
    PIXELS: tl.constexpr = BLOCK // R2
    program = tl.program_id(0).to(tl.int64)
    n_pixels = tl.full((), n_pixels, tl.int64)
    n_blocks = tl.cdiv(n_pixels, PIXELS)
    sample = program // n_blocks
    start = program % n_blocks * PIXELS
    logits += sample * n_pixels * R
    grad_logits += sample * n_pixels * R
    label += sample * n_pixels + start
    place, there = _place(n_pixels, start, PIXELS, R, R2, CHANNELS_LAST)
    x, e, t, _ = _read(logits + place, there, label, n_pixels - start, BITS, R, R2, PIXELS)
    r = tl.arange(0, R2)[None, :]
    grad_sums += (sample * R + r) * N_SUMS
    by_p = tl.load(grad_sums, mask=r < R, other=0.0)
    by_overlap = tl.load(grad_sums + 2, mask=r < R, other=0.0)
    by_bce = tl.load(grad_sums + 3, mask=r < R, other=0.0)
    share = 1 / (1 + e)
    rest = e * share  # of share and rest, the one is p and the other 1 - p, without a difference that cancels
    p_minus_t = tl.where(t, -tl.where(x >= 0, rest, share), tl.where(x >= 0, share, rest))
    grad = share * rest * (by_p + tl.where(t, by_overlap, 0.0)) + p_minus_t * by_bce
    tl.store(grad_logits + place, tl.reshape(grad, place.shape).to(grad_logits.dtype.element_ty), mask=there)


def forward(logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """The sums (B, R, 5), float32, as `bce_dice.region_sums` gives them.

    Args:
        logits_BRHW: float32, bfloat16 or float16, contiguous or channels last.
        label_BHW: uint8, contiguous.
        bits: from `bce_dice.region_bits`, one a region.
    """
    batch, n_regions, height, width = logits_BRHW.shape
    R2, n_pixels = triton.next_power_of_2(n_regions), height * width
    n_spans = triton.cdiv(n_pixels, SPAN // R2)
    sums = logits_BRHW.new_empty(batch, n_spans, n_regions, len(SUMS), dtype=torch.float32)
    with torch.cuda.device_of(logits_BRHW):
        _forward_kernel[(batch * n_spans,)](
            logits_BRHW, label_BHW, sums, n_pixels, tuple(bits), n_regions, R2, _channels_last(logits_BRHW),
            SPAN, FORWARD_BLOCK, num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return sums.sum(dim=1)


def backward(
    logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int], grad_BR5: torch.Tensor
) -> torch.Tensor:
    """The gradient in the logits, in their dtype and layout, for that in the sums (float32, contiguous)."""
    batch, n_regions, height, width = logits_BRHW.shape
    R2, n_pixels = triton.next_power_of_2(n_regions), height * width
    grad_BRHW = torch.empty_like(logits_BRHW)
    with torch.cuda.device_of(logits_BRHW):
        _backward_kernel[lambda meta: (batch * triton.cdiv(n_pixels, meta["BLOCK"] // R2),)](
            logits_BRHW, label_BHW, grad_BR5, grad_BRHW, n_pixels, tuple(bits), n_regions, R2,
            _channels_last(logits_BRHW),
        )  # fmt: skip
    return grad_BRHW


def _channels_last(logits_BRHW: torch.Tensor) -> bool:
    return not logits_BRHW.is_contiguous()

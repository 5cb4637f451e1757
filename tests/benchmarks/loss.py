"""BCE + Dice of sigmoid regions, forward and backward: ours against the peers' and plain torch, `python tests/benchmarks/loss.py [--quick]`.

Each contender gets the same logits and the same uint8 label map, and gives a loss and the gradient in the logits; making
the float targets that the peers need is part of their work. Turns alternate, and a ratio is the median over turns that lie
side by side. Memory is what torch holds at most in a step besides its inputs. On a GPU, where there is one, the bound is the time
that a copy of as many bytes takes there.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import segmentation_models_pytorch as smp
import torch
from memory import peak_allocated_mib
from report import print_result, print_table, print_versions
from torch import Tensor, nn

from distseg.config import LossConfig
from distseg.errors import positive_int
from distseg.kernels import region_bits
from distseg.losses import BceDiceLoss
from distseg.packages import installed_version

BITS = region_bits({"lung": (1, 2), "infection": (2,)})
OURS, DEFINITION, COMPILED, PLAIN = "distseg", "definition", "definition, compiled", "plain torch"
Loss = Callable[[Tensor, Tensor], Tensor]
TARGETS = {
    "fastest of MONAI and smp / distseg, time": ">= 1.5",
    "plain torch / distseg, time": ">= 1",
    "distseg memory / gradient": "<= 1.2",
}
GPU_TARGETS = {"distseg / floor, GPU": "<= 1.25", "definition / distseg, GPU": ">= 4"}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shape: tuple[int, int, int, int]  # of the logits
    turns: int


FULL = Size((8, 2, 512, 512), turns=15)
QUICK = Size((2, 2, 64, 64), turns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: whether it works, not how fast it is")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    torch.set_num_threads(args.threads)
    print_versions(["torch", "monai", "segmentation_models_pytorch", "nnunetv2"])
    print(f"{' x '.join(map(str, size.shape))} float32 logits, {args.threads} threads, {size.turns} turns")
    logits, label = make_inputs(size, "cpu")
    losses = contenders(compiled=not args.quick)
    seconds = {name: [] for name in losses}
    for loss in losses.values():
        step(loss, logits, label)
    for _ in range(size.turns):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss, logits, label)
            seconds[name].append(time.perf_counter() - start)
    gradient_mib = logits.numel() * logits.element_size() / 2**20
    memory = {
        name: peak_allocated_mib(lambda loss=loss: step(loss, logits, label)) / gradient_mib
        for name, loss in losses.items()
    }
    slower = {name: ratio(seconds[name], seconds[OURS]) for name in losses}
    print_table(
        ["loss", "ms", "times ours", "extra memory / gradient"],
        [[name, statistics.median(seconds[name]) * 1e3, slower[name], memory[name]] for name in losses],
    )
    print_bytes()
    ratios = {"plain torch / distseg, time": slower[PLAIN], "distseg memory / gradient": memory[OURS]}
    if "MONAI" in slower:
        ratios["fastest of MONAI and smp / distseg, time"] = min(slower["MONAI"], slower["smp"])
    on_gpu = measure_on_gpu(size) if torch.cuda.is_available() else {}
    print_result("loss", ratios | on_gpu, TARGETS | (GPU_TARGETS if on_gpu else {}))


def make_inputs(size: Size, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, _, height, width = size.shape
    label = torch.randint(0, 3, (batch, height, width), generator=generator).to(torch.uint8)
    return torch.randn(size.shape, generator=generator).to(device), label.to(device)


def step(loss: Loss, logits: Tensor, label: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    loss(leaf, label).backward()
    assert leaf.grad is not None
    return leaf.grad


def ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


# ---- the contenders


def contenders(compiled: bool, device: str = "cpu") -> Mapping[str, Loss]:
    definition = BceDiceLoss(BITS, LossConfig(kernel="definition")).to(device)
    fused = BceDiceLoss(BITS, LossConfig(kernel="fused")).to(device)
    found: dict[str, Loss] = {
        OURS: lambda x, label: fused(x, label).loss,
        DEFINITION: lambda x, label: definition(x, label).loss,
        PLAIN: plain,
        "smp": of_targets(smp.losses.DiceLoss("multilabel", from_logits=True)),
    }
    if installed_version("monai"):
        from monai.losses import DiceLoss

        found["MONAI"] = of_targets(DiceLoss(sigmoid=True, batch=True))
    if installed_version("nnunetv2"):
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        found["nnU-Net"] = of_targets(MemoryEfficientSoftDiceLoss(torch.sigmoid, batch_dice=True, ddp=False))
    if compiled:
        found[COMPILED] = torch.compile(lambda x, label: definition(x, label).loss)
    return found


def of_targets(dice: nn.Module) -> Loss:
    bce = nn.BCEWithLogitsLoss()

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        targets = as_targets(label)
        return bce(logits, targets) + dice(logits, targets)

    return loss


def plain(logits: Tensor, label: Tensor) -> Tensor:
    """What one writes by hand, without ignored pixels."""
    t = as_targets(label)
    p = torch.sigmoid(logits)
    pixels = (0, 2, 3)
    dice = (2 * (p * t).sum(pixels) + 1) / (p.sum(pixels) + t.sum(pixels) + 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, t) + 1 - dice.mean()


def as_targets(label: Tensor) -> Tensor:
    return torch.stack([(label == 1) | (label == 2), label == 2], dim=1).float()


# ---- bytes, and the GPU


def print_bytes() -> None:
    """Bytes that the Triton kernels move a pixel of two regions, by count of their loads and stores, and the least there is."""
    rows = []
    for name, width in (("float32", 4), ("bfloat16, float16", 2)):
        forward, backward = 2 * width + 1, 2 * width + 1 + 2 * width
        floor = 2 * (2 * width + 1) + 2 * width  # logits and labels twice, the gradient once
        rows.append([name, forward, backward, (forward + backward) / floor])
    print_table(["logits", "bytes a pixel forward", "backward", "of the floor"], rows)


def measure_on_gpu(size: Size) -> dict[str, float]:
    shape = (4 * size.shape[0], *size.shape[1:])  # past the caches
    logits, label = make_inputs(Size(shape, size.turns), "cuda")
    losses = contenders(compiled=True, device="cuda")
    n_bytes = label.numel() * 2 + logits.numel() * logits.element_size() * 3
    source = torch.empty(n_bytes // 2, dtype=torch.uint8, device="cuda")  # a copy reads and writes each byte
    target = torch.empty_like(source)
    work: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: step(loss, logits, label) for name, loss in losses.items()
    }
    work["floor"] = lambda: target.copy_(source)
    milliseconds = {name: [] for name in work}
    for _ in range(3):
        for each in work.values():
            each()
    for _ in range(size.turns):
        for name, each in work.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            each()
            end.record()
            end.synchronize()
            milliseconds[name].append(start.elapsed_time(end))
    print(torch.cuda.get_device_name())
    print_table(
        ["loss on the GPU", "ms", "times ours"],
        [[name, statistics.median(ms), ratio(ms, milliseconds[OURS])] for name, ms in milliseconds.items()],
    )
    return {
        "distseg / floor, GPU": ratio(milliseconds[OURS], milliseconds["floor"]),
        "definition / distseg, GPU": ratio(milliseconds[DEFINITION], milliseconds[OURS]),
    }


if __name__ == "__main__":
    main()

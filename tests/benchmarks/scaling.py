"""Weak scaling: predicted for GPUs, measured for two CPU cores, `python tests/benchmarks/scaling.py [--quick] [--batch N] ...`.

The model is in scaling_model.py, with the source of each formula and figure. Here it is held against what NVIDIA published for its
DALI-fed 2D nnU-Net on one and on eight GPUs of a DGX A100 (DeepLearningExamples, PyTorch/Segmentation/nnUNet, container 22.11). It
gets that network's parameters and one GPU's speed, and nothing of the eight. Then it predicts every pair of the study's grid
at 8, 64 and 512 such GPUs. Last, the real trainer runs on two cores (two_cores.py), and the model gets the time of an unconnected
step, gloo's latency and its bandwidth.
"""

import argparse
import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence

import torch
import two_cores
from report import print_result, print_table, print_versions
from scaling_model import DGX_A100, Fabric, Protocol, Work, efficiency, step_seconds
from torch import nn
from tqdm import tqdm

from distseg.config import ModelConfig
from distseg.errors import positive_int
from distseg.models.network import OUTPUT_STRIDES, build_model
from distseg.models.table import BATCH, GRID, N_REGIONS, forward_cost

GPUS = (8, 64, 512)
# MONAI 1.6.1's DynUNet for Task01's 192 x 160: filters 32 to 512, instance norm.
PUBLISHED_PARAMETERS, PUBLISHED_GMACS = 20_613_092, 6.693
PUBLISHED = {  # precision and batch a GPU: images/s of one GPU, of eight; the README's scaling column is their ratio
    ("AMP", 32): (1040.58, 7747.27),
    ("AMP", 64): (1238.68, 9417.27),
    ("AMP", 128): (1345.29, 10694.1),
    ("TF32", 32): (732.22, 5588.2),
    ("TF32", 64): (797.37, 6246.95),
    ("TF32", 128): (838.38, 6631.08),
}
ACHIEVED_FLOPS = 6 * PUBLISHED_GMACS * 1e9 * PUBLISHED["AMP", 128][0]  # 54 TFLOP/s of 312: the grid's default
TARGETS = {
    "nnunet_a100_lowest_predicted_of_8": ">= 7.45",
    "nnunet_a100_highest_predicted_of_8": "<= 7.95",
    "two_cores_own_norm_error": "<= 0.1",
}


def main() -> None:
    args = parse_arguments()
    print_versions(["torch", "timm", "accelerate"])
    ratios = compare_with_published()
    ratios |= predict_grid(("gernet_s",) if args.quick else GRID, args)
    ratios |= compare_with_two_cores(two_cores.QUICK if args.quick else two_cores.FULL)
    print_result("scaling", ratios, TARGETS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: whether it works")
    grid = parser.add_argument_group("the grid's GPUs")
    grid.add_argument("--batch", type=positive_int, default=16, help="slices a GPU (default 16)")
    grid.add_argument("--image-size", type=positive_int, default=512, help="pixels (default 512)")
    grid.add_argument("--step-ms", type=float, help="of one GPU, for all pairs; default: from the pair's GMACs")
    grid.add_argument(
        "--tflops", type=float, default=ACHIEVED_FLOPS / 1e12, help="that a GPU achieves (default %(default).3g)"
    )
    grid.add_argument("--gradient-bytes", type=int, choices=(2, 4), default=4, help="of a parameter (default 4)")
    for field in ("bandwidth", "net_bandwidth"):
        value = getattr(DGX_A100, field) / 1e9
        grid.add_argument(f"--{field.replace('_', '-')}", type=float, default=value, help=f"GB/s (default {value:.0f})")
    for field in ("ranks_per_node", "overlap", "spread"):
        value = getattr(DGX_A100, field)
        grid.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value, help=f"default {value:.3g}")
    return parser.parse_args()


# ---- the model against what was published, and for the grid


def compare_with_published() -> dict[str, float]:
    rows, predictions, errors = [], [], []
    for (precision, batch), (one, eight) in PUBLISHED.items():
        work = Work(batch / one, gradients=4 * PUBLISHED_PARAMETERS)  # AMP's gradients are float32 too
        predictions.append(8 * efficiency(work, DGX_A100, 8))
        errors.append(predictions[-1] / (eight / one) - 1)
        rows.append([precision, batch, 1e3 * work.seconds, eight / one, predictions[-1], predictions[-1] * one / eight])
    print("\n2D nnU-Net on DGX A100, eight GPUs as many times as fast as one")
    print_table(["precision", "batch a GPU", "step, ms", "published", "predicted", "predicted / published"], rows)
    return {
        "nnunet_a100_lowest_predicted_of_8": min(predictions),
        "nnunet_a100_highest_predicted_of_8": max(predictions),
        "nnunet_a100_largest_error": max(map(abs, errors)),
    }


def predict_grid(encoders: Sequence[str], args: argparse.Namespace) -> dict[str, float]:
    fabric = dataclasses.replace(
        DGX_A100, ranks_per_node=args.ranks_per_node, overlap=args.overlap, spread=args.spread,
        bandwidth=args.bandwidth * 1e9, net_bandwidth=args.net_bandwidth * 1e9,
    )  # fmt: skip
    rows, found = [], defaultdict(list)
    for pair in tqdm(list(itertools.product(encoders, OUTPUT_STRIDES)), "grid", leave=False, disable=None):
        common = work_of_pair(*pair, args)
        own = dataclasses.replace(common, norm_channels=())
        efficiencies = [efficiency(work, fabric, n) for work in (common, own) for n in GPUS]
        for (kind, n), value in zip(itertools.product(("sync_batch", "batch"), GPUS), efficiencies, strict=True):
            found[f"grid_median_efficiency_{kind}_{n}"].append(value)
        rows.append([*pair, 1e3 * common.seconds, common.gradients / 1e6, len(common.norm_channels), *efficiencies])
    print(
        f"\npredicted efficiency of {args.batch} slices of {args.image_size} x {args.image_size} a GPU; norm: sync_batch, batch"
    )
    header = ["encoder", "decoder", "step, ms", "MB of gradients", "batch norms", *[f"sync {n}" for n in GPUS]]
    print_table([*header, *[f"own {n}" for n in GPUS]], rows)
    return {name: statistics.median(values) for name, values in found.items()}


def work_of_pair(encoder: str, decoder: str, args: argparse.Namespace) -> Work:
    """On torch's meta device. A training step is three times the forward pass's multiply-accumulates, two operations each."""
    with torch.device("meta"):
        network = build_model(ModelConfig(encoder=encoder, decoder=decoder), 1, N_REGIONS)
        macs, _ = forward_cost(network, torch.empty(BATCH, 1, args.image_size, args.image_size))
    step_ms = args.step_ms or 1e3 * 3 * 2 * macs / BATCH * args.batch / (args.tflops * 1e12)
    return work_of_network(network, step_ms / 1e3, args.gradient_bytes)


def work_of_network(network: nn.Module, seconds: float, gradient_bytes: int = 4) -> Work:
    channels = [module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    return Work(seconds, gradient_bytes * parameters, channels, buffers, sums=2)


def compare_with_two_cores(size: two_cores.Size) -> dict[str, float]:
    found = two_cores.measure(size)
    seconds = {way: statistics.median(turns) for way, turns in found.seconds.items()}
    predicted = {way: seconds["alone"] / s for way, s in predicted_for_cores(seconds["unconnected"], found).items()}
    rows = [
        [way, 1e3 * s, (1 if way == "alone" else 2) * size.batch / s, found.efficiency(way), predicted.get(way, "")]
        for way, s in seconds.items()
    ]
    print(f"\n{size.batch} slices of {size.image_size} x {size.image_size} a rank, a core each; gloo's all-reduce: "
          f"{1e6 * found.latency:.0f} us, {found.bandwidth / 1e9:.2f} GB/s")  # fmt: skip
    print_table(["two cores", "step, ms", "slices/s", "efficiency", "predicted"], rows)
    ratios = {f"two_cores_{way}_efficiency": found.efficiency(way) for way in seconds if way != "alone"}
    return ratios | {f"two_cores_{way}_error": abs(p / found.efficiency(way) - 1) for way, p in predicted.items()}


def predicted_for_cores(step: float, found: two_cores.Measured) -> dict[str, float]:
    """Seconds of a step by way; on CPUs nothing overlaps: the core that computes makes the copies too."""
    ring = Protocol("ring", found.latency, 0.0, 0.0, 1.0)
    fabric = Fabric(2, found.bandwidth, found.bandwidth, (ring,), spread=0.0, overlap=0.0)
    network = build_model(ModelConfig(encoder=two_cores.ENCODER, decoder_widths=two_cores.WIDTHS), 1, N_REGIONS)
    common = work_of_network(network, step)
    own = dataclasses.replace(common, norm_channels=())
    return {"own_norm": step_seconds(own, fabric, 2), "common_norm": step_seconds(common, fabric, 2)}


if __name__ == "__main__":
    main()

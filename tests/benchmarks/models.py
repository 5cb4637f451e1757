"""Our networks against segmentation_models_pytorch: `python tests/benchmarks/models.py [--quick] [--compile] [--encoders NAME ...]`.

A training step is a forward and a backward pass, without the optimizer's. Encoder for encoder, same images, same threads; the
contenders' turns alternate, and every ratio is the median over turns that lie side by side: what else the machine does slows
both alike.
"""

import argparse
import ctypes
import gc
import itertools
import re
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from report import print_result, print_table, print_versions
from torch import Tensor, nn
from tqdm import tqdm

from distseg.config import ModelConfig
from distseg.models import build_model
from distseg.models.network import OUTPUT_STRIDES
from distseg.models.table import forward_cost

PEER = "segmentation_models_pytorch"
OURS = {  # contender: settings of the `model` section; the first is what compile and bf16 are judged by
    "distseg": {},
    "distseg, reference widths": {"decoder_widths": "reference"},
    "distseg, reference widths, recompute": {"decoder_widths": "reference", "recompute": "decoder"},
}
COMPILED = "distseg, compiled"
PEER_ENCODERS = {  # others than DenseNet are timm's in both
    "legacy_senet154": "senet154",
    **{f"legacy_seresnet{depth}": f"se_resnet{depth}" for depth in (50, 101, 152)},
    **{f"legacy_seresnext{depth}_32x4d": f"se_resnext{depth}_32x4d" for depth in (50, 101)},
}
SETTINGS = tuple(itertools.product(("train", "infer"), ("fp32", "bf16")))
N_REGIONS = 2
TARGETS = {
    "same_function_train": ">= 1",
    "same_function_infer": ">= 1",
    "same_function_saved": "<= 0.8",
    "paper_widths_densenet161_train": ">= 3",
    "bf16_train": ">= 1.5",
}
NOTES = """\
train, infer: milliseconds in fp32; bf16: how many times as fast with autocast, of train and infer. saved: MiB kept for the
gradient in fp32, parameters not among them; peak: MiB of resident memory that a training step adds at most, gradients
and scratch space among them. vs: times the peer's speed in train and infer (fp32), and its share of saved memory.
GMACs: of one image. The peer's DeepLabs are without dropout, at our output strides. The peer refuses DenseNet and timm's
legacy SENets as dilated encoders. Ratios: same_function_*: medians over pairs of what computes the same as the peer (Unet++
of reference widths, DeepLabV3, DeepLabV3+), *_worst: of the pair that does worst; bf16_*: medians over pairs of ours."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    encoders: tuple[str, ...]
    side: int  # of the images, pixels
    turns: int


FULL = Size(("densenet121", "densenet161", "gernet_s", "gernet_l", "seresnet50", "seresnext50_32x4d", "legacy_senet154"),
            side=128, turns=5)  # fmt: skip
QUICK = Size(("gernet_s",), side=64, turns=2)
BATCH = 2


@dataclass
class Measured:
    """One contender."""

    parameters_m: float
    gmacs: float
    saved_mib: float
    peak_mib: float = 0.0
    compile_s: float = 0.0
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """of each turn, by setting"""

    def median_ms(self, mode: str) -> float:
        return 1e3 * statistics.median(self.seconds[mode, "fp32"])

    def speed(self, mode: str, other: "Measured", precision: str = "fp32", others_precision: str = "fp32") -> float:
        """How many times as fast as another."""
        pairs = zip(self.seconds[mode, precision], other.seconds[mode, others_precision], strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    def bf16_gain(self, mode: str) -> float:
        return self.speed(mode, self, precision="bf16")


def main() -> int:
    args = parse_arguments()
    size = QUICK if args.quick else FULL
    pairs = list(itertools.product(args.encoders or size.encoders, OUTPUT_STRIDES))
    print_versions(["torch", "timm", PEER])
    print(f"{BATCH} x 3 x {size.side} x {size.side}, {torch.get_num_threads()} threads, {size.turns} turns")
    measured = {}
    for pair in tqdm(pairs, "measure", unit="pair", leave=False, disable=None):
        measured[pair] = measure_pair(build_contenders(*pair, args.compile), size)
    report(measured)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: whether it works, not how fast it is")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile too: minutes a pair")
    parser.add_argument("--encoders", nargs="+", metavar="NAME", help=f"default: {' '.join(FULL.encoders)}")
    return parser.parse_args()


# ---- the contenders


def build_contenders(encoder: str, decoder: str, compiled: bool) -> dict[str, nn.Module]:
    """Networks by name; widths and recomputation are Unet++'s."""
    variants = OURS if decoder == "unetplusplus" else {"distseg": {}}
    networks: dict[str, nn.Module] = {
        name: build_model(ModelConfig(encoder=encoder, decoder=decoder, **settings), 3, N_REGIONS)
        for name, settings in variants.items()
    }
    if compiled:
        networks[COMPILED] = torch.compile(networks["distseg"])
    peer = build_peer(encoder, decoder)
    return networks | {PEER: peer} if peer else networks


def build_peer(encoder: str, decoder: str) -> nn.Module | None:
    """The peer's network; None: it refuses the pair."""
    name = encoder if encoder.startswith("densenet") else PEER_ENCODERS.get(encoder, f"tu-{encoder}")
    kinds = {"unetplusplus": smp.UnetPlusPlus, "deeplabv3": smp.DeepLabV3, "deeplabv3plus": smp.DeepLabV3Plus}
    options: dict[str, object] = {"encoder_weights": None, "classes": N_REGIONS}
    if decoder != "unetplusplus":
        options |= {"encoder_output_stride": OUTPUT_STRIDES[decoder], "decoder_aspp_dropout": 0.0}
    try:
        return kinds[decoder](name, **options)
    except (TypeError, ValueError) as error:
        if "dilated" in str(error) or "output_stride" in str(error):
            return None
        raise


# ---- the measurement


def measure_pair(networks: Mapping[str, nn.Module], size: Size) -> dict[str, Measured]:
    """Measures networks of one pair in turns."""
    image_BCHW = torch.rand(BATCH, 3, size.side, size.side)
    measured = {}
    for name, network in networks.items():
        eager = getattr(network, "_orig_mod", network)
        macs, saved_bytes = forward_cost(eager.train(), image_BCHW)
        n_parameters = sum(parameter.numel() for parameter in network.parameters())
        measured[name] = Measured(n_parameters / 1e6, macs / BATCH / 1e9, saved_bytes / 2**20)
        for mode, precision in SETTINGS:
            measured[name].compile_s += seconds_of(lambda: run(network, image_BCHW, mode, precision))  # noqa: B023
        measured[name].peak_mib = peak_mib(lambda: run(network, image_BCHW, "train", "fp32"))  # noqa: B023
    for _, (mode, precision), name in itertools.product(range(size.turns), SETTINGS, networks):
        elapsed_s = run(networks[name], image_BCHW, mode, precision)
        measured[name].seconds[mode, precision].append(elapsed_s)
    return measured

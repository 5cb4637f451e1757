"""Our networks against segmentation_models_pytorch: `python tests/benchmarks/models.py [--quick] [--compile] [--encoders NAME ...]`.

A training step is a forward and a backward pass, without the optimizer's. Each as its users run it by default: ours channels
last (`model.channels_last`), the peer's contiguous. Encoder for encoder, same images, same threads; the
contenders' turns alternate, and every ratio is the median over turns that lie side by side: what else the machine does slows
both alike.
"""

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import segmentation_models_pytorch as smp
import torch
from memory import peak_mib
from report import print_result, print_table, print_versions
from torch import Tensor, nn
from tqdm import tqdm

from distseg.config import ModelConfig
from distseg.errors import positive_int
from distseg.models.network import OUTPUT_STRIDES, build_model
from distseg.models.table import forward_cost

PEER = "segmentation_models_pytorch"
OURS = {  # contender: settings of the `model` section; the first is what compile and bf16 are judged by
    "distseg": {},
    "distseg, reference widths": {"decoder_widths": "reference"},
    "distseg, reference widths, cheap": {"decoder_widths": "reference", "recompute": "cheap"},
    "distseg, cheap": {"recompute": "cheap"},
}
OF_DECODER = {  # contenders; widths are Unet++'s
    "unetplusplus": ("distseg", "distseg, reference widths", "distseg, reference widths, cheap"),
    "deeplabv3": ("distseg", "distseg, cheap"),
    "deeplabv3plus": ("distseg",),
}
COMPILED = "distseg, compiled"
GROUPS = {  # how a contender is judged against the peer
    ("unetplusplus", "distseg"): "paper_widths",
    ("unetplusplus", "distseg, reference widths"): "same_function",
    ("unetplusplus", "distseg, reference widths, cheap"): "same_function_cheap",
    ("deeplabv3", "distseg"): "same_function",
    ("deeplabv3", "distseg, cheap"): "same_function_cheap",
    ("deeplabv3plus", "distseg"): "deeplabv3plus",
}
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
train, infer: milliseconds in fp32; bf16: how many times as fast with autocast, of train and infer. saved: MiB of memory that
a forward pass leaves for the gradient in fp32, parameters, image and logits not among them; peak: MiB of resident memory that a training step adds at most, gradients
and scratch space among them. vs: times the peer's speed in train and infer (fp32), and its share of saved memory.
GMACs: of one image. The peer's DeepLabs are without dropout, at our output strides. The peer refuses DenseNet and
legacy_seresnet18 and 34 as dilated encoders. Ratios are medians over pairs, *_worst those of the slowest pair: same_function_* of what
computes the same as the peer (Unet++ of reference widths, DeepLabV3), deeplabv3plus_* apart, because both of our separable
convolutions after ASPP are at stride 4 (the paper's table 2) and the peer's first one is not; bf16_* over all pairs. cheap:
with model.recompute=cheap."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    encoders: tuple[str, ...]
    side: int  # of the images, pixels
    turns: int
    threads: int


FULL = Size(("densenet121", "densenet161", "gernet_s", "gernet_l", "seresnet50", "seresnext50_32x4d", "legacy_senet154"),
            side=128, turns=5, threads=torch.get_num_threads())  # fmt: skip
QUICK = Size(("gernet_s",), side=64, turns=2, threads=1)
BATCH = 2


def main() -> int:
    args = parse_arguments()
    size = QUICK if args.quick else FULL
    pairs = list(itertools.product(args.encoders or size.encoders, OUTPUT_STRIDES))
    print_versions(["torch", "timm", PEER])
    torch.set_num_threads(args.threads or size.threads)
    print(f"{BATCH} x 3 x {size.side} x {size.side}, {torch.get_num_threads()} threads, {size.turns} turns")
    measured = {}
    for pair in tqdm(pairs, "measure", unit="pair", leave=False, disable=None):
        measured[pair] = measure_pair(build_contenders(*pair, args.compile), size)
    print_table(HEADER, (row for pair, contenders in measured.items() for row in table_rows(pair, contenders)))
    print(NOTES)
    print_result("models", ratios_of(measured), TARGETS)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: whether it works, not how fast it is")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile too: minutes a pair")
    parser.add_argument("--threads", type=positive_int, help="default: as many as there are cores, 1 if --quick")
    parser.add_argument("--encoders", nargs="+", metavar="NAME", help=f"default: {' '.join(FULL.encoders)}")
    return parser.parse_args()


# ---- the contenders


def build_contenders(encoder: str, decoder: str, compiled: bool) -> dict[str, nn.Module]:
    """Networks by name."""
    networks: dict[str, nn.Module] = {}
    for name in OF_DECODER[decoder]:
        network = build_model(ModelConfig(encoder=encoder, decoder=decoder, **OURS[name]), 3, N_REGIONS)
        networks[name] = network.to(memory_format=torch.channels_last)
    if compiled:
        torch.compiler.reset()  # the graphs of all pairs would count towards one limit, past which it runs eagerly
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


@dataclass
class Measured:
    """One contender."""

    parameters_m: float
    gmacs: float
    saved_mib: float | None
    peak_mib: float = 0.0
    compile_s: float = 0.0
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """of each turn, by setting"""

    def median_ms(self, mode: str) -> float:
        return 1e3 * statistics.median(self.seconds[mode, "fp32"])

    def speed(self, mode: str, other: "Measured") -> float:
        """How many times as fast as another in fp32."""
        return _median_ratio(other.seconds[mode, "fp32"], self.seconds[mode, "fp32"])

    def bf16_gain(self, mode: str) -> float:
        """How many times as fast as itself in fp32."""
        return _median_ratio(self.seconds[mode, "fp32"], self.seconds[mode, "bf16"])


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def measure_pair(networks: Mapping[str, nn.Module], size: Size) -> dict[str, Measured]:
    """Measures the networks of one pair, their times in turns."""
    image_BCHW = torch.rand(BATCH, 3, size.side, size.side)
    channels_last_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
    images = {name: image_BCHW if name == PEER else channels_last_BCHW for name in networks}
    measured = {name: measure_memory(network, images[name]) for name, network in networks.items()}
    for _, setting, name in itertools.product(range(size.turns), SETTINGS, networks):
        measured[name].seconds[setting].append(run(networks[name], images[name], *setting))
    return measured


def measure_memory(network: nn.Module, image_BCHW: Tensor) -> Measured:
    """Everything but times, and warms up."""
    eager = getattr(network, "_orig_mod", network)
    macs, saved_bytes = forward_cost(eager.train(), image_BCHW)
    found = Measured(
        parameters_m=sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        gmacs=macs / BATCH / 1e9,
        saved_mib=saved_bytes / 2**20 if eager is network else None,
    )
    warm_up_s = sum(run(network, image_BCHW, *setting) for setting in SETTINGS)
    found.compile_s = 0.0 if eager is network else warm_up_s
    found.peak_mib = peak_mib(lambda: run(network, image_BCHW, "train", "fp32"))
    return found


def run(network: nn.Module, image_BCHW: Tensor, mode: str, precision: str) -> float:
    """Seconds of a training step or of inference; no gradients stay."""
    training = mode == "train"
    network.train(training)
    start = time.perf_counter()
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits_BRHW = network(image_BCHW)
    if training:
        logits_BRHW.float().square().mean().backward()
    elapsed_s = time.perf_counter() - start
    network.zero_grad(set_to_none=True)
    return elapsed_s


# ---- the report

HEADER = ("encoder", "decoder", "network", "M parameters", "GMACs", "train", "infer", "bf16", "bf16", "saved", "peak",
          "vs, train", "vs, infer", "vs, saved")  # fmt: skip


def table_rows(pair: tuple[str, str], contenders: Mapping[str, Measured]) -> Iterator[list[object]]:
    peer = contenders.get(PEER)
    for name, found in contenders.items():
        own = [found.parameters_m, found.gmacs, found.median_ms("train"), found.median_ms("infer")]
        own += [found.bf16_gain("train"), found.bf16_gain("infer"), found.saved_mib or "", found.peak_mib]
        versus: list[object] = ["", "", ""]
        if peer and name != PEER:
            versus = [found.speed("train", peer), found.speed("infer", peer), _share(found.saved_mib, peer.saved_mib)]
        yield [*pair, name, *own, *versus]
    if peer is None:
        yield [*pair, PEER, "refused", *[""] * (len(HEADER) - 4)]


def _share(mine: float | None, theirs: float | None) -> float | str:
    return mine / theirs if mine and theirs else ""


def ratios_of(measured: Mapping[tuple[str, str], Mapping[str, Measured]]) -> dict[str, float]:
    """What is judged, by name; see NOTES."""
    ratios = {}
    groups = defaultdict(list)
    for (encoder, decoder), contenders in measured.items():
        for name, found in contenders.items():
            if PEER in contenders and name in OURS:
                groups[GROUPS[decoder, name]].append((found, contenders[PEER]))
        if PEER in contenders and decoder == "unetplusplus":
            ratios[f"paper_widths_{encoder}_train"] = contenders["distseg"].speed("train", contenders[PEER])
        if COMPILED in contenders:
            eager, compiled = contenders["distseg"], contenders[COMPILED]
            ratios |= {
                f"compile_{encoder}_{decoder}_{mode}": compiled.speed(mode, eager) for mode in ("train", "infer")
            }
            ratios[f"compile_{encoder}_{decoder}_s"] = compiled.compile_s
    for group, members in groups.items():
        for mode in ("train", "infer"):
            speeds = [ours.speed(mode, peer) for ours, peer in members]
            ratios |= {f"{group}_{mode}": statistics.median(speeds), f"{group}_{mode}_worst": min(speeds)}
        ratios[f"{group}_saved"] = statistics.median(ours.saved_mib / peer.saved_mib for ours, peer in members)
    for mode in ("train", "infer"):
        gains = [contenders["distseg"].bf16_gain(mode) for contenders in measured.values()]
        ratios |= {f"bf16_{mode}": statistics.median(gains), f"bf16_{mode}_worst": min(gains)}
    return ratios


if __name__ == "__main__":
    raise SystemExit(main())

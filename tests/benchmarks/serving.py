"""Ways of running one exported segmenter: `python tests/benchmarks/serving.py [--run RUN] [--encoder NAME] [--untrained] [--quick]`.

Each takes int16 HU in the CPU's memory and gives MASK and PROB there, so copies to a GPU and back count; one asks Triton for MASK
alone, as `distseg predict --server` does where probabilities are not to be written. All run in one
process (Triton's server beside it) with equal threads, in turns; a ratio is the median over turns that lie side by side, so
that what else the machine does slows all alike. C++ is compared with Python volume by volume, both in fresh processes and
without warm-up. Without --run, a phantom is made and trained on; --untrained trains two steps only, since speed does
not depend on the weights.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ports import free_endpoints
from recipes import ROOT, make_store
from recipes import run as run_module
from report import print_result, print_table, print_versions
from torch import Tensor

from distseg.errors import DistsegError, positive_int
from distseg.models.segmenter import HuSegmenter
from distseg.runs.folder import open_run
from distseg.runs.trained import load_best
from distseg.scoring.segmenting import inference_device, segment_volume
from distseg.serving.client import RemoteSegmenter
from distseg.serving.exporting import ExportOptions, export_run
from distseg.serving.formats import FORMATS
from distseg.serving.repository import PYTHON_REPOSITORY
from distseg.serving.server import find_installation, running_server
from distseg.serving.standalone import load

BATCHES = (1, 4, 8)
EAGER, DEFAULT = "eager, float32", "exported, default"
GRPC, GRPC_MASKS = "Triton, gRPC", "Triton, gRPC, masks alone"
FRESH_ROUNDS = 15  # of C++ and Python
TARGETS = {
    "exported default / eager, batch 8": ">= 1.9",
    "Triton gRPC / in process, batch 8": ">= 0.95",
    "Triton gRPC, masks alone / in process, batch 8": ">= 0.95",
    "C++ / Python": ">= 1.0",
}
TRAINED_TARGETS = {"Dice change": "<= 0.002"}
NOTES = """\
p50, p99: milliseconds a call. vs eager: times its slices/s. difference: largest of a probability from eager's on random slices.
exported, default: model.pt of `distseg export RUN`, bfloat16 where that keeps the Dice (here if untrained: always)."""

Way = Callable[[Tensor], tuple[Tensor, Tensor]]
Seconds = Mapping[tuple[str, int], Sequence[float]]  # of each call, by way and batch


@dataclass(frozen=True)
class Bench:
    """What the ways are made from."""

    run: Path
    work: Path
    size: int
    trained: bool
    held: contextlib.ExitStack
    """ends what they leave running"""
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    """model.json of each export"""
    device: torch.device = field(default_factory=inference_device)

    def export(self, name: str, **options: Any) -> Path:
        """Path of an exported file; weights that learned nothing have no Dice to keep."""
        size, tolerance = (self.size, self.size), 0.002 if self.trained else 1.0
        chosen = ExportOptions(size=size, dice_tolerance=tolerance, **options)
        self.described[name] = export_run(self.run, self.folder(name), chosen)
        return self.folder(name) / FORMATS[chosen.format].file

    def folder(self, name: str) -> Path:
        """Of an export; without spaces, which end Triton's python backend (seen in 2.51.0)."""
        return self.work / re.sub(r"\W+", "_", name)

    def way(self, segmenter: Callable[[Tensor], Any]) -> Way:
        """From and to the CPU's memory."""

        def call(hu_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            mask, probability = segmenter(hu_BCHW.to(self.device))
            return mask.cpu(), probability.cpu()

        return call


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the server and its backend
    print_versions(["torch", "onnxruntime", "openvino", "tritonclient"])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        work = Path(folder)
        trained = args.run is not None or not args.untrained
        bench = Bench(args.run or make_run(work, args), work, args.size, trained, held)
        ways, left_out = build_ways(bench, args.skip)
        inputs = {batch: random_slices(bench, batch) for batch in BATCHES}
        differences = warm_up(ways, inputs)
        seconds = measure(ways, inputs, args.seconds)
        print_table_of_ways(bench, seconds, differences)
        n_slices, rounds = (8, 1) if args.quick else (32, FRESH_ROUNDS)
        cpp = measure_cpp(args.cpp, bench, n_slices, rounds)
    if cpp:
        print_table(["in a fresh process", "slices/s"], [[name, statistics.median(cpp[name])] for name in cpp])
    print(NOTES)
    for name, reason in left_out.items():
        print(f"not measured: {name} ({reason})")
    print_result("serving", ratios_of(bench, seconds, cpp), TARGETS | (TRAINED_TARGETS if trained else {}))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run (default: one is trained)")
    parser.add_argument("--encoder", default="gernet_s", help="of the run that is trained (default gernet_s)")
    parser.add_argument("--untrained", action="store_true", help="train two steps: speed alone, no Dice")
    parser.add_argument("--size", type=positive_int, default=256, help="of the slices, and trained at (default 256)")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring; a round begun is finished")
    parser.add_argument(
        "--cpp", type=Path, default=ROOT / "build/cpp/distseg_predict", help="the program of export/cpp"
    )
    parser.add_argument("--skip", nargs="+", choices=BUILDERS, default=[], help="ways to leave out")
    parser.add_argument("--quick", action="store_true", help="toy size: whether it works, not how fast it is")
    args = parser.parse_args()
    if args.quick:
        args.untrained, args.size, args.seconds = True, 64, 0.0
        args.skip = ["compile", "AOTInductor", "ONNX", "OpenVINO"]  # minutes of compiling
    return args


def make_run(work: Path, args: argparse.Namespace) -> Path:
    """Trains on a phantom; on a tiny one where only the speed counts."""
    store = make_tiny_store(work) if args.untrained else make_store(work, quick=False)
    words = ["--config", str(ROOT / "yaml_configs/medseg_cpu.yaml"), f"data.store={store}"]
    words += [f"model.encoder={args.encoder}", f"data.image_size={args.size}", f"output_dir={work / 'run'}"]
    words += ["train.max_steps=2", "train.batch_size_per_rank=2"] if args.untrained else ["train.epochs=5"]
    words += ["model.decoder_widths=[8,8,8,8,8]"] if args.quick else []
    run_module("distseg.train", *words)
    return work / "run"


def make_tiny_store(work: Path) -> Path:
    run_module("distseg", "phantom", str(work / "phantom"), "--cases", "3", "--size", "64", "--slices", "8")
    run_module("distseg", "prepare", str(work / "phantom"), str(work / "store"), "--folds", "3")
    return work / "store"


# ---- the ways


def build_ways(bench: Bench, skip: Sequence[str]) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways by name, eager first, and why others are left out."""
    ways: dict[str, Way] = {}
    left_out = {name: "skipped" for name in skip}
    for name, build in BUILDERS.items():
        if name not in left_out:
            try:
                ways |= build(bench)
            except (DistsegError, ImportError) as error:
                left_out[name] = str(error)
    return ways, left_out


def eager_ways(bench: Bench) -> dict[str, Way]:
    orders = {EAGER: torch.contiguous_format, f"{EAGER}, channels last": torch.channels_last}
    return {name: bench.way(eager(bench, order)) for name, order in orders.items()}


def eager(bench: Bench, order: torch.memory_format) -> HuSegmenter:
    _, segmenter = load_best(*open_run(bench.run))
    return segmenter.to(bench.device, memory_format=order)


def torchscript_ways(bench: Bench) -> dict[str, Way]:
    options = {DEFAULT: {}, "exported, float32": {"precision": "float32"}}
    return {name: bench.way(load(bench.export(name, **chosen), bench.device)) for name, chosen in options.items()}


def frozen_ways(bench: Bench) -> dict[str, Way]:
    """By itself: frozen, norms are in bfloat16 too, and export may refuse the file for what that changes."""
    return {"exported, frozen": bench.way(load(bench.export("exported, frozen", frozen=True), bench.device))}


def compiled_ways(bench: Bench) -> dict[str, Way]:
    require_compiler()
    segmenter = torch.compile(
        eager(bench, torch.channels_last), dynamic=False
    )  # inductor has no rule for a size that is padded to any
    return {"torch.compile, float32": bench.way(segmenter)}


def aot_inductor_ways(bench: Bench) -> dict[str, Way]:
    require_compiler()
    return {"AOTInductor, default": bench.way(load(bench.export("AOTInductor", format="pt2"), bench.device))}


def require_compiler() -> None:
    if shutil.which("g++") is None:
        raise DistsegError("no C++ compiler")


def onnx_ways(bench: Bench) -> dict[str, Way]:
    return {"ONNX Runtime, float32": bench.way(load(bench.export("ONNX", format="onnx"), bench.device))}


def openvino_ways(bench: Bench) -> dict[str, Way]:
    """The same ONNX file on the CPU, in the precision that OpenVINO chooses and in float32."""
    import openvino

    path = bench.folder("ONNX") / FORMATS["onnx"].file
    if not path.is_file():
        raise DistsegError("without the ONNX file")
    choices = {"OpenVINO, default": {}, "OpenVINO, float32": {"INFERENCE_PRECISION_HINT": "f32"}}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return {
        name: of_openvino(openvino.Core().compile_model(path, "CPU", threads | chosen))
        for name, chosen in choices.items()
    }


def of_openvino(model: Callable[[list[np.ndarray]], Mapping[int, np.ndarray]]) -> Way:
    def call(hu_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model([hu_BCHW.numpy()])
        return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1])

    return call


def triton_ways(bench: Bench) -> dict[str, Way]:
    """The default export behind the python backend."""
    endpoints = free_endpoints()
    bench.held.enter_context(running_server(find_installation(), bench.folder(DEFAULT) / PYTHON_REPOSITORY, endpoints))
    masks_alone = RemoteSegmenter(endpoints.grpc)
    masks_alone.probabilities = False
    return {
        "Triton, HTTP": RemoteSegmenter(endpoints.http),
        GRPC: RemoteSegmenter(endpoints.grpc),
        GRPC_MASKS: masks_alone,
    }


BUILDERS: dict[str, Callable[[Bench], dict[str, Way]]] = {
    "eager": eager_ways,
    "TorchScript": torchscript_ways,
    "frozen": frozen_ways,
    "compile": compiled_ways,
    "AOTInductor": aot_inductor_ways,
    "ONNX": onnx_ways,
    "OpenVINO": openvino_ways,
    "Triton": triton_ways,
}


# ---- the measurement


def random_slices(bench: Bench, n: int) -> Tensor:
    """int16 HU (n, C, size, size)."""
    shape = (n, bench.described[DEFAULT]["input"]["shape"][1], bench.size, bench.size)
    return torch.randint(-1000, 600, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def warm_up(ways: Mapping[str, Way], inputs: Mapping[int, Tensor]) -> dict[str, float]:
    """Calls each way as often as TorchScript watches before it optimises; gives the largest difference from eager, if any."""
    for way, batch in itertools.product(ways.values(), (1, 1, *BATCHES)):
        way(inputs[batch])
    _, expected = ways[EAGER](inputs[BATCHES[0]])
    answers = {name: way(inputs[BATCHES[0]])[1] for name, way in ways.items()}
    return {name: float((got - expected).abs().max()) for name, got in answers.items() if got.numel()}


@torch.inference_mode()
def measure(
    ways: Mapping[str, Way], inputs: Mapping[int, Tensor], seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each call, by way and batch; equally many slices of each batch, the ways in turns of any order.

    In the same order each time, what follows a slow way pays for the memory that it took.
    """
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    random = np.random.default_rng(0)
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        for batch in BATCHES:
            for _ in range(BATCHES[-1] // batch):
                for name in random.permutation(list(ways)).tolist():
                    start = time.perf_counter()
                    ways[name](inputs[batch])
                    found[name, batch].append(time.perf_counter() - start)
    return found


def measure_cpp(program: Path, bench: Bench, n_slices: int, rounds: int) -> dict[str, list[float]]:
    """Slices/s of C++ and Python in turns of any order, each time in a fresh process; empty where the program is not built."""
    found: dict[str, list[float]] = defaultdict(list)
    if not program.is_file():
        return found
    model, volume, threads = bench.folder(DEFAULT) / "model.pt", bench.work / "volume.npy", torch.get_num_threads()
    np.save(volume, random_slices(bench, n_slices)[:, 0].numpy())
    words = [program, model, volume, bench.work / "mask.npy", "--batch", BATCHES[-1], "--threads", threads]
    words += ["--device", bench.device.type]

    def cpp() -> float:
        said = subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout
        return float(re.findall(r"segmented in (\S+) s", said)[0])

    def python() -> float:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            return fresh.submit(segment_once, model, volume, threads).result()

    ways, random = {"C++": cpp, "Python": python}, np.random.default_rng(0)
    for _ in range(rounds):
        for name in random.permutation(list(ways)).tolist():
            found[name].append(n_slices / ways[name]())
    return found


def segment_once(model: Path, volume: Path, threads: int) -> float:
    """Seconds to segment a volume that was read, with a model that was loaded."""
    torch.set_num_threads(threads)
    device = inference_device()
    segmenter, hu_ZYX = load(model, device), np.load(volume)
    start = time.perf_counter()
    segment_volume(segmenter, hu_ZYX, device, BATCHES[-1])
    return time.perf_counter() - start


# ---- the report


def print_table_of_ways(bench: Bench, seconds: Seconds, differences: Mapping[str, float]) -> None:
    described = bench.described[DEFAULT]
    print(
        f"{described['model']['decoder']} on {described['model']['encoder']}, {bench.size} x {bench.size}, {bench.device.type}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {len(seconds[EAGER, BATCHES[-1]])} rounds, "
        f"default {described['precision']['weights']}"
    )
    header = ["batch", "way", "slices/s", "p50", "p99", "vs eager", "difference", "Dice change"]
    print_table(header, table_rows(bench, seconds, differences))


def table_rows(bench: Bench, seconds: Seconds, differences: Mapping[str, float]) -> Iterator[list[object]]:
    for (name, batch), found in sorted(seconds.items(), key=lambda item: item[0][1]):
        milliseconds = [float(1e3 * np.percentile(found, q)) for q in (50, 99)]
        speed, change = speed_ratio(seconds, name, EAGER, batch), dice_change(bench, name)
        difference = f"{differences[name]:.0e}" if name in differences else ""
        yield [batch, name, batch / statistics.median(found), *milliseconds, speed, difference, change]


def dice_change(bench: Bench, name: str) -> str:
    """The largest of a region, with its sign; empty where it means nothing."""
    changes = bench.described.get(name, {}).get("precision", {}).get("dice_change", {}) if bench.trained else {}
    defined = [change for change in changes.values() if change is not None]
    return f"{max(defined, key=abs):+.4f}" if defined else ""


def speed_ratio(seconds: Seconds, name: str, other: str, batch: int = BATCHES[-1]) -> float:
    """How many times as fast one way is as another."""
    pairs = zip(seconds[other, batch], seconds[name, batch], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def ratios_of(bench: Bench, seconds: Seconds, cpp: Mapping[str, list[float]]) -> dict[str, float]:
    """What is judged, by name."""
    ratios = {"exported default / eager, batch 8": speed_ratio(seconds, DEFAULT, EAGER)}
    if (GRPC, BATCHES[-1]) in seconds:
        ratios["Triton gRPC / in process, batch 8"] = speed_ratio(seconds, GRPC, DEFAULT)
        ratios["Triton gRPC, masks alone / in process, batch 8"] = speed_ratio(seconds, GRPC_MASKS, DEFAULT)
    if cpp:
        ratios["C++ / Python"] = statistics.median(a / b for a, b in zip(cpp["C++"], cpp["Python"], strict=True))
    if change := dice_change(bench, DEFAULT):
        ratios["Dice change"] = abs(float(change))
    return ratios


if __name__ == "__main__":
    raise SystemExit(main())

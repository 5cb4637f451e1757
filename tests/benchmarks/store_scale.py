"""What a slice costs as a store grows to a million: `python tests/benchmarks/store_scale.py [--quick]`.

The stores are synthetic: 200 slices of 8 x 8 pixels a case, in the layout of `distseg prepare`. Each figure is the
median of rounds that go over all sizes in turn, each measured in a process of its own.
"""

import argparse
import hashlib
import io
import itertools
import os
import random
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from report import print_result, print_table, print_versions
from torch.utils.data import BatchSampler, RandomSampler
from tqdm import tqdm

from distseg.config import PRESETS, AugmentConfig, DataConfig
from distseg.data.pipeline import build_train_loader
from distseg.data.plan import Plan, Position
from distseg.data.splits import assign_folds
from distseg.data.store import CASE_JSON, FOREGROUND, Case, Slices, Store, open_store, read_slice, write_store_json

SIZES = (1_000, 10_000, 100_000, 1_000_000)
SLICES_PER_CASE, SIDE = 200, 8
SAMPLE = 500  # slices that are found and read in a round
BATCH = 16
JUDGED = {
    "open": "open_store, us",
    "plan": "plan an epoch, us",
    "find": "find files, us",
    "read": "np.load, cold, us",
    "load": "loader, cold, us",
}
TARGETS = dict.fromkeys(JUDGED, "<= 2")
NOTES = """\
us: microseconds for each slice. Ratios: the largest store's over those of one a hundred (quick: ten) times smaller.
Of the largest store the files of {with_files} random cases were written (all would take minutes to remove); store.json,
finding and planning are of all its {cases} cases. A small store's opening is mostly what any opening takes.
cold: dropped from the page cache before (not their inodes). Images become 32 x 32; reading is the image and its label.
Peers: os.walk lists the files that are there, as a dataset of folders does; torch's BatchSampler over RandomSampler
plans an epoch as a DataLoader does. peak MB: memory on top of what the process had before."""

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 and 10,000 slices only")
    args = parser.parse_args()
    sizes, rounds, most = (SIZES[:2], 3, 5) if args.quick else (SIZES, 5, 200)
    with tempfile.TemporaryDirectory(prefix="store_scale_") as folder:
        roots = {n_slices: Path(folder) / str(n_slices) for n_slices in sizes}
        for n_slices, root in roots.items():
            alone(write_store, root, n_slices // SLICES_PER_CASE, most)
        os.sync()
        open_store(roots[sizes[0]])  # once before, since pydantic imports its parts at the first use
        measured = [{n: measure(root, n, seed) for n, root in roots.items()} for seed in range(rounds)]
    costs = {n: {name: statistics.median(m[n][name] for m in measured) for name in measured[0][n]} for n in sizes}
    report(costs, min(sizes[-1] // SLICES_PER_CASE, most))
    return 0


def report(costs: Mapping[int, Mapping[str, float]], with_files: int) -> None:
    sizes = list(costs)
    small, large = costs[sizes[-3:][0]], costs[sizes[-1]]
    print_versions(["numpy", "pydantic", "nvidia-dali-cuda130", "torch"])
    print_table(["slices", *map(str, sizes)], ([name, *(costs[n][name] for n in sizes)] for name in large))
    print(NOTES.format(cases=sizes[-1] // SLICES_PER_CASE, with_files=with_files))
    if sizes[-1] == SIZES[-1]:
        grown = (f"{name} {10 * large[name]:.3g}" for name in large if name.endswith((" s", " MB")))
        print(
            f"Ten times that, for 10,000,000 slices: {'; '.join(grown)}; a shard folder has about 195 of 50,000 cases."
        )
    ratios = {ratio: large[name] / small[name] for ratio, name in JUDGED.items()}
    print_result("store_scale", ratios | {"open_over_os_walk": large["open_store, us"] / large["os.walk, us"]}, TARGETS)


def alone(work: Callable[..., T], *args: object) -> T:
    """Runs it in a process of its own, where no memory was used and freed before."""
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        return process.submit(work, *args).result()


def measure(root: Path, n_slices: int, seed: int) -> dict[str, float]:
    """Costs of one store by name."""
    return {
        **alone(cost_of_opening, root),
        **alone(cost_of_walking, root),
        **alone(cost_of_planning, n_slices, seed),
        **alone(cost_of_reading, root, seed),
    }


def write_store(root: Path, n_cases: int, with_files: int) -> None:
    """Writes store.json of all cases and the files of some that are drawn at random."""
    cases = [synthetic_case(number) for number in range(n_cases)]
    burden_of_patient = {case.patient: number / n_cases for number, case in enumerate(cases)}
    folds = assign_folds(burden_of_patient, n_folds=5, n_test=0, seed=0)
    labels = {"background": 0, "lung": 1, "infection": 2}
    write_store_json(Store(root, "paired", labels, tuple(cases), folds))
    images = [npy_bytes(np.full((SIDE, SIDE), z, np.int16)) for z in range(SLICES_PER_CASE)]
    label, foreground = npy_bytes(np.zeros((SIDE, SIDE), np.uint8)), npy_bytes(np.empty((0, 4), np.uint16))
    drawn = random.Random(0).sample(cases, min(with_files, n_cases))
    for case in tqdm(drawn, f"write {n_cases * SLICES_PER_CASE} slices", unit="volume", leave=False):
        folder = root / case.folder
        folder.mkdir(parents=True)
        for z, image in enumerate(images):
            (folder / f"{z:04d}.image.npy").write_bytes(image)
            (folder / f"{z:04d}.label.npy").write_bytes(label)
        (folder / FOREGROUND).write_bytes(foreground)
        (folder / CASE_JSON).write_text("{}")


def synthetic_case(number: int) -> Case:
    name = f"case_{number:06d}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    files = [f"{folder}/{name}.nii.gz" for folder in ("images", "lung", "infection")]
    return Case(
        id=name,
        patient=name,
        source=files[0],
        sha256=dict.fromkeys(files, digest),
        folder=f"slices/{digest[:2]}/{name}-{digest[:12]}",
        shape=(SLICES_PER_CASE, SIDE, SIDE),
        spacing_mm=(1.0, 0.7, 0.7),
        intensity="hu",
        hu_range=(-1024, 3071),
        label_voxels={"background": 9000, "lung": 3000, "infection": 800},
        slices_with={"background": ((0, 200),), "lung": ((20, 180),), "infection": ((40, 70), (72, 90), (120, 131))},
    )


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cost_of_opening(root: Path) -> dict[str, float]:
    before, start = peak_mb(), time.perf_counter()
    slices = all_slices(root)
    seconds = time.perf_counter() - start
    return {
        "store.json, MB": (root / "store.json").stat().st_size / 1e6,
        "open_store, peak MB": peak_mb() - before,
        "open_store, s": seconds,
        "open_store, us": seconds / len(slices) * 1e6,
    }


def cost_of_walking(root: Path) -> dict[str, float]:
    start = time.perf_counter()
    entries = [len(folders) + len(files) for _, folders, files in os.walk(root)]
    seconds = time.perf_counter() - start
    return {"os.walk, us": seconds / (sum(entries) / 2) * 1e6, "entries of the fullest folder": max(entries)}


def cost_of_planning(n_slices: int, seed: int) -> dict[str, float]:
    plan = Plan(n_slices, BATCH, seed)
    before = peak_mb()
    first = seconds_of(lambda: next(plan.micro_batches()))
    epoch = seconds_of(lambda: exhaust(itertools.islice(plan.micro_batches(), plan.steps_left(Position()))))
    peak = peak_mb() - before
    peer = seconds_of(lambda: exhaust(BatchSampler(RandomSampler(range(n_slices)), BATCH, False)))
    return {
        "first batch of an epoch, s": first,
        "plan an epoch, peak MB": peak,
        "plan an epoch, us": epoch / n_slices * 1e6,
        "BatchSampler, us": peer / n_slices * 1e6,
    }


def cost_of_reading(root: Path, seed: int) -> dict[str, float]:
    """Of random slices: to find their files, to read them with numpy, and to load them as training does."""
    slices = all_slices(root)
    rng = np.random.default_rng(seed)
    places = rng.integers(len(slices), size=10 * SAMPLE).tolist()
    found = seconds_of(lambda: exhaust((files.image, files.label) for files in map(slices.__getitem__, places)))
    there = [number for number, case in enumerate(slices.cases) if (root / case.folder).is_dir()]
    places_there = np.add.outer(np.multiply(there, SLICES_PER_CASE), np.arange(SLICES_PER_CASE)).ravel()
    sample = Slices(root, slices.cases, rng.choice(places_there, SAMPLE, replace=False))
    forget(sample)
    read = seconds_of(lambda: exhaust((read_slice(files.image), read_slice(files.label)) for files in sample))
    data = DataConfig(image_size=32, augment=AugmentConfig("none", **PRESETS["none"]))
    batches = iter(build_train_loader(data, sample, Plan(SAMPLE, BATCH, seed), seed, torch.device("cpu")))
    next(batches)  # builds the graph
    forget(sample)
    loaded = seconds_of(lambda: exhaust(itertools.islice(batches, SAMPLE // BATCH)))
    return {
        "find files, us": found / len(places) * 1e6,
        "np.load, cold, us": read / SAMPLE * 1e6,
        "loader, cold, us": loaded / (SAMPLE // BATCH * BATCH) * 1e6,
    }


def all_slices(root: Path) -> Slices:
    store = open_store(root)
    return store.slices_of(store.cases)


def forget(slices: Slices) -> None:
    """Drops the slices' files from the page cache."""
    for files in slices:
        for path in (files.image, files.label):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def exhaust(items: Iterable[object]) -> None:
    """Takes all items and keeps none."""
    deque(items, maxlen=0)


def peak_mb() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())

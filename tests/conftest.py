"""Shared fixtures: a small phantom, its store, and one short run that several tests look at."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported, which reads it then. On so small images a second thread only waits, and two workers with two
# threads each last three times as long. For processes that a test starts too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock

from tests import warm

ROOT = Path(__file__).parent.parent
# What DeepSpeed builds is for this environment's torch; its usual place is shared by all environments of a user.
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
# Read when Triton is imported: where no GPU compiles its kernels, numpy runs them line by line.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SMALL = [
    "data.image_size=64",
    "data.num_threads=1",
    "model.encoder=gernet_s",
    "model.decoder_widths=[8, 8, 8, 8, 8]",
    "train.batch_size_per_rank=4",
    "train.log_every_steps=1",
]

SCRIPTS_FIRST = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

LAUNCHES = {  # `accelerate launch --config_file ...` by strategy, also `run_ranks(launch=...)`
    "ddp": ["launch/cpu.yaml"],
    **{f"zero{stage}": ["launch/cpu_zero.yaml", "--zero_stage", str(stage)] for stage in range(4)},
    "zero2_offload": ["launch/cpu_zero.yaml", "--zero_stage", "2", "--offload_optimizer_device", "cpu"],
    "fsdp2": ["launch/cpu_fsdp2.yaml"],
}


def wait_until(
    condition: Callable[[], object],
    what: str,
    seconds: float,
    process: subprocess.Popen[Any] | None = None,
    interval_s: float = 0.05,
) -> float:
    """Seconds that it took, while `process`, if given, still runs.

    Raises:
        TimeoutError: it lasted longer.
    """
    start = time.monotonic()
    while not condition():
        assert process is None or process.poll() is None, f"{what}: it ended before: {process.communicate()[0]}"
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(interval_s)
    return time.monotonic() - start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and tests within a file, in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files in the order of what they last, the longest first, so that no worker waits for another one's long one."""
    files = {item.path: 0.0 for item in items}
    for item in items:
        slow = item.get_closest_marker("slow")
        files[item.path] += slow.args[0] if slow else 0.5
    order = sorted(files, key=lambda path: -files[path])
    if (seed := config.getoption("--shuffle")) is not None:
        chance = random.Random(seed)
        chance.shuffle(order)
        chance.shuffle(items)
    items.sort(key=lambda item: order.index(item.path))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Gives what a function makes at a path; of several workers the first one makes it, and all see the same files."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "made"
    root.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.done").exists():
                make(root / name)
                (root / f"{name}.done").touch()
        return root / name

    return made


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def phantom(made_once: MadeOnce) -> Path:
    """Six patients of eight 64 x 64 slices; all workers' own: not to be written to."""
    from distseg.phantoms.case import write_phantom

    return made_once("phantom", lambda folder: write_phantom(folder, cases=6, seed=0, size=64, n_slices=8))


@pytest.fixture(scope="session")
def store(phantom: Path, made_once: MadeOnce) -> Path:
    """Of the phantom, three folds and a test patient; all workers' own: not to be written to."""
    from distseg.data.preparing import FoldRule, prepare_store

    return made_once("store", lambda folder: prepare_store(phantom, folder, FoldRule(n_folds=3, n_test=1), workers=2))


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `distseg` words in so many processes, from the repository's root; for what does not depend on how they start.

    `launch` gives them the environment of `accelerate launch` with such words, `env` more, `change` disturbs them from inside.
    """

    def run(
        n: int,
        *words: object,
        ok: bool = True,
        launch: Sequence[str] = (),
        env: dict[str, str] | None = None,
        change: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        told = warm.environment_of_launch("--config_file", *launch, "--num_processes", str(n)) if launch else {}
        done = warm.run_ranks(
            n,
            [str(word) for word in words],
            tmp_path_factory.mktemp("ranks"),
            cwd=ROOT,
            timeout=300,
            env=told | (env or {}),
            change=change,
        )
        assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def run_command(
    run_ranks: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs words as a user would, from the repository's root, with this Python's scripts first on the path.

    `distseg` is forked: its start would be most of what these tests last.
    """

    def run(*words: object, ok: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        if words[0] == "distseg":
            return run_ranks(1, *words[1:], ok=ok, env=env)
        done = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=os.environ | {"PATH": SCRIPTS_FIRST} | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def refused(
    run_command: Callable[..., subprocess.CompletedProcess[str]], capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `distseg` words that are a mistake, in this process; but for `train`, which would leave ranks connected."""
    from distseg import cli

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        if words[0] == "train":
            return run_command("distseg", *words, ok=False)
        capfd.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stopped:  # argparse's own
            status = stopped.code
        return subprocess.CompletedProcess(words, status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def small_run(
    store: Path, made_once: MadeOnce, run_command: Callable[..., object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of six steps in two epochs' time, made to find half of all pixels to be lung and a fifth infection.

    A worker's own copy: its evaluations are written into it.
    """

    def train(out: Path) -> None:
        run_command("distseg", "train", *SMALL, f"data.store={store}", "train.max_steps=6", f"output_dir={out}")
        shift_heads(out, shares=(0.5, 0.2))

    return Path(shutil.copytree(made_once("run", train), tmp_path_factory.mktemp("small") / "run"))


def shift_heads(run: Path, shares: Sequence[float]) -> None:
    """Moves the biases of a run's best weights until regions have such shares of the validation slices' pixels.

    After a few steps a network finds nothing anywhere, and masks that are equal because they are empty show nothing.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from distseg.runs.folder import open_run
    from distseg.runs.trained import load_best
    from distseg.serving.verification import pixel_mm_of, read_samples

    folder, config = open_run(run)
    segmenter = load_best(folder, config)[1]
    with torch.inference_mode():
        probabilities = [
            segmenter(sample.hu_NCHW, *pixel_mm_of(segmenter, sample.case, len(sample.z)))[1]
            for sample in read_samples(config)
        ]
        logits_RP = torch.logit(torch.cat(probabilities)).transpose(0, 1).flatten(1)
    with safe_open(folder.best_weights, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (bias,) = (name for name in state if name.startswith("heads.") and name.endswith("bias"))
    state[bias] -= torch.stack([row.quantile(1 - share) for row, share in zip(logits_RP, shares, strict=True)])
    save_file(state, folder.best_weights, metadata)


@pytest.fixture(scope="session")
def model(small_run: Path, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, exported in float32; a worker's own copy."""
    from distseg.serving.exporting import ExportOptions, export_run

    exported = made_once("model", lambda out: export_run(small_run, out, ExportOptions(precision="float32")))
    own = tmp_path_factory.mktemp("exported") / "model"
    subprocess.run(["cp", "-a", exported, own], check=True)  # keeps the hard links between its files
    return own

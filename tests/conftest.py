"""Shared fixtures: a small phantom, its store, and one short run that several tests look at."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm

ROOT = Path(__file__).parent.parent
# For processes that a test starts too: on so small images a second thread only waits.
os.environ["OMP_NUM_THREADS"] = "1"
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

LAUNCHES = {  # `accelerate launch --config_file ...` by strategy
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


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of eight 64 x 64 slices."""
    from distseg.data.phantom import write_phantom

    folder = tmp_path_factory.mktemp("phantom") / "set"
    write_phantom(folder, cases=6, seed=0, size=64, n_slices=8)
    return folder


@pytest.fixture(scope="session")
def store(phantom: Path) -> Path:
    from distseg.data.prepare import FoldRule, prepare_store

    root = phantom.parent / "store"
    prepare_store(phantom, root, FoldRule(n_folds=3, n_test=1), workers=2)
    return root


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `distseg` words in so many processes, from the repository's root; for what does not depend on how they start."""

    def run(n: int, *words: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = warm.run_ranks(n, [str(word) for word in words], tmp_path_factory.mktemp("ranks"), cwd=ROOT, timeout=300)
        assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def run_command(
    run_ranks: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs words as a user would, from the repository's root, with this Python's scripts first on the path.

    `distseg` alone is forked where it needs no environment of its own: its start would be most of what these tests last.
    """

    def run(*words: object, ok: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        if words[0] == "distseg" and env is None:
            return run_ranks(1, *words[1:], ok=ok)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env={**os.environ, "PATH": path, **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def small_run(store: Path, run_command: Callable[..., object]) -> Path:
    """A run of six steps in two epochs' time, made to find half of all pixels to be lung and a fifth infection."""
    out = store.parent / "run"
    run_command("distseg", "train", *SMALL, f"data.store={store}", "train.max_steps=6", f"output_dir={out}")
    shift_heads(out, shares=(0.5, 0.2))
    return out


def shift_heads(run: Path, shares: Sequence[float]) -> None:
    """Moves the biases of a run's best weights until regions have such shares of the validation slices' pixels.

    After a few steps a network finds nothing anywhere, and masks that are equal because they are empty show nothing.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from distseg.runs.folder import open_run
    from distseg.runs.trained import load_best
    from distseg.serving.verification import read_samples

    folder, config = open_run(run)
    segmenter = load_best(folder, config)[1]
    with torch.inference_mode():
        hu_NCHW = torch.cat([sample.hu_NCHW for sample in read_samples(config)])
        logits_RP = torch.logit(segmenter(hu_NCHW)[1]).transpose(0, 1).flatten(1)
    with safe_open(folder.best_weights, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (bias,) = (name for name in state if name.startswith("heads.") and name.endswith("bias"))
    state[bias] -= torch.stack([row.quantile(1 - share) for row, share in zip(logits_RP, shares, strict=True)])
    save_file(state, folder.best_weights, metadata)


@pytest.fixture(scope="session")
def model(small_run: Path) -> Path:
    """The small run, exported in float32."""
    from distseg.serving.artefact import ExportOptions, export_run

    out = small_run.parent / "model"
    export_run(small_run, out, ExportOptions(precision="float32"))
    return out

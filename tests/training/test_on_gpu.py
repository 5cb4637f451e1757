"""On a CUDA device: every precision, exact resumption, preemption, scores, and the exported file there."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL, wait_until
from tests.training.test_survival import same, started, train_rows, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Run = Callable[..., Any]
LAUNCH = ["accelerate", "launch", "--config_file", "launch/gpu.yaml", "--num_processes", "1"]
LEARNING = [
    "optim.lr=1e-3", "optim.ema_decay=0.9", "optim.max_grad_norm=1", "data.augment.preset=strong", "model.dropout=0.1",
]  # fmt: skip


def words(store: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, *LEARNING, f"data.store={store}", f"output_dir={out}", *more]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    precision: str, store: Path, tmp_path: Path, run_command: Run
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch = [*LAUNCH, "--mixed_precision", precision, "distseg/train.py"]
    said = run_command(*launch, *words(store, whole, "train.max_steps=20")).stdout
    assert "on cuda" in said and "loss kernel triton" in said
    run_command(*launch, *words(store, parts, "train.max_steps=9"))
    run_command(*launch, *words(store, parts, "train.max_steps=20"), "--resume")
    for kind in ("weights", "ema"):
        assert same(weights(whole, 20, kind), weights(parts, 20, kind))
    losses = [[row["loss"] for row in train_rows(out)] for out in (whole, parts)]
    assert losses[0] == losses[1]
    taken = [loss for loss in losses[0] if loss is not None]  # fp16's scale is found by steps that are skipped
    assert len(taken) >= 15 and sum(taken[-5:]) < sum(taken[:5])


@pytest.mark.parametrize("decoder", ["deeplabv3", "deeplabv3plus", "unetplusplus"])
@pytest.mark.parametrize("encoder", ["densenet121", "legacy_seresnet18"])
def test_two_runs_are_the_same_bits_for_other_networks(
    encoder: str, decoder: str, store: Path, tmp_path: Path, run_command: Run
) -> None:
    network = [f"model.encoder={encoder}", f"model.decoder={decoder}", "model.decoder_widths=paper"]
    for name in ("one", "other"):
        run_command("distseg", "train", *words(store, tmp_path / name, "train.max_steps=4", *network))
    assert same(weights(tmp_path / "one", 4), weights(tmp_path / "other", 4))


def test_a_preempted_run_saves_and_goes_on_bit_for_bit(store: Path, tmp_path: Path, run_command: Run) -> None:
    whole, cut = (words(store, tmp_path / part, "train.max_steps=60") for part in ("whole", "cut"))
    out = tmp_path / "cut"
    with started(*LAUNCH, "distseg/train.py", *cut) as job:
        wait_until(lambda: len(train_rows(out)) >= 2, "two steps", 120, job)
        job.send_signal(signal.SIGTERM)
        text = job.communicate(timeout=60)[0]
    assert "stopped by SIGTERM after step" in text and (out / "preempted.json").exists()
    run_command(*LAUNCH, "distseg/train.py", *cut, "--resume")
    run_command(*LAUNCH, "distseg/train.py", *whole)
    assert same(weights(out, 60), weights(tmp_path / "whole", 60))


def test_scores_and_the_exported_file_are_the_same_on_gpu_and_cpu(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    run_command(*LAUNCH, "distseg/train.py", *words(store, run, "train.max_steps=40"))
    run_command("distseg", "evaluate", run)
    assert (run / "eval/val/summary.json").is_file()
    run_command("distseg", "export", run, model, "--precision", "float32")
    generator = torch.Generator().manual_seed(0)
    hu_BCHW = torch.randint(-1024, 600, (2, 1, 90, 70), generator=generator).to(torch.int16)
    found = []
    for device in ("cpu", "cuda"):
        loaded = torch.jit.load(model / "model.pt", map_location=device)
        with torch.inference_mode():
            found.append([tensor.cpu() for tensor in loaded(hu_BCHW.to(device))])
    (mask, probability), (mask_gpu, probability_gpu) = found
    assert (probability - probability_gpu).abs().max() < 1e-2  # convolutions multiply in TF32 there
    assert (mask != mask_gpu).float().mean() < 1e-2

"""What the data section offers, through whole runs: other ranks on resume, staging, channels, the leaky split, bad slices."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from distseg.data.store import open_store
from distseg.tables import read_rows
from tests.conftest import SMALL

Run = Callable[..., Any]
EVERYTHING = ["data.augment.preset=strong", "data.augment.elastic_probability=0.5", "data.log_samples=true"]


def given(run: Path, epoch: int = 0) -> Counter[tuple[str, str]]:
    """(slice, digest of what the network was given) of all samples of an epoch, over all ranks."""
    rows = [row for path in (run / "samples").glob("rank*.jsonl") for row in read_rows(path)]
    return Counter((row["sample"], row["sha256"]) for row in rows if row["epoch"] == epoch)


@pytest.mark.dist
def test_going_on_with_other_ranks_loses_and_repeats_no_sample_and_draws_the_same(
    store: Path, tmp_path: Path, run_ranks: Run
) -> None:
    settings = [*SMALL, *EVERYTHING, f"data.store={store}", "data.focus_share=0.7", "model.norm=batch"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*settings, "train.batch_size_per_rank=6", "train.epochs=1"]
    run_ranks(1, "train", *words, f"output_dir={whole}")
    of_three = [*settings, "train.batch_size_per_rank=2", "train.max_steps=2", f"data.cache_dir={tmp_path / 'cache'}"]
    run_ranks(3, "train", *of_three, f"output_dir={parts}")
    assert sum(given(parts).values()) == 12  # not the whole epoch
    run_ranks(1, "train", *words, f"output_dir={parts}", "--resume")
    assert given(parts) == given(whole)
    opened = open_store(store)
    slices = opened.slices_of_split("train", 0)
    times = Counter(name for name, _ in given(whole).elements())
    infected = {slices[int(i)].id for i in slices.holding(["infection"])}
    assert times.keys() == {files.id for files in slices}
    assert sum(n for name, n in times.items() if name in infected) >= 0.7 * sum(times.values())
    assert len(given(whole)) == sum(times.values())  # a repeated slice is changed otherwise each time
    (staged,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in staged.glob("slices/*/*")} == {
        Path(case.folder).name for split in ("train", "val") for case in opened.cases_of(split, 0)
    }


def test_windows_and_neighbours_go_all_the_way_to_a_mask(
    store: Path, phantom: Path, tmp_path: Path, run_command: Run
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    channels = ["data.windows_hu=[[-1250, 250], [-160, 240]]", "data.neighbours=1"]
    run_command("distseg", "train", *SMALL, *channels, f"data.store={store}", "train.max_steps=2", f"output_dir={run}")
    run_command("distseg", "export", run, model)  # compares the file with the eager model
    described = json.loads((model / "model.json").read_text())
    assert described["input"]["shape"] == ["N", 3, "H", "W"] and len(described["windows_hu"]) == 2
    volume = next((phantom / "COVID-19-CT-Seg_20cases").iterdir())
    run_command("distseg", "predict", model, volume, tmp_path / "mask.nii.gz")
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    assert mask.shape == nib.load(volume).shape and set(np.unique(mask)) <= {0, 1, 2}


def test_the_leaky_split_is_scored_on_its_own_slices_and_named(store: Path, tmp_path: Path, run_command: Run) -> None:
    run = tmp_path / "run"
    words = [*SMALL, "data.leaky_slice_split=true", f"data.store={store}", "train.max_steps=2", f"output_dir={run}"]
    run_command("distseg", "train", *words)
    run_command("distseg", "evaluate", run)
    summary = json.loads((run / "eval/val/summary.json").read_text())
    assert summary["leaky_slice_split"] is True and summary["n_patients"] == 5  # all but the test patient
    rows = (run / "eval/val/per_case.csv").read_text().splitlines()
    header = rows[0].split(",")
    voxels = sum(
        int(row.split(",")[header.index(f"lung_{kind}")]) for row in rows[1:] for kind in ("tp", "fp", "fn", "tn")
    )
    opened = open_store(store)
    assert voxels == len(opened.slices_of_split("val", 0, leaky_seed=0)) * 64 * 64


@pytest.mark.dist
def test_a_damaged_slice_that_one_rank_meets_ends_the_job_with_its_name(
    store: Path, tmp_path: Path, run_ranks: Run
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    slices = open_store(copy).slices_of_split("train", 0)
    bad = slices[len(slices) - 1].image
    bad.write_bytes(bad.read_bytes()[:200])
    words = [*SMALL, f"data.store={copy}", f"output_dir={tmp_path / 'run'}", "train.epochs=1"]
    done = run_ranks(2, "train", *words, ok=False)  # a hang would time out
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and sum(f"damaged slice {bad}" in line for line in said) == 1, done.stderr
    assert all("damaged slice" in line or "a rank is gone" in line for line in said)


def test_a_region_that_no_training_slice_holds_is_refused(store: Path, tmp_path: Path, run_command: Run) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    values = json.loads((copy / "store.json").read_text())
    values["labels"]["consolidation"] = 4
    (copy / "store.json").write_text(json.dumps(values))
    words = [*SMALL, f"data.store={copy}", "regions={lung: [1, 2], solid: [4]}", f"output_dir={tmp_path / 'run'}"]
    done = run_command("distseg", "train", *words, ok=False)
    assert done.returncode == 1 and "regions.solid: got no training slice" in done.stderr

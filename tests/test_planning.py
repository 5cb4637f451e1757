"""What `distseg plan` proposes: the same text each time, values that training takes, and rules that follow the store."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from distseg.config import Config
from distseg.config_files import load_config
from distseg.data.store import Store, open_store
from distseg.errors import DistsegError
from distseg.planning import Machine, as_yaml, machine_here, plan
from distseg.reporting.run_page import run_page

CPU = Machine(None, 2)
SMALL = ["model.encoder=gernet_s", "model.decoder_widths=[8, 8, 8, 8, 8]"]
BASE = load_config(None, SMALL)
Run = Callable[..., object]


def values(
    store: Store, base: Config = BASE, machine: Machine = CPU, budget_s: float | None = None
) -> dict[str, object]:
    return {choice.key: choice.value for choice in plan(store, base, machine, budget_s)}


def with_sizes(store: Store, *pixel_mm: float, side: int = 64) -> Store:
    cases = (
        dataclasses.replace(case, spacing_mm=(10.0, mm, mm), shape=(8, side, side))
        for case, mm in zip(store.cases, pixel_mm * len(store.cases), strict=False)
    )
    return dataclasses.replace(store, cases=tuple(cases))


def test_the_same_store_gives_the_same_bytes_which_training_takes(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    for name in ("a", "b"):
        run_command(
            "distseg", "plan", store, "--out", tmp_path / f"{name}.yaml", "--budget", "5m", *SMALL, "optim.lr=0.002"
        )
    text = (tmp_path / "a.yaml").read_text()
    assert text == (tmp_path / "b.yaml").read_text()
    assert all("  # " in line for line in text.splitlines() if not line.endswith(":") and not line.startswith("#"))
    config = load_config(tmp_path / "a.yaml")
    assert config.model.encoder == "gernet_s" and config.optim.lr == 0.002 and config.data.image_size == 64
    assert dict(config.regions) == {"lung": ("lung", "infection"), "infection": ("infection",)}
    assert "data.image_size" in config.planned and "optim.lr" not in config.planned
    words = (
        "--config",
        tmp_path / "a.yaml",
        "train.max_steps=2",
        "data.num_threads=1",
        f"output_dir={tmp_path / 'run'}",
    )
    run_command("distseg", "train", *words)
    page, _ = run_page(tmp_path / "run")
    assert "Chosen by <code>distseg plan</code>: data.windows_hu, data.image_size" in page
    done = run_command("distseg", "plan", store, "--out", tmp_path / "a.yaml", ok=False)
    assert done.returncode == 1 and "nothing is overwritten" in done.stderr  # type: ignore[attr-defined]


def test_images_are_no_larger_than_slices_and_batches_than_memory_and_a_twentieth(store: Path) -> None:
    opened = open_store(store)
    assert values(opened)["data.image_size"] == 64
    large = with_sizes(opened, 0.7, side=500)
    assert values(large)["data.image_size"] == 256  # as configured
    sizes = [values(large, machine=Machine(gib, 8))["train.batch_size_per_rank"] for gib in (0.2, 0.4, 8.0, 80.0)]
    assert sizes == sorted(sizes) and sizes[-1] == max(1, len(opened.slices_of_split("train", 0)) // 20)  # type: ignore[type-var]
    with pytest.raises(DistsegError, match="--gpu-memory: got 0.001 GiB; one slice takes up to"):
        values(large, machine=Machine(0.001, 8))


def test_one_pixel_size_is_chosen_where_fields_of_view_differ(store: Path) -> None:
    opened = open_store(store)
    assert values(opened)["data.spacing_mm"] is None
    chosen = values(with_sizes(opened, 5.0, 6.0, 7.0))
    assert chosen["data.fit"] == "crop" and chosen["data.spacing_mm"] == 6.0
    unknown = dataclasses.replace(
        opened, cases=tuple(dataclasses.replace(case, spacing_mm=None) for case in opened.cases)
    )
    assert values(unknown)["data.spacing_mm"] is None


def test_epochs_fit_the_time_and_flips_the_regions(store: Path) -> None:
    opened = open_store(store)
    few, many = (values(opened, budget_s=seconds)["train.epochs"] for seconds in (60, 600))
    assert 0 < few < many and values(opened)["train.epochs"] == 100  # type: ignore[operator]
    assert values(opened, budget_s=1e9)["train.epochs"] == 1250
    with pytest.raises(DistsegError, match="--budget: got .* an epoch of .* slices takes about"):
        values(opened, budget_s=0.1)
    assert values(opened)["data.augment.flip_probability"] == 0.5
    sided = dataclasses.replace(
        opened,
        labels={"background": 0, "left_lung": 1, "right_lung": 2},
        cases=tuple(dataclasses.replace(case, label_voxels={"left_lung": 5, "right_lung": 5}) for case in opened.cases),
    )
    assert values(sided)["data.augment.flip_probability"] == 0


def test_what_is_given_is_kept(store: Path) -> None:
    given = {"data.image_size": 32, "data.augment.flip_probability": 0.25}
    base = load_config(None, [*SMALL, *(f"{key}={value}" for key, value in given.items())])
    choices = plan(open_store(store), base, CPU, given=given)
    text = as_yaml(choices, "distseg plan")
    assert "image_size: 32  # as you gave it" in text and "flip_probability: 0.25  # as you gave it" in text
    assert machine_here(3.0).gpu_memory_gib == 3.0


def test_a_value_given_at_its_default_is_kept(store: Path, run_command: Run) -> None:
    words = ("data.image_size=256", "train.epochs=100", *SMALL)
    done = run_command("distseg", "plan", store, "--budget", "5m", *words)
    assert "image_size: 256  # as you gave it" in done.stdout  # type: ignore[attr-defined]
    assert "epochs: 100  # as you gave it" in done.stdout  # type: ignore[attr-defined]


def test_no_pixel_size_is_chosen_for_slices_that_are_resized_whole(store: Path, tmp_path: Path) -> None:
    varied = with_sizes(open_store(store), 5.0, 6.0, 7.0)
    file = tmp_path / "plan.yaml"
    file.write_text(as_yaml(plan(varied, BASE, CPU, given={"data.fit": "resize"}), "distseg plan a\nb: c"))
    assert load_config(file).data.spacing_mm is None

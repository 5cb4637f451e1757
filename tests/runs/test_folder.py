"""A run's folder: what may change when it goes on, and what other runs must have in common with it."""

from pathlib import Path

import pytest
import torch

from distseg.config_files import config_as_yaml, load_config
from distseg.data.store import open_store, settled
from distseg.errors import DistsegError
from distseg.models.network import build_model
from distseg.runs.folder import RunFolder
from distseg.runs.trained import load_ensemble, save_best, start_from_run

SMALL = ["model.encoder=resnet18", "model.decoder_widths=[8,8,8,8,8]"]
REGIONS = ["regions={lung: [1, 2], infection: [2]}", "regions={infection: [2], lung: [1, 2]}", "regions={lung: [1, 2]}"]


def write_run(root: Path, *words: str) -> RunFolder:
    """A run whose weights are all 0."""
    folder, config = RunFolder(root), load_config(None, [*SMALL, *words])
    network = build_model(config.model, config.data.channels, len(config.regions))
    folder.config.parent.mkdir(parents=True)
    folder.config.write_text(config_as_yaml(config))
    save_best(folder.best_weights, {key: torch.zeros_like(tensor) for key, tensor in network.state_dict().items()}, {})
    return folder


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        (REGIONS[1], r"regions \(\['lung', 'infection'\] -> \['infection', 'lung'\]\)"),
        (REGIONS[2], r"regions.infection \(\['infection'\] -> None\), regions "),
        ("optim.lr=1", r"optim.lr \(0.0001 -> 1.0\)"),
        ("data.image_size=64", r"data.image_size \(256 -> 64\)"),
    ],
)
def test_a_run_does_not_go_on_as_another_one(now: str, changed: str, store: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", REGIONS[0])
    with pytest.raises(DistsegError, match=f"--resume: got another configuration than .*: {changed}"):
        folder.check_same_run(settled(load_config(folder.config, [now]), open_store(store)), open_store(store))


def test_a_run_goes_on_at_another_pace(store: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", REGIONS[0])
    words = [
        "train.epochs=7",
        "checkpoint.keep_last=5",
        "data.num_threads=9",
        "train.batch_size_per_rank=5",
        "output_dir=moved",
    ]
    now, opened = load_config(folder.config, [*words, "evaluate.threshold=0.3"]), open_store(store)
    folder.check_same_run(settled(now, opened), opened)


@pytest.mark.parametrize("regions", REGIONS[1:])
def test_an_ensemble_has_the_same_regions_in_the_same_order(regions: str, tmp_path: Path) -> None:
    members = [write_run(tmp_path / name, words) for name, words in (("one", REGIONS[0]), ("other", regions))]
    with pytest.raises(DistsegError, match="--ensemble: got .*other with regions.*in the same order"):
        load_ensemble([(folder, load_config(folder.config)) for folder in members])


@pytest.mark.parametrize(("regions", "heads"), [(REGIONS[0], True), (REGIONS[1], False)])
def test_heads_of_other_regions_are_not_taken_over(regions: str, heads: bool, tmp_path: Path) -> None:
    folder, config = write_run(tmp_path / "run", REGIONS[0]), load_config(None, [*SMALL, regions])
    network = build_model(config.model, config.data.channels, len(config.regions))
    start_from_run(network, folder.root, config.regions)
    state = network.state_dict()
    assert all(not tensor.any() for key, tensor in state.items() if not key.startswith("heads."))
    assert all(
        tensor.any() != heads for key, tensor in state.items() if key.startswith("heads.") and key.endswith("weight")
    )

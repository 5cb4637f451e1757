"""What a configuration leaves to its store."""

import dataclasses
from pathlib import Path

import pytest

from distseg.config import Config
from distseg.config_files import config_as_yaml, load_config
from distseg.data.store import Store, open_store, settled
from distseg.errors import DistsegError


def named(store: Path, **labels: int) -> Store:
    """The store, its two labels called otherwise."""
    opened = open_store(store)
    old = {number: name for name, number in opened.labels.items()}
    cases = tuple(
        dataclasses.replace(case, label_voxels={name: case.label_voxels[old[n]] for name, n in labels.items()})
        for case in opened.cases
    )
    return dataclasses.replace(opened, labels={"background": 0} | labels, cases=cases)


def test_regions_come_from_the_store_and_are_written_by_name(store: Path, tmp_path: Path) -> None:
    config = settled(load_config(None), open_store(store))
    assert config.regions == {"lung": ("lung", "infection"), "infection": ("infection",)}
    assert config.region_labels == {"lung": (1, 2), "infection": (2,)} and config.data.augment.flip_probability == 0.5
    (tmp_path / "c.yaml").write_text(config_as_yaml(config))
    assert settled(load_config(tmp_path / "c.yaml"), open_store(store)) == config == load_config(tmp_path / "c.yaml")


def test_a_region_is_the_same_label_in_a_store_that_numbers_it_otherwise(store: Path) -> None:
    config = load_config(None, ["regions={infection: [infection]}"])
    assert settled(config, named(store, infection=1, lung=2)).region_labels == {"infection": (1,)}
    before = load_config(None, ["regions={lung: [1, 2], infection: [2]}"])  # as earlier versions wrote it
    assert settled(before, open_store(store)) == settled(load_config(None), open_store(store))


@pytest.mark.parametrize("label", ["bone", "background", "7"])
def test_a_label_that_the_store_has_not_is_refused_with_its_names(store: Path, label: str) -> None:
    with pytest.raises(DistsegError, match=f"regions.lung: got label {label}; .* has .*'lung': 1, 'infection': 2"):
        settled(load_config(None, [f"regions={{lung: [lung, {label}]}}"]), open_store(store))


def test_a_side_keeps_images_as_they_are(store: Path) -> None:
    sides = named(store, left_lung=1, right_lung=2)
    config = settled(load_config(None), sides)
    assert config.data.augment.flips == 0 and list(config.regions) == ["left_lung", "right_lung"]
    both = settled(load_config(None, ["regions={lungs: [left_lung, right_lung]}"]), sides)
    assert both.data.augment.flips == 0.5
    with pytest.raises(DistsegError, match="region left_lung has a side, .*add data.augment.flip_probability=0"):
        settled(load_config(None, ["data.augment.flip_probability=0.5"]), sides)


def test_what_is_looked_for_is_the_rarest_region(store: Path) -> None:
    config = load_config(None, ["data.focus_share=0.5"])
    assert settled(config, open_store(store)).data.focus_region == "infection"
    assert settled(config, named(store, lung=1, nodule=2)).data.focus_region == "nodule"
    assert settled(Config(), open_store(store)).data.focus_region is None


def test_a_label_that_no_case_holds_is_no_region_unless_it_is_named(store: Path) -> None:
    opened = open_store(store)
    more = dataclasses.replace(opened, labels={**opened.labels, "pleural_effusion": 5})
    assert list(settled(Config(), more).regions) == ["lung", "infection"]
    named = load_config(None, ["regions={effusion: [pleural_effusion]}"])
    assert settled(named, more).region_labels == {"effusion": (5,)}

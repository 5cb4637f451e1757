"""Rules from probabilities to masks, by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from distseg.errors import DistsegError
from distseg.scoring.postprocessing import RULES, RegionRule, read_rules
from distseg.scoring.segmenting import label_map

REGIONS = {"lung": (1, 2), "infection": (2,)}


@pytest.fixture
def probability() -> np.ndarray:
    """Three separate blobs in one slice: 4 voxels up to 0.9, 6 at 0.6, 1 at 0.4."""
    volume = np.zeros((2, 8, 12), np.float32)
    volume[0, 1, 1:5] = [0.6, 0.9, 0.6, 0.6]
    volume[0, 4, 1:7] = 0.6
    volume[1, 7, 11] = 0.4
    return volume


def test_a_threshold_is_inclusive_and_nothing_else_by_default(probability: np.ndarray) -> None:
    assert RegionRule().mask(probability).sum() == 10 and RegionRule(0.4).mask(probability).sum() == 11
    assert RegionRule(np.float32(0.6)).mask(probability).sum() == 10
    assert not RegionRule(0.95, components=1).mask(probability).any()


def test_hysteresis_keeps_components_with_a_sure_voxel(probability: np.ndarray) -> None:
    assert RegionRule(0.3, seed_threshold=0.8).mask(probability)[0, 1, 1:5].all()
    assert RegionRule(0.3, seed_threshold=0.8).mask(probability).sum() == 4


def test_the_largest_components_stay(probability: np.ndarray) -> None:
    assert RegionRule(0.3, components=1).mask(probability)[0, 4, 1:7].all()
    assert [RegionRule(0.3, components=n).mask(probability).sum() for n in (1, 2, 3, 9)] == [6, 10, 11, 11]
    assert RegionRule(0.3, seed_threshold=0.8, components=1).mask(probability).sum() == 4  # of those that are sure


def test_voxels_that_share_a_corner_across_slices_are_one_component() -> None:
    volume = np.zeros((2, 4, 4), np.float32)
    volume[0, 0, 0] = volume[1, 1, 1] = 0.9
    assert RegionRule(components=1).mask(volume).sum() == 2


def test_what_lies_outside_the_lung_goes(probability: np.ndarray) -> None:
    lung = np.zeros_like(probability)
    lung[0, :6] = 0.9
    lung[0, 4, 6] = 0.0
    rules = {"lung": RegionRule(), "infection": RegionRule(0.3, inside="lung")}
    labels = label_map(rules, np.stack([lung, probability]), REGIONS)
    assert labels.dtype == np.uint8 and (labels == 2).sum() == 9 and labels[1].sum() == 0
    assert (labels > 0).sum() == (lung > 0).sum()


def test_rules_come_back_from_their_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_rules(tmp_path) is None
    rules = {"lung": {"components": 2}, "infection": {"threshold": 0.4, "seed_threshold": 0.7, "inside": "lung"}}
    (tmp_path / RULES).write_text(json.dumps({"rules": rules}))
    assert read_rules(tmp_path) == {
        "lung": RegionRule(components=2), "infection": RegionRule(0.4, 0.7, inside="lung"),
    }  # fmt: skip
    (tmp_path / RULES).write_text('{"rules": {"lung": {"threshold": "high"}}}')
    with pytest.raises(DistsegError, match="post-processing: got .*damaged"):
        read_rules(tmp_path)

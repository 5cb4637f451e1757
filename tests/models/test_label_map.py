"""One label a pixel, whatever regions say of each other."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from distseg.models.label_map import LabelMap
from distseg.scoring.postprocessing import RegionRule
from distseg.scoring.segmenting import label_map

Regions = Mapping[str, Sequence[int]]

FAMILIES: dict[str, Regions] = {
    "nested": {"lung": (1, 2), "infection": (2,)},
    "lobes": {name: (n,) for n, name in enumerate(("lul", "lll", "rul", "rml", "rll"), start=1)},
    "classes in a lung": {"solid": (2,), "lung": (1, 2, 3), "glass": (3,), "effusion": (4,)},
    "nested and apart": {"lung": (1, 2), "infection": (2,), "nodule": (3,)},
    "overlapping": {"a": (1, 2, 3), "b": (3, 4, 5), "c": (5, 6, 1), "d": (7,)},
}


def by_definition(regions: Regions, probability: Sequence[float], thresholds: Sequence[float]) -> set[int]:
    """Indices of the regions that stay: the most probable ones first, each unless it shares no label with one that stays."""
    sets = [set(labels) for labels in regions.values()]
    stay: list[int] = []
    for region in sorted(range(len(sets)), key=lambda region: -probability[region]):
        if probability[region] >= thresholds[region] and all(sets[region] & sets[other] for other in stay):
            stay.append(region)
    return set(stay)


@pytest.mark.parametrize("regions", FAMILIES.values(), ids=FAMILIES)
def test_of_regions_that_share_no_label_the_most_probable_stays(regions: Regions) -> None:
    levels = (0.2, 0.5, 0.6, 0.8, 0.9)  # equals are among them: the first of two stays
    some = list(itertools.product(levels, repeat=min(4, len(regions))))
    probability = torch.tensor([(*row, *([0.7] * (len(regions) - len(row)))) for row in some])
    module = LabelMap(regions, 0.5)
    module.thresholds[-1] = 0.65
    scripted = torch.jit.script(module)
    probability_BRHW = probability.T[None, :, None]
    found = module.found(probability_BRHW)[0, :, 0].T
    for row, got in zip(probability.tolist(), found, strict=True):
        assert set(torch.nonzero(got).ravel().tolist()) == by_definition(regions, row, module.thresholds), row
    mask = module(probability_BRHW)
    assert torch.equal(scripted(probability_BRHW), mask)
    rules = {name: RegionRule(threshold) for name, threshold in zip(regions, module.thresholds, strict=True)}
    of_volume = label_map(rules, np.ascontiguousarray(probability.T.numpy()[:, None, None]), regions)
    assert np.array_equal(of_volume[0], mask[0, 0].numpy())


def test_an_earlier_region_is_not_overwritten_by_a_less_probable_one() -> None:
    probability = torch.tensor([[0.9, 0.6], [0.7, 0.8]]).reshape(1, 2, 1, 2)
    assert LabelMap({"solid": (1,), "glass": (2,)}, 0.5)(probability).ravel().tolist() == [1, 2]

"""Regions go by the names of their labels."""

import pytest

from distseg.regions import exclusive, in_words, one_sided, own_regions


@pytest.mark.parametrize(
    ("labels", "regions"),
    [
        (["lung", "infection"], {"lung": ("lung", "infection"), "infection": ("infection",)}),
        (["left", "right", "infection"], {"left": ("left",), "right": ("right",), "infection": ("infection",)}),
        (["nodule"], {"nodule": ("nodule",)}),
        (
            ["lung", "ground_glass", "consolidation", "pleural_effusion"],
            {
                "lung": ("lung", "ground_glass", "consolidation"),
                "ground_glass": ("ground_glass",),
                "consolidation": ("consolidation",),
                "pleural_effusion": ("pleural_effusion",),
            },
        ),
    ],
)
def test_without_regions_each_label_is_one_and_the_lung_has_its_infection(
    labels: list[str], regions: dict[str, tuple[str, ...]]
) -> None:
    numbers = {"background": 0} | {name: n for n, name in enumerate(labels, start=1)} | {"ignore": 255}
    assert own_regions(numbers) == regions


@pytest.mark.parametrize(
    "label", ["left_lung", "lung_right", "LungLeft", "lung-l", "RUL", "right_middle_lobe", "lunge_links", "rightlung"]
)
def test_a_label_of_one_side_is_known_by_its_name(label: str) -> None:
    assert one_sided({"a": ("heart",), "b": (label, "heart")}) == ["b"]


@pytest.mark.parametrize(
    "labels",
    [("lung",), ("left_lung", "right_lung"), ("lul", "lll", "rul", "rml", "rll"), ("lesion",), ("upper_lobe",)],
)
def test_a_region_of_no_side_or_of_both_may_be_mirrored(labels: tuple[str, ...]) -> None:
    assert not one_sided({"region": labels})


def test_regions_that_share_no_label_exclude_each_other() -> None:
    assert exclusive({"lung": (1, 2, 3), "solid": (2,), "glass": (3,), "nodule": (4,)}) == [
        (1, 2),
        (0, 3),
        (1, 3),
        (2, 3),
    ]
    assert not exclusive({"lung": (1, 2), "infection": (2,)})


def test_regions_are_told_with_names_and_numbers() -> None:
    labels = {"background": 0, "lung": 1, "infection": 2}
    told = in_words({"lung": (1, 2), "infection": (2,)}, labels)
    assert told == "lung = labels 1, 2 (lung, infection); infection = label 2 (infection)"

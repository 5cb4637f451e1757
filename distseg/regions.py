"""Regions: unions of labels, known by name. Which a set of labels gives by itself, which exclude each other, which have a side."""

import re
from collections.abc import Mapping, Sequence

from distseg.config import IGNORED_LABEL
from distseg.errors import DistsegError

LUNG = "lung"
INSIDE_LUNG = ("infection", "ground_glass", "consolidation")  # an infection, or its parts
SIDES = {
    "left": {"left", "l", "lt", "lul", "lll", "links", "gauche", "izquierdo", "izquierda", "sinistro", "sinistra"},
    "right": {"right", "r", "rt", "rul", "rml", "rll", "rechts", "droit", "droite", "derecho", "derecha", "destro", "destra"},
}  # fmt: skip


def own_regions(labels: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """One region a label, in the order of their numbers; the lung includes its infection, or the parts of one."""
    names = [name for name in sorted(labels, key=labels.__getitem__) if labels[name] not in (0, IGNORED_LABEL)]
    infected = tuple(name for name in names if name in INSIDE_LUNG)
    return {name: (name, *infected) if name == LUNG else (name,) for name in names}


def in_words(regions: Mapping[str, Sequence[int]], labels: Mapping[str, int]) -> str:
    """`lung = labels 1, 2 (lung, infection); infection = label 2 (infection)`."""
    name_of = {number: name for name, number in labels.items()}
    return "; ".join(
        f"{region} = label{'s' if len(own) > 1 else ''} {', '.join(map(str, own))} ({', '.join(name_of[n] for n in own)})"
        for region, own in regions.items()
    )


def one_sided(regions: Mapping[str, Sequence[str]]) -> list[str]:
    """Regions whose labels name one side of the body: a mirrored image would show them on the other."""
    return [region for region, names in regions.items() if len({side for name in names if (side := _side(name))}) == 1]


def _side(label: str) -> str | None:
    """left_lung, LungLeft, lung-r, RUL, ... name a side; None: no side, or both."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", label)
    found = {side for side, known in SIDES.items() for word in words if word.lower() in known or side in word.lower()}
    return found.pop() if len(found) == 1 else None


def exclusive(regions: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of regions (by index, the lower first) that share no label: a pixel is in one of them at most."""
    sets = [set(labels) for labels in regions.values()]
    return [(a, b) for b in range(len(sets)) for a in range(b) if not sets[a] & sets[b]]


def write_order(regions: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """How overlapping regions become one label map: wide regions first, narrower ones over them.

    A region writes the label that it shares with the fewest other regions: lung = {1, 2} writes 1, infection = {2} 2.

    Returns:
        (region index, label), in the order of writing.

    Raises:
        DistsegError: two regions would write one label, so the label map could not tell them apart.
    """
    names = list(regions)
    own = own_labels(regions)
    order = sorted(range(len(names)), key=lambda index: -len(set(regions[names[index]])))
    written = [(index, own[names[index]]) for index in order]
    if len({label for _, label in written}) < len(written):
        raise DistsegError(
            f"regions: got { ({n: list(v) for n, v in regions.items()}) }; each region needs a label of its own to be written "
            "as; drop or redefine one"
        )
    return written


def own_labels(regions: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The label that each region is written as in masks, whose colour is its own too: the one that the fewest others share."""
    shared = {label: sum(label in labels for labels in regions.values()) for own in regions.values() for label in own}
    return {name: min(own, key=lambda label: (shared[label], label)) for name, own in regions.items()}


def regions_by_width(regions: Mapping[str, Sequence[int]]) -> list[str]:
    """Wide regions first, for narrower ones may lie inside them."""
    names = list(regions)
    return [names[index] for index, _ in write_order(regions)]

"""How regions become one label map."""

from collections.abc import Mapping, Sequence

from distseg.errors import DistsegError


def write_order(regions: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """How overlapping regions become one label map: wide regions first, narrower ones over them.

    A region writes the label that it shares with the fewest other regions: lung = {1, 2} writes 1, infection = {2} 2.

    Returns:
        (region index, label), in the order of writing.

    Raises:
        DistsegError: two regions would write one label, so the label map could not tell them apart.
    """
    names = list(regions)
    in_regions = {label: sum(label in labels for labels in regions.values()) for r in regions.values() for label in r}
    order = sorted(range(len(names)), key=lambda index: -len(set(regions[names[index]])))
    written = [(index, min(regions[names[index]], key=lambda label: (in_regions[label], label))) for index in order]
    if len({label for _, label in written}) < len(written):
        raise DistsegError(
            f"regions: got { ({n: list(v) for n, v in regions.items()}) }; each region needs a label of its own to be written "
            "as; drop or redefine one"
        )
    return written

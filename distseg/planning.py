"""A configuration proposed from a store: `distseg plan`. One function a value gives the value and the reason for it.

The rules are those that measurements support (docs/measured/plan.md). The same store, options and kind of machine give the same bytes.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import yaml

from distseg.config import Config
from distseg.data.store import Store, settled
from distseg.errors import DistsegError
from distseg.geometry import MM_BEYOND, field_mm
from distseg.models.table import Cost, pair_cost

GIVEN = "as you gave it"
STRIDE = 32  # of every network: sides are multiples of it
USABLE = 0.85  # of a GPU's memory
PEAK = 1.6  # of what forward keeps, at worst what a step holds besides (measured: 0.82 to 1.58)
TRAINING_MACS = 3  # forward, and twice that backward
# Billions of multiply-accumulates a second in training, low rather than high: of a CPU core in float32 (the quickstart: 12 on
# two cores), of a GPU in bfloat16.
CPU_CORE_GMACS, GPU_GMACS = 6, 10_000
MOST_EPOCHS = 1250  # beyond which MONAI's automatic configuration does not go either
MOST_OF_SLICES = 0.05  # a batch holds at most this share of the training slices


@dataclass(frozen=True)
class Choice:
    """One value of a configuration."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Machine:
    gpu_memory_gib: float | None
    """None: no GPU"""
    cpus: int

    @property
    def gmacs_per_s(self) -> float:
        return GPU_GMACS if self.gpu_memory_gib else CPU_CORE_GMACS * self.cpus


def plan(
    store: Store, base: Config, machine: Machine, budget_s: float | None = None, given: Mapping[str, Any] | None = None
) -> list[Choice]:
    """Values for a store, with reasons.

    Args:
        store: that is trained on.
        base: whose model and other values are taken as they are.
        machine: that trains.
        budget_s: how long training may take; None: as the configuration says.
        given: values of `base` that are kept, by their dotted keys.

    Returns:
        The values chosen, then those given.

    Raises:
        DistsegError: not one slice fits the memory, or the budget does not suffice for an epoch.
    """
    base = settled(replace(base, data=replace(base.data, store=str(store.root))), store)
    given = given or {}
    size = (
        image_size(store, base)
        if "data.image_size" not in given
        else Choice("data.image_size", base.data.image_size, GIVEN)
    )
    spacing = spacing_mm(store, size.value, fit=given.get("data.fit"))
    cost = pair_cost(base.model, base.data.channels, size.value)
    n_train = len(store.slices_of_split("train", base.data.fold))
    batch = batch_size(cost, machine, n_train, base.train.batch_size_per_rank)
    choices = [
        Choice(
            "data.store",
            str(store.root),
            f"{len(store.cases)} volumes of {len({case.patient for case in store.cases})} patients",
        ),
        windows_hu(base),
        size,
        *spacing,
        neighbours(base),
        focus_share(base),
        flips(base),
        batch,
        epochs(cost, machine, n_train, budget_s, base.train.epochs),
        Choice(
            "regions",
            {name: list(own) for name, own in base.regions.items()},
            "of the store's labels that some volume holds",
        ),
    ]
    chosen = [
        choice for choice in choices if not any(key == choice.key or key.startswith(f"{choice.key}.") for key in given)
    ]
    planned = Choice(
        "planned",
        tuple(choice.key for choice in chosen if choice.key != "data.store"),
        "the report of a run names them",
    )
    return [*chosen, *(Choice(key, value, GIVEN) for key, value in given.items()), planned]


def windows_hu(base: Config) -> Choice:
    return Choice(
        "data.windows_hu", [list(window) for window in base.data.windows_hu],
        "as configured: windows narrowed to the foreground's values gained nothing (docs/measured/plan.md)",
    )  # fmt: skip


def image_size(store: Store, base: Config) -> Choice:
    """No larger than slices are: what is scaled up costs time and shows nothing more."""
    longer = median(max(case.shape[1:]) for case in store.cases)
    own = max(STRIDE, math.ceil(longer / STRIDE) * STRIDE)
    if own < base.data.image_size:
        return Choice("data.image_size", own, f"slices have {longer:g} pixels a side; more would scale them up")
    return Choice("data.image_size", base.data.image_size, f"as configured; slices have {longer:g} pixels a side")


def spacing_mm(store: Store, size: int, fit: str | None) -> list[Choice]:
    """One pixel size where fields of view differ, or none; `fit` is the one given, if any."""
    if fit == "resize":
        return [Choice("data.spacing_mm", None, "images of one pixel size need data.fit=crop")]
    fields = [field_mm(case.shape[1:], case.pixel_size_mm) for case in store.cases if case.pixel_size_mm]
    if len(fields) < len(store.cases):
        return [Choice("data.spacing_mm", None, "not all volumes say how large their pixels are")]
    low, high = (round(mm, 4) for mm in (min(fields), max(fields)))
    if high <= low * (1 + MM_BEYOND):
        return [Choice("data.spacing_mm", None, f"fields of view are alike, {low:g} to {high:g} mm")]
    spacing = float(f"{median(fields) / size:.2g}")
    reason = f"fields of view differ, {low:g} to {high:g} mm: lesions keep one size (docs/measured/field_of_view.md)"
    return [
        Choice("data.fit", "crop", "windows of slices at that pixel size"),
        Choice("data.spacing_mm", spacing, reason),
    ]


def neighbours(base: Config) -> Choice:
    return Choice(
        "data.neighbours", base.data.neighbours, "as configured: what slices on each side gain is not measured"
    )


def focus_share(base: Config) -> Choice:
    return Choice("data.focus_share", base.data.focus_share, "as configured: what over-sampling gains is not measured")


def flips(base: Config) -> Choice:
    flip = base.data.augment.flips
    reason = "no region has a side" if flip else "a region has a side, which a flip would change"
    return Choice("data.augment.flip_probability", flip, reason)


def batch_size(cost: Cost, machine: Machine, n_train: int, default: int) -> Choice:
    """As many slices as the memory holds, and no more than a twentieth of all."""
    if machine.gpu_memory_gib is None:
        return Choice("train.batch_size_per_rank", default, "as configured: no GPU; --gpu-memory GIB plans for one")
    slice_mib = cost.saved_mib * PEAK
    fitting = int(machine.gpu_memory_gib * 1024 * USABLE // slice_mib)
    if fitting < 1:
        raise DistsegError(
            f"--gpu-memory: got {machine.gpu_memory_gib:g} GiB; one slice takes up to {slice_mib / 1024:.1f} GiB; choose another encoder "
            "(distseg models), a smaller data.image_size, or model.recompute=all"
        )
    most = max(1, int(n_train * MOST_OF_SLICES))
    bound = f"and a twentieth of {n_train} slices is {most}"
    reason = f"{machine.gpu_memory_gib:g} GiB hold {fitting} at up to {slice_mib:.0f} MiB a slice in float32, {bound}"
    return Choice("train.batch_size_per_rank", min(fitting, most), reason)


def epochs(cost: Cost, machine: Machine, n_train: int, budget_s: float | None, default: int) -> Choice:
    if budget_s is None:
        return Choice("train.epochs", default, "as configured; --budget 30m fits them to a time")
    epoch_s = n_train * cost.gmacs * TRAINING_MACS / machine.gmacs_per_s
    count = min(int(budget_s / epoch_s), MOST_EPOCHS)
    if count < 1:
        raise DistsegError(
            f"--budget: got {budget_s / 60:g} minutes; an epoch of {n_train} slices takes about {math.ceil(epoch_s / 60)} here; give more, or "
            "choose another encoder (distseg models)"
        )
    bound = f", at most {MOST_EPOCHS}" if count == MOST_EPOCHS else ""
    what = "a GPU" if machine.gpu_memory_gib else f"{machine.cpus} CPU cores"
    return Choice(
        "train.epochs",
        count,
        f"{budget_s / 60:g} minutes at about {epoch_s:.3g} s an epoch on {what} ({machine.gmacs_per_s:g} GMAC/s assumed){bound}",
    )


def as_yaml(choices: Sequence[Choice], command: str) -> str:
    """What `distseg train --config` takes, a reason beside each value.

    Args:
        choices: the values.
        command: that made it.
    """
    return f"# Made by {' '.join(command.split())}\n" + "".join(_lines(choices, ""))


def _lines(choices: Sequence[Choice], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    done: set[str] = set()
    for choice in choices:
        section, _, rest = choice.key[len(prefix) :].partition(".")
        if not rest:
            plain = list(choice.value) if isinstance(choice.value, tuple) else choice.value
            value = (
                yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000)
                .removesuffix("...\n")
                .strip()
            )
            yield f"{indent}{section}: {value}  # {choice.reason}\n"
        elif section not in done:
            done.add(section)
            yield f"{indent}{section}:\n"
            yield from _lines(
                [one for one in choices if one.key.startswith(f"{prefix}{section}.")], f"{prefix}{section}."
            )


def machine_here(gpu_memory_gib: float | None) -> Machine:
    """This machine, or one with so much memory on its GPU."""
    if gpu_memory_gib is None:
        import torch

        if torch.cuda.is_available():
            gpu_memory_gib = torch.cuda.get_device_properties(0).total_memory // 2**30
    return Machine(gpu_memory_gib, len(os.sched_getaffinity(0)))

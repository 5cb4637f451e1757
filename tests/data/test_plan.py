"""Every sample once an epoch, equal steps on every rank, the same geometry whoever draws it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.data.plan import MicroBatch, Plan, Position, epoch_order, repeats_for_share


def epoch(plan: Plan, start: Position = Position()) -> list[MicroBatch]:  # noqa: B008
    steps = plan.steps_left(start) * plan.accumulation
    return list(itertools.islice(plan.micro_batches(start), steps))


def counted(batches: list[MicroBatch]) -> list[int]:
    return [index for batch in batches for index in batch.indices[: batch.n_real]]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_every_sample_counts_exactly_once_an_epoch_over_all_ranks(
    samples: int, batch: int, world: int, accumulation: int, seed: int
) -> None:
    plans = [Plan(samples, batch, seed, rank, world, accumulation) for rank in range(world)]
    of_ranks = [epoch(plan) for plan in plans]
    assert sorted(index for batches in of_ranks for index in counted(batches)) == list(range(samples))
    assert len({len(batches) for batches in of_ranks}) == 1
    assert all(len(b.indices) == batch for batches in of_ranks for b in batches)
    assert of_ranks[0][-1].position == Position(1)


@given(st.integers(6, 60), st.integers(1, 3), st.integers(1, 2))
def test_drop_leaves_out_less_than_one_global_batch(samples: int, batch: int, world: int) -> None:
    plans = [Plan(samples, batch, 0, rank, world, last_batch="drop") for rank in range(world)]
    used = [index for plan in plans for index in counted(epoch(plan))]
    assert len(used) == len(set(used)) == samples // (world * batch) * world * batch


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    one = epoch(Plan(31, 6, 5))
    ranks = [epoch(Plan(31, 6 // world, 5, rank, world)) for rank in range(world)]
    for together, *apart in zip(one, *ranks, strict=True):
        assert together.indices == tuple(index for batch in apart for index in batch.indices)


@given(st.integers(1, 50), st.integers(0, 10), st.integers(1, 3), st.integers(1, 3))
def test_going_on_with_another_number_of_ranks_loses_and_repeats_nothing(
    samples: int, steps: int, before: int, after: int
) -> None:
    first = [epoch(Plan(samples, 2, 1, rank, before))[:steps] for rank in range(before)]
    start = first[0][-1].position if first[0] else Position()
    rest = [] if start.epoch else [b for rank in range(after) for b in epoch(Plan(samples, 2, 1, rank, after), start)]
    assert sorted(counted([b for rank in first for b in rank]) + counted(rest)) == list(range(samples))


def test_epochs_and_seeds_are_ordered_otherwise_and_validation_is_not() -> None:
    orders = [tuple(epoch_order(seed, number, 50)) for seed in (0, 1) for number in (0, 1)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(None, 3, 5).tolist() == [0, 1, 2, 3, 4]


@given(st.integers(2, 200), st.floats(0.05, 0.9), st.integers(1, 3))
def test_repeats_make_the_stated_share_and_leave_every_slice_in_the_epoch(
    slices: int, share: float, world: int
) -> None:
    focused = list(range(0, slices, 5))
    repeats = repeats_for_share(slices, len(focused), share)
    plans = [Plan(slices, 3, 7, rank, world, repeated=focused, n_repeats=repeats) for rank in range(world)]
    used = [i for plan in plans for batch in epoch(plan) for i in batch.indices[: batch.n_real]]
    samples = [i for plan in plans for batch in epoch(plan) for i in batch.samples[: batch.n_real]]
    assert sorted(samples) == list(range(slices + repeats)) and set(used) == set(range(slices))
    seen = np.bincount(used, minlength=slices)
    assert seen[focused].max() - seen[focused].min() <= 1
    reached = seen[focused].sum() / len(used)
    assert share <= reached + 1e-9 and (repeats == 0 or reached < share + 1 / len(used))


def test_no_share_and_nothing_to_repeat_add_nothing() -> None:
    assert repeats_for_share(10, 3, None) == repeats_for_share(10, 0, 0.5) == repeats_for_share(10, 6, 0.5) == 0

"""Every sample once an epoch, equal steps on every rank, the same geometry whoever draws it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.config import AugmentConfig
from distseg.data.plan import MicroBatch, Plan, Position, draw_affine, epoch_order, sampling_matrix


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


def test_an_unchanged_sample_maps_corner_to_corner() -> None:
    matrix = sampling_matrix((40, 80), 20, "resize")
    assert (matrix @ [0, 10 - 5, 1]).tolist() == [0, 0] and (matrix @ [20, 15, 1]).tolist() == [80, 40]
    assert sampling_matrix((40, 40), 20, "crop").tolist() == [[1, 0, 10], [0, 1, 10]]


def test_the_geometry_is_a_function_of_seed_epoch_and_sample() -> None:
    draws = {key: draw_affine(AugmentConfig(), *key) for key in itertools.product((0, 1), (0, 1), (0, 1))}
    again = draw_affine(AugmentConfig(), 1, 0, 1)
    assert np.array_equal(draws[1, 0, 1].linear, again.linear) and draws[1, 0, 1].shift == again.shift
    assert len({draw.crop for draw in draws.values()}) == 8


def test_probabilities_are_kept_and_bounds_too() -> None:
    draws = [draw_affine(AugmentConfig(flip_probability=0.3, affine_probability=0.6), 0, 0, i) for i in range(4000)]
    flipped = np.mean([np.linalg.det(draw.linear) < 0 for draw in draws])
    moved = np.mean([draw.shift != (0, 0) for draw in draws])
    assert abs(flipped - 0.3) < 0.03 and abs(moved - 0.6) < 0.03
    assert max(abs(s) for draw in draws for s in draw.shift) <= 0.05
    still = draw_affine(AugmentConfig(flip_probability=0, affine_probability=0), 0, 0, 0)
    assert np.array_equal(still.linear, np.eye(2)) and still.shift == (0, 0)

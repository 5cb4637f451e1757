"""Which slice goes where: a pure function of (seed, epoch), never of ranks or threads.

The order of an epoch is one global shuffle. A global batch is `world * batch_size * accumulation` consecutive samples of
it; each micro-batch of it is cut into equal runs, one a rank. Where training was resumed is a number of samples of the
epoch, so another number of ranks goes on with the next unseen sample.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# Each purpose draws from its own Philox key, so that adding a draw to one changes no other.
ORDER_STREAM, AUGMENT_STREAM, ELASTIC_STREAM, REPEAT_STREAM = range(4)


@dataclass(frozen=True)
class Position:
    """Where an epoch stands: samples of it that have been used by finished optimizer steps."""

    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one rank reads for one forward pass."""

    epoch: int
    samples: tuple[int, ...]
    """what random numbers are keyed by; the last ones beyond n_real are there to fill up and must count for nothing"""
    indices: tuple[int, ...]
    """the slice of each sample"""
    n_real: int
    position: Position
    """after the optimizer step that this forward pass belongs to"""


@dataclass(frozen=True)
class Plan:
    """The endless sequence of one rank's micro-batches.

    Args:
        n_slices: size of the data set, at least 1.
        seed: of the shuffle; None keeps the order 0, 1, 2, ... (validation).
        last_batch: what becomes of an epoch's last, incomplete global batch. "mask": filled up with samples that count for
            nothing, so every sample counts exactly once an epoch; "drop": left out (other samples each epoch).
        repeated: slices to show more often than once an epoch; see `repeats_for_share`.
        n_repeats: how many samples of an epoch are such repeats, dealt evenly over them.
    """

    n_slices: int
    batch_size_per_rank: int
    seed: int | None = None
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    last_batch: Literal["mask", "drop"] = "mask"
    repeated: Sequence[int] | np.ndarray = ()
    n_repeats: int = 0

    def __post_init__(self) -> None:
        if self.n_slices < 1:  # micro_batches would look for one for ever
            raise ValueError(f"n_slices: got {self.n_slices}; must be at least 1")

    @property
    def n_samples(self) -> int:
        """Of an epoch: every slice once, then the repeats."""
        return self.n_slices + self.n_repeats

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.world_size * self.batch_size_per_rank * self.accumulation

    def steps_left(self, position: Position) -> int:
        """Optimizer steps from `position` to the end of its epoch; the same on every rank."""
        left = self.n_samples - position.samples
        return left // self.global_batch if self.last_batch == "drop" else math.ceil(left / self.global_batch)

    def micro_batches(self, start: Position = Position()) -> Iterator[MicroBatch]:
        """Micro-batches from `start` on, over all later epochs, without end."""
        position = start
        while True:
            yield from self._rest_of_epoch(position)
            position = Position(position.epoch + 1)

    def _rest_of_epoch(self, position: Position) -> Iterator[MicroBatch]:
        order = epoch_order(self.seed, position.epoch, self.n_samples)
        slice_of_sample = self._slices_of_samples(position.epoch)
        for _ in range(self.steps_left(position)):
            first, end = position.samples, position.samples + self.global_batch
            position = replace(position, samples=min(end, self.n_samples))
            after = position if self.steps_left(position) else Position(position.epoch + 1)
            for micro in range(self.accumulation):
                start = first + (micro * self.world_size + self.rank) * self.batch_size_per_rank
                places = np.arange(start, start + self.batch_size_per_rank)
                n_real = int(np.count_nonzero(places < self.n_samples))
                # Fillers are the epoch's first samples: real images, so that batch statistics stay those of the data.
                samples = order[places % self.n_samples]
                indices = slice_of_sample[samples] if self.n_repeats else samples
                yield MicroBatch(position.epoch, tuple(samples.tolist()), tuple(indices.tolist()), n_real, after)

    def _slices_of_samples(self, epoch: int) -> np.ndarray:
        """Slice of each sample of an epoch; which slices get one repeat more than others differs between epochs."""
        if not self.n_repeats:
            return np.empty(0, np.int64)
        turn = philox(self.seed or 0, REPEAT_STREAM, epoch, 0).permutation(np.asarray(self.repeated))
        return np.concatenate([np.arange(self.n_slices), np.resize(turn, self.n_repeats)])


def epoch_order(seed: int | None, epoch: int, n_samples: int) -> np.ndarray:
    """The epoch's permutation of 0..n_samples-1; the identity without a seed."""
    if seed is None:
        return np.arange(n_samples)
    return philox(seed, ORDER_STREAM, epoch, 0).permutation(n_samples)


def repeats_for_share(n_slices: int, n_focused: int, share: float | None) -> int:
    """Repeats of focused slices that make them `share` of an epoch's samples; 0 where they are that much already."""
    if share is None or n_focused == 0:
        return 0
    return max(0, math.ceil((share * n_slices - n_focused) / (1 - share)))


def philox(seed: int, stream: int, epoch: int, sample: int) -> np.random.Generator:
    """Random numbers of one purpose for one sample of one epoch."""
    # Counter-based: no state to carry from sample to sample. The low counter words are left for the draws themselves.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, sample]))

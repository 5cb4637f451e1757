"""Which slice goes where, and how it is changed: pure functions of (seed, epoch, sample), never of ranks or threads.

The order of an epoch is one global shuffle. A global batch is `world * batch_size * accumulation` consecutive samples of
it; each micro-batch of it is cut into equal runs, one a rank. Where training was resumed is a number of samples of the
epoch, so another number of ranks goes on with the next unseen sample.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distseg.config import AugmentConfig

# Each purpose draws from its own Philox key, so that adding a draw to one changes no other.
ORDER_STREAM, AUGMENT_STREAM = 0, 1


@dataclass(frozen=True)
class Position:
    """Where an epoch stands: samples of it that have been used by finished optimizer steps."""

    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one rank reads for one forward pass."""

    epoch: int
    indices: tuple[int, ...]
    """samples; the last ones beyond n_real are there to fill up and must count for nothing"""
    n_real: int
    position: Position
    """after the optimizer step that this forward pass belongs to"""


@dataclass(frozen=True)
class Plan:
    """The endless sequence of one rank's micro-batches.

    Args:
        n_samples: size of the data set, at least 1.
        seed: of the shuffle; None keeps the order 0, 1, 2, ... (validation).
        last_batch: what becomes of an epoch's last, incomplete global batch. "mask": filled up with samples that count for
            nothing, so every sample counts exactly once an epoch; "drop": left out (other samples each epoch).
    """

    n_samples: int
    batch_size_per_rank: int
    seed: int | None = None
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    last_batch: Literal["mask", "drop"] = "mask"

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
        for _ in range(self.steps_left(position)):
            first, end = position.samples, position.samples + self.global_batch
            position = replace(position, samples=min(end, self.n_samples))
            after = position if self.steps_left(position) else Position(position.epoch + 1)
            for micro in range(self.accumulation):
                start = first + (micro * self.world_size + self.rank) * self.batch_size_per_rank
                places = np.arange(start, start + self.batch_size_per_rank)
                n_real = int(np.count_nonzero(places < self.n_samples))
                # Fillers are the epoch's first samples: real images, so that batch statistics stay those of the data.
                yield MicroBatch(position.epoch, tuple(order[places % self.n_samples].tolist()), n_real, after)


def epoch_order(seed: int | None, epoch: int, n_samples: int) -> np.ndarray:
    """The epoch's permutation of 0..n_samples-1; the identity without a seed."""
    if seed is None:
        return np.arange(n_samples)
    return _generator(seed, ORDER_STREAM, epoch, 0).permutation(n_samples)


def sampling_matrix(
    shape: tuple[int, int], image_size: int, fit: Literal["resize", "crop"], draw: "AffineDraw | None" = None
) -> np.ndarray:
    """The affine map from output pixels to source pixels: fit, flip, rotation, scale, shear and shift in one resampling.

    Coordinates are (x, y) with the origin at the corner of the first pixel; the slice's centre maps to the image's.

    Args:
        shape: rows, columns of the slice.
        image_size: side of the output, pixels.
        fit: "resize" scales the longer side to image_size, "crop" keeps the native scale.
        draw: augmentation; None: none, and a crop is the central one.

    Returns:
        float32 (2, 3).
    """
    rows, columns = shape
    scale = max(rows, columns) / image_size if fit == "resize" else 1.0
    linear = np.eye(2) * scale
    centre_source = np.array([columns, rows]) / 2
    if draw is not None:
        linear = linear @ draw.linear
        room = np.maximum(0, centre_source - image_size / 2) if fit == "crop" else np.zeros(2)
        centre_source = centre_source + room * draw.crop + np.array(draw.shift) * image_size * scale
    offset = centre_source - linear @ np.full(2, image_size / 2)
    return np.concatenate([linear, offset[:, None]], axis=1).astype(np.float32)


@dataclass(frozen=True)
class AffineDraw:
    """One sample's random geometry."""

    linear: np.ndarray  # (2, 2), output to source, around the centre
    shift: tuple[float, float]  # x, y, fractions of the image
    crop: tuple[float, float]  # x, y in [-1, 1]: where in the room that a crop has


def draw_affine(augment: AugmentConfig, seed: int, epoch: int, sample: int) -> AffineDraw:
    """The random geometry of a sample in an epoch: a function of (seed, epoch, sample) alone."""
    # Always the same number of draws, so that a probability of 0 or 1 changes nothing but itself.
    flip, gate, angle, zoom, shear_x, shear_y, *places = _generator(seed, AUGMENT_STREAM, epoch, sample).uniform(
        size=10
    )
    linear = np.eye(2)
    shift = np.zeros(2)
    if gate < augment.affine_probability:
        radians = math.radians(augment.rotate_deg) * (2 * angle - 1)
        rotation = np.array([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]])
        shear = np.array([[1, augment.shear * (2 * shear_x - 1)], [augment.shear * (2 * shear_y - 1), 1]])
        low, high = np.log(augment.scale)
        linear = rotation @ shear / math.exp(low + (high - low) * zoom)
        shift = augment.shift * (2 * np.array(places[:2]) - 1)
    if flip < augment.flip_probability:
        linear = linear @ np.diag([-1.0, 1.0])
    crop = 2 * np.array(places[2:]) - 1
    return AffineDraw(linear, (shift[0], shift[1]), (crop[0], crop[1]))


def _generator(seed: int, stream: int, epoch: int, sample: int) -> np.random.Generator:
    # Counter-based: no state to carry from sample to sample. The low counter words are left for the draws themselves.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, sample]))

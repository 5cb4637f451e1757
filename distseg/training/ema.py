"""The exponential moving average of a network's weights (Polyak and Juditsky 1992), kept in shards as they are."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """Follows the tensors that training changes, batch statistics too: average += (1 - decay) * (tensor - average).

    While few steps are done the decay is (1 + step) / (10 + step), if that is less: the first weights are forgotten soon.
    """

    def __init__(self, tensors: Callable[[], list[Tensor]], decay: float) -> None:
        """Starts at the tensors' values.

        Args:
            tensors: gives the floating-point tensors, or this rank's shards of them, always in the same order.
            decay: in (0, 1).
        """
        self.tensors, self.decay = tensors, decay
        self.average = [tensor.clone() for tensor in tensors()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the tensors after optimizer step `step` (from 1)."""
        torch._foreach_lerp_(self.average, self.tensors(), 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        with torch.no_grad():
            tensors = self.tensors()
            kept = [tensor.clone() for tensor in tensors]
            torch._foreach_copy_(tensors, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors(), kept)

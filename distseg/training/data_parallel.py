"""One process, or torch's DDP; what every strategy does. ZeRO (zero.py) and FSDP2 (fsdp2.py) change what differs.

A checkpoint is the same for all: whole tensors by the names of the network's parameters, so that a run goes on under
another strategy and on another number of ranks.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distseg.config import Config
from distseg.optim import build_optimizer
from distseg.ranks import check_same_parameters
from distseg.training.tensors import OptimizerState, copied, like, poisoned, whole


class DataParallel:
    """Whole parameters on every rank, gradients averaged (torch's DDP); also one process.

    Attributes:
        bare: the network, whose parameters a strategy may have replaced by shards.
        network: what is called; autocast and gradient reduction happen inside.
        optimizer: its `param_groups` are those of `build_optimizer`.
    """

    def __init__(self, accelerator: Accelerator, config: Config, network: nn.Module) -> None:
        self.accelerator = accelerator
        self.max_grad_norm = config.optim.max_grad_norm
        self.bare = network
        self.network, self.optimizer = self._share(config)
        self._parameters = list(self.bare.parameters())  # looking them up takes a millisecond

    @property
    def name(self) -> str:
        return "ddp" if self.accelerator.num_processes > 1 else "one process"

    def _share(self, config: Config) -> tuple[Any, Any]:
        network, optimizer = self.accelerator.prepare(self.bare, build_optimizer(config.optim, self.bare))
        if isinstance(network, DistributedDataParallel) and config.model.norm == "sync_batch":
            network.forward_sync_buffers = False  # statistics of the global batch are the same everywhere
        return network, optimizer

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and the backward pass of one micro-batch."""
        return self.accelerator.accumulate(self.network)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch."""
        self.accelerator.backward(poisoned(loss))

    def step(self) -> bool:
        """Takes the optimizer step after its last micro-batch, unless a gradient is not finite; then drops them.

        Returns:
            Whether it was taken, the same on every rank; the host waits for the device to know.
        """
        self.accelerator.unscale_gradients()
        finite = self._clip_gradients()
        if finite or self.accelerator.scaler is not None:  # a scaler skips by itself, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def _clip_gradients(self) -> bool:
        parameters = [parameter for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return bool(whole(norm).isfinite())

    def count_parameters(self) -> int:
        """Of the whole network, also where this rank holds a shard."""
        return sum(parameter.numel() for parameter in self.bare.parameters())

    def averaged(self) -> list[Tensor]:
        """What a moving average of the weights follows, as this rank holds it: parameters, or shards, and statistics."""
        return [self._shard(tensor) for tensor in self._followed().values()]

    def statistics(self) -> list[Tensor]:
        """Floating-point buffers: those of batch norm."""
        return [buffer for buffer in self.bare.buffers() if buffer.is_floating_point()]

    def averaged_from(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """What `averaged` gives for a network with those whole weights."""
        return [self._shard_from(tensor, weights[name]) for name, tensor in self._followed().items()]

    def _followed(self) -> dict[str, Tensor]:
        buffers = {name: buffer for name, buffer in self.bare.named_buffers() if buffer.is_floating_point()}
        return {**dict(self.bare.named_parameters()), **buffers}

    def _shard(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or buffer: here all of it."""
        return tensor.detach()

    def _shard_from(self, tensor: Tensor, value: Tensor) -> Tensor:
        """What this rank would hold of it if its whole value were `value`."""
        return like(tensor, value).clone()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole state dict, contiguous, on the CPU; every rank must call it, rank 0 gets it."""
        gathered = ((name, whole(tensor)) for name, tensor in self.bare.state_dict().items())
        return self._on_rank_0(gathered)

    def optimizer_state(self) -> OptimizerState:
        """A copy likewise."""
        state = self._torch_optimizer().state
        gathered = (
            (name, self._on_rank_0((key, whole(value)) for key, value in state[parameter].items()))
            for name, parameter in self.bare.named_parameters()
            if parameter in state
        )
        return {name: values for name, values in gathered if values}

    def _on_rank_0(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of tensors, one after the other; on other ranks they are let go at once."""
        return {name: copied(tensor) for name, tensor in tensors if self.accelerator.is_main_process}

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        state = self._torch_optimizer().state
        for name, parameter in self.bare.named_parameters():
            if name in saved:
                state[parameter] = {key: like(parameter, value) for key, value in saved[name].items()}

    def check(self) -> None:
        """Called once, after the first step.

        Raises:
            DistsegError: the ranks do not train one model.
        """
        check_same_parameters(self.bare)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer  # inside Accelerate's

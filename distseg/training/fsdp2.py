"""FSDP2: torch's fully_shard."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from distseg.config import Config
from distseg.errors import DistsegError
from distseg.optim import build_optimizer
from distseg.ranks import join_alone
from distseg.training.data_parallel import DataParallel
from distseg.training.tensors import like, local


class FullyShard(DataParallel):
    """FSDP2: parameters, gradients and optimizer state in shards.

    torch's own `fully_shard`: Accelerate's FSDP2 does nothing on CPU ranks, and says nothing (1.15).
    """

    name = "fsdp2"

    def _share(self, config: Config) -> tuple[Any, Any]:
        join_alone(self.accelerator.device)
        self.bare.to(self.accelerator.device)
        self.bare.to(memory_format=torch.contiguous_format)  # shards must be, images may be channels last
        for part in self.bare.children():
            if not isinstance(part, (nn.ModuleList, nn.ModuleDict)):  # those are never called
                fully_shard(part)
        fully_shard(self.bare)
        optimizer = self.accelerator.prepare_optimizer(build_optimizer(config.optim, self.bare))

        def autocast(*args: Any) -> Any:
            with self.accelerator.autocast():
                return self.bare(*args)

        return autocast, optimizer

    def averaged(self) -> list[Tensor]:
        for part in self.bare.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # what is left whole after a forward pass would not see that shards change
        return super().averaged()

    def _shard(self, tensor: Tensor) -> Tensor:
        return local(tensor.detach())

    def _shard_from(self, tensor: Tensor, value: Tensor) -> Tensor:
        return local(like(tensor, value)).clone()

    def check(self) -> None:
        if whole_ones := [name for name, p in self.bare.named_parameters() if not isinstance(p, DTensor)]:
            raise DistsegError(f"launch: got {whole_ones[0]} whole on each rank; FSDP2 must shard it; report this")

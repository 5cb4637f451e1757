"""How the ranks share the work: DDP (or one process), DeepSpeed ZeRO-0 to 3, or FSDP2. The launch chooses.

A checkpoint is the same for all: whole tensors by the names of the network's parameters, so that a run goes on under
another strategy and on another number of ranks.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distseg.config import Config
from distseg.errors import DistsegError
from distseg.optim import build_optimizer

OptimizerState = dict[str, dict[str, Tensor]]  # of each parameter, by its name: Adam's exp_avg, exp_avg_sq, step


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
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.bare.parameters())

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

    def _shard(self, tensor: Any) -> Tensor:
        held = tensor.detach()
        return held.to_local() if isinstance(held, DTensor) else held

    def _shard_from(self, tensor: Any, value: Tensor) -> Tensor:
        placed = like(tensor, value)
        return placed.to_local() if isinstance(placed, DTensor) else placed.clone()

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

    def check(self) -> None:
        if whole_ones := [name for name, p in self.bare.named_parameters() if not isinstance(p, DTensor)]:
            raise DistsegError(f"launch: got {whole_ones[0]} whole on each rank; FSDP2 must shard it; report this")


class Zero(DataParallel):
    """DeepSpeed: optimizer state (1), gradients (2) and parameters (3) in shards; 0 is DDP by its engine.

    DeepSpeed's own `initialize`: by way of Accelerate it needs the package transformers and a second set of rules for CPUs.
    """

    def _share(self, config: Config) -> tuple[Any, Any]:
        import deepspeed

        settings = zero_settings(config, self.accelerator.mixed_precision)
        self.stage = settings["zero_optimization"]["stage"]
        self.bare.to(memory_format=torch.contiguous_format)  # it flattens parameters; images may be channels last
        join_alone(self.accelerator.device)
        optimizer = build_optimizer(config.optim, self.bare)
        try:
            engine, optimizer, *_ = deepspeed.initialize(
                model=self.bare, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise DistsegError(
                f"launch: got {'.'.join(map(str, first['loc']))} {first['input']!r} for DeepSpeed; {first['msg']}; "
                "mend the launch's words or its DeepSpeed file"
            ) from None
        return engine, optimizer

    @property
    def name(self) -> str:
        return f"zero{self.stage}"

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the engine counts micro-batches itself

    def backward(self, loss: Tensor) -> None:
        self.network.backward(poisoned(loss))
        if not self.network.is_gradient_accumulation_boundary():
            self.network.step()  # which only counts

    def step(self) -> bool:
        if self.stage == 0 and not self._clip_gradients():
            self.network.zero_grad()  # without a gradient no parameter moves, and the engine counts
            self.network.step()
            return False
        self.network.step()
        return self.stage == 0 or not self.optimizer.overflow  # set for a gradient norm that is not finite

    def weights(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, tensor in self.bare.state_dict(keep_vars=True).items():
            with self._gathered(tensor):
                state |= self._on_rank_0([(name, tensor.detach())])
        return state

    def averaged(self) -> list[Tensor]:
        if self.stage == 3:
            self.network.empty_partition_cache()  # as FSDP2's reshard
        return super().averaged()

    def _shard(self, tensor: Any) -> Tensor:
        return getattr(tensor, "ds_tensor", tensor).detach()  # which parameters have at stage 3

    def _shard_from(self, tensor: Any, value: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_tensor"):
            return super()._shard_from(tensor, value)
        size, rank = tensor.ds_tensor.numel(), self.accelerator.process_index
        padding = size * self.accelerator.num_processes - value.numel()
        padded = nn.functional.pad(value.flatten().to(self.accelerator.device), (0, padding))
        return padded[size * rank : size * (rank + 1)].clone()

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return super().optimizer_state()
        shards = list(self._torch_optimizer().state.values())
        if not shards:
            return {}
        self._link_shards()
        kinds = [key for key, value in shards[0].items() if value.ndim > 0]
        scalars = [(key, value) for key, value in shards[0].items() if value.ndim == 0]
        gathered = {}
        for name, parameter in self.bare.named_parameters():
            whole_ones = ((key, safe_get_full_optimizer_state(parameter, key)) for key in kinds)
            gathered[name] = self._on_rank_0([*scalars, *whole_ones])
        return gathered if self.accelerator.is_main_process else {}

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0 or not saved:
            return super().load_optimizer_state(saved)
        own = self.optimizer
        for shard in own.fp32_partitioned_groups_flat if self.stage == 3 else own.single_partition_of_fp32_groups:
            own.optimizer.state[shard] = {  # which does not exist before the first step
                key: value.clone() if value.ndim == 0 else torch.zeros_like(shard)
                for key, value in next(iter(saved.values())).items()
            }
        self._link_shards()
        parameters: list[tuple[str, Any]] = list(self.bare.named_parameters())
        for name, parameter in parameters:
            for key, value in saved[name].items():
                if value.ndim > 0 and self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value.to(self.accelerator.device), key)
                elif value.ndim > 0:  # its counterpart for whole values fails where ranks do not divide a parameter
                    safe_set_local_optimizer_state(parameter, self._shard_from(parameter, value), key)

    def _link_shards(self) -> None:
        """DeepSpeed 0.19 does so once, after the step of the first parameter group, when the others have no state yet."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def check(self) -> None:
        if self.stage < 3:
            check_same_parameters(self.bare)

    def _gathered(self, tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
        import deepspeed

        return deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id"))

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage > 0 else self.optimizer


def zero_settings(config: Config, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration: its own file, where the launch names one, else the launch's few words; ours go on top."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    try:
        settings: dict[str, Any] = json.loads(Path(path).read_text()) if path != "none" else {}
    except ValueError as error:
        raise DistsegError(f"launch: got {path} for DeepSpeed; it must be JSON ({error}); mend it") from None
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if zero["stage"] == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)  # copies outside of shards would miss the average
    for what in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device != "none":
            zero.setdefault(f"offload_{what}", {"device": device})
    if precision == "fp16":
        raise DistsegError(
            "launch: got mixed_precision fp16 with DeepSpeed; it must be no or bf16; choose bf16, or DDP"
        )
    if precision == "bf16":  # DeepSpeed's own bf16 casts parameters, and not the images
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings | {
        "train_micro_batch_size_per_gpu": config.train.batch_size_per_rank,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def strategy_of_launch() -> str:
    """`fsdp`, `deepspeed` or `ddp`, as the launch asked; Accelerate is made to forget it, since both are done here."""
    asked = [
        name for name in ("fsdp", "deepspeed") if os.environ.pop(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"
    ]
    return asked[0] if asked else "ddp"


def build_strategy(kind: str, accelerator: Accelerator, config: Config, network: nn.Module) -> DataParallel:
    """The strategy that the launch asked for, around a network whose weights are loaded."""
    return {"ddp": DataParallel, "fsdp": FullyShard, "deepspeed": Zero}[kind](accelerator, config, network)


def join_alone(device: torch.device) -> None:
    """A group of this one process where the launch made none: shards need one, Accelerate does without."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def poisoned(loss: Tensor) -> Tensor:
    """The loss; one that is not finite gives every gradient NaN, so that looking at gradients is enough."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU; the caller waits for the device before it is read."""
    contiguous = torch.contiguous_format
    return tensor.detach().to("cpu", copy=True, non_blocking=True, memory_format=contiguous)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a shard is of; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor placed, and sharded, as a parameter is; numbers stay where they are."""
    if value.ndim == 0:
        return value.clone()  # Adam's step, counted up in place: not to be shared by parameters
    moved = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved


def check_same_parameters(network: nn.Module) -> None:
    """Stops every rank if their parameters differ.

    Raises:
        DistsegError: naming the ranks that differ from rank 0.
    """
    if not dist.is_initialized():
        return
    with torch.no_grad():
        # Two different sums, in float64: a difference in any parameter shows in one of them.
        sums = torch.stack(
            [torch.stack([p.double().sum(), p.double().square().sum()]) for p in network.parameters()]
        ).flatten()
    of_ranks = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, sums)
    if different := [rank for rank, other in enumerate(of_ranks) if not torch.equal(other, of_ranks[0])]:
        raise DistsegError(
            f"launch: parameters of rank(s) {different} differ from rank 0 after the first step; gradients are not shared; "
            "check the strategy in the launch file"
        )

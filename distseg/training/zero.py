"""DeepSpeed ZeRO-0 to 3."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from distseg.config import Config
from distseg.errors import DistsegError
from distseg.optim import build_optimizer
from distseg.ranks import check_same_parameters, join_alone
from distseg.training.data_parallel import DataParallel
from distseg.training.tensors import OptimizerState, poisoned


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

    def count_parameters(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.bare.parameters())

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

"""Connecting the ranks of a job, and refusing a job that is not the one that was asked for.

`accelerate launch` and `torchrun` both start jobs that train wrong and say nothing (one process where several were asked
for, several that do not know of each other). Every check here is for one of those.
"""

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from torch import nn

from distseg.config import Config
from distseg.errors import DistsegError, told
from distseg.shipped import as_typed

T = TypeVar("T")

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch")
CPU = "launch/cpu.yaml"
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
STRATEGIES = ("fsdp", "deepspeed")  # that a launch can ask for, beside ddp


def strategy_of_launch() -> str:
    """`fsdp`, `deepspeed` or `ddp`, as the launch asked."""
    asked = [name for name in STRATEGIES if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"]
    return asked[0] if asked else "ddp"


def connect_ranks(config: Config) -> Accelerator:
    """Joins this process to its job; precision and world size come from the launch, whose strategy Accelerate is made to forget.

    Raises:
        DistsegError: the job is not what the launch asked for, or its strategy is not supported.
    """
    if torch.cuda.is_available():
        repeat_bits_on_gpu()
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed looks for a GPU otherwise
    train, root = config.train, Path(config.output_dir)
    if missing := [name for name in train.trackers if importlib.util.find_spec(name) is None]:
        raise DistsegError(
            f"train.trackers: got {missing[0]}, which is not installed; accelerate would leave it out and say nothing; "
            f"pip install {missing[0]}, or leave it out"
        )
    for name in STRATEGIES:  # training/build.py does both by itself, so Accelerate must not
        os.environ.pop(f"ACCELERATE_USE_{name.upper()}", None)
    accumulation = train.gradient_accumulation_steps
    launched = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")  # would win over the argument below
    if launched not in ("auto", "1", str(accumulation)):
        raise DistsegError(
            f"launch: got gradient_accumulation_steps {launched}; the config says {accumulation}; set "
            "train.gradient_accumulation_steps, and auto in the launch file"
        )
    # cpu= must be said here: without it, ranks on a machine without GPUs are not connected (accelerate 1.15).
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=accumulation,
        log_with=list(train.trackers) or None,  # an empty list makes accelerate warn
        project_config=ProjectConfiguration(str(root), logging_dir=str(root / "tensorboard")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout_s))],
    )
    check_world(accelerator.num_processes, accelerator.distributed_type)
    return accelerator


def repeat_bits_on_gpu() -> None:
    """Has torch choose operations that give the same bits in every run; on CPUs they do anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; it refuses to go on without
    torch.use_deterministic_algorithms(True)
    # A check for memory that nobody wrote, paid for on every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_world(connected: int, strategy: DistributedType) -> None:
    """Compares the ranks that are connected with those that the launcher was told to start."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if connected != launched or (launched > 1 and strategy == DistributedType.NO):
        raise DistsegError(
            f"launch: got {launched} processes of which {connected} are connected; they would train apart; "
            f"use `torchrun --nproc_per_node N` or `accelerate launch --config_file {as_typed(CPU)} --num_processes N`"
        )
    asked = processes_asked_for()
    if asked is not None and asked != connected:
        raise DistsegError(
            f"launch: got {connected} process(es); accelerate launch was asked for {asked}; `--cpu` and MULTI_CPU start one "
            f"only: use --config_file {as_typed(CPU)} --num_processes N"
        )
    if strategy not in SUPPORTED:
        raise DistsegError(
            f"launch: got strategy {strategy.value}; supported are {', '.join(s.value for s in SUPPORTED)}; "
            f"use --config_file {as_typed('launch/gpu.yaml')}, or another file beside it"
        )


def processes_asked_for() -> int | None:
    """What this process's `accelerate launch` was told with --num_processes or its config file; None without one.

    accelerate hands the number on in no environment variable when it decides to start a single process.
    """
    launcher = psutil.Process().parent()
    words = launcher.cmdline() if launcher else []
    starts = [i for i, word in enumerate(words) if Path(word).name in LAUNCHERS]
    if not starts:
        return None
    from accelerate.commands.launch import launch_command_parser, load_config_from_file

    arguments = words[starts[0] + 1 :]
    if arguments and arguments[0] == "launch":
        arguments = arguments[1:]
    args, _ = launch_command_parser().parse_known_args(arguments)
    if args.num_processes is None and args.config_file is not None:
        return load_config_from_file(args.config_file).num_processes
    return args.num_processes


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Runs an action on rank 0 alone; every rank gets its result.

    Raises:
        DistsegError: on every rank, what the action failed with.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [action(), None]
        except (DistsegError, OSError) as error:
            outcome = [None, told(error)]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise DistsegError(outcome[1])
    return outcome[0]


def on_all(accelerator: Accelerator, action: Callable[[], T]) -> list[T]:
    """Runs an action on every rank; every rank gets all results, in the order of the ranks.

    Raises:
        DistsegError: on every rank, what the action failed with on one of them.
    """
    outcome: tuple[T | None, str | None]
    try:
        outcome = action(), None
    except (DistsegError, OSError) as error:
        outcome = None, told(error)
    found = gather_object([outcome])
    if failures := [failure for _, failure in found if failure is not None]:
        raise DistsegError(failures[0])
    return [result for result, _ in found]


def disconnect_ranks(clean: bool) -> None:
    """Leaves the process group; on a clean end, together (a rank that leaves early may abort the others)."""
    if dist.is_initialized():
        if clean:
            dist.barrier()
        dist.destroy_process_group()


def join_alone(device: torch.device) -> None:
    """A group of this one process where the launch made none: shards need one, Accelerate does without."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


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

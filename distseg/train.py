"""Trains a model: `accelerate launch distseg/train.py --config X.yaml [section.key=value ...]`.

The same through `torchrun distseg/train.py`, `python -m distseg.train` and `distseg train`. The predecessor's flags work
too: `--encoder densenet201 --base unetplus --datadir SRC --savedir_base RUNS` trains into RUNS/unetplus_densenet201.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
    # Run as a script, Python puts this folder first on the path, where our models, export, ... would hide other packages'.
    sys.path.pop(0)

from distseg.commands.arguments import command_parser
from distseg.errors import RankError, Stopped, one_line_errors, told
from distseg.shipped import presets

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distseg.config import Config
    from distseg.data.store import Store
    from distseg.runs.folder import RunFolder
    from distseg.training.interruption import Interruption
    from distseg.training.loop import Trainer


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.config_files import config_as_yaml, load_config  # here, so that --help answers at once

    config = load_config(args.config, [*_predecessor_overrides(args), *args.overrides])
    if args.print_config:
        print(config_as_yaml(config), end="")
        return 0
    train(config, resume=args.resume, source=args.datadir)
    return 0


def train(config: "Config", *, resume: bool = False, source: Path | None = None) -> None:
    """Trains the model of a configuration into its output_dir.

    Args:
        config: the whole configuration.
        resume: go on from the newest complete checkpoint in output_dir; from the start where there is none, saying so.
        source: volumes to bring the store up to date with first; None: the store is as it is.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    folder = _check(config, resume=resume, with_store=source is None)
    # Torch and what stands on it, once nothing is wrong.
    from distseg.ranks import connect_ranks, disconnect_ranks, on_main, strategy_of_launch
    from distseg.training.interruption import Interruption

    sharing = strategy_of_launch()
    accelerator = connect_ranks(config)
    clean = False
    try:
        with contextlib.ExitStack() as held:

            def hold() -> None:
                held.enter_context(folder.in_use())

            on_main(accelerator, hold)
            interruption = held.enter_context(Interruption(accelerator.device))
            if source is not None:
                on_main(accelerator, lambda: _prepare(source, config))
            _train(config, accelerator, folder, interruption, sharing=sharing, resume=resume)
        clean = True
    except Stopped:
        clean = True
        raise
    finally:
        disconnect_ranks(clean)


def _check(config: "Config", *, resume: bool, with_store: bool) -> "RunFolder":
    """Looks at all that a start can be wrong in, on every rank before they wait for each other.

    Args:
        config, resume: see `train`.
        with_store: whether the store is there already.

    Returns:
        The folder of the run.
    """
    from distseg.data.store import open_store, settled  # these here, so that --help and --print-config answer at once
    from distseg.runs.folder import RunFolder, open_run
    from distseg.runs.training_slices import training_slices

    folder = RunFolder(Path(config.output_dir))
    if not resume:
        folder.check_free()
    if with_store:
        store = open_store(Path(config.data.store))
        config = settled(config, store)
        folder.check_same_run(config, store)
        folder.check_same_cases(config, training_slices(config, store).cases)
    if config.model.start_from is not None:
        open_run(Path(config.model.start_from))
    return folder


def _train(
    config: "Config",
    accelerator: "Accelerator",
    folder: "RunFolder",
    interruption: "Interruption",
    *,
    sharing: str,
    resume: bool,
) -> None:
    """What every rank does once it is connected and the folder is ours."""
    from distseg.data.store import open_store, settled
    from distseg.ranks import on_all, on_main
    from distseg.runs.environment import describe_environment
    from distseg.runs.training_slices import training_slices
    from distseg.scoring.figures import draw_run
    from distseg.training.build import build_trainer, describe_training

    store = open_store(Path(config.data.store))
    config = settled(config, store)
    folder.check_same_run(config, store)  # --datadir has only now made the store
    if config.data.cache_dir is not None:
        roots = on_all(accelerator, lambda: str(_staged(store, config).root))
        store = dataclasses.replace(store, root=Path(roots[accelerator.process_index]))
    trainer = build_trainer(
        config, accelerator, folder, store, interruption=interruption, sharing=sharing, resume=resume
    )
    slices = training_slices(config, store)

    def begin() -> None:
        step = trainer.progress.step
        start = f"resumes after step {step}" if step else "starts from the beginning"
        no_checkpoint = " (--resume: no complete checkpoint there)" if resume and not step else ""
        print(f"{folder.root} {start}{no_checkpoint}: {describe_training(trainer, slices)}", flush=True)
        world, precision = accelerator.num_processes, accelerator.mixed_precision
        environment = describe_environment(world, precision, trainer.strategy.name) | {"seen": slices.train.sizes_mm()}
        folder.begin(config, trainer.progress, slices.cases, environment)

    on_main(accelerator, begin)
    with named_rank(trainer):
        trainer.fit()
    accelerator.end_training()  # after it the ranks are apart
    if accelerator.is_main_process:
        draw_run(folder, config, store, accelerator.device)


@contextlib.contextmanager
def named_rank(trainer: "Trainer") -> Iterator[None]:
    """Makes what goes wrong on one rank, or between them, a line that names rank, step and phase."""
    from distseg.training.watch import is_lost_rank

    rank = f"rank {trainer.accelerator.process_index}"
    try:
        yield
    except (RankError, OSError) as error:
        raise RankError(f"{rank}: {told(error)}") from error
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise RankError(
            f"{rank}, step {trainer.progress.step + 1}, {trainer.watch.phase}: a rank is gone or did not answer for "
            f"train.timeout_s ({trainer.config.train.timeout_s:g} s); the job ends; start again with --resume "
            f"({str(error).splitlines()[0]})"
        ) from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "train",
        __doc__,
        "distseg train --config covid_ct data.store=store output_dir=runs/a",
        "accelerate launch --num_processes 2 distseg/train.py --config covid_ct data.store=store output_dir=runs/a --resume",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="?",
        const=Path(),
        help="YAML file, or the name of a shipped one; without it, the defaults",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output_dir")
    habits = parser.add_argument_group("the predecessor's flags")
    habits.add_argument("--encoder", help="model.encoder")
    habits.add_argument("--base", choices=("unetplus", "deeplabv3", "deeplabv3plus"), help="model.decoder")
    habits.add_argument("--datadir", type=Path, metavar="SRC", help="volumes, prepared into RUNS/store first")
    habits.add_argument("--savedir_base", type=Path, metavar="RUNS", help="the run goes into RUNS/<base>_<encoder>")
    args = parser.parse_intermixed_args(argv)
    if args.config == Path():
        parser.error(f"--config: got no file; it must be a YAML file, or a shipped one: {', '.join(presets('train'))}")
    if wrong := [override for override in args.overrides if "=" not in override]:
        parser.error(f"override: got {wrong[0]!r}; it must be section.key=value")
    together = (args.encoder, args.base, args.datadir, args.savedir_base)
    if any(together) and not all(together):
        parser.error("--encoder, --base, --datadir and --savedir_base go together; give all four or none")
    return args


def _predecessor_overrides(args: argparse.Namespace) -> list[str]:
    if not args.base:
        return []
    return [
        f"model.encoder={args.encoder}",
        f"model.decoder={args.base}",
        f"data.store={args.savedir_base / 'store'}",
        f"output_dir={args.savedir_base / f'{args.base}_{args.encoder}'}",
    ]


def _staged(store: "Store", config: "Config") -> "Store":
    """The store with the cases of the fold on the node's own disk."""
    from distseg.data.staging import stage_store

    cases = [case for split in ("train", "val") for case in store.cases_of(split, config.data.fold)]
    return stage_store(store, cases, Path(config.data.cache_dir or ""))


def _prepare(source: Path, config: "Config") -> None:
    """Brings the store of the predecessor's --datadir up to date: five folds by the config's seed."""
    from distseg.data.preparing import FoldRule, prepare_store

    prepare_store(source, Path(config.data.store), FoldRule(seed=config.seed), workers=os.cpu_count() or 1)


if __name__ == "__main__":
    raise SystemExit(main())

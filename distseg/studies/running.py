"""Brings a study to its end: what is missing is done, whatever fails is told, and the tables follow."""

import contextlib
import dataclasses
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

from distseg.data.store import open_store, settled
from distseg.errors import DistsegError, Stopped
from distseg.files import locked, write_text
from distseg.studies.executors import gpu_slots, run_here, run_on_cluster, run_on_slurm, running_array
from distseg.studies.grid import Run, Study, changed_keys, load_study
from distseg.studies.results import dice_in_words, write_tables
from distseg.studies.task import Children, Outcome, Task, do_task, task_of, write_config

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_study(study: Study) -> int:
    """Does what is not done yet and writes results.csv and table.md.

    Returns:
        0, or 1 where a run failed; the others are done all the same.

    Raises:
        DistsegError: another process works on the folder, or it holds a study of another configuration.
        Stopped: a signal came; runs under way have saved.
    """
    study = with_store(study)
    runs = study.runs
    with alone(study):
        begin(study)
        tasks = [task_of(study, run) for run in runs]
        for task, run in zip(tasks, runs, strict=True):
            write_config(task, run)
        with stopped_by_signals() as children:
            failed = _do_missing(study, runs, tasks, children)
        write_tables(study, runs, tasks)
        if children.signum:
            name = signal.Signals(children.signum).name
            raise Stopped(f"{study.root}: stopped by {name}; started again, it goes on", children.signum)
    print(f"{study.root}: {len(runs) - len(failed)} of {len(runs)} runs done; see table.md and results.csv")
    print(f"charts of them: distseg report {shlex.quote(str(study.root))}")
    for outcome in failed:
        print(f"failed: {outcome.name}: {outcome.error} (log {study.root / 'logs' / outcome.name}.log)")
    return 1 if failed else 0


def run_only(study: Study, index: int) -> int:
    """Does one run of the grid and writes no table: what a job of an array does."""
    study = with_store(study)
    runs = study.runs
    if not 0 <= index < len(runs):
        raise DistsegError(f"--only: got {index}; the study's runs are 0 to {len(runs) - 1}; see --list")
    begin(study)
    run = runs[index]
    task = task_of(study, run)
    write_config(task, run)
    if task.is_done():
        print(f"{run.name} is done already")
        return 0
    with stopped_by_signals() as children:
        outcome = do_task(task, None, children)
    if children.signum:
        raise Stopped(f"{run.name}: stopped; started again, it goes on", children.signum)
    if outcome.error:
        raise DistsegError(f"{run.name}: {outcome.error} (log {task.log})")
    print(f"{run.name}: {dice_in_words(task, study.settings.split)}")
    return 0


def list_runs(study: Study) -> None:
    """Prints a line a run: its number in the grid, its name, how far it is."""
    study = with_store(study) if (Path(study.base.data.store) / "store.json").is_file() else study
    for run in study.runs:
        print(f"{run.index:>4}  {run.name}  {task_of(study, run).status()}")


def with_store(study: Study) -> Study:
    """The study with its base settled with its store: which regions it is about.

    Raises:
        DistsegError: the store lacks a fold, a split or a label, which is found out before anything is started.
    """
    store = open_store(Path(study.base.data.store))
    for fold in study.settings.folds:
        for split in study.settings.splits:
            store.cases_of(split, fold)
    return dataclasses.replace(study, base=settled(study.base, store))


@contextlib.contextmanager
def alone(study: Study) -> Iterator[None]:
    """Lets one process at a time work on a study's folder."""
    with locked(study.root / "lock", f"study output_dir: got {study.root}"):
        yield


def begin(study: Study) -> None:
    """Writes study.yaml; refuses a folder whose runs were made under another configuration.

    Raises:
        DistsegError: naming the keys that changed.
    """
    path = study.root / "study.yaml"
    if path.is_file():
        before, now = with_store(load_study(path)).to_dict(), study.to_dict()
        if before == now:
            return
        changed = changed_keys(before, now)
        if changed and any(study.root.glob("runs/*/config.yaml")):
            raise DistsegError(
                f"study: got other values than {path}: {', '.join(changed)}; its runs stay as they are; change back, or "
                "choose another output_dir"
            )
        grid = [key for key in ("encoders", "decoders", "folds", "seeds") if before.get(key) != now[key]]
        if (changed or grid) and (job := running_array(study.root)):
            raise DistsegError(
                f"study: got other {', '.join(grid or changed)} while SLURM job {job} still works on {path}; wait for it, or "
                f"scancel {job}"
            )
    write_text(path, study.as_yaml())


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Children]:
    """Children that SIGTERM, SIGUSR1 and Ctrl-C ask to save and end; a second one ends them at once."""
    children = Children()

    def stop(signum: int, frame: FrameType | None) -> None:
        children.stop(signum)

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield children
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _do_missing(study: Study, runs: Sequence[Run], tasks: Sequence[Task], children: Children) -> list[Outcome]:
    """Runs that failed, told of as the others are."""
    settings = study.settings
    missing = [(run.index, task) for run, task in zip(runs, tasks, strict=True) if not task.is_done()]
    todo, indices = [task for _, task in missing], [index for index, _ in missing]
    progress = StudyProgress(study, tasks, todo)
    progress.open()
    if not todo:
        return []
    for task in todo if running_array(study.root) is None else []:
        task.write_state(dataclasses.replace(task.read_state(), begun=None, error=None))
    if settings.executor == "local":
        slots = gpu_slots(settings)
        outcomes = run_here(todo, slots, children, progress.begun)
    elif settings.executor == "slurm":
        outcomes = run_on_slurm(todo, indices, settings, children, progress.begun)
    else:
        outcomes = run_on_cluster(todo, settings.executor, children, progress.begun)
    failed = []
    for outcome in outcomes:
        if outcome.error and children.signum:
            continue
        progress.ended(outcome)
        if outcome.error:
            failed.append(outcome)
        write_tables(study, runs, tasks)
    return failed


class StudyProgress:
    """A line when a run starts and when it ends, from any thread."""

    def __init__(self, study: Study, tasks: Sequence[Task], todo: Sequence[Task]) -> None:
        self.study, self.tasks = study, {task.name: task for task in tasks}
        self.n_todo, self.n_ended = len(todo), 0
        self.start = time.monotonic()
        self._lock = threading.Lock()

    def open(self) -> None:
        s = self.study.settings
        sizes = {key: len(getattr(s, f"{key}s")) for key in ("encoder", "decoder", "fold", "seed")}
        grid = " x ".join(f"{n} {key}{'s' if n > 1 else ''}" for key, n in sizes.items())
        done = len(self.tasks) - self.n_todo
        self._print(f"{self.study.root}: {len(self.tasks)} runs ({grid}), {done} done, {self.n_todo} to do")

    def begun(self, name: str, where: str) -> None:
        task = self.tasks[name]
        how = "goes on" if (task.run / "config.yaml").is_file() else "starts"
        self._print(f"{name} {how} on {where} (log {self.study.root / 'logs' / name}.log)")

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self.n_ended += 1
        left = self.n_todo - self.n_ended
        pace_s = (time.monotonic() - self.start) / self.n_ended  # of the whole study: runs beside each other included
        rest = f"{left} left, about {timedelta(seconds=round(pace_s * left))}" if left else "the last one"
        how = f"failed after {timedelta(seconds=round(outcome.elapsed_s))}: {outcome.error}"
        if outcome.error is None:
            dice = dice_in_words(self.tasks[outcome.name], self.study.settings.split)
            how = f"done in {timedelta(seconds=round(outcome.elapsed_s))}: {dice}"
        self._print(f"{outcome.name} {how}; {rest}")

    def _print(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)

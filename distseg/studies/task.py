"""One run of a study, wherever it is done: trained and scored by processes of their own, with a log and a state file.

configs/<name>.yaml   what it trains with          logs/<name>.log    all that its processes said
runs/<name>/          the run                      logs/<name>.json   how far it is
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import distseg
from distseg.config_files import config_as_yaml, load_config
from distseg.errors import DistsegError
from distseg.files import InUse, locked, write_json, write_text
from distseg.shipped import shipped
from distseg.studies.grid import Run, Study

PACKAGE = Path(distseg.__file__).parent
MARK = "DISTSEG_STUDY_RUN"  # in the environment of a run's processes: by it they are found after a crash
STOP_S = 100.0  # for a checkpoint, as in launch/torchrun.sh
# How commands and ranks end when they know why; anything else is looked for in a traceback's last line.
TOLD = re.compile(r"^(?:\[rank\d+\]: )?(error: .+|.+: stopped by SIG\w+ after step .+)$")
RAISED = re.compile(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Killed\w*)\b.*)$")
LAUNCHERS_OWN = ("ChildFailedError", "CalledProcessError", "SignalException")


@dataclass(frozen=True)
class Task:
    """A run in plain values that travel to other machines, which see the folders under the same paths."""

    name: str
    root: Path
    """of the study"""
    cwd: Path
    """that relative paths of the configuration start from"""
    fingerprint: str
    splits: tuple[str, ...]
    launch: tuple[str, ...] | None
    processes: int

    @property
    def config(self) -> Path:
        return self.root / "configs" / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{self.name}.log"

    @property
    def run(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def _state(self) -> Path:
        return self.root / "logs" / f"{self.name}.json"

    def read_state(self) -> "State":
        """How far the run is; a fresh state where another configuration was run, or its folder is gone."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            state = State(**json.loads(self._state.read_text()))
            if state.fingerprint == self.fingerprint and (not state.trained or (self.run / "config.yaml").is_file()):
                scored = [split for split in state.scored if (self.run / "eval" / split / "summary.json").is_file()]
                return dataclasses.replace(state, scored=scored)
        return State(self.fingerprint)

    def write_state(self, state: "State") -> None:
        write_json(self._state, dataclasses.asdict(state))

    def is_done(self) -> bool:
        state = self.read_state()
        return state.trained and set(self.splits) <= set(state.scored)

    def status(self) -> str:
        """done, failed, half trained or pending."""
        if self.is_done():
            return "done"
        if self.read_state().error is not None:
            return "failed"
        return "half trained" if (self.run / "config.yaml").is_file() else "pending"


@dataclass(frozen=True)
class State:
    """What logs/<name>.json holds."""

    fingerprint: str
    begun: str | None = None
    """where and when it was last started"""
    trained: bool = False
    scored: list[str] = field(default_factory=list)
    """splits"""
    parameters_m: float | None = None
    gmacs: float | None = None
    error: str | None = None
    """why it could not be finished"""


@dataclass(frozen=True)
class Outcome:
    name: str
    error: str | None
    """None: trained and scored"""
    elapsed_s: float


class Children:
    """The processes that this one has started, to be stopped with it."""

    def __init__(self) -> None:
        self.signum = 0
        """of the signal that asked to stop; nothing is started any more"""
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, words: Sequence[str], log: Path, env: dict[str, str], cwd: Path) -> int:
        """Runs a command to its end, in a process group of its own, its words going to the end of a log."""
        if self.signum:
            return -self.signum
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(os.fsencode(f"== {datetime.now().isoformat(' ', 'seconds')} {shlex.join(words)}\n"))
            file.flush()
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            # A session of its own: the terminal's Ctrl-C reaches the ranks once, by way of us.
            process = subprocess.Popen(words, cwd=cwd, env=env, start_new_session=True, **pipes)
        self._running.add(process)
        try:
            if self.signum:  # it came between the first line and here
                _signal_group(process.pid, signal.SIGTERM)
            return process.wait()
        finally:
            _signal_group(process.pid, signal.SIGKILL)  # ranks that a dead launcher left
            self._running.discard(process)

    def stop(self, signum: int) -> None:
        """Asks all of them to save and end; when asked again, ends them at once. Safe in a signal handler."""
        kind = signal.SIGKILL if self.signum else signal.SIGTERM
        self.signum = self.signum or signum
        for process in list(self._running):
            _signal_group(process.pid, kind)


def task_of(study: Study, run: Run) -> Task:
    settings = study.settings
    root = study.root.absolute()
    return Task(
        run.name, root, Path.cwd(), run.fingerprint, settings.splits, settings.launch_words, settings.processes_per_run
    )


def write_config(task: Task, run: Run) -> None:
    write_text(task.config, config_as_yaml(dataclasses.replace(run.config, output_dir=str(task.run))))


def do_task(task: Task, gpus: str | None = None, children: Children | None = None) -> Outcome:
    """Trains and scores what is not yet; never raises for what goes wrong in the run.

    Args:
        task: the run.
        gpus: for CUDA_VISIBLE_DEVICES; None: as the environment says.
        children: to stop it by.
    """
    try:
        with locked(task.log.with_suffix(".lock"), f"run: got {task.name}", _here(gpus)):
            return _do_task(task, gpus, children or Children())
    except InUse as error:
        return Outcome(task.name, f"{error.holder} works on it; wait for that one", 0.0)


def _do_task(task: Task, gpus: str | None, children: Children) -> Outcome:
    from distseg.models.table import pair_cost  # here: a report reads how far a run is without timm

    start = time.monotonic()
    stop_orphans(task)  # they are nobody's: who works on the run holds its lock
    state = dataclasses.replace(task.read_state(), begun=_here(gpus), error=None)
    task.write_state(state)
    env = _environment(task, gpus)
    try:
        if not state.trained:
            words = [*_launch_words(task), str(PACKAGE / "train.py"), "--config", str(task.config), "--resume"]
            _finish(task, children, words, env, "training")
            state = dataclasses.replace(state, trained=True, scored=[])
            task.write_state(state)
        if state.gmacs is None:  # before the last split is scored: with it the run is done
            config = load_config(task.config)
            with contextlib.suppress(DistsegError):  # scored all the same where it cannot be measured
                cost = pair_cost(config.model, config.data.channels, config.data.image_size)
                state = dataclasses.replace(state, parameters_m=cost.parameters_m, gmacs=cost.gmacs)
                task.write_state(state)
        for split in (split for split in task.splits if split not in state.scored):
            words = [sys.executable, "-m", "distseg", "evaluate", str(task.run), "--split", split]
            _finish(task, children, words, env, f"scoring {split}")
            state = dataclasses.replace(state, scored=[*state.scored, split])
            task.write_state(state)
    except (DistsegError, OSError) as error:
        if not children.signum:
            state = dataclasses.replace(state, error=str(error))
            task.write_state(state)
        return Outcome(task.name, str(error), time.monotonic() - start)
    return Outcome(task.name, None, time.monotonic() - start)


def stop_orphans(task: Task) -> None:
    """Lets processes of this run that outlived their study (kill -9) save and end, so that the run's folder is free."""
    import psutil

    orphans = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(MARK) == str(task.run)]
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for process in orphans:
            with contextlib.suppress(psutil.Error):
                process.send_signal(kind)
        _, orphans = psutil.wait_procs(orphans, STOP_S if kind == signal.SIGTERM else None)


def last_error(text: str) -> str:
    """The line of a log that says why its command failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("== ")]
    for pattern in (TOLD, RAISED):
        found = [match[1] for line in lines if (match := pattern.match(line))]
        if own := [line for line in found if not any(word in line for word in LAUNCHERS_OWN)]:
            return own[-1].removeprefix("error: ")
    return lines[-1] if lines else "it said nothing"


def _finish(task: Task, children: Children, words: Sequence[str], env: dict[str, str], what: str) -> None:
    """Runs a command of the run; what goes wrong is one line.

    Raises:
        DistsegError: it did not end with 0.
    """
    before = task.log.stat().st_size if task.log.exists() else 0
    status = children.run(words, task.log, env, task.cwd)
    if status == 0:
        return
    if children.signum:
        raise DistsegError(f"{what} stopped by {signal.Signals(children.signum).name}")
    with task.log.open("rb") as file:
        file.seek(before)
        text = file.read().decode(errors="replace")
    raise DistsegError(f"{what}: {last_error(text)}")


def _launch_words(task: Task) -> list[str]:
    if task.launch is not None:
        return list(task.launch)
    import torch

    name = "gpu.yaml" if torch.cuda.device_count() else "cpu.yaml"
    # Port 0: runs beside each other would want the same one.
    words = ["accelerate", "launch", "--config_file", str(shipped(f"launch/{name}")), "--main_process_port", "0"]
    return [*words, "--num_processes", str(task.processes)]


def _environment(task: Task, gpus: str | None) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = os.environ | {"PATH": path, MARK: str(task.run), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{STOP_S:g}"}
    return env if gpus is None else env | {"CUDA_VISIBLE_DEVICES": gpus}


def _here(gpus: str | None) -> str:
    place = f"{platform.node()}, process {os.getpid()}" + (f", GPU {gpus}" if gpus else "")
    return f"{datetime.now().isoformat(' ', 'seconds')} on {place}"


def _signal_group(pid: int, kind: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, kind)

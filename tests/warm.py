"""The `distseg` command in processes forked from one that has imported torch: a start takes half a second, not ten."""

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from torch.distributed.elastic.utils.distributed import get_free_port

from distseg import cli

AFTER_FAILURE_S = 10.0  # that the other ranks get, as a launcher gives them

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm", "distseg.training.build", "distseg.scoring.figures", "distseg.scoring.evaluation",
    "distseg.serving.exporting", "distseg.serving.prediction", "torch.utils.tensorboard"])  # fmt: skip


def run_ranks(
    n: int,
    words: Sequence[str],
    folder: Path,
    cwd: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
    change: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `distseg WORDS` in n processes that know of each other as torchrun's do; one stands alone.

    Args:
        n: processes.
        words: after `distseg`.
        folder: empty, for what they say.
        cwd: where they run.
        timeout: seconds, after which they are killed.
        env: over this process's environment.
        change: called in each process before the command, to disturb it from inside; a function of a module that it can import.

    Returns:
        The first exit status that is not 0, and what all said, by rank.

    Raises:
        subprocess.TimeoutExpired: it lasted longer.
    """
    port, ranks = str(get_free_port()), []
    for rank in range(n):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        joined = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} if n > 1 else {}
        whole_env = dict(os.environ) | joined | dict(env or {})  # of now, not of when the first of all was started
        arguments = (list(words), str(folder / str(rank)), str(cwd), whole_env, change)
        ranks.append(_CONTEXT.Process(target=_command, args=arguments))
        ranks[-1].start()
    late = _end_of(ranks, timeout)
    said = ["".join((folder / f"{rank}.{kind}").read_text() for rank in range(n)) for kind in ("out", "err")]
    if late:
        raise subprocess.TimeoutExpired(list(words), timeout, *said)
    status = next((process.exitcode for process in ranks if (process.exitcode or 0) > 0), 0)
    return subprocess.CompletedProcess(["distseg", *words], status or min(p.exitcode or 0 for p in ranks), *said)


class Started:
    """`distseg WORDS` under way, in a session of its own: what subprocess.Popen offers, as far as tests need it."""

    def __init__(self, words: Sequence[str], folder: Path, cwd: Path) -> None:
        self._said = folder / "0"
        self._process = _CONTEXT.Process(
            target=_command, args=(list(words), str(self._said), str(cwd), dict(os.environ), os.setsid)
        )
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("distseg", timeout or 0)
        return "".join(self._said.with_suffix(f".{kind}").read_text() for kind in ("out", "err")), None


def run_function(n: int, function: Callable[..., None], *arguments: object, timeout: float = 120) -> None:
    """Runs `function(rank, *arguments)`, of a module that can be imported, in n processes.

    Raises:
        AssertionError: one of them failed or lasted longer; its traceback is in this process's stderr.
    """
    ranks = [_CONTEXT.Process(target=function, args=(rank, *arguments)) for rank in range(n)]
    for process in ranks:
        process.start()
    assert not _end_of(ranks, timeout) and [process.exitcode for process in ranks] == [0] * n


def _end_of(ranks: Sequence[BaseProcess], timeout: float) -> bool:
    """Waits for processes, kills what is left, and says whether they were late; after a failure, others get a few seconds."""
    end = time.monotonic() + timeout
    failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if not failed and any(process.exitcode for process in ranks):
            failed, end = True, min(end, time.monotonic() + AFTER_FAILURE_S)
        time.sleep(0.02)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    return bool(alive) and not failed


def environment_of_launch(*words: str) -> dict[str, str]:
    """What `accelerate launch WORDS ...` would tell its ranks, by accelerate's own launcher, which starts none here."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    told: dict[str, str] = {}
    before = dict(os.environ)
    with mock.patch("torch.distributed.run.run", lambda _: told.update(os.environ)):
        launch_command(launch_command_parser().parse_args([*words, "distseg/train.py"]))
    return {name: value for name, value in told.items() if before.get(name) != value}


def _command(words: Sequence[str], said: str, cwd: str, env: dict[str, str], change: Callable[[], None] | None) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, kind in ((1, "out"), (2, "err")):
        with open(f"{said}.{kind}", "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["distseg", *words]
    if change is not None:
        change()
    try:
        status = cli.main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
    sys.exit(status)

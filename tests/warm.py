"""The `distseg` command in processes forked from one that has imported torch: a start takes half a second, not ten."""

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

from distseg import cli

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm", "distseg.training.build", "distseg.training.figures", "distseg.training.evaluation",
    "distseg.serving.artefact", "distseg.serving.work"])  # fmt: skip


def run_ranks(
    n: int, words: Sequence[str], folder: Path, cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs `distseg WORDS` in n processes that know of each other as torchrun's do; one stands alone.

    Args:
        n: processes.
        words: after `distseg`.
        folder: empty, for what they say.
        cwd: where they run.
        timeout: seconds, after which they are killed.

    Returns:
        The first exit status that is not 0, and what all said, by rank.

    Raises:
        subprocess.TimeoutExpired: it lasted longer.
    """
    port, ranks = str(get_free_port()), []
    for rank in range(n):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        joined = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} if n > 1 else {}
        env = dict(os.environ) | joined  # of now, not of when the first of all was started
        ranks.append(_CONTEXT.Process(target=_command, args=(list(words), str(folder / str(rank)), str(cwd), env)))
        ranks[-1].start()
    end = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
    said = ["".join((folder / f"{rank}.{kind}").read_text() for rank in range(n)) for kind in ("out", "err")]
    if late:
        raise subprocess.TimeoutExpired(list(words), timeout, *said)
    status = next((process.exitcode for process in ranks if process.exitcode), 0)
    return subprocess.CompletedProcess(["distseg", *words], status, *said)


def _command(words: Sequence[str], said: str, cwd: str, env: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, kind in ((1, "out"), (2, "err")):
        with open(f"{said}.{kind}", "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["distseg", *words]
    try:
        status = cli.main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
    sys.exit(status)

"""Where the runs of a study are done: on slots of this machine's GPUs, on a dask cluster, or as an array of SLURM jobs.

Each executor takes tasks and gives their outcomes as they end, telling of those that begin.
"""

import itertools
import json
import os
import queue
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from distseg.cluster import cluster_executor
from distseg.errors import DistsegError
from distseg.files import write_json
from distseg.shipped import shipped
from distseg.studies.grid import StudyConfig
from distseg.studies.task import Children, Outcome, Task, do_task, last_error

Begun = Callable[[str, str], None]
"""told of a run's name and where it is done"""
WATCH_S = 2.0  # between two looks at what other machines have begun
SQUEUE_S = 30.0  # between two questions to SLURM, which does not want more
ARRAY = "slurm.json"  # of the jobs that were submitted: in the study's folder


def gpu_slots(settings: StudyConfig) -> list[str | None]:
    """What each of the runs at a time on this machine gets as CUDA_VISIBLE_DEVICES; None: there are no GPUs.

    Raises:
        DistsegError: a run wants more GPUs than there are.
    """
    n_gpus, each = torch.cuda.device_count(), settings.processes_per_run
    if not n_gpus:
        return [None] * (settings.workers or 1)
    if each > n_gpus:
        raise DistsegError(f"study processes_per_run: got {each}; this machine has {n_gpus} GPU(s); lower it")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:n_gpus] if visible else [str(index) for index in range(n_gpus)]
    slots: list[str | None] = [",".join(names[i : i + each]) for i in range(0, n_gpus - each + 1, each)]
    return slots[: settings.workers]


def run_here(tasks: Sequence[Task], slots: Sequence[str | None], children: Children, begun: Begun) -> Iterator[Outcome]:
    """One after the other in each slot."""
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def do(task: Task) -> Outcome | None:
        if children.signum:
            return None
        slot = free.get()
        try:
            begun(task.name, f"GPU {slot}" if slot else "this machine")
            return do_task(task, slot, children)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        pending = {pool.submit(do, task) for task in tasks}
        while pending:
            ended, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (outcome for future in ended if (outcome := future.result()) is not None)


def run_on_cluster(tasks: Sequence[Task], address: str, children: Children, begun: Begun) -> Iterator[Outcome]:
    """Spread over the workers of a dask scheduler; one that dies leaves its run to another.

    Raises:
        DistsegError: no scheduler there, or it is lost.
    """
    told: set[str] = set()
    with cluster_executor(address, "study executor", "run") as executor:
        task_of = {executor.submit(do_task, task): task for task in tasks}
        pending: set[Future[Outcome]] = set(task_of)
        while pending and not children.signum:
            ended, pending = wait(pending, timeout=WATCH_S, return_when=FIRST_COMPLETED)
            _tell_begun(tasks, told, begun)
            for future in ended:
                yield _outcome(future, task_of[future])
        for future in pending:
            future.cancel()


def _outcome(future: "Future[Outcome]", task: Task) -> Outcome:
    """A worker that died, or an installation of its own that fails, is the failure of one run."""
    try:
        return future.result()
    except CancelledError:
        raise  # the scheduler is gone
    except Exception as error:
        return Outcome(task.name, f"worker: {type(error).__name__}: {' '.join(str(error).split())}", 0.0)


def run_on_slurm(
    tasks: Sequence[Task], indices: Sequence[int], settings: StudyConfig, children: Children, begun: Begun
) -> Iterator[Outcome]:
    """As an array of jobs, one a run, which this process waits for; stopped and started again, it waits for the same one.

    Args:
        tasks, indices: what is to be done, and its numbers in the grid.
        settings: `processes_per_run` is the GPUs of a job, `sbatch_options` more words.
        children: whose signal ends the waiting; the jobs go on.

    Raises:
        DistsegError: SLURM does not take the jobs.
    """
    root = tasks[0].root
    job = running_array(root) or _submit(root, indices, settings)
    told: set[str] = set()
    left, start, asked = {task.name: task for task in tasks}, time.monotonic(), 0.0
    while left and not children.signum:
        gone = False
        if time.monotonic() - asked >= SQUEUE_S:
            gone, asked = running_array(root) is None, time.monotonic()
        _tell_begun(tasks, told, begun)  # after the question: what has ended by then has told how
        for name, task in list(left.items()):
            error = task.read_state().error
            if gone and error is None and not task.is_done():
                error = f"job {job} ended without a word: {_job_error(root, job, dict(zip(tasks, indices, strict=True))[task])}"
            if error is not None or task.is_done():
                del left[name]
                yield Outcome(name, error, time.monotonic() - start)
        time.sleep(WATCH_S if left else 0)
    if not left:
        (root / ARRAY).unlink(missing_ok=True)


def running_array(root: Path) -> str | None:
    """The SLURM job that this study has submitted and that has not ended, as far as is known."""
    if not (root / ARRAY).is_file():
        return None
    job = str(json.loads((root / ARRAY).read_text())["job"])
    done = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    if (
        done.returncode != 0
    ):  # of a job that ended long ago it knows nothing; a controller that does not answer says nothing
        return None if "Invalid job id" in done.stderr else job
    return job if done.stdout.strip() else None


def array_of(indices: Sequence[int]) -> str:
    """Numbers as sbatch's --array takes them: 0-3,7."""
    runs = []
    for _, group in itertools.groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        runs.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}")
    return ",".join(runs)


def _submit(root: Path, indices: Sequence[int], settings: StudyConfig) -> str:
    words = ["sbatch", "--parsable", f"--array={array_of(indices)}", f"--gpus-per-node={settings.processes_per_run}"]
    words += [f"--output={root / 'logs' / 'slurm_%A_%a.log'}", *settings.sbatch_options]
    words += [str(shipped("launch/study.sbatch")), str(root / "study.yaml")]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise DistsegError("study executor: got slurm, but there is no sbatch here; start it where there is") from None
    if done.returncode:
        reason = last_error(done.stderr)
        raise DistsegError(f"study executor: sbatch does not take the jobs ({reason}); see sbatch_options")
    job = done.stdout.strip().partition(";")[0]
    write_json(root / ARRAY, {"job": job, "command": shlex.join(words)})
    print(f"submitted as SLURM job {job}; waiting here (stop it as you like: the jobs go on)", flush=True)
    return job


def _job_error(root: Path, job: str, index: int) -> str:
    log = root / "logs" / f"slurm_{job}_{index}.log"
    return last_error(log.read_text(errors="replace")) if log.is_file() else f"no {log}"


def _tell_begun(tasks: Sequence[Task], told: set[str], begun: Begun) -> None:
    for task in tasks:
        if task.name not in told and (where := task.read_state().begun):
            told.add(task.name)
            begun(task.name, where.partition(" on ")[2])

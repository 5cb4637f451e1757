"""OUT/predictions.jsonl: which volumes of a folder are done, so that the same command goes on after any end.

A line a volume: a digest of what its files were made of, their sizes, and its row of volumes.csv.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distseg.errors import DistsegError
from distseg.files import write_text
from distseg.serving.work import Task
from distseg.training.run_folder import read_rows

NAME = "predictions.jsonl"


class Finished:
    """What is done in a folder; files of a volume, model or options that have changed since are removed.

    Args:
        folder: of the masks, which nobody else writes into.
        tasks: what is wanted now.
        made_by: digest of the model and of the options that change a file.

    Raises:
        DistsegError: the folder holds files of these names that predict did not write.
    """

    def __init__(self, folder: Path, tasks: Sequence[Task], made_by: str) -> None:
        self.path, self.made_by = folder / NAME, made_by
        if not self.path.exists() and (taken := [task.mask for task in tasks if task.mask.exists()]):
            raise DistsegError(
                f"output: got {folder}, which holds {taken[0].name} of something else; nothing is overwritten; give a new "
                "folder, or that of an earlier predict"
            )
        self.lines: dict[str, dict[str, Any]] = {line["volume"]: line for line in read_rows(self.path)}
        for task in tasks:
            if task.name in self.lines and not self._is_whole(task):
                for name in self.lines.pop(task.name)["files"]:
                    (folder / name).unlink(missing_ok=True)
        for leftover in folder.glob(".partial-*"):
            leftover.unlink()  # of a process that was killed
        # Whole again: a line that a kill cut short would swallow the next.
        write_text(self.path, "".join(map(_as_text, self.lines.values())))

    def __contains__(self, task: Task) -> bool:
        return task.name in self.lines

    def add(self, task: Task, files: Sequence[Path], row: Mapping[str, Any]) -> None:
        """Notes a volume whose files are written."""
        sizes = {path.name: path.stat().st_size for path in files}
        line = {"volume": task.name, "made_of": self._made_of(task), "files": sizes, "row": dict(row)}
        self.lines[task.name] = line
        with self.path.open("a") as file:
            file.write(_as_text(line))
            file.flush()
            os.fsync(file.fileno())

    def rows(self, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Of volumes.csv, those that are done."""
        return [self.lines[task.name]["row"] for task in tasks if task in self]

    def _is_whole(self, task: Task) -> bool:
        line = self.lines[task.name]
        sizes = {path.name: path.stat().st_size for path in map(self.path.with_name, line["files"]) if path.is_file()}
        return line["made_of"] == self._made_of(task) and line["files"] == sizes

    def _made_of(self, task: Task) -> str:
        """A volume is known by its files' names, sizes and times: reading them all would take as long as the masks."""
        status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in task.files]
        return hashlib.sha256(json.dumps([self.made_by, status]).encode()).hexdigest()


def _as_text(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"

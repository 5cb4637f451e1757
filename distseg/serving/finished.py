"""OUT/predictions.jsonl: which volumes of a folder are done, so that the same command goes on after any end.

A line a volume: a digest of what its files are made of, before they are written; then one with their sizes and times too,
and its row of volumes.csv. So a file that no line tells of is somebody's, and so is one that was changed since.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distseg.data.file_kinds import with_data_file
from distseg.errors import DistsegError
from distseg.serving.work import MaskTask
from distseg.tables import append_rows, read_rows, write_rows

NAME, TABLE = "predictions.jsonl", "volumes.csv"


class Finished:
    """What is done in a folder; what was made of a volume, model or options that have changed since is removed.

    Args:
        folder: of the masks, which nobody else writes into.
        tasks: what is wanted now.
        outputs: names of the files, in the folder, that each of them, in order, will have.
        made_by: digest of the model and of the options that change a file.

    Raises:
        DistsegError: the folder holds files of these names that predict did not write, or that were changed since.
    """

    def __init__(self, folder: Path, tasks: Sequence[MaskTask], outputs: Sequence[Sequence[str]], made_by: str) -> None:
        self.folder, self.path, self.made_by = folder, folder / NAME, made_by
        self.lines: dict[str, dict[str, Any]] = {line["volume"]: line for line in read_rows(self.path)}
        changed = [task for task in tasks if task.name in self.lines and not self._is_whole(task)]
        wanted = [TABLE] if not self.path.exists() else []
        wanted += [
            name for task, names in zip(tasks, outputs, strict=True) for name in names if not self._tells_of(task, name)
        ]
        if taken := [name for name in wanted if (folder / name).exists()]:
            raise DistsegError(
                f"output: got {folder}, which holds {taken[0]} of something else; nothing is overwritten; move it away, or "
                "give another folder"
            )
        if edited := [name for task in changed for name in self._edited(task)]:
            raise DistsegError(
                f"output: got {folder}, whose {edited[0]} was changed after predict wrote it; nothing is overwritten; move it "
                "away, or give another folder"
            )
        for task in changed:
            for name in self.lines.pop(task.name)["files"]:
                (folder / name).unlink(missing_ok=True)
        for leftover in folder.rglob(".partial-*"):
            if leftover.is_file():
                leftover.unlink()  # of a process that was killed
        self._write()  # whole again: a line that a kill cut short would swallow the next

    def _tells_of(self, task: MaskTask, name: str) -> bool:
        """Whether a file is predict's own: of a volume that was begun, any may be."""
        line = self.lines.get(task.name)
        return line is not None and (not line["files"] or name in line["files"])

    def __contains__(self, task: MaskTask) -> bool:
        return task.name in self.lines and bool(self.lines[task.name]["files"])

    def begin(self, task: MaskTask) -> None:
        """Notes a volume whose files are about to be written."""
        self._append({"volume": task.name, "made_of": self._made_of(task), "files": {}})

    def add(self, task: MaskTask, files: Sequence[Path], row: Mapping[str, Any]) -> None:
        """Notes a volume whose files are written."""
        known = {name_in(self.folder, path): _status(path) for path in files}
        self._append({"volume": task.name, "made_of": self._made_of(task), "files": known, "row": dict(row)})

    def withdraw(self, task: MaskTask) -> None:
        """Forgets a volume that failed: none of its files is there."""
        del self.lines[task.name]
        self._write()

    def rows(self, tasks: Sequence[MaskTask]) -> list[dict[str, Any]]:
        """Of volumes.csv, those that are done."""
        return [self.lines[task.name]["row"] for task in tasks if task in self]

    def _is_whole(self, task: MaskTask) -> bool:
        """By sizes alone: a copy of the folder has other times."""
        line = self.lines[task.name]
        files = {self.folder / name: size for name, (size, _) in line["files"].items()}
        if not files or line["made_of"] != self._made_of(task):
            return False
        return all(path.is_file() and path.stat().st_size == size for path, size in files.items())

    def _edited(self, task: MaskTask) -> list[str]:
        files = {name: status for name, status in self.lines[task.name]["files"].items()}
        return [n for n, status in files.items() if (self.folder / n).is_file() and _status(self.folder / n) != status]

    def _append(self, line: dict[str, Any]) -> None:
        self.lines[line["volume"]] = line
        append_rows(self.path, [line])

    def _write(self) -> None:
        write_rows(self.path, self.lines.values())

    def _made_of(self, task: MaskTask) -> str:
        """A volume is known by its files' names, sizes and times: reading them all would take as long as the masks."""
        files = [part for path in task.files for part in with_data_file(path)]
        status = [(path.name, *_status(path)) for path in files]
        return hashlib.sha256(json.dumps([self.made_by, status]).encode()).hexdigest()


def name_in(folder: Path, path: Path) -> str:
    """How a file of the masks' folder is called in its list and table."""
    return path.relative_to(folder).as_posix()


def _status(path: Path) -> list[int]:
    """Size and time; of a link to nothing, which reading will name, neither."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [-1, -1]

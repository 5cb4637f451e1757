"""Writing files and folders so that nothing half-written ever stands under its final name.

Everything is written aside (a hidden sibling on the same file system), flushed to disk, then renamed: a reader sees
the old content or the new one, also after a crash or on a full disk.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from distseg.errors import DistsegError


class InUse(DistsegError):
    """Another process holds the lock."""

    def __init__(self, subject: str, holder: str) -> None:
        self.holder = holder or "another process"
        super().__init__(f"{subject}, which {self.holder} works on; wait for it to end, or choose another")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write a file to; on success it replaces `path`, on failure it vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as nibabel choose the format by it.
    aside = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield aside
        fsync_path(aside)
        os.replace(aside, path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """Gives an empty temporary sibling to fill; on success it takes the name `path`, replacing a folder of that name."""
    path = path.resolve()  # a link would be replaced instead of what it names
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            fsync_path(file)
        replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(lock: Path, subject: str, holder: str = "", *, waits: bool = False) -> Iterator[None]:
    """Holds a lock file, which says who holds it, goes with the process that does and is removed at the end.

    Args:
        lock: the file.
        subject: how the line begins that refuses another process: what, and the value it got.
        holder: who holds it; "": this process.
        waits: for another process to be done, instead of refusing.

    Raises:
        InUse: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _held(lock, subject, waits) as file:
        file.truncate(0)
        file.write(holder or f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            # Removed while still held: whoever opens the name next makes a new file.
            os.unlink(lock)


def _held(lock: Path, subject: str, waits: bool) -> TextIO:
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                raise InUse(subject, file.read()) from None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its holder removed it between our open and our lock
        if not waits:
            raise InUse(subject, "")


def is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that holds nothing; any other stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_leftovers(path: Path) -> None:
    """Removes what killed writers of a folder left beside it; for whoever holds the lock on it."""
    for leftover in path.parent.glob(f".partial-*-{path.name}"):
        shutil.rmtree(leftover)


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder already there is moved out of the way first, and back if the rename fails."""
    old = path.with_name(f".old-{uuid.uuid4().hex[:8]}-{path.name}")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Forces a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file atomically."""
    with written_aside(path) as aside:
        aside.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; NaN is refused by the format and must be null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Writing files and folders so that nothing half-written ever stands under its final name.

Everything is written aside (a hidden sibling on the same file system), flushed to disk, then renamed: a reader sees
the old content or the new one, also after a crash or on a full disk. A folder that is a mount point, or whose parent cannot be
written, is filled from a hidden folder inside it: its members are renamed one by one, JSON files, which make it whole, last.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from distseg.errors import DistsegError

MOST_BYTES = 220  # of a name that still takes a prefix: file systems have 255
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


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
    aside = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{_short(path.name)}")
    try:
        yield aside
        fsync_path(aside)
        os.replace(aside, path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """Gives an empty temporary folder to fill; on success it takes the name `path`, replacing a folder of that name."""
    path = path.resolve()  # a link would be replaced instead of what it names
    aside = beside(path, f".partial-{uuid.uuid4().hex[:8]}")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            fsync_path(file)
        replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def beside(path: Path, name: str) -> Path:
    """Where something that belongs to a folder is kept until it is whole: a sibling, or inside where it can have none.

    Args:
        path: the folder, which need not be there yet.
        name: hidden; a sibling has the folder's name behind it.
    """
    is_fixed = path.is_dir() and (_is_mount(path) or not os.access(path.parent, os.W_OK | os.X_OK))
    return path / name if is_fixed else path.with_name(f"{name}-{_short(path.name)}")


def _is_mount(path: Path) -> bool:
    return os.path.ismount(path) or _mount_id(path) != _mount_id(path.parent)


def _mount_id(folder: Path) -> str:
    """Of the mount that a folder is in: os.path.ismount does not see a bind mount from the same file system."""
    descriptor = os.open(folder, os.O_PATH)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next((line for line in lines if line.startswith("mnt_id:")), "")


def _short(name: str) -> str:
    """Of a name that a prefix would make too long, the digest and the end: other names have another."""
    content = os.fsencode(name)
    return name if len(content) <= MOST_BYTES else f"{hashlib.sha256(content).hexdigest()[:16]}-{name[-40:]}"


@contextlib.contextmanager
def locked(lock: Path, subject: str, holder: str = "", *, waits: bool = False) -> Iterator[None]:
    """Holds a lock file, which says who holds it, goes with the process that does and is removed at the end.

    Where the file system has no locks (some Lustre, NFS and FUSE mounts), a note says so and the work is done without.

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
            # Removed while still held: whoever opens the name next makes a new file. Without locks, others may have removed it.
            lock.unlink(missing_ok=True)


def _held(lock: Path, subject: str, waits: bool) -> TextIO:
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                raise InUse(subject, file.read()) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _note_missing_locks(lock.parent, error.strerror)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its holder removed it between our open and our lock
        if not waits:
            raise InUse(subject, "")


@functools.cache  # once a folder
def _note_missing_locks(folder: Path, reason: str) -> None:
    print(
        f"note: {folder}: this file system has no locks ({reason}); see to it that no other process writes there",
        file=sys.stderr,
        flush=True,
    )


def is_free(path: Path) -> bool:
    """Whether nothing is there, or a folder that is empty but for what killed writers, or a new file system, left in it."""
    return not path.exists() or (path.is_dir() and all(map(is_no_content, path.iterdir())))


def is_no_content(path: Path) -> bool:
    """Whether a member of a folder is what killed writers, or a new file system, left there."""
    if path.name == "lost+found":
        return _is_mount(path.parent)
    return (
        re.fullmatch(r"\.partial-[0-9a-f]{8}|\.preparing|\.lock", path.name) is not None
    )  # as `beside` puts them inside


def check_writable(out: Path) -> None:
    """Before anything is computed; what comes up later is an OSError.

    Raises:
        DistsegError: nothing can be written to `out`, a file or folder that need not be there yet.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    folder = existing.parent if existing == out and out.is_file() else existing
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DistsegError(f"output: got {out}; {folder} must be a folder that can be written; choose another")


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that holds nothing; any other stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_leftovers(path: Path) -> None:
    """Removes what killed writers of a folder left beside it; for whoever holds the lock on it."""
    siblings = path.parent.glob(f".partial-*-{glob.escape(_short(path.name))}")
    for leftover in (*siblings, *path.glob(".partial-*")):
        shutil.rmtree(leftover)


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new`, as `beside` places it, to `path`; what is there is moved out of the way first, and back if that fails."""
    if new.parent == path:
        _move_in(new, path)
        return
    old = path.with_name(f".old-{uuid.uuid4().hex[:8]}-{_short(path.name)}")
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


def _move_in(new: Path, path: Path) -> None:
    """Puts the members of a folder inside `path` into it, and removes those that it has no longer."""
    members = sorted(new.iterdir(), key=lambda member: (member.suffix == ".json", member.name))
    kept = {member.name for member in members}
    outdated = [member for member in path.iterdir() if not is_no_content(member) and member.name not in kept]
    for member in sorted(path.glob("*.json")):  # from here on it is not whole
        member.unlink()
    for member in members:
        if (path / member.name).is_dir():
            shutil.rmtree(path / member.name)
        os.replace(member, path / member.name)
        fsync_path(path)
    for member in outdated:
        shutil.rmtree(member) if member.is_dir() else member.unlink(missing_ok=True)
    new.rmdir()


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
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")  # names may be of any bytes


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; NaN is refused by the format and must be null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

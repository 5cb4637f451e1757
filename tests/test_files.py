"""Atomic writing: the old content or the new, never a part."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distseg.files import beside, folder_written_aside, is_free, locked, write_json, written_aside
from distseg.tables import read_csv, write_csv


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk"), written_aside(path) as aside:
        aside.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == '{\n  "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]


def test_nan_is_refused_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with folder_written_aside(path) as aside:
            (aside / content).touch()
    assert [p.name for p in path.iterdir()] == ["two"]
    with pytest.raises(KeyboardInterrupt), folder_written_aside(path) as aside:
        (aside / "three").touch()
        raise KeyboardInterrupt
    assert [p.name for p in path.iterdir()] == ["two"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_renamed_is_filled_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker run -v DISK:/model` has it: renaming a mount point fails."""
    path = tmp_path / "mount"
    path.mkdir()
    (path / "lost+found").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda place: Path(place) == path)
    assert is_free(path)
    inode = path.stat().st_ino
    for members in (("a.json", "folder/x", "old"), ("a.json", "folder/y")):
        with folder_written_aside(path) as aside:
            assert aside.parent == path
            for name in members:
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).touch()
    assert path.stat().st_ino == inode and list(tmp_path.iterdir()) == [path]
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*")) == ["a.json", "folder", "folder/y", "lost+found"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting is for root")
def test_a_bind_mount_from_the_same_file_system_is_filled_from_inside(tmp_path: Path) -> None:
    """As `docker run -v /data:/work -v /data/disk:/work/model` has it: os.path.ismount does not see it."""
    code = (
        "import sys; from pathlib import Path; from distseg.files import folder_written_aside as aside\n"
        "for _ in range(2):\n    with aside(Path(sys.argv[1])) as folder: (folder / 'a.json').touch()"
    )
    disk, mount = tmp_path / "disk", tmp_path / "mount"
    disk.mkdir()
    mount.mkdir()
    mounting = 'mount --bind "$0" "$1" || exit 77; exec "$2" -c "$3" "$1"'
    words = ["unshare", "-m", "bash", "-c", mounting, str(disk), str(mount), sys.executable, code]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in disk.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", [".old-notes", ".lockbox", ".preparing-other", ".partial-mine", "lost+found"])
def test_a_folder_with_hidden_files_of_somebody_else_is_not_free(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert not is_free(tmp_path)


def test_folders_with_long_names_that_end_alike_are_apart(tmp_path: Path) -> None:
    asides = [beside(tmp_path / f"{start}{'v' * 249}", ".lock") for start in "ab"]
    assert asides[0] != asides[1] and all(len(path.name) < 256 for path in asides)
    assert beside(tmp_path / f"a{'v' * 60}", ".lock").name == f".lock-a{'v' * 60}"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_noted_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):
        with locked(tmp_path / "lock", "x"):
            assert (tmp_path / "lock").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path}: this file system has no locks" in said
    with locked(tmp_path / "lock", "x"), locked(tmp_path / "lock", "x", waits=True):
        pass  # the outer one finds the file removed already
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("name", ["v" * 248, "病" * 80, os.fsdecode(b"M\xfcller")])
def test_names_of_any_length_and_bytes_are_written(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / f"{name}.json", {name: 1})
    write_csv(tmp_path / f"{name}.csv", [{"name": name}])
    for _ in range(2):  # the second replaces the first
        with folder_written_aside(tmp_path / name) as aside:
            (aside / "x").touch()
    assert read_csv(tmp_path / f"{name}.csv") == [{"name": name}] and (tmp_path / name / "x").exists()


def test_a_name_that_the_terminal_cannot_show_is_shown_otherwise() -> None:
    code = "from distseg.errors import one_line_errors; one_line_errors(lambda _: print('M\\udcfcller') or 0)()"
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
        )
        assert done.stdout.strip() == b"M?ller" and not done.stderr

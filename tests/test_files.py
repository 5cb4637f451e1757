"""Atomic writing: the old content or the new, never a part."""

from pathlib import Path

import pytest

from distseg.files import folder_written_aside, write_json, written_aside


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

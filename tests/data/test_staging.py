"""Staging: each case copied once, checked, and finished after an interruption."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distseg.data.staging import stage_store
from distseg.data.store import open_store
from distseg.errors import DistsegError


def test_whoever_comes_second_finds_every_case_there(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    cases = opened.cases_of("train", 0)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: stage_store(opened, cases, tmp_path), range(2))
    assert one.root == two.root and one.root.parent == tmp_path
    stamps = {path: path.stat().st_mtime_ns for path in one.root.rglob("*.npy")}
    assert len(stamps) == sum(2 * case.shape[0] + 1 for case in cases)
    for case in cases:
        for staged, original in zip(one.read_case(case), opened.read_case(case), strict=True):
            assert np.array_equal(staged, original)
    shutil.rmtree(one.root / cases[0].folder)
    again = stage_store(opened, cases, tmp_path)
    changed = {path.parent for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {again.root / cases[0].folder}


def test_a_damaged_case_is_named_and_not_staged(store: Path, tmp_path: Path) -> None:
    opened = open_store(Path(shutil.copytree(store, tmp_path / "store")))
    bad = opened.slices_of(opened.cases)[5].image
    bad.write_bytes(bad.read_bytes()[:-2] + b"??")
    with pytest.raises(DistsegError, match=f"changed file {bad} "):
        stage_store(opened, opened.cases, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*/" + bad.parent.name)) and not list(tmp_path.rglob(".partial-*"))

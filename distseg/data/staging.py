"""A store's cases from a shared file system onto the node's own disk, once a node, checked on the way."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distseg.bars import counted
from distseg.data.store import CASE_JSON, Case, Store
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, locked, sha256_of

COPIES_AT_ONCE = 8  # waiting for a network, not for a processor


def stage_store(store: Store, cases: Sequence[Case], cache_dir: Path) -> Store:
    """Copies cases to `cache_dir`/<store>-<digest of store.json>/ unless they are there, and returns the store there.

    Whoever comes second on a node waits and finds them. What an interrupted copy left is finished. Caches of other stores
    stay; remove them by hand.

    Raises:
        DistsegError: a file is not what it was when the store was written.
    """
    root = cache_dir / f"{store.root.resolve().name}-{sha256_of(store.root / 'store.json')[:12]}"
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock", f"data.cache_dir: got {root}", waits=True):
        missing = [case for case in cases if not (root / case.folder / CASE_JSON).is_file()]
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            copies = pool.map(functools.partial(_copy_case, store.root, root), missing)
            list(counted(copies, "cache", len(missing), "volume", shown=bool(missing)))
    return dataclasses.replace(store, root=root)


def _copy_case(source: Path, target: Path, case: Case) -> None:
    digests = json.loads((source / case.folder / CASE_JSON).read_text())["files"]
    with folder_written_aside(target / case.folder) as aside:
        for name, digest in digests.items():
            shutil.copyfile(source / case.folder / name, aside / name)
            if sha256_of(aside / name) != digest:
                raise DistsegError(
                    f"store: changed file {source / case.folder / name} (its sha256 is another); run `distseg prepare` again"
                )
        shutil.copyfile(source / case.folder / CASE_JSON, aside / CASE_JSON)

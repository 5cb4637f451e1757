"""Runs commands of distseg one after the other in a fresh process, where some packages are absent.

`python -m tests.one_process` reads a list of {"words": [...], "absent": [packages]} as JSON, and writes one of
{"status": ..., "out": ..., "err": ..., "imported": [...]}: the packages, and the modules right inside them, that are imported by
the end of each command.
"""

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Collection
from typing import Any

from distseg import cli


class WithoutAbsent:
    """One of sys.meta_path, which does not find some packages: as if they were not installed."""

    def __init__(self, finder: Any, absent: Collection[str]) -> None:
        self._finder, self._absent = finder, absent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self._absent else self._finder.find_spec(name, path, target)


def run(words: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
            status = None
    imported = sorted({".".join(name.split(".")[:2]) for name in sys.modules})
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "imported": imported}


def main() -> None:
    absent: set[str] = set()
    sys.meta_path[:] = [WithoutAbsent(finder, absent) for finder in sys.meta_path]
    found = []
    for step in json.load(sys.stdin):
        absent.clear()
        absent.update(step["absent"])
        found.append(run(step["words"]))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""The names in a folder, and patterns that find the files of cases among them."""

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distseg.data.file_kinds import PICTURES, SUFFIXES, is_dicom, is_picture, is_volume, number_of_picture
from distseg.data.layouts.source import files_of_folder
from distseg.errors import DistsegError

STORE_JSON = "store.json"  # a store may lie inside its source
SHOWN_SHAPES = 6


@dataclass(frozen=True)
class Name:
    """A file or a folder of a tree."""

    path: Path
    stem: str
    """relative to the tree, with `/`, as composed Unicode, without a known suffix"""
    suffix: str
    """in lower case; "" of a folder, and of a file that is neither volume nor picture nor DICOM by its name"""


class Tree:
    """All files and folders below one, without what is hidden, and without stores."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def files(self) -> list[Name]:
        return self._names[0]

    @property
    def folders(self) -> list[Name]:
        return self._names[1]

    @functools.cached_property
    def _names(self) -> tuple[list[Name], list[Name]]:
        files: list[Name] = []
        folders: list[Name] = []
        seen: set[str] = set()
        for folder, inner, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen or STORE_JSON in names:  # a link to a folder above, or a store
                inner.clear()
                continue
            seen.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            prefix = "" if folder == str(self.root) else os.path.relpath(folder, self.root) + os.sep
            folders += [Name(self.root / (prefix + name), *_as_written(prefix + name, "")) for name in inner]
            files += [
                Name(self.root / (prefix + name), *_as_written(*parted(prefix + name)))
                for name in sorted(names)
                if not name.startswith(".")
            ]
        return files, folders

    def shapes(self) -> list[str]:
        """What the files' names look like, digits as `#`, the most frequent first: `Train/a#_ct.nii.gz x 6`."""
        shapes = Counter(re.sub(r"\d+", "#", name.stem + name.suffix) for name in self.files)
        return [f"{shape} x {n}" for shape, n in shapes.most_common(SHOWN_SHAPES)]


class Pattern:
    """A path below a folder with `{case}`, which may come again, `{label}`, `*` and `**/`.

    What is in braces or a star does not cross folders. A suffix may be left out: it is then that of any volume or picture,
    and the path may be a folder of slices.
    """

    def __init__(self, text: str, option: str = "pattern") -> None:
        """Takes a pattern apart.

        Raises:
            DistsegError: it has no `{case}`, or braces around something else.
        """
        stem, self.suffix = _as_written(*parted(text.removeprefix("./")))
        if "{case}" not in text:
            raise DistsegError(
                f"{option}: got {text!r}; {{case}} must stand where the cases' names differ, such as 'ct/{{case}}.nii.gz'"
            )
        expression, named = "", set[str]()
        for token in re.split(r"(\{\w*\}|\*\*/|\*)", stem):
            if re.fullmatch(r"\{\w*\}", token):
                name = token[1:-1]
                if name not in ("case", "label"):
                    raise DistsegError(
                        f"{option}: got {token} in {text!r}; {{case}} and {{label}} are known; write * for anything else"
                    )
                expression += f"(?P={name})" if name in named else f"(?P<{name}>[^/]+)"
                named.add(name)
            else:
                expression += {"**/": "(?:.+/)?", "*": "[^/]*"}.get(token) or re.escape(token)
        self.expression = re.compile(expression)
        self.has_label = "label" in named

    def matches(self, tree: Tree) -> Iterator[tuple[str, str, Path]]:
        """Case, label ("" without one) and path of each file or folder that fits, by name."""
        for name in tree.files:
            if name.suffix == self.suffix or not self.suffix and name.suffix:
                yield from self._found(name)
        if not self.suffix:
            for name in tree.folders:
                yield from self._found(name)

    def _found(self, name: Name) -> Iterator[tuple[str, str, Path]]:
        if found := self.expression.fullmatch(name.stem):
            yield found["case"], found["label"] if self.has_label else "", name.path

    def fits(self, tree: Tree) -> bool:
        return next(self.matches(tree), None) is not None


def parted(name: str) -> tuple[str, str]:
    """A path without the suffix of a volume, a picture or a DICOM file, and that."""
    suffix = next((s for s in (*SUFFIXES, *PICTURES, ".dcm") if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)], name[len(name) - len(suffix) :]


def _as_written(stem: str, suffix: str) -> tuple[str, str]:
    return unicodedata.normalize("NFC", stem.replace(os.sep, "/")), suffix.lower()


def gathered(paths: Iterable[Path], left_out: list[Path]) -> tuple[Path, ...]:
    """The files of one volume or mask: those of a folder, or pictures or DICOM slices in their order."""
    files: list[Path] = []
    for path in paths:
        files += files_of_folder(path, left_out) if path.is_dir() else [path]
    return tuple(sorted(files, key=number_of_picture)) if all(map(is_picture, files)) else tuple(files)


def are_slices(files: Iterable[Path]) -> bool:
    """Several of them are one volume: pictures, or files of a DICOM series."""
    return all(is_picture(path) or not is_volume(path) and is_dicom(path) for path in files)

"""Files that come with distseg besides Python: launch/, yaml_configs/ and export/, found in a checkout and in a wheel alike.

`python -m distseg.shipped launch/gpu.yaml` prints where one lies, `python -m distseg.shipped` all of their names.
"""

import difflib
from importlib.resources import files
from pathlib import Path

from distseg.errors import DistsegError

FOLDERS = ("launch", "yaml_configs", "export")  # beside this file: links in a checkout, folders in a wheel


def shipped(name: str) -> Path:
    """Where a file lies that comes with distseg.

    Args:
        name: its path in the repository, such as launch/gpu.yaml.

    Raises:
        DistsegError: there is none of that name.
    """
    names = shipped_names()
    if name not in names:
        near = difflib.get_close_matches(name, [*names, "none"], n=1, cutoff=0.0)[0]
        raise DistsegError(
            f"shipped file: got {name}; it must be one of {len(names)}; did you mean {near}? All: python -m distseg.shipped"
        )
    return (_root() / name).resolve()


def shipped_names() -> list[str]:
    """Of all files, as `shipped` takes them."""
    folders = {name: (_root() / name).resolve() for name in FOLDERS}
    return sorted(
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    )


def as_typed(name: str) -> str:
    """What a user can type for a shipped file: the name alone where it leads to the very file, else where that lies."""
    path, here = shipped(name), Path(name)
    return name if here.is_file() and here.samefile(path) else str(path)


def presets(command: str) -> dict[str, str]:
    """Shipped configurations of a command, train or study: name -> file, as `shipped` takes it."""
    names = [name for name in shipped_names() if name.startswith("yaml_configs/")]
    return {Path(name).stem: name for name in names if Path(name).stem.startswith("study") == (command == "study")}


def find_preset(path: Path, what: str, folder: Path = Path()) -> Path:
    """A configuration file, else the shipped one of that name.

    Args:
        path: of the file, or a name without a folder: covid_ct or covid_ct.yaml.
        what: it is, for errors: a study's ("study file") or a training's.
        folder: that a relative path starts from.

    Raises:
        DistsegError: it is neither.
    """
    file = folder / path
    if file.is_file():
        return file
    known = presets("study" if what.startswith("study") else "train")
    if path.parent == Path() and path.name.removesuffix(".yaml") in known:
        return shipped(known[path.name.removesuffix(".yaml")])
    near = difflib.get_close_matches(path.stem, [*known, "none"], n=1, cutoff=0.0)[0]
    raise DistsegError(
        f"{what}: got {file}; no such file; shipped ones go by name, {', '.join(known)}; did you mean {near}?"
    )


def _root() -> Path:
    return Path(str(files(__package__)))

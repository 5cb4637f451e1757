"""What each key of a configuration means, for `distseg config` and docs/configuration.md: read from distseg/config.py."""

import ast
import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distseg.config import Config
from distseg.config_files import load_config, unknown_key
from distseg.rules import allowed, sections

HEAD = """\
# Configuration

This page is what `distseg config` prints, from [distseg/config.py](../distseg/config.py). It is not edited by hand.

A configuration is a YAML file of the sections below. `--config` takes a file, or the name of a shipped one; without a name
it lists them. A key that a file leaves out has its default. Behind a command, `section.key=value` changes one key.

```bash
distseg train --config covid_ct optim.lr=3e-4
distseg config optim.lr        # one key; a section, such as data.augment, prints all its keys
```
"""
TABLE = "\n| key | default | may be | meaning |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Entry:
    """What there is to know about a key."""

    key: str
    default: Any
    may_be: str
    meaning: str

    @property
    def default_text(self) -> str:
        """As it is typed behind a command."""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)

    def is_of(self, asked: str) -> bool:
        """Whether it lies in what was asked for: a section, a key, or a name in a mapping (regions.lung)."""
        inside = isinstance(self.default, Mapping) and f"{asked}.".startswith(f"{self.key}.")
        return inside or f"{self.key}.".startswith(f"{asked}.")

    def as_text(self) -> str:
        return f"{self.key}={self.default_text}\n    {self.meaning}\n    it must be {self.may_be}\n"

    def as_row(self) -> str:
        cells = (f"`{self.key}`", f"`{self.default_text}`", self.may_be, self.meaning)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def entries_below(asked: str) -> list[Entry]:
    """Keys of a section, or the one of a name.

    Raises:
        DistsegError: there is none.
    """
    entries = [entry for _, _, section in _sections(Config, load_config(None).to_dict()) for entry in section]
    found = [entry for entry in entries if entry.is_of(asked.rstrip("."))]
    if not found:
        names = {entry.key.rpartition(".")[0] for entry in entries} - {""}
        raise unknown_key("config", asked, sorted(names | {entry.key for entry in entries}))
    return found


def as_markdown() -> str:
    """All keys: the page docs/configuration.md."""
    text = HEAD
    for name, meaning, entries in _sections(Config, load_config(None).to_dict()):
        text += f"\n## {name or 'No section'}\n\n{meaning}\n{TABLE}{''.join(entry.as_row() for entry in entries)}"
    return text


def _sections(schema: type, values: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str, list[Entry]]]:
    """Name, meaning and keys of a section, then of those inside it."""
    meanings, inner, prefix = _meanings(schema), sections(schema), f"{name}." if name else ""
    values_of = {f.name: f.type for f in dataclasses.fields(schema) if f.name not in inner}
    entries = [Entry(prefix + key, values[key], allowed(kind), meanings[key]) for key, kind in values_of.items()]
    yield name, inspect.getdoc(schema) or "", entries
    for key, section in inner.items():
        yield from _sections(section, values[key], prefix + key)


def _meanings(schema: type) -> dict[str, str]:
    """Field -> the text under it, which Python does not keep."""
    (section,) = ast.parse(inspect.getsource(schema)).body
    meanings = {}
    for pair in itertools.pairwise(ast.iter_child_nodes(section)):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                meanings[name] = " ".join(text.split())
    return meanings

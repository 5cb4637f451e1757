"""How a configuration is read from YAML, changed by `section.key=value`, written, and compared with another."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distseg.config import PRESETS, Config
from distseg.errors import DistsegError
from distseg.rules import sections
from distseg.shipped import as_typed, find_preset

# Keys that change how fast a run goes on and what it writes, not what comes out; those that end in a dot, whole sections.
PACE_KEYS = ("planned", "train.log_every_steps", "train.timeout_s", "train.trackers", "train.profile", "checkpoint.",
             "data.num_threads", "data.cache_dir", "data.log_samples")  # fmt: skip


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads YAML (None: the defaults), then applies `section.key=value` overrides in order.

    Args:
        path: a file, or the name of a shipped configuration, such as covid_ct.
        overrides: as on the command line.

    Raises:
        DistsegError: the file is missing or is not a YAML mapping, a key is unknown, a value is of the wrong type or range.
    """
    what = "config file"
    values = read_yaml(find_preset(path, what), what, "yaml_configs/quickstart.yaml") if path else {}
    changes = [read_override(override) for override in overrides]
    if any(key == "data.augment.preset" for key, _ in changes) and isinstance(values.get("data"), dict):
        values["data"].pop("augment", None)  # a written configuration has every value: none would be left to the preset
    for key, value in changes:
        _set_dotted(values, key, value)
    _check_keys(values)
    _apply_preset(values)
    _add_sections(values, Config)
    return Config(**values)


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`.

    Raises:
        DistsegError: the value is not YAML.
    """
    key, _, text = override.partition("=")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise DistsegError(
            f"override: got {override}; its value must be YAML; a bracket or quote may be open"
        ) from None


def config_as_yaml(config: Config) -> str:
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """A mapping from a file, {} from an empty one.

    Args:
        path: of the file.
        what: it is, for errors.
        example: a shipped file that is right.

    Raises:
        DistsegError: the file is not a YAML mapping.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DistsegError(f"{what}: got {path}; it must be YAML; {error}") from None
    if not isinstance(values, dict | None):
        raise DistsegError(
            f"{what}: got {path} holding a {type(values).__name__}; it must hold `key: value` lines; see {as_typed(example)}"
        )
    return values or {}


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would keep the last of two equal keys and lose the other's section without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1 and key != "<<"}):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that a configuration (`Config.to_dict`) says, by dotted keys; of regions their order too, which is the logits'."""
    return flat(config) | {"regions": list(config["regions"])}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two mappings of dotted keys differ: key -> (value here, value there), None where it is not."""
    keys = dict.fromkeys((*one, *other))
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def given(values: Mapping[str, Any], schema: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of the values that a file gives; a mapping that is a value itself (regions) stays whole."""
    inner = sections(schema)
    for key, value in values.items():
        if isinstance(value, Mapping) and key in inner:
            yield from given(value, inner[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unknown_key(what: str, key: str, known: Iterable[str]) -> DistsegError:
    """The error about a key that is none of `known`, naming the nearest of them."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)[0]
    return DistsegError(f"{what} key: got {key}; no such key; did you mean {near}?")


def config_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all values, sections left out."""
    keys, inner = [], sections(schema)
    for f in dataclasses.fields(schema):
        keys += config_keys(inner[f.name], f"{prefix}{f.name}.") if f.name in inner else [prefix + f.name]
    return keys


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for section in above:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise DistsegError(f"config override: got {key}; {section!r} is a value, not a section; use --print-config")
    values[last] = value


def _apply_preset(values: dict[str, Any]) -> None:
    """Puts the values of data.augment.preset under those that are given; a wrong name is left to the validation."""
    data = values.get("data")
    augment = data.get("augment") if isinstance(data, dict) else None
    if isinstance(augment, dict):
        preset = PRESETS.get(str(augment.get("preset")), {})  # whatever was written: a list cannot be looked up
        values["data"]["augment"] = {**preset, **augment}


def _add_sections(values: dict[str, Any], schema: type) -> None:
    """Gives sections that are not there as empty ones: pydantic then prepares one check for all, not one for each."""
    for name, inner in sections(schema).items():
        section = values.setdefault(name, {})
        if isinstance(section, dict):
            _add_sections(section, inner)


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuses keys that no section has; a section that is given as a value is left to the validation."""
    known = config_keys()
    for key, _ in given(values):
        if key not in known and not any(name.startswith(f"{key}.") for name in known):
            raise unknown_key("config", key, known)

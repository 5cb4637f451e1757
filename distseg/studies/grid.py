"""What a study is made of: its YAML, the runs that follow from it, and what may change once it has begun."""

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from distseg.config import (
    PACE_KEYS,
    Config,
    ModelConfig,
    comparable,
    differences,
    flat,
    load_config,
    read_override,
    read_yaml,
)
from distseg.errors import DistsegError
from distseg.shipped import as_typed, find_preset

DECODERS: tuple[str, ...] = typing.get_args(typing.get_type_hints(ModelConfig)["decoder"])
EXAMPLE = "yaml_configs/study.yaml"
GRID_KEYS = ("model.encoder", "model.decoder", "data.fold", "seed", "output_dir")  # the study sets them, run by run
FIXED_KEYS = ("launch", "processes_per_run")  # of the study itself; the rest says what, not how


@dataclass(frozen=True)
class StudyConfig:
    base: str | Mapping[str, Any]
    """training configuration: a file, its path relative to the study's; the name of a shipped one (covid_ct); its sections"""
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    output_dir: str
    """folder of the study; runs that are done there are not done again"""
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] | Mapping[str, Any] = ()
    """changes to the training configuration, for all runs: section.key=value, or a mapping"""
    split: Literal["val", "test"] = "val"
    """whose patients are scored"""
    test: bool = False
    """scores the test patients too"""
    launch: str | tuple[str, ...] | None = None
    """words that start a training, before distseg/train.py; {processes} is processes_per_run. None: accelerate launch with
    launch/gpu.yaml, or launch/cpu.yaml where there is no GPU"""
    processes_per_run: int = 1
    """ranks of a training, and GPUs"""
    executor: str = "local"
    """what the runs are done by: local (this machine), slurm (an array of jobs), or tcp://host:port (a dask scheduler)"""
    workers: int | None = None
    """runs at a time on this machine; None: as many as its GPUs allow, one without GPUs"""
    sbatch_options: tuple[str, ...] = ()
    """more words for sbatch, such as --partition=gpu, or --gpus-per-node=0 where there are none"""

    def __post_init__(self) -> None:
        for name in ("encoders", "decoders", "folds", "seeds"):
            values = getattr(self, name)
            _require(len(values) > 0, name, "[]", "at least one is needed")
            _require(len(set(values)) == len(values), name, list(values), "each may be there once")
        for name in self.decoders:
            _require(name in DECODERS, "decoders", name, f"must be of {', '.join(DECODERS)}")
        _require(self.processes_per_run >= 1, "processes_per_run", self.processes_per_run, "must be at least 1")
        _require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1")
        known = self.executor in ("local", "slurm") or "://" in self.executor
        _require(known, "executor", self.executor, "must be local, slurm or tcp://host:port of a dask scheduler")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.split, "test") if self.test else (self.split,)))

    @property
    def launch_words(self) -> tuple[str, ...] | None:
        if self.launch is None:
            return None
        words = shlex.split(self.launch) if isinstance(self.launch, str) else self.launch
        return tuple(word.replace("{processes}", str(self.processes_per_run)) for word in words)


@dataclass(frozen=True)
class Run:
    index: int
    """in the order of the grid"""
    name: str
    config: Config

    @property
    def fingerprint(self) -> str:
        """Of all that the run's result depends on: the same where only its place or its pace is another."""
        kept = {key: value for key, value in comparable(self.config.to_dict()).items() if not _is_free(key)}
        grid = (self.config.model.encoder, self.config.model.decoder, self.config.data.fold, self.config.seed)
        return hashlib.sha256(json.dumps([kept, grid], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    settings: StudyConfig
    base: Config
    """with the overrides"""

    @property
    def root(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def runs(self) -> list[Run]:
        """Encoder x decoder x fold x seed.

        Raises:
            DistsegError: a pair that the base configuration does not fit.
        """
        s = self.settings
        grid = itertools.product(s.folds, s.seeds, s.encoders, s.decoders)  # a whole table of pairs first
        runs = [self._run(index, *cell) for index, cell in enumerate(grid)]
        names = [run.name for run in runs]
        for name in names:
            _require(names.count(name) == 1, "grid", name, "two runs would share a folder")
        return runs

    def to_dict(self) -> dict[str, Any]:
        """The study with its base written out, as YAML can hold it; `load_study` reads it back to an equal one."""
        values = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        return values | {"base": self.base.to_dict(), "overrides": []}

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    def _run(self, index: int, fold: int, seed: int, encoder: str, decoder: str) -> Run:
        model = dataclasses.replace(self.base.model, encoder=encoder, decoder=decoder)  # type: ignore[arg-type]
        name = re.sub(r"[^\w.-]", "_", f"{model.decoder}_{encoder}_fold{fold}_seed{seed}")
        data = dataclasses.replace(self.base.data, fold=fold)
        out = str(self.root / "runs" / name)
        return Run(index, name, dataclasses.replace(self.base, model=model, data=data, seed=seed, output_dir=out))


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study's YAML (a file, or the name of a shipped one), then applies `key=value` overrides of it and `section.key=value` ones of all its trainings.

    Raises:
        DistsegError: a file is missing, a key unknown or set by the grid, a value of the wrong type or range.
    """
    path = find_preset(path, "study file")
    values = read_yaml(path, "study file", EXAMPLE)
    own, training = _sorted_overrides(overrides)
    _check_keys(values)
    values |= own
    try:
        settings = pydantic.TypeAdapter(StudyConfig).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise DistsegError(
            f"study {first['loc'][0] if first['loc'] else 'file'}: got {str(first['input'])[:80]}; {first['msg']}; see "
            f"{as_typed(EXAMPLE)}"
        ) from None
    changes = [*_as_overrides(settings.overrides), *training]
    for key in (change.partition("=")[0] for change in changes):
        _require(key not in GRID_KEYS, "overrides", key, "the study sets it for each run; use its own keys")
    if isinstance(settings.base, str):
        base = load_config(find_preset(Path(settings.base), "config file", path.parent), changes)
    else:
        base = load_config(None, [*_as_overrides(settings.base), *changes])
    return Study(settings, base)


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes the runs of two studies (as `Study.to_dict` gives them) incomparable: `key (old -> new)`."""
    one, other = (comparable(study["base"]) | {key: study.get(key) for key in FIXED_KEYS} for study in (before, now))
    found = differences(one, other).items()
    return [f"{key} ({was} -> {becomes})" for key, (was, becomes) in found if not _is_free(key)]


def _is_free(key: str) -> bool:
    """Whether a training key may change half-way."""
    return key in GRID_KEYS or key.startswith(PACE_KEYS)


def _check_keys(keys: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Refuses keys that a study does not have, naming the nearest one of them and of `more`."""
    known = [f.name for f in dataclasses.fields(StudyConfig)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known, *more], n=1, cutoff=0.0)[0]
            raise DistsegError(f"study key: got {key}; no such key; did you mean {near}?")


def _sorted_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Command-line words apart: those of the study (no dot in the key), and those of its trainings."""
    own, training = {}, []
    sections = [f.name for f in dataclasses.fields(Config)]
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] in sections and key not in GRID_KEYS:
            training.append(override)
        else:
            _require(
                key not in GRID_KEYS or key == "output_dir", "override", key, "the study sets it; use its own keys"
            )
            own[key] = read_override(override)[1]
    _check_keys(own, list(flat(Config().to_dict())))
    return own, training


def _as_overrides(changes: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """A mapping, nested or with dotted keys, as section.key=value words."""
    if not isinstance(changes, Mapping):
        return list(changes)
    return [f"{key}={json.dumps(value)}" for key, value in _leaves(changes, Config, "")]


def _leaves(values: Mapping[str, Any], schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys of all values; a mapping that is a value itself (regions) stays whole."""
    fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in values.items():
        section = fields.get(key)
        if isinstance(value, Mapping) and isinstance(section, type) and dataclasses.is_dataclass(section):
            yield from _leaves(value, section, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise DistsegError(f"study {key}: got {value}; {rule}; see {as_typed(EXAMPLE)}")

"""What a study is made of: its YAML, the runs that follow from it, and what may change once it has begun."""

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from distseg.config import Config, Count, Decoder
from distseg.config_files import (
    PACE_KEYS,
    comparable,
    config_keys,
    differences,
    given,
    load_config,
    read_override,
    read_yaml,
    unknown_key,
)
from distseg.errors import DistsegError
from distseg.rules import Rule, checked
from distseg.shipped import as_typed, find_preset

EXAMPLE = "yaml_configs/study.yaml"
GRID_KEYS = ("model.encoder", "model.decoder", "data.fold", "seed", "output_dir")  # the study sets them, run by run
FIXED_KEYS = ("launch", "processes_per_run")  # of the study itself; the rest says what, not how

DIFFERENT = Rule(lambda values: 0 < len(values) == len(set(values)), "a list of one or more, each there once")
SCHEDULER = Rule(lambda word: "://" in word, "tcp://host:port of a dask scheduler")


def _remedy(key: str) -> str:
    return f"see {as_typed(EXAMPLE)}"


def _mistake(key: str, value: str, rule: str) -> DistsegError:
    return DistsegError(f"study {key}: got {value}; {rule}; {_remedy(key)}")


@checked("study", "", _remedy)
@dataclass(frozen=True)
class StudyConfig:
    base: str | Mapping[str, Any]
    """training configuration: a file, its path relative to the study's; the name of a shipped one (covid_ct); its sections"""
    encoders: Annotated[tuple[str, ...], DIFFERENT]
    """timm's names"""
    decoders: Annotated[tuple[Decoder, ...], DIFFERENT]
    """each with each encoder"""
    output_dir: str
    """folder of the study; runs that are done there are not done again"""
    folds: Annotated[tuple[int, ...], DIFFERENT] = (0,)
    """validation folds, a run for each"""
    seeds: Annotated[tuple[int, ...], DIFFERENT] = (0,)
    """a run for each"""
    overrides: tuple[str, ...] | Mapping[str, Any] = ()
    """changes to the training configuration, for all runs: section.key=value, or a mapping"""
    split: Literal["val", "test"] = "val"
    """whose patients are scored"""
    test: bool = False
    """scores the test patients too"""
    launch: str | tuple[str, ...] | None = None
    """words that start a training, before distseg/train.py; {processes} is processes_per_run. None: accelerate launch with
    launch/gpu.yaml, or launch/cpu.yaml where there is no GPU"""
    processes_per_run: Count = 1
    """ranks of a training, and GPUs"""
    executor: Literal["local", "slurm"] | Annotated[str, SCHEDULER] = "local"
    """what the runs are done by: local (this machine), slurm (an array of jobs), or tcp://host:port (a dask scheduler)"""
    workers: Count | None = None
    """runs at a time on this machine; None: as many as its GPUs allow, one without GPUs"""
    sbatch_options: tuple[str, ...] = ()
    """more words for sbatch, such as --partition=gpu, or --gpus-per-node=0 where there are none"""

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
            if names.count(name) > 1:
                raise _mistake("grid", name, "two runs would share a folder")
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
    settings = StudyConfig(**values | own)
    changes = [*_as_overrides(settings.overrides), *training]
    for key in (change.partition("=")[0] for change in changes):
        if key in GRID_KEYS:
            raise _mistake("overrides", key, "the study sets it for each run; use its own keys")
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
            raise unknown_key("study", str(key), [*known, *more])


def _sorted_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Command-line words apart: those of the study (no dot in the key), and those of its trainings."""
    own, training = {}, []
    sections = [f.name for f in dataclasses.fields(Config)]
    for override in overrides:
        key = override.partition("=")[0]
        if key in GRID_KEYS and key != "output_dir":
            raise _mistake("override", key, "the study sets it; use its own keys")
        if key.partition(".")[0] in sections and key != "output_dir":
            training.append(override)
        else:
            own[key] = read_override(override)[1]
    _check_keys(own, config_keys())
    return own, training


def _as_overrides(changes: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """A mapping, nested or with dotted keys, as section.key=value words."""
    if not isinstance(changes, Mapping):
        return list(changes)
    return [f"{key}={json.dumps(value)}" for key, value in given(changes)]

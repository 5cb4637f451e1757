"""The folder of a run: what it was told, what it saw, what it measured. Read without torch, so that mistakes are found at once.

run/  config.yaml  environment.json  cases.json  run_id  metrics.jsonl  score_list.csv  checkpoints/  best/weights.safetensors
      figures/  samples/rank<r>.jsonl  tensorboard/  eval/<split>/  report.html  profile/trace.json
      postprocessing.json (of `distseg evaluate --tune`)  mlflow_run (of that tracker)
      lock (while it trains)  stacks/rank<r>.txt (of a hang)  preempted.json (a signal stopped it)
"""

import contextlib
import json
import shutil
import signal
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from distseg.config import Config
from distseg.config_files import PACE_KEYS, comparable, config_as_yaml, differences, load_config
from distseg.data.store import Store, settled, with_labels
from distseg.errors import DistsegError
from distseg.files import locked, remove_if_empty, write_json, write_text
from distseg.runs.progress import Progress
from distseg.tables import append_rows, read_rows, write_csv, write_rows

# Keys that a resumed run may change: also how long it goes on, and the batch (a step has more or fewer samples then, as on another
# number of ranks; which ones an epoch has, in which order, stays).
FREE_ON_RESUME = (*PACE_KEYS, "train.epochs", "train.max_steps", "train.batch_size_per_rank", "train.patience",
                  "train.max_skipped_steps", "evaluate.", "output_dir")  # fmt: skip

# What the members of an ensemble must agree in: they are given the same image.
SAME_IN_ENSEMBLE = ("data.windows_hu", "data.neighbours", "data.image_size", "data.fit", "data.spacing_mm", "regions")

CASES = "cases.json"  # of a run's splits
SplitCases = Mapping[str, Mapping[str, str]]
"""split -> folder in the store (named after what the case was made from) -> patient"""


@dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def best_weights(self) -> Path:
        return self.root / "best" / "weights.safetensors"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def stacks(self) -> Path:
        return self.root / "stacks"

    @property
    def preempted(self) -> Path:
        return self.root / "preempted.json"

    def patients(self, split: str) -> list[str]:
        """That the run was trained on (train) or validated on (val); none before it has begun."""
        path = self.root / CASES
        return sorted(set(json.loads(path.read_text())[split].values())) if path.is_file() else []

    def seen(self) -> dict[str, list[float]]:
        """Ranges in mm of what training showed, see `Slices.sizes_mm`; none where no case says it, or before the run has begun."""
        path = self.root / "environment.json"
        return json.loads(path.read_text()).get("seen", {}) if path.is_file() else {}

    def samples(self, rank: int) -> Path:
        return self.root / "samples" / f"rank{rank}.jsonl"

    def check_free(self) -> None:
        """Refuses to start afresh over another run."""
        if self.config.exists():
            raise DistsegError(
                f"output_dir: got {self.root}, which holds a run already; nothing is overwritten; add --resume to go on with "
                "it, or choose another output_dir"
            )

    def check_same_run(self, config: Config, store: Store) -> None:
        """Refuses to resume with a configuration, settled with the store, that would make it another run, naming the keys."""
        if not self.config.exists():
            return
        before = settled(load_config(self.config), store)
        found = differences(comparable(before.to_dict()), comparable(config.to_dict()))
        changed = {key: values for key, values in found.items() if not key.startswith(FREE_ON_RESUME)}
        if changed:
            listed = ", ".join(f"{key} ({before} -> {now})" for key, (before, now) in changed.items())
            raise DistsegError(
                f"--resume: got another configuration than {self.config}: {listed}; change back, or start a new run"
            )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, no other process trains into this folder; the lock goes with the process that holds it.

        Raises:
            DistsegError: another one does.
        """
        with contextlib.ExitStack() as held:
            held.callback(remove_if_empty, self.root)  # a start that was refused leaves nothing
            try:
                held.enter_context(locked(self.root / "lock", f"output_dir: got {self.root}"))
            except OSError as error:
                raise DistsegError(
                    f"output_dir: got {self.root}; it must be a folder that can be written ({error.strerror}); choose another"
                ) from None
            yield

    def run_id(self) -> str:
        """Of the run, the same after each resume; "" before it has begun."""
        path = self.root / "run_id"
        return path.read_text().strip() if path.exists() else ""

    def check_same_cases(self, config: Config, cases: SplitCases) -> None:
        """Refuses to go on with other patients than the run began with, or with other files of them."""
        path = self.root / CASES
        if path.is_file() and json.loads(path.read_text()) != cases:
            raise DistsegError(
                f"data.store: got {config.data.store}, whose cases are no longer those of {path}; a resumed run keeps those it "
                "began with; prepare the store as it was, or start a new run"
            )

    def begin(
        self,
        config: Config,
        progress: Progress,
        cases: SplitCases,
        environment: Mapping[str, Any],
    ) -> None:
        """Writes what the run is, and drops what was logged after `progress` so that no line is repeated or lost.

        Args:
            config, progress: of the run.
            cases: of its splits.
            environment: what the run is made with, see `describe_environment`.

        Raises:
            DistsegError: it began with other patients, or with other files of them.
        """
        self.check_same_cases(config, cases)
        write_json(self.root / CASES, cases)
        if not self.run_id():
            write_text(self.root / "run_id", uuid.uuid4().hex + "\n")
        write_json(self.root / "environment.json", environment)
        for path in [self.metrics, *self.root.glob("samples/rank*.jsonl")]:
            rows = [row for row in read_rows(path) if _is_before(row, progress)]
            write_rows(path, rows)
        write_text(self.config, config_as_yaml(config))
        self.preempted.unlink(missing_ok=True)
        for leftover in [*self.checkpoints.glob(".partial-*"), *self.checkpoints.glob(".old-*")]:
            shutil.rmtree(leftover, ignore_errors=True)  # of a start that was killed

    def mark_preempted(self, signum: int, step: int) -> str:
        """Writes preempted.json, by which a job script knows that the run wants to go on; gives the user's line."""
        name = signal.Signals(signum).name
        write_json(self.preempted, {"signal": name, "step": step})
        return f"{self.root}: stopped by {name} after step {step}, which is saved; go on with --resume"

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        append_rows(self.metrics, rows)

    def write_score_list(self) -> None:
        """score_list.csv: one row a validation, the same figures as in metrics.jsonl."""
        rows = [row for row in read_rows(self.metrics) if row["split"] == "val"]
        table = [
            {"epoch": row["epoch"], "step": row["step"], "loss": row["loss"], "mean_dice": row["mean_dice"]}
            | {f"dice_{region}": value for region, value in row["dice"].items()}
            for row in rows
        ]
        write_csv(self.root / "score_list.csv", table)


def open_run(root: Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, Config]:
    """A finished or running run that has a best model, and its configuration with `overrides` on top.

    Raises:
        DistsegError: no run there, or none of its validations has happened yet.
    """
    folder = RunFolder(root)
    if not folder.config.is_file():
        raise DistsegError(
            f"run: got {root} without config.yaml; it must be a run folder; see output_dir of its config (to score a folder of "
            "masks, give its --store)"
        )
    if not folder.best_weights.is_file():
        raise DistsegError(f"run: got {root} without best/weights.safetensors; train it for at least one epoch first")
    config = load_config(folder.config, overrides)
    if not config.labels and (known := best_metadata(folder).get("labels")):  # of an earlier distseg
        config = with_labels(config, json.loads(known), str(folder.best_weights))
    return folder, config


def check_members(members: Sequence[tuple[RunFolder, Config]]) -> None:
    """Refuses runs that cannot be averaged.

    Raises:
        DistsegError: a run that sees other images, or has other regions, than the first.
    """
    (first, config), *others = members
    for folder, other in others:
        for key, (mine, theirs) in differences(comparable(config.to_dict()), comparable(other.to_dict())).items():
            if key.startswith(SAME_IN_ENSEMBLE):
                raise DistsegError(
                    f"--ensemble: got {folder.root} with {key} {theirs}; {first.root} has {mine}; members must see the same "
                    "images and have the same regions in the same order"
                )


def best_metadata(folder: RunFolder) -> dict[str, str]:
    """The text in the header of the best weights: step, mean Dice, labels of the store."""
    with safe_open(folder.best_weights, "numpy") as file:  # no tensor is read, and torch is not waited for
        return dict(sorted((file.metadata() or {}).items()))  # safetensors gives them in any order


def _is_before(row: dict[str, Any], progress: Progress) -> bool:
    """Whether a logged line is of what `progress` has behind it."""
    to_come = row["step"] == progress.step and progress.to_validate and row.get("split") == "val"
    return row["step"] <= progress.step and not to_come

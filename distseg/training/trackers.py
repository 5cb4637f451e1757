"""Where metrics go besides metrics.jsonl: TensorBoard, W&B and MLflow, by way of Accelerate.

A resumed run goes on in the tracker's same run, and gives it no point twice: TensorBoard drops what comes after the
resumed step, W&B passes over steps that it has (their values are the same bits), MLflow is asked how far it is.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distseg.errors import DistsegError
from distseg.files import write_text
from distseg.ranks import on_main
from distseg.runs.folder import RunFolder

logger = logging.getLogger(__name__)

FIGURES = ("loss", "bce", "lr", "slices_per_s", "mean_dice")


class Trackers:
    """Those of `train.trackers`, which the accelerator was made with; only rank 0 writes."""

    def __init__(self, accelerator: Accelerator, folder: RunFolder, step: int) -> None:
        """Starts them.

        Args:
            accelerator, folder: of the run.
            step: optimizer steps done; what was logged after it comes again.

        Raises:
            DistsegError: a tracker cannot be started.
        """
        self.accelerator = accelerator
        self._step_of_mlflow = on_main(accelerator, lambda: self._start(folder, step))

    def _start(self, folder: RunFolder, step: int) -> int:
        """On rank 0; gives the last step that MLflow has."""
        known = folder.root / "mlflow_run"
        settings: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"id": folder.run_id(), "resume": "allow", "name": folder.root.name, "dir": str(folder.root)},
            "mlflow": {"run_name": folder.root.name, "run_id": known.read_text() if known.exists() else None},
        }
        try:
            self.accelerator.init_trackers("distseg", init_kwargs=settings)
            names = [tracker.name for tracker in self.accelerator.trackers]
            return _start_mlflow(self.accelerator, known) if "mlflow" in names else 0
        except Exception as error:  # each tracker has its own
            raise DistsegError(
                f"train.trackers: got {error}; each must be within reach; mend it or leave it out"
            ) from error

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Passes on rows of metrics.jsonl; a tracker that fails costs a warning."""
        for row in rows:
            split = row["split"]
            values = {f"{split}/{key}": row[key] for key in FIGURES if row.get(key) is not None}
            values |= {f"{split}/dice/{name}": value for name, value in row["dice"].items() if value is not None}
            for tracker in self.accelerator.trackers:
                if tracker.name == "mlflow" and row["step"] <= self._step_of_mlflow:
                    continue
                try:
                    tracker.log(values, step=row["step"])
                except Exception as error:  # a full disk, a server that is gone: each tracker has its own
                    logger.warning(
                        "tracker %s: not written (%s); metrics.jsonl has it, training goes on", tracker.name, error
                    )


def _start_mlflow(accelerator: Accelerator, known: Path) -> int:
    """Notes which MLflow run it is; gives the last step that it has."""
    from mlflow import MlflowClient

    run = accelerator.get_tracker("mlflow", unwrap=True)
    write_text(known, run.info.run_id)
    history = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    return max((point.step for point in history), default=0)

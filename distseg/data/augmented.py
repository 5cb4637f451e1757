"""The picture behind `distseg preview`: augmented slices with their labels, and what each colour is."""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from distseg.config import Config
from distseg.data.pipeline import Batch, build_train_loader, build_val_loader
from distseg.data.plan import Plan
from distseg.data.store import Slices, Store, open_store, rarest_region, settled
from distseg.pictures import draw_legend, draw_outlines, draw_slice, save_figure

SLICE_IN = 2.4  # width of a slice


def draw_preview(config: Config, path: Path, n_slices: int, n_epochs: int) -> int:
    """Draws training slices (those with the focus region first), unchanged and as the loader gives them; says how many there were.

    Raises:
        DistsegError: no such store, fold or slice.
    """
    store = open_store(Path(config.data.store))
    config = settled(config, store)
    slices = _telling_slices(config, store, n_slices)
    plan = Plan(len(slices), len(slices))
    device = torch.device("cpu")
    focus = config.region_labels[_focus_region(config, store)]
    unchanged = list(islice(build_val_loader(config.data, slices, plan, device), 1))
    loader = build_train_loader(config.data, slices, plan, config.seed, device, focus_labels=focus)
    columns = [_kept(batch, config) for batch in (*unchanged, *islice(loader, n_epochs))]
    width_in = SLICE_IN * len(columns)
    figure = Figure(figsize=(width_in, (SLICE_IN + 0.1) * len(slices) + 0.3), layout="constrained")
    axes = figure.subplots(len(slices), len(columns), squeeze=False)
    for column, (images, labels) in enumerate(columns):
        for row, files in enumerate(slices):
            title = files.id if column == 0 else f"epoch {column - 1}"
            draw_slice(axes[row, column], images[row], title, SLICE_IN * 0.95, 7, vmin=0, vmax=1)
            draw_outlines(axes[row, column], labels[row])
    draw_legend(figure, store.labels, width_in, 7)
    save_figure(figure, path)
    return len(slices)


def _telling_slices(config: Config, store: Store, n_slices: int) -> Slices:
    """Evenly chosen among the training slices with the focus region, or among all where none has it."""
    slices = store.slices_of_split("train", config.data.fold)
    found = slices.holding([*map(str, config.regions[_focus_region(config, store)])])
    places = found if len(found) else np.arange(len(slices))
    chosen = places[np.linspace(0, len(places) - 1, min(n_slices + 2, len(places))).astype(int)]
    return Slices(store.root, slices.cases, np.unique(chosen)[1:-1] if len(chosen) > n_slices else np.unique(chosen))


def _focus_region(config: Config, store: Store) -> str:
    return config.data.focus_region or rarest_region(config, store)


def _kept(batch: Batch, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) or (N, H, W, 3) of the middle slice, and labels, that outlive the loader's buffers."""
    n_windows = len(config.data.windows_hu)
    of_window = batch.image_BCHW.unflatten(1, (n_windows, -1))[:, :, config.data.neighbours]
    shown = of_window.movedim(1, -1) if n_windows == 3 else of_window[:, 0]
    return shown.numpy().copy(), batch.label_BHW.numpy().copy()

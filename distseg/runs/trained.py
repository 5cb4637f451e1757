"""What a finished run gives: its best weights as a network, alone, averaged with others', or to start from."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distseg.config import Config
from distseg.errors import DistsegError
from distseg.files import written_aside
from distseg.models.averaging import build_views
from distseg.models.network import SegmentationNetwork, build_model
from distseg.models.segmenter import HuSegmenter, build_segmenter
from distseg.runs.folder import RunFolder, check_members, open_run


def save_best(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes contiguous weights as safetensors with text beside them in its header, atomically."""
    with written_aside(path) as aside:
        save_file(state, aside, metadata)


def load_best(folder: RunFolder, config: Config, depth: int | None = None) -> tuple[SegmentationNetwork, HuSegmenter]:
    """The network with the run's best weights, in eval mode, alone and inside its segmenter.

    Args:
        folder, config: the run.
        depth: Unet++ cut at this depth, which deep supervision has to have trained; None: all of it.
    """
    model = dataclasses.replace(config.model, encoder_weights=None)
    network = build_model(model, config.data.channels, len(config.regions), depth)
    try:
        state = load_file(folder.best_weights)
        network.load_state_dict({key: state[key] for key in network.state_dict()} if depth else state)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DistsegError(
            f"weights {folder.best_weights}: damaged or of another model ({reason}); train again"
        ) from None
    if config.model.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network.eval(), _segmenter([config], [network])


def load_ensemble(members: Sequence[tuple[RunFolder, Config]], depth: int | None = None) -> HuSegmenter:
    """The segmenter of the first run, whose probabilities are those of all the runs on average.

    Args:
        members: the runs.
        depth: each network cut at this depth, see `load_best`.

    Raises:
        DistsegError: a run that sees other images, or has other regions, than the first.
    """
    check_members(members)
    return _segmenter([config for _, config in members], [load_best(*member, depth)[0] for member in members])


def _segmenter(configs: Sequence[Config], networks: Sequence[SegmentationNetwork]) -> HuSegmenter:
    """Of networks that were trained as these configurations say; the first one's are used, too."""
    config = configs[0]
    stride = max(network.stride for network in networks)
    segmenter = build_segmenter(
        build_views(networks, config.evaluate, [each.data.augment for each in configs], stride),
        stride=stride,
        windows_hu=config.data.windows_hu,
        n_slices=2 * config.data.neighbours + 1,
        image_size=config.data.image_size,
        fit=config.data.fit,
        threshold=config.evaluate.threshold,
        regions=config.region_labels,
        spacing_mm=config.data.spacing_mm,
    )
    return segmenter.eval()


def start_from_run(network: SegmentationNetwork, run: Path, regions: Mapping[str, Sequence[int | str]]) -> None:
    """Loads another run's best weights; heads that were trained for other regions are left as they are.

    Args:
        network: to load into.
        run: folder of the other run.
        regions: what the network's logits are of, by the names of their labels.

    Raises:
        DistsegError: no such run, or a network of another encoder, decoder or number of channels.
    """
    folder, other = open_run(run)
    same_heads = list(other.regions.items()) == list(regions.items())
    own = {key: tensor for key, tensor in network.state_dict().items() if same_heads or not key.startswith("heads.")}
    try:
        state = load_file(folder.best_weights)
    except SafetensorError as error:
        raise DistsegError(f"weights {folder.best_weights}: damaged ({error}); train that run again") from None
    kept = {key: tensor for key, tensor in state.items() if key in own and own[key].shape == tensor.shape}
    if missing := [key for key in own if key not in kept and not key.startswith("heads.")]:
        raise DistsegError(
            f"model.start_from: got {run}, which lacks {len(missing)} of {len(own)} tensors or has them in another shape "
            f"({missing[0]} ...); it must be of the same encoder, decoder and channels"
        )
    network.load_state_dict(kept, strict=False)

"""Writes a segmenter to TorchScript, to AOTInductor's package or to ONNX. standalone.py reads them."""

import contextlib
import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from distseg.errors import DistsegError
from distseg.models.averaging import ReducedPrecision
from distseg.models.network import SegmentationNetwork
from distseg.models.segmenter import HuSegmenter
from distseg.serving.description import ModelDescription
from distseg.serving.standalone import METADATA

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OPSET = 20  # of ONNX: the first with every resize that is used here


def networks_of(segmenter: HuSegmenter) -> dict[str, SegmentationNetwork]:
    """The networks inside, by their place; several in an ensemble."""
    return {name: part for name, part in segmenter.named_modules() if isinstance(part, SegmentationNetwork)}


def in_precision(segmenter: HuSegmenter, precision: str) -> HuSegmenter:
    """A copy whose networks compute in bfloat16 or float16."""
    reduced = copy.deepcopy(segmenter)
    for name, network in networks_of(reduced).items():
        reduced.set_submodule(name, ReducedPrecision(network, PRECISIONS[precision]))
    return reduced.eval()


def write_torchscript(segmenter: HuSegmenter, path: Path, described: ModelDescription, device: torch.device) -> None:
    """Traces each network, scripts the segmenter around them: a traced segmenter would bake one input's padding in."""
    side = 2 * segmenter.stride
    channels = len(segmenter.low_hu) * segmenter.n_slices
    # Whoever loads it says where it runs, and never trains it.
    scriptable = copy.deepcopy(segmenter).cpu().requires_grad_(False)
    with warnings.catch_warnings(), torch.inference_mode():
        # torch 2.14 calls TorchScript deprecated; it is what C++ and Triton's pytorch backend load.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, network in networks_of(scriptable).items():
            image_BCHW = torch.zeros(1, channels, side, side, dtype=network.mean_C11.dtype)
            scriptable.set_submodule(name, torch.jit.trace(network, image_BCHW, check_trace=False))
        scripted = torch.jit.script(scriptable)
        if described.frozen:
            scripted = torch.jit.freeze(scripted, preserved_attrs=["n_slices"])
        scripted.save(str(path), _extra_files={METADATA: described.as_json()})


def write_aot_inductor(segmenter: HuSegmenter, path: Path, described: ModelDescription, device: torch.device) -> None:
    """Compiles the segmenter to a library for this machine's kind of processor.

    Raises:
        DistsegError: there is no C++ compiler.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise DistsegError("--format: got pt2 without a C++ compiler to make it with; install g++, or set CXX")
    settings = {"aot_inductor.metadata": {METADATA: described.as_json()}}
    with _quiet(), torch.no_grad():
        program = _exported(segmenter, described, device)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def write_onnx(segmenter: HuSegmenter, path: Path, described: ModelDescription, device: torch.device) -> None:
    """Writes the segmenter for ONNX Runtime and whatever else reads ONNX, its weights inside."""
    with _quiet(), torch.no_grad():
        program = _exported(segmenter, described, torch.device("cpu"))
        written = torch.onnx.export(
            program, input_names=["HU"], output_names=["MASK", "PROB"], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert written is not None  # it is None where a path is given to export
    written.model.metadata_props[METADATA] = described.as_json()
    written.save(str(path))


Writer = Callable[[HuSegmenter, Path, ModelDescription, torch.device], None]
WRITERS: dict[str, Writer] = {"torchscript": write_torchscript, "pt2": write_aot_inductor, "onnx": write_onnx}


def _exported(
    segmenter: HuSegmenter, described: ModelDescription, device: torch.device
) -> torch.export.ExportedProgram:
    """The segmenter's graph for any number of slices of one size."""
    assert described.input is not None
    _, *shape = described.input.shape
    hu_BCHW = torch.zeros(2, *map(int, shape), dtype=torch.int16, device=device)
    batch = torch.export.Dim("N", min=1)
    whole = copy.deepcopy(segmenter).to(device)
    return torch.export.export(whole, (hu_BCHW,), dynamic_shapes=({0: batch},))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what compilers say about themselves."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

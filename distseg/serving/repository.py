"""Triton model repositories of an exported model, made from its metadata and never edited by hand.

    model_repository/distseg/         config.pbtxt  1/model.pt             pytorch_libtorch: GPUs in production
    model_repository_python/distseg/  config.pbtxt  1/model.pt  model.py   python backend: wherever torch is, CPUs too

Both take HU and give MASK and PROB, so a client does not see which one answers.
"""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distseg.serving.description import ModelDescription

MODEL_NAME = "distseg"
METADATA = "distseg.json"  # among the parameters; standalone.py has its twin, whose torch `distseg serve --help` must not wait for
PYTORCH_REPOSITORY, PYTHON_REPOSITORY = "model_repository", "model_repository_python"
MAX_BATCH = 8
PREFERRED_BATCHES = (4, 8)
WARM_UP_SIDE = 512  # pixels; what CT scanners write
WARM_UP_CALLS = 3  # TorchScript watches two calls, then optimises

COMMON = """\
name: "{name}"
# Slices in one execution; dims are those of one slice, -1 is any size.
max_batch_size: {max_batch}
input [
  {{ name: "HU" data_type: TYPE_INT16 dims: [ {n_slices}, -1, -1 ] }}{pixel_mm}
]
output [
  {{ name: "MASK" data_type: TYPE_UINT8 dims: [ 1, -1, -1 ] }},
  {{ name: "PROB" data_type: TYPE_FP32 dims: [ {n_regions}, -1, -1 ] }}
]
# Requests of one size are put together; one that is alone waits at most this long for company.
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: 2000
}}
# What the model is: regions, labels, windows, verification.
parameters {{ key: "{metadata_key}" value {{ string_value: {metadata} }} }}
"""
# The backend matches names with positions: HU is neither forward's argument nor NAME__INDEX, so inputs and outputs are
# taken in the order of this file, which is that of forward.
LIBTORCH = """\
backend: "pytorch"
platform: "pytorch_libtorch"
# One on each GPU: a second one would share the same multiprocessors.
instance_group [ { kind: KIND_GPU count: 1 } ]
# No version counters and no graph for gradients.
parameters { key: "INFERENCE_MODE" value { string_value: "true" } }
# The graph is cleaned up once; the calls that this takes are among those of the warm-up.
parameters { key: "DISABLE_OPTIMIZED_EXECUTION" value { string_value: "false" } }
# It would compile kernels for each batch and size that it has not seen, while a request waits; convolutions are cuDNN's.
parameters { key: "ENABLE_TENSOR_FUSER" value { string_value: "false" } }
# Whoever raises count above has the weights once on each GPU.
parameters { key: "ENABLE_WEIGHT_SHARING" value { string_value: "true" } }
"""
PYTHON = """\
backend: "python"
# A GPU where there is one, else the CPU.
instance_group [ { kind: KIND_AUTO count: 1 } ]
"""
WARM_UP = """\
model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  count: {calls}
  inputs {{ key: "HU" value {{ data_type: TYPE_INT16 dims: [ {n_slices}, {side}, {side} ] zero_data: true }} }}{pixel_mm}
}}
"""
# Sizes of a slice's pixels in mm, down and across: a second input of models with a spacing_mm.
PIXEL_MM = ',\n  { name: "PIXEL_MM" data_type: TYPE_FP32 dims: [ 2 ] }'
WARM_UP_PIXEL_MM = (
    '\n  inputs { key: "PIXEL_MM" value { data_type: TYPE_FP32 dims: [ 2 ] input_data_file: "pixel_mm" } }'
)


def write_repositories(out: Path, described: "ModelDescription") -> None:
    """Writes both repositories beside the model.

    Args:
        out: folder with the model.pt that they serve.
        described: what is in model.json.
    """
    # cuDNN chooses its algorithms, and memory is reserved, for each batch anew; a CPU does neither.
    gpu = _write_model(out, PYTORCH_REPOSITORY, config_text(described, LIBTORCH, (1, *PREFERRED_BATCHES)))
    python = _write_model(out, PYTHON_REPOSITORY, config_text(described, PYTHON, (1,)))
    for version in (gpu, python):
        if described.takes_pixel_mm:  # what the warm-up sends: the sizes that become the largest image
            side_mm = struct.pack("<2f", described.spacing_mm, described.spacing_mm)
            (version.parent / "warmup").mkdir()
            (version.parent / "warmup/pixel_mm").write_bytes(side_mm)
        _link_or_copy(out / "model.pt", version / "model.pt")
    shutil.copyfile(Path(__file__).with_name("python_backend.py"), python / "model.py")


def config_text(described: "ModelDescription", backend: str, warm_up_batches: tuple[int, ...]) -> str:
    """A model's config.pbtxt.

    Args:
        described: what is in model.json.
        backend: the part that only this backend has.
        warm_up_batches: executed before the model is said to be ready.
    """
    assert described.input is not None
    n_slices = described.input.shape[1]
    common = COMMON.format(
        name=MODEL_NAME,
        max_batch=MAX_BATCH,
        n_slices=n_slices,
        pixel_mm=PIXEL_MM if described.takes_pixel_mm else "",
        n_regions=len(described.regions),
        preferred=", ".join(map(str, PREFERRED_BATCHES)),
        metadata_key=METADATA,
        metadata=json.dumps(described.as_json()),  # ASCII; a JSON string is a string of the text format
    )
    warm_up = [
        WARM_UP.format(
            batch=batch,
            calls=WARM_UP_CALLS,
            n_slices=n_slices,
            side=WARM_UP_SIDE,
            pixel_mm=WARM_UP_PIXEL_MM if described.takes_pixel_mm else "",
        )
        for batch in warm_up_batches
    ]
    return common + backend + "".join(warm_up)


def _write_model(out: Path, repository: str, config: str) -> Path:
    """Writes config.pbtxt and gives the empty folder of version 1."""
    version = out / repository / MODEL_NAME / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config)
    return version


def _link_or_copy(source: Path, target: Path) -> None:
    """One file under two names where the file system can, else a copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)

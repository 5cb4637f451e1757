"""Exported files in a process without distseg: what a service needs to run one, and the script that verifies them.

python standalone.py MODEL INPUTS.pt OUTPUTS.pt DEVICE THREADS
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

METADATA = "distseg.json"  # name of the metadata inside each file

Run = Callable[..., Any]  # of HU, and of sizes of pixels where the model takes them


class ExportedModel:
    """A file that was read: int16 HU (N, C, H, W) to labels uint8 (N, 1, H, W) and probabilities float32 (N, R, H, W).

    Attributes:
        metadata: What model.json says too, but for the verification.
        n_slices: C, a slice between its neighbours.
    """

    def __init__(self, run: Run, metadata: dict[str, Any]) -> None:
        self._run = run
        self.metadata = metadata
        _, self.n_slices, *self._size = metadata["input"]["shape"]

    def __call__(
        self, hu_BCHW: torch.Tensor, pixel_mm_B2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments slices on the device that the file was loaded for.

        Args:
            hu_BCHW: int16 HU.
            pixel_mm_B2: float32, sizes of pixels, down and across, where `metadata` has a spacing_mm and no pixel_mm.

        Raises:
            ValueError: of another type or shape. Compiled files do not check it: they would read past their arrays.
        """
        sizes = zip((self.n_slices, *self._size), hu_BCHW.shape[1:], strict=False)
        fits = hu_BCHW.dim() == 4 and all(wanted in (got, "H", "W") for wanted, got in sizes)
        if hu_BCHW.dtype != torch.int16 or hu_BCHW.numel() == 0 or not fits:
            wanted = ", ".join(map(str, ("N", self.n_slices, *self._size)))
            raise ValueError(
                f"input: got {hu_BCHW.dtype} {tuple(hu_BCHW.shape)}; this model takes int16 ({wanted}), none of them 0; "
                "export it with --size for another, or as TorchScript for any"
            )
        mask, probability = self._run(hu_BCHW) if pixel_mm_B2 is None else self._run(hu_BCHW, pixel_mm_B2)
        return mask, probability


def load(path: Path, device: torch.device) -> ExportedModel:
    """Reads a model.pt, model.pt2 or model.onnx.

    Raises:
        RuntimeError, ValueError: damaged, not made by distseg, or compiled for another device.
        ImportError: onnxruntime is not installed.
    """
    if path.suffix not in LOADERS:
        raise ValueError(f"got {path.name}; it must end in one of {', '.join(LOADERS)}")
    run, text = LOADERS[path.suffix](path, device)
    if not text:
        raise ValueError(f"without {METADATA}; it must come from `distseg export`")
    try:
        metadata = json.loads(text)
        compiled_for, model = metadata["device"], ExportedModel(run, metadata)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"its {METADATA} is damaged: {error!r}") from None
    if compiled_for not in (device.type, "any"):
        raise ValueError(f"compiled for {compiled_for}, not for {device.type}; export it on such a machine")
    return model


def _load_torchscript(path: Path, device: torch.device) -> tuple[Run, str]:
    extra = {METADATA: ""}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.14 calls TorchScript deprecated
        model = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    return model.eval(), extra[METADATA]


def _load_aot_inductor(path: Path, device: torch.device) -> tuple[Run, str]:
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(path))
    return model, model.get_metadata().get(METADATA, "")


def _load_onnx(path: Path, device: torch.device) -> tuple[Run, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # its own kinds, which have no other base
        raise ValueError(str(error)) from None

    def run(hu_BCHW: torch.Tensor) -> list[torch.Tensor]:
        outputs = session.run(["MASK", "PROB"], {"HU": hu_BCHW.cpu().numpy()})
        return [torch.from_numpy(output).to(hu_BCHW.device) for output in outputs]

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA, "")


LOADERS = {".pt": _load_torchscript, ".pt2": _load_aot_inductor, ".onnx": _load_onnx}


def main() -> None:
    sys.modules["distseg"] = None  # type: ignore[assignment]  # any import of it raises
    model, inputs, outputs, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    segment = load(Path(model), torch.device(device))
    with torch.inference_mode():
        results = [segment(*(one.to(device) for one in given)) for given in torch.load(inputs, weights_only=True)]
    torch.save([(mask.cpu(), probability.cpu()) for mask, probability in results], outputs)


if __name__ == "__main__":
    main()

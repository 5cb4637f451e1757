"""An exported model behind Triton's python backend: written into the repository as model.py; needs torch, not distseg."""

import warnings
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # only there inside the server
from torch.utils.dlpack import from_dlpack, to_dlpack


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model.pt that lies beside this file to the device that the server gave this instance."""
        gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if gpu else torch.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 calls TorchScript deprecated
            self.model = torch.jit.load(str(Path(__file__).with_name("model.pt")), map_location=self.device)

    @torch.inference_mode()
    def execute(self, requests: list[Any]) -> list[Any]:
        """Segments the slices of all requests in one call, or where one of them is refused each alone.

        The server only puts slices of one size together; their pixels may be of several.

        Arrays travel as DLPack: under NumPy 2 `pb_utils.Tensor(name, array)` sends no bytes and calls it success
        (seen in 2.51.0).
        """
        hu_BCHW = [from_dlpack(pb_utils.get_input_tensor_by_name(one, "HU").to_dlpack()) for one in requests]
        if any(part.numel() == 0 for part in hu_BCHW):
            reason = f"HU: got shape {tuple(hu_BCHW[0].shape)}; no size may be 0; send at least one pixel"
            error = pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG)
            return [pb_utils.InferenceResponse(error=error) for _ in requests]
        sizes_mm = [
            pb_utils.get_input_tensor_by_name(one, "PIXEL_MM") for one in requests
        ]  # of models with a spacing_mm
        parts = [hu_BCHW, *([[from_dlpack(one.to_dlpack()) for one in sizes_mm]] if sizes_mm[0] is not None else [])]
        try:
            mask, probability = self.model(*(torch.cat(part).to(self.device) for part in parts))
        except torch.jit.Error as error:
            if len(requests) > 1:
                return [response for one in requests for response in self.execute([one])]
            reason = str(error).strip().splitlines()[-1]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG))]
        sizes = [len(part) for part in hu_BCHW]
        masks, probabilities = mask.cpu().split(sizes), probability.cpu().split(sizes)
        return [
            _response(one, {"MASK": masks[index], "PROB": probabilities[index]}) for index, one in enumerate(requests)
        ]


def _response(request: Any, outputs: dict[str, torch.Tensor]) -> Any:
    """Those outputs that the request asks for: what it does not ask for would be copied all the same."""
    asked = request.requested_output_names()
    return pb_utils.InferenceResponse([_output(name, values) for name, values in outputs.items() if name in asked])


def _output(name: str, values: torch.Tensor) -> Any:
    return pb_utils.Tensor.from_dlpack(name, to_dlpack(values.contiguous()))

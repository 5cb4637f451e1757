"""A model on a Triton server, called like a local one.

Shapes: B batch, C slices around one, R regions, H rows, W columns.
"""

import importlib
import json
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar

import torch

from distseg.errors import DistsegError
from distseg.serving.repository import METADATA, MODEL_NAME
from distseg.serving.source import parse_address

Answer = TypeVar("Answer")
UNREACHABLE, LATE = "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"


class RemoteSegmenter:
    """Sends slices to a server and gives what a local segmenter gives for the same batches. For use by one thread.

    Args:
        address: grpc://host:port or http://host:port.
        model: name on the server.
        version: of the model; "": the one that the server takes.
        timeout_s: an answer has to come within.

    Raises:
        DistsegError: no such address, nobody there, not ready, no such model or version, or not a model of distseg.
    """

    n_slices: int
    """of the input: a slice and its neighbours"""
    metadata: dict[str, Any]
    """what is in the exported model's model.json"""
    probabilities: bool = True
    """whether they are asked for: they are most of an answer's bytes. False: they are given with R = 0"""

    def __init__(self, address: str, model: str = MODEL_NAME, version: str = "", timeout_s: float = 300.0):
        scheme, place = parse_address(address)
        self._address, self._model, self._version, self._timeout_s = address, model, version, timeout_s
        self._library = importlib.import_module(f"tritonclient.{scheme}")
        if scheme == "http":  # one library takes the limit once, the other with each call
            limits, self._limit = {"connection_timeout": timeout_s, "network_timeout": timeout_s}, {}
        else:
            limits, self._limit = {}, {"client_timeout": timeout_s}
        self._client = self._library.InferenceServerClient(place, **limits)
        config = self._config()
        self._max_batch = int(config["max_batch_size"])
        self.metadata = json.loads(config["parameters"][METADATA]["string_value"])
        self.n_slices = self.metadata["input"]["shape"][1]

    def __call__(
        self, hu_BCHW: torch.Tensor, pixel_mm_B2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments slices, as many in one request as the server takes.

        Args:
            hu_BCHW: int16 HU; C = n_slices.
            pixel_mm_B2: float32, sizes of pixels, down and across, where `metadata` has a spacing_mm.

        Returns:
            mask: uint8 labels (B, 1, H, W).
            probability: float32 (B, R, H, W), both in the CPU's memory.

        Raises:
            DistsegError: the server refuses them or is lost.
        """
        given = [hu_BCHW] if pixel_mm_B2 is None else [hu_BCHW, pixel_mm_B2]
        batches = (one.cpu().split(self._max_batch) for one in given)
        parts = [self._segment(*part) for part in zip(*batches, strict=True)]
        return torch.cat([mask for mask, _ in parts]), torch.cat([probability for _, probability in parts])

    def _segment(
        self, hu_BCHW: torch.Tensor, pixel_mm_B2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def infer() -> Any:
            inputs = [self._library.InferInput("HU", list(hu_BCHW.shape), "INT16")]
            inputs[0].set_data_from_numpy(hu_BCHW.numpy())
            if pixel_mm_B2 is not None:
                inputs.append(self._library.InferInput("PIXEL_MM", list(pixel_mm_B2.shape), "FP32"))
                inputs[1].set_data_from_numpy(pixel_mm_B2.numpy())
            outputs = [self._library.InferRequestedOutput(name) for name in names]
            return self._client.infer(self._model, inputs, outputs=outputs, model_version=self._version, **self._limit)

        names = ["MASK", "PROB"] if self.probabilities else ["MASK"]
        answer = self._ask(infer)
        # Copies: the answer's arrays are views of the bytes received, which torch must not write to.
        mask, *probability = (torch.from_numpy(answer.as_numpy(name).copy()) for name in names)
        return mask, probability[0] if probability else torch.empty(len(mask), 0, *mask.shape[2:])

    def _config(self) -> dict[str, Any]:
        if not self._ask(lambda: self._client.is_server_ready(**self._limit)):
            raise DistsegError(f"server: got {self._address}; it is not ready, a model may be loading; try again")
        as_json = {"as_json": True} if self._limit else {}  # HTTP's library knows nothing else
        config = self._ask(lambda: self._client.get_model_config(self._model, self._version, **as_json, **self._limit))
        config = config.get("config", config)
        if METADATA not in config.get("parameters", {}):
            raise DistsegError(
                f"server: got {self._address}; its model {self._model} was not written by distseg export; name another"
            )
        return config

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """One call to the server, its failures as one line."""
        try:
            return question()
        except self._library.InferenceServerException as error:
            said, status = error.message(), error.status()
        except TimeoutError as error:
            said, status = str(error), LATE
        except (OSError, HTTPException) as error:
            said, status = str(error), UNREACHABLE
        except ValueError as error:  # what came is not what Triton says
            said, status = str(error), UNREACHABLE
        if status == LATE:
            rule = f"no answer within {self._timeout_s:g} s"
            remedy = "it may be busy: give it smaller batches, or try again; or check the address"
        elif status == UNREACHABLE:
            rule, remedy = "no such server answers there", "start it (distseg serve), or check the address"
        else:
            rule, remedy = "it refuses this", "check the model's name and version, and the input"
        raise DistsegError(f"server: got {self._address}; {rule} ({said}); {remedy}")

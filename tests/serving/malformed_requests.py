"""Malformed inference requests, made from a seed: what a broken or a hostile client sends over HTTP, gRPC and bare sockets.

A valid request is one slice of 8 x 8 pixels; each kind of malformed request spoils one thing of it.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

SIDE = 8
DTYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
    "BF16",
)
NOT_NUMBERS: tuple[Any, ...] = ("8", 8.5, None, [8], {"a": 8}, True)
INFER = "/v2/models/distseg/infer"


def valid_hu() -> np.ndarray:
    return np.arange(-SIDE * SIDE, 0, dtype=np.int16).reshape(1, 1, SIDE, SIDE)


@dataclass
class HttpRequest:
    """An inference request in parts; `send` puts them together."""

    header: Any = field(
        default_factory=lambda: {
            "inputs": [
                {
                    "name": "HU",
                    "shape": [1, 1, SIDE, SIDE],
                    "datatype": "INT16",
                    "parameters": {"binary_data_size": 2 * SIDE * SIDE},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    data: bytes = field(default_factory=lambda: valid_hu().tobytes())
    path: str = INFER
    header_length: str | None = None
    """said in the HTTP header; None: the true one"""
    spoil: Callable[[bytes], bytes] = bytes
    """of the JSON"""

    @property
    def hu(self) -> dict[str, Any]:
        return self.header["inputs"][0]

    def parts(self) -> tuple[str, dict[str, str], bytes]:
        """Path, HTTP headers and body."""
        text = self.spoil(json.dumps(self.header).encode())
        length = str(len(text)) if self.header_length is None else self.header_length
        return self.path, {"Inference-Header-Content-Length": length}, text + self.data


def word(rng: random.Random) -> str:
    return "".join(rng.choices("abcXYZ_019 /\\\"'é", k=rng.randint(1, 12)))


def cut(rng: random.Random) -> Callable[[bytes], bytes]:
    return lambda text: text[: rng.randrange(len(text) - 1)]


def other_input_name(rng: random.Random, request: HttpRequest) -> None:
    request.hu["name"] = word(rng)


def other_datatype(rng: random.Random, request: HttpRequest) -> None:
    request.hu["datatype"] = rng.choice((*DTYPES, word(rng), 3, None, ["INT16"]))


def other_rank(rng: random.Random, request: HttpRequest) -> None:
    request.hu["shape"] = [1] * rng.choice((0, 1, 2, 3, 5, 6, 40))


def other_channels(rng: random.Random, request: HttpRequest) -> None:
    channels = rng.choice((0, 2, 3, 64))
    request.hu["shape"][1] = channels
    request.data *= channels
    request.hu["parameters"]["binary_data_size"] = len(request.data)


def batch_too_large(rng: random.Random, request: HttpRequest) -> None:
    batch = rng.randint(9, 40)
    request.hu["shape"][0] = batch
    request.data *= batch
    request.hu["parameters"]["binary_data_size"] = len(request.data)


def size_zero(rng: random.Random, request: HttpRequest) -> None:
    request.hu["shape"][rng.choice((0, 2, 3))] = 0
    request.hu["parameters"]["binary_data_size"], request.data = 0, b""


def negative_size(rng: random.Random, request: HttpRequest) -> None:
    request.hu["shape"][rng.randrange(4)] = -rng.randint(1, 2**40)


def huge_size(rng: random.Random, request: HttpRequest) -> None:
    request.hu["shape"][rng.choice((2, 3))] = rng.choice((2**31, 2**32 + SIDE, 2**61, 2**62 + 1, 2**63, 2**64 + SIDE))


def size_not_a_number(rng: random.Random, request: HttpRequest) -> None:
    request.hu["shape"][rng.randrange(4)] = rng.choice(NOT_NUMBERS)


def shape_not_a_list(rng: random.Random, request: HttpRequest) -> None:
    request.hu["shape"] = rng.choice(("1,1,8,8", 64, None, {}))


def other_binary_size(rng: random.Random, request: HttpRequest) -> None:
    sizes = (0, 1, 2 * SIDE * SIDE - 1, 2 * SIDE * SIDE + 2, 2**31, 2**62, -1, -(2**31), 2**64, "128", None, [128], 1.5)
    request.hu["parameters"]["binary_data_size"] = rng.choice(sizes)


def too_few_bytes(rng: random.Random, request: HttpRequest) -> None:
    request.data = request.data[: rng.randrange(len(request.data))]


def too_many_bytes(rng: random.Random, request: HttpRequest) -> None:
    request.data += rng.randbytes(rng.randint(1, 4000))


def field_missing(rng: random.Random, request: HttpRequest) -> None:
    del request.hu[rng.choice(("name", "shape", "datatype", "parameters"))]


def no_inputs(rng: random.Random, request: HttpRequest) -> None:
    request.header["inputs"] = rng.choice(([], None, {}, "HU", 1, [None], [1], [[]], [{}]))


def input_twice(rng: random.Random, request: HttpRequest) -> None:
    request.header["inputs"] *= 2
    request.data *= 2


def input_too_many(rng: random.Random, request: HttpRequest) -> None:
    request.header["inputs"].append({"name": word(rng), "shape": [1], "datatype": "INT32", "data": [1]})


def unknown_output(rng: random.Random, request: HttpRequest) -> None:
    request.header["outputs"] = rng.choice(([{"name": word(rng)}], [{}], [1], "MASK", {"name": "MASK"}))


def values_in_json(rng: random.Random, request: HttpRequest) -> None:
    del request.hu["parameters"]
    count = SIDE * SIDE
    wrong = (["x"] * count, [1.5] * count, [None] * count, [0] * (count - 1), [0] * (count + 1), "0" * count, 0, {})
    request.hu["data"], request.data = rng.choice(wrong), b""


def json_cut(rng: random.Random, request: HttpRequest) -> None:
    request.spoil = cut(rng)


def json_of_random_bytes(rng: random.Random, request: HttpRequest) -> None:
    noise = rng.randbytes(rng.randint(1, 300))
    request.spoil = lambda _: noise


def json_not_an_object(rng: random.Random, request: HttpRequest) -> None:
    request.header = rng.choice(([], None, 1, "HU", {}))


def other_header_length(rng: random.Random, request: HttpRequest) -> None:
    request.header_length = rng.choice(("0", "1", "-1", "x", "", "999999", str(2**31), str(2**64), str(-(2**63))))


def unknown_model(rng: random.Random, request: HttpRequest) -> None:
    request.path = f"/v2/models/{rng.choice(('x', 'distseg2', '..', '%00', 'a' * 300))}/infer"


def unknown_version(rng: random.Random, request: HttpRequest) -> None:
    request.path = (
        f"/v2/models/distseg/versions/{rng.choice(('2', '0', '-1', '99999999999999999999', 'x', '1.5'))}/infer"
    )


def unknown_path(rng: random.Random, request: HttpRequest) -> None:
    request.path = rng.choice(("/", "/v2/infer", "/v3/models/distseg/infer", "/v2/models/distseg/inferr", "/" * 500))


HTTP_KINDS = (
    other_input_name,
    other_datatype,
    other_rank,
    other_channels,
    batch_too_large,
    size_zero,
    negative_size,
    huge_size,
    size_not_a_number,
    shape_not_a_list,
    other_binary_size,
    too_few_bytes,
    too_many_bytes,
    field_missing,
    no_inputs,
    input_twice,
    input_too_many,
    unknown_output,
    values_in_json,
    json_cut,
    json_of_random_bytes,
    json_not_an_object,
    other_header_length,
    unknown_model,
    unknown_version,
    unknown_path,
)


def valid_grpc() -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="distseg")
    request.inputs.add(name="HU", datatype="INT16", shape=[1, 1, SIDE, SIDE])
    request.raw_input_contents.append(valid_hu().tobytes())
    return request


def grpc_unknown_model(rng: random.Random, request: Any) -> None:
    request.model_name = rng.choice(("", "x", "distseg2"))


def grpc_unknown_version(rng: random.Random, request: Any) -> None:
    request.model_version = rng.choice(("2", "-1", "x", "99999999999999999999"))


def grpc_other_name(rng: random.Random, request: Any) -> None:
    request.inputs[0].name = rng.choice(("", "hu", "HU ", "MASK"))


def grpc_other_datatype(rng: random.Random, request: Any) -> None:
    request.inputs[0].datatype = rng.choice((*DTYPES, "", "int16", word(rng)))


def grpc_other_shape(rng: random.Random, request: Any) -> None:
    sizes = (0, 1, 2, 7, 9, -1, -(2**63), 2**31, 2**62, 2**63 - 1)
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(rng.choices(sizes, k=rng.randint(0, 6)))


def grpc_other_bytes(rng: random.Random, request: Any) -> None:
    request.raw_input_contents[0] = rng.randbytes(rng.choice((0, 1, 127, 129, 4096)))


def grpc_no_contents(rng: random.Random, request: Any) -> None:
    del request.raw_input_contents[:]


def grpc_contents_twice(rng: random.Random, request: Any) -> None:
    request.inputs[0].contents.int_contents.extend(range(rng.randint(1, SIDE * SIDE)))


def grpc_input_twice(rng: random.Random, request: Any) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def grpc_no_input(rng: random.Random, request: Any) -> None:
    del request.inputs[:]


def grpc_unknown_output(rng: random.Random, request: Any) -> None:
    request.outputs.add(name=rng.choice(("", "mask", "HU")))


GRPC_KINDS = (
    grpc_unknown_model,
    grpc_unknown_version,
    grpc_other_name,
    grpc_other_datatype,
    grpc_other_shape,
    grpc_other_bytes,
    grpc_no_contents,
    grpc_contents_twice,
    grpc_input_twice,
    grpc_no_input,
    grpc_unknown_output,
)


def grpc_bytes(rng: random.Random, request: Any) -> bytes:
    """What is no message: one that was cut, or random bytes."""
    message = request.SerializeToString()
    return (
        message[: rng.randrange(len(message) - 129, len(message))]
        if rng.random() < 0.5
        else b"\xff" + rng.randbytes(99)
    )


START = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
# Name: what goes over a bare connection before it is half closed.
SOCKET_KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "body cut short": lambda rng: START + b"Content-Length: %d\r\n\r\n{" % rng.randint(2, 10**9),
    "negative length": lambda rng: START + b"Content-Length: -%d\r\n\r\n{}" % rng.randint(1, 2**62),
    "length not a number": lambda rng: START + b"Content-Length: many\r\n\r\n{}",
    "length beyond 64 bits": lambda rng: START + b"Content-Length: 9%s\r\n\r\n{}" % (b"9" * rng.randint(20, 90)),
    "no length": lambda rng: START + b"\r\n" + rng.randbytes(20),
    "headers cut short": lambda rng: START[: rng.randrange(1, len(START))],
    "random bytes": lambda rng: rng.randbytes(rng.randint(1, 3000)),
    "header of a megabyte": lambda rng: START + b"X: " + b"a" * 2**20 + b"\r\n\r\n",
    "path of a megabyte": lambda rng: b"POST /" + b"a" * 2**20 + b" HTTP/1.1\r\n\r\n",
    "20,000 headers": lambda rng: START + b"X: a\r\n" * 20_000 + b"Content-Length: 0\r\n\r\n",
    "bad chunks": lambda rng: START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "JSON nested 10,000 deep": lambda rng: START + b"Content-Length: 10000\r\n\r\n" + b"[" * 10_000,
}

"""A real Triton server with the exported model: right answers, and nothing that a client sends takes it down."""

import contextlib
import http.client
import http.server
import itertools
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import nibabel
import numpy as np
import pytest
import torch
import yaml

from distseg.commands import predict
from distseg.errors import DistsegError
from distseg.files import folder_written_aside
from distseg.serving.client import RemoteSegmenter
from distseg.serving.description import read_description
from distseg.serving.repository import write_repositories
from distseg.serving.server import Endpoints, find_installation, running_server
from tests.benchmarks.ports import free_endpoints
from tests.conftest import ROOT, wait_until
from tests.serving.malformed_requests import (
    GRPC_KINDS,
    HTTP_KINDS,
    SOCKET_KINDS,
    HttpRequest,
    grpc_bytes,
    valid_grpc,
    valid_hu,
)

ANSWER_WITHIN_S = 60  # on a busy machine; a hang is longer
try:
    find_installation()
    missing = ""
except DistsegError as error:
    missing = str(error)
pytestmark = [pytest.mark.serve, pytest.mark.skipif(bool(missing), reason=missing)]


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Endpoints]:
    endpoints = free_endpoints()
    with running_server(find_installation(), model / "model_repository_python", endpoints):
        yield endpoints


@pytest.fixture(scope="session")
def local(model: Path) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The exported file in this process."""
    loaded = torch.jit.load(str(model / "model.pt"))

    def segment(hu_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return loaded(hu_BCHW)

    return segment


def slices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-1024, 1500, shape, dtype=np.int16))


def assert_answers(server: Endpoints, local: Callable[..., Any]) -> None:
    """The server gives what the file gives, right now."""
    hu_BCHW = torch.from_numpy(valid_hu())
    for got, wanted in zip(RemoteSegmenter(server.grpc)(hu_BCHW), local(hu_BCHW), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (8, 1, 64, 64), (3, 1, 37, 101), (1, 1, 1, 1), (8, 1, 5, 300)])
def test_a_request_gets_the_bits_that_the_file_gives(
    server: Endpoints, local: Callable[..., Any], protocol: str, shape: tuple[int, ...]
) -> None:
    mask, probability = RemoteSegmenter(getattr(server, protocol))(slices(*shape))
    wanted_mask, wanted_probability = local(slices(*shape))
    assert mask.dtype == torch.uint8 and torch.equal(mask, wanted_mask)
    assert probability.dtype == torch.float32 and torch.equal(probability, wanted_probability)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_masks_alone_are_the_same_masks(server: Endpoints, local: Callable[..., Any], protocol: str) -> None:
    remote = RemoteSegmenter(getattr(server, protocol))
    remote.probabilities = False
    mask, probability = remote(slices(11, 1, 37, 20))
    assert torch.equal(mask, torch.cat([local(part)[0] for part in slices(11, 1, 37, 20).split(8)]))
    assert probability.shape == (11, 0, 37, 20)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_batch_beyond_the_servers_goes_in_parts_and_the_metadata_is_the_files(
    server: Endpoints, local: Callable[..., Any], model: Path, protocol: str
) -> None:
    remote = RemoteSegmenter(getattr(server, protocol))
    mask, probability = remote(slices(19, 1, 16, 16))
    parts = [local(part) for part in slices(19, 1, 16, 16).split(8)]
    assert torch.equal(mask, torch.cat([part[0] for part in parts]))
    assert torch.equal(probability, torch.cat([part[1] for part in parts]))
    assert remote.n_slices == 1 and remote.metadata == json.loads((model / "model.json").read_text())


def settled(counters: Callable[[], dict[str, Any]], least: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What Triton has counted once it counts no more, and at least so much: it answers a request before it counts it."""
    wait_until(lambda: all(counters()[name] >= value for name, value in (least or {}).items()), "Triton's counters", 60)
    seen = counters()
    while True:
        time.sleep(0.5)
        seen, before = counters(), seen
        if seen == before:
            return seen


def statistics(server: Endpoints) -> dict[str, int]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=ANSWER_WITHIN_S)
    with contextlib.closing(connection):
        connection.request("GET", "/v2/models/distseg/stats")
        counts = json.loads(connection.getresponse().read())["model_stats"][0]
    return {name: int(counts[name]) for name in ("inference_count", "execution_count")}


def test_requests_of_many_clients_run_together_and_each_gets_its_own_answer(
    server: Endpoints, local: Callable[..., Any]
) -> None:
    sizes = [(32, 48), (64, 64)]  # those of another size are never in the same batch
    requests = [slices(1, 1, *sizes[n % 2], seed=n) for n in range(32)]
    remotes = [RemoteSegmenter(server.grpc) for _ in requests]  # ready, so that they ask at once
    before = settled(lambda: statistics(server))
    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(lambda remote, hu_BCHW: remote(hu_BCHW), remotes, requests))
    count = "inference_count"
    after = settled(lambda: statistics(server), {count: before[count] + len(requests)})
    assert after["inference_count"] - before["inference_count"] == len(requests)
    assert after["execution_count"] - before["execution_count"] < len(requests)
    for hu_BCHW, (mask, probability) in zip(requests, answers, strict=True):
        wanted_mask, wanted_probability = local(hu_BCHW)
        assert torch.equal(mask, wanted_mask)
        # Not to the bit: convolutions of several slices may add in another order than those of one.
        torch.testing.assert_close(probability, wanted_probability, rtol=0, atol=1e-6)


def metrics(server: Endpoints) -> dict[str, float]:
    """The model's counters."""
    connection = http.client.HTTPConnection(server.host, server.port + 2, timeout=ANSWER_WITHIN_S)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    lines = re.findall(r'^(\w+){model="distseg",version="1"} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_metrics_count_what_was_executed(server: Endpoints) -> None:
    before = settled(lambda: metrics(server))
    RemoteSegmenter(server.grpc)(slices(3, 1, 8, 8))
    succeeded = "nv_inference_request_success"
    after = settled(lambda: metrics(server), {succeeded: before[succeeded] + 1})
    for name, more in (("request_success", 1), ("count", 3), ("exec_count", 1)):
        assert after[f"nv_inference_{name}"] == before[f"nv_inference_{name}"] + more


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_the_server_refuses_is_one_line(server: Endpoints, protocol: str) -> None:
    remote = RemoteSegmenter(getattr(server, protocol))
    for bad, reason in (
        (slices(1, 2, 8, 8), "shape"),
        (slices(1, 1, 8, 8).float(), "FP32"),
        (slices(1, 1, 0, 8), "no size may be 0"),
    ):
        with pytest.raises(DistsegError, match=reason):
            remote(bad)
    for wrong in ({"model": "nobody"}, {"version": "7"}):
        with pytest.raises(DistsegError, match="check the model's name and version"):
            RemoteSegmenter(getattr(server, protocol), **wrong)


def test_an_address_that_no_server_answers_at_is_one_line(server: Endpoints) -> None:
    nowhere, other_protocol = free_endpoints(), Endpoints(server.host, server.port + 1)
    for address in (nowhere.http, nowhere.grpc, other_protocol.http):
        with pytest.raises(DistsegError, match="no such server answers there"):
            RemoteSegmenter(address, timeout_s=5)
    for wrong in (
        "localhost:8001",
        "http://localhost:80a0",
        "http://localhost:99999",
        "http://http://x:1",
        "grpc://:1",
    ):
        with pytest.raises(DistsegError, match="must be grpc://host:port"):
            RemoteSegmenter(wrong)


def test_a_web_server_is_not_taken_for_triton(tmp_path: Path) -> None:
    class Everything(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"welcome")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Everything) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(DistsegError, match="no such server answers there"):
            RemoteSegmenter(f"http://127.0.0.1:{web.server_port}")
        web.shutdown()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_busy_server_is_not_called_absent(server: Endpoints, protocol: str) -> None:
    remote = RemoteSegmenter(getattr(server, protocol), timeout_s=0.2)
    with pytest.raises(DistsegError, match=r"no answer within 0.2 s .* it may be busy"):
        remote(slices(8, 1, 1024, 1024))


def test_a_thousand_malformed_requests_are_refused_and_the_answers_stay(
    server: Endpoints, local: Callable[..., Any]
) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=ANSWER_WITHIN_S)
    for seed, kind in enumerate(itertools.islice(itertools.cycle(HTTP_KINDS), 750)):
        request = HttpRequest()
        kind(random.Random(seed), request)
        connection.request("POST", *_body_then_headers(request))
        answer = connection.getresponse()
        said = json.loads(answer.read())["error"]
        # Triton calls JSON that is not the protocol's an internal error; what it can read and refuses is the client's.
        unreadable = answer.status == 500 and "arse" in said
        assert answer.status in (400, 404) or unreadable, (kind.__name__, seed, answer.status, said)
    connection.close()
    with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for seed, kind in enumerate(itertools.islice(itertools.cycle((*GRPC_KINDS, grpc_bytes)), 300)):
            request = valid_grpc()
            changed = kind(random.Random(seed), request)
            with pytest.raises(grpc.RpcError) as refused:
                infer(changed or request.SerializeToString(), timeout=ANSWER_WITHIN_S)
            codes = ("INTERNAL",) if changed else ("INVALID_ARGUMENT", "NOT_FOUND")  # gRPC's own for what is no message
            assert refused.value.code().name in codes, (kind.__name__, seed)
    assert_answers(server, local)


def _body_then_headers(request: HttpRequest) -> tuple[str, bytes, dict[str, str]]:
    path, headers, body = request.parts()
    return path, body, headers


@pytest.mark.parametrize("kind", SOCKET_KINDS)
def test_a_broken_connection_is_ended_and_the_answers_stay(
    server: Endpoints, local: Callable[..., Any], kind: str
) -> None:
    for seed in range(5):
        with socket.create_connection((server.host, server.port), timeout=ANSWER_WITHIN_S) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
                connection.sendall(SOCKET_KINDS[kind](random.Random(seed)))
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert b" 200 " not in connection.recv(64)
    assert_answers(server, local)


def test_connections_that_say_nothing_more_keep_nobody_waiting(server: Endpoints, local: Callable[..., Any]) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            idle = stack.enter_context(socket.create_connection((server.host, server.port)))
            idle.sendall(SOCKET_KINDS["body cut short"](random.Random(0)))
        assert_answers(server, local)
        hu_BCHW = torch.from_numpy(valid_hu())
        assert torch.equal(RemoteSegmenter(server.http)(hu_BCHW)[0], local(hu_BCHW)[0])


@pytest.mark.slow(20)
def test_distseg_serve_says_where_it_listens_and_on_sigterm_finishes_what_is_in_flight(
    model: Path, local: Callable[..., Any]
) -> None:
    endpoints = free_endpoints()
    words = [sys.executable, "-m", "distseg", "serve", str(model), "--port", str(endpoints.port)]
    requests = [slices(4, 1, 512, 512 + n) for n in range(4)]  # of different sizes: none shares an execution
    ready = threading.Barrier(len(requests))

    def ask(address: str, hu_BCHW: torch.Tensor) -> torch.Tensor:
        remote = RemoteSegmenter(address)
        ready.wait()
        return remote(hu_BCHW)[0]

    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        line = command.stdout.readline()
        assert all(url in line for url in (endpoints.http, endpoints.grpc, endpoints.metrics)), line
        warmed_up = settled(lambda: metrics(endpoints))["nv_inference_request_success"]
        with ThreadPoolExecutor(len(requests)) as clients:
            answers = list(map(clients.submit, [ask] * 4, [endpoints.http, endpoints.grpc] * 2, requests))
            arrived = 0.0
            while arrived < len(requests) - 1:  # and one is being executed
                seen = metrics(endpoints)
                arrived = seen["nv_inference_pending_request_count"] + seen["nv_inference_request_success"] - warmed_up
            command.send_signal(signal.SIGTERM)
            assert not all(answer.done() for answer in answers)
            for hu_BCHW, answer in zip(requests, answers, strict=True):
                assert torch.equal(answer.result(), local(hu_BCHW)[0])
        assert command.wait(ANSWER_WITHIN_S) == 0
    with pytest.raises(DistsegError, match="no such server answers there"):
        RemoteSegmenter(endpoints.grpc, timeout_s=5)


def test_serve_stops_with_one_line_where_it_cannot_start(
    model: Path, tmp_path: Path, run_command: Callable[..., Any], server: Endpoints
) -> None:
    broken = tmp_path / "broken" / "model_repository_python" / "distseg"
    (broken / "1").mkdir(parents=True)
    (broken / "config.pbtxt").write_text("max_batch_size: many")
    (tmp_path / "two words" / "model_repository_python").mkdir(parents=True)
    free = free_endpoints().port
    for words, reason in (
        ((tmp_path / "two words",), "Triton takes no folder with a space in its path; move it"),
        ((tmp_path,), "got .* without model_repository_python; it must be what distseg export wrote"),
        ((model, "--port", server.port - 2), "three free ports in a row are needed"),
        ((model, "--port", 65_535), "three free ports in a row are needed"),
        ((tmp_path / "broken", "--port", free), "got exit status 1 from tritonserver before it was ready"),
    ):
        done = run_command("distseg", "serve", *words, ok=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.fullmatch(f"error: .*{reason}.*", done.stderr.splitlines()[-1]), done.stderr


def test_a_machine_without_a_server_is_told_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DistsegError, match="bash launch/setup_triton.sh, or use the container"):
        find_installation()


@pytest.mark.slow(20)
def test_a_new_export_is_taken_over_without_a_lost_request(model: Path, tmp_path: Path) -> None:
    out, hu_BCHW = tmp_path / "model", slices(2, 1, 64, 64)
    described = read_description(model, json.loads((model / "model.json").read_text()))
    shutil.copytree(model, out)
    changed = torch.jit.load(str(model / "model.pt"))
    old = changed(hu_BCHW)[0]
    changed.label_map.thresholds = [0.0, 0.0]  # every pixel is in every region
    new = changed(hu_BCHW)[0]
    assert not torch.equal(old, new)
    endpoints, enough = free_endpoints(), threading.Event()

    def ask() -> list[bool]:
        """Whether each answer was the new model's."""
        remote, seen = RemoteSegmenter(endpoints.grpc), []
        while not enough.is_set():
            mask = remote(hu_BCHW)[0]
            assert torch.equal(mask, old) or torch.equal(mask, new)
            seen.append(torch.equal(mask, new))
        return seen

    with (
        running_server(find_installation(), out / "model_repository_python", endpoints, poll_s=1),
        ThreadPoolExecutor(3) as clients,
    ):
        asked = [clients.submit(ask) for _ in range(3)]
        try:
            time.sleep(2)
            with folder_written_aside(out) as aside:
                changed.save(str(aside / "model.pt"))
                write_repositories(aside, described)
            remote, end = RemoteSegmenter(endpoints.grpc), time.monotonic() + 240
            while not torch.equal(remote(hu_BCHW)[0], new):
                assert time.monotonic() < end, "the new model was not taken over"
                time.sleep(0.2)
        finally:
            enough.set()  # or the clients would ask for ever
        for client in asked:
            seen = client.result()
            assert not seen[0] and seen == sorted(seen)


def test_the_client_example_gives_the_mask_of_distseg_predict(
    server: Endpoints, model: Path, phantom: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    volume = sorted(phantom.rglob("COVID-19-CT-Seg_20cases/*.nii.gz"))[0]
    example, predicted = tmp_path / "example.nii.gz", tmp_path / "predicted.nii.gz"
    run_command("python", "export/triton/client.py", server.grpc.removeprefix("grpc://"), volume, example)
    assert predict.main([str(model), str(volume), str(predicted), "--batch-size", "8"]) == 0
    got, wanted = nibabel.load(example), nibabel.load(predicted)
    assert np.array_equal(got.affine, wanted.affine)
    assert np.array_equal(np.asarray(got.dataobj), np.asarray(wanted.dataobj))


def test_the_container_is_started_with_options_that_the_server_has() -> None:
    known = subprocess.run([find_installation().binary, "--help"], capture_output=True, text=True).stderr
    command = yaml.safe_load((ROOT / "export/triton/compose.yaml").read_text())["services"]["triton"]["command"]
    for option in command[1:]:
        assert f"{option.partition('=')[0]} " in known, option

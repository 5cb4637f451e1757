"""Downloads from a real server that cuts connections, lies about ranges and sends wrong bytes; archives that reach out."""

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distseg.commands import download as command
from distseg.data import records
from distseg.data.layouts.finding import find_source
from distseg.data.records import Record, download_record
from distseg.errors import DistsegError

FOLDERS = ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask", "Lung_and_Infection_Mask")


class Server(ThreadingHTTPServer):
    """Serves a record's files, as badly as it is told to."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cuts: Iterator[int | None] = itertools.repeat(
            None
        )  # bytes of each answer before the connection is dropped
        self.knows_ranges, self.has_api = True, True
        self.framing = "length"  # how an answer says where it ends: by its length, in one chunk, or by closing
        self.errors = 0  # answers of status 500 before the first good one
        self.busy: set[str] = set()  # files first answered by "too many requests; come back in a second"
        self.pause_s = 0.0  # after each 4 kB
        self.sent: dict[str, int] = dict.fromkeys(files, 0)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, name = self.server, self.path.rsplit("/", 1)[1]
        server.requests.append(f"{name} {self.headers.get('Range', '')}")
        if "python" in self.headers["User-Agent"].lower():  # as Zenodo does
            return self.send_error(403)
        if name in server.busy:
            server.busy.remove(name)
            self.send_response(429)
            self.send_header("Retry-After", "1")
            return self.end_headers()
        if server.errors > 0:
            server.errors -= 1
            return self.send_error(500)
        if self.path == "/api/records/3757476" and server.has_api:
            listed = [
                {"key": key, "size": len(data), "checksum": f"md5:{hashlib.md5(data).hexdigest()}"}
                for key, data in server.files.items()
            ]
            return self.answer(json.dumps({"files": listed}).encode(), "", None, "length")
        if not self.path.startswith("/records/3757476/files/") or name not in server.files:
            return self.send_error(404)
        self.answer(server.files[name], name, next(server.cuts), server.framing)

    def answer(self, data: bytes, name: str, cut_after: int | None, framing: str) -> None:
        start = 0
        if self.server.knows_ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(asked.group(1))
            if start >= len(data):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if framing == "length":
            self.send_header("Content-Length", str(len(data) - start))
        elif framing == "chunk":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if framing == "chunk":
            self.wfile.write(b"%x\r\n" % (len(data) - start))
        end = len(data) if cut_after is None else min(len(data), start + cut_after)
        for place in range(start, end, 4096):
            self.wfile.write(data[place : min(place + 4096, end)])
            self.server.sent[name] = self.server.sent.get(name, 0) + min(4096, end - place)
            time.sleep(self.server.pause_s)
        if framing == "chunk" and end == len(data):
            self.wfile.write(b"\r\n0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


@pytest.fixture
def files(phantom: Path) -> dict[str, bytes]:
    """The phantom as the record's archives: some with a top folder and some without, one with macOS' clutter."""
    made = {}
    for number, folder in enumerate(FOLDERS):
        source = phantom / ("Lung_Mask" if folder == "Lung_and_Infection_Mask" else folder)
        members = {f"{folder}/{f.name}" if number % 2 else f.name: f.read_bytes() for f in sorted(source.iterdir())}
        made[f"{folder}.zip"] = zipped(members | {"__MACOSX/._x": b"x"})
    return made


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pin(files, monkeypatch)
    serving = Server(files)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


def pin(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(records.RECORDS, "zenodo-3757476", Record(3757476, digests))


def fetch(server: Server, out: Path) -> None:
    download_record("zenodo-3757476", out, server.url, pause_s=0.001)


def test_the_pinned_record_is_the_one_that_prepare_reads() -> None:
    record = records.RECORDS["zenodo-3757476"]
    assert [Path(name).stem for name in record.sha256] == list(FOLDERS)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in record.sha256.values())


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_gone_on_with(
    ranges: bool, server: Server, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.errors = 2
    server.cuts = itertools.repeat(30_000 if ranges else None)
    server.knows_ranges = ranges
    fetch(server, tmp_path / "out")
    assert len(find_source(tmp_path / "out").cases) == 6
    if ranges:
        assert all(server.sent[name] == len(data) for name, data in files.items())  # no byte twice
        assert len(server.requests) > 10
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FOLDERS)
    server.requests.clear()
    fetch(server, tmp_path / "out")
    assert not server.requests  # all is there


@pytest.mark.parametrize("framing", ["chunk", "close"])
def test_a_cut_is_seen_in_answers_that_do_not_tell_their_length(
    framing: str, server: Server, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.framing, server.cuts = framing, itertools.cycle([20_000, None])
    fetch(server, tmp_path / "out")
    assert len(find_source(tmp_path / "out").cases) == 6
    assert all(server.sent[name] == len(data) for name, data in files.items())


def test_a_server_without_ranges_that_cuts_here_and_there_is_given_up(server: Server, tmp_path: Path) -> None:
    server.knows_ranges, server.cuts = False, itertools.cycle([4096, 8192])
    with pytest.raises(DistsegError, match="5 attempts brought nothing .the connection was cut"):
        fetch(server, tmp_path / "out")
    assert len(server.requests) < 10


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(server: Server, tmp_path: Path) -> None:
    server.busy = {"Lung_Mask.zip"}
    before = time.monotonic()
    fetch(server, tmp_path / "out")
    assert time.monotonic() - before > 1 and not server.busy


def test_any_error_of_the_network_is_one_to_try_again_after() -> None:
    for error in (ssl.SSLError(1, "bad record mac"), OSError(113, "No route to host"), TimeoutError("timed out")):
        with pytest.raises(ConnectionError, match=str(error.args[-1])), records._network_errors():
            raise error


def test_a_full_disk_is_named_and_the_next_run_goes_on(
    server: Server,
    files: dict[str, bytes],
    tmp_path: Path,
    run_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    out, name = tmp_path / "out", "COVID-19-CT-Seg_20cases.zip"
    words = [sys.executable, "-m", "distseg", "download", "zenodo-3757476", str(out), "--url", server.url]
    failed = run_command("bash", "-c", f"ulimit -f 8; {shlex.join(words)} 2>&1 >/dev/null", ok=False)  # 8 KiB a file
    assert failed.returncode == 1
    assert re.match(f"error: output {out}: got File too large; .*make room", failed.stdout.splitlines()[-1])
    kept = (out / f".download-{name}").stat().st_size
    assert 0 < kept <= 8192 < len(files[name]) and [path.name for path in out.iterdir()] == [f".download-{name}"]
    server.requests.clear()
    fetch(server, out)
    assert f"{name} bytes={kept}-" in server.requests and len(find_source(out).cases) == 6


def test_a_killed_download_goes_on_in_the_next_run(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    server.pause_s = 0.01
    out, name = tmp_path / "out", "COVID-19-CT-Seg_20cases.zip"
    words = [sys.executable, "-m", "distseg", "download", "zenodo-3757476", str(out), "--url", server.url]
    running = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    part = out / f".download-{name}"
    while not (part.exists() and part.stat().st_size > 0):
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    server.pause_s = 0
    kept = part.stat().st_size
    assert 0 < kept < len(files[name]) and not (out / "COVID-19-CT-Seg_20cases").exists()
    server.requests.clear()
    fetch(server, out)
    assert f"{name} bytes={kept}-" in server.requests and len(find_source(out).cases) == 6


def test_a_server_without_ranges_or_a_list_of_files_is_enough(
    server: Server, tmp_path: Path, files: dict[str, bytes]
) -> None:
    server.has_api = server.knows_ranges = False
    (tmp_path / "out" / "Infection_Mask").mkdir(parents=True)  # empty, so not the record's
    (tmp_path / "out" / ".partial-0a1b2c3d-Lung_Mask").mkdir()  # left by a run that was killed while it unpacked
    (tmp_path / "out" / ".download-Lung_Mask.zip").write_bytes(b"part of another file")
    (tmp_path / "out" / ".download-Infection_Mask.zip").write_bytes(files["Infection_Mask.zip"])
    fetch(server, tmp_path / "out")
    assert len(find_source(tmp_path / "out").cases) == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FOLDERS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", "download Lung_Mask.zip: got size .*; the record has"),
        ("bytes", "download Lung_Mask.zip: got md5 .*; the record has"),
        ("mirror", "download Lung_Mask.zip: got sha256 .*; the record has"),
        ("missing", "Lung_Mask.zip: got status 404"),
        ("nothing", "Lung_Mask.zip: 5 attempts brought nothing .status 500"),
    ],
)
def test_what_is_not_the_record_is_named_and_leaves_no_folder(
    kind: str, message: str, server: Server, tmp_path: Path
) -> None:
    fetch_all = dict(server.files)
    if kind == "bytes":
        server.files["Lung_Mask.zip"] = server.files["Lung_Mask.zip"][:-1] + b"?"
        server.files = Lying(server.files, fetch_all)
    elif kind == "size":
        server.files["Lung_Mask.zip"] = server.files["Lung_Mask.zip"][:-100]
        server.files = Lying(server.files, fetch_all)
    elif kind == "mirror":
        server.files["Lung_Mask.zip"] = zipped({"a.nii.gz": b"another"})
    elif kind == "missing":
        del server.files["Lung_Mask.zip"]
    else:
        server.files = Failing(server, fetch_all)
    with pytest.raises(DistsegError, match=message) as caught:
        fetch(server, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["COVID-19-CT-Seg_20cases"]


class Lying(dict[str, bytes]):
    """Lists the true files and sends others of the same size."""

    def __init__(self, sent: dict[str, bytes], listed: dict[str, bytes]):
        super().__init__(sent)
        self.listed = listed

    def items(self):  # type: ignore[no-untyped-def]
        return self.listed.items()


class Failing(dict[str, bytes]):
    """After the first file every answer is an error."""

    def __init__(self, server: Server, files: dict[str, bytes]):
        super().__init__(files)
        self.server = server

    def __getitem__(self, name: str) -> bytes:
        self.server.errors = 100
        return super().__getitem__(name)


@pytest.mark.parametrize("member", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:evil", "link"])
def test_an_archive_that_reaches_out_of_its_folder_is_not_unpacked(
    member: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("good.nii.gz", b"good")
        info = zipfile.ZipInfo(member)
        info.external_attr = (0o120777 if member == "link" else 0o100644) << 16
        archive.writestr(info, b"/etc/passwd")
    server.files["Lung_Mask.zip"] = packed.getvalue()
    pin(server.files, monkeypatch)
    with pytest.raises(DistsegError, match="archive Lung_Mask.zip: got member .*nothing was unpacked"):
        fetch(server, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "deep/out/Lung_Mask").exists()


def test_bombs_damaged_archives_and_unknown_records_are_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LARGEST_UNPACKED_BYTES", 1000)
    with pytest.raises(DistsegError, match="at most 1000 are accepted"):
        fetch(server, tmp_path / "out")
    monkeypatch.undo()
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(range(256)) * 99)
    broken = deflated.getvalue().replace(deflated.getvalue()[60:80], b"\xff" * 20)
    for number, (data, message) in enumerate(
        [
            (b"no archive", "damaged"),
            (broken, "damaged .Error -3"),
            (
                zipped({"a": b"1", "COVID-19-CT-Seg_20cases/a": b"2"}),
                "got two members of the name 'a'; nothing was unpacked",
            ),
            (zipped({"a": b"1", "a/b": b"2"}), "got two members of the name 'a'"),
        ]
    ):
        server.files["COVID-19-CT-Seg_20cases.zip"] = data
        pin(server.files, monkeypatch)
        with pytest.raises(DistsegError, match=f"archive COVID-19-CT-Seg_20cases.zip: {message}"):
            fetch(server, tmp_path / f"other{number}")
        assert not [path for path in (tmp_path / f"other{number}").iterdir() if path.is_dir()]
    with pytest.raises(DistsegError, match="record: got 'zenodo-1'; known are zenodo-3757476"):
        download_record("zenodo-1", tmp_path)


def test_an_address_without_a_scheme_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["zenodo-3757476", str(tmp_path), "--url", "mirror.example"])
    assert "got 'mirror.example'; must start with http:// or https://" in capsys.readouterr().err

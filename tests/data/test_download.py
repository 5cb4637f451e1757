"""Downloads from a real server that cuts connections, lies about ranges and sends wrong bytes; archives that reach out."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distseg.data import download
from distseg.data.download import Record, download_record
from distseg.data.layouts import find_source
from distseg.errors import DistsegError

FOLDERS = ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask", "Lung_and_Infection_Mask")


class Server(ThreadingHTTPServer):
    """Serves a record's files, as badly as it is told to."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut_after: int | None = None  # bytes of each answer, then the connection is dropped
        self.knows_ranges, self.has_api = True, True
        self.errors = 0  # answers of status 500 before the first good one
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
        if server.errors > 0:
            server.errors -= 1
            return self.send_error(500)
        if self.path == "/api/records/3757476" and server.has_api:
            listed = [
                {"key": key, "size": len(data), "checksum": f"md5:{hashlib.md5(data).hexdigest()}"}
                for key, data in server.files.items()
            ]
            return self.answer(json.dumps({"files": listed}).encode(), "", None)
        if not self.path.startswith("/records/3757476/files/") or name not in server.files:
            return self.send_error(404)
        self.answer(server.files[name], name, server.cut_after)

    def answer(self, data: bytes, name: str, cut_after: int | None) -> None:
        start = 0
        if self.server.knows_ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(asked.group(1))
            if start >= len(data):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = len(data) if cut_after is None else min(len(data), start + cut_after)
        for place in range(start, end, 4096):
            self.wfile.write(data[place : min(place + 4096, end)])
            self.server.sent[name] = self.server.sent.get(name, 0) + min(4096, end - place)
            time.sleep(self.server.pause_s)

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
    monkeypatch.setitem(download.RECORDS, "zenodo-3757476", Record(3757476, digests))


def fetch(server: Server, out: Path) -> None:
    download_record("zenodo-3757476", out, server.url, pause_s=0.001)


def test_the_pinned_record_is_the_one_that_prepare_reads() -> None:
    record = download.RECORDS["zenodo-3757476"]
    assert [Path(name).stem for name in record.sha256] == list(FOLDERS)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in record.sha256.values())


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_gone_on_with(
    ranges: bool, server: Server, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.errors = 2
    server.cut_after = 30_000 if ranges else None
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


def test_a_killed_download_goes_on_in_the_next_run(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    server.pause_s = 0.01
    out, name = tmp_path / "out", "COVID-19-CT-Seg_20cases.zip"
    words = [sys.executable, "-m", "distseg.download", "zenodo-3757476", str(out), "--url", server.url]
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
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".download-Lung_Mask.zip").write_bytes(b"part of another file")
    (tmp_path / "out" / ".download-Infection_Mask.zip").write_bytes(files["Infection_Mask.zip"])
    fetch(server, tmp_path / "out")
    assert len(find_source(tmp_path / "out").cases) == 6


@pytest.mark.parametrize(
    ("kind", "message"),
    [
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
    monkeypatch.setattr(download, "LARGEST_UNPACKED_BYTES", 1000)
    with pytest.raises(DistsegError, match="at most 1000 are accepted"):
        fetch(server, tmp_path / "out")
    monkeypatch.undo()
    server.files["COVID-19-CT-Seg_20cases.zip"] = b"no archive"
    pin(server.files, monkeypatch)
    with pytest.raises(DistsegError, match="archive COVID-19-CT-Seg_20cases.zip: damaged"):
        fetch(server, tmp_path / "other")
    with pytest.raises(DistsegError, match="record: got 'zenodo-1'; known are zenodo-3757476"):
        download_record("zenodo-1", tmp_path)

"""Public records of annotated volumes: fetched over bad connections, checked, unpacked without trusting the archive."""

import contextlib
import hashlib
import http.client
import json
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distseg import __version__
from distseg.bars import Bar, counted
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, is_free, locked, remove_leftovers, sha256_of


@dataclass(frozen=True)
class Record:
    """A record on Zenodo: its number, and each archive's SHA-256. The record itself tells sizes and MD5s."""

    number: int
    sha256: Mapping[str, str]


# The digests are those that torch_em (constantinpape/torch-em) checks the same record by.
RECORDS = {
    "zenodo-3757476": Record(
        3757476,
        {
            "COVID-19-CT-Seg_20cases.zip": "a5060480eff9315b069b086312dac4872777901fb80d268a5a83edd9f4e7b440",
            "Lung_Mask.zip": "f060b0d0299939a6d95ddefdbfa281de1a779c4d230a5adbd32414711d6d8187",
            "Infection_Mask.zip": "87901c73fdd2230260e61d2dbc57bf56026efc28264006b8ea2bf411453c1694",
            "Lung_and_Infection_Mask.zip": "34f5a573cb8fb53cb15abe81868395d9addf436854826a6fd6e70c2b294f19c3",
        },
    )
}
ZENODO = "https://zenodo.org"
# Zenodo answers 403 or 429 to the default names of Python's libraries and asks clients to say who they are
# (fatiando/pooch#502, catalyst-cooperative/pudl#4961).
USER_AGENT = f"distseg/{__version__}"
TIMEOUT_S = 60
ATTEMPTS_WITHOUT_PROGRESS = 5
LONGEST_PAUSE_S = 60  # Zenodo counts a client's requests by the minute
CHUNK_BYTES = 2**20
LARGEST_UNPACKED_BYTES = 20 * 2**30  # of one archive; the largest here holds about 2 GB


def download_record(name: str, out: Path, base: str = ZENODO, pause_s: float = 1.0) -> None:
    """Fetches the archives of a record into `out`, one folder each; what is there already is left alone.

    A cut connection goes on where it ended, in this run or the next: a part stays under a hidden name. A folder gets its
    name when its archive was checked and unpacked.

    Args:
        name: one of `RECORDS`.
        out: folder.
        base: address of Zenodo or of a mirror with the same paths.
        pause_s: before the second attempt; doubled for each further one without progress.

    Raises:
        DistsegError: no such record, no connection, a file that is not the record's, an archive that reaches out of its
            folder, or a full disk.
    """
    if name not in RECORDS:
        raise DistsegError(f"record: got {name!r}; known are {', '.join(RECORDS)}; choose one of them")
    record = RECORDS[name]
    try:
        with locked(out / ".lock", f"output: got {out}"):
            missing = [file for file in record.sha256 if is_free(out / Path(file).stem)]
            listing = _listing(base, record, pause_s) if missing else {}
            for file in missing:
                folder, archive = out / Path(file).stem, out / f".download-{file}"
                remove_leftovers(folder)
                size = listing.get(file, {}).get("size")
                # Not the API's links: those know no ranges (zenodo/zenodo#2593).
                _fetch(f"{base}/records/{record.number}/files/{file}", archive, size, pause_s)
                _check(archive, file, record.sha256[file], listing.get(file, {}))
                _unpack(archive, folder)
                archive.unlink()
    except OSError as error:  # those of the network have become lines of their own
        raise DistsegError(
            f"output {out}: got {error.strerror or error}; what came is kept; make room, or choose a folder that can be "
            "written, and run it again"
        ) from None


def _listing(base: str, record: Record, pause_s: float) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file as the record says; empty where a mirror has files only."""
    url = f"{base}/api/records/{record.number}"
    for attempt in range(ATTEMPTS_WITHOUT_PROGRESS):
        asked_s = 0
        try:
            with _network_errors(), _open(url) as response:
                return {file["key"]: file for file in json.load(response)["files"]}
        except urllib.error.HTTPError as error:
            if not _may_pass(error):
                return {}
            asked_s = _asked_pause_s(error)
        except ConnectionError as error:
            if attempt + 1 == ATTEMPTS_WITHOUT_PROGRESS:
                raise DistsegError(
                    f"download {url}: no connection ({error}); check the network, or use --url"
                ) from None
        except (ValueError, KeyError, TypeError):
            return {}
        time.sleep(min(max(pause_s * 2**attempt, asked_s), LONGEST_PAUSE_S))
    return {}


def _fetch(url: str, path: Path, size: int | None, pause_s: float) -> None:
    """Downloads to `path`, going on after what is there, as long as attempts bring something."""
    failures = 0
    furthest = start = _size_of(path)
    with Bar(url.rsplit("/", 1)[1], size, "B") as bar:
        while size is None or start < size:
            asked_s, reason = 0, "the connection was cut"
            try:
                if _fetch_rest(url, path, start, size, bar):
                    return
            except urllib.error.HTTPError as error:
                if not _may_pass(error):
                    raise DistsegError(
                        f"download {url}: got status {error.code} ({error.reason}); check the address, or --url"
                    ) from None
                asked_s, reason = _asked_pause_s(error), f"status {error.code}"
            except ConnectionError as error:
                reason = str(error)
            start = _size_of(path)
            # Beyond all before: a server without ranges that is cut here and there would otherwise never end.
            failures = 0 if start > furthest else failures + 1
            furthest = max(furthest, start)
            if failures == ATTEMPTS_WITHOUT_PROGRESS:
                raise DistsegError(
                    f"download {url}: {failures} attempts brought nothing ({reason}); what came is kept; check the network and "
                    "run it again"
                )
            time.sleep(min(max(pause_s * 2**failures, asked_s), LONGEST_PAUSE_S))


def _fetch_rest(url: str, path: Path, start: int, size: int | None, bar: Bar) -> bool:
    """One request for what is missing; whether the server's last byte came."""
    try:
        with _network_errors():
            response = _open(url, start)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond what we have: whole, or longer than the file; the digest will tell
            return True
        raise
    with response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        have = start if goes_on else 0  # a server without ranges sends it all again
        total = size if response.length is None else have + response.length
        bar.set(have, total)
        with path.open("ab" if goes_on else "wb") as file:
            for chunk in _chunks(response):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    return total is None or have == total


def _open(url: str, start: int = 0) -> http.client.HTTPResponse:
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What has come each time, so that a cut loses nothing."""
    with _network_errors():
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """Makes whatever the network does a ConnectionError (TLS and routes raise plain OSErrors); a status stays one."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def _may_pass(error: urllib.error.HTTPError) -> bool:
    return error.code >= 500 or error.code in (408, 429)


def _asked_pause_s(error: urllib.error.HTTPError) -> int:
    """Seconds that the server asks us to wait; 0 where it does not say."""
    asked = error.headers.get("Retry-After", "")
    return int(asked) if asked.isdecimal() else 0


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(archive: Path, name: str, sha256: str, listed: Mapping[str, Any]) -> None:
    """Size and MD5 against the record's own list, SHA-256 against ours; a wrong file is removed."""
    expected = {"sha256": sha256}
    got = {"sha256": sha256_of(archive)}
    if "size" in listed:
        expected["size"], got["size"] = str(listed["size"]), str(archive.stat().st_size)
    if str(listed.get("checksum", "")).startswith("md5:"):
        expected["md5"] = listed["checksum"].removeprefix("md5:")
        with archive.open("rb") as file:
            got["md5"] = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    for kind in ("size", "md5", "sha256"):
        if got.get(kind) != expected.get(kind):
            archive.unlink()
            raise DistsegError(
                f"download {name}: got {kind} {got[kind]}; the record has {expected[kind]}; the file was removed; run it again"
            )


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks to `folder`, which gets its name when all is there; a top folder of the same name is left out."""
    name = archive.name.removeprefix(".download-")
    try:
        with zipfile.ZipFile(archive) as unpacking, folder_written_aside(folder) as aside:
            members = [info for info in unpacking.infolist() if not info.is_dir() and not _is_clutter(info.filename)]
            _check_members(name, members)
            free = shutil.disk_usage(aside).free
            if (needed := sum(info.file_size for info in members)) > free:
                raise DistsegError(f"output {folder}: got {free} bytes free; {needed} are needed; free some space")
            for info in counted(members, f"unpack {folder.name}", len(members), "file"):
                parts = PurePosixPath(info.filename).parts
                target = aside.joinpath(*(parts[1:] if len(parts) > 1 and parts[0] == folder.name else parts))
                target.parent.mkdir(parents=True, exist_ok=True)
                with unpacking.open(info) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
    except FileExistsError as error:
        raise DistsegError(
            f"archive {name}: got two members of the name {Path(error.filename).name!r}; nothing was unpacked; do not use this "
            "archive"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        archive.unlink()
        raise DistsegError(f"archive {name}: damaged ({error}); it was removed; run it again") from None


def _is_clutter(name: str) -> bool:
    """What macOS adds to archives."""
    return name.startswith("__MACOSX/") or PurePosixPath(name).name in (".DS_Store",)


def _check_members(archive: str, members: list[zipfile.ZipInfo]) -> None:
    for info in members:
        name = info.filename
        leaves = name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name
        if leaves or stat.S_ISLNK(info.external_attr >> 16):
            raise DistsegError(
                f"archive {archive}: got member {name!r}, which leaves its folder or is a link; nothing was unpacked; do not "
                "use this archive"
            )
    if (size := sum(info.file_size for info in members)) > LARGEST_UNPACKED_BYTES:
        raise DistsegError(
            f"archive {archive}: would unpack to {size} bytes; at most {LARGEST_UNPACKED_BYTES} are accepted; do not use it"
        )

"""The Triton server as a process: found, started on a repository, waited for, ended without losing a request."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distseg.errors import DistsegError
from distseg.shipped import as_typed

READY_WITHIN_S = 900
IN_ENVIRONMENT = Path("tritonserver", "pytriton", "tritonserver")  # where launch/setup_triton.sh puts it


@dataclass(frozen=True)
class Endpoints:
    """Where a server listens: HTTP, then gRPC, then metrics, on three ports in a row."""

    host: str
    port: int
    """of HTTP"""

    @property
    def http(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def grpc(self) -> str:
        return f"grpc://{self.host}:{self.port + 1}"

    @property
    def metrics(self) -> str:
        return f"http://{self.host}:{self.port + 2}/metrics"


@dataclass(frozen=True)
class Installation:
    """A server on this machine."""

    binary: Path
    backends: Path
    """a folder for each"""


def find_installation() -> Installation:
    """The tritonserver on PATH, as in its container, else the one in this virtual environment.

    Raises:
        DistsegError: there is none.
    """
    on_path = shutil.which("tritonserver")
    roots = [Path(on_path).resolve().parent.parent] if on_path else []
    for root in (*roots, Path(sys.prefix) / IN_ENVIRONMENT):
        found = Installation(root / "bin" / "tritonserver", root / "backends")
        if found.binary.is_file() and found.backends.is_dir():
            return found
    script, readme = as_typed("launch/setup_triton.sh"), as_typed("export/triton/README.md")
    python = f" {sys.executable}" if Path(script).is_absolute() else ""
    raise DistsegError(
        f"server: got no tritonserver on PATH or in {sys.prefix}; distseg serve starts one; "
        f"bash {script}{python}, or use the container of {readme}"
    )


@contextlib.contextmanager
def running_server(
    installation: Installation, repository: Path, endpoints: Endpoints, poll_s: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready, for as long as the block lasts; then it finishes what is in flight, up to 30 s.

    It logs warnings and errors to our stderr.

    Args:
        repository: of models, each with its config.pbtxt.
        poll_s: how often it looks for changed models and takes them, seconds; 0: never.

    Raises:
        DistsegError: a port is taken, or the server was not ready in time or ended by itself before.
    """
    if any(map(str.isspace, str(repository.resolve()))):  # its python backend would wait for ever (seen in 2.51.0)
        raise DistsegError(f"model: got {repository}; Triton takes no folder with a space in its path; move it")
    for port in range(endpoints.port, endpoints.port + 3):
        _check_free(endpoints.host, port)
    process = subprocess.Popen(_command(installation, repository, endpoints, poll_s), env=_environment())
    try:
        _wait_until_ready(process, endpoints)
        yield process
    finally:
        process.terminate()
        process.wait()


def _command(installation: Installation, repository: Path, endpoints: Endpoints, poll_s: int) -> list[str]:
    listen = ("http", "grpc", "metrics")
    polling = ["--model-control-mode=poll", f"--repository-poll-secs={poll_s}"] if poll_s else []
    return [
        str(installation.binary),
        f"--model-repository={repository}",
        f"--backend-directory={installation.backends}",
        "--log-info=false",
        *(f"--{what}-address={endpoints.host}" for what in listen),
        *(f"--{what}-port={endpoints.port + n}" for n, what in enumerate(listen)),
        *polling,
    ]


def _environment() -> dict[str, str]:
    """The python backend embeds the libpython and the packages of whichever python3 is first on PATH: ours."""
    first = {"PATH": str(Path(sys.executable).parent), "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}
    return os.environ | {
        name: os.pathsep.join(filter(None, (folder, os.environ.get(name)))) for name, folder in first.items()
    }


def _check_free(host: str, port: int) -> None:
    """Before the start: another server on the port would answer our question whether ours is ready."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise DistsegError(
                f"host: got {host}; it must be an IPv4 address, or a name of one, of this machine ({error}); give another --host"
            ) from None
        except (OSError, OverflowError) as error:
            raise DistsegError(
                f"port: got {port} on {host}; three free ports in a row are needed ({error}); give another --port"
            ) from None


def _wait_until_ready(process: subprocess.Popen[bytes], endpoints: Endpoints) -> None:
    end = time.monotonic() + READY_WITHIN_S
    while not _is_ready(endpoints):
        if (status := process.poll()) is not None:
            raise DistsegError(
                f"server: got exit status {status} from tritonserver before it was ready; it says why above; "
                "mend that and start again"
            )
        if time.monotonic() > end:
            raise DistsegError(
                f"server: got no answer within {READY_WITHIN_S} s; a model is loaded and warmed up in less; see its log above"
            )
        time.sleep(0.1)


def _is_ready(endpoints: Endpoints) -> bool:
    connection = http.client.HTTPConnection(endpoints.host, endpoints.port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    return False

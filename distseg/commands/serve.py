"""Serves an exported model: `distseg serve OUT` starts a Triton server on the repository that `distseg export` wrote.

It listens on three ports in a row: HTTP, gRPC and metrics. SIGTERM and Ctrl-C let it finish what is in flight. For
production, see export/triton/README.md.
"""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import DistsegError, one_line_errors, positive_int
from distseg.serving.repository import PYTHON_REPOSITORY, PYTORCH_REPOSITORY

BACKENDS = {"pytorch": PYTORCH_REPOSITORY, "python": PYTHON_REPOSITORY}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.serving.server import Endpoints, find_installation, running_server

    server = find_installation()
    backend = args.backend or ("pytorch" if (server.backends / "pytorch").is_dir() else "python")
    repository = args.out / BACKENDS[backend]
    if not repository.is_dir():
        raise DistsegError(f"model: got {args.out} without {repository.name}; it must be what distseg export wrote")
    endpoints = Endpoints(args.host, args.port)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)  # as Ctrl-C: ends the block below, which ends the server
    try:
        with running_server(server, repository, endpoints, args.poll_s or 0) as process:
            print(
                f"{args.out}: served by Triton's {backend} backend at {endpoints.http}, {endpoints.grpc}, "
                f"metrics {endpoints.metrics}",
                flush=True,
            )
            status = process.wait()
    except KeyboardInterrupt:
        return 0
    raise DistsegError(f"server: got exit status {status} from tritonserver; it ended by itself; start it again")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "serve",
        __doc__,
        "distseg serve model",
        "distseg serve model --port 9000",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that distseg export wrote")
    parser.add_argument(
        "--port", type=positive_int, default=8000, help="of HTTP; gRPC and metrics follow (default 8000)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument(
        "--backend", choices=tuple(BACKENDS), help="default: pytorch (GPUs) where the server has it, else python"
    )
    parser.add_argument(
        "--poll-s", type=positive_int, metavar="S", help="take a changed model over, looking every S seconds"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Where a server of a test or a benchmark may listen."""

import contextlib
import random
import socket

from distseg.serving.server import Endpoints


def free_endpoints(host: str = "127.0.0.1") -> Endpoints:
    """Three ports in a row that nobody listens on now."""
    for port in range(random.SystemRandom().randrange(20_000, 30_000), 60_000, 3):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for n in range(3):
                stack.enter_context(socket.create_server((host, port + n)))
            return Endpoints(host, port)
    raise OSError(f"no three free ports in a row on {host}")

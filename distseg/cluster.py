"""Work on a dask cluster: an executor whose failures are lines that a user can act on."""

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor

from distseg.errors import DistsegError


@contextlib.contextmanager
def cluster_executor(address: str, setting: str, unit: str) -> Iterator[Executor]:
    """The workers of a dask scheduler, for as long as the block lasts.

    Args:
        address: of the scheduler, tcp://host:port.
        setting: what the user gave the address with, for the errors.
        unit: what a task works on, for the errors.

    Raises:
        DistsegError: nobody answers, workers died, or the scheduler is lost.
    """
    from distributed import Client, KilledWorker  # an extra

    # It logs, with a traceback, what it raises as well.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise DistsegError(
            f"{setting}: got {address}; no dask scheduler answers there ({error}); start one, or leave {setting} out"
        ) from None
    with client:
        executor = client.get_executor(pure=False)
        try:
            yield executor
        except KilledWorker as error:
            raise DistsegError(
                f"{setting}: got a {unit} whose workers died ({error.allowed_failures + 1} of them, out of memory?); "
                f"finished {unit}s are kept; give the workers more memory and run it again"
            ) from None
        except CancelledError:
            raise DistsegError(
                f"{setting}: lost the scheduler {address}; finished {unit}s are kept; start it and run it again"
            ) from None
        finally:
            # Not waiting: what a dead worker held is done again, and without a worker that never ends.
            executor.shutdown(wait=False)

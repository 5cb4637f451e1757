"""Where a model is: a run, an exported file or a server. A wrong one is told of before torch is imported."""

from pathlib import Path
from urllib.parse import urlsplit

from distseg.errors import DistsegError
from distseg.runs.folder import open_run
from distseg.serving.formats import FORMATS


def check_source(source: Path) -> None:
    """Refuses what is neither a trained run nor an export.

    Raises:
        DistsegError: it is none of them.
    """
    if is_run(source):
        open_run(source)
    else:
        exported_file(source)


def is_run(source: Path) -> bool:
    return (source / "config.yaml").is_file()


def exported_file(source: Path) -> Path:
    """The file of an export folder, or that is named itself.

    Raises:
        DistsegError: there is none.
    """
    names = [format.file for format in FORMATS.values()]
    candidates = [source / name for name in names] if source.is_dir() else [source]
    for path in candidates:
        if path.is_file():
            return path
    raise DistsegError(
        f"model: got {source}; it must be a run folder, an export folder or one of {', '.join(names)}; check the path"
    )


def parse_address(address: str) -> tuple[str, str]:
    """Scheme and host:port of a server.

    Raises:
        DistsegError: it is no such address.
    """
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("grpc", "http") and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise DistsegError(f"server: got {address}; must be grpc://host:port or http://host:port; correct it")
    return parts.scheme, parts.netloc

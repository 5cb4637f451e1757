"""Voxels of a file that is a text header and bytes (MetaImage, NRRD): as many as the header claims, no more and no fewer."""

import bz2
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distseg.data.file_kinds import with_data_file
from distseg.data.volume import check_voxel_count
from distseg.errors import DistsegError

DEFLATE_RATIO = 1032  # nothing deflated unpacks to more than this many times its size
ANY_WRAPPER = zlib.MAX_WBITS | 32  # of deflated bytes: zlib's or gzip's


def read_voxels(
    path: Path, attached: bytes, dtype: np.dtype, shape: Sequence[int], compression: str = "", skip: int = 0
) -> np.ndarray:
    """An array whose first axis changes fastest, as both formats store it.

    Args:
        path: of the header, which names its data file, or has it attached.
        attached: what the file holds behind its header.
        dtype, shape: as the header claims them.
        compression: "" (none), "deflate" or "bzip2".
        skip: bytes before the voxels; -1: they are the last of the file.

    Raises:
        DistsegError: absurd, cut, longer than claimed, or damaged, before more memory is asked for than the header claims.
    """
    check_voxel_count(path, tuple(shape))
    claimed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data_file = with_data_file(path)[-1]
    stored = attached if data_file == path else _bytes_of(data_file, path)
    if skip < -1 or skip and compression:
        raise DistsegError(
            f"volume {path}: got {skip} bytes to skip; only raw voxels may lie behind some; save it as .mha or .nrrd"
        )
    if compression:
        voxels = _unpacked(stored, claimed, compression)
    else:
        voxels = stored[max(0, len(stored) - claimed) if skip == -1 else skip :]
    if voxels is None or len(voxels) != claimed:
        held = "another number, or damaged ones" if voxels is None else str(len(voxels))
        raise DistsegError(
            f"volume {data_file}: truncated or damaged (the header claims {claimed} bytes of voxels, the file holds {held}); copy "
            "or download it again"
        )
    values = np.frombuffer(voxels, dtype).reshape(tuple(shape), order="F")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DistsegError(f"volume {path}: holds NaN or infinite values; HU are finite; mend or leave out the volume")
    return values.astype(dtype.newbyteorder("="), copy=False)


def _bytes_of(data_file: Path, header: Path) -> bytes:
    if not data_file.is_file():
        raise DistsegError(
            f"volume {header}: got no {data_file.name} beside it, which holds its voxels; copy both files"
        )
    return data_file.read_bytes()


def _unpacked(stored: bytes, claimed: int, compression: str) -> bytes | None:
    """None: not exactly as many bytes as claimed, or a wrong checksum."""
    if compression == "deflate" and claimed > len(stored) * DEFLATE_RATIO:
        return None
    unpacker = zlib.decompressobj(ANY_WRAPPER) if compression == "deflate" else bz2.BZ2Decompressor()
    try:
        voxels = unpacker.decompress(stored, claimed + 1)
    except (zlib.error, OSError, EOFError):
        return None
    return voxels if unpacker.eof and not unpacker.unused_data else None

"""Compressed files are read by the end of their names: .gz, .xz, .bz2, .zst, or none of these."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from scalegpt.errors import Mistake

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
PACKED = (*_OPENERS, ".zst")
BLOCK = 1 << 20  # bytes read at once


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the uncompressed bytes, part by part.

    Raises Mistake when the file cannot be read, is damaged or ends early.
    """
    try:
        if path.suffix == ".zst":
            yield from _zstd_blocks(path)
            return
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise Mistake(f"cannot read {path}: {error}") from error


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file. Raises Mistake as `blocks` does, and for other encodings."""
    try:
        return b"".join(blocks(Path(path))).decode()
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not UTF-8 text: {error}") from None


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise Mistake(f"{path} needs zstandard: pip install 'scalegpt[data]'") from error
    # zstandard's stream_reader would take the end of a truncated file for the end of the text.
    frame, packed = None, b""
    with open(path, "rb") as file:
        try:
            while packed := packed or file.read(BLOCK >> 4):  # 64 KiB may unpack to 64 MiB
                frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data
                if frame.eof:
                    frame = None
        except zstandard.ZstdError as error:
            raise EOFError(error) from error
    if frame:
        raise EOFError("the file ends within a frame")

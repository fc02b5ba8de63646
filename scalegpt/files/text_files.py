"""Text files are found and read, packed or not, by what they hold; what is no text is refused.

A file is a path on a disk, or a URL that fsspec reads. A byte order mark at its start is no part of
its text.
"""

import bz2
import codecs
import glob
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import AnyStr

from scalegpt.errors import Mistake
from scalegpt.files.folder import is_url, open_url
from scalegpt.files.formats import HEAD, not_text

PACKED = (".gz", ".xz", ".bz2", ".zst")  # the usual ends of their names
BLOCK = 1 << 20  # bytes read at once
Share = tuple[Fraction, Fraction]  # where a share of a file begins and ends, from 0 to 1
WHOLE = (Fraction(0), Fraction(1))
MOST_HELD = 1 << 28  # characters of a text that has to be held in memory
_ZSTD = rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"  # a frame, or one to skip
_OPENERS = {
    rb"\x1f\x8b": gzip.open,
    rb"\xfd7zXZ\0": lzma.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
}


def find_files(pattern: str) -> list[Path | str]:
    """Return the file, a folder's files at any depth but the hidden, or the matches, sorted.

    Links are followed, and a file that has several names is there once; of a URL, the files are
    URLs. Raises Mistake if there is none, and for a link that leads nowhere.
    """
    if is_url(pattern):
        return _behind(pattern)
    path = Path(pattern)
    if path.is_dir():
        found = _below(path)
    else:
        found = [path] if path.is_file() else _matching(pattern)
    files: dict[Path, Path] = {}
    for file in sorted(found, key=Path.as_posix):
        real = file.resolve()
        if real.is_file():
            files.setdefault(real, file)
        elif not real.exists():
            raise Mistake(f"{file} is a link that leads nowhere: mend it, or remove it")
    if not files:
        raise Mistake(f"no file, folder or pattern of files {pattern!r}: check --input")
    return [*files.values()]


def _behind(url: str) -> list[str]:
    """Return the URLs of the file, the folder's files or the matches of a URL, sorted."""
    fs, root = open_url(url, "read")
    try:
        if fs.isfile(root):
            return [url]
        names = filter(fs.isfile, fs.glob(root)) if glob.has_magic(root) else fs.find(root)
        hidden = re.compile(r"/\.").search
        files = sorted(name for name in names if not hidden(name.removeprefix(root)))
    except Exception as error:  # each file system has errors of its own
        raise Mistake(f"cannot read {url}: {error}") from error
    if not files:
        raise Mistake(f"no file, folder or pattern of files {url!r}: check --input")
    return [fs.unstrip_protocol(name) for name in files]


def absolute(pattern: str | Path) -> str | Path:
    """Return a file, folder or pattern independent of the working directory; a URL as it is."""
    return pattern if is_url(pattern) else Path(pattern).resolve()


@contextmanager
def opened(file: Path | str) -> Iterator[BufferedReader]:
    """Yield a file's bytes as a file object. Raises OSError, and Mistake where a URL fails."""
    if not is_url(file):
        with open(file, "rb") as stream:
            yield stream
        return
    fs, name = open_url(str(file), "read")
    try:
        stream = fs.open(name, "rb")
    except Exception as error:  # each file system has errors of its own
        raise Mistake(f"cannot read {file}: {error}") from error
    with BufferedReader(stream, BLOCK) as buffered:
        yield buffered


def size_of(file: Path | str) -> int:
    """Return the bytes of a file; 0 for a URL that does not say."""
    if is_url(file):
        fs, name = open_url(str(file), "read")
        return fs.size(name) or 0
    return Path(file).stat().st_size


def _matching(pattern: str) -> Iterator[Path]:
    """Yield the files and folders of a pattern; glob would follow a link to a parent for ever."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    from fsspec.utils import glob_translate  # which hardly any command needs

    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    matches = re.compile(glob_translate(str(Path(pattern)))).match
    yield from (path for path in _below(Path(*parts[:plain])) if matches(str(path)))


def _below(path: Path) -> Iterator[Path]:
    """Yield the files below a folder; one that links lead to again, as to a parent, comes once."""

    def refuse(error: OSError) -> None:
        raise Mistake(f"cannot read the folder {error.filename}: {error.strerror}")

    seen = set()
    for folder, names, files in os.walk(path, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def blocks(path: Path | str, share: Share = WHOLE) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked if it is gzip, xz, bzip2 or zstd, part by part.

    share: only the lines that begin in this share of the file; of a packed one, all of its lines
    are in the share that begins with the file. Raises Mistake when the file cannot be read, is
    damaged or ends early.
    """
    try:
        with opened(path) as packed:
            head = packed.peek(16)
            if share[0] and any(re.match(magic, head) for magic in (_ZSTD, *_OPENERS)):
                return
            if re.match(_ZSTD, head):
                yield from _ahead(_zstd_blocks(path, packed))
                return
            for magic, unpack in _OPENERS.items():
                if re.match(magic, head):
                    with unpack(packed) as file:
                        yield from _ahead(iter(partial(file.read, BLOCK), b""))
                    return
            if share == WHOLE:
                yield from iter(partial(packed.read, BLOCK), b"")
            elif size := size_of(path):
                yield from _lines(packed, *(int(size * part) for part in share))
            elif head:
                raise Mistake(
                    f"{path} does not say its size, by which lines are divided: make no more "
                    "parts than there are files, or copy it to a disk"
                )
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise Mistake(f"cannot read {path}: {error}") from error


def _lines(file: BufferedReader, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of the lines that begin at `start` or later, and before `stop`."""
    if start:
        file.seek(start - 1)
        while (block := file.readline(BLOCK)) and not block.endswith(b"\n"):
            pass
    block = b"\n"
    while (left := stop - file.tell()) > 0 and (block := file.read(min(left, BLOCK))):
        yield block
    while not block.endswith(b"\n") and (block := file.readline(BLOCK)):
        yield block


def _ahead(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the blocks while a thread unpacks the next one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = thread.submit(next, blocks, None)
            yield block


def decoded(path: Path | str, errors: str = "strict", hint: str = "") -> Iterator[str]:
    """Yield the text of a UTF-8 file in parts, none of them empty.

    errors: "strict", or "replace" for bytes that are not UTF-8. hint: how to get the latter, for
    the message. Raises Mistake as `blocks` does, for other encodings, and for what is no text.
    """
    parts, head = blocks(path), b""
    while len(head) < HEAD and (block := next(parts, b"")):
        head += block
    if kind := not_text(head):
        raise Mistake(f"{path} is {kind}, not UTF-8 text: unpack or convert it, or leave it out")
    decoder, n_read, at_start = codecs.getincrementaldecoder("utf-8")(errors), 0, True
    for block in chain([head] if head else [], parts, [b""]):
        start = n_read - len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise Mistake(
                f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
                f"{start + error.start}; iconv -f LATIN1 -t UTF-8 converts Latin-1{hint}"
            ) from None
        n_read += len(block)
        if text and at_start:
            text, at_start = text.removeprefix("\ufeff"), False
        if text:
            yield text


def read_text(path: str | Path) -> str:
    """Return the whole text of a UTF-8 file. Raises Mistake as `decoded` does."""
    return "".join(decoded(Path(path)))


def parts(path: Path | str, chunks: Iterable[AnyStr], separator: AnyStr) -> Iterator[AnyStr]:
    """Yield what stands between separators in the text of a file, or in its bytes, which come in
    chunks.

    Raises Mistake for a part too long to be held in memory.
    """
    nothing = separator[:0]
    held, tail = [], nothing  # of the part that has no end yet; the tail may hold half a separator
    for chunk in chunks:
        *whole, last = (tail + chunk).split(separator)
        for part in whole:
            yield nothing.join([*held, part])
            held = []
        cut = max(0, len(last) - len(separator) + 1)
        held.append(last[:cut])
        tail = last[cut:]
        if sum(map(len, held)) > MOST_HELD:
            unit = "characters" if isinstance(separator, str) else "bytes"
            raise Mistake(
                f"{path} has more than {MOST_HELD:,} {unit} without {separator!r}, too many to be "
                "held in memory: divide them, or leave the file out"
            )
    yield nothing.join([*held, tail])


def _zstd_blocks(path: Path | str, file: BufferedReader) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise Mistake(f"{path} needs zstandard: pip install 'scalegpt[data]'") from error
    # zstandard's stream_reader would take the end of a truncated file for the end of the text.
    frame, packed, held, size = None, b"", [], 0
    try:
        while packed := packed or file.read(1 << 10):  # a KiB may unpack to 32 MiB
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            held.append(frame.decompress(packed))
            size += len(held[-1])
            if size > BLOCK >> 2:
                yield b"".join(held)
                held, size = [], 0
            packed = frame.unused_data
            if frame.eof:
                frame = None
    except zstandard.ZstdError as error:
        raise EOFError(error) from error
    if size:
        yield b"".join(held)
    if frame:
        raise EOFError("the file ends within a frame")

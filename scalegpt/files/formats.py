"""What a file holds is told by its first bytes, whatever its name ends in."""

import codecs
from pathlib import Path

HEAD = 4096  # so many first bytes are looked at
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"PK\x03\x04": "a zip archive (as .docx, .xlsx and .epub are)",
    b"BZh9": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an OLE file (as old .doc and .xls are)",
    b"\x93NUMPY": "a NumPy .npy file",
    b"PAR1": "Parquet",
    b"ARROW1\0\0": "Arrow",
    b"Obj\x01": "Avro",
    b"GGUF": "GGUF (llama.cpp's)",
    b"\x89HDF": "HDF5",
    b"SQLite format 3\0": "an SQLite database",
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer (git lfs pull gets the file)",
}
_UNICODE = {  # the longest first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def known_format(head: bytes) -> str:
    """Return the format of a file that begins with `head`, in words, or "" for any other."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def stand_in(path: Path) -> str:
    """Return what lies where a download should: nothing, a web page or a file of another format, in
    words, or "" for any other. Raises OSError."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    return known_format(head) if head else "an empty file"


def not_text(head: bytes) -> str:
    """Return what a file is that begins with `head`, or "" if that can be text.

    Text may be in an encoding that is not UTF-8. Such text has hardly any control characters, which
    binary data have everywhere; UTF-16 without its mark has a NUL in every second byte.
    """
    head = head[:HEAD]
    if kind := known_format(head):
        return kind
    for mark, name in _UNICODE.items():
        if head.startswith(mark):
            return f"{name} text"
    if max(head[::2].count(0), head[1::2].count(0)) > 0.4 * len(head):
        return "UTF-16 text, or binary data"
    control = head.translate(None, bytes([*range(7, 14), 26, 27, *range(32, 256)]))
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "binary data" if len(control) > 0.01 * len(head) else ""
    return "binary data" if len(control) > 0.3 * len(head) else ""

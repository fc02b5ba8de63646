"""A folder that datatrove's DocumentTokenizer or its merger has written is read as it is.

Beside each NAME.ds, ids in little-endian uint16 or uint32, lie NAME.ds.index, which says where each
of its documents ends, as our own indices do, and NAME.ds.metadata, whose first line is the name of
the tokenizer and the bytes of an id, as "gpt2|2". The files are one stream (`joined`), in the order
of their names. Those in the sub-folders train and val are these splits; of a folder without, the
last documents are for validation, with 1 of `HELD_OUT` tokens or more. A rank that had no documents
has left files that are empty.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalegpt.data import tokenizer
from scalegpt.data.joined import Joined
from scalegpt.errors import Mistake, counted
from scalegpt.files.folder import Folder
from scalegpt.files.json_files import read_object

SPLITS = ("train", "val")
HELD_OUT = 200  # as by --val-fraction of data/text/prepare.py, 0.005
WHOLE = 1 << 28  # up to so many bytes of ids, all are checked; of more, both ends of each file
EDGE = 1 << 16  # ids that are read at a time, and at each end
INDEX = np.dtype("<u8")
TOKENIZER = "tokenizer.json"
_GPT2 = ("gpt2", "openai-community/gpt2")
_READ = re.compile(r"[^.].*\.ds(\.index|\.metadata|\.loss)?|tokenizer\.json")
_SHUFFLED = re.compile(r"[0-9]+_(doc|chunk)_shuffled\.ds$")


class Opened(dict):
    """What meta.json would say of such a folder; `splits` has each one's tokens and index.

    It is a type of its own, which no meta.json from elsewhere can claim to be.
    """

    splits: dict[str, tuple[Joined, Joined]]


class _File(NamedTuple):
    """A NAME.ds: how many tokens and documents it has, the bytes of an id, and its tokenizer."""

    path: Path
    tokens: int
    documents: int
    width: int  # 0 where it is empty
    tokenizer: str | None

    @property
    def index(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index")


def names(folder: Folder, splits: Sequence[str] = SPLITS) -> list[str]:
    """Return the names of what is read of a folder and its `splits`; none without any NAME.ds.

    Raises Mistake for masks of the loss, files both in the folder and in a sub-folder, and a folder
    that cannot be read.
    """
    try:
        found = {"": folder.names(), **{f"{split}/": (folder / split).names() for split in splits}}
    except OSError as error:
        raise Mistake(f"cannot read {folder}: {error.strerror or error}") from None
    read = [sub + name for sub, inside in found.items() for name in inside if _READ.fullmatch(name)]
    ids = [name for name in read if name.endswith(".ds")]
    if masks := [name for name in read if ids and name.endswith(".loss")]:
        raise Mistake(
            f"{folder}/{masks[0]} masks tokens from the loss, and such masks are not read: write "
            "the files without save_loss_metadata, or remove *.ds.loss to learn every token"
        )
    if ids and "/" in ids[-1] and "/" not in ids[0]:
        raise Mistake(
            f"{folder} holds {ids[0]} and {ids[-1]}: put all .ds files into its sub-folders train "
            "and val, or all into itself, whose last documents are then for validation"
        )
    return read if ids else []


def read(folder: Path, listed: Sequence[str]) -> Opened:
    """Open and check the files of a folder on this machine which `names` has listed.

    Raises Mistake for files that are damaged, or that fit neither each other nor their tokenizer.
    """
    files = [_described(folder / name) for name in sorted(listed) if name.endswith(".ds")]
    if not any(file.tokens for file in files):
        raise Mistake(f"{folder}: its .ds files are empty; run datatrove again, on some text")
    shuffled = {new for name in listed if (new := _SHUFFLED.sub("unshuffled.ds", name)) != name}
    for file in files:
        if file.tokens and file.path.relative_to(folder).as_posix() in shuffled:
            raise Mistake(
                f"{file.path} lies beside its shuffled copy, as where datatrove was stopped while "
                "it wrote that: run it again, or the text would be there twice"
            )
    for what in ("tokenizer", "width"):
        said = {getattr(f, what): f.path for f in reversed(files) if getattr(f, what)}
        if len(said) > 1:
            (a, first), (b, other) = list(said.items())[:2]
            unit = " bytes an id" * (what == "width")
            raise Mistake(
                f"{first} is of another tokenizer than {other.name}, {a}{unit} and {b}{unit}: put "
                "them into two folders, and train on one"
            )
    spec = _tokenizer(folder, files, TOKENIZER in listed)
    size = 50257 if spec["kind"] == "gpt2" else tokenizer.load(spec).vocab_size
    dtype = np.dtype(f"<u{max(file.width for file in files)}")
    parts = {split: [f for f in files if f.path.parent == folder / split] for split in SPLITS}
    parts = {split: inside for split, inside in parts.items() if any(f.tokens for f in inside)}
    splits = {split: _stream(inside, dtype) for split, inside in parts.items()}
    facts = {split: _digests(inside, dtype, size) for split, inside in parts.items()}
    if not splits:
        splits = _held_out(folder, *_stream(files, dtype))
        facts = dict.fromkeys(SPLITS, _digests(files, dtype, size))
    spec = _with_mark(spec, *next(iter(splits.values())))
    opened = Opened(tokenizer=spec, vocab_size=size, dtype=dtype.name)
    for split, (tokens, ends) in splits.items():
        opened[split] = {"tokens": len(tokens), "documents": len(ends), **facts[split]}
    opened.splits = splits
    return opened


def _described(path: Path) -> _File:
    """Return what the files beside `path` say of it. Raises Mistake where they do not fit."""
    again = "copy both again, or run datatrove again"
    index, said = path.with_name(f"{path.name}.index"), path.with_name(f"{path.name}.metadata")
    if not index.is_file():
        raise Mistake(
            f"{path} has no {index.name}, which datatrove writes when the file is whole: copy it, "
            "or run datatrove again, with save_index=True"
        )
    size, (documents, rest) = path.stat().st_size, divmod(index.stat().st_size, INDEX.itemsize)
    if rest:
        raise Mistake(f"{index} has {index.stat().st_size:,} bytes, no multiple of 8; {again}")
    last = int(_mapped(index, INDEX)[-1]) if documents else 0
    name, _, stated = _first_line(said).rpartition("|")
    name, stated = (name, int(stated)) if stated in ("2", "4") else (stated, None)
    width = next((w for w in (2, 4) if last and size == w * last and stated in (w, None)), 0)
    if not width and (size or last):
        raise Mistake(
            f"{path} has {counted(size, 'byte')}, but by {index.name} {counted(last, 'token')} of "
            f"{stated or '2 or 4'} bytes each: one of the two is cut short, or another's; {again}"
        )
    known = None if not name or name.startswith("Unknown Tokenizer") else name
    return _File(path, last, documents, width, known)


def _first_line(file: Path) -> str:
    """Return the first line of a file; "" where it is not there."""
    try:
        with open(file, errors="replace") as stream:
            return stream.readline(4096).strip()
    except FileNotFoundError:
        return ""


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, "r"))


def _stream(files: Sequence[_File], dtype: np.dtype) -> tuple[Joined, Joined]:
    """Return the tokens of all files, and where each of their documents ends among these."""
    starts = [0, *accumulate(file.tokens for file in files[:-1])]
    return (
        Joined(lambda k: _mapped(files[k].path, dtype), [f.tokens for f in files], dtype),
        Joined(
            lambda k: _mapped(files[k].index, INDEX), [f.documents for f in files], INDEX, starts
        ),
    )


def _held_out(folder: Path, tokens: Joined, ends: Joined) -> dict[str, tuple[Joined, Joined]]:
    """Return the splits of a stream: the last documents are for validation. Raises Mistake."""
    documents = bisect_right(ends, len(tokens) - max(1, len(tokens) // HELD_OUT))
    cut = int(ends[documents - 1]) if documents else 0
    if not 0 < cut < len(tokens):
        raise Mistake(
            f"{folder} has too few documents to hold the last ones out for validation: put .ds "
            "files into its sub-folders train and val"
        )
    val = tokens.cut(cut, len(tokens)), ends.cut(documents, len(ends), less=cut)
    return {"train": (tokens.cut(0, cut), ends.cut(0, documents)), "val": val}


def _tokenizer(folder: Path, files: Sequence[_File], beside: bool) -> dict[str, Any]:
    """Return the spec of the tokenizer.json in the folder, if it is beside the files, else of the
    tokenizer that they name: of GPT-2's, or of one of Hugging Face in its cache on this machine.

    A path that they name is not followed, as it may come from anywhere. Raises Mistake.
    """
    name, file = next((f.tokenizer for f in files if f.tokenizer), None), folder / TOKENIZER
    if not beside:
        if name in _GPT2:
            return {"kind": "gpt2"}
        if name is None:
            raise Mistake(
                f"{folder} does not say which tokenizer made it, as {files[0].path.name}.metadata "
                f"would: put that one's {TOKENIZER} beside the .ds files"
            )
        from huggingface_hub import try_to_load_from_cache

        is_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".json")
        file = try_to_load_from_cache(name, TOKENIZER) if is_hub else None
        if not isinstance(file, str):
            get = f"run `hf download {name} {TOKENIZER}`, or put" if is_hub else "put"
            raise Mistake(
                f"{folder} was made with the tokenizer {name}: {get} its {TOKENIZER} beside the "
                ".ds files"
            )
    return {"kind": "tokenizer.json", "name": TOKENIZER, "json": read_object(Path(file))}


def _with_mark(spec: dict[str, Any], tokens: Joined, ends: Joined) -> dict[str, Any]:
    """Return the spec with the end-of-text mark that documents end with, where all have one.

    It is eos_token of DocumentTokenizer, which a tokenizer.json does not know.
    """
    special = [t for t in tokenizer.added_tokens(spec.get("json", {})) if t.get("special")]
    some = np.linspace(0, len(ends) - 1, 64).astype(int)
    last = {int(tokens[int(ends[i]) - 1]) for i in some.tolist()}
    marks = [token["content"] for token in special if {token["id"]} == last]
    return {**spec, "eot": marks[0]} if marks else spec


def _digests(files: Sequence[_File], dtype: np.dtype, vocab_size: int) -> dict[str, str]:
    """Return hashes of the tokens and of the indices of files, of large ones in part.

    Raises Mistake for an id outside the vocabulary among what is read.
    """
    tokens, index = hashlib.sha256(), hashlib.sha256()
    whole = sum(file.tokens for file in files) * dtype.itemsize <= WHOLE
    for file in (file for file in files if file.tokens):
        for path, kind, digest in ((file.path, dtype, tokens), (file.index, INDEX, index)):
            array = _mapped(path, kind)
            digest.update(len(array).to_bytes(8, "little"))
            last = max(0, len(array) - EDGE)
            for start in range(0, len(array), EDGE) if whole else sorted({0, last}):
                block = array[start : start + EDGE]
                digest.update(block.tobytes())
                if path == file.index and (block[1:] < block[:-1]).any():
                    raise Mistake(f"{path} is out of order: copy it again, or run datatrove again")
                if path == file.path and block.max() >= vocab_size:
                    at = int(np.argmax(block >= vocab_size))
                    raise Mistake(
                        f"{path}: token {start + at:,} is {block[at]}, outside the vocabulary of "
                        f"{vocab_size:,}: put the {TOKENIZER} that made it beside the .ds files"
                    )
    return {"sha256": tokens.hexdigest(), "index": index.hexdigest()}

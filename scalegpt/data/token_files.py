"""Token files are found, brought to the local disk, and checked before anything trains on them.

A dataset is a folder, or a URL of one, with `train.bin` and `val.bin`: headerless little-endian
uint16 or uint32 ids. `meta.json` (written by `data/*/prepare.py`) or nanoGPT's `meta.pkl` says what
the ids mean; without either they are taken for nanoGPT's GPT-2 ids in uint16. A text's `train.idx`
says where each of its documents ends: after how many tokens of the file, its end-of-text mark
included, as little-endian uint64. Folders of earlier versions have none. Conversations,
by meta.json of the kind "chat", are int32: ~id, below 0, is read but not predicted, and each begins
with ~bos, which is nowhere else. Of kind "pairs" every second has the rejected answer to the prompt
of the one before. Data of kind "prompts" are JSON lines, train.jsonl and val.jsonl.
The files of a text may be in parts, which are read as one (`joined`), or those of `datatrove`.
"""

import hashlib
import json
import os
import pickle
import posixpath
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scalegpt.config.limits import LARGEST
from scalegpt.config.presets import recipe
from scalegpt.data import datatrove, tokenizer
from scalegpt.data.joined import CopiedFile, Joined, part_folder, parts_in
from scalegpt.data.packing import PackedRows
from scalegpt.data.prompts import Prompts
from scalegpt.errors import Mistake, counted
from scalegpt.files.folder import Folder, expanded, open_folder, open_url
from scalegpt.files.formats import HEAD, known_format
from scalegpt.files.json_files import read_object
from scalegpt.files.staging import Copies, stage

KINDS = ("text", "chat", "pairs", "prompts")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int32": np.dtype("<i4")}
META = ("meta.json", "meta.pkl")
CHUNK = 1 << 24  # ids per check: large enough to run at disk speed, small in memory
INDEX = np.dtype("<u8")
SLOW = 1 << 28  # files above this many bytes get a progress bar


def file_of(split: str, kind: str) -> str:
    """Return the name of a split's file in a data set of this kind."""
    return f"{split}.jsonl" if kind == "prompts" else f"{split}.bin"


def index_of(split: str) -> str:
    """Return the name of the file that says where the documents of a split end."""
    return f"{split}.idx"


def narrowest(vocab_size: int) -> np.dtype:
    """Return the type that ids of such a vocabulary are written in."""
    return DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened dataset, whose `train` and `val` are read-only memory maps of ids [tokens].

    `open_datasets` puts those of conversations into rows.
    """

    name: str
    tokenizer: dict | str
    vocab_size: int
    train: np.memmap | Joined | PackedRows | Prompts
    val: np.memmap | Joined | PackedRows | Prompts
    val_bytes_per_token: float | None  # UTF-8 bytes of the text a predicted token stands for
    fingerprint: str  # changes with the tokens; a run continued on other data can be refused
    kind: str = "text"  # one of KINDS
    train_ends: np.ndarray | Joined | None = None  # where each document ends, if the folder says so
    val_ends: np.ndarray | Joined | None = None
    index: str = ""  # changes with them
    train_bytes_per_token: float | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """One opened file of a dataset; the fields are as in Dataset."""

    name: str
    tokenizer: dict | str
    vocab_size: int
    tokens: np.ndarray | Joined | PackedRows
    bytes_per_token: float | None
    kind: str = "text"
    ends: np.ndarray | Joined | None = None


def open_dataset(
    path: str | Path, cache_dir: str | None = None, limit: float | None = None
) -> Dataset:
    """Open and check the dataset at `path`, a folder or an fsspec URL (gs://, s3://, memory://).

    A URL is first copied to the local disk by `staging.stage`. With a `limit`, which is in bytes,
    parts are copied when they are read, by `staging.Copies`. Raises Mistake, saying what to do,
    for a folder or file that is missing, empty, truncated, of unknown format, or that holds an id
    outside its vocabulary.
    """
    name, folder, meta, copies = _locate(str(path), ("train", "val"), cache_dir, limit)
    kind = meta.get("kind", "text")
    splits, indices, hashed = {}, {}, [meta["dtype"], meta["vocab_size"]]
    for split in ("train", "val"):
        file, stated_hash = folder / file_of(split, kind), meta.get(split, {}).get("sha256")
        if kind == "prompts":
            _check_hash(file, stated_hash)
            splits[split] = Prompts.read(file, meta["tokenizer"], meta[split]["longest"])
            hashed += [len(splits[split]), stated_hash]
            continue
        tokens, indices[split] = _open(file, meta, copies)
        splits[split] = tokens
        # Both ends tell other data of equal size apart, whatever meta.json says of it.
        ends = tokens[: 1 << 16].tobytes() + tokens[-(1 << 16) :].tobytes()
        hashed += [len(tokens), stated_hash, hashlib.sha256(ends).hexdigest()]
    if copies:
        del copies.sizes  # of 100,000 parts, they take 80 MB
    return Dataset(
        name=name,
        tokenizer=meta["tokenizer"],
        vocab_size=meta["vocab_size"],
        train=splits["train"],
        val=splits["val"],
        val_bytes_per_token=_bytes_per_token(meta, "val", splits["val"]),
        fingerprint=hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:16],
        kind=kind,
        train_ends=indices.get("train"),
        val_ends=indices.get("val"),
        index=" ".join(meta.get(split, {}).get("index", "")[:16] for split in ("train", "val")),
        train_bytes_per_token=_bytes_per_token(meta, "train", splits["train"]),
    )


def open_split(
    path: str | Path, split: str, cache_dir: str | None = None, limit: float | None = None
) -> Split:
    """Open only "train" or "val" of the dataset at `path`, or the file `path` itself.

    Copies and raises as `open_dataset`.
    """
    file, copies = expanded(path).resolve(), None
    if file.suffix == ".ds" and file.is_file():
        raise Mistake(
            f"{file} is one of datatrove's files, which are read together: give {file.parent}"
        )
    if file.is_file():
        name, folder, split = file.name, file.parent, file.stem
        meta = read_meta(folder)[0]
    else:
        name, folder, meta, copies = _locate(str(path), (split,), cache_dir, limit)
        file = folder / f"{split}.bin"
    if (kind := meta.get("kind", "text")) in ("pairs", "prompts"):
        raise Mistake(
            f"{name} holds {kind}, which no loss over text is measured on: give --task, or --data "
            "with text or conversations"
        )
    tokens, ends = _open(file, meta, copies)
    rate = _bytes_per_token(meta, split, tokens)
    return Split(name, meta["tokenizer"], meta["vocab_size"], tokens, rate, kind, ends)


def _locate(
    path: str, splits: tuple[str, ...], cache_dir: str | None, limit: float | None = None
) -> tuple[str, Path, dict[str, Any], Copies | None]:
    """Return the dataset's name, its folder on this machine, which has the splits, its meta, and
    what copies the files of parts there, where these are not."""
    if not path:
        raise Mistake("data.path is empty; name a folder with train.bin and val.bin")
    remote = "://" in path
    folder = expanded(path).resolve()
    if remote:
        files = [file_of(split, kind) for kind in ("text", "prompts") for split in splits]
        folder = stage(path, (*META, *files, *map(index_of, splits)), cache_dir, limit)
        if not any((folder / file).is_file() for file in (*META, *files)):
            # Copies of files that are there no more would be read, too: stage removes them.
            here = (x for x in folder.rglob("*.ds*") if x.suffix != ".stamp")
            here = {x.relative_to(folder).as_posix() for x in here} | {datatrove.TOKENIZER}
            there = datatrove.names(Folder(path, *open_url(path, "read")), splits)
            stage(path, sorted({*here, *there}), cache_dir, limit)
    if folder.is_file():
        raise Mistake(
            f"data.path: {folder} is a file; point data.path at its folder {folder.parent}, or, if "
            f"it is text, make a data set of it: python {recipe('text')} --input {folder}"
        )
    if not folder.is_dir():
        raise Mistake(f"data.path: there is no folder {folder}; {_how_to_make(folder)}")
    meta, copies = read_meta(folder)[0], None
    if remote and "parts" in meta and limit is not None:
        copies = Copies(path, folder, limit)
    elif remote and "parts" in meta:
        kinds = [kind for split in splits for kind in (file_of(split, "text"), index_of(split))]
        n = len(parts_in(meta, splits[0]))
        parts = [part_folder(folder, k, n).relative_to(folder) / f for k in range(n) for f in kinds]
        stage(path, [part.as_posix() for part in parts], cache_dir)
    if isinstance(meta, datatrove.Opened):
        if missing := [split for split in splits if split not in meta.splits]:
            raise Mistake(
                f"{path} has no text in {missing[0]}/*.ds: put some there; or put all .ds files "
                "into the folder itself, whose last documents are then for validation"
            )
    apart = isinstance(meta, datatrove.Opened) or "parts" in meta
    for file in (file_of(split, meta.get("kind")) for split in splits if not apart):
        if not (folder / file).is_file():
            how = _how_to_make(folder, meta.get("kind", "text"))
            raise Mistake(f"{path} has no {file}; {how}")
    name = posixpath.basename(path.rstrip("/")) if remote else folder.name
    return name, folder, meta, copies


def _how_to_make(folder: Path, kind: str = "text") -> str:
    files = " and ".join(file_of(split, kind) for split in ("train", "val"))
    other = "text" if kind == "text" else "chat"
    script = recipe(folder.name) or f"{recipe(other)} --input YOUR_{other.upper()}"
    prompts = "--prompts " * (kind == "prompts")
    return (
        f"point data.path at a folder with {files}, or make one: python {script} {prompts}"
        f"--out {folder} (--tokenizer byte for a small model)"
    )


def _join(
    file: Path,
    meta: dict,
    dtype: np.dtype,
    counts: str,
    digests: str,
    copies: Copies | None,
) -> Joined:
    """Return the file that parts would be together, after a check of each one's size.

    counts, digests: what meta.json calls the numbers of their elements, and their hashes. copies:
    copies those that are not here when they are read. Raises Mistake, which names the part.
    """
    facts = parts_in(meta, file.stem)
    lengths, n = [part[counts] for part in facts], len(facts)

    def path(k: int) -> Path:  # made when needed, as so many take long to make, and much memory
        return part_folder(file.parent, k, n) / file.name

    again = "copy it, or run prepare.py with --part {}/{} and --force again"

    def name(k: int) -> str:
        return path(k).relative_to(file.parent).as_posix()

    for k, length in enumerate(lengths):
        part = path(k)
        try:
            size = part.stat().st_size if copies is None else copies.sizes[name(k)]
        except (OSError, KeyError) as error:
            why = getattr(error, "strerror", "it is not there")
            raise Mistake(f"cannot read {part}: {why}; {again.format(k, n)}") from None
        if size != length * dtype.itemsize:
            raise Mistake(
                f"{part} has {counted(size, 'byte')} but meta.json says "
                f"{length * dtype.itemsize:,}; {again.format(k, n)}"
            )
    if not sum(lengths):
        raise Mistake(f"{file}: its parts are empty; run prepare.py again")
    if copies is None and sum(lengths) * dtype.itemsize <= SLOW:
        for k, stated in enumerate(facts):
            _check_hash(path(k), stated[digests])
    added = None
    if counts == "documents":  # each part's ends are counted from its own begin
        tokens = [part["tokens"] for part in facts]
        added = [0, *accumulate(tokens[:-1])]

    def opened(k: int) -> np.ndarray | CopiedFile:
        if copies is None:
            try:
                return np.asarray(np.memmap(path(k), dtype, "r"))
            except FileNotFoundError:
                raise Mistake(
                    f"{path(k)} is there no more, as where a run with data.disk_limit has made "
                    "room; start again, with another data.cache_dir than that run's"
                ) from None
        return CopiedFile(copies, name(k), dtype, lengths[k], facts[k][digests])

    return Joined(opened, lengths, dtype, added, copied=copies is not None)


def _open(
    file: Path, meta: dict, copies: Copies | None = None
) -> tuple[np.ndarray | Joined, np.ndarray | Joined | None]:
    """Return the tokens of a split, and where its documents end."""
    if isinstance(meta, datatrove.Opened):
        return meta.splits[file.stem]
    return _open_tokens(file, meta, copies), _open_index(file, meta, copies)


def _open_tokens(file: Path, meta: dict, copies: Copies | None) -> np.memmap | Joined:
    dtype, vocab_size, facts = DTYPES[meta["dtype"]], meta["vocab_size"], meta.get(file.stem, {})
    if "parts" in meta:
        return _join(file, meta, dtype, "tokens", "sha256", copies)
    try:
        tokens = _map_tokens(file, dtype, facts.get("tokens"))
    except OSError as error:
        raise Mistake(f"cannot read {file}: {error.strerror}; is its disk there?") from None
    if "format" not in meta:  # nanoGPT's files do not state their dtype, as meta.json does
        _refuse_other_files(file, tokens)
    if not 0 <= facts.get("max_id", vocab_size) < vocab_size:
        _check_ids(file, tokens, vocab_size)
    if "sha256" in facts and tokens.nbytes <= SLOW:  # a larger one takes too long to read
        _check_hash(file, facts["sha256"])
    return tokens


def _open_index(file: Path, meta: dict, copies: Copies | None) -> np.ndarray | Joined | None:
    """Map the index of a token file's documents, uint64 [documents], or None if it has none."""
    facts = meta.get(file.stem, {})
    if "index" not in facts:
        return None
    index = file.with_name(index_of(file.stem))
    if "parts" in meta:
        return _join(index, meta, INDEX, "documents", "index", copies)
    if not index.is_file():
        raise Mistake(f"{file.parent} has no {index.name}; copy it, or run prepare.py again")
    size, expected = index.stat().st_size, facts.get("documents", 0) * INDEX.itemsize
    if not size or size != expected:
        raise Mistake(
            f"{index} has {counted(size, 'byte')} but meta.json says {expected:,}; copy it or run "
            "prepare.py again"
        )
    ends = np.memmap(index, INDEX, "r")
    if size <= SLOW:
        _check_hash(index, facts["index"])
    if ends[-1] != facts["tokens"]:
        raise Mistake(
            f"{index}: its documents end at token {ends[-1]:,}, {file.name} at "
            f"{facts['tokens']:,}; run prepare.py again"
        )
    return ends


def _bytes_per_token(meta: dict, split: str, tokens: np.memmap) -> float | None:
    """Return the UTF-8 bytes of the text that a predicted token stands for, None if not known."""
    facts = meta.get(split, {})
    count = len(tokens) if meta.get("kind", "text") == "text" else facts.get("trained")
    if facts.get("bytes") and count:
        return facts["bytes"] / count
    match meta["tokenizer"]:  # nanoGPT's data of characters, which do not count their bytes
        case {"kind": "char", "chars": chars} if meta.get("kind", "text") == "text":
            if tokens.nbytes <= SLOW:  # a larger one takes too long to read
                sizes = np.array([len(char.encode(errors="surrogatepass")) for char in chars])
                return float(sizes[tokens].mean())
    return None


def check_tokens(dataset: Dataset, block_size: int) -> None:
    """Raise Mistake unless both splits hold one whole window of block_size + 1 tokens."""
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        if len(tokens) < block_size + 1:
            raise Mistake(
                f"{dataset.name}: {split} has {counted(len(tokens), 'token')}; model.block_size="
                f"{block_size} needs at least {block_size + 1}. Lower model.block_size or use "
                "more text (prepare.py's --val-fraction or --val-input gives more to validation; "
                "datatrove's files have it in a folder val)"
            )


def read_meta(folder: Path) -> tuple[dict, bool]:
    """Return meta.json's contents, or what it would say of datatrove's files, and whether a file
    states them; otherwise they are assumed."""
    # lexists, for a broken link: ignoring it would take the ids for GPT-2's.
    if os.path.lexists(folder / "meta.json"):
        return _read_meta_json(folder / "meta.json"), True
    if os.path.lexists(folder / "meta.pkl"):
        return _read_meta_pkl(folder / "meta.pkl"), True
    if (folder / "meta.json.partial").exists():  # else bytes would be trained on as GPT-2 ids
        raise Mistake(f"{folder}: preparing it was interrupted; run prepare.py again")
    ours = any((folder / file_of(split, "text")).exists() for split in datatrove.SPLITS)
    if not ours and (names := datatrove.names(open_folder(folder))):
        return datatrove.read(folder, names), True
    return {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16"}, False


def _read_meta_json(file: Path) -> dict:
    again = "run prepare.py again to rewrite it"
    meta = read_object(file, f"; {again}")
    if meta.get("format", 1) != (2 if "parts" in meta else 1):
        raise Mistake(
            f"{file}: format {meta['format']!r} is unknown, only 1, or 2 of parts; update scalegpt"
        )
    parts = {"": meta, "train.": meta.get("train"), "val.": meta.get("val")}
    needed = {"": ("format", "tokenizer", "vocab_size", "dtype", "train", "val")}
    if meta.get("kind") == "prompts":
        needed |= dict.fromkeys(("train.", "val."), ("documents", "tokens", "longest", "sha256"))
    for prefix, part in parts.items():
        keys = needed.get(prefix, ("tokens",))
        missing = [prefix + k for k in keys if not isinstance(part, dict) or k not in part]
        if missing:
            raise Mistake(f"{file} lacks {', '.join(missing)}; {again}")
        counts = {"vocab_size", "tokens", "max_id", "bytes", "longest", "documents"}
        for key in counts & part.keys():
            most = LARGEST if key == "vocab_size" else 2**63 - 1
            if type(part[key]) is not int or not 0 <= part[key] <= most:
                raise Mistake(f"{file}: {prefix}{key} is {part[key]!r}, not a count; {again}")
    if meta["dtype"] not in (*DTYPES,):
        raise Mistake(f"{file}: dtype {meta['dtype']!r} is not one of {', '.join(DTYPES)}")
    kind, dtype = meta.get("kind", "text"), meta["dtype"]
    if kind not in KINDS or (kind != "text") != (dtype == "int32"):
        raise Mistake(f"{file}: no data are of kind {kind!r} in {dtype}; update scalegpt")
    try:
        tokenizer.check(meta["tokenizer"])
    except ValueError as error:  # else a run would find out at its end
        raise Mistake(f"{file}: {error}; {again}") from None
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers, and nothing else.

    Every other object, and so every call that a pickle could make, has to come through find_class.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_meta_pkl(file: Path) -> dict:
    try:
        with open(file, "rb") as stream:
            meta = _PlainUnpickler(stream).load()
        size = meta["vocab_size"]
        if type(size) is not int or not 0 < size <= LARGEST:
            raise Mistake(f"vocab_size is {size!r}")
        names = [meta["itos"][i] for i in range(size)] if "itos" in meta else []
        spec = {"kind": "ids", "vocab_size": size}
        characters = all(isinstance(c, str) and len(c) == 1 for c in names)
        if names and characters and len(set(names)) == size:
            spec = {"kind": "char", "chars": "".join(names)}
        elif names:  # how words make a text is not said: the table only tells these ids from others
            spec["table"] = hashlib.sha256(file.read_bytes()).hexdigest()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise Mistake(
            f"{file} is not nanoGPT's table, a pickle of plain vocab_size and, where ids stand for "
            f"text, itos ({type(error).__name__}: {error}); write a meta.json instead"
        ) from error
    return {"tokenizer": spec, "vocab_size": size, "dtype": narrowest(size).name}


def _map_tokens(file: Path, dtype: np.dtype, expected: int | None) -> np.memmap:
    size = file.stat().st_size
    if size == 0:
        raise Mistake(f"{file} is empty; run prepare.py again")
    if size % dtype.itemsize:
        with file.open("rb") as stream:
            kind = _foreign(stream.read(HEAD)) or "truncated or of another dtype"
        raise Mistake(
            f"{file} has {counted(size, 'byte')}, not a multiple of {dtype.itemsize} "
            f"({dtype.name}): it is {kind}; run prepare.py again"
        )
    if expected is not None and size != expected * dtype.itemsize:
        kind = "truncated" if size < expected * dtype.itemsize else "longer than it should be"
        raise Mistake(
            f"{file} has {counted(size, 'byte')} but meta.json says {counted(expected, 'token')} "
            f"of {dtype.name}, {expected * dtype.itemsize:,} bytes: it is {kind}; copy it or run "
            "prepare.py again"
        )
    return np.memmap(file, dtype=dtype, mode="r")


def _foreign(head: bytes) -> str:
    """Return the format of a file that begins with `head`, or "" if it may hold token ids.

    Token ids have zero bytes and control characters everywhere, which plain text has not.
    """
    if kind := known_format(head):
        return kind
    control = {*range(9), *range(14, 27), *range(28, 32)}
    return "plain text" if len(head) >= 64 and control.isdisjoint(head) else ""


def _check_hash(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise Mistake(
            f"{file} is not the file that meta.json beside it describes (sha256 {digest[:8]}..., "
            f"not {expected[:8]}...); run its prepare.py again"
            + (", or remove meta.json if the ids are nanoGPT's" if file.suffix == ".bin" else "")
        )


def _refuse_other_files(file: Path, tokens: np.ndarray) -> None:
    """Raise Mistake for files of other formats, where no meta file states the dtype.

    Plain text and .npy files, read as uint16, would pass the check of ids. So would ids in uint32
    or int64, and a run would train on text with an id 0 after every token.
    """
    head = tokens[: 1 << 16]
    if kind := _foreign(head.tobytes()[:HEAD]):
        raise Mistake(
            f"{file} is {kind}, no file of token ids; make those with {recipe('text')}, or "
            "say what they are in a meta.json"
        )
    ours, width = tokens.dtype.name, tokens.dtype.itemsize
    if len(head) >= 64 and not head[1::2].any():
        wide = "int64" if width == 4 or not head[2::4].any() else "uint32"
        raise Mistake(
            f"{file}: every second value is 0, which looks like {wide} read as {ours}; write it "
            f"as {ours}, np.fromfile(FILE, {wide!r}).astype({ours!r}).tofile(NEW_FILE), or say "
            f'"dtype": "{ours}" in a meta.json if it is right'
        )


def _check_ids(file: Path, tokens: np.ndarray, vocab_size: int) -> None:
    bar = tqdm(
        total=len(tokens),
        desc=f"checking {file.name}",
        unit="tok",
        unit_scale=True,
        disable=tokens.nbytes <= SLOW,
    )
    with bar:
        for begin in range(0, len(tokens), CHUNK):
            chunk = tokens[begin : begin + CHUNK]
            chunk = np.where(chunk < 0, ~chunk, chunk)
            if chunk.max() >= vocab_size:
                at = begin + int(np.argmax(chunk >= vocab_size))
                raise Mistake(
                    f"{file}: token {at} is {tokens[at]}, outside the vocabulary of {vocab_size}; "
                    f"run prepare.py again with the right tokenizer{_dtype_hint(tokens)}"
                )
            bar.update(len(chunk))


def _dtype_hint(tokens: np.ndarray) -> str:
    head = tokens[: 1 << 16]
    if kind := _foreign(head.tobytes()[:HEAD]):
        return f". It looks like {kind}"
    if tokens.dtype.itemsize == 2 and len(head) >= 8 and head[1::2].max() < 16:
        return ". It looks like uint32 read as uint16: every second value is nearly 0"
    if tokens.dtype.itemsize == 4 and (head > 0xFFFF).mean() > 0.5:
        return ". It looks like uint16 read as uint32: most values are pairs of ids"
    return ""

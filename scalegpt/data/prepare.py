"""Documents become token files, for data/*/prepare.py: train.bin, val.bin and meta.json.

A token file is nanoGPT's: headerless little-endian uint16 (uint32 above 65,536 ids). Those of text
have train.idx and val.idx beside them, which say where documents end. Text streams through in
constant memory, or is refused by its size. Prompts become JSON lines instead.
Files get their names when they are whole, so that a killed process leaves no half of one.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from scalegpt.config.parser import Parser
from scalegpt.config.presets import data_folder
from scalegpt.data.fast_encoding import Encode, by_itself, faster
from scalegpt.data.reading import Document, chunks_of
from scalegpt.data.token_files import INDEX, file_of, index_of, narrowest
from scalegpt.data.tokenizer import Tokenizer, kind, load
from scalegpt.errors import Mistake, counted
from scalegpt.files.folder import local_path
from scalegpt.files.json_files import read_object

SPLITS = ("train", "val")
PART = 1 << 20  # characters of a long document that are cut, and of several short ones, at once
MOST_WHOLE = 1 << 22  # characters encoded in one piece: tokenizers take up to 180 bytes for each
_ANYWHERE = re.compile(r"(?s).*")  # these match a text up to the last place where it may be cut
_BEFORE_A_SPACE = re.compile(r"(?s).*\S(?=[ \n])")
_MOST = {"max_id", "longest"}  # facts of which a split has the largest, not the sum
_worker_encodes: Encode | None = None  # set in a worker when it starts


@dataclass(frozen=True)
class Corpus:
    """A corpus is what `write_dataset` turns into token files.

    documents: pairs of "train" or "val" and a document, in the order they are to be written.
    text_bytes: about how much text there is, for the disk estimate and the progress bar.
    separate: whether the tokenizer's end-of-text mark follows each document.
    facts: what meta.json says besides; with "part" in it, a split may be empty.
    """

    tokenizer: Tokenizer
    documents: Iterable[tuple[str, Document]]
    text_bytes: int
    separate: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


def write_dataset(
    out: Path, build: Callable[[], Corpus], source: str, workers: int | None, force: bool
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json into the folder `out`; return meta.json's content.

    build: makes the corpus; not called if `out` already holds `source`, unless `force`.
    source: text and settings in words; kept in meta.json and compared when called again.
    workers: processes that encode; with gigatoken threads, of which one reads (0, 1: this one;
    None: by size). The files do not depend on it.
    Raises Mistake for other data in `out`, too little disk or no text, and what `build` raises.
    """
    if workers is not None and workers < 0:
        raise Mistake(f"--workers={workers} must be 0, for this process alone, or more")

    def write() -> dict[str, Any]:
        corpus = build()
        tokenizer = corpus.tokenizer
        dtype = narrowest(tokenizer.vocab_size)
        bpe = tokenizer.name not in ("byte", "char")  # English: 4.4 bytes a token of gpt2's
        check_disk(out, corpus.text_bytes * dtype.itemsize / (4 if bpe else 1))
        splits = write_bins(out, _encoded(corpus, dtype, workers), corpus.text_bytes, "bytes")
        several = any(splits[split]["documents"] > 1 for split in SPLITS)
        if several and corpus.separate and tokenizer.eot is None:
            print("nothing separates documents: this tokenizer has no end-of-text mark")
        for split in SPLITS:
            tokens, documents = splits[split]["tokens"], splits[split]["documents"]
            print(f"{split}: {counted(tokens, 'token')}, {counted(documents, 'document')}")
        return {**described(tokenizer, dtype, splits), **corpus.facts}

    return publish(out, write, source, force)


def described(tokenizer: Tokenizer, dtype: np.dtype, splits: dict[str, Any]) -> dict[str, Any]:
    """Return meta.json's content for the files that `write_bins` has described by `splits`."""
    meta = {"format": 1, "tokenizer": tokenizer.spec(), "vocab_size": tokenizer.vocab_size}
    return {**meta, "dtype": dtype.name, **splits}


def publish(
    out: Path, write: Callable[[], dict[str, Any]], source: str, force: bool
) -> dict[str, Any]:
    """Publish what `write` leaves in the folder `out` as a data set; return meta.json's content.

    write: calls `write_bins` and returns meta.json's content; not called if `out` already holds
    `source`, unless `force`. Raises Mistake for other data in `out`, for an empty split that is not
    of a part, and what `write` raises.
    """
    if not force:
        prepared(out, source)  # what may not be overwritten is not even locked
    with _new_or_kept(out), _only_writer(out):
        if not force and (meta := prepared(out, source)):
            print(f"{out} is already prepared; --force does it again")
            return meta
        meta = {**write(), "source": source}
        for split in SPLITS:
            if not meta[split]["tokens"] and "part" not in meta:
                raise Mistake(f"no document is in the {split} split: give more text")
        _publish(out, meta)
    return meta


def training_flags(kind: str, tokenizer: str, out: Path) -> str:
    """Return the flags by which scalegpt.train learns from data of this kind that lie in `out`.

    tokenizer: as prepare.py takes it; the folder of a run is what to start from, too.
    """
    config = {"chat": "sft", "pairs": "dpo", "prompts": "grpo"}[kind]
    source = shlex.quote(tokenizer) if Path(tokenizer, "config.yaml").is_file() else "..."
    start = [] if (tokenizer, kind) == ("gpt2", "chat") else [f"--run.init_from={source}"]
    return " ".join([f"--config {config} --data.path={shlex.quote(str(out))}", *start])


def check_disk(folder: Path, need: float) -> None:
    """Print how many bytes are needed and free in an existing folder; raise Mistake if too few."""
    free = shutil.disk_usage(folder).free
    print(f"about {need / 1e6:,.1f} MB needed in {folder}, {free / 1e6:,.1f} MB free", flush=True)
    if need > free:
        raise Mistake(f"too little disk in {folder}: {need:,.0f} bytes needed, {free:,} free")


@contextmanager
def _new_or_kept(out: Path) -> Iterator[None]:
    """Create the folder for the `with` block; if the block raises, remove what was created."""
    created = [path for path in (out, *out.parents) if not os.path.lexists(path)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"cannot write to --out={out}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in created:
                path.rmdir()
        raise


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Wait for other processes that prepare `out`: those of one job may start together."""
    with FileLock(out / "prepare.tmp"):
        try:
            _remove_partial(out)  # of a killed run; they would count as used
            yield
        finally:
            # meta.json.partial stays where publishing failed: it says that the others are no set.
            _remove_partial(out)
            with suppress(PermissionError):  # Windows keeps a file that is open
                (out / "prepare.tmp").unlink(missing_ok=True)


def _remove_partial(out: Path) -> None:
    for split in SPLITS:
        for name in (index_of(split), *(file_of(split, k) for k in ("text", "prompts"))):
            (out / f"{name}.partial").unlink(missing_ok=True)


def prepared(out: Path, source: str) -> dict[str, Any] | None:
    """Return meta.json if `out` holds `source`, whole; raise Mistake if it holds other data."""
    if not os.path.lexists(out / "meta.json"):
        return None
    meta = read_object(out / "meta.json", "; see --force and --out")
    if "parts" in meta and meta.get("source") == source:
        return meta  # of which --merge has checked the parts, and each run does again
    paths = {split: out / file_of(split, meta.get("kind")) for split in SPLITS}
    indexed = {index_of(s): meta[s] for s in SPLITS if "index" in meta.get(s, {})}
    paths |= {name: out / name for name in indexed}
    sizes = {s: path.stat().st_size for s, path in paths.items() if path.is_file()}
    indices = {n: part.get("documents", 0) * INDEX.itemsize for n, part in indexed.items()}
    match meta:
        case {"kind": "prompts", "train": {"bytes": int(train)}, "val": {"bytes": int(val)}}:
            if sizes != {"train": train, "val": val}:
                return None
        case {
            "dtype": "uint16" | "uint32" | "int32" as dtype,
            "train": {"tokens": int(train)},
            "val": {"tokens": int(val)},
        }:
            width = np.dtype(dtype).itemsize
            if sizes != {"train": train * width, "val": val * width} | indices:
                return None
    if (stored := meta.get("source", "something unknown")) != source:
        raise Mistake(f"{out} holds {stored!r}, not {source!r}: see --force and --out")
    return meta


def _kind(out: Path) -> str:
    """Return of which kind the data in a folder are, by its meta.json, or one half published."""
    for name in ("meta.json.partial", "meta.json"):
        with suppress(Mistake):  # for one that is broken or not there
            return read_object(out / name).get("kind", "text")
    return "text"


def write_bins(
    out: Path,
    encoded: Iterable[tuple[str, np.ndarray, dict[str, int]]],
    total: int,
    unit: str = "documents",
) -> dict[str, Any]:
    """Write train.bin.partial and val.bin.partial; return their entries for meta.json.

    encoded: split, ids and what they add to its entry: bytes, documents and perhaps more; of text
    also `ends`, after how many of these ids a document ends, for train.idx.partial and
    val.idx.partial. An id below 0 is ~id. total: the end of the progress bar, which counts what
    `unit` names in those entries.
    """

    def largest(ids: np.ndarray) -> int:
        return max(int(ids.max(initial=0)), ~int(ids.min(initial=0)))

    rows = (
        (split, ids, {**added, "tokens": ids.size, "max_id": largest(ids)})
        for split, ids, added in encoded
    )
    return _write_rows(out, "text", rows, total, unit)


def write_prompts(
    out: Path, prompts: Iterable[tuple[str, dict[str, Any], int]], total: int
) -> dict[str, Any]:
    """Write train.jsonl.partial and val.jsonl.partial; return their entries for meta.json.

    prompts: split, example and the number of its prompt's tokens; `total` of them. Raises Mistake
    for files of other origin in the folder.
    """
    for name in (file_of(split, "prompts") for split in SPLITS):
        if (out / name).exists() and _kind(out) != "prompts":
            raise Mistake(f"--out {out} holds a {name} of another origin: choose another folder")
    rows = (
        (split, line, {"tokens": n, "longest": n, "documents": 1, "bytes": len(line)})
        for split, example, n in prompts
        for line in [f"{json.dumps(example, ensure_ascii=False)}\n".encode()]
    )
    return _write_rows(out, "prompts", rows, total, "documents")


def _write_rows(
    out: Path, kind: str, rows: Iterable[tuple[str, Any, dict[str, int]]], total: int, unit: str
) -> dict[str, Any]:
    """Write the files of a kind of data from split, content and facts of each row, which add up."""
    counts = {s: Counter(tokens=0, bytes=0, documents=0) for s in SPLITS}
    names = {split: file_of(split, kind) for split in SPLITS}
    files, digests = {}, defaultdict(hashlib.sha256)
    shown = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": " conversations"}
    bar = tqdm(total=total, **shown, leave=False, disable=None)
    with bar, ExitStack() as stack:

        def write(name: str, content: Any) -> None:
            if name not in files:
                files[name] = stack.enter_context(open(out / f"{name}.partial", "wb"))
            files[name].write(content)
            digests[name].update(content)

        for name in names.values():
            write(name, b"")
        for split, content, facts in rows:
            if (ends := facts.pop("ends", None)) is not None:
                write(index_of(split), (counts[split]["tokens"] + ends).astype(INDEX))
            write(names[split], content)
            for key, value in facts.items():
                before = counts[split][key]
                counts[split][key] = max(before, value) if key in _MOST else before + value
            bar.update(facts[unit])
    return {
        s: {**counts[s], "sha256": digests[names[s]].hexdigest()}
        | ({"index": digests[index].hexdigest()} if (index := index_of(s)) in files else {})
        for s in SPLITS
    }


def _publish(out: Path, meta: dict[str, Any]) -> None:
    """Give the files their names, in an order that never shows an old beside a new file."""
    old, new = ([file_of(s, kind) for s in SPLITS] for kind in (_kind(out), meta.get("kind")))
    (out / "meta.json.partial").write_text(json.dumps(meta, indent=1))
    (out / "meta.json").unlink(missing_ok=True)
    if "parts" in meta:  # their files have their names
        new = []
    for name in {*old, *map(index_of, SPLITS)} - {*new[:1]}:
        (out / name).unlink(missing_ok=True)
    indices = [index_of(split) for split in SPLITS if new and "index" in meta[split]]
    for name in (*new, *indices, "meta.json"):
        with open(out / f"{name}.partial", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(file.name, out / name)


def _encoded(corpus: Corpus, dtype: np.dtype, workers: int | None) -> Iterator[tuple]:
    """Yield `_encode`'s results in the order of documents; workers run a few batches ahead."""
    mark = corpus.tokenizer.eot if corpus.separate else None
    encode = partial(_encode, corpus.tokenizer.name, mark, dtype)
    batches = _batches(corpus)
    first = next(batches)
    ours = getattr(os, "sched_getaffinity", None)  # Linux has it; a Slurm job has some of the cores
    cores = len(ours(0)) if ours else os.cpu_count() or 1
    texts = [piece for _, piece, _ in first]
    # One core is busy with reading; two threads of gigatoken on a core cost more than they bring.
    threads = max(1, (cores if workers is None else workers) - 1)
    fast, said = faster(corpus.tokenizer, texts, threads)
    if workers is None:  # to start processes costs seconds: only where it pays
        slow = said and corpus.text_bytes > 50e6
        workers = cores if fast else cores // 2 if slow else 0
    if said:
        print(said, flush=True)
    batches, ahead = chain([first], batches), deque()
    if workers < 2:
        for batch in batches:
            yield from encode(batch, fast or by_itself(corpus.tokenizer))
        return
    if fast:  # its own threads encode, while this one reads
        pool, work = ThreadPoolExecutor(1), partial(encode, by=fast)
    else:
        # spawn: a forked worker would inherit threads and a device's state
        start = (corpus.tokenizer.spec(),)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start)
        work = encode
    try:
        for batch in batches:
            ahead.append(pool.submit(work, batch))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(corpus: Corpus) -> Iterator[list[tuple[str, str, bool]]]:
    """Yield lists of (split, piece of a document, whether the document ends with it).

    Each list holds about a million characters; there is at least one list.
    """
    batch, size = [], 0
    for split, document in corpus.documents:
        for piece, last in _pieces(document, corpus.tokenizer):
            batch.append((split, piece, last))
            size += len(piece) + 1
            if size >= PART:
                yield batch
                batch, size = [], 0
    yield batch


def _pieces(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Cut a document where no token of the tokenizer crosses; True comes with the end.

    Raises Mistake for a document that cannot be cut often enough.
    """
    if isinstance(document, str) and len(document) <= PART:
        yield document, True
        return
    # In short parts, so that one place to cut, far on, does not let all before it pass whole.
    parts = (c[i : i + PART] for c in chunks_of(document) for i in range(0, len(c), PART))
    places, held, size, last = None, [], 0, ""
    if tokenizer.piecewise:
        places = _ANYWHERE if kind(tokenizer.spec()) in ("byte", "char") else _BEFORE_A_SPACE
    for part in parts:
        text = last + part  # the last place may lie between parts
        match = places and places.match(text)
        if cut := match.end() if match else 0:
            yield "".join([*held, text[:cut]]), False
            held, size = [], 0
        rest, last = text[cut:-1], text[cut:][-1:]
        held.append(rest)
        size += len(rest)
        if size > MOST_WHOLE:
            without = " without a space or newline after a word" if tokenizer.piecewise else ""
            raise Mistake(
                f"a document has more than {MOST_WHOLE:,} characters{without}, which "
                f"{tokenizer.name} would encode in one piece: {held[0][:40]!r}...; divide it, or "
                "use the tokenizer byte"
            )
    yield "".join([*held, last]), True


def _start_worker(spec: dict[str, Any]) -> None:
    global _worker_encodes
    _worker_encodes = by_itself(load(spec))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    # A worker would otherwise wait forever for work from a parent that was killed.
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _encode(name: str, mark: int | None, dtype: np.dtype, batch: list, by: Encode | None = None):
    """Return (split, ids, bytes, documents and where they end) of a batch for each split.

    name: the tokenizer's. mark: follows each document. by: encodes; a worker has its own.
    """
    encoded = []
    for split in SPLITS:
        pieces = [piece for where, piece, _ in batch if where == split]
        whole = np.array([last for where, _, last in batch if where == split], bool)
        ids, ends = (by or _worker_encodes)(pieces)
        ids, ends = ids.astype(dtype), ends[whole]
        if mark is not None:
            ids, ends = np.insert(ids, ends, mark), ends + np.arange(1, ends.size + 1)
        ascii_or_bytes = (t if t.isascii() else t.encode(errors="surrogatepass") for t in pieces)
        n_bytes = sum(map(len, ascii_or_bytes))
        if name == "byte" and mark is not None:  # its end-of-text mark is a byte of the text
            n_bytes += ends.size
        added = {"bytes": n_bytes, "documents": ends.size, "ends": ends.astype(INDEX)}
        encoded.append((split, ids, added))
    return encoded


def stable_fraction(text: str, seed: int = 0) -> float:
    """Return a number in [0, 1) that depends on the text and the seed alone, on every machine."""
    key = hashlib.blake2b(text.encode(errors="surrogatepass"), key=b"%d" % seed, digest_size=8)
    return int.from_bytes(key.digest(), "big") / 2**64


def script_parser(
    description: str, script: str, workers: bool = True, reads: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the flags of every data/*/prepare.py; `script` is its __file__.

    workers: whether it encodes in several processes. reads: whether from text of the user's.
    """
    parser = Parser(description=description)
    if reads:
        parser.add_argument("--input", type=os.path.expanduser, help="local text to use")
    parser.add_argument(
        "--out",
        type=local_path,
        default=data_folder(script),
        help="folder to write (default: %(default)s)",
    )
    if workers:
        parser.add_argument(
            "--workers", type=int, help="encoding processes or threads (default: by size)"
        )
    parser.add_argument("--force", action="store_true", help="prepare again what is there")
    return parser

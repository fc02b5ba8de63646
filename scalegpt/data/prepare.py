"""Documents to token files: train.bin, val.bin and meta.json, for the scripts data/*/prepare.py.

A token file is nanoGPT's: headerless little-endian uint16 (uint32 above 65,536 ids). Text streams
through in constant memory; files get their names when whole, so that no killed run leaves half.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from scalegpt.config import command_line
from scalegpt.config.presets import data_folder
from scalegpt.data.tokenizer import Tokenizer, load
from scalegpt.errors import Mistake
from scalegpt.files.folder import local_path
from scalegpt.files.json_files import read_object

SPLITS = ("train", "val")
Document = str | Iterable[str]  # a text, or its consecutive chunks where it is too long to hold
_worker_tokenizer: Tokenizer | None = None  # set in a worker when it starts


@dataclass(frozen=True)
class Corpus:
    """What `write_dataset` turns into token files.

    documents: pairs of "train" or "val" and a document, in the order they are to be written.
    text_bytes: about how much text there is, for the disk estimate and the progress bar.
    separate: whether the tokenizer's end-of-text mark follows each document.
    """

    tokenizer: Tokenizer
    documents: Iterable[tuple[str, Document]]
    text_bytes: int
    separate: bool = True


def write_dataset(
    out: Path, build: Callable[[], Corpus], source: str, workers: int | None, force: bool
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json into the folder `out`; returns meta.json's content.

    build: makes the corpus; not called if `out` already holds `source`, unless `force`.
    source: text and settings in words; kept in meta.json and compared when called again.
    workers: processes that encode (0, 1: this one; None: by size); the files do not depend on it.
    ValueError: other data in `out`, too little disk, no text, or what `build` raises.
    """
    if workers is not None and workers < 0:
        raise Mistake(f"--workers={workers} must be 0, for this process alone, or more")
    if not force:
        _prepared(out, source)  # what may not be overwritten is not even locked
    with _new_or_kept(out), _only_writer(out):
        if not force and (meta := _prepared(out, source)):
            print(f"{out} is already prepared; --force does it again")
            return meta
        corpus = build()
        tokenizer = corpus.tokenizer
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
        bpe = tokenizer.name not in ("byte", "char")  # English: 4.4 bytes a token of gpt2's
        check_disk(out, corpus.text_bytes * dtype.itemsize / (4 if bpe else 1))
        if workers is None:  # to start processes costs seconds: only where it pays
            workers = (os.cpu_count() or 1) // 2 if bpe and corpus.text_bytes > 50e6 else 0
        meta = {"format": 1, "tokenizer": tokenizer.spec(), "vocab_size": tokenizer.vocab_size}
        meta |= {"dtype": dtype.name, **_write_bins(out, corpus, dtype, workers), "source": source}
        _publish(out, meta)
    for split in SPLITS:
        print(f"{split}: {meta[split]['tokens']:,} tokens, {meta[split]['documents']:,} documents")
    return meta


def check_disk(folder: Path, need: float) -> None:
    """Print how many bytes are needed and free in an existing folder; ValueError if too few."""
    free = shutil.disk_usage(folder).free
    print(f"about {need / 1e6:,.1f} MB needed in {folder}, {free / 1e6:,.1f} MB free", flush=True)
    if need > free:
        raise Mistake(f"too little disk in {folder}: {need:,.0f} bytes needed, {free:,} free")


@contextmanager
def _new_or_kept(out: Path) -> Iterator[None]:
    """The folder is there within; where it was not, and what is done in it fails, it goes again."""
    made = [path for path in (out, *out.parents) if not os.path.lexists(path)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"cannot write to --out={out}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Wait for another process that prepares `out`: those of one job may start it together."""
    with FileLock(out / "prepare.tmp"):
        try:
            for path in out.glob("*.bin.partial"):  # of a killed run; they would count as used
                path.unlink()
            yield
        finally:
            # meta.json.partial stays where publishing failed: it says that the others are no set.
            for path in out.glob("*.bin.partial"):
                path.unlink()
            with suppress(PermissionError):  # Windows keeps a file that is open
                (out / "prepare.tmp").unlink(missing_ok=True)


def _prepared(out: Path, source: str) -> dict[str, Any] | None:
    if not os.path.lexists(out / "meta.json"):
        return None
    meta = read_object(out / "meta.json", "; see --force and --out")
    paths = {split: out / f"{split}.bin" for split in SPLITS}
    found = {s: path.stat().st_size for s, path in paths.items() if path.is_file()}
    match meta:
        case {
            "dtype": "uint16" | "uint32" as dtype,
            "train": {"tokens": int(train)},
            "val": {"tokens": int(val)},
        }:
            size = np.dtype(dtype).itemsize
            if found != {"train": train * size, "val": val * size}:
                return None
    if (held := meta.get("source", "something unknown")) != source:
        raise Mistake(f"{out} holds {held!r}, not {source!r}: see --force and --out")
    return meta


def _write_bins(out: Path, corpus: Corpus, dtype: np.dtype, workers: int) -> dict[str, Any]:
    """Write *.bin.partial; returns the two splits' entries for meta.json."""
    counts = {s: Counter(tokens=0, bytes=0, documents=0, max_id=0) for s in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    bar = tqdm(total=corpus.text_bytes, unit="B", unit_scale=True, disable=None)
    with bar, ExitStack() as stack:
        files = {s: stack.enter_context(open(out / f"{s}.bin.partial", "wb")) for s in SPLITS}
        for split, ids, n_bytes, n_documents in _encoded(corpus, dtype, workers):
            files[split].write(ids)
            digests[split].update(ids)
            counts[split].update(tokens=ids.size, bytes=n_bytes, documents=n_documents)
            counts[split]["max_id"] = max(counts[split]["max_id"], int(ids.max(initial=0)))
            bar.update(n_bytes)
    for split in SPLITS:
        if not counts[split]["tokens"]:
            raise Mistake(f"the {split} split is empty: it takes more text, or another split")
    return {s: {**counts[s], "sha256": digests[s].hexdigest()} for s in SPLITS}


def _publish(out: Path, meta: dict[str, Any]) -> None:
    """Give the files their names; at no moment do an old and a new one stand together."""
    (out / "meta.json.partial").write_text(json.dumps(meta, indent=1))
    (out / "meta.json").unlink(missing_ok=True)
    (out / "val.bin").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        with open(out / f"{name}.partial", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(file.name, out / name)


def _encoded(corpus: Corpus, dtype: np.dtype, workers: int) -> Iterator[tuple]:
    """What `_encode` lists, in the documents' order, a bounded number of batches ahead."""
    encode = partial(_encode, separate=corpus.separate, dtype=dtype)
    if workers < 2:
        for batch in _batches(corpus):
            yield from encode(batch, tokenizer=corpus.tokenizer)
        return
    # spawn: a forked worker would inherit threads and a device's state
    spec, ahead = corpus.tokenizer.spec(), deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (spec,))
    try:
        for batch in _batches(corpus):
            ahead.append(pool.submit(encode, batch))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(corpus: Corpus) -> Iterator[list[tuple[str, str, bool]]]:
    """About a million characters at once of: split, piece of a document, whether it ends there."""
    batch, size = [], 0
    for split, document in corpus.documents:
        chunks = [document] if isinstance(document, str) else document
        if not corpus.tokenizer.piecewise:
            chunks = ["".join(chunks)]
        for piece, last in _pieces(chunks):
            batch.append((split, piece, last))
            size += len(piece) + 1
            if size >= 1 << 20:
                yield batch
                batch, size = [], 0
    yield batch


def _pieces(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The chunks cut where no token of a piecewise tokenizer crosses; True with the last one."""
    held = ""
    for chunk in chunks:
        at = len(held) - 1
        while at > 0 and not (held[at] in " \n" and not held[at - 1].isspace()):
            at -= 1
        if at > 0:
            yield held[:at], False
            held = held[at:]
        held += chunk
    yield held, True


def _start_worker(spec: dict[str, Any]) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load(spec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    # else it would wait for ever for a parent that was killed
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _encode(batch: list, separate: bool, dtype: np.dtype, tokenizer: Tokenizer | None = None):
    """For each split: its name and the batch's ids, bytes of text and documents ended."""
    tokenizer = tokenizer or _worker_tokenizer
    mark = np.array([tokenizer.eot] if separate and tokenizer.eot is not None else [], np.int32)
    encoded = []
    for split in SPLITS:
        parts, n_bytes, n_documents = [mark[:0]], 0, 0
        for piece, last in ((piece, last) for where, piece, last in batch if where == split):
            parts += [tokenizer.encode(piece), mark if last else mark[:0]]
            n_bytes += len(piece.encode(errors="surrogatepass"))
            n_documents += last
        if tokenizer.name == "byte":  # there the mark is a byte of the text
            n_bytes += n_documents * mark.size
        encoded.append((split, np.concatenate(parts).astype(dtype), n_bytes, n_documents))
    return encoded


def stable_fraction(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that only the text and the seed decide, on every machine and run."""
    key = hashlib.blake2b(text.encode(errors="surrogatepass"), key=b"%d" % seed, digest_size=8)
    return int.from_bytes(key.digest(), "big") / 2**64


def script_parser(description: str, script: str) -> argparse.ArgumentParser:
    """The flags that every data/*/prepare.py has; `script` is its __file__."""
    parser = command_line.Parser(description=description)
    parser.add_argument("--input", type=os.path.expanduser, help="local text to use")
    parser.add_argument("--out", type=local_path, default=data_folder(script))
    parser.add_argument("--workers", type=int, help="encoding processes (by default: by size)")
    parser.add_argument("--force", action="store_true", help="prepare again what is there")
    return parser

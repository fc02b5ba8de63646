"""Turn your own text into token files: a file, a folder or a pattern of plain text or JSON lines.

A plain file is one document; each line of a .jsonl file is one, under --key. Files may be
compressed as .gz, .xz, .bz2 or .zst. A hash of its text decides whether a document goes to
validation; of a single document, the end does.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import codecs
import glob
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from scalegpt.data.prepare import (
    Corpus,
    Document,
    script_parser,
    stable_fraction,
    write_dataset,
)
from scalegpt.data.tokenizer import char_tokenizer
from scalegpt.errors import Mistake
from scalegpt.files import json_files
from scalegpt.files.compressed import PACKED, blocks
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import named

_NOT_SHAPING = ("out", "workers", "force")
HASHED = 1 << 16  # the first so many characters of a document decide its split


def find_files(pattern: str) -> list[Path]:
    """Return the file, a folder's files at any depth but the hidden, or the matches, sorted."""
    path = Path(pattern)
    if path.is_dir():
        below = (p for p in path.rglob("*") if p.is_file())
        files = [p for p in below if not any(n.startswith(".") for n in p.relative_to(path).parts)]
    else:
        matches = [path] if path.is_file() else map(Path, glob.glob(pattern, recursive=True))
        files = [p for p in matches if p.is_file()]
    if not files:
        raise Mistake(f"no file, folder or pattern of files {pattern!r}: check --input")
    return sorted(files, key=lambda p: p.as_posix())


def read_documents(files: list[Path], key: str, errors: str) -> Iterator[Document]:
    """Yield the documents that are not empty.

    key: where a JSON line holds its text. errors: "strict", or "replace" for bad UTF-8. Raises
    Mistake, naming the file and the place of a fault.
    """
    for path in files:
        text = _decoded(path, errors)
        name = path.stem if path.suffix in PACKED else path.name
        if name.endswith(".jsonl"):
            yield from filter(None, _json_texts(path, text, key, errors))
        elif first := next(text, ""):
            yield chain([first], text)


def split_documents(
    files: list[Path], key: str, errors: str, val_fraction: float, seed: int
) -> Iterator[tuple[str, Document]]:
    """Give each document to "val" with the probability `val_fraction`, by its text and the seed.

    Neither the order of the documents nor their number moves one to the other side. A single
    document is cut instead, its last `val_fraction` of characters being "val".
    """
    if not 0 < val_fraction < 1:
        raise Mistake(f"--val-fraction must be between 0 and 1, got {val_fraction}")
    read = partial(read_documents, files, key, errors)
    few = [document for _, document in zip(range(2), read(), strict=False)]
    if len(few) == 1:
        n_train = int(sum(map(len, few[0])) * (1 - val_fraction))
        for split, start, stop in (("train", 0, n_train), ("val", n_train, None)):
            (document,) = read()
            yield split, _cut(document, start, stop)
        return
    for document in read():
        chunks, head = iter([document] if isinstance(document, str) else document), ""
        while len(head) < HASHED and (chunk := next(chunks, "")):
            head += chunk
        to_val = stable_fraction(head[:HASHED], seed) < val_fraction
        yield "val" if to_val else "train", chain([head], chunks)


def _cut(document: Document, start: int, stop: int | None) -> Iterator[str]:
    """Yield the document's characters from start to stop, chunk by chunk."""
    at = 0
    for chunk in [document] if isinstance(document, str) else document:
        yield chunk[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(chunk)
        if stop is not None and at >= stop:
            return


def _decoded(path: Path, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    n_read = 0
    for block in chain(blocks(path), [b""]):
        start = n_read - len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise Mistake(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                f"{start + error.start}; --errors replace reads on"
            ) from error
        n_read += len(block)
        if text:
            yield text


def _json_texts(path: Path, chunks: Iterator[str], key: str, errors: str) -> Iterator[str]:
    for number, line in enumerate(_lines(chunks), 1):
        if not line.strip():
            continue
        try:
            row = json_files.parse(line)
        except ValueError as error:
            raise Mistake(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise Mistake(f"{path}, line {number}: no text under --key {key!r} in {keys}")
        try:  # JSON can spell half a surrogate pair, which UTF-8 cannot
            yield row[key].encode("utf-16", "surrogatepass").decode("utf-16", errors)
        except UnicodeDecodeError as error:
            raise Mistake(
                f"{path}, line {number}: {error.reason}; --errors replace reads on"
            ) from error


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        yield from lines
    yield rest


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2, byte, char, a tokenizer.json, or the folder of a run or data set",
    )
    parser.add_argument("--key", default="text", help="where a line of .jsonl holds its text")
    parser.add_argument("--val-fraction", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents")
    parser.add_argument(
        "--val-input",
        type=os.path.expanduser,
        help="validation text of its own; then nothing is split off",
    )
    parser.add_argument("--errors", choices=("strict", "replace"), default="strict")
    args = parser.parse_args(argv)
    if args.input is None:
        raise Mistake("--input is missing: a file, a folder or a pattern of text files")
    files = {"train": find_files(args.input)}
    if args.val_input:
        files["val"] = find_files(args.val_input)
    all_files = [path for group in files.values() for path in group]
    if any(args.out.resolve() in path.resolve().parents for path in all_files):
        raise Mistake(f"--out {args.out} holds input files: choose another folder")

    def corpus() -> Corpus:
        read = partial(read_documents, key=args.key, errors=args.errors)
        if next(read(all_files), None) is None:
            raise Mistake(f"no text in {args.input}")
        if args.tokenizer == "char":
            tokenizer = char_tokenizer(chunk for text in read(all_files) for chunk in text)
        else:
            tokenizer = named(args.tokenizer)
        if args.val_input:
            documents = ((split, text) for split in files for text in read(files[split]))
        else:
            documents = split_documents(
                all_files, args.key, args.errors, args.val_fraction, args.seed
            )
        sizes = (p.stat().st_size * (4 if p.suffix in PACKED else 1) for p in all_files)
        return Corpus(tokenizer, documents, sum(sizes))

    given = {**vars(args), "input": Path(args.input).resolve()}
    shaping = [k for k in given if k not in _NOT_SHAPING and given[k] != parser.get_default(k)]
    source = " ".join(["text", *(f"--{k.replace('_', '-')}={given[k]}" for k in shaping)])
    write_dataset(args.out, corpus, source, args.workers, args.force)
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

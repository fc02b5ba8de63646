"""Turn your own text into token files: plain text, JSON lines or Parquet, of a disk or a URL.

A plain file is one document, or several between which --separator stands; each line of JSON lines
and each row of Parquet is one, under --text-key. What a file is, also whether it is packed (gzip,
xz, bzip2, zstd), is told by what it holds. A hash of its text decides whether a document goes to
validation; of a single document, the end does.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import argparse
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from glob import has_magic
from itertools import chain
from pathlib import Path

from scalegpt.data import engine
from scalegpt.data import parts as in_parts
from scalegpt.data.prepare import (
    Corpus,
    Document,
    script_parser,
    stable_fraction,
    write_dataset,
)
from scalegpt.data.reading import (
    File,
    check_one_kind,
    chunks_of,
    kinds_of,
    read_documents,
    summary,
    text_size,
)
from scalegpt.data.tokenizer import char_tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.folder import is_url
from scalegpt.files.text_files import WHOLE, Share, absolute, find_files
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import named

_NOT_SHAPING = ("out", "workers", "force", "part", "merge", "engine", "parts")
ENOUGH = 200  # tokens of training text for each id; a rule of thumb
HASHED = 1 << 16  # the first so many characters of a document decide its split
Read = Callable[[], Iterator[Document]]  # reads the documents from the first on, when called


def split_documents(read: Read, val_fraction: float, seed: int) -> Iterator[tuple[str, Document]]:
    """Give each document to "val" with the probability `val_fraction`, by its text and the seed.

    Neither the order of the documents nor their number moves one to the other side. A single
    document is cut instead, its last `val_fraction` of characters being "val". Raises Mistake, at
    once, where one side would get nothing.
    """
    shares: list[float] = []
    for share, _ in _shares(read, seed):
        shares.append(share)
        if min(shares[0], share) < val_fraction <= max(shares[0], share):
            return by_hash(read, val_fraction, seed)
    if len(shares) > 1:
        raise Mistake(_unsplit(shares, val_fraction))
    size = sum(map(len, *read()))
    n_train = int(size * (1 - val_fraction))
    if not 0 < n_train < size:
        raise Mistake(
            f"a document of length {size:,}, is too short for --val-fraction={val_fraction}; "
            "give more text, or validation text of its own by --val-input"
        )
    parts = (("train", 0, n_train), ("val", n_train, None))
    return ((split, _cut(*read(), start, stop)) for split, start, stop in parts)


def by_hash(read: Read, val_fraction: float, seed: int) -> Iterator[tuple[str, Document]]:
    """Give each document to its split, even if one gets nothing, as of a part of a text."""
    return (("val" if s < val_fraction else "train", d) for s, d in _shares(read, seed))


def _unsplit(shares: list[float], val_fraction: float) -> str:
    """Return why documents cannot be split by this fraction, with the nearest that can."""
    side, values = "validation", sorted(set(shares))
    if max(values) < val_fraction:
        side, values = "training", values[-2:]
    message = f"none of {len(shares):,} documents goes to {side} by --val-fraction={val_fraction}: "
    if len(values) > 1:  # else all are the same text
        digits = (math.floor(values[0] * 10**n + 1) / 10**n for n in range(1, 18))
        fitting = next(fraction for fraction in digits if values[0] < fraction <= values[1])
        message += f"--val-fraction={fitting} gives some to both; or "
    return f"{message}give validation text of its own by --val-input"


def _shares(read: Read, seed: int) -> Iterator[tuple[float, Document]]:
    """Yield each document with its place in [0, 1), a hash of its beginning."""
    for document in read():
        if isinstance(document, str):
            yield stable_fraction(document[:HASHED], seed), document
            continue
        chunks, head = iter(document), ""
        while len(head) < HASHED and (chunk := next(chunks, "")):
            head += chunk
        yield stable_fraction(head[:HASHED], seed), chain([head], chunks)


def _cut(document: Document, start: int, stop: int | None) -> Iterator[str]:
    """Yield the document's characters from start to stop, chunk by chunk."""
    at = 0
    for chunk in chunks_of(document):
        yield chunk[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(chunk)
        if stop is not None and at >= stop:
            return


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    more = parser.add_argument
    more(
        "--tokenizer",
        default="gpt2",
        help="gpt2 (default), byte, char, tokenizer.json or the folder of a run, data set or model",
    )
    more(
        "--text-key",
        "--key",
        dest="key",
        default="text",
        help="where a JSON line or row of Parquet holds its text (default: text)",
    )
    more("--separator", help="what stands between the documents of a plain file: '<|endoftext|>'")
    more("--plain", action="store_true", help="read every file as plain text, also JSON")
    more("--val-fraction", type=float, default=0.005, help="for validation (default: %(default)s)")
    more("--seed", type=int, default=0, help="of the choice of documents (default: 0)")
    more("--val-input", type=os.path.expanduser, help="validation text of its own; splits nothing")
    more(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="refuse what is not UTF-8, or read it as U+FFFD (default: strict)",
    )
    more("--part", metavar="I/N", help="make part I of N, counted from 0, on any machine")
    more(
        "--merge", action="store_true", help="make the data set of all N parts, once all are there"
    )
    more("--engine", choices=["ray"], help="make all parts, and merge them, on a cluster of Ray")
    more("--parts", type=int, metavar="N", help="so many, with --engine")
    args = parser.parse_args(argv)
    given = {**vars(args), "input": args.input and absolute(args.input)}
    shaping = [k for k in given if k not in _NOT_SHAPING and given[k] != parser.get_default(k)]
    args.source = " ".join(["text", *(f"--{k.replace('_', '-')}={given[k]}" for k in shaping)])
    if bool(args.engine) != (args.parts is not None) or (args.parts or 1) < 1:
        raise Mistake("--engine and --parts come together: --engine ray --parts 100")
    if args.engine and (args.part or args.merge):
        raise Mistake("--engine makes all parts and merges them; leave --part and --merge out")
    if args.engine:
        engine.prepare_parts(__file__, args, args.parts)
        args.merge = True
    return prepare(args)


def prepare(args: argparse.Namespace) -> int:
    """Prepare the text, or a part of it, or merge its parts, as `main` has read the flags."""
    if args.input is None:
        raise Mistake("--input is missing: a file, a folder, a pattern of text files, or a URL")
    if not 0 < args.val_fraction < 1:
        raise Mistake(f"--val-fraction must be between 0 and 1, got {args.val_fraction}")
    inputs = {"train": args.input, "val": args.val_input}
    files = {split: find_files(name) for split, name in inputs.items() if name}
    all_files = [path for group in files.values() for path in group]
    if any(args.out.resolve() in Path(absolute(path)).parents for path in all_files):
        raise Mistake(f"--out {args.out} holds input files: choose another folder")
    part = None if args.part is None else in_parts.Part.parse(args.part)
    if part and args.merge:
        raise Mistake("--merge takes no --part: give it once all parts are there")
    if (part or args.merge) and args.tokenizer == "char":
        raise Mistake(
            "--tokenizer=char is made of all the text, of which a part has some; leave --part and "
            "--merge out, or use byte"
        )
    kinds: dict[File, str] = {}
    shares: dict[File, Share] = {}  # of training files of which this part has not all

    def check_kinds(split: str, found: dict[File, str]) -> None:
        if os.path.isdir(name := inputs[split]) or (is_url(name) and not has_magic(name)):
            check_one_kind(name, found)

    def corpus() -> Corpus:
        readers: dict[str, Read] = {}
        facts = {"part": str(part), "inputs": []} if part else {}
        for split in files:
            found = kinds_of(files[split], args.key, args.plain, args.errors)
            check_kinds(split, found)
            own = shares if split == "train" else {}
            readers[split] = partial(
                read_documents, found, args.key, args.errors, args.separator, own
            )
            if part:
                facts["inputs"] += [
                    in_parts.input_facts(split, file, kind, own.get(file, WHOLE))
                    for file, kind in found.items()
                ]
            elif next(readers[split](), None) is None:
                raise Mistake(f"no text in {inputs[split]}")
            kinds.update(found)
        if args.tokenizer == "char":
            documents = chain.from_iterable(read() for read in readers.values())
            tokenizer = char_tokenizer(chain.from_iterable(map(chunks_of, documents)))
        else:
            tokenizer = named(args.tokenizer)
        if args.val_input:
            documents = ((split, text) for split, read in readers.items() for text in read())
        else:
            divide = by_hash if part else split_documents
            documents = divide(readers["train"], args.val_fraction, args.seed)
        sizes = (text_size(path, kind, shares.get(path, WHOLE)) for path, kind in kinds.items())
        return Corpus(tokenizer, documents, sum(sizes), facts=facts)

    source = args.source
    if part:
        out = in_parts.folder_of(args.out, part)
        source = in_parts.source_of(source, named(args.tokenizer), all_files, part)
        shares = part.shares(files["train"])
        files = {split: part.share(group) for split, group in files.items()}
        files["train"] = [*shares]
        write_dataset(out, corpus, source, args.workers, args.force)
    elif args.merge:
        metas = in_parts.manifests(
            args.out, partial(in_parts.source_of, source, named(args.tokenizer), all_files)
        )
        for split in files:
            read = (file for meta in metas for file in meta["inputs"] if file["split"] == split)
            check_kinds(split, {file["file"]: file["kind"] for file in read})
        meta = in_parts.merge(args.out, metas, source, args.force)
    else:
        meta = write_dataset(args.out, corpus, source, args.workers, args.force)
    for line in summary(kinds):
        print(line)
    if part:
        return 0
    tokens, ids = meta["train"]["tokens"], meta["vocab_size"]
    if ids > 1000 and tokens < ENOUGH * ids and not os.path.isdir(args.tokenizer):
        print(
            f"{tokens:,} tokens are few for the {ids:,} ids of {args.tokenizer}: of a small model "
            "most parameters would be in its table of tokens. To train from scratch on this text, "
            "use --tokenizer byte --force; to finetune a model of these tokens, keep them"
        )
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

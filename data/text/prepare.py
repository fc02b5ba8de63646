"""Turn your own text into token files: plain text, JSON lines or Parquet, of a disk or a URL.

A plain file is one document, or several between which --separator stands; each line of JSON lines
and each row of Parquet is one, under --text-key. What a file is, also whether it is packed (gzip,
xz, bzip2, zstd), is told by what it holds. A hash of its text decides whether a document goes to
validation; of a single document, the end does.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from glob import has_magic
from itertools import chain
from pathlib import Path, PurePath

from scalegpt.data.prepare import (
    Corpus,
    Document,
    script_parser,
    stable_fraction,
    write_dataset,
)
from scalegpt.data.tokenizer import char_tokenizer
from scalegpt.errors import Mistake
from scalegpt.files import json_files, parquet
from scalegpt.files.folder import is_url
from scalegpt.files.text_files import (
    PACKED,
    absolute,
    decoded,
    find_files,
    parts,
    size_of,
)
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import named

_NOT_SHAPING = ("out", "workers", "force")
ENOUGH = 200  # tokens of training text for each id; a rule of thumb
HASHED = 1 << 16  # the first so many characters of a document decide its split
LINES, PLAIN, TABLE = "JSON lines", "plain text", "Parquet"
CARD, EMPTY = "a data set's card", "empty"
_JSON = re.compile(r'(\[\s*)?\{\s*"[^"\n]*"\s*:')  # the start of an object, or of a list of these
Read = Callable[[], Iterator[Document]]  # reads the documents from the first on, when called
File = Path | str  # a str is a URL


def kinds_of(files: list[File], key: str, plain: bool, errors: str) -> dict[File, str]:
    """Return what each file is read as; `plain`: as text, also what looks like something else.

    key: the column of the texts in a Parquet file. Raises Mistake for a file that is no text, is
    JSON that has other than one object a line, or is Parquet that has no such column.
    """
    return {path: _kind(path, key, plain, errors) for path in files}


def _kind(path: File, key: str, plain: bool, errors: str) -> str:
    if parquet.has_column(path, key):
        return TABLE
    text = _decoded(path, errors)
    first = next(text, "")
    pure = PurePath(path)
    name = (pure.stem if pure.suffix.lower() in PACKED else pure.name).lower()
    if not first or plain:
        return PLAIN if first else EMPTY
    if name.endswith((".jsonl", ".ndjson")):
        return LINES
    if name == "readme.md" and first.startswith(("---\n", "---\r\n")):
        return CARD
    start = first.lstrip()
    line, newline, _ = start.partition("\n")
    if line.startswith("{"):
        if not newline and next(text, ""):  # a line that long is no prose
            return LINES
        try:
            json_files.parse(line)
            return LINES
        except ValueError:
            pass
    if _JSON.match(start) or (name.endswith(".json") and start[:1] in ("[", "{")):
        raise Mistake(
            f"{path} is JSON, but not one object a line; jq -c '.[]' makes such lines of an array, "
            "and --plain reads all files as the text they are"
        )
    return PLAIN


def check_one_kind(folder: str, kinds: dict[File, str]) -> None:
    """Raise Mistake for a folder of several kinds: its documents hardly lie in all of them."""
    first = {kind: path for path, kind in reversed(kinds.items()) if kind != EMPTY}
    if len(first) > 1:
        found = " and ".join(f"{kind} ({path})" for kind, path in first.items())
        likely = PurePath(first.get(TABLE) or first.get(LINES) or first[PLAIN])
        raise Mistake(
            f"{folder} holds {found}: say which are meant by a pattern, as "
            f"'{folder}/**/*{likely.suffix}', or read all as plain text by --plain"
        )


def summary(kinds: dict[File, str]) -> Iterator[str]:
    """Yield lines that say which files were read as what, and how many of each kind."""
    groups = Counter((_ending(path), kind) for path, kind in kinds.items())
    first = {(_ending(path), kind): path for path, kind in reversed(kinds.items())}
    for (ending, kind), count in groups.most_common(20):
        more = f" and {count - 1:,} more" if count > 1 else ""
        yield f"read as {kind}: {count:,} {ending}, {first[ending, kind]}{more}"
    if len(groups) > 20:
        yield f"and files of {len(groups) - 20:,} more endings"


def _ending(path: File) -> str:
    suffixes = PurePath(path).suffixes
    packed = suffixes and suffixes[-1].lower() in PACKED
    return "".join(suffixes[-2 if packed else -1 :]) or "without ending"


def _unpacked(path: File, kind: str) -> int:
    """Return a guess of how many bytes of text a byte of the file stands for."""
    return 4 if PurePath(path).suffix.lower() in PACKED else 2 if kind == TABLE else 1


def read_documents(
    kinds: dict[File, str], key: str, errors: str, separator: str | None = None
) -> Iterator[Document]:
    """Yield the documents that are not empty.

    key: where a JSON line or row of Parquet holds its text. errors: "strict", or "replace" for bad
    UTF-8. separator: what stands between the documents of a plain file. Raises Mistake, naming the
    file and the place of a fault.
    """
    for path, kind in kinds.items():
        text = _decoded(path, errors)
        if kind == TABLE:
            yield from filter(None, parquet.texts(path, key, errors))
        elif kind == LINES:
            yield from filter(None, _json_texts(path, text, key, errors))
        elif separator:
            yield from filter(None, (p.strip("\r\n") for p in parts(path, text, separator)))
        elif first := next(text, ""):
            yield chain([first], text)


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
            return (("val" if s < val_fraction else "train", d) for s, d in _shares(read, seed))
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
    for chunk in [document] if isinstance(document, str) else document:
        yield chunk[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(chunk)
        if stop is not None and at >= stop:
            return


def _decoded(path: File, errors: str) -> Iterator[str]:
    return decoded(path, errors, ", and --errors replace reads on")


def _json_texts(path: File, chunks: Iterator[str], key: str, errors: str) -> Iterator[str]:
    for number, line in enumerate(parts(path, chunks, "\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_files.parse(line)
        except ValueError as error:
            raise Mistake(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or key not in row:
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise Mistake(
                f"{path}, line {number}: nothing under --text-key {key!r} in {keys}; --plain reads "
                "all files as the text they are"
            )
        if not isinstance(row[key], str):
            raise Mistake(
                f"{path}, line {number}: under --text-key {key!r} is {json.dumps(row[key])[:40]}, "
                "no text; leave such lines out"
            )
        try:  # JSON can spell half a surrogate pair, which UTF-8 cannot
            row[key].encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                half = f"\\u{ord(error.object[error.start]):x}"
                raise Mistake(
                    f"{path}, line {number}: {half} is half a surrogate pair, no character; "
                    "--errors replace reads on"
                ) from None
            row[key] = row[key].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield row[key]


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
    args = parser.parse_args(argv)
    if args.input is None:
        raise Mistake("--input is missing: a file, a folder, a pattern of text files, or a URL")
    if not 0 < args.val_fraction < 1:
        raise Mistake(f"--val-fraction must be between 0 and 1, got {args.val_fraction}")
    inputs = {"train": args.input, "val": args.val_input}
    files = {split: find_files(name) for split, name in inputs.items() if name}
    all_files = [path for group in files.values() for path in group]
    if any(args.out.resolve() in Path(absolute(path)).parents for path in all_files):
        raise Mistake(f"--out {args.out} holds input files: choose another folder")
    kinds: dict[File, str] = {}

    def corpus() -> Corpus:
        readers: dict[str, Read] = {}
        for split in files:
            found = kinds_of(files[split], args.key, args.plain, args.errors)
            if os.path.isdir(name := inputs[split]) or (is_url(name) and not has_magic(name)):
                check_one_kind(inputs[split], found)
            readers[split] = partial(read_documents, found, args.key, args.errors, args.separator)
            if next(readers[split](), None) is None:
                raise Mistake(f"no text in {inputs[split]}")
            kinds.update(found)
        if args.tokenizer == "char":
            documents = chain.from_iterable(read() for read in readers.values())
            tokenizer = char_tokenizer(chain.from_iterable(documents))
        else:
            tokenizer = named(args.tokenizer)
        if args.val_input:
            documents = ((split, text) for split, read in readers.items() for text in read())
        else:
            documents = split_documents(readers["train"], args.val_fraction, args.seed)
        sizes = (size_of(path) * _unpacked(path, kind) for path, kind in kinds.items())
        return Corpus(tokenizer, documents, sum(sizes))

    given = {**vars(args), "input": absolute(args.input)}
    shaping = [k for k in given if k not in _NOT_SHAPING and given[k] != parser.get_default(k)]
    source = " ".join(["text", *(f"--{k.replace('_', '-')}={given[k]}" for k in shaping)])
    meta = write_dataset(args.out, corpus, source, args.workers, args.force)
    for line in summary(kinds):
        print(line)
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

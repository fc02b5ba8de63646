"""Files are told apart by what they hold, and read as documents: text, JSON lines and Parquet."""

import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePath

from pydantic_core import from_json

from scalegpt.errors import Mistake
from scalegpt.files import json_files, parquet
from scalegpt.files.text_files import PACKED, WHOLE, Share, blocks, decoded, parts, size_of

LINES, PLAIN, TABLE = "JSON lines", "plain text", "Parquet"
CARD, EMPTY = "a data set's card", "empty"
_JSON = re.compile(r'(\[\s*)?\{\s*"[^"\n]*"\s*:')  # the start of an object, or of a list of these
File = Path | str  # a str is a URL
Document = str | Iterable[str]  # a text, or its consecutive chunks where it is too long to hold


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


def text_size(path: File, kind: str, share: Share = WHOLE) -> int:
    """Return about how many bytes of text a share of a file holds."""
    packed = 4 if PurePath(path).suffix.lower() in PACKED else 2 if kind == TABLE else 1
    return int(packed * size_of(path) * (share[1] - share[0]))


def read_documents(
    kinds: dict[File, str],
    key: str,
    errors: str,
    separator: str | None = None,
    shares: dict[File, Share] | None = None,
) -> Iterator[Document]:
    """Yield the documents that are not empty.

    key: where a JSON line or row of Parquet holds its text. errors: "strict", or "replace" for bad
    UTF-8. separator: what stands between the documents of a plain file. shares: how much of a file
    is read, where that is not all: of JSON lines that are not packed the lines that begin there, of
    Parquet the row groups; of other files all are in the share that begins with the file. Raises
    Mistake, naming the file and the place of a fault.
    """
    for path, kind in kinds.items():
        share = (shares or {}).get(path, WHOLE)
        text = _decoded(path, errors)
        if kind == TABLE:
            yield from filter(None, parquet.texts(path, key, errors, share))
        elif kind == LINES:
            yield from filter(None, _json_texts(path, key, errors, share))
        elif share[0]:
            continue
        elif separator:
            yield from filter(None, (p.strip("\r\n") for p in parts(path, text, separator)))
        elif first := next(text, ""):
            yield chain([first], text)


def chunks_of(document: Document) -> Iterable[str]:
    """Return the consecutive chunks of a document, one for a text."""
    return [document] if isinstance(document, str) else document


def _decoded(path: File, errors: str) -> Iterator[str]:
    return decoded(path, errors, ", and --errors replace reads on")


def _json_texts(path: File, key: str, errors: str, share: Share) -> Iterator[str]:
    where = f"{path}, after {float(share[0]):.4%} of it" if share[0] else f"{path}"
    for number, line in enumerate(parts(path, blocks(path, share), b"\n"), 1):
        if number == 1 and not share[0]:
            line = line.removeprefix(BOM_UTF8)
        try:  # pydantic's parser takes bytes, in a third of the time of json for text
            text = from_json(line)[key]
        except (ValueError, LookupError, TypeError):
            text = None
        yield (
            text
            if isinstance(text, str)
            else _json_text(f"{where}, line {number}", line, key, errors)
        )


def _json_text(place: str, line: bytes, key: str, errors: str) -> str:
    """Return the text of a line as json reads it, "" of an empty one; raise Mistake for faults."""
    try:
        text = line.decode(errors=errors)
        if not text.strip():
            return ""
        row = json_files.parse(text)
    except UnicodeDecodeError as error:
        raise Mistake(
            f"{place} is not UTF-8: byte 0x{line[error.start]:02x}; iconv -f LATIN1 -t UTF-8 "
            "converts Latin-1, and --errors replace reads on"
        ) from None
    except ValueError as error:
        raise Mistake(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or key not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise Mistake(
            f"{place}: nothing under --text-key {key!r} in {keys}; --plain reads all files as the "
            "text they are"
        )
    if not isinstance(text := row[key], str):
        raise Mistake(
            f"{place}: under --text-key {key!r} is {json.dumps(text)[:40]}, no text; leave such "
            "lines out"
        )
    try:  # JSON can spell half a surrogate pair, which UTF-8 cannot
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            half = f"\\u{ord(error.object[error.start]):x}"
            raise Mistake(
                f"{place}: {half} is half a surrogate pair, no character; --errors replace reads on"
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

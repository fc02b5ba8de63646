"""Parquet files give the texts of one column, row by row, in memory that no file decides on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake
from scalegpt.files.text_files import MOST_HELD, WHOLE, Share, opened

_ROWS = 64  # read at once at most
_BUFFER = 1 << 20  # bytes read at once of a column


def has_column(path: Path | str, key: str) -> bool:
    """Tell whether a file is Parquet; raise Mistake if it is, and has no column `key` of texts."""
    try:
        with opened(path) as stream:
            if not stream.peek(4).startswith(b"PAR1"):
                return False
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error}") from error
    with _open(path, key):
        return True


def texts(path: Path | str, key: str, errors: str, share: Share = WHOLE) -> Iterator[str]:
    """Yield the text of each row of the column `key`; that of a row without one is "".

    errors: "strict", or "replace" for bytes that are not UTF-8. share: only the row groups of this
    share of the file. Raises Mistake for a file that cannot be read or has no such column, and for
    a text too long to be held in memory.
    """
    with _open(path, key) as (file, column):
        first, last = (int(file.num_row_groups * part) for part in share)
        number = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, last):
            # A few bytes may stand for a long text in each of many rows: the group states how long
            # one can be, and so many rows are read at once as can be held whatever they are.
            longest = file.metadata.row_group(group).column(column).total_uncompressed_size
            rows = min(_ROWS, max(1, MOST_HELD // max(1, longest)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=[key]):
                for value in batch.column(0).cast("large_binary"):
                    number += 1
                    content = (value.as_buffer() or b"") if value.is_valid else b""
                    if len(content) > MOST_HELD:
                        raise Mistake(f"{path}, row {number} has more than {MOST_HELD:,} bytes")
                    try:
                        yield str(content, "utf-8", errors)
                    except UnicodeDecodeError as error:
                        raise Mistake(
                            f"{path}, row {number} is not UTF-8: {error.reason}; --errors replace "
                            "reads on"
                        ) from error


@contextmanager
def _open(path: Path | str, key: str) -> Iterator[tuple[Any, int]]:
    """Yield pyarrow's file and the number of its column `key`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise Mistake(f"{path} needs pyarrow: pip install 'scalegpt[data]'") from error
    try:
        with opened(path) as stream:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER)
            schema = file.schema_arrow
            if schema.names.count(key) != 1:
                raise Mistake(
                    f"{path}: no column {key!r} among {', '.join(schema.names)}; name the column "
                    "of the texts by --text-key"
                )
            kind = schema.field(key).type
            if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
                raise Mistake(
                    f"{path}: the column {key!r} holds {kind}, no text; name the column of the "
                    "texts by --text-key"
                )
            names = [file.schema.column(i).path for i in range(len(file.schema))]
            yield file, names.index(key)
    except (pa.ArrowException, OSError) as error:
        line = str(error).strip().partition("\n")[0]
        raise Mistake(f"cannot read {path}: {line}") from error

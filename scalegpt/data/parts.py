"""A text is prepared in parts, by any machines in any order, to the tokens that one would make.

Part I of N is a function of the sorted list of input files, of which it takes a consecutive share,
of whole files if there are as many, and of the settings. It is a data set of its own, but that a
split may be empty. Its meta.json is written last, and says of what it was made, so that a part is
whole or not there. `joined` reads the parts as one.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

import scalegpt
from scalegpt.data.joined import columns_of, part_folder
from scalegpt.data.prepare import SPLITS, prepared, publish
from scalegpt.data.token_files import INDEX, file_of, index_of
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.text_files import WHOLE, Share, opened, size_of

T = TypeVar("T")
BLOCK = 1 << 22  # bytes that are hashed at a time


class Part(NamedTuple):
    """Part `number`, from 0 on, of `n`."""

    number: int
    n: int

    def __str__(self) -> str:
        return f"{self.number}/{self.n}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Return the part that "I/N" names. Raises Mistake for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        part = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not part.number < part.n:
            raise Mistake(f"--part={text} must be I/N, as 0/10 to 9/10 for ten parts")
        return part

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the consecutive items of this part, whose number differs by one at most."""
        first, last = (len(items) * i // self.n for i in (self.number, self.number + 1))
        return items[first:last]

    def shares(self, files: Sequence[T]) -> dict[T, Share]:
        """Return the files of this part, and of each the share that it takes."""
        if self.n <= len(files):
            return dict.fromkeys(self.share(files), WHOLE)
        begin, end = (Fraction(len(files) * i, self.n) for i in (self.number, self.number + 1))
        return {
            files[k]: (max(begin - k, WHOLE[0]), min(end - k, WHOLE[1]))
            for k in range(floor(begin), ceil(end))
        }


def folder_of(out: Path, part: Part) -> Path:
    """Return the folder of a part. Raises Mistake where there are parts of another N."""
    if others := {*_numbers(out)} - {part.n}:
        raise Mistake(
            f"{out} holds parts of {min(others)}, not of {part.n}; remove {out}/parts-"
            f"{min(others)}, or choose another --out"
        )
    return part_folder(out, *part)


def _numbers(out: Path) -> list[int]:
    """Return into how many parts the folder's data are divided, of each division there."""
    names = (re.fullmatch(r"parts-([1-9][0-9]{0,8})", path.name) for path in out.glob("parts-*"))
    return sorted(int(name[1]) for name in names if name)


def source_of(source: str, tokenizer: Tokenizer, files: Sequence[Any], part: Part) -> str:
    """Return the source of a part: that of the data set, and all else that parts must agree on."""
    spec = json.dumps(tokenizer.spec(), sort_keys=True)
    names = json.dumps([str(file) for file in files])
    hashes = (hashlib.sha256(text.encode("utf-8", "surrogateescape")) for text in (spec, names))
    ids, names = (digest.hexdigest()[:12] for digest in hashes)
    files = f"{len(files)} files {names}"
    return f"{source}, part {part} by scalegpt {scalegpt.__version__}, tokenizer {ids}, {files}"


def input_facts(split: str, file: Path | str, kind: str, share: Share) -> dict[str, Any]:
    """Return what the meta.json of a part says of an input file, or of its share of one."""
    size = size_of(file)
    facts = {"split": split, "file": str(file), "kind": kind, "bytes": size}
    first, last = (int(size * part) for part in share)
    if share != WHOLE:
        facts |= {"from": first, "to": last}
    with opened(file) as stream:
        if share == WHOLE:
            return {**facts, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        digest = hashlib.sha256()
        stream.seek(first)
        while first < last and (block := stream.read(min(BLOCK, last - first))):
            digest.update(block)
            first += len(block)
    return {**facts, "sha256": digest.hexdigest()}


def manifests(out: Path, source: Callable[[Part], str]) -> list[dict[str, Any]]:
    """Return the meta.json of each part in `out`, in order.

    source: returns that of a part. Raises Mistake, saying which, for parts that are missing, not
    whole, or made of something else.
    """
    if not (numbers := _numbers(out)):
        raise Mistake(f"{out} has no parts to merge: make them by the same command with --part I/N")
    if len(numbers) > 1:
        raise Mistake(
            f"{out} holds parts of {numbers[0]} and of {numbers[1]}; remove the folder parts-N of "
            "the one that is not meant"
        )
    parts = [Part(i, numbers[0]) for i in range(numbers[0])]
    metas = [prepared(part_folder(out, *part), source(part)) for part in parts]
    if missing := [part for part, meta in zip(parts, metas, strict=True) if meta is None]:
        shown = ", ".join(str(part.number) for part in missing[:20])
        more = f" and {len(missing) - 20:,} more" if len(missing) > 20 else ""
        raise Mistake(
            f"{out} lacks {len(missing):,} of {len(parts):,} parts, or has them not whole: {shown}"
            f"{more}; make each by the same command with --part, as --part {missing[0]}"
        )
    first: dict[str, tuple[int, Part]] = {}
    for part, meta in zip(parts, metas, strict=True):
        for file in meta["inputs"]:  # one that grew would have lines in two parts, or in none
            size, before = first.setdefault(file["file"], (file["bytes"], part))
            if size != file["bytes"]:
                raise Mistake(
                    f"{file['file']} had {size:,} bytes for part {before}, and {file['bytes']:,} "
                    f"for part {part}: make its parts again, with --force"
                )
    return metas


def merge(out: Path, parts: list[dict[str, Any]], source: str, force: bool) -> dict[str, Any]:
    """Write the meta.json of the data set that `parts`, from `manifests`, are; return its content.

    Every byte of them is read. source, force: as of `publish`. Raises Mistake for a part whose
    files are not those that it says.
    """

    def write() -> dict[str, Any]:
        size = sum(path.stat().st_size for path in out.glob(f"parts-{len(parts)}/*/*"))
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            splits = {split: _whole(out, parts, split, bar.update) for split in SPLITS}
        same = {key: parts[0][key] for key in ("tokenizer", "vocab_size", "dtype")}
        columns = {split: columns_of([part[split] for part in parts]) for split in SPLITS}
        return {"format": 2, **same, **splits, "parts": columns}

    return publish(out, write, source, force)


def _whole(
    out: Path, parts: list[dict[str, Any]], split: str, read: Callable[[int], Any]
) -> dict[str, Any]:
    """Return what meta.json would say of a split's file if it were one, and check the parts."""
    counts, digests = Counter(tokens=0, bytes=0, documents=0), (hashlib.sha256(), hashlib.sha256())
    for k, part in enumerate(parts):
        folder, facts = part_folder(out, k, len(parts)), part[split]
        for block in _checked(
            folder / file_of(split, "text"), facts["sha256"], Part(k, len(parts))
        ):
            digests[0].update(block)
            read(len(block))
        for block in _checked(folder / index_of(split), facts["index"], Part(k, len(parts))):
            ends = np.frombuffer(block, INDEX) + np.uint64(counts["tokens"])
            digests[1].update(ends.astype(INDEX))
            read(len(block))
        for key in ("tokens", "bytes", "documents"):
            counts[key] += facts[key]
        counts["max_id"] = max(counts["max_id"], facts["max_id"])
    return {**counts, "sha256": digests[0].hexdigest(), "index": digests[1].hexdigest()}


def _checked(file: Path, expected: str, part: Part) -> Iterator[bytes]:
    """Yield the bytes of a part's file; raise Mistake at the end if its hash is another."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            yield block
    if digest.hexdigest() != expected:
        raise Mistake(
            f"{file} is not what {file.parent}/meta.json describes (sha256 "
            f"{digest.hexdigest()[:8]}..., not {expected[:8]}...); make it again by the same "
            f"command with --part {part} --force"
        )

"""Turn conversations into token files: answers to learn, and all else to read.

The rows are JSON lines or arrays, packed or not, in the formats of OpenAI, ShareGPT and Alpaca, or
pairs of prompt and completion or of question and answer; the first row's keys tell which, and all
rows must be of that format. A hash of its first question decides whether a conversation goes to
validation. An example is shown in which what is learned is marked. Rows of a chosen and a rejected
answer become pairs of conversations. With --prompts only questions are kept, for a run that writes
the answers itself, with what its reward needs.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import argparse
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.data import chat, conversations
from scalegpt.data.prepare import (
    SPLITS,
    check_disk,
    described,
    publish,
    script_parser,
    stable_fraction,
    training_flags,
    write_bins,
    write_prompts,
)
from scalegpt.data.tokenizer import Tokenizer, char_tokenizer
from scalegpt.errors import Mistake, counted
from scalegpt.files.text_files import absolute, find_files
from scalegpt.processes.command import python, run_command
from scalegpt.processes.streams import visible
from scalegpt.weights.tokenizer_files import named

_NOT_SHAPING = ("out", "force", "preview")
MOST_FAULTS = 10_000  # so many bad rows are counted
SHOWN = 2000  # characters of an example
SIZES = (256, 512, 1024, 2048)


@dataclass
class Tally:
    """What has been seen in one reading of all rows, for the messages at the end."""

    format: str | None
    prompts: bool
    faults: list[str] = field(default_factory=list)
    unread: Counter = field(default_factory=Counter)  # rows by a key that is not read
    counts: Counter = field(default_factory=Counter)
    first_spelt: str = ""  # the place of the first text that spells a mark
    lengths: Counter = field(default_factory=Counter)  # conversations by their number of tokens
    digests: set[bytes] = field(default_factory=set)
    examples: list[list[np.ndarray]] = field(default_factory=list)  # a pair has two

    @property
    def kind(self) -> str:
        """The kind of data that rows of this format are."""
        if self.prompts:
            return "prompts"
        return "pairs" if self.format == "preferences" else "chat"

    @property
    def what(self) -> str:
        """What one of these data is, for messages."""
        return {"prompts": "prompt", "pairs": "pair", "chat": "conversation"}[self.kind]

    def talks(self, example: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Return the messages of an example, of a pair those with either answer."""
        both = self.kind == "pairs"
        return [example[key] for key in ("messages", "rejected")[: 1 + both]]


def read(
    files: list[Path], tally: Tally, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and example of each row; what is wrong with a row goes to tally.faults.

    An example is {"messages": ...}, of a pair also "rejected", and for a reward more.

    Who takes a place may add faults, too. Raises Mistake for a first row of no known format, and
    at the end for more faults than --skip-bad.
    """
    faults, skip = tally.faults, args.skip_bad
    for path in files:
        for line, text in conversations.rows(path):
            if len(faults) > max(skip, MOST_FAULTS):
                break
            place = f"{path}, line {line}"
            try:
                row = conversations.parse(text)
            except Mistake as error:
                faults.append(f"{place}: {error}")
                continue
            try:
                tally.format = tally.format or conversations.format_of(row, args.prompts)
            except Mistake as error:
                raise Mistake(f"{place}: {error}") from None
            try:
                example = example_of(row, tally, args.tools == "keep")
            except Mistake as error:
                faults.append(f"{place}: {error}")
                continue
            tally.unread.update(conversations.unread(row, tally.format, args.prompts))
            yield place, example
    if len(faults) > skip:
        more = (
            f"\n{counted(len(faults) - 1, 'more bad row')}, the next {faults[1]}"
            if faults[1:]
            else ""
        )
        at_least = "at least " * (len(faults) > MOST_FAULTS)
        raise Mistake(
            f"{faults[0]}{more}\nmend the rows, or leave {at_least}{len(faults):,} out by "
            f"--skip-bad {len(faults)}"
        )


def example_of(row: Any, tally: Tally, tools: bool) -> dict[str, Any]:
    """Return the example that a row is. Raises Mistake."""
    if tally.kind == "prompts":
        return conversations.prompt_of(row, tally.format)
    if tally.kind == "pairs":
        found = conversations.pair_of(row, tools)
    else:
        found = (conversations.messages_of(row, tally.format, tools),)
    found, lost = zip(*map(conversations.without_end_marks, found), strict=True)
    if tally.kind == "pairs":
        conversations.check_pair(*found)
    tally.counts["lost"] += sum(lost)
    return dict(zip(("messages", "rejected"), found, strict=False))


def split_at(fractions: list[float], val_fraction: float, source: str) -> float:
    """Return below which fraction a conversation goes to validation: at least one does.

    Raises Mistake where no conversation would be left to train on.
    """
    if not fractions:
        raise Mistake(f"no conversation in {source}")
    if len({*fractions}) == 1:
        raise Mistake(
            f"{counted(len(fractions), 'conversation')} with one first question in {source}: "
            "training and validation need one each; give at least one with another question"
        )
    limit = max(val_fraction, math.nextafter(min(fractions), 1))
    if max(fractions) < limit:
        raise Mistake(
            f"all of {len(fractions):,} conversations go to validation by --val-fraction="
            f"{val_fraction}, which keeps those with the same first question together: give more "
            "conversations, or a smaller fraction"
        )
    return limit


def question(messages: list[dict[str, Any]]) -> str:
    """Return the first message of the user."""
    return next(m["content"] for m in messages if m["role"] == "user")


def encoded(
    codec: Tokenizer, args: argparse.Namespace, files: list[Path], limit: float, tally: Tally
) -> Iterator[tuple[str, np.ndarray, dict[str, int]]]:
    """Yield what `write_bins` takes of each conversation. Raises Mistake as `read`."""
    pairs = {"pairs": 1} if tally.kind == "pairs" else {}
    train = "last" if pairs else args.train
    for place, example in read(files, tally, args):
        talks = tally.talks(example)
        try:
            ids = [chat.encode_conversation(codec, messages, train) for messages in talks]
            if any((part < 0).all() for part in ids):
                raise Mistake("answers of weight 0 leave nothing to learn: leave the row out")
        except Mistake as error:
            tally.faults.append(f"{place}: {error}")
            continue
        pieces = [[p for p in chat.pieces(messages, train) if p[1]] for messages in talks]
        split = "val" if stable_fraction(question(talks[0])) < limit else "train"
        count(tally, place, sum(pieces, []), ids)
        answers = [m["content"] for messages in talks for m in messages if m["role"] == "assistant"]
        spaced = [a for a in answers if isinstance(a, str) and a != a.strip()]
        tally.counts.update(answers=len(answers), outer_space=len(spaced))
        if split == "train" and len(tally.examples) < args.preview:
            tally.examples.append(ids)
        for part, texts, side in zip(ids, pieces, ("chosen", "rejected"), strict=False):
            learned = sum(len(text.encode()) for _, text, is_learned in texts if is_learned)
            trained = int((part >= 0).sum())
            tally.counts[side] += trained
            added = {"bytes": learned, "documents": 1, "trained": trained}
            yield split, part.astype("<i4"), added | (pairs if side == "chosen" else {})


def prompts(
    codec: Tokenizer, args: argparse.Namespace, files: list[Path], limit: float, tally: Tally
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield what `write_prompts` takes of each example. Raises Mistake as `read`."""
    for place, example in read(files, tally, args):
        messages = example["messages"]
        try:
            ids = chat.encode_prompt(codec, messages)
        except Mistake as error:
            tally.faults.append(f"{place}: {error}")
            continue
        split = "val" if stable_fraction(question(messages)) < limit else "train"
        count(tally, place, [*chat.pieces(messages)], [ids])
        tally.counts["answers"] += "answer" in example
        if split == "train" and len(tally.examples) < args.preview:
            tally.examples.append([~ids])
        yield split, example, len(ids)


def count(tally: Tally, place: str, pieces: list, ids: list[np.ndarray]) -> None:
    """Add an example to the tally."""
    tally.lengths.update(map(len, ids))
    digest = hashlib.blake2b(np.concatenate(ids).tobytes(), digest_size=8).digest()
    spelt = any(conversations.SPELT.search(text) for _, text, _ in pieces)
    tally.first_spelt = tally.first_spelt or place * spelt
    tally.counts.update(spelt=spelt, duplicates=digest in tally.digests)
    tally.digests.add(digest)


def summary(tally: Tally, splits: dict[str, Any]) -> Iterator[str]:
    """Yield lines that say what the data are, and what a user may want to mend."""
    counts, lengths, what = tally.counts, tally.lengths, tally.what
    answers, sizes = counted(counts["answers"], "answer"), {}
    for split in SPLITS:
        sizes[split] = splits[split].get("pairs", splits[split]["documents"])
    yield f"format {tally.format}: {counted(sum(sizes.values()), what)} with {answers}"
    for split in SPLITS:
        facts = splits[split]
        yield f"{split}: {counted(sizes[split], what)}, {facts['tokens']:,} tokens" + (
            f", of which {trained:,} ({trained / facts['tokens']:.1%}) are learned"
            if (trained := facts.get("trained"))
            else ""
        )
    yield f"longest {max(lengths):,} tokens, {_percentile(lengths):,} at the 99th percentile"
    if what == "pair":
        means = [f"{counts[side] / sum(sizes.values()):,.1f}" for side in ("chosen", "rejected")]
        yield f"a chosen answer has {means[0]} tokens on average, a rejected one {means[1]}"
    if what != "prompt":
        # A row of block_size inputs has one token more, for its last target.
        n = lengths.total()
        shares = {size: sum(k for x, k in lengths.items() if x <= size + 1) / n for size in SIZES}
        fits = ", ".join(f"{share:.1%} in {size}" for size, share in shares.items())
        yield f"whole in a row of block_size: {fits}"
    if tally.faults:
        first = tally.faults[:3]
        yield f"left out {counted(len(tally.faults), 'bad row')}, the first {len(first)}:"
        yield from (f"  {fault}" for fault in first)
    if counts["lost"]:
        answers = counted(counts["lost"], "answer")
        yield f"of {answers} a mark at the end, as <|endoftext|>, is left out"
    if counts["spelt"]:
        yield (
            f"warning: the text of {counted(counts['spelt'], what)} spells a mark, as "
            f"<|im_end|>, first {tally.first_spelt}: it is read as text"
        )
    if counts["outer_space"] > 0.01 * counts["answers"]:
        yield f"warning: space around {counted(counts['outer_space'], 'answer')} is learned"
    if counts["duplicates"]:
        yield f"{counted(counts['duplicates'], what)} repeated from before, and kept"
    if tally.unread:
        keys = ", ".join(f"{key} ({counted(k, 'row')})" for key, k in tally.unread.most_common(10))
        yield f"keys that are not read: {keys}"


def _percentile(lengths: Counter) -> int:
    left = 0.99 * lengths.total()
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            return length
    raise AssertionError(lengths)


def example_text(codec: Tokenizer, ids: np.ndarray, color: bool) -> str:
    """Return a conversation as text with its marks; what is learned is green, or within [[ ]]."""
    before, after = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    text, room = "", SHOWN
    for learned, part in groupby(ids.tolist(), lambda i: i >= 0):
        part = visible(codec.decode([i if learned else ~i for i in part], marks=True))
        shown = part[:room] + "..." * (len(part) > room)
        text += f"{before}{shown}{after}" if learned else shown
        room -= len(part)
        if room <= 0:
            break
    return text


def write(args: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """Write the data's files, and print what is in them; return meta.json's content."""
    base = None if args.tokenizer == "char" else named(args.tokenizer)
    codec = base and base.chat()
    if base and base.template:
        print(
            f"note: {args.tokenizer} has a chat template of its own; these conversations have "
            "marks of scalegpt beside it, by which a run that begins with that model learns"
        )
    fractions, characters, n_characters = [], set(), 0
    tally = Tally(args.format, args.prompts)
    for _, example in read(files, tally, args):
        fractions.append(stable_fraction(question(example["messages"])))
        texts = [text for m in tally.talks(example) for _, text, _ in chat.pieces(m)]
        n_characters += sum(map(len, texts))
        if codec is None:
            characters.update(*texts)
    limit = split_at(fractions, args.val_fraction, args.input)
    codec = codec or char_tokenizer(characters).chat()
    bpe = codec.name not in ("byte", "char")  # English: 4.4 bytes a token of gpt2's
    check_disk(args.out, n_characters * 4 / (4 if bpe else 1))
    total = len(fractions) * (2 if tally.kind == "pairs" else 1)
    tally = Tally(tally.format, args.prompts)
    if args.prompts:
        splits = write_prompts(args.out, prompts(codec, args, files, limit, tally), total)
    else:
        splits = write_bins(args.out, encoded(codec, args, files, limit, tally), total)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for ids in tally.examples:
        learned = f", learned where it is {'green' if color else 'within [[ ]]'}"
        print(f"an example{'' if args.prompts else learned}:")
        print(*(example_text(codec, part, color) for part in ids), "", sep="\n")
    for line in summary(tally, splits):
        print(line)
    return {**described(codec, np.dtype("<i4"), splits), "kind": tally.kind}


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__, workers=False)
    more = parser.add_argument
    more(
        "--tokenizer",
        default="gpt2",
        help="gpt2 (default), byte, char, tokenizer.json or the folder of a run, data set or model",
    )
    formats = dict.fromkeys((*conversations.READ, *conversations.PROMPTS))
    more("--format", choices=[*formats], help="of the rows (default: by the first one)")
    more(
        "--prompts",
        action="store_true",
        help="keep the questions, and what a reward needs, for a run that writes the answers",
    )
    more(
        "--train",
        choices=("all", "last"),
        default="all",
        help="learn all answers of a conversation, or the last alone (default: all)",
    )
    more(
        "--tools",
        choices=("keep", "drop"),
        default="keep",
        help="calls of tools and their results in answers, as GSM8K's <<1+1=2>> (default: keep)",
    )
    more("--skip-bad", type=int, default=0, help="bad rows that are left out (default: 0)")
    more("--val-fraction", type=float, default=0.05, help="for validation (default: %(default)s)")
    more("--preview", type=int, default=1, help="examples to show (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.input is None:
        raise Mistake("--input is missing: a file, a folder or a pattern of files of conversations")
    allowed = (*conversations.PROMPTS,) if args.prompts else conversations.READ
    if args.format not in (None, *allowed):
        raise Mistake(
            f"--format {args.format} goes with{'out' if args.prompts else ''} --prompts; those "
            f"that go here are {', '.join(allowed)}"
        )
    if not 0 < args.val_fraction < 1:
        raise Mistake(f"--val-fraction must be between 0 and 1, got {args.val_fraction}")
    for name in ("skip_bad", "preview"):
        if (value := getattr(args, name)) < 0:
            raise Mistake(f"--{name.replace('_', '-')}={value} must be 0 or more")
    files = find_files(args.input)
    if any(args.out.resolve() in Path(absolute(path)).parents for path in files):
        raise Mistake(f"--out {args.out} holds input files: choose another folder")
    given = {**vars(args), "input": absolute(args.input)}
    shaping = [k for k in given if k not in _NOT_SHAPING and given[k] != parser.get_default(k)]
    source = " ".join(["chat", *(f"--{k.replace('_', '-')}={given[k]}" for k in shaping)])
    meta = publish(args.out, partial(write, args, files), source, args.force)
    flags = training_flags(meta["kind"], args.tokenizer, args.out)
    print(f"to train on these: {python()} -m scalegpt.train {flags}")
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

"""Make conversations about words and numbers, whose answers can be checked; needs no network.

The words are made up. A tenth of them, by a hash, is for validation and tests alone:
`python -m scalegpt.evaluate --task reverse` asks about others than a model was trained on.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

from collections.abc import Iterator
from typing import Any

import numpy as np

from scalegpt.data import generated
from scalegpt.data.chat import encode_conversation, encode_prompt
from scalegpt.data.prepare import (
    check_disk,
    described,
    publish,
    script_parser,
    training_flags,
    write_bins,
    write_prompts,
)
from scalegpt.data.prompts import Example
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake, counted
from scalegpt.processes.command import python, run_command
from scalegpt.weights.tokenizer_files import named

VAL_SHARE = 0.05


def examples(tasks: list[str], counts: dict[str, int], seed: int) -> Iterator[tuple[str, Example]]:
    """Yield split and example, those of all tasks in turn. counts: of each task, in each split."""
    for split, source in (("train", "train"), ("val", "test")):
        for index in range(counts[split]):
            for task in tasks:
                yield split, generated.example(task, seed, index, source)


def encoded(
    codec: Tokenizer, made: Iterator[tuple[str, Example]]
) -> Iterator[tuple[str, np.ndarray, dict[str, int]]]:
    """Yield what `write_bins` takes of each example, a conversation."""
    for split, example in made:
        answer = {"role": "assistant", "content": example["answer"]}
        ids = encode_conversation(codec, [*example["messages"], answer])
        size = len(example["answer"].encode())
        added = {"bytes": size, "documents": 1, "trained": int((ids >= 0).sum())}
        yield split, ids.astype("<i4"), added


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__, workers=False, reads=False)
    more = parser.add_argument
    more(
        "--tasks",
        default=",".join(generated.TASKS),
        help="separated by commas (default: %(default)s)",
    )
    more("--count", type=int, default=8000, help="conversations of each task (default: 8000)")
    more("--seed", type=int, default=1, help="decides which (default: 1)")
    more(
        "--tokenizer",
        default="byte",
        help="byte (default), gpt2, tokenizer.json or the folder of a run, data set or model",
    )
    more("--prompts", action="store_true", help="the questions, for a run that writes the answers")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise Mistake(f"--count={args.count} must be at least 1")
    tasks = args.tasks.split(",")
    if unknown := [task for task in tasks if task not in generated.TASKS]:
        raise Mistake(f"--tasks: no task {unknown[0]!r}: there are {', '.join(generated.TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise Mistake(f"--tasks={args.tasks} names a task twice")

    def write() -> dict[str, Any]:
        codec = named(args.tokenizer).chat()
        check_disk(args.out, args.count * len(tasks) * 4 * 60)  # an int32 for each byte
        counts = {"train": args.count, "val": max(1, round(VAL_SHARE * args.count))}
        made, total = examples(tasks, counts, args.seed), sum(counts.values()) * len(tasks)
        if args.prompts:
            prompts = ((s, x, len(encode_prompt(codec, x["messages"]))) for s, x in made)
            splits = write_prompts(args.out, prompts, total)
        else:
            splits = write_bins(args.out, encoded(codec, made), total)
        kind = "prompts" if args.prompts else "chat"
        return {**described(codec, np.dtype("<i4"), splits), "kind": kind}

    names = {"tasks": args.tasks, "count": args.count, "tokenizer": args.tokenizer}
    names |= {"seed": args.seed} | ({"prompts": True} if args.prompts else {})
    source = " ".join(f"{name}={value}" for name, value in names.items())
    meta = publish(args.out, write, source, args.force)
    what = "prompt" if args.prompts else "conversation"
    for split in ("train", "val"):
        facts = meta[split]
        print(f"{split}: {counted(facts['documents'], what)}, {facts['tokens']:,} tokens")
    flags = training_flags(meta["kind"], args.tokenizer, args.out)
    print(f"to train on these: {python()} -m scalegpt.train {flags}")
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

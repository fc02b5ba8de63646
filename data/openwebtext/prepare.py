"""Prepare OpenWebText as GPT-2 tokens, shuffled and split as nanoGPT does (seed 2357).

Without --input the text comes from the Hugging Face hub; with it, from local parquet or JSON lines
(with a column "text"), or from .txt files, each of which is a document.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalegpt.data.prepare import Corpus, check_disk, script_parser, write_dataset
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.text_files import absolute, find_files
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import named

REPOSITORY = "Skylion007/openwebtext"
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}  # nanoGPT's, with gpt2
CACHE_BYTES = 54e9  # of the download and its unpacked form in datasets' cache
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def load_text(pattern: str | None, out: Path) -> Any:
    """Return a datasets.Dataset with a column "text". Raises Mistake, also without a network."""
    try:
        import datasets
    except ImportError as error:
        raise Mistake("this needs datasets: pip install 'scalegpt[data]'") from error
    if pattern is None:
        return _download(datasets, out)
    files = [str(path) for path in find_files(pattern)]
    endings = {Path(name).suffix for name in files}
    if len(endings) != 1 or not (builder := BUILDERS.get(min(endings).lower())):
        raise Mistake(
            f"--input {pattern}: files of one of {[*BUILDERS]} needed, found: {sorted(endings)}; "
            "say by a pattern which are meant"
        )
    options = {"sample_by": "document"} if builder == "text" else {}
    dataset = datasets.load_dataset(builder, data_files=files, split="train", **options)
    if "text" not in dataset.column_names:
        raise Mistake(f"--input {pattern}: no column 'text' among {dataset.column_names}")
    return dataset


def _download(datasets: Any, out: Path) -> Any:
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # HF_HOME moves it
    cache.mkdir(parents=True, exist_ok=True)
    check_disk(out, 2.0 * sum(TOKENS.values()))
    if not (cache / REPOSITORY.replace("/", "___")).exists():
        check_disk(cache, CACHE_BYTES)
    processes = max(1, (os.cpu_count() or 1) // 2)
    try:
        return datasets.load_dataset(REPOSITORY, split="train", num_proc=processes)
    except OSError as error:  # every network error of datasets and the hub is one
        raise Mistake(
            f"cannot load {REPOSITORY}: {error}; with local files: python {__file__} --input FILES "
            f"--out {out}"
        ) from error


def corpus(tokenizer: Tokenizer, dataset: Any) -> Corpus:
    """Return the corpus in nanoGPT's order, with nanoGPT's .0005 of documents for validation."""
    if len(dataset) < 2:
        raise Mistake(f"--input has {len(dataset)} of the two documents that a split needs")
    parts = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

    def documents() -> Iterator[tuple[str, str]]:
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            for rows in part.iter(batch_size=1000):
                yield from ((split, text) for text in rows["text"])

    return Corpus(tokenizer, documents(), dataset.data.nbytes)


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    parser.add_argument(
        "--tokenizer", default="gpt2", help="as in data/text, but for char (default: gpt2)"
    )
    args = parser.parse_args(argv)
    tokenizer = named(args.tokenizer)
    source = f"{absolute(args.input) if args.input else REPOSITORY}, {args.tokenizer}"
    meta = write_dataset(
        args.out,
        lambda: corpus(tokenizer, load_text(args.input, args.out)),
        source,
        args.workers,
        args.force,
    )
    counts = {split: meta[split]["tokens"] for split in TOKENS}
    if args.input is None and args.tokenizer == "gpt2" and counts != TOKENS:
        print(f"WARNING: nanoGPT counts {TOKENS} tokens, this is {counts}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

"""Prepare FineWeb-Edu, or a sample of it, from the Hugging Face hub or a local copy of its files.

A hash of its text decides whether a document goes to validation.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

from collections.abc import Iterator

from scalegpt.data import published
from scalegpt.data.prepare import Corpus, script_parser, stable_fraction
from scalegpt.files import parquet
from scalegpt.files.text_files import size_of
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import named

REPOSITORY = "HuggingFaceFW/fineweb-edu"
SUBSETS = {"sample-10BT": "sample/10BT", "sample-100BT": "sample/100BT"}
SUBSETS |= {"sample-350BT": "sample/350BT"}
VALIDATION = 0.0005  # of the documents


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    more = parser.add_argument
    more("--subset", choices=[*SUBSETS], default="sample-10BT", help="(default: %(default)s)")
    more("--files", type=int, help="only so many of its files, the first")
    more("--tokenizer", default="gpt2", help="as in data/text, but for char (default: gpt2)")
    args = parser.parse_args(argv)

    def corpus() -> Corpus:
        tokenizer = named(args.tokenizer)
        if args.input:
            files = published.local_files(args.input, 1)[: args.files]
            size = sum(map(size_of, files))
        else:
            sizes = published.names_and_sizes(REPOSITORY, SUBSETS[args.subset])
            sizes = dict([*sizes.items()][: args.files])
            size, files = sum(sizes.values()), published.download(REPOSITORY, sizes, args.out)

        def documents() -> Iterator[tuple[str, str]]:
            for file in files:
                for text in filter(None, parquet.texts(file, "text", "strict")):
                    yield ("val" if stable_fraction(text) < VALIDATION else "train"), text

        return Corpus(tokenizer, documents(), 2 * size)  # packed about 2:1

    published.write(args, f"{REPOSITORY} {args.subset}", corpus)
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

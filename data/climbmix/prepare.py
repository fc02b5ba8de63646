"""Prepare ClimbMix as nanochat has it, from the Hugging Face hub or a local copy of its files.

The last file is for validation, as in nanochat; the others are shuffled already.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

from collections.abc import Iterator
from itertools import chain

from scalegpt.data import published
from scalegpt.data.prepare import Corpus, script_parser
from scalegpt.files import parquet
from scalegpt.files.text_files import size_of
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import named

REPOSITORY = "karpathy/climbmix-400b-shuffle"


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    more = parser.add_argument
    more("--files", type=int, help="only so many files for training, the first")
    more("--tokenizer", default="gpt2", help="as in data/text, but for char (default: gpt2)")
    args = parser.parse_args(argv)

    def corpus() -> Corpus:
        tokenizer = named(args.tokenizer)
        if args.input:
            *train, val = published.local_files(args.input, 2)
            train = train[: args.files]
            size, files = sum(map(size_of, [*train, val])), chain([val], train)
        else:
            sizes = published.names_and_sizes(REPOSITORY, "")
            val, size = sizes.popitem()
            sizes = {val: size} | dict([*sizes.items()][: args.files])
            size, files = sum(sizes.values()), published.download(REPOSITORY, sizes, args.out)

        def documents() -> Iterator[tuple[str, str]]:
            for number, file in enumerate(files):
                for text in filter(None, parquet.texts(file, "text", "strict")):
                    yield ("train" if number else "val"), text

        return Corpus(tokenizer, documents(), 2 * size)  # packed about 2:1

    published.write(args, REPOSITORY, corpus)
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

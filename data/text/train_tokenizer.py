"""Train a tokenizer on your own text: BPE over bytes in GPT-4's words, as a tokenizer.json.

The ids are the bytes, the tokens that are learned, the end-of-text mark, and seven that stay free
for the marks of a chat. At the end a table says how many bytes a token stands for.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import json
import os
from collections.abc import Iterator
from itertools import chain

from scalegpt.config.parser import Parser
from scalegpt.data.fast_encoding import by_itself, faster
from scalegpt.data.reading import chunks_of, kinds_of, read_documents
from scalegpt.data.tokenizer import END_OF_TEXT, MARKS, Tokenizer, load, of_openai
from scalegpt.errors import Mistake
from scalegpt.files.folder import local_path
from scalegpt.files.text_files import find_files
from scalegpt.processes.command import run_command
from scalegpt.weights.tokenizer_files import GPT4_WORDS, read_file, trained

NOT_LEARNED = len(MARKS)  # the end-of-text mark, which begins a chat, and a chat's other marks
REPORTED = 1 << 24  # characters of each file that the table is made of


def texts(pattern: str, key: str) -> Iterator[str]:
    """Yield the documents of the files, those of plain text part by part."""
    kinds = kinds_of(find_files(pattern), key, False, "strict")
    yield from chain.from_iterable(map(chunks_of, read_documents(kinds, key, "strict")))


def learned(documents: Iterator[str], size: int) -> dict[bytes, int]:
    """Return `size` tokens of BPE over bytes with their ids; fewer where the text has no more."""
    try:
        import rustbpe
    except ImportError as error:
        raise Mistake("this needs rustbpe: pip install 'scalegpt[data]'") from error
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(documents, size, pattern=GPT4_WORDS)
    tokens = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    # Two merges may make the same bytes; a token has one id.
    return {token: i for i, token in enumerate(dict.fromkeys(bytes(t) for t, _ in tokens))}


def table(patterns: list[str], key: str, tokenizers: dict[str, Tokenizer]) -> Iterator[str]:
    """Yield the lines of a table: bytes a token of each file, by each tokenizer."""
    yield "bytes a token  " + "".join(f"{name:>12}" for name in tokenizers)
    for pattern in patterns:
        sample, size = [], 0
        for text in texts(pattern, key):
            sample, size = [*sample, text], size + len(text)
            if size > REPORTED:
                break
        n_bytes, row = sum(len(text.encode()) for text in sample), ""
        for tokenizer in tokenizers.values():
            encode = faster(tokenizer, sample[:1], 1)[0] or by_itself(tokenizer)
            row += f"{n_bytes / max(1, encode(sample)[0].size):12.3f}"
        yield f"{os.path.basename(pattern)[-14:]:15}{row}"


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    more = parser.add_argument
    more("--input", required=True, type=os.path.expanduser, help="text, as data/text/prepare.py")
    more("--out", required=True, type=local_path, help="a new folder for the tokenizer")
    more("--vocab-size", type=int, default=32768, help="ids, with marks (default: %(default)s)")
    more("--text-key", default="text", help="as data/text/prepare.py (default: text)")
    more("--report", nargs="+", default=[], help="files to show the compression of, too")
    args = parser.parse_args(argv)
    least = 256 + NOT_LEARNED
    if args.vocab_size < least + 1:
        raise Mistake(
            f"--vocab-size={args.vocab_size} must be at least {least + 1:,}: 256 bytes, "
            f"{NOT_LEARNED} marks and what is learned"
        )
    if os.path.lexists(args.out):
        raise Mistake(f"--out {args.out} is there: choose a new folder, or remove it")
    documents = texts(args.input, args.text_key)
    if (first := next(documents, None)) is None:
        raise Mistake(f"no text in {args.input}")

    def all_texts() -> Iterator[str]:
        yield first
        yield from documents

    ranks = learned(all_texts(), args.vocab_size - NOT_LEARNED)
    if (missing := args.vocab_size - NOT_LEARNED - len(ranks)) > 0:
        print(f"the text has too few different words: {missing:,} ids less than --vocab-size")
    files = {
        "tokenizer.json": trained(ranks),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
        },
    }
    args.out.mkdir(parents=True)
    for name, content in reversed(files.items()):  # the folder is a tokenizer with the last of them
        (args.out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    tokenizers = {"this": load(read_file(args.out / "tokenizer.json"))}
    for name in ("gpt2", "o200k_base"):
        try:
            tokenizers[name] = of_openai(name)
        except Mistake as mistake:
            print(f"not compared with {name}: {mistake}")
    for line in table([args.input, *args.report], args.text_key, tokenizers):
        print(line)
    print(f"use it: python data/text/prepare.py --tokenizer {args.out} ...")
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

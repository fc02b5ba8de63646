"""Prepare Tiny Shakespeare as GPT-2 tokens, or as characters, split 90/10 as in nanoGPT.

The split is by characters and no end-of-text marks are set, so that the counts are nanoGPT's.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import hashlib
import os
import urllib.request
from pathlib import Path

from scalegpt.data.prepare import Corpus, script_parser, write_dataset
from scalegpt.data.tokenizer import char_tokenizer, load
from scalegpt.errors import Mistake
from scalegpt.files.text_files import read_text
from scalegpt.processes.command import run_command

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download(path: Path) -> bytes:
    """Return the 1.1 MB at URL, stored as `path`. Raises Mistake offline or for other content."""
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        content = path.read_bytes()
    else:
        print(f"downloading {URL}", flush=True)
        try:
            with urllib.request.urlopen(URL, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            raise Mistake(
                f"cannot get {URL}: {error}; save a copy of it as {path} and try again"
            ) from error
        partial.write_bytes(content)
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise Mistake(f"{path} has sha256 {digest}, not {SHA256}; delete it and try again")
    if partial.exists():
        os.replace(partial, path)
    return content


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    parser.add_argument(
        "--tokenizer", choices=("gpt2", "char"), default="gpt2", help="default: gpt2"
    )
    args = parser.parse_args(argv)

    def corpus() -> Corpus:
        text = read_text(args.input) if args.input else download(args.out / "input.txt").decode()
        tokenizer = char_tokenizer([text]) if args.tokenizer == "char" else load(args.tokenizer)
        n_train = int(len(text) * 0.9)
        documents = [("train", text[:n_train]), ("val", text[n_train:])]
        return Corpus(tokenizer, documents, len(text), separate=False)

    text = Path(args.input).resolve() if args.input else URL
    source = f"{text}, {args.tokenizer}"
    write_dataset(args.out, corpus, source, args.workers, args.force)
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)

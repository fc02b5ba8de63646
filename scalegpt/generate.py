"""Text from a trained model: `python -m scalegpt.generate --run out/NAME --prompt "..."`."""

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import jax
import numpy as np

from scalegpt import command_line, trained
from scalegpt.decode import Decoder, decoder
from scalegpt.sampling import Sampler
from scalegpt.tokenizer import Tokenizer

_HELP = {
    "temperature": "0: always the likeliest token",
    "top_k": "draw from the so many likeliest; 0: from all",
    "top_p": "draw from the likeliest that have this probability together",
    "min_p": "draw from those at least this likely, relative to the likeliest",
    "repetition_penalty": "above 1: tokens of the text so far become less likely",
}

_MOST = {"num_samples": 1 << 16, "max_new_tokens": 2**31 - 1}  # a list of samples; JAX's counter


@dataclass
class Continuation:
    """What has been written after one prompt. text: what is certain of it so far.

    finish: why it ended, None while it has not: end_of_text, stop (a stop string, which is not part
    of the text) or length.
    """

    codec: Tokenizer
    stops: Sequence[str] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None

    def add(self, token: int) -> None:
        """One more token; it is ignored when the text has ended."""
        if self.finish:
            return
        if token == self.codec.eot:
            self.end("end_of_text")
            return
        self.ids.append(token)
        text = self._decoded()
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.text, self.finish = text[: min(found)], "stop"
            return
        # Not yet certain: half a UTF-8 character, and what may become a stop string.
        text = text.rstrip("\ufffd")
        held = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self.text = text[: len(text) - max(held, default=0)]

    def end(self, finish: str) -> None:
        if self.finish is None:
            self.text, self.finish = self._decoded(), finish

    def _decoded(self) -> str:
        return self.codec.decode(np.array(self.ids, np.int64))


def continuations(
    write: Decoder,
    codec: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    seed: int = 1337,
    stops: Sequence[str] = (),
    watch: Callable[[list[Continuation]], None] = lambda texts: None,
) -> list[Continuation]:
    """Continue each prompt until end of text, a stop string or max_new_tokens.

    watch: called after each token, with all texts. Every process must call this together.
    """
    texts = [Continuation(codec, stops) for _ in prompts]
    for ids in write.ids(prompts, max_new_tokens, seed):
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.add(token)
        watch(texts)
        if all(text.finish for text in texts):
            break
    for text in texts:
        text.end("length")
    watch(texts)
    return texts


def prompt_ids(codec: Tokenizer, text: str) -> np.ndarray:
    """An empty prompt is the start of a new text. Raises ValueError for what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line or a pipe that Python could not decode
        raise ValueError(f"the prompt {text[:20]!r} is not UTF-8 text") from None
    ids = codec.encode_prompt(text)
    if len(ids):
        return ids
    if codec.eot is None:
        raise ValueError("the prompt is empty, and this tokenizer has no mark to start from")
    return np.array([codec.eot])


def main(argv: list[str]) -> int:
    parser = command_line.Parser(
        prog="scalegpt.generate",
        description="Continue texts with a trained model. Without a prompt: standard input, or, "
        "at a terminal, one prompt after the other.",
    )
    trained.add_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="text to continue; can be repeated")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    for option in fields(Sampler):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}", type=option.type, default=option.default,
            help=f"{_HELP[option.name]} (default {option.default})",
        )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text; can be repeated")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--past-block", choices=("slide", "error"), default="slide",
                        help="a text longer than the model's block_size: continue from its last "
                        "block_size tokens, slowly, or refuse")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample")
    flags = parser.parse_args(argv)
    for name in ("num_samples", "max_new_tokens"):
        if not 1 <= (value := getattr(flags, name)) <= _MOST[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}={value} must be at least 1 and at most {_MOST[name]}")
    if not 0 <= flags.seed < 2**32:
        raise ValueError(f"--seed={flags.seed} must be from 0 to {2**32 - 1}")
    if "" in flags.stop:
        raise ValueError("--stop='' would end every text before it begins; give some text")
    sampler = Sampler(**{option.name: getattr(flags, option.name) for option in fields(Sampler)})
    prompts, interactive = _prompts(flags)
    model = trained.load(flags, microbatch=1)
    if flags.prompt is None and flags.prompt_file is None and jax.process_count() > 1:
        raise ValueError("several processes need --prompt or --prompt-file: each has its own input")
    codec = model.codec()
    write = decoder(model.steps, model.params, sampler, codec.vocab_size, keep=False)
    block = model.config.model.block_size
    for texts in prompts:
        try:
            ids = [prompt_ids(codec, text) for text in texts]
            _check_length(flags, max(map(len, ids)), block)
        except ValueError as error:  # of this prompt; the next may do
            if not interactive:
                raise
            print(f"error: {error}")
            continue
        try:
            _write(flags, write, codec, texts, ids)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
    return 0


def _check_length(flags: argparse.Namespace, longest: int, block: int) -> None:
    if flags.past_block == "error" and longest + flags.max_new_tokens > block:
        raise ValueError(
            f"{longest} tokens of prompt and --max-new-tokens={flags.max_new_tokens} are more than "
            f"the model's block_size={block}; ask for fewer, or use --past-block=slide"
        )


def _prompts(flags: argparse.Namespace) -> tuple[Iterable[list[str]], bool]:
    """Batches of prompts, and whether somebody is typing them."""
    if flags.prompt is not None:
        return [flags.prompt], False
    if flags.prompt_file is not None:
        try:
            return [[flags.prompt_file.read_text(encoding="utf-8")]], False
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read --prompt-file {flags.prompt_file}: {error}") from None
    if not sys.stdin.isatty():
        return ([_piped()] for _ in range(1)), False  # not before it is asked for
    return _typed_prompts(), True


def _piped() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}; convert it first") from None


def _typed_prompts() -> Iterator[list[str]]:
    """Until Ctrl-D, or Ctrl-C where a prompt is asked for."""
    with contextlib.suppress(ImportError):  # Windows
        importlib.import_module("readline")  # editing and history for input()
    while True:
        try:
            text = input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"error: that is not UTF-8 text: {error}")
            continue
        if text:
            yield [text]


def _write(
    flags: argparse.Namespace,
    write: Decoder,
    codec: Tokenizer,
    texts: list[str],
    ids: list[np.ndarray],
) -> None:
    """Print the samples of all prompts, the first one while it is made, then the speed."""
    asked = [pair for pair in zip(texts, ids, strict=True) for _ in range(flags.num_samples)]
    is_main, stream = jax.process_index() == 0, not flags.json
    printed, began, first = "", time.perf_counter(), 0.0

    def watch(written: list[Continuation]) -> None:
        nonlocal printed, first
        first = first or time.perf_counter()
        if is_main and stream:
            print(written[0].text[len(printed) :], end="", flush=True)
            printed = written[0].text

    if is_main and stream:
        print(asked[0][0], end="", flush=True)
    written = continuations(
        write, codec, [x for _, x in asked],
        max_new_tokens=flags.max_new_tokens, seed=flags.seed, stops=flags.stop, watch=watch,
    )  # fmt: skip
    ended = time.perf_counter()
    if not is_main:
        return
    if stream:
        rest = zip(asked[1:], written[1:], strict=True)
        print("".join(f"\n---------------\n{text}{done.text}" for (text, _), done in rest))
    else:
        for (text, x), done in zip(asked, written, strict=True):
            row = {"prompt": text, "text": done.text, "finish": done.finish,
                   "prompt_tokens": len(x), "new_tokens": len(done.ids)}  # fmt: skip
            print(json.dumps(row, ensure_ascii=False))
    later, seconds = sum(len(done.ids) for done in written) - len(asked), ended - first
    speed = f", then {later / seconds:.1f} tokens/s" if later > 0 else ""
    prompts = " + ".join(str(len(x)) for x in ids)
    print(
        f"[{prompts} tokens of prompt, first new token after {first - began:.1f} s{speed}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    command_line.run(main)

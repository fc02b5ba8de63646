"""This command writes text: `python -m scalegpt.generate --run out/NAME --prompt "..."`."""

if __name__ == "__main__":
    import gc

    from scalegpt.processes.exits import leave_on_interrupt

    gc.disable()  # until `run_command`: nothing that is imported is garbage
    leave_on_interrupt()

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np

from scalegpt.config import command_line
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake, counted
from scalegpt.files.cache import keep_compiled
from scalegpt.inference import sampling
from scalegpt.inference.continuation import continued, prompt_ids
from scalegpt.inference.decode import Decoder, decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.processes import startup, streams
from scalegpt.processes.command import run_command
from scalegpt.weights import trained

# Each sample is an entry of a list, and JAX counts tokens in an int32.
_MOST = {"num_samples": 1 << 16, "max_new_tokens": 2**31 - 1}


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    _check(flags)
    sampler = sampling.from_flags(flags)
    prompts, interactive = _prompts(flags)
    keep_compiled()
    with startup.start(trained.machine(flags).distributed) as group:
        if flags.prompt is None and flags.prompt_file is None and group.count > 1:
            raise Mistake(
                "several processes need --prompt or --prompt-file: each has its own input"
            )
        trained.self_check(flags, group)
        digest = sha256(repr(prompts).encode()).hexdigest()[:16]
        startup.same_everywhere({"prompts": f"SHA-256 {digest}"})
        _continue(flags, sampler, prompts, interactive)
        return group.farewell(0)


def _continue(
    flags: argparse.Namespace, sampler: Sampler, prompts: Iterable[list[str]], interactive: bool
) -> None:
    """Load the model and print its continuations of all prompts."""
    model = trained.load(flags, microbatch=1)
    codec = model.codec()
    write = decoder(model.steps, model.params, sampler, codec.vocab_size, keep=False)
    for texts in prompts:
        try:
            ids = [prompt_ids(codec, text) for text in texts]
            _check_length(flags, max(map(len, ids)), model.config.model.block_size)
        except ValueError as error:
            if not interactive:
                raise
            print(f"error: {error}")  # the next prompt may be good
            continue
        try:
            _write(flags, write, codec, texts, ids)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _parser() -> command_line.Parser:
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
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, help="of each, at most (default: 200)"
    )
    sampling.add_flags(parser)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; can be repeated",
    )
    parser.add_argument(
        "--past-block",
        choices=("slide", "error"),
        default="slide",
        help="a text longer than the model's block_size: continue from its last "
        "block_size tokens, slowly, or refuse",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample")
    return parser


def _check(flags: argparse.Namespace) -> None:
    for name in ("num_samples", "max_new_tokens"):
        if not 1 <= (value := getattr(flags, name)) <= _MOST[name]:
            flag = name.replace("_", "-")
            raise Mistake(f"--{flag}={value} must be at least 1 and at most {_MOST[name]}")
    if "" in flags.stop:
        raise Mistake("--stop='' would end every text before it begins; give some text")


def _check_length(flags: argparse.Namespace, longest: int, block: int) -> None:
    if flags.past_block == "error" and longest + flags.max_new_tokens > block:
        raise Mistake(
            f"{counted(longest, 'token')} of prompt and --max-new-tokens={flags.max_new_tokens} "
            f"are more than the model's block_size={block}; ask for fewer, or use "
            "--past-block=slide"
        )


def _prompts(flags: argparse.Namespace) -> tuple[Iterable[list[str]], bool]:
    """Return batches of prompts, and whether somebody is typing them."""
    if flags.prompt is not None:
        for text in flags.prompt:
            if text.startswith("FILE:"):
                file = text.removeprefix("FILE:")
                raise Mistake(
                    f"--prompt={text} is the way of nanoGPT; write --prompt-file={file}, as also "
                    "for a text that begins so"
                )
        return [flags.prompt], False
    if flags.prompt_file is not None:
        try:
            return [[flags.prompt_file.read_text(encoding="utf-8-sig")]], False
        except (OSError, UnicodeDecodeError) as error:
            raise Mistake(f"cannot read --prompt-file {flags.prompt_file}: {error}") from None
    if not sys.stdin.isatty():
        return _piped_prompt(), False
    return _typed_prompts(), True


def _piped_prompt() -> Iterator[list[str]]:
    """Yield the text of standard input; it is read when the model has been loaded."""
    try:
        text = sys.stdin.read().removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise Mistake(f"standard input is not UTF-8 text: {error}; convert it first") from None
    yield [text]


def _typed_prompts() -> Iterator[list[str]]:
    """Yield each prompt that is typed, until Ctrl-D, or Ctrl-C instead of a prompt."""
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
    """Print the samples of all prompts, the first one while it is written, then the speed."""
    pairs = [pair for pair in zip(texts, ids, strict=True) for _ in range(flags.num_samples)]
    is_main, stream = jax.process_index() == 0, not flags.json
    shown = streams.visible if sys.stdout.isatty() else str  # a pipe gets the text itself
    printed, began, first = "", time.perf_counter(), 0.0

    if is_main and stream:
        print(pairs[0][0], end="", flush=True)
    for samples in continued(
        write,
        codec,
        [prompt for _, prompt in pairs],
        max_new_tokens=flags.max_new_tokens,
        seed=flags.seed,
        stops=flags.stop,
    ):
        first = first or time.perf_counter()
        if is_main and stream:
            print(shown(samples[0].text[len(printed) :]), end="", flush=True)
            printed = samples[0].text
    ended = time.perf_counter()
    if not is_main:
        return
    if stream:
        others = zip(pairs[1:], samples[1:], strict=True)
        print("".join(f"\n---------------\n{text}{shown(x.text)}" for (text, _), x in others))
    else:
        for (text, prompt), sample in zip(pairs, samples, strict=True):
            row = {
                "prompt": text,
                "text": sample.text,
                "finish": sample.finish,
                "prompt_tokens": len(prompt),
                "new_tokens": len(sample.ids),
            }
            print(json.dumps(row, ensure_ascii=False))
    later, seconds = sum(len(sample.ids) for sample in samples) - len(pairs), ended - first
    speed = f", then {later / seconds:.1f} tokens/s" if later > 0 else ""
    prompts = " + ".join(str(len(prompt)) for prompt in ids)
    plural = "" if prompts == "1" else "s"
    print(
        f"[{prompts} token{plural} of prompt, first new token after {first - began:.1f} s{speed}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_command(main)

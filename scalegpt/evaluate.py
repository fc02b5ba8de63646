"""Figures of a trained model: loss over text, and tasks; `python -m scalegpt.evaluate`.

Evaluation shares no random key and no position with training: how often it happens changes
nothing in the run.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax

from scalegpt.config import Config, DataConfig, command_line, loading
from scalegpt.config.differences import NOT_SHAPING
from scalegpt.data import tokenizer
from scalegpt.data.token_files import Split, open_split
from scalegpt.errors import Mistake
from scalegpt.files.cache import keep_compiled
from scalegpt.inference import tasks
from scalegpt.inference.batching import Figures
from scalegpt.inference.likelihood import scorer
from scalegpt.inference.text_loss import losses, text_split
from scalegpt.processes import startup
from scalegpt.processes.command import run_command
from scalegpt.weights import trained


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    _check(flags)
    config = None
    if flags.config is not None:
        config = loading.validate(loading.load(flags.config), flags.config)
        if not config.run.init_from:
            raise Mistake(
                f"{flags.config} has no run.init_from, which names the weights to evaluate; for "
                f"those of the run itself: --run {config.run.out_dir}"
            )
    asked = dict(zip(flags.task, flags.file, strict=True))
    if config and not (asked or flags.text or flags.data):
        asked, flags.limit = config.eval.tasks, flags.limit or config.eval.task_examples
    microbatch = flags.microbatch or (config and config.batch.microbatch) or 8
    # Before the weights are read, maybe downloaded; of a run's own data only they can tell.
    splits, weights = _splits(flags, config.data) if config else ([], [])
    keep_compiled()
    startup.start(trained.machine(flags, config).distributed)
    loaded = trained.load(flags, microbatch, config)
    model, steps = loaded.config.model, loaded.steps
    if config:
        _refuse_other_model(config, loaded)
    else:
        splits, weights = _splits(flags, loaded.config.data)
    for split in splits:
        _refuse_other_tokens(split, loaded)
    codec = loaded.codec() if asked or flags.text else None
    # Everything is read before anything is computed: a mistake shall not cost an hour.
    opened = [tasks.open_task(n, f, codec, model.block_size, flags.limit) for n, f in asked.items()]
    if flags.text:
        splits, weights = [text_split(flags.text, codec)], [1.0]
    results: list[tuple[str, Figures, int, str]] = []
    if splits:
        windows = flags.windows or (config and config.eval.windows)
        evaluate, count = losses(steps, splits, weights, windows, shown=True)
        file = Path(flags.data) if flags.data else None
        name = file.stem if file and file.is_file() else flags.split or "val"
        name = "text" if flags.text else name
        results.append((name, evaluate(loaded.params), count, "tokens"))
    score = scorer(steps)
    for task in opened:
        found = tasks.run(task, score, loaded.params, shown=True)
        results.append((task.name, found, len(task.gold), "examples"))
    for name, figures, _, _ in results:
        if not all(math.isfinite(value) for value, _ in figures.values()):
            raise Mistake(
                f"a figure of {loaded.name} over {name} is not finite: the tokens are others than "
                "their meta.json says, or the weights are broken"
            )
    if jax.process_index() == 0:
        at = "" if loaded.step is None else f", step {loaded.step}"
        on = [split.name for split in splits] + [Path(file).name for file in asked.values()]
        title = f"{loaded.name}{at}, on {', '.join(on)}"
        print(_json(loaded, results) if flags.json else f"{title}\n{_table(results)}")
    return 0


def _json(loaded: trained.Trained, results: list[tuple[str, Figures, int, str]]) -> str:
    row: dict[str, Any] = {"model": loaded.name, "step": loaded.step}
    for name, figures, count, unit in results:
        for key, (value, error) in figures.items():
            row |= {f"{name}/{key}": value, f"{name}/{key}_stderr": error}
        row[f"{name}/{unit}"] = count
    return json.dumps(row)


def _table(results: list[tuple[str, Figures, int, str]]) -> str:
    lines = [
        (f"{name}/{key}", f"{value:.6g}", f"± {error:.3g}", f"{count:,} {unit}")
        for name, figures, count, unit in results
        for key, (value, error) in figures.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([x.ljust(w) for x, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  " + "  ".join(line).rstrip() for line in cells)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="scalegpt.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Loss of a trained model over text, and its scores in tasks. Text is evaluated "
        "in\nwindows of block_size side by side, each without what came before it.",
        epilog=tasks.__doc__,
    )
    trained.add_flags(parser).add_argument(
        "--config",
        metavar="FILE",
        help="a run's config: the weights of its run.init_from, on its "
        "data.path, with its eval, batch.microbatch and mesh",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--data",
        metavar="PATH",
        help="folder or URL with val.bin, or a .bin file (default: the "
        "run's own, if there is no --task)",
    )
    text.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text, encoded by the model's tokenizer; predicted "
        "from its first token on, where the tokenizer has an end-of-text mark to start from",
    )
    parser.add_argument("--split", choices=("val", "train"), help="of a data folder (default val)")
    parser.add_argument("--windows", type=int, help="first so many windows (default: all)")
    parser.add_argument(
        "--task",
        action="append",
        choices=tasks.NAMES,
        default=[],
        help="with its --file; several are possible",
    )
    parser.add_argument("--file", action="append", default=[], help="the task's examples")
    parser.add_argument("--limit", type=int, help="first so many examples (default: all)")
    parser.add_argument("--microbatch", type=int, help="rows a device works on (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _check(flags: argparse.Namespace) -> None:
    """What can be told before JAX starts and weights are read."""
    for name in ("microbatch", "windows", "limit"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise Mistake(f"--{name}={getattr(flags, name)} must be at least 1")
    if (flags.microbatch or 1) > 1 << 16:  # rows of a batch, padded to so many
        raise Mistake(f"--microbatch={flags.microbatch} must be at most {1 << 16}")
    if len(flags.task) != len(flags.file) or len(set(flags.task)) != len(flags.task):
        raise Mistake("each --task needs its --file, and each task can be given once")
    for path in [*flags.file, *([flags.text] if flags.text else [])]:
        if not Path(path).is_file():
            raise Mistake(f"there is no file {path}")
    if flags.task and not (flags.data or flags.text) and (flags.windows or flags.split):
        raise Mistake("--windows and --split are of text; a --task alone has --limit")
    if flags.split and (flags.text or str(flags.data).endswith(".bin")):
        raise Mistake(f"--split={flags.split} is of a folder; a file is evaluated as it is")
    if flags.limit and not (flags.task or flags.config):
        raise Mistake(f"--limit={flags.limit} is of a --task; --windows is of text")
    if flags.hf and not (flags.data or flags.text or flags.task):
        raise Mistake(f"{flags.hf} has no data of its own; give --data, --text or --task")


def _refuse_other_model(config: Config, loaded: trained.Trained) -> None:
    """The weights decide what the model is, so the config must not say that it is another."""
    neutral = NOT_SHAPING - {"block_size"}
    theirs = loaded.config.model
    for key in sorted(config.model.model_fields_set - neutral):
        if getattr(config.model, key) != getattr(theirs, key):
            raise Mistake(
                f"model.{key}={getattr(config.model, key)}, but {loaded.name} of run.init_from has "
                f"{getattr(theirs, key)}"
            )


def _splits(flags: argparse.Namespace, data: DataConfig) -> tuple[list[Split], list[float]]:
    """The token files asked for, else those of `data`; none if only something else is asked for."""
    if flags.text or (flags.task and not flags.data):
        return [], []
    shares = {flags.data: 1.0} if flags.data else data.weights
    if "" in shares:
        raise Mistake("an imported model has no data of its own; give --data, --text or --task")
    splits = [open_split(path, flags.split or "val", data.cache_dir) for path in shares]
    return splits, list(shares.values())


def _refuse_other_tokens(split: Split, loaded: trained.Trained) -> None:
    size = loaded.config.model.vocab_size
    if split.vocab_size > size:
        raise Mistake(
            f"{split.name} has {split.vocab_size} token ids, the model only {size}; prepare the "
            "text with the model's tokenizer"
        )
    if loaded.tokenizer is not None and not tokenizer.same(loaded.tokenizer, split.tokenizer):
        raise Mistake(
            f"{split.name} was made with tokenizer {tokenizer.kind(split.tokenizer)}, the model "
            f"with another, {tokenizer.kind(loaded.tokenizer)}, so that ids do not mean the same; "
            "prepare the text again"
        )


if __name__ == "__main__":
    run_command(main)

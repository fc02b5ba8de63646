"""This command measures a trained model: its loss over text and its scores in tasks.

Evaluation shares no random key and no data position with training, so that a run is the same
however often it is evaluated.
"""

if __name__ == "__main__":
    import gc

    from scalegpt.processes.exits import leave_on_interrupt

    gc.disable()  # until `run_command`: nothing that is imported is garbage
    leave_on_interrupt()

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalegpt.config import Config, DataConfig, command_line, loading
from scalegpt.config.differences import OF_THE_RUN
from scalegpt.data import tokenizer
from scalegpt.data.datasets import check_documents
from scalegpt.data.generated import TASKS
from scalegpt.data.packing import pack
from scalegpt.data.templates import with_end
from scalegpt.data.token_files import Split, open_dataset, open_split
from scalegpt.errors import Mistake
from scalegpt.files.cache import keep_compiled
from scalegpt.files.run_folder import local
from scalegpt.inference import chat_tasks, tasks
from scalegpt.inference.core import Core
from scalegpt.inference.decode import decoder
from scalegpt.inference.likelihood import scorer
from scalegpt.inference.results import Result
from scalegpt.inference.sampling import Sampler
from scalegpt.inference.text_loss import text_evaluator, text_split
from scalegpt.processes import startup
from scalegpt.processes.command import run_command
from scalegpt.step.build import build_for_use
from scalegpt.weights import trained


class _Inputs(NamedTuple):
    """The model to evaluate, and what on: text (splits with their weights) and opened tasks."""

    model: trained.Trained
    splits: list[Split]
    weights: list[float]
    opened: list[tasks.Task | Core | chat_tasks.ChatTask]


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    _check(flags)
    config = _read_config(flags.config) if flags.config is not None else None
    task_files = _task_files(flags, config)
    # A config's data come before its weights, which may be a download; of --run and --hf only the
    # weights' own config names the data.
    splits, weights = _splits(flags, config.data) if config else ([], [])
    keep_compiled()
    with startup.start(trained.machine(flags, config).distributed) as group:
        trained.self_check(flags, group)
        inputs = _load(flags, config, task_files, splits, weights)
        startup.same_everywhere(_facts(inputs))
        results = _results(flags, config, inputs)
        _refuse_not_finite(inputs.model, results)
        if group.index == 0:
            model, names = inputs.model, [split.name for split in inputs.splits]
            names += [Path(file or task).name for task, file in task_files.items()]
            step = "" if model.step is None else f", step {model.step}"
            title = f"{model.name}{step}, on {', '.join(names)}"
            if inputs.splits and model.steps.eval_model.config.begins_in_batch:
                title += ", attention within each document"
            print(_json(model, results) if flags.json else f"{title}\n{_table(results)}")
        return group.farewell(0)


def _read_config(file: str) -> Config:
    config = loading.validate(loading.load(file), file)
    if not config.run.init_from:
        raise Mistake(
            f"{file} has no run.init_from, which names the weights to evaluate; for "
            f"those of the run itself: --run {config.run.out_dir}"
        )
    return config


def _task_files(flags: argparse.Namespace, config: Config | None) -> dict[str, str | None]:
    """Return each task's file by --task, or else by eval.tasks, together with its --limit."""
    given = iter(flags.file)
    files = {name: None if name in TASKS else next(given) for name in flags.task}
    if config and not (files or flags.text or flags.data):
        files, flags.limit = config.eval.tasks, flags.limit or config.eval.task_examples
    return files


def _load(
    flags: argparse.Namespace,
    config: Config | None,
    task_files: dict[str, str | None],
    splits: list[Split],
    weights: list[float],
) -> _Inputs:
    """Read everything before anything is computed, so that a mistake does not cost an hour."""
    microbatch = flags.microbatch or (config and config.batch.microbatch) or 8
    model = _masked(flags, config, trained.load(flags, microbatch, config), microbatch)
    if config:
        _refuse_other_model(config, model)
    else:
        splits, weights = _splits(flags, model.config.data)
    for split in splits:
        _refuse_other_tokens(split, model)
        if split.kind == "text" and model.steps.eval_model.config.begins_in_batch:
            lacks = f"{split.name} has neither an index"
            check_documents(lacks, split.ends, split.tokenizer, "documents are to be kept apart")
        elif flags.document_mask is not None and split.kind != "text":
            raise Mistake(
                f"--document-mask is of plain text, and {split.name} is none; leave it out"
            )
    codec = model.codec() if task_files or flags.text else None
    block_size = model.config.model.block_size
    opened = [
        (chat_tasks if name in chat_tasks.NAMES else tasks).open_task(
            name, file, codec, block_size, flags.limit
        )
        for name, file in task_files.items()
    ]
    for task in opened:
        if isinstance(task, Core) and not task.whole:
            print("note: these are not the 22 tasks of CORE: their mean is not it", file=sys.stderr)
    if not flags.seen:
        _refuse_seen(model, opened)
    if flags.text:
        splits, weights = [text_split(flags.text, codec)], [1.0]
    return _Inputs(model, splits, weights, opened)


def _masked(
    flags: argparse.Namespace, config: Config | None, model: trained.Trained, microbatch: int
) -> trained.Trained:
    """Return the model to be evaluated with documents kept apart, or not, as is asked for."""
    asked = config.eval.document_mask if config else None
    asked = asked if flags.document_mask is None else flags.document_mask
    if asked is None:
        return model
    if model.config.objective.name != "text":
        raise Mistake(
            f"{model.name} has learned from conversations, which are always kept apart: leave out "
            "--document-mask, or eval.document_mask"
        )
    evaluation = model.config.eval.model_copy(update={"document_mask": asked})
    changed = model.config.model_copy(update={"eval": evaluation})
    steps = build_for_use(changed, model.steps.mesh, microbatch)
    return replace(model, config=changed, steps=steps)


def _refuse_seen(model: trained.Trained, opened: list[Any]) -> None:
    """Raise Mistake for a task of a file whose questions the model was trained on.

    The data are those of its run, and of the runs that this began from, where they are here.
    """
    opened = [task for task in opened if isinstance(task, chat_tasks.ChatTask)]
    if all(task.name in TASKS for task in opened):
        return
    for config in _lineage(model.config):
        for path in filter(None, config.data.weights):
            try:
                datasets = [] if "://" in path else [open_dataset(path)]
            except Mistake:
                datasets = []
            if not datasets:
                print(f"note: {path} is not here to tell what was trained on", file=sys.stderr)
            for task in opened:
                chat_tasks.refuse_seen(task, model.codec(), datasets)


def _lineage(config: Config) -> Iterator[Config]:
    """Yield a run's configuration, then those of the runs that it began from and that are here."""
    files = set[Path]()
    while True:
        yield config
        file = local(config.run.init_from or "") / "config.yaml"
        if not config.run.init_from or file in files or not file.is_file():
            return
        files.add(file)
        try:
            config = loading.validate(loading.load(str(file)), str(file))
        except Mistake:  # of another version: it is no fault of what is evaluated
            return


def _facts(inputs: _Inputs) -> dict[str, str]:
    """Return what must be the same in all processes, each of which has read its own files."""
    model = inputs.model
    ids = {f"text of {split.name}": split.tokens for split in inputs.splits}
    ids |= {f"task {t.name}": np.concatenate(t.ids) for t in inputs.opened}
    return {
        "checkpoint": str(model.step),
        **{f"model.{key}": str(value) for key, value in model.config.model},
        **{
            name: f"{len(x)} ids, SHA-256 {sha256(x[: 1 << 20].tobytes()).hexdigest()[:16]}"
            for name, x in ids.items()
        },
    }


def _results(flags: argparse.Namespace, config: Config | None, inputs: _Inputs) -> list[Result]:
    (model, splits, weights, opened), results = inputs, []
    if splits:
        block = model.config.model.block_size
        splits = [
            replace(s, tokens=pack(s.name, s.tokens, s.vocab_size, block))
            if s.kind == "chat"
            else s
            for s in splits
        ]
        windows = flags.windows or (config and config.eval.windows)
        evaluate, count = text_evaluator(model.steps, splits, weights, windows, shown=True)
        file = Path(flags.data) if flags.data else None
        name = file.stem if file and file.is_file() else flags.split or "val"
        name = "text" if flags.text else name
        results.append((name, evaluate(model.params), {"tokens": count}))
    score, write = scorer(model.steps), None
    for task in opened:
        if not isinstance(task, chat_tasks.ChatTask):
            results += tasks.run(task, score, model.params, shown=True)
        else:
            codec, sampler = with_end(model.codec()), Sampler(flags.temperature, top_k=0)
            write = write or decoder(model.steps, model.params, sampler, codec.vocab_size)
            figures = chat_tasks.run(task, write, codec, flags.samples, shown=True)
            results.append((task.name, figures, {"examples": task.count}))
    return results


def _refuse_not_finite(model: trained.Trained, results: list[Result]) -> None:
    for name, figures, _ in results:
        if not all(math.isfinite(value) for value, _ in figures.values()):
            raise Mistake(
                f"a figure of {model.name} over {name} is not finite: the tokens are others "
                "than their meta.json says, or the weights are broken"
            )


def _json(model: trained.Trained, results: list[Result]) -> str:
    row: dict[str, Any] = {"model": model.name, "step": model.step}
    if model.steps.eval_model.config.begins_in_batch:
        row["document_mask"] = True
    for name, figures, counts in results:
        for key, (value, error) in figures.items():
            row |= {f"{name}/{key}": value, f"{name}/{key}_stderr": error}
        row |= {f"{name}/{unit}": count for unit, count in counts.items()}
    return json.dumps(row)


def _table(results: list[Result]) -> str:
    lines = [
        (f"{name}/{key}", f"{value:.6g}", f"± {error:.3g}", ", ".join(counted))
        for name, figures, counts in results
        for counted in [[f"{count:,} {unit}" for unit, count in counts.items() if count]]
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
        epilog=f"{tasks.__doc__}\n{chat_tasks.__doc__}",
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
    parser.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        help="keep the documents of a text apart, or not (default: as the run was evaluated)",
    )
    parser.add_argument("--windows", type=int, help="first so many windows (default: all)")
    parser.add_argument(
        "--task",
        action="append",
        choices=(*tasks.NAMES, *chat_tasks.NAMES),
        default=[],
        help="with its --file, if it has one; several are possible",
    )
    parser.add_argument(
        "--file", action="append", default=[], help="the task's examples, or core's folder"
    )
    parser.add_argument(
        "--limit", type=int, help="first so many examples (default: all of a file, or 200)"
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="answers to each prompt of a chat (default 1)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of answers in a chat (default 0: greedy)"
    )
    parser.add_argument(
        "--seen", action="store_true", help="also ask questions that the model was trained on"
    )
    parser.add_argument("--microbatch", type=int, help="rows a device works on (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _check(flags: argparse.Namespace) -> None:
    """Raise Mistake for what can be told before JAX starts and weights are read."""
    for name in ("microbatch", "windows", "limit", "samples"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise Mistake(f"--{name}={getattr(flags, name)} must be at least 1")
    if (flags.microbatch or 1) > 1 << 16:  # every batch is padded to so many rows
        raise Mistake(f"--microbatch={flags.microbatch} must be at most {1 << 16}")
    with_files = [name for name in flags.task if name not in TASKS]
    if len(with_files) != len(flags.file) or len(set(flags.task)) != len(flags.task):
        raise Mistake(
            "each --task needs its --file, and each task can be given once; those without a file "
            f"are {', '.join(TASKS)}"
        )
    if (flags.samples > 1 or flags.temperature) and not set(flags.task) & {*chat_tasks.NAMES}:
        raise Mistake(f"--samples and --temperature are of --task {', '.join(chat_tasks.NAMES)}")
    Sampler(flags.temperature)  # raises Mistake
    if flags.samples > 1 and not flags.temperature:
        raise Mistake(
            f"--samples={flags.samples} would all be the same greedy answer; give --temperature 1"
        )
    files = dict(zip(with_files, flags.file, strict=True)) | {"text": flags.text or None}
    for name, path in files.items():
        if path is not None and not Path(path).is_file() and name != "core":
            raise Mistake(f"there is no file {path}")
    if flags.task and not (flags.data or flags.text) and (flags.windows or flags.split):
        raise Mistake("--windows and --split are of text; a --task alone has --limit")
    if flags.split and (flags.text or str(flags.data).endswith(".bin")):
        raise Mistake(f"--split={flags.split} is of a folder; a file is evaluated as it is")
    if flags.limit and not (flags.task or flags.config):
        raise Mistake(f"--limit={flags.limit} is of a --task; --windows is of text")
    if flags.hf and not (flags.data or flags.text or flags.task):
        raise Mistake(f"{flags.hf} has no data of its own; give --data, --text or --task")


def _refuse_other_model(config: Config, model: trained.Trained) -> None:
    """Raise Mistake if the config says that the model is another than the weights make it."""
    loaded = model.config.model
    for key in sorted(config.model.model_fields_set - OF_THE_RUN - {"vocab_multiple"}):
        if getattr(config.model, key) != getattr(loaded, key):
            raise Mistake(
                f"model.{key}={getattr(config.model, key)}, but {model.name} of run.init_from has "
                f"{getattr(loaded, key)}"
            )


def _splits(flags: argparse.Namespace, data: DataConfig) -> tuple[list[Split], list[float]]:
    """Open the token files of --data, or else of `data`; none if only text or tasks are wanted."""
    if flags.text or (flags.task and not flags.data):
        return [], []
    weights = {flags.data: 1.0} if flags.data else data.weights
    if "" in weights:
        raise Mistake("an imported model has no data of its own; give --data, --text or --task")
    limit = data.disk_limit and data.disk_limit * 1e9
    splits = [open_split(path, flags.split or "val", data.cache_dir, limit) for path in weights]
    return splits, list(weights.values())


def _refuse_other_tokens(split: Split, model: trained.Trained) -> None:
    size = model.config.model.vocab_size
    if split.vocab_size > size:
        raise Mistake(
            f"{split.name} has {split.vocab_size} token ids, the model only {size}; prepare the "
            "text with the model's tokenizer"
        )
    specs = model.tokenizer, split.tokenizer
    if specs[0] is not None and not (tokenizer.same(*specs) or tokenizer.is_chat_of(*specs)):
        raise Mistake(
            f"{split.name} was made with tokenizer {tokenizer.kind(split.tokenizer)}, the model "
            f"with another, {tokenizer.kind(model.tokenizer)}, so that ids do not mean the same; "
            "prepare the text again, with --tokenizer and the run's folder"
        )


if __name__ == "__main__":
    run_command(main)

"""A run's configuration decides its data sets and the windows of each update; no device."""

import math
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config import BatchConfig, Config
from scalegpt.config.limits import LARGEST
from scalegpt.config.loading import validate
from scalegpt.config.presets import recipe
from scalegpt.data import datatrove, tokenizer
from scalegpt.data.batches import PIECES, TrainBatches, rows_together, train_order
from scalegpt.data.best_fit import FittedText, group_tokens
from scalegpt.data.documents import DocumentText, reach
from scalegpt.data.joined import Joined
from scalegpt.data.packing import PackedRows, one_in_each_row, pack
from scalegpt.data.token_files import Dataset, check_tokens, file_of, open_dataset
from scalegpt.errors import Mistake
from scalegpt.files.folder import expanded, open_folder

# Kind of a data set -> the objective that learns from it, what it holds, and what makes it.
_KINDS = {
    "text": ("text", "plain text", "data/text/prepare.py"),
    "chat": ("sft", "conversations", "data/chat/prepare.py"),
    "pairs": ("dpo", "pairs of preferences", "data/chat/prepare.py, of pairs,"),
    "prompts": ("grpo", "prompts", "data/chat/prepare.py --prompts"),
}


def open_datasets(config: Config, alive: Callable[[], None] = lambda: None) -> list[Dataset]:
    """Open and check every data set, preparing those that are missing if data.prepare says so.

    Conversations are put into rows.

    alive: called every ten seconds while data are prepared, which can take hours; it keeps the
    deadline of this phase away. Raises Mistake.
    """
    datasets = []
    for path in config.data.weights:
        if config.data.prepare and "://" not in path:
            _prepare(expanded(path), alive)
        limit = config.data.disk_limit and config.data.disk_limit * 1e9
        dataset = open_dataset(path, config.data.cache_dir, limit)
        _check_kind(config, dataset)
        if dataset.kind in ("chat", "pairs"):
            dataset = _in_rows(dataset, config.model.block_size)
        elif dataset.kind == "text":
            check_tokens(dataset, config.model.block_size)
            _check_disk_limit(config, dataset)
            if config.data.shuffle == "documents" and dataset.train_ends is None:
                raise Mistake(
                    f"data.shuffle=documents, but {dataset.name} has no train.idx, which says "
                    "where documents end; prepare it again, with --force"
                )
        if datasets and not tokenizer.same(dataset.tokenizer, datasets[0].tokenizer):
            raise Mistake(
                f"{dataset.name} and {datasets[0].name} have different tokenizers; "
                "prepare the data sets of a mixture with the same one"
            )
        if any(dataset.name == other.name for other in datasets):
            raise Mistake(
                f"two data sets of the mixture are both named {dataset.name}, as their folders "
                f"are; rename one, for val/{dataset.name}/loss is of one"
            )
        datasets.append(dataset)
    return _as_wide(datasets) if datasets[0].kind == "pairs" else datasets


def _check_kind(config: Config, dataset: Dataset) -> None:
    """Raise Mistake unless a data set holds what objective.name learns from."""
    name, (fitting, what, _) = config.objective.name, _KINDS[dataset.kind]
    if name != fitting:
        script = next(script for other, _, script in _KINDS.values() if other == name)
        raise Mistake(
            f"objective.name={name}, but the data set {dataset.name} holds {what}: set "
            f"--objective.name={fitting}, or give data that {script} has made"
        )


def _check_disk_limit(config: Config, dataset: Dataset) -> None:
    """Raise Mistake where one span of the training order may not fit into data.disk_limit.

    Each of its windows would have files copied that the next one deletes.
    """
    limit, train = config.data.disk_limit, dataset.train
    if not limit or not isinstance(train, Joined) or not train.copied:
        return
    splits = ((train, dataset.train_ends), (dataset.val, dataset.val_ends))
    sizes, other = (
        sum(np.multiply(s.lengths, s.dtype.itemsize) for s in split if s is not None)
        for split in splits
    )
    span = config.data.shuffle_span
    order = train_order(train, config.model.block_size, config.run.seed, 0, span)
    need, where = int(sizes.sum()), "the data set has"
    if order.piece:
        stops, width = np.cumsum([0, *sizes]), order.piece * order.block_size
        moved = config.data.shuffle == "documents" and dataset.train_ends is not None
        beyond = reach(len(train), len(dataset.train_ends)) if moved else 0
        beyond += group_tokens(order.block_size) if config.data.pack == "best_fit" else 0
        begins = np.arange(0, len(train), width)
        ends = np.minimum(begins + width + order.block_size + beyond, len(train)) - 1
        begins = np.maximum(begins - beyond, 0)
        first, last = (train.stops.searchsorted(at, "right") for at in (begins, ends))
        need = min(need, int(np.sort(stops[last + 1] - stops[first])[-PIECES:].sum()))
        where = f"the files that data.shuffle_span={span:g} tokens lie in may have"
    if (need := need + int(other.sum())) > limit * 1e9:
        raise Mistake(
            f"data.disk_limit={limit:g} GB, but {where} {need / 1e9:.3g} GB in {dataset.name}: "
            "raise it, give a smaller data.shuffle_span, or prepare the text in more parts"
        )


def _in_rows(dataset: Dataset, block_size: int) -> Dataset:
    """Return a data set of conversations in rows."""
    rows = {}
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        name = f"{dataset.name}/{split}.bin"
        if dataset.kind == "pairs":
            rows[split] = one_in_each_row(name, tokens, block_size)
        else:
            rows[split] = pack(name, tokens, dataset.vocab_size, block_size)
    return replace(dataset, **rows)


def _as_wide(datasets: list[Dataset]) -> list[Dataset]:
    """Return data sets with rows of one width, that of the widest."""
    width = max(rows.width for d in datasets for rows in (d.train, d.val))
    return [
        replace(d, train=replace(d.train, width=width), val=replace(d.val, width=width))
        for d in datasets
    ]


def resolved(config: Config, datasets: list[Dataset]) -> Config:
    """Return the run with what follows from its data.

    These are vocab_size, bos and isolate, the width of rows that are narrower than block_size, the
    marks that LoRA trains, and the number of updates.

    Raises Mistake where the keys do not go together.
    """
    config = config.with_vocab(max(d.vocab_size for d in datasets))
    chat, asked = datasets[0].kind == "chat", config.model.isolate
    masked = datasets[0].kind == "text" and config.data.document_mask
    isolate = chat or masked if asked is None else asked
    if masked and not isolate:
        raise Mistake(
            "data.document_mask=true keeps documents apart, and model.isolate=false does not; "
            "leave one of them out"
        )
    if datasets[0].kind == "text" and (why := _needs_documents(config)):
        for d in datasets:
            for split, ends in (("train", d.train_ends), ("val", d.val_ends)):
                check_documents(f"{d.name} has neither {split}.idx", ends, d.tokenizer, why)
    bos = _bos(datasets[0]) if isolate and not masked else None
    # Of plain text null stays null, as earlier runs have it.
    model = {"isolate": True if isolate else asked, "bos": bos}
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    if datasets[0].kind == "pairs":
        objective = {"width": datasets[0].train.width - 1}
        objective = config.objective.model_copy(update=objective)
        config = config.model_copy(update={"objective": objective})
    if datasets[0].kind == "prompts":
        config = _with_answers(config, datasets)
    if config.lora.rank and datasets[0].kind != "text":
        marks = {"marks": tokenizer.load(datasets[0].tokenizer).marks["system"]}
        config = config.model_copy(update={"lora": config.lora.model_copy(update=marks)})
    return _with_updates(config, datasets) if config.optim.counts_epochs else config


def resolved_to_compile(config: Config) -> Config:
    """Return the run with what its training step takes from its data, which are read if it does."""
    model, apart = config.model, config.model.isolate or config.data.document_mask
    if model.vocab_size is None or config.objective.name != "text" or apart:
        return resolved(config, open_datasets(config))
    return config


def _with_answers(config: Config, datasets: list[Dataset]) -> Config:
    """Return the run with rows that hold the longest prompt and an answer. Raises Mistake."""
    longest = max(split.longest for d in datasets for split in (d.train, d.val))
    most, block = config.grpo.max_new_tokens, config.model.block_size
    if longest + most > block:
        raise Mistake(
            f"grpo.max_new_tokens={most} and the longest prompt of {longest} tokens are more than "
            f"model.block_size={block}; lower the one, or leave out such prompts"
        )
    if config.model.vocab_size != datasets[0].vocab_size:
        raise Mistake(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer of "
            f"{datasets[0].name} knows {datasets[0].vocab_size} ids: answers could not be drawn "
            "from the distribution that is learned; leave model.vocab_size out"
        )
    # A multiple, as accelerators compute so many positions at once.
    step = 128 if longest + most > 128 else 16
    width = min(block, -(-(longest + most) // step) * step)
    objective = config.objective.model_copy(update={"width": width})
    return config.model_copy(update={"objective": objective})


def _needs_documents(config: Config) -> str | None:
    """Return the first key that needs to know where documents end, None if none does."""
    keys = {
        "data.document_mask=true": config.data.document_mask,
        "data.pack=best_fit": config.data.pack == "best_fit",
        "eval.document_mask=true": config.eval.document_mask,
    }
    return next((key for key, asked in keys.items() if asked), None)


def check_documents(lacks: str, ends: np.ndarray | None, spec: dict | str, why: str) -> None:
    """Raise Mistake unless an index or the marks of a tokenizer say where documents end.

    lacks, why: what the message says of the index that is missing, and of what needs it.
    """
    if ends is None and tokenizer.load(spec).eot is None:
        raise Mistake(
            f"{why}, but {lacks} nor end-of-text marks, which say where documents end; prepare it "
            "again, with --force"
        )


def text_of(
    tokens: np.ndarray,
    ends: np.ndarray | None,
    spec: dict | str,
    make: type[DocumentText] = DocumentText,
    **options: Any,
) -> DocumentText:
    """Return the documents of a token file, from its index and its tokenizer.

    make, options: a kind of text, and its own.
    """
    return make(tokens, ends, tokenizer.load(spec).eot, **options)


def _bos(dataset: Dataset) -> int:
    """Return the id that each of a data set's conversations, or documents, begins with."""
    if isinstance(dataset.train, PackedRows):
        return ~int(dataset.train.tokens[0])
    if (eot := tokenizer.load(dataset.tokenizer).eot) is None:
        raise Mistake(
            f"model.isolate=true keeps documents apart, but {dataset.name} has no end-of-text mark "
            "between them; leave it out, or prepare the text with another --tokenizer"
        )
    return eot


def _with_updates(config: Config, datasets: list[Dataset]) -> Config:
    """Return the run with optim.steps as optim.epochs sets them, to which a warm-up yields."""
    epochs = config.optim.epochs
    if len(datasets) > 1:
        raise Mistake(
            f"optim.epochs={epochs}: a mixture has no epochs, as its data sets are of different "
            "lengths; give optim.steps"
        )
    train = datasets[0].train
    rows = train_order(train, config.model.block_size, 0).n_windows * rows_together(train)
    updates = range(1, LARGEST + 1)
    index = bisect_left(updates, math.ceil(epochs * rows), key=config.examples_after)
    if index == len(updates):
        raise Mistake(f"optim.epochs={epochs} of {rows:,} rows are more than {LARGEST:,} updates")
    together = config.grpo.updates  # from the same answers
    steps = -(-updates[index] // together) * together
    values = config.model_dump()
    values["optim"] |= {"steps": steps, "epochs": None}
    what, notes = f"optim.epochs={epochs} of {rows:,} rows", list[str]()
    config = validate(values, what, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config


def _prepare(folder: Path, alive: Callable[[], None]) -> None:
    """Make the data set by scalegpt's own recipe of the folder's name, unless it is there.

    A script that lies in the folder is not run, because data may come from anywhere.
    """
    script = recipe(folder.name)
    interrupted = (folder / "meta.json.partial").exists()
    made = [{(folder / file_of(s, kind)).is_file() for s in ("train", "val")} for kind in _KINDS]
    whole = {True} in made and not interrupted
    if script is None or whole or datatrove.names(open_folder(folder)):
        return
    if _run([sys.executable, str(script), "--out", str(folder)], alive):
        raise Mistake(f"{script} could not prepare the data, see above")


def _run(argv: list[str], alive: Callable[[], None]) -> int:
    """Run a command, which shows its own progress, and return its exit code."""
    with subprocess.Popen(argv) as process:
        while True:
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                alive()


def training_texts(config: Config, datasets: list[Dataset]) -> list[np.ndarray | DocumentText]:
    """Return the plain texts that a run trains on, as texts of documents if a key says so."""
    data = config.data
    if data.shuffle == data.pack == "windows" and not data.document_mask:
        return [d.train for d in datasets]
    options: dict[str, Any] = {"marked": data.document_mask}
    if data.pack == "best_fit":
        options |= {"make": FittedText, "block_size": config.row_width}
    shuffled = data.shuffle == "documents"
    keys = [f"scalegpt/{config.run.seed}/{i}" if shuffled else None for i in range(len(datasets))]
    return [
        text_of(d.train, d.train_ends, d.tokenizer, key=key, **options)
        for d, key in zip(datasets, keys, strict=True)
    ]


def train_batches(
    config: Config, datasets: list[Dataset], microbatch: int, rows: np.ndarray
) -> TrainBatches:
    """Return the batches of a run by step; of each microbatch only `rows` are read.

    microbatch: its sequences over all devices. Of prompts only their places can be read.
    """
    batch, tokens = config.batch, [d.train for d in datasets]
    if datasets[0].kind == "prompts":
        batch = BatchConfig(sequences=config.grpo.prompts)
    if datasets[0].kind == "text":
        tokens = training_texts(config, datasets)
    return TrainBatches(
        tokens,
        list(config.data.weights.values()),
        config.row_width,
        config.run.seed,
        batch,
        microbatch,
        rows,
        config.data.shuffle_span if datasets[0].kind == "text" else None,
    )


def windows_of(config: Config, datasets: list[Dataset], update: int) -> list[tuple[str, int]]:
    """Return (data set, first token) of every row of an update's batch; updates count from 1.

    Of a row of conversations it is the first one's, and of prompts the number of each. It is where
    the token is in the file, whatever the order of documents.
    """
    batches, number = train_batches(config, datasets, 1, np.zeros(1, int)), update - 1
    indices, starts = batches.windows(number // config.grpo.updates)
    places = []
    for i, start in zip(indices.tolist(), starts.tolist(), strict=True):
        tokens = batches.tokens[i]
        found = isinstance(tokens, DocumentText | PackedRows)
        places.append((datasets[i].name, tokens.first_token(start) if found else start))
    return places

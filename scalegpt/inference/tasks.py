"""Tasks are scored by log-likelihood, as EleutherAI's evaluation harness defines them.

A task is a file with one JSON object a line, plain or packed as .xz, .gz, .bz2 or .zst:
hellaswag        activity_label, ctx_a, ctx_b, endings and label, as published
lambada          text, whose last word is to be guessed, or context and continuation
multiple_choice  context (or query), choices, and label (or gold), the right one's index from 0
core             nanochat's folder eval_bundle: DCLM's 22 tasks, each also centred (0 is guessing, 1
                 all right), and CORE, the mean of these; cut: prompts that lost their beginning,
                 as they are longer than the model's context

A model that answers in a conversation is asked a multiple_choice there: its choices get letters,
and the likeliest of these as an answer counts, by its logits over the letters alone.
"""

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config import EvalConfig
from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_prompt
from scalegpt.data.token_files import Dataset
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.inference import core, examples
from scalegpt.inference.core import Core
from scalegpt.inference.examples import Fields
from scalegpt.inference.likelihood import Row, Scorer, row_of, scorer
from scalegpt.inference.results import Figures, Result, mean
from scalegpt.step.build import Steps


@dataclass(frozen=True)
class Task:
    """A task is a list of encoded examples, each with a row for each of its choices.

    gold: the index of each example's right choice. lengths: characters of each example's choices.
    """

    name: str
    gold: list[int]
    lengths: list[list[int]]
    rows: list[Row]

    @property
    def ids(self) -> list[np.ndarray]:
        return [row.ids for row in self.rows]

    def results(self, sums: np.ndarray, greedy: np.ndarray) -> list[Result]:
        """Return what its rows' log-likelihoods say."""
        return [(self.name, figures(self, sums, greedy), {"examples": len(self.gold)})]


def open_task(
    name: str, path: str | Path, codec: Tokenizer, block_size: int, limit: int | None = None
) -> Task | Core:
    """Read and encode a task, or its first `limit` examples.

    Raises Mistake, with file and line, for a line that is no example of this task, and for a choice
    that does not fit into block_size.
    """
    if name == "core":
        return core.open_bundle(path, codec, block_size, limit)
    task = Task(name, [], [], [])

    def encoded(fields: Fields) -> tuple[int, list[str], list[Row]]:
        context, choices, gold = _PARSERS[name](fields)
        if name == "multiple_choice" and codec.chats:
            return gold, *lettered(codec, context, choices, block_size)
        # The harness joins context and choice by a space, its "target_delimiter".
        return gold, choices, [encode_pair(codec, context, f" {c}", block_size) for c in choices]

    for _, (gold, choices, rows) in islice(examples.read(path, name, encoded), limit):
        task.gold.append(gold)
        task.lengths.append([len(c) for c in choices])
        task.rows.extend(rows)
    return task


def lettered(
    codec: Tokenizer, question: str, choices: list[str], block_size: int
) -> tuple[list[str], list[Row]]:
    """Return letters for choices, and a row of each as the answer to the question in a chat.

    A letter stands after its choice, where small models see it best. Raises Mistake for more
    choices than letters, a letter of several tokens, and a question that is too long.
    """
    letters = list(string.ascii_uppercase[: len(choices)])
    if len(letters) < len(choices):
        raise Mistake(f"it has {len(choices)} choices, and there are {len(letters)} letters")
    lines = [f"- {c}={letter}" for c, letter in zip(choices, letters, strict=True)]
    asked = "\n".join([question, *lines, "Answer with the letter alone."])
    prompt = encode_prompt(codec, [{"role": "user", "content": asked}])
    if len(prompt) > block_size:
        raise Mistake(
            f"the question has {len(prompt)} tokens with its choices, the model room for "
            f"{block_size}: leave it out, or take another model"
        )
    rows = []
    for letter in letters:
        ids = codec.encode(letter)
        if len(ids) != 1:
            raise Mistake(f"{letter} is not one token of {codec.name}, so it cannot be compared")
        rows.append(Row(np.concatenate([prompt, ids]), 1))
    return letters, rows


def encode_pair(codec: Tokenizer, context: str, continuation: str, block_size: int) -> Row:
    """Encode context and continuation as the harness's `TemplateLM._encode_pair` does.

    Space at the end of the context moves to the continuation. The continuation's ids are those of
    the whole text after the first n, where n is the number of ids of the context alone. An empty
    context becomes the mark that begins a text, which stands before any other where the tokenizer
    puts it before each. A row that is too long loses its beginning. Raises Mistake where nothing of
    the context would be left.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if context:
        context_ids = codec.encode(context)
        scored_ids = codec.encode(context + continuation)[len(context_ids) :]
        context_ids = context_ids if codec.bos is None else [codec.bos, *context_ids]
    elif codec.begin is None:
        raise Mistake(f"the context is empty, and tokenizer {codec.name} has no mark for that")
    else:
        context_ids, scored_ids = np.array([codec.begin], np.int32), codec.encode(continuation)
    return row_of(context_ids, scored_ids, block_size, continuation)


def figures(task: Task, sums: np.ndarray, greedy: np.ndarray) -> Figures:
    """Compute the task's figures from its rows' log-likelihoods; standard errors are over examples.

    Of choices, acc is the share of examples whose likeliest choice is right, and acc_norm the same
    with log-likelihoods divided by the choice's length in characters. Of LAMBADA, acc is the share
    of words that greedy decoding gives, and perplexity is that of whole words; its error is by the
    delta method (the harness bootstraps).
    """
    if task.name == "lambada":
        log_likelihood, error = mean(sums)
        perplexity = math.exp(min(-log_likelihood, 700))
        return {"acc": mean(greedy), "perplexity": (perplexity, perplexity * error)}
    correct, correct_norm = [], []
    ends = np.cumsum([len(lengths) for lengths in task.lengths])
    parts = np.split(sums, ends[:-1])
    for gold, lengths, scores in zip(task.gold, task.lengths, parts, strict=True):
        correct.append(np.argmax(scores) == gold)  # the first of equals, as the harness
        correct_norm.append(np.argmax(scores / np.array(lengths)) == gold)
    return {"acc": mean(correct), "acc_norm": mean(correct_norm)}


def run(task: Task | Core, score: Scorer, params: Any, shown: bool = False) -> list[Result]:
    """Score a task with these parameters; shown: with a progress bar."""
    return task.results(*score(params, task.rows, task.name if shown else ""))


def in_training(
    config: EvalConfig,
    datasets: Sequence[Dataset],
    steps: Steps,
    check_stop: Callable[[], None],
) -> Callable[[Any], dict[str, float]]:
    """Return a function from parameters to the figures of eval.tasks here, such as hellaswag/acc.

    check_stop: called before each batch. The tasks are read at once, so that a Mistake in their
    files is raised before training begins.
    """
    files = {name: path for name, path in config.tasks.items() if name in NAMES}
    if not files:
        return lambda params: {}
    codec, block_size = tokenizer.load(datasets[0].tokenizer), steps.model.config.block_size
    opened = [
        open_task(name, path, codec, block_size, config.task_examples)
        for name, path in files.items()
    ]
    score = scorer(steps, check_stop)

    def evaluate(params: Any) -> dict[str, float]:
        row = {}
        for task in opened:
            for name, scores, _ in run(task, score, params):
                scores.pop("centered", None)  # which follows from acc
                row |= {f"{name}/{key}": value for key, (value, _) in scores.items()}
        return row

    return evaluate


Example = tuple[str, list[str], int]  # context, choices, which is right


def _hellaswag(row: Fields) -> Example:
    context = row.text("ctx_a") + " " + row.text("ctx_b").capitalize()
    choices = [_clean(ending) for ending in row.texts("endings")]
    context = _clean(row.text("activity_label") + ": " + context)
    return context, _not_empty(choices), row.index(choices, "label")


def _clean(text: str) -> str:
    """Remove the marks that WikiHow's pages have left in the text, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _lambada(row: Fields) -> Example:
    if "continuation" in row:
        context, word = row.text("context"), row.text("continuation").removeprefix(" ")
    elif "text" not in row:
        raise Mistake("it has neither 'text' nor 'context' and 'continuation'")
    else:
        context, _, word = row.text("text").rpartition(" ")
    return context, _not_empty([word]), 0


def _multiple_choice(row: Fields) -> Example:
    choices = _not_empty(row.texts("choices"))
    return row.text("context", "query"), choices, row.index(choices, "label", "gold")


def _not_empty(choices: list[str]) -> list[str]:
    if not all(choices):
        raise Mistake("a choice is empty")
    return choices


_PARSERS: dict[str, Callable[[Fields], Example]] = {
    "hellaswag": _hellaswag,
    "lambada": _lambada,
    "multiple_choice": _multiple_choice,
}
NAMES = (*_PARSERS, "core")

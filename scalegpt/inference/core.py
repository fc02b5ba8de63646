"""CORE is the mean of 22 tasks that nanochat reports (DCLM, arXiv:2406.11794, appendix G).

Each task has a number of solved examples in front of a question, and its accuracy is centred: 0 is
what guessing gets, and 1 is everything right. Prompts, examples and centring are as nanochat has
them, so that figures compare with those that are published.
"""

import csv
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from scalegpt.config.loading import parse_yaml, shown
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.text_files import read_text
from scalegpt.inference.examples import Fields, named, read
from scalegpt.inference.likelihood import Row
from scalegpt.inference.results import Result, mean, progress

LABELS = frozenset(
    "hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa "
    "piqa openbook_qa lambada_openai hellaswag winograd winogrande bigbench_dyck_languages "
    "agi_eval_lsat_ar bigbench_cs_algorithms bigbench_operators bigbench_repeat_copy_logic squad "
    "coqa boolq bigbench_language_identification".split()
)
_HINT = (
    "core wants the folder of https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip, "
    "unpacked, which holds core.yaml, eval_meta_data.csv and eval_data"
)


class _Listed(BaseModel):
    """A task as core.yaml lists it, of whose numbers of solved examples the first counts."""

    label: str
    dataset_uri: str
    num_fewshot: list[NonNegativeInt] = Field(min_length=1)
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    continuation_delimiter: str = " "


class _Listing(BaseModel):
    icl_tasks: list[_Listed] = Field(min_length=1)


class _Example(NamedTuple):
    """An example as texts, the index of the right one among them, and its line in the file.

    The right text is also what stands in front of other questions. For language modelling the two
    texts are without and with what is to be written.
    """

    texts: list[str]
    gold: int
    line: int


@dataclass(frozen=True)
class Part:
    """One of the tasks, with the right answer of each example and the index of each answer's row.

    baseline: the share that guessing gets right. kind: icl_task_type. answers: an index is None
    where an answer has no token of its own. cut: how many prompts lost their beginning.
    """

    label: str
    kind: str
    baseline: float
    gold: list[int]
    answers: list[list[int | None]]
    cut: int


@dataclass(frozen=True)
class Core:
    """The tasks of a bundle and the rows of all of them, which are scored together."""

    parts: list[Part]
    rows: list[Row]
    name: str = "core"

    @property
    def ids(self) -> list[np.ndarray]:
        return [row.ids for row in self.rows]

    @property
    def whole(self) -> bool:
        """Whether these are the 22 tasks, so that their mean is CORE."""
        return {part.label for part in self.parts} == LABELS

    def results(self, sums: np.ndarray, greedy: np.ndarray) -> list[Result]:
        """Return accuracy and centred accuracy of each task, and the mean over tasks.

        The mean is called `score` if it is over the 22 tasks of CORE, otherwise `mean`. Its error
        takes the tasks as independent.
        """
        means = [-x / row.scored for x, row in zip(sums.tolist(), self.rows, strict=True)]
        results, centered = list[Result](), []
        for part in self.parts:
            if part.kind == "language_modeling":
                right = [greedy[row] for [row] in part.answers]
            else:
                right = [
                    _likeliest([math.nan if row is None else means[row] for row in rows]) == gold
                    for rows, gold in zip(part.answers, part.gold, strict=True)
                ]
            acc, error = mean(right)
            room = 1 - part.baseline
            centered.append(((acc - part.baseline) / room, error / room))
            figures = {"acc": (acc, error), "centered": centered[-1]}
            counts = {"examples": len(part.gold), "cut": part.cut}
            results.append((f"core/{part.label}", figures, counts))
        values, errors = zip(*centered, strict=True)
        n = len(values)
        overall = (sum(values) / n, math.hypot(*errors) / n)
        return [*results, ("core", {"score" if self.whole else "mean": overall}, {"tasks": n})]


def _likeliest(losses: list[float]) -> int:
    """Return the index of the smallest loss, the first of equals.

    As nanochat's, min() keeps a NaN that comes first and passes over all others: an answer with
    which the others begin has no token of its own, and is taken only if it is the first one.
    """
    return losses.index(min(losses))


def open_bundle(
    path: str | Path, codec: Tokenizer, block_size: int, limit: int | None = None
) -> Core:
    """Read and encode the tasks of a bundle, or of each the first `limit` examples, shuffled.

    As in nanochat, solved examples come from these alone, as many as there are, and prompts of
    more than block_size tokens lose their beginning. Raises Mistake for a folder that is none, a
    line that is no example, and an answer that alone is too long.
    """
    folder, bos = Path(path), codec.begin
    if bos is None:
        raise Mistake(
            f"core puts the mark that begins a text before each prompt, and tokenizer {codec.name} "
            "has none: take a model whose tokenizer has one, such as gpt2"
        )
    tasks, baselines = _listed(folder / "core.yaml"), _baselines(folder / "eval_meta_data.csv")
    for task in tasks:
        if not 0 <= baselines.get(task.label, -1) < 1:
            raise Mistake(
                f"{folder}/eval_meta_data.csv has no 'Random baseline' of 0 up to 100 for "
                f"{task.label}, a task of core.yaml"
            )
    # All files are read before any is encoded, so that a mistake does not cost minutes.
    texts = [_examples(folder / "eval_data" / t.dataset_uri, t, limit) for t in tasks]
    parts, rows = [], list[Row]()
    with progress("prompts of core", sum(map(len, texts)), "example") as bar:
        for task, examples in zip(tasks, texts, strict=True):
            file, kind = folder / "eval_data" / task.dataset_uri, task.icl_task_type
            answers, cut = [], 0
            for i, example in enumerate(examples):
                with named(file, example.line, task.label):
                    prompts = _prompts(task, examples, i)
                    ids = [np.array([bos, *codec.encode(p)], np.int32) for p in prompts]
                    answers.append([])
                    for row, was_cut in _rows(kind, ids, block_size):
                        answers[-1].append(None if row is None else len(rows))
                        rows += [] if row is None else [row]
                        cut += was_cut
                bar.update()
            gold = [example.gold for example in examples]
            parts.append(Part(task.label, kind, baselines[task.label], gold, answers, cut))
    return Core(parts, rows)


def _listed(file: Path) -> list[_Listed]:
    if not file.is_file():
        raise Mistake(f"there is no {file}; {_HINT}")
    try:
        tasks = _Listing.model_validate(parse_yaml(read_text(file))).icl_tasks
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        raise Mistake(f"{file}: {key}={shown(detail['input'])}: {detail['msg']}") from None
    except ValueError as error:
        raise Mistake(f"{file} is not valid YAML: {error}") from None
    labels = [task.label for task in tasks]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise Mistake(f"{file} lists {twice[0]} twice")
    return tasks


def _baselines(file: Path) -> dict[str, float]:
    """Return for each task the share that guessing gets right, NaN where that is no number."""
    if not file.is_file():
        raise Mistake(f"there is no {file}; {_HINT}")
    table = csv.DictReader(io.StringIO(read_text(file), newline=""))
    try:
        rows = [*table]
    except csv.Error as error:
        raise Mistake(f"{file} is no table of values with commas: {error}") from None
    if missing := {"Eval Task", "Random baseline"} - {*(table.fieldnames or ())}:
        raise Mistake(f"{file} has no column {' and '.join(sorted(missing))}")
    baselines = {}
    for row in rows:
        try:
            baselines[row["Eval Task"]] = 0.01 * float(row["Random baseline"])
        except (TypeError, ValueError):
            continue
    return baselines


def _examples(file: Path, task: _Listed, limit: int | None) -> list[_Example]:
    if not file.is_file():
        raise Mistake(f"there is no {file}, of {task.label} in core.yaml")
    texts, delimiter = _TEXTS[task.icl_task_type], task.continuation_delimiter
    lines = read(file, task.label, lambda fields: texts(fields, delimiter))
    examples = [_Example(*example, number) for number, example in lines]
    random.Random(1337).shuffle(examples)  # nanochat's seeds, here and below
    return examples[:limit]


def _choices(fields: Fields, delimiter: str) -> tuple[list[str], int]:
    choices = fields.texts("choices")
    question = fields.text("query") + delimiter
    return [question + choice for choice in choices], fields.index(choices, "gold")


def _schema(fields: Fields, delimiter: str) -> tuple[list[str], int]:
    contexts = fields.texts("context_options")
    end = delimiter + fields.text("continuation")
    return [context + end for context in contexts], fields.index(contexts, "gold")


def _continued(fields: Fields, delimiter: str) -> tuple[list[str], int]:
    context = fields.text("context").strip() + delimiter
    return [context, context + fields.text("continuation")], 1


_TEXTS: dict[str, Callable[[Fields, str], tuple[list[str], int]]] = {
    "multiple_choice": _choices,
    "schema": _schema,
    "language_modeling": _continued,
}


def _prompts(task: _Listed, examples: list[_Example], i: int) -> list[str]:
    """Return the texts of example i, each after the solved examples that are drawn for it."""
    others = range(len(examples) - 1)
    count = min(task.num_fewshot[0], len(others))
    drawn = [examples[j + (j >= i)] for j in random.Random(1234 + i).sample(others, count)]
    solved = "".join(f"{example.texts[example.gold]}\n\n" for example in drawn)
    prompts = [solved + text for text in examples[i].texts]
    if task.icl_task_type == "language_modeling":  # a space at the end belongs to what follows
        prompts[0] = prompts[0].strip()
    return prompts


def _rows(kind: str, ids: list[np.ndarray], block_size: int) -> list[tuple[Row | None, bool]]:
    """Return a row for each answer, None without tokens of its own, and whether it was cut.

    What is scored is what the prompts do not share at their start; of a schema, what they share at
    their end; of language modelling, what the second has beyond the first.
    """
    from_the_end = kind == "schema"
    common = _common([x[::-1] for x in ids] if from_the_end else ids)
    rows = list[tuple[Row | None, bool]]()
    for x in ids[-1:] if kind == "language_modeling" else ids:
        scored = common if from_the_end else len(x) - common
        kept = x[-block_size:]
        if scored == len(x) or scored == 0:
            if kind == "language_modeling":
                raise Mistake("its continuation has no token")
            rows.append((None, False))
        elif scored >= len(kept):
            raise Mistake(
                f"{scored} tokens are to be scored, and the model has room for {len(kept) - 1}: "
                "take a model with a larger block_size"
            )
        else:
            rows.append((Row(kept, scored), len(kept) < len(x)))
    return rows


def _common(rows: list[np.ndarray]) -> int:
    """Return how many ids are the same at the start of all rows."""
    shortest = min(map(len, rows))
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))

"""A run evaluates itself while it trains: by its validation data and eval.tasks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from scalegpt.config import Config
from scalegpt.data import rewards, tokenizer
from scalegpt.data.chat import content_of, spoken
from scalegpt.data.packing import PackedRows
from scalegpt.data.token_files import Dataset, Split
from scalegpt.inference import chat_tasks, tasks
from scalegpt.inference.answers import ended_share, for_any_parameters
from scalegpt.inference.preferences import pair_evaluator
from scalegpt.inference.sampling import Sampler
from scalegpt.inference.text_loss import text_evaluator
from scalegpt.step.build import Steps

SHOWN = 16  # answers that are kept for people to read


def validation(
    config: Config,
    datasets: list[Dataset],
    steps: Steps,
    check_stop: Callable[[], None] = lambda: None,
) -> Callable[[Any], dict[str, float]]:
    """Return a function from parameters to an evaluation row of metrics.jsonl.

    check_stop: called before each batch; it raises when the run was asked to stop. Raises Mistake
    for tasks that cannot be scored.
    """
    task_figures = [
        kind.in_training(config.eval, datasets, steps, check_stop) for kind in (tasks, chat_tasks)
    ]
    figures_of = (_of_rewards if config.goal == "reward" else _of_losses)(
        config, datasets, steps, check_stop
    )

    def evaluate(params: Any) -> dict[str, Any]:
        row = figures_of(params)
        for scored in task_figures:
            row |= scored(params)
        return row

    return evaluate


def _of_losses(
    config: Config, datasets: list[Dataset], steps: Steps, check_stop: Callable[[], None]
) -> Callable[[Any], dict[str, Any]]:
    splits = [
        Split(d.name, d.tokenizer, d.vocab_size, d.val, d.val_bytes_per_token, ends=d.val_ends)
        for d in datasets
    ]
    weights = list(config.data.weights.values())
    trained_on = [
        replace(s, tokens=d.train, ends=d.train_ends, bytes_per_token=d.train_bytes_per_token)
        for s, d in zip(splits, datasets, strict=True)
    ]
    windows, train_windows = config.eval.windows, config.eval.train_windows

    def evaluator(splits: list[Split], windows: int | None, spread: bool) -> Any:
        if config.objective.name == "dpo":
            return pair_evaluator(config, steps, splits, windows, check_stop, spread)
        return text_evaluator(steps, splits, weights, windows, False, check_stop, spread)[0]

    val_figures = evaluator(splits, windows, spread=False)
    if train_windows:
        train_figures = evaluator(trained_on, train_windows, spread=True)
    ended = None
    if isinstance(datasets[0].val, PackedRows) and config.eval.answers:
        vocab_size = datasets[0].vocab_size
        ended = ended_share(steps, [d.val for d in datasets], vocab_size, config.eval.answers)

    def evaluate(params: Any) -> dict[str, Any]:
        figures = val_figures(params)
        row = {f"val/{key}": value for key, (value, _) in figures.items()}
        if train_windows:
            figures_there = train_figures(params)
            row["train/eval_loss"] = figures_there["loss"][0]
            if "bits_per_byte" in figures_there:
                row["train/eval_bits_per_byte"] = figures_there["bits_per_byte"][0]
        if ended:
            check_stop()
            row["val/ended"] = ended(params)
        row["val/loss_stderr"] = figures["loss"][1]
        return row

    return evaluate


def _of_rewards(
    config: Config, datasets: list[Dataset], steps: Steps, check_stop: Callable[[], None]
) -> Callable[[Any], dict[str, Any]]:
    """Return a function from parameters to figures of greedy answers to the held-out prompts.

    In a row, `answers` are some with their questions and rewards, for people.
    """
    grpo, codec = config.grpo, tokenizer.load(datasets[0].tokenizer)
    reward = rewards.load(grpo.reward)
    counts = [len(range(len(d.val))[: config.eval.windows]) for d in datasets]
    prompts = [
        d.val.ids(i) for d, count in zip(datasets, counts, strict=True) for i in range(count)
    ]
    examples = [d.val[i] for d, count in zip(datasets, counts, strict=True) for i in range(count)]
    weights = [
        weight / count
        for weight, count in zip(config.data.weights.values(), counts, strict=True)
        for _ in range(count)
    ]
    decoder_for = for_any_parameters(steps, Sampler(temperature=0), codec.vocab_size)

    def evaluate(params: Any) -> dict[str, Any]:
        found = chat_tasks.answers(
            decoder_for(params), codec, prompts, grpo.max_new_tokens, check_stop=check_stop
        )
        texts = [spoken(content_of(codec, ids)) for ids in found]
        values = [reward(x, text) for x, text in zip(examples, texts, strict=True)]
        ended = np.array([codec.end in ids for ids in found])
        length = np.array([len(ids) for ids in found]) - ended
        row = {
            "val/reward": float(np.dot(weights, values)),
            "val/ended": float(np.dot(weights, ended)),
            "val/length": float(np.dot(weights, length)),
        }
        if len(datasets) > 1:
            parts = np.split(np.array(values), np.cumsum(counts)[:-1])
            pairs = zip(datasets, parts, strict=True)
            row |= {f"val/{d.name}/reward": float(part.mean()) for d, part in pairs}
        questions = [example["messages"][-1]["content"] for example in examples]
        shown = zip(questions, texts, values, strict=True)
        return row | {"answers": list(shown)[:SHOWN]}

    return evaluate

"""A run evaluates itself while it trains: by its validation data and eval.tasks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scalegpt.config import Config
from scalegpt.data.token_files import Dataset, Split
from scalegpt.inference import chat_tasks, tasks
from scalegpt.inference.answers import ended_share
from scalegpt.inference.text_loss import text_evaluator
from scalegpt.step.build import Steps


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
    splits = [
        Split(d.name, d.tokenizer, d.vocab_size, d.val, d.val_bytes_per_token) for d in datasets
    ]
    weights = list(config.data.weights.values())
    text_figures = text_evaluator(steps, splits, weights, config.eval.windows, False, check_stop)[0]
    if config.eval.train_windows:
        trained_on = [replace(s, tokens=d.train) for s, d in zip(splits, datasets, strict=True)]
        train_figures = text_evaluator(
            steps, trained_on, weights, config.eval.train_windows, False, check_stop, spread=True
        )[0]
    ended = None
    if config.objective.name == "sft" and config.eval.answers:
        vocab_size = datasets[0].vocab_size
        ended = ended_share(steps, [d.val for d in datasets], vocab_size, config.eval.answers)
    task_figures = [
        kind.in_training(config.eval, datasets[0].tokenizer, steps, check_stop)
        for kind in (tasks, chat_tasks)
    ]

    def evaluate(params: Any) -> dict[str, float]:
        figures = text_figures(params)
        row = {f"val/{key}": value for key, (value, _) in figures.items()}
        if config.eval.train_windows:
            row["train/eval_loss"] = train_figures(params)["loss"][0]
        if ended:
            check_stop()
            row["val/ended"] = ended(params)
        row["val/loss_stderr"] = figures["loss"][1]
        for scored in task_figures:
            row |= scored(params)
        return row

    return evaluate

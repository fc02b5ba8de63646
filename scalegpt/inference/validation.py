"""The evaluations of a run while it trains."""

from collections.abc import Callable
from typing import Any

from scalegpt.config import Config
from scalegpt.data.token_files import Dataset, Split
from scalegpt.inference import tasks
from scalegpt.inference.text_loss import losses
from scalegpt.step.build import Steps


def validation(
    config: Config,
    datasets: list[Dataset],
    steps: Steps,
    between: Callable[[], None] = lambda: None,
) -> Callable[[Any], dict[str, float]]:
    """params -> the evaluation row of metrics.jsonl: the loss over each val.bin, and eval.tasks.

    between: called before each batch. Raises ValueError for tasks that cannot be scored.
    """
    splits = [
        Split(d.name, d.tokenizer, d.vocab_size, d.val, d.val_bytes_per_token) for d in datasets
    ]
    weights = list(config.data.weights.values())
    loss = losses(steps, splits, weights, config.eval.windows, False, between)[0]
    scores = tasks.in_training(config.eval, datasets[0].tokenizer, steps, between)

    def evaluate(params: Any) -> dict[str, float]:
        figures = loss(params)
        row = {f"val/{key}": value for key, (value, _) in figures.items()}
        return {**row, "val/loss_stderr": figures["loss"][1], **scores(params)}

    return evaluate

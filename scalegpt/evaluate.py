"""Loss over fixed windows of held-out tokens, weighted by token; `python -m scalegpt.evaluate`.

Evaluation shares no random key and no position with training: how often it happens changes
nothing in the run.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from scalegpt import command_line, sharding, trained
from scalegpt.data import Dataset, EvalBatches, check_tokens, open_dataset
from scalegpt.step import Steps


def mean_loss(steps: Steps, params: Any, batches: EvalBatches) -> tuple[float, float]:
    """Mean cross-entropy a token in nats, and its standard error with windows as samples.

    Every process gets the same figures; they do not depend on batch size or mesh.
    """
    results = []
    for batch in batches:
        tokens = sharding.to_global(
            batch, batches.rows, steps.eval_sharding, batches.rows_per_batch
        )
        results.append(steps.evaluate(params, tokens))
    sums, counts = (np.concatenate([np.asarray(r[i]) for r in results]) for i in (0, 1))
    sums, counts = (x[: batches.windows].astype(np.float64) for x in (sums, counts))
    loss = sums.sum() / counts.sum()
    # Standard error of a ratio of sums (Cochran, Sampling Techniques, 1977, eq. 6.9).
    spread = np.square(sums - loss * counts).sum() * len(sums) / max(1, len(sums) - 1)
    return float(loss), math.sqrt(spread) / float(counts.sum())


def validation(
    steps: Steps, datasets: list[Dataset], weights: list[float], windows: int | None
) -> Callable[[Any], dict[str, float]]:
    """params -> the evaluation row of metrics.jsonl, over the val.bin of each data set.

    Of a mixture val/loss is the mean by the mixture's weights; val/NAME/loss are its parts.
    """
    rows_per_batch = steps.layout[1]
    rows = sharding.local_rows(steps.mesh, rows_per_batch)
    block = steps.model.config.block_size
    all_batches = [EvalBatches(d.val, block, rows_per_batch, rows, windows) for d in datasets]

    def evaluate(params: Any) -> dict[str, float]:
        results = np.array([mean_loss(steps, params, batches) for batches in all_batches])
        loss = float(np.dot(weights, results[:, 0]))
        row = {
            "val/loss": loss,
            "val/loss_stderr": float(np.linalg.norm(weights * results[:, 1])),
            "val/perplexity": math.exp(min(loss, 700)),
        }
        if all(d.val_bytes_per_token for d in datasets):
            bits = results[:, 0] / math.log(2) / [d.val_bytes_per_token for d in datasets]
            row["val/bits_per_byte"] = float(np.dot(weights, bits))
        if len(datasets) > 1:
            row |= {
                f"val/{d.name}/loss": float(r) for d, r in zip(datasets, results[:, 0], strict=True)
            }
        return row

    return evaluate


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scalegpt.evaluate", description="Loss of a trained model on held-out tokens."
    )
    trained.add_flags(parser)
    parser.add_argument("--data", help="folder with val.bin (default: the run's own)")
    parser.add_argument("--windows", type=int, help="first so many windows (default: all)")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences a device (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(argv)
    for name in ("microbatch", "windows"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1")
    loaded = trained.load(flags, flags.microbatch)
    weights = {flags.data: 1.0} if flags.data else loaded.config.data.weights
    datasets = [open_dataset(path, loaded.config.data.cache_dir) for path in weights]
    for dataset in datasets:
        check_tokens(dataset, loaded.config.model.block_size)
        if dataset.vocab_size > loaded.config.model.vocab_size:
            raise ValueError(
                f"{dataset.name} has {dataset.vocab_size} token ids, the model only "
                f"{loaded.config.model.vocab_size}; prepare the text with the model's tokenizer"
            )
    evaluate = validation(loaded.steps, datasets, list(weights.values()), flags.windows)
    row = {"step": loaded.step, **evaluate(loaded.params)}
    if not math.isfinite(row["val/loss"]):
        raise ValueError(
            f"the loss of {loaded.name}, step {loaded.step}, is not finite: val.bin holds other "
            "tokens than its meta.json says, or the weights are broken"
        )
    if flags.json:
        print(json.dumps(row))
        return 0
    print(f"{loaded.name}, step {loaded.step}, on {', '.join(d.name for d in datasets)}")
    for key, value in list(row.items())[1:]:
        print(f"  {key.removeprefix('val/'):16} {value:.5f}")
    return 0


if __name__ == "__main__":
    command_line.run(main)

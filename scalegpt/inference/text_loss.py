"""Cross-entropy over text: windows of block_size side by side, each without what came before it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.data.batches import EvalBatches
from scalegpt.data.token_files import Split
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.compressed import read_text
from scalegpt.inference.batching import Figures, progress
from scalegpt.inference.likelihood import fetch
from scalegpt.step import sharding
from scalegpt.step.build import Steps


def mean_loss(
    steps: Steps,
    params: Any,
    batches: EvalBatches,
    what: str = "",
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Mean cross-entropy a token in nats, and its standard error with windows as samples.

    Every process gets the same figures; they do not depend on batch size or mesh. what: for the
    progress bar; "" is for none. between: called before each batch.
    """

    def dispatch() -> Iterator[Any]:
        for batch in batches:
            between()
            tokens = sharding.to_global(
                batch, batches.rows, steps.eval_sharding, batches.rows_per_batch
            )
            yield steps.evaluate(params, tokens)

    results = []
    with progress(what, batches.windows, "window") as bar:
        for result in fetch(dispatch()):
            results.append(result)
            bar.update(len(result[0]))
    sums, counts = (np.concatenate([r[i] for r in results]) for i in (0, 1))
    sums, counts = (x[: batches.windows].astype(np.float64) for x in (sums, counts))
    loss = sums.sum() / counts.sum()
    # Standard error of a ratio of sums (Cochran, Sampling Techniques, 1977, eq. 6.9).
    spread = np.square(sums - loss * counts).sum() * len(sums) / max(1, len(sums) - 1)
    return float(loss), math.sqrt(spread) / float(counts.sum())


def losses(
    steps: Steps,
    splits: list[Split],
    weights: list[float],
    windows: int | None,
    shown: bool,
    between: Callable[[], None] = lambda: None,
) -> tuple[Callable[[Any], Figures], int]:
    """params -> loss, perplexity and, where bytes are known, bits_per_byte; how many tokens each is
    the mean of.

    Of a mixture each figure is of the mean by the mixture's weights; NAME/loss are its parts.
    Errors of perplexity are the delta method's.
    """
    rows_per_batch = steps.layout[1]
    rows = sharding.local_rows(steps.mesh, rows_per_batch)
    block = steps.model.config.block_size
    all_batches = [EvalBatches(s.tokens, block, rows_per_batch, rows, windows) for s in splits]
    names = [split.name for split in splits]

    def evaluate(params: Any) -> Figures:
        results = np.array(
            [
                mean_loss(steps, params, batches, name if shown else "", between)
                for name, batches in zip(names, all_batches, strict=True)
            ]
        )

        def mixed(results: np.ndarray) -> tuple[float, float]:
            value = np.dot(weights, results[:, 0])
            return float(value), float(np.linalg.norm(weights * results[:, 1]))

        loss, error = mixed(results)
        perplexity = math.exp(min(loss, 700))
        figures = {"loss": (loss, error), "perplexity": (perplexity, perplexity * error)}
        if all(split.bytes_per_token for split in splits):
            rates = np.array([[split.bytes_per_token] for split in splits])
            figures["bits_per_byte"] = mixed(results / math.log(2) / rates)
        if len(splits) > 1:
            parts = zip(names, results.tolist(), strict=True)
            figures |= {f"{name}/loss": tuple(result) for name, result in parts}
        return figures

    return evaluate, sum(batches.tokens for batches in all_batches)


def text_split(path: str, codec: Tokenizer) -> Split:
    """A text file as tokens, after the end-of-text mark where there is one. Raises ValueError."""
    text = read_text(path)
    ids, size = codec.encode(text), len(text.encode())
    if codec.eot is None:  # then nothing predicts the first token, and its bytes do not count
        size -= len(codec.decode(ids[:1]).encode())
    else:
        ids = np.concatenate([[codec.eot], ids])
    if len(ids) < 2:
        raise Mistake(f"{path} holds no text to predict")
    rate = size / (len(ids) - 1)
    return Split(Path(path).name, codec.spec(), codec.vocab_size, ids.astype(np.int32), rate)

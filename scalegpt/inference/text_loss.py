"""The loss over text is its mean cross-entropy, read in windows of block_size tokens.

The windows lie side by side, and the model sees none of the text before a window.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config.limits import VOID
from scalegpt.data.batches import EvalBatches
from scalegpt.data.datasets import text_of
from scalegpt.data.packing import PackedRows
from scalegpt.data.token_files import Split
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.text_files import read_text
from scalegpt.inference.results import Figures, fetch, progress
from scalegpt.step import sharding
from scalegpt.step.build import Steps


class Unreadable(Mistake):
    """A process could not read its windows. why: None in the others, which learn of it."""

    def __init__(self, why: Exception | None) -> None:
        super().__init__(str(why or "another process could not read its data"))
        self.why = why


def mean_loss(
    steps: Steps,
    params: Any,
    batches: EvalBatches,
    what: str = "",
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return the mean cross-entropy of a token in nats, and its standard error over windows.

    Every process gets the same figures, and they depend neither on batch size nor on mesh. what,
    check_stop: as of `window_sums`.
    """
    sums, counts = window_sums(steps, params, batches, what, check_stop)
    loss = sums.sum() / counts.sum()
    # Standard error of a ratio of sums (Cochran, Sampling Techniques, 1977, eq. 6.9).
    spread = np.square(sums - loss * counts).sum() * len(sums) / max(1, len(sums) - 1)
    return float(loss), math.sqrt(spread) / float(counts.sum())


def window_sums(
    steps: Steps,
    params: Any,
    batches: EvalBatches,
    what: str = "",
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the cross-entropies in each window, and their count, both float64.

    what: the progress bar's label, "" for no bar. check_stop: called before each batch. Raises
    Unreadable, in all processes alike, where one of them could not read its rows.
    """
    why: list[Exception] = []

    def read(i: int) -> np.ndarray:
        try:
            if not why:
                return batches[i]
        except (Mistake, OSError) as error:  # the others wait in this batch for what is computed
            why.append(error)
        return np.full((len(batches.rows), batches.block_size + 1), VOID, np.int32)

    def dispatch() -> Iterator[Any]:
        for batch in map(read, range(len(batches))):
            check_stop()
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
    if (counts < 0).any():
        raise Unreadable(why[0] if why else None)
    sums, counts = (x[: batches.windows].astype(np.float64) for x in (sums, counts))
    return sums, counts


def text_evaluator(
    steps: Steps,
    splits: list[Split],
    weights: list[float],
    windows: int | None,
    shown: bool,
    check_stop: Callable[[], None] = lambda: None,
    spread: bool = False,
) -> tuple[Callable[[Any], Figures], int]:
    """Return a function from parameters to `text_figures`, and the number of tokens it predicts.

    windows: how many of each split, None for all. shown: with a progress bar. check_stop: called
    before each batch. spread: as of EvalBatches.
    """
    rows_per_batch = steps.layout[1]
    rows = sharding.local_rows(steps.mesh, rows_per_batch)
    block = steps.model.config.block_size
    all_tokens = [split.tokens for split in splits]
    if steps.eval_model.config.begins_in_batch:
        all_tokens = [
            s.tokens
            if isinstance(s.tokens, PackedRows)
            else text_of(s.tokens, s.ends, s.tokenizer, marked=True)
            for s in splits
        ]
    all_batches = [
        EvalBatches(tokens, block, rows_per_batch, rows, windows, spread) for tokens in all_tokens
    ]

    def evaluate(params: Any) -> Figures:
        losses = [
            mean_loss(steps, params, batches, split.name if shown else "", check_stop)
            for split, batches in zip(splits, all_batches, strict=True)
        ]
        return text_figures(splits, weights, np.array(losses))

    return evaluate, sum(batches.tokens for batches in all_batches)


def text_figures(splits: list[Split], weights: list[float], losses: np.ndarray) -> Figures:
    """Return loss, perplexity and, where all splits know their bytes, bits_per_byte.

    losses [splits, 2]: mean loss and standard error of each. The figures of several splits are
    means by `weights`; of one there is NAME/loss, and NAME/bits_per_byte where it knows its bytes.
    Perplexity's error is by the delta method.
    """
    loss, error = weighted(weights, losses)
    perplexity = math.exp(min(loss, 700))  # math.exp(710) overflows
    figures = {"loss": (loss, error), "perplexity": (perplexity, perplexity * error)}
    rates = np.array([[split.bytes_per_token or math.nan] for split in splits])
    bits = losses / math.log(2) / rates
    if not np.isnan(rates).any():
        figures["bits_per_byte"] = weighted(weights, bits)
    if len(splits) > 1:
        for split, loss_of, bits_of in zip(splits, losses.tolist(), bits.tolist(), strict=True):
            figures[f"{split.name}/loss"] = tuple(loss_of)
            if split.bytes_per_token:
                figures[f"{split.name}/bits_per_byte"] = tuple(bits_of)
    return figures


def weighted(weights: list[float], values: np.ndarray) -> tuple[float, float]:
    """Return the mean by weights, with its standard error, of values [n, 2] with theirs."""
    value = np.dot(weights, values[:, 0])
    return float(value), float(np.linalg.norm(weights * values[:, 1]))


def text_split(path: str, codec: Tokenizer) -> Split:
    """Encode a text file as `encoded_text`. Raises Mistake."""
    return encoded_text(read_text(path), codec, path)


def encoded_text(text: str, codec: Tokenizer, name: str) -> Split:
    """Encode a text, after the mark that begins one if the tokenizer has it.

    name: of the text, or of its file. Raises Mistake for a text without anything to predict.
    """
    ids, size = codec.encode(text), len(text.encode())
    if codec.begin is None:  # nothing predicts the first token, so its bytes must not count
        size -= len(codec.decode(ids[:1]).encode())
    else:
        ids = np.concatenate([[codec.begin], ids])
    if len(ids) < 2:
        raise Mistake(f"{name} holds no text to predict")
    rate = None if codec.name == "ids" else size / (len(ids) - 1)  # of ids no text is known
    return Split(Path(name).name, codec.spec(), codec.vocab_size, ids.astype(np.int32), rate)

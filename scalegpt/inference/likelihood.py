"""How likely a model finds given continuations, for rows of any length and on any mesh.

Shapes: M rows of a batch, W positions, K scored positions, D embed, V vocab.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from scalegpt.config.recipe import ModelConfig
from scalegpt.inference.batching import fetch, progress
from scalegpt.model.gpt import head_table, logits
from scalegpt.model.layers import constrain
from scalegpt.step import sharding
from scalegpt.step.build import Steps

# (parameters, rows, what the progress bar says, or "" for none) -> [n] sums of log-likelihood in
# nats, float64, and [n] whether greedy decoding gives the continuation, in the order of the rows.
Scorer = Callable[[Any, list["Row"], str], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Row:
    """ids [n + 1], n at most block_size; the last `scored` of them are to be predicted."""

    ids: np.ndarray
    scored: int


def log_likelihood(
    hidden: Array, table: Array, targets: Array, config: ModelConfig
) -> tuple[Array, Array]:
    """Sum of the targets' log-likelihoods [M], and whether each is the likeliest id [M].

    hidden [M, K, D], targets [M, K], -1 where nothing is scored. Logits exist for `loss_chunk`
    positions at a time. Of ids equally likely the first is greedy's, as with torch and NumPy.
    """

    def part(args: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = args
        scores = constrain(logits(hidden, table, config), "batch", "position", "act_vocab")
        ids, scored = jnp.arange(scores.shape[-1]), targets >= 0
        right = jnp.where(ids == targets[..., None], scores, 0).sum(-1, keepdims=True)
        # As argmax(scores) != targets, which takes twice the time on a CPU.
        beaten = (scores > right) | ((scores == right) & (ids < targets[..., None]))
        total = jnp.where(scored, right[..., 0] - jax.nn.logsumexp(scores, -1), 0).sum(-1)
        return total, ~(scored & beaten.any(-1)).any(-1)

    rows, slots, width = hidden.shape
    chunk = min(config.loss_chunk, slots)
    pad = -slots % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, chunk, width)
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1).reshape(rows, -1, chunk)
    totals, greedy = jax.lax.map(part, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return totals.sum(0), greedy.all(0)


def scorer(steps: Steps, between: Callable[[], None] = lambda: None) -> Scorer:
    """Compiled once for each of a few widths. Every process of a run must call it together.
    between: called before each batch.

    A row's width follows from its own length alone, and nothing in a row sees another, so that
    no figure depends on microbatch or mesh.
    """
    config, batch = steps.model.config, steps.layout[1]
    local = sharding.local_rows(steps.mesh, batch)
    everywhere = NamedSharding(steps.mesh, PartitionSpec())
    shortest = 32 if steps.model.attention == "xla" else 128  # the kernels' tiles

    def score(params: Any, inputs: Array, positions: Array, targets: Array) -> Any:
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            hidden = steps.model.apply({"params": params}, inputs)
            # Most of a row is context: its logits would cost more than all the rest.
            hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
            hidden = constrain(hidden, "batch", "position", "act_embed")
            table = head_table(params)
            return log_likelihood(hidden, table, targets, config)

    score = jax.jit(score, out_shardings=everywhere)

    def shape(row: Row) -> tuple[int, int]:
        """(W, K)"""
        length = len(row.ids) - 1
        assert 0 < row.scored <= length <= config.block_size, (row.scored, length)
        width = min(config.block_size, max(shortest, 1 << (length - 1).bit_length()))
        return width, min(width, shortest if row.scored <= shortest else width)

    def dispatch(params: Any, rows: list[Row], groups: list[np.ndarray]) -> Iterator[Any]:
        for group in groups:
            between()
            arrays = _padded([rows[i] for i in group], batch, *shape(rows[group[0]]))
            arrays = [
                sharding.to_global(a[local], local, steps.eval_sharding, batch) for a in arrays
            ]
            with jax.set_mesh(steps.mesh):
                yield score(params, *arrays)

    def run(params: Any, rows: list[Row], what: str) -> tuple[np.ndarray, np.ndarray]:
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows):
            by_shape.setdefault(shape(row), []).append(i)
        groups = [
            np.array(indices[i : i + batch])
            for _, indices in sorted(by_shape.items())
            for i in range(0, len(indices), batch)
        ]
        sums, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
        with progress(what, len(rows), "row") as bar:
            for group, result in zip(groups, fetch(dispatch(params, rows, groups)), strict=True):
                sums[group], greedy[group] = (x[: len(group)] for x in result)
                bar.update(len(group))
        return sums, greedy

    return run


def _padded(rows: list[Row], batch: int, width: int, slots: int) -> tuple[np.ndarray, ...]:
    """Inputs [M, W], and positions and targets [M, K] of what is scored, padded on the right."""
    inputs = np.zeros((batch, width), np.int32)
    positions, targets = np.zeros((batch, slots), np.int32), np.full((batch, slots), -1, np.int32)
    for i, row in enumerate(rows):
        length = len(row.ids) - 1
        inputs[i, :length] = row.ids[:-1]
        positions[i, : row.scored] = np.arange(length - row.scored, length)
        targets[i, : row.scored] = row.ids[-row.scored :]
    return inputs, positions, targets

"""A model's log-likelihood of given continuations, for rows of any length and on any mesh.

Shapes: M rows of a batch, W positions, K scored positions, D embed, V vocab.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from scalegpt.config.recipe import ModelConfig
from scalegpt.errors import Mistake
from scalegpt.inference.results import fetch, progress
from scalegpt.model.gpt import GPT, head_table, logits
from scalegpt.model.layers import constrain
from scalegpt.step import sharding
from scalegpt.step.build import Steps

# (parameters, n rows, the progress bar's label or "") -> for each row in order, the sum of its
# log-likelihoods in nats, float64 [n], and whether greedy decoding gives the continuation [n].
Scorer = Callable[[Any, list["Row"], str], tuple[np.ndarray, np.ndarray]]
FEWEST_SLOTS = 32  # of a row, for ids to score


@dataclass(frozen=True)
class Row:
    """A row is a context and its continuation, as ids [n + 1], n at most block_size.

    scored: how many ids at the end are the continuation.
    """

    ids: np.ndarray
    scored: int


def row_of(context: Sequence[int], scored: Sequence[int], block_size: int, what: str) -> Row:
    """Return the row of a context and its continuation; one that is too long loses its beginning.

    Raises Mistake, naming `what` is scored, where nothing of the context would be left.
    """
    if not 0 < len(scored) <= block_size:
        raise Mistake(f"{what[:40]!r} has {len(scored)} tokens, the model room for {block_size}")
    ids = np.concatenate([context, scored]).astype(np.int32)
    return Row(ids[-(block_size + 1) :], len(scored))


def log_likelihood(
    hidden: Array, table: Array, targets: Array, config: ModelConfig
) -> tuple[Array, Array]:
    """Return each target's log-likelihood [M, K], and whether greedy decoding gives it [M, K].

    hidden [M, K, D], table [V, D], targets [M, K]; below 0, where nothing is scored, they give any
    value. Logits exist for `loss_chunk` positions at a time. Greedy takes the first of equals, as
    torch and NumPy do.
    """

    def part(args: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = args
        scores = constrain(logits(hidden, table, config), "batch", "act_position", "act_vocab")
        ids = jnp.arange(scores.shape[-1])
        target = jnp.where(ids == targets[..., None], scores, 0).sum(-1, keepdims=True)
        # The same as argmax(scores) != targets, which takes twice the time on a CPU.
        beaten = (scores > target) | ((scores == target) & (ids < targets[..., None]))
        return target[..., 0] - jax.nn.logsumexp(scores, -1), ~beaten.any(-1)

    rows, slots, width = hidden.shape
    chunk = min(config.loss_chunk, slots)
    pad = -slots % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, chunk, width)
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1).reshape(rows, -1, chunk)
    parts = jax.lax.map(part, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :slots] for x in parts)


def scorer(steps: Steps, check_stop: Callable[[], None] = lambda: None) -> Scorer:
    """Return a function that scores rows; every process of a run must call it together.

    A row's width follows from its own length alone, and no row sees another, so that no figure
    depends on microbatch or mesh. One program is compiled for each of a few widths. Rows that
    differ in their last id alone, as the letters of a question do, are computed as one. check_stop:
    called before each batch.
    """
    everywhere = NamedSharding(steps.mesh, PartitionSpec())
    score = jax.jit(partial(_score_batch, steps.model), out_shardings=everywhere)
    batch = steps.layout[1]
    local = sharding.local_rows(steps.mesh, batch)

    def dispatch(params: Any, rows: list[list[Row]], shape: tuple[int, int]) -> Any:
        check_stop()
        arrays = [
            sharding.to_global(a[local], local, steps.eval_sharding, batch)
            for a in _padded(rows, batch, *shape)
        ]
        with jax.set_mesh(steps.mesh):
            return score(params, *arrays)

    def run(params: Any, rows: list[Row], what: str) -> tuple[np.ndarray, np.ndarray]:
        sums, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
        groups = _groups(rows, batch, steps.model)
        dispatched = (
            dispatch(params, [[rows[i] for i in same] for same in group], shape)
            for shape, group in groups
        )
        with progress(what, len(rows), "row") as bar:
            for (_, group), (values, agreed) in zip(groups, fetch(dispatched), strict=True):
                for line, same in enumerate(group):
                    end = 0
                    for i in same:
                        part = slice(end, end := end + rows[i].scored)
                        sums[i] = values[line, part].sum(dtype=np.float64)
                        greedy[i] = agreed[line, part].all()
                bar.update(sum(map(len, group)))
        return sums, greedy

    return run


def _score_batch(
    model: GPT, params: Any, inputs: Array, positions: Array, targets: Array
) -> tuple[Array, Array]:
    """Score inputs [M, W] at positions [M, K] for targets [M, K]; see `log_likelihood`."""
    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        hidden = model.apply({"params": params}, inputs)
        # Most of a row is context: its logits would cost more than all the rest.
        hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        hidden = constrain(hidden, "batch", "act_position", "act_embed")
        return log_likelihood(hidden, head_table(params), targets, model.config)


def token_logits(steps: Steps, params: Any, ids: np.ndarray) -> np.ndarray:
    """Return the logits [T, V] float32 after each of `ids` [T], on every process of a run."""
    model, batch = steps.model, steps.layout[1]
    width, _ = _padded_shape(Row(np.append(ids, 0), 1), 1, model)
    tokens = np.zeros((batch, width), np.int32)
    tokens[:, : len(ids)] = ids
    local = sharding.local_rows(steps.mesh, batch)
    whole = NamedSharding(steps.mesh, PartitionSpec())
    with jax.set_mesh(steps.mesh):
        scores = jax.jit(partial(_first_row, model), out_shardings=whole)
        inputs = sharding.to_global(tokens[local], local, steps.eval_sharding, batch)
        return np.asarray(scores(params, inputs))[: len(ids), : model.config.vocab_size]


def _first_row(model: GPT, params: Any, tokens: Array) -> Array:
    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        hidden = model.apply({"params": params}, tokens)
        return logits(hidden[0], head_table(params), model.config)


def _groups(
    rows: list[Row], batch: int, model: GPT
) -> list[tuple[tuple[int, int], list[list[int]]]]:
    """Sort rows into batches of one padded shape: ((W, K), at most `batch` lists of indices).

    The rows of a list have the same inputs, which are all ids but the last.
    """
    lists, by_inputs = list[list[int]](), dict[bytes, list[int]]()
    most = min(FEWEST_SLOTS, model.config.block_size)  # so that none needs more for another
    for i, row in enumerate(rows):
        inputs = sha256(row.ids[:-1].tobytes()).digest()
        same = by_inputs.get(inputs, [])
        if not same or sum(rows[j].scored for j in same) + row.scored > most:
            by_inputs[inputs] = same = []
            lists.append(same)
        same.append(i)
    by_shape: dict[tuple[int, int], list[list[int]]] = {}
    for same in lists:
        scored = sum(rows[i].scored for i in same)
        by_shape.setdefault(_padded_shape(rows[same[0]], scored, model), []).append(same)
    return [
        (shape, lists[i : i + batch])
        for shape, lists in sorted(by_shape.items())
        for i in range(0, len(lists), batch)
    ]


def _padded_shape(row: Row, scored: int, model: GPT) -> tuple[int, int]:
    """Return (W, K) for a row and what is scored there: powers of two, so that few programs are
    compiled."""
    length, block_size = len(row.ids) - 1, model.config.block_size
    assert 0 < row.scored <= length <= block_size, (row.scored, length)
    shortest = FEWEST_SLOTS if model.attention == "xla" else 128  # the attention kernels' tiles
    width = min(block_size, max(shortest, 1 << (length - 1).bit_length()))
    return width, min(width, shortest if scored <= shortest else width)


def _padded(rows: list[list[Row]], batch: int, width: int, slots: int) -> tuple[np.ndarray, ...]:
    """Return inputs [M, W], and positions and targets [M, K] to score, padded on the right.

    rows: those of each line, which have the same inputs; they are scored one after the other.
    """
    inputs = np.zeros((batch, width), np.int32)
    positions, targets = np.zeros((batch, slots), np.int32), np.full((batch, slots), -1, np.int32)
    for i, same in enumerate(rows):
        length, end = len(same[0].ids) - 1, 0
        inputs[i, :length] = same[0].ids[:-1]
        for row in same:
            part = slice(end, end := end + row.scored)
            positions[i, part] = np.arange(length - row.scored, length)
            targets[i, part] = row.ids[-row.scored :]
    return inputs, positions, targets

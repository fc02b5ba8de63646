"""An objective says what an update minimises: a loss summed over a batch, and what divides it.

Letters: A microbatches of M sequences, T positions. A batch is tokens [A, M, T+1], or a dict with
these under "tokens" and more about each sequence, [A, M, ...]. Its leaves are split by rows alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from scalegpt.config import Config
from scalegpt.model.gpt import GPT
from scalegpt.step.loss import row_losses

Batch = Array | dict[str, Array]
# Name of a metric -> a sum over rows or tokens, and how many these are.
Sums = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Objective:
    """An objective is the functions that an update needs of it; `objective_of` makes one.

    loss(model, params, microbatch, dropout keys) -> its sum, and sums for metrics. Nothing is
    divided, so that an update does not depend on how its batch is cut into microbatches and parts.
    count(batch) -> float32 scalar: what the sums over the batch are divided by. row: the shape and
    dtype of one sequence of a batch.
    """

    loss: Callable[[GPT, Any, Any, Array | None], tuple[Array, Sums]]
    count: Callable[[Any], Array]
    row: Any


def objective_of(config: Config) -> Objective:
    """Return the objective that objective.name names."""
    tokens = jax.ShapeDtypeStruct((config.row_width + 1,), jnp.int32)
    return Objective(cross_entropy, target_count, tokens)


def cross_entropy(
    model: GPT, params: Any, tokens: Array, dropout_keys: Array | None
) -> tuple[Array, Sums]:
    """Sum the cross-entropies of the targets of tokens [M, T+1]."""
    return row_losses(model, params, tokens, dropout_keys).sum(), {}


def target_count(tokens: Array) -> Array:
    """Count the targets of tokens [..., T+1] that are not masked, as float32 like the gradients.

    One dtype lets XLA reduce the count together with them.
    """
    return (tokens[..., 1:] >= 0).sum(dtype=jnp.float32)


def tokens_of(batch: Any) -> Any:
    """Return the tokens of a batch."""
    return batch["tokens"] if isinstance(batch, dict) else batch

"""One optimizer update as functions of arrays: accumulation, gradients, what the optimizer does."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from scalegpt.config import Config
from scalegpt.model.gpt import GPT
from scalegpt.step import health
from scalegpt.step.loss import row_losses
from scalegpt.step.optimizer import optimizer, schedule, swap_average


@struct.dataclass
class State:
    """What an update changes. `step`: updates made so far."""

    step: Array
    params: Any
    opt_state: Any
    health: health.Health

    def swapped(self) -> "State":
        """As checkpoints hold it: with the weights to evaluate and to use, which optim.average may
        have averaged, in `params`. Twice is as before."""
        params, opt_state = swap_average(self.params, self.opt_state)
        return self.replace(params=params, opt_state=opt_state)


def accumulate(loss: Callable, params: Any, tokens: Array, rows: Array) -> tuple[Array, Any]:
    """Sums of loss and gradient over the microbatches of tokens [A, M, T+1]; nothing is divided.

    loss: (params, tokens [M, T+1], rows [M]) -> scalar. rows: [A, M] global row numbers.
    """
    gradient = jax.value_and_grad(loss)
    if tokens.shape[0] == 1:
        return gradient(params, tokens[0], rows[0])

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    # From the rows, so that the zero varies over the same manual mesh axes as the gradients; from
    # a parameter, it would gather that parameter.
    zero = jnp.float32(0) * rows[0, 0]
    return jax.lax.scan(add, (zero, jax.tree.map(jnp.zeros_like, params)), (tokens, rows))[0]


def gradient_sums(
    config: Config, model: GPT, params: Any, tokens: Array, rows: Array, key: Array
) -> tuple[Array, Any]:
    """`accumulate` for a run: key is the update's, from which each row's dropout key follows."""

    def loss(params: Any, tokens: Array, rows: Array) -> Array:
        keys = None
        if config.model.dropout > 0:
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return row_losses(model, params, tokens, keys).sum()

    return accumulate(loss, params, tokens, rows)


def target_count(tokens: Array) -> Array:
    """Targets of tokens [..., T+1] that count; float32, to be reduced together with gradients."""
    return (tokens[..., 1:] >= 0).sum(dtype=jnp.float32)


def dropout_key(config: Config, step: Array) -> Array:
    """Of all rows of update `step`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.run.seed), 1), step)


def apply_gradients(
    config: Config, dtype: Any, state: State, total: Array, grads: Any, count: Array
) -> tuple[State, dict[str, Array]]:
    """The optimizer's part, from the sums of loss and gradient over `count` tokens. dtype: of
    matrix products.

    The update is not applied where `health.judge` says so; the step counts all the same.
    """
    share = 1 / jnp.maximum(count, 1)  # divisions would not be fused into their uses
    grads = jax.tree.map(lambda g: g * share, grads)
    tx = optimizer(config.optim, dtype)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    loss, norm = total * share, optax.tree.norm(grads)
    apply, deviation, after = health.judge(config.run, state.health, loss, norm)
    metrics = {
        "train/loss": loss,
        "train/lr": schedule(config.optim)(state.step),
        "train/grad_norm": norm,
        "train/spike": deviation,
        "train/skipped": after.nonfinite + after.spikes,
        "nonfinite": after.nonfinite,
        "norms": health.layer_norms(grads),
    }
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = health.choose(apply, new, (state.params, state.opt_state))
    return State(state.step + 1, params, opt_state, after), metrics

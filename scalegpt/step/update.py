"""Do one optimizer update: accumulate gradients, reduce them, let the optimizer act."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from scalegpt.config import Config
from scalegpt.model.gpt import GPT
from scalegpt.model.lora import is_trained, joined, of_marks, parted
from scalegpt.model.parameters import parameters
from scalegpt.step import health
from scalegpt.step.objective import Batch, Objective, Sums
from scalegpt.step.optimizer import optimizer, schedule, swap_average


@struct.dataclass
class State:
    """The state is all that an update changes; `step` counts the updates so far."""

    step: Array
    params: Any
    opt_state: Any
    health: health.Health

    def swapped(self) -> "State":
        """Swap `params` with the averaged weights that `opt_state` carries under optim.average.

        Without averaging nothing changes. Checkpoints hold the swapped state, so that `params` on
        disk are the weights to evaluate and to use; a second call undoes the first.
        """
        params, opt_state = swap_average(self.params, self.opt_state)
        return self.replace(params=params, opt_state=opt_state)


def accumulate(
    loss: Callable, params: Any, batch: Batch, rows: Array
) -> tuple[tuple[Array, Sums], Any]:
    """Sum loss and gradient over the microbatches of a batch; nothing is divided.

    loss: (params, microbatch, rows [M]) -> scalar and sums. rows: [A, M] global row numbers.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[0], (batch, rows))
    if len(rows) == 1:
        return gradient(params, *first)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    # scan wants its carry typed as varying over the manual mesh axes, as the gradients that it sums
    # are. A plain 0.0 is not; `rows` are. A zero made from a parameter would all-gather it.
    zero = jnp.float32(0) * rows[0, 0]
    figures = jax.eval_shape(loss, params, *first)[1]
    zeros = (zero, jax.tree.map(lambda x: zero, figures)), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zeros, (batch, rows))[0]


def reduced_sums(
    objective: Objective,
    model: GPT,
    axes: Any,
    params: Any,
    batch: Batch,
    rows: Array,
    key: Array,
) -> tuple[tuple[Array, Sums], Any, Array]:
    """Sum loss, gradient and count over a batch [A, m, ...] here, then over all parts of a batch.

    axes: the manual mesh axes, or pmap's, which split the batch into parts. The sums over them are
    the one reduction of an update. Sums, not means: masked tokens may make their counts differ.
    rows: [A, m], the numbers of the rows in the global batch. key: the update's `dropout_key`.
    """

    trained, frozen = parted(params, partial(is_trained, model.lora))

    def loss(trained: Any, microbatch: Batch, rows: Array) -> tuple[Array, Sums]:
        params = joined(trained, frozen)
        return objective.loss(model, params, microbatch, row_keys(model, key, rows))

    total, grads = accumulate(loss, trained, batch, rows)
    return jax.lax.psum((total, grads, objective.count(batch)), axes)


def train_step(
    config: Config, model: GPT, sums: Callable, rows: Array, state: State, batch: Batch
) -> tuple[State, dict[str, Array]]:
    """Do one update, under jit or pmap: sum the gradients, then let the optimizer act.

    sums: (params, batch, rows, key) -> what `reduced_sums` returns. rows: [A, M], the numbers of
    the rows of `batch` in the global batch.
    """
    key = dropout_key(config.run.seed, state.step)
    return apply_gradients(config, model.dtype, state, *sums(state.params, batch, rows, key))


def dropout_key(seed: int, step: Array) -> Array:
    """Derive the dropout key of update `step` from the run's seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def row_keys(model: GPT, key: Array, rows: Array) -> Array | None:
    """Derive a dropout key for each row from an update's key; None for a model without dropout.

    rows: their numbers in the global batch, so that what a row drops does not depend on the mesh.
    """
    if model.config.dropout == 0:
        return None
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@jax.named_scope("optimizer")
def apply_gradients(
    config: Config, dtype: Any, state: State, total: tuple[Array, Sums], grads: Any, count: Array
) -> tuple[State, dict[str, Array]]:
    """Let the optimizer act on the sums of loss and gradient, divided by the objective's count.

    dtype: of the matrix products within the optimizer (Muon's). An update that `health.judge` finds
    bad is not applied, but its step counts. One with a count below 0 is void, as a process could
    not read its rows: it changes nothing, so that the state can be saved as before it.
    """
    total, sums = total
    scale = 1 / jnp.maximum(count, 1)  # XLA fuses a product into its uses, but not a division
    grads = of_marks(config.lora, jax.tree.map(lambda g: g * scale, grads))
    tx = optimizer(config.optim, parameters(config.model, config.lora), dtype)
    trained, frozen = parted(state.params, partial(is_trained, config.lora))
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    loss, norm = total * scale, optax.tree.norm(grads)
    apply, deviation, after = health.judge(config.run, state.health, loss, norm)
    metrics = {
        "train/loss": loss,
        "train/lr": schedule(config.optim)(state.step),
        "train/grad_norm": norm,
        "train/spike": deviation,
        "train/skipped": after.nonfinite + after.spikes,
        "nonfinite": after.nonfinite,
        "void": count < 0,
        "norms": health.layer_norms(grads),
        **{name: x / jnp.maximum(n, 1) for name, (x, n) in sums.items()},
    }
    new = optax.apply_updates(trained, updates), opt_state
    trained, opt_state = health.choose(apply, new, (trained, state.opt_state))
    done = State(state.step + 1, joined(trained, frozen), opt_state, after)
    return jax.tree.map(partial(jnp.where, count < 0), state, done), metrics

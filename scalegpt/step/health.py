"""Healthy numbers: whether an update is applied, decided on the device, from its loss and gradient.

An update that is not finite never reaches the weights. A spike is a loss far above the median of
the last ones, in units of their spread: the median of absolute deviations, which neither a spike
nor the fall of the loss moves much.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from scalegpt.config import RunConfig

WINDOW = 128  # losses that a spike is measured against
ENOUGH = 32  # so many there must be before any loss is called a spike


@struct.dataclass
class Health:
    """Part of the state, so that a run that continues judges as the unbroken one.

    recent: the last finite losses, [WINDOW] float32, NaN where there is none; those of updates that
    were left out, too, or after a lasting rise all would be.
    nonfinite, spikes: updates left out so far.
    """

    recent: Array
    nonfinite: Array
    spikes: Array


def initial() -> Health:
    zero = jnp.zeros((), jnp.int32)
    return Health(jnp.full(WINDOW, jnp.nan, jnp.float32), zero, zero)


def deviation(recent: Array, loss: Array) -> Array:
    """How far `loss` lies above the median of `recent`, in standard deviations as the median of
    absolute deviations estimates them; 0 while there are not ENOUGH."""
    median = jnp.nanmedian(recent)
    spread = 1.4826 * jnp.nanmedian(jnp.abs(recent - median))
    # Of losses that hardly differ, the smallest step would be a spike.
    spread = jnp.maximum(spread, 1e-3 * jnp.abs(median))
    return jnp.where(jnp.isfinite(recent).sum() >= ENOUGH, (loss - median) / spread, 0)


def judge(run: RunConfig, health: Health, loss: Array, norm: Array) -> tuple[Array, Array, Health]:
    """Whether to apply an update of this loss and gradient norm; its deviation; health after it."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    far = deviation(health.recent, loss)
    left_out = finite & (far > run.spike) if run.skip_spikes else jnp.zeros((), bool)
    apply = finite & ~left_out
    recent = jnp.where(finite, jnp.append(health.recent[1:], loss), health.recent)
    after = Health(recent, health.nonfinite + ~finite, health.spikes + left_out)
    return apply, far, after


def choose(apply: Array, new: Any, old: Any) -> Any:
    """`new` where the update is applied. The schedule goes on in any case: it counts updates."""

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda n, o: n if is_schedule(n) else jnp.where(apply, n, o), new, old, is_leaf=is_schedule
    )


def layer_norms(tree: Any) -> dict[str, Array]:
    """Name of a parameter -> its norm; of those of the layers, which are stacked, [L] of them."""

    def norm(path: tuple, x: Array) -> Array:
        axes = tuple(range(1, x.ndim)) if path[0].key == "h" else None
        return jnp.sqrt(jnp.square(x).sum(axes))

    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): norm(p, x) for p, x in flat}

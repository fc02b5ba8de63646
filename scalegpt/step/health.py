"""Decide on the device, from an update's loss and gradient norm, whether the update is applied.

An update that is not finite never reaches the weights. A spike is a loss far above the median of
the last losses, in units of their spread: the median of absolute deviations, which neither a spike
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
ENOUGH = 32  # losses that there must be before one is called a spike


@struct.dataclass
class Health:
    """Health is part of the state, so that a continued run judges updates as an unbroken one does.

    recent: the last finite losses, [WINDOW] float32, NaN where there is none. Losses of skipped
    updates are recorded too: otherwise, after a lasting rise, the median would never move and every
    later update would be skipped. nonfinite, spikes: how many updates were skipped for each.
    """

    recent: Array
    nonfinite: Array
    spikes: Array

    def without_losses(self) -> "Health":
        """Forget the losses: those of other data or another model are no measure of a spike."""
        return self.replace(recent=self.recent * jnp.nan)


def initial() -> Health:
    """Make the health of a run before its first update."""
    zero = jnp.zeros((), jnp.int32)
    return Health(jnp.full(WINDOW, jnp.nan, jnp.float32), zero, zero)


def deviation(recent: Array, loss: Array) -> Array:
    """Measure how many standard deviations, estimated by the median of absolute deviations, `loss`
    lies above the median of `recent`; 0 while there are fewer than ENOUGH losses."""
    median = jnp.nanmedian(recent)
    spread = 1.4826 * jnp.nanmedian(jnp.abs(recent - median))
    # Without this floor the smallest rise would be a spike where losses hardly differ.
    spread = jnp.maximum(spread, 1e-3 * jnp.abs(median))
    return jnp.where(jnp.isfinite(recent).sum() >= ENOUGH, (loss - median) / spread, 0)


def judge(run: RunConfig, health: Health, loss: Array, norm: Array) -> tuple[Array, Array, Health]:
    """Decide whether to apply an update of this loss and gradient norm; return that decision, the
    deviation of the loss, and the health after the update."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    deviations = deviation(health.recent, loss)
    skipped = finite & (deviations > run.spike) if run.skip_spikes else jnp.zeros((), bool)
    recent = jnp.where(finite, jnp.append(health.recent[1:], loss), health.recent)
    after = Health(recent, health.nonfinite + ~finite, health.spikes + skipped)
    return finite & ~skipped, deviations, after


def choose(apply: Array, new: Any, old: Any) -> Any:
    """Take `new` where the update is applied, else `old`; the schedule counts it in any case."""

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda n, o: n if is_schedule(n) else jnp.where(apply, n, o), new, old, is_leaf=is_schedule
    )


def layer_norms(tree: Any) -> dict[str, Array]:
    """Compute the norm of each parameter, by name; parameters stacked over layers get [L] norms."""

    def norm(path: tuple, x: Array) -> Array:
        axes = tuple(range(1, x.ndim)) if path[0].key == "h" else None
        return jnp.sqrt(jnp.square(x).sum(axes))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): norm(p, x) for p, x in leaves}

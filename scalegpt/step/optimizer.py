"""Learning-rate schedules, what decays, AdamW, and Muon with AdamW for the rest.

A step is an optimizer update throughout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from scalegpt.config.recipe import OptimConfig
from scalegpt.step.muon import LAYOUTS, scale_by_muon

Schedule = Callable[[Any], Any]


def schedule(config: OptimConfig) -> Schedule:
    """Update index (from 0) -> learning rate, float32.

    Warm-up is nanoGPT's: lr (i + 1) / (warmup + 1), so that update 0 already moves. The decay
    reaches min_lr at update `decay_steps` and stays there.
    """
    end, warmup = config.decay_steps or config.steps, config.warmup_steps
    span, drop = max(1, end - warmup), config.lr - config.min_lr
    cooldown = max(1, round(config.cooldown * end))

    def learning_rate(i: Any) -> Any:
        i = jnp.asarray(i, jnp.float32)
        done = jnp.clip((i - warmup) / span, 0, 1)
        after = {
            "constant": lambda: jnp.float32(config.lr),
            "cosine": lambda: config.min_lr + drop * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": lambda: config.lr - drop * done,
            "wsd": lambda: config.lr - drop * jnp.clip((i - end + cooldown) / cooldown, 0, 1),
        }[config.schedule]()
        return jnp.where(i < warmup, config.lr * (i + 1) / (warmup + 1), after)

    return learning_rate


def decay_mask(config: OptimConfig) -> Callable[[Any], Any]:
    """Parameters -> which of them weight decay shrinks.

    By name, not by number of axes: stacked layers give LayerNorm scales two axes.
    """

    def decays(path: tuple) -> bool:
        name = next(k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey))
        if config.decay == "all":
            return True
        embedding = group(name) == "embeddings"
        return name.endswith("kernel") or (config.decay == "matrices" and embedding)

    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def optimizer(config: OptimConfig, dtype: Any = jnp.float32) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) on globally clipped gradients; with Muon, only for what is no matrix
    of the layers. State is in the parameters' dtype, Muon's products are in `dtype`."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    average = [tail_average(config)] if config.average else []
    if config.name == "adamw":
        return optax.chain(clip, *_steps(config, _adam(config), config.lr), *average)
    muon = scale_by_muon(_momentum(config), config.ns_steps, dtype)
    directions = {
        "matrices": (muon, config.lr),
        "embeddings": (_adam(config), config.embedding_lr),
        "head": (_adam(config), config.head_lr),
        "scalars": (_adam(config), config.scalar_lr),
    }
    groups = {name: optax.chain(*_steps(config, *pair)) for name, pair in directions.items()}
    return optax.chain(clip, by_group(groups, group), *average)


def group(path: str) -> str:
    """Which of Muon's groups a parameter belongs to, by its path "h/mlp/up_kernel"."""
    if path in LAYOUTS:
        return "matrices"
    name = path.rpartition("/")[2]
    return {
        "wte": "embeddings",
        "wpe": "embeddings",
        "value_table": "embeddings",
        "head_kernel": "head",
    }.get(name, "scalars")


def by_group(
    transforms: dict[str, optax.GradientTransformation], group: Callable[[str], str]
) -> optax.GradientTransformation:
    """Each transform for the parameters of its group, as a flat {path: parameter}.

    Not optax.partition, whose masked leaves cannot carry the names of axes.
    """

    def split(tree: Any) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {name: {} for name in transforms}
        for path, leaf in flatten_dict(tree, sep="/").items():
            parts[group(path)][path] = leaf
        return parts

    def init(params: Any) -> dict[str, Any]:
        return {name: transforms[name].init(part) for name, part in split(params).items()}

    def update(grads: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        merged, after, parts = {}, {}, split(params)
        for name, part in split(grads).items():
            updates, after[name] = transforms[name].update(part, state[name], parts[name])
            merged |= updates
        return unflatten_dict(merged, sep="/"), after

    return optax.GradientTransformation(init, update)


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _steps(
    config: OptimConfig, direction: optax.GradientTransformation, lr: float
) -> list[optax.GradientTransformation]:
    """In a direction by a peak learning rate, with weight decay (decoupled, times the rate)."""
    decay = cautious_decay if config.cautious_decay else optax.add_decayed_weights
    rate, share = schedule(config), lr / config.lr
    return [
        direction,
        decay(config.weight_decay, decay_mask(config)),
        optax.scale_by_learning_rate(rate if share == 1 else lambda i: share * rate(i)),
    ]


def cautious_decay(weight_decay: float, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    """optax.add_decayed_weights, but only for entries that the update moves towards zero, too
    (arXiv:2510.12402)."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def add(decays: bool, u: Array, p: Array) -> Array:
            return u + weight_decay * p * (u * p > 0) if decays else u

        return jax.tree.map(add, mask(updates), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class AverageState(NamedTuple):
    """count: updates so far. average: of the weights after each update of the tail; before it, the
    last weights."""

    count: Array
    average: Any


def tail_average(config: OptimConfig) -> optax.GradientTransformation:
    """Keeps the mean of the weights over the last share of the run; changes no update."""
    start = round((1 - config.average) * config.steps)

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params))

    def update(updates: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        count = state.count + 1
        tail = jnp.maximum(1, count - start)  # updates in it, this one included

        def mean(a: Array, p: Array, u: Array) -> Array:
            return jnp.where(tail == 1, p + u, a + (p + u - a) / tail)

        return updates, AverageState(count, jax.tree.map(mean, state.average, params, updates))

    return optax.GradientTransformation(init, update)


def swap_average(params: Any, opt_state: Any) -> tuple[Any, Any]:
    """The averaged weights in place of the last ones, and those in the optimizer's state; twice is
    as before. The same of a run that averages nothing."""
    if not isinstance(opt_state[-1], AverageState):
        return params, opt_state
    last = opt_state[-1]
    return last.average, (*opt_state[:-1], last._replace(average=params))


def _momentum(config: OptimConfig) -> Callable[[Array], Any]:
    """Updates so far -> momentum: it rises from 0.85 over momentum_warmup updates."""
    if not config.momentum_warmup:
        return lambda i: config.momentum
    return optax.linear_schedule(0.85, config.momentum, config.momentum_warmup)

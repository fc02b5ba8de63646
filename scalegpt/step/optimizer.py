"""Make the optimizer and its learning-rate schedule: AdamW, or Muon with AdamW for the rest.

A step is an optimizer update throughout.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from scalegpt.config.recipe import OptimConfig
from scalegpt.model.parameters import Parameter
from scalegpt.step.muon import even_rows, scale_by_muon

Schedule = Callable[[Any], Any]
# The share of a run after which Muon has two momenta (KellerJordan/modded-nanogpt#340).
SLOW_START = 0.3


def schedule(config: OptimConfig) -> Schedule:
    """Return a function from the index of an update, from 0, to its float32 learning rate.

    Warm-up is nanoGPT's: lr (i + 1) / (warmup + 1), so that update 0 already moves. The decay
    reaches min_lr at update `decay_steps` and stays there.
    """
    end, warmup = config.decay_steps or config.steps, config.warmup_steps
    span, drop = max(1, end - warmup), config.lr - config.min_lr
    cooldown, power = max(1, round(config.cooldown * end)), config.cooldown_power

    def learning_rate(i: Any) -> Any:
        i = jnp.asarray(i, jnp.float32)
        done = jnp.clip((i - warmup) / span, 0, 1)
        cooled = jnp.clip((i - end + cooldown) / cooldown, 0, 1)
        cooled = cooled if power == 1 else 1 - (1 - cooled) ** power
        after = {
            "constant": lambda: jnp.float32(config.lr),
            "cosine": lambda: config.min_lr + drop * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": lambda: config.lr - drop * done,
            "wsd": lambda: config.lr - drop * cooled,
        }[config.schedule]()
        return jnp.where(i < warmup, config.lr * (i + 1) / (warmup + 1), after)

    return learning_rate


def decay_mask(config: OptimConfig, parameters: Mapping[str, Parameter]) -> Callable[[Any], Any]:
    """Return a function that marks which parameters weight decay shrinks.

    It goes by what a parameter is, not by its number of axes: stacked layers give LayerNorm scales
    two axes.
    """
    kinds = {"matrices", "head"} | ({"embeddings"} if config.decay == "matrices" else set())
    adapters = {path for path, x in parameters.items() if x.kind == "adapters"}

    def decays(path: tuple) -> bool:
        # The tree may be flat, and its leaves boxed, which adds to the path what is no name.
        name = "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        if adapters:  # the rows of a table that are trained beside them do not decay
            return name in adapters
        return config.decay == "all" or parameters[name].kind in kinds

    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def optimizer(
    config: OptimConfig, parameters: Mapping[str, Parameter], dtype: Any = jnp.float32
) -> optax.GradientTransformation:
    """Make AdamW (arXiv:1711.05101) on globally clipped gradients, or Muon for the layers' matrices
    and AdamW for the rest.

    parameters: those of the model, by path. State has their dtype, Muon's products are in `dtype`.
    """
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    last = [lookahead(config)] if config.lookahead else []
    last += [tail_average(config)] if config.average else []
    rule = partial(_update_rule, config, decay_mask(config, parameters))
    if config.name == "adamw":
        return optax.chain(clip, *rule(_adam(config), config.lr), *last)
    muon = scale_by_muon(
        *(_momentum(config), config.ns_steps, dtype, parameters),
        *(config.momentum_slow, round(SLOW_START * config.steps)),
    )
    if config.row_beta2:
        muon = optax.chain(muon, even_rows(config.row_beta2, parameters))
    directions = {
        "matrices": (muon, config.lr),
        "embeddings": (_adam(config), config.embedding_lr),
        "head": (_adam(config), config.head_lr),
        "scalars": (_adam(config), config.scalar_lr),
    }
    groups = {kind: optax.chain(*rule(*pair)) for kind, pair in directions.items()}
    return optax.chain(clip, by_group(groups, lambda path: parameters[path].kind), *last)


def by_group(
    transforms: dict[str, optax.GradientTransformation], group: Callable[[str], str]
) -> optax.GradientTransformation:
    """Apply each transform to the parameters of its group, given as a flat {path: parameter}.

    This is not optax.partition, as its masked leaves cannot carry the names of axes.
    """

    def split(tree: Any) -> dict[str, dict[str, Any]]:
        groups: dict[str, dict[str, Any]] = {name: {} for name in transforms}
        for path, leaf in flatten_dict(tree, sep="/").items():
            groups[group(path)][path] = leaf
        return groups

    def init(params: Any) -> dict[str, Any]:
        return {name: transforms[name].init(own) for name, own in split(params).items()}

    def update(grads: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        updates, new_state, params = {}, {}, split(params)
        for name, own in split(grads).items():
            own_updates, new_state[name] = transforms[name].update(own, state[name], params[name])
            updates |= own_updates
        return unflatten_dict(updates, sep="/"), new_state

    return optax.GradientTransformation(init, update)


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _update_rule(
    config: OptimConfig,
    mask: Callable[[Any], Any],
    direction: optax.GradientTransformation,
    lr: float,
) -> list[optax.GradientTransformation]:
    """Chain a direction with what all optimizers share: add weight_decay x parameter (decoupled, as
    in AdamW), multiply by -learning rate. mask: what `decay_mask` returns. lr: the peak here; its
    shape is the run's schedule."""
    add_decay = cautious_decay if config.cautious_decay else optax.add_decayed_weights
    rate, share = schedule(config), lr / config.lr

    def falling(i: Any) -> Any:
        return config.weight_decay / config.lr * rate(i)

    return [
        direction,
        add_decay(falling if config.decay_follows_lr else config.weight_decay, mask),
        optax.scale_by_learning_rate(rate if share == 1 else lambda i: share * rate(i)),
    ]


def cautious_decay(
    weight_decay: float | Schedule, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Add weight decay as optax.add_decayed_weights does, but only to entries that the update moves
    towards zero, too (arXiv:2510.12402)."""
    scheduled = callable(weight_decay)

    def init(params: Any) -> Any:
        count = jnp.zeros((), jnp.int32)
        return optax.ScaleByScheduleState(count) if scheduled else optax.EmptyState()

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        share = weight_decay(state.count) if scheduled else weight_decay

        def add(decays: bool, u: Array, p: Array) -> Array:
            return u + share * p * (u * p > 0) if decays else u

        updates = jax.tree.map(add, mask(updates), updates, params)
        return updates, state._replace(count=state.count + 1) if scheduled else state

    return optax.GradientTransformation(init, update)


class LookaheadState(NamedTuple):
    """count: updates so far. drift: the mean update, shaped and sharded like the parameters."""

    count: Array
    drift: Any


def lookahead(config: OptimConfig) -> optax.GradientTransformation:
    """Have the weights lie ahead of where updates have led, by a share of the mean update, so that
    gradients are taken there: EMA-Nesterov, arXiv:2605.25395.

    With x where updates have led, b the share and m the mean, weights are y = x + b m; an update
    leads from y to the next x, and m becomes d m + (1 - d) (next x - x). The share is
    optim.lookahead times the learning rate over its peak, and 0 outside of a sixth to three
    quarters of the run, about as in KellerJordan/modded-nanogpt#308, so that y is x in the end.
    """
    rate, steps, decay = schedule(config), config.steps, config.lookahead_decay

    def share(i: Array) -> Array:
        within = (i >= round(steps / 6)) & (i < round(steps * 3 / 4))
        return jnp.where(within, config.lookahead / config.lr * rate(i), 0)

    def init(params: Any) -> LookaheadState:
        return LookaheadState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: LookaheadState, params: Any) -> tuple[Any, LookaheadState]:
        now, following = share(state.count), share(state.count + 1)
        drift = jax.tree.map(
            lambda m, u: decay * m + (1 - decay) * (now * m + u), state.drift, updates
        )
        updates = jax.tree.map(lambda u, m: u + following * m, updates, drift)
        return updates, LookaheadState(state.count + 1, drift)

    return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
    """count: updates so far. average: the mean of the weights after each update of the tail, or,
    before the tail begins, the last weights."""

    count: Array
    average: Any


def tail_average(config: OptimConfig) -> optax.GradientTransformation:
    """Keep the mean of the weights over the last share of the run; no update is changed."""
    start = round((1 - config.average) * config.steps)

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params))

    def update(updates: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        count = state.count + 1
        length = jnp.maximum(1, count - start)  # of the tail so far, with this update

        def mean(a: Array, p: Array, u: Array) -> Array:
            return jnp.where(length == 1, p + u, a + (p + u - a) / length)

        return updates, AverageState(count, jax.tree.map(mean, state.average, params, updates))

    return optax.GradientTransformation(init, update)


def swap_average(params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Swap the last weights with the averaged ones of the optimizer's state, if it has any."""
    *others, average = opt_state
    if not isinstance(average, AverageState):
        return params, opt_state
    return average.average, (*others, average._replace(average=params))


def _momentum(config: OptimConfig) -> Callable[[Array], Any]:
    """Return a function: updates so far -> momentum, from 0.85 up over momentum_warmup updates."""
    if not config.momentum_warmup:
        return lambda i: config.momentum
    return optax.linear_schedule(0.85, config.momentum, config.momentum_warmup)

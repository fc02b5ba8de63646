"""Learning-rate schedules, what decays, and AdamW. A step is an optimizer update throughout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scalegpt.config import OptimConfig

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
        return name.endswith("kernel") or (config.decay == "matrices" and name in ("wte", "wpe"))

    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) on globally clipped gradients; state in the parameters' dtype."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask(config)),
        optax.scale_by_learning_rate(schedule(config)),
    )

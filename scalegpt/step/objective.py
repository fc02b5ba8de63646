"""An objective says what an update minimises: a loss summed over a batch, and what divides it.

Letters: A microbatches of M sequences, T positions. A batch is tokens [A, M, T+1], or a dict with
these under "tokens" and more about each sequence, [A, M, ...]. Its leaves are split by rows alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from scalegpt.config import Config, GrpoConfig
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
    if config.objective.name == "grpo":
        grpo = config.grpo
        token = jax.ShapeDtypeStruct((config.row_width,), jnp.float32)
        row = {
            "tokens": tokens,
            "advantage": jax.ShapeDtypeStruct((), jnp.float32),
            **dict.fromkeys(log_probs_read(grpo), token),
        }
        return Objective(partial(policy_loss, grpo), partial(divisor, grpo), row)
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


EXPONENT = 20.0  # the largest, for a policy that has drifted far: e^20 is 5e8


def log_probs_read(grpo: GrpoConfig) -> list[str]:
    """Return which log-probabilities of its tokens a batch carries, [A, M, T] each.

    sampled: when they were drawn. old: before the first update from them. reference: with the
    weights of run.init_from.
    """
    return ["sampled", *["old"] * (grpo.updates > 1), *["reference"] * (grpo.kl > 0)]


def policy_loss(
    grpo: GrpoConfig, model: GPT, params: Any, batch: dict[str, Array], dropout_keys: Array | None
) -> tuple[Array, Sums]:
    """Sum the loss of the policy gradient over the rows of a microbatch, by their advantages [M].

    On-policy its gradient is that of -advantage x log-probability; its value means nothing. With
    several updates from the same answers it is PPO's clipped one (Schulman et al.,
    arXiv:1707.06347, equation 7). To it are added grpo.kl estimates of the KL divergence from the
    reference, of which k3 is never negative (John Schulman, "Approximating KL Divergence", 2020).
    """
    tokens = batch["tokens"]
    learned = tokens[:, 1:] >= 0
    log_probs = -row_losses(model, params, tokens, dropout_keys, False, grpo.temperature)
    count = learned.sum(dtype=jnp.float32)

    def total(values: Array) -> Array:
        return jnp.where(learned, values, 0).sum()

    advantage = batch["advantage"][:, None]
    gain = advantage * log_probs
    gap = jnp.abs(jax.lax.stop_gradient(log_probs) - batch["sampled"])
    figures = {"rl/logp_gap": (total(gap), count)}
    if grpo.updates > 1:
        ratio = jnp.exp(log_probs - batch["old"])
        clipped = jnp.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
        gain = jnp.minimum(ratio * advantage, clipped * advantage)
        figures["rl/clipped"] = total((clipped - ratio) * advantage < 0).astype(jnp.float32), count
    loss = -gain
    if grpo.kl:
        excess = jnp.minimum(batch["reference"] - log_probs, EXPONENT)
        k3 = jnp.exp(excess) - excess - 1
        loss += grpo.kl * (k3 if grpo.kl_estimator == "k3" else jnp.square(excess) / 2)
        figures["rl/kl"] = total(jax.lax.stop_gradient(k3)), count
    if grpo.divide == "sequences":
        loss /= jnp.maximum(learned.sum(-1, keepdims=True), 1)
    return total(loss), figures


def divisor(grpo: GrpoConfig, batch: dict[str, Array]) -> Array:
    """Return what the sums over a batch are divided by, as grpo.divide says, as float32."""
    if grpo.divide == "tokens":
        return target_count(batch["tokens"])
    rows = jnp.ones_like(batch["advantage"]).sum()
    return rows * grpo.max_new_tokens if grpo.divide == "constant" else rows


def advantages(grpo: GrpoConfig, rewards: np.ndarray) -> np.ndarray:
    """Return how much better each answer is than its group, [P G] float32, from rewards [P, G].

    Without scaling it is Dr. GRPO's (Liu et al., arXiv:2503.20783), with it GRPO's (Shao et al.,
    arXiv:2402.03300, section 4.1.2).
    """
    better = rewards - rewards.mean(1, keepdims=True)
    better[np.ptp(rewards, axis=1) == 0] = 0  # not what rounding leaves of them
    if grpo.scale == "group":
        better /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
    return better.reshape(-1).astype(np.float32)


def tokens_of(batch: Any) -> Any:
    """Return the tokens of a batch."""
    return batch["tokens"] if isinstance(batch, dict) else batch

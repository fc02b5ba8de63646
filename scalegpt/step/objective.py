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
from jax.nn import log_sigmoid

from scalegpt.config import Config, DpoConfig, GrpoConfig
from scalegpt.config.limits import VOID
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
    count(batch) -> float32 scalar: what the sums over the batch are divided by; below 0 if a row is
    of `VOID` tokens. row: the shape and dtype of one sequence of a batch. group: so many sequences,
    side by side, stay in a microbatch and on a device together.
    """

    loss: Callable[[GPT, Any, Any, Array | None], tuple[Array, Sums]]
    count: Callable[[Any], Array]
    row: Any
    group: int = 1


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
    if config.objective.name == "dpo":
        row = {"tokens": tokens, "reference": jax.ShapeDtypeStruct((), jnp.float32)}
        return Objective(partial(preference_loss, config.dpo), pair_count, row, group=2)
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
    return _unless_void(tokens, (tokens[..., 1:] >= 0).sum(-1, dtype=jnp.float32)).sum()


def _unless_void(tokens: Array, counts: Array) -> Array:
    """Return the count of each row, -inf for one of `VOID` tokens: so is then the sum over all."""
    return jnp.where(tokens[..., 0] == VOID, -jnp.inf, counts)


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


def preference_loss(
    dpo: DpoConfig, model: GPT, params: Any, batch: dict[str, Array], dropout_keys: Array | None
) -> tuple[Array, Sums]:
    """Sum the losses of the pairs in a microbatch, tokens [M, T+1] and reference [M]."""
    tokens = batch["tokens"]
    sums = row_losses(model, params, tokens, dropout_keys)
    figures = pair_figures(dpo, sums, batch["reference"], (tokens[:, 1:] >= 0).sum(-1))
    pairs = pair_count(batch)
    loss = figures.pop("loss").sum()
    return loss, {f"dpo/{name}": (values.sum(), pairs) for name, values in figures.items()}


def pair_figures(dpo: DpoConfig, sums: Array, reference: Array, counts: Array) -> dict[str, Array]:
    """Compute loss and figures of each pair, [M / 2], from what is known of its two rows, [M].

    sums: cross-entropy of each row's answer, as `row_losses`. reference: the log-probability that
    it had at the start. counts: its tokens. An answer's reward is beta times how much its
    log-probability has grown. The margin is the chosen one's reward less the rejected one's, and
    the loss is -log sigmoid(margin) (Rafailov et al., arXiv:2305.18290, equation 7); with label
    smoothing e it is 1 - e parts of that and e parts of -log sigmoid(-margin).
    """
    chosen, rejected = (dpo.beta * (-sums - reference)).reshape(-1, 2).T
    margin, smoothing = chosen - rejected, dpo.label_smoothing
    loss = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    if (
        dpo.chosen_weight
    ):  # both log-probabilities may fall, as long as the rejected one's falls more
        loss += dpo.chosen_weight * (sums / jnp.maximum(counts, 1)).reshape(-1, 2)[:, 0]
    accuracy = (margin > 0).astype(jnp.float32)
    figures = {"margin": margin, "accuracy": accuracy, "chosen": chosen, "rejected": rejected}
    return {"loss": loss, **figures}


def pair_count(batch: dict[str, Array]) -> Array:
    """Count the pairs of a batch, as float32 like the gradients."""
    tokens = batch["tokens"]
    return _unless_void(tokens, (tokens >= 0).any(-1).astype(jnp.float32)).sum() / 2


def tokens_of(batch: Any) -> Any:
    """Return the tokens of a batch."""
    return batch["tokens"] if isinstance(batch, dict) else batch

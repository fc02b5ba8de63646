"""Compute the training loss, cross-entropy, in chunks, so that the logits never exist whole."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from scalegpt.config.limits import BEGINS
from scalegpt.config.recipe import ModelConfig
from scalegpt.model.custom_gradients import logsumexp
from scalegpt.model.gpt import GPT, head_table, logits
from scalegpt.model.layers import constrain, split_over
from scalegpt.step import sharding


@jax.named_scope("loss")
def token_losses(
    hidden: Array,
    table: Array,
    targets: Array,
    config: ModelConfig,
    summed: bool = True,
    temperature: float = 1.0,
) -> Array:
    """Compute the cross-entropies of targets [B, T], float32, from hidden [B, T, D].

    Logits exist for `loss_chunk` positions at a time and are recomputed for the gradient, so that
    [B, T, V] never exists. Masked targets, below 0, count as 0. summed: return the sum of each row,
    [B], instead of [B, T]. temperature: what the logits are divided by.
    """

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("logsumexp"))
    def chunk_losses(hidden: Array, targets: Array) -> Array:
        scores = logits(hidden, table, config)
        scores = constrain(scores, "batch", "act_position", "act_vocab")
        if temperature != 1:
            scores = scores / temperature
        # Not a gather: XLA cannot split one over a vocabulary sharded inside manual axes.
        is_target = jnp.arange(scores.shape[-1]) == targets[..., None]
        target_scores = jnp.where(is_target, scores, 0).sum(-1)
        losses = jnp.where(targets >= 0, logsumexp(scores) - target_scores, 0)
        return losses.sum(-1) if summed else losses

    (b, t, d), chunk = hidden.shape, config.loss_chunk
    if t <= chunk:
        return chunk_losses(hidden, targets)
    pad = -t % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1)
    hidden = hidden.reshape(b, -1, chunk, d).swapaxes(0, 1)
    targets = targets.reshape(b, -1, chunk).swapaxes(0, 1)
    if not summed:
        losses = jax.lax.map(lambda x: chunk_losses(*x), (hidden, targets))
        return losses.swapaxes(0, 1).reshape(b, -1)[:, :t]
    first, rest = chunk_losses(hidden[0], targets[0]), (hidden[1:], targets[1:])
    return jax.lax.scan(lambda sums, x: (sums + chunk_losses(*x), None), first, rest)[0]


def row_losses(
    model: GPT,
    params: Any,
    tokens: Array,
    dropout_keys: Array | None,
    summed: bool = True,
    temperature: float = 1.0,
) -> Array:
    """Sum the cross-entropies of each row of tokens [B, T+1]: [B] float32.

    summed, temperature: as of `token_losses`, which without the sums returns [B, T].

    A token that is read but not predicted is there as ~id, its bitwise complement, which is below
    0. So the mark lies on the target itself, and no second array could be shifted against it.
    Padding is -1 = ~0. Likewise BEGINS is added to an id that begins a document, if the model's
    config has these kept apart so.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    inputs, begins = jnp.where(inputs < 0, ~inputs, inputs), None
    if model.config.begins_in_batch:
        begins, inputs = inputs >= BEGINS, inputs % BEGINS
        targets = jnp.where(targets < 0, targets, targets % BEGINS)
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    split = split_over("batch")
    if rules and mesh.shape.get("context", 1) > 1:
        rules["act_position"] = rules["act_residual"] = "context"
        split += ["context"]
    if rules and mesh.shape.get("tensor", 1) > 1:
        rules["act_residual"] = tuple(a for a in ("context", "tensor") if mesh.shape[a] > 1)
    with nn.logical_axis_rules(tuple(rules.items())):
        hidden = model.apply({"params": params}, inputs, dropout_keys, begins=begins)
    table = head_table(params)
    losses_of = partial(token_losses, config=model.config, summed=summed, temperature=temperature)
    # The compiler would reduce the table's gradient over fsdp and context in every chunk. So the
    # rows of each shard use a copy of their own, which that shard has anyway; these gradients are
    # summed once. Nor may a chunk hold positions of several shards.
    axes = tuple(a for a in split if a == "context" or split in (["fsdp"], ["fsdp", "context"]))
    if not axes:
        return losses_of(hidden, table, targets)
    fsdp, context = (mesh.shape[a] if a in axes else 1 for a in ("fsdp", "context"))
    copies = jnp.broadcast_to(table, (fsdp * context, *table.shape))
    copies = jax.lax.with_sharding_constraint(copies, P(axes, sharding.RULES["act_vocab"]))

    def shards(x: Array) -> Array:
        """Turn [B, T, ...] into [fsdp context, B / fsdp, T / context, ...]."""
        x = x.reshape(fsdp, len(x) // fsdp, context, x.shape[1] // context, *x.shape[2:])
        return x.swapaxes(1, 2).reshape(fsdp * context, x.shape[1], *x.shape[3:])

    with nn.logical_axis_rules(tuple(sharding.rules_within((*axes, *mesh.manual_axes)).items())):
        losses = jax.vmap(losses_of)(shards(hidden), copies, shards(targets))
    if context == 1:
        return losses.reshape(-1, *losses.shape[2:])
    losses = losses.reshape(fsdp, context, *losses.shape[1:])
    if summed:
        return losses.sum(1).reshape(-1)
    return losses.swapaxes(1, 2).reshape(inputs.shape)

"""Rollouts are answers that a model in training draws to prompts, several to each, to be rewarded.

They are drawn from the whole distribution at a temperature, and come with the log-probability of
each token in exactly that distribution. What an update draws follows from its weights, the run's
seed and its number. Shapes: P prompts, G answers to each, N = P G rows, group after group, S slots
of the cache, K new tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from scalegpt.config.recipe import NO_LORA
from scalegpt.inference.decode import Decoder, bucket, decoder, empty_cache, next_scores, padded
from scalegpt.inference.sampling import Sampler, keys_at, sample_token
from scalegpt.model.gpt import Cache
from scalegpt.model.layers import constrain
from scalegpt.step import sharding
from scalegpt.step.build import Steps

PIECE = 32  # tokens of all answers that are drawn before a request to stop is heard


@dataclass(frozen=True)
class Rollouts:
    """Answers to P prompts, G to each, one after the other.

    answers: their ids, with the end mark where it was drawn. log_probs [N, K] float32, of each
    token; entropy: of the distribution of a token, in nats, on average. seconds: that it took.
    """

    answers: list[np.ndarray]
    ended: np.ndarray
    log_probs: np.ndarray
    entropy: float
    seconds: float


@struct.dataclass
class _Progress:
    """What is drawn so far: `drawn` tokens of each row. ids, log_probs, entropies: [N, K]."""

    cache: Cache
    ids: Array
    log_probs: Array
    entropies: Array
    ended: Array
    drawn: Array


def rollouts(
    steps: Steps,
    vocab_size: int,
    end: int,
    samples: int,
    new_tokens: int,
    temperature: float,
    check_stop: Callable[[], None] = lambda: None,
) -> Callable[[Any, Sequence[np.ndarray], Array], Rollouts]:
    """Return a function from parameters, prompts and a key to rollouts, which compiles once.

    samples: G. new_tokens: K, at most. end: the id that ends an answer. check_stop: called between
    pieces of a rollout; what it raises ends that. Every process of a run must call this together.
    """
    # The decoder's parameters have LoRA's changes merged in.
    model, shards = steps.model.clone(lora=NO_LORA), sharding.row_shards(steps.mesh)
    sampler = Sampler(temperature=temperature, top_k=0)
    draw = partial(_draw, sampler, end)
    kept = list[Decoder]()

    def prefill(params: Any, tokens: Array, first: Array, key: Array) -> _Progress:
        """Read each prompt once, and draw the first token of all its answers."""
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            slots = bucket(tokens.shape[1] + new_tokens - 1)
            cache = empty_cache(model, first, slots)
            scores, cache = next_scores(model, vocab_size, params, tokens, cache)
            # Whole groups lie on the shard of their prompt, so that nothing moves.
            scores, recent, first, layers = jax.tree.map(
                lambda x: x.repeat(samples, 0), (scores, cache.recent, cache.first, cache.layers)
            )
            scores, recent = (constrain(x, "batch", None) for x in (scores, recent))
            first = constrain(first, "batch")
            layers = jax.tree.map(lambda x: constrain(x, "batch", "act_heads", None, None), layers)
            cache = Cache(layers, first, cache.used, recent)
            shape = (len(scores), new_tokens)
            zeros = constrain(jnp.zeros(shape, jnp.float32), "batch", None)
            begun = _Progress(
                cache,
                constrain(jnp.zeros(shape, jnp.int32), "batch", None),
                zeros,
                zeros,
                constrain(jnp.zeros(len(scores), bool), "batch"),
                jnp.zeros((), jnp.int32),
            )
            return draw(begun, scores, cache, key)

    def piece(params: Any, begun: _Progress, key: Array) -> tuple[_Progress, Array]:
        """Draw up to PIECE tokens of each answer; return also whether that was all."""
        until = jnp.minimum(begun.drawn + PIECE, new_tokens)

        def more(progress: _Progress) -> Array:
            return (progress.drawn < until) & ~progress.ended.all()

        def token(progress: _Progress) -> _Progress:
            last = jax.lax.dynamic_slice_in_dim(progress.ids, progress.drawn - 1, 1, 1)
            scores, cache = next_scores(model, vocab_size, params, last, progress.cache)
            return draw(progress, scores, cache, key)

        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            progress = jax.lax.while_loop(more, token, begun)
            done = (progress.drawn == new_tokens) | progress.ended.all()
            return progress, constrain(done)

    def results(progress: _Progress) -> Any:
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            arrays = progress.ids, progress.log_probs, progress.entropies
            return [constrain(x, None, None) for x in arrays]

    prefill, results = jax.jit(prefill), jax.jit(results)
    piece = jax.jit(piece, donate_argnums=1)

    def roll(params: Any, prompts: Sequence[np.ndarray], key: Array) -> Rollouts:
        began = time.monotonic()
        if not kept:
            kept.append(decoder(steps, params, sampler, vocab_size).with_params(None))
        weights = kept[0].with_params(params).params
        # So many that each shard of rows has whole groups; those that fill up are left out below.
        all_prompts = [*prompts, *[prompts[0]] * (-len(prompts) % shards)]
        width = min(model.config.block_size, bucket(max(map(len, prompts))))
        rows = sharding.local_rows(steps.mesh, len(all_prompts))
        tokens, first = (
            sharding.to_global(x[rows], rows, steps.eval_sharding, len(all_prompts))
            for x in padded(all_prompts, width)
        )
        with jax.set_mesh(steps.mesh):
            progress, done = prefill(weights, tokens, first, key), False
            while not done:
                check_stop()
                progress, done = piece(weights, progress, key)
            n = samples * len(prompts)
            ids, log_probs, entropies = (np.asarray(x)[:n] for x in results(progress))
        is_end = ids == end
        ended = is_end.any(1)
        lengths = np.where(ended, is_end.argmax(1) + 1, new_tokens)
        drawn = np.arange(new_tokens) < lengths[:, None]
        return Rollouts(
            [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)],
            ended,
            np.where(drawn, log_probs, 0),
            float(entropies[drawn].mean()),
            time.monotonic() - began,
        )

    return roll


def _draw(
    sampler: Sampler, end: int, progress: _Progress, scores: Array, cache: Cache, key: Array
) -> _Progress:
    """Draw a token of each row from its logits [N, V]; the row's number decides by which noise."""
    i = progress.drawn
    ids = sample_token(scores, keys_at(key, jnp.full(len(scores), i)), sampler)
    log_probs = jax.nn.log_softmax(scores / sampler.temperature)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
    log_prob = jnp.take_along_axis(log_probs, ids[:, None], -1)[:, 0]

    def put(column: Array, into: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(into, column[:, None], i, 1)

    return progress.replace(
        cache=cache,
        ids=put(ids, progress.ids),
        log_probs=put(log_prob, progress.log_probs),
        entropies=put(entropy, progress.entropies),
        ended=progress.ended | (ids == end),
        drawn=i + 1,
    )

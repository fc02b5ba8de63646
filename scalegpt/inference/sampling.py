"""A sampler draws the next token: temperature, top-k, top-p, min-p, repetition penalty."""

import argparse
from dataclasses import dataclass, fields
from math import inf

import jax
import jax.numpy as jnp
from jax import Array

from scalegpt.errors import Mistake


@dataclass(frozen=True)
class Sampler:
    """A sampler says how a token is drawn; transformers applies the same rules in the same order.

    temperature: 0 is greedy. prompt_lookup changes the speed alone: how many tokens are proposed at
    a time, as `prompt_lookup.proposed` does. Raises Mistake for a value without a meaning.
    """

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 <= self.temperature < inf, "from 0, which is greedy, upwards"),
            "top_k": (self.top_k >= 0, "at least 0, which keeps all tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1, which keeps all tokens"),
            "min_p": (0 <= self.min_p <= 1, "from 0, which keeps all tokens, to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < inf, "above 0; 1 is none"),
            "prompt_lookup": (0 <= self.prompt_lookup <= 64, "from 0, which is none, to 64"),
        }
        for field in fields(self):
            is_allowed, rule = allowed[field.name]
            if not is_allowed:
                name, value = field.name.replace("_", "-"), getattr(self, field.name)
                raise Mistake(f"--{name}={value} must be {rule}")


_HELP = {
    "temperature": "0: always the likeliest token",
    "top_k": "draw from the so many likeliest; 0: from all",
    "top_p": "draw from the likeliest that have this probability together",
    "min_p": "draw from those at least this likely, relative to the likeliest",
    "repetition_penalty": "above 1: tokens of the text so far become less likely",
    "prompt_lookup": "try so many tokens at a time that stood in the text before; what is written "
    "stays the same, a text that repeats itself comes faster",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of a `Sampler`, as --top-k, and --seed."""
    for option in fields(Sampler):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=option.type,
            default=option.default,
            help=f"{_HELP[option.name]} (default {option.default})",
        )
    parser.add_argument("--seed", type=int, default=1337, help="decides what is drawn")


def from_flags(flags: argparse.Namespace) -> Sampler:
    """Return the sampler that the flags of `add_flags` ask for. Raises Mistake."""
    if not 0 <= flags.seed < 2**32:
        raise Mistake(f"--seed={flags.seed} must be from 0 to {2**32 - 1}")
    return Sampler(**{option.name: getattr(flags, option.name) for option in fields(Sampler)})


def keys_at(key: Array, i: Array) -> Array:
    """Return the key of each text for its step i [N], of one key for all texts or of keys [N]."""
    if key.ndim:
        return jax.vmap(jax.random.fold_in)(key, i)
    rows = jnp.arange(len(i))
    return jax.vmap(lambda i, row: jax.random.fold_in(jax.random.fold_in(key, i), row))(i, rows)


def sample_token(scores: Array, keys: Array, sampler: Sampler, seen: Array | None = None) -> Array:
    """Draw one id [N] int32 for each row of float32 logits [N, V], each with its own of keys [N].

    seen: [N, V] bool, ids of the text so far. repetition_penalty divides their logits where these
    are positive and multiplies them where not (CTRL, arXiv:1909.05858, section 4.1). top_p keeps
    the likeliest ids until together they have that probability (arXiv:1904.09751). min_p keeps
    ids whose probability is at least that share of the likeliest's (arXiv:2407.01082).
    """
    if sampler.repetition_penalty != 1:
        penalty = sampler.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if sampler.temperature == 0:
        return scores.argmax(-1).astype(jnp.int32)
    scores, ids = scores / sampler.temperature, None
    if sampler.top_k or sampler.top_p < 1:  # sort no more than these need
        size = scores.shape[-1]
        scores, ids = jax.lax.top_k(scores, min(sampler.top_k or size, size))
    if sampler.top_p < 1:
        probability = jax.nn.softmax(scores)
        likelier = jnp.cumsum(probability, -1) - probability
        scores = jnp.where(likelier < sampler.top_p, scores, -jnp.inf)
    if sampler.min_p:
        lowest = scores.max(-1, keepdims=True) + jnp.log(sampler.min_p)
        scores = jnp.where(scores >= lowest, scores, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, scores)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)

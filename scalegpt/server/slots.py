"""Slots are the rows of one key-value cache; each holds a text that is being written.

A slot never depends on the others: a text is the same, bit for bit in float32, whoever else is
served. So each row has places of its own in the cache, where rows of `decode` share theirs, a
prompt is read by itself, and a token's random key is of the text's seed and the token's index.
How a token is drawn is in arrays, so that two programs serve all: one reads, one writes.

Shapes: N slots, S places of a slot, V ids of the tokenizer.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from scalegpt.inference.decode import Decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.model.gpt import GPT, Cache, head_table, logits
from scalegpt.model.layers import constrain
from scalegpt.step import sharding

READ = 64  # tokens of a prompt that are read at once, between two tokens of the other texts
ALTERNATIVES = 20  # tokens whose probability comes with each that is drawn
LIKELIEST = 1024  # a sort of so many costs much less than one of a whole vocabulary
# Every device has all rows; parameters are split as ever.
RULES = sharding.rules_within(sharding.ROWS)


@dataclass(frozen=True)
class Drawn:
    """A token that was drawn, with log-probabilities as the model gives them, before the cuts.

    top: the likeliest ids with theirs, the best first.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Slots:
    """The N slots of a decoder's model. A text is opened, read until `read` is done, and written.

    One thread may use them at a time.
    """

    def __init__(self, decoder: Decoder, count: int) -> None:
        model = decoder.steps.model
        c = model.config
        places = -(-c.block_size // READ) * READ
        self.count, self.mesh, self.params = count, decoder.steps.mesh, decoder.params
        self.lookback = c.lookback
        shape = (count, c.kv_heads, places, c.head_dim)
        with jax.set_mesh(self.mesh):
            self.cache = jax.jit(partial(_empty, model, shape))()
        self.reader = jax.jit(partial(_read, model), donate_argnums=1)
        self.writer = jax.jit(partial(_write, model, decoder.vocab_size), donate_argnums=1)
        self.tokens = np.zeros((count, places), np.int32)
        self.lengths = np.zeros(count, np.int32)  # of the texts
        self.read_to = np.zeros(count, np.int32)  # tokens that are in the cache
        self.options = {
            **{name: np.zeros(count, np.float32) for name in ("temperature", "top_p", "min_p")},
            "repetition_penalty": np.ones(count, np.float32),
            **{name: np.zeros(count, np.int32) for name in ("top_k", "index")},
            "seed": np.zeros(count, np.uint32),
        }

    @property
    def bytes(self) -> int:
        """The memory of the cache."""
        return sum(x.nbytes for x in jax.tree.leaves(self.cache))

    def compile(self) -> None:
        """Compile both programs, so that nobody has to wait for them."""
        self.open(0, np.zeros(2, np.int32), Sampler(), 0, 0)
        self.read(0)
        self.write([0])
        self.close(0)

    def open(self, slot: int, ids: np.ndarray, sampler: Sampler, seed: int, index: int) -> None:
        """Begin a text with at least one id. index: how many of its tokens are drawn already."""
        self.tokens[slot, : len(ids)] = ids
        self.lengths[slot], self.read_to[slot] = len(ids), 0
        for name, values in self.options.items():
            values[slot] = {"seed": seed, "index": index}.get(name, getattr(sampler, name, None))

    def close(self, slot: int) -> None:
        """Leave a text; what a free slot draws is as little work as can be."""
        self.lengths[slot] = self.read_to[slot] = 0
        self.options["temperature"][slot] = 0

    def read(self, slot: int) -> bool:
        """Read on in a text, READ tokens at most; return whether it may be written.

        The last token of a prompt is read where the first of the answer is drawn.
        """
        start, last = int(self.read_to[slot]), int(self.lengths[slot]) - 1
        if start < last:
            # Before the first token stands what no token reads.
            places = range(start - self.lookback, start + READ)
            tokens = self.tokens[slot].take(places, mode="clip")
            with jax.set_mesh(self.mesh):
                self.cache = self.reader(self.params, self.cache, tokens, slot, start)
            self.read_to[slot] = min(start + READ, last)
        return bool(self.read_to[slot] == last)

    def write(self, slots: list[int]) -> list[Drawn]:
        """Draw the next token of each of these texts, which have been read."""
        with jax.set_mesh(self.mesh):
            # What the other rows compute goes to the place that they will fill next.
            self.cache, *drawn = self.writer(
                self.params, self.cache, self.tokens, self.read_to, self.options
            )
        ids, logprobs, top_ids, top_logprobs = (np.asarray(x)[slots].tolist() for x in drawn)
        self.read_to[slots] += 1
        self.options["index"][slots] += 1
        tops = [[*zip(*both, strict=True)] for both in zip(top_ids, top_logprobs, strict=True)]
        return [Drawn(*token) for token in zip(ids, logprobs, tops, strict=True)]

    def append(self, slot: int, token: int) -> None:
        """Add to a text the token that was drawn for it."""
        self.tokens[slot, self.lengths[slot]] = token
        self.lengths[slot] += 1


def _empty(model: GPT, shape: tuple[int, ...]) -> Any:
    with nn.logical_axis_rules(tuple(RULES.items())):
        empty = jnp.zeros(shape, model.dtype)
        empty = constrain(empty, "batch", "act_heads", None, None)
        return tuple((empty, empty) for _ in range(model.config.n_layer))


def _read(model: GPT, params: Any, cache: Any, tokens: Array, slot: Array, start: Array) -> Any:
    """Add READ tokens of a slot to the cache, from place `start` on; return the cache.

    tokens: after those that the first depends on. Those of padding are behind the text, where no
    token sees them before they are written over.
    """
    with nn.logical_axis_rules(tuple(RULES.items())):
        row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), cache)
        recent, tokens = jnp.split(tokens[None], [model.config.lookback], axis=1)
        past = Cache(row, jnp.zeros(1, jnp.int32), start, recent)
        _, past = model.apply({"params": params}, tokens, cache=past)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=0)
        return jax.tree.map(put, cache, past.layers)


def _write(
    model: GPT,
    vocab_size: int,
    params: Any,
    cache: Any,
    tokens: Array,
    used: Array,
    options: dict[str, Array],
) -> tuple:
    """Add the token at place `used` [N] of each text [N, S] to the cache, and draw the next.

    Returns the cache; the ids [N], their log-probabilities; the likeliest ids [N, 20] and theirs.
    """
    with nn.logical_axis_rules(tuple(RULES.items())):
        places = used[:, None] + jnp.arange(-model.config.lookback, 1)
        read = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
        past, last = Cache(cache, jnp.zeros_like(used), used, read[:, :-1]), read[:, -1:]
        hidden, past = model.apply({"params": params}, last, cache=past)
        scores = logits(hidden[:, 0], head_table(params), model.config)
        scores = constrain(scores, "batch", None)[:, :vocab_size]

    def one(row: tuple) -> tuple:
        scores, text, used, options = row
        token = _draw(scores, jnp.where(jnp.arange(len(text)) <= used, text, -1), options)
        logprobs = jax.nn.log_softmax(scores)
        top, ids = jax.lax.top_k(logprobs, min(ALTERNATIVES, vocab_size))
        return token, logprobs[token], ids, top

    # One after another, so that each row takes the cheapest way to draw that its options allow, and
    # no other row's options decide which.
    return past.layers, *jax.lax.map(one, (scores, tokens, used, options))


def _draw(scores: Array, text: Array, options: dict[str, Array]) -> Array:
    """Draw an id by the rules of `sample_token`, whose options are arrays here, from logits [V].

    text: the ids so far [S], -1 where there are none.
    """
    places = jnp.where(text < 0, len(scores), text)
    old = scores.at[places].get(mode="fill", fill_value=0)
    penalty = jnp.clip(options["repetition_penalty"], 1e-30, 1e30)
    new = jnp.where(old > 0, old / penalty, old * penalty)
    scores = jnp.clip(scores.at[places].set(new, mode="drop"), -1e30, 1e30)
    # The least temperatures divide by so little that only the likeliest stays finite.
    scaled = (scores - scores.max()) / options["temperature"]
    key = jax.random.fold_in(jax.random.key(options["seed"]), options["index"])
    top_k, top_p = options["top_k"], options["top_p"]

    def drawn(scores: Array) -> Array:
        scores = jnp.where(scores >= jnp.log(options["min_p"]), scores, -jnp.inf)
        return jax.random.categorical(key, scores)

    def of_likeliest(most: int, scores: Array) -> Array:
        scores, ids = jax.lax.top_k(scores, most)
        kept = jnp.arange(most) < jnp.where(top_k > 0, top_k, most)
        scores = jnp.where(kept, scores, -jnp.inf)
        probability = jax.nn.softmax(scores)
        likelier = jnp.cumsum(probability) - probability
        scores = jnp.where((likelier < jnp.maximum(top_p, 1e-30)) | (top_p == 1), scores, -jnp.inf)
        return ids[drawn(scores)]

    size = len(scores)
    ways = [
        (options["temperature"] < 1e-30, lambda _: scores.argmax()),
        ((top_k == 0) & (top_p == 1), drawn),
        ((top_k > 0) & (top_k <= LIKELIEST), partial(of_likeliest, min(LIKELIEST, size))),
        (True, partial(of_likeliest, size)),
    ]
    which = jnp.argmax(jnp.array([fits for fits, _ in ways]))
    return jax.lax.switch(which, [way for _, way in ways], scaled).astype(jnp.int32)

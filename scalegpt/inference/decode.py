"""Decoding fills a key-value cache with the prompts, then draws one token a step from it.

Shapes: N texts, P tokens of a padded prompt, S slots of the cache, V padded vocabulary.
P and S are powers of two, at most block_size for P, so that neither a growing text nor a prompt of
about the same length compiles anything anew. From LEAST on, S doubles when the cache is full: a
step reads all of it, as to read a part of it would first copy that part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, zip_longest
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from scalegpt.config.recipe import NO_LORA
from scalegpt.data.calculator import Results
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.inference.prompt_lookup import Growing
from scalegpt.inference.sampling import Sampler, keys_at, sample_token
from scalegpt.model.gpt import GPT, Cache, head_table, logits, separate_layers
from scalegpt.model.layers import constrain
from scalegpt.model.lora import is_adapter, merged, parted
from scalegpt.step import sharding
from scalegpt.step.build import Steps

LEAST = 128  # slots of a cache that will be doubled


@dataclass(frozen=True)
class Decoder:
    """A decoder is a model and a sampler, compiled to continue texts; `decoder` makes one.

    params: as `separate_layers` returns them. prefill(params, tokens [N, P], first [N], seen, key,
    i, slots) and step(params, ids [N], (cache, seen), key, i) -> (ids [N], (cache, seen)), where
    seen is as for `sample_token`. begin(tokens [N, 1], first [N], slots) -> (ids [N], empty cache).
    grow(cache) -> the same cache with twice the slots. ahead: `_draw_ahead`.
    """

    steps: Steps
    params: Any
    sampler: Sampler
    vocab_size: int
    begin: Callable
    prefill: Callable
    step: Callable
    grow: Callable
    ahead: Callable

    def with_params(self, params: Any) -> "Decoder":
        """Return this decoder for other parameters of the same model; nothing is compiled again.

        They are copied. None makes a decoder that only keeps what is compiled.
        """
        if params is not None:
            with jax.set_mesh(self.steps.mesh):
                params = _for_decoding(params, self.steps.model, True)
        return replace(self, params=params)

    def ids(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        seed: int | Sequence[int] = 1337,
        codec: Tokenizer | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the next id of each of N prompts, int32 [N], max_new_tokens times.

        seed: of all texts together, or of each, so that none depends on its place among the others.
        prompts: ids, at least one each, of any lengths. Past block_size a text is continued from
        its last block_size tokens; all positions then shift, so the cache is of no use and each
        token costs a whole forward pass. codec: of a chat, so that a calculator writes the results
        of calls, which count as new tokens. Every process of a run must call this together.
        """
        block, shards = self.steps.model.config.block_size, sharding.row_shards(self.steps.mesh)
        texts = [np.asarray(prompt, np.int32).tolist() for prompt in prompts]
        texts += [list(texts[0]) for _ in range(-len(texts) % shards)]  # so that the rows divide
        longest = min(block, max(map(len, texts)))
        from_cache = min(max_new_tokens, 1 + block - longest)
        if isinstance(seed, Sequence):
            seeds = [*seed, *[seed[0]] * (len(texts) - len(prompts))]
            key = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
        else:
            key = jax.random.key(seed)
        results, ahead = _results(codec, len(texts)), None
        if self.sampler.prompt_lookup and from_cache > 1:
            ahead = self._read_ahead(texts, key, from_cache, _results(codec, len(texts)))
            new = next(ahead)
        else:
            new, state = self._read(texts, key, 0, from_cache)
        filled = self._width(texts)
        for i in range(1, max_new_tokens):
            if i < from_cache and not ahead:
                # Dispatched before the ids of the last step are read, so the device never waits.
                with jax.set_mesh(self.steps.mesh):
                    cache, seen = state
                    if filled == cache.slots:
                        state = self.grow(cache), seen
                    following, state = self.step(self.params, new, state, key, i)
                filled += 1
            yield (ids := np.asarray(new))[: len(prompts)]
            for text, token in zip(texts, ids.tolist(), strict=True):
                text.append(token)
            if i >= from_cache:
                following, state = self._read(texts, key, i, 1)
            elif ahead:
                following = next(ahead)
            must = [row.add(text[-1]) for row, text in zip(results, texts, strict=False)]
            if any(token is not None for token in must):
                forced = np.array([-1 if token is None else token for token in must])
                with jax.set_mesh(self.steps.mesh):
                    following = _replaced(following, forced)
            new = following
        yield np.asarray(new)[: len(prompts)]

    def _read_ahead(
        self, texts: list[list[int]], key: Array, count: int, results: list[Results]
    ) -> Iterator[np.ndarray]:
        """Yield the first `count` ids of `ids`; `_draw_ahead` draws several of them at once.

        Some texts are ahead of others, so each fills slots of its own number. What stands behind
        these is written over before any token sees it.
        """
        most, back = self.sampler.prompt_lookup, self.steps.model.config.lookback
        new, (cache, _) = self._read(texts, key, 0, count + most)
        first = self._width(texts) - np.array([*map(len, texts)])
        growing = [
            Growing(text, count, most, own)
            for text, own in zip_longest(texts, results)  # there may be none
        ]
        drawn, given = np.asarray(new)[:, None], 0
        while True:
            for text, ids in zip(growing, drawn.tolist(), strict=True):
                text.add(ids)
            while given < min(text.new for text in growing):
                yield np.array([text.ids[text.begun + given] for text in growing])
                given += 1
            # Where nothing is proposed, a step is of one token, as without proposals.
            length = 1 + most * any([text.propose() for text in growing])
            used = np.array([at + text.length - 1 for at, text in zip(first, growing, strict=True)])
            arrays = self._global(
                np.stack([text.end(back, length) for text in growing]),
                used.astype(np.int32),
                np.array([text.new for text in growing], np.int32),
                self._seen([text.ids[: text.length] for text in growing]),
            )
            with jax.set_mesh(self.steps.mesh):
                if used.max() + length > cache.slots:
                    cache = self.grow(cache)
                drawn, cache = self.ahead(self.params, cache, *arrays, key)
            drawn = np.asarray(drawn)

    def _width(self, texts: list[list[int]]) -> int:
        """Return how many slots of a cache the padded texts fill, of each its last block_size."""
        block, longest = self.steps.model.config.block_size, max(map(len, texts))
        # A step can read prompts of one token, so that no prefill need be compiled for them.
        return 1 if longest == 1 else min(block, bucket(longest))

    def _read(self, texts: list[list[int]], key: Array, i: int, new: int) -> tuple[Array, Any]:
        """Fill a cache with the texts, with room for `new` tokens, and draw the first of them."""
        steps, width = self.steps, self._width(texts)
        tokens, first = padded([text[-width:] for text in texts], width)
        tokens, first, seen = self._global(tokens, first, self._seen(texts))
        slots = min(bucket(width + new - 1), max(LEAST, bucket(width)))
        with jax.set_mesh(steps.mesh):
            if width == 1:
                ids, cache = self.begin(tokens, first, slots)
                return self.step(self.params, ids, (cache, seen), key, i)
            return self.prefill(self.params, tokens, first, seen, key, i, slots)

    def _seen(self, texts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray | None:
        """Return which ids texts hold, [N, V], where the sampler has to know."""
        if self.sampler.repetition_penalty == 1:
            return None
        seen = np.zeros((len(texts), self.vocab_size), bool)
        for row, text in zip(seen, texts, strict=True):
            row[text] = True
        return seen

    def _global(self, *arrays: np.ndarray | None) -> Any:
        """Make arrays of which every process has all rows into global ones, split over these."""
        steps = self.steps

        def split(x: np.ndarray) -> Array:
            rows = sharding.local_rows(steps.mesh, len(x))
            return sharding.to_global(x[rows], rows, steps.eval_sharding, len(x))

        return jax.tree.map(split, arrays)


def decoder(
    steps: Steps, params: Any, sampler: Sampler, vocab_size: int, keep: bool = True
) -> Decoder:
    """Return a Decoder for the parameters of `build_for_use`'s steps, which are copied.

    vocab_size: ids that the tokenizer knows; a model's others are never drawn. keep: False deletes
    each of params' layers as it is copied, for a model that would not fit into memory twice.
    """
    # The copy has LoRA's changes merged in: else each token would compute them again.
    model = steps.model.clone(lora=NO_LORA)
    vocab_size = min(vocab_size, model.config.vocab_size)
    with jax.set_mesh(steps.mesh):
        params = _for_decoding(params, steps.model, keep)
    begin, draw = partial(_begin, model), partial(_draw, model, sampler, vocab_size)
    ahead = partial(_draw_ahead, model, sampler, vocab_size)

    def prefill(
        params: Any, tokens: Array, first: Array, seen: Any, key: Array, i: Array, slots: int
    ) -> tuple:
        return draw(params, tokens, begin(tokens, first, slots)[1], seen, key, i)

    def step(params: Any, ids: Array, state: tuple, key: Array, i: Array) -> tuple:
        return draw(params, ids[:, None], *state, key, i)

    return Decoder(
        steps,
        params,
        sampler,
        vocab_size,
        jax.jit(begin, static_argnums=2),
        jax.jit(prefill, static_argnums=6),
        jax.jit(step, donate_argnums=2),
        jax.jit(_grown),
        jax.jit(ahead, donate_argnums=1),
    )


def _results(codec: Tokenizer | None, rows: int) -> list[Results]:
    """Return what calculates in each text, for a tokenizer that has marks of calls."""
    return [Results(codec) for _ in range(rows)] if codec and codec.marks else []


@jax.jit
def _replaced(ids: Array, forced: np.ndarray) -> Array:
    """Return ids [N] with those of `forced` [N] that are not below 0 in their place."""
    return constrain(jnp.where(forced >= 0, forced, ids).astype(ids.dtype), None)


def _draw(
    model: GPT,
    sampler: Sampler,
    vocab_size: int,
    params: Any,
    tokens: Array,
    cache: Cache,
    seen: Array | None,
    key: Array,
    i: Array,
) -> tuple[Array, tuple[Cache, Array | None]]:
    """Append tokens [N, P] to the cache and draw the ids [N] that follow them, for step i."""
    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        scores, cache = next_scores(model, vocab_size, params, tokens, cache)
        seen = _seen_too(seen, tokens[:, -1])
        ids = sample_token(scores, keys_at(key, jnp.full(len(tokens), i)), sampler, seen)
        return constrain(ids, None), (cache, seen)


def _draw_ahead(
    model: GPT,
    sampler: Sampler,
    vocab_size: int,
    params: Any,
    cache: Cache,
    tokens: Array,
    used: Array,
    i: Array,
    seen: Array | None,
    key: Array,
) -> tuple[Array, Cache]:
    """Put T tokens into slots `used` [N] and on, and draw the ids [N, T] that follow each of them.

    tokens: after those that the first depends on, [N, lookback + T]. i [N]: the step of the first
    id, from which the others count. seen: of the texts up to the first token.
    """
    recent, tokens = jnp.split(tokens, [model.config.lookback], axis=1)

    def draw(seen: Array | None, position: tuple[Array, Array, Array]) -> tuple:
        scores, read, j = position
        seen = _seen_too(seen, read)
        return seen, sample_token(scores, keys_at(key, i + j), sampler, seen)

    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        past = cache.replace(used=used, recent=recent)
        hidden, past = model.apply({"params": params}, tokens, cache=past)
        scores = logits(hidden, head_table(params), model.config).swapaxes(0, 1)
        scores = constrain(scores, None, "batch", None)[..., :vocab_size]
        # One after another, so that a step's sort is compiled once.
        _, ids = jax.lax.scan(draw, seen, (scores, tokens.T, jnp.arange(len(scores))))
        return constrain(ids.T, None, None), cache.replace(layers=past.layers)


def _seen_too(seen: Array | None, ids: Array) -> Array | None:
    """Return `seen` [N, V] with the ids [N] that texts have got."""
    return seen if seen is None else seen.at[jnp.arange(len(ids)), ids].set(True)


def next_scores(
    model: GPT, vocab_size: int, params: Any, tokens: Array, cache: Cache
) -> tuple[Array, Cache]:
    """Append tokens [N, P] to the cache; return it with the logits [N, V] of what follows them."""
    hidden, cache = model.apply({"params": params}, tokens, cache=cache)
    scores = logits(hidden[:, -1], head_table(params), model.config)
    # Gathered over the vocabulary once: sorting it while it is split would move it repeatedly.
    return constrain(scores, "batch", None)[:, :vocab_size], cache


def batches(prompts: Sequence[Sequence[int] | np.ndarray], size: int) -> list[list[int]]:
    """Return the indices of prompts in batches of at most `size`, each of one padded width."""
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    groups = [[*g] for _, g in groupby(order, lambda i: (lengths[i] - 1).bit_length())]
    return [g[i : i + size] for g in groups for i in range(0, len(g), size)]


def padded(texts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of texts with padding before them, [N, width], and where each begins, [N]."""
    first = np.array([width - len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[width - len(text) :] = text
    return tokens, first


def _begin(model: GPT, tokens: Array, first: Array, slots: int) -> tuple[Array, Cache]:
    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        return constrain(tokens[:, 0], None), empty_cache(model, first, slots, grows=True)


def empty_cache(model: GPT, first: Array, slots: int, grows: bool = False) -> Cache:
    c = model.config
    shape = (len(first), c.kv_heads, slots, c.head_dim)

    def empty() -> Array:
        return constrain(jnp.zeros(shape, model.dtype), "batch", "act_heads", None, None)

    layers = tuple((empty(), empty()) for _ in range(c.n_layer))
    recent = constrain(jnp.zeros((len(first), c.lookback), jnp.int32), "batch", None)
    return Cache(layers, first, jnp.zeros((), jnp.int32), recent, grows)


def _grown(cache: Cache) -> Cache:
    """Return the cache with as many empty slots again behind those that it has."""

    def doubled(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2]), (0, 0)))
        return constrain(x, "batch", "act_heads", None, None)

    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        return cache.replace(layers=jax.tree.map(doubled, cache.layers))


def _for_decoding(params: Any, model: GPT, keep: bool) -> Any:
    """Copy the parameters with each layer apart and each kernel in the dtype of its products.

    Otherwise every token would round the float32 weights again. keep: as for `decoder`.
    """

    convert = partial(_converted, model)
    leaves = {path: leaf for path, leaf in flatten_dict(params).items() if path[0] != "h"}
    if model.dtype != jnp.float32:
        leaves |= flatten_dict(convert({"head_kernel": params.get("head_kernel", params["wte"])}))
    if keep:  # one program, not one for each parameter
        return unflatten_dict(leaves) | convert({"h": params["h"]})
    for path, leaf in flatten_dict({"h": params["h"]}).items():
        leaves |= flatten_dict(convert(unflatten_dict({path: leaf})))
        leaf.delete()
    return unflatten_dict(leaves)


@partial(jax.jit, static_argnums=0)  # here, so that it is compiled once, not for each update
def _converted(model: GPT, part: Any) -> Any:
    def cast(path: tuple, x: Array) -> Array:
        return x.astype(model.dtype) if path[-1].key.endswith("kernel") else x

    adapters, base = parted(part, is_adapter)
    layers = separate_layers(merged(model.lora, base, adapters))
    return jax.tree_util.tree_map_with_path(cast, layers)


def bucket(n: int) -> int:
    """Round up to a power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())

"""Token by token: prefill of the prompts, then a step that reads each weight once.

Shapes: N texts, P tokens of a padded prompt, S slots of the cache, V padded vocabulary.
Each function is compiled for powers of two of P and S, so neither a growing text nor a prompt of
about the same length compiles anything anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from scalegpt.inference.sampling import Sampler, sample_token
from scalegpt.model.gpt import GPT, Cache, head_table, logits, separate_layers
from scalegpt.model.layers import constrain
from scalegpt.step import sharding
from scalegpt.step.build import Steps


@dataclass(frozen=True)
class Decoder:
    """A model ready to write, with one way of sampling; `decoder` makes it.

    params: as `separate_layers` leaves them. prefill(params, tokens [N, P], first [N], seen, key,
    i, slots) and step(params, ids [N], (cache, seen), key, i) -> (ids [N], (cache, seen)).
    begin(tokens [N, 1], first [N], slots) -> (ids [N], cache), what a first step needs.
    """

    steps: Steps
    params: Any
    sampler: Sampler
    vocab_size: int
    begin: Callable
    prefill: Callable
    step: Callable

    def ids(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, seed: int = 1337
    ) -> Iterator[np.ndarray]:
        """The next id of each of N prompts, int32 [N], max_new_tokens times.

        prompts: ids, at least one each, of any lengths. Past block_size a text is continued from
        its last block_size tokens; as all positions shift, nothing cached can serve, and each
        token costs a whole forward pass. Every process of a run must call this together.
        """
        block, shards = self.steps.model.config.block_size, sharding.row_shards(self.steps.mesh)
        texts = [np.asarray(prompt, np.int32).tolist() for prompt in prompts]
        texts += [list(texts[0]) for _ in range(-len(texts) % shards)]  # so that the rows divide
        longest = min(block, max(map(len, texts)))
        from_cache = min(max_new_tokens, 1 + block - longest)
        key = jax.random.key(seed)
        new, state = self._read(texts, key, 0, from_cache)
        for i in range(1, max_new_tokens):
            if i < from_cache:
                # Before the ids of the last step are looked at, so that the device never waits.
                with jax.set_mesh(self.steps.mesh):
                    following, state = self.step(self.params, new, state, key, i)
            yield (now := np.asarray(new))[: len(prompts)]
            for text, token in zip(texts, now.tolist(), strict=True):
                text.append(token)
            if i >= from_cache:
                following, state = self._read(texts, key, i, 1)
            new = following
        yield np.asarray(new)[: len(prompts)]

    def _read(self, texts: list[list[int]], key: Array, i: int, new: int) -> tuple[Array, Any]:
        """Fill a cache with the texts, with room for `new` tokens, and draw the first of them."""
        steps, config = self.steps, self.steps.model.config
        windows = [text[-config.block_size :] for text in texts]
        longest = max(map(len, windows))
        # One token each, as of a text from nothing, is what a step reads: no prefill to compile.
        width = 1 if longest == 1 else min(config.block_size, _bucket(longest))
        first = np.array([width - len(window) for window in windows], np.int32)
        tokens = np.array([[0] * (width - len(window)) + window for window in windows], np.int32)
        seen = None
        if self.sampler.repetition_penalty != 1:
            seen = np.zeros((len(texts), self.vocab_size), bool)
            for row, text in zip(seen, texts, strict=True):
                row[text] = True
        rows = sharding.local_rows(steps.mesh, len(texts))
        tokens, first, seen = jax.tree.map(
            lambda x: sharding.to_global(x[rows], rows, steps.eval_sharding, len(texts)),
            (tokens, first, seen),
        )
        slots = _bucket(width + new - 1)
        with jax.set_mesh(steps.mesh):
            if width == 1:
                ids, cache = self.begin(tokens, first, slots)
                return self.step(self.params, ids, (cache, seen), key, i)
            return self.prefill(self.params, tokens, first, seen, key, i, slots)


def decoder(
    steps: Steps, params: Any, sampler: Sampler, vocab_size: int, keep: bool = True
) -> Decoder:
    """steps: of `build_for_use`; params: theirs, which are copied.

    vocab_size: ids that the tokenizer knows; of a model's others none is ever drawn. keep: False
    deletes each of params' layers as it is copied, for a model of which two would not fit.
    """
    model = steps.model
    vocab_size = min(vocab_size, model.config.vocab_size)
    with jax.set_mesh(steps.mesh):
        params = _for_decoding(params, model.dtype, keep)

    def draw(params: Any, tokens: Array, cache: Cache, seen: Any, key: Array, i: Array) -> tuple:
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            hidden, cache = model.apply({"params": params}, tokens, cache=cache)
            scores = logits(hidden[:, -1], head_table(params), model.config)
            # Sorting a vocabulary that is split would move it about more than once.
            scores = constrain(scores, "batch", None)[:, :vocab_size]
            ids = sample_token(scores, jax.random.fold_in(key, i), sampler, seen)
            if seen is not None:
                seen = seen.at[jnp.arange(len(ids)), ids].set(True)
            return constrain(ids, None), (cache, seen)

    def begin(tokens: Array, first: Array, slots: int) -> tuple[Array, Cache]:
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            return constrain(tokens[:, 0], None), _empty_cache(model, first, slots)

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
    )


def _empty_cache(model: GPT, first: Array, slots: int) -> Cache:
    c = model.config
    shape = (len(first), c.n_head, slots, c.head_dim)

    def empty() -> Array:
        return constrain(jnp.zeros(shape, model.dtype), "batch", "act_heads", None, None)

    layers = tuple((empty(), empty()) for _ in range(c.n_layer))
    return Cache(layers, first, jnp.zeros((), jnp.int32))


def _for_decoding(params: Any, dtype: Any, keep: bool) -> Any:
    """Layers apart, and what only products read rounded once, not anew for every token."""

    @jax.jit
    def apart(part: Any) -> Any:
        return jax.tree_util.tree_map_with_path(cast, separate_layers(part))

    def cast(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key.endswith("kernel") else x

    done = {path: leaf for path, leaf in flatten_dict(params).items() if path[0] != "h"}
    if dtype != jnp.float32:
        done[("head_kernel",)] = apart({"head_kernel": params.get("head_kernel", params["wte"])})[
            "head_kernel"
        ]
    if keep:  # then one program, not one for each parameter
        return unflatten_dict(done) | apart({"h": params["h"]})
    for path, leaf in flatten_dict({"h": params["h"]}).items():
        done |= flatten_dict(apart(unflatten_dict({path: leaf})))
        leaf.delete()
    return unflatten_dict(done)


def _bucket(n: int) -> int:
    """The next power of two, from 16 on."""
    return max(16, 1 << (n - 1).bit_length())

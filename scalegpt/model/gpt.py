"""This is the GPT in Flax linen; every parameter and activation carries logical axis names.

Shapes: B rows, T positions, D embed, H heads, N heads of keys and values, K head size, F width
within the MLP, V padded vocabulary, L layers.
Layers are stacked: each block parameter has a leading axis `layers`, whether the compiler loops
over it or unrolls it, so that a checkpoint fits both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from scalegpt.config.recipe import NO_LORA, LoraConfig, ModelConfig
from scalegpt.errors import Mistake
from scalegpt.model import lora
from scalegpt.model.attention import cached_attention, causal_attention
from scalegpt.model.custom_gradients import product, recompute
from scalegpt.model.layers import (
    ACTIVATIONS,
    GATES,
    constrain,
    dropout,
    gathered,
    layer_norm,
    look_up,
    ngram_rows,
    project,
    rms_norm,
    rotary_tables,
    rotate,
    scattered,
)

GATE_INPUTS = 12  # how many channels a gate reads, as in modded-nanogpt and nanochat


@struct.dataclass
class Cache:
    """A cache holds the keys and values of the tokens so far, for decoding.

    layers: (keys, values) of each layer, both [B, N, S, K]. first [B]: where each text begins.
    used: how many slots are filled, of all rows, or [B] of each. Where it is of all, shorter texts
    are padded on the left. recent [B, model.lookback]: the tokens before the next one, or padding.
    grows: its slots become more as they are filled, so that few are empty.
    """

    layers: tuple[tuple[Array, Array], ...]
    first: Array
    used: Array
    recent: Array
    grows: bool = struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        """How many tokens of a row fit into it."""
        return self.layers[0][0].shape[2]


@struct.dataclass
class Context:
    """A context holds what all layers read besides their input: x0, the input of the first one
    [B, T, D], the tokens [B, T], the cos and sin that `rotate` takes, and the `starts` [B, T] of
    each token's conversation or document where these are kept apart."""

    x0: Array
    tokens: Array
    rotary: Any = None
    starts: Array | None = None


class _Layer(nn.Module):
    """This base of all parts of the model has their config and dtype, and makes their weights."""

    config: ModelConfig
    dtype: Any
    attention: str
    lora: LoraConfig = NO_LORA

    def weight(self, name: str, shape: tuple, axes: tuple, fan_in: int | None = None) -> Array:
        """Make a float32 matrix and cast it for products. fan_in: its number of inputs, or None if
        it writes into the residual stream, whose variance must not grow with depth: with fan-in
        init alone, deep models train worse."""
        c = self.config
        if c.init == "gpt2":
            std = 0.02 if fan_in else 0.02 / (2 * c.n_layer) ** 0.5
        else:
            std = 0.5 / fan_in**0.5 if fan_in else 0.0
        kernel = self.table(name, shape, axes, std)
        if self.lora.rank:
            kernel = kernel + self.change(name, shape, axes)
        return kernel.astype(self.dtype)

    def change(self, name: str, shape: tuple, axes: tuple) -> Array:
        """Make the two factors of a matrix's change, and return that, which is 0 at the start."""
        inputs = 1 if axes[0] == "embed" else len(axes) - 1
        # Uniform up to 1 / sqrt(inputs), as in PEFT.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", range(inputs), -1)
        init = nn.with_logical_partitioning(init, (*axes[:inputs], "lora"))
        a = self.param(f"{name}_a", init, (*shape[:inputs], self.lora.rank), jnp.float32)
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("lora", *axes[inputs:]))
        b = self.param(f"{name}_b", init, (self.lora.rank, *shape[inputs:]), jnp.float32)
        return lora.change(self.lora, a, b)

    def table(self, name: str, shape: tuple, axes: tuple, std: float) -> Array:
        """Make a float32 parameter drawn from N(0, std^2)."""
        init = nn.initializers.normal(std) if std else nn.initializers.zeros
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

    def scalars(self, name: str, values: Any) -> Array:
        """Make float32 numbers that are learned, starting from `values`."""
        names = (None,) * np.ndim(values)
        init = nn.with_logical_partitioning(lambda *_: jnp.array(values, jnp.float32), names)
        return self.param(name, init)

    def gain(self, name: str, size: int) -> Array:
        """Make a float32 vector that a norm multiplies with."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return self.param(name, ones, (size,), jnp.float32)

    def bias(self, name: str, shape: tuple, axes: tuple, wanted: bool = False) -> Array | float:
        if not (self.config.bias or wanted):
            return 0.0
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)


class Norm(_Layer):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis in float32, and return the dtype of products."""
        c = self.config
        if c.norm == "rmsnorm":
            gain = (self.gain("scale", x.shape[-1]),) if c.norm_gain else ()
            return recompute(partial(rms_norm, eps=c.norm_eps), x, *gain)
        x = recompute(partial(layer_norm, eps=c.norm_eps), x, self.gain("scale", x.shape[-1]))
        if c.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            x = x + self.param("bias", zeros, x.shape[-1:], jnp.float32)
        return x.astype(self.dtype)


class Attention(_Layer):
    @nn.compact
    def __call__(
        self,
        x: Array,
        layer: Array,
        keys: Array | None,
        context: Context,
        cache: Cache | None = None,
    ) -> tuple[Array, Any]:
        """Return the output [B, T, D] and, with a cache, the layer's keys and values up to x's.

        keys: dropout's, one a row, or None; `key` is the attention's.
        """
        c, (d, h, k) = self.config, (self.config.n_embd, self.config.n_head, self.config.head_dim)
        if c.kv_heads == h:
            q, key, v = self.projections("qkv", x, 3, h, "heads")
        else:
            (q,) = self.projections("q", x, 1, h, "heads")
            key, v = self.projections("kv", x, 2, c.kv_heads, "kv_heads")
        if c.value_embeddings:
            v = v + self.value_embedding(context.tokens, x)
        if c.qk_norm:
            gains = ("q_gain", "k_gain") if c.norm_gain else ()
            gains = [self.gain(name, k) for name in gains] or [None, None]
            q, key = (rms_norm(x, g, c.norm_eps) for x, g in zip((q, key), gains, strict=True))
        if context.rotary is not None:
            q, key = rotate(q, *context.rotary), rotate(key, *context.rotary)
        mask_keys = cached = None
        if keys is not None and c.dropout > 0:
            mask_keys = jax.vmap(lambda row: jax.random.fold_in(row, 3 * layer))(keys)
        if cache is None:
            attend = partial(
                causal_attention,
                implementation=self.attention,
                dropout_rate=c.dropout if keys is not None else 0.0,
                dropout_keys=mask_keys,
                segments=context.starts,
                scale=c.attention_scale,
            )
            y = _by_window(attend, c.windows, layer, q, key, v)
        else:
            past, window = cache.layers[layer], c.windows[layer]
            y, cached = cached_attention(
                *(q, key, v, past, cache.first, cache.used, window, c.attention_scale),
                whole=cache.grows,
            )
        kernel = self.weight("proj_kernel", (h, k, d), ("heads", "kv", "embed"))
        y = product("bthk,hkd->btd", y, kernel) + self.bias("proj_bias", (d,), ("norm",))
        return dropout(y, c.dropout, keys, 3 * layer + 1), cached

    def projections(self, name: str, x: Array, n: int, heads: int, axis: str) -> list[Array]:
        """Multiply x by n matrices that are one parameter; return n arrays [B, T, heads, K]."""
        d, k = self.config.n_embd, self.config.head_dim
        shape, axes = (n, heads, k), ("qkv", axis, "kv")
        kernel = self.weight(f"{name}_kernel", (d, *shape), ("embed", *axes), d)
        y = project("btd,dchk->btchk", x, kernel) + self.bias(
            f"{name}_bias", shape, axes, self.config.qkv_bias
        )
        y = constrain(y, "batch", "act_position", None, "act_heads", None)
        # Indexing would make the gradient a sum of n arrays, each filled up with zeros.
        return [y.squeeze(2) for y in checkpoint_name(jnp.split(y, n, axis=2), "project")]

    def value_embedding(self, tokens: Array, x: Array) -> Array:
        """Look up embeddings [B, T, N, K] of tokens [B, T], scaled for each head by a learned
        scalar or by a gate that reads the layer's input x [B, T, D]."""
        c = self.config
        shape, axes = (c.padded_vocab, c.kv_heads * c.head_dim), ("vocab", "table_embed")
        table = self.table("value_table", shape, axes, 0.02)
        # Gathered before it is looked up, as the token table in `GPT._whole_texts` is.
        rows = look_up(constrain(constrain(table, "act_vocab", None), None, None), tokens)
        if c.value_gates:
            gate = self.scalars("value_gate", np.zeros((min(GATE_INPUTS, c.n_embd), c.kv_heads)))
            read = x[..., : len(gate)].astype(jnp.float32)
            strength = 2 * jax.nn.sigmoid((read[..., None] * gate).sum(-2))
        else:
            strength = self.scalars("value_strength", [1.0] * c.kv_heads)
        rows = rows.reshape(*tokens.shape, c.kv_heads, c.head_dim) * strength[..., None]
        return constrain(rows.astype(self.dtype), "batch", "act_position", "act_heads", None)


def _by_window(attend: Callable, windows: tuple, layer: Any, *qkv: Array) -> Array:
    """Attend with the window of a layer, whose number is traced: kernels need theirs to compile."""
    kinds = sorted(set(windows), key=windows.index)
    branches = [partial(attend, window=window) for window in kinds]
    if len(branches) == 1:
        return branches[0](*qkv)
    which = jnp.array([kinds.index(window) for window in windows])[layer]
    return jax.lax.switch(which, branches, *qkv)


class MLP(_Layer):
    @nn.compact
    def __call__(self, x: Array, layer: Array, keys: Array | None) -> Array:
        c, (d, f) = self.config, (self.config.n_embd, self.config.inner)
        up = self.projection("up", x, f)
        if c.mlp == "plain":
            x = recompute(ACTIVATIONS[c.activation], up)
        else:
            x = recompute(GATES[c.mlp], self.projection("gate", x, f), up)
        kernel = self.weight("down_kernel", (f, d), ("mlp", "embed"))
        x = product("btf,fd->btd", x, kernel) + self.bias("down_bias", (d,), ("norm",))
        return dropout(x, c.dropout, keys, 3 * layer + 2)

    def projection(self, name: str, x: Array, f: int) -> Array:
        kernel = self.weight(f"{name}_kernel", (x.shape[-1], f), ("embed", "mlp"), x.shape[-1])
        x = project("btd,df->btf", x, kernel) + self.bias(f"{name}_bias", (f,), ("mlp",))
        return constrain(x, "batch", "act_position", "act_mlp")


class Block(_Layer):
    @nn.compact
    def __call__(
        self,
        x: Array,
        layer: Any,
        keys: Array | None,
        context: Context,
        cache: Cache | None = None,
    ) -> tuple[Array, Any]:
        shared = (self.config, self.dtype, self.attention, self.lora)
        x, middle = x if self.config.backout else (x, None)
        if self.config.residual_scalars:
            a, b = self.scalars("residual_scalars", [1.0, 0.0]).astype(self.dtype)
            x = a * x + b * context.x0
        normed = gathered(Norm(*shared, name="ln_1")(x))
        y, cached = Attention(*shared, name="attn")(normed, layer, keys, context, cache)
        # Named after it is scattered, for remat=dots: else each device of `tensor` saves it whole,
        # or gathers it again. Nothing backward reads what the MLP adds.
        y = checkpoint_name(scattered(y), "project")
        x = constrain(x + y, "batch", "act_residual", "act_embed")
        normed = gathered(Norm(*shared, name="ln_2")(x))
        y = MLP(*shared, name="mlp")(normed, layer, keys)
        x = constrain(x + scattered(y), "batch", "act_residual", "act_embed")
        if self.config.backout:
            x = x, jnp.where(layer == self.config.n_layer // 2, x, middle)
        return x, cached


class GPT(_Layer):
    """Map token ids [B, T] to final hidden states [B, T, D]; `logits` turns those into logits."""

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        dropout_keys: Array | None = None,
        cache: Cache | None = None,
        begins: Array | None = None,
    ) -> Any:
        """Return the hidden states of whole texts or, with a cache, of tokens that continue it.

        These are two programs: `_whole_texts` to train and evaluate, `_decode` to write. In the
        first, dropout_keys [B], one typed key a row, switch dropout on, and begins [B, T], of bool,
        keep documents apart that begin there. Raises Mistake when T exceeds block_size.
        """
        if (length := tokens.shape[1]) > self.config.block_size:
            raise Mistake(
                f"{length} tokens are more than model.block_size={self.config.block_size}"
            )
        if cache is not None:
            return self._decode(tokens, cache)
        return self._whole_texts(tokens, dropout_keys, begins)

    def _whole_texts(
        self, tokens: Array, dropout_keys: Array | None, begins: Array | None
    ) -> Array:
        c, length = self.config, tokens.shape[1]
        # The table is gathered before it is looked up: for some shapes XLA aborts on a look-up in a
        # vocabulary that is split over tensor inside manual axes.
        table = constrain(constrain(self._token_table(), "act_vocab", None), None, None)
        starts, positions = None, slice(length)
        if c.bos is not None:
            begins = tokens == c.bos
        if begins is not None:
            starts = starts_of(begins)
            positions = jnp.arange(length) - starts
        x = self._embed(table, tokens, positions)
        x = dropout(x, c.dropout, dropout_keys, 3 * c.n_layer)
        rotary = None
        if c.position == "rope":
            rotary = rotary_tables(length, c.head_dim, c.rope_base, c.rope_scaling)
        layers = nn.scan(
            _remat(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.n_layer,
            unroll=1 if c.scan_layers else c.n_layer,
            # The check traces the layers twice, on which the initial values of a seed depend.
            check_constancy_invariants=self.is_initializing(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.attention, self.lora, name="h")
        context = Context(x, tokens, rotary, starts)
        # Constants: where layers are unrolled, XLA then compiles only the window that each has.
        x = (x, x) if c.backout else x
        x, _ = layers(x, np.arange(c.n_layer), dropout_keys, context)
        return self._final_norm(x)

    def _decode(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Return the hidden states of `tokens`, and the cache with these tokens added.

        It needs the parameters as `separate_layers` returns them.
        """
        c, length, back = self.config, tokens.shape[1], self.config.lookback
        # Positions of padding would be negative; no token attends to what is computed there.
        begin = jnp.asarray(cache.used - cache.first)[:, None]
        positions = jnp.maximum(begin + jnp.arange(-back, length), 0)
        read = jnp.concatenate([cache.recent, tokens], 1)
        x = self._embed(self._token_table(), read, positions)[:, back:]
        positions = positions[:, back:]
        rotary = None
        if c.position == "rope":
            # block_size may be far more than any text needs
            tables = rotary_tables(cache.slots, c.head_dim, c.rope_base, c.rope_scaling)
            rotary = tuple(jnp.asarray(table)[positions] for table in tables)
        context, layers = Context(x, tokens, rotary), []
        x = (x, x) if c.backout else x
        for i in range(c.n_layer):
            block = Block(c, self.dtype, self.attention, name=f"h_{i}")
            x, layer = block(x, i, None, context, cache)
            layers.append(layer)
        used, recent = cache.used + length, read[:, length:]
        return self._final_norm(x), cache.replace(layers=tuple(layers), used=used, recent=recent)

    # Parameters are made in this order: wte, wpe, the layers, head_kernel, ln_f. Linen derives its
    # random keys from it, so that another order would change the initial weights of a seed.

    def _token_table(self) -> Array:
        c = self.config
        shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "table_embed")
        return self.table("wte", shape, axes, 0.02 if c.init == "gpt2" else 1.0)

    def _embed(self, table: Array, tokens: Array, positions: Any) -> Array:
        """Return the input of the layers [B, T, D]: embeddings of tokens and of their positions.

        positions: a slice, or [T] or [B, T]. Both are looked up and added in float32: in bfloat16
        the gradients of a frequent token would be summed in bfloat16.
        """
        c, rows = self.config, look_up(table, tokens)
        if c.position == "learned":
            std = 0.02 if c.init == "gpt2" else 1.0
            wpe = self.table("wpe", (c.block_size, c.n_embd), ("position", "embed"), std)
            rows = rows + constrain(wpe, None, None)[positions]
        rows = rms_norm(rows, eps=c.norm_eps) if c.embedding_norm else rows
        if c.smear:
            gate = self.scalars("smear_gate", [0.0] * min(GATE_INPUTS, c.n_embd))
            gate = jax.nn.sigmoid((rows[..., : len(gate)] * gate).sum(-1))
            gate = self.scalars("smear_strength", [0.0]) * gate * _has_before(1, positions, tokens)
            rows = rows + gate[..., None] * jnp.roll(rows, 1, axis=1)
        if c.ngram_rows:
            rows = rows + self._ngram_embeddings(tokens, positions)
        rows = scattered(rows.astype(self.dtype))
        return constrain(rows, "batch", "act_residual", "act_embed")

    def _ngram_embeddings(self, tokens: Array, positions: Any) -> Array:
        """Sum the embeddings of the n-grams of 2 tokens and more that end with each; [B, T, D]."""
        c = self.config
        table = self.table("ngram_table", (c.ngram_rows, c.n_embd), ("ngrams", "table_embed"), 0.0)
        table = constrain(constrain(table, "act_vocab", None), None, None)  # as the token table is
        lengths = range(2, c.ngram + 1)
        # Small, as the optimizer's steps are made for token embeddings, which do not begin at 0.
        strength = self.scalars("ngram_strength", [0.1] * len(lengths))
        found = []
        for n, share in zip(lengths, strength, strict=True):
            share = share * _has_before(n - 1, positions, tokens)
            rows = look_up(table, ngram_rows(tokens, n, c.ngram_rows))
            found.append(share[..., None] * rows)
        return sum(found)

    def _final_norm(self, x: Array) -> Array:
        c = self.config
        if c.backout:
            x, middle = x
            x = x - self.scalars("backout", [0.2]).astype(self.dtype) * middle
        if not c.tie_word_embeddings:  # made here, used by `head_table`
            shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "head_embed")
            self.table("head_kernel", shape, axes, 0.02 if c.init == "gpt2" else 0.0)
        return gathered(Norm(c, self.dtype, self.attention, name="ln_f")(x))


def _has_before(n: int, positions: Any, tokens: Array) -> Array:
    """Return whether each token has n tokens before it in its text; positions: as in `_embed`."""
    if isinstance(positions, slice):
        positions = jnp.arange(tokens.shape[1])
    return positions >= n


def starts_of(begins: Array) -> Array:
    """Return for each position of begins [B, T] the last up to it that is true, or 0: [B, T].

    Tokens of one conversation or document have the same, and learned positions count from there.
    Rotations need no such count, as only the distance of two positions matters to them.
    """
    positions = jnp.arange(begins.shape[1])
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def separate_layers(params: Any) -> Any:
    """Split the stacked parameters h [L, ...] into h_0, h_1, ..., for decoding, which would copy
    each layer out of the stack for every token: that takes longer than all its products."""
    if "h" not in params:
        return params
    layers = range(jax.tree.leaves(params["h"])[0].shape[0])
    split = {f"h_{i}": jax.tree.map(lambda x, i=i: x[i], params["h"]) for i in layers}
    return {name: x for name, x in params.items() if name != "h"} | split


def _remat(config: ModelConfig) -> Callable:
    if config.remat == "none":
        return Block
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.save_only_these_names("project"),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["project"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[config.remat]
    # XLA would merge the recomputation with the forward pass, but cannot do so inside a loop.
    return nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)


def head_table(params: Any) -> Array:
    """Return the head's table [V, D], the embedding's when tied, gathered over fsdp.

    Otherwise the chunked loss would gather it, and reduce its gradient, once a chunk.
    """
    return constrain(params.get("head_kernel", params["wte"]), "act_vocab", None)


def logits(hidden: Array, table: Array, config: ModelConfig) -> Array:
    """Compute float32 logits [..., V] of hidden [..., D]; ids of padding get the lowest float."""
    rows = "bt"[: hidden.ndim - 1]
    y = product(f"{rows}d,vd->{rows}v", hidden, table.astype(hidden.dtype), jnp.float32)
    if cap := config.logit_softcap:
        tanh = config.softcap == "tanh"
        y = cap * (jnp.tanh(y / cap) if tanh else y * jax.lax.rsqrt(y * y + cap * cap))
    padded = jnp.arange(table.shape[0]) >= config.vocab_size
    return jnp.where(padded, jnp.finfo(jnp.float32).min, y)

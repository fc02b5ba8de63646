"""GPT in Flax linen. Every parameter and activation carries logical axis names.

Shapes: B rows, T positions, D embed, H heads, K head size, F = 4 D, V padded vocabulary, L layers.
Layers are stacked: each block parameter has a leading axis `layers`, whether the compiler loops
over it or unrolls it, so that a checkpoint fits both.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from scalegpt.config.recipe import ModelConfig
from scalegpt.errors import Mistake
from scalegpt.model.attention import cached_attention, causal_attention
from scalegpt.model.custom_gradients import alone, product
from scalegpt.model.layers import (
    ACTIVATIONS,
    constrain,
    dropout,
    layer_norm,
    project,
    rms_norm,
    rotary_tables,
    rotate,
)


@struct.dataclass
class Cache:
    """What decoding keeps of the tokens so far.

    layers: of each layer (keys, values), both [B, H, S, K]. All rows write to the same slots of S,
    so shorter texts are padded on the left: first [B] is where each one begins. used: slots filled.
    """

    layers: tuple[tuple[Array, Array], ...]
    first: Array
    used: Array


@struct.dataclass
class Context:
    """What all layers read besides x: what entered the first one [B, T, D], the tokens [B, T], and
    the tables of `rotate`."""

    x0: Array
    tokens: Array
    rotary: Any = None


class _Layer(nn.Module):
    """What all parts share: the configuration, the dtype of products, and how weights are made."""

    config: ModelConfig
    dtype: Any
    attention: str

    def weight(self, name: str, shape: tuple, axes: tuple, fan_in: int | None = None) -> Array:
        """A float32 matrix, cast for products. fan_in: its rows; None: it writes into the residual
        stream, whose variance shall not grow with depth. Fan-in init alone hurts deep models."""
        c = self.config
        if c.init == "gpt2":
            std = 0.02 if fan_in else 0.02 / (2 * c.n_layer) ** 0.5
        else:
            std = 0.5 / fan_in**0.5 if fan_in else 0.0
        return self.table(name, shape, axes, std).astype(self.dtype)

    def table(self, name: str, shape: tuple, axes: tuple, std: float) -> Array:
        """A float32 parameter N(0, std)."""
        init = nn.initializers.normal(std) if std else nn.initializers.zeros
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

    def scalars(self, name: str, values: Any) -> Array:
        """A few float32 numbers, learned from `values` on."""
        init = nn.with_logical_partitioning(lambda *_: jnp.array(values, jnp.float32), (None,))
        return self.param(name, init)

    def bias(self, name: str, shape: tuple, axes: tuple) -> Array | float:
        if not self.config.bias:
            return 0.0
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)


class Norm(_Layer):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis in float32; back to the dtype of products."""
        if self.config.norm == "rmsnorm":
            return alone(rms_norm, x)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        x = alone(layer_norm, x, self.param("scale", ones, x.shape[-1:], jnp.float32))
        if self.config.bias:
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
        """Also this layer's keys and values with those of x, when there is a cache."""
        c, (d, h, k) = self.config, (self.config.n_embd, self.config.n_head, self.config.head_dim)
        kernel = self.weight("qkv_kernel", (d, 3, h, k), ("embed", "qkv", "heads", "kv"), d)
        qkv = project("btd,dchk->btchk", x, kernel)
        qkv = qkv + self.bias("qkv_bias", (3, h, k), ("qkv", "heads", "kv"))
        qkv = constrain(qkv, "batch", "position", None, "act_heads", None)
        # Not by index: three gradients filled up with zeros would be added.
        parts = checkpoint_name(jnp.split(qkv, 3, axis=2), "project")
        q, key, v = (x.squeeze(2) for x in parts)
        if c.value_embeddings:
            v = v + self.value_embedding(context.tokens)
        if c.qk_norm:
            q, key = rms_norm(q), rms_norm(key)
        if context.rotary is not None:
            q, key = rotate(q, *context.rotary), rotate(key, *context.rotary)
        mask_keys = kept = None
        if keys is not None and c.dropout > 0:
            mask_keys = jax.vmap(lambda row: jax.random.fold_in(row, 3 * layer))(keys)
        if cache is None:
            y = causal_attention(
                q,
                key,
                v,
                implementation=self.attention,
                dropout_rate=c.dropout if keys is not None else 0.0,
                dropout_keys=mask_keys,
            )
        else:
            y, kept = cached_attention(q, key, v, cache.layers[layer], cache.first, cache.used)
        kernel = self.weight("proj_kernel", (h, k, d), ("heads", "kv", "embed"))
        y = project("bthk,hkd->btd", y, kernel) + self.bias("proj_bias", (d,), ("norm",))
        return dropout(y, c.dropout, keys, 3 * layer + 1), kept

    def value_embedding(self, tokens: Array) -> Array:
        """[B, T, H, K] of tokens [B, T], by a learned strength of each head."""
        c = self.config
        shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "table_embed")
        table = self.table("value_table", shape, axes, 0.02)
        # Whole, for the same reason as the table of the tokens themselves.
        rows = constrain(constrain(table, "act_vocab", None), None, None)[tokens]
        strength = self.scalars("value_strength", [1.0] * c.n_head)
        rows = rows.reshape(*tokens.shape, c.n_head, c.head_dim) * strength[:, None]
        return constrain(rows.astype(self.dtype), "batch", "position", "act_heads", None)


class MLP(_Layer):
    @nn.compact
    def __call__(self, x: Array, layer: Array, keys: Array | None) -> Array:
        c, (d, f) = self.config, (self.config.n_embd, 4 * self.config.n_embd)
        x = project("btd,df->btf", x, self.weight("up_kernel", (d, f), ("embed", "mlp"), d))
        x = constrain(x + self.bias("up_bias", (f,), ("mlp",)), "batch", "position", "act_mlp")
        x = alone(ACTIVATIONS[c.activation], x)
        kernel = self.weight("down_kernel", (f, d), ("mlp", "embed"))
        x = project("btf,fd->btd", x, kernel) + self.bias("down_bias", (d,), ("norm",))
        return dropout(x, c.dropout, keys, 3 * layer + 2)


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
        part = (self.config, self.dtype, self.attention)
        if self.config.residual_scalars:
            a, b = self.scalars("residual_scalars", [1.0, 0.0]).astype(self.dtype)
            x = a * x + b * context.x0
        normed = Norm(*part, name="ln_1")(x)
        y, kept = Attention(*part, name="attn")(normed, layer, keys, context, cache)
        x = constrain(x + y, "batch", "position", "act_embed")
        y = MLP(*part, name="mlp")(Norm(*part, name="ln_2")(x), layer, keys)
        return constrain(x + y, "batch", "position", "act_embed"), kept


class GPT(_Layer):
    """Token ids [B, T] -> final hidden states [B, T, D]; `logits` turns those into logits."""

    @nn.compact
    def __call__(
        self, tokens: Array, dropout_keys: Array | None = None, cache: Cache | None = None
    ) -> Any:
        """Return hidden states of whole texts; with a cache, of tokens that continue those in it.

        These are two programs: `_whole_texts` to train and evaluate, `_decode` to write. In the
        first, dropout_keys [B], one typed key a row, switch dropout on. Raises Mistake when T
        exceeds block_size.
        """
        if (length := tokens.shape[1]) > self.config.block_size:
            raise Mistake(
                f"{length} tokens are more than model.block_size={self.config.block_size}"
            )
        if cache is not None:
            return self._decode(tokens, cache)
        return self._whole_texts(tokens, dropout_keys)

    def _whole_texts(self, tokens: Array, dropout_keys: Array | None) -> Array:
        c, length = self.config, tokens.shape[1]
        # The table is gathered before it is looked up: for some shapes XLA aborts on a look-up in a
        # vocabulary that is split over tensor inside manual axes.
        table = constrain(constrain(self._token_table(), "act_vocab", None), None, None)
        x = self._embed(table[tokens], slice(length))
        x = dropout(x, c.dropout, dropout_keys, 3 * c.n_layer)
        rotary = rotary_tables(length, c.head_dim, c.rope_base) if c.position == "rope" else None
        layers = nn.scan(
            _remat(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.n_layer,
            unroll=1 if c.scan_layers else c.n_layer,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.attention, name="h")
        x, _ = layers(x, jnp.arange(c.n_layer), dropout_keys, Context(x, tokens, rotary))
        return self._final_norm(x)

    def _decode(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Return the hidden states of `tokens`, and the cache with these tokens in it, too.

        The parameters are `separate_layers` of the usual ones.
        """
        c, length = self.config, tokens.shape[1]
        # Positions of padding are negative; nobody sees what comes of it.
        positions = jnp.maximum(cache.used + jnp.arange(length) - cache.first[:, None], 0)
        x = self._embed(self._token_table()[tokens], positions)
        rotary = None
        if c.position == "rope":
            tables = rotary_tables(c.block_size, c.head_dim, c.rope_base)
            rotary = tuple(jnp.asarray(table)[positions] for table in tables)
        context, layers = Context(x, tokens, rotary), []
        for i in range(c.n_layer):
            block = Block(c, self.dtype, self.attention, name=f"h_{i}")
            x, layer = block(x, i, None, context, cache)
            layers.append(layer)
        return self._final_norm(x), Cache(tuple(layers), cache.first, cache.used + length)

    # Linen's random keys follow from the order in which parameters are made: wte, wpe, the layers,
    # head_kernel, ln_f. Another order would change the initial weights of a seed.

    def _token_table(self) -> Array:
        c = self.config
        shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "table_embed")
        return self.table("wte", shape, axes, 0.02 if c.init == "gpt2" else 1.0)

    def _embed(self, rows: Array, positions: Any) -> Array:
        """Rows of the token table, float32, and those of their positions -> [B, T, D].

        They are looked up and added in float32: in bfloat16 the gradients of a frequent token
        would be summed in bfloat16.
        """
        c = self.config
        if c.position == "learned":
            std = 0.02 if c.init == "gpt2" else 1.0
            wpe = self.table("wpe", (c.block_size, c.n_embd), ("position", "embed"), std)
            rows = rows + constrain(wpe, None, None)[positions]
        rows = rms_norm(rows) if c.embedding_norm else rows
        return constrain(rows.astype(self.dtype), "batch", "position", "act_embed")

    def _final_norm(self, x: Array) -> Array:
        c = self.config
        if not c.tie_word_embeddings:  # made here, used by `head_table`
            shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "table_embed")
            self.table("head_kernel", shape, axes, 0.02 if c.init == "gpt2" else 0.0)
        return Norm(c, self.dtype, self.attention, name="ln_f")(x)


def separate_layers(params: Any) -> Any:
    """The same parameters with h [L, ...] as h_0, h_1, ...: decoding would copy out each layer of
    the stack for every token, which takes longer than all its products."""
    if "h" not in params:
        return params
    layers = range(jax.tree.leaves(params["h"])[0].shape[0])
    parts = {f"h_{i}": jax.tree.map(lambda x, i=i: x[i], params["h"]) for i in layers}
    return {name: x for name, x in params.items() if name != "h"} | parts


def _remat(config: ModelConfig) -> Callable:
    if config.remat == "none":
        return Block
    policy = jax.checkpoint_policies.save_only_these_names("project")
    # Inside a loop nothing can be merged with the forward pass; unrolled it would be.
    return nn.remat(
        Block,
        policy=policy if config.remat == "dots" else None,
        prevent_cse=not config.scan_layers,
    )


def head_table(params: Any) -> Array:
    """The table [V, D] of the head, which is the embedding's when tied, gathered over fsdp once.

    Without this the chunked loss gathers it, and reduces its gradient, once a chunk.
    """
    return constrain(params.get("head_kernel", params["wte"]), "act_vocab", None)


def logits(hidden: Array, table: Array, config: ModelConfig) -> Array:
    """float32 logits [..., V] of hidden [..., D] by the head's table; padded ids get the lowest."""
    rows = "bt"[: hidden.ndim - 1]
    y = product(f"{rows}d,vd->{rows}v", hidden, table.astype(hidden.dtype), jnp.float32)
    if cap := config.logit_softcap:
        y = cap * y * jax.lax.rsqrt(y * y + cap * cap)
    padded = jnp.arange(table.shape[0]) >= config.vocab_size
    return jnp.where(padded, jnp.finfo(jnp.float32).min, y)

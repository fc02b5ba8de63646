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
import numpy as np
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from scalegpt.attention import cached_attention, causal_attention
from scalegpt.config import ModelConfig
from scalegpt.gradients import alone, product

LAYER_NORM_EPS = 1e-5  # GPT-2's; Flax's own default is 1e-6


def constrain(x: Array, *names: str | None) -> Array:
    """Place an activation by its logical axis names. A name without a rule is an error."""
    rules = dict(nn.get_logical_axis_rules())
    if not rules:  # outside of a mesh: initialisation, plain tests
        return x
    spec = PartitionSpec(*(rules[name] if name else None for name in names))
    return jax.lax.with_sharding_constraint(x, spec)


def dropout(x: Array, rate: float, keys: Array | None, site: Array | int) -> Array:
    """Drop entries of x [B, ...], each row by its own key: no mesh or microbatch changes a mask.

    keys: [B] typed PRNG keys, or None: identity. site: which dropout of the model this is.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def rotate(x: Array, cos: Any, sin: Any) -> Array:
    """Rotary position embedding of x [B, T, H, K], cos, sin [T, K/2] or [B, T, K/2], one for each
    position (arXiv:2104.09864)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, K/2] in float32, computed in float64: large angles lose digits in float32."""
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(length)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def project(spec: str, x: Array, kernel: Array) -> Array:
    """x times a weight matrix, under the name by which remat=dots keeps it."""
    return checkpoint_name(product(spec, x, kernel), "project")


@struct.dataclass
class Cache:
    """What decoding keeps of the tokens so far.

    layers: of each layer (keys, values), both [B, H, S, K]. All rows write to the same slots of S,
    so shorter texts are padded on the left: first [B] is where each one begins. used: slots filled.
    """

    layers: tuple[tuple[Array, Array], ...]
    first: Array
    used: Array


class _Layer(nn.Module):
    """What all parts share: the configuration, the dtype of products, and how weights are made."""

    config: ModelConfig
    dtype: Any
    attention: str

    def weight(self, name: str, shape: tuple, axes: tuple, std: float) -> Array:
        """A float32 parameter N(0, std), cast for products. Fan-in init hurts deep models."""
        init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)

    def bias(self, name: str, shape: tuple, axes: tuple) -> Array | float:
        if not self.config.bias:
            return 0.0
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)


def normalize(x: Array, scale: Array) -> Array:
    """LayerNorm of the last axis (arXiv:1607.06450) without bias, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + LAYER_NORM_EPS) * scale


class LayerNorm(_Layer):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis in float32; back to the dtype of products."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        x = alone(normalize, x, self.param("scale", ones, x.shape[-1:], jnp.float32))
        if self.config.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            x = x + self.param("bias", zeros, x.shape[-1:], jnp.float32)
        return x.astype(self.dtype)


class Attention(_Layer):
    @nn.compact
    def __call__(
        self, x: Array, layer: Array, keys: Array | None, rotary: Any, cache: Cache | None = None
    ) -> tuple[Array, Any]:
        """Also this layer's keys and values with those of x, when there is a cache."""
        c, (d, h, k) = self.config, (self.config.n_embd, self.config.n_head, self.config.head_dim)
        kernel = self.weight("qkv_kernel", (d, 3, h, k), ("embed", "qkv", "heads", "kv"), 0.02)
        qkv = project("btd,dchk->btchk", x, kernel)
        qkv = qkv + self.bias("qkv_bias", (3, h, k), ("qkv", "heads", "kv"))
        qkv = constrain(qkv, "batch", "position", None, "act_heads", None)
        q, key, v = (qkv[:, :, i] for i in range(3))
        if rotary is not None:
            q, key = rotate(q, *rotary), rotate(key, *rotary)
        mask_keys = kept = None
        if keys is not None and c.dropout > 0:
            mask_keys = jax.vmap(lambda row: jax.random.fold_in(row, 3 * layer))(keys)
        if cache is None:
            y = causal_attention(
                q, key, v,
                implementation=self.attention, dropout_rate=c.dropout if keys is not None else 0.0,
                dropout_keys=mask_keys,
            )  # fmt: skip
        else:
            y, kept = cached_attention(q, key, v, cache.layers[layer], cache.first, cache.used)
        kernel = self.weight("proj_kernel", (h, k, d), ("heads", "kv", "embed"), residual_std(c))
        y = project("bthk,hkd->btd", y, kernel) + self.bias("proj_bias", (d,), ("norm",))
        return dropout(y, c.dropout, keys, 3 * layer + 1), kept


class MLP(_Layer):
    @nn.compact
    def __call__(self, x: Array, layer: Array, keys: Array | None) -> Array:
        c, (d, f) = self.config, (self.config.n_embd, 4 * self.config.n_embd)
        x = project("btd,df->btf", x, self.weight("up_kernel", (d, f), ("embed", "mlp"), 0.02))
        x = constrain(x + self.bias("up_bias", (f,), ("mlp",)), "batch", "position", "act_mlp")
        x = alone(gelu if c.activation == "gelu" else jax.nn.gelu, x)
        kernel = self.weight("down_kernel", (f, d), ("mlp", "embed"), residual_std(c))
        x = project("btf,fd->btd", x, kernel) + self.bias("down_bias", (d,), ("norm",))
        return dropout(x, c.dropout, keys, 3 * layer + 2)


def gelu(x: Array) -> Array:
    """x times the normal distribution up to x, in float32; as x (arXiv:1606.08415).

    By erf, as in PyTorch: JAX's own is made of erfc, which takes a CPU three times as long.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def residual_std(config: ModelConfig) -> float:
    """Of the two projections into the residual stream, so its variance does not grow with depth."""
    return 0.02 / (2 * config.n_layer) ** 0.5


class Block(_Layer):
    @nn.compact
    def __call__(
        self, x: Array, layer: Any, keys: Array | None, rotary: Any, cache: Cache | None = None
    ) -> tuple[Array, Any]:
        part = (self.config, self.dtype, self.attention)
        normed = LayerNorm(*part, name="ln_1")(x)
        y, kept = Attention(*part, name="attn")(normed, layer, keys, rotary, cache)
        x = constrain(x + y, "batch", "position", "act_embed")
        y = MLP(*part, name="mlp")(LayerNorm(*part, name="ln_2")(x), layer, keys)
        return constrain(x + y, "batch", "position", "act_embed"), kept


class GPT(_Layer):
    """Token ids [B, T] -> final hidden states [B, T, D]; `logits` turns those into logits."""

    @nn.compact
    def __call__(
        self, tokens: Array, dropout_keys: Array | None = None, cache: Cache | None = None
    ) -> Any:
        """dropout_keys: [B] typed keys, one a row, to train with dropout; None: no dropout.

        With a cache the tokens continue those in it, the parameters are `separate_layers` of the
        usual ones, and the result is (hidden states, cache that holds these tokens too).
        Raises ValueError when T exceeds block_size.
        """
        c, length = self.config, tokens.shape[1]
        if length > c.block_size:
            raise ValueError(f"{length} tokens are more than model.block_size={c.block_size}")
        init = nn.initializers.normal(0.02)
        shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "table_embed")
        wte = self.param("wte", nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        # Looked up in float32: gradients of a frequent token would be summed in bfloat16.
        if cache is None:
            # Looked up whole: for some shapes XLA aborts on a look-up in a vocabulary that is
            # split over tensor inside manual axes.
            x = constrain(constrain(wte, "act_vocab", None), None, None)[tokens]
        else:  # positions of padding are negative, and what comes of it is never seen
            x = wte[tokens]
            positions = jnp.maximum(cache.used + jnp.arange(length) - cache.first[:, None], 0)
        if c.position == "learned":
            shape, axes = (c.block_size, c.n_embd), ("position", "embed")
            wpe = self.param("wpe", nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            wpe = constrain(wpe, None, None)
            x = x + (wpe[:length] if cache is None else wpe[positions])
        x = constrain(x.astype(self.dtype), "batch", "position", "act_embed")
        x = dropout(x, c.dropout, dropout_keys, 3 * c.n_layer)

        rotary = None
        if c.position == "rope":
            size = length if cache is None else c.block_size
            rotary = rotary_tables(size, c.head_dim, c.rope_base)
            if cache is not None:
                rotary = tuple(jnp.asarray(table)[positions] for table in rotary)
        part = (c, self.dtype, self.attention)
        if cache is None:
            layers = nn.scan(
                _remat(c),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.n_layer,
                unroll=1 if c.scan_layers else c.n_layer,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = layers(*part, name="h")(x, jnp.arange(c.n_layer), dropout_keys, rotary)
        else:
            kept = []
            for i in range(c.n_layer):
                x, layer = Block(*part, name=f"h_{i}")(x, i, None, rotary, cache)
                kept.append(layer)
            cache = Cache(tuple(kept), cache.first, cache.used + length)
        if not c.tie_word_embeddings:  # made here, used by `head_table`
            shape, axes = (c.padded_vocab, c.n_embd), ("vocab", "table_embed")
            self.param(
                "head_kernel", nn.with_logical_partitioning(init, axes), shape, jnp.float32
            )
        x = LayerNorm(*part, name="ln_f")(x)
        return x if cache is None else (x, cache)


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


def logits(hidden: Array, table: Array, vocab_size: int) -> Array:
    """float32 logits [..., V] of hidden [..., D] by the head's table; padded ids get the lowest."""
    y = jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    padded = jnp.arange(table.shape[0]) >= vocab_size
    return jnp.where(padded, jnp.finfo(jnp.float32).min, y)

"""Define what the model's layers compute; nothing here has parameters of its own.

Shapes: B rows, T positions, H heads, K head size.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from scalegpt.config.recipe import RopeScaling
from scalegpt.model.custom_gradients import product

LAYER_NORM_EPS = 1e-5  # GPT-2's; Flax's own default is 1e-6
RMS_NORM_EPS = 1e-6


def gelu(x: Array) -> Array:
    """Multiply x by the normal distribution function of x, in float32 (arXiv:1606.08415).

    By erf, as in PyTorch: JAX's own is made of erfc, which takes a CPU three times as long.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def squared_relu(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "gelu_tanh": jax.nn.gelu,
    "gelu": gelu,
    "relu2": squared_relu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def swiglu(gate: Array, x: Array) -> Array:
    return jax.nn.silu(gate) * x


def geglu(gate: Array, x: Array) -> Array:
    return gelu(gate) * x


def geglu_tanh(gate: Array, x: Array) -> Array:
    return jax.nn.gelu(gate) * x


GATES = {"swiglu": swiglu, "geglu": geglu, "geglu_tanh": geglu_tanh}  # arXiv:2002.05202


def constrain(x: Array, *names: str | None) -> Array:
    """Shard an activation by its logical axis names. Raises KeyError for a name without a rule."""
    rules = dict(nn.get_logical_axis_rules())
    if not rules:  # outside of a mesh: initialisation, plain tests
        return x
    spec = PartitionSpec(*(rules[name] if name else None for name in names))
    return jax.lax.with_sharding_constraint(x, spec)


def split_over(name: str) -> list[str]:
    """Return the mesh axes, of those larger than 1, that a logical axis is split over."""
    axes = dict(nn.get_logical_axis_rules()).get(name) or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return [a for a in ((axes,) if isinstance(axes, str) else axes) if sizes.get(a, 1) > 1]


def gathered(x: Array) -> Array:
    """Give each device of `tensor` all positions of x [B, T, D], for its products, where the
    residual stream is split over them (act_residual), and backward its part of the gradient's sum.

    So an all-reduce becomes a reduce-scatter and an all-gather, which move as many bytes, and what
    lies between them is computed and kept once (sequence parallelism, arXiv:2205.05198).
    """
    return _through(x, "act_residual", "act_position")


def scattered(x: Array) -> Array:
    """Undo `gathered`: give each device its part of x, the products' sum, and backward all of the
    gradient."""
    return _through(x, "act_position", "act_residual")


def _through(x: Array, *positions: str) -> Array:
    rules = dict(nn.get_logical_axis_rules())
    if rules and rules["act_position"] != rules["act_residual"]:
        for name in positions:
            x = constrain(x, "batch", name, "act_embed")
    return x


def look_up(table: Array, tokens: Array) -> Array:
    """Return the rows [B, T, D] of a table [V, D] that each device has, for tokens [B, T].

    Where tokens are more than the table's rows, each part of B and T reads a copy of its own, and
    sums a gradient of its own. XLA would have every device gather the gradients of all tokens: for
    a model 2,304 wide on a pod of TPU v5e, 4.8 GB instead of 0.5.
    """
    rows, positions = split_over("batch"), split_over("act_position")
    sizes = jax.sharding.get_abstract_mesh().shape
    b, t = (math.prod(sizes[a] for a in some) for some in (rows, positions))
    (B, T), every = tokens.shape, PartitionSpec((*rows, *positions))
    if b * t == 1 or B % b or T % t or B * T <= len(table):
        return table[tokens]
    own = jnp.broadcast_to(table, (b * t, *table.shape))
    parts = tokens.reshape(b, B // b, t, T // t).swapaxes(1, 2).reshape(b * t, B // b, T // t)
    own, parts = (jax.lax.with_sharding_constraint(x, every) for x in (own, parts))
    found = jax.vmap(lambda table, tokens: table[tokens])(own, parts)
    found = jax.lax.with_sharding_constraint(found, every)
    found = found.reshape(b, t, B // b, T // t, -1).swapaxes(1, 2)
    return constrain(found.reshape(B, T, -1), "batch", "act_position", None)


def dropout(x: Array, rate: float, keys: Array | None, site: Array | int) -> Array:
    """Drop entries of x [B, ...], each row by its own key: no mesh or microbatch changes a mask.

    keys: [B] typed PRNG keys, or None to drop nothing. site: which dropout of the model this is.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def layer_norm(x: Array, scale: Array, eps: float | None = None) -> Array:
    """Apply LayerNorm (arXiv:1607.06450) without bias to the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + (eps or LAYER_NORM_EPS)) * scale


def rms_norm(x: Array, gain: Array | None = None, eps: float | None = None) -> Array:
    """Divide x by the root mean square of its last axis, in float32, and return x's dtype
    (arXiv:1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + (eps or RMS_NORM_EPS))
    return (y if gain is None else y * gain).astype(x.dtype)


def ngram_rows(tokens: Array, n: int, rows: int) -> Array:
    """Return in which of a table's rows the n-gram is that ends with each of the tokens [B, T]."""
    hashed = jnp.full(tokens.shape, n, jnp.uint32)
    for back in range(n):  # FNV-1a by words, whose upper bits the lower ones get, too
        hashed = (hashed ^ jnp.roll(tokens, back, 1).astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hashed ^= hashed >> 15
    return (hashed % rows).astype(jnp.int32)


def rotate(x: Array, cos: Any, sin: Any) -> Array:
    """Rotate x [B, T, H, K] by the angles of its positions (rotary embedding, arXiv:2104.09864);
    cos, sin: of these angles, [T, K/2] or [B, T, K/2]."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotary_tables(
    length: int, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin [T, K/2], computed in float64: in float32 large angles lose digits."""
    frequency, factor = base ** (-np.arange(0, head_dim, 2) / head_dim), 1.0
    if scaling:
        kept = _kept_speed(frequency, base, scaling)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
        if scaling.rope_type == "yarn":
            factor = scaling.attention_factor or 1 + 0.1 * math.log(scaling.factor)
    angle = np.arange(length)[:, None] * frequency
    return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)


def _kept_speed(frequency: np.ndarray, base: float, scaling: RopeScaling) -> np.ndarray | float:
    """Return how far each frequency [K/2] stays as it is: 1 is wholly, at 0 the factor divides it.

    Sources: arXiv:2306.15595 (linear), arXiv:2309.00071 (YaRN), Llama 3.1's reference code.
    """
    if scaling.rope_type == "linear":
        return 0.0
    before = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        turns, low = before * frequency / (2 * math.pi), scaling.low_freq_factor
        return np.clip((turns - low) / (scaling.high_freq_factor - low), 0, 1)

    def pair(turns: float) -> float:
        """Return which pair of dimensions, as a number, rotates so often in a text before."""
        return len(frequency) * math.log(before / (turns * 2 * math.pi)) / math.log(base)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(frequency) - 1)
    ramp = (np.arange(len(frequency)) - first) / (last - first or 0.001)
    return 1 - np.clip(ramp, 0, 1)


def project(spec: str, x: Array, kernel: Array) -> Array:
    """Multiply x by a weight matrix; remat=dots saves the product by its name "project"."""
    return checkpoint_name(product(spec, x, kernel), "project")

"""Define what the model's layers compute; nothing here has parameters of its own.

Shapes: B rows, T positions, H heads, K head size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

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


def rotate(x: Array, cos: Any, sin: Any) -> Array:
    """Rotate x [B, T, H, K] by the angles of its positions (rotary embedding, arXiv:2104.09864);
    cos, sin: of these angles, [T, K/2] or [B, T, K/2]."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin [T, K/2], computed in float64: in float32 large angles lose digits."""
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(length)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def project(spec: str, x: Array, kernel: Array) -> Array:
    """Multiply x by a weight matrix; remat=dots saves the product by its name "project"."""
    return checkpoint_name(product(spec, x, kernel), "project")

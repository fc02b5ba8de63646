"""Define functions with gradients written by hand, because those JAX and XLA make are slow."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike


def on_cpu() -> bool:
    """Tell whether the code is traced for a mesh of CPUs now; False where no mesh is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: Array, y: Array, dtype: DTypeLike | None = None) -> Array:
    """Compute einsum(spec, x, y) in `dtype` (default: the operands'), with plain products backward.

    JAX's own transpose would multiply a float32 cotangent by bfloat16 operands, off the fast
    units; the cotangent is rounded first, as the flash kernels do. On a CPU, XLA would fuse the
    neighbours of the product into transposing copies: a third of the time of a whole update.
    """
    return _einsum(spec, x, y, dtype)


def _einsum(spec: str, x: Array, y: Array, dtype: DTypeLike | None = None) -> Array:
    if x.dtype != jnp.bfloat16 or not on_cpu():
        return jnp.einsum(spec, x, y, preferred_element_type=dtype)
    # XLA uses a CPU's bfloat16 units only where the result is float32 and all three arrays have
    # the order of axes below; for others it computes in float32, or calls no fast kernel at all.
    xs, ys, out = spec.replace("->", ",").split(",")
    batch = "".join(axis for axis in out if axis in xs and axis in ys)
    inner = "".join(axis for axis in xs if axis in ys and axis not in out)
    rows, columns = ("".join(a for a in own if a in out and a not in batch) for own in (xs, ys))
    left, right, wide = batch + rows + inner, batch + inner + columns, batch + rows + columns
    if ys == batch + columns + inner:
        right = ys
    x = _row_major(jnp.einsum(f"{xs}->{left}", x))
    y = _row_major(jnp.einsum(f"{ys}->{right}", y))
    z = jnp.einsum(f"{left},{right}->{wide}", x, y, preferred_element_type=jnp.float32)
    return jnp.einsum(f"{wide}->{out}", _row_major(z)).astype(dtype or x.dtype)


def _row_major(x: Array) -> Array:
    """Keep the entries of x's last axis side by side in memory."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _to_bits(*args: Array) -> tuple[Array, ...]:
    """Turn bfloat16 into its bits, uint16, on a CPU, to save arrays for the backward pass. XLA
    stacks those of all layers. It would convert a stack of bfloat16 to float32 and copy that stack
    instead of slicing it."""
    bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return tuple(bits(x) if x.dtype == jnp.bfloat16 and on_cpu() else x for x in args)


def _from_bits(saved: tuple[Array, ...]) -> tuple[Array, ...]:
    """Undo `_to_bits`: turn uint16 back into bfloat16."""
    bfloat16 = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
    return tuple(bfloat16(x) if x.dtype == jnp.uint16 else x for x in saved)


def _product_bwd(spec: str, dtype: Any, saved: tuple[Array, ...], g: Array) -> tuple:
    (x, y), (xs, ys, out) = _from_bits(saved), spec.replace("->", ",").split(",")
    g = g.astype(x.dtype)
    if g.dtype == jnp.bfloat16 and on_cpu():
        g = jax.lax.optimization_barrier(g)  # else each copy below computes it again, in strides
    dx = _einsum(f"{out},{ys}->{xs}", g, y)
    if not on_cpu() or x.size <= g.size:
        return dx, _einsum(f"{xs},{out}->{ys}", x, g)
    # On a CPU the first operand is copied, transposed: let that be the smaller one. The barrier
    # keeps XLA from swapping the operands back.
    transposed = "".join(sorted(ys, key=lambda axis: axis not in out))
    dy = jax.lax.optimization_barrier(_einsum(f"{out},{xs}->{transposed}", g, x))
    return dx, jnp.einsum(f"{transposed}->{ys}", dy)


product.defvjp(lambda spec, x, y, dtype: (product(spec, x, y, dtype), _to_bits(x, y)), _product_bwd)


def recompute(function: Callable, *args: Array) -> Array:
    """Compute function(*args), and again in the backward pass, for which only args are saved.

    On a CPU this is also a barrier to fusion: XLA would fuse the function into each of its
    consumers, some of which read it with strides. Elsewhere it is plain jax.checkpoint: the loop
    over layers would write values saved inside the function to memory and read them back.
    """
    if on_cpu():
        return _recompute_cpu(function, *args)
    # Inside a loop XLA cannot merge the two passes anyway; where layers are unrolled, it may.
    return jax.checkpoint(function, prevent_cse=False)(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recompute_cpu(function: Callable, *args: Array) -> Array:
    return jax.lax.optimization_barrier(function(*args))


def _recompute_bwd(function: Callable, saved: tuple[Array, ...], g: Array) -> tuple:
    return jax.lax.optimization_barrier(jax.vjp(function, *_from_bits(saved))[1](g))


_recompute_cpu.defvjp(lambda f, *args: (_recompute_cpu(f, *args), _to_bits(*args)), _recompute_bwd)


@jax.custom_vjp
def logsumexp(x: Array) -> Array:
    """Compute the logsumexp of the last axis, under a name that `jax.checkpoint` can save: then the
    gradient takes one pass over x, and else three, for the maximum, the sum and the quotients."""
    return jax.nn.logsumexp(x, axis=-1)


def _logsumexp_fwd(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = checkpoint_name(logsumexp(x), "logsumexp")
    return y, (x, y)


def _logsumexp_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    x, y = saved
    return (jnp.exp(x - y[..., None]) * g[..., None],)


logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)

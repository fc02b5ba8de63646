"""Functions whose gradients are written out, because what JAX and XLA make of them is slow."""

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
    """Whether what is traced now is for a mesh of CPUs; not so where no mesh is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: Array, y: Array, dtype: DTypeLike | None = None) -> Array:
    """einsum(spec, x, y) in `dtype` (default: theirs), also its gradients made by plain products.

    JAX's own transpose would multiply a float32 cotangent by bfloat16 operands, off the fast
    units; rounding it first is what the flash kernels do. On a CPU, XLA would fuse what stands
    around the product into transposing copies: a third of the time of a whole update.
    """
    return _einsum(spec, x, y, dtype)


def _einsum(spec: str, x: Array, y: Array, dtype: DTypeLike | None = None) -> Array:
    if x.dtype != jnp.bfloat16 or not on_cpu():
        return jnp.einsum(spec, x, y, preferred_element_type=dtype)
    # XLA has kernels for a CPU's bfloat16 units where the result is float32 and all three lie in
    # memory as here; of what lies otherwise it makes float32 products, or none at all.
    xs, ys, out = spec.replace("->", ",").split(",")
    batch = "".join(axis for axis in out if axis in xs and axis in ys)
    inner = "".join(axis for axis in xs if axis in ys and axis not in out)
    rows, columns = ("".join(a for a in own if a in out and a not in batch) for own in (xs, ys))
    left, right, wide = batch + rows + inner, batch + inner + columns, batch + rows + columns
    if ys == batch + columns + inner:
        right = ys
    x = _in_order(jnp.einsum(f"{xs}->{left}", x))
    y = _in_order(jnp.einsum(f"{ys}->{right}", y))
    z = jnp.einsum(f"{left},{right}->{wide}", x, y, preferred_element_type=jnp.float32)
    return jnp.einsum(f"{wide}->{out}", _in_order(z)).astype(dtype or x.dtype)


def _in_order(x: Array) -> Array:
    """x, its last axis the one without strides."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _kept(*args: Array) -> tuple[Array, ...]:
    """What a gradient needs, where CPUs have bfloat16 as its bits: XLA stacks what the layers keep,
    and makes float32 of a stack of bfloat16, which it then copies instead of taking it apart."""
    bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return tuple(bits(x) if x.dtype == jnp.bfloat16 and on_cpu() else x for x in args)


def _again(kept: tuple[Array, ...]) -> tuple[Array, ...]:
    """The args of `_kept`."""
    bfloat16 = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
    return tuple(bfloat16(x) if x.dtype == jnp.uint16 else x for x in kept)


def _product_bwd(spec: str, dtype: Any, kept: tuple[Array, ...], g: Array) -> tuple:
    (x, y), (xs, ys, out) = _again(kept), spec.replace("->", ",").split(",")
    g = g.astype(x.dtype)
    if g.dtype == jnp.bfloat16 and on_cpu():
        g = jax.lax.optimization_barrier(g)  # or the copies below would each compute it, in strides
    dx = _einsum(f"{out},{ys}->{xs}", g, y)
    if not on_cpu() or x.size <= g.size:
        return dx, _einsum(f"{xs},{out}->{ys}", x, g)
    # A CPU copies the first operand, transposed: let it be the smaller one. The barrier keeps XLA
    # from turning this around again.
    turned = "".join(sorted(ys, key=lambda axis: axis not in out))
    dy = jax.lax.optimization_barrier(_einsum(f"{out},{xs}->{turned}", g, x))
    return dx, jnp.einsum(f"{turned}->{ys}", dy)


product.defvjp(lambda spec, x, y, dtype: (product(spec, x, y, dtype), _kept(x, y)), _product_bwd)


def alone(function: Callable, *args: Array) -> Array:
    """function(*args), computed again for its gradient, which keeps nothing but args. On a CPU it
    is compiled apart from what stands around it: XLA would fuse it into each of its uses, of which
    some read it in strides. Elsewhere the loop over layers would write and read what it keeps."""
    if on_cpu():
        return _alone(function, *args)
    # In a loop nothing can be merged with the forward pass, and unrolled XLA may choose.
    return jax.checkpoint(function, prevent_cse=False)(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _alone(function: Callable, *args: Array) -> Array:
    return jax.lax.optimization_barrier(function(*args))


def _alone_bwd(function: Callable, kept: tuple[Array, ...], g: Array) -> tuple:
    return jax.lax.optimization_barrier(jax.vjp(function, *_again(kept))[1](g))


_alone.defvjp(lambda function, *args: (_alone(function, *args), _kept(*args)), _alone_bwd)


@jax.custom_vjp
def logsumexp(x: Array) -> Array:
    """Of the last axis, under the name by which `jax.checkpoint` can keep it: with it the gradient
    takes one pass over x, and without it three, for the greatest, the sum and the quotients."""
    return jax.nn.logsumexp(x, axis=-1)


def _logsumexp_fwd(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = checkpoint_name(logsumexp(x), "logsumexp")
    return y, (x, y)


def _logsumexp_bwd(kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    x, y = kept
    return (jnp.exp(x - y[..., None]) * g[..., None],)


logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)

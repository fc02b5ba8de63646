"""Functions whose gradients are written out, because what JAX and XLA make of them is slow."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
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
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _product_bwd(spec: str, dtype: Any, operands: tuple[Array, Array], g: Array) -> tuple:
    (x, y), (xs, ys, out) = operands, spec.replace("->", ",").split(",")
    g = g.astype(x.dtype)
    dx = jnp.einsum(f"{out},{ys}->{xs}", g, y)
    if not on_cpu() or x.size <= g.size:
        return dx, jnp.einsum(f"{xs},{out}->{ys}", x, g)
    # A CPU copies the first operand, transposed: let it be the smaller one. The barrier keeps XLA
    # from turning this around again.
    turned = "".join(sorted(ys, key=lambda axis: axis not in out))
    dy = jax.lax.optimization_barrier(jnp.einsum(f"{out},{xs}->{turned}", g, x))
    return dx, jnp.einsum(f"{turned}->{ys}", dy)


product.defvjp(lambda spec, x, y, dtype: (product(spec, x, y, dtype), (x, y)), _product_bwd)


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


def _alone_bwd(function: Callable, args: tuple[Array, ...], g: Array) -> tuple:
    return jax.lax.optimization_barrier(jax.vjp(function, *args)[1](g))


_alone.defvjp(lambda function, *args: (_alone(function, *args), args), _alone_bwd)


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

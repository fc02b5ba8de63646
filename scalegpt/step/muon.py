"""Muon: momentum, orthogonalised (kellerjordan.github.io/posts/muon), for the layers' matrices.

Matrices of one shape are computed as one stack. On a mesh the stack is split over devices by
matrices, so that each orthogonalises whole ones of its own: a resharding each way a shape and
update, in place of several for each of the products of each matrix.

Shapes: N matrices of a stack, D embed, W the other side of a matrix, of the heads or the MLP;
D <= W.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from scalegpt.step.sharding import RULES

# Of Keller Jordan's quintic: fast for small singular values, which end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """count: updates so far. momentum: as the parameters, and placed as they are."""

    count: Array
    momentum: Any


class Layout(NamedTuple):
    """How a parameter is a stack of matrices: which of its axes tell matrices apart, which are
    embed, which the other side; and whether a matrix reads the residual stream or writes it."""

    stack: tuple[int, ...]
    embed: tuple[int, ...]
    other: tuple[int, ...]
    reads: bool


# Query, key and value are matrices of their own, in which the heads lie side by side.
LAYOUTS = {
    "h/attn/qkv_kernel": Layout((0, 2), (1,), (3, 4), reads=True),
    "h/attn/proj_kernel": Layout((0,), (3,), (1, 2), reads=False),
    "h/mlp/up_kernel": Layout((0,), (1,), (2,), reads=True),
    "h/mlp/down_kernel": Layout((0,), (2,), (1,), reads=False),
}


def orthogonalise(x: Array, steps: int) -> Array:
    """U V^T, nearly, of each U S V^T in x [N, D, W], D <= W, in the dtype of x."""
    norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True))
    x = (x / (norm + 1e-8)).astype(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def scale_by_muon(
    momentum: Callable[[Array], Any], steps: int, dtype: Any
) -> optax.GradientTransformation:
    """{path of LAYOUTS: gradient} -> {path: orthogonalised Nesterov momentum, scaled by
    sqrt(max(1, fan out / fan in))}.

    momentum: updates so far -> its factor. dtype: of the products. In float32 and for a constant
    momentum this is optax.contrib.scale_by_muon.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        beta, count = momentum(state.count), state.count + 1
        kept = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        ahead, now = 1 - beta ** (count + 1), 1 - beta**count  # sums that began at zero
        sums = jax.tree.map(lambda m, g: beta * m / ahead + (1 - beta) * g / now, kept, grads)
        return _orthogonalised(sums, steps, dtype), MuonState(count, kept)

    return optax.GradientTransformation(init, update)


def _orthogonalised(updates: dict[str, Array], steps: int, dtype: Any) -> dict[str, Array]:
    groups: dict[tuple, dict[str, Array]] = {}
    for path, x in updates.items():
        matrices = _matrices(x, LAYOUTS[path]).astype(dtype)
        groups.setdefault(matrices.shape[1:], {})[path] = matrices
    out = {}
    for parts in groups.values():
        stack, begin = jnp.concatenate(list(parts.values())), 0
        stack = _each_its_own(lambda x: orthogonalise(x, steps), stack)
        for path, part in parts.items():
            x = _parameter(stack[begin : begin + len(part)], LAYOUTS[path], updates[path])
            out[path], begin = x, begin + len(part)
    return out


def _matrices(x: Array, layout: Layout) -> Array:
    """[N, D, W] of a parameter."""
    sizes = [prod(x.shape[axis] for axis in axes) for axes in layout[:3]]
    return x.transpose(layout.stack + layout.embed + layout.other).reshape(sizes)


def _parameter(matrices: Array, layout: Layout, like: Array) -> Array:
    """The inverse of `_matrices`, scaled by the shape."""
    order = layout.stack + layout.embed + layout.other
    x = matrices.astype(like.dtype).reshape([like.shape[axis] for axis in order])
    _, embed, other = matrices.shape
    ratio = other / embed if layout.reads else embed / other  # fan out / fan in
    return x.transpose(sorted(range(len(order)), key=order.__getitem__)) * max(1, ratio) ** 0.5


def _each_its_own(function: Callable[[Array], Array], stack: Array) -> Array:
    """function of a stack [N, D, W] that lies as the parameters do, by devices that have whole
    matrices of their own. Without a mesh, as under pmap, all do the same."""
    sizes = jax.sharding.get_abstract_mesh().shape
    fsdp, tensor = RULES["embed"], RULES["mlp"]
    if all(sizes.get(axis, 1) == 1 for axis in (fsdp, tensor, "data")):
        return function(stack)
    # One axis after the other: for two at once the compiler would gather the whole stack. Over
    # `data` all hold the same, so that each goes on with a part of it, and only the way back moves.
    hops = [
        P(None, fsdp, tensor),
        P(fsdp, None, tensor),
        P((fsdp, tensor)),
        P((fsdp, tensor, "data")),
    ]
    parts = prod(sizes[axis] for axis in (fsdp, tensor, "data"))
    count = len(stack)
    stack = jnp.pad(stack, ((0, -count % parts), (0, 0), (0, 0)))
    for spec in hops:
        stack = jax.lax.with_sharding_constraint(stack, spec)
    stack = function(stack)
    for spec in reversed(hops):
        stack = jax.lax.with_sharding_constraint(stack, spec)
    return stack[:count]

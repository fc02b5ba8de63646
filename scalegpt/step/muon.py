"""Muon orthogonalises the momentum of the layers' matrices (kellerjordan.github.io/posts/muon).

All matrices of one shape are one stack. On a mesh the stack is resharded so that each device has
whole matrices: once each way for each shape and update, instead of several times for each product
of each matrix.

Shapes: N matrices of a stack, D embed, W the other side of a matrix (heads or MLP).
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from scalegpt.config.recipe import FAST_MOMENTUM
from scalegpt.model.parameters import STACKED, Parameter
from scalegpt.step.sharding import RULES

# Keller Jordan's quintic: small singular values grow fast, and all end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The slow one's share of two momenta (KellerJordan/modded-nanogpt#340), whose mean age is 30
# updates with a slow decay of 0.98.
SLOW_SHARE = 0.5615


class MuonState(NamedTuple):
    """count: updates so far. momentum: shaped and sharded like the parameters."""

    count: Array
    momentum: Any


class TwoTimeState(NamedTuple):
    """This is a MuonState with a second momentum, which is the slow one."""

    count: Array
    momentum: Any
    slow: Any


class Layout(NamedTuple):
    """A layout says which axes of a parameter number its matrices (`stack`), which are a matrix's
    D (`embed`) and W (`other`), and whether it `reads` the residual stream or writes to it."""

    stack: tuple[int, ...]
    embed: tuple[int, ...]
    other: tuple[int, ...]
    reads: bool


def layout(axes: tuple[str | None, ...]) -> Layout:
    """Return the layout of matrices whose axes have these names; their inputs come first.

    Query, key and value are three matrices, in which the heads lie side by side.
    """
    stack = tuple(i for i, axis in enumerate(axes) if axis in STACKED)
    embed = axes.index("embed")
    other = tuple(i for i in range(len(axes)) if i != embed and i not in stack)
    return Layout(stack, (embed,), other, reads=embed < other[0])


def orthogonalise(x: Array, steps: int) -> Array:
    """Approximate U V^T of each matrix U S V^T in x [N, D, W] by Newton-Schulz, in x's dtype."""
    if x.shape[-2] > x.shape[-1]:  # the squares below are those of the shorter side
        return orthogonalise(x.mT, steps).mT
    norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True))
    x = (x / (norm + 1e-8)).astype(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def scale_by_muon(
    momentum: Callable[[Array], Any],
    steps: int,
    dtype: Any,
    parameters: Mapping[str, Parameter],
    slow_decay: float = 0.0,
    slow_start: int = 0,
) -> optax.GradientTransformation:
    """Turn gradients into orthogonalised Nesterov momentum times sqrt(max(1, fan out / fan in)).

    Both are {path: array}. momentum: updates so far -> its factor. dtype: of the products.
    parameters: those of the model, by path. In float32 and for a constant momentum this is
    optax.contrib.scale_by_muon. slow_decay: if not 0, from update `slow_start` on the mean gradient
    is that of two means, a fast and a slow one of this decay, which go on from the one before.
    """

    def init(params: Any) -> MuonState | TwoTimeState:
        count, zeros = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        return TwoTimeState(count, zeros, zeros) if slow_decay else MuonState(count, zeros)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        beta, count = momentum(state.count), state.count + 1
        decay, late = beta, state.count >= slow_start
        if slow_decay:
            decay = jnp.where(late, FAST_MOMENTUM, beta)
        mean = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, grads)
        direction, kept = mean, (mean,)
        if slow_decay:

            def lag(slow: Array, m: Array, g: Array) -> Array:
                return jnp.where(late, slow_decay * slow + (1 - slow_decay) * g, m)

            slow = jax.tree.map(lag, state.slow, mean, grads)
            direction = jax.tree.map(lambda m, s: m + SLOW_SHARE * (s - m), mean, slow)
            kept = mean, slow
        next_bias, bias = 1 - beta ** (count + 1), 1 - beta**count  # as the mean began at zero
        nesterov = jax.tree.map(
            lambda m, g: beta * m / next_bias + (1 - beta) * g / bias, direction, grads
        )
        layouts = {path: layout(parameters[path].axes) for path in nesterov}
        return _orthogonalised(nesterov, layouts, steps, dtype), type(state)(count, *kept)

    return optax.GradientTransformation(init, update)


class RowState(NamedTuple):
    """variance: the mean square of each row, shaped and sharded as a parameter without one side."""

    variance: Any


def even_rows(beta2: float, parameters: Mapping[str, Parameter]) -> optax.GradientTransformation:
    """Divide each row of orthogonalised updates by the root of its mean square over the updates so
    far, and keep the norm of each matrix (NorMuon, arXiv:2510.05491).

    Rows are numbered by the longer side of a matrix, along which those of an orthogonal one differ,
    and by the outputs of a square one. beta2: the decay of the mean.
    """

    def init(params: Any) -> RowState:
        def zeros(path: str, x: Any) -> Any:
            axes, boxed = parameters[path].axes, isinstance(x, nn.LogicallyPartitioned)
            shape = x.value.shape if boxed else x.shape
            kept = [i for i in range(len(axes)) if i not in _along_rows(axes, shape)]
            mean = jnp.zeros([shape[i] for i in kept])
            return x.replace(value=mean, names=tuple(axes[i] for i in kept)) if boxed else mean

        return RowState({path: zeros(path, x) for path, x in params.items()})

    def update(updates: Any, state: RowState, params: Any = None) -> tuple[Any, RowState]:
        evened, variance = {}, {}
        for path, x in updates.items():
            axes = parameters[path].axes
            along = _along_rows(axes, x.shape)
            mean = jnp.square(x).mean(along)
            variance[path] = beta2 * state.variance[path] + (1 - beta2) * mean
            root = jnp.sqrt(jnp.maximum(jnp.expand_dims(variance[path], along), 1e-20))
            matrix = tuple(i for i, axis in enumerate(axes) if axis not in STACKED)
            before, after = (jnp.square(y).sum(matrix, keepdims=True) for y in (x, x / root))
            evened[path] = x / root * jnp.sqrt(before / jnp.maximum(after, 1e-20))
        return evened, RowState(variance)

    return optax.GradientTransformation(init, update)


def _along_rows(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes along which a row of a parameter's matrices lies."""
    way = layout(axes)
    embed, other = (prod(shape[i] for i in side) for side in (way.embed, way.other))
    return way.embed if other > embed or (other == embed and way.reads) else way.other


def _orthogonalised(
    updates: dict[str, Array], layouts: dict[str, Layout], steps: int, dtype: Any
) -> dict[str, Array]:
    groups: dict[tuple, dict[str, Array]] = {}
    for path, x in updates.items():
        matrices = _matrices(x, layouts[path]).astype(dtype)
        groups.setdefault(matrices.shape[1:], {})[path] = matrices
    orthogonal = {}
    for group in groups.values():
        stack, begin = jnp.concatenate(list(group.values())), 0
        stack = _on_whole_matrices(lambda x: orthogonalise(x, steps), stack)
        for path, matrices in group.items():
            end = begin + len(matrices)
            orthogonal[path] = _parameter(stack[begin:end], layouts[path], updates[path])
            begin = end
    return orthogonal


def _matrices(x: Array, layout: Layout) -> Array:
    """Transpose and reshape a parameter to its matrices [N, D, W]."""
    sizes = [prod(x.shape[axis] for axis in axes) for axes in layout[:3]]
    return x.transpose(layout.stack + layout.embed + layout.other).reshape(sizes)


def _parameter(matrices: Array, layout: Layout, like: Array) -> Array:
    """Undo `_matrices`, and scale by the shape."""
    order = layout.stack + layout.embed + layout.other
    x = matrices.astype(like.dtype).reshape([like.shape[axis] for axis in order])
    _, embed, other = matrices.shape
    ratio = other / embed if layout.reads else embed / other  # fan out / fan in
    return x.transpose(sorted(range(len(order)), key=order.__getitem__)) * max(1, ratio) ** 0.5


def _on_whole_matrices(function: Callable[[Array], Array], stack: Array) -> Array:
    """Apply `function` to [N, D, W] while each device holds whole matrices, and reshard back.

    Before and after, each matrix is split over fsdp x context x tensor, as the parameters are. This
    costs all-to-alls each way, instead of collectives inside every Newton-Schulz product. Without a
    mesh, as under pmap, each device computes the whole stack.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    (fsdp, context), tensor = RULES["embed"], RULES["mlp"]
    whole = (fsdp, context, tensor, "data")
    if all(sizes.get(axis, 1) == 1 for axis in whole):
        return function(stack)
    # One mesh axis after the other: for two at once the compiler would gather the whole stack. The
    # devices along `data` hold copies, so that splitting over it moves nothing; the way back does.
    hops = [
        P(None, (fsdp, context), tensor),
        P(context, fsdp, tensor),
        P((context, fsdp), None, tensor),
        P((context, fsdp, tensor)),
        P((context, fsdp, tensor, "data")),
    ]
    devices = prod(sizes[axis] for axis in whole)
    count = len(stack)
    stack = jnp.pad(stack, ((0, -count % devices), (0, 0), (0, 0)))
    for spec in hops:
        stack = jax.lax.with_sharding_constraint(stack, spec)
    stack = function(stack)
    for spec in reversed(hops):
        stack = jax.lax.with_sharding_constraint(stack, spec)
    return stack[:count]

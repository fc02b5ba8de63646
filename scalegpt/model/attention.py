"""Compute causal attention by one of four implementations: XLA, Flax, cuDNN flash, TPU splash.

`resolve` picks the implementation once, at start, so that it can be printed; `causal_attention`
then runs exactly that one. Shapes: B batch, T time, H heads, N heads of keys and values, of which
each serves G = H / N heads of queries, K head dim.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.lax import optimization_barrier as barrier
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from scalegpt.config.types import divisors
from scalegpt.errors import Mistake
from scalegpt.model.custom_gradients import on_cpu, product

AMPERE = (8, 0)  # NVIDIA's first GPUs with units for bfloat16; cuDNN's kernel needs one
IMPLEMENTATIONS = ("xla", "flax", "cudnn", "splash")
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")
# The mesh axes of batch and heads, which only splash has to be told: a copy of ROWS and
# RULES["act_heads"] of step/sharding.py, which decides and which the model may not import.
BATCH_AXES = ("replica", "data", "fsdp")
HEAD_AXES = ("tensor",)
# How "xla" cuts up the queries: more or smaller blocks save little more and compile longer.
QUERY_BLOCKS, LEAST_BLOCK = 4, 64
# Of a TPU's fast memory "xla" takes so many bytes for the scores of a block; two kinds have little.
FAST_MEMORY, SMALL_MEMORY = 2**25, ("TPU v2", "TPU v3")
CONTEXT_BLOCK = 512  # queries that "xla" computes at a time where sequences are split


def resolve(
    implementation: str,
    platform: str,
    block_size: int,
    dropout: float,
    dtype: str,
    head_dim: int = 64,
    device_kind: str = "",
    capability: str = "8.0",
    isolate: bool = False,
    context: int = 1,
) -> str:
    """Choose the implementation, one of IMPLEMENTATIONS; call this once and print the result.

    platform: what the program is lowered for, one of PLATFORMS ("gpu" means "cuda"). device_kind:
    JAX's name for the chip, like "TPU v3". dropout: the training rate of attention dropout. dtype:
    the compute dtype. capability: JAX's compute capability of a GPU, as "7.5" of a T4; "gpu" is
    AMD's platform too, whose capability is no number, as "gfx90a". isolate: whether attention stays
    within a conversation or document. context: how many parts sequences are split into. "auto"
    means splash on a TPU from 2048 positions on, cuDNN on an NVIDIA GPU from Ampere on in bfloat16
    without isolate and on whole sequences, else XLA. Raises Mistake for an unknown name or a choice
    that cannot work.
    """
    if platform not in PLATFORMS:
        raise Mistake(f"unknown platform {platform!r}: use one of {', '.join(PLATFORMS)}")
    # These know no queries that begin after the first key.
    whole = context > 1, f"cannot split sequences over mesh.context={context}"
    checks = {
        "xla": ((context > 1 and dropout > 0, f"has no dropout with mesh.context={context}"),),
        "flax": (whole,),
        "cudnn": (
            whole,
            (platform not in ("gpu", "cuda"), f"needs an NVIDIA GPU, not {platform!r}"),
            (
                (compute_capability(capability) or (0, 0)) < AMPERE,
                "needs an NVIDIA GPU of compute capability 8.0 or more, not "
                f"{device_kind or platform} of {capability}",
            ),
            (dropout > 0, f"has no dropout by row, got dropout={dropout}"),
            # The kernel takes float16 too, but nothing here would scale the loss for it.
            (jnp.dtype(dtype) != jnp.bfloat16, f"needs dtype bfloat16, not {dtype}"),
            # Hopper could do 256; 128 is what every GPU that has the kernel can do.
            (head_dim % 8 or head_dim > 128, f"needs a head dim of 8, 16 .. 128, not {head_dim}"),
        ),
        "splash": (
            (platform != "tpu", f"needs a TPU, not {platform!r}"),
            # Pallas compiles no bfloat16 product for these two: its error E2001.
            (
                device_kind.startswith(("TPU v2", "TPU v3")) and jnp.dtype(dtype) != jnp.float32,
                f"needs a TPU v4 or later in {dtype}, not {device_kind!r}",
            ),
            (dropout > 0, f"has no dropout, got dropout={dropout}"),
            (
                block_size // context % 128,
                f"needs a block size that 128 divides, not {block_size // context}"
                f"{' on a device' if context > 1 else ''}",
            ),
        ),
    }
    obstacles = {name: "; ".join(why for bad, why in checks[name] if bad) for name in checks}
    if implementation == "auto":
        if not obstacles["splash"] and block_size >= 2048:
            return "splash"
        # With segments, JAX gives cuDNN's kernel a mask [B, 1, T, T].
        implementation = "xla" if obstacles["cudnn"] or isolate else "cudnn"
    if implementation not in IMPLEMENTATIONS:
        raise Mistake(f"unknown attention {implementation!r}: use 'auto' or {IMPLEMENTATIONS}")
    if obstacles[implementation]:
        other = "set model.dropout=0" if implementation == "xla" else "use auto or xla"
        raise Mistake(f"attention {implementation!r} {obstacles[implementation]}: {other}")
    return implementation


def compute_capability(text: str) -> tuple[int, int] | None:
    """Parse the compute capability of an NVIDIA GPU, as (7, 5); return None for AMD's "gfx90a"."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


@jax.named_scope("causal_attention")
def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    implementation: str,
    dropout_rate: float = 0.0,
    dropout_keys: Array | None = None,
    segments: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    """Compute softmax(q k' / sqrt(K)) v, in which position t sees the positions 0..t.

    q and the result are [B,T,H,K], k and v [B,T,N,K] of the same dtype, float32 or bfloat16, which
    the operands of the products have, too; scores and softmax are float32. A row may be padded on
    the right only: padding on the left would be attended to.
    dropout_rate: the chance that a weight is dropped; "xla" and "flax" can, and drop the same ones.
    dropout_keys: [B] typed PRNG keys, one a row, so that what a row drops depends neither on the
    mesh nor on its microbatch; needed if dropout_rate > 0.
    segments: [B,T] integers; a position sees only those with its own.
    window: how many positions one sees, itself included, if not all. scale: of q k', if not
    1 / sqrt(K). Raises Mistake for what the implementation cannot do. Sources: Vaswani et al. 2017,
    eq. 1; arXiv:2305.13245 (fewer heads of keys and values).
    """
    fits = q.ndim == 4 == k.ndim and q.shape == (*k.shape[:2], q.shape[2], k.shape[3])
    if (
        not fits
        or k.shape != v.shape
        or q.shape[2] % k.shape[2]
        or not q.dtype == k.dtype == v.dtype
    ):
        got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in (q, k, v))
        raise Mistake(
            "q, k, v must have one dtype and one shape [B,T,H,K], in which k and v may have fewer "
            f"heads that divide q's, got {got}"
        )
    if dropout_rate and implementation in ("cudnn", "splash"):
        raise Mistake(f"{implementation!r} has no dropout, got {dropout_rate}: use 'xla'")
    if implementation == "xla" and not dropout_rate and _context()[0]:
        return _over_context(q, k, v, segments, window, scale)
    drop = _dropout(dropout_rate, dropout_keys, q.shape)
    if implementation == "xla":
        if dropout_rate or on_cpu():
            return _xla(q, k, v, drop, segments, window, scale)
        return _xla_recomputing(q, k, v, segments, window, scale)
    if implementation == "flax":
        return _flax(q, k, v, drop, segments, window, scale)
    if implementation == "cudnn":
        return _cudnn(q, k, v, segments, window, scale)
    if implementation == "splash":
        return _splash(q, k, v, segments, window, scale)
    raise Mistake(f"unknown attention {implementation!r}: resolve() gives {IMPLEMENTATIONS}")


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    past: tuple[Array, Array],
    first: Array,
    used: Array,
    window: int | None = None,
    scale: float | None = None,
    whole: bool = False,
) -> tuple[Array, tuple[Array, Array]]:
    """Attend from new tokens to themselves and those in the cache; return also the cache with both.

    q, k, v: of the new tokens, as for `causal_attention`. past: the cached keys and values,
    [B,N,S,K], of which the slots before `used` are filled; the new tokens take the next T. used:
    one number, or [B]. Row b begins at slot first[b]; nothing attends to the slots before that.
    whole: read the whole cache, and not only as much of it as may be filled.
    """

    def appended(old: Array, new: Array) -> Array:
        if used.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(old, new, used, axis=2)
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(old, new, used)

    past = tuple(appended(old, new.swapaxes(1, 2)) for old, new in zip(past, (k, v), strict=True))
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    query_slots = used[..., None] + jnp.repeat(jnp.arange(q.shape[1]), groups)

    def attend(slots: int, q: Array, k: Array, v: Array) -> Array:
        slot = jnp.arange(slots)
        visible = (slot <= query_slots[..., None]) & (slot >= first[:, None, None])
        if window:
            visible &= slot > query_slots[..., None] - window
        k, v = k[:, :, :slots], v[:, :, :slots]
        q = _grouped(q, groups)
        scores = jnp.einsum("bthk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
        scores = scores * (scale or q.shape[-1] ** -0.5)
        scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return _ungrouped(jnp.einsum("bhts,bhsk->bthk", weights, v), heads)

    size = past[0].shape[2]
    if whole:
        return attend(size, q, *past), past
    # The cache is mostly empty, and reading all of it would cost as much as reading the weights.
    sizes = [2**i for i in range(7, size.bit_length()) if 2**i < size] + [size]
    smallest = jnp.searchsorted(jnp.array(sizes), used.max() + q.shape[1])
    return jax.lax.switch(smallest, [partial(attend, n) for n in sizes], q, *past), past


def _grouped(x: Array, groups: int) -> Array:
    """Lay queries [B,T,H,K] out as [B,T*G,N,K]: those that share keys are rows of one product."""
    if groups == 1:
        return x
    b, t, h, k = x.shape
    return x.reshape(b, t, h // groups, groups, k).swapaxes(2, 3).reshape(b, -1, h // groups, k)


def _ungrouped(y: Array, heads: int) -> Array:
    """Undo `_grouped`."""
    b, _, n, k = y.shape
    if n == heads:
        return y
    return y.reshape(b, -1, heads // n, n, k).swapaxes(2, 3).reshape(b, -1, heads, k)


def _dropout(
    rate: float, keys: Array | None, shape: tuple[int, ...]
) -> Callable[[Array, slice, slice], Array]:
    """Return a function of weights [B,N,t*G,s] and the slices of their queries and keys, which
    drops some weights and scales up the rest. Row b's mask depends on keys[b] alone."""
    if not rate:
        return lambda weights, *_: weights
    batch, time, heads, _ = shape
    if not 0.0 < rate < 1.0:
        raise Mistake(f"dropout_rate must be in [0, 1), got {rate}")
    typed = keys is not None and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or keys.shape != (batch,):
        got = None if keys is None else f"{keys.dtype}{list(keys.shape)}"
        raise Mistake(f"dropout_rate={rate} needs [{batch}] typed dropout_keys, got {got}")
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (heads, time, time)))(keys)

    def drop(weights: Array, queries: slice, keys: slice) -> Array:
        keep = mask[:, :, queries, keys]
        if (n := weights.shape[1]) != heads:
            keep = keep.reshape(batch, n, heads // n, *keep.shape[2:]).swapaxes(2, 3)
            keep = keep.reshape(weights.shape)
        return jnp.where(keep, weights / (1 - rate), 0.0)

    return drop


def _scores(spec: str, q: Array, k: Array) -> Array:
    return product(spec, q, k, jnp.float32)


class _Block(NamedTuple):
    """A block is some queries, the rows where `_grouped` lays them, and the keys that they see."""

    rows: slice
    queries: slice
    keys: slice


def _blocks(time: int, groups: int, window: int | None) -> list[_Block]:
    """Split the queries into blocks, each with the keys from the first that its first query sees to
    its last query. So most of the scores that the mask would hide are not computed."""
    size = max(LEAST_BLOCK, -(-time // QUERY_BLOCKS))
    blocks = []
    for start in range(0, time, size):
        end = min(start + size, time)
        rows, first = slice(start * groups, end * groups), max(0, start - (window or time) + 1)
        blocks.append(_Block(rows, slice(start, end), slice(first, end)))
    return blocks


def _causal_scores(
    q: Array,
    k: Array,
    block: _Block,
    segments: Array | None,
    window: int | None,
    scale: float | None,
) -> Array:
    """Compute the float32 scores [B,N,t*G,s] of a block, from all queries as `_grouped` and all
    keys; those that a query may not see are masked."""
    rows, queries, keys = block
    query, key = (jnp.arange(one.start, one.stop) for one in (queries, keys))
    both = None if segments is None else (segments[:, queries], segments[:, keys])
    return _masked_scores(q[:, rows], k[:, keys], query, key, both, window, scale)


def _masked_scores(
    q: Array,
    k: Array,
    query: Array,
    key: Array,
    segments: tuple[Array, Array] | None,
    window: int | None,
    scale: float | None,
) -> Array:
    """Compute the float32 scores [B,N,t*G,s] of queries at the positions query [t], as `_grouped`
    lays them, and of keys at key [s]. segments: of these, [B,t] and [B,s]."""
    scores = _scores("bthk,bshk->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    groups = q.shape[1] // len(query)
    query = jnp.repeat(query, groups)[:, None]
    seen = query >= key
    if window:
        seen &= query - key < window
    if segments is not None:
        own = jnp.repeat(segments[0], groups, axis=1)[..., None]
        seen &= (own == segments[1][:, None])[:, None]
    # The least float, not -inf: then no row and no gradient can hold inf - inf, a NaN.
    return jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


def _xla(
    q: Array,
    k: Array,
    v: Array,
    drop: Callable[[Array, slice, slice], Array],
    segments: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    (_, time, heads, _), groups = q.shape, q.shape[2] // k.shape[2]
    q, outputs = _grouped(q, groups), []
    for block in _blocks(time, groups, window):
        weights = jax.nn.softmax(_causal_scores(q, k, block, segments, window, scale))
        weights = drop(weights, block.queries, block.keys).astype(v.dtype)
        outputs.append(product("bhts,bshk->bthk", weights, v[:, block.keys]))
    return _ungrouped(jnp.concatenate(outputs, axis=1), heads)


def _context() -> tuple[str | None, int]:
    """Return the mesh axis that splits sequences, if any, and into how many parts."""
    axis = dict(nn.get_logical_axis_rules()).get("act_position")
    parts = jax.sharding.get_abstract_mesh().shape.get(axis, 1) if axis else 1
    return (axis, parts) if parts > 1 else (None, 1)


def _share(implementation: str, q: Array, k: Array) -> tuple[set[str], *tuple[PartitionSpec, ...]]:
    """Return the mesh axes that are to become manual, and how these split arrays [B,T,H,K], the
    segments of queries and those of all keys.

    A caller's shard_map has split the arrays over its manual axes already. Raises Mistake for
    arrays that do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto}
    rows, heads = (tuple(a for a in axes if a in free) for axes in (BATCH_AXES, HEAD_AXES))
    for what, size, axes in (("rows", q.shape[0], rows), ("heads", k.shape[2], heads)):
        if size % (shards := math.prod(mesh.shape[axis] for axis in axes)):
            other = ", or use 'xla' (as for a model's init with one row)"
            raise Mistake(
                f"{implementation!r} cannot split {size} {what} over {shards} devices: change the "
                f"mesh{other if implementation == 'splash' else ''}"
            )
    context = _context()[0]
    every = PartitionSpec(rows, context, heads, None)
    return free, every, PartitionSpec(rows, context), PartitionSpec(rows, None)


def _over_context(
    q: Array, k: Array, v: Array, segments: Array | None, window: int | None, scale: float | None
) -> Array:
    """Compute `_xla` without dropout where each device has the queries of its part of a sequence.

    Each gathers the keys and values of all positions, and computes the scores of CONTEXT_BLOCK
    queries at a time, backward again. All keys are computed, as no program knows its part: half of
    the scores are masked.
    """
    context, _ = _context()

    def attend(q: Array, k: Array, v: Array, own: Array | None, segments: Array | None) -> Array:
        k, v = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v))
        (_, time, heads, _), groups = q.shape, q.shape[2] // k.shape[2]
        size = max(d for d in divisors(time) if d <= CONTEXT_BLOCK)

        @jax.checkpoint
        def block(start: Array, q: Array, own: Array | None) -> Array:
            query, key = start + jnp.arange(size), jnp.arange(k.shape[1])
            both = None if own is None else (own, segments)
            scores = _masked_scores(_grouped(q, groups), k, query, key, both, window, scale)
            weights = jax.nn.softmax(scores).astype(v.dtype)
            return _ungrouped(product("bhts,bshk->bthk", weights, v), heads)

        starts = jax.lax.axis_index(context) * time + jnp.arange(0, time, size)
        blocks = jax.tree.map(
            lambda x: x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1), (q, own)
        )
        y = jax.lax.map(lambda x: block(*x), (starts, *blocks))
        return y.swapaxes(0, 1).reshape(q.shape)

    # All axes are manual: XLA would gather over those that are not, too, before it does over one.
    free, spec, *of_segments = _share("xla", q, k)
    split = partial(jax.shard_map, axis_names=free, out_specs=spec)

    # By hand, so that keys and values are gathered again backward: those of all positions and
    # layers would be too many to keep.
    @jax.custom_vjp
    def attended(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        specs = (spec, spec, spec, *of_segments)
        return split(attend, in_specs=specs)(q, k, v, segments, segments)

    def backward(saved: tuple, g: Array) -> tuple:
        def pull(g: Array, own: Array | None, segments: Array | None, *qkv: Array) -> tuple:
            return jax.vjp(lambda *qkv: attend(*qkv, own, segments), *qkv)[1](g)

        *qkv, segments = saved
        pull = split(pull, in_specs=(spec, *of_segments, spec, spec, spec))
        return *pull(g, segments, segments, *qkv), None

    attended.defvjp(lambda *saved: (attended(*saved), saved), backward)
    return checkpoint_name(attended(q, k, v, segments), "project")


def _xla_recomputing(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    groups = q.shape[2] // k.shape[2]
    y = _recomputing(_grouped(q, groups), k, v, segments, window, scale)
    return _ungrouped(y, q.shape[2])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _recomputing(
    q: Array, k: Array, v: Array, segments: Array | None, window: int | None, scale: float | None
) -> Array:
    """Compute `_xla` without dropout, but recompute the weights backward, as flash attention does,
    from q, k and the log of each query's sum of exponentials. Saving those of all layers would cost
    an accelerator more memory and more time, as reads and writes bound its speed."""
    return _recomputing_fwd(q, k, v, segments, window, scale)[0]


def _recomputing_fwd(
    q: Array, k: Array, v: Array, segments: Array | None, window: int | None, scale: float | None
) -> tuple[Array, tuple]:
    def some(q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Array]:
        outputs, sums = [], []
        for block in _blocks(k.shape[1], q.shape[1] // k.shape[1], window):
            scores = _causal_scores(q, k, block, segments, window, scale)
            if _tpu():  # it computes them within a product sooner than it reads them
                again = _causal_scores(*barrier((q, k)), block, segments, window, scale)
                largest = scores.max(-1, keepdims=True)
                sums.append(largest + jnp.log(jnp.exp(again - largest).sum(-1, keepdims=True)))
            else:
                sums.append(jax.nn.logsumexp(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - sums[-1]).astype(v.dtype)
            outputs.append(jnp.einsum("bhts,bshk->bthk", weights, v[:, block.keys]))
        return jnp.concatenate(outputs, axis=1), jnp.concatenate(sums, axis=2)

    y, sums = checkpoint_name(_by_rows(some, q, k, v, segments), "project")
    return y, (q, k, v, segments, y, sums)


def _recomputing_bwd(
    window: int | None, scale: float | None, saved: tuple, g: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, y, sums = saved
    # Without the barrier XLA would save the scores of the forward pass where layers are unrolled.
    k, g = barrier((k, g))

    def some(
        g: Array, k: Array, q: Array, v: Array, segments: Array | None, y: Array, sums: Array
    ) -> tuple[Array, Array, Array]:
        # dweights' weighted mean
        mean = (y.astype(jnp.float32) * g).sum(-1).swapaxes(1, 2)[..., None]
        time, dq, dk, dv = k.shape[1], [], jnp.zeros_like(k), jnp.zeros_like(v)
        for block in _blocks(time, q.shape[1] // time, window):
            rows, _, keys = block
            scores = _causal_scores(q, k, block, segments, window, scale)
            weights = jnp.exp(scores - sums[:, :, rows]).astype(v.dtype)
            dweights = _scores("bthk,bshk->bhts", g[:, rows], v[:, keys])
            dscores = weights * (dweights - mean[:, :, rows]) * (scale or q.shape[-1] ** -0.5)
            dscores = dscores.astype(q.dtype)
            dq.append(jnp.einsum("bhts,bshk->bthk", dscores, k[:, keys]))
            other_keys = ((0, 0), (keys.start, time - keys.stop), (0, 0), (0, 0))
            dk += jnp.pad(jnp.einsum("bhts,bthk->bshk", dscores, q[:, rows]), other_keys)
            dv += jnp.pad(jnp.einsum("bhts,bthk->bshk", weights, g[:, rows]), other_keys)
        return jnp.concatenate(dq, axis=1), dk, dv

    return *_by_rows(some, g, k, q, v, segments, y, sums), None


def _tpu() -> str | None:
    """Return the kind of TPU that the code is traced for, as "TPU v3", else None."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None and device.platform == "tpu" else None


def _by_rows(function: Callable, *arrays: Array | None) -> tuple[Array, ...]:
    """Compute a function of arrays [B,...] for `_rows_at_once` after the other.

    The first two are queries, or their results' gradient, [B,T*G,N,K] and keys [B,T,N,K].
    """
    (rows, queries, heads, _), keys = arrays[0].shape, arrays[1].shape[1]
    parts = rows // _rows_at_once(rows, 4 * heads * (-(-queries // QUERY_BLOCKS)) * keys)
    if parts == 1:
        return function(*arrays)

    def split(x: Array) -> Array:  # into rows that lie `parts` apart: as many on each device
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    results = jax.lax.map(lambda some: function(*some), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:]), results)


def _rows_at_once(rows: int, bytes_: int) -> int:
    """Return of how many rows, over all devices, the scores are to exist at a time.

    bytes_: of one row's scores. A TPU from v4 on has fast memory for those of a few, which then are
    not written to the slow one and read again by each operation.
    """
    if _tpu() in (None, *SMALL_MEMORY):
        return rows
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in free)
    if rows % shards:
        return rows
    most = FAST_MEMORY * math.prod(mesh.shape[axis] for axis in HEAD_AXES if axis in free)
    fitting = (n for n in divisors(rows // shards) if n * bytes_ <= most)
    return shards * max(fitting, default=1)


_recomputing.defvjp(_recomputing_fwd, _recomputing_bwd)


def _flax(
    q: Array,
    k: Array,
    v: Array,
    drop: Callable[[Array, slice, slice], Array],
    segments: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    seen, all_ = nn.make_causal_mask(jnp.zeros((1, q.shape[1])), dtype=bool), slice(None)
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    if window:
        at = jnp.arange(q.shape[1])
        seen &= at[:, None] - at < window
    if segments is not None:
        same = nn.make_attention_mask(segments, segments, jnp.equal, dtype=bool)
        seen = nn.combine_masks(seen, same, dtype=bool)
    factor = scale and scale * q.shape[-1] ** 0.5
    # By itself Flax rounds the scores to bfloat16 before the float32 softmax, draws dropout from
    # one key for the whole batch and divides q by sqrt(K). Its hooks for the two products correct
    # all three.
    return nn.dot_product_attention(
        q,
        k,
        v,
        force_fp32_for_softmax=True,
        mask=seen,
        qk_attn_weights_einsum=lambda *x: _scores(*x) * factor if factor else _scores(*x),
        attn_weights_value_einsum=lambda spec, w, v: jnp.einsum(
            spec, drop(w, all_, all_).astype(v.dtype), v
        ),
    )


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    window: int | None,
    scale: float | None,
    implementation: str = "cudnn",
) -> Array:
    sides, mask = window and (window - 1, 0), None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None])[:, None]
    return jax.nn.dot_product_attention(
        *(q, k, v),
        mask=mask,
        is_causal=True,
        scale=scale,
        local_window_size=sides,
        implementation=implementation,
    )


def _splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Array:
    """Run TPU splash attention, each device on its own rows and heads; interpret: on any device."""
    # XLA cannot split a kernel over axes that are not manual.
    free, spec, spec_of_own, spec_of_segments = _share("splash", q, k)
    context, parts = _context()
    if (own_time := q.shape[1] // parts) % 128:
        raise Mistake(f"'splash' needs a T that 128 divides, got {own_time}: use 'xla'")
    attend = partial(_splash_kernel, window=window, scale=scale, interpret=interpret)
    attend = partial(attend, context=context, parts=parts)
    if not free:
        return attend(q, k, v, segments, segments)
    split = partial(jax.shard_map, axis_names=free, check_vma=False)
    specs = (spec, spec, spec, spec_of_own, spec_of_segments)
    attend = split(attend, in_specs=specs, out_specs=spec)
    if context:  # keys and values are gathered again backward, as `_over_context` does
        kept = jax.checkpoint_policies.save_only_these_names("project")
        attend = jax.checkpoint(attend, policy=kept)
    varying = tuple(jax.typeof(q).manual_axis_type.varying)
    if not varying:
        return attend(q, k, v, segments, segments)
    # A caller's shard_map that tracks which values vary over its axes (check_vma=True) marks q, k
    # and v, but the kernel marks neither result nor gradient, and JAX refuses the mismatch. So drop
    # the marks, differentiate without, and put them back. A bare pcast would psum the gradient.
    remember = partial(jax.lax.pcast, axis_name=varying, to="varying")
    forget = split(lambda x: x * 1, in_specs=spec, out_specs=spec)
    if segments is not None:
        segments = split(lambda x: x * 1, in_specs=spec_of_segments, out_specs=spec_of_segments)(
            segments
        )

    def forward(segments: Array | None, *qkv: Array) -> tuple[Array, Callable]:
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, segments, segments), *map(forget, qkv))
        return remember(out), pullback

    def backward(pullback: Callable, g: Array) -> tuple:
        return None, *map(remember, pullback(forget(g)))

    marked = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    marked.defvjp(forward, backward)
    return marked(segments, q, k, v)


def _splash_kernel(
    q: Array,
    k: Array,
    v: Array,
    own: Array | None,
    segments: Array | None,
    *,
    window: int | None,
    scale: float | None,
    context: str | None,
    parts: int,
    interpret: bool,
) -> Array:
    """Attend on one device; own, segments: of its queries and of all keys."""
    import jax.experimental.pallas.ops.tpu.splash_attention as splash

    if context:
        k, v = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v))
    (_, own_time, heads, head_dim), time = q.shape, k.shape[1]
    # A window is as much work for every query.
    balanced = parts % 2 == 0 and own_time % 256 == 0 and not window
    if balanced:
        q, own = jax.tree.map(lambda x: _exchanged(x, context, parts), (q, own))
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    block = math.gcd(own_time // (1 + balanced), 512)  # a block has to divide T
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    square = (time, time)
    mask = splash.LocalMask(square, (window - 1, 0), 0) if window else splash.CausalMask(square)
    if balanced:
        device = _computed_by(parts)
        order = sorted(range(2 * parts), key=lambda half: (device[half], half % 2))
        mask.q_sequence = mask.q_sequence.reshape(2 * parts, -1)[order].reshape(-1)
    mask = splash.MultiHeadMask([mask] * heads)
    kernel = splash.make_splash_mha(
        mask=mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
        residual_checkpoint_name="project",
    )
    if context:  # it has the blocks of all queries' masks
        places = NamedSharding(AbstractMesh((parts,), (context,)), PartitionSpec(None, context))

        def of_own_queries(blocks: Array, spec: PartitionSpec) -> Array:
            if context not in spec:
                return blocks
            axis = spec.index(context)
            size = blocks.shape[axis] // parts
            first = jax.lax.axis_index(context) * size
            return jax.lax.dynamic_slice_in_dim(blocks, first, size, axis)

        kernel = jax.tree.map(of_own_queries, kernel, kernel.manual_sharding_spec(places))
    # The kernel does not scale. Scaling in float32 rounds q once, and not at all where K is 4^n.
    q = (q.astype(jnp.float32) * (scale or head_dim**-0.5)).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if segments is not None:
        segments = splash.SegmentIds(own, segments)
    y = jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)
    return _exchanged(y, context, parts, back=True) if balanced else y


def _computed_by(parts: int) -> list[int]:
    """Return which device computes each half of the parts of a sequence.

    The later a query, the more keys it sees. So one gets the first half and the last one, the next
    the second and the last but one, and so on; else the last device would take nearly twice as long
    as the mean.
    """
    return [min(half, 2 * parts - 1 - half) for half in range(2 * parts)]


def _exchanged(x: Array, context: str, parts: int, back: bool = False) -> Array:
    """Send the halves of x [B,T,...] to the devices that compute them, or back.

    Of an even number of parts, each device gets one that was a first half and one that was not.
    """
    halves = []
    for i, half in enumerate(jnp.split(x, 2, axis=1)):
        moves = list(enumerate(_computed_by(parts)[i::2]))
        moves = [move[::-1] for move in moves] if back else moves
        halves.append(jax.lax.ppermute(half, context, moves))
    return jnp.concatenate(halves, axis=1)

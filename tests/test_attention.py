"""Attention against NumPy in float64: values, gradients, causality, precision, dropout, sharding.

Splash, a TPU kernel, runs here in Pallas' interpreter; that it compiles for real TPUs is checked
ahead of time, without one.
"""

import importlib.util
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scalegpt.model import attention
from scalegpt.model.attention import causal_attention, resolve

AXES = ("replica", "data", "fsdp", "tensor")
ON_CPU = ("xla", "flax", "splash")


def run(implementation, q, k, v, **keys):
    """causal_attention, with splash in the interpreter; "stored": what xla is on a CPU's mesh;
    "cudnn": what JAX's own program makes of that kernel's arguments, for the kernel needs a GPU."""
    if implementation == "cudnn":
        return attention._cudnn(
            *(q, k, v, keys.get("segments"), keys.get("window"), keys.get("scale")),
            implementation="xla",
        )
    if implementation == "splash":
        return attention._splash(q, k, v, **keys, interpret=True)
    if implementation == "stored":
        return attention._xla(q, k, v, lambda weights, *_: weights, **keys)
    return causal_attention(q, k, v, implementation=implementation, **keys)


def vjp(implementation, q, k, v, g, **dropout):
    def both(q, k, v, g):
        out, pullback = jax.vjp(lambda *x: run(implementation, *x, **dropout), q, k, v)
        return out, *pullback(g)

    return jax.jit(both)(q, k, v, g)


def reference(q, k, v, g, kept=1.0, segments=None, window=None, scale=None):
    """Output and gradients to q, k, v in float64; kept [B,H,T,T] multiplies the weights."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    if groups := q.shape[2] // k.shape[2] - 1:  # heads of k and v that several of q share
        spread = [np.repeat(x, groups + 1, axis=2) for x in (k, v)]
        out, dq, *shared = reference(q, *spread, g, kept, segments, window, scale)
        return out, dq, *(x.reshape(*k.shape[:3], -1, k.shape[3]).sum(3) for x in shared)
    scale, past = scale or q.shape[-1] ** -0.5, np.tri(q.shape[1], dtype=bool)
    if window is not None:
        past = past & ~np.tri(q.shape[1], k=-window, dtype=bool)
    if segments is not None:
        past = past & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = np.where(past, np.einsum("bthk,bshk->bhts", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshk->bthk", weights * kept, v)
    dv = np.einsum("bhts,bthk->bshk", weights * kept, g)
    dw = np.einsum("bthk,bshk->bhts", g, v) * kept
    ds = weights * (dw - (dw * weights).sum(-1, keepdims=True)) * scale
    return out, np.einsum("bhts,bshk->bthk", ds, k), np.einsum("bhts,bthk->bshk", ds, q), dv


def inputs(shape, dtype="float32", count=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return [jax.random.normal(key, shape, dtype) for key in keys]


def assert_close(got, want, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
        assert error <= tolerance * max(1.0, np.abs(b).max()), f"{name}: error {error:.2e}"


def equations(jaxpr):
    """Every equation of a jaxpr, those of its inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def gradient_jaxpr(implementation, q, k, v, g, **dropout):
    def both(q, k, v, g):
        out, pullback = jax.vjp(lambda *x: run(implementation, *x, **dropout), q, k, v)
        return out, pullback(g)

    return jax.make_jaxpr(both)(q, k, v, g).jaxpr


# --- values and gradients


def test_reference_gradients_are_finite_differences():
    rng = np.random.default_rng(0)
    q, k, v, g = rng.normal(size=(4, 1, 3, 2, 4))
    kept = rng.integers(0, 2, (1, 2, 3, 3)) * 2.0
    grads = reference(q, k, v, g, kept)[1:]
    for i, grad in enumerate(grads):
        for at in np.ndindex(grad.shape):
            sides = []
            for step in (1e-5, -1e-5):
                x = [a.copy() for a in (q, k, v)]
                x[i][at] += step
                sides.append((reference(*x, g, kept)[0] * g).sum())
            assert abs((sides[0] - sides[1]) / 2e-5 - grad[at]) < 1e-8


@pytest.mark.parametrize("implementation", [*ON_CPU, "stored"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [("float32", 1e-5), ("bfloat16", 2e-2)],  # bfloat16 has 8 bits: 2^-8 a rounding, a few in a row
)
def test_values_and_gradients_match_numpy(implementation, dtype, tolerance):
    shape = (2, 128, 2, 64) if implementation == "splash" else (3, 33, 2, 16)
    q, k, v, g = inputs(shape, dtype)
    got = vjp(implementation, q, k, v, g)
    assert all(x.dtype == dtype and x.shape == shape for x in got)
    assert_close(got, reference(q, k, v, g), tolerance)


@pytest.mark.parametrize("implementation", ["xla", "flax", "stored"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 7, 3, 5), (4, 64, 4, 32), (1, 150, 2, 8)])
def test_odd_shapes(implementation, shape):
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        x = inputs(shape, dtype)
        assert_close(vjp(implementation, *x), reference(*x), tolerance)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_nothing_comes_from_the_future(implementation):
    q, k, v, _ = inputs((1, 128, 1, 64))
    out, pullback = jax.vjp(jax.jit(lambda *x: run(implementation, *x)), q, k, v)
    for t in (0, 1, 77, 127):
        _, dk, dv = pullback(jnp.zeros_like(out).at[0, t].set(1.0))
        for name, d in (("k", dk), ("v", dv)):
            reached = np.asarray(jnp.abs(d[0, :, 0]).max(-1))
            assert (reached[t + 1 :] == 0).all(), f"position {t} sees later {name}"
            # With one position to see, its weight is 1 whatever its key: no gradient to k at t=0.
            if (name, t) != ("k", 0):
                assert (reached[: t + 1] > 0).all(), f"position {t} misses earlier {name}"


@pytest.mark.parametrize("implementation", ON_CPU)
def test_right_padding_changes_nothing_before_it(implementation):
    q, k, v, junk = inputs((2, 128, 2, 64))
    padded = [x.at[:, 50:].set(junk[:, 50:] * 100) for x in (q, k, v)]
    np.testing.assert_array_equal(
        run(implementation, q, k, v)[:, :50], run(implementation, *padded)[:, :50]
    )


@pytest.mark.parametrize("implementation", ON_CPU)
def test_huge_scores_stay_finite(implementation):
    q, k, v, g = inputs((1, 128, 1, 64))
    assert all(jnp.isfinite(x).all() for x in vjp(implementation, q * 1e4, k * 1e4, v, g))


@pytest.mark.parametrize("implementation", [*ON_CPU, "stored"])
@pytest.mark.parametrize(
    "heads, segmented, keys",
    [
        (1, False, {}),
        (2, False, {"window": 1}),
        (4, False, {"window": 70, "scale": 0.3}),
        (2, True, {"window": 37, "scale": 0.3}),
    ],
    ids=str,
)
def test_fewer_heads_of_keys_windows_and_a_scale_match_numpy(
    implementation, heads, segmented, keys
):
    segments = {"segments": SEGMENTS} if segmented else {}
    q, g = inputs((4, 128, 4, 16), count=2)
    k, v = inputs((4, 128, heads, 16), count=2, seed=1)
    got = vjp(implementation, q, k, v, g, **jax.tree.map(jnp.asarray, segments), **keys)
    assert_close(got, reference(q, k, v, g, **segments, **keys), 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_dropout_with_shared_keys_and_a_window_matches_numpy(implementation):
    (q, g), (k, v) = inputs((2, 80, 4, 8), count=2), inputs((2, 80, 2, 8), count=2, seed=1)
    keys = jax.random.split(jax.random.key(4), 2)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.75, (4, 80, 80)))(keys)
    got = vjp(implementation, q, k, v, g, dropout_rate=0.25, dropout_keys=keys, window=9)
    assert_close(got, reference(q, k, v, g, np.asarray(kept) / 0.75, window=9), 1e-5)


# --- precision


# "xla" computes the scores again for the gradient.
@pytest.mark.parametrize(("implementation", "products"), [("xla", 7), ("flax", 6)])
def test_bfloat16_has_float32_scores_and_softmax(implementation, products):
    jaxpr = gradient_jaxpr(implementation, *inputs((2, 8, 2, 16), "bfloat16"))
    names = [eqn.primitive.name for eqn in equations(jaxpr)]
    assert "exp" in names and names.count("dot_general") == products
    for eqn in equations(jaxpr):
        dtypes = {v.aval.dtype.name for v in eqn.invars}
        if eqn.primitive.name in ("exp", "reduce_max", "reduce_sum", "div", "sub"):
            on_weights = eqn.invars[0].aval.shape[:3] == (2, 2, 8)
            assert not on_weights or dtypes == {"float32"}, eqn
        if eqn.primitive.name == "dot_general":
            assert dtypes == {"bfloat16"}, f"a product left bfloat16: {eqn}"


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_scores_that_bfloat16_cannot_tell_apart(implementation):
    # Scores 256 and 257: the second is no bfloat16 number and would round to the first.
    q = jnp.array([2.0, 2, 0, 0], "bfloat16") * jnp.ones((1, 2, 1, 1), "bfloat16")
    k = jnp.array([[256.0, 0, 0, 0], [256, 1, 0, 0]], "bfloat16").reshape(1, 2, 1, 4)
    v = jnp.array([[0.0] * 4, [1.0] * 4], "bfloat16").reshape(1, 2, 1, 4)
    out = run(implementation, q, k, v)
    np.testing.assert_allclose(out[0, 1, 0], 1 / (1 + np.exp(-1)), rtol=4e-3)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_complex_and_no_float64(implementation, dtype):
    """Fault 16 of nanogpt-jax: complex64 rotations and a float64 mask."""
    x = inputs((2, 128, 2, 64), dtype)
    jaxprs = [gradient_jaxpr(implementation, *x)]
    if implementation != "splash":
        keys = jax.random.split(jax.random.key(0), 2)
        jaxprs.append(gradient_jaxpr(implementation, *x, dropout_rate=0.1, dropout_keys=keys))
    if implementation == "xla":
        with jax.enable_x64(True):  # without it float64 could not even be asked for
            jaxprs.append(gradient_jaxpr(implementation, *x))
    for jaxpr in jaxprs:
        values = [v for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars)]
        dtypes = {str(getattr(v.aval, "dtype", "")) for v in values}
        assert not dtypes & {"complex64", "complex128", "float64"}


# --- dropout


def dropped_weights(implementation, keys, rate, time=64, heads=4):
    """The weights [B,H,T,T] as used: all scores equal, and v the identity, so that out shows them.

    Multiplied by the number of positions seen: 1 where nothing is dropped."""
    zero = jnp.zeros((len(keys), time, heads, time))
    v = jnp.broadcast_to(jnp.eye(time)[None, :, None], zero.shape)
    out = causal_attention(
        zero, zero, v, implementation=implementation, dropout_rate=rate, dropout_keys=keys
    )
    return np.asarray(out.transpose(0, 2, 1, 3) * jnp.arange(1, time + 1)[:, None])


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_dropout_keeps_the_right_share_and_scales_it(implementation):
    past = np.tri(64, dtype=bool)
    for rate in (0.1, 0.5):
        weights = dropped_weights(implementation, jax.random.split(jax.random.key(1), 8), rate)
        assert (weights[..., ~past] == 0).all()
        kept = weights[..., past]
        np.testing.assert_allclose(kept[kept > 0], 1 / (1 - rate), rtol=1e-5)
        error = 4 * np.sqrt(rate * (1 - rate) / kept.size)
        assert abs((kept > 0).mean() - (1 - rate)) < error
        # Every row and every head draws its own.
        masks = (weights > 0).reshape(8 * 4, -1)
        assert len(np.unique(masks, axis=0)) == 32


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_dropout_of_a_row_follows_its_key(implementation):
    q, k, v, _ = inputs((4, 16, 2, 8))
    keys = jax.random.split(jax.random.key(2), 4)
    order = jnp.array([2, 0, 3, 1])

    def out(q, k, v, keys):
        return run(implementation, q, k, v, dropout_rate=0.3, dropout_keys=keys)

    whole = out(q, k, v, keys)
    np.testing.assert_array_equal(out(q[order], k[order], v[order], keys[order]), whole[order])
    halves = [out(q[i : i + 2], k[i : i + 2], v[i : i + 2], keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, atol=1e-6)
    assert jnp.abs(out(q, k, v, keys[order]) - whole).max() > 0.1


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_dropout_does_not_depend_on_the_mesh(implementation):
    mesh = jax.make_mesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    x = inputs((8, 16, 4, 8), count=3)
    keys = jax.random.split(jax.random.key(3), 8)

    @jax.jit
    def out(q, k, v, keys):
        return run(implementation, q, k, v, dropout_rate=0.3, dropout_keys=keys)

    one = out(*x, keys)
    spread = out(*(jax.device_put(a, heads) for a in x), jax.device_put(keys, rows))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, one, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_dropout_gradients_match_numpy(implementation):
    x = inputs((2, 16, 2, 16))
    keys = jax.random.split(jax.random.key(4), 2)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.75, (2, 16, 16)))(keys)
    got = vjp(implementation, *x, dropout_rate=0.25, dropout_keys=keys)
    assert_close(got, reference(*x, kept=np.asarray(kept) / 0.75), 1e-5)


def test_dropout_keeps_the_expectation_and_xla_and_flax_agree():
    q, k, v, _ = inputs((1, 8, 2, 8))
    keys = jax.random.split(jax.random.key(5), 4000)

    def mean(implementation, keys):
        one = lambda key: run(  # noqa: E731
            implementation, q, k, v, dropout_rate=0.2, dropout_keys=key[None]
        )
        return jax.jit(jax.vmap(one))(keys).mean(0)

    a = mean("xla", keys)
    np.testing.assert_allclose(a, run("xla", q, k, v), atol=0.06)  # 4 sigma of 4000 draws
    np.testing.assert_allclose(a, mean("flax", keys), atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "flax"])
def test_zero_dropout_is_no_dropout(implementation):
    q, k, v, _ = inputs((2, 16, 2, 8))
    keys = jax.random.split(jax.random.key(6), 2)
    np.testing.assert_array_equal(
        run(implementation, q, k, v),
        run(implementation, q, k, v, dropout_rate=0.0, dropout_keys=keys),
    )


# --- segments

SEGMENTS = np.array([[0] * 30 + [30] * 1 + [31] * 97, [0] * 128, [0] * 64 + [64] * 64, [7] * 128])


@pytest.mark.parametrize("implementation", ["xla", "stored", "flax", "splash", "cudnn"])
def test_a_position_sees_its_own_segment_only(implementation):
    x = inputs((4, 128, 2, 32))
    segments = jnp.asarray(SEGMENTS, jnp.int32)
    got = vjp(implementation, *x, segments=segments)
    assert_close(got, reference(*x, segments=SEGMENTS), 1e-5)
    # Exactly nothing comes from another segment: another value there changes no bit.
    q, k, v, g = x
    g = g * (SEGMENTS[0] == 31)[None, :, None, None]
    alone = [a[0, :31] for a in vjp(implementation, q, k, v, g, segments=segments)[1:]]
    assert all((a == 0).all() for a in alone)


def test_with_segments_cudnn_is_taken_where_it_is_asked_for():
    for asked in ("auto", "xla"):
        assert resolve(asked, "cuda", 1024, 0, "bfloat16", isolate=True) == "xla"
    assert resolve("cudnn", "cuda", 1024, 0, "bfloat16", isolate=True) == "cudnn"
    assert (
        resolve("auto", "tpu", 2048, 0, "bfloat16", device_kind="TPU v5e", isolate=True) == "splash"
    )


# --- the choice, and mistakes


@pytest.mark.parametrize(
    "asked, platform, block_size, dropout, dtype, want",
    [
        ("auto", "cpu", 1024, 0.0, "bfloat16", "xla"),
        ("auto", "cpu", 64, 0.2, "float32", "xla"),
        ("auto", "gpu", 1024, 0.0, "bfloat16", "cudnn"),
        ("auto", "cuda", 1000, 0.0, "bfloat16", "cudnn"),
        ("auto", "gpu", 1024, 0.1, "bfloat16", "xla"),
        ("auto", "gpu", 1024, 0.0, "float32", "xla"),
        ("auto", "rocm", 1024, 0.0, "bfloat16", "xla"),
        ("auto", "tpu", 2048, 0.0, "bfloat16", "splash"),
        ("auto", "tpu", 8192, 0.0, "float32", "splash"),
        ("auto", "tpu", 1024, 0.0, "bfloat16", "xla"),
        ("auto", "tpu", 2048, 0.1, "bfloat16", "xla"),
        ("auto", "tpu", 2100, 0.0, "bfloat16", "xla"),
        ("xla", "tpu", 2048, 0.1, "bfloat16", "xla"),
        ("flax", "gpu", 100, 0.1, "float32", "flax"),
        ("splash", "tpu", 128, 0.0, "bfloat16", "splash"),
        ("cudnn", "gpu", 100, 0.0, "bfloat16", "cudnn"),
    ],
)
def test_resolve(asked, platform, block_size, dropout, dtype, want):
    assert resolve(asked, platform, block_size, dropout, dtype) == want


def test_resolve_minds_the_head_dim():
    for head_dim, want in ((64, "cudnn"), (128, "cudnn"), (60, "xla"), (256, "xla")):
        assert resolve("auto", "gpu", 1024, 0.0, "bfloat16", head_dim=head_dim) == want
    with pytest.raises(ValueError, match="head dim.*not 60"):
        resolve("cudnn", "gpu", 1024, 0.0, "bfloat16", head_dim=60)


@pytest.mark.parametrize(
    "kind, capability, want",
    [
        ("NVIDIA A100-SXM4-40GB", "8.0", "cudnn"),
        ("NVIDIA L4", "8.9", "cudnn"),
        ("NVIDIA B200", "10.0", "cudnn"),
        ("Tesla T4", "7.5", "xla"),
        ("Tesla V100-SXM2-16GB", "7.0", "xla"),
        ("AMD Instinct MI250X", "gfx90a", "xla"),
        ("AMD Radeon RX 7900 XTX", "gfx1100", "xla"),
        ("Metal", "unknown", "xla"),
    ],
)
def test_resolve_minds_the_gpu_for_jax_calls_each_of_them_gpu(kind, capability, want):
    chip = {"device_kind": kind, "capability": capability}
    assert resolve("auto", "gpu", 1024, 0.0, "bfloat16", **chip) == want
    if want == "xla":
        message = f"compute capability 8.0 or more, not {kind} of {capability}.*use auto or xla"
        with pytest.raises(ValueError, match=message):
            resolve("cudnn", "gpu", 1024, 0.0, "bfloat16", **chip)


def test_resolve_minds_the_chip():
    """The TPU v3's compiler refuses splash in bfloat16 (E2001), and takes it in float32."""
    for kind, dtype, want in (
        ("TPU v3", "bfloat16", "xla"),
        ("TPU v3", "float32", "splash"),
        ("TPU v4", "bfloat16", "splash"),
        ("TPU v5 lite", "bfloat16", "splash"),
        ("TPU7x", "bfloat16", "splash"),
    ):
        assert resolve("auto", "tpu", 2048, 0.0, dtype, device_kind=kind) == want
    with pytest.raises(ValueError, match="TPU v4 or later in bfloat16, not 'TPU v3'"):
        resolve("splash", "tpu", 2048, 0.0, "bfloat16", device_kind="TPU v3")


@pytest.mark.parametrize(
    "asked, platform, block_size, dropout, dtype, message",
    [
        ("cudnn", "cpu", 1024, 0.0, "bfloat16", "NVIDIA GPU, not 'cpu'.*use auto or xla"),
        ("cudnn", "rocm", 1024, 0.0, "bfloat16", "NVIDIA GPU, not 'rocm'"),
        ("cudnn", "gpu", 1024, 0.1, "bfloat16", "dropout=0.1"),
        ("cudnn", "gpu", 1024, 0.0, "float32", "bfloat16, not float32"),
        ("splash", "gpu", 2048, 0.0, "bfloat16", "TPU, not 'gpu'"),
        ("splash", "cpu", 2048, 0.0, "bfloat16", "TPU, not 'cpu'"),
        ("splash", "tpu", 2048, 0.2, "bfloat16", "dropout=0.2"),
        ("splash", "tpu", 1000, 0.0, "bfloat16", "128 divides, not 1000"),
        ("flash", "gpu", 1024, 0.0, "bfloat16", "'flash'.*'auto' or .'xla', 'flax'"),
        ("auto", "TPU v3", 1024, 0.0, "bfloat16", "unknown platform 'TPU v3'"),
    ],
)
def test_resolve_refuses(asked, platform, block_size, dropout, dtype, message):
    with pytest.raises(ValueError, match=message):
        resolve(asked, platform, block_size, dropout, dtype)


@pytest.mark.parametrize(
    "message, change",
    [
        ("unknown attention 'auto'.*resolve", {"implementation": "auto"}),
        ("needs .2. typed dropout_keys, got None", {"dropout_rate": 0.1}),
        ("got uint32.2, 2.", {"dropout_rate": 0.1, "dropout_keys": jnp.zeros((2, 2), "uint32")}),
        ("must be in", {"dropout_rate": 1.0}),
        ("must be in", {"dropout_rate": -0.1}),
        ("'cudnn' has no dropout", {"dropout_rate": 0.1, "implementation": "cudnn"}),
        ("'splash' has no dropout", {"dropout_rate": 0.1, "implementation": "splash"}),
        ("128 divides, got 16", {"implementation": "splash"}),
        ("one dtype and one shape", {"v": jnp.zeros((2, 16, 2, 8), "bfloat16")}),
        ("one dtype and one shape", {"k": jnp.zeros((2, 8, 2, 8))}),
        ("that divide q's", dict.fromkeys("kv", jnp.zeros((2, 16, 3, 8)))),
    ],
)
def test_mistakes_are_value_errors(message, change):
    x = jnp.zeros((2, 16, 2, 8))
    with pytest.raises(ValueError, match=message):
        causal_attention(**({"q": x, "k": x, "v": x, "implementation": "xla"} | change))


def test_one_key_too_few_is_a_value_error():
    x = jnp.zeros((2, 16, 2, 8))
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=r"got key<fry>\[1\]"):
        causal_attention(x, x, x, implementation="xla", dropout_rate=0.1, dropout_keys=keys)


def test_import_loads_no_kernel_and_touches_no_device():
    code = (
        "import sys, jax, scalegpt.model.attention;"
        "assert not [m for m in sys.modules if 'splash_attention' in m];"
        "jax.config.update('jax_num_cpu_devices', 3)"  # refused once JAX has its devices
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cudnn_is_asked_for_causal_flash_attention(monkeypatch):
    """Lowered for CUDA with a pretended cuDNN; running it takes a GPU."""
    try:
        # Private: JAX lowers for cuDNN only where it finds a GPU and cuDNN, or is made to.
        from jax._src.cudnn import fused_attention_stablehlo as cudnn  # noqa: TID251

        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
        monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
        monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    except (ImportError, AttributeError) as missing:
        pytest.skip(f"this JAX cannot be made to lower for cuDNN without a GPU: {missing}")
    x = jax.ShapeDtypeStruct((2, 1024, 12, 64), "bfloat16")
    kv = jax.ShapeDtypeStruct((2, 1024, 3, 64), "bfloat16")

    def both(q, k, v, g, **keys):
        call = lambda *x: causal_attention(*x, implementation="cudnn", **keys)  # noqa: E731
        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(g)

    text = jax.jit(both).trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    assert text.count("CAUSAL") == 2 and text.count("0.125") == 2  # 64 ** -0.5
    both = jax.jit(partial(both, window=256, scale=0.3))
    text = both.trace(x, kv, kv, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("0.3") == 2 and text.count("sliding_window_length\\22: 256") == 2


# --- a TPU's fast memory


@pytest.mark.parametrize("heads", [4, 2])
def test_scores_of_a_few_rows_and_computed_twice_are_the_same(monkeypatch, heads):
    q, g = inputs((4, 128, 4, 16), count=2)
    k, v = inputs((4, 128, heads, 16), count=2, seed=1)
    keys = {"segments": jnp.asarray(SEGMENTS), "window": 70}
    whole = vjp("xla", q, k, v, g, **keys)
    monkeypatch.setattr(attention, "_rows_at_once", lambda rows, bytes_: 2)
    monkeypatch.setattr(attention, "_tpu", lambda: "TPU v4")
    assert_close(vjp("xla", q, k, v, g, **keys), whole, 1e-6)


@pytest.mark.parametrize(
    ("kind", "sizes", "rows", "heads", "manual", "want"),
    [
        ("TPU v4", (1, 1, 1, 1), 64, 12, (), 2),
        ("TPU v5 lite", (1, 4, 2, 1), 64, 12, (), 16),
        ("TPU v5 lite", (1, 4, 2, 1), 24, 12, ("data",), 4),
        ("TPU v5 lite", (1, 1, 1, 4), 64, 12, (), 8),
        ("TPU v5 lite", (1, 1, 1, 1), 8, 64, (), 1),
        ("TPU v5 lite", (1, 1, 2, 1), 7, 12, (), 7),
        ("TPU v3", (1, 1, 1, 1), 64, 12, (), 64),
        ("cpu", (1, 1, 1, 1), 64, 12, (), 64),
    ],
)
def test_scores_of_so_many_rows_fit_a_tpus_fast_memory(kind, sizes, rows, heads, manual, want):
    device = AbstractDevice(kind, None, "cpu" if kind == "cpu" else "tpu")
    types = tuple(AxisType.Manual if axis in manual else AxisType.Auto for axis in AXES)
    mesh = AbstractMesh(sizes, AXES, types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention._rows_at_once(rows, heads * 256 * 1024 * 4) == want


# --- sharding


def split_vjp(mesh, implementation, nested, check_vma=True):
    """Output and gradients, by jit over the mesh or inside a shard_map over replica and data."""

    def both(q, k, v, g, segments):
        out, pullback = jax.vjp(lambda *x: run(implementation, *x, segments=segments), q, k, v)
        return out, *pullback(g)

    if not nested:
        return jax.jit(both)
    manual = ("replica", "data")
    return jax.jit(
        jax.shard_map(
            both,
            mesh=mesh,
            in_specs=P(manual),
            out_specs=P(manual),
            axis_names=set(manual),
            check_vma=check_vma,
        )
    )


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(
    "nested, check_vma",
    [(False, True), (True, True), (True, False)],
    ids=["jit", "in_shard_map", "in_unchecked_shard_map"],
)
def test_values_and_gradients_on_a_mesh(implementation, nested, check_vma):
    """Under check_vma=True a careless splash would sum its gradient over the data axis."""
    mesh = jax.make_mesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    x = inputs((4, 128, 2, 32))
    with jax.set_mesh(mesh):
        got = split_vjp(mesh, implementation, nested, check_vma)(*x, jnp.asarray(SEGMENTS))
    assert_close(got, reference(*x, segments=SEGMENTS), 1e-5)


def test_splash_says_what_it_cannot_split():
    mesh = jax.make_mesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        for rows, heads, message in ((1, 2, "1 rows over 4"), (4, 3, "3 heads over 2")):
            x = jax.ShapeDtypeStruct((rows, 128, heads, 8), "float32")
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(lambda x: run("splash", x, x, x), x)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "chip, sizes, nested, segmented",
    [
        ("v5e", (1, 1, 2, 2), False, False),
        ("v5e", (1, 2, 1, 2), True, True),
        ("v4", (1, 1, 2, 2), False, True),
        ("v4", (1, 2, 2, 1), True, False),
    ],
)
def test_splash_compiles_for_tpu(chip, sizes, nested, segmented):
    """The real TPU compiler takes splash, forward and backward, split without any collective."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no compiler for TPUs (pip install 'scalegpt[plan]')")
    from jax.experimental import topologies

    name, options = {
        "v5e": ("v5e:2x2", {}),
        "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    }[chip]
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4, devices=chips)
    rows = NamedSharding(mesh, P(("replica", "data", "fsdp"), None, "tensor"))
    x = jax.ShapeDtypeStruct((8, 2048, 4, 64), "bfloat16", sharding=rows)
    kv, segments, window = x, None, None
    if segmented:
        rows = NamedSharding(mesh, P(("replica", "data", "fsdp"), None))
        segments = jax.ShapeDtypeStruct((8, 2048), "int32", sharding=rows)
        kv, window = jax.ShapeDtypeStruct((8, 2048, 2, 64), x.dtype, sharding=x.sharding), 700

    def both(q, k, v, g, segments):
        call = partial(causal_attention, implementation="splash", segments=segments, window=window)
        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(g)

    if nested:
        spec = P(("replica", "data"))
        both = jax.shard_map(
            both, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"replica", "data"}
        )
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(x, kv, kv, x, segments).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in text and f"{collective}-start(" not in text

"""scalegpt/model/custom_gradients.py: on a CPU it computes otherwise, and the same."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from scalegpt.model import custom_gradients
from scalegpt.model.custom_gradients import recompute
from scalegpt.model.layers import gelu, layer_norm

B, T, D, F, H, K = 2, 5, 6, 24, 2, 3
CPU = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
SHAPES = dict(zip("btsdfhkcv", (B, T, T, D, F, H, K, 3, 7), strict=True))


def random(axes: str, seed: int) -> np.ndarray:
    shape = [SHAPES[axis] for axis in axes]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def program(function, *args) -> str:
    return str(jax.make_jaxpr(jax.grad(lambda *a: function(*a).sum()))(*args))


@pytest.mark.parametrize("spec", ["btf,fd->btd", "btd,df->btf", "btd,dchk->btchk", "bthk,hkd->btd"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_gradients_of_a_product_are_those_in_float64(spec, on_cpu):
    """Of all the model's products with weights; the first is turned around on a CPU."""
    xs, ys, out = spec.replace("->", ",").split(",")
    x, y, g = (random(axes, i) for i, axes in enumerate((xs, ys, out)))

    def gradient(x, y):
        return jax.vjp(partial(custom_gradients.product, spec), x, y)[1](jnp.asarray(g))

    if on_cpu:
        with jax.set_mesh(CPU):
            assert ("optimization_barrier" in str(jax.make_jaxpr(gradient)(x, y))) == (
                spec == "btf,fd->btd"
            )
            dx, dy = jax.jit(gradient)(x, y)
    else:
        dx, dy = gradient(x, y)
    wide = partial(np.einsum, dtype=np.float64)
    np.testing.assert_allclose(dx, wide(f"{out},{ys}->{xs}", g, y), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dy, wide(f"{xs},{out}->{ys}", x, g), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "btf,fd->btd",
        "btd,df->btf",
        "btd,dchk->btchk",
        "bthk,hkd->btd",
        "bthk,bshk->bhts",
        "bhts,bshk->bthk",
        "btd,vd->btv",
    ],
)
def test_bfloat16_on_a_cpu_is_rounded_once_and_keeps_no_stack_of_it(spec):
    """Of all products of the model; XLA itself refuses some of these at run time."""
    xs, ys, out = spec.replace("->", ",").split(",")
    x, y, g = (jnp.asarray(random(axes, i), "bfloat16") for i, axes in enumerate((xs, ys, out)))

    def both(x, y):
        z, pullback = jax.vjp(partial(custom_gradients.product, spec), x, y)
        return z, *pullback(g)

    with jax.set_mesh(CPU):
        found = jax.jit(both)(x, y)
        kept = jax.tree.leaves(jax.vjp(partial(custom_gradients.product, spec), x, y)[1])
    assert {leaf.dtype.name for leaf in kept} == {"uint16"}
    x, y, g = (np.asarray(a, np.float64) for a in (x, y, g))
    wanted = (
        np.einsum(spec, x, y),
        np.einsum(f"{out},{ys}->{xs}", g, y),
        np.einsum(f"{xs},{out}->{ys}", x, g),
    )
    for mine, want in zip(found, wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(mine, np.float64), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "axes"), [(gelu, ["btf"]), (jax.nn.gelu, ["btf"]), (layer_norm, ["btd", "d"])]
)
def test_recompute_is_the_function_itself_and_its_gradient(function, axes):
    args = [random(a, i) for i, a in enumerate(axes)]
    g = random(axes[0], 9)

    def both(function, *args):
        y, pullback = jax.vjp(function, *args)
        return y, *pullback(jnp.asarray(g))

    with jax.set_mesh(CPU):
        found = jax.jit(partial(both, partial(recompute, function)))(*args)
    for mine, want in zip(found, both(function, *args), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 3e-7), ("bfloat16", 2**-8)])
def test_exact_gelu_and_its_derivative_are_those_of_the_definition(dtype, rounding):
    x = np.linspace(-9, 9, 1001).astype(dtype)
    wide = x.astype(np.float64)
    below = np.array([0.5 * math.erfc(-v / 2**0.5) for v in wide])
    density = np.exp(-(wide**2) / 2) / (2 * np.pi) ** 0.5
    y, pullback = jax.vjp(gelu, jnp.asarray(x))
    (slope,) = pullback(jnp.ones_like(y))
    assert y.dtype == slope.dtype == dtype
    for found, want in ((y, wide * below), (slope, below + wide * density)):
        error = np.abs(np.asarray(found, np.float64) - want)
        assert (error / np.maximum(1, np.abs(wide))).max() < rounding


def test_accelerators_compile_it_as_they_like():
    x = random("btf", 0)
    barriers = {}
    for kind in ("cpu", "tpu"):
        device = AbstractDevice(kind, None, kind)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            barriers[kind] = program(partial(recompute, jax.nn.gelu), x).count("barrier")
    assert barriers["cpu"] > barriers["tpu"] == 0
    assert "barrier" not in program(partial(recompute, jax.nn.gelu), x), "there is no mesh"


def test_the_gradient_of_logsumexp_is_in_float64_and_takes_no_sum_where_it_was_kept():
    x, g = random("btd", 0) * 10, random("bt", 1)
    keep = jax.checkpoint_policies.save_only_these_names("logsumexp")
    kept = jax.checkpoint(lambda x: custom_gradients.logsumexp(x * 2), policy=keep)
    y, pullback = jax.vjp(kept, x)
    wide = np.exp(2 * x.astype(np.float64))
    np.testing.assert_allclose(y, np.log(wide.sum(-1)), rtol=1e-5)
    want = 2 * g[..., None] * wide / wide.sum(-1, keepdims=True)
    np.testing.assert_allclose(pullback(g)[0], want, rtol=1e-4, atol=1e-5)
    assert "reduce" not in str(jax.make_jaxpr(pullback)(g))

"""Sequences split over `context` have the numbers of whole ones, on any mesh, in every part."""

import math
import re
from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scalegpt.config import Config
from scalegpt.errors import Mistake
from scalegpt.model import attention
from scalegpt.planning.hlo import collectives
from scalegpt.step import build as step
from scalegpt.step import pmap, sharding

LAYERS, D, T, VOCAB, ROWS, UPDATES = 2, 64, 64, 67, 8, 3
ONE = {"data": 1}
CUBE = {"data": 2, "context": 2, "tensor": 2}
LONG = {"data": 1, "fsdp": 2, "context": 4}
# Whatever mixes neighbours or counts positions, so that a border between two shards would show.
LEARNED = dict(smear=True, ngram_rows=64, value_embeddings=True, isolate=True, bos=3)
ROTATED = dict(position="rope", window=24, window_pattern="SL", n_kv_head=2, remat="dots")


def make_config(mesh: dict, width: int = T, **model) -> Config:
    shards = math.prod(size for axis, size in mesh.items() if axis in sharding.ROWS)
    return Config(
        model=dict(n_layer=LAYERS, n_head=4, n_embd=D, block_size=width, vocab_size=VOCAB)
        | dict(vocab_multiple=8, loss_chunk=8, dtype="float32", scan_layers=True)
        | model,
        mesh=mesh,
        batch=dict(sequences=ROWS, microbatch=ROWS // shards // 2),
        data=dict(path="unused"),
        optim=dict(lr=1e-3, min_lr=1e-4, warmup_steps=1, steps=30),
        run=dict(out_dir="unused"),
    )


def build(mesh: dict, **model) -> step.Steps:
    config = make_config(mesh, **model)
    here = sharding.make_mesh(config.mesh, jax.devices()[: math.prod(mesh.values())])
    return step.build_steps(config, here, *step.resolve(config, here))


def updates(steps: step.Steps) -> dict[str, np.ndarray]:
    """Losses and gradient norms of some updates, the evaluation of each row, and the parameters."""
    state, rng, figures = steps.init(), np.random.default_rng(0), []
    for _ in range(UPDATES):
        tokens = rng.integers(0, VOCAB, (ROWS, T + 1), dtype=np.int32)
        tokens[:, ::7] = 3  # a document begins
        tokens[:, 5:9] = ~tokens[:, 5:9]  # masked
        batch = jax.device_put(tokens.reshape(*steps.layout, T + 1), steps.batch_sharding)
        state, metrics = steps.train(state, batch)
        figures.append((float(metrics["train/loss"]), float(metrics["train/grad_norm"])))
    windows = jax.device_put(tokens[: ROWS // 2], steps.eval_sharding)
    sums, counts = steps.evaluate(state.params, windows)
    return {"figures": np.array(figures), "evaluated": np.asarray(sums / counts)}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "model"), [(CUBE, LEARNED), (LONG, ROTATED)])
def test_updates_and_evaluation_are_those_of_whole_sequences(mesh, model):
    whole, split = (updates(build(m, **model)) for m in (ONE, mesh))
    for name, values in whole.items():
        np.testing.assert_allclose(split[name], values, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_only_keys_and_values_move_along_context_besides_what_fsdp_moves():
    """A layer's weights are gathered over fsdp x context as over fsdp alone; no activation is."""
    steps = build(LONG, position="rope", n_kv_head=2)
    found = collectives(steps.lower().compile().as_text(), steps.mesh)
    in_layers = [c for c in found if c.depth == 2 and c.bytes > 4 * LAYERS * D]
    keys = ROWS // 2 // 2 * T * 2 * 16 * 4  # bytes, of a microbatch's rows on a device
    along = sorted((c.kind, c.bytes) for c in in_layers if c.axes == ("context",))
    forward_and_backward = [("all-gather", keys)] * 4
    assert along == [*forward_and_backward, *[("reduce-scatter", keys)] * 2]
    weights = [c for c in in_layers if c.axes != ("context",)]
    assert {c.axes for c in weights} == {("fsdp", "context")}
    largest = 4 * D * 4 * D  # a matrix of the MLP
    assert max(c.bytes for c in weights if c.kind == "all-gather") == largest
    chunks = [c for c in found if c.times > 2 * LAYERS]
    assert not chunks, "something moves once a chunk of the loss"


# --- attention alone


def vjp(attend, mesh=None, nested=False):
    """Output and gradients of attend(q, k, v, segments), compiled for sequences split on a mesh."""

    def both(q, k, v, g, segments):
        out, pullback = jax.vjp(lambda *x: attend(*x, segments=segments), q, k, v)
        return out, *pullback(g)

    if nested:
        axes = ("replica", "data")
        both = jax.shard_map(
            both, mesh=mesh, in_specs=P(axes), out_specs=P(axes), axis_names=set(axes)
        )
    return jax.jit(both)


def mesh_of(*sizes: int, devices=None) -> jax.sharding.Mesh:
    devices = devices or jax.devices()[: math.prod(sizes)]
    auto = (AxisType.Auto,) * len(sharding.AXES)
    return jax.make_mesh(sizes, sharding.AXES, axis_types=auto, devices=devices)


SPLIT = (("act_position", "context"),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xla", "splash"])
@pytest.mark.parametrize(
    ("sizes", "nested", "apart", "window"),
    [((1, 2, 1, 2, 2), True, True, None), ((1, 1, 2, 4, 1), False, False, 100)],
)
def test_values_and_gradients_of_split_sequences(name, sizes, nested, apart, window):
    rng, time = np.random.default_rng(0), 1024
    q, g = (jnp.asarray(rng.normal(size=(4, time, 4, 32)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(4, time, 2, 32)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(0, 5, (4, time))), jnp.int32) if apart else None
    of = partial(attention.causal_attention, window=window)
    whole = vjp(partial(of, implementation="flax"))(q, k, v, g, segments)
    attend = {
        "xla": partial(of, implementation="xla"),
        "splash": partial(attention._splash, window=window, interpret=True),
    }[name]
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(SPLIT):
        split = vjp(attend, mesh, nested)(q, k, v, g, segments)
    for ours, theirs in zip(split, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_xla_holds_the_scores_of_a_block_of_its_own_queries_and_no_more():
    time, context = 8192, 8
    x = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
    with jax.set_mesh(mesh_of(1, 1, 1, context, 1)), nn.logical_axis_rules(SPLIT):
        attend = partial(attention.causal_attention, implementation="xla")
        hlo = vjp(attend).lower(x, x, x, x, None).compile().as_text()
    shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", hlo)
    most = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert most == attention.CONTEXT_BLOCK * time < time * time // context


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_splash_gives_all_devices_the_same_work_and_sends_each_half_of_a_part_to_one(parts):
    device, even = attention._computed_by(parts), list(range(parts))
    assert sorted(device[::2]) == sorted(device[1::2]) == even
    work = [sum(h for h in range(2 * parts) if device[h] == d) for d in even]
    assert set(work) == {2 * parts - 1}


@pytest.mark.oracle
def test_splash_on_split_sequences_compiles_for_tpu():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = mesh_of(1, 2, 1, 2, 1, devices=chips)
    where = NamedSharding(mesh, P(("replica", "data", "fsdp"), "context"))
    q, kv = (jax.ShapeDtypeStruct((4, 4096, h, 64), "bfloat16", sharding=where) for h in (4, 2))
    segments = jax.ShapeDtypeStruct((4, 4096), "int32", sharding=where)
    attend = partial(attention.causal_attention, implementation="splash")
    with jax.set_mesh(mesh), nn.logical_axis_rules(SPLIT):
        compiled = vjp(attend, mesh, True).lower(q, kv, kv, q, segments).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    found = [c for c in collectives(text, mesh) if c.axes]
    assert {c.axes for c in found} == {("context",)}
    # k and v, again backward, and their gradients; q, again backward, y, and their gradients.
    large = Counter(c.kind for c in found if c.bytes > 1e6)
    assert large == {"all-gather": 4, "reduce-scatter": 2, "collective-permute": 5}


# --- what is refused


@pytest.mark.parametrize(
    ("implementation", "platform", "changes", "match"),
    [
        ("flax", "cpu", {}, "'flax' cannot split sequences over mesh.context=4: use auto or xla"),
        ("cudnn", "cuda", {}, "'cudnn' cannot split sequences over mesh.context=4: use auto"),
        ("xla", "cpu", {"dropout": 0.1}, "'xla' has no dropout with mesh.context=4: set"),
        ("auto", "cuda", {"dropout": 0.1}, "'xla' has no dropout with mesh.context=4"),
        ("splash", "tpu", {"block_size": 256}, "'splash' needs a block size .* not 64"),
    ],
)
def test_attention_that_cannot_split_sequences_is_refused(implementation, platform, changes, match):
    keys = dict(block_size=2048, dropout=0.0, dtype="bfloat16", context=4) | changes
    with pytest.raises(Mistake, match=match):
        attention.resolve(implementation, platform, **keys)


def test_auto_chooses_attention_that_can_split_sequences():
    keys = dict(block_size=8192, dropout=0.0, dtype="bfloat16", context=4)
    assert attention.resolve("auto", "tpu", **keys) == "splash"
    assert attention.resolve("auto", "cuda", **keys) == "xla"
    assert attention.resolve("auto", "cuda", **keys | {"context": 1}) == "cudnn"


def test_pmap_is_refused():
    config = make_config({"data": 1, "context": 2})
    with pytest.raises(Mistake, match="whole copy .* mesh.context=2; set --mesh.context=1"):
        pmap.build_steps(config, mesh_of(1, 1, 1, 2, 1), "float32", "xla")


def test_sequences_that_do_not_divide_are_refused():
    with pytest.raises(Mistake, match="block_size=66 does not divide over mesh.context=4"):
        build(LONG, width=66)
    with pytest.raises(Mistake, match="n_embd=68 .* over mesh.fsdp x context=8; use a smaller"):
        build(LONG, n_embd=68)

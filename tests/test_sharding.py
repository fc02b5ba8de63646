"""The mesh changes speed, never numbers; every array lies where the rules say; traffic is least."""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from scalegpt.config import BatchConfig, Config, MeshConfig
from scalegpt.model import attention
from scalegpt.planning.hlo import collectives, table
from scalegpt.step import build as step
from scalegpt.step import health, sharding

LAYERS, D, T, CHUNK, VOCAB, ROWS = 2, 64, 32, 8, 65, 32
UPDATES, MORE_UPDATES = 10, 30
ONE = (("data", 1),)
FSDP8, DATA8 = (("data", 1), ("fsdp", 8)), (("data", 8),)
HYBRID = (("data", 2), ("fsdp", 4))
CUBE = (("data", 2), ("fsdp", 2), ("tensor", 2))
TENSOR4 = (("data", 1), ("tensor", 4))
SLICES = (("replica", 2), ("data", 2), ("tensor", 2))


def make_config(mesh: tuple, accumulation: int = 1, dropout: float = 0.0, **model) -> Config:
    shards = int(np.prod([n for axis, n in mesh if axis != "tensor"]))
    return Config(
        model=dict(n_layer=LAYERS, n_head=4, n_embd=D, block_size=T, vocab_size=VOCAB)
        | dict(loss_chunk=CHUNK, dropout=dropout, dtype="float32", attention="xla")
        | dict(scan_layers=True)  # compiles faster, and traffic is counted by loop
        | model,
        mesh=dict(mesh),
        batch=dict(sequences=ROWS, microbatch=ROWS // shards // accumulation),
        data=dict(path="unused"),
        optim=dict(lr=1e-3, min_lr=1e-4, warmup_steps=3, steps=MORE_UPDATES),
        run=dict(out_dir="unused"),
    )


@cache
def build(*args, **keywords) -> step.Steps:
    config = make_config(*args, **keywords)
    devices = jax.devices()[: int(np.prod([n for _, n in args[0]]))]
    return step.build_steps(config, sharding.make_mesh(config.mesh, devices), "float32", "xla")


@cache
def compiled(*args):
    """The training step of a case: run by some tests, and read as HLO by others."""
    return build(*args).lower().compile()


def train(case: tuple, updates: int = UPDATES) -> SimpleNamespace:
    """Losses of some updates on fixed random rows, and the parameters before and after."""
    steps, update = build(*case), compiled(*case)
    a, m = steps.layout
    rng = np.random.default_rng(0)
    state = steps.init()
    first, losses, norms = jax.tree.map(np.asarray, state.params), [], []
    for _ in range(updates):
        tokens = rng.integers(0, VOCAB, (ROWS, T + 1), dtype=np.int32)
        tokens[:, 1::2] = tokens[:, :-1:2]  # half of the targets can be learnt
        tokens = jax.device_put(tokens.reshape(a, m, T + 1), steps.batch_sharding)
        state, metrics = update(state, tokens)
        losses.append(float(metrics["train/loss"]))
        norms.append(float(metrics["train/grad_norm"]))
    return SimpleNamespace(losses=losses, norms=norms, first=first, state=state)


@cache
def trained(*case) -> SimpleNamespace:
    return train(case)


# Dropout masks are keyed by row, so they are the same on every mesh and accumulation too.
CASES = [
    (DATA8, 1, 0.0),
    (DATA8, 4, 0.1),
    (FSDP8, 4, 0.1),
    (HYBRID, 1, 0.0),
    (HYBRID, 2, 0.1),
    (HYBRID, 4, 0.1),
    (CUBE, 2, 0.1),
    (TENSOR4, 1, 0.1),
    (SLICES, 4, 0.1),
]


# Together they have each mesh axis.
FAST = [
    (CUBE, 2, 0.1),
    pytest.param((HYBRID, 2, 0.1), marks=pytest.mark.slow),
    (SLICES, 4, 0.1),
]


def assert_same(one: SimpleNamespace, here: SimpleNamespace, learnt: float) -> None:
    assert one.losses[0] - one.losses[-1] > learnt, "nothing was learnt, so nothing is compared"
    np.testing.assert_allclose(here.losses, one.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(here.norms, one.norms, rtol=2e-4)


@pytest.mark.parametrize("case", FAST)
def test_losses_do_not_depend_on_mesh_and_accumulation(case):
    assert_same(trained(ONE, 1, 0.1), trained(*case), 0.02)


@cache
def trained_for_longer(*case) -> SimpleNamespace:
    return train(case, MORE_UPDATES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_of_30_updates_do_not_depend_on_mesh_and_accumulation(case):
    assert_same(trained_for_longer(ONE, 1, case[2]), trained_for_longer(*case), 0.1)


SLOW_MESHES = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in (DATA8, FSDP8, TENSOR4)]


@pytest.mark.parametrize("mesh", [*SLOW_MESHES, HYBRID, CUBE, SLICES])
def test_initial_parameters_are_bitwise_equal_on_every_mesh(mesh):
    case = next(c for c in [*FAST, *CASES] if c[0] == mesh)
    here = build(*case).init().params
    jax.tree.map(np.testing.assert_array_equal, trained(ONE, 1, 0.1).first, here)


def test_a_rerun_is_bitwise_equal():
    again = train((CUBE, 2, 0.1))
    assert again.losses == trained(CUBE, 2, 0.1).losses
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        again.state,
        trained(CUBE, 2, 0.1).state,
    )


@pytest.mark.slow
def test_dropout_changes_the_losses():
    assert abs(trained(ONE, 1, 0.1).losses[1] - trained(ONE, 1, 0.0).losses[1]) > 1e-4


# --- where things lie

# Shape of each parameter's part on a device of a mesh of fsdp 4 x tensor 2, by hand.
PARTS = {
    "wte": (128 // 8, D),
    "wpe": (T, D // 4),
    "h/ln_1/scale": (LAYERS, D),
    "h/ln_1/bias": (LAYERS, D),
    "h/ln_2/scale": (LAYERS, D),
    "h/ln_2/bias": (LAYERS, D),
    "h/attn/qkv_kernel": (LAYERS, D // 4, 3, 4 // 2, 16),
    "h/attn/qkv_bias": (LAYERS, 3, 2, 16),
    "h/attn/proj_kernel": (LAYERS, 4 // 2, 16, D // 4),
    "h/attn/proj_bias": (LAYERS, D),
    "h/mlp/up_kernel": (LAYERS, D // 4, 4 * D // 2),
    "h/mlp/up_bias": (LAYERS, 4 * D // 2),
    "h/mlp/down_kernel": (LAYERS, 4 * D // 2, D // 4),
    "h/mlp/down_bias": (LAYERS, D),
    "ln_f/scale": (D,),
    "ln_f/bias": (D,),
}


def parts(tree) -> dict:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): x.addressable_shards[0].data.shape for path, x in flat}


def test_every_parameter_and_moment_lies_where_the_rules_say():
    steps = build((("data", 1), ("fsdp", 4), ("tensor", 2)), 2, bias=True)
    state = steps.init()
    for _ in range(2):  # as initialised, and as an update leaves it
        assert parts(state.params) == PARTS
        adam = next(s for s in state.opt_state if hasattr(s, "mu"))
        assert parts(adam.mu) == parts(adam.nu) == PARTS
        placed = jax.tree.map(lambda x, a: x.sharding == a.sharding, state, steps.abstract)
        assert all(jax.tree.leaves(placed))
        state, _ = steps.train(state, np.zeros((*steps.layout, T + 1), np.int32))


def test_the_state_is_initialised_in_its_sharding_never_whole():
    steps = build((("data", 1), ("fsdp", 4), ("tensor", 2)), 2, bias=True)
    with jax.set_mesh(steps.mesh):
        hlo = steps.jit_init.lower().compile().as_text()
    assert "f32[16,64]" in hlo and "f32[2,16,128]" in hlo
    for whole in ("[128,64]", "[2,64,3,4,16]", "[2,64,256]", "[2,256,64]"):
        assert f"f32{whole}" not in hlo and f"u32{whole}" not in hlo


def test_the_constraints_are_in_the_program():
    """Under `with mesh:` Flax's constraints silently vanish; ours must not."""
    steps = build(CUBE, 2, 0.1)
    tokens = jax.ShapeDtypeStruct((*steps.layout, T + 1), jnp.int32)
    with jax.set_mesh(steps.mesh):
        jaxpr = str(steps.jit_train.trace(steps.abstract, tokens).jaxpr)
    assert jaxpr.count("sharding_constraint") >= 6


def test_an_unknown_logical_axis_is_an_error():
    boxed = {"w": nn.LogicallyPartitioned(jnp.zeros((2, 2)), ("embed", "wrong"))}
    with pytest.raises(ValueError, match="'wrong' has no rule"):
        sharding.specs(boxed, sharding.RULES)


def test_no_rule_puts_two_axes_of_one_array_on_one_mesh_axis():
    for tree in (build(ONE, 1, bias=True).abstract, build(CUBE, 2, 0.1).abstract):
        for leaf in jax.tree.leaves(tree):
            used = [a for names in leaf.sharding.spec for a in np.ravel(names) if a is not None]
            assert len(used) == len(set(used))


def test_rules_within_manual_axes_leave_only_the_others_to_the_batch():
    assert sharding.rules_within(("replica", "data"))["batch"] == ("fsdp",)
    assert sharding.rules_within(())["batch"] == ("replica", "data", "fsdp")
    assert sharding.rules_within(sharding.ROWS)["vocab"] == ("tensor", "fsdp", "context")


def test_splash_attention_splits_over_the_axes_of_the_table():
    assert attention.BATCH_AXES == sharding.RULES["batch"]
    assert attention.HEAD_AXES == (sharding.RULES["act_heads"],)


# --- the arithmetic of meshes and batches


def mesh_of(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1}, (1, 2, 4, 1, 1)),
        ({"replica": 2, "data": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
    ],
)
def test_a_mesh_axis_of_minus_one_takes_what_is_left(sizes, expected):
    mesh = mesh_of(**sizes)
    assert tuple(mesh.shape.values()) == expected
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 4}, {"fsdp": 16}, {"tensor": 3}])
def test_a_mesh_that_does_not_fit_names_the_devices(sizes):
    with pytest.raises(ValueError, match=r"does not fit 8 cpu device\(s\).*multiply to 8"):
        mesh_of(**sizes)


@dataclass(frozen=True)
class Chip:
    """A chip of a pod, as jax asks one where it lies."""

    id: int
    coords: tuple
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    process_index: int = 0
    core_on_chip: int = 0


@pytest.mark.parametrize("fsdp", [16, 128])
def test_a_mesh_axis_may_lie_on_a_part_of_an_axis_of_the_torus(fsdp):
    """16 x 16 are whole axes; for 128 one of them must be split."""
    chips = [Chip(16 * y + x, (x, y, 0)) for y in range(16) for x in range(16)]
    grid = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp), chips).devices.reshape(-1, fsdp)
    assert set(grid.flat) == set(chips)
    for shards in grid:  # neighbours, as close as can be
        sides = np.ptp([chip.coords for chip in shards], axis=0) + 1
        assert np.prod(sides) == fsdp


@pytest.mark.parametrize(
    ("sequences", "microbatch", "expected"),
    [(480, None, (1, 480)), (480, 12, (5, 96)), (480, 1, (60, 8)), (8, 1, (1, 8))],
)
def test_accumulation_follows_from_the_batch(sequences, microbatch, expected):
    batch = BatchConfig(sequences=sequences, microbatch=microbatch)
    assert sharding.batch_layout(batch, mesh_of()) == expected


def test_the_tensor_axis_splits_no_rows():
    batch = BatchConfig(sequences=12, microbatch=3)
    assert sharding.batch_layout(batch, mesh_of(data=4, tensor=2)) == (1, 12)


@pytest.mark.parametrize(("most", "expected"), [(1, (12, 8)), (5, (3, 32)), (12, (1, 96))])
def test_a_microbatch_that_is_not_given_has_a_limit(most, expected):
    """Of the 12 sequences of each of 8 devices it takes the largest divisor within."""
    batch = BatchConfig(sequences=96)
    assert sharding.batch_layout(batch, mesh_of(), most) == expected
    given = BatchConfig(sequences=96, microbatch=6)
    assert sharding.batch_layout(given, mesh_of(), most) == (2, 48)
    assert sharding.batch_layout(batch, mesh_of(), 100) == (1, 96)


def test_a_cpu_accumulates_over_microbatches_that_its_cache_holds(monkeypatch):
    config = Config(
        model=dict(n_layer=1, n_head=1, n_embd=8, block_size=512, vocab_size=8),
        batch=dict(sequences=96),
        data=dict(path=""),
        run=dict(out_dir="none"),
    )
    assert step.build_steps(config, mesh_of(), "float32", "xla").layout == (6, 16)
    assert 16 // 8 * 512 == step.CPU_TOKENS


@pytest.mark.parametrize(("sequences", "works"), [(479, 480), (485, 488), (3, 8)])
def test_a_batch_that_does_not_divide_names_one_that_does(sequences, works):
    with pytest.raises(ValueError, match=f"={sequences} .*nearest that does is {works}"):
        sharding.batch_layout(BatchConfig(sequences=sequences), mesh_of())
    sharding.batch_layout(BatchConfig(sequences=works), mesh_of())


def test_the_batch_of_rollouts_is_named_by_what_sets_it():
    config = Config(
        model=dict(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8),
        objective=dict(name="grpo"),
        grpo=dict(prompts=3, samples=4, reward="exact"),
        data=dict(path=""),
        run=dict(out_dir="none", init_from="other"),
    )
    with pytest.raises(ValueError, match="grpo.prompts x grpo.samples=12 does not .* that does is"):
        step.build_steps(config, mesh_of(), "float32", "xla")


def test_a_microbatch_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"batch.microbatch=5 .*could be 1, 2, 3, 4, 6, 12$"):
        sharding.batch_layout(BatchConfig(sequences=96, microbatch=5), mesh_of())


def test_every_batch_that_grows_is_a_multiple_of_the_microbatch_or_refused_by_name():
    grows = {"sequences": 16, "growth": {3: 24}}
    assert sharding.batch_layout(BatchConfig(**grows), mesh_of(data=4, tensor=2)) == (2, 8)
    with pytest.raises(ValueError, match=r"batch.growth\[3\]=17 does not divide over 4 .* is 16"):
        sharding.batch_layout(BatchConfig(sequences=16, growth={3: 17}), mesh_of(data=4, tensor=2))
    with pytest.raises(ValueError, match=r"the 6 .* of batch.growth\[3\]=24; it could be 1, 2$"):
        sharding.batch_layout(BatchConfig(**grows, microbatch=4), mesh_of(data=4, tensor=2))


@pytest.mark.parametrize(
    ("mesh", "model", "match"),
    [
        ({"data": 1, "tensor": 8}, {}, "n_head=4 does not divide over mesh.tensor=8"),
        ({"data": 1, "fsdp": 8}, {"ngram_rows": 65}, "ngram_rows=65 does not .* it could be 72"),
        ({"data": 1, "fsdp": 8}, {"n_embd": 68, "n_head": 4}, "n_embd=68 .*mesh.fsdp=8"),
        ({"data": 1, "fsdp": 8}, {"vocab_multiple": 5}, "of 65 .*fsdp x tensor = 8.*multiple=40"),
    ],
)
def test_a_model_that_does_not_divide_over_the_mesh_is_refused(mesh, model, match):
    config = make_config(tuple(mesh.items()), **model)
    with pytest.raises(ValueError, match=match):
        sharding.check_divisible(config.model, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize("mesh", [DATA8, FSDP8, HYBRID, CUBE, SLICES])
@pytest.mark.parametrize("accumulated", [True, False])
def test_local_rows_make_the_global_array(mesh, accumulated):
    mesh = sharding.make_mesh(MeshConfig(**dict(mesh)))
    rows = sharding.local_rows(mesh, 16)
    np.testing.assert_array_equal(rows, np.arange(16))  # one process has them all
    local = np.random.default_rng(0).integers(0, 9, (3, 16, 5) if accumulated else (16, 5))
    place = sharding.batch_sharding(mesh, accumulated)
    array = sharding.to_global(local, rows, place, 16)
    assert array.sharding == place
    assert array.addressable_shards[0].data.shape[-2] == 16 // sharding.row_shards(mesh)
    np.testing.assert_array_equal(np.asarray(array), local)


# --- traffic between devices, read off the compiled program


@cache
def traffic(mesh: tuple) -> SimpleNamespace:
    """Of a step with several microbatches."""
    case = next(c for c in CASES if c[0] == mesh and c[1] > 1)
    steps, micro = build(*case), case[1]
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): 4 * x.size
        for path, x in jax.tree_util.tree_flatten_with_path(steps.abstract.params)[0]
    }
    found = collectives(compiled(*case).as_text(), steps.mesh)
    return SimpleNamespace(
        found=found, table=table(found), sizes=sizes, total=sum(sizes.values()), micro=micro
    )


@pytest.mark.slow
def test_fault_14_gradients_are_reduced_over_data_once_an_update():
    """Under plain jit every microbatch reduces every layer: 4 x the bytes, over the slow links."""
    seen = traffic(DATA8)
    assert {(c.kind, c.axes, c.depth) for c in seen.found} == {("all-reduce", ("data",), 0)}
    small = seen.table["all-reduce", "data", 0] - seen.total
    assert 0 < small <= 64, "the sums of losses and of tokens, and nothing more"


@pytest.mark.parametrize("mesh", [HYBRID, CUBE, SLICES])
def test_fault_14_no_loop_holds_a_collective_over_replica_or_data(mesh):
    slow = [c for c in traffic(mesh).found if {"replica", "data"} & set(c.axes)]
    assert any(c.bytes > 10_000 for c in slow), "the gradients must be reduced somewhere"
    assert {c.depth for c in slow} == {0}
    params = build(*CASES[0]).abstract.params
    norms = jax.tree.leaves(jax.eval_shape(health.layer_norms, params))
    numbers = 64 + 4 * sum(x.size for x in norms)  # loss, count and the norms, each once
    big = [c for c in slow if c.bytes > numbers]
    assert {"fsdp", "tensor"}.isdisjoint(axis for c in big for axis in c.axes)


def test_traffic_of_data_and_fsdp_is_near_the_least_possible():
    """Least: a microbatch gathers each layer's weights forward and backward and reduces their
    gradients; an update gathers the table and reduces a fourth of all gradients over data."""
    seen = traffic(HYBRID)
    micro = seen.micro
    kernels = sum(size for name, size in seen.sizes.items() if "kernel" in name)
    norms = sum(size for name, size in seen.sizes.items() if "scale" in name)
    ends = seen.sizes["wte"] + seen.sizes["wpe"]

    # Once an update. The norms are not split, so they are reduced whole.
    reduced = (seen.total - norms) // 4 + norms
    assert 0 <= seen.table["all-reduce", "data", 0] - reduced <= 64
    assert seen.table["all-gather", "fsdp", 0] == ends
    # In a layer of a microbatch; CPU writes all-reduce where others have reduce-scatter.
    assert seen.table["all-gather", "fsdp", 2] == 2 * micro * kernels
    layer_norms = norms - seen.sizes["ln_f/scale"]
    assert seen.table["all-reduce", "fsdp", 2] == micro * (kernels + layer_norms)
    # In a microbatch: the gradients of positions and, of the table, the loss's and the look-up's;
    # for the latter XLA by itself would gather the gradients of all activations.
    assert seen.table["all-gather", "fsdp", 1] == 0
    assert seen.table["all-reduce", "fsdp", 1] <= micro * (ends + seen.sizes["wte"] + 1000)


@pytest.mark.parametrize("mesh", [pytest.param(FSDP8, marks=pytest.mark.slow), HYBRID, CUBE])
def test_the_chunked_loss_gathers_the_head_once_and_reduces_its_gradient_once(mesh):
    """Not once a chunk: 8 chunks of a 124M model would move 1.2 GB a microbatch."""
    seen = traffic(mesh)
    fsdp = [c for c in seen.found if "fsdp" in c.axes]
    # Of the loops in a microbatch, that over the layers is all that may move anything. Names of
    # operations do not tell the loops apart in every version of JAX; how often they run does.
    assert T // CHUNK != LAYERS
    assert {c.times for c in fsdp if c.depth == 2} == {seen.micro * LAYERS}
    tensor = dict(mesh).get("tensor", 1)
    whole = [c for c in fsdp if c.kind == "all-gather" and c.bytes == 128 * D * 4 // tensor]
    assert [(c.times, c.depth) for c in whole] == [(1, 0)]  # outside all loops, once


def test_evaluation_gathers_the_head_once():
    steps = build(HYBRID, 4, 0.1)
    tokens = jax.ShapeDtypeStruct((8, T + 1), jnp.int32)
    with jax.set_mesh(steps.mesh):
        compiled = steps.jit_evaluate.lower(steps.abstract.params, tokens).compile()
    found = collectives(compiled.as_text(), steps.mesh)
    assert [c.times for c in found if c.bytes == 128 * D * 4 and c.kind == "all-gather"] == [1]
    assert {c.times for c in found} <= {1, LAYERS}, "something moves once a chunk"


def test_tensor_parallelism_gathers_and_sums_four_activations_a_layer_and_microbatch():
    """Least: attention and MLP each gather their input and sum their output, and backward the
    gradients of both. The hidden states are gathered for the loss, whose gradient of them is summed
    once a position, and the embeddings' gradient is gathered."""
    seen = traffic(CUBE)
    activations = ROWS // 4 // seen.micro * T * D * 4  # bytes of float32, of a microbatch's rows
    moved = {key: n for key, n in seen.table.items() if key[1] == "tensor"}
    in_layers = [c for c in seen.found if c.axes == ("tensor",) and c.times == seen.micro * LAYERS]
    norms = 2 * D * 4
    # A CPU writes all-reduce where others have reduce-scatter.
    kinds = sorted((c.kind, c.bytes) for c in in_layers if c.bytes != norms)
    assert kinds == [("all-gather", activations)] * 4 + [("all-reduce", activations)] * 4
    for kind, at_the_ends in (("all-gather", 2), ("all-reduce", 1)):
        least = seen.micro * (4 * LAYERS + at_the_ends) * activations
        in_loops = sum(n for (of, _, depth), n in moved.items() if depth and of == kind)
        assert least <= in_loops <= 1.05 * least
    # The table for look-ups is split over both axes, and gathered once an update.
    assert moved["all-gather", "tensor", 0] == seen.sizes["wte"]


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "scatters"), [("dots", 4), ("full", 5)])
def test_what_layers_keep_of_the_residual_stream_is_split_over_tensor(remat, scatters):
    steps = build(TENSOR4, 1, remat=remat, n_inner=2 * D)
    hlo = steps.lower().compile().as_text()
    assert f"f32[{LAYERS},{ROWS},{T // 4},{D}]" in hlo
    assert f"f32[{LAYERS},{ROWS},{T},{D}]" not in hlo
    # Inputs of products are gathered again backward, and scattered what remat=full does not keep.
    found = collectives(hlo, steps.mesh)
    kinds = [c.kind for c in found if c.times == LAYERS and c.bytes == 4 * ROWS * T * D]
    assert sorted(kinds) == ["all-gather"] * 6 + ["all-reduce"] * scatters


@pytest.mark.slow
def test_sequences_that_tensor_does_not_divide_have_the_same_losses():
    odd = {"block_size": 30, "loss_chunk": 30}
    one, here = (build(mesh, 1, **odd) for mesh in (ONE, TENSOR4))
    state, tokens = one.init(), np.arange(ROWS * 31, dtype=np.int32).reshape(1, ROWS, 31) % VOCAB
    params = jax.device_put(state.params, jax.tree.map(lambda x: x.sharding, here.abstract.params))
    losses = [s.evaluate(p, tokens[0])[0] for s, p in ((one, state.params), (here, params))]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    gradients = [s.train(s.init(), tokens)[1]["train/grad_norm"] for s in (one, here)]
    np.testing.assert_allclose(*gradients, rtol=2e-5)


@pytest.mark.slow
def test_the_optimizer_gathers_no_parameter():
    """Once an update only the two tables are gathered: for the loss and for the look-ups."""
    seen = traffic(FSDP8)
    once = {key: n for key, n in seen.table.items() if key[0] == "all-gather" and key[2] == 0}
    assert once == {("all-gather", "fsdp", 0): seen.sizes["wte"] + seen.sizes["wpe"]}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={}", ("data", "tensor")),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "tensor")),
        ("source_target_pairs={{0,0},{1,1},{2,4},{4,2}}", ("data",)),
        ("source_target_pairs={{0,1},{1,0},{2,4},{4,2}}", ("data", "tensor")),
        ("replica_groups=mesh['data'=4,'tensor'=2] {'tensor'}", ("tensor",)),
        ("replica_groups=mesh['data'=4,'tensor'=2] {'tensor','data'}", ("data", "tensor")),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}", ("tensor",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(2)2}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("data",)),
    ],
)
def test_groups_of_devices_are_read_in_every_form_that_xla_writes(groups, axes):
    """jax 0.10 writes lists, arrays and meshes without names; jax 0.12 meshes with names, too."""
    line = f"  %r = f32[2]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    (found,) = collectives(f"ENTRY %main () -> f32[2] {{\n{line}\n}}", mesh_of(data=4, tensor=2))
    assert found.axes == axes


def test_groups_in_an_unknown_form_are_an_error():
    line = "  %r = f32[2]{0} all-reduce(%x), replica_groups=everyone, to_apply=%add"
    with pytest.raises(ValueError, match="does not know these replica groups .* everyone"):
        collectives(f"ENTRY %main () -> f32[2] {{\n{line}\n}}", mesh_of(data=4, tensor=2))


def test_hlo_depths_are_counted_from_loops():
    """The reader itself: a reduction in a loop of a loop is seen with its trip counts."""
    mesh = mesh_of(data=4, tensor=2)

    @jax.jit
    def twice_nested(x):
        def inner(c, _):
            return jax.lax.psum(c, "tensor") * 0.5, None

        def outer(c, _):
            c = jax.lax.scan(inner, c, None, length=5)[0]
            return jax.lax.psum(jax.lax.all_gather(c, "data"), "data")[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    run = jax.shard_map(twice_nested, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    hlo = jax.jit(run).lower(jnp.zeros((7, 11))).compile().as_text()
    seen = table(collectives(hlo, mesh))
    assert seen["all-reduce", "tensor", 2] == 15 * 7 * 11 * 4
    assert seen["all-gather", "data", 1] == 3 * 4 * 7 * 11 * 4

"""Muon against optax and NumPy, on every mesh; and that the modern recipe learns as it should."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from flax.traverse_util import flatten_dict

from scalegpt.config import Config
from scalegpt.config.recipe import ModelConfig, OptimConfig
from scalegpt.model.parameters import parameters
from scalegpt.planning.hlo import collectives
from scalegpt.planning.memory import moment_bytes
from scalegpt.step import build as step
from scalegpt.step import build_for_training, muon, sharding
from scalegpt.step.optimizer import cautious_decay, optimizer, schedule

LAYERS, D, T, VOCAB, ROWS, UPDATES = 3, 32, 16, 65, 16, 8
ONE, DATA8 = {"data": 1}, {"data": 8}
FSDP8, HYBRID = {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
SHAPES = {
    "h/attn/qkv_kernel": (LAYERS, D, 3, 2, D // 2),
    "h/attn/proj_kernel": (LAYERS, 2, D // 2, D),
    "h/mlp/up_kernel": (LAYERS, D, 4 * D),
    "h/mlp/down_kernel": (LAYERS, 4 * D, D),
}


PARAMETERS = parameters(ModelConfig(preset="nanochat", vocab_size=64))


def random(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def matrices(tree: dict) -> dict[str, np.ndarray]:
    """By hand: [N, fan in, fan out], of each projection by itself."""
    x = {name.split("/")[-1]: np.asarray(leaf) for name, leaf in tree.items()}
    qkv = x["qkv_kernel"].reshape(LAYERS, D, 3, D)
    return {
        **{name: qkv[:, :, i] for i, name in enumerate("qkv")},
        "proj": x["proj_kernel"].reshape(LAYERS, D, D),
        "up": x["up_kernel"],
        "down": x["down_kernel"],
    }


def test_it_is_optax_muon_in_float32_for_each_projection_by_itself():
    ours = muon.scale_by_muon(lambda i: 0.95, 5, jnp.float32, PARAMETERS)
    dimensions = optax.contrib.MuonDimensionNumbers(-2, -1)
    theirs = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: dimensions, tree)
    )
    a, b = ours.init(random(0)), theirs.init(jax.tree.map(jnp.asarray, matrices(random(0))))
    for seed in range(1, 6):
        gradient = random(seed)
        got, a = ours.update(gradient, a)
        want, b = theirs.update(jax.tree.map(jnp.asarray, matrices(gradient)), b)
        for name, x in matrices(got).items():
            shape = max(1, x.shape[2] / x.shape[1]) ** 0.5
            np.testing.assert_allclose(x, shape * want[name], atol=1e-5, err_msg=name)


def test_rows_are_divided_by_the_root_of_their_mean_square():
    """NorMuon by hand, for [fan in, fan out] of each projection; norms stay."""
    plain = muon.scale_by_muon(lambda i: 0.95, 5, jnp.float32, PARAMETERS)
    tx = muon.even_rows(0.9, PARAMETERS)
    state, other = tx.init(random(0)), plain.init(random(0))
    # Outputs of square matrices; of the others the side of 4 D, which `down` reads.
    along = {"q": 1, "k": 1, "v": 1, "proj": 1, "up": 1, "down": 2}
    mean = dict.fromkeys(along, 0.0)
    for seed in (1, 2, 3):
        # Columns of very different sizes, so that rows differ.
        grads = jax.tree.map(lambda x: x * jnp.arange(1, x.shape[-1] + 1) ** 2, random(seed))
        want, other = plain.update(grads, other)
        got, state = tx.update(want, state)
        for name, x in matrices(want).items():
            x = x.astype(np.float64)
            mean[name] = 0.9 * mean[name] + 0.1 * (x**2).mean(along[name], keepdims=True)
            y = x / np.sqrt(mean[name])
            before, after = (np.linalg.norm(z, axis=(1, 2), keepdims=True) for z in (x, y))
            y *= before / after
            np.testing.assert_allclose(matrices(got)[name], y, rtol=2e-5, atol=1e-7)
    assert abs(matrices(got)["up"] - matrices(want)["up"]).max() > 1e-2


def test_two_time_momentum_is_a_mean_of_a_fast_and_a_slow_one_from_its_start_on():
    """As in modded-nanogpt#340, by hand; before its start it is the one momentum."""
    one = muon.scale_by_muon(lambda i: 0.9, 5, jnp.float32, PARAMETERS)
    two = muon.scale_by_muon(lambda i: 0.9, 5, jnp.float32, PARAMETERS, 0.98, 3)
    a, b = one.init(random(0)), two.init(random(0))
    fast = slow = np.zeros(SHAPES["h/mlp/up_kernel"])
    for i in range(6):
        gradient = random(i + 1)
        want, a = one.update(gradient, a)
        got, b = two.update(gradient, b)
        g = np.asarray(gradient["h/mlp/up_kernel"], np.float64)
        if i < 3:
            jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, want)
            fast = slow = 0.9 * fast + 0.1 * g
            continue
        fast, slow = 0.85 * fast + 0.15 * g, 0.98 * slow + 0.02 * g
        mean = (0.4385 * fast + 0.5615 * slow) / (1 - 0.9 ** (i + 2))
        x = jnp.asarray(0.9 * mean + 0.1 * g / (1 - 0.9 ** (i + 1)), jnp.float32)
        x = 2 * muon.orthogonalise(x, 5)  # whose sides are D and 4 D
        np.testing.assert_allclose(got["h/mlp/up_kernel"], x, atol=2e-5)
        assert abs(x - want["h/mlp/up_kernel"]).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_come_near_one(dtype):
    tx = muon.scale_by_muon(lambda i: 0.95, 5, jnp.dtype(dtype), PARAMETERS)
    got = matrices(tx.update(random(1), tx.init(random(1)))[0])
    for name, x in got.items():
        values = np.linalg.svd(x / max(1, x.shape[2] / x.shape[1]) ** 0.5, compute_uv=False)
        # Square random matrices have some near zero, which five iterations only begin to lift.
        assert values.max() < 1.3 and np.median(values) > 0.6, (name, values.min(), values.max())
        assert name not in ("up", "down") or values.min() > 0.5


# What an update may do besides, in one run.
MORE = {"row_beta2": 0.95, "decay_follows_lr": True, "lookahead": 0.6, "lookahead_decay": 0.9}
MORE |= {"momentum_slow": 0.98}


def make_config(mesh: dict[str, int], backend: str = "jit", optim=(), **model) -> Config:
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
    return Config(
        model=dict(preset="nanochat", n_layer=LAYERS, n_head=2, n_embd=D, block_size=T)
        | dict(vocab_size=VOCAB, dtype="float32", attention="xla", scan_layers=True)
        | model,
        mesh=mesh,
        batch=dict(sequences=ROWS, microbatch=ROWS // shards),
        data=dict(path="unused"),
        optim=dict(
            name="muon", steps=UPDATES, weight_decay=0.1, cautious_decay=True, momentum_warmup=4
        )
        | dict(optim),
        run=dict(out_dir="unused", backend=backend),
    )


def build(config: Config) -> step.Steps:
    devices = jax.devices()[: int(np.prod(list(config.mesh.model_dump().values())))]
    return build_for_training(config, sharding.make_mesh(config.mesh, devices))


def losses(config: Config) -> list[float]:
    steps, rng = build(config), np.random.default_rng(0)
    state, found = steps.init(), []
    for _ in range(UPDATES):
        tokens = rng.integers(0, VOCAB, (ROWS, T + 1), dtype=np.int32)
        tokens[:, 1::2] = tokens[:, :-1:2]  # half of the targets can be learnt
        tokens = jax.device_put(tokens.reshape(*steps.layout, T + 1), steps.batch_sharding)
        state, metrics = steps.train(state, tokens)
        found.append(float(metrics["train/loss"]))
    return found


@pytest.fixture(scope="module")
def alone() -> list[float]:
    found = losses(make_config(ONE))
    assert found[0] - found[-1] > 0.3, "nothing was learnt, so nothing is compared"
    return found


@pytest.mark.parametrize(
    ("mesh", "backend"),
    [
        (CUBE, "jit"),
        pytest.param(FSDP8, "jit", marks=pytest.mark.slow),
        pytest.param(HYBRID, "jit", marks=pytest.mark.slow),
        pytest.param({"data": 1, "fsdp": 2, "context": 4}, "jit", marks=pytest.mark.slow),
        pytest.param(DATA8, "pmap", marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_mesh_and_backend(alone, mesh, backend):
    np.testing.assert_allclose(losses(make_config(mesh, backend)), alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_losses_with_all_that_an_update_may_do_do_not_depend_on_the_mesh(alone):
    parts = dict(smear=True, backout=True, ngram_rows=64, ngram=3)
    parts |= dict(value_embeddings=True, value_gates=True)
    one = losses(make_config(ONE, optim=MORE, **parts))
    for mesh, backend in ((CUBE, "jit"), (DATA8, "pmap")):
        found = losses(make_config(mesh, backend, optim=MORE, **parts))
        np.testing.assert_allclose(found, one, rtol=0, atol=1e-5)
    assert abs(np.subtract(one, alone)).max() > 1e-3


def update_hlo(config: Config) -> tuple[str, float, step.Steps]:
    """The optimizer's update alone, compiled: HLO and FLOPs of a device."""
    steps = build(config)
    params, state = steps.abstract.params, steps.abstract.opt_state
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    tx = optimizer(config.optim, PARAMETERS, jnp.bfloat16)
    with jax.set_mesh(steps.mesh):
        jitted = jax.jit(
            tx.update, in_shardings=(places[0], places[1], places[0]), out_shardings=places
        )
        compiled = jitted.lower(params, state, params).compile()
    return compiled.as_text(), compiled.cost_analysis()["flops"], steps


def test_each_shape_moves_once_each_way_and_no_device_repeats_another_ones_work():
    alone = update_hlo(make_config(ONE))[1]
    hlo, flops, steps = update_hlo(make_config(FSDP8))
    found = [c for c in collectives(hlo, steps.mesh) if c.bytes > 64]  # the norm of the gradients
    assert [c.kind for c in found] == ["all-to-all"] * 4  # two shapes, there and back
    # Their matrices, padded to whole ones for each device: 4 x 3 -> 16, 2 x 3 -> 8.
    each_way = (16 * D * D + 8 * D * 4 * D) // 8
    assert sum(c.bytes for c in found) <= 2 * 4 * each_way  # the CPU moves bfloat16 as float32
    assert flops < 1.1 * alone * (16 + 8 * 4) / (12 + 6 * 4) / 8
    hlo = update_hlo(make_config(FSDP8, optim=MORE))[0]
    found = collectives(hlo, steps.mesh)
    assert [c.kind for c in found if c.kind != "all-reduce"] == ["all-to-all"] * 4
    rows = LAYERS * (3 * D + D + 4 * D + 4 * D)  # whose means are sums over fsdp
    assert sum(c.bytes for c in found if c.kind == "all-reduce") <= 4 * rows + 100

    hlo, flops, steps = update_hlo(make_config(CUBE))
    moved = {c.kind for c in collectives(hlo, steps.mesh) if c.bytes > 64}
    gathered = [c for c in collectives(hlo, steps.mesh) if c.kind == "all-gather"]
    assert moved <= {"all-to-all", "all-gather", "collective-permute"}
    assert {c.axes for c in gathered} <= {("data",)}, "back to those who hold the same weights"
    assert flops < 1.1 * alone * (16 + 8 * 4) / (12 + 6 * 4) / 8


def test_every_parameter_is_in_the_group_that_its_axes_say():
    config = make_config(
        ONE,
        bias=True,
        norm="layernorm",
        position="learned",
        residual_scalars=True,
        value_embeddings=True,
        smear=True,
        backout=True,
        ngram_rows=8,
    )
    found = {path: x.kind for path, x in parameters(config.model).items()}
    assert found.keys() == flatten_dict(build(config).abstract.params, sep="/").keys()
    assert {p for p, g in found.items() if g == "matrices"} == set(SHAPES)
    assert {p for p, g in found.items() if g == "embeddings"} == {
        "wte",
        "wpe",
        "ngram_table",
        "h/attn/value_table",
    }
    assert {p for p, g in found.items() if g == "head"} == {"head_kernel"}
    rest = {p for p, g in found.items() if g == "scalars"}
    assert {p.rpartition("/")[2] for p in rest} == {
        "scale",
        "bias",
        "qkv_bias",
        "proj_bias",
        "up_bias",
        "down_bias",
        "residual_scalars",
        "value_strength",
        "smear_gate",
        "smear_strength",
        "backout",
        "ngram_strength",
    }


def test_what_muon_does_not_train_is_adamw_at_a_rate_of_its_own():
    config = OptimConfig(name="muon", steps=10, weight_decay=0.3, embedding_lr=0.2)
    tx, rng = optimizer(config, PARAMETERS), np.random.default_rng(0)
    params = {
        "wte": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "head_kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    }
    state, rate = tx.init(params), schedule(config)
    adam = dict(b1=config.beta1, b2=config.beta2, eps=config.eps)
    references = {
        "wte": optax.adamw(lambda i: 10 * rate(i), weight_decay=0.0, **adam),
        "head_kernel": optax.adamw(lambda i: 0.4 * rate(i), weight_decay=0.3, **adam),
    }
    states = {name: other.init(params[name]) for name, other in references.items()}
    for _ in range(4):
        grads = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in params.items()}
        updates, state = tx.update(grads, state, params)
        for name, other in references.items():
            want, states[name] = other.update(grads[name], states[name], params[name])
            np.testing.assert_allclose(updates[name], want, rtol=2e-6, atol=1e-7)
        params = optax.apply_updates(params, updates)


def test_cautious_decay_shrinks_only_where_the_update_does():
    u, p = jnp.array([1.0, -1.0, 1.0, 0.0]), jnp.array([2.0, 2.0, -2.0, 2.0])
    tx = cautious_decay(0.5, lambda tree: {"a": True, "b": False})
    got, _ = tx.update({"a": u, "b": u}, tx.init({}), {"a": p, "b": p})
    np.testing.assert_array_equal(got["a"], [2.0, -1.0, 1.0, 0.0])  # as they will be subtracted
    np.testing.assert_array_equal(got["b"], u)


def test_the_momentum_rises_to_its_value():
    """From the state of two updates: m2 = b1 b0' + ..., with factors 0.85 and 0.875."""
    config = OptimConfig(name="muon", momentum=0.95, momentum_warmup=4, steps=9)
    tx = optimizer(config, PARAMETERS)
    state = tx.init(random(0))
    for seed in (1, 2):
        _, state = tx.update(random(seed), state, random(0))
    kept = state[1]["matrices"][0].momentum["h/mlp/up_kernel"]
    first, second = (random(seed)["h/mlp/up_kernel"] for seed in (1, 2))
    np.testing.assert_allclose(kept, 0.875 * 0.15 * first + 0.125 * second, atol=1e-6)


@pytest.mark.parametrize("keys", [{}, {"momentum_slow": 0.98}, {"average": 0.1, "lookahead": 0.5}])
def test_the_bytes_of_the_moments_are_planned(keys):
    config = OptimConfig(name="muon", steps=9, **keys)
    params = {path: jnp.zeros(x.shape) for path, x in PARAMETERS.items()}
    state = jax.eval_shape(optimizer(config, PARAMETERS).init, params)
    kept = sum(x.size for x in jax.tree.leaves(state) if x.ndim)  # without counts of updates
    count, matrices = (
        sum(np.prod(x.shape) for x in PARAMETERS.values() if x.kind == kind or not kind)
        for kind in ("", "matrices")
    )
    assert moment_bytes(count, matrices, config) == 4 * kept


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embedding_lr": 0.1}, "optim.embedding_lr=0.1 is Muon's"),
        ({"momentum": 0.9}, "optim.momentum=0.9 is Muon's"),
        ({"row_beta2": 0.9}, "optim.row_beta2=0.9 is Muon's"),
        ({"momentum_slow": 0.9}, "optim.momentum_slow=0.9 is Muon's"),
        ({"name": "muon", "momentum_slow": 0.5}, "optim.momentum_slow=0.5 would forget sooner"),
        ({"name": "muon", "min_lr": 0.1}, "optim.min_lr=0.1 is above optim.lr=0.02"),
        ({"name": "muon", "steps": 100, "warmup_steps": 31}, "31 reaches into wsd's cooldown"),
        ({"name": "muon", "cautious_decay": True}, "decays nothing with optim.weight_decay=0"),
        ({"name": "muon", "steps": None}, "steps"),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**keys)


def test_a_rate_of_null_is_not_given():
    """As in the stored configuration of a run of AdamW."""
    stored = OptimConfig().model_dump()
    config = OptimConfig(**{**stored, "name": "muon"})
    assert (config.embedding_lr, config.head_lr, config.scalar_lr) == (0.3, 0.008, 0.015)
    assert config.lr == stored["lr"] and config.decay_steps is None


@pytest.mark.slow
def test_after_100_updates_the_modern_recipe_is_where_it_should_be(shared_data, tmp_path):
    """nanoGPT's settings are at 2.61 then; a wrong label, rate or initialisation is not below."""
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    data = tiny_run.write_data(tmp_path / "data", text, text)
    argv = [
        f"--data.path={data}",
        f"--run.out_dir={tmp_path / 'run'}",
        "--model.preset=modern",
        "--model.n_layer=4",
        "--model.n_head=4",
        "--model.n_embd=128",
        "--model.block_size=64",
        "--batch.sequences=12",
        "--optim.name=muon",
        "--optim.steps=100",
        "--log.tensorboard=false",
        "--eval.windows=320",
    ]
    process = tiny_run.start(argv, JAX_NUM_CPU_DEVICES="1", XLA_FLAGS="")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["val/loss"] for row in rows if "val/loss" in row][-1] < 2.25

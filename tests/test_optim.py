"""Schedules, what decays, and AdamW, against NumPy in float64 and against PyTorch's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scalegpt.config.command_line import parse
from scalegpt.config.loading import validate
from scalegpt.config.recipe import ModelConfig, OptimConfig
from scalegpt.model.parameters import parameters
from scalegpt.step import build as step
from scalegpt.step import sharding
from scalegpt.step.optimizer import decay_mask, optimizer, schedule, swap_average


def rate(config: OptimConfig, i: int) -> float:
    """The learning rate of update i in Python floats; cosine is nanoGPT's get_lr."""
    end = config.decay_steps or config.steps
    if i < config.warmup_steps:
        return config.lr * (i + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if i > end:
        return config.min_lr
    done = (i - config.warmup_steps) / max(1, end - config.warmup_steps)
    if config.schedule == "wsd":
        length = max(1, round(config.cooldown * end))
        left = min(1.0, (end - i) / length) ** config.cooldown_power
    elif config.schedule == "linear":
        left = 1 - done
    else:
        left = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + left * (config.lr - config.min_lr)


# --- schedules


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(
    "keys",
    [
        {"steps": 100, "warmup_steps": 10},
        {"steps": 150, "warmup_steps": 0, "decay_steps": 90, "min_lr": 0},
        {"steps": 40, "warmup_steps": 7, "decay_steps": 60, "lr": 1.0, "min_lr": 1.0},
        {"steps": 5000, "warmup_steps": 1000, "cooldown": 0.35},
        {"steps": 90, "warmup_steps": 0, "cooldown": 0.6, "cooldown_power": 1.2},
        {"steps": 20, "warmup_steps": 20},
    ],
    ids=lambda keys: " ".join(f"{k}={v}" for k, v in keys.items()),
)
def test_schedule_matches_numpy_at_every_update(name, keys):
    config = OptimConfig(schedule=name, **keys)
    updates = np.arange(config.steps + 50)
    if config.warmup_steps == (config.decay_steps or config.steps):
        # nanoGPT divides by zero at the one update where both end; elsewhere they agree.
        updates = np.delete(updates, config.warmup_steps)
    got = jax.jit(jax.vmap(schedule(config)))(updates)
    want = np.array([rate(config, int(i)) for i in updates])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7 * config.lr)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_trap_1_schedule_counts_updates_at_its_corners(name):
    lr = schedule(OptimConfig(schedule=name, lr=6e-4, min_lr=6e-5, steps=600_000))
    first, last_warm, peak, end, after, far = (
        float(lr(i)) for i in (0, 1999, 2000, 600_000, 600_001, 10**9)
    )
    assert first == pytest.approx(6e-4 / 2001, rel=1e-6) and first > 0  # update 0 already moves
    assert last_warm == pytest.approx(6e-4 * 2000 / 2001, rel=1e-6)
    assert peak == pytest.approx(6e-4, rel=1e-6)
    assert end == after == far == pytest.approx(6e-5, rel=1e-6)


def test_wsd_stays_then_falls_linearly():
    lr = schedule(OptimConfig(schedule="wsd", steps=1000, warmup_steps=10, cooldown=0.2))
    assert {float(lr(i)) for i in (10, 400, 800)} == {float(np.float32(6e-4))}
    assert float(lr(900)) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-6)


def test_fault_05_learning_rate_on_the_command_line_changes_the_whole_schedule():
    def rates(*argv):
        config = parse(["--data.path=x", "--run.out_dir=y", *argv], "test", {})[0]
        return np.array([float(schedule(config.optim)(i)) for i in (0, 1000, 2000, 300_000)])

    base, tripled = rates(), rates("--optim.lr=1.8e-3", "--optim.min_lr=1.8e-4")
    np.testing.assert_allclose(tripled, 3 * base, rtol=1e-6)
    assert rates("--optim.lr=1e-3")[2] == pytest.approx(1e-3, rel=1e-6)


# --- a small run on the real step


def run_config(**sections):
    base = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11},
        "batch": {"sequences": 8, "microbatch": 1},
        "data": {"path": "x"},
        "run": {"out_dir": "y"},
        "optim": {"steps": 10, "warmup_steps": 2, "lr": 1e-2, "min_lr": 1e-3},
    }
    for name, keys in sections.items():
        base[name] = {**base[name], **keys}
    return validate(base, "test")


def build(config, devices=2):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    return step.build_steps(config, mesh, "float32", "xla")


def counts(opt_state) -> list[int]:
    """Every step counter in the optimizer state."""
    return [int(x) for x in jax.tree.leaves(opt_state) if jnp.issubdtype(x.dtype, jnp.integer)]


def test_fault_01_a_step_is_an_update_also_under_accumulation():
    config = run_config()
    steps = build(config)
    assert steps.layout == (4, 2)  # 8 sequences on 2 devices, one at a time: 4 microbatches
    rng = np.random.default_rng(0)
    state = steps.init()
    for update in range(3):
        assert counts(state.opt_state) == [update] * len(counts(state.opt_state)) != []
        before = jax.tree.map(np.asarray, state.params)
        tokens = jax.device_put(
            rng.integers(0, 11, (4, 2, 5)).astype(np.int32), steps.batch_sharding
        )
        state, metrics = steps.train(state, tokens)
        want = rate(config.optim, update)
        assert float(metrics["train/lr"]) == pytest.approx(want, rel=1e-6)
        assert int(state.step) == update + 1
        # The rate reported is the rate applied: Adam moves wte's first entries by about it.
        if update == 0:
            moved = np.abs(np.asarray(state.params["wte"]) - before["wte"])[:11]
            assert np.median(moved) == pytest.approx(want, rel=0.05)
    assert counts(state.opt_state) == [3] * len(counts(state.opt_state))


# --- AdamW


class NumpyAdamW:
    """Loshchilov and Hutter's algorithm 2 in float64, on a dict of arrays."""

    def __init__(self, config, params, decays):
        self.c, self.decays, self.t = config, decays, 0
        self.p = {k: np.asarray(v, np.float64) for k, v in params.items()}
        self.m = {k: np.zeros_like(v) for k, v in self.p.items()}
        self.v = {k: np.zeros_like(v) for k, v in self.p.items()}

    def update(self, grads):
        c, grads = self.c, {k: np.asarray(g, np.float64) for k, g in grads.items()}
        norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
        if c.grad_clip and norm > c.grad_clip:
            grads = {k: g * c.grad_clip / norm for k, g in grads.items()}
        lr = rate(c, self.t)
        self.t += 1
        for k, g in grads.items():
            self.m[k] = c.beta1 * self.m[k] + (1 - c.beta1) * g
            self.v[k] = c.beta2 * self.v[k] + (1 - c.beta2) * g * g
            m = self.m[k] / (1 - c.beta1**self.t)
            v = self.v[k] / (1 - c.beta2**self.t)
            decay = c.weight_decay * (lr / c.lr if c.decay_follows_lr else 1) * self.p[k]
            if c.cautious_decay:
                decay = decay * (m * self.p[k] > 0)
            decay = decay if self.decays[k] else 0
            self.p[k] -= lr * (m / (np.sqrt(v) + c.eps) + decay)


PARAMETERS = parameters(ModelConfig(bias=True, value_embeddings=True, vocab_size=64))
SHAPES = {
    "wte": (5, 3),
    "wpe": (4, 3),
    "h/mlp/up_kernel": (2, 3, 4),
    "h/mlp/up_bias": (2, 4),
    "h/ln_1/scale": (2, 3),
    "h/attn/qkv_bias": (2, 3, 2, 2),
}
DECAYED = {
    "matrices": {"wte", "wpe", "h/mlp/up_kernel"},
    "no_embeddings": {"h/mlp/up_kernel"},
    "all": set(SHAPES),
}


def adamw_run(config, gradient_scale, updates=10):
    """Parameters after each update, by scalegpt's optimizer; and the gradients."""
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    tx = optimizer(config, PARAMETERS)
    state, update = tx.init(params), jax.jit(tx.update)
    history, gradients = [params], []
    for _ in range(updates):
        grads = {
            k: jnp.asarray(gradient_scale * rng.normal(size=s), jnp.float32)
            for k, s in SHAPES.items()
        }
        changes, state = update(grads, state, params)
        params = optax.apply_updates(params, changes)
        history.append(params)
        gradients.append(grads)
    return history, gradients


@pytest.mark.parametrize("decay", ["matrices", "no_embeddings", "all"])
@pytest.mark.parametrize(
    "grad_clip, gradient_scale, how",
    # The norm of 100 normal numbers is about 10: below the threshold, above it, and no threshold.
    [
        (1.0, 0.01, {}),
        (1.0, 5.0, {"decay_follows_lr": True}),
        (0.0, 5.0, {"decay_follows_lr": True, "cautious_decay": True}),
    ],
)
def test_adamw_matches_numpy(decay, grad_clip, gradient_scale, how):
    config = OptimConfig(
        lr=0.02,
        min_lr=0.002,
        steps=10,
        warmup_steps=3,
        weight_decay=0.3,
        decay=decay,
        grad_clip=grad_clip,
        **how,
    )
    history, gradients = adamw_run(config, gradient_scale)
    norms = [float(optax.tree.norm(g)) for g in gradients]
    assert all((n > config.grad_clip) == (gradient_scale == 5.0) for n in norms)
    reference = NumpyAdamW(config, history[0], {k: k in DECAYED[decay] for k in SHAPES})
    for params, grads in zip(history[1:], gradients, strict=True):
        reference.update(grads)
        for k in SHAPES:
            np.testing.assert_allclose(params[k], reference.p[k], rtol=3e-6, atol=3e-7, err_msg=k)


def test_clipping_changes_the_update_only_above_the_threshold():
    def final(grad_clip, scale):
        # A large eps, since Adam alone would undo the scale of a gradient.
        config = OptimConfig(steps=10, warmup_steps=0, grad_clip=grad_clip, eps=0.1)
        return adamw_run(config, scale, 3)[0][-1]["wte"]

    np.testing.assert_array_equal(final(1.0, 0.01), final(0.0, 0.01))
    assert np.abs(final(1.0, 5.0) - final(0.0, 5.0)).max() > 1e-5


def test_fault_19_eps_and_betas_reach_the_update():
    """nanogpt-jax logged adam_eps=1e-5 and never passed it on."""
    base = dict(lr=0.01, min_lr=0.01, steps=10, warmup_steps=0, weight_decay=0.0, grad_clip=0.0)
    usual = adamw_run(OptimConfig(**base), 1e-4)[0][-1]["wte"]
    for key, value in (("eps", 1e-4), ("beta1", 0.5), ("beta2", 0.5)):
        config = OptimConfig(**base, **{key: value})
        history, gradients = adamw_run(config, 1e-4)
        reference = NumpyAdamW(config, history[0], dict.fromkeys(SHAPES, False))
        for grads in gradients:
            reference.update(grads)
        np.testing.assert_allclose(history[-1]["wte"], reference.p["wte"], rtol=1e-5, atol=1e-6)
        assert np.abs(history[-1]["wte"] - usual).max() > 1e-3, key


@pytest.mark.oracle
@pytest.mark.parametrize("gradient_scale", [0.01, 5.0])
def test_adamw_matches_pytorch(gradient_scale):
    torch = pytest.importorskip("torch", reason="the second opinion on AdamW needs torch")
    config = OptimConfig(lr=0.02, min_lr=0.002, steps=10, warmup_steps=3, weight_decay=0.3)
    history, gradients = adamw_run(config, gradient_scale)
    tensors = {
        k: torch.nn.Parameter(torch.tensor(np.array(v), dtype=torch.float64))
        for k, v in history[0].items()
    }
    groups = [
        {
            "params": [t for k, t in tensors.items() if (k in DECAYED["matrices"]) == decays],
            "weight_decay": 0.3 if decays else 0.0,
        }
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for i, (params, grads) in enumerate(zip(history[1:], gradients, strict=True)):
        for k, t in tensors.items():
            t.grad = torch.tensor(np.array(grads[k]), dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = rate(config, i)
        adamw.step()
        for k, t in tensors.items():
            np.testing.assert_allclose(
                params[k], t.detach().numpy(), rtol=3e-6, atol=1e-6, err_msg=f"{k}, update {i}"
            )


# --- what decays

# Leaf of a model with biases -> (axes it has here, stacked layers included; axes it has in
# nanoGPT, which decays what has two or more).
LEAVES = {
    "wte": (2, 2),
    "wpe": (2, 2),
    "h/ln_1/scale": (2, 1),
    "h/ln_1/bias": (2, 1),
    "h/attn/qkv_kernel": (5, 2),
    "h/attn/qkv_bias": (4, 1),
    "h/attn/proj_kernel": (4, 2),
    "h/attn/proj_bias": (2, 1),
    "h/ln_2/scale": (2, 1),
    "h/ln_2/bias": (2, 1),
    "h/mlp/up_kernel": (3, 2),
    "h/mlp/up_bias": (2, 1),
    "h/mlp/down_kernel": (3, 2),
    "h/mlp/down_bias": (2, 1),
    "ln_f/scale": (1, 1),
    "ln_f/bias": (1, 1),
}


def named(tree) -> dict:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in paths}


@pytest.fixture(scope="module")
def abstract_params():
    return {
        scan: build(run_config(model={"bias": True, "scan_layers": scan})).abstract.params
        for scan in (False, True)
    }


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("decay", ["matrices", "no_embeddings", "all"])
def test_fault_19_trap_2_decay_follows_nanogpts_rule_leaf_by_leaf(abstract_params, decay, scan):
    params = named(abstract_params[scan])
    assert {k: leaf.ndim for k, leaf in params.items()} == {k: n for k, (n, _) in LEAVES.items()}
    want = {
        name: {
            "matrices": theirs >= 2,
            "no_embeddings": theirs >= 2 and name not in ("wte", "wpe"),
            "all": True,
        }[decay]
        for name, (_, theirs) in LEAVES.items()
    }
    assert named(decay_mask(OptimConfig(decay=decay), PARAMETERS)(abstract_params[scan])) == want


def test_value_embeddings_decay_as_the_others_do():
    params = {"wte": 0, "h": {"attn": {"value_table": 0, "qkv_kernel": 0}}}
    for decay, embeddings in (("matrices", True), ("no_embeddings", False)):
        got = named(decay_mask(OptimConfig(decay=decay), PARAMETERS)(params))
        assert got.pop("h/attn/qkv_kernel") and set(got.values()) == {embeddings}


def test_fault_19_stacked_scales_and_biases_do_not_shrink():
    """With no gradient AdamW moves only what decays, here by lr * weight_decay = 1/8."""
    config = OptimConfig(lr=0.5, min_lr=0.5, steps=4, warmup_steps=0, weight_decay=0.25)
    params = {k: jnp.ones((2,) * n) for k, (n, _) in LEAVES.items()}
    tree: dict = {}
    for name, leaf in params.items():
        *parents, last = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = leaf
    tx = optimizer(config, PARAMETERS)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates = jax.jit(lambda p: tx.update(zeros, tx.init(p), p)[0])(tree)
    for name, update in named(updates).items():
        expected = -0.125 if LEAVES[name][1] >= 2 else 0.0
        np.testing.assert_allclose(update, expected, err_msg=name, rtol=1e-6)


def test_optimizer_state_is_float32_whatever_the_products_are():
    config = run_config()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    abstract = step.build_steps(config, mesh, "bfloat16", "xla").abstract
    for tree in (abstract.params, abstract.opt_state):
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
        assert dtypes <= {"float32", "int32"} and "float32" in dtypes


# --- weights that lie ahead


def test_weights_lie_ahead_of_updates_by_a_share_of_their_mean():
    """By the paper's formulas: x' = y + update(y), m' = d m + (1 - d) (x' - x), y' = x' + b' m'."""
    config = OptimConfig(lr=0.1, min_lr=0.0, steps=24, warmup_steps=0, schedule="linear")
    config = config.model_copy(update={"lookahead": 0.6, "lookahead_decay": 0.9})
    tx = optimizer(config, PARAMETERS)
    rng = np.random.default_rng(0)
    params = {"wte": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    reference = NumpyAdamW(config, params, {"wte": True})
    state, x, mean = tx.init(params), reference.p["wte"].copy(), 0.0
    for i in range(24):
        grads = {"wte": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        reference.update(grads)  # from y
        mean = 0.9 * mean + 0.1 * (reference.p["wte"] - x)
        x = reference.p["wte"]
        share = 0.6 * rate(config, i + 1) / 0.1 if 4 <= i + 1 < 18 else 0.0
        reference.p["wte"] = x + share * mean
        np.testing.assert_allclose(params["wte"], reference.p["wte"], rtol=1e-5, atol=1e-6)
        assert np.allclose(x, params["wte"], atol=1e-4) == (share == 0)


# --- the mean of the last weights


def test_the_average_is_the_mean_of_the_weights_after_each_update_of_the_tail():
    config = OptimConfig(lr=0.1, steps=10, warmup_steps=0, average=0.4)
    tx, plain = (
        optimizer(config.model_copy(update={"average": average}), PARAMETERS)
        for average in (0.4, 0.0)
    )
    rng = np.random.default_rng(0)
    params = {"wte": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    state, other, seen = tx.init(params), plain.init(params), []
    for _ in range(10):
        grads = {"wte": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
        updates, state = tx.update(grads, state, params)
        same, other = plain.update(grads, other, params)
        np.testing.assert_array_equal(updates["wte"], same["wte"])
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["wte"], np.float64))
        average = swap_average(params, state)[0]["wte"]
        if len(seen) <= 7:  # the tail begins with update 7, and has one set of weights then
            np.testing.assert_array_equal(average, params["wte"])
        else:
            np.testing.assert_allclose(average, np.mean(seen[6:], 0), rtol=1e-6)
    back = swap_average(*swap_average(params, state))
    jax.tree.map(np.testing.assert_array_equal, back, (params, state))
    assert swap_average(params, other) == (params, other)

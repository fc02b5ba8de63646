"""The model against GPT-2 written in NumPy float64, against Hugging Face, and its promises."""

import math
import os
import subprocess
import sys
from functools import lru_cache, partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.extend.core import jaxprs_in_params

from scalegpt.config.loading import validate
from scalegpt.config.recipe import ModelConfig, RopeScaling
from scalegpt.model import gpt as model_module
from scalegpt.model.flops import parameter_count
from scalegpt.model.gpt import GPT, logits
from scalegpt.model.layers import constrain, dropout, rotary_tables, rotate
from scalegpt.step import build as step
from scalegpt.step import sharding
from scalegpt.step.loss import row_losses, token_losses

TINY = dict(n_layer=2, n_head=3, n_embd=12, block_size=10, vocab_size=50, vocab_multiple=16)


def gpt(dtype="float32", **keys):
    return GPT(ModelConfig(**{**TINY, **keys}), jnp.dtype(dtype), "xla")


def initial(model, seed=0):
    """The model's own initial parameters; compiling the random numbers takes a while."""

    def init(key):
        return nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])

    return jax.jit(init)(jax.random.key(seed))


@lru_cache
def shapes(model):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def random_params(model, seed=1):
    """Far from the initial ones, so that a bias or a scale that is not used shows."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        mean = 1.0 if path[-1].key in ("scale", "q_gain", "k_gain") else 0.0
        return jnp.asarray(mean + 0.2 * rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes(model))


# Tests compile much and run little: the least of LLVM's optimizations saves half of their time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnums=0)
def all_logits(model, params, tokens):
    hidden = model.apply({"params": params}, tokens)
    return logits(hidden, params.get("head_kernel", params["wte"]), model.config)


def some_tokens(rows=3, length=10, vocab=50, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def equations(jaxpr):
    """Every equation of a jaxpr, those of its inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def named(tree) -> dict:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in paths}


# --- the forward pass


def numpy_gpt(c: ModelConfig, params, tokens):
    """Logits [B, T, vocab_size] in float64, of GPT-2 and of what may differ from it."""
    p = {k: np.asarray(v, np.float64) for k, v in named(params).items()}
    erf = np.vectorize(math.erf)

    def rms(x, gain=1.0):
        return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + (c.norm_eps or 1e-6))

    def norm(x, name, layer=None):
        scale, bias = (p.get(f"{name}/{k}") for k in ("scale", "bias"))
        pick = (lambda a: a) if layer is None else (lambda a: a[layer])
        if c.norm == "rmsnorm":
            return rms(x, 1.0 if scale is None else pick(scale))
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + (c.norm_eps or 1e-5)
        )
        return x * pick(scale) + (0 if bias is None else pick(bias))

    def linear(x, name, layer):
        """The last axis of x against the kernel as a matrix."""
        kernel = p[f"{name}_kernel"][layer].reshape(x.shape[-1], -1)
        bias = p.get(f"{name}_bias")
        return x @ kernel + (0 if bias is None else bias[layer].reshape(-1))

    def turn(x):
        """RoPE as a complex rotation: entry j is the real part, j + K/2 the imaginary one."""
        if c.position != "rope":
            return x
        half = c.head_dim // 2
        z = x[..., :half] + 1j * x[..., half:]
        t, j = np.arange(x.shape[1]), np.arange(half)
        z = z * np.exp(1j * t[:, None] * c.rope_base ** (-2 * j / c.head_dim))[:, None, :]
        return np.concatenate([z.real, z.imag], -1)

    def activation(x, name):
        if "relu" in name:
            return np.maximum(x, 0) ** (2 if name == "relu2" else 1)
        if name in ("silu", "swiglu"):
            return x / (1 + np.exp(-x))
        if name in ("gelu", "geglu"):
            return x * 0.5 * (1 + erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    b, t = tokens.shape
    x = p["wte"][tokens]
    if c.position == "learned":
        x = x + p["wpe"][:t]
    if c.embedding_norm:
        x = rms(x)
    if c.smear:
        gate = 1 / (1 + np.exp(-x[..., :12] @ p["smear_gate"]))
        x = (
            x
            + np.pad(x[:, :-1] * gate[:, 1:, None], ((0, 0), (1, 0), (0, 0))) * p["smear_strength"]
        )
    for n in range(2, c.ngram + 1) if c.ngram_rows else ():
        for row, at in np.ndindex(b, t):
            if at < n - 1:
                continue
            hashed = n
            for token in tokens[row, at - n + 1 : at + 1][::-1].tolist():
                hashed = (hashed ^ token) * 0x9E3779B1 % 2**32
                hashed ^= hashed >> 15
            x[row, at] += p["ngram_strength"][n - 2] * p["ngram_table"][hashed % c.ngram_rows]
    x0 = x
    for i in range(c.n_layer):
        if c.residual_scalars:
            x = p["h/residual_scalars"][i, 0] * x + p["h/residual_scalars"][i, 1] * x0
        normed, heads = norm(x, "h/ln_1", i), (c.n_head, c.kv_heads, c.kv_heads)
        names = ["qkv"] if "h/attn/qkv_kernel" in p else ["q", "kv"]
        qkv = np.concatenate([linear(normed, f"h/attn/{name}", i) for name in names], -1)
        qkv = np.split(qkv, np.cumsum(heads)[:-1] * c.head_dim, -1)
        q, k, v = (x.reshape(b, t, h, -1) for x, h in zip(qkv, heads, strict=True))
        if c.value_embeddings:
            added = p["h/attn/value_table"][i][tokens].reshape(v.shape)
            if c.value_gates:
                share = 2 / (1 + np.exp(-normed[..., :12] @ p["h/attn/value_gate"][i]))
            else:
                share = p["h/attn/value_strength"][i]
            v = v + added * share[..., None]
        if c.qk_norm:
            gains = [p.get(f"h/attn/{x}_gain", np.ones((c.n_layer, 1)))[i] for x in "qk"]
            q, k = rms(q, gains[0]), rms(k, gains[1])
        q, k = turn(q), turn(k)
        k, v = (x.repeat(c.n_head // c.kv_heads, 2) for x in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) * (c.attention_scale or c.head_dim**-0.5)
        seen = np.tri(t, dtype=bool)
        if c.window and c.window_pattern[i % len(c.window_pattern)] == "S":
            seen &= np.arange(t)[:, None] - np.arange(t) < c.window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhts,bshk->bthk", weights, v).reshape(b, t, -1)
        x = x + linear(y, "h/attn/proj", i)
        normed = norm(x, "h/ln_2", i)
        up = linear(normed, "h/mlp/up", i)
        if c.mlp == "plain":
            inner = activation(up, c.activation)
        else:
            inner = activation(linear(normed, "h/mlp/gate", i), c.mlp) * up
        x = x + linear(inner, "h/mlp/down", i)
        if i == c.n_layer // 2:
            middle = x
    if c.backout:
        x = x - p["backout"] * middle
    z = norm(x, "ln_f") @ p.get("head_kernel", p["wte"])[: c.vocab_size].T
    if c.softcap == "tanh":
        return c.logit_softcap * np.tanh(z / c.logit_softcap)
    return c.logit_softcap * z / np.sqrt(z**2 + c.logit_softcap**2) if c.logit_softcap else z


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"activation": "gelu"},
        {"position": "rope"},
        {"position": "rope", "rope_base": 50.0, "n_head": 2, "activation": "gelu"},
        {"norm": "rmsnorm", "activation": "relu2", "qk_norm": True},
        {"embedding_norm": True, "logit_softcap": 1.5, "tie_word_embeddings": False},
        {"residual_scalars": True, "value_embeddings": True},
        {"preset": "modern", "residual_scalars": True, "value_embeddings": True},
        {"n_head": 4, "n_kv_head": 2, "head_size": 6, "value_embeddings": True},
        {"smear": True, "backout": True, "n_layer": 3},
        {"preset": "modern", "smear": True, "backout": True, "ngram_rows": 40},
        {"ngram_rows": 40, "ngram": 3},
        {"n_kv_head": 1, "value_embeddings": True, "value_gates": True},
        {"n_kv_head": 1, "position": "rope"},
        {"mlp": "swiglu", "n_inner": 20},
        {"norm": "rmsnorm", "norm_gain": True, "norm_eps": 0.01, "qk_norm": True},
        {"window": 3, "attention_scale": 0.9},
        {"window": 4, "window_pattern": "SSL", "n_layer": 4, "position": "rope"},
        {"window": 2, "window_pattern": "LS", "logit_softcap": 1.5, "softcap": "tanh"},
        {"qkv_bias": True, "n_kv_head": 1, "norm_eps": 0.1},
        {"mlp": "geglu"},
        {"mlp": "geglu_tanh"},
        {"activation": "silu", "n_inner": 7},
        {"activation": "relu"},
    ],
    ids=str,
)
def test_trap_3_forward_matches_numpy_with_either_bias_and_gelu(keys, bias):
    model = gpt(bias=bias, **keys)
    params = random_params(model)
    tokens = some_tokens()
    want = numpy_gpt(model.config, params, tokens)
    got = all_logits(model, params, tokens)[..., :50]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(want).max() > 1  # so that the comparison means something


def test_the_modern_model_begins_with_equal_chances_for_all_tokens():
    """Nothing is written into the residual stream, and the head is zero."""
    model = gpt(preset="modern")
    params = initial(model)
    assert np.abs(all_logits(model, params, some_tokens())[..., :50]).max() == 0
    own = {path: x for path, x in named(params).items() if path != "h/residual_scalars"}
    zero = {path for path, x in own.items() if not np.abs(x).max()}
    written = {"h/attn/proj_kernel", "h/mlp/down_kernel"}
    assert zero == {"head_kernel", "smear_gate", "smear_strength", *written}
    spread = {path: float(x.std()) for path, x in own.items() if path not in zero}
    assert spread.keys() == {"wte", "h/attn/qkv_kernel", "h/mlp/up_kernel"}
    assert abs(spread.pop("wte") - 1) < 0.1
    assert all(abs(s - 0.5 / 12**0.5) < 0.02 for s in spread.values()), spread


def test_traps_3_and_4_the_two_gelus_and_the_two_positions_are_not_the_same():
    params = random_params(gpt())
    tokens = some_tokens()
    base = all_logits(gpt(), params, tokens)[..., :50]
    assert np.abs(all_logits(gpt(activation="gelu"), params, tokens)[..., :50] - base).max() > 1e-4
    assert np.abs(all_logits(gpt(position="rope"), params, tokens)[..., :50] - base).max() > 0.1


def test_fault_10_learned_positions_are_used():
    model = gpt()
    params = random_params(model)
    other = {**params, "wpe": params["wpe"][::-1]}
    tokens = some_tokens()
    assert np.abs(all_logits(model, params, tokens) - all_logits(model, other, tokens)).max() > 0.1


@pytest.mark.oracle
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 300},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.5},
    ],
    ids=str,
)
def test_scaled_rotations_are_those_of_transformers(scaling):
    pytest.importorskip("torch", reason="the second opinion needs torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**scaling, "rope_theta": 500.0}
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=rope)
    frequency, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, None)
    angle = np.arange(700)[:, None] * frequency.double().numpy()
    cos, sin = rotary_tables(700, 64, 500.0, RopeScaling(**scaling))
    np.testing.assert_allclose(cos, factor * np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(sin, factor * np.sin(angle), atol=1e-4)
    plain = rotary_tables(700, 64, 500.0)[0]
    assert np.abs(cos - plain).max() > 0.5


def test_rotation_depends_on_the_distance_only():
    cos, sin = rotary_tables(1024, 64, 10000.0)
    q, k = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    everywhere = [rotate(jnp.tile(x, (1, 1024, 1, 1)), cos, sin)[0, :, 0] for x in (q, k)]
    for distance in (0, 1, 77, 500):
        products = (everywhere[0][distance:] * everywhere[1][: 1024 - distance]).sum(-1)
        np.testing.assert_allclose(products, products[0], atol=1e-4)
    np.testing.assert_allclose(everywhere[0][0], q)  # position 0 does not turn


@pytest.mark.oracle
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_forward_matches_hugging_face(activation):
    torch = pytest.importorskip("torch", reason="the second opinion on GPT-2 needs torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = (
        GPT2LMHeadModel(
            GPT2Config(
                n_layer=2,
                n_head=3,
                n_embd=12,
                n_positions=10,
                vocab_size=50,
                activation_function=activation,
                attn_implementation="eager",
            )
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {k: v.numpy() for k, v in theirs.state_dict().items()}

    def stacked(name, *shape):
        layers = [weights[f"transformer.h.{i}.{name}"].reshape(shape or (-1,)) for i in range(2)]
        return jnp.asarray(np.stack(layers), jnp.float32)

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    wte = jnp.zeros((64, 12)).at[:50].set(weights["transformer.wte.weight"])
    params = {
        "wte": wte,
        "wpe": jnp.asarray(weights["transformer.wpe.weight"], jnp.float32),
        "h": {
            "ln_1": norm("ln_1"),
            "ln_2": norm("ln_2"),
            "attn": {
                "qkv_kernel": stacked("attn.c_attn.weight", 12, 3, 3, 4),
                "qkv_bias": stacked("attn.c_attn.bias", 3, 3, 4),
                "proj_kernel": stacked("attn.c_proj.weight", 3, 4, 12),
                "proj_bias": stacked("attn.c_proj.bias"),
            },
            "mlp": {
                "up_kernel": stacked("mlp.c_fc.weight", 12, 48),
                "up_bias": stacked("mlp.c_fc.bias"),
                "down_kernel": stacked("mlp.c_proj.weight", 48, 12),
                "down_bias": stacked("mlp.c_proj.bias"),
            },
        },
        "ln_f": {
            "scale": jnp.asarray(weights["transformer.ln_f.weight"], jnp.float32),
            "bias": jnp.asarray(weights["transformer.ln_f.bias"], jnp.float32),
        },
    }
    model = gpt(bias=True, activation="gelu" if activation == "gelu" else "gelu_tanh")
    assert jax.tree.map(jnp.shape, shapes(model)) == jax.tree.map(jnp.shape, params)
    tokens = some_tokens()
    want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    got = all_logits(model, params, tokens)[..., :50]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_no_position_sees_a_later_one():
    model = gpt()
    params, tokens = random_params(model), some_tokens(1)

    @jit
    def gradient(t):
        """Of a random mixture of what position t gives, to every position embedding."""
        direction = jax.random.normal(jax.random.key(0), (12,))
        out = lambda wpe: model.apply({"params": {**params, "wpe": wpe}}, tokens)[0, t]  # noqa: E731
        return jax.grad(lambda wpe: out(wpe) @ direction)(params["wpe"])

    for t in range(10):
        reached = np.abs(gradient(t)).max(-1)
        assert (reached[t + 1 :] == 0).all(), f"{t} sees a later position"
        assert (reached[: t + 1] > 0).all(), f"{t} misses an earlier position"


def test_with_rope_no_position_sees_a_later_one():
    model = gpt(position="rope")
    params, tokens = random_params(model), some_tokens(1)
    apply = jit(lambda x: model.apply({"params": params}, x))
    base = np.asarray(apply(tokens))
    for t in (1, 5, 9):
        other = tokens.copy()
        other[0, t] = (other[0, t] + 1) % 50
        changed = (np.asarray(apply(other)) != base).any(-1)[0]
        assert not changed[:t].any() and changed[t:].all()


def test_more_tokens_than_block_size_is_an_error():
    model = gpt()
    with pytest.raises(ValueError, match="11 tokens are more than model.block_size=10"):
        jax.eval_shape(model.apply, {"params": shapes(model)}, jnp.zeros((1, 11), jnp.int32))


# --- initialisation


def test_fault_25_initialisation_is_gpt2s():
    """N(0, 0.02); the two projections into the residual stream 0.02 / sqrt(2 L); no fan-in."""
    L, D = 8, 128
    model = gpt(n_layer=L, n_head=4, n_embd=D, block_size=256, vocab_size=500, bias=True)
    params = named(initial(model))
    for name, x in params.items():
        if name.endswith("scale"):
            assert (x == 1).all(), name
        elif name.endswith("bias"):
            assert (x == 0).all(), name
        else:
            std = 0.02 / math.sqrt(2 * L) if "proj" in name or "down" in name else 0.02
            layers = np.asarray(x).reshape(L, -1) if name.startswith("h/") else x.reshape(1, -1)
            # 5 sigma of an estimate from n draws.
            error = 5 * std / math.sqrt(2 * layers.shape[1])
            assert np.abs(layers.std(1) - std).max() < error, name
            assert np.abs(layers.mean(1)).max() < 5 * std / math.sqrt(layers.shape[1]), name
            # Layers, and the kernels of a layer, are drawn independently.
            together = np.corrcoef(layers[:, :1000]) - np.eye(len(layers))
            assert len(layers) == 1 or np.abs(together).max() < 0.2, name
    kernels = [np.asarray(x)[0].ravel()[:1000] for k, x in params.items() if k.endswith("kernel")]
    assert np.abs(np.corrcoef(kernels) - np.eye(4)).max() < 0.2
    assert sum(k.endswith("bias") for k in params) == 7 and len(kernels) == 4


def test_initial_loss_is_that_of_guessing():
    model = gpt(n_head=4, n_embd=64, block_size=64, vocab_size=997, vocab_multiple=128)
    tokens = some_tokens(8, 65, 997)
    loss = jit(lambda p: row_losses(model, p, tokens, None))(initial(model)).sum() / 512
    # Logits of std s = 0.02 sqrt(D) = 0.16 cost s^2 / 2 = 0.013 nats above ln V.
    assert float(loss) == pytest.approx(math.log(997) + 0.013, abs=0.03)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_leaves_add_up_to_parameter_count(position, bias):
    model = gpt(position=position, bias=bias)
    leaves = jax.tree.leaves(shapes(model))
    padding = (64 - 50) * 12
    count = sum(x.size for x in leaves) - padding
    assert count == parameter_count(model.config)
    assert {x.dtype.name for x in leaves} == {"float32"}


def test_leaves_of_gpt2_add_up_to_the_published_number():
    for bias, published in ((False, 124_337_664), (True, 124_439_808)):
        model = GPT(ModelConfig(bias=bias, vocab_size=50257), jnp.dtype("float32"), "xla")
        assert sum(x.size for x in jax.tree.leaves(shapes(model))) == published + 47 * 768


@pytest.mark.parametrize("asked, want", [("auto", "xla"), ("flax", "flax"), ("splash", "xla")])
def test_a_trained_model_keeps_its_attention_where_this_machine_has_it(asked, want):
    keys = {"data": {"path": "x"}, "run": {"out_dir": "y"}}
    config = validate({**keys, "model": {"vocab_size": 64, "attention": asked}}, "test")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    assert step.build_for_use(config, mesh, 1).model.attention == want


# --- precision


def test_fault_03_products_are_bfloat16_on_every_accelerator_and_never_float16():
    def dtype(platform, kind, capability=None, **keys):
        base = {"data": {"path": "x"}, "run": {"out_dir": "y"}, "model": keys}
        device = SimpleNamespace(platform=platform, device_kind=kind, coords=None)
        if capability:
            device.compute_capability = capability
        mesh = SimpleNamespace(devices=np.array([device]), shape={"context": 1})
        return step.resolve(validate(base, "test"), mesh)[0]

    for kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v6 lite"):
        assert dtype("tpu", kind) == "bfloat16"
    for kind, capability, want in (
        ("NVIDIA H200", "9.0", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB", "8.0", "bfloat16"),
        ("NVIDIA B200", "10.0", "bfloat16"),
        ("AMD Instinct MI250X", "gfx90a", "bfloat16"),
        ("Tesla T4", "7.5", "float32"),
        ("Tesla V100-SXM2-16GB", "7.0", "float32"),
        ("Tesla P100-PCIE-16GB", "6.0", "float32"),
    ):
        assert dtype("gpu", kind, capability) == want
    assert dtype("cpu", "cpu") == "float32"
    assert dtype("tpu", "TPU v3", dtype="float32") == "float32"
    assert dtype("cpu", "cpu", dtype="bfloat16") == "bfloat16"


def test_fault_04_logits_are_float32_under_bfloat16():
    # 257 is no bfloat16 number.
    hidden, table = jnp.array([[256.0, 1.0]], "bfloat16"), jnp.ones((3, 2))
    scores = logits(hidden, table, ModelConfig(vocab_size=2))
    assert scores.dtype == jnp.float32 and scores[0, :2].tolist() == [257.0, 257.0]


def test_fault_04_loss_is_float32_under_bfloat16():
    model = gpt("bfloat16")
    params, tokens = random_params(model), some_tokens(16, 11)
    losses = jit(lambda p: row_losses(model, p, tokens, None))(params)
    exact = jit(lambda p: row_losses(gpt(), p, tokens, None))(params)
    assert losses.dtype == jnp.float32
    rounded = losses.astype(jnp.bfloat16).astype(jnp.float32)
    assert (losses != rounded).sum() >= 14  # one in 2^16 would be, by chance
    np.testing.assert_allclose(losses, exact, rtol=0.05)
    assert (losses != exact).any()  # it did compute in bfloat16


def test_trap_5_under_bfloat16_everything_delicate_is_float32():
    model = gpt("bfloat16", bias=True, position="rope")
    params, tokens = shapes(model), some_tokens(3, 11)
    jaxpr = jax.make_jaxpr(lambda p: row_losses(model, p, tokens, None))(params).jaxpr
    seen = []
    for eqn in equations(jaxpr):
        kinds = {str(v.aval.dtype) for v in eqn.invars}
        if eqn.primitive.name == "dot_general":
            assert kinds == {"bfloat16"}, eqn
        if eqn.primitive.name in ("exp", "log", "rsqrt", "reduce_sum", "reduce_max"):
            assert kinds <= {"float32", "int32", "bool"}, eqn
        seen.append(eqn.primitive.name)
    # qkv, scores, values, proj, up and down of a scanned layer, and the head.
    assert seen.count("dot_general") % 7 == 0 and {"exp", "log", "rsqrt"} <= set(seen)


def test_fault_16_no_complex_and_no_float64():
    tokens, keys = some_tokens(3, 11), jax.random.split(jax.random.key(0), 3)

    def kinds(rate):
        model = gpt("bfloat16", bias=True, position="rope", dropout=rate)
        loss = lambda p: row_losses(  # noqa: E731
            model, p, jnp.asarray(tokens), keys if rate else None
        ).sum()
        jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes(model)).jaxpr
        values = [v for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars)]
        # Scalars are Python's own numbers.
        return {str(v.aval.dtype) for v in values if getattr(v.aval, "ndim", 0)}

    with jax.enable_x64(True):  # without it float64 could not even be asked for
        wide = kinds(0.0)
    for found in (wide, kinds(0.1)):
        assert {"bfloat16", "float32"} <= found
        assert not found & {"float64", "complex64", "complex128"}, found


# --- the padded vocabulary


def test_fault_22_padded_ids_never_win_and_have_no_probability():
    model = gpt()
    params = random_params(model)
    params["wte"] = params["wte"].at[50:].set(100.0)  # would win everything
    scores = all_logits(model, params, some_tokens())
    assert scores.shape[-1] == 64
    assert (scores.argmax(-1) < 50).all()
    assert (jax.nn.softmax(scores)[..., 50:] == 0).all()


def test_trap_6_padding_changes_neither_loss_nor_gradient():
    padded, exact = gpt(), gpt(vocab_multiple=1)
    params = random_params(padded)
    tokens = some_tokens(3, 11)

    def value(model, params):
        return jax.value_and_grad(lambda p: row_losses(model, p, tokens, None).sum())(params)

    loss, grads = jit(lambda p: value(padded, p))(params)
    cut = {**params, "wte": params["wte"][:50]}
    loss_cut, grads_cut = jit(lambda p: value(exact, p))(cut)
    assert float(loss) == pytest.approx(float(loss_cut), rel=1e-6)
    np.testing.assert_allclose(grads["wte"][:50], grads_cut["wte"], rtol=1e-4, atol=1e-5)
    assert (grads["wte"][50:] == 0).all()
    assert (np.abs(grads["wte"][:50]).max(-1) > 0).all()


# --- the loss


def numpy_losses(hidden, table, targets, vocab):
    """Sums of rows, and the gradients of their total to hidden and table, in float64."""
    hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)[:vocab]
    scores = hidden @ table.T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counted = targets >= 0
    right = np.take_along_axis(p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    d = (p - np.eye(vocab)[np.maximum(targets, 0)]) * counted[..., None]
    dtable = np.einsum("btv,btd->vd", d, hidden)
    return (-np.log(right) * counted).sum(-1), d @ table, dtable


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 11, 12, 13, 128])
def test_chunked_loss_and_gradients_match_numpy(chunk):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 12, 6)).astype(np.float32)
    table = rng.normal(size=(16, 6)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 12)).astype(np.int32)
    targets[0, :5] = targets[1, 11] = targets[2] = -1  # a row that counts nothing at all, too

    def losses(hidden, table):
        config = ModelConfig(vocab_size=11, loss_chunk=chunk)
        rows = token_losses(hidden, table, targets, config)
        return rows.sum(), rows

    grad = jit(jax.value_and_grad(losses, argnums=(0, 1), has_aux=True))
    (_, rows), (dhidden, dtable) = grad(hidden, table)
    want, want_dhidden, want_dtable = numpy_losses(hidden, table, targets, 11)
    assert rows.dtype == jnp.float32 and rows[2] == 0
    np.testing.assert_allclose(rows, want, rtol=2e-6)
    np.testing.assert_allclose(dhidden, want_dhidden, atol=3e-6)
    np.testing.assert_allclose(dtable[:11], want_dtable, atol=1e-5)
    assert (dtable[11:] == 0).all()


def test_masked_inputs_and_targets_count_nothing():
    model = gpt(loss_chunk=4)
    params = random_params(model)
    tokens = some_tokens(2, 11)
    masked = tokens.copy()
    masked[0, 6:] = -1
    row = lambda x: jit(lambda p: row_losses(model, p, x, None))(params)  # noqa: E731
    scores = jnp.asarray(numpy_gpt(model.config, params, tokens[:, :-1]))
    each = -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(row(tokens), each.sum(1), rtol=1e-5)
    np.testing.assert_allclose(row(masked), [each[0, :5].sum(), each[1].sum()], rtol=1e-5)


def test_logits_of_the_whole_sequence_are_never_held():
    """At T = 1024 and V = 50304 they would be the largest array by far."""
    B, T, V, chunk = 2, 1024, 50304, 128

    def largest(chunk, scan):
        model = gpt(
            n_layer=1,
            n_head=1,
            n_embd=8,
            block_size=T,
            vocab_size=50257,
            vocab_multiple=128,
            loss_chunk=chunk,
            scan_layers=scan,
        )
        params = shapes(model)
        tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
        loss = lambda p, x: row_losses(model, p, x, None).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens).jaxpr
        return max(
            v.aval.size for eqn in equations(jaxpr) for v in eqn.outvars if hasattr(v.aval, "size")
        )

    assert largest(chunk, True) == largest(chunk, False) == B * chunk * V
    assert largest(T, True) == B * T * V  # that this test would notice


# --- unrolled or looped, kept or recomputed


# (scan_layers, remat), beside the reference. (False, "dots") would say no more than these.
SLOW_KINDS = [(False, "full"), (True, "full"), (True, "none"), (True, "dots")]


@pytest.mark.parametrize(
    "kinds", [[(True, "offload")], pytest.param(SLOW_KINDS, marks=pytest.mark.slow)]
)
def test_scan_and_remat_change_neither_loss_nor_gradient(kinds):
    """With dropout: recomputing must draw the same masks again."""
    tokens = some_tokens(3, 11)
    keys = jax.random.split(jax.random.key(3), 3)
    parts = dict(bias=True, smear=True, backout=True)
    params = random_params(gpt(**parts))
    results = {}
    for scan, remat in [(False, "none"), *kinds]:
        model = gpt(**parts, scan_layers=scan, remat=remat, dropout=0.2)
        assert jax.tree.map(jnp.shape, shapes(model)) == jax.tree.map(jnp.shape, params)
        loss = lambda p, model=model: row_losses(model, p, tokens, keys).sum()  # noqa: E731
        results[scan, remat] = jit(jax.value_and_grad(loss))(params)
    value, grads = results.pop((False, "none"))
    for which, (other, other_grads) in results.items():
        assert float(other) == pytest.approx(float(value), rel=1e-6), which
        for name, g in named(grads).items():
            error = np.linalg.norm(named(other_grads)[name] - g) / np.linalg.norm(g)
            assert error < 1e-6, f"{which} {name}: {error:.1e}"


def test_remat_recomputes_and_scan_loops():
    """That the two keys do something."""

    def count(name, **keys):
        model = gpt(n_layer=3, **keys)
        params = shapes(model)
        tokens = jnp.zeros((1, 11), jnp.int32)
        loss = lambda p: row_losses(model, p, tokens, None).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
        return sum(eqn.primitive.name == name for eqn in equations(jaxpr))

    none, dots, full = (count("dot_general", remat=r) for r in ("none", "dots", "full"))
    assert none == dots < full  # attention's scores are computed again whatever remat is
    assert count("dot_general", remat="offload") == dots
    # There and back: queries, keys, values, what attention gives, its scores' sums, its projection
    # and the MLP's first product.
    assert [count("device_put", remat=r) for r in ("dots", "offload")] == [0, 2 * 7]
    assert count("tanh", remat="dots") == count("tanh", remat="full") > count("tanh", remat="none")
    unrolls = [
        [eqn.params["unroll"] for eqn in equations(jaxpr_of_forward(scan)) if is_scan(eqn)]
        for scan in (False, True)
    ]
    assert unrolls == [[3], [1]]


def is_scan(eqn) -> bool:
    return eqn.primitive.name == "scan"


def jaxpr_of_forward(scan_layers):
    model = gpt(n_layer=3, scan_layers=scan_layers)
    params = shapes(model)
    apply = lambda p: model.apply({"params": p}, jnp.zeros((1, 10), jnp.int32))  # noqa: E731
    return jax.make_jaxpr(apply)(params).jaxpr


# --- dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_scales_it(rate):
    x = jnp.ones((8, 64, 32))
    keys = jax.random.split(jax.random.key(0), 8)
    y = np.asarray(dropout(x, rate, keys, 0))
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-6)
    assert abs((y > 0).mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / y.size)
    assert len(np.unique(y.reshape(8, -1), axis=0)) == 8  # every row its own mask
    assert (y != dropout(x, rate, keys, 1)).any()  # every site too
    assert dropout(x.astype(jnp.bfloat16), rate, keys, 0).dtype == jnp.bfloat16


def test_dropout_of_rate_0_or_without_keys_is_identity():
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(dropout(x, 0.0, keys, 0), x)
    np.testing.assert_array_equal(dropout(x, 0.5, None, 0), x)


def test_dropout_mask_of_a_row_follows_its_key():
    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    keys = jax.random.split(jax.random.key(1), 6)
    whole = dropout(x, 0.4, keys, 7)
    order = jnp.array([3, 1, 5])
    np.testing.assert_array_equal(dropout(x[order], 0.4, keys[order], 7), whole[order])


@pytest.mark.parametrize("scan", [False, True])
def test_every_place_of_dropout_draws_its_own_mask(monkeypatch, scan):
    """One key for all layers is a fault of ROCm's nanoGPT-JAX."""
    seen, params = [], random_params(gpt(n_layer=3))

    def record(x, keys):
        """`x`, of which the keys are seen on the way: Flax's scan takes no jax.debug.callback."""
        assert keys is not None

        def see(*data):
            seen.append(np.array(data))
            return np.zeros((), x.dtype)

        nothing = jax.ShapeDtypeStruct((), x.dtype)
        return x + jax.pure_callback(see, nothing, *jax.random.key_data(keys))

    def spy_dropout(x, rate, keys, site):
        x = record(x, jax.vmap(lambda key: jax.random.fold_in(key, site))(keys))
        return dropout(x, rate, keys, site)

    attend = model_module.causal_attention

    def spy_attention(q, *args, dropout_keys, **kwargs):
        return attend(record(q, dropout_keys), *args, dropout_keys=dropout_keys, **kwargs)

    monkeypatch.setattr(model_module, "dropout", spy_dropout)
    monkeypatch.setattr(model_module, "causal_attention", spy_attention)
    model = gpt(n_layer=3, dropout=0.2, scan_layers=scan)
    keys = jax.random.split(jax.random.key(0), 2)
    jax.block_until_ready(jit(lambda p: model.apply({"params": p}, some_tokens(2), keys))(params))
    assert len(seen) == 3 * 3 + 1  # weights, projection and MLP of each layer, and embeddings
    assert len(np.unique(np.concatenate(seen), axis=0)) == 2 * len(seen)


SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 11}


def run_config(**sections):
    base = {
        "model": {**SMALL, "vocab_multiple": 16},
        "batch": {"sequences": 8},
        "data": {"path": "x"},
        "run": {"out_dir": "y"},
        "optim": {"steps": 10, "warmup_steps": 2},
    }
    for name, keys in sections.items():
        base[name] = {**base[name], **keys} if name in base else keys
    return validate(base, "test")


def build(devices, **sections):
    config = run_config(**sections)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    return step.build_steps(config, mesh, "float32", "xla")


def test_fault_08_dropout_is_off_in_evaluation_and_on_in_training():
    tokens, keys = some_tokens(8, 7, 11), jax.random.split(jax.random.key(0), 8)
    with_dropout, without = (build(1, model={"dropout": rate}) for rate in (0.9, 0.0))
    params = random_params(without.model)
    got, count = with_dropout.evaluate(params, tokens)
    want, _ = without.evaluate(params, tokens)
    np.testing.assert_array_equal(got, want)
    assert count.tolist() == [6] * 8
    for rate in (0.5, 0.9):
        model = GPT(ModelConfig(**{**TINY, **SMALL, "dropout": rate}), jnp.dtype("float32"), "xla")
        loss = lambda p, model=model: row_losses(model, p, tokens, keys)  # noqa: E731
        trained = jit(loss)(params)
        assert np.isfinite(trained).all() and (np.abs(trained - want) > 1e-3).all()


def test_dropout_of_a_row_does_not_depend_on_the_microbatch():
    tokens, results = some_tokens(4, 7, 11), {}
    for rate, microbatch in ((0.4, 4), (0.4, 2), (0.0, 4)):
        steps = build(1, model={"dropout": rate}, batch={"sequences": 4, "microbatch": microbatch})
        a, m = steps.layout
        assert (a, m) == (4 // microbatch, microbatch)
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), steps.abstract)
        state = state.replace(params=random_params(steps.model))
        _, metrics = steps.train(state, tokens.reshape(a, m, 7))
        results[rate, microbatch] = [float(metrics[k]) for k in ("train/loss", "train/grad_norm")]
    np.testing.assert_allclose(results[0.4, 2], results[0.4, 4], rtol=1e-5)
    assert abs(results[0.4, 4][0] - results[0.0, 4][0]) > 1e-3  # masks do change the loss


# --- placement


def test_unknown_logical_name_is_an_error():
    x = jnp.ones((2, 3))
    with nn.logical_axis_rules((("batch", None), ("act_embed", None))):
        with pytest.raises(KeyError, match="act_embd"):
            jax.eval_shape(lambda x: constrain(x, "batch", "act_embd"), x)
    np.testing.assert_array_equal(constrain(x, "batch", "act_embd"), x)  # no mesh: nothing to place


def test_every_name_in_the_model_has_a_rule_and_the_constraints_are_in_the_train_step():
    """Under `with mesh:` Flax's constraints silently vanish; under jax.set_mesh they must not."""
    steps = build(8, mesh={"data": 2, "fsdp": 2, "tensor": 2}, batch={"microbatch": 1})
    a, m = steps.layout
    tokens = jax.ShapeDtypeStruct((a, m, 7), jnp.int32, sharding=steps.batch_sharding)
    with jax.set_mesh(steps.mesh):
        jaxpr = steps.jit_train.trace(steps.abstract, tokens).jaxpr.jaxpr
    placed = [
        (tuple(eqn.params["sharding"].spec), eqn.invars[0].aval.shape)
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "sharding_constraint"
    ]

    def over_fsdp(axes) -> bool:
        return "fsdp" in (axes if isinstance(axes, tuple) else (axes,))

    # Inside the manual axis `data` a microbatch of 4 rows is 2 rows, which lie over fsdp.
    rows = [(spec, shape) for spec, shape in placed if shape[:2] == (2, 6) and over_fsdp(spec[0])]
    heads = [spec for spec, shape in rows if shape == (2, 6, 3, 2, 4) and spec[3] == "tensor"]
    mlp = [spec for spec, shape in rows if shape == (2, 6, 32) and spec[2] == "tensor"]
    residual = [spec for spec, shape in rows if shape == (2, 6, 8) and "tensor" in (spec[1] or ())]
    whole = [spec for spec, shape in rows if shape == (2, 6, 8) and spec[1:] == (None, None)]
    table = [spec for spec, shape in placed if shape == (16, 8) and spec[0] == "tensor"]
    scores = [spec for spec, shape in placed if shape[-1] == 16 and spec[-1] == "tensor"]
    # Each is there for the forward pass and again for its gradient.
    assert len(heads) == len(mlp) == 2 and len(table) >= 2 and scores
    assert len(whole) == 12 and len(residual) == 18


# --- imports


def test_fault_23_importing_any_module_touches_no_device():
    code = (
        "import importlib, pkgutil, scalegpt\n"
        "for m in pkgutil.walk_packages(scalegpt.__path__, 'scalegpt.'):\n"
        "    importlib.import_module(m.name)\n"
        "    print(m.name)\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)  # refused once JAX has its devices\n"
        "assert jax.device_count() == 3\n"
        "try:\n"
        "    jax.config.update('jax_num_cpu_devices', 2)\n"
        "except RuntimeError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError('this test could not fail')\n"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert result.returncode == 0, result.stderr
    modules = set(result.stdout.split())
    assert {"scalegpt.train", "scalegpt.step.muon", "scalegpt.processes.startup"} <= modules

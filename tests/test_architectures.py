"""Architectures made of known parts: against transformers, on meshes, and what they refuse."""

import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import all_logits, gpt, shapes

from scalegpt.config import Config
from scalegpt.config.command_line import parse
from scalegpt.config.recipe import ModelConfig
from scalegpt.model.flops import parameter_count
from scalegpt.model.layers import rotary_tables
from scalegpt.model.parameters import parameters
from scalegpt.step import build_for_training, muon, sharding
from scalegpt.weights import init_from

PUBLISHED = {  # by vocabulary and name
    (32_000, "llama-60m"): 58_073_600,
    (32_000, "llama-130m"): 134_105_856,
    (32_000, "llama-350m"): 367_969_280,
    (128_256, "llama-1b"): 1_235_814_400,
    (128_256, "llama-3b"): 3_212_749_824,
    (128_256, "llama-8b"): 8_030_261_248,
}


@pytest.mark.parametrize("vocabulary, name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(vocabulary, name):
    model = ModelConfig(preset=name, vocab_size=vocabulary)
    assert parameter_count(model) == PUBLISHED[vocabulary, name]


# --- transformers


@pytest.mark.oracle
def test_llama_3_2_rotates_as_published():
    pytest.importorskip("torch", reason="the second opinion needs torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # config.json of Llama-3.2-1B
    text = """{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3", "rope_theta": 500000.0}"""
    theirs = LlamaConfig(head_dim=64, rope_parameters=json.loads(text))
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0].numpy()
    model = ModelConfig(preset="llama-1b")
    cos, _ = rotary_tables(2, model.head_dim, model.rope_base, model.rope_scaling)
    np.testing.assert_allclose(cos[1], np.cos(frequencies), rtol=0, atol=1e-6)
    _, sin = rotary_tables(100_001, model.head_dim, model.rope_base, model.rope_scaling)
    slow = np.sin(100_000 * frequencies.astype(np.float64))[-8:]
    np.testing.assert_allclose(sin[-1, -8:], slow, rtol=0, atol=1e-4)


SIZE = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
SIZE |= dict(vocab_size=50, max_position_embeddings=32)
OURS = dict(n_layer=3, n_head=4, n_embd=24, n_inner=40, block_size=32, vocab_size=50)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": (
        "Llama",
        dict(num_key_value_heads=2, rope_parameters={**LLAMA3, "rope_theta": 1e4}),
        dict(preset="llama", n_kv_head=2, rope_scaling=LLAMA3),
    ),
    "llama, tied, with biases": (
        "Llama",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=0.01)
        | dict(rope_parameters={**YARN, "rope_theta": 1e4}),
        dict(preset="llama", bias=True, tie_word_embeddings=True, norm_eps=0.01)
        | dict(rope_scaling=YARN),
    ),
    "mistral": (
        "Mistral",
        dict(num_key_value_heads=1, sliding_window=5, head_dim=8),
        dict(preset="llama", n_kv_head=1, window=5, head_size=8),
    ),
    "qwen2": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=2, num_key_value_heads=2),
        dict(preset="llama", n_kv_head=2, window=5, window_pattern="LLS", qkv_bias=True),
    ),
    "qwen3": (
        "Qwen3",
        dict(head_dim=10, num_key_value_heads=2, tie_word_embeddings=True),
        dict(preset="llama", n_kv_head=2, head_size=10, qk_norm=True, tie_word_embeddings=True),
    ),
    "nanochat": ("NanoChat", dict(num_key_value_heads=2), dict(preset="nanochat", n_kv_head=2)),
}
# Ours -> theirs.
TOP = {"wte": "embed_tokens.weight", "head_kernel": "lm_head.weight", "ln_f/scale": "norm.weight"}
VECTORS = {
    "ln_1/scale": "input_layernorm.weight",
    "ln_2/scale": "post_attention_layernorm.weight",
    "attn/q_gain": "self_attn.q_norm.weight",
    "attn/k_gain": "self_attn.k_norm.weight",
}
MATRICES = {
    "attn/proj": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
NANOCHAT = {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}


@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    torch = pytest.importorskip("torch", reason="the second opinion needs torch")
    import transformers

    kind, theirs, ours = MODELS[name]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(
        **SIZE, **theirs, attn_implementation="eager", pad_token_id=None
    )
    reference = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = {k.removeprefix("model."): v.numpy() for k, v in reference.state_dict().items()}
    model = gpt(**OURS, **ours)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: ours_of(tensors, model.config, "/".join(k.key for k in path), x.shape),
        shapes(model),
    )
    tokens = np.random.default_rng(0).integers(0, 50, (3, 32)).astype(np.int32)
    with torch.no_grad():
        want = reference(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    got = all_logits(model, params, tokens)[..., :50]
    assert np.abs(got - want).max() <= 2e-4
    assert np.abs(want).max() > 3  # so that the comparison means something


def ours_of(tensors, c, path, shape):
    """The parameter at `path` from the tensors of transformers, which are [out, in]."""
    if path in TOP:
        return jnp.zeros(shape).at[:50].set(tensors[TOP[path]])
    path = path.removeprefix("h/")

    def of_layer(i):
        def tensor(name):
            return tensors[f"layers.{i}.{name}"]

        if path in VECTORS:
            return tensor(VECTORS[path])
        ours, _, part = path.rpartition("_")
        kind = {"kernel": "weight", "bias": "bias"}[part]
        if ours in MATRICES:
            names = MATRICES | (NANOCHAT if c.preset == "nanochat" else {})
            return tensor(f"{names[ours]}.{kind}").T
        heads = []
        for letter in ours.removeprefix("attn/"):  # of q, kv or qkv
            x = tensor(f"self_attn.{letter}_proj.{kind}").T
            x = x.reshape(*x.shape[:-1], -1, c.head_dim)
            if c.preset == "nanochat" and letter in "qk":  # which rotates the other way
                x = x * np.repeat([1, -1], c.head_dim // 2)
            heads.append(x)
        return np.stack(heads, -3)

    return jnp.asarray(np.stack([of_layer(i) for i in range(c.n_layer)]).reshape(shape))


# --- training

SMALL = dict(preset="llama", n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_size=16)
SMALL |= dict(n_inner=48, qk_norm=True, window=5, window_pattern="SL", block_size=16)
SMALL |= dict(vocab_size=65, dtype="float32", loss_chunk=8)


def losses(mesh, backend="jit", **model):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    config = Config(
        model={**SMALL, "scan_layers": True, **model},
        mesh=mesh,
        batch=dict(sequences=16, microbatch=16 // len(devices) * mesh.get("tensor", 1)),
        optim=dict(lr=3e-3, min_lr=1e-4, warmup_steps=0, steps=8),
        data=dict(path="unused"),
        run=dict(out_dir="unused", backend=backend),
    )
    steps = build_for_training(config, sharding.make_mesh(config.mesh, devices))
    rng, state, found = np.random.default_rng(0), steps.init(), []
    for _ in range(5):
        tokens = rng.integers(0, 65, (*steps.layout, 17), dtype=np.int32)
        tokens = tokens.reshape(16, 17)
        tokens[:, 1::2] = tokens[:, :-1:2]
        batch = jax.device_put(tokens.reshape(*steps.layout, 17), steps.batch_sharding)
        state, metrics = steps.train(state, batch)
        found.append(float(metrics["train/loss"]))
    return found


@pytest.mark.slow
def test_losses_are_one_devices_on_every_mesh_by_every_attention_and_whatever_is_recomputed():
    want = losses({"data": 1})
    assert want[0] - want[-1] > 0.05, "nothing was learnt, so nothing is compared"
    for case in (
        dict(mesh={"data": 2, "fsdp": 2, "tensor": 2}),
        dict(mesh={"data": 1, "fsdp": 8}, remat="dots"),
        dict(mesh={"data": 8}, backend="pmap"),
        dict(mesh={"data": 1}, attention="flax", remat="full"),
        dict(mesh={"data": 1}, scan_layers=False),
    ):
        np.testing.assert_allclose(losses(**case), want, rtol=0, atol=1e-5, err_msg=str(case))


def test_muon_takes_each_projection_of_shared_heads_for_a_matrix():
    known = parameters(ModelConfig(**SMALL))
    rng = np.random.default_rng(0)
    paths = ("h/attn/q_kernel", "h/attn/kv_kernel", "h/mlp/gate_kernel")
    updates = {path: rng.normal(size=known[path].shape).astype(np.float32) for path in paths}
    layouts = {path: muon.layout(known[path].axes) for path in paths}
    got = jax.jit(lambda x: muon._orthogonalised(x, layouts, 5, jnp.float32))(updates)
    for path, x in updates.items():
        flat = x.reshape(2, 32, -1, 48 if "mlp" in path else 64 if "q_" in path else 32)
        result = np.asarray(got[path]).reshape(flat.shape)
        for layer in range(2):
            for i in range(flat.shape[2]):
                u, _, v = np.linalg.svd(flat[layer, :, i], full_matrices=False)
                scale = max(1, flat.shape[3] / 32) ** 0.5
                matrix = result[layer, :, i] / scale
                singular = np.linalg.svd(matrix, compute_uv=False)
                assert 0.5 < singular.min() and singular.max() < 1.3
                assert (matrix * (u @ v)).sum() / np.linalg.norm(matrix) / 32**0.5 > 0.97


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"n_kv_head": 1}, "n_kv_head=1 does not divide over mesh.tensor=2"),
        ({"n_inner": 49}, "MLP's width of 49 does not divide over mesh.tensor=2"),
    ],
)
def test_what_a_mesh_cannot_split_is_refused(keys, message):
    model = ModelConfig(**{**SMALL, **keys})
    mesh = jax.make_mesh((1, 1, 1, 2), sharding.AXES, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=message):
        sharding.check_divisible(model, mesh)


SHAPE = {"n_embd": 32, "n_head": 4, "vocab_size": 5, "position": "rope"}


@pytest.fixture
def begins(monkeypatch):
    """A function that has a run begin with weights of a model, and says what is wrong with that."""

    def check(stored, **keys):
        argv = ["--data.path=x", "--run.out_dir=y", "--run.init_from=z"]
        argv += [f"--model.{k}={json.dumps(v).strip(chr(34))}" for k, v in (SHAPE | keys).items()]
        monkeypatch.setattr(init_from, "source_model", lambda config: (stored, None))
        config = init_from.shaped_as(stored, parse(argv, "test", {})[0])
        try:
            init_from.check(config, None)
        except ValueError as error:
            return argv, str(error)
        return config.model

    return check


def test_keys_to_set_for_other_weights_can_be_typed_as_they_are_shown(begins):
    argv, message = begins(ModelConfig(**SHAPE, bias=True), n_kv_head=2, bias=False)
    assert "another model: model.n_kv_head: None -> 2; model.bias: True -> False" in message
    flags = shlex.split(message.partition("to start from it set ")[2])
    model = parse([*argv, *flags], "test", {})[0].model
    assert model.n_kv_head is None and model.bias


def test_weights_go_on_with_longer_texts_by_other_rotations_and_windows(begins):
    scaling = {"rope_type": "linear", "factor": 2.0}
    stored = ModelConfig(**SHAPE, block_size=64, rope_base=500.0, window=8, window_pattern="SL")
    same = begins(stored)
    assert (same.block_size, same.rope_base, same.windows[:3]) == (64, 500, (8, None, 8))
    model = begins(stored, block_size=128, rope_scaling=scaling, rope_base=1e4, window=None)
    assert (model.block_size, model.rope_scaling.factor, model.rope_base) == (128, 2, 1e4)
    assert ModelConfig(**model.model_dump()) == model and set(model.windows) == {None}
    learned = ModelConfig(**SHAPE | {"position": "learned"}, block_size=64)
    assert "block_size: 64 -> 128" in begins(learned, position="learned", block_size=128)[1]
    assert begins(learned, position="learned", block_size=32).block_size == 32


@pytest.mark.parametrize(
    "keys",
    [
        {"n_inner": 128},
        {"n_kv_head": 4, "head_size": 8},
        {"attention_scale": 8**-0.5},
        {"norm": "rmsnorm", "norm_eps": 1e-6},
        {"bias": True, "qkv_bias": True},
        {"mlp": "swiglu", "activation": "relu2"},
    ],
)
def test_what_means_the_same_is_no_other_model(begins, keys):
    plain = {key: keys[key] for key in ("norm", "bias", "mlp") if key in keys}
    assert isinstance(begins(ModelConfig(**SHAPE | plain), **keys), ModelConfig)

"""Architectures made of known parts: against transformers, on meshes, and what they refuse."""

import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file
from test_hf import read, scores

from scalegpt.config import Config
from scalegpt.config.architectures import PRESETS
from scalegpt.config.command_line import parse
from scalegpt.config.recipe import ModelConfig
from scalegpt.errors import Mistake
from scalegpt.model.flops import parameter_count
from scalegpt.model.layers import rotary_tables
from scalegpt.model.parameters import parameters
from scalegpt.step import build_for_training, muon, sharding
from scalegpt.weights import export, huggingface, init_from, trained
from scalegpt.weights.places import Format

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
LINEAR = {"rope_type": "linear", "factor": 3.0}
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
        dict(num_key_value_heads=1, sliding_window=5, head_dim=8, hidden_act="gelu")
        | dict(rope_parameters={**LINEAR, "rope_theta": 500.0}),
        dict(preset="llama", n_kv_head=1, window=5, head_size=8, mlp="geglu")
        | dict(rope_scaling=LINEAR, rope_base=500.0),
    ),
    "qwen2": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=2, num_key_value_heads=2)
        | dict(hidden_act="gelu_pytorch_tanh"),
        dict(preset="llama", n_kv_head=2, window=5, window_pattern="LLS", qkv_bias=True)
        | dict(mlp="geglu_tanh"),
    ),
    "qwen3": (
        "Qwen3",
        dict(head_dim=10, num_key_value_heads=2, tie_word_embeddings=True),
        dict(preset="llama", n_kv_head=2, head_size=10, qk_norm=True, tie_word_embeddings=True),
    ),
    "nanochat": ("NanoChat", dict(num_key_value_heads=2), dict(preset="nanochat", n_kv_head=2)),
    "nanochat, tied, uncapped": (
        "NanoChat",
        dict(tie_word_embeddings=True, hidden_act="gelu", final_logit_softcapping=None)
        | dict(rope_parameters={**LINEAR, "rope_theta": 1e4}),
        dict(preset="nanochat", tie_word_embeddings=True, activation="gelu", logit_softcap=0.0)
        | dict(rope_scaling=LINEAR),
    ),
}


DTYPES = {"mistral": "bfloat16", "qwen2": "float16"}  # of the file; float32 if not here


@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the second opinion needs torch")
    import transformers

    kind, theirs, ours = MODELS[name]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(
        **SIZE, **theirs, attn_implementation="eager", pad_token_id=None
    )
    reference = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    dtype = getattr(torch, DTYPES.get(name, "float32"))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype))
    stored = {key: x.to(dtype) for key, x in reference.state_dict().items()}
    reference.save_pretrained(tmp_path / "theirs", stored, max_shard_size=6000)
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 2
    model = read(tmp_path / "theirs")
    assert_same(model.config.model, ModelConfig(**OURS, **ours))
    tokens = np.random.default_rng(0).integers(0, 50, (3, 32)).astype(np.int32)

    def of_transformers(model):
        with torch.no_grad():
            return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()

    want = of_transformers(reference)
    assert np.abs(scores(model, tokens) - want).max() <= 2e-4
    assert np.abs(want).max() > 3  # so that the comparison means something

    (tmp_path / "ours").mkdir()
    assert export.export_hf(model, tmp_path / "ours") == ""
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(reference) and not any(report.values()), report
    assert np.abs(of_transformers(again.eval()) - want).max() < 1e-5  # same but gelu's spelling
    exported = load_file(tmp_path / "ours" / "model.safetensors")
    assert exported.keys() == {*reference.state_dict()} - (
        {"lm_head.weight"} if settings.tie_word_embeddings else set()
    )
    for key, tensor in exported.items():
        assert np.array_equal(tensor, reference.state_dict()[key].numpy()), key


def assert_same(a: ModelConfig, b: ModelConfig) -> None:
    """They compute the same, and have the same keys but for a preset that has set them."""
    x, y = (model.model_dump(exclude={"preset", "init"}) for model in (a, b))
    assert x == y


# --- formats


def format_of(name: str) -> Format:
    return huggingface.FORMATS[MODELS[name][0].lower()]


def described(format_: Format, values: dict) -> ModelConfig:
    values = json.loads(json.dumps(values))
    return huggingface.model_of(format_.describe(values, Path("config.json")), Path("config.json"))


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_goes_into_a_format_and_back_bitwise(name):
    for changes in ({}, {"n_kv_head": 4}):
        format_, model = format_of(name), ModelConfig(**OURS, **MODELS[name][2] | changes)
        rng = np.random.default_rng(0)
        shapes = {path: x.shape for path, x in parameters(model).items()}
        leaves = {path: rng.normal(size=shape).astype("f4") for path, shape in shapes.items()}
        params = traverse_util.unflatten_dict(leaves, sep="/")
        tensors, added = export.tensors_of(format_, model, params)
        assert not added and sum(x.size for x in tensors.values()) == parameter_count(model)
        again = {path: np.full(shape, np.nan, "f4") for path, shape in shapes.items()}
        for key, place in format_.places(model).items():
            place.put(
                tensors[key if key == "lm_head.weight" else f"model.{key}"], again[place.leaf]
            )
        for path, leaf in leaves.items():
            rows = 50 if path in ("wte", "head_kernel") else None  # without the padding
            assert np.array_equal(again[path][:rows], leaf[:rows]), path


# Keys that change nothing that a format describes.
ANYTHING = {"preset", "depth", "vocab_multiple", "isolate", "bos", "dropout", "init", "dtype"}
ANYTHING |= {"attention", "scan_layers", "remat", "loss_chunk"}
ANYTHING |= {"ngram", "value_gates"}  # of parts that no format has
ANOTHER = dict(n_kv_head=1, head_size=26, position="learned", rope_scaling=LINEAR, window=7)
ANOTHER |= dict(window_pattern="SL", attention_scale=0.5, mlp="geglu", n_inner=44, norm_eps=0.5)
ANOTHER |= dict(activation="silu", norm="layernorm", softcap="rsqrt", logit_softcap=3.0, n_head=6)
_GATED = {"activation", "softcap"}
UNREAD = {  # by a model that has other keys
    "gpt2": {"rope_base", "rope_scaling", "norm_gain", "window_pattern", "softcap", "qkv_bias"},
    "llama": {*_GATED, "window_pattern"},
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": {*_GATED, "window_pattern"},
    "nanochat": {"window_pattern"},
}


@pytest.mark.parametrize("kind", huggingface.FORMATS)
def test_every_key_of_a_model_is_in_the_formats_config_or_refused(kind):
    """A new key must be put into one of the two, or exported models would lose it in silence."""
    format_ = huggingface.FORMATS[kind]
    ours = [MODELS[name][2] for name in MODELS if format_of(name) is format_] or [{"bias": True}]
    keys = ModelConfig(**OURS, **ours[0]).model_dump()
    assert not format_.misfits(ModelConfig(**keys))
    refused = set()
    for key in keys.keys() - ANYTHING - UNREAD[kind]:
        value = keys[key]
        other = ANOTHER.get(key) or (not value if isinstance(value, bool) else 2 * value)
        model = ModelConfig(**keys | {key: other})
        if format_.misfits(model):
            refused.add(key)
        else:  # what a model has not, a format may have, and then it changes nothing
            more = {key: True} if key in ("bias", "norm_gain", "qkv_bias") else {}
            assert_same(described(format_, format_.config(model)), model.model_copy(update=more))
    assert len(refused) > 5


WRITTEN = {  # a whole config.json of each model_type, in the spelling of before transformers 5
    kind: {**SIZE, "model_type": kind, "rope_theta": 1e4, "num_key_value_heads": 2}
    for kind in huggingface.FORMATS
}


@pytest.mark.parametrize(
    "kind, changes, keys",
    [
        ("llama", {}, dict(window=None, norm_eps=None, rope_base=1e4)),
        ("llama", {"rope_theta": 500, "rms_norm_eps": 1e-5}, dict(rope_base=500, norm_eps=1e-5)),
        ("llama", {"num_key_value_heads": None, "head_dim": 6}, dict(n_kv_head=None)),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7}},
            dict(rope_base=7),
        ),
        ("llama", {"rope_scaling": {"type": "default"}}, dict(rope_scaling=None)),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 3}}, dict(rope_scaling=LINEAR)),
        (
            "qwen2",  # whose length of before is that of now, where it is not said
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 8},
            dict(rope_scaling=YARN, rope_base=1e4),
        ),
        ("mistral", {"sliding_window": None}, dict(window=None)),
        ("mistral", {}, dict(window=4096, window_pattern="S")),
        ("qwen2", {"sliding_window": 5}, dict(window=None, window_pattern="S", qkv_bias=True)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            dict(window=5, window_pattern="SL", head_size=128),
        ),
        ("nanochat", {}, dict(logit_softcap=15.0, activation="relu2", n_inner=40)),
    ],
)
def test_a_config_in_any_spelling_is_read(kind, changes, keys):
    model = described(huggingface.FORMATS[kind], WRITTEN[kind] | changes)
    want = ModelConfig(**model.model_dump() | keys)
    assert model == want


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", {"hidden_size": None}, "hidden_size is None: "),
        ("llama", {"intermediate_size": ...}, "intermediate_size is missing"),
        ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers is '3': "),
        (
            "llama",
            {"hidden_act": "relu"},
            "hidden_act is 'relu', which our model has not; .*'silu'",
        ),
        ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias False; our"),
        ("llama", {"sliding_window": 5}, "sliding_window is 5, which our model has not"),
        ("llama", {"is_causal": False}, "is_causal is False, which"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type is 'dynamic', which",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("llama", {"rope_scaling": YARN | {"mscale": 1}}, "rope_scaling.mscale is 1: "),
        ("llama", {"rope_parameters": 3}, "rope_parameters is 3: "),
        ("llama", {"num_key_value_heads": 3}, "n_head=4 is not divisible by model.n_kv_head=3"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, r"layer_types is \[.*, which our"),
        (
            "qwen2",
            {"layer_types": ["linear_attention"]},
            "layer_types.0 is 'linear_attention', which",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types are 1, and num_hidden_layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "there is no width for it"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, which"),
        ("nanochat", {"rope_scaling": YARN}, "rope_type is yarn; our model has linear or llama3: "),
        ("nanochat", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0: "),
    ],
)
def test_what_a_config_says_and_our_model_lacks_is_refused_by_name(kind, changes, message):
    values = {k: v for k, v in (WRITTEN[kind] | changes).items() if v is not ...}
    with pytest.raises(Mistake, match=message):
        described(huggingface.FORMATS[kind], values)


def test_a_model_that_no_format_says_is_refused_with_the_reasons_the_nearest_first(tmp_path):
    model = ModelConfig(**OURS, preset="nanochat", value_embeddings=True)
    with pytest.raises(Mistake, match="no format .* what x is; --format scalegpt does") as error:
        export.export_hf(
            trained.Trained("x", trained.config_of(model), None, 1, None, {}), tmp_path
        )
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == "  NanoChat: model.value_embeddings=True, not False"
    assert [line.split(":")[0].strip() for line in lines].count("Llama") == 1
    assert len(lines) == len(huggingface.FORMATS) and not any(tmp_path.iterdir())
    model = ModelConfig(**OURS, preset="many_epochs")
    with pytest.raises(Mistake, match="preset=nanochat, .* can be exported\n  NanoChat: ") as error:
        export.export_hf(
            trained.Trained("x", trained.config_of(model), None, 1, None, {}), tmp_path
        )
    assert "model.residual_scalars=True, not False; model.smear=True, not False" in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_format_but_those_with_smear(name):
    model = ModelConfig(preset=name, vocab_size=50)
    fitting = [kind for kind, x in huggingface.FORMATS.items() if not x.misfits(model)]
    assert fitting[:1] == ([] if model.smear else [name.split("-")[0]])


@pytest.mark.parametrize("kind, qk_norm", [("llama", False), ("qwen3", True)])
def test_a_model_without_gains_gets_gains_of_1(kind, qk_norm):
    model = ModelConfig(**OURS, preset="llama", norm_gain=False, qk_norm=qk_norm)
    shapes = {path: x.shape for path, x in parameters(model).items()}
    params = traverse_util.unflatten_dict({k: np.zeros(x) for k, x in shapes.items()}, sep="/")
    tensors, added = export.tensors_of(huggingface.FORMATS[kind], model, params)
    gains = [x for key, x in tensors.items() if "norm" in key]
    assert added == "gains" and len(gains) == 7 + 6 * qk_norm
    assert all((x == 1).all() for x in gains)


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
    mesh = jax.make_mesh((1, 1, 1, 1, 2), sharding.AXES, devices=jax.devices()[:2])
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

"""Exports write in other programs what the model writes here: transformers' own pipeline."""

import json

import convert_hf
import jax
import numpy as np
import pytest
from flax import traverse_util

from scalegpt.api import Model
from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import MeshConfig
from scalegpt.config.architectures import PRESETS
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_prompt
from scalegpt.inference.continuation import continuations
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.model.parameters import parameters
from scalegpt.step import sharding
from scalegpt.weights import huggingface, trained
from scalegpt.weights.tokenizer_files import reads_as_qwen2

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64}
# model_type that is exported -> keys of a model of that shape.
SHAPES = {
    "gpt2": {"bias": True},
    "llama": {**PRESETS["llama"], "n_kv_head": 2},
    "mistral": {**PRESETS["llama"], "n_kv_head": 2, "window": 8, "window_pattern": "S"},
    "qwen2": {**PRESETS["llama"], "n_kv_head": 2, "qkv_bias": True},
    "qwen3": {**PRESETS["llama"], "n_kv_head": 2, "qk_norm": True, "head_size": 32},
    "nanochat": PRESETS["nanochat"],
}
ONE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
CHARS = {"kind": "char", "chars": "".join(map(chr, [10, *range(32, 127)]))}


def make_run(folder, spec, **changes):
    """A run's folder with random weights, by which each token depends on all before it."""
    codec = tokenizer.load(spec)
    model = ModelConfig(**SIZES | changes, vocab_size=codec.vocab_size)
    config = trained.config_of(model)
    rng = np.random.default_rng(0)
    params = {
        # Larger biases would make some few tokens the likeliest everywhere.
        path: (0.03 if path.endswith("bias") else 0.3) * rng.standard_normal(x.shape, np.float32)
        for path, x in parameters(config.model).items()
    }
    checkpoints = Checkpoints(folder)
    meta = {"config": config.model_dump(), "tokenizer": codec.spec(), "data": {}}
    checkpoints.save_weights(traverse_util.unflatten_dict(params, sep="/"), meta)
    checkpoints.close()


def exported(tmp_path, spec, **changes):
    """A run's model as it is loaded here, and transformers' pipeline of its export."""
    pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    from transformers import pipeline

    make_run(tmp_path / "run", spec, **changes)
    argv = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert convert_hf.main(argv) == 0
    write = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    return Model(trained.from_run(str(tmp_path / "run"), None, ONE, 1)), write


def test_every_format_has_a_shape_here():
    assert huggingface.FORMATS.keys() <= SHAPES.keys()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("gpt2", "gpt2"),
        ("gpt2", "byte"),
        *((kind, CHARS) for kind in huggingface.FORMATS if kind != "qwen2"),
    ],
)
def test_transformers_pipeline_writes_what_the_model_writes(kind, spec, tmp_path):
    model, write = exported(tmp_path, spec, **SHAPES[kind])
    assert write.model.config.model_type == kind
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("python convert_hf_to_gguf.py out --outfile out.gguf" in card) == (spec == "gpt2")
    prompts, texts = ("Once upon a time", "def "), []
    for prompt in prompts:
        texts.append(model.generate(prompt, max_new_tokens=24, temperature=0))
        options = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
        assert write(prompt, **options)[0]["generated_text"] == texts[-1]
    assert texts[0] != texts[1] and len({*texts[0], *texts[1]}) > 3, "else any model would do"


@pytest.mark.oracle
def test_a_qwen2_needs_a_tokenizer_that_reads_as_qwen2s(tmp_path):
    """Of this model_type, transformers 5 reads any tokenizer.json as Qwen2's, whatever it says."""
    with pytest.raises(ValueError, match="as Qwen2's, and this model's would give other ids"):
        exported(tmp_path, CHARS, **SHAPES["qwen2"])
    from transformers import Qwen2Tokenizer

    theirs = Qwen2Tokenizer()
    content = json.loads(theirs.backend_tokenizer.to_str())
    assert reads_as_qwen2(content)
    model, (first, second) = content["model"], content["pre_tokenizer"]["pretokenizers"]
    mark = content["added_tokens"][0]
    for change in (
        {"model": {**model, "ignore_merges": True}},
        {"model": {**model, "vocab": {**model["vocab"], "b": 2}}},  # which would become 1
        {"model": {**model, "vocab": {"b": 0}}, "added_tokens": []},
        {"added_tokens": [mark, {**mark, "id": 2, "content": "<a>"}]},
        {"pre_tokenizer": {"pretokenizers": [first, {**second, "add_prefix_space": True}]}},
        {"pre_tokenizer": {"pretokenizers": [{**first, "invert": True}, second]}},
        {"normalizer": None},
    ):
        assert not reads_as_qwen2({**content, **change}), change


@pytest.mark.oracle
def test_transformers_pipeline_answers_what_the_model_answers(tmp_path):
    spec = tokenizer.load(CHARS).chat().spec()
    model, write = exported(tmp_path, spec, **SHAPES["gpt2"])
    question = [{"role": "user", "content": "Who?"}]
    codec, steps = model.tokenizer, model.trained.steps
    greedy = decoder(steps, model.params, Sampler(temperature=0), codec.vocab_size)
    ids = encode_prompt(codec, question)
    (ours,) = continuations(greedy, codec, [ids], max_new_tokens=24)
    said = write(question, max_new_tokens=24, do_sample=False)[0]["generated_text"]
    assert said[-1] == {"role": "assistant", "content": ours.text} and len(set(ours.text)) > 5

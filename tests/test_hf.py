"""Weights from and to Hugging Face: the logits are transformers' own, and every tensor is used."""

import base64
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import convert_hf
import jax
import numpy as np
import pytest
import yaml
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from scalegpt import train
from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.config import MeshConfig
from scalegpt.config.command_line import parse
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_conversation, encode_prompt
from scalegpt.errors import Mistake
from scalegpt.evaluate import main as evaluate
from scalegpt.model import layers
from scalegpt.model.gpt import head_table, logits
from scalegpt.run import resume
from scalegpt.step import build, sharding
from scalegpt.step.build import build_for_use
from scalegpt.step.update import State
from scalegpt.weights import export, gpt2, huggingface, init_from, trained
from scalegpt.weights.tokenizer_files import named, tokenizer_files

ODD = {"n_layer": 3, "n_head": 3, "n_embd": 51, "vocab_size": 101, "n_positions": 37}
# The real widths and head counts; depth and vocabulary only repeat.
SIZES = {
    "gpt2": {"n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_head": 25, "n_embd": 1600},
    "odd": ODD,
    "odd, with a head of its own": ODD | {"tie_word_embeddings": False},
    "odd, exact GELU": ODD | {"activation_function": "gelu"},
    "odd, ReLU, narrow within, a large epsilon": ODD
    | {"activation_function": "relu", "n_inner": 70, "layer_norm_epsilon": 0.02},
    "odd, unscaled attention, SiLU": ODD
    | {"scale_attn_weights": False, "activation_function": "swish"},
    # As BioMedLM and other models of stanford-crfm.
    "odd, attention scaled by layer": ODD
    | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
}


ONE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def read(folder: Path) -> trained.Trained:
    return trained.from_hugging_face(str(folder), ONE, 1)


def scores(model: trained.Trained, ids) -> np.ndarray:
    """Logits [B, T, V] without the padding."""
    vocab = model.config.model.vocab_size
    ids = np.asarray(ids, np.int32)
    hidden = jax.jit(model.steps.model.apply)({"params": model.params}, ids)
    return np.asarray(logits(hidden, head_table(model.params), model.config.model))[..., :vocab]


def weights(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of GPT-2's format, under the names of transformers."""
    rng = np.random.default_rng(seed)
    return {
        name if name == "lm_head.weight" else f"transformer.{name}": (
            0.1 * rng.standard_normal(place.shape) + name.endswith(("ln_f.weight", "1.weight"))
        ).astype(np.float32)
        for name, place in gpt2.places(model).items()
    }


def write(folder: Path, tensors: dict | None = None, **changes) -> Path:
    """A folder of the odd model, without torch."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "gpt2", **ODD, **changes}
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is None:
        tensors = weights(odd(**changes))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def odd(**changes) -> ModelConfig:
    values = {"block_size" if key == "n_positions" else key: v for key, v in ODD.items()}
    tied = changes.get("tie_word_embeddings", True)
    return ModelConfig(**values, bias=True, tie_word_embeddings=tied)


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32, name
        np.testing.assert_array_equal(a[name].view(np.uint32), b[name].view(np.uint32), name)


def leaves(params) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(params, sep="/").items()}


def params_of_run(folder: Path) -> dict[str, np.ndarray]:
    return leaves(trained.from_run(str(folder), "best", ONE, 1).params)


def write_data(folder: Path, train, val, spec: dict, vocab_size: int) -> None:
    folder.mkdir()
    meta = {"format": 1, "tokenizer": spec, "vocab_size": vocab_size, "dtype": "uint16"}
    for name, ids in (("train", train), ("val", val)):
        ids.tofile(folder / f"{name}.bin")
        meta[name] = {"tokens": len(ids)}
    (folder / "meta.json").write_text(json.dumps(meta))


def convert(*argv) -> int:
    return convert_hf.main([str(word) for word in argv])


# --- the same numbers as transformers


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES)
def test_fault_10_logits_are_transformers_own_both_ways(size, tmp_path):
    """nanogpt-jax gave pretrained weights to a model with RoPE, and dropped their positions."""
    torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(len(size))
    # Not 50256 as the end: it must lie in the vocabulary.
    ends = {"bos_token_id": None, "eos_token_id": None}
    small = {"n_layer": 2, "vocab_size": 307, "n_positions": 48}
    config = GPT2Config(**small | SIZES[size], **ends, attn_implementation="eager")
    reference = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, value in reference.named_parameters():
            if value.ndim == 1:  # as made, biases are 0 and LayerNorms 1: swaps would not show
                value.normal_(float(name.endswith("weight")), 0.3)
            elif size.startswith("odd"):
                value.normal_(0, 0.2)
    ids = torch.randint(reference.config.vocab_size, (2, 37))
    with torch.no_grad():
        expected = reference(ids).logits.numpy()
    reference.save_pretrained(tmp_path / "theirs")
    model = read(tmp_path / "theirs")
    ours = scores(model, ids.numpy())
    assert np.abs(ours - expected).max() < 2e-4
    assert expected.std() > 0.1, "else any model would do"

    (tmp_path / "ours").mkdir()
    export.export_hf(model, tmp_path / "ours")
    again, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert np.abs(again.eval()(ids).logits.numpy() - ours).max() < 2e-4
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")]
    for i in range(config.n_layer if config.scale_attn_by_inverse_layer_idx else 0):
        for name in ("weight", "bias"):  # the format's own key is not written: queries are scaled
            c_attn = tensors[0][f"transformer.h.{i}.attn.c_attn.{name}"]
            c_attn[..., : config.n_embd] /= i + 1
    assert_same_tensors(*tensors)


@pytest.mark.oracle
def test_every_activation_is_the_function_that_transformers_has_under_its_name():
    torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    ours = {name: np.asarray(function(x)) for name, function in layers.ACTIVATIONS.items()}
    for name in ACT2FN.keys() - {"prelu", "xielu"}:  # which have parameters
        theirs = ACT2FN[name](torch.from_numpy(x)).numpy()
        same = {x for x, values in ours.items() if np.abs(theirs - values).max() < 5e-6}
        known = {gpt2.ACTIVATIONS[name]} if name in gpt2.ACTIVATIONS else set()
        assert same == known, name


@pytest.mark.slow
def test_a_trained_model_gives_its_stored_activations_and_sorts(shared_data, tmp_path):
    """minGPT's sorter: nn.Linear kernels [out, in], and a head of its own."""
    stored, partials = (
        json.loads((shared_data / "gpt_nano_sort" / f"gpt-nano-sort-{name}.json").read_text())
        for name in ("model", "t0-partials")
    )

    def array(entry: dict) -> np.ndarray:
        data = np.frombuffer(base64.b64decode(entry["data"]), np.float32)
        return data.reshape(entry["shape"])

    sizes = stored.pop("config")
    tensors = {name: array(entry) for name, entry in stored.items() if ".attn.bias" not in name}
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {
        name: np.ascontiguousarray(x.T) if name.endswith(linear) else x
        for name, x in tensors.items()
    }
    sizes = {key: sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    write(tmp_path / "hf", tensors, **sizes, n_positions=11, tie_word_embeddings=False)
    run = tmp_path / "run"
    assert convert("import", tmp_path / "hf", "--out", run) == 0

    ids = array(partials["idx"]).astype(np.int32)
    model = trained.from_run(str(run), "best", ONE, 1, "float32")
    params = leaves(model.params)
    for name, got in (("tok_emb", params["wte"][ids]), ("pos_emb", params["wpe"][None])):
        np.testing.assert_array_equal(got, array(partials[name]), name)
    names = ["x", "block0", "block1", "block2", "ln_f", "lm_head"]
    states = convert_hf.outputs(str(run), ids, by_layer=True)
    for name, got in zip(names, states, strict=True):
        assert np.abs(got - array(partials[name])).max() < 2e-5, name
    probs = np.asarray(jax.nn.softmax(states[-1]))
    assert np.abs(probs - array(partials["probs"])).max() < 1e-6

    digits = np.array(list(product(range(3), repeat=6)), np.int32)
    assert len(digits) == 729
    text = np.pad(digits, ((0, 0), (0, 6)))
    for i in range(6, 12):  # in one shape, so that it compiles once; nothing looks right
        text[:, i] = scores(model, text[:, :11])[:, i - 1].argmax(-1)
    np.testing.assert_array_equal(text[:, 6:], np.sort(digits, axis=1))


# --- there and back


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_to_scalegpt_and_back_is_bitwise(tmp_path, tied):
    source = write(tmp_path / "a", tie_word_embeddings=tied)
    convert("import", source, "--out", tmp_path / "b", "--vocab-multiple", 8)
    convert("export", "--run", tmp_path / "b", "--out", tmp_path / "c", "--format", "scalegpt")
    convert("import", tmp_path / "c", "--out", tmp_path / "d")
    convert("export", "--run", tmp_path / "d", "--out", tmp_path / "e")
    assert_same_tensors(*(load_file(tmp_path / x / "model.safetensors") for x in "ae"))
    assert huggingface.describe(tmp_path / "c")[0].vocab_multiple == 8
    # Another padding is another matrix product, and rounds otherwise.
    assert convert("check", tmp_path / "a", tmp_path / "c", "--tolerance", "1e-5") == 0


@pytest.fixture
def make_run(tmp_path):
    """A folder of a run with random weights at step 7, evaluated there."""

    def make(name: str, spec=None, **changes) -> Path:
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 101}
        config = trained.config_of(ModelConfig(**sizes | changes))
        config = config.model_copy(
            update={
                "data": config.data.model_copy(
                    update={"path": {"data/books": 1.0, "data/owt": 2.0}}
                )
            }
        )
        rng, mesh = np.random.default_rng(0), sharding.make_mesh(config.mesh)
        params = jax.tree.map(
            lambda x: 0.3 * rng.standard_normal(x.shape, np.float32),
            build_for_use(config, mesh, 1).abstract.params,
        )
        checkpoints = Checkpoints(tmp_path / name)
        meta = {"config": config.model_dump(), "tokenizer": spec, "data": {}, "best_loss": 1.25}
        checkpoints.save(State(np.int32(7), params, {}, {}), 7, meta, 1.25)
        checkpoints.wait()
        checkpoints.close()
        rows = [
            {"step": 0, "val/loss": 9.0},
            {"step": 7, "train/loss": 2.0},
            {"step": 7, "val/loss": 1.25, "val/bits_per_byte": 1.8034},
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "tr'
        (tmp_path / name / "metrics.jsonl").write_text(lines)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("hf", {"bias": True, "dropout": 0.1}),
        ("scalegpt", {"bias": False, "position": "rope", "rope_base": 500.0, "vocab_multiple": 16}),
        *(
            pytest.param(form, changes, marks=pytest.mark.slow)
            for form, changes in (
                ("hf", {"bias": True, "tie_word_embeddings": False, "activation": "gelu"}),
                ("scalegpt", {"bias": True, "tie_word_embeddings": False}),
                ("scalegpt", {"value_embeddings": True, "vocab_multiple": 16}),
            )
        ),
    ],
)
def test_a_run_exported_and_imported_again_is_bitwise(make_run, tmp_path, form, changes):
    run = make_run("run", {"kind": "byte"} if form == "scalegpt" else None, **changes)
    convert("export", "--run", run, "--out", tmp_path / "out", "--format", form)
    assert convert("import", tmp_path / "out", "--out", tmp_path / "again") == 0
    before, after = params_of_run(run), params_of_run(tmp_path / "again")
    for name in ("wte", "head_kernel"):
        if form == "hf" and name in before:  # padding is cut off, and made anew as zeros
            assert np.abs(before[name][101:]).max() > 0 and not after[name][101:].any()
            before[name], after[name] = before[name][:101], after[name][:101]
    assert_same_tensors(before, after)
    assert convert("check", run, tmp_path / "again", "--tolerance", "0") == 0
    runs = (run, tmp_path / "again")
    then, now = (trained.from_run(str(x), "best", ONE, 1) for x in runs)
    kept = then.config.model.model_copy(update={"dropout": 0.0} if form == "hf" else {})
    assert now.config.model == kept and now.tokenizer == then.tokenizer
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["model"]["n_embd"] == 32
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("generate(" in card) == (form == "scalegpt"), "with a tokenizer it writes text"
    if form == "scalegpt":  # with another padding: 101 rows of 104, where there may have been 112
        argv = ("import", tmp_path / "out", "--out", tmp_path / "other", "--vocab-multiple", 8)
        longer = "position" in changes  # which are rotations; learned ones are 16
        assert convert(*argv, *(("--block-size", 32) if longer else ())) == 0
        assert convert("check", run, tmp_path / "other", "--tolerance", "1e-5") == 0


def test_without_biases_gpt2s_format_gets_zeros_and_the_same_logits(make_run, tmp_path):
    run = make_run("run", bias=False)
    convert("export", "--run", run, "--out", tmp_path / "out")
    assert convert("check", run, tmp_path / "out", "--tolerance", "1e-6") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no biases" in card and "only `model` can be loaded" in card
    assert 'scalegpt.load("out")\nprint(model.logits([5, 17]))' in card


def test_what_config_json_says_and_what_to_type_next(make_run, tmp_path, capsys, monkeypatch):
    run = make_run(
        "plays",
        {"kind": "char", "chars": "".join(map(chr, range(33, 134)))},
        bias=True,
        activation="gelu",
        dropout=0.1,
    )
    monkeypatch.setattr(convert_hf, "find_spec", lambda name: None)
    convert("export", "--run", run, "--out", tmp_path / "out")
    assert "scalegpt[data]'  # for the next command" in capsys.readouterr().out
    count = sum(x.size for x in load_file(tmp_path / "out" / "model.safetensors").values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"A GPT of {count:,} parameters, trained with scalegpt" in card
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["activation_function"] == "gelu" and values["attn_pdrop"] == 0.1
    assert values["eos_token_id"] is None, "GPT-2's default, 50256, is not in this vocabulary"


# --- what a user may have


def test_every_key_of_gpt2s_config_is_checked_or_changes_nothing(tmp_path):
    """Such as those of distilgpt2 and DialoGPT, whose other keys are GPT-2's own."""
    from transformers import GPT2Config

    without_effect = {
        **{f"{part}_pdrop": 0.1 for part in ("resid", "embd", "attn")},
        **{"summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None},
        **{"summary_proj_to_labels": True, "summary_first_dropout": 0.1, "use_cache": False},
        **{"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": None},
        **{"initializer_range": 0.02, "reorder_and_upcast_attn": True},
    }
    known = gpt2._Settings.model_fields.keys() - {"quantization_config"}  # of all architectures
    assert set(GPT2Config.__annotations__) - {"model_type"} == known | without_effect.keys()
    old = {
        **{"n_ctx": 37, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "torch_dtype": "float16"},
        **{"task_specific_params": {"conversational": {"max_length": 1000}}},
        **{"architectures": ["GPT2LMHeadModel"], "gradient_checkpointing": True},
    }
    folder = write(tmp_path / "hf", {}, **without_effect, **old)
    assert huggingface.describe(folder)[0] == odd()


def test_names_and_masks_of_old_files_are_read(tmp_path):
    """The official files: no prefix, causal masks beside the weights, a copy of the tied head."""
    tensors = weights(odd())
    old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    for i in range(3):
        old[f"h.{i}.attn.bias"] = np.ones((1, 1, 37, 37), np.uint8)
        old[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    old["lm_head.weight"] = old["wte.weight"].copy()
    a, b = read(write(tmp_path / "new", tensors)), read(write(tmp_path / "old", old))
    assert_same_tensors(leaves(a.params), leaves(b.params))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "model._orig_mod."])
def test_the_names_of_what_wraps_a_model_are_no_part_of_its_tensors_names(prefix, tmp_path):
    """torch.compile, DistributedDataParallel and Lightning put them before."""
    tensors = weights(odd())
    wrapped = {prefix + name: x for name, x in tensors.items()}
    wrapped[f"{prefix}lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    a, b = read(write(tmp_path / "a", tensors)), read(write(tmp_path / "b", wrapped))
    assert_same_tensors(leaves(a.params), leaves(b.params))
    with pytest.raises(ValueError, match=r"has my.wte.weight, not wte.weight: something wraps the"):
        read(write(tmp_path / "c", {f"my.{name[12:]}": x for name, x in tensors.items()}))


def test_a_tied_head_may_be_stored_under_its_own_name_alone(tmp_path):
    """As safetensors.torch.save_model does: of the names of one tensor it keeps the first."""
    tensors = weights(odd())
    expected = leaves(read(write(tmp_path / "a", tensors)).params)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    assert_same_tensors(leaves(read(write(tmp_path / "b", tensors)).params), expected)
    with pytest.raises(ValueError, match="missing: wte.weight$"):
        read(write(tmp_path / "c", tensors, tie_word_embeddings=False))


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    tensors = weights(odd())
    whole = read(write(tmp_path / "whole", tensors))
    folder = write(tmp_path / "shards", tensors)
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_tensors(leaves(whole.params), leaves(read(folder).params))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot read .*model-00002-of-00002.safetensors"):
        read(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    half = {name: x.astype(dtype) for name, x in weights(odd()).items()}
    params = leaves(read(write(tmp_path / "half", half)).params)
    wider = {name: x.astype(np.float32) for name, x in half.items()}
    assert_same_tensors(params, leaves(read(write(tmp_path / "full", wider)).params))


@pytest.mark.oracle
def test_pytorchs_own_file_is_read_where_torch_is_there(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="writes PyTorch's format")
    tensors = weights(odd())
    folder = write(tmp_path / "hf", tensors)
    expected = leaves(read(folder).params)
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(x) for name, x in tensors.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_tensors(leaves(read(folder).params), expected)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="needs a package that is not installed: pip install"):
        read(folder)


def test_every_mesh_gets_the_same_values(tmp_path):
    folder = write(
        tmp_path / "hf",
        n_head=2,
        n_embd=8,
        vocab_size=100,
        tensors=weights(ModelConfig(**ODD_FOR_MESH)),
    )
    alone = read(folder)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    abstract = build_for_use(alone.config, mesh, 1).abstract.params
    spread = huggingface.open_folder(folder).load_params(alone.config.model, abstract)
    assert_same_tensors(leaves(alone.params), leaves(spread))
    jax.tree.map(lambda x, place: x.sharding == place.sharding or pytest.fail(), spread, abstract)
    kernel = spread["h"]["attn"]["qkv_kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


ODD_FOR_MESH = {
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 100,
    "block_size": 37,
    "bias": True,
}


def test_a_run_looks_at_the_weights_that_it_begins_with_before_its_model_is_made(tmp_path):
    folder = write(tmp_path / "gpt2")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "n_layer": 9}))
    config = trained.config_of(odd())
    run = config.run.model_copy(update={"init_from": str(folder)})
    with pytest.raises(Mistake, match="does not hold the model that it describes"):
        init_from.source_model(config.model_copy(update={"run": run}))


def test_positions_are_cropped_vocabulary_padded_and_dropout_set_as_asked(tmp_path):
    source = write(tmp_path / "hf")
    asked = ("--block-size", 9, "--vocab-multiple", 64, "--dropout", 0.1)
    convert("import", source, "--out", tmp_path / "run", *asked)
    model = trained.from_run(str(tmp_path / "run"), "latest", ONE, 1)
    assert model.config.model.dropout == 0.1 and model.config.model.block_size == 9
    whole, cropped = leaves(read(source).params), leaves(model.params)
    np.testing.assert_array_equal(cropped["wpe"], whole["wpe"][:9])
    assert cropped["wte"].shape == (128, 51) and not cropped["wte"][101:].any()
    np.testing.assert_array_equal(cropped["wte"][:101], whole["wte"][:101])
    with pytest.raises(ValueError, match="block_size=38 is more than the 37 positions"):
        convert("import", source, "--out", tmp_path / "other", "--block-size", 38)
    assert not (tmp_path / "other").exists()


# --- tokenizers


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char"])
def test_transformers_reads_our_tokenizers_with_the_same_ids_and_text(kind, shared_data, tmp_path):
    from transformers import AutoTokenizer

    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:50_000]
    text += " é日本 a . b 's ’ \r\n\t   it 's 1234  😀 \x00 Ā"
    spec = {"kind": "char", "chars": "".join(sorted(set(text)))} if kind == "char" else kind
    codec = tokenizer.load(spec)
    for name, content in tokenizer_files(codec.spec(), 64).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = codec.encode(text)
    assert theirs(text)["input_ids"] == ids.tolist()
    assert theirs.decode(ids.tolist()) == text
    assert len(theirs) == codec.vocab_size
    noise = np.random.default_rng(0).integers(0, codec.vocab_size, 2000)  # broken UTF-8 among it
    assert theirs.decode(noise.tolist()) == codec.decode(noise)
    if kind == "gpt2":
        assert theirs.eos_token_id == codec.eot == theirs.encode("<|endoftext|>")[0]
    if kind == "char":
        with pytest.raises(Exception, match="Missing"):  # as ours; never dropped in silence
            theirs("ß")


@pytest.mark.parametrize(
    "kind", [pytest.param("gpt2", marks=pytest.mark.slow), "byte", "char", "sentencepiece"]
)
def test_transformers_template_of_an_exported_chat_gives_our_ids(kind, shared_data, tmp_path):
    from transformers import AutoTokenizer

    call = {"call": "12/60", "result": "0.2"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is 12/60?\n"},
        {"role": "assistant", "content": ["It is ", call, "0.2 é🙂"]},
        {"role": "user", "content": "So"},
        {"role": "assistant", "content": "Yes  "},
    ]
    texts = [json.dumps(messages, ensure_ascii=False), "\n"]
    specs = {"char": {"kind": "char", "chars": "".join(sorted({*"".join(texts)}))}}
    if kind == "sentencepiece":  # which puts a space before the first word of a text
        specs[kind] = {"kind": "tokenizer.json", "name": "t", "json": sentencepiece(texts)}
    codec = tokenizer.load(specs.get(kind, kind)).chat()
    for name, content in tokenizer_files(codec.spec(), 1024).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    signed = encode_conversation(codec, messages)
    ids = np.where(signed < 0, ~signed, signed)
    apply = partial(theirs.apply_chat_template, tokenize=True, return_dict=False)
    assert apply(messages) == ids.tolist()
    prompt = apply(messages[:2], add_generation_prompt=True)
    assert prompt == encode_prompt(codec, messages[:2]).tolist() == ids[: len(prompt)].tolist()
    assert theirs.eos_token_id == codec.end and len(theirs) == codec.vocab_size
    with pytest.raises(Exception, match="no role tool: there are system, user and assistant"):
        apply([{"role": "tool", "content": "4"}])
    again = named(str(tmp_path))
    assert again.marks == codec.marks and tokenizer.same(again.spec(), codec.spec())
    np.testing.assert_array_equal(encode_conversation(again, messages), signed)


def sentencepiece(texts: list[str]) -> dict:
    """A tokenizer.json like Llama's, trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*space, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return json.loads(bpe.to_str())


def test_a_tokenizer_with_marks_of_its_own_keeps_them(tmp_path):
    content = word_level()
    content["model"]["vocab"]["<|end|>"] = 9
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9, "content": "<|end|>"})
    codec = tokenizer.load({"kind": "tokenizer.json", "name": "t", "json": content}).chat()
    assert codec.vocab_size == 17 and codec.marks["system"] == 10  # 5 to 8 are a gap
    for name, value in tokenizer_files(codec.spec(), 64).items():
        (tmp_path / name).write_text(json.dumps(value))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(["<|end|>", "<|chat_end|>"]) == [9, codec.end]
    assert named(str(tmp_path)).marks == codec.marks


def word_level(**more) -> dict:
    """A tokenizer.json of three words and a mark whose name says what it is."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    mark = {"id": 0, "content": "[EOS]", "special": True, **flags}
    other = {"id": 1, "content": "<END>", "special": True, **flags}
    vocab = {"[EOS]": 0, "<END>": 1, "a": 2, "b": 3, "c": 4}
    return {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "c"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [mark, other],
        **more,
    }


def test_the_end_of_text_is_what_the_tokenizers_folder_says(tmp_path):
    folder = write(tmp_path / "hf")
    (folder / "tokenizer.json").write_text(json.dumps(word_level()))

    def eot():
        assert named(str(folder)).eot == (
            eot := tokenizer.load(huggingface.describe(folder)[1]).eot
        )
        return eot

    assert eot() == 0, "[EOS] is known by its name"
    config = json.loads((folder / "config.json").read_text())
    for stated, want in ((50256, 0), (2, 0), (1, 1)):  # not the default, nor a word
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": stated}))
        assert eot() == want
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert eot() == 0
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<END>"}}')
    assert eot() == 1
    exported = tokenizer_files(huggingface.describe(folder)[1], 64)
    assert exported["tokenizer_config.json"]["eos_token"] == "<END>"


def llama_2(texts: list[str]) -> dict:
    """A tokenizer.json as Llama 2's: pieces, bytes for what they lack, and <s> before a text."""
    content = sentencepiece(texts)
    content["pre_tokenizer"] = None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return content | {"post_processor": template("<s>", 1)}


def llama_3(texts: list[str]) -> dict:
    """A tokenizer.json as Llama 3's: BPE over bytes, cut by a pattern, and many added tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    cut = pre_tokenizers.Split(
        Regex(r"\p{N}{1,3}|\s*[\r\n]+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    begin = bpe.get_vocab_size()
    bpe.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bpe.add_tokens(["<tool>"])
    content = json.loads(bpe.to_str())
    plain = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    steps = [plain, template("<|begin_of_text|>", begin)]
    return content | {"post_processor": {"type": "Sequence", "processors": steps}}


def template(token: str, id_: int) -> dict:
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
    }


@pytest.mark.parametrize(
    "make, bos, eos",
    [(llama_2, "<s>", "</s>"), (llama_3, "<|begin_of_text|>", "<|end_of_text|>")],
)
def test_tokenizers_with_a_first_token_keep_ids_and_text_both_ways(
    make, bos, eos, shared_data, tmp_path
):
    from transformers import AutoTokenizer

    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:20_000]
    content, folder = make([text]), write(tmp_path / "theirs")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    spec = huggingface.describe(folder)[1]
    codec = tokenizer.load(spec)
    assert codec.begin == theirs.bos_token_id and codec.end == codec.eot == theirs.eos_token_id
    (tmp_path / "ours").mkdir()
    for name, value in tokenizer_files(spec, 64).items():
        (tmp_path / "ours" / name).write_text(json.dumps(value))
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (again.bos_token, again.eos_token) == (bos, eos) and len(again) == codec.vocab_size
    for words in (text, " é日本 a  . 's ’ \r\n\t 1234  😀 Ā<tool> x", "a", ""):
        ids = theirs(words)["input_ids"]
        assert ids[0] == codec.bos
        assert ids == codec.encode_prompt(words).tolist() == again(words)["input_ids"], words
        assert ids[1:] == codec.encode(words).tolist()
        whole = theirs.decode(ids[1:], clean_up_tokenization_spaces=False)
        assert codec.decode(ids[1:]) == whole == again.decode(ids[1:])
    assert named(str(tmp_path / "ours")).bos is None, "data of one's own have none before a text"
    config["add_bos_token"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "bos" not in huggingface.describe(folder)[1]


def test_a_template_of_the_tokenizer_is_not_exported(tmp_path):
    """Training never saw the token that it puts before a text."""
    from transformers import AutoTokenizer

    piece = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[EOS]", "type_id": 0}}, piece],
        "pair": [piece, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[EOS]": {"id": "[EOS]", "ids": [0], "tokens": ["[EOS]"]}},
    }
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content = word_level(post_processor=template, truncation=cut)
    spec = {"kind": "tokenizer.json", "name": "t.json", "json": content}
    for name, value in tokenizer_files(spec, 64).items():
        (tmp_path / name).write_text(json.dumps(value))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        theirs("a b a")["input_ids"] == tokenizer.load(spec).encode("a b a").tolist() == [2, 3, 2]
    )
    assert tokenizer.same(spec, tokenizer.read_json(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char"])
def test_an_exported_tokenizer_means_the_same_ids(kind, tmp_path):
    spec = {"kind": kind} | ({"chars": "abĀ"} if kind == "char" else {})
    for name, content in tokenizer_files(spec, 64).items():
        (tmp_path / name).write_text(json.dumps(content))
    exported = named(str(tmp_path)).spec()
    assert exported["kind"] == "tokenizer.json" and tokenizer.same(exported, spec)
    others = ({"kind": "char", "chars": "aĀb"}, {"kind": "ids", "vocab_size": 256}, "gpt2", "byte")
    assert [other for other in others if tokenizer.same(exported, other)] == [kind] * (
        kind != "char"
    )


def test_a_runs_or_data_sets_folder_names_its_tokenizer(tmp_path):
    spec = {"kind": "char", "chars": "abc"}
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save_weights({"wte": np.zeros(2)}, {"tokenizer": spec})
    checkpoints.close()
    (tmp_path / "data").mkdir()
    meta = {"vocab_size": 3, "itos": ["a", "b", "c"]}
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (tmp_path / "own").mkdir()  # a model in our own format, whose config.json has the tokenizer
    config = {"model_type": "scalegpt", "model": {"vocab_size": 3}, "tokenizer": spec}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    for folder in ("run", "data", "own"):
        assert named(str(tmp_path / folder)).spec() == spec
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"tokenizer": None}))
    with pytest.raises(ValueError, match="own came without a tokenizer; .*--tokenizer"):
        named(str(tmp_path / "own"))


def test_vocabulary_and_merges_without_tokenizer_json_are_read_as_transformers_reads_them(tmp_path):
    """As of GPT-2s in other languages from before that file."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer

    texts = ["Äpfel und Birnen's  kosten 123 €\n", "Äpfel und Nüsse, und Brot"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 300, special_tokens=["<|endoftext|>"], show_progress=False)
    size = bpe.get_vocab_size() + 1
    folder = write(tmp_path / "hf", {}, vocab_size=size)
    bpe.save_model(str(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"Brot": size - 1}))
    ours, theirs = named(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert size - 1 in ours.encode(texts[1])
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    assert ours.eot == theirs.eos_token_id and ours.vocab_size == len(theirs) == size
    (folder / "merges.txt").unlink()
    assert huggingface.describe(folder)[1] is None


@pytest.mark.slow
def test_a_vocabulary_is_gpt2s_only_if_it_is(shared_data, tmp_path):
    """There are GPT-2s of other languages with 50257 tokens too."""
    content = tokenizer_files("gpt2", 64)["tokenizer.json"]
    folder = write(tmp_path / "hf")
    assert huggingface.describe(folder)[1] is None
    write(folder, vocab_size=50257, tensors={})
    assert huggingface.describe(folder)[1] == {"kind": "gpt2"}, "nothing but weights was put there"
    for file, value in (("tokenizer.json", content), ("vocab.json", content["model"]["vocab"])):
        (folder / file).write_text(json.dumps(value))
        assert huggingface.describe(folder)[1] == {"kind": "gpt2"}
        (folder / file).unlink()
    cutter = {**content["pre_tokenizer"], "add_prefix_space": True}
    others = {"pre_tokenizer": cutter}, {"normalizer": {"type": "Lowercase"}}
    for change in (*others, {"post_processor": template("<|endoftext|>", 50256)}):
        (folder / "tokenizer.json").write_text(json.dumps(other := {**content, **change}))
        assert huggingface.describe(folder)[1]["json"] == other, "of the same words, other ids"
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer_files("byte", 64)["tokenizer.json"])
    )
    assert huggingface.describe(folder)[1] == {"kind": "byte"}, "whose NUL is the end of a text"
    pad = {"id": 50257, "content": "<pad>"}
    more = {**content, "added_tokens": [*content["added_tokens"], pad]}
    (folder / "tokenizer.json").write_text(json.dumps(more))
    assert huggingface.describe(folder)[1]["json"] == more
    (folder / "tokenizer.json").unlink()
    vocab = content["model"]["vocab"]
    vocab["the"], vocab["of"] = vocab["of"], vocab["the"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    assert huggingface.describe(folder)[1] is None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    spec = huggingface.describe(folder)[1]
    assert spec == {"kind": "tokenizer.json", "name": "tokenizer.json", "json": content}
    (tmp_path / "out").mkdir()
    files = tokenizer_files(spec, 64)
    assert files["tokenizer.json"] == content
    assert files["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"


# --- what is wrong


def change(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("transformer.h.1.attn.c_attn.bias"), "missing: h.1.attn.c_attn.bias$"),
        (
            change("transformer.h.3.ln_1.bias", np.zeros(51, np.float32)),
            "unexpected: h.3.ln_1.bias$",
        ),
        (change("score.weight", np.zeros((2, 51), np.float32)), "unexpected: score.weight$"),
        (
            change("transformer.h.0.attn.c_proj.bias", np.zeros((1, 51), np.float32)),
            r"h.0.attn.c_proj.bias is \(1, 51\), not \(51,\)$",
        ),
        (
            change("transformer.h.0.mlp.c_fc.weight", np.zeros((204, 51), np.float32)),
            r"h.0.mlp.c_fc.weight is \(204, 51\), not \(51, 204\)$",
        ),
        (
            change("lm_head.weight", np.ones((101, 51), np.float32)),
            "lm_head.weight differs from wte.weight",
        ),
        (change("transformer.wte.weight", np.zeros((101, 51), np.int8)), "is stored as I8"),
        (change("wte.weight", np.zeros((101, 51), np.float32)), "with and without the prefix"),
    ],
)
def test_a_tensor_that_is_wrong_is_named_and_nothing_is_written(edit, message, tmp_path):
    tensors = weights(odd())
    edit(tensors)
    source = write(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=message):
        convert("import", source, "--out", tmp_path / "out" / "run")
    assert not (tmp_path / "out").exists()


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    tensors = weights(odd())
    del tensors["transformer.h.0.ln_1.bias"], tensors["transformer.ln_f.bias"]
    tensors["a"] = tensors["b"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as caught:
        read(write(tmp_path / "hf", tensors))
    expected = ["missing: ln_f.bias", "missing: h.0.ln_1.bias", "unexpected: a", "unexpected: b"]
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', and only gpt2, "),
        ({"activation_function": "quick_gelu"}, "is 'quick_gelu', which our .* it has 'gelu_new',"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "layer_idx is 1: Input should be a valid bool"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* take them as they were"),
        ({"n_head": 4}, "n_embd=51 is not divisible by model.n_head=4"),
        ({"n_layer": None}, "n_layer is None: Input should be a valid integer"),
        ({"n_layer": 4}, "missing: h.3.ln_1.weight"),
    ],
)
def test_a_config_that_our_model_cannot_express_is_refused(changes, message, tmp_path):
    source = write(tmp_path / "hf", weights(odd()), **changes)
    with pytest.raises(ValueError, match=message):
        read(source)


def test_folders_that_are_no_model_are_told_apart(tmp_path, make_run):
    with pytest.raises(
        ValueError, match=r"cannot read .*json: No such file.* import reads .*nanoGPT"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match="is the folder of a run, no model of Hugging"):
        read(make_run("run"))
    for wrong in (f"{tmp_path}/none", "./gpt2", "a/b/c", "", "gpt 2", "C:\\gpt2"):
        with pytest.raises(ValueError, match="is not a folder with config.json"):
            huggingface.locate(wrong)
    write(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot read .*model.safetensors"):
        read(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors, no .* and no pytorch_model"):
        read(tmp_path / "hf")


def test_without_a_network_a_name_says_what_to_place_where(tmp_path):
    tool = Path(convert_hf.__file__)
    done = subprocess.run(
        [sys.executable, tool, "import", "gpt2-large", "--out", tmp_path / "run"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in (
        "error: gpt2-large is not a folder",
        "put config.json and model.safetensors",
        "HF_HOME",
    ):
        assert part in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_download_takes_what_is_needed_and_nothing_else(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        write(tmp_path / "snapshot")
        if len(asked) == 1 and name == "old/model":
            (tmp_path / "snapshot" / "model.safetensors").unlink()
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    assert huggingface.locate("owner/model") == tmp_path / "snapshot"
    assert len(asked) == 1 and "pytorch_model.bin" not in asked[0]
    asked.clear()
    huggingface.locate("old/model")
    assert "pytorch_model.bin" in asked[1]


def test_nothing_is_overwritten_and_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    source, taken = write(tmp_path / "hf"), tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    run = tmp_path / "run"
    convert("import", source, "--out", run)
    for argv in (("import", source), ("export", "--run", run)):
        for out in (taken, run, taken / "mine"):
            with pytest.raises(ValueError, match="is there already"):
                convert(*argv, "--out", out)
    with pytest.raises(ValueError, match="cannot write to --out"):
        convert("import", source, "--out", taken / "mine" / "below")
    assert [x.name for x in taken.iterdir()] == ["mine"]

    late = tmp_path / "late"
    with (
        pytest.raises(ValueError, match="late is there already and is not overwritten"),
        convert_hf.new_folder(late) as scratch,
    ):
        (scratch / "file").touch()
        shutil.copytree(taken, late)  # by another process
    assert [x.name for x in late.iterdir()] == ["mine"] and not list(tmp_path.glob(".late*"))

    (tmp_path / "out").mkdir()
    save = Checkpoints.save_weights
    monkeypatch.setattr(Checkpoints, "save_weights", lambda *a: (save(*a), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        convert("import", source, "--out", tmp_path / "out" / "run")
    assert not list((tmp_path / "out").iterdir())


def test_rope_is_refused_with_the_reason_and_the_way_out(make_run, tmp_path):
    run = make_run("run", position="rope")
    with pytest.raises(
        ValueError, match="--format scalegpt does\n  GPT-2: .*position=rope, not learned"
    ):
        convert("export", "--run", run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- check


def test_check_finds_the_layer_where_two_models_part(tmp_path, capsys):
    tensors = weights(odd())
    a = write(tmp_path / "a", tensors)
    for name, said in (
        ("transformer.h.1.mlp.c_proj.bias", "in layer 1"),
        ("transformer.wpe.weight", "in the embedding"),
        ("transformer.ln_f.weight", "in the last norm"),
    ):
        other = {**tensors, name: tensors[name] + 0.01 * np.sin(np.arange(51)).astype(np.float32)}
        b = write(tmp_path / "b", other)
        assert convert("check", a, b) == 1
        assert f"they first differ {said}" in capsys.readouterr().out
    assert convert("check", a, b, "--tolerance", "100") == 0
    convert("import", a, "--out", tmp_path / "run")
    ids = [np.arange(30, dtype="<u2")] * 2
    write_data(tmp_path / "data", *ids, {"kind": "byte"}, 101)
    for data in (tmp_path / "data", tmp_path / "data" / "val.bin"):
        capsys.readouterr()
        assert convert("check", a, tmp_path / "run", "--data", data) == 0
        assert "difference 0.000e+00 over 30 positions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="neither model has a tokenizer"):
        convert("check", a, a, "--prompt", "hello")
    smaller = write(
        tmp_path / "c", weights(ModelConfig(**ODD_FOR_MESH)), n_head=2, n_embd=8, vocab_size=100
    )
    with pytest.raises(ValueError, match="101 tokens, .* 100: there is nothing to compare"):
        convert("check", a, smaller)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = weights(odd())
    tensors["transformer.ln_f.bias"] = np.full(51, math.nan, np.float32)
    b = write(tmp_path / "b", tensors)
    with pytest.raises(ValueError, match="ln_f.bias holds numbers that are not finite"):
        convert("import", b, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- a run that starts from such weights


@pytest.mark.slow
def test_training_starts_from_a_hugging_face_model_or_an_imported_one(tmp_path, capsys):
    text = np.frombuffer(Path(huggingface.__file__).read_bytes()[:6000], np.uint8).astype("<u2")
    data = tmp_path / "bytes"
    write_data(data, text[:5000], text[5000:], {"kind": "byte"}, 256)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 256}
    tensors = weights(ModelConfig(**sizes, block_size=37, bias=True))
    source = write(tmp_path / "hf", tensors, **sizes)
    imported = tmp_path / "imported"
    convert("import", source, "--out", imported)

    def arguments(name: str, **changes) -> list[str]:
        keys = {
            "model.n_layer": 1,
            "model.n_head": 2,
            "model.n_embd": 16,
            "model.bias": "true",
            "model.block_size": 37,
            "data.path": data,
            "batch.sequences": 8,
            "optim.steps": 1,
            "optim.warmup_steps": 0,
            "log.tensorboard": "false",
            "run.out_dir": tmp_path / name,
        }
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in keys.items()]

    def started(**changes) -> dict[str, np.ndarray]:
        config = parse(arguments("none", **changes), "test", {})[0].with_vocab(256)
        assert resume.stored_config(config) is None
        mesh = sharding.make_mesh(config.mesh)
        steps = build.build_steps(config, mesh, *build.resolve(config, mesh))
        return leaves(resume.initial_state(config, steps, None, 0, print).params)

    expected = leaves(read(source).params)
    for where in (source, imported):
        assert_same_tensors(started(run__init_from=where), expected)
    cropped = started(run__init_from=source, model__block_size=20, model__vocab_multiple=512)
    np.testing.assert_array_equal(cropped["wpe"], expected["wpe"][:20])
    np.testing.assert_array_equal(cropped["wte"][:256], expected["wte"])
    cropped = started(run__init_from=imported, model__block_size=20)
    assert_same_tensors(cropped, {**expected, "wpe": expected["wpe"][:20]})

    capsys.readouterr()
    assert train.main(arguments("run", run__init_from=source)) == 0
    assert f"weights from {source}" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = next(row for row in map(json.loads, lines) if "val/loss" in row)
    evaluate(["--run", str(imported), "--data", str(data), "--json"])
    evaluated = json.loads(capsys.readouterr().out)
    assert abs(evaluated["val/loss"] - first["val/loss"]) < 1e-6

    wrong = {"model__bias": "false", "model__n_layer": 3}
    for where in (source, imported):
        with pytest.raises(ValueError, match="set --model.n_layer=1 --model.bias=true"):
            train.main(arguments("other", run__init_from=where, **wrong))
    with pytest.raises(ValueError, match="block_size: 37 -> 38\nto start .*--model.block_size=37"):
        train.main(arguments("other", run__init_from=source, model__block_size=38))
    meta = {**open_checkpoints(imported).meta(0), "tokenizer": {"kind": "gpt2"}}
    Checkpoints(tmp_path / "gpt2").save_weights(read(source).params, meta)
    with pytest.raises(ValueError, match="trained on tokens of gpt2, .* another tokenizer, byte"):
        train.main(arguments("other", run__init_from=tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="imported weights, .* --run.init_from=.*imported"):
        train.main(arguments("imported"))
    assert not (tmp_path / "other").exists() and not (imported / "metrics.jsonl").exists()
    assert open_checkpoints(imported).find("best") == 0


# --- memory

MEASURE = """
import sys
sys.modules.update(torch=None, transformers=None)
import convert_hf

def peak():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

*argv, source, out = sys.argv[1:]
convert_hf.main([*argv, "small" + source, "--out", "small" + out])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak from here on
base = peak()
convert_hf.main([*argv, "big" + source, "--out", "big" + out])
print(peak() - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
def test_memory_stays_below_2_2_times_the_model(tmp_path):
    """Import and export, beyond what converting a tiny model has left in the process. Of the eight
    devices that tests have, each could hold a copy; and neither torch nor transformers is there."""
    size = {"n_layer": 8, "n_head": 4, "n_embd": 640, "vocab_size": 9000}
    big = weights(ModelConfig(**size, block_size=37, bias=True))
    count = sum(x.nbytes for x in big.values())
    assert count > 150e6
    write(tmp_path / "small")
    write(tmp_path / "big", big, **size)
    environment = os.environ | {"PYTHONPATH": str(Path(convert_hf.__file__).parent)}
    for argv in (["import", "", "-run"], ["export", "--run", "-run", "-out"]):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *argv],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        ratio = int(done.stdout.splitlines()[-1]) / count
        print(f"{argv[0]}: peak memory {ratio:.2f} times the model")
        assert 1 < ratio < 2.2, argv

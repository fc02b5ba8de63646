"""What nanoGPT, nanogpt-jax and gpt-jax have trained is read from the checkpoints they write.

The files are written here as theirs are; the logits are those of their models in NumPy.
"""

import json
import math
import pickle
from pathlib import Path

import convert_hf
import flax
import jax
import numpy as np
import pytest
from flax import serialization, traverse_util
from flax.training import checkpoints

from scalegpt.step.build import build_for_use
from scalegpt.weights import predecessors, trained
from scalegpt.weights.source import Source

L, H, D, T, V = 2, 3, 24, 9, 31
IDS = np.random.default_rng(1).integers(0, V, (2, T))
ONE = convert_hf.one_device()


def parameters(bias: str = "", wpe: bool = True) -> dict[str, np.ndarray]:
    """Random parameters by the paths of gpt-jax, with the biases that have `bias` in their path."""
    shapes = {"wte/embedding": (V, D), "ln_f/scale": (D,), "ln_f/bias": (D,)}
    shapes |= {"wpe/embedding": (T, D)} if wpe else {}
    matrices = {
        "attn/c_attn": (D, 3 * D),
        "attn/c_proj": (D, D),
        "mlp/c_fc": (D, 4 * D),
        "mlp/c_proj": (4 * D, D),
    }
    for i in range(L):
        for name, shape in matrices.items():
            shapes |= {f"{i}/{name}/kernel": shape, f"{i}/{name}/bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{i}/{name}/scale": (D,), f"{i}/{name}/bias": (D,)}
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(name.endswith("scale"), 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
        if not name.endswith("bias") or bias in name
    }


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))


def their_logits(p: dict[str, np.ndarray], gelu=tanh_gelu) -> np.ndarray:
    """[B, T, V] for IDS; without learned positions, pairs of neighbours turn as complex numbers."""
    p = {name: x.astype(np.float64) for name, x in p.items()}
    rotary, k = "wpe/embedding" not in p, D // H

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}/scale"] + p.get(f"{name}/bias", 0)

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)

    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(k // 2) / (k // 2)))
    turn = np.exp(1j * angles)[:, None] if rotary else 1
    x = p["wte/embedding"][IDS] + (0 if rotary else p["wpe/embedding"])
    for i in range(L):
        qkv = dense(norm(x, f"{i}/ln_1"), f"{i}/attn/c_attn").reshape(*IDS.shape, 3, H, k)
        q, key = ((y[..., ::2] + 1j * y[..., 1::2]) * turn for y in (qkv[:, :, 0], qkv[:, :, 1]))
        score = np.einsum("bthk,bshk->bhts", q, key.conj()).real / k**0.5
        weight = np.exp(np.where(np.tri(T), score, -np.inf))
        weight /= weight.sum(-1, keepdims=True)
        y = np.einsum("bhts,bshk->bthk", weight, qkv[:, :, 2]).reshape(x.shape)
        x = x + dense(y, f"{i}/attn/c_proj")
        y = gelu(dense(norm(x, f"{i}/ln_2"), f"{i}/mlp/c_fc"))
        x = x + dense(y, f"{i}/mlp/c_proj")
    return norm(x, "ln_f") @ p["wte/embedding"].T


def load(checkpoint: Source) -> tuple:
    steps = build_for_use(trained.config_of(checkpoint.model), ONE, 1)
    return steps.model, checkpoint.load_params(checkpoint.model, steps.abstract.params)


def our_logits(checkpoint: Source) -> np.ndarray:
    model, params = load(checkpoint)
    return np.asarray(convert_hf._forward(model, params, IDS)[1])[..., :V]


def save(folder: Path, tree: dict, orbax: bool = False) -> Path:
    """By flax.training, as they do; by its default, Orbax, or as it was before that."""
    with flax.config.temp_flip_flag("use_orbax_checkpointing", orbax):
        checkpoints.save_checkpoint(str(folder), tree, 7, overwrite=True)
    return folder / "checkpoint_7"


def nested(p: dict[str, np.ndarray]) -> dict:
    return traverse_util.unflatten_dict(p, sep="/")


@pytest.mark.parametrize("bias", ["", "none"])
def test_nanogpt_jaxs_rotation_of_pairs_becomes_ours(bias, tmp_path):
    """Both forms that flax.training writes, of which one in a folder needs no name."""
    p = parameters(bias, wpe=False)
    tree = {"state": {"step": 7, "params": nested(p), "opt_state": {"0": p}}, "step": 7}
    path = predecessors.find(str(save(tmp_path / "msgpack", tree).parent))
    checkpoint = predecessors.read(path, H, None)
    assert checkpoint.model.position == "rope" and checkpoint.model.block_size == 1024
    assert np.abs(our_logits(checkpoint) - (expected := their_logits(p))).max() < 2e-5
    assert expected.std() > 0.5, "else any model would do"
    again = [predecessors.read(path, H, 16)]
    if bias == "":
        path = save(tmp_path / "orbax", tree, orbax=True)
        assert path.is_dir()
        again += [predecessors.read(predecessors.find(str(path)), H, 16)]
        jax.tree.map(np.testing.assert_array_equal, *(load(x)[1] for x in again))
    assert again[-1].model.block_size == 16


@pytest.mark.parametrize("bias", ["", "attn"])
def test_gpt_jax_has_biases_in_attention_whatever_use_bias_says(bias, tmp_path):
    p = parameters(bias)
    path = save(tmp_path, {"step": 7, "params": {"params": nested(p)}, "opt_state": {}})
    checkpoint = predecessors.read(path, H, None)
    assert checkpoint.model.block_size == T and checkpoint.tokenizer is None
    assert np.abs(our_logits(checkpoint) - their_logits(p)).max() < 2e-5


@pytest.mark.oracle
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpts_checkpoint_with_the_characters_of_its_data_set(compiled, tmp_path):
    torch = pytest.importorskip("torch", reason="writes PyTorch's format")
    p = parameters("" if compiled else "none")
    names = {x.replace("/", "."): x for x in p}
    state = {
        predecessors._gpt2_name(name): torch.from_numpy(p[x].T if "kernel" in name else p[x])
        for name, x in names.items()
    }
    state = {"lm_head.weight": state["wte.weight"]} | {
        f"transformer.{n}": x for n, x in state.items()
    }
    prefix = "_orig_mod." if compiled else ""
    sizes = {"n_layer": L, "n_head": H, "n_embd": D, "block_size": T, "vocab_size": V}
    saved = {
        "model": {prefix + name: x for name, x in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "model_args": sizes | {"bias": compiled, "dropout": 0.1},
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters", "compile": compiled},
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "data" / "letters").mkdir(parents=True)
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    path = predecessors.find(str(tmp_path / "out"))
    assert predecessors.read(path, None, None).tokenizer is None
    chars = "".join(map(chr, range(65, 65 + V)))
    meta = {"vocab_size": V}
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert predecessors.read(path, None, None).tokenizer == {"kind": "ids", "vocab_size": V}
    meta |= {"itos": dict(enumerate(chars)), "stoi": {}}
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps(meta))
    checkpoint = predecessors.read(path, None, None)
    assert checkpoint.tokenizer == {"kind": "char", "chars": chars}
    assert np.abs(our_logits(checkpoint) - their_logits(p, exact_gelu)).max() < 2e-5
    with pytest.raises(ValueError, match=f"--n-head=2: .* has {H} heads"):
        predecessors.read(path, 2, None)
    if compiled:  # with biases, which were no choice before nanoGPT had the exact GELU
        del saved["model_args"]["bias"]
        torch.save(saved, path)
        assert predecessors.read(path, None, None).model.activation == "gelu_tanh"
    torch.save(state, path)
    with pytest.raises(
        ValueError, match="is not nanoGPT's ckpt.pt: it holds no model and model_args"
    ):
        predecessors.read(path, None, None)


def test_a_checkpoint_imported_can_be_used_and_asks_for_what_it_does_not_store(tmp_path):
    p = parameters()
    path = save(tmp_path / "theirs", {"params": {"params": nested(p)}})
    out = tmp_path / "out"
    argv = ["import", str(path), "--out", str(out)]
    with pytest.raises(
        ValueError, match="does not store the number of heads; say it, as --n-head 1"
    ):
        convert_hf.main(argv)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        IDS.astype("<u2").tofile(data / f"{split}.bin")
    chars = "".join(map(chr, range(65, 65 + V)))
    for size, more in ((V + 1, "x"), (V, "")):
        meta = {"vocab_size": size, "itos": dict(enumerate(chars + more)), "stoi": {}}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))
        argv = [*argv[:4], "--n-head", str(H), "--data", str(data)]
        if more:
            with pytest.raises(ValueError, match=f"has {V + 1} ids, and the model only {V}"):
                convert_hf.main(argv)
    assert not out.exists()
    assert convert_hf.main(argv) == 0
    loaded = trained.from_run(str(out), "best", ONE, 1)
    assert loaded.codec().encode("A").tolist() == [0]
    np.testing.assert_array_equal(np.asarray(loaded.params["wpe"]), p["wpe/embedding"])
    facts = {split: {"tokens": IDS.size} for split in ("train", "val")}
    meta = {"format": 1, "tokenizer": "gpt2", "vocab_size": V, "dtype": "uint16"} | facts
    (data / "meta.json").write_text(json.dumps(meta))  # a name, as of nanoGPT's ids without a file
    assert convert_hf.main([*argv[:3], str(tmp_path / "named"), *argv[4:]]) == 0


def test_what_is_no_checkpoint_of_theirs_is_refused_by_name(tmp_path):
    p = nested(parameters())
    for content, message in (
        (b"", "cannot read .*odd as a checkpoint of nanoGPT, nanogpt-jax or gpt-jax"),
        (b"once upon a time", "cannot read .*odd as a checkpoint of"),
        (serialization.msgpack_serialize({"params": {"x": 1}}), "it has no params/wte"),
        (serialization.msgpack_serialize({"params": p})[:-9], "cannot read .*odd as a checkpoint"),
    ):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            predecessors.read(predecessors.find(str(tmp_path / "odd")), H, None)
    del p["1"]["mlp"]["c_fc"]["kernel"]
    save(tmp_path, {"params": p})
    with pytest.raises(ValueError, match="missing: h.1.mlp.c_fc.weight$"):
        predecessors.read(tmp_path / "checkpoint_7", H, None)
    (tmp_path / "checkpoint_best_5").write_bytes(b"")
    with pytest.raises(ValueError, match="has checkpoint_7, checkpoint_best_5; name one"):
        predecessors.find(str(tmp_path))
    assert predecessors.find("gpt2") is None
    with pytest.raises(
        ValueError, match="--n-head and --activation are for checkpoints of nanoGPT"
    ):
        convert_hf.main(["import", "gpt2", "--out", str(tmp_path / "run"), "--n-head", "12"])

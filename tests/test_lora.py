"""LoRA: only factors of low rank are trained, and merged they are a model like any other."""

import json
import math
from functools import partial

import convert_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax.traverse_util import flatten_dict
from test_sft import CHAT, SYSTEM, TALKS, VOCAB, WORDS, write_chat

from scalegpt import evaluate, train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import Config
from scalegpt.config.command_line import parse
from scalegpt.config.recipe import LoraConfig, ModelConfig
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.model.lora import is_adapter, joined, merged, parted
from scalegpt.model.parameters import parameters
from scalegpt.planning import memory
from scalegpt.step import build_for_training, sharding
from scalegpt.step.build import build_for_use
from scalegpt.step.optimizer import decay_mask

XL = ModelConfig(preset="gpt2-xl", vocab_size=50257, scan_layers=True, remat="full")
GIB = 2**30


def configured(mesh=None, backend="jit", accumulation=1, lora=None, optim=None, **model):
    """A config of 16 sequences an update; no file is read for it."""
    mesh = {"data": 1} | (mesh or {})
    shards = mesh["data"] * mesh.get("fsdp", 1)
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=60, vocab_multiple=8)
    return Config(
        model={**shape, "dtype": "float32", "scan_layers": True, "bias": True, **model},
        mesh=mesh,
        batch=dict(sequences=16, microbatch=16 // shards // accumulation),
        data=dict(path=""),
        lora={"rank": 4} if lora is None else lora,
        optim=dict(lr=1e-2, steps=100, warmup_steps=0, weight_decay=0.0) | (optim or {}),
        run=dict(out_dir="none", init_from="base", backend=backend),
    )


def build(config):
    devices = jax.devices()[: math.prod(max(1, n) for n in config.mesh.model_dump().values())]
    return build_for_training(config, sharding.make_mesh(config.mesh, devices))


def trained(config, updates=4, tokens=None, base=None):
    """The steps, the losses of the updates, and the parameters before and after them.

    tokens: [16, 17], or random ones. base: what to start from, or random weights."""
    steps = build(config)
    state, losses = steps.init(), []
    if base is not None:
        state = state.replace(params=joined(state.params, jax.tree.map(jnp.array, base)))
    before = jax.tree.map(np.asarray, state.params)
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, 60, (16, 17), np.int32)
    tokens = tokens.reshape(*steps.layout, 17)
    for _ in range(updates):
        state, metrics = steps.train(state, jax.device_put(tokens, steps.batch_sharding))
        losses.append(float(metrics["train/loss"]))
    return steps, losses, before, state.params


# --- in the configuration, and on paper


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--run.init_from=null"], "lora.rank=4 trains a change of weights that are there; set --"),
        (["--model.depth=2"], "optim.name=muon, which model.depth chooses, is for whole matrices"),
        (["--optim.name=muon"], "optim.name=muon is for whole matrices, and lora.rank=4 trains tw"),
        (["--optim.average=0.1"], "optim.average=0.1 would average the factors that lora.rank=4 t"),
    ],
)
def test_what_does_not_go_together_is_refused(argv, said):
    base = ["--lora.rank=4", "--run.init_from=gpt2", "--data.path=x", "--run.out_dir=y"]
    with pytest.raises(ValueError, match=said):
        parse([*base, *argv], "test", {})


def test_gpt2_xl_fits_into_16_gib_by_lora_alone():
    device = dict(mesh={"fsdp": 1, "tensor": 1}, microbatch=1, accumulation=32)
    for itemsize, fused in ((2, True), (4, False)):  # a TPU v5e; a T4, which computes in float32
        plan = partial(memory.on_device, XL, **device, itemsize=itemsize, fused_attention=fused)
        whole, adapted = (sum(plan(lora=LoraConfig(rank=rank)).values()) for rank in (0, 16))
        assert whole > 28 * GIB and adapted < 8 * GIB
        chat = plan(lora=LoraConfig(rank=16, marks=50257))
        assert 16 * 50304 * 1600 == sum(chat.values()) - adapted  # the table has moments, too
    lora = LoraConfig(rank=16)
    adapters = memory.parameters_on_device(XL, device["mesh"], "adapters", lora)
    assert adapters == 48 * 16 * (1600 + 4800 + 1600 + 1600 + 2 * (1600 + 6400)) == 19_660_800
    assert (
        memory.checkpoint_bytes(XL, configured().optim, lora) == 4 * 1_557_611_200 + 12 * adapters
    )


def test_weight_decay_shrinks_the_adapters_and_nothing_else():
    model = configured().model
    for decay in ("matrices", "all"):
        known = parameters(model, LoraConfig(rank=4))
        leaves = {path: np.zeros(x.shape) for path, x in known.items()}
        mask = decay_mask(configured(optim={"decay": decay}).optim, known)(leaves)
        assert {path for path, decays in mask.items() if decays} == {
            f"h/{name}_kernel_{factor}"
            for name in ("attn/qkv", "attn/proj", "mlp/up", "mlp/down")
            for factor in "ab"
        }


# --- updates


@pytest.mark.slow
def test_training_moves_the_adapters_alone_and_merging_changes_nothing():
    steps, losses, before, after = trained(config := configured(position="rope"))
    use = build_for_use(config, steps.mesh, 16)
    (factors, base), (moved, same) = (parted(x, is_adapter) for x in (before, after))
    jax.tree.map(np.testing.assert_array_equal, base, same)
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (factors, moved)), strict=True))
    assert losses[0] - losses[-1] > 0.01
    a, b = (factors["h"]["mlp"][f"down_kernel_{factor}"] for factor in "ab")
    assert a.shape == (2, 64, 4) and b.shape == (2, 4, 16) and not b.any()
    assert 0.9 / 8 < np.abs(a).max() <= 1 / 8 and abs(a.mean()) < 0.01

    tokens = np.random.default_rng(1).integers(0, 60, (16, 17), np.int32)
    place = partial(jax.device_put, tokens)
    unadapted = use.evaluate(base, place(use.eval_sharding))[0]
    np.testing.assert_array_equal(steps.evaluate(before, place(steps.eval_sharding))[0], unadapted)
    whole = jax.tree.map(np.asarray, merged(config.lora, same, moved))
    expected = same["h"]["mlp"]["up_kernel"] + 32 / 4 * np.einsum(
        "lir,lro->lio", *(moved["h"]["mlp"][f"up_kernel_{factor}"] for factor in "ab")
    )
    np.testing.assert_allclose(whole["h"]["mlp"]["up_kernel"], expected, atol=1e-6)
    scores = steps.evaluate(after, place(steps.eval_sharding))[0]
    assert np.abs(scores - unadapted).max() > 0.05
    np.testing.assert_allclose(use.evaluate(whole, place(use.eval_sharding))[0], scores, atol=1e-4)
    texts = [
        list(decoder(of, params, Sampler(temperature=0), 60).ids([np.array([1, 2])], 8))
        for of, params in ((steps, after), (use, whole))
    ]
    np.testing.assert_array_equal(*texts)


@pytest.mark.slow
def test_losses_and_adapters_do_not_depend_on_mesh_accumulation_backend_or_memory():
    _, losses, _, params = trained(configured())
    expected = flatten_dict(params, sep="/")
    for case in (
        dict(mesh={"data": 2, "fsdp": 2, "tensor": 2}, accumulation=2, remat="offload"),
        dict(mesh={"data": 8}, backend="pmap", scan_layers=False, remat="offload"),
    ):
        _, others, _, params = trained(configured(**case))
        np.testing.assert_allclose(others, losses, rtol=0, atol=1e-5, err_msg=str(case))
        for path, x in flatten_dict(params, sep="/").items():
            np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=f"{case} {path}")


@pytest.mark.slow
def test_with_full_rank_lora_learns_as_well_as_a_full_finetune():
    """A base that counts upwards learns to count downwards."""
    up = (np.arange(17) + 7 * np.arange(16)[:, None]).astype(np.int32) % 60
    optim = {"lr": 1e-2, "schedule": "constant"}
    keys = dict(n_embd=32, optim=optim)
    base = trained(configured(lora={"rank": 0}, **keys), 60, up)[3]
    full, adapted = (
        trained(configured(lora={"rank": rank}, **keys), 60, up[:, ::-1].copy(), base)[1]
        for rank in (0, 32)
    )
    assert adapted[0] == pytest.approx(full[0], abs=1e-5) and full[0] > 5
    assert adapted[-1] < full[-1] + 0.05


@pytest.mark.slow
def test_xla_needs_the_memory_that_the_plan_says_for_gpt2_xl():
    config = Config(
        model=XL.model_dump() | {"dtype": "float32"},
        batch=dict(sequences=2, microbatch=1),
        data=dict(path=""),
        lora={"rank": 16},
        run=dict(out_dir="none", init_from="gpt2-xl"),
    )
    steps = build_for_training(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    sizes = steps.lower().compile().memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    one = {"fsdp": 1, "tensor": 1}
    plan = memory.on_device(config.model, one, 1, 2, 4, False, lora=config.lora)
    assert needed < 8 * GIB and 0.8 < sum(plan.values()) / needed < 1.2


# --- runs


@pytest.mark.slow
def test_a_base_learns_to_answer_by_lora(tmp_path, capsys, monkeypatch):
    """A stop and its continuation, evaluation, export, and a run that starts from the result."""
    text = "".join(f"Say {word}{i} {word}{i}\n" for i in range(40) for word in WORDS)
    plain = tiny_run.write_data(tmp_path / "plain", text, "".join(map(chr, range(128))))
    meta = json.loads((plain / "meta.json").read_text())
    meta |= {"tokenizer": {"kind": "byte"}, "vocab_size": 256}
    (plain / "meta.json").write_text(json.dumps(meta))
    chats = write_chat(tmp_path / "chats", TALKS[:-12], TALKS[-12:])
    shape = {"model.block_size": 63, "model.dropout": 0, "model.bias": "true"}
    assert train.main(tiny_run.arguments(plain, tmp_path / "base", **shape)) == 0
    keys = {"objective.name": "sft", "lora.rank": 4, "checkpoint.keep_every": 4, **shape}

    def argv(name, source="base", **changes):
        changes = {**keys, "run.init_from": tmp_path / source, **changes}
        return tiny_run.arguments(chats, tmp_path / name, **changes)

    assert train.main(argv("whole")) == 0
    said = capsys.readouterr().out
    count = 2 * 4 * (32 + 96 + 32 + 32 + 2 * (32 + 128))
    assert f"lora     rank 4: {count:,} parameters and the embeddings of a chat's marks are" in said
    assert "on 16 of 17 tensors" in said
    losses, val = (tiny_run.rows(tmp_path / "whole", f"{key}/loss") for key in ("train", "val"))
    last = max(losses)
    assert losses[1] - losses[last] > 0.1

    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 4)
        assert train.main(argv("parts")) == 3
    assert train.main(argv("parts")) == 0
    assert tiny_run.rows(tmp_path / "parts") == losses
    base, one, other = (
        flatten_dict(open_checkpoints(tmp_path / name).read_item(last, "params"), sep="/")
        for name in ("base", "whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    for path, x in base.items():
        rows = slice(256) if path == "wte" else slice(None)
        np.testing.assert_array_equal(one[path][rows], x[rows], err_msg=path)
    earlier = open_checkpoints(tmp_path / "whole").read_item(8, "params")["wte"]
    assert (one["wte"][SYSTEM:VOCAB] != earlier[SYSTEM:VOCAB]).any(-1).all()
    with pytest.raises(ValueError, match="lora.rank=33 is more than model.n_embd=32, the larg"):
        train.main(argv("high", **{"lora.rank": 33}))
    with pytest.raises(ValueError, match="lora.rank: 4 -> 2"):
        train.main(argv("whole", **{"lora.rank": 2}))

    capsys.readouterr()
    assert evaluate.main(["--run", str(tmp_path / "whole"), "--checkpoint=latest", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["val/loss"] == pytest.approx(val[last], abs=1e-5)
    export = ["export", "--run", str(tmp_path / "whole"), "--format", "scalegpt", "--checkpoint"]
    assert convert_hf.main([*export, "latest", "--out", str(tmp_path / "exported")]) == 0
    # Both start from what the run has learned.
    for source in ("whole", "exported"):
        start = {"run.init_checkpoint": "latest", "optim.steps": 1, "optim.warmup_steps": 0}
        assert train.main(argv(f"from_{source}", source, **start)) == 0
        first = tiny_run.rows(tmp_path / f"from_{source}", "val/loss")[0]
        assert first == pytest.approx(val[last], abs=1e-5)
    assert CHAT == json.loads((tmp_path / "exported" / "config.json").read_text())["tokenizer"]

"""tools/sizing.py against nanoGPT's published figures, XLA's memory and a grid search in NumPy."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sizing
from planning import scaling_laws
from planning.scaling_laws import LAWS

from scalegpt.config import Config
from scalegpt.planning import memory
from scalegpt.planning.compiler import tpu_devices
from scalegpt.planning.topologies import parse
from scalegpt.step import build as step
from scalegpt.step import health, sharding

ROOT = Path(__file__).resolve().parents[1]
ONE = {"data": 1}
FSDP = {"data": 1, "fsdp": 8}
ALL = {"data": 2, "fsdp": 2, "tensor": 2}
CONTEXT = {"data": 1, "fsdp": 2, "context": 4}


def report(capsys, *argv: str) -> dict:
    assert sizing.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys, *argv: str) -> str:
    assert sizing.main([*argv]) == 0
    return capsys.readouterr().out


def config(mesh: dict, sequences: int = 8, accumulation: int = 1, **model) -> Config:
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
    return Config(
        model=dict(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=1000)
        | dict(scan_layers=True, dtype="float32")
        | model,
        mesh=mesh,
        batch=dict(sequences=sequences * shards * accumulation, microbatch=sequences),
        data=dict(path=""),
        run=dict(out_dir="none"),
    )


def test_checkpoints_kept_for_good_take_room_too(capsys):
    run = (
        "--optim.steps=1000",
        "--optim.warmup_steps=9",
        "--checkpoint.every=10",
        "--checkpoint.keep=4",
    )
    for argv, count in ((run, 5), ((*run, "--checkpoint.keep_every=100"), 15)):
        found = report(capsys, *argv)
        one = found["parameters"]["checkpoint_bytes"]
        assert found["run"]["checkpoints_bytes"] == count * one
    assert f"checkpoints: {15 * one / 1e9:.2f} GB at most" in printed(capsys, *argv)


def build(c: Config, devices: list) -> step.Steps:
    mesh = sharding.make_mesh(c.mesh, devices)
    return step.build_steps(c, mesh, c.model.dtype, "xla")


def estimate(c: Config, mesh, itemsize: int, fused: bool) -> dict[str, int]:
    accumulation, rows = sharding.batch_layout(c.batch, mesh)
    microbatch = rows // sharding.row_shards(mesh)
    return memory.on_device(c.model, mesh.shape, microbatch, accumulation, itemsize, fused)


# --- nanoGPT's transformer_sizing ---


def test_the_tables_of_the_124m_model_are_nanogpts(capsys):
    text = printed(capsys, "--config", "configs/gpt2_124m.yaml", "--devices=8")
    parameters, flops, *_ = (
        {line.split("  ")[1]: line for line in part.splitlines()[1:]}
        for part in text.split("\n\n")[1:]
    )
    assert "124,337,664" in parameters["total"] and "100.00%" in parameters["total"]
    assert "38,597,376" in parameters["wte"] and "31.04%" in parameters["wte"]
    assert "1.49 GB" in text and "4.48 GB" in text  # a checkpoint, and the three that are kept
    assert "291,648,307,200" in flops["forward"] and "583,296,614,400" in flops["backward"]
    assert "874,944,921,600" in flops["training"]
    assert "27.10%" in flops["head"] and "79,047,426,048" in flops["head"]
    assert "875,062,886,400  = 1.0001 x" in flops["PaLM's 6 N + 12 L H Q T"]
    assert "294,912,000,000 tokens" in text  # 600,000 updates of nanoGPT's 491,520
    assert "data 8" in text and "microbatch of 12" in text and "accumulation 5" in text
    policies = next(line for line in text.splitlines() if "model.remat" in line)
    assert policies.split()[1:] == ["none", "(set)", "dots", "full", "offload"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--config=configs/gpt2_xl.yaml", "--device=TPU v4", "--devices=16"),
        ("--config=configs/modern_124m.yaml", "--model.value_embeddings=true", "--budget=3e21"),
        ("--config=configs/v3_32.yaml", "--device=TPU v3", "--devices=32"),
    ],
)
def test_the_tables_fit_80_columns(capsys, argv):
    assert max(map(len, printed(capsys, *argv).splitlines())) <= 80


def test_the_preset_alone_is_gpt2(capsys):
    r = report(capsys, "--model.preset=gpt2")
    assert r["parameters"]["total"] == 124_439_808
    assert r["parameters"]["embedding"] == 50257 * 768 + 1024 * 768
    parts = r["parameters"]
    assert parts["embedding"] + parts["non_embedding"] == parts["total"]


def test_time_is_nanogpts_6nd_estimate(capsys):
    """3.46 days for 300e9 tokens on 8 A100 of 312 TFLOP/s at 30 %."""
    r = report(
        capsys,
        "--config=configs/gpt2_124m.yaml",
        "--batch.sequences=375",
        "--batch.microbatch=25",
        "--optim.steps=781250",
        "--mfu=0.3",
    )
    assert r["run"]["tokens"] == 300_000_000_000
    assert r["run"]["days"]["6ND"] / 8 == pytest.approx(3.46, abs=0.005)
    count = r["flops"]["training"]["full"] / 1024 * 300e9
    assert r["run"]["days"]["full"] == pytest.approx(count / (312e12 * 0.3 * 86400))
    assert r["run"]["days"]["causal"] < r["run"]["days"]["full"]


def test_float32_products_have_no_peak_and_so_no_days(capsys):
    text = printed(capsys, "--model.preset=gpt2", "--model.dtype=float32")
    assert text.count("unknown") == 4  # the peak, and three ways to count


# --- memory ---


@pytest.mark.parametrize("mesh", [ONE, {"data": 8}, FSDP, ALL, CONTEXT])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": True, "tie_word_embeddings": False},
        {"position": "rope", "vocab_multiple": 8, "n_embd": 96},
        {"preset": "modern", "residual_scalars": True, "value_embeddings": True, "smear": True},
        {"ngram_rows": 64, "value_embeddings": True, "value_gates": True},
        {"preset": "llama", "n_kv_head": 2, "qk_norm": True, "qkv_bias": True},
    ],
)
def test_parameters_on_a_device_are_those_of_the_sharding_rules(mesh, kind):
    c = config(mesh, **kind)
    steps = build(c, jax.devices()[: 1 if mesh == ONE else 8])
    leaves = jax.tree.leaves(steps.abstract.params)
    ours = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    assert memory.parameters_on_device(c.model, steps.mesh.shape) == ours


@pytest.mark.parametrize(
    "mesh, accumulation, remat",
    [
        (ONE, 2, "dots"),
        (ALL, 1, "full"),
        pytest.param(ONE, 1, "none", marks=pytest.mark.slow),
        pytest.param(ONE, 1, "full", marks=pytest.mark.slow),
        pytest.param(FSDP, 1, "none", marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_xla_says_within_a_factor_of_0_6_on_a_cpu(mesh, accumulation, remat):
    c = config(mesh, accumulation=accumulation, remat=remat)
    steps = build(c, jax.devices()[: 1 if mesh == ONE else 8])
    compiled = steps.lower().compile().memory_analysis()
    parts = estimate(c, steps.mesh, 4, fused=False)
    tokens = 4 * accumulation * 8 * 129
    state = parts["weights"] + parts["moments"]
    rest = 64 + 4 * health.WINDOW  # step, counts, and the losses that spikes are judged by
    assert 0 <= compiled.argument_size_in_bytes - tokens - state < rest
    total = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    assert 0.6 * total < sum(parts.values()) < 1.2 * total


@pytest.mark.oracle
def test_memory_is_what_the_tpu_compiler_says_within_20_percent():
    """tools/planning/memory.json has the same of large models."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    c = config({"data": 8}, 8, n_embd=256, block_size=512, dtype="bfloat16")
    # Later chips would hold activations as few as these outside of the memory that is counted.
    steps = build(c, tpu_devices(parse("v3-8")))
    compiled = steps.lower().compile().memory_analysis()
    total = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    parts = estimate(c, steps.mesh, 2, fused=True)
    assert parts["activations kept"] > total / 2  # so that it is the estimate which is tested
    assert sum(parts.values()) == pytest.approx(total, rel=0.2)


@pytest.mark.slow
@pytest.mark.oracle
def test_offload_leaves_a_tpu_the_memory_that_is_planned():
    """tools/planning/memory.json has that of dots."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    wide = dict(n_layer=16, n_embd=256, block_size=512, dtype="bfloat16", remat="offload")
    c = config({"data": 4}, 16, **wide)
    steps = build(c, tpu_devices(parse("v5e:2x2")))
    compiled = steps.lower().compile().memory_analysis()
    total = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    parts = estimate(c, steps.mesh, 2, fused=True)
    assert 0.7 * sum(parts.values()) < total < 1.2 * sum(parts.values())
    offloaded = memory.products(c.model, steps.mesh.shape, 16, 2)
    assert compiled.host_temp_size_in_bytes == pytest.approx(offloaded, rel=0.05)
    c = config({"data": 4}, 16, **wide | {"remat": "dots"})
    assert total < sum(estimate(c, steps.mesh, 2, fused=True).values()) - offloaded / 2


def test_v3_8_needs_what_the_compiler_said(capsys):
    """5.2 GiB of --compile-only v3-8 with scanned layers; README.md has 4.5, of unrolled ones."""
    r = report(capsys, "--config=configs/v3_8.yaml", "--device=TPU v3", "--devices=8")
    total = r["memory"]["total_bytes"]
    assert total["none"] / 2**30 == pytest.approx(5.2, rel=0.03)
    assert total["none"] > total["dots"] > total["full"]
    assert r["memory"]["accumulation"] == 8 and r["memory"]["attention"] == "xla"


def test_scores_are_kept_for_dropout_alone(capsys):
    argv = ["--config=configs/v3_8.yaml", "--devices=8", "--device"]
    plain, dropped = (
        [report(capsys, *extra, *argv, device) for device in ("TPU v3", "NVIDIA H100")]
        for extra in ([], ["--model.dropout=0.1"])
    )
    for without, kept in zip(plain, dropped, strict=True):
        more = [r["memory"]["bytes"]["activations kept"] for r in (kept, without)]
        # L, sequences, T, T, heads, bytes
        assert more[0] - more[1] == 12 * 8 * 1024 * 1024 * 12 * 9


# --- scaling laws ---


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("budget", [1e17, 2.21e19, 5.76e23])
def test_the_optimum_is_that_of_a_grid_search(law, budget):
    n = np.logspace(6, 14, 400_001)
    d = budget / (6 * n)
    best = n[np.argmin(law.E + law.A / n**law.alpha + law.B / d**law.beta)]
    parameters, tokens = law.optimum(budget)
    assert parameters == pytest.approx(best, rel=2e-3)
    assert 6 * parameters * tokens == pytest.approx(budget)
    assert law.tokens_for(parameters) == pytest.approx(tokens)


def test_approach_3_is_nanogpts_notebook():
    n = 10 ** np.arange(7, 11, step=2**-4)
    law = LAWS["Chinchilla"]
    losses = [law.loss(a, 2.21e19 / 6 / a) for a in n]
    best = n[np.argmin(losses)]
    assert f"{best / 1e6:.2f} {2.21e19 / 6 / best / 1e9:.2f}" == "316.23 11.65"
    ours = law.optimum(2.21e19)[0]
    assert abs(np.log10(ours / best)) < 2**-5  # no grid point is nearer
    assert law.loss(399.54e6, 14.43e9) == pytest.approx(2.76, abs=0.005)


def test_approach_2_is_nanogpts_notebook():
    assert scaling_laws.table_tokens_for(124e6) == pytest.approx(2.292426e9, rel=1e-6)
    raw = np.log10(np.array(scaling_laws.OPTIMAL_MODELS))
    slope, intercept = np.linalg.lstsq(
        np.vstack([raw[:, 0], np.ones(len(raw))]).T, raw[:, 1], rcond=None
    )[0]
    assert (slope, intercept) == pytest.approx((1.0409573169995892, 0.9353887152390791))
    parameters, tokens = scaling_laws.table_optimum(1e21)
    assert 6 * parameters * tokens == pytest.approx(1e21)
    assert np.log10(tokens) == pytest.approx(slope * np.log10(parameters) + intercept)


def test_epochs_fit_explains_chinchillas_own_20_tokens_a_parameter():
    parameters, tokens = LAWS["Epoch"].optimum(5.76e23)  # Chinchilla itself: 70B and 1.4T
    assert 15 < tokens / parameters < 25
    parameters, tokens = LAWS["Chinchilla"].optimum(5.76e23)
    assert tokens / parameters > 60  # what the replication objects to


def test_the_default_budget_is_the_runs_own(capsys):
    s = report(capsys, "--config=configs/gpt2_124m.yaml", "--devices=8")["scaling"]
    run = s["models"]["this run"]
    assert s["budget"] == s["run_6ND"] == 6 * (124_337_664 - 1024 * 768) * 600_000 * 491_520
    for name, law in LAWS.items():
        assert s["models"][name]["loss"][name] < run["loss"][name]
        assert run["loss"][name] == law.loss(run["parameters"], run["tokens"])
    other = report(capsys, "--config=configs/gpt2_124m.yaml", "--budget=2.21e19")["scaling"]
    assert other["models"]["Chinchilla"]["parameters"] == pytest.approx(326e6, rel=0.01)
    assert other["models"]["this run"] == run


# --- the command ---


def test_the_vocabulary_is_the_models_the_datas_or_gpt2s(capsys, tmp_path):
    meta = {"format": 1, "tokenizer": "byte", "vocab_size": 256, "dtype": "uint16"}
    meta |= {"train": {"tokens": 9}, "val": {"tokens": 9}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    data = f"--data.path={tmp_path}"
    assert report(capsys, data)["model"] == {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "bias": False,
        "vocab_size": 256,
        "vocabulary_from": f"meta of {tmp_path}",
    }
    assert report(capsys, data, "--model.vocab_size=300")["model"]["vocab_size"] == 300
    without = report(capsys, f"--data.path={tmp_path}/nothing")["model"]
    assert without["vocab_size"] == 50257 and f"{tmp_path}/nothing" in without["vocabulary_from"]
    assert report(capsys)["model"]["vocab_size"] == 50257
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        sizing.main([data])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--device=a100"], "'a100' is none of those known: TPU v2, .*NVIDIA A100"),
        (["--mfu=40"], r"--mfu=40.0 must be above 0 and at most 1"),
        (["--mfu=0"], "--mfu=0.0"),
        (["--budget=-1"], "--budget=-1.0"),
        (["--budget=nan"], "--budget=nan"),
        (["--devices=0"], "--devices=0"),
        (["--config=configs/v3_8.yaml", "--devices=3"], "512 does not divide over 3 shards"),
        (["--mesh.fsdp=3", "--mesh.data=1", "--devices=8"], "mesh .*fsdp 3.* 8 NVIDIA A100 device"),
        (["--mesh.tensor=5", "--mesh.data=1"], "n_head=12 does not divide over mesh.tensor=5"),
        (["--model.attention=splash"], "'splash' needs a TPU"),
        (["--bugdet=1e20"], "did you mean --budget"),
        (["--model.n_heads=3"], "did you mean --model.n_head"),
        (["--plot=a.jpg"], "--plot=a.jpg must end in .png"),
        (["--plot=no/such/a.png"], "there is no folder no/such"),
    ],
)
def test_a_mistake_names_the_fix_and_prints_nothing_else(argv, message, capsys):
    with pytest.raises(ValueError, match=message):
        sizing.main(argv)
    assert capsys.readouterr().out == ""


def test_the_plot_shows_both_fits_and_the_run(capsys, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="the plot needs matplotlib")
    file = tmp_path / "plot.png"
    text = printed(capsys, "--config=configs/v3_8.yaml", "--budget=1e21", f"--plot={file}")
    assert text.endswith(f"plot in {file}\n")
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and 20_000 < len(data) < 500_000
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1000 and height >= 600
    pixels = image.imread(file)[..., :3]
    for colour in ((31, 119, 180), (255, 127, 14)):  # tab:blue, tab:orange
        near = np.abs(pixels * 255 - colour).max(-1) < 8
        columns = np.flatnonzero(near.any(0))
        assert np.ptp(columns) > 0.8 * width  # a curve from side to side, not a mark alone


def test_the_command_needs_no_device_no_data_and_exits_2_on_a_mistake():
    env = os.environ | {"JAX_PLATFORMS": "nothing", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/sizing.py", "--model.preset=gpt2-xl"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1,557,611,200" in done.stdout and done.stderr == ""
    command.append("--mfu=2")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --mfu=2.0") and done.stderr.count("\n") == 1

"""tools/bench.py: its figures against sums made here, its turns, and other programs."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import bench
import jax
import numpy as np
import pytest
from benchmarks import decoding, profiling, programs, pytorch
from conftest import ROOT
from jax.profiler import ProfileData

from scalegpt.config import command_line
from scalegpt.processes.command import exit_code

L, H, D, T, VOCAB, ROWS = 2, 2, 32, 16, 50, 16
ARGV = [
    f"--model.n_layer={L}",
    f"--model.n_head={H}",
    f"--model.n_embd={D}",
    f"--model.block_size={T}",
    f"--model.vocab_size={VOCAB}",
    f"--batch.sequences={ROWS}",
    "--model.scan_layers=true",
    "--rounds=2",
    "--steps=2",
]
PACKAGES = {name for program in programs.PROGRAMS.values() for name in program.packages}
# A bag of words, with what tools/bench.py asks of nanoGPT's model.py; it prints, as that does.
MODEL = """
    from dataclasses import dataclass
    import torch
    from torch.nn import functional as F

    @dataclass
    class GPTConfig:
        n_layer: int
        n_head: int
        n_embd: int
        block_size: int
        vocab_size: int
        dropout: float
        bias: bool

    class GPT(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)
            self.head = torch.nn.Linear(config.n_embd, config.vocab_size)
            print("number of parameters: 0.00M")

        def forward(self, idx, targets):
            logits = self.head(torch.cumsum(self.table(idx), 1))
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.view(-1))

        def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
            assert device_type == "cpu"
            return torch.optim.SGD(self.parameters(), learning_rate)
"""


@pytest.fixture(autouse=True)
def cache_as_it_was():
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    return tmp_path


def report(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert bench.main([*ARGV, *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def settings(**changes) -> dict:
    shape = dict(n_layer=L, n_head=H, n_embd=D, block_size=T, vocab_size=VOCAB)
    return {
        "program": "transformers",
        "folder": "",
        "differs": [],
        "mode": "eager",
        "activation": "gelu",
        "shape": {**shape, "dropout": 0.0, "bias": True},
        "microbatches": 2,
        "rows": 4,
        "gpu": False,
        "dtype": "float32",
        "optim": {"lr": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 0.5},
        **changes,
    }


# --- figures ---


@pytest.mark.slow
def test_the_figures_of_a_run_are_those_of_its_definition(tmp_path):
    # In a process of its own: the profiler crashes one in which a test has loaded libtpu.
    argv = [*ARGV, "--batch.microbatch=1", f"--profile={tmp_path}", "--json"]
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (mine,) = found["trainers"]
    step, rate = mine["step_seconds"], mine["tokens_per_second"]
    assert found["batch"] == {"sequences": ROWS, "accumulation": 2, "tokens": ROWS * T}
    assert found["devices"] == {"kind": "cpu", "count": 8}
    assert rate * step["median"] == pytest.approx(ROWS * T)
    assert 0 < step["least"] <= step["median"] <= step["most"]
    assert mine["dispatch_seconds"] + mine["data_seconds"] < step["most"]
    # 6 FLOPs a token for each weight of a product, and 12 T D a layer for scores and sums.
    weights, pairs = L * 12 * D * D + VOCAB * D, 12 * L * T * D
    assert mine["flops_per_second"] == {
        "causal": pytest.approx((6 * weights + pairs / 2) * rate),
        "full": pytest.approx((6 * weights + pairs) * rate),
    }
    assert mine["mfu"] is None, "a CPU has no peak"
    assert mine["parameters"] == L * (12 * D * D + 2 * D) + 128 * D + T * D + D
    assert mine["peak_memory_bytes"] > 2**26  # JAX alone takes more
    assert 0.05 < mine["compile_seconds"] < 100
    operations = found["operations"]
    seconds = [op["seconds"] for op in operations]
    assert seconds == sorted(seconds, reverse=True) and len(seconds) == 10 and seconds[-1] > 0
    assert any("GPT" in op["place"] for op in operations), operations
    (file,) = tmp_path.rglob("*.xplane.pb")  # where TensorBoard looks
    assert file.relative_to(tmp_path).parts[:2] == ("plugins", "profile")
    totals = profiling.operations(ProfileData.from_file(str(file)))
    assert {op["name"]: 2 * op["seconds"] for op in operations} == pytest.approx(
        dict(totals.most_common(10))
    )


def test_a_known_device_has_an_mfu_and_a_ratio_is_of_the_same_round(capsys):
    config, _ = command_line.parse(ARGV, "bench", bench.FLAGS, bench.NO_RUN)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="NVIDIA A100")]), size=2)
    model = SimpleNamespace(dtype="bfloat16", attention="cudnn")
    ours = SimpleNamespace(
        name="scalegpt",
        built={"parameters": 1, "first": 9.5},
        steps=SimpleNamespace(mesh=mesh, model=model, layout=(1, ROWS)),
    )
    built = {"parameters": 1, "first": 1.0, "devices": 1}
    other = SimpleNamespace(name="other", built=built, differs=["its"])

    def block(seconds: float, memory: int) -> dict:
        return dict(seconds=seconds, dispatch=seconds / 4, data=seconds / 8, memory=memory)

    # The machine gets slower all the time; the other is 3, 2 and 1.5 times as slow.
    blocks = [[block(1, 5), block(3, 70)], [block(2, 7), block(4, 50)], [block(4, 6), block(6, 60)]]
    found = bench.summary(config, [ours, other], blocks)
    mine, theirs = found["trainers"]
    assert theirs["ratio"] == {"pairs": [3, 2, 1.5], "median": 2}
    assert mine["step_seconds"] == {"median": 2, "least": 1, "most": 4}
    assert (mine["dispatch_seconds"], mine["data_seconds"]) == (0.5, 0.25)
    assert (mine["peak_memory_bytes"], theirs["peak_memory_bytes"]) == (7, 70)
    assert (mine["compile_seconds"], theirs["compile_seconds"]) == (7.5, 0)
    for kind, share in mine["mfu"].items():
        assert share == pytest.approx(mine["flops_per_second"][kind] / (2 * 312e12))
    verdict, pairs = (
        "2.00 x the speed of other",
        "other  (3.00 2.00 1.50)\n  other has devices=1; its",
    )
    for share, refused in ((0.314, True), (0.1, False)):
        flags = SimpleNamespace(json=False)
        assert bench.show({"others_cpu": share, **found}, flags, bench.tables) == 0
        shown = capsys.readouterr().out
        assert pairs in shown and "% MFU" in shown and (verdict in shown) == (not refused)
        assert ("no verdict: other programs kept 31% of this machine's cores" in shown) == refused


def test_trainers_take_turns_whose_order_turns_around_after_a_round_that_is_not_counted():
    order = []

    def trainer(name: str) -> SimpleNamespace:
        def block(updates: int) -> str:
            order.append(name)
            return f"{name}{len(order)}"

        return SimpleNamespace(block=block)

    found, busy = bench.turns([trainer(name) for name in "abc"], rounds=2, updates=1)
    assert "".join(order) == "cbaabccba"
    assert found == [["a4", "b5", "c6"], ["a9", "b8", "c7"]]
    assert 0 <= busy <= 1


def test_what_children_compute_is_not_of_other_programs(monkeypatch):
    """Of 100 seconds of cores in a round, the rest less 30 and 40 of this process and its child."""
    clock = iter(range(2))
    spent = {None: 30, 7: 40}

    def cpu_seconds(*children: int) -> tuple[float, float]:
        now = next(clock)
        return 100.0 * now, now * (95.0 - sum(spent[pid] for pid in (None, *children)))

    child = SimpleNamespace(pid=7)
    process = SimpleNamespace(children=lambda: [child])
    monkeypatch.setattr(bench.psutil, "Process", lambda: process)
    monkeypatch.setattr(bench, "cpu_seconds", cpu_seconds)
    _, busy = bench.turns([SimpleNamespace(block=lambda updates: {})], rounds=1, updates=1)
    assert busy == pytest.approx(0.25)


# --- trainers in PyTorch ---


@pytest.mark.oracle
def test_it_runs_against_nanogpt_and_transformers(capsys, checkout):
    torch = pytest.importorskip("torch")
    argv = [f"--against=nanogpt={checkout}", "--against=transformers", "--their-microbatch=8"]
    found = report(capsys, *argv, "--their-mode=eager", "--model.bias=true", "--rounds=1")
    ours, nanogpt, transformers = found["trainers"]
    assert [row["name"] for row in (nanogpt, transformers)] == [
        "nanogpt eager",
        "transformers eager",
    ]
    assert nanogpt["parameters"] == 2 * VOCAB * D + VOCAB
    # The same model but for the rows that pad our table.
    assert transformers["parameters"] == ours["parameters"] - (128 - VOCAB) * D
    for row in (nanogpt, transformers):
        (pair,) = row["ratio"]["pairs"]
        assert pair == pytest.approx(ours["tokens_per_second"] / row["tokens_per_second"])
        assert row["peak_memory_bytes"] > 2**26 and "dispatch_seconds" not in row
    assert torch.__version__, "the children had it too"


@pytest.mark.oracle
def test_texts_are_written_beside_transformers(capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(decoding, "ADDED", 2**20)
    argv = ["--decode", "1", "9", "--model.block_size=32", "--steps=8", "--against=transformers"]
    found = report(capsys, *argv)
    assert found["tokens"] == 8 and [row["texts"] for row in found["decoding"]] == [1, 9]
    for row, mine in zip(found["decoding"], (1, 2), strict=True):  # of 9 texts on 8 devices
        ours, theirs = row["writers"]
        assert [ours["name"], theirs["name"]] == ["scalegpt", "transformers eager"]
        for writer in (ours, theirs):
            rate = writer["tokens_per_second"]
            assert rate * writer["token_seconds"] == pytest.approx(row["texts"])
        assert len(theirs["ratio"]["pairs"]) == 2 and ours["ratio"]["median"] == 1
        weights = L * (12 * D * D + 2 * D) + 128 * D + D
        read = 4 * (weights + mine * 2 * L * D * (16 + 8 // 2))
        rate = read / ours["token_seconds"] / found["bandwidth_bytes_per_second"]
        assert row["share_of_bandwidth"] == pytest.approx(rate)


@pytest.mark.oracle
def test_a_compiled_trainer_makes_the_same_updates(checkout):
    """torch.compile, in the process that the tool starts; its own prints stay out of the pipe."""
    pytest.importorskip("torch")
    child = programs.Child(settings(program="nanogpt", folder=str(checkout), mode="compiled"))
    try:
        block = child.block(2)
        assert child.built["first"] > block["seconds"] > 0, "nothing was compiled"
    finally:
        child.close()


@pytest.mark.oracle
@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_update_in_pytorch_is_one_of_nanogpts(checkout, monkeypatch, microbatches):
    """The whole batch's mean loss, its gradient clipped to a norm of 0.5, one optimizer step."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.delitem(pytorch.sys.modules, "model", raising=False)
    trainer = pytorch.Trainer(
        settings(
            program="nanogpt",
            folder=str(checkout),
            microbatches=microbatches,
            rows=8 // microbatches,
        )
    )
    before = [p.detach().clone().requires_grad_() for p in trainer.parameters]
    tokens = trainer.batches[0].flatten(0, 1)
    trainer.update()
    table, weight, bias = before
    scores = table[tokens[:, :-1]].cumsum(1) @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
    grads = torch.autograd.grad(loss, before)
    norm = sum(g.square().sum() for g in grads) ** 0.5
    assert tokens.shape == (8, T + 1) and norm > 0.5, "clipping is not tested"
    for now, was, grad in zip(trainer.parameters, before, grads, strict=True):
        torch.testing.assert_close(now, was - 0.1 * grad * 0.5 / norm, rtol=1e-4, atol=1e-6)
        assert now.grad is None


@pytest.mark.oracle
def test_adamw_decays_what_nanogpts_does():
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 3)
    adamw = pytorch.adamw(model, settings()["optim"], fused=False)
    decays = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decays == {id(model.weight): 0.1, id(model.bias): 0.0}
    assert all(g["lr"] == 0.1 and g["betas"] == (0.9, 0.95) for g in adamw.param_groups)


# --- mistakes ---


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert exit_code(bench.main, [*ARGV, *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds=0"], "--rounds=0 must be at least 1"),
        (
            ["--against=pytorch"],
            "neither nanogpt=DIR, transformers, nanogpt-jax=DIR, gpt-jax=DIR nor nanodo=DIR",
        ),
        (["--against=nanogpt"], "--against=nanogpt is neither nanogpt=DIR, transformers"),
        (["--against=nanogpt=none"], "there is no model.py in none; for a checkout, git clone"),
        (["--against=transformers", "--model.position=rope"], "has no model.position=rope"),
        (["--against=transformers", "--their-microbatch=5"], "does not divide batch.sequences=16"),
        (["--profile=/dev/null/x"], "cannot write --profile=/dev/null/x"),
        (["--batch.sequences=12"], "batch.sequences=12 does not divide over 8 shards"),
        (["--real-data", "--data.path=none"], "none"),
        (["--decode", "1", "0"], "--decode=[1, 0] must be at least 1"),
        (["--decode", "1", "--steps=0"], "--steps=0 must be at least 1"),
        (["--decode", "1", "--steps=1"], "prompt of 16 tokens is more than model.block_size=16"),
        (["--decode", "1", "--real-data"], "--decode does not go with --real-data"),
        (["--their-microbatch=4"], "--their-microbatch is for a trainer of --against"),
        (["--against=transformers", "--decode=1", "--their-mode=compiled"], "with --their-mode"),
        (["--against=transformers", "--their-microbatch=0"], "--their-microbatch=0 must be at"),
        (
            ["--objective.name=grpo", "--grpo.reward=exact", "--grpo.prompts=2"]
            + ["--run.init_from=x"],
            "--decode times the writing",
        ),
        (["--objective.name=dpo", "--run.init_from=x"], "add --real-data"),
        (["--against=transformers", "--model.qk_norm=true"], "has no model.qk_norm=True"),
        (["--against=gpt-jax=none"], "there is no train.py in none; for a checkout, git clone"),
        (["--against=nanodo=none"], "no nanodo/train.py in none; for a checkout, git clone"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, monkeypatch, argv, message):
    pretend_installed(monkeypatch, *PACKAGES)
    assert message in refused(capsys, *argv)


def pretend_installed(monkeypatch, *packages: str) -> None:
    """The tool finds these of PACKAGES, whichever are installed here."""
    find = programs.importlib.util.find_spec

    def find_pretended(name: str):
        if name in PACKAGES:
            return "a specification" if name in packages else None
        return find(name)

    monkeypatch.setattr(programs.importlib.util, "find_spec", find_pretended)


def test_a_missing_package_is_named(capsys, monkeypatch, checkout):
    for missing, others, what in (
        ("torch", ["transformers"], f"nanogpt={checkout}"),
        ("transformers", ["torch"], "transformers"),
        ("wandb, tyro", ["tensorflow"], "gpt-jax=none"),
    ):
        pretend_installed(monkeypatch, *others)
        pip = missing.replace(",", "")
        assert f"needs {missing}: pip install {pip}" in refused(capsys, f"--against={what}")


def test_a_checkout_of_another_program_is_refused(capsys, monkeypatch, checkout):
    """nanoGPT has a train.py as gpt-jax has; neither has nanogpt-jax's way to make a state."""
    pretend_installed(monkeypatch, *PACKAGES)
    (checkout / "train.py").write_text("import torch\n")
    assert "train.py is not of gpt-jax" in refused(capsys, f"--against=gpt-jax={checkout}")
    (checkout / "train.py").write_text("def init_train_state(key): pass\n")
    (checkout / "nanogpt").mkdir()
    (checkout / "nanogpt" / "train.py").write_text("def init_train_state(key): pass\n")
    for argv, message in (
        (["--decode", "1"], "--decode is not measured against nanogpt-jax"),
        (["--model.mlp=swiglu"], "nanogpt-jax has no model.mlp=swiglu"),
    ):
        assert message in refused(capsys, f"--against=nanogpt-jax={checkout}", *argv)


def test_what_a_program_does_otherwise_is_said():
    config, _ = command_line.parse(
        [*ARGV, "--optim.beta2=0.95"], "bench", bench.FLAGS, bench.NO_RUN
    )
    assert programs.differences("nanogpt", config) == ["model.activation=gelu"]
    assert programs.differences("nanogpt-jax", config) == ["model.position=rope", "optim.decay=all"]
    assert "attention has biases always" in programs.differences("gpt-jax", config)


# A bag of words, with what tools/bench.py asks of gpt-jax's model.py and train.py.
GPT_JAX = {
    "model.py": """
        from dataclasses import dataclass

        @dataclass
        class GPTConfig:
            block_size: int
            vocab_size: int
            num_layers: int
            num_heads: int
            num_embeds: int
            dropout_rate: float
            use_bias: bool
            dtype: str
        """,
    "train.py": """
        from dataclasses import dataclass, field
        from typing import Any
        import flax, jax, optax
        from flax.training.train_state import TrainState

        assert flax.config.flax_return_frozendict

        @dataclass
        class CosineDecayScheduleConfig:
            init_value: float = 0.0
            peak_value: float = 1.0
            warmup_steps: int = 1
            decay_steps: int = 9
            end_value: float = 1.0

        @dataclass
        class TrainConfig:
            model: Any
            batch_size: int
            weight_decay: float
            grad_clip: float
            betas: tuple
            gradient_accumulation_steps: int
            learning_rate: Any

        def init_train_state(key, config, learning_rate):
            assert (config.batch_size, config.gradient_accumulation_steps) == (1, 2)
            shape = config.model.vocab_size, config.model.vocab_size
            params = {"table": jax.random.normal(key, shape)}
            return TrainState.create(
                apply_fn=lambda params, x: params["table"][x],
                params=params,
                tx=optax.sgd(learning_rate),
            )

        @jax.pmap
        def train_step(state, tokens, key):
            assert tokens.shape == (1, 17)
            def loss(params):
                logits = state.apply_fn(params, tokens[:, :-1])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
                return losses.mean()
            loss, grads = jax.value_and_grad(loss)(state.params)
            return loss, state.apply_gradients(grads=grads)
        """,
}


@pytest.mark.slow
def test_it_runs_against_a_program_in_jax_on_all_devices(capsys, monkeypatch, tmp_path):
    """One microbatch holds a sequence for each of the 8 devices that the tests have."""
    pretend_installed(monkeypatch, *PACKAGES)
    for name, text in GPT_JAX.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    argv = [f"--against=gpt-jax={tmp_path}", "--their-microbatch=8", "--rounds=1"]
    found = report(capsys, *argv)
    ours, theirs = found["trainers"]
    assert theirs["name"] == "gpt-jax" and theirs["parameters"] == VOCAB**2
    (pair,) = theirs["ratio"]["pairs"]
    assert pair == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert found["verdict"] == (found["others_cpu"] <= bench.BUSY)
    assert not any("devices" in x for x in theirs["differs"])
    (tmp_path / "train.py").write_text("def init_train_state(): jax.tree_map\nraise OSError('old')")
    assert refused(capsys, *argv) == "error: gpt-jax failed: OSError: old\n"


@pytest.mark.oracle
def test_a_trainer_that_dies_is_quoted(capsys, checkout):
    pytest.importorskip("torch")
    (checkout / "model.py").write_text("import torch\nraise RuntimeError('no such kernel')")
    said = refused(capsys, f"--against=nanogpt={checkout}", "--their-mode=compiled")
    assert said == "error: nanogpt compiled failed: RuntimeError: no such kernel\n"


def test_several_gpus_are_no_match_for_one(capsys):
    config, flags = command_line.parse(
        [*ARGV, "--against=transformers"], "bench", bench.FLAGS, bench.NO_RUN
    )
    device = SimpleNamespace(platform="gpu")
    mesh = SimpleNamespace(devices=np.array([device] * 8), size=8)
    with pytest.raises(ValueError, match="one GPU, not on 8 x gpu; CUDA_VISIBLE_DEVICES=0"):
        bench.settings_of_programs(config, flags, SimpleNamespace(mesh=mesh))


def test_a_profile_beside_an_idle_libtpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling.importlib.util, "find_spec", lambda name: name == "libtpu")
    profiling.check(str(tmp_path))
    monkeypatch.setattr(profiling.jax, "config", SimpleNamespace(jax_platforms=None))
    with pytest.raises(ValueError, match="run it with JAX_PLATFORMS=cpu"):
        profiling.check(str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    profiling.check(str(tmp_path))

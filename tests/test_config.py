"""Configuration: defaults, precedence, every kind of mistake, and the YAML files in configs/.

Expected figures are written out here; nothing is read back from the code under test.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT

from scalegpt.config import Config, DataConfig, command_line, loading
from scalegpt.config.differences import curve_diff
from scalegpt.config.recipe import ModelConfig, RopeScaling
from scalegpt.model.flops import flops_per_token, parameter_count
from scalegpt.processes.command import python
from scalegpt.run import reports
from scalegpt.run.reports import muon_line, unread_line
from scalegpt.train import FLAGS

GIVEN = ["--data.path=text", "--run.out_dir=out/x"]
MINIMAL = {"data": {"path": "text"}, "run": {"out_dir": "out/x"}}


def parse(*argv: str) -> Config:
    return command_line.parse(list(argv), "scalegpt.train", FLAGS)[0]


def mistake(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        parse(*argv)
    return str(error.value)


@pytest.fixture
def in_yaml(tmp_path):
    """Text -> the argument that makes it the config."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"--config={path}"

    return write


def gpt2_parameters(L, D, T, V, bias):
    """Independent of scalegpt.model.flops: GPT-2's arrays, one term each."""
    weights = D * 3 * D + D * D + D * 4 * D + 4 * D * D
    norms = 2 * D
    biases = (3 * D + D + 4 * D + D + 2 * D) if bias else 0
    return V * D + T * D + L * (weights + norms + biases) + (2 * D if bias else D)


# --- defaults and presets


def test_a_tilde_is_the_home_folder(monkeypatch, in_yaml):
    monkeypatch.setenv("HOME", "/home/ada")
    c = parse(in_yaml("data: {path: d, cache_dir: ~/c}"), "--run.out_dir=~/runs/a~b")
    assert (c.run.out_dir, c.data.cache_dir) == ("/home/ada/runs/a~b", "/home/ada/c")
    bucket = parse("--data.path=d", "--run.out_dir=gs://~/a", "--run.init_from=~/runs/b")
    assert (bucket.run.out_dir, bucket.run.init_from) == ("gs://~/a", "/home/ada/runs/b")


def test_defaults_are_nanogpts_124m_run():
    c = parse(*GIVEN)
    m, o = c.model, c.optim
    assert (m.n_layer, m.n_head, m.n_embd, m.block_size) == (12, 12, 768, 1024)
    assert (m.bias, m.dropout, m.position, m.dtype) == (False, 0.0, "learned", "auto")
    assert (o.lr, o.min_lr, o.steps, o.warmup_steps, o.schedule) == (
        6e-4,
        6e-5,
        600_000,
        2000,
        "cosine",
    )
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.grad_clip) == (0.9, 0.95, 1e-8, 0.1, 1.0)
    assert o.decay == "matrices"
    assert c.batch.sequences * m.block_size == 491_520  # nanoGPT's 12 x 1024 x 40
    assert c.mesh.model_dump() == {"replica": 1, "data": -1, "fsdp": 1, "context": 1, "tensor": 1}
    assert parameter_count(c.with_vocab(50257).model) == 124_337_664


@pytest.mark.parametrize(
    "preset, size, count",
    [
        ("gpt2", (12, 12, 768), 124_439_808),
        ("gpt2-medium", (24, 16, 1024), 354_823_168),
        ("gpt2-large", (36, 20, 1280), 774_030_080),
        ("gpt2-xl", (48, 25, 1600), 1_557_611_200),
    ],
)
def test_preset_is_a_gpt2_with_the_published_number_of_parameters(preset, size, count):
    model = parse(*GIVEN, f"--model.preset={preset}").with_vocab(50257).model
    assert (model.n_layer, model.n_head, model.n_embd) == size
    assert (model.block_size, model.bias, model.head_dim) == (1024, True, 64)
    assert parameter_count(model) == count == gpt2_parameters(size[0], size[2], 1024, 50257, True)
    assert model.padded_vocab == 50304


def test_other_keys_override_the_preset(in_yaml):
    file = in_yaml(
        "model: {preset: gpt2-medium, n_layer: 3, bias: false}\n"
        "data: {path: text}\nrun: {out_dir: out/x}\n"
    )
    model = parse(file, "--model.n_head=8").model
    assert (model.n_layer, model.n_head, model.n_embd, model.bias) == (3, 8, 1024, False)
    assert parse(file, "--model.preset=gpt2-xl").model.n_embd == 1600


def test_vocabulary_comes_from_the_data_and_is_padded():
    config = parse(*GIVEN)
    assert config.model.vocab_size is None
    for size, padded in ((65, 128), (128, 128), (129, 256), (50257, 50304)):
        model = config.with_vocab(size).model
        assert (model.vocab_size, model.padded_vocab) == (size, padded)
    larger = parse(*GIVEN, "--model.vocab_size=300").with_vocab(65)
    assert larger.model.vocab_size == 300
    with pytest.raises(ValueError, match="model.vocab_size=60 .*65"):
        parse(*GIVEN, "--model.vocab_size=60").with_vocab(65)


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(*GIVEN).optim.lr = 1.0


# --- precedence


def test_command_line_beats_yaml_beats_default(in_yaml):
    file = in_yaml(
        "optim: {lr: 1.0e-3, steps: 5000}\ndata: {path: text}\nrun: {out_dir: out/x, seed: 3}\n"
    )
    c = parse(file, "--optim.lr=2e-3", "--run.out_dir=out/z")
    assert c.optim.lr == 2e-3  # command line over YAML
    assert c.optim.steps == 5000  # YAML over default, although its section is overridden
    assert c.optim.beta2 == 0.95  # default
    assert (c.run.out_dir, c.run.seed) == ("out/z", 3)
    assert parse("--run.out_dir=out/z", file, "--optim.lr=2e-3") == c  # --config may come anywhere


def test_last_of_a_repeated_argument_wins():
    for key, first, last in (("optim.lr", 1e-3, 2e-3), ("data.path", "one", "two")):
        section, name = key.split(".")
        c = parse(*GIVEN, f"--{key}={first}", f"--{key}={last}")
        assert getattr(getattr(c, section), name) == last


def test_key_and_value_may_be_two_arguments():
    assert parse(*GIVEN, "--optim.lr", "1e-3").optim.lr == 1e-3


def test_fault_05_and_09_values_reach_the_config():
    """Learning rate, data set and switches of nanogpt-jax could not be set from its flags."""
    c = parse(*GIVEN, "--optim.lr=1", "--log.tensorboard=false", "--data.path=elsewhere")
    assert c.optim.lr == 1.0 and isinstance(c.optim.lr, float)
    assert c.log.tensorboard is False and c.data.path == "elsewhere"
    assert parse(*GIVEN, "--log.wandb=true").log.wandb is True


@pytest.mark.parametrize("written, value", [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1", 1.0)])
def test_yaml_numbers_in_every_spelling(in_yaml, written, value):
    # YAML 1.1 takes 1e-3, without a dot, for text.
    lr = parse(in_yaml(f"optim: {{lr: {written}}}"), *GIVEN).optim.lr
    assert lr == value and isinstance(lr, float)


def test_whole_numbers_with_an_exponent_and_texts_that_look_like_one(in_yaml):
    argv = (*GIVEN, "--optim.steps=1.2e4", "--batch.microbatch=1e1", "--run.out_dir=1e5")
    for extra in ((), ("--model.depth=4", "--optim.lr=1e-2")):
        c = parse(in_yaml("checkpoint: {every: 1e3}\neval: {every: 1.0e+3}"), *argv, *extra)
        assert (c.optim.steps, c.batch.microbatch, c.run.out_dir) == (12_000, 10, "1e5")
        assert (c.checkpoint.every, c.eval.every) == (1000, 1000)


def test_help_says_what_every_key_means():
    for section, field in Config.model_fields.items():
        for key, info in field.annotation.model_fields.items():
            assert info.description, f"{section}.{key}"


def test_empty_section_means_its_defaults(in_yaml):
    assert parse(in_yaml("optim:\nmodel: {}\n"), *GIVEN) == parse(*GIVEN)


@pytest.mark.parametrize(
    "path",
    [
        "2024",
        "007",
        "true",
        "a b",
        "a,b",
        "data/lang=en",
        "a=1,b=2",
        r"C:\text",
        'x"y',
        "data/é",
        "gs://bucket/x",
        "[x]",
    ],
)
def test_paths_are_taken_as_they_are(path):
    c = parse(f"--data.path={path}", f"--run.out_dir={path}")
    assert (c.data.path, c.run.out_dir) == (path, path)


@pytest.mark.parametrize("mixture", ['{"a": 1, "b": 3}', "{a: 1, b: 3}"])
def test_mixture_on_the_command_line_and_in_yaml(in_yaml, mixture):
    for c in (
        parse(f"--data.path={mixture}", "--run.out_dir=x"),
        parse(in_yaml(f"data: {{path: {mixture}}}"), "--run.out_dir=x"),
        parse(in_yaml("data: {path: text}"), f"--data.path={mixture}", "--run.out_dir=x"),
    ):
        assert c.data.path == {"a": 1, "b": 3}
        assert c.data.weights == {"a": 0.25, "b": 0.75}
    assert DataConfig(path="a").weights == {"a": 1.0}


@pytest.mark.parametrize("tasks", ['{"lambada": "x"}', "{lambada: x}"])
def test_tasks_on_the_command_line_are_written_as_in_yaml(in_yaml, tasks):
    run = ("--data.path=text", "--run.out_dir=x")
    assert parse(f"--eval.tasks={tasks}", *run).eval.tasks == {"lambada": "x"}
    assert parse(in_yaml(f"eval: {{tasks: {tasks}}}"), *run).eval.tasks == {"lambada": "x"}


def test_a_mistake_names_the_file_and_the_command_line_that_made_it(in_yaml):
    file = in_yaml("data: {path: text}")
    with pytest.raises(ValueError, match=r"\.yaml with this command line makes no run:\n.*lr="):
        parse(file, "--optim.lr=abc", "--run.out_dir=x")
    with pytest.raises(ValueError, match=r"\.yaml makes no run:\n.*run.out_dir is missing"):
        parse(file)


# --- mistakes


@pytest.mark.parametrize(
    "arguments, said",
    [
        # Unknown keys name the nearest.
        (["--optim.lrr=1"], ["--optim.lrr=1", "did you mean --optim.lr?"]),
        (["--lr=1"], ["--lr=1", "did you mean --optim.lr?"]),
        (["--model.lr=1"], ["--model.lr=1", "did you mean --optim.lr?"]),
        (["--modle.n_layer=1"], ["did you mean --model.n_layer?"]),
        # Other trainers' names, as configs/README has them.
        (["--optim.learning_rate=1"], ["--optim.learning_rate=1; here that is --optim.lr"]),
        (["--learning-rate=1"], ["here that is --optim.lr"]),
        (["--max_iters=5"], ["here that is --optim.steps"]),
        (["--batch_size=12"], ["here that is --batch.sequences", "--batch.microbatch"]),
        (["--device=cpu"], ["here that is JAX_PLATFORMS=cpu"]),
        (["--dataset=text"], ["here that is --data.path"]),
        (["--compile=False"], ["here that is nothing"]),
        (["--eval_only=True"], ["here that is python -m scalegpt.evaluate"]),
        (["--decay_lr=False"], ["here that is --optim.schedule=constant"]),
        (["--init_from=resume"], ["the same command again"]),
        (["--init_from=gpt2"], ["did you mean --run.init_from?"]),
        (["--run.resume=true"], ["the same command again"]),
        (["--backend=nccl"], ["the same command on every host"]),
        (["--n_layer=4"], ["did you mean --model.n_layer?"]),
        (["--n_layer", "4"], ["did you mean --model.n_layer?"]),
        (["--qq", "7", "--lrr=1", "--bar"], ["--qq; see", "mean --optim.lr?", "--bar; see"]),
        (["--start=To be"], ["here that is --prompt of python -m scalegpt.generate"]),
        (["config/x.py"], ["here that is --config FILE"]),
        (["--config=config/x.py"], ["config/x.py is Python; here that is --config FILE"]),
        (["--config=config/train_shakespeare_char.py"], ["configs/: --config shakespeare_char"]),
        (["demo"], ["did you mean --config demo?"]),
        (["ablations/char-cpu"], ["did you mean --config ablations/char_cpu?"]),
        (["configs/demo.yaml"], ["did you mean --config configs/demo.yaml?"]),
        (["--config=ablations/char_cpu"], ["several arms", "tools/ablation.py"]),
        (["--mesh.dat=2"], ["did you mean --mesh.data?"]),  # not --data
        (["--print-confg"], ["did you mean --print-config?"]),
        (["--optim.l=1"], ["--optim.l=1"]),  # no abbreviations
        (["stray"], ["stray"]),
        (["--optim.lr"], ["--optim.lr", "expected one argument"]),
        # Wrong types.
        (["--optim.lr=abc"], ["optim.lr='abc'", "valid number"]),
        (["--optim.steps=1.5"], ["optim.steps='1.5'", "valid integer"]),
        (["--optim.steps=1.5e0"], ["optim.steps=1.5", "valid integer"]),
        (["--optim.steps=1e99"], ["optim.steps=1e+99", "maximum size"]),
        (["--model.bias=maybe"], ["model.bias='maybe'", "boolean"]),
        (["--optim=3"], ["optim=3"]),
        (["--data=3"], ["data=3"]),
        (["--model={n_layer: 4}"], ["model", "--section.key=value"]),
        (["--data.path={a: 1"], ["--data.path={a: 1"]),
        (["--model.preset=gpt3"], ["model.preset='gpt3'", "'gpt2-xl'"]),
        (["--optim.schedule=cos"], ["optim.schedule='cos'", "'cosine'"]),
        # Out of range.
        (["--model.n_layer=0"], ["model.n_layer='0'", "greater than or equal to 1"]),
        (["--batch.sequences=-4"], ["batch.sequences='-4'"]),
        (["--batch.microbatch=0"], ["batch.microbatch='0'"]),
        (["--model.dropout=1"], ["model.dropout='1'", "less than 1"]),
        (["--model.dropout=-0.1"], ["model.dropout='-0.1'"]),
        (["--optim.lr=0"], ["optim.lr='0'"]),
        (["--optim.lr=inf"], ["optim.lr='inf'", "finite"]),
        (["--optim.lr=nan"], ["optim.lr='nan'"]),
        (["--optim.eps=inf"], ["optim.eps='inf'", "finite"]),
        (["--optim.eps=0"], ["optim.eps='0'"]),
        (["--optim.beta2=1"], ["optim.beta2='1'"]),
        (["--optim.grad_clip=-1"], ["optim.grad_clip='-1'"]),
        (["--optim.weight_decay=nan"], ["optim.weight_decay='nan'"]),
        (
            ["--model.rope_scaling={rope_type: yarn, factor: 4}"],
            ["rope_scaling of type yarn needs original_max_position_embeddings"],
        ),
        (["--model.rope_scaling={rope_type: ntk, factor: 4}"], ["rope_scaling.rope_type='ntk'"]),
        (["--model.window_pattern=SSSL"], ["model.window_pattern=SSSL needs model.window"]),
        (["--model.window=8", "--model.window_pattern=SX"], ["model.window_pattern='SX'"]),
        (["--model.n_head=4", "--model.n_kv_head=3"], ["n_kv_head=3", "could be 2 or 4"]),
        (["--model.rope_base=inf"], ["model.rope_base='inf'", "finite"]),
        (["--run.seed=-1"], ["run.seed='-1'"]),
        (["--checkpoint.keep=0"], ["checkpoint.keep='0'"]),
        (["--log.every=0"], ["log.every='0'"]),
        (["--data.path={a: 0, b: 1}"], ["data.path.a=0"]),
        (["--data.path={}"], ["data.path={}"]),
        # Keys that do not go together.
        (
            ["--model.n_embd=100", "--model.n_head=7"],
            ["model.n_embd=100", "model.n_head=7", "4 or 5"],
        ),
        (
            ["--model.n_embd=12", "--model.n_head=4", "--model.position=rope"],
            ["model.position=rope", "even", "3"],
        ),
        (["--optim.lr=1e-6"], ["optim.min_lr=6e-05", "optim.lr=1e-06"]),
        (["--optim.steps=9", "--optim.warmup_steps=10"], ["optim.warmup_steps=10", "update 9"]),
        (["--optim.decay_steps=9", "--optim.warmup_steps=10"], ["optim.warmup_steps=10", "end"]),
        (["--optim.warmup_steps=600001"], ["optim.warmup_steps=600001", "update 600000"]),
        # The mesh.
        (["--mesh.fsdp=-1"], ["only one mesh axis can be -1", "data, fsdp"]),
        (["--mesh.tensor=0"], ["mesh.tensor=0"]),
        (["--mesh.data=-2"], ["mesh.data='-2'"]),
    ],
)
def test_mistake_names_key_value_and_fix(arguments, said):
    message = mistake(*GIVEN, *arguments)
    for part in said:
        assert part in message, message


def test_min_lr_above_lr_is_fine_without_a_decay():
    assert parse(*GIVEN, "--optim.lr=1e-6", "--optim.schedule=constant").optim.lr == 1e-6


def test_missing_required_keys_are_named(in_yaml):
    for file in ([], [in_yaml("optim: {lr: 1}\n")], [in_yaml("")], [in_yaml("data:\nrun:\n")]):
        message = mistake(*file)
        assert "data.path is missing; give --data.path=" in message
        assert "run.out_dir is missing; give --run.out_dir=" in message
    assert "run.out_dir" in mistake("--data.path=x") and "data.path" not in mistake("--data.path=x")


def test_every_mistake_is_named_at_once():
    lines = mistake(*GIVEN, "--optim.lr=abc", "--model.n_layer=0", "--mesh.data=0").split("\n")
    assert len(lines) == 4  # where, then one line each
    assert [any(key in line for line in lines[1:]) for key in ("optim.lr", "model.n_layer")]
    assert sum("mesh.data=0" in line for line in lines) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("optim: {lrr: 1}", ["unknown key optim.lrr=1", "did you mean optim.lr?"]),
        ("model: {lr: 1}", ["unknown key model.lr=1", "did you mean optim.lr?"]),
        ("optimm: {lr: 1}", ["unknown key optimm", "did you mean optim?"]),
        ("lr: 1", ["unknown key lr=1", "did you mean optim.lr?"]),
        ("max_iters: 1", ["unknown key max_iters=1", "here that is --optim.steps"]),
        ("model: {qqq: 1}", ["unknown key model.qqq=1", "there are", "n_layer", "loss_chunk"]),
        ("mesh: {dat: 1}", ["unknown key mesh.dat=1", "did you mean mesh.data?"]),
        ("optim: [1, 2]", ["optim=[1, 2]"]),
        ("optim: 3", ["optim=3"]),
        ("data: text", ["data='text'"]),
        ("optim: {lr: [1]}", ["optim.lr=[1]"]),
        ("model: {bias: perhaps}", ["model.bias='perhaps'"]),
        ("run: {out_dir: 3}", ["run.out_dir=3"]),
        ("data: {path: []}", ["data.path=[]"]),
        ("data: {path: {}}", ["data.path={}"]),
        ("1: 2", ["1"]),
        ("- 1\n- 2", ["holds a list, not sections of keys"]),
        ("just text", ["holds a str, not sections of keys"]),
        ("a: [1", ["not valid YAML", "line 1"]),
        ("a: 1\n b: 2", ["not valid YAML", "line 2"]),
        ("!!python/object:os.system {}", ["not valid YAML"]),
        (b"data: {path: \xff\xfe}", ["not UTF-8"]),
    ],
)
def test_mistake_in_yaml_names_file_key_and_fix(in_yaml, text, said):
    file = in_yaml(text)
    message = mistake(file)
    for part in (*said, file.removeprefix("--config=")):
        assert part in message, message


def test_wrong_section_in_yaml_is_not_hidden_by_an_override(in_yaml):
    assert "optim=3" in mistake(in_yaml("optim: 3"), *GIVEN, "--optim.lr=1")


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml", "./configs/demo.yaml"])
def test_scalegpts_own_configs_are_found_by_name_in_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", name) == parse("--config", str(ROOT / "configs" / "demo.yaml"))
    Path("demo").mkdir()  # a folder of this name is no config
    assert parse("--config", name).run.out_dir == "out/demo"
    if name != "demo":  # a file of the user's comes first
        Path("configs").mkdir()
        Path(name).write_text("data: {path: mine}\nrun: {out_dir: mine}")
        assert parse("--config", name).run.out_dir == "mine"


def test_missing_config_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked, near in (("v3-8", "v3_8"), ("gpt2_124M", "gpt2_124m"), ("dem", "demo")):
        message = mistake("--config", f"configs/{asked}.yaml")
        assert f"cannot read config configs/{asked}.yaml" in message
        assert f"did you mean configs/{near}.yaml?" in message
    assert "did you mean" not in mistake("--config=/nowhere/else")
    assert "cannot read config" in mistake(f"--config={tmp_path}")  # a folder


def test_environment_changes_nothing(monkeypatch):
    for name in ("OPTIM", "optim", "RUN", "optim.lr", "OPTIM__LR", "LR"):
        monkeypatch.setenv(name, '{"lr": 1}' if name.lower() == "optim" else "1")
    assert parse(*GIVEN) == loading.validate(MINIMAL, "here")


# --- the real command line


def command(tmp_path, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "scalegpt.train", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--optim.lrr=1"], "did you mean --optim.lr?"),
        pytest.param(["--mesh.data=0"], "mesh.data=0", marks=pytest.mark.slow),
        pytest.param(["--config=NOT_UTF8"], "is not UTF-8", marks=pytest.mark.slow),
    ],
)
def test_mistake_exits_2_with_one_message_and_makes_nothing(tmp_path, arguments, said):
    bad, out = tmp_path / "bad.yaml", tmp_path / "out"
    bad.write_bytes(b"\xff")
    arguments = [a.replace("NOT_UTF8", str(bad)) for a in arguments]
    result = command(tmp_path, "--data.path=x", f"--run.out_dir={out}", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == "" and said in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_mesh_that_does_not_fit_the_machine_exits_2_and_makes_nothing(tmp_path):
    """Found only when the devices are known; the data is opened before, so there has to be some."""
    import numpy as np

    for split in ("train", "val"):
        np.arange(4000, dtype="<u2").__mod__(60).tofile(tmp_path / f"{split}.bin")
    out = tmp_path / "out"
    result = command(
        tmp_path,
        f"--data.path={tmp_path}",
        f"--run.out_dir={out}",
        "--model.block_size=8",
        "--mesh.tensor=3",
        JAX_NUM_CPU_DEVICES="8",
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "does not fit 8 cpu device(s)" in result.stderr.replace("\n", " ")
    assert not out.exists()


def test_print_config_prints_yaml_of_the_same_run(tmp_path):
    out = tmp_path / "out"
    argv = [
        "--model.preset=gpt2-medium",
        "--model.n_layer=5",
        "--optim.lr=3e-4",
        "--data.path={a: 1, b: 2}",
        f"--run.out_dir={out}",
    ]
    result = command(tmp_path, *argv, "--print-config")
    assert result.returncode == 0, result.stderr
    assert loading.validate(yaml.safe_load(result.stdout), "printed") == parse(*argv)
    assert not out.exists()


# --- round trip and comparison


@pytest.mark.parametrize(
    "argv",
    [
        GIVEN,
        [*GIVEN, "--model.preset=gpt2-xl", "--model.bias=false", "--optim.lr=1"],
        ["--data.path={a b: 1, 'c:d': 0.1}", "--run.out_dir=out/é ü", "--optim.eps=1e-8"],
        [*GIVEN, "--batch.microbatch=3", "--optim.lr=0.00012345678901234567"],
    ],
)
def test_resolved_config_round_trip(tmp_path, argv):
    config = parse(*argv).with_vocab(50257)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert loading.validate(loading.load(path), str(path)) == config
    assert parse(f"--config={path}") == config
    assert curve_diff(parse(f"--config={path}"), config) == []


def leaves(config: Config) -> dict[str, object]:
    return {f"{s}.{k}": v for s, keys in config.model_dump().items() for k, v in keys.items()}


# A change of any other key of the model, batch, data or optimizer changes the curve.
NEUTRAL = {
    "model.preset",
    "model.depth",
    "model.attention",
    "model.scan_layers",
    "model.remat",
    "model.loss_chunk",
    "batch.microbatch",
    "data.path",
    "data.prepare",
    "data.prefetch",
    *("data.cache_dir", "data.disk_limit"),
    # Of RoPE, of rmsnorm, of wsd, of lookahead and of an untied head, which the defaults are not.
    *(
        "model.rope_base",
        "model.rope_scaling",
        "model.norm_gain",
        "model.softcap",
        "model.ngram",
        "model.value_gates",
        "optim.cooldown",
        "optim.cooldown_power",
        "optim.lookahead_decay",
        "optim.head_lr",
    ),
    *("lora.alpha", "lora.marks"),  # with a rank; the second follows from the data
    # What isolate and the data, and steps say.
    *("model.bos", "optim.epochs", "objective.width"),
    # Of several updates from the same answers, and of grpo.kl.
    *("grpo.clip_low", "grpo.clip_high", "grpo.kl_estimator"),
}
OTHER = {  # a value that differs from the default, where adding one will not do
    "model.preset": "gpt2",
    "model.depth": 3,
    "model.n_head": 6,
    "model.n_kv_head": 4,
    "model.mlp": "swiglu",
    "model.n_inner": 128,
    "model.norm_eps": 1e-4,
    "model.window": 32,
    "model.window_pattern": "SL",
    "model.attention_scale": 0.1,
    "model.softcap": "tanh",
    "model.rope_scaling": RopeScaling(rope_type="linear", factor=2.0),
    "model.head_size": 8,
    "model.n_embd": 96,
    "model.position": "rope",
    "model.activation": "gelu",
    "model.dtype": "float32",
    "model.attention": "xla",
    "model.remat": "dots",
    "model.dropout": 0.1,
    "model.vocab_size": 300,
    "model.isolate": True,
    "model.bos": 3,
    "eval.document_mask": True,
    "lora.marks": 3,
    "objective.width": 8,
    "objective.name": "sft",
    "grpo.reward": "exact",
    "grpo.divide": "tokens",
    "grpo.scale": "group",
    "grpo.clip_low": 0.3,
    "grpo.kl_estimator": "k2",
    "optim.epochs": 2.0,
    "batch.microbatch": 2,
    "batch.growth": {7: 960},
    "data.path": "moved",
    "data.cache_dir": "x",
    "data.shuffle": "documents",
    "data.shuffle_span": 1e9,
    "data.disk_limit": 9.0,
    "data.pack": "best_fit",
    "optim.lr": 7e-4,
    "model.norm": "rmsnorm",
    "model.init": "zero_out",
    "optim.name": "muon",
    "optim.embedding_lr": 0.1,
    "optim.head_lr": 0.1,
    "optim.scalar_lr": 0.1,
    "optim.momentum": 0.5,
    "optim.min_lr": 1e-5,
    "optim.schedule": "linear",
    "optim.decay": "all",
    "optim.beta1": 0.8,
    "optim.beta2": 0.9,
    "optim.cooldown": 0.1,
    "optim.lookahead": 0.6,
    "optim.lookahead_decay": 0.9,
    "optim.decay_steps": 5000,
    "run.backend": "pmap",
    "run.out_dir": "moved",
    "run.init_from": "x",
    "run.init_checkpoint": "latest",
    "run.replay": 3,
    "eval.windows": 3,
    "eval.train_windows": 3,
    "eval.sample_prompt": "x",
    "eval.tasks": {"lambada": "x"},
    "eval.task_examples": 3,
    "distributed.coordinator": "a:1",
    "distributed.num_processes": 2,
    "distributed.process_id": 1,
    "log.wandb_project": "x",
    "log.wandb_entity": "x",
    "log.wandb_name": "x",
    "log.wandb_tags": "a,b",
    "mesh.data": 2,
}


@pytest.mark.parametrize(
    ("argv", "steps", "warmup"),
    [
        (["--optim.steps=20"], 20, 2),
        (["--optim.steps=5"], 5, 0),
        (["--optim.steps=100"], 100, 100),  # it fits, as it always has
        (["--optim.decay_steps=60", "--optim.schedule=linear"], 2400, 6),
        (["--optim.steps=105", "--optim.schedule=wsd"], 105, 10),
        (["--optim.steps=105", "--optim.schedule=wsd", "--optim.cooldown=0.95"], 105, 5),
    ],
)
def test_a_short_trial_shortens_the_warm_up_that_the_config_has(
    argv, steps, warmup, tmp_path, capsys
):
    """Of 100 updates, in the demo of 2400."""
    config = parse("--config=demo", *argv)
    assert (config.optim.steps, config.optim.warmup_steps) == (steps, warmup)
    end = config.optim.decay_steps or steps
    said = f"is shortened to {warmup} in {end} updates"
    said = "is most of the 100 updates" if warmup == 100 else said
    assert capsys.readouterr().err == f"note: optim.warmup_steps=100 {said}\n"
    # The run that is stored says what it used, and the same command continues it.
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse(f"--config={tmp_path}/config.yaml") == config == parse("--config=demo", *argv)


def test_a_default_warm_up_yields_and_one_that_is_given_with_the_updates_does_not(in_yaml, capsys):
    assert parse(in_yaml("optim: {steps: 300}"), *GIVEN).optim.warmup_steps == 30
    assert "warmup_steps=2000 is shortened to 30 in 300 updates" in capsys.readouterr().err
    assert "is beyond the end" in mistake(in_yaml("optim: {steps: 30, warmup_steps: 31}"), *GIVEN)
    # What a stored run says is never changed.
    with pytest.raises(ValueError, match="beyond the end"):
        loading.validate({**MINIMAL, "optim": {"steps": 300}}, "stored")


def test_curve_diff_names_each_key_that_changes_the_curve_and_no_other():
    base = loading.validate(MINIMAL, "here")
    seen = set()
    for key, default in leaves(base).items():
        value = OTHER.get(key)
        if value is None:
            value = not default if isinstance(default, bool) else default + 1
        assert value != default, key
        section, name = key.split(".")
        part = getattr(base, section).model_copy(update={name: value})
        lines = curve_diff(base, base.model_copy(update={section: part}))
        sections = ("model", "batch", "data", "objective", "dpo", "grpo", "lora", "optim")
        compared = section in sections or key == "run.seed"
        expected = [f"{key}: {default} -> {value}"] if compared and key not in NEUTRAL else []
        assert lines == expected, key
        seen.add(key)
    assert NEUTRAL <= seen


def test_curve_diff_minds_the_weights_of_a_mixture_but_not_where_it_lies():
    def config(path):
        return loading.validate({**MINIMAL, "data": {"path": path}}, "here")

    stored = config({"a": 1, "b": 3})
    assert curve_diff(stored, config({"/mnt/a": 10, "/mnt/b": 30})) == []
    assert "data.path" in curve_diff(stored, config({"a": 3, "b": 1}))[0]
    assert "data.path" in curve_diff(config("a"), stored)[0]


def test_a_schedule_that_stays_the_same_curve_may_end_later():
    def differs(old: list[str], new: list[str]) -> list[str]:
        lines = curve_diff(parse(*GIVEN, *old), parse(*GIVEN, *new))
        return [line.partition(":")[0] for line in lines]

    longer = ["--optim.steps=700_000"]
    constant, ends = ["--optim.schedule=constant"], ["--optim.decay_steps=600000"]
    ahead, average = ["--optim.lookahead=0.5"], ["--optim.average=0.1"]
    assert differs(constant, [*constant, *longer, "--optim.min_lr=0", *ends]) == []
    assert (
        differs([], ends) == differs(ends, [*ends, *longer]) == differs([], [*ends, *longer]) == []
    )
    assert differs([], longer) == ["optim.steps"]
    assert differs([], ["--optim.decay_steps=7e5", *longer]) == ["optim.steps", "optim.decay_steps"]
    for kind in (constant, ends):
        for more in (ahead, average):
            assert differs([*kind, *more], [*kind, *more, *longer]) == ["optim.steps"]
    muon = ["--optim.name=muon", "--optim.schedule=constant"]
    slow = [*muon, "--optim.momentum_slow=0.98"]  # which begins after a share of the updates
    assert differs(muon, [*muon, *longer]) == [] and differs(slow, [*slow, *longer]) != []
    assert differs(constant, longer) == ["optim.schedule", "optim.steps"]


def test_config_changes_are_allowed_by_key(in_yaml):
    def allowed(value: str) -> Config:
        config = parse(*GIVEN, f"--run.allow_config_change={value}")
        assert parse(in_yaml(f"run: {{allow_config_change: {value}}}"), *GIVEN) == config
        return config

    for value in ("[optim.lr, data.path]", '["optim.lr", "data.path"]'):
        run = allowed(value).run
        assert run.allow_config_change == ["optim.lr", "data.path"]
        assert run.allows("data.path") and not run.allows("optim.steps")
    assert parse(*GIVEN, "--run.allow_config_change=optim.lr,data.path").run == run
    assert allowed("true").run.allows("optim.lr") and not allowed("false").run.allows("optim.lr")
    for value, said in (
        ("maybe", "maybe is no key; see --help"),
        ("optim.lr,seed", "seed is no key; did you mean run.seed?"),
        (
            "[optim.stesp, data.pth]",
            "optim.stesp is no key; did you mean optim.steps?\n  data.pth is",
        ),
    ):
        message = mistake(*GIVEN, f"--run.allow_config_change={value}")
        assert "run.allow_config_change=" in message and said in message


# --- one dial


def test_the_start_names_what_is_not_muons_own():
    of_adamw = ("--optim.lr=0.004", "--optim.min_lr=1e-5", "--optim.warmup_steps=100")
    assert muon_line(parse("--optim.name=muon", *of_adamw, *GIVEN)) == (
        "muon with lr 0.004 (its own: 0.02), min_lr 1e-05 (its own: 0.0), warmup_steps 100 "
        "(its own: 0); null gives its own"
    )
    nulls = [f"{flag.partition('=')[0]}=null" for flag in of_adamw]
    for silent in (["--optim.name=muon"], ["--optim.name=muon", *of_adamw, *nulls], of_adamw):
        assert muon_line(parse(*silent, *GIVEN)) == ""


def test_the_start_names_what_nothing_reads():
    for argv, said in (
        (["--optim.cooldown=0.5"], "optim.cooldown=0.5 (optim.schedule=cosine)"),
        (["--batch.growth={9: 960}", "--optim.steps=8"], "growth={9: 960} (optim.steps=8)"),
        (["--model.rope_base=5e4"], "model.rope_base=50000.0 (model.position=learned)"),
        (["--optim.schedule=constant", "--optim.min_lr=0"], "optim.min_lr=0.0 (optim.schedule=con"),
        (["--optim.name=muon", "--optim.head_lr=0.1"], "optim.head_lr=0.1 (model.tie_word_embeddi"),
        (
            ["--optim.name=muon", "--model.preset=nanochat", "--optim.scalar_lr=0.1"],
            "optim.scalar_lr=0.1 (a model without norms",
        ),
        (
            ["--eval.task_examples=9", "--log.wandb_name=a"],
            "examples=9 (no eval.tasks), log.",
        ),
    ):
        assert said in unread_line(parse(*argv, *GIVEN)), argv
    for silent in (
        ["--optim.schedule=wsd", "--optim.cooldown=0.5"],
        ["--model.position=rope", "--model.rope_base=5e4"],
        ["--optim.name=muon", "--optim.schedule=cosine"],
        ["--model.depth=4"],
        ["--batch.growth={9: 960, 90: 1920}", "--optim.steps=9", "--optim.warmup_steps=1"],
        ["--optim.name=muon", "--model.preset=many_epochs", "--model.tie_word_embeddings=true"],
    ):
        assert unread_line(parse(*silent, *GIVEN)) == ""


def test_the_start_warns_of_a_run_that_is_absurd_and_names_one_to_begin_from():
    config = parse(*GIVEN, "--data.path=my text").with_vocab(50257)
    data = SimpleNamespace(name="my text", train=np.zeros(102_400 + 1024, np.uint16))
    passes = reports.epochs(config, [data], config.optim.steps)
    assert passes == {"my text": 600_000 * 480 / 100}
    seconds, speed = reports.least_seconds(config)
    # 6 x 123.6M + 6 x 12 x 1024 x 768 FLOPs a token, 600,000 updates of 491,520 tokens.
    assert speed == "(2.4e+20 FLOPs at 1 TFLOP/s, about what a fast CPU does)"
    said = "\n".join(reports.advice(config, passes, seconds, speed))
    assert "reads my text 2,880,000 times and takes 7 years (2.4e+20 FLOPs at" in said
    assert "train --config demo --data.path='my text' --run.out_dir=" in said
    # The first updates tell the pace; what the start has warned of is not repeated.
    assert "about 7 days for the 599,998 updates to come" in reports.pace(config, 2, 7 * 86400)
    assert "warning" not in reports.pace(config, 2, 7 * 86400)
    demo = parse("--config=demo").with_vocab(256)
    assert reports.advice(demo, {"python_stdlib": 0.2}, *reports.least_seconds(demo)) == []
    assert "warning: this run takes 7 days at this pace" in reports.pace(demo, 2, 7 * 86400)
    assert reports.pace(demo, 2, 300).endswith("about 5 minutes for the 2,398 updates to come")


def test_what_to_type_next_begins_with_the_python_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a b" / "bin" / "python3"))
    assert python() == "'a b/bin/python3'"
    Path("a b", "bin").mkdir(parents=True)
    Path(sys.executable).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert python() == "python3"
    monkeypatch.setattr(sys, "executable", "/elsewhere/python3")
    assert python() == "/elsewhere/python3"


def test_muon_moves_a_tied_table_by_smaller_steps():
    muon = ("--optim.name=muon", *GIVEN)
    for expected, argv in (
        (0.02, ["--model.preset=gpt2-xl"]),
        (0.02, ["--model.tie_word_embeddings=true"]),
        (0.3, ["--model.tie_word_embeddings=false"]),
        (0.3, ["--model.preset=modern"]),
        (0.02, ["--model.preset=modern", "--model.tie_word_embeddings=True"]),
        (0.5, ["--optim.embedding_lr=0.5"]),
        (0.02, ["--optim.embedding_lr=null"]),
        (0.02, ["--model.depth=12", "--model.preset=gpt2"]),
    ):
        config = parse(*argv, *muon)
        assert config.optim.embedding_lr == expected, argv
        assert ("embedding_lr" in muon_line(config)) == (expected == 0.5)


def test_muon_evens_rows_and_forgets_sooner_with_the_preset_modern():
    muon = ("--optim.name=muon", *GIVEN)
    for expected, argv in (
        ((0.95, 0.0), []),
        ((0.95, 0.0), ["--model.preset=nanochat"]),
        ((0.9, 0.95), ["--model.preset=modern"]),
        ((0.9, 0.95), ["--model.preset=modern", "--optim.momentum=null", "--optim.row_beta2=null"]),
        ((0.8, 0.95), ["--model.preset=modern", "--optim.momentum=0.8"]),
        (
            (0.8, 0.95),
            ["--model.preset=modern", "--optim.momentum=0.8", "--optim.embedding_lr=0.3"],
        ),
        ((0.95, 0.95), ["--model.depth=12"]),
        ((0.95, 0.0), ["--model.depth=12", "--model.preset=gpt2"]),
    ):
        optim = (config := parse(*argv, *muon)).optim
        assert (optim.momentum, optim.row_beta2) == expected, argv
        assert ("momentum 0.8 (its own: 0.9)" in muon_line(config)) == (expected[0] == 0.8)
    assert parse("--model.preset=modern", *GIVEN).optim.row_beta2 == 0  # AdamW has no such key


def test_many_epochs_is_modern_with_lower_rates_of_embeddings_and_head():
    def config(*argv):
        return parse(*argv, "--optim.name=muon", *GIVEN)

    many, modern = config(own := "--model.preset=many_epochs"), config("--model.preset=modern")
    lower = {"embedding_lr": 0.1, "head_lr": 0.003}
    assert many.optim == modern.optim.model_copy(update=lower) and muon_line(many) == ""
    assert many.model == modern.model.model_copy(update={"preset": "many_epochs"})
    assert config(own, "--optim.head_lr=null").optim == many.optim
    given = config(own, "--optim.head_lr=0.5")
    assert given.optim.head_lr == 0.5 and "head_lr 0.5 (its own: 0.003" in muon_line(given)
    deep = [parse("--model.depth=2", f"--model.preset={x}", *GIVEN) for x in ("modern", own[15:])]
    assert deep[1].optim.embedding_lr == pytest.approx(deep[0].optim.embedding_lr / 3, rel=0.01)
    assert parse(own, *GIVEN).optim == parse(*GIVEN).optim  # AdamW has one rate


def test_a_modern_run_of_before_its_preset_had_a_key_keeps_its_own():
    new = ModelConfig(preset="modern", n_layer=2)
    assert new.softcap == "tanh" and new.smear and ModelConfig(**new.model_dump()) == new
    for later in ({"softcap"}, {"smear"}, {"softcap", "smear", "residual_scalars"}):
        old = ModelConfig(**new.model_dump(exclude=later))
        assert old.preset == "modern" and old.qk_norm
        assert [key for key in later if getattr(old, key) not in ("rsqrt", False)] == []
        assert not later & old.model_fields_set
    assert not {"softcap", "smear"} & new.model_fields_set and "qk_norm" in new.model_fields_set
    stored = parse("--model.preset=modern", "--optim.name=muon", *GIVEN).model_dump()
    del stored["optim"]["row_beta2"]  # which muon had no such key for, either
    assert Config.model_validate(stored).optim.row_beta2 == 0


def test_depth_12_is_the_tuned_recipe_and_the_rest_follows_by_the_rules():
    c = parse("--model.depth=12", *GIVEN)
    assert (c.model.n_layer, c.model.n_embd, c.model.n_head) == (12, 768, 6)
    assert c.model.preset == "modern" and c.model.qk_norm and c.optim.name == "muon"
    assert c.batch.sequences * c.model.block_size == 2**19
    assert (c.optim.lr, c.optim.embedding_lr, c.optim.weight_decay) == (0.02, 0.3, 0.05)
    weights = 12 * 12 * 768**2 + 50257 * 768
    scalars = 2 * 12 + 12 + 1  # of the residual stream, and of smear
    assert parameter_count(c.with_vocab(50257).model) == weights + 50257 * 768 + scalars
    assert abs(c.optim.steps * 2**19 - 12 * weights) < 2**19

    small = parse("--model.depth=5", *GIVEN)
    assert (small.model.n_embd, small.model.n_head) == (384, 3)  # 320, to whole heads
    ratio = (12 * 5 * 384**2 + 50257 * 384) / weights
    batch = small.batch.sequences * 1024
    assert batch == 2**18 == 2 ** round(19 + 0.383 * math.log2(ratio))
    assert small.optim.lr == pytest.approx(0.02 / 2**0.5, rel=5e-3)
    assert small.optim.head_lr == pytest.approx(0.008 / 2**0.5 * (768 / 384) ** 0.5, rel=5e-3)
    assert small.optim.weight_decay == pytest.approx(0.05 / 2**0.5 / ratio, rel=5e-3)
    least = parse("--model.depth=12", "--batch.sequences=128", *GIVEN).optim  # 2^17 tokens
    fewer = parse("--model.depth=12", "--batch.sequences=8", *GIVEN).optim
    assert (fewer.lr, fewer.embedding_lr) == (least.lr, least.embedding_lr) == (0.01, 0.15)
    ratio = fewer.steps / least.steps
    assert fewer.weight_decay == pytest.approx(least.weight_decay / ratio, rel=5e-3)


def test_a_batch_that_grows_sees_the_tokens_of_one_that_does_not(in_yaml):
    file = in_yaml("model: {depth: 4, block_size: 512, vocab_size: 300}\nbatch: {sequences: 64}")
    rows = 12 * (12 * 4 * 256**2 + 300 * 256) / 512
    assert parse(file, *GIVEN).optim.steps == round(rows / 64)
    grown = parse(file, "--batch.growth={11: 128, 41: 256}", *GIVEN)
    assert grown.optim.steps == 40 + round((rows - 10 * 64 - 30 * 128) / 256)
    assert abs(grown.batch.rows_after(grown.optim.steps) - rows) <= 128
    late = parse(file, "--batch.growth={99999: 256}", *GIVEN)
    assert late.optim.steps == parse(file, *GIVEN).optim.steps
    with pytest.raises(ValueError, match="batch.growth='many' must be a whole number"):
        parse(file, "--batch.growth={11: many}", *GIVEN)


def test_what_is_given_stays_and_the_rest_follows_from_it(in_yaml):
    file = in_yaml("model: {depth: 4, block_size: 512, vocab_size: 300}\nbatch: {sequences: 64}")
    c = parse(file, "--optim.lr=0.5", "--model.n_embd=128", *GIVEN)
    assert (c.model.n_embd, c.model.n_head, c.model.block_size, c.optim.lr) == (128, 1, 512, 0.5)
    assert c.batch.sequences == 64
    assert c.optim.steps == round(12 * (12 * 4 * 128**2 + 300 * 128) / (64 * 512))
    assert c.optim.embedding_lr == pytest.approx(0.3 * (2**17 / 2**19 * 6) ** 0.5, rel=5e-3)
    adamw = parse("--model.depth=4", "--model.preset=gpt2", "--optim.name=adamw", *GIVEN)
    assert adamw.optim.embedding_lr is None and adamw.optim.lr == 6e-4
    assert adamw.optim.warmup_steps == adamw.optim.steps // 20
    assert adamw.model.position == "learned" and adamw.model.n_layer == 4
    # A config made for another size: null leaves out what it gives.
    config = in_yaml("model: {n_layer: 2, n_embd: 64}\noptim: {lr: 0.5}")
    nulls = ("--model.n_layer=null", "--model.n_embd=null", "--optim.lr=null")
    assert parse(config, *nulls, "--model.depth=12", *GIVEN) == parse("--model.depth=12", *GIVEN)
    assert parse(config, "--model.depth=2", *GIVEN).model.n_embd == 64
    with pytest.raises(ValueError, match="depth=12 and model.n_layer=2 both .*n_layer=null"):
        parse(config, "--model.depth=12", *GIVEN)
    with pytest.raises(ValueError, match="depth=12 and model.preset=gpt2-xl both .*preset=null"):
        parse("--model.preset=gpt2-xl", "--model.depth=12", *GIVEN)
    whole = parse("--model.depth=12", *GIVEN).optim
    half = parse("--model.depth=12", f"--optim.steps={whole.steps // 2}", *GIVEN)
    assert half.optim.weight_decay == pytest.approx(0.1, rel=5e-3)
    for zero in ("0", "0.00", "0e5"):
        none = parse("--model.depth=4", f"--optim.weight_decay={zero}", *GIVEN).optim
        assert not none.cautious_decay and none.weight_decay == 0
    # A width that has no heads of 128 has those of an even size near it.
    for embd, size in ((960, 120), (400, 100), (192, 192), (64, 64), (100, 100), (1920, 128)):
        wide = parse("--model.depth=15", f"--model.n_embd={embd}", *GIVEN).model
        assert (wide.n_layer, wide.head_dim, wide.preset) == (15, size, "modern")
    with pytest.raises(ValueError, match="rope needs an even head size, n_embd/n_head=401"):
        parse("--model.depth=15", "--model.n_embd=401", *GIVEN)
    with pytest.raises(ValueError, match="n_kv_head=3"):
        parse("--model.depth=4", "--model.n_kv_head=3", *GIVEN)
    # A run that is stored continues with the numbers it began with.
    assert loading.validate(c.model_dump(), "stored") == c


# --- configs/

SIZES = {  # n_layer, n_embd, block_size, vocabulary
    "gpt2_124m": (12, 768, 1024, 50257),
    "v3_8": (12, 768, 1024, 50257),
    "v3_32": (12, 768, 1024, 50257),
    "gpt2_medium": (24, 1024, 1024, 50257),
    "gpt2_large": (36, 1280, 1024, 50257),
    "gpt2_xl": (48, 1600, 1024, 50257),
    "finetune_gpt2": (12, 768, 1024, 50257),
    "finetune_lora": (48, 1600, 1024, 50257),
    "eval_gpt2": (12, 768, 1024, 50257),
    "eval_gpt2_medium": (24, 1024, 1024, 50257),
    "eval_gpt2_large": (36, 1280, 1024, 50257),
    "eval_gpt2_xl": (48, 1600, 1024, 50257),
    "shakespeare_char": (6, 384, 256, 65),
    "shakespeare_char_cpu": (4, 128, 64, 65),
}
PARAMETERS = {  # published figures, and the sum by hand for the characters
    ("gpt2_124m", False): 124_337_664,
    ("gpt2_124m", True): 124_439_808,
    ("v3_8", False): 124_337_664,
    ("v3_8", True): 124_439_808,
    ("v3_32", False): 124_337_664,
    ("v3_32", True): 124_439_808,
    ("gpt2_medium", True): 354_823_168,
    ("gpt2_large", True): 774_030_080,
    ("gpt2_xl", True): 1_557_611_200,
    ("finetune_gpt2", True): 124_439_808,
    ("eval_gpt2", True): 124_439_808,
    ("eval_gpt2_medium", True): 354_823_168,
    ("eval_gpt2_large", True): 774_030_080,
    ("eval_gpt2_xl", True): 1_557_611_200,
    ("shakespeare_char", False): 10_745_088,
    ("shakespeare_char_cpu", False): 804_096,
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # ablations/: test_ablation_input.py


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_is_a_run_and_opens_with_four_lines_of_comment(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("# ") for line in lines[:4])
    assert not lines[4].startswith("#") or lines[4].startswith("# python -m scalegpt.plan ")
    assert f"--config configs/{path.name}" in lines[3]
    config = parse(f"--config={path}")
    assert config.run.out_dir and config.data.path
    assert "".join(lines[:4]).find("PENDING") == -1, "say (not measured) or measure it"
    assert unread_line(config) == ""


def test_the_time_of_configs_that_were_not_timed_follows_from_their_flops():
    for name, vocabulary, stated in (("modern_25m", 256, 5.4e15), ("finetune_gpt2", 50257, 5.2e14)):
        config = parse(f"--config=configs/{name}.yaml").with_vocab(vocabulary)
        tokens = config.batch.rows_after(config.optim.steps) * config.model.block_size
        assert tokens * flops_per_token(config.model) == pytest.approx(stated, rel=0.01)
        time = f"# Time: {stated:.1e} FLOPs, expected, not timed".replace("e+", "e")
        assert time in (ROOT / "configs" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem in SIZES], ids=lambda path: path.stem
)
def test_config_file_has_the_expected_number_of_parameters(path):
    model, size = parse(f"--config={path}").model, SIZES[path.stem]
    assert (model.n_layer, model.n_embd, model.block_size) == size[:3]
    count = parameter_count(ModelConfig(**{**model.model_dump(), "vocab_size": size[3]}))
    assert count == gpt2_parameters(size[0], size[1], *size[2:], model.bias)
    assert count == PARAMETERS.get((path.stem, model.bias), count)

"""The step compiles for TPUs that are not here; skipped where TPU's compiler is not installed."""

import importlib.util
import json
import re

import pytest
from conftest import ROOT

from scalegpt import plan, stages, train

V3_8 = ["--config", "configs/v3_8.yaml"]
# As narrow as its compiler likes: it takes most of its time for the arithmetic of wide layers.
SMALL = [
    "--model.n_layer=1",
    "--model.n_embd=256",
    "--model.n_head=4",
    "--model.vocab_size=1000",
    "--batch.sequences=128",
]


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")


def gib(printed: str, what: str) -> float:
    return float(re.search(rf"{what} ([\d.]+)", printed).group(1))


@pytest.mark.oracle
def test_the_step_of_v3_8_compiles_with_the_state_sharded(libtpu, capsys):
    mesh = ["--mesh.data=1", "--mesh.fsdp=8"]
    assert train.main([*V3_8, *SMALL, *mesh, "--compile-only", "v3-8"]) == 0
    printed = capsys.readouterr().out
    assert "8 x TPU v3" in printed and "accumulation 2" in printed
    # 12 bytes a parameter; each device has an eighth of them, which two digits show as nothing.
    whole = 12 * int(printed.split(" parameters")[0].replace(",", "")) / 2**30
    assert gib(printed, "state and batch") <= 0.01 < whole


@pytest.mark.oracle
def test_the_step_of_the_modern_recipe_compiles_for_v5e_8(libtpu, capsys):
    """And so does plan --verify, with what moves and how long its operations should take."""
    small = ["--model.depth=2", "--model.vocab_size=1000", "--batch.sequences=256"]
    assert plan.main(["--config=v5e_8", *small, "--topology=v5e:2x4", "--verify", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    compiled = planned["compiled"]
    assert (compiled["kind"], compiled["accumulation"]) == ("TPU v5 lite", 2)
    assert compiled["peak"] >= compiled["state"] > planned["bytes_per_device"]["weights"]
    assert 0 < compiled["mfu"] < 1 and compiled["unread"] is None
    moved = {(row["kind"], row["depth"]) for row in compiled["collectives"]}
    assert ("all-reduce", 0) in moved and {depth for _, depth in moved} == {0}


@pytest.mark.oracle
def test_the_stages_of_v3_8_compile(libtpu, tmp_path, monkeypatch, capsys):
    """With the model of the base, whose run would be there by then; the base is the test above."""
    base, *later = stages.plan(stages.read_file("stages/v3_8"), "v3_8", str(tmp_path), None)
    monkeypatch.setattr(train, "with_model", lambda config: config)
    shape = base.config.model.model_dump(include={"bias", "block_size", "position"})
    given = [*(f"--model.{key}={value}" for key, value in shape.items()), *SMALL[:3]]
    for stage in later:
        script = stage.prepare[1]
        spec = importlib.util.spec_from_file_location("prepare_tasks", script)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        flags = [word for word in stage.prepare[2:-2] if not word.startswith("--count")]
        assert script == str(ROOT / "data/tasks/prepare.py")
        assert module.main([*flags, "--count=50"]) == 0  # of bytes, as no tokenizer is given
        assert train.main([*stage.argv, *given, "--compile-only", "v3-8"]) == 0
        assert "8 x TPU v3" in capsys.readouterr().out


@pytest.mark.oracle
def test_a_step_that_does_not_fit_says_what_to_lower(libtpu):
    with pytest.raises(ValueError, match="does not fit.*(?s:.)*batch.microbatch"):
        large = ["--batch.microbatch=64", "--model.scan_layers=true"]
        train.main([*V3_8, *large, "--compile-only", "v3-8"])


@pytest.mark.oracle
def test_an_unknown_topology_names_some_that_are_known(libtpu):
    with pytest.raises(ValueError, match="v9-8.*v5e:4x4"):
        train.main([*V3_8, "--compile-only", "v9-8"])

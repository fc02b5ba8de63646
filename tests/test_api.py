"""A trained model used from Python says what the commands say."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from tiny_run import arguments

import scalegpt
from scalegpt import evaluate, generate, train

pytestmark = pytest.mark.usefixtures("signals_as_they_were")
TEXT = "KING:\nSpeak, sir number 7, and let us 49 times be heard!\n"


@pytest.fixture(scope="module")
def run(plays, tmp_path_factory) -> str:
    out_dir = tmp_path_factory.mktemp("api") / "run"
    changes = {"optim.steps": 4, "eval.every": 2, "checkpoint.every": 2, "checkpoint.keep": 9}
    assert train.main(arguments(plays, out_dir, **changes)) == 0
    return str(out_dir)


@pytest.fixture(scope="module")
def model(run) -> scalegpt.Model:
    return scalegpt.load(run)


def test_it_writes_what_the_command_writes(run, model, capsys):
    flags = ["--prompt=KING", "--prompt=sir", "--max-new-tokens=30", "--seed=7", "--json"]
    assert generate.main(["--run", run, *flags]) == 0
    said = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert model.generate(["KING", "sir"], 30, seed=7) == said
    one = model.generate("KING", 30, temperature=0)
    assert isinstance(one, str) and model.generate(["KING"], 30, temperature=0) == [one]
    pieces = list(model.generate("KING", 30, temperature=0, stream=True))
    assert "".join(pieces) == one and len(pieces) > 1
    assert one.startswith(stopped := model.generate("KING", 30, temperature=0, stop=one[9:11]))
    assert len(stopped) < len(one)


def test_it_judges_as_the_command_does_and_its_logits_are_that_loss(run, model, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    assert evaluate.main(["--run", run, "--text", str(tmp_path / "text"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert model.loss(TEXT) == pytest.approx(said["text/loss"])
    assert model.bits_per_byte(TEXT) == pytest.approx(said["text/bits_per_byte"])
    ids = model.tokenizer.encode(TEXT)[: model.config.model.block_size]
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.model.vocab_size)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -chances[np.arange(len(ids) - 1), ids[1:]]
    assert losses.mean() == pytest.approx(model.loss(model.tokenizer.decode(ids)), rel=1e-5)


def test_a_notebook_shows_it_in_one_line(run, model):
    assert repr(model) == f"<scalegpt.Model of {run}, step 4: 26,528 parameters>"


def test_checkpoint_mesh_and_dtype_are_those_asked_for(run, model):
    early = scalegpt.load(run, checkpoint=2)
    assert early.loss(TEXT) > model.loss(TEXT) and early.trained.step == 2
    spread = scalegpt.load(run, mesh={"data": 2, "fsdp": 2, "tensor": 2}, dtype="float32")
    assert spread.loss(TEXT) == pytest.approx(model.loss(TEXT), rel=1e-5)
    assert spread.params["wte"].sharding.shard_shape(spread.params["wte"].shape)[0] < len(
        spread.params["wte"]
    )


def test_the_lines_of_the_readme_run(run):
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import scalegpt\n\ngpt = .*?)```", text, re.DOTALL)[1]
    for written, ours in (("out/slow", run), ("ROMEO:", "KING:"), ("To be, or not to be", TEXT)):
        assert written in code
        code = code.replace(written, ours.replace("\n", "\\n"))
    names: dict = {}
    exec(code.replace("To be", "KING"), names)
    assert names["text"] and names["loss"] > 0 and names["logits"].shape[0] == len("KING")


def test_the_metrics_of_a_run_without_any_are_an_empty_frame(run):
    pytest.importorskip("pandas")
    begun = dataclasses.replace(scalegpt.Run.read(run), rows=[])
    assert begun.dataframe().empty and begun.dataframe().index.name == "step"


def test_mistakes_are_named(run, model, tmp_path):
    for call, message in (
        (lambda: scalegpt.load(run, checkpoint=3), "no checkpoint '3'.*there are steps 2, 4"),
        (lambda: scalegpt.load(str(tmp_path)), "is not the folder of a run.*config.json"),
        (lambda: scalegpt.load(run, dtype="float16"), "model.dtype='float16'"),
        (lambda: scalegpt.load(run, mesh={"fdsp": 2}), "mesh.fdsp.*did you mean mesh.fsdp"),
        (lambda: scalegpt.load("gpt2", checkpoint=3), "checkpoint=3 is of a run, and gpt2 is none"),
        (lambda: model.generate("K", 0), "max_new_tokens=0"),
        (lambda: model.generate(["K"], stream=True), "of one prompt, not of a list"),
        (lambda: model.generate("K", temperature=-1), "temperature=-1"),
        (lambda: model.generate("K", warmth=1), "no option warmth of sampling"),
        (lambda: model.generate("K", stop=["", "x"]), "stop='' would end every text"),
        (lambda: model.loss("K"), "no text to predict"),
        (lambda: model.logits([999]), "ids must be from 0 to"),
        (lambda: model.logits([]), "must be 1 to block_size"),
    ):
        with pytest.raises(scalegpt.Mistake, match=message):
            call()

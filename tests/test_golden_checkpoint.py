"""A checkpoint of an earlier version is read bit for bit, gives its loss, and the run goes on."""

import json
import math
import signal
import tarfile

import golden
import jax
import pytest

from scalegpt import train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.weights.tokenizer_files import named


def test_an_earlier_checkpoint_is_read_evaluated_and_continued(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    golden.write_data(tmp_path / "data")
    with tarfile.open(golden.FOLDER / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = json.loads((golden.FOLDER / "expected.json").read_text())
    assert open_checkpoints("run").verify(golden.SAVED) == []

    def capture(function) -> str:
        capsys.readouterr()
        assert function() == 0
        return capsys.readouterr().out

    known = golden.figures(capture)
    assert known["step"] == expected["step"] and known["params"] == expected["params"]
    # The numbers of a processor other than that which wrote it differ by rounding.
    assert math.isclose(known["val_loss"], expected["val_loss"], rel_tol=1e-5)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    assert train.main(golden.arguments(golden.STEPS)) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert f"continuing from step {golden.SAVED} in" in capsys.readouterr().out
    assert golden.train_losses() == pytest.approx(expected["train_losses"], rel=1e-4)


def test_the_tokenizer_of_a_run_is_read_on_the_cpu(tmp_path, monkeypatch):
    """Preparing data beside a run must not take its TPU."""
    with tarfile.open(golden.FOLDER / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    assert named(str(tmp_path / "run")).name == "byte"
    assert asked[0] == ("jax_platforms", "cpu")

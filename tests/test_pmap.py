"""run.backend=pmap is the same training: same numbers, one reduction, same checkpoints."""

import json
import re
import warnings
from functools import cache
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny_run
import yaml
from conftest import ROOT

from scalegpt import evaluate, train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import Config
from scalegpt.config.command_line import parse
from scalegpt.data.token_files import open_dataset
from scalegpt.planning.hlo import collectives
from scalegpt.step import build as build_module
from scalegpt.step import build_for_training, sharding
from scalegpt.step import pmap as pmap_step

ROWS, T, VOCAB, UPDATES = 32, 16, 65, 5
DATA8, SLICES = (("data", 8),), (("replica", 2), ("data", 4))


def make_config(backend: str, mesh: tuple, accumulation: int) -> Config:
    return Config(
        model=dict(n_layer=2, n_head=4, n_embd=32, block_size=T, vocab_size=VOCAB, dropout=0.1)
        | dict(bias=True, dtype="float32", loss_chunk=8, scan_layers=True),
        mesh=dict(mesh),
        batch=dict(sequences=ROWS, microbatch=ROWS // 8 // accumulation),
        data=dict(path="unused"),
        optim=dict(lr=1e-3, min_lr=1e-4, warmup_steps=2, steps=UPDATES),
        run=dict(out_dir="unused", backend=backend),
    )


@cache
def build(*case) -> pmap_step.Steps:
    config = make_config(*case)
    return build_for_training(config, sharding.make_mesh(config.mesh))


@cache
def trained(*case):
    """(losses, gradient norms, state) of some updates on rows of which some are partly masked."""
    steps = build(*case)
    rng, state, losses, norms = np.random.default_rng(0), build(*case).init(), [], []
    for _ in range(UPDATES):
        tokens = rng.integers(0, VOCAB, (ROWS, T + 1), dtype=np.int32)
        tokens[:, 1::2] = tokens[:, :-1:2]
        # So a mean over microbatches or devices of their own means would be another loss: rows that
        # end early, rows of one target, and a microbatch of none where there are four.
        tokens[:5, 7:] = -1
        tokens[5:8, 2:] = ~tokens[5:8, 2:]
        tokens[8:16] = ~tokens[8:16]
        before = state
        batch = jax.device_put(tokens.reshape(*steps.layout, T + 1), steps.batch_sharding)
        state, metrics = steps.train(state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "a second state is kept"
        losses.append(float(metrics["train/loss"]))
        norms.append(float(metrics["train/grad_norm"]))
    return losses, norms, state


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        (DATA8, 4),
        pytest.param(DATA8, 1, marks=pytest.mark.slow),
        pytest.param(SLICES, 4, marks=pytest.mark.slow),
    ],
)
def test_losses_gradients_and_parameters_are_those_of_jit(mesh, accumulation):
    """Also with dropout and masked targets; jit accumulates nothing here, pmap 1 or 4 times."""
    losses, norms, state = trained("pmap", mesh, accumulation)
    want_losses, want_norms, want = trained("jit", DATA8, 1)
    assert want_losses[0] - want_losses[-1] > 0.02, "nothing was learnt, so nothing is compared"
    np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-4)
    ours, theirs = state, want
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), ours, theirs)


def test_the_state_lies_where_evaluation_and_checkpoints_expect_it():
    steps, (_, _, state) = build("pmap", DATA8, 4), trained("pmap", DATA8, 4)
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, state, steps.abstract))
    initial = build("jit", DATA8, 1).init().params
    jax.tree.map(np.testing.assert_array_equal, steps.init().params, initial)


@pytest.mark.parametrize("accumulation", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_fault_14_gradients_are_reduced_once_an_update(accumulation):
    steps = build("pmap", DATA8, accumulation)
    with warnings.catch_warnings(action="error"):
        compiled = steps.lower().compile()
    found = collectives(compiled.as_text(), steps.mesh)
    assert {(c.kind, c.axes, c.depth) for c in found} == {("all-reduce", ("data",), 0)}
    parameters = sum(4 * x.size for x in jax.tree.leaves(steps.abstract.params))
    assert 0 < sum(c.bytes for c in found) - parameters <= 64
    # The state is updated in place: copies of it on the way in or out would show here.
    state = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(steps.abstract))
    assert compiled.memory_analysis().alias_size_in_bytes == state


def test_devices_of_a_process_are_put_side_by_side(monkeypatch):
    """A TPU mesh may interleave hosts, which pmap refuses."""

    class Device:
        platform = device_kind = "cpu"

        def __init__(self, id, process_index):
            self.id, self.process_index = id, process_index

    monkeypatch.setattr(build_module, "compiler_options", lambda mesh: {})  # which compiles for one
    mixed = [Device(i, i % 2) for i in range(8)]
    config = make_config("pmap", DATA8, 1)
    mesh = jax.sharding.Mesh(np.array(mixed).reshape(1, 8, 1, 1, 1), sharding.AXES)
    steps = pmap_step.build_steps(config, mesh, "float32", "xla")
    assert [d.process_index for d in steps.mesh.devices.flat] == [0] * 4 + [1] * 4


# --- runs


@pytest.fixture(scope="module")
def data(bottles) -> Path:
    return bottles


def arguments(data: Path, out_dir: Path, backend: str, *extra: str) -> list[str]:
    return [
        *("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=32", f"--model.block_size={T}"),
        *("--model.dropout=0.1", "--model.scan_layers=true", "--batch.sequences=16"),
        *("--batch.microbatch=1", "--optim.lr=1e-2", "--optim.steps=8", "--optim.warmup_steps=2"),
        *("--eval.every=4", "--eval.windows=9", "--checkpoint.every=4", "--log.every=1"),
        *("--log.tensorboard=false", f"--data.path={data}", f"--run.out_dir={out_dir}"),
        *(f"--run.backend={backend}", *extra),
    ]


def rows(out_dir: Path, key: str = "train/loss") -> dict[int, float]:
    lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in lines if key in row}


def state_of(data: Path, out_dir: Path):
    argv = arguments(data, out_dir, "jit")
    config = parse(argv, "test", {})[0].with_vocab(open_dataset(str(data)).vocab_size)
    steps = build_for_training(config, sharding.make_mesh(config.mesh))
    checkpoints = open_checkpoints(out_dir)
    state = checkpoints.restore(checkpoints.steps[-1], steps.abstract)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for backend in ("jit", "pmap"):
        assert train.main(arguments(data, folder / backend, backend)) == 0
    return {backend: folder / backend for backend in ("jit", "pmap")}


def close(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs) and len(ours) >= 3
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("jit", "pmap"), ("pmap", "jit"), ("pmap", "pmap")])
def test_a_run_of_one_backend_continues_under_the_other(
    data, unbroken, tmp_path, monkeypatch, capsys, first, then
):
    tiny_run.stop_after(monkeypatch, 3)
    assert train.main(arguments(data, tmp_path / "run", first)) == 3
    tiny_run.stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "run", then)) == 0
    printed = capsys.readouterr().out
    where = "data 8, pmap" if then == "pmap" else "data 8\n"
    assert "continuing from step 3" in printed and where in printed
    for key in ("train/loss", "val/loss"):
        close(rows(tmp_path / "run", key), rows(unbroken["jit"], key))
    if first == then:
        assert rows(tmp_path / "run") == rows(unbroken[first])
        states = (state_of(data, out_dir) for out_dir in (tmp_path / "run", unbroken[first]))
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_two_processes_are_the_run_of_one(data, unbroken, tmp_path, capsys):
    argv = arguments(data, tmp_path / "run", "pmap")
    outputs = ["".join(texts) for texts in processes.run("scalegpt.train", *argv)]
    assert "data 8, pmap" in outputs[0] and "resharding" not in "".join(outputs)
    for key in ("train/loss", "val/loss"):
        close(rows(tmp_path / "run", key), rows(unbroken["pmap"], key))
    # What two have written, one reads, and it evaluates as they have seen it.
    argv = ["--run", str(tmp_path / "run"), "--checkpoint", "latest", "--windows", "9", "--json"]
    assert evaluate.main(argv) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["step"] == 8
    assert abs(row["val/loss"] - rows(tmp_path / "run", "val/loss")[8]) < 1e-5


# --- mistakes, and compiling alone


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"tensor": 2}, {"replica": 2, "fsdp": 2}])
def test_a_mesh_that_splits_the_model_is_refused_before_anything_is_made(data, tmp_path, mesh):
    flags = [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
    axis = list(mesh)[-1]
    with pytest.raises(ValueError, match=rf"whole copy .*mesh\.{axis}=2; set --mesh\.{axis}=1"):
        train.main(arguments(data, tmp_path / "run", "pmap", *flags))
    assert not (tmp_path / "run").exists()


def test_the_config_for_pmap_is_that_of_v3_8_but_for_the_backend():
    pmap, jit = (
        yaml.safe_load((ROOT / f"configs/v3_8{name}.yaml").read_text()) for name in ("_pmap", "")
    )
    assert pmap.pop("run") == {"out_dir": "out/v3_8_pmap", "backend": "pmap"}
    assert jit.pop("run") == {"out_dir": "out/v3_8"} and pmap == jit


def test_a_mistyped_backend_names_both(data, tmp_path):
    with pytest.raises(ValueError, match=r"run.backend='pmpa'.*'jit' or 'pmap'"):
        train.main(arguments(data, tmp_path / "run", "pmpa"))


def test_compile_only_compiles_the_step_of_pmap(data, tmp_path, capsys):
    assert train.main(arguments(data, tmp_path / "run", "pmap", "--compile-only")) == 0
    assert "'data': 8" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.oracle
def test_compile_only_takes_a_tpu_that_is_not_here(capsys):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    small = ["--model.n_layer=1", "--model.n_embd=128", "--model.n_head=2"]
    small += ["--model.vocab_size=500"]
    argv = ["--config", "configs/v3_8_pmap.yaml", *small, "--model.block_size=128"]
    assert train.main([*argv, "--batch.sequences=128", "--compile-only", "v3-8"]) == 0
    printed = capsys.readouterr().out
    assert "8 x TPU v3" in printed and re.search(r"accumulation 2$", printed, re.MULTILINE)

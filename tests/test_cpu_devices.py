"""scalegpt/step/cpu_devices.py: two devices where nobody asked for another number, and they fit."""

import os
import subprocess
import sys

import jax
import pytest
import tiny_run

from scalegpt.config import Config
from scalegpt.step import cpu_devices


def make_config(sequences: int = 12, microbatch: int | None = None, **mesh: int) -> Config:
    return Config(
        batch=dict(sequences=sequences, microbatch=microbatch),
        mesh=mesh,
        data=dict(path=""),
        run=dict(out_dir="none"),
    )


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(cpu_devices, "_cores", lambda: 4)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    before = jax.config.jax_num_cpu_devices

    class Silent:
        jax_num_cpu_devices = -1

    monkeypatch.setattr(cpu_devices, "jax", type("jax", (), {"config": Silent}))
    assert before == 8, "the tests' own number"


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"data": -1}, True),
        ({"sequences": 11}, False),
        ({"microbatch": 3}, True),
        ({"microbatch": 4}, False),
        ({"data": 1}, False),
        ({"data": 1, "fsdp": -1}, False),
    ],
)
def test_they_must_divide_the_batch_and_no_mesh_be_given(nothing_said, changes, fits):
    assert cpu_devices.fits(make_config(**changes)) == fits


def test_what_was_said_holds(nothing_said, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert not cpu_devices.fits(make_config())
    monkeypatch.undo()
    assert not cpu_devices.fits(make_config()), "JAX_NUM_CPU_DEVICES is 8 in the tests"


def test_one_core_is_one_device(nothing_said, monkeypatch):
    monkeypatch.setattr(cpu_devices, "_cores", lambda: 1)
    assert not cpu_devices.fits(make_config())


@pytest.mark.slow
def test_a_run_on_two_devices_is_the_run_on_one(plays, tmp_path):
    """The command as a person types it, with and without the number that JAX is told."""
    ours = ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC")  # scalegpt sets the latter for the former
    outside = {k: v for k, v in os.environ.items() if k not in ours}
    losses = {}
    for name, told in (("one", {"JAX_NUM_CPU_DEVICES": "1"}), ("two", {})):
        argv = tiny_run.arguments(
            plays, tmp_path / name, batch__microbatch=None, optim__steps=3, eval__every=0
        )
        done = subprocess.run(
            [sys.executable, "-m", "scalegpt.train", *argv],
            env=outside | told,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        losses[name] = tiny_run.rows(tmp_path / name)
        devices = 1 if told or cpu_devices._cores() < 2 else 2
        assert f"{devices} x cpu" in done.stdout, done.stdout
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)

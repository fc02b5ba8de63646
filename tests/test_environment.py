"""Environment variables and flags of Python that a run meets on other people's machines."""

import checkpoint
import convert_hf
import jax
import pytest
import tiny_run
import tpu

from scalegpt.config import DistributedConfig, MeshConfig
from scalegpt.config.command_line import parse
from scalegpt.errors import Mistake
from scalegpt.processes import startup
from scalegpt.step import build_for_training, sharding


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no cuda\nframes")])
def test_a_platform_that_is_not_here_is_a_mistake(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(Mistake, match="JAX_PLATFORMS=cpu: JAX finds no such device") as said:
        sharding.make_mesh(MeshConfig())
    assert "frames" not in str(said.value) and "scalegpt[cuda]" in str(said.value)


def test_jax_debug_nans_does_not_end_a_healthy_run(tmp_path, capsys):
    """A state holds NaN on purpose: `health.Health` before there are enough losses."""
    config, _ = parse(tiny_run.arguments(tmp_path, tmp_path), "train", {})
    jax.config.update("jax_debug_nans", True)
    try:
        build_for_training(config.with_vocab(65), sharding.make_mesh(MeshConfig()))
        assert not jax.config.jax_debug_nans
    finally:
        jax.config.update("jax_debug_nans", False)
    assert "JAX_DEBUG_NANS is off" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [checkpoint, convert_hf, tpu])
def test_a_tool_without_docstrings_has_a_help(monkeypatch, tool):
    monkeypatch.setattr(tool, "__doc__", None)  # python -OO
    assert "usage" in tool.parser().format_help()


@pytest.mark.parametrize("numbers", ["a", "0,", "0;1"])
def test_device_numbers_that_are_none_are_a_mistake(monkeypatch, numbers):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", numbers)
    config = DistributedConfig(coordinator="localhost:1", num_processes=2, process_id=0)
    with pytest.raises(Mistake, match=f"JAX_LOCAL_DEVICE_IDS={numbers} is not device numbers"):
        startup.find(config, 1)

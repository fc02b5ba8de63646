"""Environment variables and flags of Python that a run meets on other people's machines."""

import json
from argparse import Namespace
from types import SimpleNamespace

import checkpoint
import convert_hf
import jax
import pytest
import tpu

from scalegpt.config import DistributedConfig, MeshConfig
from scalegpt.errors import Mistake
from scalegpt.processes import agreement, startup
from scalegpt.processes.group import Alone
from scalegpt.step import sharding
from scalegpt.weights import trained


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no cuda\nframes")])
def test_a_platform_that_is_not_here_is_a_mistake(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(Mistake, match="JAX_PLATFORMS=cpu: JAX finds no such device") as said:
        sharding.make_mesh(MeshConfig())
    with pytest.raises(Mistake, match="finds no such device"):  # as generate asks at first
        trained.self_check(Namespace(), Alone())
    assert "frames" not in str(said.value) and "scalegpt[cuda]" in str(said.value)


def test_processes_are_compared_without_their_devices(monkeypatch):
    said = json.dumps({"host": "b", "environment variable JAX_PLATFORMS": "cuda"})
    store = SimpleNamespace(
        key_value_set=lambda key, value: None,
        blocking_key_value_get=lambda key, ms: said if key.endswith("/1") else '{"host": "a"}',
    )
    state = SimpleNamespace(num_processes=2, process_id=0, client=store)
    monkeypatch.setattr(agreement, "_state", lambda: state)
    for name in ("process_count", "process_index", "devices"):  # which all start JAX's devices
        monkeypatch.setattr(jax, name, lambda: pytest.fail("asks for devices"))
    with pytest.raises(Mistake, match=r"JAX_PLATFORMS: process 0 \(a\) has none, process 1 \(b\)"):
        startup.same_everywhere({})


OTHER = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
    "jax_default_matmul_precision": "high",
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 1,
}


@pytest.mark.parametrize("name", sharding._SETTINGS)
def test_jaxs_settings_neither_end_a_healthy_run_nor_change_it(name, capsys):
    before = getattr(jax.config, name)
    assert before == sharding._SETTINGS[name]  # JAX's own default, in this version too
    try:
        other = OTHER[name] if name in OTHER else not before
        jax.config.update(name, other)
        sharding.make_mesh(MeshConfig())
        assert getattr(jax.config, name) == sharding._SETTINGS[name]
        assert capsys.readouterr().err.startswith(f"note: {name.upper()}={other} does not apply")
        sharding.make_mesh(MeshConfig())
        assert capsys.readouterr().err == ""
    finally:
        jax.config.update(name, before)


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

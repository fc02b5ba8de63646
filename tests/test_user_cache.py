"""Compiled programs outlive a process, where the user has not said otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny_run

from scalegpt.config.command_line import parse
from scalegpt.errors import Mistake
from scalegpt.files import cache
from scalegpt.files.folder import expanded


def run(data: Path, out_dir: Path, **environment: str) -> dict[int, float]:
    """The losses of a run of its own process, whose compilations all last long enough to keep."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "scalegpt.train", *tiny_run.arguments(data, out_dir)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tiny_run.rows(out_dir)


def programs(home: Path) -> dict[str, int]:
    """Name -> when it was made."""
    found = (home / "scalegpt" / "compiled").glob("*/*-cache")
    return {path.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_gets_the_same_losses(plays, tmp_path):
    home = tmp_path / "home"
    first = run(plays, tmp_path / "a", XDG_CACHE_HOME=str(home))
    made = programs(home)
    assert any("train" in name for name in made), made
    assert run(plays, tmp_path / "b", XDG_CACHE_HOME=str(home)) == first
    assert programs(home) == made


def test_a_folder_that_the_user_has_named_stays():
    cache.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_it_leaves_the_place_or_all_of_it_to_the_user(plays, tmp_path, name):
    value = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}.get(name, "false")
    run(plays, tmp_path / "run", XDG_CACHE_HOME=str(tmp_path / "home"), **{name: value})
    assert not programs(tmp_path / "home")
    assert (tmp_path / "mine").exists() == (name == "JAX_COMPILATION_CACHE_DIR")


@pytest.mark.parametrize(("said", "kept_from"), [(None, 0.1), ("7", 1.0)])
def test_programs_of_a_tenth_of_a_second_are_kept_if_nobody_said_otherwise(
    monkeypatch, said, kept_from
):
    values = {
        "jax_compilation_cache_dir": None,
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }
    for name in map(str.upper, list(values)[1:]):
        monkeypatch.setenv(name, said) if said else monkeypatch.delenv(name, raising=False)
    before = {key: getattr(jax.config, key) for key in values}
    try:
        for key, value in values.items():
            jax.config.update(key, value)
        cache.keep_compiled()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == kept_from
        assert jax.config.jax_compilation_cache_max_size == (-1 if said else 4 * 2**30)
    finally:
        for key, value in before.items():
            jax.config.update(key, value)


@pytest.mark.parametrize("limit", [str(2**30), "-1"])
def test_a_program_that_a_killed_process_has_half_written_is_removed(monkeypatch, tmp_path, limit):
    """Without its "-atime" JAX adds no other program; with no limit it writes none at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", limit)
    keys = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {key: getattr(jax.config, key) for key in keys}
    folder = cache.cache_folder("compiled", cache.kind_of_cpu())
    folder.mkdir(parents=True)
    for name in ("half-cache", "whole-atime", "whole-cache"):
        (folder / name).write_bytes(b"x")
    try:
        jax.config.update(keys[0], None)
        jax.config.update(keys[1], int(limit))
        cache.keep_compiled()
    finally:
        for key, value in before.items():
            jax.config.update(key, value)
    assert (folder / "half-cache").exists() == (limit == "-1")
    assert (folder / "whole-cache").exists()


def test_a_user_without_a_home_gets_no_folder_named_tilde(monkeypatch):
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path
    )  # as for `docker run --user 12345`
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        cache.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with pytest.raises(Mistake, match="set XDG_CACHE_HOME"):
        cache.cache_folder("runs")
    for flag in ("--run.out_dir=~/run", "--data.cache_dir=~/cache"):
        with pytest.raises(Mistake, match="home folder that is not known here"):
            parse(["--data.path=x", "--run.out_dir=x", flag], "train", {})
    with pytest.raises(Mistake, match="home folder is not known here"):
        expanded("~/x")


def test_each_kind_of_cpu_has_a_folder_of_its_own(monkeypatch):
    keys = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before, found = {key: getattr(jax.config, key) for key in keys}, []
    for kind in ("flags: sse\n", "flags: avx512\n"):
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(cache.Path, "read_text", lambda path, kind=kind: kind)
        cache.keep_compiled()
        found.append(jax.config.jax_compilation_cache_dir)
    for key, value in before.items():
        jax.config.update(key, value)
    assert len(set(found)) == 2 and all("/scalegpt/compiled/" in folder for folder in found)

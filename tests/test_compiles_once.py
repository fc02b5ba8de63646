"""A run compiles its training step once: not again for the second update, nor after a save."""

import pytest
import tiny_run

from scalegpt import pmap_step, train


@pytest.fixture
def made(monkeypatch) -> list:
    """The steps of the runs of this process."""
    found, build = [], pmap_step.build_for_training

    def build_and_keep(*args):
        found.append(build(*args))
        return found[-1]

    monkeypatch.setattr(pmap_step, "build_for_training", build_and_keep)
    return found


def test_a_run_and_its_continuation_compile_the_step_once_each(
    made, plays, tmp_path, signals_as_they_were
):
    argv = tiny_run.arguments(
        plays, tmp_path / "run", optim__decay_steps=6, optim__steps=None
    )
    for steps in (6, tiny_run.STEPS):
        assert train.main([*argv, f"--optim.steps={steps}", "--run.allow_config_change=true"]) == 0
    assert len(tiny_run.rows(tmp_path / "run")) == tiny_run.STEPS
    assert [steps.jit_train._cache_size() for steps in made] == [1, 1]
    assert [steps.jit_evaluate._cache_size() for steps in made] == [1, 1]

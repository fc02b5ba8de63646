"""What is saved comes back bit for bit, on any mesh; the best and the latest are both kept."""

import jax
import numpy as np
import pytest

from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.config import Config
from scalegpt.step import build as step
from scalegpt.step import sharding


def build(**mesh) -> step.Steps:
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    config = Config(
        model=dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=65, scan_layers=True),
        mesh=mesh,
        batch=dict(sequences=8),
        data=dict(path="unused"),
        optim=dict(lr=1e-2, steps=10, warmup_steps=0),
        run=dict(out_dir="unused"),
    )
    return step.build_steps(config, sharding.make_mesh(config.mesh, devices), "float32", "xla")


@pytest.fixture(scope="module")
def hybrid() -> step.Steps:
    return build(data=2, fsdp=4)


@pytest.fixture(scope="module")
def state(hybrid):
    """After an update, so that the moments are not zero."""
    tokens = np.random.default_rng(0).integers(0, 65, (*hybrid.layout, 17), dtype=np.int32)
    return hybrid.train(hybrid.init(), tokens)[0]


def assert_bitwise(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture
def saved(state, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1, {"best_loss": 3.25, "text": "é"}, 3.25)
    checkpoints.wait()
    checkpoints.close()
    return tmp_path


MESHES = [
    *(dict(data=2, fsdp=4), dict(data=1, fsdp=2, tensor=4), dict(data=8), dict(data=1)),
    dict(data=1, fsdp=2, context=4),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_trap_8_a_state_comes_back_bitwise_on_any_mesh_in_its_sharding(saved, state, mesh):
    steps = build(**mesh)
    checkpoints = open_checkpoints(saved)
    restored = checkpoints.restore(checkpoints.steps[-1], steps.abstract)
    assert_bitwise(restored, state)
    assert int(restored.step) == 1
    assert any(np.asarray(x).any() for x in jax.tree.leaves(restored.opt_state[1].mu))
    jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(), restored, steps.abstract)
    assert checkpoints.meta(1) == {"best_loss": 3.25, "text": "é"}
    checkpoints.close()


def test_weights_alone_are_read_without_the_optimizer(saved, state):
    """Its files are gone, and nobody notices."""
    for file in (saved / "checkpoints" / "1" / "optimizer").rglob("*"):
        if file.is_file():
            file.unlink()
    steps = build(data=1)
    checkpoints = open_checkpoints(saved)
    params = checkpoints.restore_params(1, steps.abstract.params)
    assert_bitwise(params, state.params)
    checkpoints.close()


LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: None, 10: 2.7, 12: 1.9, 14: 2.9, 16: None}


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reopen", [False, True])
def test_fault_07_best_and_latest_are_kept_separately(tmp_path, state, keep, reopen):
    """A worse loss never replaces the best, and the latest is never dropped for being worse."""
    checkpoints, seen = Checkpoints(tmp_path, keep), {}
    for at, loss in LOSSES.items():
        if reopen:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep)
        checkpoints.save(state, at, {}, loss)
        checkpoints.wait()
        seen[at] = loss
        best = min((s for s in seen if seen[s] is not None), key=seen.get)
        on_disk = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
        assert on_disk == {best, *list(seen)[-keep:]}
        assert checkpoints.find("best") == best
        assert checkpoints.find("latest") == checkpoints.steps[-1] == at
    checkpoints.close()


def test_a_step_is_saved_once(saved, state):
    checkpoints = Checkpoints(saved)
    checkpoints.save(state, 1, {"best_loss": 0.0}, 0.0)
    checkpoints.wait()
    assert checkpoints.meta(1)["best_loss"] == 3.25
    checkpoints.close()


def test_find_names_the_steps_that_there_are(saved, tmp_path):
    checkpoints = open_checkpoints(saved)
    assert checkpoints.find("1") == checkpoints.find("best") == checkpoints.find("latest") == 1
    for which in ("2", "newest", "-1"):
        with pytest.raises(ValueError, match=f"no checkpoint '{which}' in .*there are steps 1$"):
            checkpoints.find(which)
    checkpoints.close()
    empty = Checkpoints(tmp_path / "empty")
    assert empty.steps == []
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        empty.find("latest")
    empty.close()


def test_without_an_evaluation_there_is_no_best(tmp_path, state):
    said = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    checkpoints.save(state, 3, {}, None)
    checkpoints.wait()
    assert checkpoints.find("latest") == 3
    with pytest.raises(ValueError, match="'best' in .*there are steps 3, none of them evaluated"):
        checkpoints.find("best")
    assert not said and checkpoints.find(None, ["params"]) == 3
    assert said == [
        f"note: no checkpoint in {checkpoints.folder} was evaluated yet; the latest is taken"
    ]
    checkpoints.evaluated(3, {}, 2.5)
    assert checkpoints.find(None) == checkpoints.find("best") == 3 and len(said) == 1
    checkpoints.close()


def test_a_save_does_not_wait_and_the_state_may_change_at_once(hybrid, tmp_path):
    """The next update reuses the state's buffers while the save goes on."""
    tokens = np.zeros((*hybrid.layout, 17), np.int32)
    state = hybrid.init()
    before = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1, {}, None)
    for _ in range(3):
        state, _ = hybrid.train(state, tokens)
    checkpoints.wait()
    assert_bitwise(checkpoints.restore(1, hybrid.abstract), before)
    checkpoints.close()


def test_opening_to_read_what_is_no_run_is_a_message(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run: it has no checkpoints/"):
        open_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())

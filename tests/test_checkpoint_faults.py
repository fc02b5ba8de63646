"""What a disk, a kill or a bad manifest can do to checkpoints, and that the last good one is found.

The state is a few small arrays: what is in it makes no difference here.
"""

import errno
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalegpt.checkpoints import manifest, writing
from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.files.folder import Folder, open_folder
from scalegpt.step.health import initial
from scalegpt.step.update import State


def state(at: int) -> State:
    rng = np.random.default_rng(at)
    params = {"wte": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.ones(3) * at}
    moments = {"mu": jax.tree.map(lambda x: x * 2, params)}
    return State(jnp.int32(at), params, moments, initial())


ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
)


def assert_is(restored: State, at: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, restored, state(at))


def save(out_dir: Path, *steps: int, **options) -> Checkpoints:
    checkpoints = Checkpoints(out_dir, keep=9, **options)
    for at in steps:
        checkpoints.save(state(at), at, {"best_loss": 1.0}, 10.0 - at)
        assert checkpoints.wait() is None
    return checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("runs") / "two"
    save(out_dir, 1, 2).close()
    return out_dir


@pytest.fixture
def run(two, tmp_path) -> Path:
    """A run with the good checkpoints 1 and 2; 2 is also the best."""
    return shutil.copytree(two, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def arrays_of(folder: Path, item: str) -> Path:
    """The largest file of an item: its arrays."""
    return max((folder / item).rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)


def truncate(step: Path) -> None:
    file = arrays_of(step, "optimizer")
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(step: Path, old: str, new: str, sign: bool = False) -> None:
    file = step / "manifest.json"
    text = file.read_text()
    assert old in text
    content = json.loads(text.replace(old, new, 1))
    if sign:  # by somebody who knows how
        del content["sha256"]
        content["sha256"] = manifest._digest(content)
    file.write_text(json.dumps(content))


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def torn(step: Path) -> None:
    os.truncate(step / "manifest.json", 300)


FAULTS = {
    "truncated file": (truncate, r"optimizer/.* has [\d,]+ bytes instead of"),
    "flipped byte": (lambda step: flip(arrays_of(step, "params")), "params/.*: its bytes were alt"),
    "missing file": (lambda step: arrays_of(step, "params").unlink(), "params/.* is missing"),
    "missing item": (lambda step: shutil.rmtree(step / "optimizer"), "optimizer/.* is missing"),
    "missing manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json is missin"),
    "torn manifest": (torn, "manifest.json is torn or altered"),
    "empty manifest": (lambda step: (step / "manifest.json").write_text(""), "manifest.json is to"),
    "altered manifest": (lambda step: edit(step, '"val_loss": 8.0', '"val_loss": 1.0'), "altered"),
    "no object": (lambda step: (step / "manifest.json").write_text("[1]"), "manifest.json is torn"),
    "another step's": (lambda step: edit(step, '"step": 2', '"step": 7', True), "is of step 7"),
    "another format": (lambda step: edit(step, '"format": 1', '"format": 9', True), "has format 9"),
    "empty folder": (empty, "it is an empty folder"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, two, kind):
    damage, message = FAULTS[kind]
    step = run / "checkpoints" / "2"
    damage(step)
    before, said = contents(run), []
    checkpoints = Checkpoints(run, keep=9, say=said.append)
    assert checkpoints.continue_from() == 1
    assert_is(checkpoints.restore(1, ABSTRACT), 1)
    assert len(said) == 1 and f"{step} is damaged and left out: " in said[0]
    assert re.search(message, said[0]), said[0]
    assert contents(run) == before and step.is_dir()
    with pytest.raises(ValueError, match=f"step 2 in .* is damaged: .*{message}"):
        checkpoints.restore(2, ABSTRACT)

    # It is in the way of the run that comes there again, and it is not lost.
    checkpoints.save(state(2), 2, {"best_loss": 1.0}, 8.0)
    assert checkpoints.wait() is None
    aside = {n.removeprefix("checkpoints/2"): x for n, x in before.items() if "nts/2/" in n}
    assert contents(run / "checkpoints" / "damaged-2") == {n[1:]: x for n, x in aside.items()}
    assert_is(checkpoints.restore(checkpoints.find("latest"), ABSTRACT), 2)
    assert len(said) == 1


def test_every_flipped_byte_of_every_file_is_noticed(run):
    """Orbax itself has restored each of 24 flipped bytes of arrays without a word."""
    checkpoints = open_checkpoints(run)
    step = run / "checkpoints" / "2"
    files = [p for p in step.rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        for at in range(0, file.stat().st_size, max(1, file.stat().st_size // 3)):
            flip(file, at)
            wrong = checkpoints.verify(2)
            assert len(wrong) == 1 and file.relative_to(step).as_posix() in wrong[0], (file, at)
            flip(file, at)
    assert checkpoints.verify(2) == []


def test_two_damaged_ones_of_a_step_are_both_kept(run):
    for _ in range(3):
        flip(arrays_of(run / "checkpoints" / "2", "params"))
        checkpoints = Checkpoints(run, keep=9, say=[].append)
        assert checkpoints.continue_from() == 1
        checkpoints.save(state(2), 2, {}, None)
        assert checkpoints.wait() is None
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {"1", "2", "damaged-2", "damaged-2-1", "damaged-2-2"}
    assert checkpoints.find("latest") == 2


def test_where_none_is_whole_the_run_does_not_start_again_from_nothing(run):
    for at in "12":
        flip(arrays_of(run / "checkpoints" / at, "params"))
    said = []
    with pytest.raises(ValueError, match="no checkpoint in .* is whole, see above; to start anew"):
        Checkpoints(run, say=said.append).continue_from()
    assert len(said) == 2
    for at in "12":
        (run / "checkpoints" / at / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        Checkpoints(run, say=said.append).continue_from()


def test_a_new_run_and_one_killed_in_its_first_save_start_from_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.continue_from() is None
    step = tmp_path / "checkpoints" / "5"
    (step / "params").mkdir(parents=True)
    (step / "unfinished").touch()
    (step / "params" / "half").write_text("half")
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").touch()
    assert checkpoints.continue_from() is None
    checkpoints.save(state(5), 5, {}, None)
    assert checkpoints.wait() is None
    assert not (step / "unfinished").exists() and not (step / "params" / "half").exists()
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"5", "5.orbax-checkpoint-tmp", "notes.txt"}


def test_readers_leave_out_what_is_damaged_and_move_nothing(run, capsys):
    """The best is damaged: the next best. Of weights, only the weights are verified."""
    flip(arrays_of(run / "checkpoints" / "2", "optimizer"))
    before = contents(run)
    assert open_checkpoints(run).find("best", ("params",)) == 2
    flip(arrays_of(run / "checkpoints" / "2", "params"))
    before = contents(run)
    for which in ("best", "latest"):
        assert open_checkpoints(run).find(which, ("params",)) == 1
        assert "2 is damaged and left out: params/" in capsys.readouterr().err
    with pytest.raises(ValueError, match="step 2 in .* is damaged: params/"):
        open_checkpoints(run).find("2", ("params",))
    with pytest.raises(ValueError, match="step 2 in .* is damaged: params/"):
        open_checkpoints(run).restore_params(2, ABSTRACT.params)
    assert contents(run) == before


OUTSIDE = ["../1/manifest.json", "/etc/passwd", "a/../../x", "a\\b", "", "."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_name_files_outside_its_folder(run, name):
    step = run / "checkpoints" / "2"
    content = json.loads((step / "manifest.json").read_text())
    del content["sha256"]
    content["files"][name] = [1, "0" * 64]
    content["sha256"] = manifest._digest(content)
    (step / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(manifest.Damaged, match="names a file outside its folder"):
        manifest.read(open_folder(step), 2)


def test_another_shape_or_dtype_is_an_error_and_not_a_cast(run):
    checkpoints = open_checkpoints(run)
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), ABSTRACT.params)
    with pytest.raises(ValueError, match=r"params/b is float32\[3\], not bfloat16\[3\] \(and 1 mo"):
        checkpoints.restore_params(2, other)
    with pytest.raises(ValueError, match=r"params/wte is float32\[8,4\], not None"):
        checkpoints.restore_params(2, {"b": ABSTRACT.params["b"]})


def test_the_manifest_says_what_is_in_it(run):
    content = json.loads((run / "checkpoints" / "2" / "manifest.json").read_text())
    assert (content["format"], content["step"], content["val_loss"]) == (1, 2, 8.0)
    assert content["tree"]["params/wte"] == "float32[8,4]"
    assert content["tree"]["optimizer/step"] == "int32[]"
    assert {"python", "jax", "orbax-checkpoint"} <= set(content["versions"])
    step = run / "checkpoints" / "2"
    assert set(content["files"]) == set(contents(step)) - {"manifest.json"}


# --- saving that fails


class Disk:
    """Lets writing fail as a disk would; `full` is changed while it is in use."""

    def __init__(self, monkeypatch, number: int = errno.ENOSPC) -> None:
        self.full, self.number, self.file = False, number, "manifest.json"
        write = Folder.write

        def failing_write(folder, name, data):
            if self.full and name == self.file:
                raise OSError(self.number, os.strerror(self.number))
            write(folder, name, data)

        monkeypatch.setattr(Folder, "write", failing_write)


def test_a_full_disk_is_said_once_and_saving_goes_on_when_there_is_room(tmp_path, monkeypatch):
    disk, said = Disk(monkeypatch), []
    checkpoints = save(tmp_path, 1, say=said.append)
    disk.full = True
    for at in (2, 3):
        checkpoints.save(state(at), at, {}, None)
        failure = checkpoints.wait()
        assert failure.reason == "No space left on device" and not failure.over
        left = {p for p in (tmp_path / "checkpoints" / str(at)).rglob("*") if p.is_file()}
        assert {p.name for p in left} <= {"unfinished"}, "room is given back"
    assert len(said) == 1 and "step 2 could not be saved in" in said[0]
    assert "No space left on device" in said[0] and "last good checkpoint is step 1" in said[0]
    disk.number = errno.EIO
    checkpoints.save(state(4), 4, {}, None)
    assert checkpoints.wait().reason == os.strerror(errno.EIO) and len(said) == 2
    assert checkpoints.failing.since == failure.since
    disk.full = False
    checkpoints.save(state(5), 5, {}, None)
    assert checkpoints.wait() is None and checkpoints.failing is None
    assert len(said) == 3 and "saving works again: step 5 is saved" in said[2]
    assert_is(checkpoints.restore(5, ABSTRACT), 5)


@pytest.mark.parametrize(
    "fault", ["vanished", "vanishes", "read-only", "a file", "in Orbax", "in the copy"]
)
def test_no_fault_of_a_disk_is_raised_into_training(tmp_path, monkeypatch, fault):
    said = []
    checkpoints = save(tmp_path, 1, say=said.append)
    folder = tmp_path / "checkpoints"
    if fault == "vanished":
        shutil.move(folder, tmp_path / "elsewhere")
        reason = "No such file or directory"
    elif fault == "vanishes":
        files = Folder.files

        def vanishes_before(self):
            shutil.rmtree(folder)
            return files(self)

        monkeypatch.setattr(Folder, "files", vanishes_before)
        reason = "has vanished while it was written"
    elif fault == "read-only":
        if os.getuid() == 0:  # whom no mode stops
            disk = Disk(monkeypatch, errno.EROFS)
            disk.full, disk.file = True, "unfinished"
        else:
            folder.chmod(0o500)
        reason = "Read-only file system" if os.getuid() == 0 else "Permission denied"
    elif fault == "a file":
        shutil.move(folder, tmp_path / "elsewhere")
        folder.write_text("")
        reason = "Not a directory"
    elif fault == "in Orbax":
        commit = writing.Save._copy

        def fails_later(self, name, tree):
            futures = commit(self, name, tree)
            (tmp_path / "checkpoints" / "2" / name / "d").mkdir(exist_ok=True)
            return [*futures, Broken()]

        class Broken:
            def result(self, timeout):
                raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [x]")

        monkeypatch.setattr(writing.Save, "_copy", fails_later)
        reason = "No space left on device"
    else:
        monkeypatch.setattr(writing.Save, "_copy", lambda *a: 1 / 0)
        reason = "ZeroDivisionError"
    checkpoints.save(state(2), 2, {}, None)
    assert reason in checkpoints.wait().reason
    assert len(said) == 1 and reason in said[0]
    if fault == "vanished":
        assert not folder.exists(), "it is not made anew where a disk has gone"


def test_the_loop_learns_of_a_failure_without_asking_to_wait(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    checkpoints = save(tmp_path, 1, say=lambda text: None, patience=60)
    disk.full = True
    checkpoints.save(state(2), 2, {}, None)
    deadline = time.monotonic() + 10
    while checkpoints.failing is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not checkpoints.failing.over
    checkpoints._saver.patience = 0.0
    assert checkpoints.failing.over and checkpoints.last_good() == (
        "the last good checkpoint is step 1"
    )


def test_a_disk_that_hangs_is_given_up_after_the_deadline(tmp_path, monkeypatch):
    """And no second copy of the state is made while it hangs."""
    said, release = [], threading.Event()
    checkpoints = save(tmp_path, 1, say=said.append)
    monkeypatch.setattr(writing.Save, "_commit", lambda self: release.wait(20) and None)
    monkeypatch.setattr(
        writing.Save,
        "join",
        lambda self, seconds=None: (
            self._thread.join(0.2 if seconds is None else seconds),
            not self._thread.is_alive(),
        )[1],
    )
    checkpoints.save(state(2), 2, {}, None)
    for at in (3, 4):
        checkpoints.save(state(at), at, {}, None)
        assert "is not written after" in checkpoints.failing.reason
    assert len(said) == 1 and not (tmp_path / "checkpoints" / "3").exists()
    release.set()
    checkpoints.close()


# --- what is kept


def test_what_is_kept_besides_the_last_ones(tmp_path):
    losses = {10: 3.0, 20: 1.5, 30: 2.0, 40: None, 50: 2.5}
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=30)
    for at, loss in losses.items():
        checkpoints.save(state(at), at, {}, loss)
        assert checkpoints.wait() is None
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"20", "30", "50"}
    contents = {at: {"val_loss": loss, "meta": {}} for at, loss in losses.items()}
    assert manifest.removable(contents, 2, 0) == [10, 30]
    assert manifest.removable(contents, 1, 20, also=[30]) == [10]
    assert manifest.removable({1: contents[40], 2: contents[40]}, 1, 0) == [1]


def test_the_best_is_sought_anew_when_losses_are_measured_on_other_text(tmp_path):
    """The best of before is kept, but neither named nor found."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for at, loss, windows in ((10, 2.0, 320), (20, 1.0, 320), (30, 5.0, 8), (40, 6.0, 8)):
        meta = {"config": {"eval": {"windows": windows}}, "best_loss": loss}
        checkpoints.save(state(at), at, meta, loss)
        assert checkpoints.wait() is None
        assert checkpoints.find("best") == {10: 10, 20: 20, 30: 30, 40: 30}[at]
    assert checkpoints.steps == [20, 30, 40]
    group = {"data": {"a": "1"}, "config": {"data": {"path": {"a": 1, "b": 3}}}}
    same = {"data": {"x": "1"}, "config": {"data": {"path": {"/mnt/a": 2, "/mnt/b": 6}}}}
    assert manifest.measure(group) == manifest.measure(same)
    assert manifest.measure(group) != manifest.measure({**group, "data": {"a": "2"}})
    assert manifest.losses({}) == [{}]


def test_weights_alone_that_find_no_room_are_a_mistake_and_no_training_goes_on(
    tmp_path, monkeypatch
):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    Disk(monkeypatch).full = True
    with pytest.raises(ValueError, match="cannot write to .*: No space left on device"):
        checkpoints.save_weights(state(0).params, {"best_loss": 1.0})
    assert not said


@pytest.mark.parametrize("call", ["write", "delete", "remove"])
def test_killed_while_an_old_one_is_removed_it_is_no_damaged_checkpoint(run, monkeypatch, call):
    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, call, killed)
        with pytest.raises(KeyboardInterrupt):
            writing.retire(open_folder(run / "checkpoints" / "1"))
    said = []
    checkpoints = Checkpoints(run, keep=1, say=said.append)
    assert checkpoints.continue_from() == 2 and not said
    checkpoints.save(state(3), 3, {}, 1.0)
    assert checkpoints.wait() is None and not said
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"3"}


@pytest.mark.parametrize("parts", [1, 2])
def test_killed_in_the_midst_of_removing_what_is_left_is_an_unfinished_save(
    run, monkeypatch, parts
):
    """As when a run that was killed in its first save comes to that step again."""
    folder, removed = open_folder(run / "checkpoints" / "1"), []
    remove = type(folder.fs).rm

    def killed(self, path, **keywords):
        if len(removed) == parts:
            raise KeyboardInterrupt
        removed.append(path)
        remove(self, path, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder.fs), "rm", killed)
        with pytest.raises(KeyboardInterrupt):
            writing.retire(folder)
    assert len(removed) == parts and manifest.UNFINISHED in folder.names()
    said = []
    assert Checkpoints(run, say=said.append).continue_from() == 2 and not said

"""A run whose run.out_dir is gs://..., against a server on this machine that speaks as GCS does.

Checkpoints go there by tensorstore, all else by gcsfs, as they do to the real one.
"""

import json
import os
import shutil
import time

import fake_gcs
import pytest
import tiny_run
from test_checkpoint_faults import ABSTRACT, assert_is, state

from scalegpt import evaluate, train
from scalegpt.checkpoints import writing
from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.files import run_folder
from scalegpt.files.folder import open_folder

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it would ask Google about the bucket
pytest.importorskip("gcsfs")

URL = "gs://bucket/runs"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The server of gs://bucket, and the cache of a machine that uses it."""
    server = fake_gcs.Server("bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.address)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.address)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield server
    server.shutdown()


def arguments(data, url: str, **changes) -> list[str]:
    values = {
        "data.path": data,
        "run.out_dir": url,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 8,
        "model.block_size": 8,
        "batch.sequences": 8,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 0,
        "optim.steps": 6,
        "eval.every": 2,
        "eval.windows": 8,
        "checkpoint.every": 2,
        "checkpoint.keep": 1,
        "log.every": 1,
    } | changes
    return [f"--{key}={value}" for key, value in values.items()]


def lines(text: bytes, key: str) -> list[int]:
    rows = [json.loads(line) for line in text.decode().splitlines()]
    return [row["step"] for row in rows if key in row]


@pytest.mark.slow
@pytest.mark.usefixtures("signals_as_they_were")
def test_a_recreated_machine_continues_a_run_in_a_bucket(bottles, bucket, monkeypatch, capsys):
    """Its disk is empty: checkpoints and the rows up to them come from the bucket."""
    url = f"{URL}/x"
    tiny_run.stop_after(monkeypatch, 3)
    assert train.main(arguments(bottles, url)) == 3
    here, remote = run_folder.local(url), open_folder(url)
    assert here.name.startswith("x-") and (here / "metrics.jsonl").is_file()
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints"} <= set(remote.names())
    shutil.rmtree(here)
    tiny_run.stop_after(monkeypatch)
    assert train.main(arguments(bottles, url)) == 0
    assert f"continuing from step 3 in {url}/checkpoints" in capsys.readouterr().out
    for rows in (remote.read("metrics.jsonl"), (here / "metrics.jsonl").read_bytes()):
        assert lines(rows, "train/loss") == [1, 2, 3, 4, 5, 6]
        assert lines(rows, "val/loss") == [0, 2, 4, 6]
    assert evaluate.main(["--run", url, "--windows", "4", "--checkpoint", "latest"]) == 0
    assert f"{url}, step 6" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run that differs"):
        train.main(arguments(bottles, url, **{"optim.lr": 1e-3}))


def test_local_files_count_where_they_continue_the_buckets(bucket):
    url = f"{URL}/y"
    remote, here = open_folder(url), run_folder.local(url)
    assert run_folder.fetch(url) == here and not list(here.iterdir())
    (here / "config.yaml").write_text("a: 1")
    (here / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    run_folder.push(url)
    assert remote.read("metrics.jsonl") == b'{"step": 1}\n'
    run_folder.fetch(url)
    assert (here / "metrics.jsonl").read_text() == '{"step": 1}\n{"st'
    remote.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')  # from another machine
    run_folder.fetch(url)
    assert (here / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    remote.remove()  # a new run of the same name
    run_folder.fetch(url)
    assert [path.name for path in here.iterdir()] == ["metrics.jsonl.old1"]
    with pytest.raises(ValueError, match="cannot write to run.out_dir=gs://no-such-bucket/x"):
        run_folder.local("gs://no-such-bucket/x").mkdir(parents=True)
        (run_folder.local("gs://no-such-bucket/x") / "config.yaml").write_text("a: 1")
        run_folder.push_or_explain("gs://no-such-bucket/x")


def test_damage_in_a_bucket_is_left_out_and_moved_aside(bucket):
    said = []
    checkpoints = Checkpoints(f"{URL}/z", keep=2, say=said.append)
    assert checkpoints.continue_from() is None
    for at in (1, 2, 3):
        checkpoints.save(state(at), at, {}, None)
        assert checkpoints.wait() is None
    folder = open_folder(checkpoints.folder)
    assert folder.names() == ["2", "3"] and not said
    name = next(n for n in folder.files() if n.startswith("3/params/d/"))
    data = bytearray(folder.read(name))
    data[5] ^= 1
    folder.write(name, bytes(data))
    checkpoints = Checkpoints(f"{URL}/z", keep=2, say=said.append)
    assert checkpoints.continue_from() == 2 and f"{name[2:]}: its bytes were altered" in said[0]
    assert_is(checkpoints.restore(2, ABSTRACT), 2)
    checkpoints.save(state(3), 3, {}, None)
    assert checkpoints.wait() is None and folder.names() == ["2", "3", "damaged-3"]
    assert_is(open_checkpoints(f"{URL}/z").restore(3, ABSTRACT), 3)


def test_a_lost_bucket_does_not_stop_training(bucket, monkeypatch):
    said = []
    checkpoints = Checkpoints(f"{URL}/lost", say=said.append)
    checkpoints.save(state(1), 1, {}, None)
    assert checkpoints.wait() is None
    bucket.down = True
    for at in (2, 3):
        assert checkpoints.save(state(at), at, {}, None) < 5
        assert checkpoints.wait().reason
    bucket.down = False
    assert len(said) == 1 and "could not be saved in gs://bucket/runs/lost/checkpoints" in said[0]
    checkpoints.save(state(4), 4, {}, None)
    assert checkpoints.wait() is None and "saving works again" in said[1]
    # Its client tries for minutes: so long is not waited for.
    monkeypatch.setattr(writing, "PATIENCE", 0.1)
    monkeypatch.setattr(writing, "_is_there_or_make_room", lambda *arguments: time.sleep(5))
    assert checkpoints.save(state(5), 5, {}, None) < 2
    assert "nothing was answered within 0.1 s" in checkpoints.wait().reason


def test_other_urls_are_refused():
    with pytest.raises(ValueError, match="memory://x: checkpoints can be in a local folder, gs://"):
        Checkpoints("memory://x")

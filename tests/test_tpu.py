"""tools/tpu.py against a stand-in for gcloud: the life of a run, and what goes wrong in it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcloud
import pytest
import tpu
from tpus.job import local_data

from scalegpt.config import Config, DataConfig, RunConfig
from scalegpt.processes.command import run_command

ROOT = Path(__file__).resolve().parents[1]
RUN = ["--config", "configs/demo.yaml", "--data.path=gs://b/owt", "--run.out_dir=gs://b/demo"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Makes a stand-in that follows a plan; returns its folder."""

    def make(plan, **machine) -> Path:
        folder = tmp_path / "fake"
        path = fake_gcloud.install(folder, plan, **machine)
        monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE", str(folder))
        return folder

    monkeypatch.chdir(ROOT)
    yield make
    (tmp_path / "fake" / "go").touch()  # no stub outlives its test


def train(*flags: str, run: list[str] = RUN) -> int:
    kind = [] if any(flag.startswith("--type") for flag in flags) else ["--type=v3-8"]
    return tpu.main(["train", "me", *kind, "--poll=0.02", *flags, "--", *run])


def verbs(folder: Path) -> list[str]:
    return [argv[3] for argv in fake_gcloud.calls(folder)]


def commands(text: str) -> list[str]:
    """The printed commands, without the log between them and without the archive's folder."""
    lines = [line for line in text.splitlines() if line.startswith("gcloud ")]
    return [re.sub(r" /\S*/(scalegpt-me.tar.gz) ", r" \1 ", line) for line in lines]


def test_a_whole_life_with_a_preemption_in_the_middle(cloud, capsys):
    plan = [{"steps": [10, 20], "preempt": True}, {"steps": [20, 30, 100]}]
    folder = cloud(plan, workers=4)
    assert tpu.main(["train", "me", "--type=v4-32", "--spot", "--poll=0.02", "--", *RUN]) == 0
    assert verbs(folder).count("create") == verbs(folder).count("delete") == 2
    create = fake_gcloud.calls(folder, "create")[0]
    assert {"--spot", "--accelerator-type=v4-32", "--node-id=me"} < set(create)
    assert "--runtime-version=tpu-ubuntu2204-base" in create
    for worker in range(4):
        argv = [start["argv"] for start in fake_gcloud.starts(folder, worker)]
        assert argv == [["-u", "-m", "scalegpt.train", *RUN]] * 2
    printed = capsys.readouterr().out
    assert "lost its machine" in printed and "step 100/100" in printed
    assert not (folder / "made.json").exists()


def test_a_dry_run_prints_what_is_then_run_and_runs_nothing(cloud, capsys):
    folder = cloud([{"steps": [100]}])
    assert train("--spot", "--dry-run", "--zone=europe-west4-a") == 0
    planned = commands(capsys.readouterr().out)
    assert not fake_gcloud.calls(folder)
    assert train("--spot", "--zone=europe-west4-a") == 0
    assert planned == commands(capsys.readouterr().out)
    called = {shlex.join(["gcloud", *argv]) for argv in fake_gcloud.calls(folder)}
    assert {line for line in planned if "scp" not in line} <= called
    assert planned[0].startswith("gcloud compute tpus queued-resources describe me ")
    assert planned[-1].startswith("gcloud compute tpus queued-resources delete me --force")


def test_it_prints_a_shell_script(cloud, capsys, tmp_path):
    cloud([])
    train("--dry-run")
    script = tmp_path / "script.sh"
    script.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_arguments_arrive_as_they_are(cloud):
    folder = cloud([{"steps": [100]}], workers=2)
    awkward = ["it's", 'a "b" c', "$HOME `id` \\", "two  spaces;&|", "ü*?#~ x"]
    run = [*RUN, *(f"--log.wandb_name={text}" for text in awkward)]
    assert train("--keep", run=run) == 0
    first, second = (fake_gcloud.starts(folder, worker)[0] for worker in (0, 1))
    assert first["argv"][3:] == second["argv"][3:] == run
    assert first["token"] == second["token"]


@pytest.mark.slow
@pytest.mark.parametrize("code", [2, 4])
def test_what_would_only_happen_again_is_not_repeated(cloud, capfd, code):
    folder = cloud([{"steps": [10], "code": code}])
    assert train() == code
    assert len(fake_gcloud.starts(folder)) == 1
    assert "delete" not in verbs(folder)
    printed = capfd.readouterr().out
    assert "w-0: step 10/100" in printed and "tools/tpu.py down me" in printed


@pytest.mark.slow
def test_a_mistake_that_another_worker_sees_counts(cloud, capsys):
    folder = cloud({"all": [{"code": 5}], "w-2": [{"code": 2}]}, workers=3)
    assert train() == 2
    assert len(fake_gcloud.starts(folder)) == 1


@pytest.mark.slow
def test_any_other_end_is_followed_by_another_start(cloud):
    plan = [{"steps": [step], "code": code} for step, code in enumerate((3, 5, 137, 0))]
    folder = cloud(plan)
    assert train("--max-restarts=0") == 0
    assert len(fake_gcloud.starts(folder)) == len(plan)
    assert verbs(folder).count("create") == 1  # the machine was not at fault
    assert verbs(folder).count("scp") == 1


@pytest.mark.slow
def test_restarts_without_progress_end(cloud, capsys):
    folder = cloud([{"steps": [10], "code": 5}])
    assert train("--max-restarts=2") == 5
    # The first counts as progress; then two more, one of them on a new machine; then the limit.
    assert len(fake_gcloud.starts(folder)) == 4
    assert verbs(folder).count("create") == 2
    assert "without a new update" in capsys.readouterr().out


def test_a_run_that_was_left_alone_is_found_again(cloud, capsys):
    folder = cloud([{"steps": [10], "wait": True}])
    argv = ["train", "me", "--type=v3-8", "--poll=0.02", "--", *RUN]
    tool = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "tpu.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    for line in tool.stdout:
        if line.startswith("step 10/"):
            break
    tool.send_signal(signal.SIGINT)
    errors = tool.communicate(timeout=60)[1]
    assert tool.returncode == 130
    assert shlex.join(["python", "tools/tpu.py", *argv]) in errors and "stop me" in errors

    with pytest.raises(ValueError, match="another run is in progress"):
        train(run=[*RUN, "--optim.lr=1e-4"])
    assert tpu.main(["status", "me"]) == 0
    assert "w-0: running" in capsys.readouterr().out
    (folder / "go").touch()
    assert train() == 0
    assert len(fake_gcloud.starts(folder)) == 1
    assert "found the run" in capsys.readouterr().out


def test_a_run_that_ended_well_meanwhile_is_not_run_again(cloud):
    folder = cloud([{"steps": [100]}])
    assert train("--keep") == 0
    assert train() == 0
    assert len(fake_gcloud.starts(folder)) == 1
    assert not (folder / "made.json").exists()


def test_stop_saves_and_is_not_undone(cloud, capsys):
    folder = cloud([{"steps": [10], "wait": True}])
    assert tpu.main(["up", "me", "--type=v3-8", "--poll=0.02"]) == 0
    assert tpu.main(["run", "me", "--", *RUN]) == 0
    with pytest.raises(ValueError, match="in progress"):
        tpu.main(["run", "me", "--", *RUN])
    assert tpu.main(["stop", "me"]) == 0
    exit_code = folder / "w-0" / "scalegpt" / "run.exit"
    deadline = time.monotonic() + 5
    while not exit_code.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert exit_code.read_text() == "143\n"  # the stub does not save; the shell around it lived on
    assert tpu.main(["status", "me"]) == 0
    assert "stopped" in capsys.readouterr().out
    assert tpu.main(["down", "me"]) == tpu.main(["down", "me"]) == 0


def test_up_twice_is_up_once(cloud):
    folder = cloud([])
    for _ in range(2):
        assert tpu.main(["up", "me", "--type=v5e-8", "--poll=0.02"]) == 0
    created = fake_gcloud.calls(folder, "create")
    assert len(created) == 1
    assert "--accelerator-type=v5litepod-8" in created[0]
    assert "--runtime-version=v2-alpha-tpuv5-lite" in created[0]


def test_what_was_preempted_long_ago_is_created_anew(cloud):
    folder = cloud([])
    tpu.main(["up", "me", "--type=v3-8", "--poll=0.02"])
    (folder / "preempted").touch()
    tpu.main(["up", "me", "--type=v3-8", "--poll=0.02"])
    assert verbs(folder).count("create") == 2 and verbs(folder).count("delete") == 1


@pytest.mark.parametrize(
    "message",
    [
        "PERMISSION_DENIED: Permission denied on 'locations/mars' (or it may not exist).",
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV3sPreemptiblePerProjectPerZoneForTPUAPI' exceeded.",
    ],
)
def test_what_gcloud_refuses_is_shown(cloud, capfd, message):
    folder = cloud([], error=message)
    with pytest.raises(ValueError, match="creating me failed: gcloud ended with 1"):
        train("--zone=mars")
    assert message in capfd.readouterr().err
    assert not fake_gcloud.starts(folder)


def test_a_machine_that_fails_each_time_is_given_up(cloud, capfd):
    folder = cloud([], states=["FAILED"])
    with pytest.raises(ValueError, match="created 3 times, and is FAILED again"):
        train()
    assert verbs(folder).count("create") == 3


def test_an_error_here_does_not_leave_a_machine_unmentioned(cloud, capsys):
    folder = cloud([], workers=2)
    (folder / "remote" / "python3").write_text("#!/bin/sh\nexit 7\n")
    with pytest.raises(ValueError, match="installing failed: gcloud ended with 7"):
        train("--zone=z")
    assert "may cost money" in capsys.readouterr().out
    assert (folder / "made.json").exists()


def test_a_machine_that_is_taken_while_it_is_installed_is_replaced(cloud, capsys):
    folder = cloud([{"steps": [100]}])
    good = (folder / "remote" / "python3").read_text()
    once = 'if [ ! -f "$FAKE/once" ]; then touch "$FAKE/once" "$FAKE/preempted"; exit 1; fi\n'
    (folder / "remote" / "python3").write_text(good.replace("\n", f"\n{once}", 1))
    assert train("--spot") == 0
    assert verbs(folder).count("create") == 2


def test_a_run_whose_out_dir_went_with_its_machine_is_not_begun_again(cloud, capsys):
    folder = cloud([{"steps": [10], "preempt": True}])
    with pytest.raises(ValueError, match="out/none with it"):
        train(run=[*RUN[:3], "--run.out_dir=out/none"])
    assert verbs(folder).count("create") == 1


def test_data_from_here_is_copied_once(cloud, bottles, tmp_path, monkeypatch):
    folder = cloud([{"steps": [10], "code": 5}, {"steps": [20]}], workers=2)
    monkeypatch.chdir(bottles.parent)
    run = [f"--data.path=./{bottles.name}", "--run.out_dir=gs://b/demo", "--model.n_layer=1"]
    assert train("--keep", run=run) == 0
    for worker in (0, 1):
        there = folder / f"w-{worker}" / "scalegpt" / bottles.name
        for name in ("train.bin", "val.bin", "meta.json"):
            assert (there / name).read_bytes() == (bottles / name).read_bytes()
    tpu.main(["run", "me", "--", *run])
    assert verbs(folder).count("scp") == 3  # sources, data, sources


def test_data_in_parts_of_datatrove_and_of_prompts_are_copied_in_their_folders(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sets = {
        "parts": ["meta.json", "parts-2/0/train.bin", "parts-2/1/train.idx"],
        "filtered": [f"{s}/0.ds{end}" for s in ("train", "val") for end in ("", ".index")],
        "prompts": ["train.jsonl", "val.jsonl", "meta.json"],
    }
    sets["filtered"] += ["tokenizer.json", "train/0.ds.metadata"]
    for name, files in sets.items():
        for file in [*files, "other.txt", ".hidden.ds"]:
            Path(name, file).parent.mkdir(parents=True, exist_ok=True)
            Path(name, file).touch()
        config = Config(data=DataConfig(path=f"./{name}"), run=RunConfig(out_dir="x"))
        copied = local_data(config)
        assert sorted(f for fs in copied.values() for f in fs) == sorted(
            f"{name}/{file}" for file in files
        )
        assert all(str(Path(f).parent) == folder for folder, fs in copied.items() for f in fs)


def test_an_out_dir_of_the_machine_is_fetched_before_it_is_deleted(cloud, tmp_path):
    folder = cloud([{"steps": [10], "wait": True}])
    run = [*RUN[:3], "--run.out_dir=out/demo"]
    tpu.main(["up", "me", "--type=v3-8", "--poll=0.02"])
    tpu.main(["run", "me", "--", *run])
    out = folder / "w-0" / "scalegpt" / "out" / "demo"
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}\n")
    (folder / "go").touch()
    assert train(f"--to={tmp_path / 'got'}", run=run) == 0
    assert (tmp_path / "got" / "metrics.jsonl").read_text() == "{}\n"
    assert verbs(folder)[-2:] == ["scp", "delete"]
    with pytest.raises(ValueError, match="not overwritten"):
        train(f"--to={tmp_path / 'got'}", run=run)


def test_a_run_in_a_bucket_is_fetched_from_there(cloud, tmp_path):
    folder = cloud([])
    (folder / "bucket" / "b" / "demo").mkdir(parents=True)
    (folder / "bucket" / "b" / "demo" / "metrics.jsonl").write_text("{}\n")
    assert tpu.main(["fetch", "me", "--run=gs://b/demo", f"--to={tmp_path / 'got'}"]) == 0
    assert (tmp_path / "got" / "metrics.jsonl").exists()


def test_a_variable_goes_in_a_file_and_never_in_a_command(cloud, monkeypatch, capsys):
    folder = cloud([{"steps": [100]}])
    monkeypatch.setenv("SECRET", "s3cret 'quoted'")
    assert train("--keep", "--env=SECRET") == 0
    (start,) = fake_gcloud.starts(folder)
    assert start["secret"] == "s3cret 'quoted'" and len(start["token"]) == 32
    assert "s3cret" not in capsys.readouterr().out + str(fake_gcloud.calls(folder))
    assert (folder / "w-0" / "scalegpt" / "run.env").stat().st_mode & 0o777 == 0o600
    assert not (folder / "w-0" / "scalegpt-me.tar.gz").exists()


@pytest.mark.parametrize(
    "flags, run, message",
    [
        (["--spot"], [*RUN[:3], "--run.out_dir=out/x"], "gs://BUCKET/x"),
        (["--type=v4-32"], [*RUN[:3], "--run.out_dir=out/x"], "hosts of a slice share no disk"),
        (["--type=v9-8"], RUN, "--type=v9-8 is none of v2-N"),
        ([], [*RUN, "--optim.lrr=1"], "did you mean --optim.lr"),
        ([], [*RUN[:2], "--data.path=data/none", RUN[3]], "no data/none/train.bin here"),
        ([], [*RUN, "--run.init_from=configs"], "run.init_from=configs is a folder here"),
        ([], ["--config", "/etc/hosts.yaml", *RUN[2:]], "cannot read config"),
        ([], [], "say what to train"),
        (["--env=NO_SUCH_VARIABLE"], RUN, "no such variable"),
    ],
)
def test_mistakes_are_found_before_anything_is_rented(cloud, flags, run, message):
    folder = cloud([])
    with pytest.raises(ValueError, match=re.escape(message)):
        train(*flags, run=run)
    assert not fake_gcloud.calls(folder)


def test_without_gcloud_it_says_so_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / "tpu.py"), "down", "me"])
    with pytest.raises(SystemExit) as ended:
        run_command(tpu.main)
    assert ended.value.code == 2
    assert "gcloud is not on PATH" in capsys.readouterr().err


def test_the_commands_of_the_readme_are_commands(cloud, monkeypatch, capsys):
    folder = cloud([])
    monkeypatch.setenv("WANDB_API_KEY", "key")
    text = (ROOT / "tools" / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python tools/tpu.py (.*)$", text, re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        command, name, *rest = shlex.split(line, comments=True)
        assert tpu.main([command, name, "--dry-run", *rest]) == 0, line
    assert not fake_gcloud.calls(folder)
    assert commands(capsys.readouterr().out)

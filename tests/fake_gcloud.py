"""A stand-in for gcloud: TPU machines whose workers are folders and whose ssh is a local shell.

`install` puts it on a PATH. It knows the flags of the real one's reference pages and no others,
passes remote commands on as the real one does, and keeps its state in one folder, where a test
says what goes wrong.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# From the pages of gcloud's reference for each of these commands.
COMMON = {"--zone", "--project", "--quiet", "--format"}
SSH = {"--worker", "--command", "--ssh-flag", "--internal-ip"} | COMMON
CREATE = {
    *("--node-id", "--accelerator-type", "--runtime-version", "--spot", "--reserved", "--network"),
    *("--subnetwork", "--service-account", "--labels", "--valid-until-duration", *COMMON),
}
FLAGS = {
    "queued-resources describe": COMMON,
    "queued-resources create": CREATE,
    "queued-resources delete": {"--force", "--async", *COMMON},
    "tpu-vm describe": COMMON,
    "tpu-vm ssh": SSH,
    "tpu-vm scp": {"--worker", "--recurse", "--scp-flag", *COMMON},
}
# What a worker has: python3 that "installs" by copying the stub, and the name of the machine.
PYTHON3 = """#!/bin/sh
case "$*" in *"uv venv"*) mkdir -p .venv/bin; cp "$FAKE/stub" .venv/bin/python;; esac
"""
HOSTNAME = '#!/bin/sh\nbasename "$HOME"\n'
# In place of training: does what the plan says for this attempt of this worker, and records it.
STUB = """#!{python} -SE
import json, os, pathlib, sys, time
fake, worker = pathlib.Path(os.environ["FAKE"]), os.path.basename(os.environ["HOME"])
calls = fake / f"{{worker}}.starts"
attempt = len(calls.read_text().splitlines()) if calls.exists() else 0
key, token = os.environ.get("SECRET"), os.environ.get("SCALEGPT_TOKEN")
with calls.open("a") as f:
    f.write(json.dumps({{"argv": sys.argv[1:], "secret": key, "token": token}}) + "\\n")
plan = json.loads((fake / "plan.json").read_text())
plan = plan.get(worker, plan["all"])
plan = plan[min(attempt, len(plan) - 1)]
for step in plan.get("steps", []):
    print(f"step {{step}}/100 | loss 1.0", flush=True)
if plan.get("wait"):
    while not (fake / "go").exists():
        time.sleep(0.02)
if plan.get("preempt"):
    (fake / "preempted").touch()
sys.exit(plan.get("code", 0))
"""


def install(folder: Path, plan: list | dict, workers: int = 1, **machine) -> Path:
    """Make the stand-in below `folder`. Returns what to put on PATH, first."""
    for name in ("bin", "remote", "bucket"):
        (folder / name).mkdir(parents=True)
    for path, text in (
        ("bin/gcloud", f"#!{sys.executable} -SE\n" + Path(__file__).read_text()),
        ("remote/python3", PYTHON3),
        ("remote/hostname", HOSTNAME),
        ("stub", STUB.format(python=sys.executable)),
    ):
        (folder / path).write_text(text)
        (folder / path).chmod(0o755)
    (folder / "plan.json").write_text(json.dumps(plan if isinstance(plan, dict) else {"all": plan}))
    (folder / "machine.json").write_text(json.dumps({"workers": workers, **machine}))
    return folder / "bin"


def calls(folder: Path, verb: str = "") -> list[list[str]]:
    """The calls so far, as lists of arguments."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [argv for argv in map(json.loads, lines) if not verb or verb in argv]


def starts(folder: Path, worker: int = 0) -> list[dict]:
    file = folder / f"w-{worker}.starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# --- from here on: what runs as gcloud ---


def main(argv: list[str]) -> int:
    fake = Path(os.environ["FAKE"])
    with (fake / "calls").open("a") as stream:
        stream.write(json.dumps(argv) + "\n")
    machine = json.loads((fake / "machine.json").read_text())
    if argv[:3] == ["storage", "rsync", "--recursive"]:
        source = fake / "bucket" / argv[3].removeprefix("gs://")
        shutil.copytree(source, argv[4], dirs_exist_ok=True)
        return 0
    if argv[:2] != ["compute", "tpus"]:
        return fail(f"Invalid choice: {argv}")
    command = " ".join(argv[2:4])
    flags = dict(a.partition("=")[::2] for a in argv[4:] if a.startswith("--"))
    names = [a for a in argv[4:] if not a.startswith("--")]
    if unknown := set(flags) - FLAGS[command]:
        return fail(f"({command}) unrecognized arguments: {unknown}", 2)
    made = fake / "made.json"
    if (fake / "preempted").exists() and made.exists():
        made.write_text(json.dumps(["SUSPENDED"]))
    if command == "queued-resources create":
        if "error" in machine:
            return fail(machine["error"])
        if made.exists():
            return fail("ALREADY_EXISTS: Resource already exists")
        for worker in range(machine["workers"]):
            (fake / f"w-{worker}").mkdir()
        made.write_text(json.dumps(machine.get("states", ["WAITING_FOR_RESOURCES", "ACTIVE"])))
        return 0
    if not made.exists():
        return fail(f"({command}) NOT_FOUND: Resource 'projects/p/{names[0]}' was not found")
    states = json.loads(made.read_text())
    if command == "queued-resources describe":
        print(states[0])
        made.write_text(json.dumps(states[1:] or states))
        return 0
    if command == "queued-resources delete":
        if "--force" not in flags:
            return fail("the queued resource has nodes")
        made.unlink()
        (fake / "preempted").unlink(missing_ok=True)
        for worker in range(machine["workers"]):
            shutil.rmtree(fake / f"w-{worker}")
        return 0
    if command == "tpu-vm describe":
        print("READY" if states == ["ACTIVE"] else "PREEMPTED")
        return 0
    if states != ["ACTIVE"]:
        return fail("TPU is not READY")
    everyone = range(machine["workers"]) if flags["--worker"] == "all" else [int(flags["--worker"])]
    if command == "tpu-vm ssh":
        words = flags["--command"].split(" ")  # as the real one, whose ssh joins them again
        shells = [on_worker(fake, fake / f"w-{w}", " ".join(words)) for w in everyone]
        return next((code for shell in shells if (code := shell.wait())), 0)
    *sources, target = names
    if ":" in target:
        for worker in everyone:
            for source in sources:
                shutil.copy(source, fake / f"w-{worker}" / target.split(":")[1])
    else:
        shutil.copytree(fake / "w-0" / sources[0].split(":")[1], target)
    return 0


def on_worker(fake: Path, home: Path, command: str) -> subprocess.Popen:
    environment = {"HOME": str(home), "FAKE": str(fake), "PATH": f"{fake / 'remote'}:/usr/bin:/bin"}
    return subprocess.Popen(["bash", "-c", command], cwd=home, env=environment)


def fail(message: str, code: int = 1) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

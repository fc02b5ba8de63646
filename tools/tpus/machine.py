"""A machine is a TPU VM or pod slice, managed by gcloud commands without a local shell.

Each command is printed before it runs; with notes after a "#", the output is a shell script.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable

from scalegpt.errors import Mistake

# What Google's page "TPU software versions" recommends for JAX.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# A request or node in one of these states never comes back; any other is worth waiting for.
ON_THE_WAY = {"SUSPENDING", "DELETING"}  # these become SUSPENDED and ABSENT
DEAD = {"SUSPENDED", "FAILED", *ON_THE_WAY}
DEAD_NODE = {"PREEMPTED", "TERMINATED", "DELETING", "ABSENT"}
CREATIONS = 3  # how often in a row a machine is created before its failing is final
PATIENCE = 10  # questions in a row that gcloud may fail to answer while a machine is waited for
# So that a connection to a machine that is gone ends by itself.
SSH_FLAGS = ("--ssh-flag=-oConnectTimeout=30", "--ssh-flag=-oServerAliveInterval=15")


def note(text: str) -> None:
    print(*(f"# {line}" for line in text.splitlines()), sep="\n", flush=True)


def accelerator(name: str) -> tuple[str, str, bool]:
    """Return gcloud's name of a type, its runtime version, and whether it has several hosts."""
    name = re.sub("^v5e-", "v5litepod-", name)
    generation, _, size = name.partition("-")
    if generation not in RUNTIMES or not size.isdigit():
        raise Mistake(
            f"--type={name} is none of {', '.join(f'{g}-N' for g in RUNTIMES)}; N is cores up to "
            "v5p (v3-8, v4-32), chips of v5litepod and v6e"
        )
    return name, RUNTIMES[generation], int(size) > 8


class Machine:
    """A machine is one queued resource (the request) and its one node, both named `name`."""

    def __init__(self, name: str, zone: str | None, project: str | None, dry_run: bool) -> None:
        if not re.fullmatch("[a-z]([-a-z0-9]{0,60}[a-z0-9])?", name):
            raise Mistake(f"NAME={name!r}: lower-case letters, digits and -, a letter first")
        if not dry_run and not shutil.which("gcloud"):
            raise Mistake("gcloud is not on PATH; see https://cloud.google.com/sdk/docs/install")
        self.name, self.dry_run = name, dry_run
        self._where = [f"--{k}={v}" for k, v in (("zone", zone), ("project", project)) if v]
        self._printed: set[str] = set()
        self.created = 0  # how often this object has created it
        self.exists = False  # as of the last answer

    def call(
        self, argv: list[str], capture: bool = False, once: str = "", pretend: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Print a command and run it; a dry run returns `pretend` as its output instead.

        once: the name of a question that is asked repeatedly but printed once.
        """
        if once not in self._printed:
            print(shlex.join(argv), flush=True)
            self._printed |= {once} - {""}
        if self.dry_run:
            return subprocess.CompletedProcess(argv, 0, pretend, "")
        pipe = subprocess.PIPE if capture else None
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            encoding="utf-8",
            errors="replace",
        )

    def must(self, argv: list[str], what: str, hint: str = "") -> None:
        """Run a command with gcloud's output shown. Raises Mistake if it fails."""
        if code := self.call(argv).returncode:
            see = f"see above; {hint}" if hint else "see above"
            raise Mistake(f"{what} failed: gcloud ended with {code}, {see}")

    def _tpus(self, group: str, verb: str, *flags: str) -> list[str]:
        return ["gcloud", "compute", "tpus", group, verb, self.name, *flags, *self._where]

    # --- from creation to deletion ---

    def state(self) -> str:
        """Return ABSENT, the request's state, or "ACTIVE, node ..." with the node's state.

        Raises Mistake where gcloud does not answer.
        """
        pretend = "ACTIVE" if self.created else "ABSENT"
        request = self._describe("queued-resources", "value(state.state)", pretend)
        self.exists = request != "ABSENT"
        if request != "ACTIVE":
            return request
        # The node is asked, too: after a preemption its request may stay ACTIVE for minutes.
        return f"ACTIVE, node {self._describe('tpu-vm', 'value(state)', 'READY')}"

    def is_gone(self) -> bool:
        """Return whether the machine is certainly gone; False where gcloud does not answer."""
        try:
            return is_dead(self.state())
        except ValueError:
            return False

    def _describe(self, group: str, form: str, pretend: str) -> str:
        argv = self._tpus(group, "describe", f"--format={form}")
        answer = self.call(argv, capture=True, once=group, pretend=pretend)
        if answer.returncode and "NOT_FOUND" in answer.stderr:
            return "ABSENT"
        if answer.returncode:
            raise Mistake(f"gcloud does not say how {self.name} is:\n{answer.stderr.strip()}")
        return answer.stdout.strip() or "UNKNOWN"

    def up(self, create: Iterable[str], seconds: float) -> None:
        """Create the machine if need be, again after a preemption, and wait until it is ready.

        create: flags of `gcloud compute tpus queued-resources create`. Raises Mistake where gcloud
        fails, or the machine has failed CREATIONS times.
        """
        creations, failures, shown = 0, 0, ""
        while True:
            try:
                state, failures = self.state(), 0
            except ValueError:
                failures += 1
                if not shown or failures > PATIENCE:
                    raise
                time.sleep(seconds)
                continue
            if state != shown:
                note(f"{self.name}: {state}")
            shown = state
            if state == "ACTIVE, node READY":
                return
            dead = is_dead(state) and state not in {"ABSENT", *ON_THE_WAY}
            if dead and creations == CREATIONS:
                self.call(self._tpus("queued-resources", "describe", "--format=yaml(state)"))
                raise Mistake(f"{self.name} was created {creations} times, and is {state} again")
            if dead:
                self.down()
            if dead or state == "ABSENT":
                self._create(create)
                creations += 1
            else:
                time.sleep(seconds)

    def _create(self, flags: Iterable[str]) -> None:
        argv = self._tpus("queued-resources", "create", f"--node-id={self.name}", *flags, "--quiet")
        self.must(
            argv,
            f"creating {self.name}",
            "what a zone has: gcloud compute tpus accelerator-types list --zone=ZONE",
        )
        self.created += 1
        self.exists = True

    def down(self) -> None:
        """Delete the request and its node; gcloud returns when both are gone."""
        argv = self._tpus("queued-resources", "delete", "--force", "--quiet")
        self.must(argv, f"deleting {self.name}")
        self.exists = False

    # --- on the machine ---

    def ssh(
        self,
        command: str,
        worker: str = "0",
        capture: bool = False,
        once: str = "",
        pretend: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of shell on one worker or on all; gcloud does not change the line."""
        argv = self._ssh(command, worker)
        return self.call(argv, capture, once, pretend)

    def must_ssh(self, command: str, what: str) -> None:
        self.must(self._ssh(command, "all"), what)

    def _ssh(self, command: str, worker: str) -> list[str]:
        flags = (f"--worker={worker}", f"--command={command}", "--quiet", *SSH_FLAGS)
        return self._tpus("tpu-vm", "ssh", *flags)

    def send(self, files: list[str], folder: str) -> None:
        """Copy files into a folder below the home of all workers.

        Where an ssh-agent runs, gcloud copies to several workers only if the agent has the key.
        """
        argv = self._scp(*files, f"{self.name}:{folder}", "--worker=all")
        self.must(argv, "copying", "of a key: ssh-add ~/.ssh/google_compute_engine")

    def fetch(self, folder: str, to: str) -> None:
        """Copy a folder below the home of worker 0 to the local folder `to`."""
        argv = self._scp("--recurse", f"{self.name}:{folder}", to, "--worker=0")
        self.must(argv, "fetching")

    def _scp(self, *arguments: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", *arguments, "--quiet", *self._where]


def is_dead(state: str) -> bool:
    """Return whether a request or node in this state never comes back."""
    return state in DEAD | {"ABSENT"} or state.removeprefix("ACTIVE, node ") in DEAD_NODE

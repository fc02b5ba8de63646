"""What a run reports: fixed metric keys, the places rows go to, and how fast the steps are.

The same keys go to metrics.jsonl (always), TensorBoard and W&B (optional), and a person sees them
on the console. Only the main process of a run writes anything.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from scalegpt import run_folder

Row = dict[str, Any]
Say = Callable[[str], None]
# Scripts read these: a key is never renamed. A step is an optimizer update, a loss is in nats a
# token, train/tokens counts from step 0 over restarts, rates are the whole run's, time is unix
# seconds. Absent rather than wrong: perf/* where no step was timed, perf/mfu on a device of
# unknown peak, val/bits_per_byte where bytes are not known.
TRAIN_KEYS = ("step", "train/loss", "train/lr", "train/grad_norm", "train/tokens",
              "perf/tokens_per_second", "perf/step_seconds", "perf/mfu", "time")
# A mixture adds val/NAME/loss for each of its data sets, eval.tasks TASK/acc and TASK_KEYS' others.
EVAL_KEYS = ("step", "val/loss", "val/loss_stderr", "val/perplexity", "val/bits_per_byte",
             "val/best_loss", "time")
TASK_KEYS = ("acc", "acc_norm", "perplexity")
# What the console shows of a row, in this order.
_SHOWN = {
    "train/loss": "loss {:.4f}", "train/lr": "lr {:.2e}",
    "perf/tokens_per_second": "{:,.0f} tok/s", "perf/mfu": "mfu {:.1%}",
    "val/loss": "val loss {:.4f}", "val/loss_stderr": "± {:.4f}",
    "val/perplexity": "perplexity {:.2f}", "val/bits_per_byte": "{:.4f} bits/byte",
    "val/best_loss": "best {:.4f}",
}


class JsonlWriter:
    """Appends rows to a JSON-lines file, a whole line each, flushed at once.

    Lines are strict JSON: a NaN or an infinity, which JSON has not, is written as null.
    Continuing after step s (`resume_step`) first drops what a killed run left behind: rows of
    later steps and a torn last line. So the loop goes on with s + 1 and nothing is there twice.
    Raises ValueError on a new run (`resume_step=None`) whose file exists: runs never overwrite.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        if "://" in str(path):  # Path() would quietly make a local folder named "gs:"
            raise ValueError(f"run.out_dir holds files that grow, so it must be local: {path}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_step is not None:
            lines = path.read_text(errors="replace").splitlines()
            # Written beside it and renamed: killed at any point, the file is the old or the new.
            beside = path.with_name(path.name + ".tmp")
            beside.write_text("".join(x + "\n" for x in lines if self._step(x) <= resume_step))
            beside.replace(path)
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is another run's: choose a new run.out_dir, or move it away")
        self._file = path.open("a")

    @staticmethod
    def _step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):  # torn
            return math.inf

    def write(self, row: Row) -> None:
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                  for k, v in row.items()}
        self._file.write(json.dumps(strict, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Rows as TensorBoard scalars; on continuing, TensorBoard hides what came after that step."""

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        purge = None if resume_step is None else resume_step + 1  # it hides this step and later
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        self.close = self._writer.close

    def write(self, row: Row) -> None:
        for key, value in row.items():
            if key not in ("step", "time"):
                self._writer.add_scalar(key, value, row["step"], walltime=row["time"])


class WandbWriter:
    """Rows to Weights & Biases, which may fail in any way without stopping or holding up a run.

    Without credentials: W&B's offline mode. Any other trouble: one warning, and the writer is off.
    A continued run keeps its W&B id, in out_dir/wandb_id.txt, and W&B ignores the steps that it
    already has. Raises ValueError if the package is missing.
    """

    def __init__(
        self, config: Row, out_dir: str | Path, project: str, name: str | None = None,
        resume: bool = False, entity: str | None = None, say: Say = print,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("log.wandb=true needs a package that is not installed: "
                             "pip install 'scalegpt[wandb]', or set log.wandb=false") from error
        self._say, self._run = say, None
        id_file = Path(out_dir) / "wandb_id.txt"

        def start() -> None:
            mode = wandb.setup().settings.mode  # from WANDB_MODE or W&B's settings files
            online = mode not in ("offline", "dryrun", "disabled")
            # wandb.init would ask for a key and wait; this neither asks nor goes to the network.
            if online and not wandb.login(prompt=False, verify=False):
                mode = "offline"
                say("warning: no W&B credentials, so W&B logs offline; to upload later: "
                    f"wandb login && wandb sync {out_dir}/wandb/offline-run-*")
            known = id_file.read_text().strip() if resume and id_file.exists() else None
            self._run = wandb.init(
                project=project, name=name, entity=entity, config=config, dir=str(out_dir),
                mode=mode, id=known, resume="allow" if known else None,
                # Without it a run whose network died waits for ever at its end.
                settings=wandb.Settings(finish_timeout=60),
            )
            id_file.write_text(self._run.id + "\n")

        self._guard(start)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            # All of them on purpose: a bad key, a full disk, a fault of W&B's server or client
            # must not end days of training, whose rows are in metrics.jsonl anyway.
            self._run = None
            self._say(f"warning: W&B is off from here on ({type(error).__name__}: {error})")

    def write(self, row: Row) -> None:
        if run := self._run:
            self._guard(lambda: run.log(row, step=row["step"]))

    def close(self) -> None:
        if run := self._run:
            self._guard(run.finish)


class Console:
    """Progress for a person: a live line on a terminal, a plain line per row anywhere else."""

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None) -> None:
        self._total, self._stream, self._bar = total_steps, stream or sys.stdout, None
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, file=self._stream,
                             bar_format="{desc} |{bar}| {percentage:3.0f}%")

    def say(self, text: str) -> None:
        """A line that stays; on a terminal, above the live one."""
        if self._bar is None:
            with contextlib.suppress(BrokenPipeError):  # `| head` shall not end a run
                print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def write(self, row: Row) -> None:
        parts = [f"step {row['step']}/{self._total}"]
        parts += [form.format(row[key]) for key, form in _SHOWN.items() if key in row]
        parts += [f"{key} {row[key]:.4g}" for key in row if _of_task(key)]
        if "perf/step_seconds" in row:  # of steps alone: evaluations and saves come on top
            left = (self._total - row["step"]) * row["perf/step_seconds"]
            parts.append(f"left {tqdm.format_interval(left)}")
        if self._bar is None or "train/loss" not in row:
            self.say(" | ".join(parts))
        else:
            self._bar.n = row["step"]
            self._bar.ncols = shutil.get_terminal_size().columns  # 80 where tqdm's way says 0
            self._bar.set_description_str("  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """Sends each row everywhere; does nothing at all where `is_main` is false.

    `log` is the config's log section, `config` the whole of it (for W&B) and `resume_step` the step
    of the checkpoint that the run continues from. Raises ValueError as the writers do.
    """

    def __init__(
        self, out_dir: str, log: Any, *, total_steps: int, resume_step: int | None = None,
        is_main: bool = True, config: Row | None = None, stream: TextIO | None = None,
    ) -> None:
        self._writers: list[Any] = []
        self.say: Say = lambda text: None
        if not is_main:
            return
        folder = run_folder.local(out_dir)
        jsonl = JsonlWriter(folder / "metrics.jsonl", resume_step)  # refuses before all others
        console = Console(total_steps, resume_step or 0, stream)
        self.say, self._writers = console.say, [jsonl, console]
        if log.tensorboard:
            self._writers.append(TensorBoardWriter(folder / "tensorboard", resume_step))
        if log.wandb:
            self._writers.append(WandbWriter(
                config or {}, folder, log.wandb_project, log.wandb_name or Path(out_dir).name,
                resume_step is not None, log.wandb_entity, self.say))

    def train(self, row: Row) -> None:
        """Write a row of TRAIN_KEYS; `time` is added. Values: Python, NumPy or JAX scalars."""
        assert row.keys() <= set(TRAIN_KEYS), row.keys() - set(TRAIN_KEYS)
        self._write(row)

    def evaluation(self, row: Row) -> None:
        """Write a row of EVAL_KEYS, val/NAME/loss and those of tasks; `time` is added."""
        extra = {key for key in row.keys() - set(EVAL_KEYS) if not _of_task(key)}
        assert all(key.startswith("val/") and key.endswith("/loss") for key in extra), extra
        self._write(row)

    def _write(self, row: Row) -> None:
        row = {"time": time.time(), **row}
        for writer in self._writers:
            writer.write({k: v.item() if hasattr(v, "item") else v for k, v in row.items()})

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _of_task(key: str) -> bool:
    task, _, name = key.partition("/")
    return task != "val" and name in TASK_KEYS


class Throughput:
    """Speed since the last reading, without compilation, evaluations and saves.

    A step is over when its loss is on the host, not when it is dispatched: call each method right
    after that. `start` ends a process's first step, the one that compiles; `pause` and `resume` go
    round whatever is not training. `mfu` maps tokens/s to MFU (`flops.mfu_meter`).
    """

    def __init__(
        self, mfu: Callable[[float], float | None] = lambda rate: None, clock=time.perf_counter
    ) -> None:
        self._mfu, self._clock = mfu, clock
        self._step: int | None = None
        self._since = self._paused_at = 0.0

    def start(self, step: int) -> None:
        """`step` has just finished: count from here."""
        self._step, self._since = step, self._clock()

    def pause(self) -> None:
        self._paused_at = self._clock()

    def resume(self) -> None:
        self._since += self._clock() - self._paused_at

    def read(self, step: int, tokens_per_step: int) -> dict[str, float]:
        """The perf/* keys of the steps since `start` or the last reading; {} if there are none.

        `tokens_per_step` is the global batch of an *update*, all its microbatches and devices.
        """
        before, since = self._step, self._since
        self.start(step)
        if before is None or step <= before:
            return {}
        seconds = (self._since - since) / (step - before)
        rate = tokens_per_step / seconds
        speed = {"perf/tokens_per_second": rate, "perf/step_seconds": seconds}
        if (used := self._mfu(rate)) is not None:
            speed["perf/mfu"] = used
        return speed

"""Send rows of metrics with fixed keys to all places that keep or show them.

The same keys go to metrics.jsonl (always), TensorBoard, W&B and trackio (optional), and a person
sees them on the console. Only the main process of a run writes anything.
"""

import importlib.util
import re
import shutil
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil
from tqdm import tqdm

from scalegpt.errors import Mistake
from scalegpt.files import run_folder
from scalegpt.files.folder import open_folder
from scalegpt.processes import streams
from scalegpt.processes.phases import Phases
from scalegpt.run import ledger
from scalegpt.run.writers import (
    Apart,
    JsonlWriter,
    Row,
    Say,
    TensorBoardWriter,
    TrackioWriter,
    WandbWriter,
)

with warnings.catch_warnings(action="ignore"):  # a notebook may lack ipywidgets
    from tqdm.autonotebook import tqdm as Bar  # elsewhere than in a notebook: tqdm itself
    from tqdm.contrib import DummyTqdmFile

# Scripts read these: a key is never renamed. A step is an optimizer update, a loss is in nats a
# token, train/tokens counts from step 0 over restarts, train/spike is in deviations
# (health.deviation), train/skipped counts the updates left out so far, rates are the whole run's,
# memory is process 0's, time is unix seconds. Absent rather than wrong: perf/* where no step was
# timed, perf/mfu on a device of unknown peak, val/bits_per_byte where bytes are not known,
# train/epoch of a mixture.
TRAIN_KEYS = (
    "step",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "train/epoch",
    "train/spike",
    "train/skipped",
    "perf/tokens_per_second",
    "perf/step_seconds",
    "perf/mfu",
    "memory/host_gib",
    "time",
)
# A mixture adds val/NAME/loss and val/NAME/bits_per_byte for each of its data sets, and each of
# eval.tasks adds TASK_KEYS, of core also for its parts, as core/piqa/acc.
EVAL_KEYS = (
    "step",
    "val/loss",
    "val/loss_stderr",
    "val/perplexity",
    "val/bits_per_byte",
    "val/accuracy",
    "val/margin",
    "val/best_loss",
    "val/reward",
    "val/best_reward",
    "val/ended",
    "val/length",
    "train/eval_loss",
    "train/eval_bits_per_byte",
    "time",
)
# Rows of some runs have more: every log.norms_every updates norm/NAME of each parameter, with
# pairs dpo/NAME, and with rewards rl/NAME.
PREFIXES = ("norm/", "dpo/", "rl/")
SHOWN = 3  # answers with their rewards that a person sees after each evaluation
TASK_KEYS = (
    "acc",
    "acc_norm",
    "perplexity",
    "pass@1",
    "flexible_pass@1",
    "ended",
    "length",
    "score",
    "mean",
)
# What the console shows of a row, in this order.
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "rl/reward": "reward {:.3f}",
    "rl/ended": "{:.0%} end",
    "rl/silent_groups": "{:.0%} silent",
    "dpo/margin": "margin {:.3f}",
    "dpo/accuracy": "{:.0%} of pairs right",
    "train/lr": "lr {:.2e}",
    "perf/tokens_per_second": "{:,.0f} tok/s",
    "perf/mfu": "mfu {:.1%}",
    "val/loss": "val loss {:.4f}",
    "val/loss_stderr": "± {:.4f}",
    "val/margin": "margin {:.3f}",
    "val/accuracy": "{:.0%} of pairs right",
    "val/bits_per_byte": "{:.4f} bits/byte",
    "val/best_loss": "best {:.4f}",
    "val/reward": "val reward {:.4f}",
    "val/best_reward": "best {:.4f}",
    "val/ended": "{:.0%} of answers end",
    "train/eval_loss": "train loss {:.4f}",
}
# What the live line leaves out, one after the other, where it would not fit.
_LEFT_OUT = ("rl/silent_groups", "dpo/margin", "train/lr", "perf/mfu", "perf/tokens_per_second")


class Console:
    """A console shows progress to a person: a live line on a terminal, a bar in a notebook,
    elsewhere a line a row. All lines that stay come above the live one, also what Python's
    warnings and logs write to standard error meanwhile. Standard output is not replaced: what a
    host program prints may join the live line, but its prompts do not wait for a line's end."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total, self._stream, self._bar = total_steps, stream or sys.stdout, None
        self._stderr: tuple[TextIO, TextIO] | None = None  # ours above the live line, and Python's
        self.on_terminal = _is_terminal(self._stream)

    def say(self, text: str) -> None:
        """Print a line that stays, from any thread."""
        with tqdm.external_write_mode(self._stream):
            # At once, for `exits.say` does not wait. A host without a standard output gets nothing.
            print(f"{text}\n", end="", file=self._stream, flush=hasattr(self._stream, "flush"))

    def write(self, row: Row) -> None:
        if "time/step" in row:  # a row of the ledger, which `summary` prints once, at the end
            return
        columns = {"step": f"step {row['step']}/{self._total}"}
        columns |= {key: form.format(row[key]) for key, form in _SHOWN.items() if key in row}
        if "rl/reward" in row:  # the loss hovers around 0 and says nothing
            del columns["train/loss"]
        # The 22 tasks of core would fill a screen; their mean is there.
        shown = [key for key in row if of_task(key) and key.count("/") == 1]
        columns |= {key: f"{key} {row[key]:.4g}" for key in shown}
        if "perf/step_seconds" in row:  # without evaluations and saves, which come on top
            left = (self._total - row["step"]) * row["perf/step_seconds"]
            columns["left"] = f"left {tqdm.format_interval(left)}"
        live = self.on_terminal or Bar is not tqdm
        if live and "train/loss" in row:
            self._show(row["step"], columns)
        else:
            self.say(" | ".join(columns.values()))

    def _show(self, step: int, columns: dict[str, str]) -> None:
        if self._bar is None:  # not before: what compiles has much to say
            self._bar = Bar(
                total=self._total,
                file=self._stream,
                nrows=20,  # a terminal that says 0 shows the line, too
                # Not drawn before it has a description: `say` of another thread would not take
                # the line away before tqdm's start_t, which is set after the first drawing.
                delay=1e-9,
                leave=not self.on_terminal,
                bar_format="{desc} |{bar}| {percentage:3.0f}%",
            )
            # Of two runs at once, the first one's serves both.
            served = isinstance(sys.stderr, DummyTqdmFile)
            if self.on_terminal and _is_terminal(sys.stderr) and not served:
                ours = DummyTqdmFile(self._stream)
                self._stderr = ours, streams.put("stderr", ours)
        if self.on_terminal:
            # Room for ^C, which would make it two lines; tqdm itself may find 0 columns.
            self._bar.ncols = shutil.get_terminal_size().columns - 5
            for key in _LEFT_OUT:
                if len("  ".join(columns.values())) > self._bar.ncols - len(" |12345678| 100%"):
                    columns.pop(key, None)
        self._bar.n = step
        self._bar.set_description_str("  ".join(columns.values()))

    def close(self) -> None:
        """Take the live line away; a notebook keeps its bar."""
        if self._bar is not None:
            self._bar.close()
        if self._stderr and sys.stderr is self._stderr[0]:  # else a host has put its own there
            streams.put("stderr", self._stderr[1])


def _is_terminal(stream: TextIO | None) -> bool:
    """Return whether it is one; a host program may have no standard streams, or makeshift ones."""
    return hasattr(stream, "isatty") and stream.isatty()


def check_packages(log: Any) -> None:
    """Raise Mistake if a package that the log section needs is not installed; import nothing."""
    for name in ("wandb", "trackio"):
        if getattr(log, name) and importlib.util.find_spec(name) is None:
            raise Mistake(
                f"log.{name}=true needs a package that is not installed: "
                f"pip install 'scalegpt[{name}]', or set log.{name}=false"
            )


class Metrics:
    """Metrics sends each row to all writers; it does nothing at all where `is_main` is false.

    `log` is the config's log section, `config` the whole of it (for W&B) and `resume_step` what
    `resume.rows_to_keep` returned. Raises Mistake as the writers do.
    """

    def __init__(
        self,
        out_dir: str,
        log: Any,
        *,
        total_steps: int,
        phases: Phases,
        resume_step: int | None = None,
        is_main: bool = True,
        ends_with_sample: bool = True,
        config: Row | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._writers: list[Any] = []
        self._texts: list[Any] = []  # the writers of samples
        self.say: Say = lambda text: None
        self.on_terminal, self.folder = False, open_folder(run_folder.local(out_dir))
        self._ledger: ledger.Ledger | None = None
        self._stalled: Row = {}
        if not is_main:
            return
        console = Console(total_steps, stream)
        folder = run_folder.local(out_dir)
        # The first writer, as it refuses a folder that holds another run.
        jsonl = JsonlWriter(folder / "metrics.jsonl", resume_step, console.say)
        self._ledger = ledger.Ledger(phases, jsonl.earlier, resume_step)
        self._memory = psutil.Process()
        self.say, self._writers = console.say, [jsonl, console]
        self.on_terminal = console.on_terminal
        samples = folder / run_folder.SAMPLES  # runs of earlier versions have none
        # A finished run that is started again writes its last sample again.
        again = resume_step is not None and samples.exists()
        kept = min(resume_step, total_steps - ends_with_sample) if again else None
        self._texts.append(JsonlWriter(samples, kept, console.say))
        if log.tensorboard:
            tensorboard = partial(TensorBoardWriter, folder / "tensorboard", resume_step)
            self._writers.append(Apart("TensorBoard", tensorboard, self.say))
        name = log.wandb_name or Path(out_dir).name
        begun = resume_step is not None and resume_step >= 0  # -1: none of its rows are kept
        run = config or {}, folder, log.wandb_project, name, begun
        if log.wandb:
            tags = [tag.strip() for tag in (log.wandb_tags or "").split(",") if tag.strip()]
            wandb = partial(WandbWriter, *run, entity=log.wandb_entity, say=self.say, tags=tags)
            self._writers.append(Apart("W&B", wandb, self.say))
        if log.trackio:
            self._writers.append(Apart("trackio", partial(TrackioWriter, *run), self.say))
        self._texts += self._writers[2:]

    def train(self, row: Row) -> None:
        """Write a row of TRAIN_KEYS and PREFIXES, any scalars; time and memory are added."""
        unknown = {key for key in row.keys() - set(TRAIN_KEYS) if not key.startswith(PREFIXES)}
        assert not unknown, unknown
        if self._writers:
            memory = round(self._memory.memory_info().rss / 2**30, 4)
            self._write({**row, "memory/host_gib": memory})

    def evaluation(self, row: Row) -> None:
        """Write a row, which gets `time`: EVAL_KEYS, some of them of a NAME, and tasks' keys."""
        other = {key for key in row.keys() - set(EVAL_KEYS) if not of_task(key)}
        assert all(re.fullmatch("val/.+/(loss|reward|bits_per_byte)", key) for key in other), other
        self._write(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a text that the model wrote after a prompt, and keep it in samples.jsonl."""
        frame = f" a sample after update {step} "
        self.say(f"{frame:-^40}\n{streams.visible(prompt + text)}\n{'':-^40}")
        for writer in self._texts:
            writer.write({"time": time.time(), "step": step, "prompt": prompt, "text": text})

    def answers(self, step: int, answers: list[tuple[str, str, float]]) -> None:
        """Keep answers to questions with their rewards in samples.jsonl, and show some."""
        for prompt, text, reward in answers if self._texts else []:
            row = {"time": time.time(), "step": step, "prompt": prompt, "text": text}
            self._texts[0].write({**row, "reward": reward})
        lines = [f"{streams.visible(f'{q} -> {a}')} ({reward:.2f})" for q, a, reward in answers]
        self.say("\n".join(f"  {line}" for line in lines[:SHOWN]))
        for writer in self._texts[1:]:
            text = "\n".join(lines)
            writer.write({"time": time.time(), "step": step, "prompt": "", "text": text})

    def save_stalled(self, seconds: float) -> None:
        """Note how many seconds a save held up training; the next row of the ledger has it."""
        self._stalled = {"perf/save_stall_seconds": round(seconds, 4)}

    def ledger(self, step: int) -> None:
        """Write where the time went up to now, after update `step`: a row of `ledger.Ledger`."""
        if self._ledger:
            self._write({"step": step, **self._ledger.row(), **self._stalled})
            self._stalled = {}

    def summary(self) -> None:
        """Print where the time went."""
        if self._ledger:
            self.say(self._ledger.summary())

    def _write(self, row: Row) -> None:
        row = {"time": time.time(), **row}
        for writer in self._writers:
            writer.write({k: v.item() if hasattr(v, "item") else v for k, v in row.items()})

    def close(self) -> None:
        for writer in {*self._writers, *self._texts}:
            writer.close()


def of_task(key: str) -> bool:
    task, _, name = key.partition("/")
    return task not in ("val", "rl") and name.rpartition("/")[2] in TASK_KEYS

"""The training loop: `python -m scalegpt.train --config configs/demo.yaml`.

Exit codes: 0 done; 2 the user's mistake; 3 stopped on request, state saved; 4 stopped on a
non-finite loss or gradient, nothing bad saved; 5 a deadline passed, another process died, or no
checkpoint could be written for checkpoint.patience, or the last one.
"""

if __name__ == "__main__":
    # Until StopRequest listens, which is after JAX is imported: a KeyboardInterrupt in the midst of
    # that may be swallowed, or end in a page of JAX's own.
    from scalegpt.processes.exits import leave_on_signals

    leave_on_signals()

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import Config, command_line
from scalegpt.data import tokenizer
from scalegpt.data.datasets import open_datasets
from scalegpt.data.token_files import Dataset
from scalegpt.files import run_folder
from scalegpt.files.cache import keep_compiled
from scalegpt.inference.continuation import continuations
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.inference.validation import validation
from scalegpt.model.flops import mfu_meter
from scalegpt.processes import group, startup
from scalegpt.processes.agreement import Deadline, gather
from scalegpt.processes.command import fail, run_command
from scalegpt.processes.deadlines import Watch
from scalegpt.processes.exits import Exit
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import Interrupted, StopRequest
from scalegpt.run import reports
from scalegpt.run.feed import batches_from
from scalegpt.run.metrics import Metrics, Throughput, check_packages
from scalegpt.run.replay import replay
from scalegpt.run.resume import (
    check_same_run,
    initial_state,
    lock,
    open_to_save,
    stored_config,
    write_config,
)
from scalegpt.step import build_for_training, cpu_devices, sharding
from scalegpt.step.build import Steps
from scalegpt.step.compile_only import compile_only, memory_advice
from scalegpt.step.update import State

FLAGS = {
    "--print-config": {"action": "store_true", "help": "print the resolved configuration, exit"},
    "--compile-only": {
        "nargs": "?",
        "const": "here",
        "metavar": "TOPOLOGY",
        "help": "compile the step, print its memory, exit; for a TPU that is not here: v3-8, "
        "v5e:4x4, ... (needs the package libtpu)",
    },
}


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "scalegpt.train", FLAGS)
    if flags.print_config:
        print(config.to_yaml(), end="")
        return Exit.DONE
    if flags.compile_only:
        cpu_devices.choose(config)
        if config.model.vocab_size is None:
            config = config.with_vocab(max(d.vocab_size for d in open_datasets(config)))
        compile_only(config, flags.compile_only)
        return Exit.DONE
    check_packages(config.log)
    keep_compiled()
    stop, phases = StopRequest(), Phases(config.run)
    watch = Watch(phases)
    try:
        with phases("processes"):
            startup.start(config.distributed, config.run.deadline_start)
        if group.line is None:  # alone
            cpu_devices.choose(config)
        return train(config, phases, stop)
    finally:
        watch.close()
        stop.close()


@dataclass(frozen=True)
class Run:
    """What a run's loop works with. meta: what each checkpoint says of the run."""

    config: Config
    datasets: list[Dataset]
    steps: Steps
    evaluate: Callable[[Any], dict[str, float]]
    checkpoints: Checkpoints
    meta: dict[str, Any]
    metrics: Metrics
    phases: Phases
    stop: StopRequest


def train(config: Config, phases: Phases, stop: StopRequest) -> int:
    """A new run, or the continuation of the one in run.out_dir. Returns the exit code."""
    is_main = jax.process_index() == 0
    with phases("data"):
        datasets = open_datasets(config, phases.progress)
    config = config.with_vocab(max(d.vocab_size for d in datasets))
    with phases("devices"):
        jax.devices()
    with phases("mesh"):
        steps = build_for_training(config, sharding.make_mesh(config.mesh))
    stored = stored_config(config, datasets[0].tokenizer)
    if config.run.replay:
        return replay(config, datasets, steps, phases)
    evaluate = validation(config, datasets, steps, stop.check)
    in_use = lock(config) if is_main else None
    checkpoints = open_to_save(config)
    meta = {
        "config": config.model_dump(),
        "tokenizer": datasets[0].tokenizer,
        "data": {d.name: d.fingerprint for d in datasets},
        "best_loss": math.inf,
        "evaluation_due": False,  # a request to stop has cut it short
    }
    with phases("restore"):
        start = checkpoints.continue_from() or 0
    with phases("self-check"):
        startup.self_check(startup.facts(config, meta["data"], start))
    if start > 0:
        before = checkpoints.meta(start)
        meta["best_loss"] = check_same_run(config, meta, before)
        meta["evaluation_due"] = before.get("evaluation_due", False)
    notes: list[str] = []
    with phases("restore" if start else "weights"):
        state = initial_state(config, steps, checkpoints, start, notes.append)
    resume_step = start if start else (-1 if stored else None)
    if start >= config.optim.steps:
        resume_step = start + 1  # nothing will be done: the ledger of the end stays, too
    metrics = Metrics(
        config.run.out_dir,
        config.log,
        total_steps=config.optim.steps,
        phases=phases,
        resume_step=resume_step,
        is_main=is_main,
        config=meta["config"],
    )
    checkpoints.say = metrics.say
    run = Run(config, datasets, steps, evaluate, checkpoints, meta, metrics, phases, stop)
    try:
        # The mark of a run that may be continued comes after all that can refuse to start one.
        if is_main:
            write_config(config)
        metrics.say("\n".join([reports.describe(config, datasets, steps), *notes]))
        stop.heed_notices(jax.default_backend() == "tpu")
        with memory_advice():
            return loop(run, state, start)
    except BaseException as error:
        fail(error)  # the clean-up would wait for processes that wait for this one
        raise
    finally:
        metrics.close()
        checkpoints.close()
        if is_main:
            with contextlib.suppress(Exception):  # rows since the last checkpoint: good to have
                run_folder.push(config.run.out_dir)
        if in_use:
            in_use.close()


def loop(run: Run, state: State, start: int) -> int:
    """Updates `start` + 1 to optim.steps, and what happens every so many of them."""
    config, metrics, phases, meta = run.config, run.metrics, run.phases, run.meta
    total, tokens_per_step = config.optim.steps, config.batch.sequences * config.model.block_size
    batches = batches_from(config, run.datasets, run.steps, start)
    device = jax.devices()[0].device_kind
    precision = str(run.steps.model.dtype)
    meter = mfu_meter(config.model, device, jax.device_count(), metrics.say, precision)
    throughput = Throughput(phases.training, meter)

    def report(done: int, values: dict[str, Any]) -> bool:
        """Read the metrics of update `done`; False when the run cannot go on."""
        row = {"step": done} | {k: float(v) for k, v in values.items() if k.startswith("train/")}
        row["train/skipped"] = int(row["train/skipped"])
        finite = all(map(math.isfinite, (row["train/loss"], row["train/grad_norm"])))
        bad = not finite or row["train/spike"] > config.run.spike
        if bad:
            reports.bad_update(config, run.datasets, done, values, metrics)
        if done == start + 1:
            throughput.start(done)
        if bad or done % config.log.every == 0 or done in (start + 1, total):
            row["train/tokens"] = done * tokens_per_step
            metrics.train(row | throughput.read(done, tokens_per_step))
        phases.progress(done)
        return finite or int(values["nonfinite"]) <= config.run.skip_nonfinite

    def evaluation(done: int) -> float:
        """Validate; the loss is written before any checkpoint of the same step."""
        with phases("evaluation"):
            row = run.evaluate(state.swapped().params)
        meta["best_loss"] = min(meta["best_loss"], row["val/loss"])
        meta["evaluation_due"] = False
        metrics.evaluation({"step": done, **row, "val/best_loss": meta["best_loss"]})
        return row["val/loss"]

    def leave(done: int, code: int, stall: float | None = None) -> int:
        """All is on disk, or it is said that it is not, and the last row is of the time."""
        with phases("save"):
            failure = run.checkpoints.wait()
        run.stop.saves = False
        if code == Exit.NOT_FINITE:
            reports.not_finite(done, config.run.skip_nonfinite, run.checkpoints, metrics)
        elif failure or code == Exit.FAILED:
            reports.not_saved(failure, run.checkpoints, metrics)
            code = Exit.FAILED
        elif code == Exit.STOPPED:
            metrics.say(f"stopped on request after update {done}; the same command continues")
        else:
            with phases("sample"):
                metrics.say(sample(run, state.swapped().params))
                reports.finish(config, run.checkpoints, meta["best_loss"], metrics)
        if start < total:
            metrics.ledger(done, stall)
            metrics.summary()
        return code

    if start < total:
        metrics.ledger(start)
    if start == 0:
        evaluation(0)
        meta["best_loss"] = math.inf  # of weights that nobody has trained
    elif meta["evaluation_due"]:
        loss = evaluation(start)
        run.checkpoints.evaluated(start, meta, loss)
    metrics.say(f"start    {phases}")
    if start < total:
        metrics.say("compiling the training step ...")
    pending, began, stall = None, time.perf_counter(), None
    phases.begin("compile", start)
    batch = next(batches) if start < total else None
    for done in range(start + 1, total + 1):
        state, values = run.steps.train(state, batch)
        # While the device computes this update: put the next batch there, then look at the last
        # update's numbers, so that nothing ever waits for this one.
        if done < total:
            with phases("wait for data"):
                batch = next(batches)
        if pending and not report(*pending):
            return leave(pending[0], Exit.NOT_FINITE)
        pending = (done, values)
        if (failure := run.checkpoints.failing) and failure.over:
            report(*pending)
            return leave(done, Exit.FAILED, stall)
        leaving = run.stop.reached(done)
        last = done == total or leaving
        evaluate_now = done == total or _due(done, config.eval.every)
        save_now = last or _due(done, config.checkpoint.every)
        if done == start + 1 or evaluate_now or save_now:
            if not report(*pending):
                return leave(done, Exit.NOT_FINITE)
            pending = None
        if done == start + 1:
            phases.begin("step", done)
            run.stop.saves = True
            metrics.say(f"first update after {time.perf_counter() - began:.1f} s")
        if not (evaluate_now or save_now):
            continue
        best, loss = meta["best_loss"], None
        if evaluate_now:
            try:
                loss = evaluation(done)
            except Interrupted:
                leaving = last = save_now = meta["evaluation_due"] = True
        if loss is not None and not math.isfinite(loss):
            return leave(done, Exit.NOT_FINITE)
        if save_now or (loss is not None and loss < best):
            with phases("save"):
                stall = run.checkpoints.save(state.swapped(), done, meta, loss)
            if not last:
                metrics.ledger(done, stall)
        if meta["evaluation_due"] or (leaving and done < total):
            return leave(done, Exit.STOPPED, stall)
    return leave(total, Exit.DONE, stall)


def sample(run: Run, params: Any) -> str:
    """A text that the model writes from nothing, or why it cannot be had.

    A tokenizer may want a network or a package that only some processes have. All processes write
    together, so that either all of them do or none does.
    """
    problem = None
    try:
        codec = tokenizer.load(run.meta["tokenizer"])
        start = codec.encode("\n") if codec.eot is None else np.array([codec.eot])
    except ValueError as error:
        problem = str(error)
    problems = gather("sample", problem, Deadline(run.config.run.deadline_evaluation))
    if why := next(filter(None, problems), None):
        return f"no sample: {why}"
    write = decoder(run.steps, params, Sampler(), codec.vocab_size)
    longest = min(200, run.config.model.block_size)
    text = continuations(write, codec, [start], max_new_tokens=longest)[0].text
    return f"--- a sample ---\n{text}\n----------------"


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


if __name__ == "__main__":
    run_command(main)

"""Train a model: `python -m scalegpt.train --config configs/demo.yaml`.

Exit codes: 0 done; 2 the user's mistake; 3 stopped on request, state saved; 4 stopped on a
non-finite loss or gradient, nothing bad saved; 5 a deadline passed, another process died, the last
checkpoint could not be written, or none could for checkpoint.patience seconds.
"""

if __name__ == "__main__":
    import gc
    import sys

    gc.disable()  # until `run_command`: nothing that is imported is garbage
    # Signals end the process at once until StopRequest listens, after the import of JAX. During the
    # import a KeyboardInterrupt may be swallowed, or end in a page of JAX's traceback.
    from scalegpt.processes.exits import leave_on_signals

    leave_on_signals()

    # pydantic looks for docstrings in all modules that there are: in fewer before JAX is imported.
    import scalegpt.config.schema

    # Grain imports Orbax for checkpoints of its own. Ours need it at the first save, not before.
    if sys.modules.setdefault("orbax.checkpoint", None) is None:
        import grain  # noqa: F401

        del sys.modules["orbax.checkpoint"]

import contextlib
import math
import shlex
import socket
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import scalegpt
from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import Config, command_line
from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_prompt
from scalegpt.data.datasets import open_datasets, resolved, resolved_to_compile
from scalegpt.data.packing import PackedRows
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.files import run_folder
from scalegpt.files.cache import keep_compiled
from scalegpt.inference.answers import for_any_parameters, held_out
from scalegpt.inference.continuation import continuations, prompt_ids
from scalegpt.inference.decode import Decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.inference.text_loss import Unreadable
from scalegpt.inference.validation import validation
from scalegpt.model.flops import mfu_meter
from scalegpt.planning import tables, topologies
from scalegpt.planning.compiler import compile_step, memory_advice
from scalegpt.processes import startup, streams
from scalegpt.processes.agreement import Deadline, gather
from scalegpt.processes.command import code_of, message_of, python, run_command
from scalegpt.processes.deadlines import Watch
from scalegpt.processes.exits import Exit
from scalegpt.processes.group import Alone, Group, Guest
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import GuestStopRequest, Interrupted, StopRequest
from scalegpt.run import reports
from scalegpt.run.feed import Source, source, void_batch
from scalegpt.run.metrics import Metrics, check_packages
from scalegpt.run.progress import Ended, NotFinite, NotSaved, Progress, Stopped, Unread
from scalegpt.run.reference import set_reference
from scalegpt.run.replay import replay
from scalegpt.run.resume import (
    carry_over,
    data_marks,
    initial_state,
    lasting,
    lock,
    open_to_save,
    rows_to_keep,
    stored_config,
    with_model,
    write_config,
)
from scalegpt.run.rewarded import reference_weights
from scalegpt.step import build_for_training, cpu_devices, sharding
from scalegpt.step.build import Steps
from scalegpt.step.objective import Batch
from scalegpt.step.update import State

FLAGS = {
    "--print-config": {"action": "store_true", "help": "print the resolved configuration, exit"},
    "--compile-only": {
        "nargs": "?",
        "const": "here",
        "metavar": "TOPOLOGY",
        "help": "compile the step, print its memory, exit; for a TPU that is not here: v3-8, "
        "v5e:4x4, ... (needs scalegpt[plan]); scalegpt.plan --verify compares it with a plan",
    },
}


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "scalegpt.train", FLAGS)
    if flags.print_config:
        print(config.to_yaml(), end="")
        return Exit.DONE
    if flags.compile_only:
        cpu_devices.choose(config)
        config = resolved_to_compile(with_model(config))
        where = flags.compile_only
        topology = None if where == "here" else topologies.parse(where, flag="--compile-only")
        print(tables.compiled(compile_step(config, topology)))
        return Exit.DONE
    return run(config, f"{python()} -m scalegpt.train {shlex.join(argv)}")


def run(config: Config, command: str, guest: Guest | None = None) -> int:
    """Find the processes of a run and train. Returns the exit code.

    command: what was typed, which checkpoints keep. guest: set where this is not the command, but
    somebody's program, which must live on.
    Raises Mistake, and of a guest Left.
    """
    check_packages(config.log)
    keep_compiled()
    phases = Phases(config.run, age=0 if guest else None)
    seconds = config.run.deadline_start
    with phases("processes"):
        group = startup.find(config.distributed, seconds, config.run.out_dir)
    if guest and group.count > 1:
        raise Mistake(
            f"scalegpt.train is of one process, and {group.count} were started: on each of them "
            "run python -m scalegpt.train"
        )
    group = guest or group
    with group:
        stopping = GuestStopRequest(group) if guest else StopRequest(group)
        with (
            closing(stopping) as stop,
            closing(Watch(phases, group)),
            contextlib.ExitStack() as cleanup,
        ):
            with phases("processes"):
                startup.join(group, seconds, phases, stop)
            if group.count == 1:
                cpu_devices.choose(config)
            else:
                startup.same_everywhere(startup.surroundings())
            code = train(config, command, group, phases, stop, cleanup)
        return group.farewell(code)


@dataclass(frozen=True)
class Training:
    """Everything that the training loop needs. `meta`: what each checkpoint says about the run."""

    config: Config
    datasets: list[Dataset]
    steps: Steps
    validate: Callable[[Any], dict[str, float]]
    checkpoints: Checkpoints
    meta: dict[str, Any]
    metrics: Metrics
    progress: Progress
    phases: Phases
    stop: StopRequest
    reference: Any = None  # with grpo.kl: the weights that the run began with
    decoders: list[Callable[[Any], Decoder]] = field(default_factory=list)  # that of samples


def train(
    config: Config,
    command: str,
    group: Group | Alone,
    phases: Phases,
    stop: StopRequest,
    cleanup: contextlib.ExitStack,
) -> int:
    """Start a run, or continue the one in run.out_dir, to its end. Returns the exit code.

    cleanup: what is to be closed when the run has ended, in any way; the caller does it.
    """
    is_main = group.index == 0
    with phases("weights"):
        config = with_model(config)
    with phases("data"):
        datasets = open_datasets(config, phases.progress)
    config = resolved(config, datasets)
    with phases("devices"):
        devices = sharding.all_devices()
    with phases("self-check"):
        startup.self_check()
    with phases("mesh"):
        steps = build_for_training(config, sharding.make_mesh(config.mesh))
    notes, changes = list[str](), list[str]()
    stored = stored_config(config, datasets, notes.append)
    if config.run.replay:
        return replay(config, stored, datasets, steps, phases)
    streams.make_optional()
    validate = validation(config, datasets, steps, stop.check)
    if is_main:
        cleanup.enter_context(lock(config))
    checkpoints = open_to_save(config)
    meta = {
        "config": lasting(config).model_dump(),
        "command": command,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "tokenizer": datasets[0].tokenizer,
        **data_marks(config, datasets),
        "best_loss": math.inf,
        "evaluation_due": False,  # True if a request to stop has cut it short
        "changes": [],  # of keys: [step, "key: old -> new"]
    }
    with phases("restore"):
        start = checkpoints.continue_from() or 0
    with phases("self-check"):
        marks = {d.name: f"{d.fingerprint} {d.index}" for d in datasets}
        startup.same_everywhere(startup.facts(config, marks, start))
    if start > 0:
        changes = carry_over(config, meta, checkpoints.meta(start), start, notes.append)
    with phases("restore" if start else "weights"):
        state = initial_state(config, steps, checkpoints, start, notes.append, changes)
    reference, mark = None, checkpoints.meta(start).get("reference") if start else None
    if config.grpo.kl:
        with phases("weights"):
            reference, meta["reference"] = reference_weights(config, steps, state, start, mark)
    if config.objective.name == "dpo":
        with phases("reference"):
            say = group.say if is_main else lambda text: None
            meta["reference"] = set_reference(config, datasets, steps, state, start, mark, say)
    metrics = Metrics(
        config.run.out_dir,
        config.log,
        total_steps=config.optim.steps,
        phases=phases,
        resume_step=rows_to_keep(start, config.optim.steps, begun_before=stored is not None),
        is_main=is_main,
        ends_with_sample=config.goal == "loss",
        config={
            **meta["config"],
            "parameters": steps.parameters,
            "checkpoints": checkpoints.folder,
        },
    )
    if is_main:
        cleanup.callback(push_what_is_there, config.run.out_dir)
    cleanup.callback(checkpoints.close)
    cleanup.callback(metrics.close)  # which comes first
    checkpoints.say = metrics.say
    precision = str(steps.model.dtype)
    mfu = mfu_meter(config.model, devices[0].device_kind, len(devices), metrics.say, precision)
    progress = Progress(config, datasets, metrics, phases, start, mfu)
    run = Training(
        config,
        datasets,
        steps,
        validate,
        checkpoints,
        meta,
        metrics,
        progress,
        phases,
        stop,
        reference,
    )
    try:
        # config.yaml marks a run that may be continued; all that can refuse a start comes before.
        if is_main:
            write_config(config)
        metrics.say("\n".join([reports.describe(config, datasets, steps), *notes]))
        stop.heed_notices(jax.default_backend() == "tpu")
        with memory_advice():
            end = None
            try:
                before_the_first_update(run, state, start)
                state = loop(run, state, start)
            except Ended as error:
                end = error
            return finish(run, state, start, end)
    except BaseException as error:
        group.fail(error)  # a clean-up would wait for processes that wait for this one
        raise


def push_what_is_there(out_dir: str) -> None:
    """Push the rows since the last checkpoint to a bucket: good to have, but no reason to fail."""
    with contextlib.suppress(Exception):
        run_folder.push(out_dir)


def before_the_first_update(run: Training, state: State, start: int) -> None:
    """Evaluate the untrained weights, or do the evaluation that a request to stop has cut short."""
    unfinished = start < run.config.optim.steps
    if unfinished:
        run.metrics.ledger(start)
    if start == 0:
        evaluate(run, state, 0)
        run.meta["best_loss"] = math.inf  # untrained weights are never the best
    elif run.meta["evaluation_due"]:
        run.checkpoints.evaluated(start, run.meta, evaluate(run, state, start))
    line = textwrap.fill(f"start    {run.phases}", 79, subsequent_indent=" " * 9)
    run.metrics.say(line)
    if unfinished:
        run.metrics.say("compiling the training step ...")


def loop(run: Training, state: State, start: int) -> State:
    """Do updates `start` + 1 to optim.steps, with the evaluations and saves in between.

    Returns the state after the last one. Raises what is Ended to end before it.
    """
    config, total = run.config, run.config.optim.steps
    batch_of = source(
        config, run.datasets, run.steps, start, run.phases, run.stop.check, run.reference
    )
    began = time.perf_counter()
    for step in range(start + 1, total + 1):
        compiling = step == start + 1 or step in config.batch.growth
        if compiling:
            run.phases.begin("compile", step - 1)
        batch, figures = next_batch(run, batch_of, state, step)
        state, values = run.steps.train(state, batch)  # dispatched, not waited for
        judge(run, state, step, values | figures)
        if (failure := run.checkpoints.failing) and failure.over:
            judge(run, state)
            raise NotSaved(step)
        # Between two updates from the same answers a run could not continue.
        stopping = run.stop.reached() and step % config.grpo.updates == 0
        evaluating = step == total or due(step, config.eval.every)
        saving = stopping or step == total or due(step, config.checkpoint.every)
        sampling = step < total and due(step, config.eval.sample_every)
        if not (evaluating or saving or compiling or sampling):
            continue
        judge(run, state)  # before it is evaluated or saved
        if compiling:
            run.phases.begin("step", step)
        if step == start + 1:
            run.stop.saves = True
            run.metrics.say(f"first update after {time.perf_counter() - began:.1f} s")
        best, loss = run.meta["best_loss"], None
        if evaluating:
            loss = evaluate(run, state, step)  # a request to stop: saves, raises Stopped
            if not math.isfinite(loss):
                raise NotFinite(step, evaluated=True)
        if sampling:
            write_sample(run, state, step)
        if saving or (loss is not None and loss < best):
            save(run, state, step, loss)
            if step < total and not stopping:  # `finish` writes the last row of the ledger
                run.metrics.ledger(step)
        if stopping and step < total:
            raise Stopped(step)
    return state


def judge(run: Training, state: State, *dispatched: Any) -> None:
    """Judge the update dispatched last, or the one before it if that is given. Raises as `read`.

    After an update for which a process had no batch, the state is still the one before it; it is
    saved.
    """
    try:
        run.progress.dispatched(*dispatched) if dispatched else run.progress.read()
    except Unread as end:
        if end.step:
            save(run, state, end.step, None)
        raise


def next_batch(
    run: Training, batch_of: Source, state: State, step: int
) -> tuple[Batch, dict[str, Any]]:
    """Return the batch of update `step` and its figures.

    Raises Stopped, with the update before it saved, where the run is asked to stop while the model
    writes its answers; the next process writes them again. For a batch that cannot be read there
    is a void one, and among the figures the error: `judge` ends the run for all processes alike.
    """
    if run.config.goal == "reward":
        run.progress.read()  # answers wait for the update before anyway, and that is its own time
    try:
        return batch_of(state, step)
    except Interrupted:
        save(run, state, step - 1, None)
        raise Stopped(step - 1) from None
    except Exception as error:
        if run.config.goal == "reward":  # what was not drawn here cannot be made up for
            raise
        return void_batch(run.config, run.steps, step), {"unread": error}


def due(step: int, every: int) -> bool:
    """Tell whether what happens every `every` updates happens after `step`; 0 means never."""
    return every > 0 and step % every == 0


def evaluate(run: Training, state: State, step: int) -> float:
    """Write the evaluation row of `step` and return its loss, of a reward its negative.

    The row is written before any checkpoint of that step, so that the best one's loss is known.
    Raises Stopped when the run is asked to stop meanwhile, and Unread where a process cannot read
    its data; the next process evaluates again.
    """
    try:
        with run.phases("evaluation"):
            row = run.validate(state.swapped().params)
    except Interrupted:
        run.meta["evaluation_due"] = True
        save(run, state, step, None)
        raise Stopped(step) from None
    except Unreadable as error:
        run.meta["evaluation_due"] = True
        if step:
            save(run, state, step, None)
        raise Unread(step, error.why) from None
    goal, answers = run.config.goal, row.pop("answers", [])
    loss = run.config.as_goal(row[f"val/{goal}"])
    best = run.meta["best_loss"] = min(run.meta["best_loss"], loss)
    run.meta["evaluation_due"] = False
    run.metrics.evaluation({"step": step, **row, f"val/best_{goal}": run.config.as_goal(best)})
    run.metrics.answers(step, answers)
    return loss


def save(run: Training, state: State, step: int, loss: float | None) -> None:
    """Begin to save the state; `loss` makes it a candidate for the best checkpoint."""
    with run.phases("save"):
        stalled = run.checkpoints.save(state.swapped(), step, run.meta, loss)
    run.metrics.save_stalled(stalled)


def finish(run: Training, state: State, start: int, end: Ended | None) -> Exit:
    """Wait for the last save, say how the run has ended and write its last row.

    end: None when all updates are done. Returns the exit code.
    """
    config, metrics, checkpoints = run.config, run.metrics, run.checkpoints
    step, code = (end.step, end.code) if end else (config.optim.steps, Exit.DONE)
    with run.phases("save"):
        failure = checkpoints.wait()
    run.stop.saves = False
    if isinstance(end, Unread):
        code = unread(run, end)
        if failure:
            reports.not_saved(failure, checkpoints, metrics)
            code = Exit.FAILED
    elif isinstance(end, NotFinite):
        allowed = None if end.evaluated else config.run.skip_nonfinite
        reports.not_finite(step, allowed, checkpoints, metrics)
    elif failure or code == Exit.FAILED:
        reports.not_saved(failure, checkpoints, metrics)
        code = Exit.FAILED
    elif code == Exit.STOPPED:
        metrics.say(f"stopped on request after update {step}; the same command continues")
    else:
        write_sample(run, state, step)
        reports.finish(config, checkpoints, run.meta["best_loss"], metrics)
    if start < config.optim.steps:
        metrics.ledger(step)
        metrics.summary()
    if config.log.report and jax.process_index() == 0:
        reports.write_report(config, metrics)
    return code


def unread(run: Training, end: Unread) -> Exit:
    """Say which process could not read its data and why; return the exit code of that error."""
    ours = end.why and [socket.gethostname(), message_of(end.why), code_of(end.why)]
    if end.why and code_of(end.why) == Exit.FAILED:  # the program's fault, not the data's
        traceback.print_exception(end.why)
    every = gather("unread", ours, Deadline(run.config.run.deadline_save))
    index, (host, text, code) = next((i, said) for i, said in enumerate(every) if said)
    who = f"process {index} ({host}): " if len(every) > 1 else ""
    run.metrics.say(
        f"error: {who}{text}\nstopped; {run.checkpoints.last_good()}, from which the same "
        "command continues"
    )
    return Exit(code)


def write_sample(run: Training, state: State, step: int) -> None:
    """Show and keep what the model writes after update `step`, if it can.

    With rewards, evaluations show answers.
    """
    if run.config.goal == "reward":
        return
    with run.phases("sample"):
        if (text := sample(run, state.swapped().params)) is not None:
            run.metrics.sample(step, run.config.eval.sample_prompt, text)


def sample(run: Training, params: Any) -> str | None:
    """Return a text that the model writes after eval.sample_prompt; None where it says why not.

    With conversations it is an answer, without a prompt that to the first held-out question.
    A tokenizer may need the network or a package that only some processes have. All processes
    write together, so either all of them do or none does.
    """
    problem, prompt, shown = None, run.config.eval.sample_prompt, ""
    try:
        codec = tokenizer.load(run.meta["tokenizer"])
        if codec.marks and prompt:
            start = encode_prompt(codec, [{"role": "user", "content": prompt}])
        elif codec.marks and isinstance(val := run.datasets[0].val, PackedRows):
            start = held_out(val, 1)[0][0]
            shown = codec.decode(start, marks=True)
        elif prompt:
            start = prompt_ids(codec, prompt)
        else:
            start = codec.encode("\n") if codec.eot is None else np.array([codec.eot])
            start = start if start.size else np.zeros(1, np.int32)  # ids that stand for no text
    except Mistake as error:
        problem = str(error)
    problems = gather("sample", problem, Deadline(run.config.run.deadline_evaluation))
    if first := next(filter(None, problems), None):
        run.metrics.say(f"no sample: {first}")
        return None
    if not run.decoders:
        run.decoders.append(for_any_parameters(run.steps, Sampler(), codec.vocab_size))
    decode = run.decoders[0](params)
    longest = min(200, run.config.model.block_size)
    return shown + continuations(decode, codec, [start], max_new_tokens=longest)[0].text


if __name__ == "__main__":
    run_command(main)
else:  # a script or a notebook calls the module: scalegpt.train("demo")
    sys.modules[__name__].__class__ = scalegpt.CallableModule

"""The training loop: `python -m scalegpt.train --config configs/demo.yaml`.

Exit codes: 0 done; 2 the user's mistake; 3 stopped on request, state saved; 4 stopped on a
non-finite loss or gradient, nothing bad saved; 5 no checkpoint could be written for
checkpoint.patience, or the last one.
"""

import contextlib
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from scalegpt import (
    checkpoint,
    command_line,
    distributed,
    generate,
    pmap_step,
    run_folder,
    saving,
    sharding,
    tokenizer,
)
from scalegpt.ahead_of_time import compile_only
from scalegpt.config import Config
from scalegpt.data import Dataset, TrainBatches, check_tokens, open_dataset, train_iterator
from scalegpt.evaluate import validation
from scalegpt.flops import mfu_meter, parameter_count
from scalegpt.metrics import Metrics, Throughput
from scalegpt.resume import (
    check_same_run,
    initial_state,
    lock,
    open_to_save,
    stored_config,
    write_config,
)
from scalegpt.step import State, Steps

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
DONE, STOPPED, NOT_FINITE, NOT_SAVED = 0, 3, 4, 5


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "scalegpt.train", FLAGS)
    if flags.print_config:
        print(config.to_yaml(), end="")
        return DONE
    if flags.compile_only:
        if config.model.vocab_size is None:
            config = config.with_vocab(max(d.vocab_size for d in open_datasets(config)))
        compile_only(config, flags.compile_only)
        return DONE
    distributed.start(config.distributed)
    return train(config)


def train(config: Config) -> int:
    """A new run, or the continuation of the one in run.out_dir. Returns the exit code."""
    stop = distributed.StopRequest()
    is_main = jax.process_index() == 0
    datasets = open_datasets(config)
    config = config.with_vocab(max(d.vocab_size for d in datasets))
    mesh = sharding.make_mesh(config.mesh)
    steps = pmap_step.build_for_training(config, mesh)
    stored = stored_config(config, datasets[0].tokenizer)
    evaluate = validation(config, datasets, steps)
    in_use = lock(config) if is_main else None
    checkpoints = open_to_save(config)
    meta = {
        "config": config.model_dump(),
        "tokenizer": datasets[0].tokenizer,
        "data": {d.name: d.fingerprint for d in datasets},
        "best_loss": math.inf,
    }
    if (start := checkpoints.continue_from() or 0) > 0:
        meta["best_loss"] = check_same_run(config, meta, checkpoints.meta(start))
    notes: list[str] = []
    state = initial_state(config, steps, checkpoints, start, notes.append)
    resume_step = start if start else (-1 if stored else None)
    metrics = Metrics(
        config.run.out_dir,
        config.log,
        total_steps=config.optim.steps,
        resume_step=resume_step,
        is_main=is_main,
        config=meta["config"],
    )
    checkpoints.say = metrics.say
    try:
        # The mark of a run that may be continued comes after all that can refuse to start one.
        if is_main:
            write_config(config)
        metrics.say("\n".join([describe(config, datasets, steps), *notes]))
        return loop(
            config, datasets, steps, evaluate, checkpoints, meta, state, start, metrics, stop
        )
    finally:
        metrics.close()
        checkpoints.close()
        if is_main:
            with contextlib.suppress(Exception):  # rows since the last checkpoint: good to have
                run_folder.push(config.run.out_dir)
        if in_use:
            in_use.close()


def loop(
    config: Config,
    datasets: list[Dataset],
    steps: Steps,
    evaluate: Callable[[Any], dict[str, float]],
    checkpoints: checkpoint.Checkpoints,
    meta: dict[str, Any],
    state: State,
    start: int,
    metrics: Metrics,
    stop: distributed.StopRequest,
) -> int:
    """Updates `start` + 1 to optim.steps, and what happens every so many of them."""
    total, tokens_per_step = config.optim.steps, config.batch.sequences * config.model.block_size
    batches = batches_from(config, datasets, steps, start)
    device = jax.devices()[0].device_kind
    meter = mfu_meter(config.model, device, jax.device_count(), metrics.say)
    throughput = Throughput(meter)

    def report(done: int, values: dict[str, Any]) -> bool:
        """Read the metrics of update `done`; False when they are not finite."""
        row = {"step": done, **{key: float(value) for key, value in values.items()}}
        if not all(map(math.isfinite, (row["train/loss"], row["train/grad_norm"]))):
            metrics.train(row)
            return False
        if done == start + 1:
            throughput.start(done)
        if done % config.log.every == 0 or done in (start + 1, total):
            row["train/tokens"] = done * tokens_per_step
            metrics.train(row | throughput.read(done, tokens_per_step))
        return True

    def evaluation(done: int) -> float:
        """Validate; the loss is written before any checkpoint of the same step."""
        row = evaluate(state.params)
        meta["best_loss"] = min(meta["best_loss"], row["val/loss"])
        metrics.evaluation({"step": done, **row, "val/best_loss": meta["best_loss"]})
        return row["val/loss"]

    if start == 0:
        evaluation(0)
        meta["best_loss"] = math.inf  # of weights that nobody has trained
    if start < total:
        metrics.say("compiling the training step ...")
    pending, code, began = None, DONE, time.perf_counter()
    batch = next(batches) if start < total else None
    for done in range(start + 1, total + 1):
        state, values = steps.train(state, batch)
        # While the device computes this update: put the next batch there, then look at the last
        # update's numbers, so that nothing ever waits for this one.
        batch = next(batches) if done < total else None
        if pending and not report(*pending):
            return not_finite(pending[0], checkpoints, metrics)
        pending = (done, values)
        if (failure := checkpoints.failing) and failure.over:
            return not_saved(failure, checkpoints, metrics)
        leaving = stop.reached(done)
        last = done == total or leaving
        evaluate_now = done == total or _due(done, config.eval.every)
        save_now = last or _due(done, config.checkpoint.every)
        if done == start + 1 or evaluate_now or save_now:
            if not report(*pending):
                return not_finite(done, checkpoints, metrics)
            pending = None
        if done == start + 1:
            metrics.say(f"first update after {time.perf_counter() - began:.1f} s")
        if not (evaluate_now or save_now):
            continue
        throughput.pause()
        best, loss = meta["best_loss"], evaluation(done) if evaluate_now else None
        if loss is not None and not math.isfinite(loss):
            return not_finite(done, checkpoints, metrics)
        if save_now or (loss is not None and loss < best):
            checkpoints.save(state, done, meta, loss)
        throughput.resume()
        if leaving and done < total:
            code = STOPPED
            break
    if failure := checkpoints.wait():
        return not_saved(failure, checkpoints, metrics)
    if code == STOPPED:
        metrics.say(f"stopped on request after update {done}; the same command continues")
    else:
        finish(config, steps, checkpoints, meta, state, metrics)
    return code


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def open_datasets(config: Config) -> list[Dataset]:
    """Open and check every data set, preparing what is missing if the config says so."""
    datasets = []
    for path in config.data.weights:
        script = Path(path, "prepare.py")
        whole = all(Path(path, name).is_file() for name in ("train.bin", "val.bin", "meta.json"))
        if config.data.prepare and script.is_file() and not whole:
            if subprocess.run([sys.executable, str(script)]).returncode:
                raise ValueError(f"{script} could not prepare the data, see above")
        dataset = open_dataset(path, config.data.cache_dir)
        check_tokens(dataset, config.model.block_size)
        if datasets and dataset.tokenizer != datasets[0].tokenizer:
            raise ValueError(
                f"{dataset.name} and {datasets[0].name} have different tokenizers; "
                "prepare the data sets of a mixture with the same one"
            )
        if any(dataset.name == other.name for other in datasets):
            raise ValueError(
                f"two data sets of the mixture are both named {dataset.name}, as their folders "
                f"are; rename one, for val/{dataset.name}/loss is of one"
            )
        datasets.append(dataset)
    return datasets


def batches_from(config: Config, datasets: list[Dataset], steps: Steps, start: int) -> Any:
    """Yields the global batch [A, M, T+1] of each update from `start` on, already on the devices.

    A process reads the rows of its own devices only.
    """
    accumulation, microbatch = steps.layout
    rows = sharding.local_rows(steps.mesh, microbatch)
    source = TrainBatches(
        [d.train for d in datasets],
        list(config.data.weights.values()),
        config.model.block_size,
        config.run.seed,
        config.batch.sequences,
        accumulation,
        rows,
    )
    for batch in train_iterator(source, start, config.data.prefetch):
        yield sharding.to_global(batch, rows, steps.batch_sharding, microbatch)


def describe(config: Config, datasets: list[Dataset], steps: Steps) -> str:
    """What is about to run, for the person at the terminal."""
    devices, (accumulation, microbatch) = jax.devices(), steps.layout
    mesh = " x ".join(f"{a} {n}" for a, n in steps.mesh.shape.items() if n > 1) or "one device"
    tokens = config.batch.sequences * config.model.block_size
    text = ", ".join(f"{d.name} ({len(d.train):,} tokens)" for d in datasets)
    return "\n".join(
        [
            f"model    {parameter_count(config.model):,} parameters, {steps.model.dtype} products,"
            f" attention {steps.model.attention}",
            f"data     {text}",
            f"devices  {len(devices)} x {devices[0].device_kind}, {mesh}, {config.run.backend}",
            f"update   {tokens:,} tokens = {accumulation} x {microbatch} sequences of "
            f"{config.model.block_size}",
            f"run      {config.optim.steps:,} updates into {config.run.out_dir}",
        ]
    )


def finish(
    config: Config,
    steps: Steps,
    checkpoints: checkpoint.Checkpoints,
    meta: dict[str, Any],
    state: State,
    metrics: Metrics,
) -> None:
    """The end of a run: a sample, where things are, what to type next."""
    codec = tokenizer.load(meta["tokenizer"])
    text = generate.sample(steps, state.params, codec, min(200, config.model.block_size))
    best, out_dir = checkpoints.find("best"), shlex.quote(config.run.out_dir)
    metrics.say(f"--- a sample ---\n{text}\n----------------")
    metrics.say(
        f"done: best val loss {meta['best_loss']:.4f} at step {best}; metrics in "
        f"{out_dir}/metrics.jsonl\nnext:\n"
        f'  python -m scalegpt.generate --run {out_dir} --prompt "..."\n'
        f"  python -m scalegpt.evaluate --run {out_dir}"
    )


def not_finite(done: int, checkpoints: checkpoint.Checkpoints, metrics: Metrics) -> int:
    """A loss or the gradient of update `done` is NaN or infinite: leave, with nothing bad saved."""
    checkpoints.wait()
    metrics.say(
        f"error: loss or gradient of update {done} is not finite; stopped; "
        f"{checkpoints.last_good()} in {checkpoints.folder}. A lower optim.lr or a longer warm-up "
        "may help"
    )
    return NOT_FINITE


def not_saved(
    failure: saving.Failure, checkpoints: checkpoint.Checkpoints, metrics: Metrics
) -> int:
    """Nothing that is computed here can be kept: leave."""
    metrics.say(
        f"error: no checkpoint could be written for {time.time() - failure.since:.0f} s: "
        f"{failure.reason}; stopped; {checkpoints.last_good()} in {checkpoints.folder}, from which "
        "the same command continues"
    )
    return NOT_SAVED


if __name__ == "__main__":
    command_line.run(main)

"""Tell the person at the terminal what a run does, besides its rows of metrics."""

import contextlib
import json
import math
import shlex
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.checkpoints.writing import Failure
from scalegpt.config import Config
from scalegpt.config.differences import unread
from scalegpt.config.recipe import ModelConfig, muons
from scalegpt.data.batches import rows_together, train_order
from scalegpt.data.datasets import training_texts, windows_of
from scalegpt.data.token_files import Dataset
from scalegpt.data.tokenizer import kind
from scalegpt.errors import counted
from scalegpt.files import run_folder
from scalegpt.model.flops import flops_per_token, peak_flops
from scalegpt.model.lora import is_adapter, is_trained, parted
from scalegpt.model.parameters import parameters
from scalegpt.processes.command import python
from scalegpt.run.curves import text_plot
from scalegpt.run.history import read_history, read_rows
from scalegpt.run.metrics import Metrics
from scalegpt.run.page import NAME, write_page
from scalegpt.step.build import Steps
from scalegpt.step.optimizer import decay_mask


def describe(config: Config, datasets: list[Dataset], steps: Steps) -> str:
    """Describe what is about to run, in a few lines, and warn of a run that makes little sense."""
    devices, (accumulation, microbatch) = jax.devices(), steps.layout
    where = [f"{len(devices)} x {devices[0].device_kind}"]
    if jax.process_count() > 1:
        where.append(f"{jax.process_count()} processes")
    if axes := " x ".join(f"{a} {n}" for a, n in steps.mesh.shape.items() if n > 1):
        where.append(f"mesh {axes}")
    where += [config.run.backend] if config.run.backend != "jit" else []
    tokens = counted(config.batch.sequences * config.row_width, "token")
    sizes = ", ".join(
        f"{d.name} ({counted(len(d.train), 'token') if d.kind == 'text' else d.train})"
        for d in datasets
    )
    parts = f", {microbatch} at a time" if accumulation > 1 else ""
    growth = sorted((at, n) for at, n in config.batch.growth.items() if at <= config.optim.steps)
    later = "".join(f"; from update {update:,} on {counted(n, 'sequence')}" for update, n in growth)
    total = config.batch.rows_after(config.optim.steps) * config.row_width
    passes = epochs(config, datasets, config.optim.steps)
    recipe = depth_line(config), muon_line(config), unread_line(config)
    return "\n".join(
        [
            *[f"recipe   {line}" for line in recipe if line],
            f"model    {steps.parameters:,} parameters, matrix products in {steps.model.dtype},"
            f" attention by {steps.model.attention}" + _apart(config, datasets),
            *_lora_lines(config, steps),
            *_objective_lines(config),
            f"data     {sizes}, tokenizer {kind(datasets[0].tokenizer)}, vocabulary of "
            f"{max(d.vocab_size for d in datasets):,}",
            *_row_lines(config, datasets),
            f"devices  {', '.join(where)}",
            f"decay    weight decay {config.optim.weight_decay:g} on {_decaying(config, steps)}",
            f"update   {tokens}: {counted(config.batch.sequences, 'sequence')} of "
            f"{config.row_width}{parts}{later}",
            f"run      {counted(config.optim.steps, 'update')}, {counted(total, 'token')}, "
            + ", ".join(f"{_times(n)} epochs of {name}" for name, n in passes.items()),
            f"folder   {config.run.out_dir}",
            *advice(config, passes, *least_seconds(config)),
        ]
    )


def _apart(config: Config, datasets: list[Dataset]) -> str:
    def kept(model: ModelConfig) -> str:
        if not model.begins_in_batch:
            return "within each conversation" if model.isolate else "across documents"
        without = [d.name for d in datasets if d.train_ends is None or d.val_ends is None]
        if len(without) == len(datasets):
            return "within each document, by end-of-text marks"
        others = f", in {', '.join(without)} by end-of-text marks" if without else ""
        return f"within each document, by its index{others}"

    model, evaluated = config.model, config.evaluated_model
    line = f" {kept(model)}" if model.isolate else ""
    same = evaluated.begins_in_batch == model.begins_in_batch
    return line if same else f"{line}, in evaluations {kept(evaluated)}"


def _row_lines(config: Config, datasets: list[Dataset]) -> list[str]:
    """Say how well documents fit into rows; [] for windows."""
    if config.objective.name != "text" or config.data.pack == "windows":
        return []
    figures = [text.shares() for text in training_texts(config, datasets)]
    return [
        f"rows     {d.name}: of the documents that fit into a row, about {cut:.1%} are cut; "
        f"{left_out:.1%} of the text is left out"
        for d, (cut, left_out) in zip(datasets, figures, strict=True)
    ]


def epochs(config: Config, datasets: list[Dataset], step: int) -> dict[str, float]:
    """Return how often the updates 1 to `step` read each data set, by its name."""
    rows, length = config.examples_after(step), config.row_width
    return {
        d.name: rows * weight / rows_together(d.train) / train_order(d.train, length, 0).n_windows
        for d, weight in zip(datasets, config.data.weights.values(), strict=True)
    }


def least_seconds(config: Config) -> tuple[float, str]:
    """Return the seconds that a run takes at least on the devices that JAX has, and at which speed.

    They are 0 on a device whose peak is not known.
    """
    devices, tokens = jax.devices(), config.batch.rows_after(config.optim.steps)
    flops = tokens * config.row_width * flops_per_token(config.model)
    rate, whose = 1e12, "about what a fast CPU does"
    if devices[0].platform != "cpu":
        rate = len(devices) * (peak_flops(devices[0].device_kind) or math.inf)
        whose = "the peak of these devices"
    return flops / rate, f"({flops:.1e} FLOPs at {rate / 1e12:,.0f} TFLOP/s, {whose})"


def advice(config: Config, passes: dict[str, float], seconds: float, speed: str) -> list[str]:
    """Warn of a run that reads its data hundreds of times, or takes too long for its devices, and
    name a run to begin from; [] for one that makes sense.

    passes: as `epochs` returns. seconds: how long the run takes at this speed.
    """
    on_cpu = jax.default_backend() == "cpu"
    faults = [f"reads {name} {_times(n)} times" for name, n in passes.items() if n >= 100]
    if seconds >= (1 if on_cpu else 60) * 86400:
        faults.append(f"takes {span(seconds)} {speed}")
    if not faults:
        return []
    path, out_dir = config.data.path, shlex.quote(f"{config.run.out_dir}_small")
    data = f" --data.path={shlex.quote(path)}" if isinstance(path, str) else ""
    return [
        f"warning: this run {' and '.join(faults)}",
        "  lower optim.steps, or begin with a small run:",
        f"  {python()} -m scalegpt.train --config {'demo' if on_cpu else 'shakespeare_char'}{data} "
        f"--run.out_dir={out_dir}",
    ]


def pace(config: Config, step: int, seconds: float) -> str:
    """Say how long the updates after `step` take at the speed of the first ones."""
    left = config.optim.steps - step
    line = f"pace     about {span(seconds)} for the {counted(left, 'update')} to come"
    warned = advice(config, {}, *least_seconds(config))  # at the start
    return "\n".join([line, *([] if warned else advice(config, {}, seconds, "at this pace"))])


def span(seconds: float) -> str:
    """Return a length of time in the largest unit that it has two of, as 90 minutes or 7 years."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _times(n: float) -> str:
    return f"{n:,.0f}" if n >= 10 else f"{n:.2f}"


def _lora_lines(config: Config, steps: Steps) -> list[str]:
    """Say what is trained instead of the weights; [] without LoRA."""
    if not config.lora.rank:
        return []
    adapters = parted(steps.abstract.params, is_adapter)[0]
    count = sum(x.size for x in jax.tree.leaves(adapters))
    marks = " and the embeddings of a chat's marks" if config.lora.marks is not None else ""
    return [f"lora     rank {config.lora.rank}: {count:,} parameters{marks} are trained instead"]


def _objective_lines(config: Config) -> list[str]:
    """Say what the figures of pairs and of rewards mean; [] for an objective that has neither."""
    grpo = config.grpo
    lines = {
        "dpo": "margin   what a chosen answer gains on its rejected one, against the model at the "
        "start: from 0 up",
        "grpo": f"reward   {grpo.reward}, of {counted(grpo.samples, 'answer')} to each of "
        f"{counted(grpo.prompts, 'prompt')}; a prompt is silent where all of its rewards are equal",
    }
    return [lines[name]] if (name := config.objective.name) in lines else []


def _decaying(config: Config, steps: Steps) -> str:
    """Say how many tensors and parameters weight decay shrinks, each layer's tensors apart."""
    params = parted(steps.abstract.params, partial(is_trained, config.lora))[0]
    known = parameters(config.model, config.lora)
    marks = jax.tree.leaves(decay_mask(config.optim, known)(params))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = [(x.shape[0] if path[0].key == "h" else 1, x.size) for path, x in leaves]
    decaying = [tensor for tensor, decays in zip(tensors, marks, strict=True) if decays]
    share = sum(size for _, size in decaying) / sum(size for _, size in tensors)
    counts = (sum(count for count, _ in group) for group in (decaying, tensors))
    return "{} of {} tensors, {:.1%} of the parameters".format(*counts, share)


def depth_line(config: Config) -> str:
    """Name what followed from model.depth; "" without it."""
    c, o = config.model, config.optim
    if not c.depth:
        return ""
    rates = [
        f"{key} {value:g}"
        for key in ("lr", "embedding_lr", "head_lr", "scalar_lr")
        if (value := getattr(o, key)) is not None
    ]
    tokens = config.batch.rows_after(o.steps) * config.row_width
    return (
        f"depth {c.depth}: {counted(c.n_layer, 'layer')}, {c.n_embd} wide, "
        f"{counted(c.n_head, 'head')}; {o.name}, "
        f"{', '.join(rates)}, weight_decay {o.weight_decay:g}, {o.steps:,} updates of "
        f"{config.batch.sequences} sequences, {tokens:,} tokens"
    )


def muon_line(config: Config) -> str:
    """Name the settings that differ from Muon's own, if any: AdamW's rates are too low for Muon."""
    optim = config.optim
    if optim.name != "muon" or config.model.depth:
        return ""
    differing = [
        f"{key} {getattr(optim, key)} (its own: {value})"
        for key, value in muons(config.model.model_dump()).items()
        if getattr(optim, key) != value
    ]
    return f"muon with {', '.join(differing)}; null gives its own" if differing else ""


def unread_line(config: Config) -> str:
    """Name the keys that were given and that nothing reads with the other keys; "" for none."""
    muons_own = muons(config.model.model_dump()) if config.optim.name == "muon" else {}
    given = []
    for name, why in unread(config).items():
        section, key = name.split(".")
        values = getattr(config, section)
        default = muons_own.get(key, type(values).model_fields[key].default)
        derived = config.model.depth and key in ("head_lr", "scalar_lr")
        if (value := getattr(values, key)) != default and not derived:
            given.append(f"{name}={value} ({why})")
    return f"not read: {', '.join(given)}" if given else ""


def finish(config: Config, checkpoints: Checkpoints, best_loss: float, metrics: Metrics) -> None:
    """Say at the end of a run where its results are and what to type next."""
    best, out_dir = checkpoints.find("best"), shlex.quote(config.run.out_dir)
    project = shlex.quote(config.log.wandb_project)
    if metrics.on_terminal and (plot := text_plot(read_rows(metrics.folder))):
        metrics.say(plot)
    of_text = config.objective.name in ("text", "sft")  # pairs and prompts have no loss over text
    use = f'generate --run {out_dir} --prompt "..."'
    if config.objective.name != "text":
        use = f"chat --run {out_dir}"
    metrics.say(
        f"done: best val {config.goal} {config.as_goal(best_loss):.4f} at step {best}; metrics in "
        f"{out_dir}/metrics.jsonl\nnext:\n"
        f"  {python()} -m scalegpt.{use}\n"
        + (f"  {python()} -m scalegpt.evaluate --run {out_dir}\n" if of_text else "")
        + f"  {python()} -m scalegpt.report {out_dir}"
        + (f"\n  {python()} -m trackio.cli show --project {project}" if config.log.trackio else "")
    )


def write_report(config: Config, metrics: Metrics) -> None:
    """Write the run's page into its folder, in process 0; a fault is a warning, not an end."""
    out_dir = config.run.out_dir
    try:
        run_folder.push(out_dir)  # a bucket has the metrics as of the last checkpoint
        write_page(f"{out_dir}/{NAME}", [read_history(out_dir)])
        metrics.say(f"report in {out_dir}/{NAME}")
    except Exception as error:  # of drawing or of a bucket: no reason for another exit code
        metrics.say(f"warning: no report: {type(error).__name__}: {error}")


def bad_update(
    config: Config, datasets: list[Dataset], step: int, values: dict[str, Any], metrics: Metrics
) -> None:
    """Warn of an update whose loss or gradient is not finite, or whose loss is a spike. For a
    post-mortem, the windows of text that it saw and its gradient norms go to the run's folder."""
    loss, norm = float(values["train/loss"]), float(values["train/grad_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
        what = (
            f"warning: loss {loss:.4f} of update {step} is {float(values['train/spike']):.1f} "
            f"deviations above the last ones"
        )
        what += ", the update is left out" if config.run.skip_spikes else ""
    else:
        what = (
            f"warning: update {step} is not finite (loss {loss:.4f}, gradient norm {norm:.4g}),"
            " it is not applied"
        )
    norms = {name: np.asarray(x).tolist() for name, x in values["norms"].items()}
    worst = _worst(by_layer(norms))
    windows = windows_of(config, datasets, step)
    shown = ", ".join(f"{name}:{start}" for name, start in windows[:4])
    more = f", and {len(windows) - 4} more" if len(windows) > 4 else ""
    metrics.say(
        f"{what}\n  windows (data set:first token) {shown}{more}; gradient norms {worst}\n"
        f"  all in {config.run.out_dir}/{run_folder.BAD_UPDATES}; the loss of each example: the "
        f"same command with --run.replay={step}"
    )
    row = {"step": step, "loss": loss, "grad_norm": norm, "windows": windows, "norms": norms}
    # A full disk does not end the run here; the writers of metrics and checkpoints warn of it.
    if jax.process_index() == 0:
        path = run_folder.local(config.run.out_dir) / run_folder.BAD_UPDATES
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")  # NaN and Infinity as in Python's json


def by_layer(norms: dict[str, Any]) -> dict[str, float]:
    """Name the norms of `health.layer_norms` by parameter and layer, as h3/attn/qkv_kernel."""
    flat = {}
    for name, x in norms.items():
        values = np.asarray(x).tolist()
        layers = enumerate(values) if isinstance(values, list) else [(None, values)]
        flat |= {name.replace("h/", f"h{i}/", 1) if i is not None else name: v for i, v in layers}
    return flat


def _worst(flat: dict[str, float]) -> str:
    """List the largest gradient norms of `by_layer`; those not finite come first."""
    ordered = sorted(flat.items(), key=lambda x: -x[1] if math.isfinite(x[1]) else -math.inf)
    bad = sum(not math.isfinite(v) for v in flat.values())
    more = f" ({bad} of {len(flat)} not finite)" if bad else ""
    return ", ".join(f"{name} {v:.3g}" for name, v in ordered[:3]) + more


def not_finite(step: int, allowed: int | None, checkpoints: Checkpoints, metrics: Metrics) -> None:
    """Say that the run stops: loss or gradient of more than `allowed` updates was not finite.

    allowed: None where it was the loss of the evaluation after `step`.
    """
    what, how = f"the validation loss after update {step}", ""
    if allowed is not None:
        what = f"loss or gradient of update {step}"
        how = "; to go on without such updates: --run.skip_nonfinite=N leaves out up to N of the "
        how += f"whole run ({allowed} now)"
    metrics.say(
        f"error: {what} is not finite; stopped; {checkpoints.last_good()} in "
        f"{checkpoints.folder}. A lower optim.lr or a longer warm-up may help{how}"
    )


def not_saved(failure: Failure | None, checkpoints: Checkpoints, metrics: Metrics) -> None:
    """Say that the run stops as it could not save. failure: None if the last save went well."""
    why = f" for {time.time() - failure.since:.0f} s: {failure.reason}" if failure else ""
    metrics.say(
        f"error: no checkpoint could be written{why}; stopped; {checkpoints.last_good()} in "
        f"{checkpoints.folder}, from which the same command continues"
    )

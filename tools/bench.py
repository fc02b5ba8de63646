"""This tool measures how fast a run trains here, alone or against other programs.

    python tools/bench.py --config configs/demo.yaml [--section.key=value ...]
    python tools/bench.py --config configs/shakespeare_char_cpu.yaml --model.vocab_size=65 \\
        --against nanogpt=../nanoGPT --rounds 10 --steps 50
    python tools/bench.py --config configs/gpt2_124m.yaml --profile out/trace
    python tools/bench.py --config configs/gpt2_124m.yaml --decode 1 16 64 --against transformers

Updates are made by the step and the input pipeline of scalegpt.train, on random tokens, so that no
data set is needed. In each round every trainer makes --steps updates, one trainer after the other,
and the next round reverses the order. A machine that slows down slows all trainers, so the ratios
of a round mean something even where its times do not.

step       seconds of an update, the mean of a turn: median, least and most over all turns
tokens/s   tokens of an update / its median time
MFU        model FLOPs over the peak of the devices, attention counted causally, and in full as
           nanoGPT and PaLM count it; TFLOP/s where no peak is known, as on a CPU
compile    the first update less a median one, with no cache of compiled programs
dispatch   seconds of an update in which the host dispatches it; a CPU may compute meanwhile
data       seconds of an update in which the host waits for its batch
memory     the peak of a device, or of the process where the device does not tell

The programs of --against train the same shapes by their own code. nanogpt=DIR and transformers do
in PyTorch, with nanoGPT's optimizer and clipping: in float32 on a CPU, as nanoGPT does, and in this
run's precision on a GPU. nanogpt-jax=DIR, gpt-jax=DIR and nanodo=DIR do in JAX, each by its own
training step, in this run's precision, on all devices that JAX has by itself: on a CPU one, where
scalegpt makes two, unless JAX_NUM_CPU_DEVICES says how many both have. All hold as many sequences
at a time as batch.microbatch says, and all at once where it is not set. What one does otherwise is
said.

Where other programs kept more than a tenth of this machine's cores busy meanwhile, figures are
shown, but no verdict.

With --decode nothing is trained: random weights continue random prompts of 16 tokens, several texts
at a time, as scalegpt.generate does, and as the `generate` of --against does.
"""

import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from benchmarks import decoding, profiling, programs

from scalegpt.config import Config, command_line
from scalegpt.config.loading import NO_RUN
from scalegpt.data.datasets import open_datasets, resolved
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.model import flops
from scalegpt.planning.plans import with_vocabulary
from scalegpt.processes.command import run_command
from scalegpt.run.feed import batches_from
from scalegpt.run.ledger import cpu_seconds
from scalegpt.run.resume import with_model
from scalegpt.step import build_for_training, cpu_devices, sharding
from scalegpt.step.build import Steps, build_for_use

FLAGS = {
    "--against": {
        "action": "append",
        "default": [],
        "metavar": "WHAT",
        "help": "nanogpt=DIR, nanogpt-jax=DIR, gpt-jax=DIR or nanodo=DIR, a checkout, or "
        "transformers; may be repeated",
    },
    "--their-mode": {"choices": programs.MODES, "help": "of PyTorch (default: both)"},
    "--their-microbatch": {"type": int, "metavar": "N", "help": "sequences they hold at a time"},
    "--their-dtype": {"choices": ("float32", "bfloat16"), "help": "of their products"},
    "--rounds": {"type": int, "default": 5, "help": "turns of each trainer (default 5)"},
    "--steps": {"type": int, "help": "updates of a turn (default 10), or tokens of a text (128)"},
    "--decode": {"type": int, "nargs": "+", "metavar": "TEXTS", "help": "write so many at a time"},
    "--real-data": {"action": "store_true", "help": "the run's data set instead of random tokens"},
    "--profile": {"metavar": "DIR", "help": "trace one more turn, and print what is costliest"},
    "--json": {"action": "store_true", "help": "print one JSON object"},
}
RANDOM_TOKENS = 2**21  # the least size of the random data set
BUSY = 0.1  # share of this machine's cores that other programs may have, for a verdict
COLUMNS = f"{'':20} {'tokens/s':>10} {'step ms: median':>16} {'least':>9} {'most':>9}"


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/bench.py", FLAGS, NO_RUN)
    flags.steps = (128 if flags.decode else 10) if flags.steps is None else flags.steps
    check(config, flags)
    config = with_model(config)
    jax.config.update("jax_enable_compilation_cache", False)
    # Otherwise JAX takes most of a GPU's memory at once, and leaves none to torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not flags.decode:
        cpu_devices.choose(config)
    if flags.profile:
        profiling.check(flags.profile)
    if flags.real_data:
        datasets = open_datasets(config)
        config = resolved(config, datasets)
    else:
        config, _ = with_vocabulary(config)
        datasets = [random_tokens(config)]
    if flags.decode:
        return show(measure_decoding(config, flags), flags, decoding.table)
    return show(measure_training(config, flags, datasets), flags, tables)


def check(config: Config, flags: Namespace) -> None:
    """Raise Mistake for flags that make no sense, alone or together."""
    for name in ("rounds", "steps", "decode", "their_microbatch"):
        if (value := getattr(flags, name)) is not None and np.min(value) < 1:
            raise Mistake(f"--{name.replace('_', '-')}={value} must be at least 1")
    names = ("their_mode", "their_microbatch", "their_dtype", "profile", "real_data")
    for name in (name for name in names if getattr(flags, name) not in (None, False)):
        if name.startswith("their") and not flags.against:
            raise Mistake(f"--{name.replace('_', '-')} is for a trainer of --against")
        if flags.decode and name != "their_dtype":
            raise Mistake(f"--decode does not go with --{name.replace('_', '-')}")
    if config.objective.name == "grpo" and not flags.decode:
        raise Mistake(
            "objective.name=grpo writes answers before it learns, which is not timed here: "
            "--decode times the writing, and a run's own rows have time/rollout and time/step"
        )
    if config.objective.name == "dpo" and not (flags.decode or flags.real_data):
        raise Mistake("objective.name=dpo learns from pairs, not random tokens: add --real-data")
    data = config.data
    documents = data.document_mask or {data.shuffle, data.pack} != {"windows"}
    if documents and not flags.real_data:
        raise Mistake("random tokens have no documents, which data asks for: add --real-data")
    for trainer in flags.against:
        programs.check(trainer, config, bool(flags.decode))


def measure_decoding(config: Config, flags: Namespace) -> dict[str, Any]:
    steps = build_for_use(config, sharding.make_mesh(config.mesh), 1)
    others = settings_of_programs(config, flags, steps)
    figures = decoding.measure(config, flags, others, turns)
    return {**about(config, steps), **figures}


def measure_training(config: Config, flags: Namespace, datasets: list[Dataset]) -> dict[str, Any]:
    batch = config.batch.model_copy(update={"growth": {}})  # every update that is timed is alike
    config = config.model_copy(update={"batch": batch})
    steps = build_for_training(config, sharding.make_mesh(config.mesh))
    trainers: list[Any] = []
    try:
        for settings in settings_of_programs(config, flags, steps):
            trainers.append(programs.Child(settings))
        trainers.insert(0, Trainer(steps, batches_from(config, datasets, steps, 0)))
        blocks, busy = turns(trainers, flags.rounds, flags.steps)
        report = {**summary(config, trainers, blocks), "others_cpu": busy}
        if flags.profile:
            report["operations"] = profiling.trace(trainers[0], flags.steps, flags.profile)
        return report
    finally:
        for trainer in trainers:
            trainer.close()


def show(report: dict[str, Any], flags: Namespace, table: Callable) -> int:
    report["verdict"] = report["others_cpu"] <= BUSY
    print(json.dumps(report, indent=2) if flags.json else table(report))
    if not (report["verdict"] or flags.json):
        print(
            f"no verdict: other programs kept {report['others_cpu']:.0%} of this machine's cores "
            f"busy meanwhile, and more than {BUSY:.0%} may turn a ratio around"
        )
    return 0


def random_tokens(config: Config) -> Dataset:
    vocab, size = config.model.vocab_size, max(RANDOM_TOKENS, 4 * config.model.block_size)
    ids = np.random.default_rng(0).integers(0, vocab, size, np.uint32)
    return Dataset("random", "none", vocab, ids, ids, None, "random")


class Trainer:
    """scalegpt trains the run on all devices; the constructor compiles and makes one update."""

    name = "scalegpt"

    def __init__(self, steps: Steps, batches: Iterator[jax.Array]) -> None:
        self.steps, self.batches, self.state = steps, batches, steps.init()
        jax.block_until_ready(self.state)
        leaves = jax.tree.leaves(self.state.params)
        self.built = {"parameters": sum(x.size for x in leaves)}
        self.built["first"] = self.block(1)["seconds"]

    def close(self) -> None:
        self.batches.close()  # ends the thread that reads ahead

    def block(self, updates: int) -> dict[str, Any]:
        """Measure seconds of an update, of its dispatch and of its wait for data, and peak bytes.

        As in training, an update's loss is read after the next update has been dispatched.
        """
        dispatch, data, pending, began = 0.0, 0.0, None, time.perf_counter()
        for _ in range(updates):
            waiting = time.perf_counter()
            batch = next(self.batches)
            ready = time.perf_counter()
            self.state, metrics = self.steps.train(self.state, batch)
            data, dispatch = data + ready - waiting, dispatch + time.perf_counter() - ready
            if pending is not None:
                float(pending)
            pending = metrics["train/loss"]
        float(pending)
        seconds = time.perf_counter() - began
        stats = [d.memory_stats() for d in self.steps.mesh.local_devices]
        peak = max(s["peak_bytes_in_use"] for s in stats) if all(stats) else programs.rss()
        times = {"seconds": seconds, "dispatch": dispatch, "data": data}
        return {key: value / updates for key, value in times.items()} | {"memory": peak}


def settings_of_programs(config: Config, flags: Namespace, steps: Steps) -> list[dict[str, Any]]:
    """Return the settings of each program of --against. Raises Mistake where it cannot run."""
    mesh, model, optim = steps.mesh, config.model, config.optim
    platform, sequences = mesh.devices.flat[0].platform, config.batch.sequences
    shape = {
        key: getattr(model, key)
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    }
    if shape["vocab_size"] == 50257:
        shape["vocab_size"] = 50304  # as nanoGPT's train.py does, and the others' defaults are
    all_settings = []
    for against in flags.against:
        name, _, folder = against.partition("=")
        program = programs.PROGRAMS[name]
        if platform == "tpu" or (platform != "cpu" and mesh.size > 1 and not program.jax):
            raise Mistake(
                f"--against={against} runs on a CPU or on "
                f"{'GPUs' if program.jax else 'one GPU'}, not on {mesh.size} x {platform}; "
                "CUDA_VISIBLE_DEVICES=0 leaves one"
            )
        rows = flags.their_microbatch or config.batch.microbatch or sequences
        if sequences % rows:
            raise Mistake(f"--their-microbatch={rows} does not divide batch.sequences={sequences}")
        own_dtype = "float32" if platform == "cpu" and not program.jax else str(steps.model.dtype)
        modes = [flags.their_mode] if flags.their_mode else programs.MODES
        settings = {
            "program": name,
            "folder": str(Path(folder, program.root).resolve()),
            "differs": programs.differences(name, config),
            "shape": shape,
            "activation": model.activation,
            "microbatches": sequences // rows,
            "rows": rows,
            "gpu": platform != "cpu",
            "dtype": flags.their_dtype or own_dtype,
            "optim": {
                "lr": optim.lr,
                "betas": (optim.beta1, optim.beta2),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "grad_clip": optim.grad_clip,
            },
        }
        modes = [None] if program.jax else ["eager"] if flags.decode else modes
        all_settings += [{**settings, "mode": mode} for mode in modes]
    return all_settings


def turns(
    trainers: list[Any], rounds: int, updates: int
) -> tuple[list[list[dict[str, Any]]], float]:
    """Return each trainer's figures by round, and the share of all cores that others had meanwhile.

    The figures are [round][trainer]. A round of warm-up is left out.
    """
    figures: list[list[dict[str, Any]]] = []
    children = [child.pid for child in psutil.Process().children()]
    for turn in range(rounds + 1):
        if turn == 1:
            before = cpu_seconds(*children)
        order = range(len(trainers)) if turn % 2 else reversed(range(len(trainers)))
        by_trainer = {i: trainers[i].block(updates) for i in order}
        figures.append([by_trainer[i] for i in range(len(trainers))])
    cores, others = (x - y for x, y in zip(cpu_seconds(*children), before, strict=True))
    return figures[1:], max(0.0, others) / max(cores, 1e-9)


def summary(
    config: Config, trainers: list[Any], blocks: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Summarise all turns; `ratio` is scalegpt's tokens/s over the other trainer's."""
    steps, batch = trainers[0].steps, config.batch
    device, tokens = steps.mesh.devices.flat[0], batch.sequences * config.model.block_size
    peak = flops.peak_flops(device.device_kind, str(steps.model.dtype))
    rows = []
    for i, trainer in enumerate(trainers):
        own_blocks = [turn[i] for turn in blocks]
        seconds = [block["seconds"] for block in own_blocks]
        median = statistics.median(seconds)
        row = {"name": trainer.name, "parameters": trainer.built["parameters"]}
        row["tokens_per_second"] = tokens / median
        row["step_seconds"] = {"median": median, "least": min(seconds), "most": max(seconds)}
        row["flops_per_second"] = {
            kind: flops.flops_per_token(config.model, kind == "causal") * tokens / median
            for kind in ("causal", "full")
        }
        row["mfu"] = peak and {
            kind: rate / peak / steps.mesh.size for kind, rate in row["flops_per_second"].items()
        }
        row["compile_seconds"] = max(0.0, trainer.built["first"] - median)
        row["peak_memory_bytes"] = max(block["memory"] for block in own_blocks)
        if i == 0:
            for key in ("dispatch", "data"):
                row[f"{key}_seconds"] = statistics.median(block[key] for block in own_blocks)
        else:
            pairs = [turn[i]["seconds"] / turn[0]["seconds"] for turn in blocks]
            row["ratio"] = {"pairs": pairs, "median": statistics.median(pairs)}
            row["differs"] = trainer.differs
            if trainer.built["devices"] != steps.mesh.size:
                row["differs"] = [f"devices={trainer.built['devices']}", *trainer.differs]
        rows.append(row)
    layout = {"sequences": batch.sequences, "accumulation": steps.layout[0], "tokens": tokens}
    return {**about(config, steps), "batch": layout, "trainers": rows}


def about(config: Config, steps: Steps) -> dict[str, Any]:
    """Describe the model that was measured, and the devices."""
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    kind = steps.mesh.devices.flat[0].device_kind
    return {
        "model": {key: getattr(config.model, key) for key in keys},
        "devices": {"kind": kind, "count": steps.mesh.size},
        "dtype": str(steps.model.dtype),
        "attention": steps.model.attention,
    }


def tables(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    shape, batch, devices = (report[key] for key in ("model", "batch", "devices"))
    ours, *others = report["trainers"]
    lines = [
        f"{batch['tokens']:,} tokens an update: {batch['sequences']} x {shape['block_size']}, "
        f"accumulation {batch['accumulation']}; {shape['n_layer']} layers, {shape['n_embd']} wide, "
        f"{shape['n_head']} heads, vocabulary {shape['vocab_size']}",
        f"scalegpt in {report['dtype']} on {devices['count']} x {devices['kind']}, "
        f"attention {report['attention']}",
        COLUMNS,
    ]
    for row in report["trainers"]:
        times = [f"{1e3 * row['step_seconds'][key]:,.2f}" for key in ("median", "least", "most")]
        cells = f"{times[0]:>16} {times[1]:>9} {times[2]:>9}"
        lines.append(f"{row['name']:20} {row['tokens_per_second']:10,.0f} {cells}")
    for row in report["trainers"]:
        counts = row["mfu"] or row["flops_per_second"]
        shown = {
            k: f"{v:.1%} MFU" if row["mfu"] else f"{v / 1e12:.4f} TFLOP/s"
            for k, v in counts.items()
        }
        lines.append(
            f"{row['name']:20} {shown['causal']} (attention in full: {shown['full']}), "
            f"compile {row['compile_seconds']:.1f} s, "
            f"memory {row['peak_memory_bytes'] / 2**20:,.0f} MiB"
        )
    lines.append(
        f"an update of scalegpt: dispatch {1e3 * ours['dispatch_seconds']:.2f} ms, "
        f"waiting for data {1e3 * ours['data_seconds']:.2f} ms"
    )
    for row in others:
        pairs = " ".join(f"{ratio:.2f}" for ratio in row["ratio"]["pairs"])
        verdict = f"{row['ratio']['median']:.2f} x the speed of" if report["verdict"] else "beside"
        lines.append(f"{verdict} {row['name']}  ({pairs})")
        if row["differs"]:
            lines.append(f"  {row['name']} has {'; '.join(row['differs'])}")
    if "operations" in report:
        lines.append("the costliest operations, ms of an update over all devices")
        lines += [
            f"{1e3 * op['seconds']:10.3f}  {op['name']:32} {op['place'][-60:]}"
            for op in report["operations"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)

"""How fast a run trains here, alone or against nanoGPT or transformers, turn by turn.

    python tools/bench.py --config configs/demo.yaml [--section.key=value ...]
    python tools/bench.py --config configs/shakespeare_char_cpu.yaml --model.vocab_size=65 \\
        --against nanogpt=../nanoGPT --rounds 10 --steps 50
    python tools/bench.py --config configs/gpt2_124m.yaml --profile out/trace
    python tools/bench.py --config configs/gpt2_124m.yaml --decode 1 16 64 --against transformers

Updates by the step and the input pipeline of scalegpt.train, on random tokens, so that no data set
is needed. In each round every trainer makes --steps updates, one trainer after the other, and the
next round turns the order around: a machine that slows down slows all of them, so the ratio of a
round means something even where its times do not.

step       seconds of an update, the mean of a turn: median, least and most over all turns
tokens/s   tokens of an update / its median
MFU        model FLOPs over the peak of the devices, attention counted causally, and in full as
           nanoGPT and PaLM count it; TFLOP/s where no peak is known, as on a CPU
compile    the first update less a median one, with no cache of compiled programs
dispatch   seconds of an update in which the host hands it over; a CPU may compute meanwhile
data       seconds of an update in which the host waits for its batch
memory     the most that a device held, or that the process did where the device does not tell

The others train the same shapes in PyTorch, with nanoGPT's optimizer and clipping: in float32 on a
CPU, as nanoGPT does, and in this run's precision on a GPU. They hold as many sequences at a time as
batch.microbatch says, and all at once where it says nothing.

With --decode nobody trains: random weights continue random prompts of 16 tokens, several texts at
a time, as scalegpt.generate does, and as the others' own `generate` does.
"""

import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from benchmarks import decoding, profiling, pytorch
from sizing import with_vocabulary

from scalegpt.config import Config, command_line
from scalegpt.config.loading import NO_RUN
from scalegpt.data.datasets import open_datasets
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.model import flops
from scalegpt.processes.command import run_command
from scalegpt.run.feed import batches_from
from scalegpt.step import build_for_training, cpu_devices, sharding
from scalegpt.step.build import Steps, build_for_use

FLAGS = {
    "--against": {
        "action": "append",
        "default": [],
        "metavar": "WHAT",
        "help": "nanogpt=DIR, a checkout of karpathy/nanoGPT, or transformers; may be repeated",
    },
    "--their-mode": {"choices": pytorch.MODES, "help": "default: both"},
    "--their-microbatch": {"type": int, "metavar": "N", "help": "sequences they hold at a time"},
    "--their-dtype": {"choices": ("float32", "bfloat16"), "help": "of their autocast"},
    "--rounds": {"type": int, "default": 5, "help": "turns of each trainer (default 5)"},
    "--steps": {"type": int, "help": "updates of a turn (default 10), or tokens of a text (128)"},
    "--decode": {"type": int, "nargs": "+", "metavar": "TEXTS", "help": "write so many at a time"},
    "--real-data": {"action": "store_true", "help": "the run's data set instead of random tokens"},
    "--profile": {"metavar": "DIR", "help": "trace one more turn, and print what is costliest"},
    "--json": {"action": "store_true", "help": "print one JSON object"},
}
RANDOM_TOKENS = 2**21  # of the data set that is made up, at least
COLUMNS = f"{'':20} {'tokens/s':>10} {'step ms: median':>16} {'least':>9} {'most':>9}"


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/bench.py", FLAGS, NO_RUN)
    flags.steps = (128 if flags.decode else 10) if flags.steps is None else flags.steps
    for name in ("rounds", "steps", "decode", "their_microbatch"):
        if (value := getattr(flags, name)) is not None and np.min(value) < 1:
            raise Mistake(f"--{name.replace('_', '-')}={value} must be at least 1")
    names = ("their_mode", "their_microbatch", "their_dtype", "profile", "real_data")
    for name in (name for name in names if getattr(flags, name) not in (None, False)):
        if name.startswith("their") and not flags.against:
            raise Mistake(f"--{name.replace('_', '-')} is for a trainer of --against")
        if flags.decode and name != "their_dtype":
            raise Mistake(f"--decode does not go with --{name.replace('_', '-')}")
    for what in flags.against:
        pytorch.check(what, config.model)
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX would take most of a GPU's memory at once, and leave none to torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not flags.decode:
        cpu_devices.choose(config)
    if flags.profile:
        profiling.check(flags.profile)
    if flags.real_data:
        datasets = open_datasets(config)
        config = config.with_vocab(max(d.vocab_size for d in datasets))
    else:
        config, _ = with_vocabulary(config)
        datasets = [random_tokens(config)]
    load = os.getloadavg()[0]  # before there is any of ours
    if flags.decode:
        steps = build_for_use(config, sharding.make_mesh(config.mesh), 1)
        found = decoding.measure(config, flags, theirs(config, flags, steps), turns)
        report = {"load_average": load, **about(config, steps), **found}
        return show(report, flags, decoding.table)
    steps = build_for_training(config, sharding.make_mesh(config.mesh))
    trainers: list[Any] = []
    try:
        for settings in theirs(config, flags, steps):
            trainers.append(pytorch.Child(settings))
        trainers.insert(0, Ours(steps, batches_from(config, datasets, steps, 0)))
        blocks = turns(trainers, flags.rounds, flags.steps)
        report = {"load_average": load, **summary(config, trainers, blocks)}
        if flags.profile:
            report["operations"] = profiling.trace(trainers[0], flags.steps, flags.profile)
    finally:
        for trainer in trainers:
            trainer.close()
    return show(report, flags, tables)


def show(report: dict[str, Any], flags: Namespace, table: Callable) -> int:
    print(json.dumps(report, indent=2) if flags.json else table(report))
    if report["load_average"] > 0.5 and not flags.json:
        print(
            "warning: others kept this machine busy, with a load of "
            f"{report['load_average']:.1f} before this began"
        )
    return 0


def random_tokens(config: Config) -> Dataset:
    vocab, size = config.model.vocab_size, max(RANDOM_TOKENS, 4 * config.model.block_size)
    ids = np.random.default_rng(0).integers(0, vocab, size, np.uint32)
    return Dataset("random", "none", vocab, ids, ids, None, "random")


class Ours:
    """The run on all devices here. Compiled, and one update old, once it is made."""

    name = "scalegpt"

    def __init__(self, steps: Steps, batches: Iterator[jax.Array]) -> None:
        self.steps, self.batches, self.state = steps, batches, steps.init()
        jax.block_until_ready(self.state)
        leaves = jax.tree.leaves(self.state.params)
        self.built = {"parameters": sum(x.size for x in leaves)}
        self.built["first"] = self.block(1)["seconds"]

    def close(self) -> None:
        self.batches.close()  # and with it the thread that reads ahead

    def block(self, updates: int) -> dict[str, Any]:
        """Seconds of an update, of its dispatch and of its wait for data; bytes at the peak.

        As in training, an update's loss is read once the next update is on its way.
        """
        dispatch, data, pending, began = 0.0, 0.0, None, time.perf_counter()
        for _ in range(updates):
            asked = time.perf_counter()
            batch = next(self.batches)
            ready = time.perf_counter()
            self.state, values = self.steps.train(self.state, batch)
            data, dispatch = data + ready - asked, dispatch + time.perf_counter() - ready
            if pending is not None:
                float(pending)
            pending = values["train/loss"]
        float(pending)
        seconds = time.perf_counter() - began
        stats = [d.memory_stats() for d in self.steps.mesh.local_devices]
        peak = max(s["peak_bytes_in_use"] for s in stats) if all(stats) else pytorch.rss()
        times = {"seconds": seconds, "dispatch": dispatch, "data": data}
        return {key: value / updates for key, value in times.items()} | {"memory": peak}


def theirs(config: Config, flags: Namespace, steps: Steps) -> list[dict[str, Any]]:
    """The settings of each trainer in PyTorch. Raises ValueError for what it cannot be told."""
    if not flags.against:
        return []
    mesh, model, optim = steps.mesh, config.model, config.optim
    platform = mesh.devices.flat[0].platform
    if platform == "tpu" or (platform != "cpu" and mesh.size > 1):
        raise Mistake(
            f"--against runs on a CPU or on one GPU, not on {mesh.size} x {platform}; "
            "CUDA_VISIBLE_DEVICES=0 leaves one"
        )
    sequences = config.batch.sequences
    rows = flags.their_microbatch or config.batch.microbatch or sequences
    if sequences % rows:
        raise Mistake(f"--their-microbatch={rows} does not divide batch.sequences={sequences}")
    ours_dtype = "float32" if platform == "cpu" else str(steps.model.dtype)
    shape = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    common = {
        "shape": {key: getattr(model, key) for key in shape},
        "activation": model.activation,
        "microbatches": sequences // rows,
        "rows": rows,
        "gpu": platform != "cpu",
        "dtype": flags.their_dtype or ours_dtype,
        "optim": {
            "lr": optim.lr,
            "betas": (optim.beta1, optim.beta2),
            "weight_decay": optim.weight_decay,
            "grad_clip": optim.grad_clip,
        },
    }
    mode = "eager" if flags.decode else flags.their_mode
    modes = [mode] if mode else pytorch.MODES
    return [{**common, "trainer": what, "mode": mode} for what in flags.against for mode in modes]


def turns(trainers: list[Any], rounds: int, updates: int) -> list[list[dict[str, Any]]]:
    """[round][trainer] -> what its block said. One round more goes before, and is not counted."""
    found = []
    for turn in range(rounds + 1):
        order = range(len(trainers)) if turn % 2 else reversed(range(len(trainers)))
        said = {i: trainers[i].block(updates) for i in order}
        found.append([said[i] for i in range(len(trainers))])
    return found[1:]


def summary(
    config: Config, trainers: list[Any], blocks: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """All figures: seconds, bytes, tokens/s, FLOP/s; a ratio is our tokens/s over the other's."""
    steps, batch = trainers[0].steps, config.batch
    device, tokens = steps.mesh.devices.flat[0], batch.sequences * config.model.block_size
    peak = flops.peak_flops(device.device_kind, str(steps.model.dtype))
    rows = []
    for i, trainer in enumerate(trainers):
        mine = [turn[i] for turn in blocks]
        seconds = [block["seconds"] for block in mine]
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
        row["peak_memory_bytes"] = max(block["memory"] for block in mine)
        if i == 0:
            for key in ("dispatch", "data"):
                row[f"{key}_seconds"] = statistics.median(block[key] for block in mine)
        else:
            pairs = [turn[i]["seconds"] / turn[0]["seconds"] for turn in blocks]
            row["ratio"] = {"pairs": pairs, "median": statistics.median(pairs)}
        rows.append(row)
    layout = {"sequences": batch.sequences, "accumulation": steps.layout[0], "tokens": tokens}
    return {**about(config, steps), "batch": layout, "trainers": rows}


def about(config: Config, steps: Steps) -> dict[str, Any]:
    """What was measured, and on what."""
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    kind = steps.mesh.devices.flat[0].device_kind
    return {
        "model": {key: getattr(config.model, key) for key in keys},
        "devices": {"kind": kind, "count": steps.mesh.size},
        "dtype": str(steps.model.dtype),
        "attention": steps.model.attention,
    }


def tables(report: dict[str, Any]) -> str:
    """The report for a person."""
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
        lines.append(f"{row['ratio']['median']:.2f} x the speed of {row['name']}  ({pairs})")
    if "operations" in report:
        lines.append("the costliest operations, ms of an update over all devices")
        lines += [
            f"{1e3 * op['seconds']:10.3f}  {op['name']:32} {op['place'][-60:]}"
            for op in report["operations"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)

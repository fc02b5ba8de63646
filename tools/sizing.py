"""This tool says what a run will cost in FLOPs, memory and days, and which model would use it best.

    python tools/sizing.py --config configs/gpt2_124m.yaml --device "NVIDIA A100" --devices 8
    python tools/sizing.py --model.preset=gpt2-xl --budget 1e21 --plot optimum.png

It does the work of nanoGPT's notebooks transformer_sizing and scaling_laws, and needs no data, no
accelerator and no out_dir. What a machine does with the run, `python -m scalegpt.plan` says; the
arithmetic is in scalegpt/model/flops.py, scalegpt/planning/ and tools/planning/scaling_laws.py.
"""

import json
import math
from argparse import Namespace
from functools import partial
from typing import Any

from planning import scaling_laws
from planning.isoflop_plot import draw, short

from scalegpt.config import Config, command_line
from scalegpt.config.loading import NO_RUN
from scalegpt.errors import Mistake
from scalegpt.model import flops
from scalegpt.planning import memory, plans
from scalegpt.planning.picture import check_file
from scalegpt.planning.topologies import Topology
from scalegpt.processes.command import run_command
from scalegpt.run.resume import with_model

FLAGS = {
    "--device": {
        "default": "NVIDIA A100",
        "metavar": "NAME",
        "help": 'as jax.devices()[0].device_kind says, "TPU v3" (default: "NVIDIA A100")',
    },
    "--devices": {
        "type": int,
        "metavar": "N",
        "help": "how many JAX devices (default: as many as the mesh names; a v3-8 has 8)",
    },
    "--mfu": {
        "type": float,
        "default": 0.4,
        "metavar": "SHARE",
        "help": "model FLOPs utilisation that you expect, above 0 and up to 1 (default: 0.4)",
    },
    "--budget": {
        "type": float,
        "metavar": "FLOPS",
        "help": "of training, for the compute-optimal model (default: this run's own)",
    },
    "--plot": {"metavar": "FILE", "help": "draw loss over model size at that budget (.png, ...)"},
    "--json": {"action": "store_true", "help": "print one JSON object"},
}
COUNTS = ("full", "causal")


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/sizing.py", FLAGS, NO_RUN)
    check(flags)
    plans.check(config)
    config, source = plans.with_vocabulary(with_model(config))
    report = size(config, flags)
    report["model"]["vocabulary_from"] = source
    if flags.plot:
        try:
            draw(report["scaling"], flags.plot)
        except OSError as error:
            raise Mistake(f"cannot write --plot={flags.plot}: {error.strerror}") from None
    print(json.dumps(report, indent=2) if flags.json else tables(report))
    if flags.plot and not flags.json:
        print(f"\nplot in {flags.plot}")
    return 0


def check(flags: Namespace) -> None:
    """Raise Mistake for flags that make no sense."""
    if flops.peak_flops(flags.device) is None:
        known = ", ".join(flops.PEAK_TFLOPS)
        raise Mistake(f"--device={flags.device!r} is none of those known: {known}")
    if flags.devices is not None and not 1 <= flags.devices <= 10**6:
        raise Mistake(f"--devices={flags.devices} must be at least 1 and at most a million")
    if not 0 < flags.mfu <= 1:
        raise Mistake(f"--mfu={flags.mfu} must be above 0 and at most 1; 40 % is 0.4")
    if flags.budget is not None and not 1 <= flags.budget <= 1e60:
        raise Mistake(f"--budget={flags.budget} must be a number of FLOPs, such as 1e21")
    if flags.plot:
        check_file(flags.plot)


def size(config: Config, flags: Namespace) -> dict[str, Any]:
    """Compute all figures, in parameters, FLOPs, bytes, tokens and days.

    Raises Mistake as `placement` does.
    """
    model, parts = config.model, flops.parameters_by_component(config.model)
    parameters, used = sum(parts.values()), flops.used_parameters(model)
    sequence = {kind: flops.flops_by_component(model, kind == "causal") for kind in COUNTS}
    training = {kind: 3 * sum(by.values()) for kind, by in sequence.items()}
    palm = flops.palm_flops_per_token(model) * model.block_size
    tokens_per_update = config.batch.sequences * model.block_size
    tokens = config.batch.rows_after(config.optim.steps) * model.block_size
    budget = flags.budget or 6 * used * tokens
    permanent = config.optim.steps // every if (every := config.checkpoint.keep_every) else 0
    place = placement(config, flags)
    checkpoint = memory.checkpoint_bytes(model, config.optim, config.lora)
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    return {
        "model": {key: getattr(model, key) for key in keys},
        "parameters": {
            "by_component": parts,
            "total": parameters,
            "embedding": flops.embedding_count(model),
            "non_embedding": parameters - flops.embedding_count(model),
            "used": used,
            "float32_bytes": 4 * parameters,
            "checkpoint_bytes": checkpoint,
        },
        "flops": {
            "forward": sequence,
            "training": training,
            "palm": palm,
            "training_per_token": {k: v / model.block_size for k, v in training.items()},
        },
        "memory": place,
        "run": {
            "updates": config.optim.steps,
            "tokens_per_update": tokens_per_update,
            "tokens": tokens,
            "checkpoints_bytes": (config.checkpoint.keep + 1 + permanent) * checkpoint,
            **cost(
                {
                    **{k: v / model.block_size * tokens for k, v in training.items()},
                    "6ND": 6 * parameters * tokens,
                },
                flags,
                place,
            ),
        },
        "scaling": scaling(used, tokens, budget),
    }


def placement(config: Config, flags: Namespace) -> dict[str, Any]:
    """Lay the run out on its mesh, and estimate each device's bytes under each remat.

    Raises Mistake where the mesh does not fit the devices or the model.
    """
    fixed = math.prod(max(1, n) for n in config.mesh.model_dump().values())
    machine = Topology(flags.device, flags.device, (1, flags.devices or fixed), math.inf, None)
    by_remat = {remat: plans.own_plan(config, machine, remat) for remat in memory.REMAT}
    plan = by_remat[config.model.remat]
    return {
        "device": flags.device,
        "devices": machine.devices,
        "mesh": plan.mesh,
        "dtype": plan.dtype,
        "attention": plan.attention,
        "microbatch": plan.microbatch,
        "accumulation": plan.accumulation,
        "remat": plan.remat,
        "bytes": plan.bytes,
        "total_bytes": {remat: plan.total_bytes for remat, plan in by_remat.items()},
        "by_remat": {remat: plan.bytes for remat, plan in by_remat.items()},
    }


def cost(run_flops: dict[str, float], flags: Namespace, place: dict[str, Any]) -> dict[str, Any]:
    """Compute the run's days for each count of its FLOPs; None where the peak is unknown."""
    peak = flops.peak_flops(flags.device, place["dtype"])
    seconds = {k: peak and v / (peak * place["devices"] * flags.mfu) for k, v in run_flops.items()}
    days = {k: s and s / 86400 for k, s in seconds.items()}
    return {"mfu": flags.mfu, "peak_flops": peak, "flops": run_flops, "days": days}


def scaling(parameters: int, tokens: int, budget: float) -> dict[str, Any]:
    """Return the compute-optimal models for the budget, and this run beside them."""
    laws = scaling_laws.LAWS
    pairs = {name: law.optimum(budget) for name, law in laws.items()}
    pairs["approach 2"] = scaling_laws.table_optimum(budget)
    pairs["this run"] = (parameters, tokens)
    optimal = {name: law.tokens_for(parameters) for name, law in laws.items()}
    optimal["approach 2"] = scaling_laws.table_tokens_for(parameters)
    return {
        "budget": budget,
        "run_6ND": 6 * parameters * tokens,
        "models": {
            name: {
                "parameters": n,
                "tokens": d,
                "tokens_per_parameter": d / n,
                "loss": {by: law.loss(n, d) for by, law in laws.items()},
            }
            for name, (n, d) in pairs.items()
        },
        "optimal_tokens_of_this_model": optimal,
    }


def line(name: str, *cells: str, widths: tuple[int, ...] = (16, 16, 16)) -> str:
    """Return a row of a table, of at most 80 columns."""
    padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
    return f"  {name:28}" + "".join(padded)


def tables(r: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    m = r["model"]
    head = (
        f"{m['n_layer']} layers, {m['n_head']} heads, {m['n_embd']} wide, {m['block_size']:,} "
        f"tokens, {'with' if m['bias'] else 'no'} biases\n"
        f"vocabulary {m['vocab_size']:,} ({m['vocabulary_from']})"
    )
    sections = (of_parameters, of_flops, of_memory, of_time, of_scaling)
    return "\n\n".join([head, *("\n".join(section(r)) for section in sections)])


def of_parameters(r: dict[str, Any]) -> list[str]:
    p = r["parameters"]
    counts = {
        **p["by_component"],
        "total": p["total"],
        "embeddings": p["embedding"],
        "all but embeddings": p["non_embedding"],
    }
    return [
        line("Parameters", "count", "share")[2:],
        *(line(name, f"{n:,}", f"{n / p['total']:.2%}") for name, n in counts.items() if n),
        f"  {p['float32_bytes'] / 1e9:.2f} GB on disk in float32; a checkpoint, with moments, "
        f"{p['checkpoint_bytes'] / 1e9:.2f} GB",
    ]


def of_flops(r: dict[str, Any]) -> list[str]:
    f, length, token = r["flops"], r["model"]["block_size"], r["flops"]["training_per_token"]
    full, causal = (f["forward"][kind] for kind in COUNTS)
    forward = sum(full.values())
    rows = {name: (full[name], causal[name]) for name in full}
    rows["forward"] = (forward, sum(causal.values()))
    rows["backward"] = tuple(2 * n for n in rows["forward"])
    rows["training"] = tuple(f["training"][kind] for kind in COUNTS)
    row = partial(line, widths=(20, 9, 20))
    return [
        row(f"FLOPs of {length:,} tokens", "full", "share", "causal")[2:],
        *(row(name, f"{a:,}", f"{a / forward:.2%}", f"{b:,}") for name, (a, b) in rows.items()),
        row("training, a token", f"{token['full']:,.0f}", "", f"{token['causal']:,.0f}"),
        row("PaLM's 6 N + 12 L H Q T", f"{f['palm']:,}")
        + f"  = {f['palm'] / f['training']['full']:.4f} x training",
    ]


def of_memory(r: dict[str, Any]) -> list[str]:
    m, remats = r["memory"], r["memory"]["by_remat"]
    rows = {name: [parts[name] for parts in remats.values()] for name in m["bytes"]}
    rows["total"] = list(m["total_bytes"].values())
    heads = [f"{x} (set)" if x == m["remat"] else x for x in remats]
    widths = (12, 12, 12, 14)
    mesh = " x ".join(f"{axis} {n}" for axis, n in m["mesh"].items() if n > 1) or "one device"
    return [
        f"Memory of a device in GiB, on {m['devices']} x {m['device']}",
        f"  {mesh}; microbatch of {m['microbatch']}, accumulation {m['accumulation']}",
        f"  {m['dtype']} products, attention {m['attention']}",
        line("model.remat", *heads, widths=widths),
        *(line(k, *(f"{n / 2**30:.2f}" for n in row), widths=widths) for k, row in rows.items()),
        "  an estimate for model.scan_layers=true;",
        "  scalegpt.train --compile-only asks the compiler",
    ]


def of_time(r: dict[str, Any]) -> list[str]:
    run, m = r["run"], r["memory"]
    names = {
        "causal": "causal, as perf/mfu",
        "full": "full, as nanoGPT and PaLM",
        "6ND": "6 N D, N all parameters",
    }
    days = {k: "unknown" if d is None else f"{d:,.2f}" for k, d in run["days"].items()}
    peak = f"{run['peak_flops'] / 1e12:g}" if run["peak_flops"] else "unknown"
    return [
        f"Time of {run['updates']:,} updates x {run['tokens_per_update']:,} = "
        f"{run['tokens']:,} tokens",
        f"  on {m['devices']} x {m['device']} of {peak} TFLOP/s in {m['dtype']}, "
        f"MFU {run['mfu']:.0%}",
        line("attention counted", "FLOPs", "days"),
        *(line(name, f"{run['flops'][k]:.3g}", days[k]) for k, name in names.items()),
        f"  checkpoints: {run['checkpoints_bytes'] / 1e9:.2f} GB at most: keep, keep_every, best",
    ]


def of_scaling(r: dict[str, Any]) -> list[str]:
    s = r["scaling"]
    names = {
        "Chinchilla": "Chinchilla, approach 3",
        "Epoch": "Epoch's fit of its data",
        "approach 2": "Chinchilla, approach 2",
        "this run": "this run",
    }

    def row(name: str) -> str:
        model, needs = s["models"][name], s["optimal_tokens_of_this_model"].get(name)
        cells = [short(model["parameters"]), short(model["tokens"])]
        cells += [f"{model['tokens_per_parameter']:,.1f}", short(needs) if needs else ""]
        cells += [f"{loss:#.4g}" for loss in model["loss"].values()]
        return line(names[name], *cells, widths=widths)

    widths = (6, 9, 8, 10, 11, 6)
    return [
        f"Compute-optimal for {s['budget']:.3g} FLOPs"
        + ", this run's own 6 N D" * (s["budget"] == s["run_6ND"]),
        line("", "N", "tokens D", "D / N", "optimal D", *scaling_laws.LAWS, widths=widths),
        *map(row, s["models"]),
        "  N leaves out tables that are only looked up; optimal D is for this run's N;",
        "  the losses at the right are those of two fits, of Chinchilla's text and tokens",
    ]


if __name__ == "__main__":
    run_command(main)

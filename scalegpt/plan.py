"""This command plans a run before a machine is rented.

    python -m scalegpt.plan --config configs/gpt2_xl.yaml --topology v5e:16x16
    python -m scalegpt.plan --config configs/v3_8.yaml --topology v3-8 --verify
    python -m scalegpt.plan --config configs/gpt2_xl.yaml --sweep v5e,v6e --price 1.2
    python -m scalegpt.plan --run out/NAME

It says whether the run fits, how fast it will be, what bounds it, which mesh is best, and how many
chip-hours it takes: by arithmetic, from neither data nor an accelerator. Without --topology it
plans for the machine that it runs on, and asks JAX what that is. --verify compiles the training
step, which needs no TPU either, and compares. --run compares a run's measured updates with its
plan.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import json
from argparse import Namespace
from statistics import median
from typing import Any

from scalegpt.config import Config, command_line
from scalegpt.config.loading import NO_RUN
from scalegpt.data.datasets import resolved_to_compile
from scalegpt.errors import Mistake
from scalegpt.planning import compiler, picture, plans, tables, topologies
from scalegpt.planning.chips import CHIPS
from scalegpt.planning.costs import costs
from scalegpt.planning.plans import Plan, as_dict
from scalegpt.planning.speed import fitted_efficiency
from scalegpt.planning.topologies import Topology
from scalegpt.processes.command import run_command
from scalegpt.run.history import read_history
from scalegpt.step import cpu_devices

MACHINE: dict[str, dict[str, Any]] = {
    "--topology": {
        "metavar": "NAME",
        "help": "the machine, as v5e:16x16, v3-8 or h100:2x8; list: all (default: this machine)",
    },
    "--slices": {
        "type": int,
        "default": 1,
        "metavar": "N",
        "help": "so many of them, over the data-centre network (default: 1)",
    },
    "--efficiency": {
        "type": float,
        "metavar": "SHARE",
        "help": "of the chip's peak that products of wide models reach, as --run RUN fits it",
    },
    "--json": {"action": "store_true", "help": "print one JSON object, of --sweep a list"},
}
FLAGS: dict[str, dict[str, Any]] = {
    **MACHINE,
    "--search": {
        "action": "store_true",
        "help": "plan the best mesh, microbatch and remat instead of the config's own",
    },
    "--verify": {
        "action": "store_true",
        "help": "compile the training step and compare; for a TPU that is not here this needs "
        "scalegpt[plan]",
    },
    "--sweep": {
        "nargs": "?",
        "const": ",".join(CHIPS),
        "metavar": "CHIPS",
        "help": "a line for each topology of these chips, as v5e,v6e (default: all), with the best "
        "mesh on each",
    },
    "--price": {"type": float, "metavar": "MONEY", "help": "of a chip and hour"},
    "--preemption-hours": {
        "type": float,
        "default": 24.0,
        "metavar": "HOURS",
        "help": "the mean time between two preemptions, for how often to save (default: 24)",
    },
    "--plot": {"metavar": "FILE", "help": "draw memory and time by term (.png, .pdf, .svg)"},
}


def main(argv: list[str]) -> int:
    if any(word.partition("=")[0] == "--run" for word in argv):
        return compare(argv)
    config, flags = command_line.parse(argv, "scalegpt.plan", FLAGS, NO_RUN)
    check(flags)
    if flags.topology == "list":
        print(topologies.listing())
        return 0
    plans.check(config)
    if config.run.init_from:
        from scalegpt.run.resume import with_model  # with Orbax, a quarter of the answer's time

        config = with_model(config)
    config, _ = plans.with_vocabulary(config)
    return sweep(config, flags) if flags.sweep else one(config, flags)


def check(flags: Namespace) -> None:
    """Raise Mistake for flags that make no sense."""
    check_machine(flags)
    if flags.price is not None and not 0 <= flags.price <= 1e6:
        raise Mistake(f"--price={flags.price} must be the price of a chip and hour, as 1.2")
    if not 0 < flags.preemption_hours <= 1e6:
        raise Mistake(f"--preemption-hours={flags.preemption_hours} must be above 0, as 24")
    if flags.sweep and (
        flags.topology or flags.search or flags.verify or flags.plot or flags.efficiency
    ):
        raise Mistake(
            "--sweep searches on many topologies, and goes without --topology, --search, --verify, "
            "--plot and --efficiency; leave them out"
        )
    if flags.plot:
        picture.check_file(flags.plot)


def check_machine(flags: Namespace) -> None:
    """Raise Mistake for flags of MACHINE that make no sense."""
    if flags.efficiency is not None and not 0 < flags.efficiency <= 1:
        raise Mistake(f"--efficiency={flags.efficiency} must be above 0 and at most 1, as 0.5")
    if flags.slices != 1 and not flags.topology:
        raise Mistake(f"--slices={flags.slices} is of a --topology, as v5e:16x16")


def machine(config: Config, flags: Namespace) -> Topology:
    """Return the machine that the flags name, or this one."""
    if flags.topology:
        topology = topologies.parse(flags.topology, flags.slices)
    else:
        cpu_devices.choose(config)
        topology = topologies.here()
    return topologies.with_efficiency(topology, flags.efficiency)


def one(config: Config, flags: Namespace) -> int:
    """Print the plan of a run on one machine."""
    topology = machine(config, flags)
    best = plans.search(config, topology)
    if flags.search and not best:
        if not topology.chip:
            raise Mistake(
                f"--search: no speed is known of {topology.name}, so none is best; name a machine "
                "with --topology, as v5e:2x4"
            )
        raise Mistake(
            f"--search: nothing fits {topology.name} with {plans.SPARE:.0%} of its memory to spare,"
            f" of meshes with context {config.mesh.context} that divide batch.sequences="
            f"{config.batch.sequences}, heads and widths, or no speed is known of the model's "
            "dtype there; --sweep shows where the run fits"
        )
    plan = best[0] if flags.search else plans.own_plan(config, topology)
    cost = costs(plan, flags.price, flags.preemption_hours)
    compiled = verify(plan, topology if flags.topology else None) if flags.verify else None
    if flags.plot:
        others = [p for p in tables.different(best) if p != plan]
        try:
            picture.draw([plan, *others], flags.plot)
        except OSError as error:
            raise Mistake(f"cannot write --plot={flags.plot}: {error.strerror}") from None
    if flags.json:
        more = {"best": [as_dict(p) for p in best[:5]]}
        if flags.verify:
            more["compiled"] = compiled.as_dict()
        print(json.dumps(report(plan, cost) | more, indent=2))
    else:
        print(tables.text(plan, cost, best))
        if flags.verify:
            print(f"\n{tables.verified(plan, compiled)}")
        print(f"\nplot in {flags.plot}" if flags.plot else "", end="\n" * bool(flags.plot))
    return 0


def verify(plan: Plan, topology: Topology | None) -> compiler.Compiled | compiler.DoesNotFit:
    """Compile the step that is planned, for a TPU or for this machine.

    Returns the mistake where it does not fit.
    """
    try:
        return compiler.compile_step(resolved_to_compile(plans.applied(plan)), topology)
    except compiler.DoesNotFit as error:
        return error


def report(plan: Plan, cost: dict[str, Any]) -> dict[str, Any]:
    """Return a plan and its costs for --json."""
    return as_dict(plan) | cost


def sweep(config: Config, flags: Namespace) -> int:
    """Print the best plan on each topology of the chips that --sweep names."""
    names = [name.strip() for name in flags.sweep.split(",")]
    if unknown := [name for name in names if name not in CHIPS]:
        raise Mistake(f"--sweep={flags.sweep}: {unknown[0]!r} is none of {', '.join(CHIPS)}")
    best = plans.sweep(config, names)
    if not best:
        raise Mistake(
            f"--sweep={flags.sweep}: the run fits none of up to {plans.MOST_DEVICES} devices; "
            "a smaller model would"
        )
    all_costs = [costs(plan, flags.price, flags.preemption_hours) for plan in best]
    if flags.json:
        both = zip(best, all_costs, strict=True)
        print(json.dumps([report(plan, cost) for plan, cost in both], indent=2))
    else:
        print(tables.sweep_table(best, all_costs))
    return 0


def compare(argv: list[str]) -> int:
    """Print how long the updates of the run that --run names took, beside its plan."""
    parser = command_line.Parser(prog="scalegpt.plan", description=compare.__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="its run.out_dir")
    for name, keywords in MACHINE.items():
        parser.add_argument(name, **keywords)
    flags = parser.parse_args(argv)
    check_machine(flags)
    if flags.topology == "list":
        print(topologies.listing())
        return 0
    history = read_history(flags.run)
    seconds = [x for row in history.rows if (x := row.get("perf/step_seconds"))]
    if not seconds:
        raise Mistake(f"{flags.run} has no timed updates in its metrics.jsonl yet")
    plans.check(history.config)
    config, _ = plans.with_vocabulary(history.config)
    whole = [m for m in history.checkpoints.values() if not isinstance(m, str)]
    devices = whole[-1]["meta"].get("devices", "") if whole else ""
    topology = None if flags.topology else topologies.like(devices)
    plan = plans.own_plan(config, topology or machine(config, flags))
    measured, fitted = median(seconds), None
    if plan.step:
        expected = plan.topology.chip.efficiency
        fitted = fitted_efficiency(plan.seconds, expected, measured)
    result = as_dict(plan) | {
        "measured_on": devices,
        "measured_step_seconds": measured,
        "measured_tokens_per_second": plan.tokens / measured,
        "measured_rows": len(seconds),
        "fitted_efficiency": fitted,
    }
    print(json.dumps(result, indent=2) if flags.json else tables.comparison(plan, result))
    return 0


if __name__ == "__main__":
    run_command(main)

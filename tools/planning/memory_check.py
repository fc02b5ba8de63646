"""This command compares planned memory with the peaks that the TPUs' compiler has stated.

    python tools/planning/memory_check.py
    python tools/planning/memory_check.py --measure llama

memory.json beside it has, for each step, the keys of its run, the topology, the peak of a device
that was planned and the compiler's, in bytes, and whether the step was first compiled after the
formulas were frozen. The first command compares today's formulas with these peaks; --measure
compiles again what has the word in its keys or topology, and writes the file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scalegpt.config import command_line
from scalegpt.config.loading import NO_RUN
from scalegpt.planning import compiler, plans, topologies
from scalegpt.planning.plans import Plan

FILE = Path(__file__).with_name("memory.json")


def recorded() -> list[dict[str, Any]]:
    """Return the steps of memory.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def planned(step: dict[str, Any]) -> Plan:
    """Plan a step as the formulas are today."""
    argv = [f"--{word}" for word in step["keys"].split()]
    config, _ = command_line.parse(argv, "memory_check.py", {}, NO_RUN)
    topology = topologies.parse(step["topology"], step.get("slices", 1))
    return plans.own_plan(plans.with_vocabulary(config)[0], topology)


def line(step: dict[str, Any]) -> str:
    """Return one step's row of the table."""
    plan = planned(step)
    ratio = plan.total_bytes / step["compiler"]
    when = "after" if step["after_freeze"] else "before"
    name = f"{step.get('slices', 1)} x " * ("slices" in step) + step["topology"]
    gib = f"{plan.total_bytes / 2**30:7.2f} {step['compiler'] / 2**30:7.2f}"
    return f"{gib}  {ratio:4.2f}  {when:6}  {name}: {step['keys']}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", metavar="WORD", help="compile these steps again")
    flags = parser.parse_args(argv)
    steps = recorded()
    if flags.measure is not None:
        for step in steps:
            if flags.measure in f"{step['topology']} {step['keys']}":
                plan = planned(step)
                step["planned"] = plan.total_bytes
                step["compiler"] = compiler.compile_step(plan.config, plan.topology).peak
                print(line(step), flush=True)
        rows = ",\n".join(json.dumps(step) for step in steps)
        FILE.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
        return 0
    print("planned, compiler (GiB), ratio, compiled before or after the freeze, step")
    print(*map(line, steps), sep="\n")
    within = sum(abs(planned(s).total_bytes / s["compiler"] - 1) <= 0.15 for s in steps)
    print(f"{within} of {len(steps)} within 15 %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

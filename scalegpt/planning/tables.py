"""Write plans as text for a terminal, of at most 80 columns."""

import math
import textwrap
from typing import Any

from scalegpt.planning.compiler import Compiled, DoesNotFit
from scalegpt.planning.plans import SPARE, Plan

GIB = 2**30
LOOPS = ("in no loop", "in a loop", "in a loop's loop", *[f"in {n} loops" for n in (3, 4, 5)])
CYCLES = (
    "by the cycles that the compiler expects of all but collectives and Pallas kernels, "
    "of which it states none"
)
TERMS = {
    "arithmetic": "products of matrices and of attention",
    "hbm": "reading and writing weights and moments",
    "fsdp": "gathering weights, scattering gradients",
    "tensor": "summing activations; half of it is hidden",
    "context": "gathering keys and values; half of it is hidden",
    "data": "summing gradients over copies, after the last product",
    "slices": "summing gradients over slices, after the last product",
    "host": "moving products to the host's memory and back",
}


def text(plan: Plan, costs: dict[str, Any], plans: list[Plan]) -> str:
    """Return all that the command says of a plan. costs: `costs.costs` of it; plans: `search`'s."""
    parts = (_memory(plan), _speed(plan), _bounds(plan), _advice(plan, plans), _costs(plan, costs))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _memory(plan: Plan) -> list[str]:
    t, total = plan.topology, plan.total_bytes
    left = t.memory - total
    verdict = "fits" if left >= 0 else "does not fit"
    near = abs(left) < SPARE * t.memory
    lines = [
        where(plan),
        layout(plan),
        f"{verdict}: {total / GIB:.2f} of {t.memory / GIB:.2f} GiB a device"
        + (", nearer than the estimate is good for" if near else ""),
        *(_line(name, f"{size / GIB:.2f}") for name, size in plan.bytes.items() if size),
    ]
    if plan.host_bytes:
        lines += [f"and in the host's memory: {plan.host_bytes / GIB:.2f} GiB of each device"]
    if not plan.config.model.scan_layers:
        lines += ["  of layers that are scanned; unrolled ones take less on a TPU"]
    return lines


def where(plan: Plan) -> str:
    """Return "2 slices of v5e:2x4: 16 x TPU v5 lite"."""
    t = plan.topology
    slices = f"{t.slices} slices of " if t.slices > 1 else ""
    return f"{slices}{t.name}: {t.devices} x {t.kind}"


def layout(plan: Plan) -> str:
    """Return "data 4 x fsdp 2; microbatch 8 x 4, remat none"."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    return f"{mesh}; microbatch {plan.microbatch} x {plan.accumulation}, remat {plan.remat}"


def _line(name: str, *cells: str) -> str:
    return f"  {name:30}" + "".join(f"{cell:>10}" for cell in cells)


def _speed(plan: Plan) -> list[str]:
    if not plan.step:
        what = plan.dtype if plan.topology.chip else plan.topology.kind
        return [f"no peak FLOP/s is known of {what}, and so no speed; tools/bench.py measures it"]
    least, likely, most = plan.step
    return [
        f"an update: {likely:.3g} s, at best {least:.3g}, at worst {most:.3g}",
        f"tokens/s: {plan.tokens / likely:,.0f}, at best {plan.tokens / least:,.0f}, at worst "
        f"{plan.tokens / most:,.0f}",
        f"MFU: {plan.mfu:.1%}, as perf/mfu: causal attention, recomputation not counted",
    ]


def _bounds(plan: Plan) -> list[str]:
    if not plan.step:
        return []
    (first, longest), (second, next_), *_ = sorted(plan.seconds.items(), key=lambda item: -item[1])
    lines = [f"bound by {first}: {longest:.3g} s, {longest / next_:.1f} times {second}"]
    lines += [f"  {k:11}{v:10.3g} s  {TERMS[k]}" for k, v in plan.seconds.items() if v]
    tokens, needs = plan.device_tokens, plan.needed_tokens()
    if "fsdp" in needs:
        lines += [
            f"each device has {tokens:,.0f} tokens a microbatch; fsdp needs {needs['fsdp']:,.0f}"
        ]
    tokens *= plan.accumulation
    for axis in needs.keys() - {"fsdp"}:
        lines += [
            f"sums over {axis} take the time of {needs[axis]:,.0f} of a device's {tokens:,.0f} "
            "tokens an update"
        ]
    if seconds := plan.seconds["tensor"]:
        most = plan.mesh["tensor"] * plan.seconds["arithmetic"] / seconds
        lines += [f"tensor is {plan.mesh['tensor']}; beyond {most:.0f} its traffic is longer"]
    return lines


def _advice(plan: Plan, plans: list[Plan]) -> list[str]:
    if not plan.seconds:
        return []
    if not plans:
        return [
            f"nothing that was tried fits with {SPARE:.0%} to spare: more devices,",
            "a smaller model, or another batch",
        ]
    best, *others = different(plans)
    gain = plan.step[1] / best.step[1] - 1
    against = f", {gain:.0%} faster than this plan" if gain > 0.02 and plan.fits else ""
    lines = [f"# recommended: {_figures(best)}{against}", fragment(best)]
    lines += [f"# or {layout(p)}:\n#    {_figures(p)}" for p in others]
    return lines


def different(plans: list[Plan]) -> list[Plan]:
    """Return the first plan of each mesh, at most four."""
    first: dict[tuple, Plan] = {}
    for plan in plans:
        first.setdefault(tuple(plan.mesh.values()), plan)
    return list(first.values())[:4]


def _figures(plan: Plan) -> str:
    return f"{plan.step[1]:.3g} s, MFU {plan.mfu:.1%}, {plan.total_bytes / GIB:.2f} GiB"


def fragment(plan: Plan) -> str:
    """Return a plan's mesh, microbatch and remat as YAML for a config."""
    mesh = ", ".join(f"{axis}: {size}" for axis, size in plan.mesh.items())
    batch, model = f"microbatch: {plan.microbatch}", f"remat: {plan.remat}"
    return f"mesh: {{{mesh}}}\nbatch: {{{batch}}}\nmodel: {{{model}}}"


def _whole(x: float) -> str:
    """Return a number without decimals, but a small one with two digits that count."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _costs(plan: Plan, costs: dict[str, Any]) -> list[str]:
    run, saves = costs["run"], costs["checkpoint"]
    lines = [f"the run: {run['updates']:,} updates, {run['tokens']:,} tokens"]
    if run["days"]:
        for name, key, form in (
            ("days", "days", "{:.3g}".format),
            ("chip-hours", "chip_hours", _whole),
            ("price", "price", "{:,.2f}".format),
        ):
            if run[key]:
                least, likely, most = map(form, run[key])
                lines += [f"  {name:11}{likely:>10}, at best {least}, at worst {most}"]
        lines += ["  of updates alone, without evaluations and start-up"]
    lines += [f"a checkpoint: {saves['bytes'] / 1e9:.2f} GB"]
    if "every_updates" in saves:
        minutes = _whole(saves["every_seconds"] / 60)
        lines += textwrap.wrap(
            f"checkpoint.every={saves['every_updates']}, every {minutes} minutes: "
            f"with a preemption every {saves['preemption_hours']:g} hours, saving and "
            f"repeated updates take {saves['lost']:.1%} of the time",
            78,
            initial_indent="  ",
            subsequent_indent="  ",
        )
    return lines


def comparison(plan: Plan, result: dict[str, Any]) -> str:
    """Return what --run says: `result` has the measured figures beside those of the plan."""
    measured, rate = result["measured_step_seconds"], result["measured_tokens_per_second"]
    there = f" on {result['measured_on']}" if result["measured_on"] else ""
    lines = [
        where(plan),
        layout(plan),
        f"an update took {measured:.3g} s{there}, the median of {result['measured_rows']} rows: "
        f"{rate:,.0f} tokens/s",
    ]
    if not plan.step:
        return "\n".join([*lines, *_speed(plan)])
    least, likely, most = plan.step
    lines += [
        f"planned: {likely:.3g} s, at best {least:.3g}, at worst {most:.3g}; it took "
        f"{measured / likely:.2f} of that",
        f"MFU: {plan.mfu * likely / measured:.1%}, planned {plan.mfu:.1%}",
    ]
    if fitted := result["fitted_efficiency"]:
        expected = plan.topology.chip.efficiency
        lines += [f"next time: --efficiency {fitted:.2f}, planned with {expected:.2f}"]
    else:
        lines += ["no efficiency explains that"]
    return "\n".join(lines)


def compiled(step: Compiled) -> str:
    """Return what a compiler says of a step."""
    memory = (
        f"state and batch {step.state / GIB:.2f}, temporary {step.temporary / GIB:.2f}, "
        f"at the peak {step.peak / GIB:.2f}"
    )
    lines = [
        f"{step.parameters:,} parameters on {math.prod(step.mesh.values())} x {step.kind}, "
        f"{step.mesh}, accumulation {step.accumulation}",
        f"compiled in {step.seconds:.0f} s by {step.compiler}; GiB a device: {memory}",
    ]
    if step.mfu:
        lines += [f"an update: {step.step_seconds:.3g} s, MFU {step.mfu:.1%}; {CYCLES}"]
        lines += [_parts(step)]
    return "\n".join([*lines, *_collectives(step)])


def verified(plan: Plan, step: Compiled | DoesNotFit) -> str:
    """Return what a compiler says of a plan's step beside what the plan says."""
    if isinstance(step, DoesNotFit):
        return f"compiled: {step}"
    rows = [("GiB a device at the peak", plan.total_bytes / GIB, step.peak / GIB, ".2f")]
    if step.host:
        rows += [("and in the host's memory", plan.host_bytes / GIB, step.host / GIB, ".2f")]
    if plan.step and step.mfu:
        rows += [("seconds of an update", plan.step[1], step.step_seconds, ".3g")]
        rows += [("MFU, %", 100 * plan.mfu, 100 * step.mfu, ".1f")]
    head = f"compiled in {step.seconds:.0f} s by {step.compiler}"
    lines = [f"{head:42}{'plan':>10}{'compiler':>10}{'ratio':>8}"]
    for name, planned, found, form in rows:
        lines += [f"  {name:40}{planned:>10{form}}{found:>10{form}}{planned / found:>8.2f}"]
    if step.mfu:
        for told in (CYCLES, _parts(step)):
            lines += textwrap.wrap(told, 78, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, *_collectives(step)])


def _parts(step: Compiled) -> str:
    """Return "cycles: attention 40 %, loss 17 %": which parts of the step they are of."""
    shares = ((part, cycles / step.cycles.total()) for part, cycles in step.cycles.most_common())
    return "cycles: " + ", ".join(f"{part} {share:.0%}" for part, share in shares if share >= 0.005)


def _collectives(step: Compiled) -> list[str]:
    if step.unread:
        told = f"no cycles or collectives are known; the program is unreadable: {step.unread}"
        return textwrap.wrap(told, 80)
    if not step.collectives:
        return []
    lines = ["collectives of an update, MB on each device:"]
    for (kind, axes, depth), size in sorted(step.collectives.items(), key=lambda x: -x[1]):
        name = f"{kind} over {axes or 'nothing'}, {LOOPS[depth]}"
        lines += [f"  {name:40}{size / 1e6:>20,.2f}"]
    return lines


def sweep_table(plans: list[Plan], all_costs: list[dict[str, Any]]) -> str:
    """Return a line for each plan, of another topology each."""
    priced = any(costs["run"]["price"] is not None for costs in all_costs)
    heads = ("topology", "step s", "tokens/s", "MFU", "GiB", "days", "chip-h", "price" * priced)
    rows = [heads]
    for plan, costs in zip(plans, all_costs, strict=True):
        run = {
            key: costs["run"][key] and costs["run"][key][1]
            for key in ("days", "chip_hours", "price")
        }
        rows += [
            (
                plan.topology.name,
                f"{plan.step[1]:.3g}",
                f"{plan.tokens / plan.step[1]:,.0f}",
                f"{plan.mfu:.0%}",
                f"{plan.total_bytes / GIB:.1f}",
                f"{run['days']:.3g}",
                f"{run['chip_hours']:,.0f}",
                f"{run['price']:,.0f}" if priced else "",
            )
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for plan, row in zip([None, *plans], rows, strict=True):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines += ["  ".join(cells).rstrip() + ("" if plan is None else f"  {mesh_of(plan)}")]
    return "\n".join(lines)


def mesh_of(plan: Plan) -> str:
    """Return "d4 f2 t1 mb8 none": the mesh, the microbatch and the remat policy in short."""
    mesh = " ".join(f"{axis[0]}{n}" for axis, n in plan.mesh.items() if n > 1)
    return f"{mesh} mb{plan.microbatch} {plan.remat}".strip()

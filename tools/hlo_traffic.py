"""Collectives in compiled HLO text: bytes, loop depth, and which mesh axes they run over.

Depth counts `while` bodies around an operation: 0 runs once an update, 1 once a microbatch (or
once a layer or chunk where there is no accumulation), 2 once a layer or chunk of a microbatch.
"""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np
from jax.sharding import Mesh

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "s64": 8, "pred": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: tuple[str, ...]  # of the mesh, that a group of devices spans
    depth: int  # loops around it
    times: int  # executions an update: the product of those loops' trip counts
    bytes: int  # of one execution's full array: the larger of input and output, on one device
    source: str  # the name of the JAX operation that asked for it


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """All collectives of an optimized HLO module compiled for `mesh`."""
    bodies = _computations(hlo)
    loops = _loops(bodies)
    found = []
    for name, lines in bodies.items():
        shapes = {
            m[1]: m[2] for line in lines if (m := re.match(r"(?:ROOT )?%?(\S+) = (.*)", line))
        }
        for line in lines:
            match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\((.*?)\)", line)
            if not match:
                continue
            operands = re.findall(r"%([\w.\-]+)", match[3])
            sent = sum(_size(re.split(r" [\w\-]+\(", shapes.get(o, ""))[0]) for o in operands)
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    match[2],
                    _axes(line, mesh),
                    len(loops[name]),
                    prod(loops[name]),
                    max(_size(match[1]), sent),
                    source[1] if source else "",
                )
            )
    return found


def table(found: list[Collective]) -> Counter:
    """(kind, axes, depth) -> bytes an update."""
    total = Counter()
    for c in found:
        total[c.kind, "+".join(c.axes), c.depth] += c.bytes * c.times
    return total


def _computations(hlo: str) -> dict[str, list[str]]:
    bodies, current = {}, None
    for line in hlo.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            current = bodies.setdefault(match[1], [])
        elif current is not None:
            current.append(line.strip())
    return bodies


def _loops(bodies: dict[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """Trip counts of the loops around each computation, outermost first."""
    callers = {}
    names = r"\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
    call = re.compile(rf"(body|condition|calls|to_apply|branch_computations)={names}")
    for caller, lines in bodies.items():
        for line in lines:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for kind, names in call.findall(line):
                loop = (int(trips[1]) if trips else 1,) if kind == "body" else ()
                for name in re.findall(r"%([\w.\-]+)", names):
                    callers.setdefault(name, []).append((caller, loop))

    def around(name: str) -> tuple[int, ...]:
        paths = [around(caller) + loop for caller, loop in callers.get(name, [])]
        return max(paths, key=len, default=())

    return {name: around(name) for name in bodies}


def _size(text: str) -> int:
    """Bytes of the arrays in an HLO shape such as `(f32[4,2]{1,0}, bf16[])`."""
    arrays = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", text)
    return sum(BYTES[kind] * prod(int(d) for d in dims.split(",") if d) for kind, dims in arrays)


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a replica group differ."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = (
            [int(x) for x in text.split(",")] if text else None for text in match.groups()
        )
        ids = np.arange(prod(dims)).reshape(dims).transpose(order).reshape(shape)
        group = ids[0].tolist()
    elif match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        group = [int(x) for x in match[1].split(",")]
    else:
        group = list(range(mesh.size))
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return tuple(a for a, line in zip(mesh.axis_names, places, strict=True) if len(set(line)) > 1)

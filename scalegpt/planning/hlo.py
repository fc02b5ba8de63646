"""Read from a compiled program's HLO text its collectives and, of a TPU, the cycles it shall take.

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
SLICES = ("replica",)  # along which slices of TPUs lie, whose hosts do what is sent to them
_SENT = r'= \((\w+\[.*?\]).* send\(.*megascale_transfer_type="(\w+)"'
# What the names of a part's operations hold: modules of model/gpt.py, and named scopes.
PARTS = {
    "attention": r"\bcausal_attention\b",
    "projections": r"\battn\b",
    "mlp": r"\bmlp\b",
    "norms": r"\bln_",
    "embeddings": r"\b_embed\b",
    "loss": r"\bloss\b",
    "optimizer": r"\boptimizer\b",
}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclass(frozen=True)
class Collective:
    """A collective is an operation in which devices exchange the parts of an array."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, that a group of devices spans
    depth: int  # loops around it
    times: int  # executions an update: the product of those loops' trip counts
    bytes: int  # of one execution's full array: the larger of input and output, on one device
    source: str  # the name of the JAX operation that asked for it


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """List all collectives of an optimized HLO module compiled for `mesh`."""
    bodies = _computations(hlo)
    loops = _loops(bodies)
    all_collectives, chains = [], set()
    for name, lines in bodies.items():
        shapes = _values(lines)
        for line in lines:
            around = len(loops[name]), prod(loops[name])
            if match := re.search(_SENT, line):
                kind = match[2].lower().replace("_", "-")
                all_collectives.append(Collective(kind, SLICES, *around, _size(match[1]), ""))
            match = re.search(rf"= (.*?) ({KINDS})(-start)?\((.*?)\)", line)
            if not match:
                continue
            # A TPU's program repeats one that goes on beside several fusions in each of these.
            if chain := re.search(r"channel_id=(\d+),.* frontend_attributes=\{.*?chain_id=", line):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            # An all-reduce of which a TPU keeps a part is its reduce-scatter.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]
            operands = re.findall(r"%([\w.\-]+)", match[4])
            sent = sum(_size(re.split(r" [\w\-]+\(", shapes.get(o, ""))[0]) for o in operands)
            both = match[3] and match[2] in ("all-gather", "collective-permute")
            received = _size(match[1]) - (sent if both else 0)  # these starts give their input, too
            source = re.search(r'op_name="([^"]*)"', line)
            all_collectives.append(
                Collective(
                    kind,
                    _axes(line, mesh),
                    *around,
                    max(received, sent),
                    source[1] if source else "",
                )
            )
    return all_collectives


def cycles(hlo: str) -> Counter:
    """Sum the cycles that a TPU's compiler has estimated for the operations of an update, by part.

    It states none for collectives, nor for kernels in Pallas. A fusion of several parts counts as
    that of its last operation.
    """
    bodies = _computations(hlo)
    loops, total = _loops(bodies), Counter()
    for name, lines in bodies.items():
        for line in lines:
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                source = re.search(r'op_name="([^"]*)"', line)
                total[part(source[1] if source else "")] += int(estimate[1]) * prod(loops[name])
    return total


def part(source: str) -> str:
    """Return the part of a training step that the name of a JAX operation belongs to."""
    return next((name for name, pattern in PARTS.items() if re.search(pattern, source)), "other")


def table(collectives: list[Collective]) -> Counter:
    """Sum the bytes of an update by (kind, axes, depth)."""
    total = Counter()
    for c in collectives:
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
    """Return the trip counts of the loops around each computation, outermost first."""
    callers = {}
    names = r"\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
    call = re.compile(rf"(body|condition|calls|to_apply|branch_computations)={names}")
    for caller, lines in bodies.items():
        for line in lines:
            for kind, names in call.findall(line):
                loop = (_trips(line, lines, bodies),) if kind == "body" else ()
                for name in re.findall(r"%([\w.\-]+)", names):
                    callers.setdefault(name, []).append((caller, loop))

    def around(name: str) -> tuple[int, ...]:
        paths = [around(caller) + loop for caller, loop in callers.get(name, [])]
        return max(paths, key=len, default=())

    return {name: around(name) for name in bodies}


def _values(lines: list[str]) -> dict[str, str]:
    """Return the operation, with its shape, that each name of a computation stands for."""
    found = (re.match(r"(?:ROOT )?%?(\S+) = (.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _trips(loop: str, around: list[str], bodies: dict[str, list[str]]) -> int:
    """Return how often a `while` runs: the compiler says so, or its condition `i < constant`.

    1 where neither does. TPUs' loops may begin after 0, or count by twos where they were unrolled.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    condition, body = (bodies[re.search(rf"{part}=%([\w.\-]+)", loop)[1]] for part in _PARTS)
    inside = _values(condition)
    test = re.search(r"ROOT .* compare\(%(\S+), %(\S+)\), direction=LT", "\n".join(condition))
    index = test and re.search(r"get-tuple-element\(.*\), index=(\d+)", inside.get(test[1], ""))
    if not index or (end := _constant(inside, test[2])) is None:
        return 1
    before, i = _values(around), int(index[1])
    start = _constant(before, _element(before.get(re.search(r"while\(%(\S+)\)", loop)[1], ""), i))
    values = _values(body)
    root = next(line for line in body if line.startswith("ROOT"))
    step = re.search(r" add\(%(\S+), %(\S+)\)", values.get(_element(root, i), ""))
    by = step and (_constant(values, step[2]) or _constant(values, step[1]))
    return max(1, -(-(end - (start or 0)) // (by or 1)))


_PARTS = ("condition", "body")


def _element(line: str, index: int) -> str:
    """Return the name of an element of `tuple(%a, %b)`."""
    match = re.search(r" tuple\((.*?)\)", line)
    names = re.findall(r"%([\w.\-]+)", match[1]) if match else []
    return names[index] if index < len(names) else ""


def _constant(values: dict[str, str], name: str) -> int | None:
    match = re.search(r" constant\((\d+)\)", values.get(name, ""))
    return int(match[1]) if match else None


def _size(text: str) -> int:
    """Return the bytes of the arrays in an HLO shape such as `(f32[4,2]{1,0}, bf16[])`."""
    arrays = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", text)
    return sum(BYTES[kind] * prod(int(d) for d in dims.split(",") if d) for kind, dims in arrays)


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of any group differ."""
    groups = _groups(line) or [list(range(mesh.size))]
    axes = set()
    for group in groups:
        coordinates = np.array(np.unravel_index(group, mesh.devices.shape))
        axes |= {a for a, along in zip(mesh.axis_names, coordinates, strict=True) if np.ptp(along)}
    return tuple(a for a in mesh.axis_names if a in axes)


def _groups(line: str) -> list[list[int]]:
    """Return groups of devices that talk to each other, by index in the mesh; [] means all devices.

    XLA writes them in three ways: as lists `{{0,1},{2,3}}`; as an array of all devices, of which
    each row is a group, `[2,4]<=[4,2]T(1,0)`; and as axes of a mesh, `mesh['a'=4,'b'=2] {'a'}`.
    """
    written = re.search(r"\b(?:replica_groups|source_target_pairs)=(.*)", line)
    if not written or written[1].startswith("{}"):
        return []
    text = written[1]
    if match := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
        return [_numbers(group) for group in match[1].split("},{")]
    if match := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _device_ids(match[2]).reshape(_numbers(match[1])).tolist()
    if match := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        return [_first_group_of_mesh(*match.groups())]
    raise ValueError(f"this reader does not know these replica groups of XLA's: {text[:200]}")


def _first_group_of_mesh(axes: str, order: str | None, grouped: str) -> list[int]:
    """Return the first device's group: all that differ from it along the grouped axes alone.

    axes: `'a'=4,'b'=2`. order: the mesh's devices, where they are not 0, 1, 2, ...
    grouped: `'b','a':(1)2`, of which the latter is the part of 2 of axis a that has 1 before it,
    that is, with a = 4 written as 2 x 2, the first of both.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _device_ids(order or f"[{prod(sizes.values())}]").reshape(tuple(sizes.values()))
    along = {name: [0] for name in sizes}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        count = int(size or sizes[name])
        stride = sizes[name] // (int(before or 1) * count)
        along[name] = [start + i * stride for start in along[name] for i in range(count)]
    return ids[np.ix_(*along.values())].flatten().tolist()


def _device_ids(text: str) -> np.ndarray:
    """Parse `[4,2]T(1,0)`, which is 0 to 7 as an array, transposed, or the ids `0,2,1,3`."""
    shape, _, order = text.partition("T")
    if not shape.startswith("["):
        return np.array(_numbers(text))
    dims = _numbers(shape)
    return np.arange(prod(dims)).reshape(dims).transpose(_numbers(order) or None).flatten()


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]

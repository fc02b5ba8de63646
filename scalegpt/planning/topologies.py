"""Name machines: `v5e:16x16` is a TPU slice, `h100:4x8` four nodes of eight GPUs."""

import difflib
import math
import re
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations_with_replacement

import psutil

from scalegpt.errors import Mistake
from scalegpt.planning.chips import CHIPS, Chip
from scalegpt.step import sharding

_V3 = ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
_V5E = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SHAPES = {"v2": ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)), "v3": _V3, "v5e": _V5E, "v6e": _V5E}
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of three axes: less than a cube of 4x4x4
_NODE = (1, 2, 4, 8)
_ALIASES = {"v5litepod": "v5e", "v5": "v5p", "v7x": "tpu7x", "a100-80gb": "a100"}


@dataclass(frozen=True)
class Topology:
    """A topology is a machine: slices of chips that lie in a torus, or nodes of GPUs.

    shape: chips along each axis of a slice; of GPUs (nodes, GPUs of a node); of a machine of
    another kind (1, devices). chip: None for that one, of which only the memory is known.
    memory: bytes of a device.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    memory: float
    chip: Chip | None
    slices: int = 1

    @property
    def chips(self) -> int:
        """Count the chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Count JAX's devices of all slices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def platform(self) -> str:
        """What a program is lowered for, one of attention.PLATFORMS."""
        vendor = re.match("[A-Za-z]*", self.kind)[0]
        return {"cpu": "cpu", "TPU": "tpu", "AMD": "rocm"}.get(vendor, "cuda")

    @property
    def hosts(self) -> int:
        """Count the machines that the chips are plugged into."""
        return max(1, self.chips // self.chip.chips_of_a_host) if self.chip else 1


@cache
def shapes(name: str) -> tuple[tuple[int, ...], ...]:
    """Return the legal shapes of a chip of CHIPS, smallest first.

    With three axes these are parts of a cube of 4x4x4, and A <= B <= C of multiples of 4.
    """
    chip = CHIPS[name]
    if name in _SHAPES:
        return _SHAPES[name]
    if not chip.axes:
        nodes = range(2, chip.largest // _NODE[-1] + 1)
        return (*((1, gpus) for gpus in _NODE), *((n, _NODE[-1]) for n in nodes))
    sides = range(4, chip.largest // 16 + 1, 4)
    cubes = [
        (a, b, c)
        for a, b in combinations_with_replacement(sides, 2)
        if a * b * b <= chip.largest
        for c in range(b, chip.largest // (a * b) + 1, 4)
    ]
    return (*_SMALL, *sorted(cubes, key=lambda shape: (math.prod(shape), shape[2])))


def usual_shapes(name: str) -> list[tuple[int, ...]]:
    """Return one shape for each power of two of chips, the one nearest to a cube."""
    by_size: dict[int, tuple[int, ...]] = {}
    for shape in shapes(name):
        if (size := math.prod(shape)) & (size - 1) == 0:
            by_size[size] = min(by_size.get(size, shape), shape, key=sum)
    return list(by_size.values())


def parse(text: str, slices: int = 1, flag: str = "--topology") -> Topology:
    """Return the machine that a user names, as v5e:4x4, v3-8, v4-32, h100:2x8 or h100-16.

    flag: by which it was named. Raises Mistake, with the nearest names that are legal.
    """
    match = re.fullmatch(r"([a-z]\w*)(?:[:=](\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    name = _ALIASES.get(match[1], match[1]) if match else text.partition(":")[0].lower()
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Mistake(
            f"{flag}={text}: no chip is called {name!r}; {hint}there are {', '.join(CHIPS)}, "
            "each with a shape, as v5e:4x4; --topology list shows them"
        )
    chip, legal = CHIPS[name], shapes(name)
    if match and match[3]:
        shape = _shape_of_size(name, int(match[3]))
    else:
        shape = tuple(map(int, match[2].split("x"))) if match else ()
    if shape not in legal:
        near = sorted(legal, key=lambda other: _distance(other, shape, chip, match))[:3]
        if not match:
            near = usual_shapes(name)
        raise Mistake(
            f"{flag}={text}: {'there is no such slice' if chip.axes else 'no such nodes'}; "
            f"{'legal are' if not match else 'the nearest are'} "
            f"{', '.join(written(name, other) for other in near)}; --topology list shows all"
        )
    if slices < 1 or slices > 1000:
        raise Mistake(f"--slices={slices} must be at least 1 and at most 1000")
    if slices > 1 and not (chip.axes and chip.network):
        what = "has no network between slices" if chip.axes else "is counted in nodes, as h100:4x8"
        raise Mistake(f"--slices={slices}: {name} {what}; leave --slices out")
    return Topology(written(name, shape), chip.kind, shape, chip.memory, chip, slices)


def written(name: str, shape: tuple[int, ...]) -> str:
    """Write a topology as `parse` reads it."""
    return f"{name}:{'x'.join(map(str, shape))}"


def _shape_of_size(name: str, size: int) -> tuple[int, ...]:
    """Return the usual shape for the number in "v4-32", or () if there is none."""
    counts = CHIPS[name].name_counts
    known = {math.prod(shape) * counts: shape for shape in usual_shapes(name)}
    return known.get(size, ()) if counts else ()


def _distance(other: tuple, shape: tuple, chip: Chip, match: re.Match | None) -> tuple:
    """Compare shapes by their number of chips, then by their sides."""
    size = math.prod(shape)
    if match and match[3]:
        size = int(match[3]) / (chip.name_counts or 1)
    sides = sorted(shape), sorted(other)
    far = sum(abs(a - b) for a, b in zip(*sides, strict=False)) + abs(len(shape) - len(other))
    return abs(math.log(math.prod(other) / max(size, 0.5))), far, max(other)


def with_efficiency(topology: Topology, share: float | None) -> Topology:
    """Return the machine with the Chip.efficiency that a run has shown; None changes nothing."""
    if share is None or topology.chip is None:
        return topology
    return replace(topology, chip=replace(topology.chip, efficiency=share))


def like(devices: str) -> Topology | None:
    """Return the usual machine with devices as "8 x TPU v3", which checkpoints keep; None if there
    is none in CHIPS."""
    match = re.fullmatch(r"(\d+) x (.*)", devices)
    for name, chip in CHIPS.items() if match else ():
        if match[2].startswith(chip.kind):
            sizes = {math.prod(shape) * chip.devices: shape for shape in usual_shapes(name)}
            shape = sizes.get(int(match[1]))
            return parse(written(name, shape)) if shape else None
    return None


def listing() -> str:
    """Return the table of `--topology list`."""
    lines = []
    for name, chip in CHIPS.items():
        sizes = " ".join(written(name, shape).partition(":")[2] for shape in usual_shapes(name))
        cores = ", two devices a chip" if chip.devices == 2 else ""
        what = f"up to {chip.largest:,} chips{cores}" if chip.axes else "nodes x GPUs of a node"
        lines += [f"{name:6} {chip.kind}, {chip.memory / 2**30:.2f} GiB a device; {what}"]
        lines += textwrap.wrap(sizes, 72, initial_indent=" " * 7, subsequent_indent=" " * 7)
    return "\n".join(
        [
            *lines,
            "Slices of three axes: also other AxBxC of multiples of 4 with A <= B <= C.",
            "Written as v5e:4x4 or h100:2x8, or by size as v3-8, v4-32, h100-16.",
        ]
    )


def here() -> Topology:
    """Return this machine, and those of a run's other processes, by JAX's devices.

    Of a kind that CHIPS does not have, as a CPU, only the memory is known.
    """
    devices = sharding.all_devices()
    kind, count = devices[0].device_kind, len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    memory = float(limit or psutil.virtual_memory().total / len(devices))
    chip = next((c for c in CHIPS.values() if kind.startswith(c.kind)), None)
    if chip and chip.axes:
        shape = tuple(max(d.coords[i] for d in devices) + 1 for i in range(chip.axes))
        slices = len({getattr(d, "slice_index", 0) for d in devices})
        if math.prod(shape) * slices * chip.devices != count:  # a part of a slice
            shape, slices = (count // chip.devices, *(1,) * (chip.axes - 1)), 1
        return Topology("this machine", kind, shape, memory, chip, slices)
    if chip:
        nodes = max(1, count // 8)
        return Topology("this machine", kind, (nodes, count // nodes), memory, chip)
    return Topology("this machine", kind, (1, count), memory, None)

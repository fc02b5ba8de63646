"""Estimate how long an update takes on a machine, by arithmetic.

Symbols as in "How to Scale Your Model": an all-gather or reduce-scatter of V bytes over a ring that
carries W bytes/s takes V / W, an all-reduce twice that. What is divided over the devices, and what
moves between them and when, is what step/build.py makes of a config.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.config import Config
from scalegpt.config.recipe import ModelConfig
from scalegpt.model import flops
from scalegpt.model.parameters import parameters
from scalegpt.planning.memory import parameters_on_device, products
from scalegpt.planning.topologies import Topology
from scalegpt.step.muon import layout

# These are expectations, not fits: of the shorter one of arithmetic and the traffic beside it this
# share is not hidden, as the scaling book expects nearly full overlap.
NOT_HIDDEN = 0.1
# Tensor traffic lies between two products that depend on it. With half of it exposed, 70B on 256
# H100 comes out at 661 tokens/s a GPU; torchtitan published 597, and 652 with both interleaved.
TENSOR_NOT_HIDDEN = 0.5
# What products reach in the best and the worst case, of Chip.efficiency.
BEST, WORST = 1.2, 1 / 1.35
CEILING = 0.9  # of the peak
HOP = 1e-6  # seconds that a byte needs to the next chip
NODE_HOP = 1e-5  # and a collective of GPUs to begin


@dataclass(frozen=True)
class Ring:
    """A ring is what a mesh axis communicates over: seconds for each byte that an all-gather
    collects, and the least seconds of an operation."""

    seconds_per_byte: float = 0.0
    latency: float = 0.0

    def gather(self, bytes_: float, operations: float = 1) -> float:
        """Return the seconds of all-gathers, or reduce-scatters, that collect so many bytes."""
        return max(bytes_ * self.seconds_per_byte, operations * self.latency)


@dataclass(frozen=True)
class Work:
    """The work of a sequence in a run: FLOPs of a forward pass and parameters, by what they do."""

    matrices: float
    attention: float
    head: float
    layer_parameters: int
    table: int
    matrices_of_a_layer: int
    model_flops: float


@lru_cache
def work(model: ModelConfig) -> Work:
    """Count the work of a sequence of block_size tokens."""
    parts = flops.flops_by_component(model, causal=True)
    attention = parts["attn/scores"] + parts["attn/reduce"]
    matrices = [p for p in parameters(model).values() if p.kind == "matrices"]
    return Work(
        sum(parts.values()) - attention - parts["head"],
        attention,
        parts["head"],
        sum(math.prod(p.shape) for p in matrices),
        model.padded_vocab * model.n_embd,
        len(matrices),
        3 * sum(parts.values()),
    )


def executed_flops(model: ModelConfig, remat: str, attention: str, context: int = 1) -> float:
    """Count the FLOPs that a device executes for a sequence, recomputation included.

    The loss recomputes the logits, and attention its scores: half of its forward pass, where it is
    not Flax's. XLA's attention computes blocks of a quarter of the queries, 5/4 of what is seen.
    Where context splits sequences, XLA's computes all scores.
    Not counted are the scores that XLA's computes again on TPUs, as that takes no longer.
    """
    w, again = work(model), {"none": 0, "full": 1}.get(remat, 0.02)
    beyond = {"flax": 2.0, "xla": 1.25}.get(attention, 1.1)
    if context > 1 and attention == "xla":
        beyond = 2.0
    passes = (3 if attention == "flax" else 3.5) + (1 if remat == "full" else 0)
    return w.matrices * (3 + again) + w.attention * beyond * passes + 4 * w.head


def efficiency(topology: Topology, model: ModelConfig) -> float:
    """Return the share of the peak that products reach on a chip: less for narrow models.

    At 1,024 channels it is 70 % of what it is from 4,096 on (Levanter on v3: 51 % at 345M, 77 % at
    13B, recomputation included).
    """
    width = min(1.0, max(0.0, math.log2(model.n_embd / 1024) / 2))
    return topology.chip.efficiency * (0.7 + 0.3 * width)


def rings(topology: Topology, mesh: Mapping[str, int]) -> dict[str, Ring]:
    """Return what each mesh axis communicates over, within a slice or over all nodes."""
    return (_torus if topology.chip.axes else _nodes)(topology, mesh)


def _torus(topology: Topology, mesh: Mapping[str, int]) -> dict[str, Ring]:
    """Lay mesh axes on the axes of a torus, `tensor` first, as jax.make_mesh does.

    A ring goes both ways; an axis without wrap-around, or a part of one, carries half. Two cores of
    a chip share its links, and exchange over its memory.
    """
    chip = topology.chip
    left = {i: size for i, size in enumerate(topology.shape)}
    cores, result = chip.devices, {}
    for axis in ("tensor", "context", "fsdp", "data", "replica"):
        size = mesh[axis] // (topology.slices if axis == "replica" else 1)
        if size == 1:
            result[axis] = Ring()
            continue
        together = math.gcd(size, cores)
        size, cores = size // together, cores // together
        links = hops = 0.0
        for i in _taken(left, size):
            part = math.gcd(size, left[i])
            whole = topology.shape[i]
            wraps = part == whole and whole % chip.wraps == 0
            links += chip.link * (2 if wraps else 1)
            hops += part / 2 if wraps else part
            size, left[i] = size // part, left[i] // part
        # In a chip, one core reads what the other has written.
        speed = links * together / chip.devices if links else chip.memory_speed / 2
        share = 1 - 1 / mesh[axis]
        result[axis] = Ring(share / speed, hops * HOP)
    return result


def _taken(left: dict[int, int], size: int) -> list[int]:
    """Return axes of a torus for a mesh axis: some that fit it whole, else the largest parts."""
    axes = [i for i, n in left.items() if n > 1]
    best: list[int] = []
    for chosen in range(1, 2 ** len(axes)):
        some = [axis for bit, axis in enumerate(axes) if chosen >> bit & 1]
        if math.prod(left[i] for i in some) == size and len(some) > len(best):
            best = some
    if best:
        return best
    order, parts = sorted(axes, key=lambda i: -math.gcd(size, left[i])), []
    for i in order:
        if (part := math.gcd(size, left[i])) > 1:
            parts.append(i)
            size //= part
    return parts


def _nodes(topology: Topology, mesh: Mapping[str, int]) -> dict[str, Ring]:
    """Lay mesh axes on nodes of GPUs, `tensor` first, so that it is within a node."""
    chip, gpus, result, stride = topology.chip, topology.shape[1], {}, 1
    for axis in ("tensor", "context", "fsdp", "data", "replica"):
        size = mesh[axis]
        inside = math.gcd(size, max(1, gpus // stride))
        outside = size // inside
        # All GPUs of a node bring in what they need of the others' parts, over their own network.
        seconds = max((1 - 1 / inside) / chip.link, (1 - 1 / outside) / (chip.network * inside))
        latency = NODE_HOP * (math.log2(inside) + 2 * math.log2(outside)) if size > 1 else 0.0
        result[axis] = Ring(seconds, latency)
        stride *= size
    return result


def seconds_by_term(
    config: Config,
    topology: Topology,
    mesh: Mapping[str, int],
    microbatch: int,
    accumulation: int,
    remat: str,
    attention: str,
    itemsize: int,
) -> dict[str, float]:
    """Estimate the seconds of an update, of each kind as if nothing else happened meanwhile.

    mesh: sizes of all axes. microbatch: sequences of a device at a time. arithmetic: at the
    expected efficiency. hbm: reading and writing parameters, gradients and moments. host: what
    remat=offload moves.
    """
    model, chip = config.model, topology.chip
    w, tensor, context = work(model), mesh["tensor"], mesh["context"]
    tokens = microbatch * model.block_size / context
    peak = flops.peak_flops(topology.kind, {2: "bfloat16", 4: "float32"}[itemsize])
    speed = peak * efficiency(topology, model)
    ring = rings(topology, mesh)
    trained = parameters_on_device(model, mesh, "trained", config.lora)

    executed = microbatch * accumulation / tensor / context
    executed *= executed_flops(model, remat, attention, context)
    gathered = itemsize * (w.layer_parameters + 2 * w.table) / tensor
    # What goes into a layer's two blocks of products is gathered over `tensor`, and what comes out
    # is scattered; backward the other way round. What is not kept of these is gathered again, and
    # with remat=full the attention's scattered again.
    moves = {"none": 8, "full": 11}.get(remat, 10) * model.n_layer * accumulation
    operations = 3 * accumulation * model.n_layer * w.matrices_of_a_layer
    # Keys and values are gathered, again backward, and their gradients scattered.
    passes = 2 * model.n_layer * (4 if remat == "full" else 3) * accumulation
    keys = microbatch * model.block_size * model.kv_heads * model.head_dim / tensor
    # AdamW reads parameter, gradient and two moments, and writes three of them; a microbatch reads
    # the weights twice, and adds a gradient to a sum.
    moments = 28 * trained
    per_microbatch = 2 * itemsize * w.layer_parameters / tensor + 12 * trained * (accumulation > 1)
    terms = {
        "arithmetic": (executed + _muon_flops(config, mesh)) / speed,
        "hbm": (moments + accumulation * per_microbatch) / chip.memory_speed,
        "fsdp": ring["fsdp"].gather(3 * accumulation * gathered / context, operations)
        + ring["context"].gather(3 * accumulation * gathered, operations),
        "tensor": ring["tensor"].gather(moves * itemsize * tokens * model.n_embd, moves),
        "context": ring["context"].gather(passes * itemsize * keys, passes),
        "data": ring["data"].gather(8 * trained, 2) + ring["replica"].gather(8 * trained, 2),
        "slices": 0.0,
        "host": 0.0,
    }
    if remat == "offload":  # to the host and back
        moved = 2 * accumulation * products(model, mesh, microbatch, itemsize)
        terms["host"] = moved * chip.devices / chip.host_link
    if topology.slices > 1:
        per_device = chip.network / chip.devices
        terms["slices"] = 8 * trained * (1 - 1 / topology.slices) / per_device
    if config.optim.name == "muon":  # the orthogonalised matrices come back to all copies
        matrices = parameters_on_device(model, mesh, "matrices")
        terms["data"] += ring["data"].gather(itemsize * matrices)
    return terms


def _muon_flops(config: Config, mesh: Mapping[str, int]) -> float:
    """Count Muon's FLOPs on a device, which orthogonalises whole matrices of its own."""
    if config.optim.name != "muon":
        return 0.0
    devices = mesh["data"] * mesh["fsdp"] * mesh["context"] * mesh["tensor"]
    stacks: dict[tuple[int, int], int] = {}
    for parameter in parameters(config.model).values():
        if parameter.kind != "matrices":
            continue
        stack, embed, other, _ = layout(parameter.axes)
        sides = (math.prod(parameter.shape[i] for i in axes) for axes in (embed, other))
        m, n = sorted(sides)
        stacks[m, n] = stacks.get((m, n), 0) + math.prod(parameter.shape[i] for i in stack)
    return sum(
        -(-number // devices) * config.optim.ns_steps * (4 * m * m * n + 2 * m**3)
        for (m, n), number in stacks.items()
    )


def fitted_efficiency(terms: Mapping[str, float], expected: float, measured: float) -> float | None:
    """Return the efficiency with which updates likely take the seconds that were measured.

    expected: with which `terms` were estimated. None where none explains them.
    """
    low, high = 1e-3, 2.0

    def likely(share: float) -> float:
        seconds = terms["arithmetic"] * expected / share
        return step_seconds({**terms, "arithmetic": seconds}, share)[1]

    if not likely(high) < measured < likely(low):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if likely(middle) > measured else (low, middle)
    return high


def step_seconds(terms: Mapping[str, float], chip_efficiency: float) -> tuple[float, float, float]:
    """Return the least, the likely and the most seconds of an update, from `seconds_by_term`.

    Least: all traffic is hidden behind arithmetic at its best. Most: nothing is, and arithmetic is
    at its worst. Gradients are summed over data, replica and slices after the last microbatch, so
    nothing hides them but in the least.
    """
    best = min(BEST, CEILING / chip_efficiency)
    math_s, hbm = terms["arithmetic"], terms["hbm"]
    after = terms["data"] + terms["slices"]
    between = terms["tensor"] + terms["context"]
    beside = terms["fsdp"] + (1 - TENSOR_NOT_HIDDEN) * between
    least = max(math_s / best, terms["fsdp"] + between, after, terms["host"])
    *hidden, longest = sorted((math_s, beside, terms["host"]))  # over links of their own
    likely = longest + NOT_HIDDEN * sum(hidden)
    likely += TENSOR_NOT_HIDDEN * between + hbm + after
    most = sum(terms.values()) + math_s * (1 / WORST - 1)
    return least, likely, most

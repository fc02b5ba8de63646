"""A plan says of a run on a machine whether it fits, how fast it will be, and what bounds it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.sharding import AbstractMesh

from scalegpt.config import Config
from scalegpt.config.types import divisors
from scalegpt.data.token_files import read_meta
from scalegpt.errors import Mistake
from scalegpt.files.folder import expanded
from scalegpt.model import attention, flops
from scalegpt.planning import memory, speed
from scalegpt.planning.topologies import Topology, parse, usual_shapes, written
from scalegpt.step import pmap, sharding
from scalegpt.step.build import CPU_TOKENS

GPT2_VOCABULARY = 50257
SPARE = 0.15  # of a device's memory, that a recommended plan leaves: estimates err
ALIKE = 0.02  # of plans whose times differ by less, the simplest is recommended
MOST_TENSOR = 16  # beyond, traffic always wins
MOST_DEVICES = 256  # of a sweep


@dataclass(frozen=True)
class Plan:
    """A plan is a run on a machine with a mesh, a microbatch and a remat policy, and its estimates.

    bytes: of a device, by term. host_bytes: those of a device that are in its host's memory.
    seconds: of an update, by term, as `speed.seconds_by_term` has them; {} where the chip's speed
    is not known.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    microbatch: int
    accumulation: int
    remat: str
    dtype: str
    attention: str
    bytes: dict[str, int]
    host_bytes: int
    seconds: dict[str, float]

    @property
    def total_bytes(self) -> int:
        """Count all bytes of a device."""
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough, by the estimate."""
        return self.total_bytes <= self.topology.memory

    @property
    def tokens(self) -> int:
        """Count the tokens of an update."""
        return self.config.batch.sequences * self.config.row_width

    @cached_property
    def step(self) -> tuple[float, float, float] | None:
        """The least, the likely and the most seconds of an update."""
        if not self.seconds:
            return None
        return speed.step_seconds(self.seconds, speed.efficiency(self.topology, self.config.model))

    @property
    def mfu(self) -> float | None:
        """The likely model FLOPs utilisation, as perf/mfu of a run; attention counts causally."""
        if not self.step:
            return None
        speed_ = self.tokens / self.step[1]
        devices, kind = self.topology.devices, self.topology.kind
        return flops.mfu(self.config.model, speed_, kind, devices, self.dtype)

    @property
    def bound(self) -> str | None:
        """The term that takes the longest."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None

    @property
    def run_seconds(self) -> tuple[float, ...] | None:
        """The least, the likely and the most seconds of all updates of the run."""
        batch, steps = self.config.batch, self.config.optim.steps
        updates = batch.rows_after(steps) / batch.sequences
        return tuple(updates * seconds for seconds in self.step) if self.step else None

    def needed_tokens(self) -> dict[str, float]:
        """Return how many tokens a device needs for arithmetic to take as long as the traffic.

        fsdp: of a microbatch; data and slices: of an update. Only of axes that are used.
        """
        if not self.seconds:
            return {}
        math_s, tokens = self.seconds["arithmetic"], self.device_tokens
        per_microbatch = {"fsdp": tokens}
        per_update = dict.fromkeys(("data", "slices"), tokens * self.accumulation)
        return {
            axis: count * self.seconds[axis] / math_s
            for axis, count in (per_microbatch | per_update).items()
            if self.seconds[axis]
        }

    @property
    def device_tokens(self) -> float:
        """The tokens of a microbatch of one device; tensor and context shards have a part of each
        sequence's work."""
        shards = self.mesh["tensor"] * self.mesh["context"]
        return self.microbatch * self.config.row_width / shards


def check(config: Config) -> None:
    """Raise Mistake for a run of which arithmetic knows too little."""
    if config.objective.name not in ("text", "sft"):
        raise Mistake(
            f"objective.name={config.objective.name}: only text and sft can be planned, as other "
            "objectives have more than one forward pass, and grpo writes answers"
        )
    if config.optim.counts_epochs:
        raise Mistake(
            f"optim.epochs={config.optim.epochs}: how many updates that is follows from the data, "
            "which are not read here; give the updates: --optim.steps=1000"
        )


def with_vocabulary(config: Config) -> tuple[Config, str]:
    """Return the config with the vocabulary size of its data, else GPT-2's, and its source."""
    if config.model.vocab_size is not None:
        return config, "model.vocab_size"
    paths = [path for path in config.data.weights if path]
    metas = [(read_meta(expanded(path)), path) for path in paths]
    if sizes := [(meta["vocab_size"], path) for (meta, stated), path in metas if stated]:
        vocabulary, path = max(sizes)
        return config.with_vocab(vocabulary), f"meta of {path}"
    reason = f"no {paths[0]}/meta.json" if paths else "no data"
    return config.with_vocab(GPT2_VOCABULARY), f"GPT-2's, or model.vocab_size: {reason}"


def own_plan(config: Config, topology: Topology, remat: str | None = None) -> Plan:
    """Plan a run as its config says, or with another remat policy.

    Raises Mistake where mesh, batch and model do not fit each other or the machine.
    """
    shape = sharding.mesh_shape(config.mesh, topology.devices, topology.name)
    if shape[0] % topology.slices:
        raise Mistake(
            f"mesh.replica={shape[0]} must be a multiple of the {topology.slices} slices; "
            f"set --mesh.replica={topology.slices}, or let --search choose the mesh"
        )
    if config.run.backend == "pmap":
        pmap.check_whole(dict(zip(sharding.AXES, shape, strict=True)))
    return _plan(config, topology, shape, remat or config.model.remat)


def _plan(config: Config, topology: Topology, shape: tuple[int, ...], remat: str) -> Plan:
    """Estimate a plan; raises Mistake where mesh, model and batch do not fit each other."""
    model, kind = config.model, topology.kind
    mesh = AbstractMesh(shape, sharding.AXES)
    sharding.check_divisible(model, mesh)
    on_cpu = topology.platform == "cpu"
    most = max(1, CPU_TOKENS // config.row_width) if on_cpu else None
    accumulation, rows = sharding.batch_layout(config.batch, mesh, most)
    microbatch = rows // sharding.row_shards(mesh)
    dtype = ("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype
    itemsize = {"float32": 4}.get(dtype, 2)
    kernel = attention.resolve(
        model.attention,
        topology.platform,
        config.row_width,
        model.dropout,
        dtype,
        model.head_dim,
        kind,
        isolate=bool(model.isolate),
        context=mesh.shape["context"],
    )
    sizes = dict(mesh.shape)
    bytes_ = memory.on_device(
        model,
        sizes,
        microbatch,
        accumulation,
        itemsize,
        kernel != "flax" and not model.dropout and not on_cpu,
        "dots" if on_cpu and remat == "offload" else remat,  # a CPU's memory is its host's
        config.optim,
        config.lora,
    )
    offloaded = 0
    if remat == "offload" and not on_cpu:
        offloaded = memory.products(model, sizes, microbatch, itemsize)
    seconds = {}
    if topology.chip and flops.peak_flops(kind, dtype):
        seconds = speed.seconds_by_term(
            config, topology, sizes, microbatch, accumulation, remat, kernel, itemsize
        )
    chosen = (sizes, microbatch, accumulation, remat, dtype, kernel)
    return Plan(config, topology, *chosen, bytes_, round(offloaded), seconds)


def applied(plan: Plan) -> Config:
    """Return the run with the mesh, the microbatch and the remat policy of its plan."""
    c = plan.config
    sections = {
        "mesh": c.mesh.model_copy(update=plan.mesh),
        "batch": c.batch.model_copy(update={"microbatch": plan.microbatch}),
        "model": c.model.model_copy(update={"remat": plan.remat}),
    }
    return c.model_copy(update=sections)


def search(config: Config, topology: Topology) -> list[Plan]:
    """Return the plans that fit with SPARE memory, fastest first, over meshes, microbatches, remat.

    The size of context is the config's; remat=offload is tried only where dots does not fit. Of
    those that are nearly as fast as the fastest, the one with the fewest shards is the first. []
    where none fits, or where no speed is known.
    """
    found = []
    context = max(1, config.mesh.context)  # as given: more is only for sequences that do not fit
    inside, beyond = divmod(topology.devices // topology.slices, context)
    if beyond:
        return []
    whole = config.run.backend == "pmap"
    gpus = topology.shape[1] if topology.chip and not topology.chip.axes else MOST_TENSOR
    for tensor in divisors(inside):
        if tensor > min(gpus, MOST_TENSOR) or (whole and tensor > 1):
            break
        for fsdp in divisors(inside // tensor):
            if whole and fsdp > 1:
                break
            shape = (topology.slices, inside // tensor // fsdp, fsdp, context, tensor)
            found += _with_all_microbatches(config, topology, shape)

    if not found:
        return []
    fastest = min(plan.step[1] for plan in found)

    def order(plan: Plan) -> tuple:
        simple = (plan.mesh["tensor"], plan.mesh["fsdp"], memory.REMAT.index(plan.remat))
        alike = plan.step[1] <= (1 + ALIKE) * fastest
        return (not alike, *(simple if alike else ()), plan.step[1])

    return sorted(found, key=order)


def _with_all_microbatches(
    config: Config, topology: Topology, shape: tuple[int, ...]
) -> list[Plan]:
    shards = math.prod(shape[: len(sharding.ROWS)])
    every = math.gcd(config.batch.sequences, *config.batch.growth.values())
    if every % shards:
        return []
    plans = []
    for microbatch in divisors(every // shards):
        batch = config.batch.model_copy(update={"microbatch": microbatch})
        changed = config.model_copy(update={"batch": batch})
        fitting = set()
        for remat in memory.REMAT:
            if remat == "offload" and "dots" in fitting:  # which is as fast at least
                continue
            try:
                plan = _plan(changed, topology, shape, remat)
            except Mistake:  # heads or widths that the mesh does not divide
                return []
            if plan.step and plan.total_bytes <= (1 - SPARE) * topology.memory:
                plans.append(plan)
                fitting.add(remat)
    return plans


def sweep(config: Config, names: Sequence[str]) -> list[Plan]:
    """Return the best plan for each usual shape of the chips `names`, up to MOST_DEVICES.

    Shapes on which nothing fits are left out.
    """
    best = []
    for name in names:
        for shape in usual_shapes(name):
            topology = parse(written(name, shape))
            if topology.devices <= MOST_DEVICES:
                best += search(config, topology)[:1]
    return best


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the figures of a plan that a script reads; step_seconds are [least, likely, most]."""
    return {
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "device": plan.topology.kind,
        "devices": plan.topology.devices,
        "chips": plan.topology.chips,
        "fits": plan.fits,
        "bytes_per_device": plan.bytes,
        "total_bytes": plan.total_bytes,
        "memory_bytes": round(plan.topology.memory),
        "host_bytes_per_device": plan.host_bytes,
        "step_seconds": plan.step and list(plan.step),
        "seconds": plan.seconds,
        "tokens_per_second": plan.step and plan.tokens / plan.step[1],
        "mfu": plan.mfu,
        "bound": plan.bound,
        "needed_tokens": plan.needed_tokens(),
        "mesh": plan.mesh,
        "microbatch": plan.microbatch,
        "accumulation": plan.accumulation,
        "remat": plan.remat,
        "dtype": plan.dtype,
        "attention": plan.attention,
    }

"""Plans against figures by hand, the scaling book's thresholds, published runs and the compiler."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT
from jax.sharding import SingleDeviceSharding
from planning import memory_check

from scalegpt import plan as command
from scalegpt.config import Config, MeshConfig
from scalegpt.errors import Mistake
from scalegpt.model import flops
from scalegpt.planning import compiler, hlo, plans, speed, tables, topologies
from scalegpt.planning.chips import CHIPS, CLOCKS, GIB
from scalegpt.planning.costs import costs
from scalegpt.planning.topologies import parse
from scalegpt.step import build, build_for_training, sharding
from scalegpt.step.muon import orthogonalise

WIDE = {"n_layer": 2, "n_embd": 4096, "n_head": 32, "vocab_size": 1024, "block_size": 1024}
LLAMA_8B = {"preset": "llama-8b", "vocab_size": 128256}
LLAMA_70B = {"preset": "llama", "n_layer": 80, "n_embd": 8192, "n_inner": 28672, "n_head": 64}
LLAMA_70B |= {"n_kv_head": 8, "tie_word_embeddings": False}


def config(sequences: int = 512, microbatch: int | None = None, **sections) -> Config:
    """A run of GPT-2's size, or with other sections."""
    mesh, model, optim = (sections.get(name, {}) for name in ("mesh", "model", "optim"))
    return Config(
        model={"vocab_size": 50257} | model,
        mesh={"data": -1} | mesh,
        batch={"sequences": sequences, "microbatch": microbatch},
        data={"path": ""},
        optim={"steps": 1000, "warmup_steps": 10} | optim,
        run={"out_dir": "none"},
    )


def planned(machine: str, *args, slices: int = 1, **sections) -> plans.Plan:
    return plans.own_plan(config(*args, **sections), parse(machine, slices))


def shape(**sizes: int) -> dict[str, int]:
    return {"replica": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes


@dataclass(frozen=True)
class Chip:
    """A device of a TPU, as jax asks one where it lies."""

    id: int
    coords: tuple
    device_kind: str
    core_on_chip: int
    platform: str = "tpu"
    process_index: int = 0


# --- machines


@pytest.mark.parametrize(
    ("text", "name", "devices", "hosts"),
    [
        ("v3-8", "v3:2x2", 8, 1),
        ("v3:2x2", "v3:2x2", 8, 1),
        ("v2-512", "v2:16x16", 512, 64),
        ("v4-32", "v4:2x2x4", 16, 4),
        ("v4:4x4x12", "v4:4x4x12", 192, 48),
        ("v5litepod-16", "v5e:4x4", 16, 2),
        ("V5E-8", "v5e:2x4", 8, 1),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v6e-1", "v6e:1x1", 1, 1),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 128, 16),
        ("h100-16", "h100:2x8", 16, 2),
        ("a100:1x4", "a100:1x4", 4, 1),
    ],
)
def test_a_machine_has_the_devices_that_jax_has_on_it(text, name, devices, hosts):
    machine = parse(text)
    assert (machine.name, machine.devices, machine.hosts) == (name, devices, hosts)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e:3x3", 1, r"no such slice; the nearest are v5e:2x4, v5e:4x4"),
        ("v5e:8x4", 1, r"the nearest are v5e:4x8,"),
        ("v4:4x4x6", 1, r"the nearest are v4:4x4x(4|8), v4:4x4x"),
        ("v3-12", 1, r"the nearest are v3:2x2"),
        ("v5p-100", 1, r"the nearest are v5p:4x4x4"),
        ("tpu7x-8", 1, r"the nearest are tpu7x:2x2x2"),
        ("h100:8", 1, r"no such nodes; the nearest are h100:1x8"),
        ("h100:2x4", 1, r"the nearest are h100:1x8"),
        ("v5e", 1, r"legal are v5e:1x1, v5e:2x2, v5e:2x4, .*v5e:16x16; --topology list"),
        ("v5e:axb", 1, r"legal are v5e:1x1"),
        ("v9-8", 1, r"no chip is called 'v9'; .*there are v2, v3, v4"),
        ("v5x:2x2", 1, r"did you mean v5[ep]\?"),
        ("b100:1x8", 1, r"did you mean [bah][12]00\?"),
        ("", 1, r"no chip is called ''"),
        ("v5e:4x4", 0, r"--slices=0 must be at least 1"),
        ("v3:2x2", 2, r"--slices=2: v3 has no network between slices"),
        ("h100:1x8", 2, r"is counted in nodes"),
    ],
)
def test_a_machine_that_is_not_there_names_the_nearest(text, slices, message):
    with pytest.raises(Mistake, match=message):
        parse(text, slices)


def test_the_list_names_machines_that_are_read_back():
    lines = topologies.listing().splitlines()
    assert max(map(len, lines)) <= 80
    name, seen = "", []
    for line in lines:
        if head := re.match(r"(\w+) +\S+ .*GiB", line):
            name = head[1]
        elif line.startswith("   "):
            seen += [parse(f"{name}:{shape}").name for shape in line.split()]
    assert {name.partition(":")[0] for name in seen} == CHIPS.keys()
    assert {"v3:32x32", "v4:8x8x16", "v5e:16x16", "v5p:8x16x16", "h100:512x8"} <= set(seen)


def test_several_slices_have_the_devices_of_all():
    two = parse("v5e:16x16", 2)
    assert (two.chips, two.devices, two.hosts) == (512, 512, 64)


@pytest.mark.oracle
def test_devices_and_memory_of_a_tpu_are_what_its_compiler_says():
    """An argument of 2 TiB is refused at once, with the memory that there is."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    for name, chip in CHIPS.items():
        if not chip.axes:
            continue
        for shape in topologies.usual_shapes(name)[-4:]:
            machine = parse(topologies.written(name, shape))
            assert len(compiler.tpu_devices(machine)) == machine.devices, machine
        smallest = parse(topologies.written(name, topologies.shapes(name)[0]))
        device = compiler.tpu_devices(smallest)[0]
        assert device.device_kind == chip.kind
        there = SingleDeviceSharding(device)
        large = jax.ShapeDtypeStruct((2**20, 2**19), "float32", sharding=there)
        with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
            jax.jit(lambda x: 2 * x).lower(large).compile()
        gib = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(refusal.value))[1]
        assert float(gib) == pytest.approx(chip.memory / GIB, abs=0.01), name
        side = jax.ShapeDtypeStruct((4096, 4096), "bfloat16", sharding=there)
        product = jax.jit(lambda x: x @ x).lower(side).compile().as_text()
        seconds = hlo.cycles(product).total() / CLOCKS[chip.kind]
        assert 0.8 < 2 * 4096**3 / seconds / flops.peak_flops(chip.kind) <= 1, name


def test_an_option_that_a_cpus_compiler_does_not_know_is_left_out_with_a_warning(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    (name,) = known = build.compiler_options(mesh)
    assert known == build.CPU_OPTIONS
    monkeypatch.setitem(build.CPU_OPTIONS, "xla_no_such_option", "1")
    with pytest.warns(UserWarning, match="no option xla_no_such_option"):
        assert build.compiler_options(mesh) == known
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false --xla_no_such_option=2")
    assert build.compiler_options(mesh) == {}


@pytest.mark.oracle
def test_a_tpus_compiler_gets_the_options_that_it_knows_where_fsdp_splits_weights(monkeypatch):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    devices = compiler.tpu_devices(parse("v4-8"))

    def options(**sizes: int) -> dict:
        return build.compiler_options(sharding.make_mesh(MeshConfig(**sizes), devices))

    assert options(data=1, fsdp=4) == build.FSDP_OPTIONS
    assert options(data=4) == options(data=1, fsdp=2, tensor=2) == {}
    monkeypatch.setitem(build.FSDP_OPTIONS, "xla_no_such_option", "1")
    with pytest.warns(UserWarning, match="no option xla_no_such_option"):
        known = options(data=1, fsdp=4)
    (name,) = known
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}=8 --xla_no_such_option=2")
    assert options(data=1, fsdp=4) == {}


# --- traffic


@pytest.mark.parametrize(
    ("machine", "sizes", "axis", "bytes_a_second"),
    [
        # Two rings of the torus, each both ways.
        ("v5e:16x16", {"fsdp": 256}, "fsdp", 4 * 4.5e10),
        ("v5e:16x16", {"data": 16, "fsdp": 16}, "fsdp", 2 * 4.5e10),
        ("v5e:16x16", {"data": 16, "fsdp": 16}, "data", 2 * 4.5e10),
        # Without wrap-around, and along a part of an axis, half of it.
        ("v5e:4x4", {"fsdp": 16}, "fsdp", 2 * 4.5e10),
        ("v5e:16x16", {"fsdp": 64, "tensor": 4}, "tensor", 4.5e10),
        ("v4:4x4x4", {"fsdp": 64}, "fsdp", 6 * 4.5e10),
        ("v4:4x4x4", {"fsdp": 16, "tensor": 4}, "fsdp", 4 * 4.5e10),
        ("v4:2x2x4", {"fsdp": 16}, "fsdp", 4 * 4.5e10),
        # Cores share the links of their chip, and gather together what both need.
        ("v3:2x2", {"fsdp": 8}, "fsdp", 2 * 8.3e10),
        ("v3:2x2", {"fsdp": 4, "tensor": 2}, "fsdp", 2 * 8.3e10 / 2),
        ("v3:2x2", {"fsdp": 4, "tensor": 2}, "tensor", 450e9 / 2),
        # GPUs: NVLink within a node; beyond, each brings in an eighth of what the node lacks.
        ("h100:1x8", {"fsdp": 8}, "fsdp", 3.7e11),
        ("h100:16x8", {"data": 16, "fsdp": 8}, "data", 50e9),
        ("h100:16x8", {"fsdp": 16, "tensor": 8}, "fsdp", 50e9),
    ],
)
def test_an_axis_has_the_links_that_it_lies_on(machine, sizes, axis, bytes_a_second):
    ring = speed.rings(parse(machine), shape(**sizes))[axis]
    share = 1 - 1 / sizes[axis]
    assert ring.gather(1e9) == pytest.approx(1e9 * share / bytes_a_second)


def test_gpus_of_all_nodes_gather_over_both_networks():
    ring = speed.rings(parse("h100:2x8"), shape(fsdp=16))["fsdp"]
    assert ring.gather(1e9) == pytest.approx(max(7 / 8 / 3.7e11, 1 / 2 / 8 / 50e9) * 1e9)


def test_small_collectives_take_the_time_of_their_hops():
    """A ring of 16 chips and one of 16: 8 hops each, of a microsecond."""
    ring = speed.rings(parse("v5e:16x16"), shape(fsdp=256))["fsdp"]
    assert ring.gather(1, operations=10) == pytest.approx(10 * 16e-6)


# --- time


def test_fsdp_of_a_wide_model_needs_the_scaling_books_tokens():
    """2,190 / n on v5e, n axes: of a peak that is reached, and without attention and loss."""
    plan = planned("v5e:16x16", 4096, model=WIDE, mesh={"fsdp": 256})
    layers, table = 2 * 12 * 4096**2, 1024 * 4096
    moved = 3 * 2 * (layers + 2 * table) * 255 / 256 / (2 * 2 * 4.5e10)
    assert plan.accumulation == 1 and plan.seconds["fsdp"] == pytest.approx(moved, rel=1e-3)
    per_token = speed.executed_flops(plan.config.model, "none", "xla") / 1024
    book = 197e12 / (2 * 4.5e10) / 2
    reached = plan.topology.chip.efficiency * 6 * (layers + 2 * table) / per_token
    assert plan.needed_tokens()["fsdp"] == pytest.approx(book * reached, rel=5e-3)
    assert plan.device_tokens == 16 * 1024


def test_terms_of_a_run_on_v3_8_are_those_by_hand():
    """GPT-2 124M without biases, microbatch 8 of 64 sequences a core, remat none."""
    plan = planned("v3-8", 512, 8)
    assert (plan.accumulation, plan.mesh["data"]) == (8, 8)
    matrices, head, pairs = 12 * 12 * 768**2, 768 * 50257, 12 * 2 * 2 * 1024 * 768 / 2
    forward = 1024 * 2 * (matrices + head) + 1024 * pairs
    executed = 1024 * 2 * (3 * matrices + 4 * head) + 1024 * pairs * 1.25 * 3.5
    reached = 61.5e12 * 0.75 * 0.7
    assert plan.seconds["arithmetic"] == pytest.approx(64 * executed / reached)
    parameters = 124_337_664 + 47 * 768  # and the padding of the table
    sums = 2 * 4 * parameters * (7 / 8) / (2 * 8.3e10)
    assert plan.seconds["data"] == pytest.approx(sums)
    read = 28 * parameters + 8 * (12 * parameters + 2 * 2 * matrices)
    assert plan.seconds["hbm"] == pytest.approx(read / 450e9)
    assert {term for term, seconds in plan.seconds.items() if not seconds} == {
        "fsdp",
        "context",
        "tensor",
        "slices",
        "host",
    }
    arithmetic, rest = 64 * executed / reached, sums + read / 450e9
    best = 0.9 / 0.75  # 1.2 times what is likely, which is the ceiling
    assert plan.step == pytest.approx(
        (arithmetic / best, arithmetic + rest, 1.35 * arithmetic + rest)
    )
    assert plan.mfu == pytest.approx(3 * forward * 64 / plan.step[1] / 61.5e12)
    assert plan.bound == "arithmetic"


def test_slices_sum_each_devices_gradients_over_the_network():
    plan = planned("v5e:2x4", 512, 8, slices=2, mesh={"replica": 2, "data": 1, "fsdp": 8})
    shard = (124_337_664 + 47 * 768) / 8
    assert plan.topology.devices == 16
    assert plan.seconds["slices"] == pytest.approx(2 * 4 * shard / 2 / 3.1e9, rel=2e-2)
    assert plan.needed_tokens().keys() == {"fsdp", "slices"}
    with pytest.raises(Mistake, match="mesh.replica=1 must be a multiple of the 2 slices"):
        planned("v5e:2x4", 512, 8, slices=2)


def test_context_shards_gather_keys_and_values_and_split_all_else():
    whole, split = (
        planned("v4:2x2x1", 64, 64 // fsdp, mesh={"data": 1, "fsdp": fsdp, "context": 4 // fsdp})
        for fsdp in (4, 1)
    )
    moved = 3 * 2 * 12 * 2 * 64 * 1024 * 768  # bytes: k and v, again backward, and their gradients
    assert split.seconds["context"] == pytest.approx(moved * (3 / 4) / (2 * 4.5e10))
    assert split.device_tokens == whole.device_tokens == 64 * 1024 / 4
    assert split.seconds["fsdp"] == pytest.approx(whole.seconds["fsdp"])
    attention = 12 * 2 * 2 * 1024 * 768 / 2 * 1024 * 64 / 4
    reached = 275e12 * split.topology.chip.efficiency * 0.7
    more = (2 - 1.25) * 3.5 * attention / reached  # XLA computes what the mask hides
    gap = split.seconds["arithmetic"] - whole.seconds["arithmetic"]
    assert gap == pytest.approx(more, rel=1e-3)
    assert split.bytes["weights"] == whole.bytes["weights"]
    assert split.bytes["activations kept"] == whole.bytes["activations kept"]


# test_sharding and test_budgets count these in compiled programs.
@pytest.mark.parametrize(("remat", "gathers"), [("none", 8), ("dots", 10), ("full", 11)])
def test_tensor_shards_gather_and_scatter_activations(remat, gathers):
    plan = planned("v4:2x2x1", 64, 8, mesh={"data": 1, "tensor": 4}, model={"remat": remat})
    moved = gathers * 2 * 64 * 1024 * 768 * 12
    assert plan.seconds["tensor"] == pytest.approx(moved * (3 / 4) / (2 * 4.5e10))
    assert plan.device_tokens == 8 * 1024 / 4


def test_offload_moves_to_the_host_and_back_what_dots_keeps():
    """Of 8 layers and 4 sequences of 2,048 tokens in bfloat16, twice an update."""
    model = LLAMA_8B | {"n_layer": 8, "block_size": 2048}
    dots, offload = (
        planned("v5e:2x4", 64, 4, mesh={"fsdp": 8}, model=model | {"remat": remat})
        for remat in ("dots", "offload")
    )
    widths = 4096 + 2 * (4096 + 1024) + 2 * 14336
    kept = 8 * 4 * 2048 * 2 * widths
    assert (dots.host_bytes, offload.host_bytes) == (0, kept)
    name = "activations kept"  # of four layers, on the way
    assert dots.bytes[name] - offload.bytes[name] == kept // 2
    assert offload.seconds["host"] == pytest.approx(2 * 2 * kept / 16e9)
    assert dots.seconds["host"] == 0 and offload.step[1] >= dots.step[1]
    assert "in the host's memory" in tables.text(offload, costs(offload, None, 24.0), [])


def test_muon_computes_what_its_products_do():
    """The FLOPs that XLA counts in `orthogonalise`, where two devices have half of the layers."""
    plan = planned("v3-8", 512, 8, optim={"name": "muon"}, model={"n_layer": 8})
    flops = 0.0
    for (rows, columns), number in {(768, 768): 4 * 8, (768, 3072): 2 * 8}.items():
        product = jax.jit(lambda x: orthogonalise(x, 5)).lower(
            jax.ShapeDtypeStruct((number // 8, rows, columns), "float32")
        )
        flops += product.cost_analysis()["flops"]
    ours = speed._muon_flops(plan.config, plan.mesh)
    assert ours == pytest.approx(flops, rel=0.01)


# Tokens/s of a chip, each on the mesh that suits it; where a project offloads activations to the
# host, remat=dots stands for it. Sources: MaxText docs/reference/models/tiering.md, torchtitan
# benchmarks/llama3_h100_202412 and asyncTP_llama3_h100_2025-06, Levanter's 1.0 release (MFU there
# counts attention fully; turned into tokens/s with its formula). Chip.efficiency comes from the
# first four.
PUBLISHED = [
    ("v5p:8x8x8", LLAMA_70B | {"vocab_size": 32000, "block_size": 4096}, 2048, 256, 1, "dots", 692),
    ("v6e:16x16", LLAMA_8B | {"block_size": 8192}, 1024, 256, 1, "dots", 7207),
    ("v6e:16x16", LLAMA_70B | {"vocab_size": 128256, "block_size": 8192}, 512, 256, 1, "dots", 960),
    ("h100:1x8", LLAMA_8B | {"block_size": 8192}, 8, 8, 1, "dots", 6667),
    ("h100:16x8", LLAMA_8B | {"block_size": 8192}, 128, 128, 1, "dots", 6514),
    ("h100:32x8", LLAMA_70B | {"vocab_size": 128256, "block_size": 8192}, 128, 32, 8, "dots", 597),
    ("h100:32x8", LLAMA_70B | {"vocab_size": 128256, "block_size": 8192}, 128, 32, 8, "dots", 652),
]


@pytest.mark.parametrize(
    ("machine", "model", "sequences", "fsdp", "tensor", "remat", "published"), PUBLISHED
)
def test_published_throughput_lies_within_the_range(
    machine, model, sequences, fsdp, tensor, remat, published
):
    sizes = {"data": -1, "fsdp": fsdp, "tensor": tensor}
    model = model | {"remat": remat}
    microbatch = max(1, sequences // fsdp // 4)
    plan = planned(machine, sequences, microbatch, mesh=sizes, model=model)
    best, likely, worst = (plan.tokens / s / plan.topology.chips for s in plan.step)
    assert worst < published < best
    assert likely == pytest.approx(published, rel=0.2)


# --- memory


def test_memory_is_the_compilers_within_15_percent():
    """Of nine steps in ten, and of the rest within 25 %; those after the freeze are a test."""
    steps = memory_check.recorded()
    ratios = [memory_check.planned(s).total_bytes / s["compiler"] for s in steps]
    assert 0.8 < min(ratios) and max(ratios) < 1.25
    assert sum(0.85 < ratio < 1.15 for ratio in ratios) >= 0.9 * len(ratios)
    kinds = {s["topology"].partition(":")[0] for s in steps}
    assert kinds == {"v3", "v4", "v5e", "v5p", "v6e", "tpu7x"}


def test_the_memory_check_counts_what_is_near(capsys):
    assert memory_check.main([]) == 0
    count = len(memory_check.recorded())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count + 2
    near = sum(0.85 <= float(line.split()[2]) <= 1.15 for line in lines[1:-1])
    assert abs(int(lines[-1].split()[0]) - near) <= 1 and lines[-1].endswith("within 15 %")


# --- compiled programs

# As a TPU's compiler writes it: five microbatches, of seven chunks of which the first is done.
PROGRAM = """
%chunk (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %next = s32[]{:T(256)} add(%i, %one)
  %x = f32[8] fusion(%i), metadata={op_name="jvp(loss)/exp"}, config={"estimated_cycles":"100"}
  %sum = f32[8] all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%next, %sum)
}

%chunks (c: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(256)} constant(8)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%microbatch (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = s32[] get-tuple-element(%c), index=0
  %two = s32[] constant(2)
  %first = s32[] constant(1)
  %x = f32[8] get-tuple-element(%c), index=1
  %start = (s32[], f32[8]) tuple(%first, %x)
  %loop = (s32[], f32[8]) while(%start), condition=%chunks, body=%chunk
  %y = f32[8] fusion(%loop), metadata={op_name="h/mlp/add"}, config={"estimated_cycles":"10"}
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}

%microbatches (c: (s32[], f32[8])) -> pred[] {
  %end = s32[] constant(9)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %p)
  %loop = (s32[], f32[8]) while(%start), condition=%microbatches, body=%microbatch
  ROOT %z = f32[8] fusion(%loop), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1"}
}
"""


def test_loops_of_a_tpus_program_are_counted_by_their_conditions():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    cycles = {"loss": 5 * 7 * 100, "mlp": 5 * 10, "other": 1}
    assert hlo.cycles(PROGRAM) == cycles
    assert hlo.table(hlo.collectives(PROGRAM, mesh)) == {("all-reduce", "fsdp", 2): 5 * 7 * 32}


def test_each_part_of_a_step_is_known_by_the_names_of_its_operations():
    run = config(2, model={"n_layer": 2, "n_embd": 8, "n_head": 2, "block_size": 8})
    steps = build_for_training(run, sharding.make_mesh(run.mesh, jax.devices()[:1]))
    names = re.findall(r'loc\("([^"]*)"', steps.lower().as_text(debug_info=True))
    assert {hlo.part(name) for name in names} == {*hlo.PARTS, "other"}
    for spec, part in (("btd,dchk->btchk", "projections"), ("btd,df->btf", "mlp")):
        assert {hlo.part(name) for name in names if spec in name} == {part}


# One that goes on beside two fusions, a reduce-scatter, a hop, which gives its input, too, and what
# the hosts of slices do.
TPUS_OWN = """
%begun (p: bf16[2,4]) -> bf16[8,4] {
  %p = bf16[2,4] parameter(0)
  ROOT %g = bf16[8,4] all-gather(%p), channel_id=8, replica_groups={{0,1,2,3}}, NAMED{chain_id="0"}
}

%done (p: bf16[2,4]) -> bf16[8,4] {
  %p = bf16[2,4] parameter(0)
  ROOT %g = bf16[8,4] all-gather(%p), channel_id=8, replica_groups={{0,1,2,3}}, NAMED{chain_id="0"}
}

%all-reduce-scatter.2.clone (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4] parameter(0)
  %r = bf16[8,4] all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = bf16[2,4] dynamic-slice(%r), dynamic_slice_sizes={2,4}
}

ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  %p = bf16[2,4] parameter(0)
  %a = bf16[8,4] fusion(%p), kind=kCustom, calls=%begun
  %b = bf16[8,4] fusion(%p), kind=kCustom, calls=%done
  %start = (bf16[2,4], bf16[2,4]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %sent = (f32[5,8]{1,0:T(8,128)}, u32[], token[]) send(%p), NAMED{MEGA_transfer_type="ALL_REDUCE"}
  ROOT %c = bf16[2,4] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.2.clone
}
""".replace("NAMED", "frontend_attributes=").replace("MEGA", "_xla_megascale")


def test_what_a_tpu_writes_in_its_own_way_is_counted_once():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    assert hlo.table(hlo.collectives(TPUS_OWN, mesh)) == {
        ("all-gather", "data+fsdp", 0): 64,
        ("reduce-scatter", "data+fsdp", 0): 64,
        ("collective-permute", "fsdp", 0): 16,
        ("all-reduce", "replica", 0): 160,
    }


# --- plans


def test_a_search_finds_the_fastest_of_all_that_fit():
    run = config(64, model={"preset": "gpt2-large"})
    machine = parse("v5e:2x4")
    found = plans.search(run, machine)
    assert all(p.total_bytes <= 0.85 * machine.memory for p in found)
    assert all(np.prod(list(p.mesh.values())) == 8 for p in found)
    best = min(p.step[1] for p in found)
    assert best <= found[0].step[1] <= 1.02 * best
    everything = []  # but offload, where dots fits
    for fsdp, tensor, remat in (
        (f, t, r) for f in (1, 2, 4, 8) for t in (1, 2, 4) for r in ("none", "dots", "full")
    ):
        for microbatch in (1, 2, 4, 8, 16, 32, 64):
            if fsdp * tensor > 8 or 64 % (8 // tensor * microbatch):
                continue
            mesh = {"data": 8 // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
            model = {"preset": "gpt2-large", "remat": remat}
            plan = planned("v5e:2x4", 64, microbatch, mesh=mesh, model=model)
            everything += [plan.step[1]] * (plan.total_bytes <= 0.85 * machine.memory)
    kept = [p for p in found if p.remat != "offload"]
    assert best == pytest.approx(min(everything)) and len(kept) == len(everything)
    layouts = [(*p.mesh.values(), p.microbatch) for p in kept if p.remat == "dots"]
    moved = [(*p.mesh.values(), p.microbatch) for p in found if p.remat == "offload"]
    assert moved and not set(moved) & set(layouts)


def test_of_plans_alike_the_one_with_the_fewest_shards_comes_first():
    found = plans.search(config(), parse("v3-8"))
    assert found[0].mesh == shape(data=8) and found[0].remat == "none"
    fewer = [p.mesh for p in tables.different(found)]
    assert len(fewer) == 4 and fewer[0] == shape(data=8)


def test_pmap_is_planned_with_whole_copies_alone():
    run = config()
    run = run.model_copy(update={"run": run.run.model_copy(update={"backend": "pmap"})})
    assert {tuple(p.mesh.values()) for p in plans.search(run, parse("v3-8"))} == {(1, 8, 1, 1, 1)}


def test_a_plan_with_pmap_that_splits_the_model_is_refused_as_the_run_is():
    run = config(mesh={"fsdp": 2})
    run = run.model_copy(update={"run": run.run.model_copy(update={"backend": "pmap"})})
    with pytest.raises(Mistake, match="cannot have mesh.fsdp=2"):
        plans.own_plan(run, parse("v3-8"))


def test_a_run_costs_its_updates_and_young_says_how_often_to_save():
    plan = planned("v3-8", 512, 8, optim={"steps": 9000})
    cost = costs(plan, price=1.5, preemption_hours=6)
    seconds = 9000 * plan.step[1]
    assert cost["run"]["tokens"] == 9000 * 512 * 1024
    assert cost["run"]["days"][1] == pytest.approx(seconds / 86400)
    assert cost["run"]["chip_hours"][1] == pytest.approx(4 * seconds / 3600)  # of two cores each
    assert cost["run"]["price"][2] == pytest.approx(6 * 9000 * plan.step[2] / 3600)
    saves = cost["checkpoint"]
    assert saves["bytes"] == 12 * 124_337_664
    # No other interval costs less, of stalls and of updates that are repeated.
    stall = saves["stall_seconds"]
    every = np.arange(1, 9001) * plan.step[1]
    lost = stall / every + (every / 2 + saves["write_seconds"]) / (6 * 3600)
    assert saves["every_updates"] == pytest.approx(1 + np.argmin(lost), abs=1)
    assert saves["lost"] == pytest.approx(lost.min(), rel=1e-3)


def test_a_price_of_nothing_is_a_price():
    plan = planned("v3-8", 512, 8)
    cost = costs(plan, price=0)
    assert cost["run"]["price"] == [0, 0, 0]
    assert "price" in tables.text(plan, cost, []) and "price" in tables.sweep_table([plan], [cost])


def test_a_cpu_keeps_in_its_own_memory_what_offload_sends_to_the_host():
    here = topologies.here()
    dots, offload = (plans.own_plan(config(), here, remat=r) for r in ("dots", "offload"))
    assert offload.bytes == dots.bytes and offload.host_bytes == 0 and offload.remat == "offload"


def test_batches_that_grow_count_as_they_are():
    run = config(optim={"steps": 100})
    batch = run.batch.model_copy(update={"growth": {51: 1024}})
    plan = plans.own_plan(run.model_copy(update={"batch": batch}), parse("v3-8"))
    assert plan.run_seconds[1] == pytest.approx((50 + 2 * 50) * plan.step[1])


def test_float32_and_a_machine_of_another_kind_have_memory_and_no_speed():
    plan = planned("v3-8", 512, 8, model={"dtype": "float32"})
    here = topologies.here()
    assert (here.kind, here.devices, here.platform) == ("cpu", 8, "cpu")
    other = plans.own_plan(config(), here)
    for p in (plan, other):
        assert p.total_bytes and p.step is None and p.mfu is None and p.bound is None
        assert "no peak FLOP/s is known" in tables.text(p, costs(p), [])
    assert plans.search(config(), here) == [] and other.microbatch == 1


def test_the_efficiency_that_a_run_shows_plans_what_it_took():
    machine = parse("v5e:16x16")
    plan = planned("v5e:16x16", 4096, model=WIDE, mesh={"fsdp": 256})
    measured = 1.7 * plan.step[1]
    share = speed.fitted_efficiency(plan.seconds, machine.chip.efficiency, measured)
    again = plans.own_plan(plan.config, topologies.with_efficiency(machine, share))
    assert again.step[1] == pytest.approx(measured) and share < machine.chip.efficiency
    assert speed.fitted_efficiency(plan.seconds, machine.chip.efficiency, 1e-9) is None


def test_what_a_checkpoint_says_of_its_devices_is_a_machine():
    assert topologies.like("8 x TPU v3") == parse("v3-8")
    assert topologies.like("16 x TPU v4") == parse("v4-32")
    assert topologies.like("16 x NVIDIA H100 80GB HBM3") == parse("h100-16")
    assert topologies.like("4 x TPU v5 lite") == parse("v5e:2x2")
    assert topologies.like("2 x cpu") is None and topologies.like("") is None


# --- the command

V3_8 = ("--config=configs/v3_8.yaml", "--topology=v3-8")


def printed(capsys, *argv: str) -> str:
    assert command.main([*argv]) == 0
    return capsys.readouterr().out


def test_json_has_the_figures_of_the_plan(capsys):
    figures = json.loads(printed(capsys, *V3_8, "--price=2", "--json"))
    plan = planned("v3-8", 512, 8, optim={"steps": 9000, "warmup_steps": 700})
    assert figures["fits"] is True and figures["bytes_per_device"] == plan.bytes
    assert figures["step_seconds"] == list(plan.step)
    assert figures["step_seconds"] == sorted(figures["step_seconds"])
    assert figures["tokens_per_second"] == plan.tokens / plan.step[1]
    assert (figures["mfu"], figures["bound"]) == (plan.mfu, "arithmetic")
    assert figures["mesh"] == shape(data=8)
    assert (figures["microbatch"], figures["remat"]) == (8, "none")
    assert figures["run"]["price"][1] == 2 * figures["run"]["chip_hours"][1]
    best = json.loads(printed(capsys, *V3_8, "--search", "--json"))
    assert best["mesh"] == figures["best"][0]["mesh"] and best["microbatch"] > 8


def test_the_text_is_in_the_order_of_questions_and_its_yaml_is_a_config(capsys):
    text = printed(capsys, *V3_8, "--mesh.data=1", "--mesh.fsdp=8", "--price=2")
    assert max(map(len, text.splitlines())) <= 80
    order = ["fits: ", "weights  ", "an update: ", "tokens/s: ", "MFU: ", "bound by ", "fsdp needs"]
    order += ["# recommended", "# or ", "days  ", "chip-hours", "price", "a checkpoint: 1.49 GB"]
    order += ["checkpoint.every="]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    fragment = text[text.index("# recommended") :].partition("\n\n")[0]
    sections = yaml.safe_load(fragment)
    assert sections["mesh"] == shape(data=8) and sections["model"] == {"remat": "none"}
    again = config(512, sections["batch"]["microbatch"], mesh=sections["mesh"])
    assert plans.own_plan(again, parse("v3-8")).fits


def test_a_run_that_does_not_fit_is_told_of_more_room(capsys):
    argv = ("--config=configs/gpt2_xl.yaml", "--mesh.fsdp=1", "--topology=v5e:1x1")
    assert json.loads(printed(capsys, *argv, "--json"))["fits"] is False
    text = printed(capsys, *argv)
    assert "does not fit: " in text and "nothing that was tried fits" in text


@pytest.fixture
def compiles(monkeypatch):
    """TPUs' compiler is as if it had made PROGRAM, or refused the step."""

    def with_result(result: str | Exception | None) -> None:
        def compile_() -> SimpleNamespace:
            if isinstance(result, Exception):
                raise result

            def text() -> str:
                if result is None:
                    raise jax.errors.JaxRuntimeError("INTERNAL: operands\nand more")
                return result

            return SimpleNamespace(
                as_text=text,
                memory_analysis=lambda: SimpleNamespace(
                    argument_size_in_bytes=GIB,
                    temp_size_in_bytes=4 * GIB,
                    host_temp_size_in_bytes=0,
                    peak_memory_in_bytes=3 * GIB,
                ),
            )

        def build(config: Config, mesh: jax.sharding.Mesh) -> SimpleNamespace:
            asked.append(config)
            lowered = SimpleNamespace(compile=compile_)
            model = SimpleNamespace(dtype=np.dtype("bfloat16"))
            lower = lambda: lowered  # noqa: E731
            return SimpleNamespace(lower=lower, model=model, layout=(8, 64), parameters=124_337_664)

        monkeypatch.setattr(compiler, "build_for_training", build)
        return asked

    asked = []
    chips = [Chip(i, (i // 2 % 2, i // 4, 0), "TPU v3", i % 2) for i in range(8)]
    monkeypatch.setattr(compiler, "tpu_devices", lambda topology: chips)
    monkeypatch.setattr(compiler, "version", lambda package: "1.2")
    return with_result


def test_verify_lays_the_compilers_figures_beside_the_plans(compiles, capsys):
    compiles(PROGRAM)
    mesh = ("--mesh.data=2", "--mesh.fsdp=4")
    plan = planned("v3-8", 512, 8, mesh={"data": 2, "fsdp": 4})
    step = (1 + 5 * (10 + 7 * 100)) / 0.94e9
    text = printed(capsys, *V3_8, *mesh, "--verify")
    told = text[text.index("compiled in 0 s by libtpu 1.2") :]
    assert max(map(len, told.splitlines())) <= 80
    ratio = plan.total_bytes / 3 / GIB
    assert re.search(rf"the peak +{plan.total_bytes / GIB:.2f} +3.00 +{ratio:.2f}\n", told)
    assert re.search(rf"an update +{plan.step[1]:.3g} +{step:.3g}", told)
    assert "all-reduce over fsdp, in a loop's loop" in told
    assert "  cycles: loss 99%, mlp 1%\n" in told
    found = json.loads(printed(capsys, *V3_8, *mesh, "--verify", "--json"))["compiled"]
    assert found["fits"] is True and found["peak"] == 3 * GIB
    assert found["step_seconds"] == pytest.approx(step)
    assert found["mfu"] == pytest.approx(plan.mfu * plan.step[1] / step)
    moved = {"kind": "all-reduce", "axes": "fsdp", "depth": 2, "bytes": 5 * 7 * 32}
    assert found["collectives"] == [moved]
    assert found["cycles"] == {"loss": 5 * 7 * 100, "mlp": 5 * 10, "other": 1}


def test_verify_says_which_library_has_compiled(compiles, capsys, monkeypatch):
    compiles(PROGRAM)
    for named, said in (("", "libtpu 1.2"), ("/x/libtpu.so", "libtpu /x/libtpu.so")):
        monkeypatch.setenv("TPU_LIBRARY_PATH", named)
        found = json.loads(printed(capsys, *V3_8, "--verify", "--json"))["compiled"]
        assert found["compiler"] == said


def test_verify_says_when_the_program_cannot_be_read(compiles, capsys):
    """As libtpu 0.0.52's for v6e now and then, by jaxlib 0.10.2."""
    compiles(None)
    told = printed(capsys, *V3_8, "--verify")
    assert " 3.00 " in told and "unreadable:" in told and "operands" in told
    assert "expects" not in told
    found = json.loads(printed(capsys, *V3_8, "--verify", "--json"))["compiled"]
    assert (found["mfu"], found["collectives"], found["fits"]) == (None, [], True)


def test_verify_compiles_what_the_search_has_found(compiles, capsys):
    asked = compiles(PROGRAM)
    plan = json.loads(printed(capsys, *V3_8, "--search", "--verify", "--json"))
    (config,) = asked
    assert (config.batch.microbatch, config.model.remat) == (plan["microbatch"], plan["remat"])
    assert config.mesh.model_dump() == plan["mesh"] and config.batch.microbatch != 8


def test_verify_says_the_compilers_words_for_a_step_that_does_not_fit(compiles, capsys):
    compiles(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 22.98G exceeds 15.75G\nand more"))
    told = printed(capsys, *V3_8, "--verify")
    assert "does not fit: RESOURCE_EXHAUSTED: 22.98G exceeds 15.75G\nlower batch.micro" in told
    found = json.loads(printed(capsys, *V3_8, "--verify", "--json"))["compiled"]
    assert found["fits"] is False and "22.98G exceeds" in found["message"]


def test_compiling_for_a_tpu_without_its_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Mistake, match=r"v3:2x2 needs .*libtpu.*pip install 'scalegpt\[plan\]'"):
        command.main([*V3_8, "--verify"])


def test_verify_without_a_topology_compiles_for_this_machine(capsys):
    small = ("--model.n_layer=1", "--model.n_embd=32", "--model.n_head=1", "--model.vocab_size=64")
    small += ("--batch.sequences=16",)
    argv = ("--config=shakespeare_char_cpu", *small, "--verify", "--json")
    found = json.loads(printed(capsys, *argv))["compiled"]
    assert found["kind"] == "cpu" and found["compiler"].startswith("jax ")
    assert found["mfu"] is None and found["peak"] > 0


def test_a_sweep_has_a_line_for_each_machine_that_fits(capsys):
    argv = ("--config=configs/gpt2_xl.yaml", "--sweep=v5e,h100", "--price=1")
    head, *lines = printed(capsys, *argv).splitlines()
    assert head.split()[0] == "topology" and max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines]
    assert names[0] == "v5e:2x2" and {"v5e:16x16", "h100:1x1", "h100:32x8"} <= set(names)
    found = json.loads(printed(capsys, *argv, "--json"))
    assert [p["topology"] for p in found] == names and all(p["fits"] for p in found)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v5e:3x3"], "nearest are v5e:2x4"),
        (["--topology=v3-8", "--mesh.fsdp=3"], "does not fit 8 v3:2x2"),
        (["--topology=v3-8", "--mesh.tensor=8"], "n_head=12 does not divide"),
        (["--topology=v5e:1x1", "--model.preset=gpt2-xl", "--search"], "nothing fits v5e:1x1"),
        (["--slices=2"], "--slices=2 is of a --topology"),
        (["--price=-1"], "--price=-1.0"),
        (["--price=nan"], "--price=nan"),
        (["--preemption-hours=0"], "--preemption-hours=0.0 must be above 0"),
        (["--efficiency=40"], "--efficiency=40.0 must be above 0 and at most 1"),
        (["--sweep=v9"], "'v9' is none of v2, v3"),
        (["--sweep", "--topology=v3-8"], "without --topology"),
        (["--sweep", "--verify"], "without --topology, --search, --verify"),
        (["--topology=h100:1x8", "--verify"], "h100:1x8: only for TPUs is there a compiler"),
        (["--plot=a.jpg"], "must end in .png"),
        (["--plot=no/such/a.png"], "there is no folder no/such"),
        (["--optim.epochs=2"], "give the updates"),
        (
            ["--objective.name=dpo", "--run.init_from=x", "--topology=v3-8", "--search"],
            "objective.name=dpo: only text and sft",
        ),
        (["--topolgy=v3-8"], "did you mean --topology"),
        (["--run=nowhere"], "nowhere is not the folder of a run"),
        (["--run=nowhere", "--config=demo"], "unknown argument --config"),
    ],
)
def test_a_mistake_names_the_fix_and_prints_nothing_else(argv, message, capsys):
    with pytest.raises(Mistake, match=message):
        command.main(argv)
    assert capsys.readouterr().out == ""


def test_a_run_is_compared_with_its_plan(capsys, tmp_path):
    run = config(512, 8)
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    plan = planned("v3-8", 512, 8)
    rows = [
        {"step": 10 * i, "perf/step_seconds": s} for i, s in enumerate((9.9, 3.0, 3.1, 2.9, 3.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = (f"--run={tmp_path}", "--topology=v3-8")
    found = json.loads(printed(capsys, *argv, "--json"))
    assert found["measured_step_seconds"] == 3.0 and found["step_seconds"][1] == plan.step[1]
    text = printed(capsys, *argv)
    assert f"it took {3 / plan.step[1]:.2f} of that" in text
    share = re.search(r"next time: --efficiency ([\d.]+), planned with 0.75", text)[1]
    assert float(share) == pytest.approx(found["fitted_efficiency"], abs=0.005)
    told = printed(capsys, f"--run={tmp_path}")  # on this CPU
    assert printed(capsys, f"--run={tmp_path}", "--topology=list").startswith("v2 ")
    assert "took 3 s, the median of 5 rows" in told and "no peak FLOP/s is known of cpu" in told
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(Mistake, match="no timed updates"):
        command.main([*argv])


def test_the_picture_has_a_bar_for_each_plan(capsys, tmp_path):
    file = tmp_path / "plan.png"
    assert printed(capsys, *V3_8, f"--plot={file}").endswith(f"plot in {file}\n")
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 500


def test_the_command_takes_three_seconds_and_touches_no_device():
    """Of its own processor time, as this machine has other work; no platform is there to ask."""
    env = os.environ | {"JAX_PLATFORMS": "nothing"}
    argv = [sys.executable, "-m", "scalegpt.plan", *V3_8]
    before = os.times()
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0 and done.stderr == "" and "fits: " in done.stdout
    spent = after.children_user + after.children_system - before.children_user
    assert spent - before.children_system < 3


@pytest.mark.parametrize("name", ["v4_32", "v5e_8", "v5e_256", "v5e_2x256", "v5p_128", "v6e_256"])
def test_the_plan_that_a_config_opens_with_is_what_the_command_prints(name, capsys):
    lines = (ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8").splitlines()
    asked, *stated = [line[2:] for line in lines[4:] if line.startswith("#")]
    assert asked.startswith(f"python -m scalegpt.plan --config configs/{name}.yaml ")
    assert command.main(asked.split()[3:]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert len(stated) == 8 and [line for line in stated if line not in printed] == []
    assert command.main([*asked.split()[3:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["bytes_per_device"].values()) < 0.9 * parse(asked.split()[6]).memory

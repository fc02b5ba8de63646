"""Plans against figures by hand, the scaling book's thresholds, published runs and the compiler."""

import re

import pytest

from scalegpt.errors import Mistake
from scalegpt.planning import topologies
from scalegpt.planning.chips import CHIPS, GIB
from scalegpt.planning.topologies import parse

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
def test_devices_and_memory_of_a_tpu_are_what_its_compiler_says(monkeypatch):
    """An argument of 2 TiB is refused at once, with the memory that there is."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    import jax
    from jax.sharding import SingleDeviceSharding

    from scalegpt.step.compile_only import tpu_devices

    for name, chip in CHIPS.items():
        if not chip.axes:
            continue
        for shape in topologies.usual_shapes(name)[-4:]:
            machine = parse(topologies.written(name, shape))
            assert len(tpu_devices(machine.name)) == machine.devices, machine
        device = tpu_devices(topologies.written(name, topologies.shapes(name)[0]))[0]
        assert device.device_kind == chip.kind
        there = SingleDeviceSharding(device)
        large = jax.ShapeDtypeStruct((2**20, 2**19), "float32", sharding=there)
        with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
            jax.jit(lambda x: 2 * x).lower(large).compile()
        gib = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(refusal.value))[1]
        assert float(gib) == pytest.approx(chip.memory / GIB, abs=0.01), name

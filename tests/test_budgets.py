"""What devices of TPUs send each other in an update is the least there is, by the TPU's compiler.

tests/test_sharding.py counts the same on CPUs, whose programs differ: theirs have no
reduce-scatter, no slices, and other decisions on what is gathered when.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from scalegpt.config import Config
from scalegpt.planning.hlo import collectives
from scalegpt.step import build_for_training, sharding

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

LAYERS, D, T, VOCAB, ROWS, MICROBATCHES = 3, 512, 256, 2048, 4, 2


def traffic(topology: str, slices: int, mesh: dict[str, int], optim: str) -> SimpleNamespace:
    """Compile an update of two microbatches of ROWS sequences a device, and list what moves."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu")
    from jax.experimental import topologies

    shards = int(np.prod([n for axis, n in mesh.items() if axis in sharding.ROWS]))
    config = Config(
        model=dict(n_layer=LAYERS, n_head=4, n_embd=D, block_size=T, vocab_size=VOCAB)
        | dict(loss_chunk=T // 4, scan_layers=True),
        mesh=mesh,
        batch=dict(sequences=shards * ROWS * MICROBATCHES, microbatch=ROWS),
        data=dict(path="unused"),
        optim=dict(name=optim, lr=1e-3, min_lr=1e-4, warmup_steps=10, steps=100),
        run=dict(out_dir="unused"),
    )
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=slices
    ).devices
    devices = sharding.make_mesh(config.mesh, chips)
    steps = build_for_training(config, devices)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.size
        for path, x in jax.tree_util.tree_flatten_with_path(steps.abstract.params)[0]
    }
    found = collectives(steps.lower().compile().as_text(), devices)
    return SimpleNamespace(
        found=found,
        kernels=sum(2 * n for name, n in sizes.items() if "kernel" in name),  # in bfloat16
        table=4 * sizes["wte"],
        positions=4 * sizes["wpe"],
        parameters=4 * sum(sizes.values()),
    )


GATHERS, SUMS = ("all-gather",), ("reduce-scatter", "all-reduce")


def moved(seen: SimpleNamespace, kinds: tuple[str, ...], axis: str, *depths: int) -> int:
    """Count the bytes of an update along one mesh axis, in so many loops."""
    some = [c for c in seen.found if c.kind in kinds and c.axes == (axis,) and c.depth in depths]
    return sum(c.bytes * c.times for c in some)


def is_budget(bytes_moved: int, budget: int) -> bool:
    """Tell whether as much moves as was planned, and at most 5 % more."""
    return budget <= bytes_moved <= 1.05 * budget


def test_two_slices_with_muon_move_the_least():
    seen = traffic("v5e:2x2", 2, {"replica": 2, "data": 1, "fsdp": 4}, "muon")
    # Between slices only once an update: a fourth of the gradients, which each device has.
    assert {c.depth for c in seen.found if "replica" in c.axes} == {0}
    assert is_budget(moved(seen, SUMS, "replica", 0), seen.parameters // 4)
    # A microbatch gathers each weight forward and backward, and sums its gradient, in bfloat16.
    assert is_budget(moved(seen, GATHERS, "fsdp", 2), MICROBATCHES * 2 * seen.kernels)
    assert is_budget(moved(seen, SUMS, "fsdp", 2), MICROBATCHES * seen.kernels)
    # The gradients of head and look-up, together, in float32; and no activation is gathered.
    ends = seen.table + seen.positions
    assert is_budget(moved(seen, SUMS, "fsdp", 1), MICROBATCHES * ends)
    assert moved(seen, GATHERS, "fsdp", 1) <= 0.05 * seen.table
    # The table is gathered once an update, for the head and for look-ups.
    assert is_budget(moved(seen, GATHERS, "fsdp", 0), seen.table + seen.positions)
    # Muon sends its part of each matrix to the device that has it whole, and gets it back: of 12
    # of a layer's and 6 of the MLP's, of which 8 divide over the devices.
    matrices = 2 * D * D * (12 + 8 * 4)
    assert is_budget(moved(seen, ("all-to-all",), "fsdp", 0), 2 * matrices // 4)
    rest = [c for c in seen.found if c.kind == "collective-permute"]
    assert sum(c.bytes * c.times for c in rest) <= 0.05 * seen.kernels


def test_tensor_parallelism_moves_four_activations_each_way():
    seen = traffic("v5e:2x4", 1, {"data": 1, "fsdp": 4, "tensor": 2}, "adamw")
    activations = MICROBATCHES * ROWS * T * D * 2
    in_layers = 4 * LAYERS * activations
    assert is_budget(moved(seen, GATHERS, "tensor", 2), in_layers)
    assert is_budget(moved(seen, ("reduce-scatter",), "tensor", 2), in_layers)
    # The loss's gradient of the hidden states; with it, the norms' gains.
    assert is_budget(moved(seen, ("all-reduce",), "tensor", 1, 2), activations)
    # Hidden states forward, their gradient backward, and the table that tokens are looked up in.
    ends = 2 * activations + MICROBATCHES * seen.table
    assert is_budget(moved(seen, GATHERS, "tensor", 1), ends)
    # Each group of `tensor` has half of the weights.
    assert is_budget(moved(seen, GATHERS, "fsdp", 2), MICROBATCHES * seen.kernels)
    assert is_budget(moved(seen, SUMS, "fsdp", 2), MICROBATCHES * seen.kernels // 2)

"""Make the mesh, and shard arrays over it by one table from logical axis names to mesh axes."""

import sys
from collections.abc import Sequence
from math import gcd, lcm, prod
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scalegpt.config import BatchConfig, MeshConfig, ModelConfig
from scalegpt.config.types import divisors
from scalegpt.errors import Mistake

AXES = ("replica", "data", "fsdp", "context", "tensor")
REDUCED = ("replica", "data")  # gradients are summed over these once an update
ROWS = ("replica", "data", "fsdp")  # the rows of a batch are split over these

# Parameters and activations have different names, so that a rule for one never reshards the other.
RULES = {
    # parameters
    "layers": None,
    "vocab": ("tensor", "fsdp", "context"),
    "ngrams": ("tensor", "fsdp", "context"),
    "table_embed": None,  # else XLA would rematerialise the whole table
    "head_embed": None,
    "embed": ("fsdp", "context"),
    "position": None,
    "qkv": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "kv": None,
    "mlp": "tensor",
    "norm": None,
    "lora": None,
    # activations
    "batch": ROWS,
    "act_position": None,  # "context" in `loss.row_losses`: a decoder has few positions at a time
    "act_residual": None,  # the positions of the residual stream: over "tensor", too, there
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}

# Settings of JAX that some have for all of their programs, with the values that scalegpt needs:
# others end a healthy run, or change its numbers, so that it could not be continued elsewhere. A
# state holds NaN on purpose (health.Health), and arrays are made on the host.
_SETTINGS = {
    "jax_enable_x64": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_disable_jit": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_transfer_guard": None,
    "jax_default_matmul_precision": None,  # model.dtype says it
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


def rules_within(manual: Sequence[str]) -> dict[str, Any]:
    """Return the RULES that hold inside a jax.shard_map over the axes `manual`."""
    return {**RULES, "batch": tuple(axis for axis in ROWS if axis not in manual)}


def mesh_shape(config: MeshConfig, devices: int, what: str) -> tuple[int, ...]:
    """Return the sizes of AXES on so many devices; a size of -1 becomes what is left.

    what: the kind of devices, for the message. Raises Mistake when the sizes do not multiply to the
    number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        raise Mistake(
            f"mesh {shown} does not fit {devices} {what} device(s): "
            f"the sizes must multiply to {devices}; one of them may be -1"
        )
    return tuple(devices // fixed if size == -1 else size for size in sizes.values())


def all_devices() -> list[Any]:
    """Return JAX's devices. Raises Mistake where there are none of the kind that it wants.

    First it turns off, with a note, what ends a healthy run, or changes its numbers, where the
    environment asks for it.
    """
    for name, needed in _SETTINGS.items():
        if (value := getattr(jax.config, name)) != needed:
            jax.config.update(name, needed)
            print(
                f"note: {name.upper()}={value} does not apply to scalegpt, which sets {needed}",
                file=sys.stderr,
            )
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise Mistake(
            f"JAX_PLATFORMS={jax.config.jax_platforms or ''}: JAX finds no such device here"
            f"{': ' if str(error) else ''}{str(error).partition(chr(10))[0]}; unset it, or install "
            "what the device needs: pip install 'scalegpt[cuda]' or 'scalegpt[tpu]'"
        ) from error


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh over all devices. Raises Mistake as `mesh_shape` does."""
    devices = all_devices() if devices is None else devices
    shape = mesh_shape(config, len(devices), devices[0].platform)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise Mistake(f"mesh.replica={shape[0]} must be a multiple of the {slices} slices")
    # jax.make_mesh splits an axis of the torus, as 128 of 16 x 16 needs, on v5e alone.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside, between = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    # Flax's logical constraints need Auto axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Count the parts that the rows of a batch are split into."""
    return prod(mesh.shape[axis] for axis in ROWS)


def batch_layout(
    batch: BatchConfig,
    mesh: Mesh | AbstractMesh,
    most: int | None = None,
    group: int = 1,
    key: str = "batch.sequences",
) -> tuple[int, int]:
    """Return (A, M): microbatches of an update, and sequences of each over all devices.

    most: the largest microbatch of a device, in sequences, if batch.microbatch is not given.
    group: so many sequences stay together on a device. key: what a user sets batch.sequences by.
    Every batch of batch.growth is a multiple of M, too. Raises Mistake, naming numbers that work.
    """
    shards = row_shards(mesh)
    unit, pairs = shards * group, ", in pairs" if group == 2 else ""
    sizes = {key: batch.sequences}
    sizes |= {f"batch.growth[{update}]": size for update, size in batch.growth.items()}
    for name, size in sizes.items():
        if size % unit:
            near = round(size / unit) * unit or unit
            raise Mistake(
                f"{name}={size} does not divide over {shards} shards of rows "
                f"(replica x data x fsdp){pairs}; the nearest that does is {near}"
            )
    fitting = [d * group for d in divisors(gcd(*sizes.values()) // unit)]  # those of every batch
    limit = max(most or fitting[-1], group)
    microbatch = batch.microbatch or max(d for d in fitting if d <= limit)
    if microbatch % group:
        raise Mistake(
            f"batch.microbatch={microbatch} would part the two sequences of a pair; it could be "
            f"{', '.join(map(str, fitting))}"
        )
    for name, size in sizes.items():
        if size // shards % microbatch:
            raise Mistake(
                f"batch.microbatch={microbatch} does not divide the {size // shards} sequences "
                f"that each shard has of {name}={size}; it could be {', '.join(map(str, fitting))}"
            )
    return batch.sequences // shards // microbatch, microbatch * shards


def check_divisible(model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise Mistake when an axis of the model does not divide over its mesh axes."""
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    fsdp, names = mesh.shape["fsdp"] * context, "fsdp x context" if context > 1 else "fsdp"
    if model.block_size % context:
        raise Mistake(
            f"model.block_size={model.block_size} does not divide over mesh.context={context}"
        )
    if model.n_head % tensor:
        raise Mistake(
            f"model.n_head={model.n_head} does not divide over mesh.tensor={tensor}; "
            "use a tensor size that divides the heads"
        )
    if model.kv_heads % tensor:
        raise Mistake(
            f"model.n_kv_head={model.n_kv_head} does not divide over mesh.tensor={tensor}; "
            "use a tensor size that divides the heads of keys and values, and data for the rest"
        )
    if model.inner % tensor:
        raise Mistake(
            f"the MLP's width of {model.inner} does not divide over mesh.tensor={tensor}; "
            "set another model.n_inner, or use a smaller tensor, and data for the rest"
        )
    if model.n_embd % fsdp:
        raise Mistake(
            f"model.n_embd={model.n_embd} does not divide over mesh.{names}={fsdp}; "
            f"use a smaller {names}, and data for the rest"
        )
    shards, names = fsdp * tensor, f"{names} x tensor"
    if model.padded_vocab % shards:
        raise Mistake(
            f"the padded vocabulary of {model.padded_vocab} does not divide over {names} = {shards}"
            f"; set model.vocab_multiple={lcm(model.vocab_multiple, shards)}"
        )
    if beyond := model.ngram_rows % shards:
        raise Mistake(
            f"model.ngram_rows={model.ngram_rows} does not divide over {names} = {shards}; it "
            f"could be {model.ngram_rows - beyond + shards}"
        )


def specs(boxed: Any, rules: dict[str, Any]) -> Any:
    """Return the PartitionSpecs of a tree with boxed logical axis names; leaves without get P()."""

    def spec(names: P) -> P:
        if unknown := [name for name in names if name is not None and name not in rules]:
            raise Mistake(f"logical axis {unknown[0]!r} has no rule in sharding.RULES")
        return P(*(rules[name] if name is not None else None for name in names))

    return jax.tree.map(spec, nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, P))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Turn PartitionSpecs into NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, P)
    )


def batch_sharding(mesh: Mesh, accumulated: bool) -> NamedSharding:
    """Split the rows of tokens [A, M, T+1] (accumulated) or [M, T+1], and nothing else."""
    return NamedSharding(mesh, P(None, ROWS) if accumulated else P(ROWS))


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Return which of `rows` rows the devices of this process hold, in order."""
    slices = batch_sharding(mesh, accumulated=False).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices.values()]))


def to_global(local: np.ndarray, rows: np.ndarray, sharding: NamedSharding, total: int) -> Any:
    """Make a global array of each process's own rows, [A, len(rows), ...] or [len(rows), ...].

    rows: what `local_rows` returned for `total` rows.
    """
    axis = 1 if len(sharding.spec) == 2 else 0
    shape = (*local.shape[:axis], total, *local.shape[axis + 1 :])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[axis].indices(total)
        low, high = np.searchsorted(rows, (first, last))
        return local[(slice(None),) * axis + (slice(low, high),)]

    return jax.make_array_from_callback(shape, sharding, part)

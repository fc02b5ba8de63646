"""Train under jax.pmap, for people who know pmap loops: the reference for the jit backend.

Each device has a whole copy of the state and its own rows. Loss, accumulation, optimizer, initial
weights, token layout, dropout keys, evaluation and checkpoints are those of build.py; only the
reduction of gradients differs, and with it their rounding. `run.backend: pmap` chooses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from scalegpt.config import Config
from scalegpt.errors import Mistake
from scalegpt.step import build, update
from scalegpt.step.build import Steps
from scalegpt.step.objective import Batch
from scalegpt.step.update import State

AXIS = "device"  # pmap's only axis: all devices of the mesh in a row


@dataclass(frozen=True)
class PmapSteps(Steps):
    """These are Steps whose `jit_train` is made by pmap and takes what `jit_split` returns."""

    jit_split: Any

    def train(self, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        # Outside of jax.set_mesh: pmap has a mesh of its own and refuses another one around it.
        state, metrics = self.jit_train(state, self.jit_split(batch))
        # pmap returns the copies of this process only; making global arrays of them moves nothing.
        return jax.tree.map(_as_global, state, self.abstract), metrics

    def lower(self) -> Any:
        return self.jit_train.lower(self.abstract, self.jit_split.eval_shape(self.abstract_batch))


def check_whole(sizes: Mapping[str, int]) -> None:
    """Raise Mistake for sizes of mesh axes that split the model."""
    for axis in ("fsdp", "context", "tensor"):
        if sizes[axis] > 1:
            raise Mistake(
                f"run.backend=pmap gives each device a whole copy of the model, so it cannot have "
                f"mesh.{axis}={sizes[axis]}; set --mesh.{axis}=1 --mesh.data=-1, or "
                "--run.backend=jit"
            )


def build_steps(config: Config, mesh: Mesh, dtype: str, implementation: str) -> PmapSteps:
    """Do what build.build_steps does. Raises Mistake also for a mesh that splits the model."""
    check_whole(mesh.shape)
    # pmap wants each process's devices side by side; a TPU mesh may order them otherwise.
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    grid = np.array(devices).reshape(mesh.devices.shape)
    mesh = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    steps = build.build_steps(config, mesh, dtype, implementation)
    microbatch = steps.layout[1]
    per_device = microbatch // mesh.size  # sequences of a microbatch on one device

    def train(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        """Do one device's part of an update, with a batch [A, per_device, ...]."""
        first = jax.lax.axis_index(AXIS) * per_device
        accumulation = len(jax.tree.leaves(batch)[0])
        rows = jnp.arange(accumulation)[:, None] * microbatch + first + jnp.arange(per_device)
        sums = partial(update.reduced_sums, steps.objective, steps.model, AXIS)
        return update.train_step(config, steps.model, sums, rows.astype(jnp.uint32), state, batch)

    def split(batch: Batch) -> Batch:
        """Reshape [A, M, ...] to [A, devices, per_device, ...]: pmap maps over the devices."""
        return jax.tree.map(lambda x: x.reshape(len(x), mesh.size, per_device, *x.shape[2:]), batch)

    mapped = jax.pmap(
        train, AXIS, in_axes=(None, 1), out_axes=None, devices=devices, donate_argnums=0
    )
    jit_split = jax.jit(split, out_shardings=steps.batch_sharding)
    return PmapSteps(**{**vars(steps), "jit_train": mapped, "jit_split": jit_split})


def _as_global(x: Array, like: jax.ShapeDtypeStruct) -> Array:
    copies = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, like.sharding, copies)

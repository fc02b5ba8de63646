"""The reference backend: the same training under jax.pmap, for people who know pmap loops.

Each device has a whole copy of the state and its own rows. Loss, accumulation, optimizer,
initial weights, token layout, dropout keys, evaluation and checkpoints are those of step.py: only
how gradients are reduced differs, and with it their rounding. `run.backend: pmap` chooses it.
"""

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
from scalegpt.step.update import State

AXIS = "device"  # pmap's only one: all devices of the mesh in a row


@dataclass(frozen=True)
class PmapSteps(Steps):
    """As Steps, of the same arrays; `jit_train` is made by pmap, over what `jit_split` gives."""

    jit_split: Any

    def train(self, state: State, tokens: Array) -> tuple[State, dict[str, Array]]:
        # Outside of jax.set_mesh: pmap has a mesh of its own and refuses another one around it.
        state, metrics = self.jit_train(state, self.jit_split(tokens))
        # pmap returns the copies of this process alone; nothing is moved by calling them global.
        return jax.tree.map(_as_global, state, self.abstract), metrics

    def lower(self) -> Any:
        return self.jit_train.lower(self.abstract, self.jit_split.eval_shape(self.abstract_tokens))


def build_steps(config: Config, mesh: Mesh, dtype: str, implementation: str) -> PmapSteps:
    """As `step.build_steps`. Raises ValueError also for a mesh that splits the model."""
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1:
            raise Mistake(
                f"run.backend=pmap gives each device a whole copy of the model, so it cannot have "
                f"mesh.{axis}={mesh.shape[axis]}; set --mesh.{axis}=1 --mesh.data=-1, or "
                "--run.backend=jit"
            )
    # pmap wants each process's devices side by side; a TPU mesh may order them otherwise.
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    grid = np.array(devices).reshape(mesh.devices.shape)
    mesh = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    steps = build.build_steps(config, mesh, dtype, implementation)
    accumulation, microbatch = steps.layout
    mine = microbatch // mesh.size  # sequences of a microbatch on one device

    def train(state: State, tokens: Array) -> tuple[State, dict[str, Array]]:
        """One device's part: tokens [A, mine, T+1]."""
        first = jax.lax.axis_index(AXIS) * mine
        rows = jnp.arange(accumulation)[:, None] * microbatch + first + jnp.arange(mine)
        sums = partial(update.reduced_sums, config, steps.model, AXIS)
        return update.train_step(config, steps.model, sums, rows.astype(jnp.uint32), state, tokens)

    def split(tokens: Array) -> Array:
        """[A, M, T+1] -> [A, devices, mine, T+1]: an axis for pmap to map over."""
        return tokens.reshape(accumulation, mesh.size, mine, -1)

    mapped = jax.pmap(
        train, AXIS, in_axes=(None, 1), out_axes=None, devices=devices, donate_argnums=0
    )
    jit_split = jax.jit(split, out_shardings=steps.batch_sharding)
    return PmapSteps(**{**vars(steps), "jit_train": mapped, "jit_split": jit_split})


def _as_global(x: Array, like: jax.ShapeDtypeStruct) -> Array:
    copies = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, like.sharding, copies)

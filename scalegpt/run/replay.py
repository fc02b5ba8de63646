"""The batch of one update again, for a post-mortem: `--run.replay=STEP`; nothing is written.

The state before the update is that of the last checkpoint before it, trained on from there; so what
is seen is what the run had seen, dropout included.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import Config
from scalegpt.data import tokenizer
from scalegpt.data.datasets import windows_of
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.processes.phases import Phases
from scalegpt.run.feed import batches_from
from scalegpt.run.resume import check_same_run, initial_state
from scalegpt.step import sharding
from scalegpt.step.build import Steps
from scalegpt.step.loss import row_losses
from scalegpt.step.update import State, dropout_key, row_keys

SHOWN = 10


def replay(config: Config, datasets: list[Dataset], steps: Steps, phases: Phases) -> int:
    """Print what update run.replay of the run in run.out_dir saw. Raises ValueError without one."""
    done = config.run.replay
    state, start = _state_before(config, datasets, steps, done, phases)
    say = print if jax.process_index() == 0 else lambda *text: None
    batches = batches_from(config, datasets, steps, start)
    phases.begin("compile", start)
    again = range(start + 1, done)
    shown = jax.process_index() == 0 and len(again) > 1
    for step in tqdm(again, desc="updates before it", leave=False, disable=not shown or None):
        state, values = steps.train(state, next(batches))
        float(values["train/loss"])
        phases.begin("step", step)
    batch = next(batches)
    losses = example_losses(config, steps, state, batch)
    _, values = steps.train(state, batch)
    norms = {name: np.asarray(x) for name, x in values["norms"].items()}
    codec = tokenizer.load(datasets[0].tokenizer)
    tokens = {d.name: d.train for d in datasets}
    bad = int((~np.isfinite(losses)).sum())
    say(
        f"update {done}, from the checkpoint of step {start}: loss "
        f"{float(values['train/loss']):.6f}, gradient norm {float(values['train/grad_norm']):.6g}, "
        f"{bad} of {len(losses)} examples not finite, median {np.nanmedian(losses):.4f}"
    )
    say("\nloss      data set:first token   text")
    windows = windows_of(config, datasets, done)
    # Not finite first, then the largest.
    order = np.argsort(np.where(np.isfinite(losses), -losses, -math.inf), kind="stable")
    for row in order[:SHOWN].tolist():
        name, first = windows[row]
        text = codec.decode(tokens[name][first : first + 40].tolist())
        say(f"{losses[row]:<9.4f} {f'{name}:{first}':<22} {text[:60]!r}")
    say("\ngradient norm of each parameter, by layer where there are several")
    for name, norm in norms.items():
        say(f"{name:<22} {np.array2string(norm, precision=3, max_line_width=78)}")
    return 0


def example_losses(config: Config, steps: Steps, state: State, batch: Array) -> np.ndarray:
    """Mean cross-entropy of each row of the batch [A, M, T+1] in nats a token, [A * M], as the
    update has it."""

    def losses(params: Any, tokens: Array, rows: Array, key: Array) -> Array:
        keys = row_keys(steps.model, key, rows)
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            sums = row_losses(steps.model, params, tokens, keys)
        return sums / jnp.maximum((tokens[:, 1:] >= 0).sum(-1), 1)

    everywhere = NamedSharding(steps.mesh, PartitionSpec())
    losses = jax.jit(losses, out_shardings=everywhere)
    rows = np.arange(batch.shape[0] * batch.shape[1], dtype=np.uint32).reshape(batch.shape[:2])
    with jax.set_mesh(steps.mesh):
        key = jax.jit(lambda step: dropout_key(config.run.seed, step))(state.step)
        parts = [losses(state.params, batch[i], rows[i], key) for i in range(len(rows))]
        return np.concatenate([np.asarray(part) for part in parts]).astype(np.float64)


def _state_before(
    config: Config, datasets: list[Dataset], steps: Steps, done: int, phases: Phases
) -> tuple[State, int]:
    """The state after the last checkpoint before update `done`, and its step."""
    if done > config.optim.steps:
        raise Mistake(
            f"run.replay={done} is beyond the run's end, optim.steps={config.optim.steps}"
        )
    checkpoints = open_checkpoints(config.run.out_dir)
    start = max((step for step in checkpoints.steps if step < done), default=0)
    if start:
        data = {d.name: d.fingerprint for d in datasets}
        check_same_run(config, {"data": data}, checkpoints.meta(start))
    with phases("restore" if start else "weights"):
        state = initial_state(config, steps, checkpoints, start, lambda text: None)
    checkpoints.close()
    return state, start

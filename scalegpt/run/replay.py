"""Repeat one update for a post-mortem, with `--run.replay=STEP`, and print what it saw.

The state before that update comes from the last checkpoint before it, trained on from there; so
loss and gradient are those of the run, dropout included. Nothing is written.
"""

import math
from collections.abc import Callable, Iterator
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
from scalegpt.config.limits import BEGINS
from scalegpt.data import tokenizer
from scalegpt.data.datasets import train_batches, windows_of
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.processes.phases import Phases
from scalegpt.run.feed import source
from scalegpt.run.reference import set_reference
from scalegpt.run.resume import carry_over, data_marks, differences, initial_state
from scalegpt.run.rewarded import reference_weights
from scalegpt.step import sharding
from scalegpt.step.build import Steps
from scalegpt.step.loss import row_losses
from scalegpt.step.objective import pair_figures, tokens_of
from scalegpt.step.update import State, dropout_key, row_keys

SHOWN = 10  # examples that are printed


def replay(
    config: Config, stored: Config | None, datasets: list[Dataset], steps: Steps, phases: Phases
) -> int:
    """Print what update run.replay of the run in run.out_dir saw. Raises Mistake without one.

    stored: the run's own configuration. What differs from it is said, and may be what is tried.
    """
    update = config.run.replay
    say = print if jax.process_index() == 0 else lambda *text: None
    state, start, changes, reference = _state_before(
        config, stored, datasets, steps, update, phases, say
    )
    if changes:
        say("\n  ".join(["this is not the run's own update, for these settings differ:", *changes]))
    batch_of = source(config, datasets, steps, start, phases, reference=reference)
    phases.begin("compile", start)
    earlier = range(start + 1, update)
    bar = jax.process_index() == 0 and len(earlier) > 1
    for step in tqdm(earlier, desc="updates before it", leave=False, disable=not bar or None):
        state, values = steps.train(state, batch_of(state, step)[0])
        float(values["train/loss"])
        phases.begin("step", step)
    batch, figures = batch_of(state, update)
    losses = example_losses(config, steps, state, tokens_of(batch))
    _, values = steps.train(state, batch)
    norms = {name: np.asarray(x) for name, x in values["norms"].items()}
    bad = int((~np.isfinite(losses)).sum())
    say(
        f"update {update}, from the checkpoint of step {start}: loss "
        f"{float(values['train/loss']):.6f}, gradient norm {float(values['train/grad_norm']):.6g}, "
        f"{bad} of {len(losses)} examples not finite, median {np.nanmedian(losses):.4f}"
    )
    if "answers" in figures:
        lines = _answers(figures)
    else:
        lines = (_pairs if steps.objective.group == 2 else _texts)(config, datasets, update, losses)
    say("\n" + "\n".join(lines))
    say("\ngradient norm of each parameter, by layer where there are several")
    for name, norm in norms.items():
        say(f"{name:<22} {np.array2string(norm, precision=3, max_line_width=78)}")
    return 0


def _answers(figures: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each answer of an update, with its reward and advantage."""
    yield "reward    advantage  answer"
    for question, answer, reward, advantage in figures["answers"]:
        yield f"{reward:<9.4f} {advantage:<+10.4f} {question[:60]!r} {answer[:60]!r}"


def _pairs(
    config: Config, datasets: list[Dataset], update: int, losses: np.ndarray
) -> Iterator[str]:
    """Yield lines for the pairs of an update: not finite first, then the smallest margins."""
    codec, rows = tokenizer.load(datasets[0].tokenizer), np.arange(2)
    batch = train_batches(config, datasets, 2, rows)[update - 1]
    counts = (batch["tokens"][..., 1:] >= 0).sum(-1).reshape(-1)
    reference = batch["reference"].reshape(-1)
    margins = np.asarray(pair_figures(config.dpo, losses * counts, reference, counts)["margin"])
    windows = windows_of(config, datasets, update)[::2]
    yield "margin    data set:first token   question, chosen and rejected answer"
    order = np.argsort(np.where(np.isfinite(margins), margins, -math.inf), kind="stable")
    for i in order[:SHOWN].tolist():
        name, first = windows[i]
        prompt = batch["tokens"][i, 0]
        prompt = codec.decode(~prompt[: np.argmax(prompt >= 0)])
        texts = [codec.decode(row[row >= 0])[:30] for row in batch["tokens"][i]]
        texts = " ".join(map(repr, (prompt[-40:], *texts)))
        yield f"{margins[i]:<9.4f} {f'{name}:{first}':<22} {texts}"


def _texts(
    config: Config, datasets: list[Dataset], update: int, losses: np.ndarray
) -> Iterator[str]:
    """Yield lines for the examples of an update: not finite first, then the largest losses."""
    codec = tokenizer.load(datasets[0].tokenizer)
    texts = train_batches(config, datasets, 1, np.zeros(1, int))[update - 1][:, 0]
    texts = np.where(texts < 0, ~texts, texts) % BEGINS
    windows = windows_of(config, datasets, update)
    yield "loss      data set:first token   text"
    order = np.argsort(np.where(np.isfinite(losses), -losses, -math.inf), kind="stable")
    for row in order[:SHOWN].tolist():
        name, first = windows[row]
        text = codec.decode(texts[row, :40].tolist())
        yield f"{losses[row]:<9.4f} {f'{name}:{first}':<22} {text[:60]!r}"


def example_losses(config: Config, steps: Steps, state: State, batch: Array) -> np.ndarray:
    """Compute the mean cross-entropy of each row of an update's tokens [A, M, T+1]: [A * M], in
    nats a token, with the dropout that the update had."""

    def losses(params: Any, tokens: Array, rows: Array, key: Array) -> Array:
        keys = row_keys(steps.model, key, rows)
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            sums = row_losses(steps.model, params, tokens, keys)
        return sums / jnp.maximum((tokens[:, 1:] >= 0).sum(-1), 1)

    losses = jax.jit(losses, out_shardings=NamedSharding(steps.mesh, PartitionSpec()))
    rows = np.arange(batch.shape[0] * batch.shape[1], dtype=np.uint32).reshape(batch.shape[:2])
    with jax.set_mesh(steps.mesh):
        key = jax.jit(lambda step: dropout_key(config.run.seed, step))(state.step)
        microbatches = [losses(state.params, batch[i], rows[i], key) for i in range(len(rows))]
        return np.concatenate([np.asarray(x) for x in microbatches]).astype(np.float64)


def _state_before(
    config: Config,
    stored: Config | None,
    datasets: list[Dataset],
    steps: Steps,
    update: int,
    phases: Phases,
    say: Callable[[str], Any],
) -> tuple[State, int, list[str], Any]:
    """Restore the last checkpoint before `update`; return the state, its step, what differs, and
    the reference of grpo.kl."""
    if update > config.optim.steps:
        raise Mistake(
            f"run.replay={update} is beyond the run's end, optim.steps={config.optim.steps}"
        )
    checkpoints = open_checkpoints(config.run.out_dir)
    start = max((step for step in checkpoints.steps if step < update), default=0)
    changes = differences(stored, config, datasets) if stored else []
    if start:
        meta = data_marks(config, datasets)
        changes = carry_over(config, meta, checkpoints.meta(start), start, lambda text: None)
    with phases("restore" if start else "weights"):
        state = initial_state(config, steps, checkpoints, start, lambda text: None, changes)
    reference, mark = None, checkpoints.meta(start).get("reference") if start else None
    if config.grpo.kl:
        reference, _ = reference_weights(config, steps, state, start, mark)
    if config.objective.name == "dpo":
        with phases("reference"):
            set_reference(config, datasets, steps, state, start, mark, say)
    checkpoints.close()
    return state, start, changes, reference

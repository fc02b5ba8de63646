"""An update's batch is made of answers that the model has just written, with their rewards.

What update N sees follows from the weights before it, the run's seed and N. All processes have all
answers and compute all rewards, and each puts its own rows on its devices. Shapes: P prompts, G
answers to each, T targets of a row, A microbatches of M rows, which are the P G answers in order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from scalegpt.config import Config
from scalegpt.data import rewards, tokenizer
from scalegpt.data.chat import content_of, spoken
from scalegpt.data.datasets import windows_of
from scalegpt.data.token_files import Dataset
from scalegpt.inference.rollouts import Rollouts, rollouts
from scalegpt.processes.phases import Phases
from scalegpt.step import sharding
from scalegpt.step.build import Steps
from scalegpt.step.loss import row_losses
from scalegpt.step.objective import Batch, advantages
from scalegpt.step.update import State
from scalegpt.weights import init_from


def rewarded_source(
    config: Config,
    datasets: list[Dataset],
    steps: Steps,
    phases: Phases,
    check_stop: Callable[[], None],
    reference: Any,
) -> Callable[[State, int], tuple[Batch, dict[str, Any]]]:
    """Return a function from the state before an update and its number to its batch and figures.

    check_stop: called in the midst of a rollout; what it raises ends that. reference: the weights
    that grpo.kl measures the distance from. Among the figures are `answers`, for people: question,
    answer, reward and advantage of each. Raises Mistake for a reward that is none.
    """
    grpo, codec = config.grpo, tokenizer.load(datasets[0].tokenizer)
    reward = rewards.load(grpo.reward)
    roll = rollouts(
        steps,
        codec.vocab_size,
        codec.end,
        grpo.samples,
        grpo.max_new_tokens,
        grpo.temperature,
        check_stop,
    )
    log_probs = jax.jit(
        lambda params, tokens: _log_probs(steps, grpo.temperature, params, tokens),
        out_shardings=steps.batch_sharding,
    )
    splits = {dataset.name: dataset.train for dataset in datasets}
    key = jax.random.fold_in(jax.random.key(config.run.seed), 2)
    kept: list[Any] = [None, None]  # the number of a rollout, and what came of it

    def write(state: State, step: int) -> tuple[Batch, dict[str, Any]]:
        places = [(splits[name], i) for name, i in windows_of(config, datasets, step)]
        prompts = [split.ids(i) for split, i in places]
        drawn = roll(state.params, prompts, jax.random.fold_in(key, step))
        texts = [spoken(content_of(codec, ids)) for ids in drawn.answers]
        examples = [split[i] for split, i in places for _ in range(grpo.samples)]
        values = np.array([reward(x, text) for x, text in zip(examples, texts, strict=True)])
        values = values.reshape(-1, grpo.samples)
        better = advantages(grpo, values)
        questions = [prompt for prompt in prompts for _ in range(grpo.samples)]
        rows = _rows(config, questions, drawn, better)
        local = sharding.local_rows(steps.mesh, steps.layout[1])
        batch = jax.tree.map(
            lambda x: sharding.to_global(
                x.reshape(*steps.layout, *x.shape[1:])[:, local],
                local,
                steps.batch_sharding,
                steps.layout[1],
            ),
            rows,
        )
        with jax.set_mesh(steps.mesh):
            if grpo.updates > 1:
                batch["old"] = log_probs(state.params, batch["tokens"])
            if grpo.kl:
                batch["reference"] = log_probs(reference, batch["tokens"])
        figures = _figures(values, drawn)
        asked = [example["messages"][-1]["content"] for example in examples]
        figures["answers"] = list(
            zip(asked, texts, values.reshape(-1).tolist(), better.tolist(), strict=True)
        )
        return jax.block_until_ready(batch), figures

    def source(state: State, step: int) -> tuple[Batch, dict[str, Any]]:
        number = (step - 1) // grpo.updates
        if kept[0] != number:
            kept[:] = None, None
            with phases("rollout"):
                kept[:] = number, write(state, step)
        return kept[1]

    return source


def _rows(
    config: Config, prompts: Sequence[np.ndarray], drawn: Rollouts, better: np.ndarray
) -> dict[str, np.ndarray]:
    """Lay prompts and answers out as rows of signed ids [N, T+1]; "sampled" is [N, T]."""
    count, width = len(prompts), config.row_width
    tokens = np.full((count, width + 1), -1, np.int32)
    sampled = np.zeros((count, width), np.float32)
    for i, (prompt, answer) in enumerate(zip(prompts, drawn.answers, strict=True)):
        begin, end = len(prompt), len(prompt) + len(answer)
        learned = drawn.ended[i] or not config.grpo.mask_truncated
        tokens[i, :begin] = ~prompt
        tokens[i, begin:end] = answer if learned else ~answer
        sampled[i, begin - 1 : end - 1] = drawn.log_probs[i, : len(answer)]
    return {"tokens": tokens, "advantage": better, "sampled": sampled}


def _figures(values: np.ndarray, drawn: Rollouts) -> dict[str, Any]:
    """Return figures of an update's answers and their rewards [P, G]."""
    tokens = sum(map(len, drawn.answers))
    return {
        "rl/reward": values.mean(),
        "rl/reward_std": values.std(1).mean(),
        "rl/silent_groups": (np.ptp(values, axis=1) == 0).mean(),
        "rl/length": (tokens - drawn.ended.sum()) / len(drawn.answers),
        "rl/ended": drawn.ended.mean(),
        "rl/entropy": drawn.entropy,
        "rl/tokens_per_second": tokens / drawn.seconds,
    }


def _log_probs(steps: Steps, temperature: float, params: Any, tokens: Array) -> Array:
    """Compute the log-probability of each target of tokens [A, M, T+1] as training does."""

    def of_microbatch(tokens: Array) -> Array:
        return -row_losses(steps.model, params, tokens, None, False, temperature)

    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        return jax.lax.map(of_microbatch, tokens)


def reference_weights(
    config: Config, steps: Steps, state: State, start: int, stored: str | None
) -> tuple[Any, str]:
    """Return the weights that a run with grpo.kl began with, and their fingerprint.

    start: the update that the run continues from. stored: the fingerprint that they had then.
    Raises Mistake where run.init_from has other weights now.
    """
    if start == 0:  # the state's own buffers are used up by the first update
        params = jax.tree.map(jnp.copy, state.params)
    else:
        params = init_from.first_weights(config, steps.abstract.params, stored)
    return params, init_from.fingerprint(params)

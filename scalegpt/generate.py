"""Text from a trained model: `python -m scalegpt.generate --run out/NAME --prompt "..."`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from scalegpt import command_line, sharding, tokenizer, trained
from scalegpt.model import head_table, logits
from scalegpt.step import Steps


def sample_token(scores: Array, key: Array, temperature: float, top_k: int) -> Array:
    """One id [N] for each row of float32 logits [N, V], the row's key folded from `key`.

    temperature 0: the likeliest id. top_k 0: all ids compete.
    """
    if temperature == 0:
        return scores.argmax(-1)
    if top_k:
        lowest_kept = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < lowest_kept, -jnp.inf, scores)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(scores)))
    return jax.vmap(jax.random.categorical)(keys, scores / temperature)


def continuations(
    steps: Steps,
    params: Any,
    prompt: np.ndarray,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 1337,
    stop: int | None = None,
) -> list[list[int]]:
    """New ids for each of `samples` continuations of prompt [P]; one ends at the id `stop`.

    Ids of the padded vocabulary are never drawn. A text longer than block_size is continued
    from its last block_size tokens. Every process of a run must call this together.
    """
    next_token = _next_token(steps, temperature, top_k)
    rows = -(-samples // steps.layout[1]) * steps.layout[1]
    local = sharding.local_rows(steps.mesh, rows)
    block = steps.model.config.block_size
    key = jax.random.key(seed)
    text = np.tile(np.asarray(prompt, np.int32), (rows, 1))
    for i in range(max_new_tokens):
        window = text[:, -block:]
        length = window.shape[1]
        # Padded to one shape, so that one compilation serves all lengths; nothing looks right.
        window = np.pad(window, ((0, 0), (0, block - length)))
        tokens = sharding.to_global(window[local], local, steps.eval_sharding, rows)
        with jax.set_mesh(steps.mesh):
            new = next_token(params, tokens, length - 1, jax.random.fold_in(key, i))
        text = np.concatenate([text, np.asarray(new)[:, None]], axis=1)
        if stop is not None and (text[:samples, len(prompt) :] == stop).any(1).all():
            break
    new_ids = [row.tolist() for row in text[:samples, len(prompt) :]]
    return [ids[: ids.index(stop)] if stop in ids else ids for ids in new_ids]


def _next_token(steps: Steps, temperature: float, top_k: int) -> Callable:
    config = steps.model.config

    def next_token(params: Any, tokens: Array, last: Array, key: Array) -> Array:
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            hidden = steps.model.apply({"params": params}, tokens)[:, last]
            scores = logits(hidden, head_table(params), config.vocab_size)
        return sample_token(scores, key, temperature, top_k)

    everywhere = jax.sharding.NamedSharding(steps.mesh, jax.sharding.PartitionSpec())
    return jax.jit(next_token, out_shardings=everywhere)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scalegpt.generate", description="Continue a text with a trained model."
    )
    trained.add_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue (default: standard input)")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
    parser.add_argument("--top-k", type=int, default=200, help="0: all tokens")
    parser.add_argument("--seed", type=int, default=1337)
    flags = parser.parse_args(argv)
    lowest_allowed = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0}
    for name, lowest in lowest_allowed.items():
        if getattr(flags, name) < lowest:
            shown = name.replace("_", "-")
            raise ValueError(f"--{shown}={getattr(flags, name)} must be at least {lowest}")
    text = _prompt(flags)
    loaded = trained.load(flags, microbatch=1)
    codec = tokenizer.load(loaded.tokenizer)
    prompt = codec.encode_prompt(text)
    if not len(prompt):
        if codec.eot is None:
            raise ValueError("the prompt is empty, and this tokenizer has no mark to start from")
        prompt = np.array([codec.eot])
    results = continuations(
        loaded.steps, loaded.params, prompt,
        samples=flags.num_samples, max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed, stop=codec.eot,
    )  # fmt: skip
    for i, ids in enumerate(results):
        if i:
            print("---------------")
        print(text + codec.decode(ids))
    return 0


def _prompt(flags: argparse.Namespace) -> str:
    if flags.prompt is not None:
        return flags.prompt
    if flags.prompt_file is None:
        return sys.stdin.read()
    try:
        return flags.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --prompt-file {flags.prompt_file}: {error}") from None


if __name__ == "__main__":
    command_line.run(main)

"""tools/bench.py --decode measures tokens a second, and the share of memory bandwidth they take.

A step of decoding multiplies each weight with one vector a text, so it is bound by how fast the
weights and the cache can be read. Its share of the bandwidth is the bytes of both, counted once a
step as they are stored, over the bandwidth of adding 1 to an array, which is timed here.
"""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import programs
from flax.traverse_util import flatten_dict

from scalegpt.config import Config
from scalegpt.errors import Mistake
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.model.parameters import parameters
from scalegpt.step.build import build_for_use
from scalegpt.step.sharding import make_mesh, row_shards

PROMPT = 16  # tokens
ADDED = 2**28  # bytes of the array whose addition is timed


class Writer:
    """A writer is scalegpt.generate's decoder with random weights; the constructor compiles it."""

    name = "scalegpt"

    def __init__(self, config: Config, texts: int, tokens: int) -> None:
        mesh, model = make_mesh(config.mesh), config.model
        device_texts = -(-texts // row_shards(mesh))
        steps = build_for_use(config, mesh, device_texts)
        self.write = decoder(steps, steps.init().params, Sampler(), model.vocab_size, keep=False)
        self.prompts = np.random.default_rng(0).integers(0, model.vocab_size, (texts, PROMPT))
        # A step reads one row a text of these tables, which is next to nothing.
        kinds = {path.rpartition("/")[2]: x.kind for path, x in parameters(model).items()}
        head = {"wte"} if model.tie_word_embeddings else set()
        looked_up = {name for name, kind in kinds.items() if kind == "embeddings"} - head
        flat = flatten_dict(self.write.params)
        read = [x for path, x in flat.items() if path[-1] not in looked_up]
        token_bytes = (
            2 * model.n_layer * model.kv_heads * model.head_dim * steps.model.dtype.itemsize
        )
        cached_tokens = device_texts * (PROMPT + tokens // 2)  # half way through the texts
        # What one device reads in a step.
        self.bytes_read = token_bytes * cached_tokens / mesh.shape["tensor"] + sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in read
        )
        self.block(tokens)

    def close(self) -> None:
        pass

    def block(self, tokens: int) -> dict[str, Any]:
        """Measure seconds of a token, prefill included."""
        began = time.perf_counter()
        for _ in self.write.ids(self.prompts, tokens):
            pass
        return {"seconds": (time.perf_counter() - began) / tokens}


def bandwidth() -> float:
    """Measure the bytes a second that a device reads and writes by x + 1: the best of ten."""
    x, times = jnp.ones(ADDED // 4, jnp.float32), []
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new memory would cost more
    for _ in range(11):
        began = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - began)
    return 2 * ADDED / min(times[1:])


def measure(
    config: Config, flags: Namespace, others: list[dict[str, Any]], turns: Callable
) -> dict[str, Any]:
    """Measure decoding for each number of texts, beside the models of `others`' settings.

    turns: bench's function. Raises Mistake when a text would not fit into block_size, or a process
    fails.
    """
    tokens = flags.steps
    if PROMPT + tokens > config.model.block_size:
        raise Mistake(
            f"--steps={tokens} after a prompt of {PROMPT} tokens is more than "
            f"model.block_size={config.model.block_size}, past which nothing is cached; "
            f"{config.model.block_size - PROMPT} would do"
        )
    rate, rows, busy = bandwidth(), [], 0.0
    for count in flags.decode:
        writers: list[Any] = []
        try:
            for settings in others:
                prompts = {"texts": count, "prompt": PROMPT, "tokens": tokens, "mode": "eager"}
                writers.append(programs.Child({**settings, **prompts}))
            writers.insert(0, Writer(config, count, tokens))
            blocks, others_cpu = turns(writers, flags.rounds, tokens)
            busy = max(busy, others_cpu)
        finally:
            for writer in writers:
                writer.close()
        own_seconds = [turn[0]["seconds"] for turn in blocks]
        used = writers[0].bytes_read / statistics.median(own_seconds)
        row: dict[str, Any] = {"texts": count, "share_of_bandwidth": used / rate, "writers": []}
        for i, writer in enumerate(writers):
            seconds = [turn[i]["seconds"] for turn in blocks]
            pairs = [other / own for own, other in zip(own_seconds, seconds, strict=True)]
            row["writers"].append(
                {
                    "name": writer.name,
                    "tokens_per_second": count / statistics.median(seconds),
                    "token_seconds": statistics.median(seconds),
                    "ratio": {"pairs": pairs, "median": statistics.median(pairs)},
                }
            )
        rows.append(row)
    figures = {"tokens": tokens, "bandwidth_bytes_per_second": rate, "decoding": rows}
    return {**figures, "others_cpu": busy}


def table(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    rate = report["bandwidth_bytes_per_second"]
    lines = [
        f"{report['tokens']} tokens after a prompt of {PROMPT}; a device reads and writes "
        f"{rate / 1e9:.1f} GB/s",
        f"{'texts':>5}  {'':20} {'tokens/s':>10} {'ms a step':>10}",
    ]
    for row in report["decoding"]:
        for i, writer in enumerate(row["writers"]):
            last = f"{row['share_of_bandwidth']:.0%} of the bandwidth"
            if i:
                verdict = f"scalegpt is {writer['ratio']['median']:.2f} x as fast"
                last = verdict if report["verdict"] else "no verdict"
            lines.append(
                f"{row['texts']:5}  {writer['name']:20} {writer['tokens_per_second']:10,.1f} "
                f"{1e3 * writer['token_seconds']:10,.2f}  {last}"
            )
    return "\n".join(lines)

"""List the parameters of a model without computing them: their shapes, and what each of them is.

A new parameter is counted, decayed, trained by Muon and laid out by the names of its axes alone.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from scalegpt.config.recipe import NO_LORA, LoraConfig, ModelConfig
from scalegpt.errors import Mistake
from scalegpt.model.gpt import GPT

STACKED = ("layers", "qkv")  # axes that number matrices or vectors
_VECTORS = {("norm",), ("mlp",), ("heads", "kv"), ("kv_heads", "kv"), (None,), (None, None)}


class Parameter(NamedTuple):
    """A parameter has a shape, rows of padding included, and a name for each axis, or None."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def kind(self) -> str:
        """Say whether it is of the "head", "embeddings", "matrices", "adapters" or "scalars".

        matrices: those of the layers, which all have the axis `embed`; adapters: LoRA's factors;
        scalars: norms, biases, gates and learned numbers. Raises Mistake for other axes: a new
        matrix would pass for a bias, which neither decays nor is Muon's nor counts as FLOPs.
        """
        if "lora" in self.axes:
            return "adapters"
        if "head_embed" in self.axes:
            return "head"
        if "table_embed" in self.axes or "position" in self.axes:
            return "embeddings"
        if "embed" in self.axes:
            return "matrices"
        if tuple(axis for axis in self.axes if axis not in STACKED) not in _VECTORS:
            raise Mistake(
                f"axes {self.axes} do not say what a parameter is: a matrix needs the axis "
                "`embed`, other axes a line in `Parameter` of scalegpt/model/parameters.py"
            )
        return "scalars"

    def size(self, vocab_size: int) -> int:
        """Count the entries, without the padding of the vocabulary."""
        sizes = zip(self.axes, self.shape, strict=True)
        return prod(vocab_size if axis == "vocab" else length for axis, length in sizes)


def parameters(model: ModelConfig, lora: LoraConfig = NO_LORA) -> dict[str, Parameter]:
    """Return the parameters by path, as "h/mlp/up_kernel"; no device is touched."""
    return _parameters(model, lora)


@lru_cache  # whose calls differ where one names the default and another does not
def _parameters(model: ModelConfig, lora: LoraConfig) -> dict[str, Parameter]:
    gpt = GPT(model, jnp.float32, "xla", lora)
    # Where a step is being traced, its rules for activations would split this batch of one row.
    with nn.logical_axis_rules(()):
        boxed = jax.eval_shape(
            lambda: gpt.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        )
    leaves = flatten_dict(boxed, sep="/")
    return {path: Parameter(x.value.shape, x.names) for path, x in leaves.items()}

"""Trained weights of others are checked against the model that they should be, then read.

A leaf [L, ...] of our parameters is the L layers' tensors, each put where its `Place` says.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from scalegpt.config.recipe import ModelConfig
from scalegpt.errors import Mistake
from scalegpt.weights.places import Place
from scalegpt.weights.tensor_files import Read, Shapes

# Causal masks and frequencies that old versions of transformers saved beside the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_LINES = 12  # of a message


class Source(NamedTuple):
    """A source is weights in the file or folder `path`, which hold what their model should.

    tokenizer: a spec, or None where there is none. places: where each tensor goes. head: the name
    of a copy of the embedding table that the source has for a tied head.
    """

    path: Path
    model: ModelConfig
    tokenizer: dict[str, Any] | None
    places: dict[str, Place]
    read: Read
    head: str | None

    def load_params(self, model: ModelConfig, abstract_params: Any) -> Any:
        """Load the parameters, float32, in the shapes and shardings of `abstract_params`.

        model: the source's, or with another block_size (learned positions are cropped) or
        vocab_multiple (rows of padding are zero). The host holds one leaf at a time. Raises Mistake
        for more learned positions than there are, and for numbers that are not finite.
        """
        if model.block_size > self.model.block_size and model.position == "learned":
            raise Mistake(
                f"model.block_size={model.block_size} is more than the {self.model.block_size} "
                f"positions of {self.path}; they can only be cropped"
            )
        assert model.vocab_size == self.model.vocab_size, (model.vocab_size, self.model.vocab_size)
        leaves = traverse_util.flatten_dict(abstract_params, sep="/")
        tensors: dict[str, list[tuple[str, Place]]] = {path: [] for path in leaves}
        for name, place in self.places.items():
            tensors[place.leaf].append((name, place))
        unfilled = [path for path, sources in tensors.items() if not sources]
        assert not unfilled, unfilled  # else they would be 0

        def load(path: str, leaf: Any) -> jax.Array:
            whole = np.zeros(leaf.shape, np.float32)
            for name, place in tensors[path]:
                place.put(self._tensor(name, path), whole)
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: whole[index]
            )

        params = {path: load(path, leaf) for path, leaf in leaves.items()}
        return traverse_util.unflatten_dict(params, sep="/")

    def _tensor(self, name: str, leaf: str) -> np.ndarray:
        tensor = self.read(name)
        if not np.isfinite(tensor).all():
            raise Mistake(
                f"{self.path}: {name} holds numbers that are not finite; the weights are damaged, "
                "or of a training that diverged: take others"
            )
        if leaf == "wte" and self.head and not np.array_equal(tensor, self.read(self.head)):
            raise Mistake(
                f"{self.path}: {self.head} differs from {name}, which config.json says it is; "
                'a model with a head of its own has "tie_word_embeddings": false'
            )
        return tensor


def open_source(
    path: Path,
    model: ModelConfig,
    tokenizer: dict[str, Any] | None,
    places: dict[str, Place],
    tensors: tuple[Shapes, Read],
) -> Source:
    """Return the source with these named tensors, of which none is read yet.

    Raises Mistake with every tensor that is missing, unexpected or misshapen: before anything is
    allocated or compiled by what a damaged file says of its sizes.
    """
    shapes, read = tensors
    table = next(name for name, place in places.items() if place.leaf == "wte")
    if model.tie_word_embeddings and _HEAD in shapes and table not in shapes:
        # safetensors' save_model writes one name of a table that has two.
        places = {_HEAD if name == table else name: x for name, x in places.items()}
        table = _HEAD
    names = {name for name in shapes if name not in places and not _BUFFER.fullmatch(name)}
    if wrapped := [name for name in names if name.endswith(f".{table}")]:
        raise Mistake(
            f"{path} has {wrapped[0]}, not {table}: something wraps the model, and its name "
            "precedes those of the tensors; store the state_dict of the model itself"
        )
    expected = {name: place.shape for name, place in places.items()}
    head = _HEAD if _HEAD in names else None
    if head:
        expected[head] = places[table].shape
    faults = [f"missing: {name}" for name in expected if name not in shapes]
    faults += [f"unexpected: {name}" for name in sorted(names - {head})]
    faults += [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if (more := len(faults) - _LINES) > 0:
        faults = [*faults[:_LINES], f"and {more:,} more"]
    if faults:
        raise Mistake("\n  ".join([f"{path} does not hold the model that it describes:", *faults]))
    return Source(path, model, tokenizer, places, read, head)

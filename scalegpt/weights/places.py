"""Where the tensors of other programs' files go: what a format of Hugging Face's is to us."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalegpt.config.recipe import ModelConfig
from scalegpt.weights.tensor_files import Read


class Place(NamedTuple):
    """A place is where a tensor of a file goes: a leaf of the parameters, or a part of one.

    shape: the tensor's in the file. layer: None where the leaf is not stacked over layers. part:
    of a leaf [..., n, heads, head size] the index in n, which is query, key or value; None: all.
    transposed: of a layer's kernels; PyTorch's linear layers are [out, in], ours
    and GPT-2's [in, out]. signs: what the
    numbers of each head are multiplied with, 1 or -1, by the file's program as by ours; None: 1.
    absent: what all numbers of the tensor are where the model has no such leaf; None: it must have.
    """

    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    part: int | None = None
    transposed: bool = False
    signs: tuple[int, ...] | None = None
    absent: float | None = None

    def put(self, tensor: np.ndarray, leaf: np.ndarray) -> None:
        """Write a file's tensor into its leaf, whose further rows (padding) stay as they are."""
        if self.layer is None:  # tables and vectors, which all have as we do
            common = tuple(map(slice, np.minimum(leaf.shape, tensor.shape)))
            leaf[common] = tensor[common]
            return
        target = self._view(leaf)
        tensor = (tensor.T if self.transposed else tensor).reshape(target.shape)
        target[...] = tensor if self.signs is None else tensor * np.array(self.signs, tensor.dtype)

    def get(self, leaf: np.ndarray) -> np.ndarray:
        """Return the file's tensor from its leaf, the reverse of `put`; mostly a view of it."""
        if self.layer is None:
            return leaf[: self.shape[0]]
        found = self._view(leaf)
        found = found if self.signs is None else found * np.array(self.signs, found.dtype)
        return found.reshape(self.shape[::-1]).T if self.transposed else found.reshape(self.shape)

    def _view(self, leaf: np.ndarray) -> np.ndarray:
        layer = leaf[self.layer]
        return layer if self.part is None else layer[..., self.part, :, :]


class Format(NamedTuple):
    """A format is how transformers stores models of one model_type.

    name: of its program's class, for messages. describe: config.json's values and its path -> keys
    of our model section; raises Mistake, by name, for what our model lacks. places: the place of
    every tensor, named without `prefix`. config: what config.json says of a model that fits. fits:
    of a model's keys that cannot all be said, the values that can be. adapt: config.json's values
    and the function that reads a tensor -> one that returns it changed, where the file's program
    computes with it otherwise.
    """

    name: str
    prefix: str
    describe: Callable[[dict[str, Any], Path], dict[str, Any]]
    places: Callable[[ModelConfig], dict[str, Place]]
    config: Callable[[ModelConfig], dict[str, Any]]
    fits: Callable[[ModelConfig], dict[str, tuple]]
    adapt: Callable[[dict[str, Any], Read], Read] = lambda values, read: read

    def misfits(self, model: ModelConfig) -> list[str]:
        """Return what the format cannot say of a model, as ["model.qk_norm=True, not False"]."""
        misfits = []
        for key, known in self.fits(model).items():
            if (value := getattr(model, key)) not in known:
                only = " or ".join(str(x) for x in known if x is not None)
                can = f"not {only}" if only else "which it lacks"
                misfits.append(f"model.{key}={value}, {can}")
        return misfits

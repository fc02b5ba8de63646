"""LoRA (arXiv:2106.09685) adds to each matrix W of the layers a change of low rank, alpha/rank A B.

A and B are parameters beside W, named W_a and W_b. They are trained, and W is not. B begins as 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from scalegpt.config.recipe import LoraConfig

TABLES = ("wte", "head_kernel", "value_table")  # which have a row for each id


def change(lora: LoraConfig, a: Array, b: Array) -> Array:
    """Return the change of a matrix, [in..., out...], from A [in..., R] and B [R, out...]."""
    return lora.alpha / lora.rank * jnp.tensordot(a, b, 1)


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is a factor of a change, by the last part of its path."""
    return name.endswith(("_a", "_b"))


def is_trained(lora: LoraConfig, name: str) -> bool:
    """Tell whether a parameter is trained; of a table, `of_marks` leaves only some rows."""
    marked = lora.marks is not None and name in TABLES
    return not lora.rank or is_adapter(name) or marked


def parted(params: Any, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """Part a tree of parameters into those that are chosen by their names, and the others."""
    leaves = flatten_dict(params)
    inside = {path: x for path, x in leaves.items() if chosen(path[-1])}
    others = {path: x for path, x in leaves.items() if path not in inside}
    return unflatten_dict(inside), unflatten_dict(others)


def joined(one: Any, other: Any) -> Any:
    """Return the tree that `parted` has parted."""
    return unflatten_dict(flatten_dict(one) | flatten_dict(other))


def of_marks(lora: LoraConfig, grads: Any) -> Any:
    """Set to 0 the gradient of all rows of the tables but those of a chat's marks.

    Marks that are new begin as the mean of the other rows, so that adapters alone could hardly tell
    them apart.
    """
    if not lora.rank or lora.marks is None:
        return grads

    def leaf(path: tuple, x: Array) -> Array:
        if path[-1].key not in TABLES:
            return x
        return jnp.where(jnp.arange(x.shape[-2])[:, None] >= lora.marks, x, 0)

    return jax.tree_util.tree_map_with_path(leaf, grads)


def merged(lora: LoraConfig, params: Any, adapters: Any) -> Any:
    """Add to the matrices, which are stacked over layers, the changes of their adapters."""
    leaves, factors = flatten_dict(params), flatten_dict(adapters)
    for *path, name in factors:
        kernel = name.removesuffix("_a")
        if kernel != name:
            a, b = (factors[*path, f"{kernel}_{factor}"] for factor in "ab")
            leaves[*path, kernel] += jax.vmap(partial(change, lora))(a, b)
    return unflatten_dict(leaves)

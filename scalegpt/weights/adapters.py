"""The weights of a run are restored for use; what LoRA has trained is merged into its matrices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import Config
from scalegpt.model.lora import is_adapter, joined, merged, parted
from scalegpt.model.parameters import parameters


def restore(checkpoints: Checkpoints, step: int, stored: Config, abstract: Any) -> Any:
    """Return the weights of a checkpoint in the shapes and shardings of `abstract`, a model without
    LoRA. stored: the run's configuration. Raises Mistake as `Checkpoints.restore_params`."""
    if not stored.lora.rank:
        return checkpoints.restore_params(step, abstract)
    # Whole on each device, as they are small.
    whole = NamedSharding(jax.tree.leaves(abstract)[0].sharding.mesh, PartitionSpec())
    factors = {
        tuple(path.split("/")): jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=whole)
        for path, x in parameters(stored.model, stored.lora).items()
        if is_adapter(path)
    }
    params = checkpoints.restore_params(step, joined(abstract, unflatten_dict(factors)))
    adapters, base = parted(params, is_adapter)
    # The buffers of the matrices are reused, as a large model would not fit twice.
    places = jax.tree.map(lambda x: x.sharding, abstract)
    merge = jax.jit(partial(merged, stored.lora), donate_argnums=0, out_shardings=places)
    return merge(base, adapters)

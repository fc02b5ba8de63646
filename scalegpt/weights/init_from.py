"""A new run may start from trained weights, which run.init_from names."""

import hashlib
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from scalegpt.checkpoints.checkpoints import PARAMS, Checkpoints, open_checkpoints
from scalegpt.config import Config
from scalegpt.config.differences import OF_LENGTH, OF_THE_RUN, unread
from scalegpt.config.loading import validate
from scalegpt.config.recipe import ModelConfig, muons
from scalegpt.data import tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.run_folder import FOLDER, is_run
from scalegpt.model.layers import RMS_NORM_EPS
from scalegpt.model.lora import TABLES, is_adapter, joined, parted
from scalegpt.weights import adapters, huggingface


def weights(config: Config, abstract: Any) -> tuple[Any, str]:
    """Load the weights that run.init_from names; return them and where they came from.

    abstract: the parameters of this run, with their shapes and shardings. LoRA's factors are 0.
    Raises Mistake where the weights cannot be read.
    """
    factors, abstract = parted(abstract, is_adapter)
    name = config.run.init_from
    if is_run(name):
        source = open_checkpoints(name)
        step = source.find(config.run.init_checkpoint, PARAMS)
        config_of_source = validate(source.meta(step)["config"], f"step {step} of {source.folder}")
        stored = config_of_source.model
        params = _restore_cropped(source, step, config_of_source, abstract)
        source.close()
        name = f"{name}, step {step}"
    else:
        opened = huggingface.open_folder(huggingface.locate(name))
        stored = opened.model
        model = config.model.model_copy(update={"vocab_size": stored.vocab_size})
        params = opened.load_params(model, abstract)
    if (new := config.model.vocab_size - stored.vocab_size) > 0:
        params = grown(params, stored.vocab_size, config.run.seed, abstract)
        name += f"; {new} new ids begin as the mean of the others"
        if config.objective.name in ("dpo", "grpo"):
            name += "\nwarning: these weights have not learned to answer, as --config sft teaches"
    before, now = _meaning(stored, config), _meaning(config.model, config)
    for key in sorted(key for key in OF_LENGTH if before.get(key) != now.get(key)):
        name += f"; model.{key}: {before.get(key)} -> {now.get(key)}"
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), factors)
    return joined(params, zeros), name


def first_weights(config: Config, abstract: Any, mark: str | None) -> Any:
    """Load the weights that a run that continues has begun with.

    mark: their fingerprint, or None where the run has not needed them before. Raises Mistake where
    run.init_from has others now, as when its run has gone on.
    """
    params, name = weights(config, abstract)
    if mark is not None and fingerprint(params) != mark:
        raise Mistake(
            f"the weights that the run began with are needed again, and run.init_from="
            f"{config.run.init_from} has others now: {name}; name the checkpoint of before by its "
            "step, --run.init_checkpoint=STEP, or begin anew in another run.out_dir"
        )
    return params


def fingerprint(params: Any) -> str:
    """Return a mark of these weights without LoRA's factors, which is the same on any mesh."""
    sums = [int(x) for x in jax.device_get(_checksums(parted(params, is_adapter)[1]))]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


@jax.jit
def _checksums(params: Any) -> list[jax.Array]:
    """Sum the bits of each array, each times an odd number by its place, modulo 2^32.

    Sums of integers are the same in any order, and so on any mesh.
    """

    def checksum(x: jax.Array) -> jax.Array:
        places = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        return (bits * (2 * places + 1)).sum(dtype=jnp.uint32)

    return [checksum(x) for x in jax.tree.leaves(params)]


def _restore_cropped(source: Checkpoints, step: int, stored: Config, abstract: Any) -> Any:
    """Restore a run's weights, of which this run may use fewer learned positions.

    stored: the run's configuration. Tables of ids have its model's number of rows.
    """
    rows = {"wpe": stored.model.block_size, **dict.fromkeys(TABLES, stored.model.padded_vocab)}

    def as_stored(path: tuple, leaf: Any) -> Any:
        count = rows.get(path[-1].key)
        if count is None or count == leaf.shape[-2]:
            return leaf
        # Whole on each device, as the mesh need not divide the other number of rows.
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        shape = (*leaf.shape[:-2], count, leaf.shape[-1])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=whole)

    shapes = jax.tree_util.tree_map_with_path(as_stored, abstract)
    params = adapters.restore(source, step, stored, shapes)
    if "wpe" in params and params["wpe"].shape != (wpe := abstract["wpe"]).shape:
        crop = jax.jit(lambda x: x[: wpe.shape[0]], out_shardings=wpe.sharding)
        params["wpe"] = crop(params["wpe"])
    return params


def grown(params: Any, vocab_size: int, seed: int, abstract: Any) -> Any:
    """Return the parameters with rows for ids from `vocab_size` on: the mean of the rows before.

    A row of padding would not do. It is random or 0 and was never trained, so that its logit is
    near 0, far above the others' of a trained model: the new ids would have all probability. With
    the mean, each has at most 1 / vocab_size of it, by Jensen's inequality (John Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021). A little noise tells
    them apart. abstract: the parameters with the shapes and shardings to return.
    """
    key = jax.random.fold_in(jax.random.key(seed), 3)

    def grow(table: Array, like: Any, number: int) -> Array:
        *axes, rows, width = like.shape
        old = table[..., :vocab_size, :]
        noise = jax.random.normal(
            jax.random.fold_in(key, number), (*axes, rows - vocab_size, width)
        )
        new = old.mean(-2, keepdims=True) + 0.01 * old.std(-2, keepdims=True) * noise
        return jnp.concatenate([old, new], -2)

    def leaf(path: tuple, x: Array, like: Any) -> Array:
        if path[-1].key not in TABLES:
            return x
        whole = partial(grow, like=like, number=TABLES.index(path[-1].key))
        return jax.jit(whole, out_shardings=like.sharding)(x)

    return jax.tree_util.tree_map_with_path(leaf, params, abstract)


def source_model(config: Config) -> tuple[ModelConfig, Any]:
    """Return the model that run.init_from names and its tokenizer's spec, which may be None.

    Raises Mistake where it names none, or weights that are not those of their config.json.
    """
    source = config.run.init_from
    if is_run(source):
        checkpoints = open_checkpoints(source)
        meta = checkpoints.meta(checkpoints.find(config.run.init_checkpoint))
        checkpoints.close()
        return validate(meta["config"], source).model, meta["tokenizer"]
    try:
        opened = huggingface.open_folder(huggingface.locate(source))
        return opened.model, opened.tokenizer
    except ValueError as error:
        raise Mistake(
            f"{source} is not the folder of a run: it has no {FOLDER}/; nor can it be read as "
            f"a model of Hugging Face: {error}"
        ) from None


def shaped_as(model: ModelConfig, config: Config) -> Config:
    """Return a run whose model has the shape of `model` in all keys that the run does not give.

    The number of ids is the data's. Muon's rate for embeddings follows, where it is not given.
    """
    keys = ModelConfig.model_fields.keys() - OF_THE_RUN - {"vocab_size"}
    keys -= config.model.model_fields_set
    same = config.model.model_copy(update={key: getattr(model, key) for key in keys})
    if same.window is None:  # given, so that a pattern of the weights has nothing to say
        same = same.model_copy(update={"window_pattern": "S"})
    optim = config.optim
    by_depth = config.model.depth is not None
    if optim.name == "muon" and not by_depth and "embedding_lr" not in optim.model_fields_set:
        rate = muons(same.model_dump())["embedding_lr"]
        optim = optim.model_copy(update={"embedding_lr": rate})
    return config.model_copy(update={"model": same, "optim": optim})


def check(config: Config, tokenizer_spec: Any) -> None:
    """Raise Mistake unless run.init_from holds a model of this shape, for the same tokens.

    The model may have other keys `OF_LENGTH`, though not fewer learned positions than this run, and
    in Hugging Face's format other padding. It may lack the marks of a chat, which this run adds.
    The message names the keys to set.
    """
    source = config.run.init_from
    own = OF_THE_RUN | OF_LENGTH | (set() if is_run(source) else {"vocab_multiple"})
    shaping = [key for key in ModelConfig.model_fields if key not in own]
    model, spec = source_model(config)
    # First, as the shapes of a model for another tokenizer would be of no use.
    both_known = spec is not None and tokenizer_spec is not None
    grows = both_known and tokenizer.is_chat_of(tokenizer_spec, spec)
    if (
        both_known
        and not grows
        and not tokenizer.same(spec, tokenizer_spec)
        and not config.run.allows("data.path")
    ):
        raise Mistake(
            f"run.init_from={source} was trained on tokens of {tokenizer.kind(spec)}, the data has "
            f"those of another tokenizer, {tokenizer.kind(tokenizer_spec)}; prepare it again "
            f"with --tokenizer {source}, or start all the same with "
            "--run.allow_config_change=data.path"
        )
    if config.lora.rank > model.n_embd:
        raise Mistake(
            f"lora.rank={config.lora.rank} is more than model.n_embd={model.n_embd}, the largest "
            f"rank of a matrix of {source}; 16 is usual"
        )
    if model.block_size < config.model.block_size and config.model.position == "learned":
        shaping += ["block_size"]
    if grows and model.vocab_size < config.model.vocab_size:
        shaping.remove("vocab_size")
    means, wants = _meaning(model, config), _meaning(config.model, config)
    if differ := [key for key in shaping if means.get(key) != wants.get(key)]:
        stored, wanted = model.model_dump(), config.model.model_dump()
        changes = "; ".join(f"model.{key}: {stored[key]} -> {wanted[key]}" for key in differ)
        keys = " ".join(f"--model.{key}={_shown(stored[key])}" for key in differ)
        raise Mistake(
            f"run.init_from={source} holds another model: {changes}\nto start from it set {keys}"
        )


def _meaning(model: ModelConfig, config: Config) -> dict[str, Any]:
    """Return the keys of a run's model that something reads, and for null what it stands for."""
    config = config.model_copy(update={"model": model})
    values = model.model_dump() | {
        "n_kv_head": model.kv_heads,
        "head_size": model.head_dim,
        "n_inner": model.inner,
        "attention_scale": model.attention_scale or model.head_dim**-0.5,
    }
    if model.norm == "rmsnorm" and model.norm_eps is None:
        values["norm_eps"] = RMS_NORM_EPS
    return {key: value for key, value in values.items() if f"model.{key}" not in unread(config)}


def _shown(value: Any) -> str:
    """Return a value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)

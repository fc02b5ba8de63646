"""A new run may start from trained weights, which run.init_from names."""

from typing import Any

import jax

from scalegpt.checkpoints.checkpoints import PARAMS, Checkpoints, open_checkpoints
from scalegpt.config import Config
from scalegpt.config.differences import NOT_SHAPING
from scalegpt.config.loading import validate
from scalegpt.data import tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.run_folder import FOLDER, is_run
from scalegpt.weights import huggingface


def weights(config: Config, abstract: Any) -> tuple[Any, str]:
    """Load the weights that run.init_from names; return them and where they came from.

    abstract: the parameters of this run, with their shapes and shardings. Raises Mistake where the
    weights cannot be read.
    """
    name = config.run.init_from
    if not is_run(name):
        return huggingface.load_params(huggingface.locate(name), config.model, abstract), name
    source = open_checkpoints(name)
    step = source.find(config.run.init_checkpoint, PARAMS)
    params = _restore_cropped(source, step, config, abstract)
    source.close()
    return params, f"{name}, step {step}"


def _restore_cropped(source: Checkpoints, step: int, config: Config, abstract: Any) -> Any:
    """Restore a run's weights, of which this run may use fewer learned positions."""
    stored = validate(source.meta(step)["config"], f"step {step} of {source.folder}").model
    if config.model.position != "learned" or stored.block_size == config.model.block_size:
        return source.restore_params(step, abstract)
    wpe = abstract["wpe"]
    stored_wpe = jax.ShapeDtypeStruct(
        (stored.block_size, wpe.shape[1]), wpe.dtype, sharding=wpe.sharding
    )
    params = source.restore_params(step, {**abstract, "wpe": stored_wpe})
    crop = jax.jit(lambda x: x[: config.model.block_size], out_shardings=wpe.sharding)
    return {**params, "wpe": crop(params["wpe"])}


def check(config: Config, tokenizer_spec: Any) -> None:
    """Raise Mistake unless run.init_from holds a model of this shape, for the same tokens.

    The model may have more positions than this run and, in Hugging Face's format, other padding.
    The message names the keys to set.
    """
    source = config.run.init_from
    shaping = [key for key in type(config.model).model_fields if key not in NOT_SHAPING]
    if is_run(source):
        checkpoints = open_checkpoints(source)
        meta = checkpoints.meta(checkpoints.find(config.run.init_checkpoint))
        checkpoints.close()
        source_model, spec = validate(meta["config"], source).model, meta["tokenizer"]
        shaping += ["vocab_multiple"]
    else:
        try:
            source_model, spec = huggingface.describe(huggingface.locate(source))
        except ValueError as error:
            raise Mistake(
                f"{source} is not the folder of a run: it has no {FOLDER}/; nor can it be read as "
                f"a model of Hugging Face: {error}"
            ) from None
    # First, as the shapes of a model for another tokenizer would be of no use.
    both_known = spec is not None and tokenizer_spec is not None
    if (
        both_known
        and not tokenizer.same(spec, tokenizer_spec)
        and not config.run.allows("data.path")
    ):
        raise Mistake(
            f"run.init_from={source} was trained on tokens of {tokenizer.kind(spec)}, the data has "
            f"those of another tokenizer, {tokenizer.kind(tokenizer_spec)}; prepare it again "
            f"with --tokenizer {source}, or start all the same with "
            "--run.allow_config_change=data.path"
        )
    if source_model.block_size < config.model.block_size:
        shaping += ["block_size"]
    stored, wanted = source_model.model_dump(), config.model.model_dump()
    if differ := [key for key in shaping if stored[key] != wanted[key]]:
        changes = "; ".join(f"model.{key}: {stored[key]} -> {wanted[key]}" for key in differ)
        keys = " ".join(f"--model.{key}={_shown(stored[key])}" for key in differ)
        raise Mistake(
            f"run.init_from={source} holds another model: {changes}\nto start from it set {keys}"
        )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

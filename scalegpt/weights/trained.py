"""A trained model, of a run or of Hugging Face's format, ready for use on any mesh."""

import argparse
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from scalegpt.checkpoints.checkpoints import PARAMS, open_checkpoints
from scalegpt.config import Config, DistributedConfig, MeshConfig, types
from scalegpt.config.loading import validate
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.run_folder import is_run
from scalegpt.step.build import Steps, build_for_use
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import huggingface

_SECTIONS = {"mesh": MeshConfig, "distributed": DistributedConfig}


@dataclass(frozen=True)
class Trained:
    """Weights, and what is needed to use them.

    name: for messages. tokenizer: a spec for `tokenizer.load`, or None when the source has none.
    step: the update at which a run had these weights, None for a model of Hugging Face's format.
    """

    name: str
    config: Config
    tokenizer: dict | str | None
    step: int | None
    steps: Steps
    params: Any

    def codec(self) -> Tokenizer:
        """Its tokenizer. Raises ValueError when it came without one."""
        if self.tokenizer is None:
            raise Mistake(
                f"{self.name} came without a tokenizer, so it knows no text; if it is of Hugging "
                "Face's format, put its tokenizer.json into the folder (and import it again)"
            )
        return tokenizer.load(self.tokenizer).within(self.config.model.vocab_size)


def add_flags(parser: argparse.ArgumentParser) -> Any:
    """Which model, in which precision, on which mesh; `load` reads them.

    Returns the group of sources, of which one is required, for a command that has more of them.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="out_dir of a training run")
    source.add_argument(
        "--hf",
        metavar="NAME",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, another repository "
        "of Hugging Face, or a folder with config.json and model.safetensors",
    )
    parser.add_argument("--checkpoint", help="of the run: best (default), latest or a step")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of matrix products (default: the run's; auto: float32 on a CPU, else bfloat16)",
    )
    for section, keys in _SECTIONS.items():
        for key, field in keys.model_fields.items():
            parser.add_argument(f"--{section}.{key}", metavar="N", help=field.description)
    return source


def check_checkpoint(which: str | None) -> None:
    """Raises ValueError for what --checkpoint cannot be."""
    if which is not None:
        try:
            types.checkpoint(which)
        except ValueError as error:
            raise Mistake(f"--checkpoint={which[:40]} {error}") from None


def machine(flags: argparse.Namespace, config: Config | None = None) -> Config:
    """Return the mesh and the processes that the flags, else `config`, ask for; touches no device.

    Raises ValueError for them, and for what --checkpoint cannot be.
    """
    check_checkpoint(flags.checkpoint)
    stated = config.model_dump(include={"mesh", "distributed"}) if config else {}
    sections = {
        name: {
            **stated.get(name, {}),
            **{k: v for k in keys.model_fields if (v := getattr(flags, f"{name}.{k}")) is not None},
        }
        for name, keys in _SECTIONS.items()
    }
    rest = {"data": {"path": ""}, "run": {"out_dir": "none"}}
    return validate({**sections, **rest}, "this command line")


def load(flags: argparse.Namespace, microbatch: int, config: Config | None = None) -> Trained:
    """Load the model that the flags name; the processes have been started. Raises ValueError.

    microbatch: sequences that each device works on at a time. config: a run's, whose run.init_from
    is loaded where no flag names a model; its mesh and dtype hold where no flag gives another.
    """
    which, dtype, run, name = flags.checkpoint, flags.dtype, flags.run, flags.hf
    if config and not (run or name):
        source = config.run.init_from
        run, name = (source, None) if is_run(source) else (None, source)
        dtype = dtype or config.model.dtype
        which = which or (config.run.init_checkpoint if run else None)
    if name and which:
        raise Mistake(f"--checkpoint={which} is of a run, and {name} is none")
    mesh = make_mesh(machine(flags, config).mesh)
    if name:
        return from_hugging_face(name, mesh, microbatch, dtype)
    return from_run(run, which or "best", mesh, microbatch, dtype)


def from_run(
    out_dir: str, which: str, mesh: Mesh, microbatch: int, dtype: str | None = None
) -> Trained:
    """which: best, latest or a step."""
    checkpoints = open_checkpoints(out_dir)
    for attempt in range(5):
        step = None
        try:
            step = checkpoints.find(which, PARAMS)
            meta = checkpoints.meta(step)
            config = validate(meta["config"], f"step {step} of {out_dir}")
            config = _with_dtype(config, dtype)
            steps = build_for_use(config, mesh, microbatch)
            params = checkpoints.restore_params(step, steps.abstract.params)
        except (ValueError, OSError):
            # A run that goes on may have saved anew meanwhile, and removed what was just found.
            if which.isdigit() or attempt == 4 or step in checkpoints.steps:
                raise
        else:
            return Trained(out_dir, config, meta["tokenizer"], step, steps, params)
    raise AssertionError("unreachable")


def from_hugging_face(
    source: str, mesh: Mesh, microbatch: int, dtype: str | None = None
) -> Trained:
    """source: as `hf.locate` takes it."""
    folder = huggingface.locate(source)
    model, tokenizer = huggingface.describe(folder)
    config = _with_dtype(config_of(model), dtype)
    steps = build_for_use(config, mesh, microbatch)
    params = huggingface.load_params(folder, config.model, steps.abstract.params)
    return Trained(source, config, tokenizer, None, steps, params)


def config_of(model: ModelConfig) -> Config:
    """A run around a model that came without one: it has no data and no folder."""
    return Config.model_validate({"model": model, "data": {"path": ""}, "run": {"out_dir": "none"}})


def _with_dtype(config: Config, dtype: str | None) -> Config:
    if dtype is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})

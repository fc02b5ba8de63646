"""A trained model is loaded from a run or from Hugging Face's format, for use on any mesh."""

import argparse
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from scalegpt.checkpoints.checkpoints import PARAMS, open_checkpoints
from scalegpt.config import Config, DistributedConfig, MeshConfig, types
from scalegpt.config.loading import NO_RUN, validate, validate_sections
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files import run_folder
from scalegpt.files.json_files import complete_rows
from scalegpt.files.run_folder import is_run
from scalegpt.processes import startup
from scalegpt.processes.group import Alone, Group
from scalegpt.step.build import Steps, build_for_use
from scalegpt.step.sharding import all_devices, make_mesh
from scalegpt.weights import adapters, huggingface

_PLACES = ("run", "config", "data", "text", "file", "prompt_file", "include_path")
_SECTIONS = {"mesh": MeshConfig, "distributed": DistributedConfig}


@dataclass(frozen=True)
class Trained:
    """A trained model is its weights and what is needed to use them.

    name: for messages. tokenizer: a spec for `tokenizer.load`, or None when the source has none.
    step: the update at which a run had these weights; None if they are from Hugging Face's format.
    """

    name: str
    config: Config
    tokenizer: dict | str | None
    step: int | None
    steps: Steps
    params: Any

    def codec(self) -> Tokenizer:
        """Return the model's tokenizer. Raises Mistake when the model came without one."""
        if self.tokenizer is None:
            raise Mistake(
                f"{self.name} came without a tokenizer, so it knows no text; if it is of Hugging "
                "Face's format, put its tokenizer.json into the folder; if imported, import it "
                "again with --data, the data set it was trained on"
            )
        return tokenizer.load(self.tokenizer).within(self.config.model.vocab_size)


def add_flags(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that `load` reads: which model, in which precision, on which mesh.

    Returns the argparse group of sources, one of which is required; a command may add others.
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
        help="of matrix products (default: the run's; auto: bfloat16 where the device has it)",
    )
    for section, keys in _SECTIONS.items():
        for key, field in keys.model_fields.items():
            parser.add_argument(f"--{section}.{key}", metavar="N", help=field.description)
    return source


def check_checkpoint(which: str | None) -> None:
    """Raise Mistake unless --checkpoint is best, latest or a step."""
    if which is not None:
        try:
            types.checkpoint(which)
        except ValueError as error:
            raise Mistake(f"--checkpoint={which[:40]} {error}") from None


def machine(flags: argparse.Namespace, config: Config | None = None) -> Config:
    """Return the mesh and the processes that the flags, else `config`, ask for.

    No device is touched. Raises Mistake for them, and for a wrong --checkpoint.
    """
    check_checkpoint(flags.checkpoint)
    defaults = config.model_dump(include={"mesh", "distributed"}) if config else {}
    sections = {
        name: {
            **defaults.get(name, {}),
            **{k: v for k in keys.model_fields if (v := getattr(flags, f"{name}.{k}")) is not None},
        }
        for name, keys in _SECTIONS.items()
    }
    return validate_sections(sections, "this command line")


def self_check(flags: argparse.Namespace, group: Group | Alone) -> None:
    """Check that all processes have the same flags, surroundings and devices.

    Processes that differ would compile different programs, and wait for each other for ever. Files
    may lie in different folders. Raises Mistake, in all processes, also where a single process
    finds no device.
    """
    if group.count > 1:
        given = {k: v for k, v in vars(flags).items() if k not in _PLACES}
        settings = {f"--{k}": str(v) for k, v in given.items() if not k.startswith("distributed.")}
        startup.same_everywhere({**startup.surroundings(), **settings})
    all_devices()  # before anything else asks JAX for them, for the sake of its message
    if group.count > 1:
        startup.self_check()


def load(flags: argparse.Namespace, microbatch: int, config: Config | None = None) -> Trained:
    """Load the model that the flags name, or else that of `config`'s run.init_from.

    The processes of the run must have been started. microbatch: sequences that each device works on
    at a time. The mesh and dtype of `config` hold where no flag gives another. Raises Mistake where
    the model cannot be read.
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
    return from_run(run, which, mesh, microbatch, dtype)


def from_run(
    out_dir: str, which: str | None, mesh: Mesh, microbatch: int, dtype: str | None = None
) -> Trained:
    """Load the model of a run from checkpoint `which`: best, latest, a step, or None for the best
    that there is, as `Checkpoints.find` says."""
    checkpoints = open_checkpoints(out_dir)
    for attempt in range(5):
        step = None
        try:
            step = checkpoints.find(which, PARAMS)
            meta = checkpoints.meta(step)
            config = validate(meta["config"], f"step {step} of {out_dir}")
            config = _with_dtype(config, dtype)
            steps = build_for_use(config, mesh, microbatch)
            params = adapters.restore(checkpoints, step, config, steps.abstract.params)
        except (ValueError, OSError):
            # A run that goes on may have removed this checkpoint after saving a newer one.
            if (which or "").isdigit() or attempt == 4 or step in checkpoints.steps:
                raise
        else:
            return Trained(out_dir, config, meta["tokenizer"], step, steps, params)
    raise AssertionError("unreachable")


def from_hugging_face(name: str, mesh: Mesh, microbatch: int, dtype: str | None = None) -> Trained:
    """Load the model of a folder or of a Hugging Face repository, as `locate` finds it."""
    opened = huggingface.open_folder(huggingface.locate(name))
    config = _with_dtype(config_of(opened.model), dtype)
    steps = build_for_use(config, mesh, microbatch)
    params = opened.load_params(config.model, steps.abstract.params)
    return Trained(name, config, opened.tokenizer, None, steps, params)


def config_of(model: ModelConfig) -> Config:
    """Return a Config for a model that belongs to no run: it names no data and no folder."""
    return Config.model_validate({"model": model, **NO_RUN})


def evaluation(model: Trained) -> dict[str, Any]:
    """Return the row of metrics.jsonl of the last evaluation at the model's step, {} for none."""
    path = run_folder.local(model.name) / "metrics.jsonl"
    # Complete rows only: a run that goes on may have written half of the last one.
    rows = complete_rows(path.read_text(errors="replace").splitlines()) if path.is_file() else []
    evaluations = [row for row in rows if row["step"] == model.step and "val/loss" in row]
    return evaluations[-1] if evaluations else {}


def _with_dtype(config: Config, dtype: str | None) -> Config:
    if dtype is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})

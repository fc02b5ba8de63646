"""This tool converts weights of others to ours, and ours to Hugging Face's; it compares models.

python tools/convert_hf.py import gpt2 --out out/gpt2
python tools/convert_hf.py import ../nanoGPT/out-shakespeare-char/ckpt.pt --out out/char
python tools/convert_hf.py export --run out/NAME --out NAME [--push OWNER/NAME]
python tools/convert_hf.py check out/gpt2 gpt2

Exit codes: 0 done; 1 `check` found a difference; 2 the user's mistake.
"""

import argparse
import math
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.config import MeshConfig, command_line, loading
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.data.token_files import open_split
from scalegpt.errors import Mistake
from scalegpt.files.folder import local_path
from scalegpt.files.run_folder import is_run
from scalegpt.model.flops import parameter_count
from scalegpt.model.gpt import GPT, Block, Context, head_table, logits
from scalegpt.model.layers import rms_norm, rotary_tables
from scalegpt.processes.command import python, run_command
from scalegpt.run.card import write_card
from scalegpt.step import sharding
from scalegpt.step.build import build_for_use
from scalegpt.weights import export, hub, huggingface, predecessors, trained


def main(argv: list[str]) -> int:
    flags = parser().parse_args(argv)
    if flags.function is check and not 0 <= flags.tolerance < math.inf:
        raise Mistake(f"--tolerance={flags.tolerance} must be at least 0, and finite")
    if flags.function is export_:
        trained.check_checkpoint(flags.checkpoint)
    # Converting needs no accelerator, and a TPU would be taken from whatever trains on it.
    jax.config.update("jax_platforms", "cpu")
    return flags.function(flags)


def parser() -> command_line.Parser:
    whole = command_line.Parser(
        prog="convert_hf.py", description=(__doc__ or "").partition("\n")[0]
    )
    commands = whole.add_subparsers(required=True)

    def command(name: str, function: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    sub = command("import", import_, "make a run folder from trained weights")
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, another repository, or a folder with "
        f"config.json and weights, of model_type {', '.join(huggingface.FORMATS)}; or a checkpoint "
        "of nanoGPT (ckpt.pt), nanogpt-jax or gpt-jax (checkpoint_...)",
    )
    sub.add_argument(
        "--out", required=True, type=local_path, help="run folder to make, such as out/gpt2"
    )
    sub.add_argument(
        "--block-size", type=int, help="positions, of which learned ones can only be cropped"
    )
    sub.add_argument("--n-head", type=int, help="heads, which nanogpt-jax and gpt-jax do not store")
    sub.add_argument(
        "--activation",
        choices=("gelu", "gelu_tanh"),
        help="gelu_tanh: of a nanoGPT from before 2023-05-17 (its checkpoints do not say)",
    )
    sub.add_argument("--data", help="take the tokenizer of this data set")
    sub.add_argument("--dropout", type=float, default=0.0, help="for training (default: 0)")
    sub.add_argument("--vocab-multiple", type=int, help="pad the vocabulary to a multiple of this")

    sub = command("export", export_, "make a folder for transformers from a run")
    sub.add_argument("--run", required=True, help="out_dir of a run")
    sub.add_argument("--checkpoint", help="best (default), latest or a step")
    sub.add_argument("--out", required=True, type=local_path, help="folder to make")
    sub.add_argument(
        "--format",
        choices=("hf", "scalegpt"),
        default="hf",
        help="hf: the first of GPT-2's, Llama's, Mistral's, Qwen2's, Qwen3's and NanoChat's that "
        "says what the model is, for transformers; scalegpt: any model",
    )
    sub.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to this repository of Hugging Face, private if it is new; one that "
        "has files is refused",
    )

    sub = command("check", check, "compare the logits of two models, in float32")
    for name in ("A", "B"):
        sub.add_argument(name.lower(), metavar=name, help="run folder, Hugging Face folder or name")
    text = sub.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="on this text")
    text.add_argument(
        "--data",
        help="on the start of this .bin, or of a data set's val.bin (default: on random tokens)",
    )
    sub.add_argument("--tolerance", type=float, default=2e-4, help="of a logit (default: 2e-4)")
    return whole


def import_(flags: argparse.Namespace) -> int:
    """Make a run's folder with weights of others, which can be used but not continued."""
    began, out = time.perf_counter(), flags.out
    refuse_existing(out)
    if path := predecessors.find(flags.source):
        source = predecessors.read(path, flags.n_head, flags.block_size)
    elif flags.n_head or flags.activation:
        raise Mistake(
            "--n-head and --activation are for checkpoints of nanoGPT, nanogpt-jax and gpt-jax; "
            f"{flags.source} is none"
        )
    else:
        source = huggingface.open_folder(huggingface.locate(flags.source))
    model, spec = source.model, source.tokenizer
    if flags.data:
        spec = tokenizer_of(flags.data, model)
    keys = ("block_size", "vocab_multiple", "dropout", "activation")
    changes = {key: value for key in keys if (value := getattr(flags, key)) is not None}
    values = model.model_dump() | changes
    config = loading.validate(
        {"model": values, "data": {"path": ""}, "run": {"out_dir": str(out)}}, "this command line"
    )
    kind = tokenizer.kind(spec) if spec else "none"
    if "tokenizer.json" in kind and find_spec("tokenizers"):
        tokenizer.load(spec)  # raises Mistake for a damaged one
    print(f"reading {source.path}: {describe(config.model)}, tokenizer: {kind}", flush=True)
    steps = build_for_use(config, one_device(), 1)
    params = source.load_params(config.model, steps.abstract.params)
    meta = {"config": config.model_dump(), "tokenizer": spec, "data": {}, "best_loss": math.inf}
    with new_folder(out) as scratch:
        checkpoints = Checkpoints(scratch)
        checkpoints.save_weights(params, meta)
        checkpoints.close()
        (scratch / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    name, run = shlex.quote(str(out)), f"{python()} -m scalegpt"
    print(f"{wrote(out, config.model, began)}\nnext:")
    if spec:
        command = "chat" if tokenizer.is_chat(spec) else "generate"
        print(f'  {run}.{command} --run {name} --prompt "..."')
    print(f"  {run}.evaluate --run {name} --data DIR")
    print(f"  {run}.train --config FILE --run.init_from={name} --run.out_dir=out/NEW")
    return 0


def export_(flags: argparse.Namespace) -> int:
    """Make a folder for transformers, or for --hf, with the weights of a run."""
    began, out = time.perf_counter(), flags.out
    refuse_existing(out)
    if flags.push:
        hub.check(flags.push)  # before the work, which may take minutes
    loaded = trained.from_run(flags.run, flags.checkpoint, one_device(), 1)
    print(f"read {flags.run}, step {loaded.step}: {describe(loaded.config.model)}", flush=True)
    write = export.export_hf if flags.format == "hf" else export.export_own
    with new_folder(out) as scratch:
        write_card(scratch, loaded, write(loaded, scratch), flags.push)
    name = shlex.quote(str(out))
    print(wrote(out, loaded.config.model, began), flush=True)
    if flags.push:
        print(f"uploading to {flags.push} ...", flush=True)
        print(f"uploaded to {hub.push(out, flags.push)}")
    print("next:")
    print(f"  {python()} tools/convert_hf.py check {shlex.quote(flags.run)} {name}")
    if spec := huggingface.describe(out)[1]:  # formats of transformers have no ids without a text
        if "tokenizer.json" in tokenizer.kind(spec) and not find_spec("tokenizers"):
            print("  pip install 'scalegpt[data]'  # for the next command, which needs tokenizers")
        command = "chat" if tokenizer.is_chat(spec) else "generate"
        print(f'  {python()} -m scalegpt.{command} --hf {name} --prompt "..."')
    if flags.format == "hf":
        print(f'  transformers: AutoModelForCausalLM.from_pretrained("{flags.push or out}")')
    print(f"  use, upload and the licence, which is yours to choose: {name}/README.md")
    return 0


def check(flags: argparse.Namespace) -> int:
    """Compare the logits of two models; the exit code is 1 if any differs beyond the tolerance."""
    sources = flags.a, flags.b
    (model_a, spec_a), (model_b, spec_b) = map(look_up, sources)
    if (a := model_a.vocab_size) != (b := model_b.vocab_size):
        raise Mistake(f"{flags.a} has {a} tokens, {flags.b} {b}: there is nothing to compare")
    length = min(model_a.block_size, model_b.block_size)
    tokens = tokens_for(flags, spec_a or spec_b, length, model_a.vocab_size)
    scores = [outputs(source, tokens[None])[-1][0] for source in sources]
    difference = np.abs(scores[0] - scores[1])
    where = np.unravel_index(difference.argmax(), difference.shape)  # argmax finds a NaN
    print(
        f"largest logit difference {difference[where]:.3e} over {len(tokens)} positions, tolerance "
        f"{flags.tolerance:.0e}\n  at position {where[0]}, token {where[1]}: "
        f"{flags.a} {scores[0][where]:.6f}, {flags.b} {scores[1][where]:.6f}"
    )
    if difference[where] <= flags.tolerance:
        print("the same")
        return 0
    print(f"different: {first_difference(sources, tokens)}")
    return 1


def first_difference(sources: tuple[str, str], tokens: np.ndarray) -> str:
    """Name the first layer whose results differ by more than rounding."""
    states = [outputs(source, tokens[None], by_layer=True) for source in sources]
    if len(states[0]) != len(states[1]) or states[0][0].shape != states[1][0].shape:
        return "the models have other numbers of layers or other widths"
    names = [
        "in the embedding",
        *(f"in layer {i}" for i in range(len(states[0]) - 3)),
        "in the last norm",
        "in the head",
    ]
    for name, a, b in zip(names, *states, strict=True):
        # More than rounding does to numbers of this size; a NaN, too.
        if not np.abs(a - b).max() <= 1e-4 * np.abs(a).max():
            return f"they first differ {name} (counted from 0), by {np.abs(a - b).max():.3e}"
    return "no layer differs by more than 1e-4 of its largest value: it is rounding"


def outputs(source: str, tokens: np.ndarray, by_layer: bool = False) -> list[np.ndarray]:
    """Return a list of the logits [B, T, V] for tokens [B, T].

    by_layer: before them, the embedding and the output of each layer and of ln_f, all [B, T, D].
    """
    load = trained.from_run if is_run(source) else trained.from_hugging_face
    which = ("best",) if is_run(source) else ()
    loaded = load(source, *which, one_device(), 1, "float32")
    params, config = loaded.params, loaded.config.model.model_copy(update={"scan_layers": True})
    model = loaded.steps.model.clone(config=config)  # a loop compiles sooner than 48 layers
    states = _states(model, params, tokens) if by_layer else []
    hidden, scores = _forward(model, params, tokens)
    states += [hidden] * by_layer
    return [*map(np.asarray, states), np.asarray(scores)[..., : config.vocab_size]]


# The model is a static argument, so that two models of one shape are compiled once.
@partial(jax.jit, static_argnums=0)
def _forward(model: GPT, params: Any, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
    hidden = model.apply({"params": params}, tokens)
    return hidden, logits(hidden, head_table(params), model.config)


@partial(jax.jit, static_argnums=0)
def _states(model: GPT, params: Any, tokens: np.ndarray) -> list[jax.Array]:
    c, length = model.config, tokens.shape[1]
    x = params["wte"][tokens] + params.get("wpe", jnp.zeros((1, 1)))[:length]
    rotary = None
    if c.position == "rope":
        rotary = rotary_tables(length, c.head_dim, c.rope_base, c.rope_scaling)
    x = rms_norm(x, eps=c.norm_eps) if c.embedding_norm else x
    context, block = Context(x, tokens, rotary), Block(c, model.dtype, "xla")

    def layer(x: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array]:
        number, params = layer
        y = block.apply({"params": params}, x, number, None, context)[0]
        return y, y

    after = jax.lax.scan(layer, x, (jnp.arange(c.n_layer), params["h"]))[1]
    return [x, *(after[i] for i in range(c.n_layer))]


def tokens_for(flags: argparse.Namespace, spec: Any, length: int, vocab: int) -> np.ndarray:
    """Return ids [T], T at most `length`: of the prompt, of the data, or random ones."""
    if flags.prompt is not None:
        if spec is None:
            raise Mistake("neither model has a tokenizer for --prompt; use --data, or neither")
        ids = tokenizer.load(spec).encode_prompt(flags.prompt)
    elif flags.data:
        ids = np.asarray(open_split(flags.data, "val").tokens[:length], np.int32)
        ids = np.where(ids < 0, ~ids, ids)  # of conversations, what is not predicted
    else:
        ids = np.random.default_rng(0).integers(0, vocab, length, np.int32)
    if not len(ids):
        raise Mistake("there is no token to compare on")
    if ids.max() >= vocab:
        raise Mistake(f"token id {ids.max()} is outside the models' vocabulary of {vocab}")
    return ids[:length]


def tokenizer_of(data: str, model: ModelConfig) -> Any:
    """Return the tokenizer spec of a data set, whose ids the model must have."""
    split = open_split(data, "val")
    if split.vocab_size > model.vocab_size:
        raise Mistake(
            f"--data={data} has {split.vocab_size} ids, and the model only {model.vocab_size}: it "
            "was trained on another data set"
        )
    return split.tokenizer


def one_device() -> Mesh:
    """Return a mesh of one device; each other, though simulated, would hold a copy of the model."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def look_up(source: str) -> tuple[ModelConfig, Any]:
    """Return the model and the tokenizer spec of a run or folder, without reading weights."""
    if not is_run(source):
        return huggingface.describe(huggingface.locate(source))
    checkpoints = open_checkpoints(source)
    meta = checkpoints.meta(checkpoints.find(None))
    checkpoints.close()
    return loading.validate(meta["config"], source).model, meta["tokenizer"]


def describe(model: ModelConfig) -> str:
    return (
        f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
        f"{model.block_size} positions, {model.vocab_size} tokens"
    )


def wrote(folder: Path, model: ModelConfig, began: float) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return (
        f"wrote {folder}: {parameter_count(model):,} parameters, {size / 1e6:,.1f} MB "
        f"in {time.perf_counter() - began:.1f} s"
    )


def refuse_existing(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise Mistake(f"{path} is there already and is not overwritten; choose another --out")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `path` when it is whole, and is removed on an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise Mistake(f"cannot write to --out={path}: {error}") from None
    with scratch as parent:
        folder = Path(parent, path.name)
        folder.mkdir()
        yield folder
        try:
            folder.replace(path)
        except OSError:
            refuse_existing(path)  # another process has made it in the meantime
            raise


if __name__ == "__main__":
    run_command(main, essential=False)

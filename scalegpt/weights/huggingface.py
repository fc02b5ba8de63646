"""Models are read from folders in the formats of Hugging Face, and in our own that `export` writes.

A folder holds config.json and model.safetensors, or shards with an index, or pytorch_model.bin. A
leaf [L, ...] of our parameters is the L layers' tensors, each put where its `Place` says.
"""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from scalegpt.config.loading import validate_sections
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.folder import expanded
from scalegpt.files.json_files import read_object
from scalegpt.files.run_folder import is_run
from scalegpt.model.parameters import parameters
from scalegpt.weights import gpt2
from scalegpt.weights.places import Place
from scalegpt.weights.tensor_files import INDEX, SAFE, TORCH, Read, Shapes, open_tensors
from scalegpt.weights.tokenizer_files import read_file

HUB_SECONDS = 15  # without an answer from Hugging Face, there is no network
OWN_TYPE = "scalegpt"  # model_type of our own format, which names tensors by their path in params
# By model_type; an export takes the first that can say what the model is.
FORMATS = {"gpt2": gpt2.FORMAT}
# Causal masks that old versions of transformers saved beside the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_OTHERS = (
    "; python tools/convert_hf.py import reads checkpoints of nanoGPT, nanogpt-jax and gpt-jax"
)
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


def locate(source: str) -> Path:
    """Return a folder as it is, or download a Hugging Face repository to the Hub's cache.

    Raises Mistake, which says what to place where, when `source` is neither or cannot be had.
    """
    folder = expanded(source)
    if source and folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) or folder.exists():
        raise Mistake(
            f"{source} is not a folder with config.json and model.safetensors, nor the name of a "
            f"repository of Hugging Face, as gpt2 or OWNER/NAME{_OTHERS}"
        )
    print(f"{source} is no folder here; looking for it on Hugging Face ...", file=sys.stderr)
    return _download(source)


def _download(source: str) -> Path:
    import huggingface_hub

    unreachable, cache_only = None, {}
    try:  # snapshot_download would wait for ever for a server that accepts and never answers
        huggingface_hub.HfApi().model_info(source, timeout=HUB_SECONDS)
    except Exception as error:
        unreachable, cache_only = error, {"local_files_only": True}

    def get(*patterns: str) -> Path:
        patterns = list(patterns)
        download = huggingface_hub.snapshot_download
        return Path(download(source, allow_patterns=patterns, **cache_only))

    try:
        folder = get("config.json", SAFE, INDEX, "model-*.safetensors", *_TOKENIZER)
        return folder if any(folder.glob("*.safetensors")) else get("config.json", TORCH)
    # Not found, gated, no network and no space raise exceptions of several packages.
    except Exception as error:
        error = unreachable or error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Mistake(
            f"{source} is not a folder, and cannot be had from Hugging Face: {reason}\n"
            "without a network, put config.json and model.safetensors (and tokenizer.json) into a "
            "folder and give that, or set HF_HOME to a cache filled on a machine with one"
        ) from None


def describe(folder: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Return the model in a folder, with dropout 0, and its tokenizer's spec if it has one.

    A vocabulary of 50257 without tokenizer files is taken for GPT-2's. Raises Mistake with the
    reason for a model that ours cannot express.
    """
    path = folder / "config.json"
    hint = "" if path.exists() else _OTHERS
    if is_run(folder):
        hint = f"; {folder} is the folder of a run, no model of Hugging Face"
    values = read_object(path, hint)
    if values.get("model_type") == OWN_TYPE:
        if (spec := values.get("tokenizer")) is not None:
            tokenizer.check(spec)
        return model_of(values.get("model", {}), path), spec
    if (kind := values.get("model_type")) not in FORMATS:
        known = " or ".join(FORMATS)
        raise Mistake(f"{path}: model_type is {kind!r}, not {known}")
    model = model_of(FORMATS[kind].describe(values, path), path)
    return model, _tokenizer(folder, model.vocab_size)


def model_of(values: dict[str, Any], path: Path) -> ModelConfig:
    """Return the model with these keys, which come from the file `path`. Raises Mistake."""
    model = validate_sections({"model": values}, str(path)).model
    if model.vocab_size is None:
        raise Mistake(f"{path} does not give vocab_size")
    return model


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    known = {"kind": "gpt2"}
    if (path := folder / "tokenizer.json").is_file():
        spec = read_file(path)
        return known if tokenizer.same(spec, known) else spec
    if (path := folder / "vocab.json").is_file():
        same = tokenizer.same({"json": {"model": {"vocab": read_object(path)}}}, known)
        return known if same else None
    return known if vocab_size == 50257 else None


def own_places(model: ModelConfig) -> dict[str, Place]:
    """Return the place of every tensor of our own format, where `model` is the file's."""
    return {path: Place(path, None, x.shape) for path, x in parameters(model).items()}


def load_params(folder: Path, model: ModelConfig, abstract_params: Any) -> Any:
    """Load the parameters in a folder, float32, in the shapes and shardings of `abstract_params`.

    model: as `describe` returns it, or with a smaller block_size (positions are cropped) or another
    vocab_multiple (rows of padding are zero). The host holds one leaf at a time. Raises Mistake
    with every tensor that is missing, unexpected or misshapen.
    """
    source = describe(folder)[0]
    kind = read_object(folder / "config.json")["model_type"]
    places = own_places(source) if kind == OWN_TYPE else FORMATS[kind].places(source)
    return fill(folder, source, places, open_tensors(folder), model, abstract_params)


def fill(
    folder: Path,
    source: ModelConfig,
    places: dict[str, Place],
    named: tuple[Shapes, Read],
    model: ModelConfig,
    abstract_params: Any,
) -> Any:
    """Load parameters from the named tensors of `folder`, as `load_params` does.

    source: the model of these tensors. places: where each of them goes.
    """
    if model.block_size > source.block_size:
        raise Mistake(
            f"model.block_size={model.block_size} is more than the {source.block_size} positions "
            f"of {folder}; they can only be cropped"
        )
    assert model.vocab_size == source.vocab_size, (model.vocab_size, source.vocab_size)
    leaves = traverse_util.flatten_dict(abstract_params, sep="/")
    shapes, read = named
    table = next(name for name, place in places.items() if place.leaf == "wte")
    if source.tie_word_embeddings and "lm_head.weight" in shapes and table not in shapes:
        # safetensors' save_model writes one name of a table that has two.
        places = {"lm_head.weight" if n == table else n: x for n, x in places.items()}
        table = "lm_head.weight"
    head_copy = _check(folder, shapes, places, table)
    tensors: dict[str, list[tuple[str, Place]]] = {path: [] for path in leaves}
    for name, place in places.items():
        tensors[place.leaf].append((name, place))
    unfilled = [path for path, sources in tensors.items() if not sources]
    assert not unfilled, unfilled  # else they would be 0

    def load(path: str, leaf: Any) -> jax.Array:
        whole = np.zeros(leaf.shape, np.float32)
        for name, place in tensors[path]:
            tensor = read(name)
            if not np.isfinite(tensor).all():
                raise Mistake(f"{folder}: {name} holds numbers that are not finite")
            if name == table and head_copy and not np.array_equal(tensor, read(head_copy)):
                raise Mistake(
                    f"{folder}: {head_copy} differs from {table}, which config.json says it is; "
                    'a model with a head of its own has "tie_word_embeddings": false'
                )
            place.put(tensor, whole)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

    params = {path: load(path, leaf) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _check(folder: Path, shapes: Shapes, places: dict[str, Place], table: str) -> str | None:
    """Raise Mistake unless the file holds what it should. table: the name of the embeddings.

    Returns the name of the file's copy of a tied head, if it has one.
    """
    names = {name for name in shapes if name not in places and not _BUFFER.fullmatch(name)}
    if wrapped := [name for name in names if name.endswith(f".{table}")]:
        raise Mistake(
            f"{folder} has {wrapped[0]}, not {table}: something wraps the model, and its name "
            "precedes those of the tensors; store the state_dict of the model itself"
        )
    head = "lm_head.weight" if "lm_head.weight" in names else None
    expected = {name: place.shape for name, place in places.items()}
    if head:
        expected[head] = places[table].shape
    faults = [f"missing: {name}" for name in expected if name not in shapes]
    faults += [f"unexpected: {name}" for name in sorted(names - {head})]
    faults += [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if faults:
        raise Mistake(
            "\n  ".join([f"{folder} does not hold the model of its config.json:", *faults])
        )
    return head

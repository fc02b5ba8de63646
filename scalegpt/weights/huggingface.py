"""Models are read from folders in Hugging Face's GPT-2 format, and in our own that `export` writes.

A folder holds config.json and model.safetensors, or shards with an index, or pytorch_model.bin.
GPT-2's Conv1D kernels are [in, out] as ours are, so a leaf [L, ...] of our parameters is the L
layers' tensors stacked and reshaped.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
from scalegpt.model.layers import LAYER_NORM_EPS
from scalegpt.model.parameters import parameters
from scalegpt.weights.tensor_files import INDEX, SAFE, TORCH, Read, Shapes, open_tensors
from scalegpt.weights.tokenizer_files import read_file

HUB_SECONDS = 15  # without an answer from Hugging Face, there is no network
OWN_TYPE = "scalegpt"  # model_type of our own format, which names tensors by their path in params
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# A layer's tensors: GPT-2's name -> (our name, GPT-2's shape in multiples of n_embd).
_LAYER = {
    "ln_1.weight": ("ln_1/scale", (1,)),
    "ln_1.bias": ("ln_1/bias", (1,)),
    "attn.c_attn.weight": ("attn/qkv_kernel", (1, 3)),
    "attn.c_attn.bias": ("attn/qkv_bias", (3,)),
    "attn.c_proj.weight": ("attn/proj_kernel", (1, 1)),
    "attn.c_proj.bias": ("attn/proj_bias", (1,)),
    "ln_2.weight": ("ln_2/scale", (1,)),
    "ln_2.bias": ("ln_2/bias", (1,)),
    "mlp.c_fc.weight": ("mlp/up_kernel", (1, 4)),
    "mlp.c_fc.bias": ("mlp/up_bias", (4,)),
    "mlp.c_proj.weight": ("mlp/down_kernel", (4, 1)),
    "mlp.c_proj.bias": ("mlp/down_bias", (1,)),
}
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


class Place(NamedTuple):
    """A place is where a tensor of a file goes: a leaf of the parameters, and a layer of that leaf.

    shape: the tensor's in the file. layer: None where the leaf is not stacked over layers.
    """

    leaf: str
    layer: int | None
    shape: tuple[int, ...]


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
    if values.get("model_type") != "gpt2":
        raise Mistake(f"{path}: model_type is {values.get('model_type')!r}, not gpt2")
    _refuse_other_gpt2(values, path)
    model = {
        **{key: values[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "block_size": values["n_positions"],
        "bias": True,
        "activation": ACTIVATIONS[values.get("activation_function", "gelu_new")],
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
    }
    return model_of(model, path), _tokenizer(folder, values["vocab_size"])


def _refuse_other_gpt2(values: dict[str, Any], path: Path) -> None:
    """Raise Mistake for a GPT-2 without sizes, or with a feature that our model lacks."""
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    if missing := [key for key in sizes if type(values.get(key)) is not int]:
        raise Mistake(f"{path} does not give {', '.join(missing)} as a whole number")
    known = {
        "n_inner": (None, 4 * values["n_embd"]),
        "layer_norm_epsilon": (LAYER_NORM_EPS,),
        "activation_function": tuple(ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    }
    for key, allowed in known.items():
        if values.get(key, allowed[0]) not in allowed:
            only = " or ".join(str(value) for value in allowed if value is not None)
            raise Mistake(
                f"{path}: {key} is {values[key]}, which our model has not; it has {only or 'none'}"
            )


def model_of(values: dict[str, Any], path: Path) -> ModelConfig:
    """Return the model with these keys, which come from the file `path`. Raises Mistake."""
    model = validate_sections({"model": values}, str(path)).model
    if model.vocab_size is None:
        raise Mistake(f"{path} does not give vocab_size")
    return model


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    gpt2 = {"kind": "gpt2"}
    if (path := folder / "tokenizer.json").is_file():
        spec = read_file(path)
        return gpt2 if tokenizer.same(spec, gpt2) else spec
    if (path := folder / "vocab.json").is_file():
        same = tokenizer.same({"json": {"model": {"vocab": read_object(path)}}}, gpt2)
        return gpt2 if same else None
    return gpt2 if vocab_size == 50257 else None


def gpt2_places(model: ModelConfig) -> dict[str, Place]:
    """Return the place of every tensor of GPT-2's format, named without `transformer.`."""
    d, v = model.n_embd, model.vocab_size
    places = {
        "wte.weight": Place("wte", None, (v, d)),
        "wpe.weight": Place("wpe", None, (model.block_size, d)),
        "ln_f.weight": Place("ln_f/scale", None, (d,)),
        "ln_f.bias": Place("ln_f/bias", None, (d,)),
    }
    for i in range(model.n_layer):
        for name, (leaf, shape) in _LAYER.items():
            places[f"h.{i}.{name}"] = Place(f"h/{leaf}", i, tuple(n * d for n in shape))
    if not model.tie_word_embeddings:
        places["lm_head.weight"] = Place("head_kernel", None, (v, d))
    return places


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
    is_own = read_object(folder / "config.json")["model_type"] == OWN_TYPE
    places = own_places(source) if is_own else gpt2_places(source)
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
    if source.tie_word_embeddings and "lm_head.weight" in shapes and "wte.weight" not in shapes:
        # safetensors' save_model writes one name of a table that has two.
        places = {"lm_head.weight" if n == "wte.weight" else n: x for n, x in places.items()}
    head_copy = _check(folder, shapes, places)
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
            if name == "wte.weight" and head_copy and not np.array_equal(tensor, read(head_copy)):
                raise Mistake(
                    f"{folder}: {head_copy} differs from wte.weight, which config.json says it is; "
                    'a model with a head of its own has "tie_word_embeddings": false'
                )
            if place.layer is None:
                common = tuple(map(slice, np.minimum(whole.shape, tensor.shape)))
                whole[common] = tensor[common]
            else:
                whole[place.layer] = tensor.reshape(leaf.shape[1:])
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

    params = {path: load(path, leaf) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _check(folder: Path, shapes: dict[str, Any], places: dict[str, Place]) -> str | None:
    """Raise Mistake unless the file holds what it should.

    Returns the name of the file's copy of a tied head, if it has one.
    """
    names = {name for name in shapes if name not in places and not _BUFFER.fullmatch(name)}
    if wrapped := [name for name in names if name.endswith(".wte.weight")]:
        raise Mistake(
            f"{folder} has {wrapped[0]}, not wte.weight: something wraps the model, and its name "
            "precedes those of the tensors; store the state_dict of the model itself"
        )
    head = "lm_head.weight" if "lm_head.weight" in names and "wte.weight" in places else None
    expected = {name: place.shape for name, place in places.items()}
    if head:
        expected[head] = places["wte.weight"].shape
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

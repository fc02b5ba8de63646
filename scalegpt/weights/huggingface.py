"""Models are read from folders in the formats of Hugging Face, and in our own that `export` writes.

A folder holds config.json and model.safetensors, or shards with an index, or pytorch_model.bin.
"""

import re
import sys
from pathlib import Path
from typing import Any

from scalegpt.config.loading import shown, validate_sections
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.folder import expanded
from scalegpt.files.json_files import read_object
from scalegpt.files.run_folder import is_run
from scalegpt.model.parameters import parameters
from scalegpt.weights import gpt2, llama, nanochat
from scalegpt.weights.places import Place
from scalegpt.weights.source import Source, open_source
from scalegpt.weights.tensor_files import INDEX, SAFE, TORCH, instead, open_tensors
from scalegpt.weights.tokenizer_files import known_as, of_weights, read_merges, with_template

HUB_SECONDS = 15  # without an answer from Hugging Face, there is no network
OWN_TYPE = "scalegpt"  # model_type of our own format, which names tensors by their path in params
# By model_type; an export takes the first that can say what the model is.
FORMATS = {"gpt2": gpt2.FORMAT, **llama.FORMATS, "nanochat": nanochat.FORMAT}
_OTHERS = (
    "; python tools/convert_hf.py import reads checkpoints of nanoGPT, nanogpt-jax and gpt-jax"
)
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
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
            f"repository of Hugging Face, as gpt2 or OWNER/NAME{instead(folder) or _OTHERS}"
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
    hint = "; download it again" if path.exists() else instead(folder) or _OTHERS
    if is_run(folder):
        hint = f"; {folder} is the folder of a run, no model of Hugging Face"
    values = read_object(path, hint)
    if values.get("model_type") == OWN_TYPE:
        if (spec := values.get("tokenizer")) is not None:
            tokenizer.check(spec)
        return model_of(values.get("model", {}), path), spec
    if str(kind := values.get("model_type")) not in FORMATS:
        known = ", ".join([*FORMATS, OWN_TYPE])
        raise Mistake(f"{path}: model_type is {shown(kind)}, and only {known} are read")
    model = model_of(FORMATS[kind].describe(values, path), path)
    spec = _tokenizer(folder, kind, model.vocab_size)
    return model, spec and with_template(spec, folder)


def model_of(values: dict[str, Any], path: Path) -> ModelConfig:
    """Return the model with these keys, which come from the file `path`. Raises Mistake."""
    model = validate_sections({"model": values}, str(path)).model
    if model.vocab_size is None:
        raise Mistake(f"{path} does not give vocab_size")
    return model


def _tokenizer(folder: Path, model_type: str, vocab_size: int) -> dict[str, Any] | None:
    known = {"kind": "gpt2"}
    if (path := folder / "tokenizer.json").is_file():
        spec = of_weights(path)
        return {"kind": name} if (name := known_as(spec)) else spec
    if (path := folder / "vocab.json").is_file():
        if tokenizer.same({"json": {"model": {"vocab": read_object(path)}}}, known):
            return known
        # Another model_type may cut texts into other words.
        return read_merges(path) if model_type == "gpt2" else None
    return known if vocab_size == 50257 else None


def open_folder(folder: Path) -> Source:
    """Open the model in a folder. Raises Mistake as `describe`, and where its tensors are not those
    that its config.json asks for."""
    model, spec = describe(folder)
    values, (shapes, read) = read_object(folder / "config.json"), open_tensors(folder)
    if (kind := values["model_type"]) == OWN_TYPE:
        places = {path: Place(path, None, x.shape) for path, x in parameters(model).items()}
    else:
        places, read = FORMATS[kind].places(model), FORMATS[kind].adapt(values, read)
    return open_source(folder, model, spec, places, (shapes, read))

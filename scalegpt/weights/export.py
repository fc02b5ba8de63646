"""A trained model is exported as a folder of Hugging Face's, in a format of its own or in ours.

Many programs read the formats of transformers, but not every model fits one; ours takes any model.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.errors import Mistake
from scalegpt.weights.huggingface import FORMATS, OWN_TYPE
from scalegpt.weights.places import Format
from scalegpt.weights.tensor_files import SAFE
from scalegpt.weights.tokenizer_files import reads_as_qwen2, tokenizer_files
from scalegpt.weights.trained import Trained


def export_hf(model: Trained, folder: Path) -> str:
    """Write a model into an empty folder, which `transformers` loads without our code.

    The format is the first that can say what the model is. The padding of the vocabulary is cut
    off, and where the format has tensors that the model has not they change nothing, which the text
    that is returned says. Raises Mistake with the reasons for a model that no format expresses.
    """
    config = model.config.model
    misfits = {format_: format_.misfits(config) for format_ in FORMATS.values()}
    format_ = min(misfits, key=lambda x: len(misfits[x]))
    if misfits[format_]:
        modern = "; a run with --model.preset=nanochat, modern without smear and residual_scalars, "
        modern = f"{modern}can be exported" if config.smear and config.residual_scalars else ""
        raise Mistake(
            f"no format of transformers says what {model.name} is; --format scalegpt does{modern}\n"
            + "\n".join(
                f"  {x.name}: {'; '.join(reasons)}"
                for x, reasons in sorted(misfits.items(), key=lambda item: len(item[1]))
            )
        )
    values = format_.config(config)
    files = tokenizer_files(model.tokenizer, config.block_size)
    if files and values["model_type"] == "qwen2" and not reads_as_qwen2(files["tokenizer.json"]):
        raise Mistake(
            f"{model.name} would be a qwen2 for transformers, which reads the tokenizers of all of "
            "these as Qwen2's, and this model's would give other ids; use --format scalegpt"
        )
    codec = tokenizer.load(model.tokenizer) if model.tokenizer else None
    marks = {"bos_token_id": codec and codec.begin, "eos_token_id": codec and codec.end}
    if codec and codec.template:
        marks["eos_token_id"] = sorted(codec.ends)
    files["config.json"] = {**values, **marks, "dtype": "float32"}
    files["generation_config.json"] = {"_from_model_config": True, **marks}
    tensors, added = tensors_of(format_, config, model.params)
    _write(folder, tensors, files)
    if not added:
        return ""
    return f"The model has no {added}; {format_.name}'s format has, and they change nothing."


def export_own(model: Trained, folder: Path) -> str:
    """Write a model's leaves bit for bit, each under its path, with its shape and tokenizer."""
    leaves = traverse_util.flatten_dict(model.params, sep="/")
    tensors = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    values = {"model_type": OWN_TYPE, "model": model.config.model.model_dump()}
    values["tokenizer"] = model.tokenizer
    _write(folder, tensors, {"config.json": values})
    return ""


def tensors_of(
    format_: Format, config: ModelConfig, params: Any
) -> tuple[dict[str, np.ndarray], str]:
    """Return the tensors of a format by name, and the kind of those that the model has not.

    On a CPU they are views of the parameters where the format stores them as we do.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    leaves = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    tensors, added = {}, set()
    places = format_.places(config)
    unknown = leaves.keys() - {place.leaf for place in places.values()}
    assert not unknown, unknown  # else a model without them would be written
    for name, place in places.items():
        stored = name if name == "lm_head.weight" else format_.prefix + name
        if place.leaf in leaves:
            tensors[stored] = np.ascontiguousarray(place.get(leaves[place.leaf]))
        else:
            assert place.absent is not None, name
            tensors[stored] = np.full(place.shape, place.absent, np.float32)
            added.add("biases" if name.endswith("bias") else "gains")
        assert tensors[stored].shape == place.shape, name
    return tensors, " and ".join(sorted(added))


def _write(folder: Path, tensors: dict[str, np.ndarray], files: dict[str, Any]) -> None:
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    try:
        # Without this metadata transformers refuses the file.
        save_file(tensors, folder / SAFE, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors wraps the disk's errors, such as a full disk
        raise Mistake(
            f"cannot write {SAFE}: {error}; free some room, or choose another --out"
        ) from None
    # safetensors makes a file that only its owner may read.
    (folder / SAFE).chmod((folder / "config.json").stat().st_mode)

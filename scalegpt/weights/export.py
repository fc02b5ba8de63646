"""A trained model as a folder: Hugging Face's GPT-2, for everybody, or our own, for any model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.json_files import complete_rows
from scalegpt.model.flops import parameter_count
from scalegpt.model.layers import LAYER_NORM_EPS
from scalegpt.weights.huggingface import ACTIVATIONS, OWN_TYPE, gpt2_places
from scalegpt.weights.tensor_files import SAFE
from scalegpt.weights.tokenizer_files import tokenizer_files
from scalegpt.weights.trained import Trained

# What GPT-2's format has one value for: nothing else can be written in it.
_ONLY = {
    "position": "learned",
    "norm": "layernorm",
    "qk_norm": False,
    "embedding_norm": False,
    "logit_softcap": 0.0,
    "residual_scalars": False,
    "value_embeddings": False,
}


def export_gpt2(model: Trained, folder: Path) -> None:
    """What `transformers` loads as it is, into an empty folder.

    The padding of the vocabulary is cut off, and biases that the model has not are zero.
    Raises ValueError with the reason for a model that the format cannot express.
    """
    config = model.config.model
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_pytorch_tanh"}
    fits = {**{key: (only,) for key, only in _ONLY.items()}, "activation": tuple(names)}
    for key, known in fits.items():
        if (value := getattr(config, key)) not in known:
            raise Mistake(
                f"{model.name} has model.{key}={value}: GPT-2's format can only say "
                f"{' or '.join(map(str, known))}; use --format scalegpt"
            )
    files = tokenizer_files(model.tokenizer, config.block_size)
    tensors = gpt2_tensors(config, model.params)
    end = tokenizer.load(model.tokenizer).eot if model.tokenizer else None
    ends = {"bos_token_id": end, "eos_token_id": end}
    files["config.json"] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "tie_word_embeddings": config.tie_word_embeddings,
        **{f"{part}_pdrop": config.dropout for part in ("embd", "attn", "resid")},
        **ends,
        "dtype": "float32",
    }
    files["generation_config.json"] = {"_from_model_config": True, **ends}
    use = _USE.format(folder=folder.name)
    if not config.bias:
        use += "\n\nThe model has no biases; GPT-2's format has, and they are 0."
    if model.tokenizer is None:
        use += "\n\nIt came without a tokenizer: only `model` can be loaded, for token ids."
    _write(folder, tensors, files, model, use, "transformers")


def export_own(model: Trained, folder: Path) -> None:
    """Every leaf under its path, with the configuration and the tokenizer, bit for bit."""
    leaves = traverse_util.flatten_dict(model.params, sep="/")
    tensors = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    values = {"model_type": OWN_TYPE, "model": model.config.model.model_dump()}
    values["tokenizer"] = model.tokenizer
    use = f'```\npython -m scalegpt.generate --hf {folder.name} --prompt "..."\n```'
    _write(folder, tensors, {"config.json": values}, model, use, OWN_TYPE)


def gpt2_tensors(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """The tensors of GPT-2's format by name; views of the parameters, on a CPU without a copy."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    leaves = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    tensors = {}
    for name, place in gpt2_places(config).items():
        if place.leaf not in leaves:
            assert place.leaf.endswith("bias") and not config.bias, name
            tensors[name] = np.zeros(place.shape, np.float32)
        elif place.layer is None:
            tensors[name] = leaves[place.leaf][: place.shape[0]]
        else:
            tensors[name] = leaves[place.leaf][place.layer].reshape(place.shape)
        assert tensors[name].shape == place.shape, name
    prefix = "transformer."
    return {n if n == "lm_head.weight" else prefix + n: tensor for n, tensor in tensors.items()}


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```"""
_CARD = """---
library_name: {library}
tags: [{tags}]
---
# {title}

A GPT of {parameters:,} parameters, {origin} scalegpt.

| | |
|---|---|
{table}

{use}

## Configuration

```yaml
{config}```
"""


def _write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    files: dict[str, Any],
    model: Trained,
    use: str,
    library: str,
) -> None:
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    try:
        # Without this metadata transformers refuses.
        save_file(tensors, folder / SAFE, metadata={"format": "pt"})
    except SafetensorError as error:  # the disk's, in its own words
        raise Mistake(
            f"cannot write {SAFE}: {error}; free some room, or choose another --out"
        ) from None
    # safetensors leaves its file to its owner alone.
    (folder / SAFE).chmod((folder / "config.json").stat().st_mode)
    config = model.config
    figures = {**_figures(model), "context": f"{config.model.block_size} tokens"}
    values = config.model_dump() if model.step else {"model": config.model.model_dump()}
    card = _CARD.format(
        library=library,
        tags="scalegpt, gpt2" if library == "transformers" else "scalegpt",
        title=Path(model.name).name,
        parameters=parameter_count(config.model),
        origin="trained with" if model.step else "converted by",
        table="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        use=use,
        config=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _figures(model: Trained) -> dict[str, str]:
    """What is known of a run at this checkpoint: its evaluation, if there was one at this step."""
    figures = {"data": ", ".join(Path(path).name for path in model.config.data.weights if path)}
    if model.step:
        figures["updates"] = f"{model.step:,}"
    path = Path(model.name) / "metrics.jsonl"
    # The last row may be half written.
    rows = complete_rows(path.read_text(errors="replace").splitlines()) if path.is_file() else ()
    for row in rows:
        if row["step"] == model.step and "val/loss" in row:
            figures["validation loss"] = f"{row['val/loss']:.4f} nats a token"
            if "val/bits_per_byte" in row:
                figures["bits per byte"] = f"{row['val/bits_per_byte']:.4f}"
    return {key: value for key, value in figures.items() if value}

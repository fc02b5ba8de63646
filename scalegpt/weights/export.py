"""A trained model is exported as a folder of Hugging Face's, in GPT-2's format or in our own.

Many programs read GPT-2's format, but only models of GPT-2's kind fit it; ours takes any model.
"""

import json
import shlex
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
from scalegpt.model.flops import parameter_count
from scalegpt.model.layers import LAYER_NORM_EPS
from scalegpt.weights.huggingface import ACTIVATIONS, OWN_TYPE, gpt2_places
from scalegpt.weights.tensor_files import SAFE
from scalegpt.weights.tokenizer_files import tokenizer_files
from scalegpt.weights.trained import Trained, evaluation

# GPT-2's format has no key for these, so a model must have GPT-2's own values.
_ONLY = {
    "position": "learned",
    "norm": "layernorm",
    "qk_norm": False,
    "embedding_norm": False,
    "logit_softcap": 0.0,
    "norm_eps": None,
    "qkv_bias": False,
    "window": None,
    "attention_scale": None,
    "mlp": "plain",
    "n_inner": None,
    "n_kv_head": None,
    "head_size": None,
    "residual_scalars": False,
    "value_embeddings": False,
}


def export_gpt2(model: Trained, folder: Path) -> None:
    """Write a model into an empty folder as GPT-2, which `transformers` loads without our code.

    The padding of the vocabulary is cut off, and a model without biases gets zeros for them.
    Raises Mistake with the reason for a model that the format cannot express.
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
    codec = tokenizer.load(model.tokenizer) if model.tokenizer else None
    marks = {"bos_token_id": codec and codec.eot, "eos_token_id": codec and codec.end}
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
        **marks,
        "dtype": "float32",
    }
    files["generation_config.json"] = {"_from_model_config": True, **marks}
    use = _USE.format(folder=folder.name)
    if not config.bias:
        use += "The model has no biases; GPT-2's format has, and they are 0.\n\n"
    if "tokenizer.json" not in files:
        use += "It came without a tokenizer: only `model` can be loaded, for token ids.\n\n"
    _write(folder, tensors, files, model, use, "transformers")


def export_own(model: Trained, folder: Path) -> None:
    """Write a model's leaves bit for bit, each under its path, with its shape and tokenizer."""
    leaves = traverse_util.flatten_dict(model.params, sep="/")
    tensors = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    values = {"model_type": OWN_TYPE, "model": model.config.model.model_dump()}
    values["tokenizer"] = model.tokenizer
    _write(folder, tensors, {"config.json": values}, model, "", OWN_TYPE)


def gpt2_tensors(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Return the tensors of GPT-2's format by name; on a CPU they are views of the parameters."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    leaves = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    places, tensors = gpt2_places(config), {}
    unknown = leaves.keys() - {place.leaf for place in places.values()}
    assert not unknown, unknown  # else a model without them would be written
    for name, place in places.items():
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
```

"""
_CARD = """---
library_name: {library}
tags: [{tags}]
license: unknown
---
# {title}

A GPT of {parameters:,} parameters, {origin} scalegpt.

| | |
|---|---|
{table}

## Use

{use}```python
import scalegpt

model = scalegpt.load("{folder}")
print(model.{call})
```

## Licence

None is chosen yet. Whoever publishes these weights does, in place of `unknown` in the first lines
of this file; the text they were trained on, and weights they began with, may have a say. scalegpt
itself is under the MIT licence, which does not extend to what it trains.

## Upload

```
hf auth login
hf upload USER/{folder} {path}
```

Afterwards `USER/{folder}` is the name to load the model by.

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
        # Without this metadata transformers refuses the file.
        save_file(tensors, folder / SAFE, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors wraps the disk's errors, such as a full disk
        raise Mistake(
            f"cannot write {SAFE}: {error}; free some room, or choose another --out"
        ) from None
    # safetensors makes a file that only its owner may read.
    (folder / SAFE).chmod((folder / "config.json").stat().st_mode)
    config = model.config
    figures = {**_figures(model), "context": f"{config.model.block_size} tokens"}
    has_text = "tokenizer.json" in files or files["config.json"].get("tokenizer")
    values = config.model_dump() if model.step else {"model": config.model.model_dump()}
    card = _CARD.format(
        library=library,
        tags="scalegpt, gpt2" if library == "transformers" else "scalegpt",
        title=Path(model.name).name,
        parameters=parameter_count(config.model),
        origin="trained with" if model.step else "converted by",
        table="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        use=use,
        folder=folder.name,
        path=shlex.quote(folder.name),
        call='generate("Once", max_new_tokens=100)' if has_text else "logits([5, 17])",
        config=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _figures(model: Trained) -> dict[str, str]:
    """Return the rows of the card's table: data, updates and the evaluation at this checkpoint."""
    figures = {"data": ", ".join(Path(path).name for path in model.config.data.weights if path)}
    if model.step:
        figures["updates"] = f"{model.step:,}"
    row = evaluation(model)
    if "val/loss" in row:
        figures["validation loss"] = f"{row['val/loss']:.4f} nats a token"
    if "val/bits_per_byte" in row:
        figures["bits per byte"] = f"{row['val/bits_per_byte']:.4f}"
    return {key: value for key, value in figures.items() if value}

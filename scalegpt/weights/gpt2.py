"""GPT-2's format, which most programs read: biases, learned positions, LayerNorm and GELU.

Its Conv1D kernels are [in, out] as ours are.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from scalegpt.config.recipe import ModelConfig
from scalegpt.config.types import Positive, Share, Width
from scalegpt.model.layers import LAYER_NORM_EPS
from scalegpt.weights.places import Format, Place
from scalegpt.weights.settings import Settings
from scalegpt.weights.tensor_files import Read

# Ours -> the names that transformers has for the function, up to rounding; the first is written.
_ACTIVATIONS = {
    "gelu_tanh": (
        "gelu_new",
        "gelu_pytorch_tanh",
        "gelu_python_tanh",
        "gelu_fast",
        "gelu_accurate",
    ),
    "gelu": ("gelu", "gelu_python"),
    "relu": ("relu",),
    "relu2": ("relu2",),
    "silu": ("silu", "swish"),
}
ACTIVATIONS = {name: ours for ours, names in _ACTIVATIONS.items() for name in names}
# A layer's tensors: GPT-2's name -> (our name, axes: n_embd, or within the MLP).
_LAYER = {
    "ln_1.weight": ("ln_1/scale", ("d",)),
    "ln_1.bias": ("ln_1/bias", ("d",)),
    "attn.c_attn.weight": ("attn/qkv_kernel", ("d", "3d")),
    "attn.c_attn.bias": ("attn/qkv_bias", ("3d",)),
    "attn.c_proj.weight": ("attn/proj_kernel", ("d", "d")),
    "attn.c_proj.bias": ("attn/proj_bias", ("d",)),
    "ln_2.weight": ("ln_2/scale", ("d",)),
    "ln_2.bias": ("ln_2/bias", ("d",)),
    "mlp.c_fc.weight": ("mlp/up_kernel", ("d", "f")),
    "mlp.c_fc.bias": ("mlp/up_bias", ("f",)),
    "mlp.c_proj.weight": ("mlp/down_kernel", ("f", "d")),
    "mlp.c_proj.bias": ("mlp/down_bias", ("d",)),
}
# GPT-2's format has no key for these, so a model must have GPT-2's own values.
_ONLY = {
    "position": "learned",
    "norm": "layernorm",
    "qk_norm": False,
    "embedding_norm": False,
    "logit_softcap": 0.0,
    "window": None,
    "mlp": "plain",
    "residual_scalars": False,
    "value_embeddings": False,
    "smear": False,
    "backout": False,
    "ngram_rows": 0,
}


class _Settings(Settings):
    n_layer: Positive
    n_head: Width
    n_embd: Width
    n_positions: Positive
    n_inner: Width | None = None
    activation_function: Literal[tuple(ACTIVATIONS)] = "gelu_new"
    layer_norm_epsilon: Share = LAYER_NORM_EPS
    scale_attn_weights: bool = True
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True
    scale_attn_by_inverse_layer_idx: bool = False  # see _adapt
    # reorder_and_upcast_attn has the softmax in float32, which ours always is.


def _describe(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raises Mistake for a GPT-2 without sizes, or with a feature that our model lacks."""
    s = _Settings.read(values, path)
    return {
        **{key: getattr(s, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "block_size": s.n_positions,
        "bias": True,
        "n_inner": None if s.n_inner == 4 * s.n_embd else s.n_inner,
        "norm_eps": None if s.layer_norm_epsilon == LAYER_NORM_EPS else s.layer_norm_epsilon,
        "attention_scale": None if s.scale_attn_weights else 1.0,
        "activation": ACTIVATIONS[s.activation_function],
        "tie_word_embeddings": s.tie_word_embeddings,
    }


def places(model: ModelConfig) -> dict[str, Place]:
    """Return the place of every tensor of GPT-2's format, named without `transformer.`."""
    d, v = model.n_embd, model.vocab_size
    sizes = {"d": d, "3d": 3 * d, "f": model.inner}
    places = {
        "wte.weight": Place("wte", None, (v, d)),
        "wpe.weight": Place("wpe", None, (model.block_size, d)),
        "ln_f.weight": Place("ln_f/scale", None, (d,)),
        "ln_f.bias": Place("ln_f/bias", None, (d,), absent=0.0),
    }
    for i in range(model.n_layer):
        for name, (leaf, shape) in _LAYER.items():
            absent = 0.0 if name.endswith("bias") else None
            shape = tuple(sizes[axis] for axis in shape)
            places[f"h.{i}.{name}"] = Place(f"h/{leaf}", i, shape, absent=absent)
    if not model.tie_word_embeddings:
        places["lm_head.weight"] = Place("head_kernel", None, (v, d))
    return places


def _fits(model: ModelConfig) -> dict[str, tuple]:
    return {
        **{key: (only,) for key, only in _ONLY.items()},
        "n_kv_head": (None, model.n_head),
        "head_size": (None, model.n_embd / model.n_head),
        "attention_scale": (None, model.head_dim**-0.5, 1.0),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "vocab_size": model.vocab_size,
        "activation_function": _ACTIVATIONS[model.activation][0],
        "layer_norm_epsilon": model.norm_eps or LAYER_NORM_EPS,
        "n_inner": model.n_inner,
        "scale_attn_weights": model.attention_scale in (None, model.head_dim**-0.5),
        "tie_word_embeddings": model.tie_word_embeddings,
        **{f"{part}_pdrop": model.dropout for part in ("embd", "attn", "resid")},
    }


def _adapt(values: dict[str, Any], read: Read) -> Read:
    """Divide layer i's queries by i + 1, if the file's program divides their products by that."""
    if not values.get("scale_attn_by_inverse_layer_idx"):
        return read

    def adapted(name: str) -> np.ndarray:
        tensor = read(name)
        if ".attn.c_attn." not in name:
            return tensor
        query, key_and_value = np.split(tensor, [tensor.shape[-1] // 3], axis=-1)
        return np.concatenate([query / (1 + int(name.split(".")[1])), key_and_value], axis=-1)

    return adapted


FORMAT = Format("GPT-2", "transformer.", _describe, places, _config, _fits, _adapt)

"""GPT-2's format, which most programs read: biases, learned positions, LayerNorm and GELU.

Its Conv1D kernels are [in, out] as ours are.
"""

from pathlib import Path
from typing import Any

from scalegpt.config.recipe import ModelConfig
from scalegpt.errors import Mistake
from scalegpt.model.layers import LAYER_NORM_EPS
from scalegpt.weights.places import Format, Place

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


def _describe(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raises Mistake for a GPT-2 without sizes, or with a feature that our model lacks."""
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
    return {
        **{key: values[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "block_size": values["n_positions"],
        "bias": True,
        "activation": ACTIVATIONS[values.get("activation_function", "gelu_new")],
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
    }


def places(model: ModelConfig) -> dict[str, Place]:
    """Return the place of every tensor of GPT-2's format, named without `transformer.`."""
    d, v = model.n_embd, model.vocab_size
    places = {
        "wte.weight": Place("wte", None, (v, d)),
        "wpe.weight": Place("wpe", None, (model.block_size, d)),
        "ln_f.weight": Place("ln_f/scale", None, (d,)),
        "ln_f.bias": Place("ln_f/bias", None, (d,), absent=0.0),
    }
    for i in range(model.n_layer):
        for name, (leaf, shape) in _LAYER.items():
            absent = 0.0 if name.endswith("bias") else None
            shape = tuple(n * d for n in shape)
            places[f"h.{i}.{name}"] = Place(f"h/{leaf}", i, shape, absent=absent)
    if not model.tie_word_embeddings:
        places["lm_head.weight"] = Place("head_kernel", None, (v, d))
    return places


def _config(model: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_pytorch_tanh"}
    fits = {**{key: (only,) for key, only in _ONLY.items()}, "activation": tuple(names)}
    for key, known in fits.items():
        if (value := getattr(model, key)) not in known:
            only = " or ".join(map(str, known))
            raise Mistake(f"model.{key}={value}: GPT-2's format can only say {only}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "vocab_size": model.vocab_size,
        "activation_function": names[model.activation],
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "tie_word_embeddings": model.tie_word_embeddings,
        **{f"{part}_pdrop": model.dropout for part in ("embd", "attn", "resid")},
    }


FORMAT = Format("GPT-2", "transformer.", _describe, places, _config)

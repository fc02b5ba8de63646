"""NanoChat's format: the preset of that name, without gains and windows.

Its rotation turns the other way, by -1 times the angle. So do queries and keys here whose second
half has the other sign, and what they are multiplied to is the same.
"""

from pathlib import Path
from typing import Any, Literal

from scalegpt.config.recipe import ModelConfig
from scalegpt.config.types import Share
from scalegpt.errors import Mistake
from scalegpt.weights.gpt2 import ACTIVATIONS
from scalegpt.weights.llama import (
    RotarySettings,
    config_rotary,
    describe_rotary,
    fits_rotary,
    rotary_places,
)
from scalegpt.weights.places import Format, Place

_MLP = {"mlp.fc1": ("mlp/up", "inner", "n_embd"), "mlp.fc2": ("mlp/down", "n_embd", "inner")}
_YARN = "linear or llama3: yarn's attention_factor is lost where a norm follows the rotation"


class _Settings(RotarySettings):
    hidden_act: Literal[tuple(ACTIVATIONS)] = "relu2"
    final_logit_softcapping: Share | None = 15.0
    attention_bias: Literal[False] = False


def _describe(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raises Mistake for a model without sizes, or with a feature that our model lacks."""
    s = _Settings.read(values, path)
    if not _yarn_fits(scaling := s.rope_scaling or s.rope_parameters):
        raise Mistake(f"{path}: rope_type is {scaling.rope_type}; our model has {_YARN}")
    return {
        **describe_rotary(s, "plain"),
        "activation": ACTIVATIONS[s.hidden_act],
        "qk_norm": True,
        "embedding_norm": True,
        "logit_softcap": s.final_logit_softcapping or 0.0,
        "softcap": "tanh",
    }


def _yarn_fits(scaling: Any) -> bool:
    return not scaling or scaling.rope_type != "yarn" or scaling.attention_factor == 1


def _places(model: ModelConfig) -> dict[str, Place]:
    half = model.head_dim // 2
    return rotary_places(model, _MLP, signs=(1,) * half + (-1,) * half)


def _fits(model: ModelConfig) -> dict[str, tuple]:
    return fits_rotary(model) | {
        "mlp": ("plain",),
        "norm_gain": (False,),
        "qk_norm": (True,),
        "embedding_norm": (True,),
        "softcap": ("tanh",) if model.logit_softcap else (model.softcap,),
        "window": (None,) if any(model.windows) else (model.window,),
        "rope_scaling": (model.rope_scaling,) if _yarn_fits(model.rope_scaling) else (_YARN,),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    names = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        **config_rotary(model),
        "hidden_act": names[model.activation],
        "final_logit_softcapping": model.logit_softcap or None,
        "attention_bias": False,
    }


FORMAT = Format("NanoChat", "model.", _describe, _places, _config, _fits)

"""Llama's format and those that differ from it in a detail: Mistral, Qwen2 and Qwen3.

All have RMSNorms with gains, rotations, shared heads of keys and values, and an MLP with a gate.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from scalegpt.config.recipe import ModelConfig, RopeScaling
from scalegpt.config.types import Positive, Share, Width
from scalegpt.errors import Mistake
from scalegpt.model.layers import GATES, RMS_NORM_EPS
from scalegpt.weights.gpt2 import ACTIVATIONS
from scalegpt.weights.places import Format, Place
from scalegpt.weights.settings import Settings

_GATE_OF = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
_ACTS = {name: _GATE_OF[ours] for name, ours in ACTIVATIONS.items() if ours in _GATE_OF}
_FULL, _SLIDING = "full_attention", "sliding_attention"
# What transformers knows of a type of rotation, beside the type and its factor.
_ROPE_KEYS = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings",
        *("beta_fast", "beta_slow", "truncate", "attention_factor"),
    ),
}
# Linear layers: their name -> our leaf without its part, sizes of outputs and inputs.
GATED_MLP = {
    "mlp.gate_proj": ("mlp/gate", "inner", "n_embd"),
    "mlp.up_proj": ("mlp/up", "inner", "n_embd"),
    "mlp.down_proj": ("mlp/down", "n_embd", "inner"),
}


class RotarySettings(Settings):
    """The keys of formats with rotations, whose spelling of before transformers 5 is read, too."""

    num_hidden_layers: Positive
    num_attention_heads: Width
    num_key_value_heads: Width | None = None
    hidden_size: Width
    intermediate_size: Width
    max_position_embeddings: Positive
    head_dim: Width | None = None
    rms_norm_eps: Share = RMS_NORM_EPS
    tie_word_embeddings: bool = False
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    rope_parameters: RopeScaling | None = None
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: Literal[None, 1.0] = None
    is_causal: Literal[True] = True
    sliding_window: Literal[None] = None
    layer_types: Literal[None] = None
    per_layer_config: Literal[None] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_rotation(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Bring what config.json says of rotations into one form, by the rules of transformers."""
        key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        rope = values.get(key) or {}
        if not isinstance(rope, dict):  # which its type refuses
            return values
        rope = {name: value for name, value in rope.items() if value is not None}
        kind = rope.pop("type", "default")
        rope.setdefault("rope_type", kind)
        outer = {x: rope.pop(x) for x in ("rope_theta", "partial_rotary_factor") if x in rope}
        if rope["rope_type"] in ("llama3", "yarn"):
            before = values.get("original_max_position_embeddings")
            if before is not None:
                rope["original_max_position_embeddings"] = before
            before = values.get("max_position_embeddings")
            rope.setdefault("original_max_position_embeddings", before)
        scaling = None if rope == {"rope_type": "default"} else rope
        return {**values, **outer, "rope_scaling": None, "rope_parameters": None, key: scaling}


class _Gated(RotarySettings):
    hidden_act: Literal[tuple(_ACTS)] = "silu"


class _Llama(_Gated):
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.attention_bias != self.mlp_bias:
            raise Mistake(
                f"attention_bias is {self.attention_bias} and mlp_bias {self.mlp_bias}; our model "
                "has biases in both, or of queries, keys and values alone, as qwen2"
            )
        return self


class _Mistral(_Gated):
    num_key_value_heads: Width | None = 8
    sliding_window: Positive | None = 4096


class _Qwen2(_Gated):
    num_key_value_heads: Width | None = 32
    use_sliding_window: bool = False
    sliding_window: Positive | None = 4096
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        types, window = self.layer_types, self.sliding_window if self.use_sliding_window else None
        if types is not None and len(types) != self.num_hidden_layers:
            raise Mistake(
                f"layer_types are {len(types)}, and num_hidden_layers is {self.num_hidden_layers}"
            )
        if _SLIDING in (types or ()) and window is None:
            raise Mistake(
                f"layer_types has {_SLIDING}, and use_sliding_window is {self.use_sliding_window}, "
                f"sliding_window {self.sliding_window}: there is no width for it"
            )
        return self


class _Qwen3(_Qwen2):
    head_dim: Width | None = 128
    attention_bias: Literal[False] = False


class _Kind(NamedTuple):
    """What differs between the formats of this file.

    settings: config.json's keys. biased: which linear layers have biases, by the start of their
    names, where the model has any. qk_norm: whether queries and keys are normalised.
    """

    name: str
    settings: type[RotarySettings]
    biased: tuple[str, ...]
    qk_norm: bool


def describe_rotary(s: RotarySettings, mlp: str) -> dict[str, Any]:
    """Return the keys of our model section that all formats with rotations have.

    What is our default is left out, so that a run may give the same architecture without it.
    """
    heads, kv_heads = s.num_attention_heads, s.num_key_value_heads
    scaling = s.rope_scaling or s.rope_parameters
    inner = ModelConfig(n_head=1, n_embd=s.hidden_size, mlp=mlp).inner
    return {
        "n_layer": s.num_hidden_layers,
        "n_head": heads,
        "n_kv_head": None if kv_heads == heads else kv_heads,
        "n_embd": s.hidden_size,
        "head_size": None if s.head_dim and s.head_dim * heads == s.hidden_size else s.head_dim,
        "mlp": mlp,
        "n_inner": None if s.intermediate_size == inner else s.intermediate_size,
        "block_size": s.max_position_embeddings,
        "vocab_size": s.vocab_size,
        "tie_word_embeddings": s.tie_word_embeddings,
        "position": "rope",
        "rope_base": s.rope_theta,
        "rope_scaling": scaling and scaling.model_dump(),
        "norm": "rmsnorm",
        "norm_eps": None if s.rms_norm_eps == RMS_NORM_EPS else s.rms_norm_eps,
    }


def _describe(kind: _Kind, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raises Mistake for a model without sizes, or with a feature that our model lacks."""
    s = kind.settings.read(values, path)
    return {
        **describe_rotary(s, _ACTS[s.hidden_act]),
        "norm_gain": True,
        "bias": kind.settings is _Llama and s.attention_bias,
        "qkv_bias": kind.settings is _Qwen2,
        "qk_norm": kind.qk_norm,
        **_windows(s),
    }


def _windows(s: RotarySettings) -> dict[str, Any]:
    """Return our keys of sliding windows, with the shortest pattern that repeats over layers."""
    n, window = s.num_hidden_layers, s.sliding_window
    if isinstance(s, _Qwen2):
        window = window if s.use_sliding_window else None
        first = s.max_window_layers
        types = s.layer_types or [_SLIDING if i >= first else _FULL for i in range(n)]
        letters = "".join("S" if x == _SLIDING else "L" for x in types)
    else:
        letters = "S" * n
    if window is None or "S" not in letters:
        return {}
    lengths = range(1, n + 1)
    pattern = next(x for i in lengths if ((x := letters[:i]) * n)[:n] == letters)
    return {"window": window, "window_pattern": pattern}


def rotary_places(
    model: ModelConfig,
    mlp: dict[str, tuple[str, str, str]],
    biased: tuple[str, ...] = (),
    gains: dict[str, str] | None = None,
    signs: tuple[int, ...] | None = None,
) -> dict[str, Place]:
    """Return the place of every tensor of a format with rotations, named without `model.`.

    mlp: as GATED_MLP. biased: which linear layers have biases, by the start of their names. gains:
    of the layers' norms, their name -> our leaf. signs: as `Place.signs`, of queries and keys.
    """
    d, k = model.n_embd, model.head_dim
    width = {"n_embd": d, "inner": model.inner, "q": model.n_head * k, "kv": model.kv_heads * k}
    # Where all have the same heads, they are one leaf of three parts.
    one = model.kv_heads == model.n_head
    q, kv, first = ("attn/qkv", "attn/qkv", 1) if one else ("attn/q", "attn/kv", 0)
    linear = {
        "self_attn.q_proj": (q, "q", "n_embd", 0, signs),
        "self_attn.k_proj": (kv, "kv", "n_embd", first, signs),
        "self_attn.v_proj": (kv, "kv", "n_embd", first + 1, None),
        "self_attn.o_proj": ("attn/proj", "n_embd", "q", None, None),
        **{name: (*leaf, None, None) for name, leaf in mlp.items()},
    }
    places = {"embed_tokens.weight": Place("wte", None, (model.vocab_size, d))}
    for i in range(model.n_layer):
        for name, (leaf, outputs, inputs, part, sign) in linear.items():
            shape = width[outputs], width[inputs]
            kernel = Place(f"h/{leaf}_kernel", i, shape, part, True, sign)
            places[f"layers.{i}.{name}.weight"] = kernel
            if name.startswith(biased):
                bias = Place(f"h/{leaf}_bias", i, shape[:1], part, signs=sign, absent=0.0)
                places[f"layers.{i}.{name}.bias"] = bias
        for name, leaf in (gains or {}).items():
            size = k if leaf.startswith("attn/") else d
            places[f"layers.{i}.{name}.weight"] = Place(f"h/{leaf}", i, (size,), absent=1.0)
    if gains:
        places["norm.weight"] = Place("ln_f/scale", None, (d,), absent=1.0)
    if not model.tie_word_embeddings:
        places["lm_head.weight"] = Place("head_kernel", None, (model.vocab_size, d))
    return places


def _places(kind: _Kind, model: ModelConfig) -> dict[str, Place]:
    gains = {"input_layernorm": "ln_1/scale", "post_attention_layernorm": "ln_2/scale"}
    if kind.qk_norm:
        gains |= {"self_attn.q_norm": "attn/q_gain", "self_attn.k_norm": "attn/k_gain"}
    biased = kind.biased if model.bias or kind.settings is _Qwen2 else ()
    return rotary_places(model, GATED_MLP, biased, gains)


def fits_rotary(model: ModelConfig) -> dict[str, tuple]:
    """Return what keys of a model may be in all formats with rotations."""
    return {
        "position": ("rope",),
        "norm": ("rmsnorm",),
        "attention_scale": (None, model.head_dim**-0.5),
        "residual_scalars": (False,),
        "value_embeddings": (False,),
        "smear": (False,),
        "backout": (False,),
        "ngram_rows": (0,),
        "bias": (False,),
        "qkv_bias": (False,),
    }


def _fits(kind: _Kind, model: ModelConfig) -> dict[str, tuple]:
    fits = fits_rotary(model) | {
        "mlp": tuple(GATES),
        "embedding_norm": (False,),
        "logit_softcap": (0.0,),
        "qk_norm": (kind.qk_norm,),
    }
    windows = set(model.windows)
    if kind.settings is _Llama:
        fits["window"] = (None,) if any(windows) else (model.window,)
        fits["bias"] = (False, True)
        fits["qkv_bias"] = (False, True) if model.bias else (False,)
        if model.n_embd % model.n_head:  # its configuration refuses it, whatever head_dim is
            fits["n_embd"] = ("a multiple of n_head",)
    if kind.settings is _Mistral and len(windows) > 1:
        fits["window_pattern"] = ("S", "L")
    if kind.settings is _Qwen2:
        fits["qkv_bias"] = (False, True)
    return fits


def config_rotary(model: ModelConfig) -> dict[str, Any]:
    """Return what config.json of all formats with rotations says of a model."""
    rope, scaling = {"rope_type": "default"}, model.rope_scaling
    if scaling:
        keys = {"rope_type", "factor", *_ROPE_KEYS[scaling.rope_type]}
        rope = scaling.model_dump(include=keys, exclude_none=True)
    return {
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "hidden_size": model.n_embd,
        "head_dim": model.head_dim,
        "intermediate_size": model.inner,
        "max_position_embeddings": model.block_size,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rms_norm_eps": model.norm_eps or RMS_NORM_EPS,
        "attention_dropout": model.dropout,
        "pad_token_id": None,
        # transformers 5 reads the first; versions before it and other programs the others.
        "rope_parameters": {**rope, "rope_theta": model.rope_base},
        "rope_theta": model.rope_base,
        "rope_scaling": rope if scaling else None,
    }


def _config(kind: _Kind, model: ModelConfig) -> dict[str, Any]:
    acts = {ours: name for name, ours in reversed(_ACTS.items())}
    values = {
        "architectures": [f"{kind.name}ForCausalLM"],
        "model_type": kind.name.lower(),
        **config_rotary(model),
        "hidden_act": acts[model.mlp],
    }
    windows = model.windows
    if kind.settings is _Llama:
        return {**values, "attention_bias": model.bias, "mlp_bias": model.bias}
    if kind.settings is _Mistral:
        return {**values, "sliding_window": windows[0]}
    return {
        **values,
        "use_sliding_window": any(windows),
        "sliding_window": model.window if any(windows) else None,
        "max_window_layers": model.n_layer,  # which layer_types says in detail
        "layer_types": [_SLIDING if window else _FULL for window in windows],
    }


def _format(*kind: Any) -> Format:
    kind = _Kind(*kind)
    parts = (partial(part, kind) for part in (_describe, _places, _config, _fits))
    return Format(kind.name, "model.", *parts)


_QKV = ("self_attn.q", "self_attn.k", "self_attn.v")
FORMATS = {
    "llama": _format("Llama", _Llama, ("self_attn.", "mlp."), False),
    "mistral": _format("Mistral", _Mistral, (), False),
    "qwen2": _format("Qwen2", _Qwen2, _QKV, False),
    "qwen3": _format("Qwen3", _Qwen3, (), True),
}

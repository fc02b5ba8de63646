"""The model and optimizer sections, with their presets, decide the loss curve; no JAX here."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from scalegpt.config.architectures import LATER, PRESETS
from scalegpt.config.types import (
    Amount,
    Integer,
    Positive,
    Rate,
    Section,
    Share,
    Whole,
    Width,
    divisors_near,
)
from scalegpt.errors import Mistake

# Muon's defaults, where AdamW's would be wrong: Muon's updates all have the same size, so that the
# learning rate alone sets the pace, and the parameters that AdamW trains beside it need their own.
MUON = {
    "lr": 0.02,
    "min_lr": 0.0,
    "schedule": "wsd",
    "cooldown": 0.7,
    "warmup_steps": 0,
    "beta1": 0.8,
    "eps": 1e-10,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "decay": "no_embeddings",
    "embedding_lr": 0.3,
    "head_lr": 0.008,
    "scalar_lr": 0.015,
    "momentum": 0.95,
    "row_beta2": 0.0,
}
# The decay of the fast one of Muon's two momenta (KellerJordan/modded-nanogpt#340).
FAST_MOMENTUM = 0.85
# What Muon has instead with a preset of architectures.
_MODERN = {"momentum": 0.9, "row_beta2": 0.95}
MUON_WITH: dict[str, dict[str, Any]] = {
    "modern": _MODERN,
    # Tables that see each id seldom overfit first (configs/README.md).
    "many_epochs": {**_MODERN, "embedding_lr": 0.1, "head_lr": 0.003},
}
# Muon's defaults that the model decides.
OF_MODEL = set().union(*MUON_WITH.values())

# Tried on tinyshakespeare, 400 updates: 0.3 ends at 2.05, 0.02 at 1.89, 0.008 and 0.004 at 1.91.
TIED_EMBEDDING_LR = 0.02


def muons(model: dict[str, Any]) -> dict[str, Any]:
    """Return Muon's defaults for a model section, which may not be validated yet.

    A tied embedding table is the head, too, and starts fifty times smaller than a modern one: the
    embedding rate for a modern table would wreck it.
    """
    preset, tied = str(model.get("preset")), model.get("tie_word_embeddings")
    if tied is None:
        tied = PRESETS.get(preset, {}).get("tie_word_embeddings", True)
    tied = str(tied).lower() not in _FALSE
    of_table = {"embedding_lr": TIED_EMBEDDING_LR} if tied else {}
    return MUON | MUON_WITH.get(preset, {}) | of_table


def following(model: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
    """Return Muon's defaults that follow from a model section and that an optim section, too, does
    not give; neither need be validated yet."""
    missing = {key: value for key, value in muons(model).items() if optim.get(key) is None}
    stored = {"ns_steps", "momentum_warmup", "beta1", "beta2", "eps", *MUON} - {"row_beta2"}
    if "row_beta2" in missing and stored <= optim.keys():
        del missing["row_beta2"]  # a run of before there was this key has stored all others
    return {key: value for key, value in missing.items() if key in OF_MODEL}


_FALSE = ("false", "0", "off", "no", "f", "n")  # as pydantic reads a command line


class RopeScaling(Section):
    """How rotations slow down for texts longer than a model was trained on, with the names and the
    defaults of transformers' `rope_scaling`."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """linear: all; llama3: those of long wavelengths; yarn: these, too (arXiv:2309.00071)"""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """how much slower the slowest rotate"""
    original_max_position_embeddings: Positive | None = None
    """the length of the texts before, for llama3 and yarn"""
    low_freq_factor: Share = 1.0
    """llama3: what rotates fewer times in a text before slows down by the factor"""
    high_freq_factor: Share = 4.0
    """llama3: what rotates more often stays"""
    beta_fast: Share = 32.0
    """yarn: what rotates more often stays"""
    beta_slow: Share = 1.0
    """yarn: what rotates fewer times slows down by the factor"""
    truncate: bool = True
    """yarn: both bounds are rounded, outwards, to whole dimensions"""
    attention_factor: Share | None = None
    """yarn: queries and keys are multiplied by it; default: 1 + 0.1 ln(factor)"""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.rope_type != "linear" and self.original_max_position_embeddings is None:
            raise Mistake(
                f"model.rope_scaling of type {self.rope_type} needs "
                "original_max_position_embeddings, the length of the texts before"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise Mistake(
                    f"model.rope_scaling has {low}={getattr(self, low)}, which must be below "
                    f"{high}={getattr(self, high)}"
                )
        return self


class ModelConfig(Section):
    """The GPT's architecture; the defaults are nanoGPT's 124M model, presets are others."""

    preset: Literal[tuple(PRESETS)] | None = None
    """gpt2*: its n_layer, n_head, n_embd, block_size 1024, bias; llama-*: sizes of Llama; modern,
    many_epochs (as modern; muon with lower rates of embeddings and head), nanochat, llama:
    architectures of any size; keys that are given override the preset's"""
    depth: Annotated[Integer, Field(ge=1, le=1000)] | None = None
    """one dial: layers, from which width, heads, batch, optimizer, rates and updates follow by the
    rules of scalegpt/config/depth.py; keys that are given stay"""
    n_layer: Annotated[Integer, Field(ge=1, le=10_000)] = 12
    """number of layers"""
    n_head: Width = 12
    """number of attention heads; divides n_embd, unless head_size is given"""
    n_kv_head: Width | None = None
    """number of heads of keys and values, which queries share in groups; divides n_head, its
    default"""
    head_size: Width | None = None
    """width of a head; default: n_embd / n_head"""
    n_embd: Width = 768
    """width of the residual stream"""
    block_size: Positive = 1024
    """context length, in tokens"""
    vocab_size: Annotated[Integer, Field(ge=1, le=2**30)] | None = None
    """number of token ids; taken from the data set when not given"""
    isolate: bool | None = None
    """attention stays within a conversation, or with plain text within a document, and learned
    positions begin anew with each; default: with conversations, and with data.document_mask"""
    bos: Whole | None = None
    """the id that a conversation begins with, for isolate; follows from the data"""
    vocab_multiple: Width = 128
    """the embedding table is padded to a multiple of this (50257 -> 50304); the tail is masked"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of activations that training zeroes at random"""
    bias: bool = False
    """biases in linear layers and LayerNorms (GPT-2: true, nanoGPT: false)"""
    qkv_bias: bool = False
    """biases of queries, keys and values alone (Qwen2)"""
    tie_word_embeddings: bool = True
    """the head is the embedding table itself (GPT-2, nanoGPT); false: a table of its own"""
    position: Literal["learned", "rope"] = "learned"
    """a learned embedding of each position, or rotation of queries and keys (RoPE)"""
    rope_base: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    """with rope: the base of the rotation's wavelengths"""
    rope_scaling: RopeScaling | None = None
    """with rope: slower rotations for texts longer than before, {rope_type: linear, llama3 or yarn,
    factor: ...} with the keys of transformers"""
    window: Positive | None = None
    """how many positions one attends to in a layer with a window, itself included"""
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")] = "S"
    """with window: which layers have it, as letters that repeat over them: S has it, L sees all"""
    attention_scale: Share | None = None
    """what products of queries and keys are multiplied by; default: 1 / sqrt(head size)"""
    mlp: Literal["plain", "swiglu", "geglu", "geglu_tanh"] = "plain"
    """plain: two matrices around the activation; the others have a third, a gate through SiLU or
    GELU (exact or by tanh) that the first one's result is multiplied with"""
    n_inner: Width | None = None
    """width within the MLP; default: 4 n_embd, with a gate 8/3 n_embd up to a multiple of 256"""
    activation: Literal["gelu_tanh", "gelu", "relu2", "relu", "silu"] = "gelu_tanh"
    """GPT-2's tanh approximation, the exact GELU of nanoGPT, the square of ReLU, or others"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """rmsnorm divides by the root mean square"""
    norm_gain: bool = False
    """rmsnorm, in the layers, before the head and for qk_norm, multiplies by a learned gain; a
    layernorm always does"""
    norm_eps: Share | None = None
    """what norms add to the mean square; default: 1e-5 for layernorm, 1e-6 for rmsnorm"""
    qk_norm: bool = False
    """queries and keys are normalised (rmsnorm) in each head, before rotation"""
    embedding_norm: bool = False
    """the embeddings are normalised (rmsnorm) before the first layer"""
    init: Literal["gpt2", "zero_out"] = "gpt2"
    """gpt2: N(0, 0.02), smaller for projections into the residual stream; zero_out: 0 for those and
    for an untied head, embeddings N(0, 1), other matrices N(0, 0.25 / rows)"""
    logit_softcap: Amount = 0.0
    """logits z become less than c, by the function that softcap names; 0: none"""
    softcap: Literal["rsqrt", "tanh"] = "rsqrt"
    """with logit_softcap c: c z / sqrt(z^2 + c^2), or c tanh(z / c)"""
    residual_scalars: bool = False
    """each layer reads a x + b x0, with x0 the input of the first; a, b learned from 1 and 0"""
    smear: bool = False
    """each embedding gets a share of the one before, by a gate that is learned from 0"""
    ngram_rows: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = 0
    """rows of a table of embeddings for pairs of tokens and longer n-grams, found by a hash, which
    are added to those of tokens; 0: none"""
    ngram: Annotated[Integer, Field(ge=2, le=8)] = 2
    """with ngram_rows: how many tokens the longest n-gram has"""
    backout: bool = False
    """a share of what the middle layer gave, learned from 0.2, is subtracted before the head"""
    value_embeddings: bool = False
    """each layer adds to its attention values an embedding of the token, from its own table"""
    value_gates: bool = False
    """with value_embeddings: a gate that is learned says how much of it each head gets, from 1"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products; auto: bfloat16 on accelerators that have it, else float32"""
    attention: Literal["auto", "xla", "flax", "cudnn", "splash"] = "auto"
    """the implementation: cudnn is for NVIDIA GPUs, splash for TPUs; auto: by device"""
    scan_layers: bool = False
    """compile one layer and loop over it (fast compile), or unroll (fast step on CPU and TPU)"""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """what the backward pass recomputes: little, all but matrix products, whole layers; offload: as
    dots, with the products in the host's memory meanwhile"""
    loss_chunk: Positive = 128
    """positions of each sequence whose logits are in memory at a time"""

    @model_validator(mode="wrap")
    @classmethod
    def _fill_preset(cls, values: Any, make: Callable[[Any], "ModelConfig"]) -> "ModelConfig":
        if not isinstance(values, dict):
            return make(values)
        preset = PRESETS.get(str(values.get("preset")), {})
        # A run of before a key of LATER has stored all others, also those that no preset sets.
        stored = {*preset, "scan_layers", "remat", "loss_chunk", "dtype", "attention"}
        if stored - LATER <= values.keys():
            preset = {}
        model = make({**preset, **values})
        model.model_fields_set.difference_update(LATER - values.keys())
        return model

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.head_size is None and self.n_embd % self.n_head:
            raise Mistake(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; "
                f"n_head could be {divisors_near(self.n_embd, self.n_head)}"
            )
        if self.n_head % self.kv_heads:
            raise Mistake(
                f"model.n_head={self.n_head} is not divisible by model.n_kv_head={self.n_kv_head}; "
                f"n_kv_head could be {divisors_near(self.n_head, self.kv_heads)}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise Mistake(
                f"model.position=rope needs an even head size, n_embd/n_head={self.head_dim}"
                if self.head_size is None
                else f"model.position=rope needs an even model.head_size, not {self.head_size}"
            )
        if self.window is None and self.window_pattern != "S":
            raise Mistake(
                f"model.window_pattern={self.window_pattern} needs model.window, how many "
                "positions its layers S see"
            )
        if self.rope_scaling and self.rope_scaling.rope_type == "yarn" and self.rope_base <= 1:
            raise Mistake(f"model.rope_base={self.rope_base} must be above 1 for yarn")
        return self

    @property
    def begins_in_batch(self) -> bool:
        """Whether batches say where documents begin, by BEGINS; data.document_mask has it so."""
        return bool(self.isolate) and self.bos is None

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """The number of heads that keys and values have."""
        return self.n_kv_head or self.n_head

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window, or None where it sees all positions before."""
        pattern = self.window_pattern
        letters = (pattern[i % len(pattern)] for i in range(self.n_layer))
        return tuple(self.window if letter == "S" else None for letter in letters)

    @property
    def inner(self) -> int:
        """The width within the MLP."""
        gated = -(-8 * self.n_embd // (3 * 256)) * 256
        return self.n_inner or (4 * self.n_embd if self.mlp == "plain" else gated)

    @property
    def lookback(self) -> int:
        """How many tokens before one its input depends on."""
        return max(self.smear, self.ngram - 1 if self.ngram_rows else 0)

    @property
    def padded_vocab(self) -> int:
        """The number of rows of the embedding table."""
        assert self.vocab_size is not None, "the vocabulary is known once the data is open"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class LoraConfig(Section):
    """LoRA: the weights of run.init_from stay, and a small change of each matrix is trained."""

    rank: Whole = 0
    """rank of the trained change of each matrix of the layers (LoRA), as 16; 0: all is trained"""
    alpha: Share = 32.0
    """the change is multiplied by alpha / rank, so that one learning rate suits all ranks"""
    marks: Whole | None = None
    """with conversations, the first id of the chat's marks, whose embeddings are trained, too;
    follows from the data"""


NO_LORA = LoraConfig()


class OptimConfig(Section):
    """The optimizer, its learning rate schedule, and the length of the run in updates."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, AdamW for the rest, and defaults of its own for
    lr, min_lr, schedule, cooldown, warmup_steps, beta1, eps, weight_decay, decay and grad_clip"""
    lr: Share = 6e-4
    """peak learning rate; with muon: that of the matrices"""
    embedding_lr: Share | None = None
    """with muon: AdamW's peak learning rate for embeddings, by the same schedule"""
    head_lr: Share | None = None
    """with muon: AdamW's peak learning rate for an untied head"""
    scalar_lr: Share | None = None
    """with muon: AdamW's peak learning rate for norms, biases and scalars"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """with muon: Nesterov momentum; presets modern and many_epochs: 0.9, but not by model.depth"""
    momentum_warmup: Whole = 0
    """with muon: updates in which the momentum rises from 0.85"""
    momentum_slow: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """with muon: after 0.3 of the run the momentum is a mean of two, whose decays are 0.85 and
    this, as 0.98, in proportion 0.44 to 0.56; 0: it is one"""
    ns_steps: Annotated[Integer, Field(ge=1, le=20)] = 5
    """with muon: Newton-Schulz iterations of an update"""
    row_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """with muon: decay of the mean square of each row of an orthogonalised update, by whose root
    the row is divided (NorMuon); 0: rows are as they are; presets modern and many_epochs: 0.95"""
    average: Rate = 0.0
    """share of the run, at its end, over which the weights are averaged; the average is evaluated
    and saved for use. 0: the last weights are"""
    cautious_decay: bool = False
    """weight decay only for weights that the update shrinks, too"""
    decay_follows_lr: bool = False
    """weight_decay itself falls as the learning rate does: a weight shrinks by the square of it"""
    lookahead: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """updates between a sixth and three quarters of the run go on by this times the mean of the
    updates so far (EMA-Nesterov), as 0.6, in proportion to the learning rate; 0: they do not"""
    lookahead_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """with lookahead: decay of the mean update"""
    min_lr: Amount = 6e-5
    """learning rate at the end of the decay"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """after the warm-up; wsd stays at lr, then falls linearly in the last part"""
    steps: Positive = 600_000
    """optimizer updates of the whole run"""
    epochs: Share | None = None
    """how often the run sees its data, which sets steps where these are not given"""
    warmup_steps: Whole = 2000
    """updates in which the learning rate rises to its peak"""
    decay_steps: Positive | None = None
    """update at which min_lr is reached; default: steps"""
    cooldown: Rate = 0.2
    """share of decay_steps in which wsd falls"""
    cooldown_power: Share = 1.0
    """wsd falls as this power of what is left of the cooldown; 1: linearly"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the mean squared gradient"""
    eps: Share = 1e-8
    """AdamW's addition to the root of the mean squared gradient"""
    weight_decay: Amount = 0.1
    """an update takes this times the learning rate off a weight"""
    decay: Literal["matrices", "no_embeddings", "all"] = "matrices"
    """which parameters decay: matrices and embeddings (nanoGPT), matrices only, or all"""
    grad_clip: Amount = 1.0
    """largest global gradient norm; 0: no clipping"""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps", 0) is None and values.get("epochs"):
            values = {k: v for k, v in values.items() if k != "steps"}
        if isinstance(values, dict) and values.get("name") == "muon":
            # AdamW's runs store the rates that only Muon has as null, which means not given.
            given = {k: v for k, v in values.items() if v is not None or k not in MUON}
            return {**MUON, **given}
        return values

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "OptimConfig":
        end, warmup = self.decay_steps or self.steps, self.warmup_steps
        room = end - round(self.cooldown * end) if self.schedule == "wsd" else end
        fits = warmup <= room or warmup == end
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise Mistake(
                f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}; set --optim.min_lr too"
            )
        unread = {"embedding_lr", "head_lr", "scalar_lr", "momentum", "momentum_warmup", "ns_steps"}
        unread |= {"row_beta2", "momentum_slow"}
        if self.name == "adamw" and (
            given := sorted(
                key for key in unread if getattr(self, key) != OptimConfig.model_fields[key].default
            )
        ):
            raise Mistake(
                f"optim.{given[0]}={getattr(self, given[0])} is Muon's, and optim.name=adamw has "
                "no such key; leave it out, or set --optim.name=muon"
            )
        if 0 < self.momentum_slow < FAST_MOMENTUM:
            raise Mistake(
                f"optim.momentum_slow={self.momentum_slow} would forget sooner than the fast "
                f"momentum, {FAST_MOMENTUM}; give more, as 0.98, or 0 for one momentum"
            )
        if self.cautious_decay and not self.weight_decay:
            raise Mistake(
                "optim.cautious_decay=true decays nothing with optim.weight_decay=0, which is "
                "Muon's default; set --optim.weight_decay too"
            )
        if not fits and info.context is not None:  # loading.validate's notes
            shorter = min(end // 10, room)
            info.context.append(
                f"optim.warmup_steps={warmup} is shortened to {shorter} in {end:,} updates"
            )
            return self.model_copy(update={"warmup_steps": shorter})
        if warmup > end / 2 and info.context is not None:
            info.context.append(f"optim.warmup_steps={warmup} is most of the {end:,} updates")
        if warmup > end:
            raise Mistake(
                f"optim.warmup_steps={warmup} is beyond the end of the decay, "
                f"update {end}; lower it or raise optim.steps"
            )
        if not fits:
            raise Mistake(
                f"optim.warmup_steps={warmup} reaches into wsd's cooldown, the last "
                f"{self.cooldown:.0%} of {end} updates, where the rate would jump; lower either"
            )
        return self

    @property
    def counts_epochs(self) -> bool:
        """Whether `steps` follow from `epochs` and the data, and are not known yet."""
        return self.epochs is not None and "steps" not in self.model_fields_set

"""Estimate the memory of the training step on one device, in bytes, by arithmetic.

No device is touched, as in model/flops.py. State and gradients are exact; the rest
estimates what XLA keeps for layers that are scanned (model.scan_layers), at that time of the step
which needs the most. tools/planning/memory.json has it beside the peaks that the TPUs' compiler
states. Unrolled layers may need less on a TPU, and on a CPU, where the estimate is down to 0.6 of
what XLA allots and XLA then ignores model.remat, as much as without remat. The compiler has the
last word: `scalegpt.plan --verify`.
"""

from collections.abc import Mapping
from math import prod

from scalegpt.config.recipe import NO_LORA, LoraConfig, ModelConfig, OptimConfig
from scalegpt.model.flops import parameter_count
from scalegpt.model.lora import is_trained
from scalegpt.model.parameters import Parameter, parameters
from scalegpt.step.sharding import RULES

_ADAMW = OptimConfig()
REMAT = ("none", "dots", "full", "offload")
ON_THE_WAY = 4  # layers whose products a device has with remat=offload, by the TPUs' compiler


def parameters_on_device(
    model: ModelConfig, mesh: Mapping[str, int], kind: str = "", lora: LoraConfig = NO_LORA
) -> int:
    """Count the parameters on each device, padded rows included, split as sharding.RULES says.

    mesh: sizes of its axes, 1 if not given. kind: of the parameters to count, or "trained", if not
    all.
    """

    def shards(parameter: Parameter) -> int:
        rules = (RULES[axis] or () for axis in parameter.axes if axis)
        axes = [axis for rule in rules for axis in ((rule,) if isinstance(rule, str) else rule)]
        return prod(mesh.get(axis, 1) for axis in axes)

    def is_wanted(path: str, parameter: Parameter) -> bool:
        if kind == "trained":
            return is_trained(lora, path.rpartition("/")[2])
        return kind in ("", parameter.kind)

    wanted = [p for path, p in parameters(model, lora).items() if is_wanted(path, p)]
    return sum(prod(p.shape) // shards(p) for p in wanted)


def moment_bytes(count: int, matrices: int, optim: OptimConfig) -> int:
    """Count the bytes of moments, mean updates and averaged weights, float32. AdamW has two moments
    of each of `count` parameters, Muon with one momentum one less for the layers' matrices."""
    has_one = optim.name == "muon" and not optim.momentum_slow
    spared = matrices if has_one else 0  # optim.row_beta2 adds too few to count
    kept = 2 + bool(optim.average) + bool(optim.lookahead)
    return 4 * (kept * count - spared)


def products(model: ModelConfig, mesh: Mapping[str, int], microbatch: int, itemsize: int) -> float:
    """Count the bytes of a microbatch on each device that remat=dots keeps of all layers, and
    remat=offload sends to the host's memory: what is named "project" in model/.

    These are queries, keys and values, what attention gives before and after its projection, and
    the MLP's inner products. mesh, microbatch, itemsize: as in `on_device`.
    """
    tokens = microbatch * model.block_size / mesh.get("context", 1)
    heads = 2 * (model.n_head + model.kv_heads) * model.head_dim
    widths = model.n_embd + heads + _mlp_width(model)
    return model.n_layer * tokens * itemsize * widths / mesh["tensor"]


def _mlp_width(model: ModelConfig) -> int:
    """Return how many values the MLP's first products have for a position."""
    return model.inner if model.mlp == "plain" else 2 * model.inner


def on_device(
    model: ModelConfig,
    mesh: Mapping[str, int],
    microbatch: int,
    accumulation: int,
    itemsize: int,
    fused_attention: bool,
    remat: str | None = None,
    optim: OptimConfig = _ADAMW,
    lora: LoraConfig = NO_LORA,
) -> dict[str, int]:
    """Estimate the bytes on each device when it needs the most; their sum is the peak.

    mesh: sizes of fsdp, tensor and context. microbatch: sequences of one device (or group of tensor
    and context shards). itemsize: bytes of an element in matrix products, 2 or 4. fused_attention:
    no T x T scores are saved; true of cuDNN and splash, and of XLA unless on a CPU or with dropout.
    remat: in place of the model's own.
    """
    remat = remat or model.remat
    L, D, T, tensor = model.n_layer, model.n_embd, model.block_size, mesh["tensor"]
    rows = model.padded_vocab // tensor
    context = mesh.get("context", 1)
    fsdp = mesh["fsdp"] * context
    tokens = microbatch * T // context
    count = parameters_on_device(model, mesh, lora=lora)
    trained = parameters_on_device(model, mesh, "trained", lora)
    matrices = parameters_on_device(model, mesh, "matrices")

    # Fitted: for a score, float32 weights and 2.5 copies in the products' dtype; for the rest, of
    # GPT-2, 17 values a position and channel, 12 of which are split over tensor: queries and what
    # attention gives, keys and values, and the MLP before and after its activation.
    scores = 0 if fused_attention else tokens * T * model.n_head // tensor
    queries, keys = (heads * model.head_dim for heads in (model.n_head, model.kv_heads))
    up = _mlp_width(model)
    heads = (2 * queries + 2 * keys) / tensor
    # The stream between products is split by positions over tensor, but not, where there is fsdp,
    # the two inputs of products that are gathered for these. Without, XLA gathers these again.
    stream = 5 * D / tensor + (2 * D * (1 - 1 / tensor) if fsdp > 1 else 0)
    layer = tokens * itemsize * (stream + heads + 2 * up / tensor) + scores * (4 + 2.5 * itemsize)
    if model.qk_norm:  # what the norms read, in float32
        layer += 4 * tokens * (queries + keys) / tensor
    inputs = L * tokens * itemsize * D / tensor  # of the layers
    named = products(model, mesh, microbatch, itemsize)
    activations = {
        "none": L * layer,
        "dots": inputs + named,
        "full": inputs,
        "offload": inputs + named * min(1, ON_THE_WAY / L),
    }[remat]
    # Keys and values of all positions and their gradients, where a device has some of these; the
    # MLP's values are not there then.
    gathered = 4 * microbatch * T * itemsize * keys / tensor if context > 1 else 0
    scratch = max(layer, gathered + tokens * itemsize * (stream + heads))
    positions = min(model.loss_chunk, T // context)
    # Logits, what their exponentials are, and their gradient.
    logits = 1.5 * microbatch * positions * rows * (4 + itemsize)
    # Of the weights cast or gathered for products, two layers exist at a time. With LoRA they are
    # made in the forward pass, and without remat kept for the backward pass.
    layers = L if lora.rank and remat == "none" else 2
    used_in_place = itemsize == 4 and fsdp == 1 and not lora.rank
    copies = 0 if used_in_place else itemsize * layers * matrices * fsdp // L
    head = 0 if used_in_place else itemsize * rows * D
    # The float32 gradients of the head and the embeddings are whole until they are scattered to
    # their shards, which is after the layers' backward pass. A tied table stays gathered, too, over
    # all microbatches.
    whole = 4 * rows * D if fsdp > 1 else 0
    tables = whole + (4 * (model.padded_vocab + model.ngram_rows) * D if fsdp > 1 else 0)
    orthogonal = 4 * matrices if optim.name == "muon" else 0  # the updates, for all copies
    state = {
        "weights": 4 * count,
        "moments": moment_bytes(trained, matrices, optim),
        "gradients": 4 * trained,
        "gradients of a microbatch": 4 * trained if accumulation > 1 else 0,
    }
    tied = accumulation > 1 and model.tie_word_embeddings
    phases = (  # of the loss, of the layers' backward pass, of the embeddings', of the update
        (head, whole * (1 + tied), activations, logits),
        (copies, whole, activations, 0 if remat == "none" else scratch),
        (0, whole + tables, 0, 0),
        (0, 0, 0, orthogonal),
    )
    copied, gathered, kept, scratch = max(phases, key=sum)
    return state | {
        "weights as products use them": copied,
        "whole tables and gradients": gathered,
        "activations kept": round(kept),
        "scratch": round(scratch),
    }


def checkpoint_bytes(model: ModelConfig, optim: OptimConfig, lora: LoraConfig = NO_LORA) -> int:
    """Count the bytes of weights and moments: 1.49 GB for nanoGPT's 124M, as its notebook does."""
    one, count = {"fsdp": 1, "tensor": 1}, parameter_count(model)
    if lora.rank:
        adapters = parameters_on_device(model, one, "adapters", lora)
        trained = parameters_on_device(model, one, "trained", lora)
        return 4 * (count + adapters) + moment_bytes(trained, 0, optim)
    return 4 * count + moment_bytes(count, parameters_on_device(model, one, "matrices"), optim)

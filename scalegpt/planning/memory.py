"""Estimate the memory of the training step on one device, in bytes, by arithmetic.

No device is touched, as in model/flops.py. State and gradients are exact; the rest
estimates what XLA keeps for layers that are scanned (model.scan_layers). The estimate was within
20 % of `memory_analysis()` for TPU programs (v3, v4, v5e; bfloat16; 43M to 1.5B parameters; chunked
logits), and down to 0.6 of it on a CPU. With a term for fsdp that six more of them showed (v3 to
tpu7x; data, fsdp, tensor, two slices) it is 0.94 to 1.02 of their peaks. Unrolled layers may need
half as much on a TPU, and on a CPU, where XLA then ignores model.remat, as much as without remat.
The compiler has the last word: `scalegpt.plan --verify`.
"""

from collections.abc import Mapping
from math import prod

from scalegpt.config.recipe import NO_LORA, LoraConfig, ModelConfig, OptimConfig
from scalegpt.model.flops import parameter_count
from scalegpt.model.lora import is_trained
from scalegpt.model.parameters import Parameter, parameters
from scalegpt.step.sharding import RULES

_ADAMW = OptimConfig()
REMAT = ("none", "dots", "full")


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
    of each of `count` parameters, Muon one less for the layers' matrices."""
    spared = matrices if optim.name == "muon" else 0  # optim.row_beta2 adds too few to count
    kept = 2 + bool(optim.average) + bool(optim.lookahead)
    return 4 * (kept * count - spared)


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
    """Estimate the bytes on each device while it trains; their sum is the peak.

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
    tokens = microbatch * T // context  # the residual stream is not split over tensor
    count = parameters_on_device(model, mesh, lora=lora)
    trained = parameters_on_device(model, mesh, "trained", lora)
    matrices = parameters_on_device(model, mesh, "matrices")

    # Fitted: for a score, float32 weights and 2.5 copies in the products' dtype; for the rest, of
    # GPT-2, 17 values a position and channel, 12 of which are split over tensor: queries and what
    # attention gives, keys and values, and the MLP before and after its activation.
    scores = 0 if fused_attention else tokens * T * model.n_head // tensor
    queries, keys = (heads * model.head_dim for heads in (model.n_head, model.kv_heads))
    up = model.inner if model.mlp == "plain" else 2 * model.inner
    split = (2 * queries + 2 * keys + up + up) / tensor
    layer = tokens * itemsize * (5 * D + split) + scores * (4 + 2.5 * itemsize)
    # Keys and values of all positions and their gradients, where a device has some of these.
    gathered = 4 * microbatch * T * itemsize * keys / tensor if context > 1 else 0
    split = (queries + 2 * keys + up) / tensor
    activations = {
        "none": L * layer,
        "dots": L * tokens * itemsize * (3 * D + split),
        "full": L * tokens * D * itemsize,
    }[remat]
    positions = min(model.loss_chunk, T // context)
    logits = microbatch * positions * rows * (4 + itemsize)  # and their gradient
    # One layer's backward pass and the logits are never alive together. Without remat a layer
    # recomputes nothing.
    scratch = max(gathered + (0 if remat == "none" else layer), logits)
    # Of the weights cast or gathered for products, two layers and the head exist at a time. With
    # LoRA they are made in the forward pass, and without remat kept for the backward pass.
    layers = L if lora.rank and remat == "none" else 2
    used_in_place = itemsize == 4 and fsdp == 1 and not lora.rank
    copies = 0 if used_in_place else itemsize * (layers * matrices * fsdp // L + rows * D)
    if fsdp > 1:
        # In float32: step/loss.py's copy of the head and its gradient, and the whole gradients of
        # the embeddings before they are scattered to their shards.
        copies += 8 * rows * D + 4 * (model.padded_vocab + model.ngram_rows) * D
    return {
        "weights": 4 * count,
        "moments": moment_bytes(trained, matrices, optim),
        "gradients": 4 * trained,
        "gradients of a microbatch": 4 * trained if accumulation > 1 else 0,
        "weights as products use them": copies,
        "activations kept": round(activations),
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

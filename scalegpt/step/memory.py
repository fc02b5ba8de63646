"""Estimate the memory of the training step on one device, in bytes, by arithmetic.

These are plain integers without JAX, as in model/flops.py. State and gradients are exact; the rest
estimates what XLA keeps for layers that are scanned (model.scan_layers). The estimate was within
20 % of `memory_analysis()` for TPU programs (v3, v4, v5e; bfloat16; 43M to 1.5B parameters; chunked
logits), and down to 0.6 of it on a CPU. Unrolled layers may need half as much on a TPU, and on a
CPU, where XLA then ignores model.remat, as much as without remat. The compiler has the last word:
`scalegpt.train --compile-only`.
"""

from collections.abc import Mapping
from typing import Any

from scalegpt.config.recipe import OptimConfig
from scalegpt.model.flops import parameter_count

_ADAMW = OptimConfig()
REMAT = ("none", "dots", "full")


def parameters_on_device(model: Any, mesh: Mapping[str, int]) -> int:
    """Count the parameters on each device, padded rows of the tables included.

    They are split as sharding.RULES says: matrices over fsdp and tensor, positions over fsdp, the
    biases inside attention and MLP over tensor, norms and the other biases not at all.
    """
    L, D, fsdp, tensor = model.n_layer, model.n_embd, mesh["fsdp"], mesh["tensor"]
    tables = 1 if model.tie_word_embeddings else 2
    tables += L * model.value_embeddings
    matrices = 12 * L * D * D + tables * model.padded_vocab * D
    scalars = 2 * L * model.residual_scalars + L * model.n_head * model.value_embeddings
    positions = model.block_size * D if model.position == "learned" else 0
    norms = (2 * L + 1) * D if model.norm == "layernorm" else 0
    biases = 7 * L * D // tensor + 2 * L * D + norms if model.bias else 0
    return matrices // (fsdp * tensor) + positions // fsdp + norms + biases + scalars


def moment_bytes(parameters: int, model: Any, optim: OptimConfig, shards: int = 1) -> int:
    """Count the bytes of moments and averaged weights, float32. AdamW has two moments of each
    parameter, Muon one less for the layers' matrices, which are split into `shards`."""
    spared = 12 * model.n_layer * model.n_embd**2 // shards if optim.name == "muon" else 0
    return (12 if optim.average else 8) * parameters - 4 * spared


def on_device(
    model: Any,
    mesh: Mapping[str, int],
    microbatch: int,
    accumulation: int,
    itemsize: int,
    fused_attention: bool,
    remat: str | None = None,
    optim: OptimConfig = _ADAMW,
) -> dict[str, int]:
    """Estimate the bytes on each device while it trains; their sum is the peak.

    mesh: sizes of fsdp and tensor. microbatch: sequences of one device (or group of tensor
    shards). itemsize: bytes of an element in matrix products, 2 or 4. fused_attention: no T x T
    scores are saved; true of cuDNN and splash, and of XLA unless on a CPU or with dropout.
    remat: in place of the model's own.
    """
    remat = remat or model.remat
    L, D, T, tensor = model.n_layer, model.n_embd, model.block_size, mesh["tensor"]
    rows = model.padded_vocab // tensor
    tokens = microbatch * T  # the residual stream is not split over tensor
    parameters = parameters_on_device(model, mesh)

    # Fitted: for a score, float32 weights and 2.5 copies in the products' dtype; for the rest, 17
    # values a position and channel, 12 of which are split over tensor.
    scores = 0 if fused_attention else tokens * T * model.n_head // tensor
    layer = tokens * D * itemsize * (5 + 12 / tensor) + scores * (4 + 2.5 * itemsize)
    activations = {
        "none": L * layer,
        "dots": L * tokens * D * itemsize * (3 + 7 / tensor),
        "full": L * tokens * D * itemsize,
    }[remat]
    logits = microbatch * min(model.loss_chunk, T) * rows * (4 + itemsize)  # and their gradient
    # One layer's backward pass and the logits are never alive together. Without remat a layer
    # recomputes nothing.
    scratch = logits if remat == "none" else max(layer, logits)
    # Of the weights cast or gathered for products, two layers and the head exist at a time.
    used_in_place = itemsize == 4 and mesh["fsdp"] == 1
    copies = 0 if used_in_place else itemsize * (24 * D * D // tensor + rows * D)
    return {
        "weights": 4 * parameters,
        "moments": moment_bytes(parameters, model, optim, mesh["fsdp"] * tensor),
        "gradients": 4 * parameters,
        "gradients of a microbatch": 4 * parameters if accumulation > 1 else 0,
        "weights as products use them": copies,
        "activations kept": round(activations),
        "scratch": round(scratch),
    }


def checkpoint_bytes(model: Any, optim: OptimConfig) -> int:
    """Count the bytes of weights and moments: 1.49 GB for nanoGPT's 124M, as its notebook does."""
    parameters = parameter_count(model)
    return 4 * parameters + moment_bytes(parameters, model, optim)

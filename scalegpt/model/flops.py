"""Count a run's parameters and FLOPs, and compare its speed with its devices' peak: MFU.

These are plain integers without JAX, so that a script or a test touches no device. `model` is a
ModelConfig, or anything with n_layer L, n_embd D, block_size T, vocab_size V (the logical
one: padded rows of the table are never counted), and the keys that say which parts it has.
"""

from collections.abc import Callable
from typing import Any


def parameters_by_component(model: Any) -> dict[str, int]:
    """Count each component's parameters, over all layers; they add up to `parameter_count`.

    GPT-2's layout as in nanoGPT: the MLP is 4 D wide, and a LayerNorm has a bias only when the
    linear layers have one. A tied head is `wte` itself.
    """
    L, D = model.n_layer, model.n_embd
    bias = int(model.bias)
    norm = D * (1 + bias) if model.norm == "layernorm" else 0
    learned = model.position == "learned"
    return {
        "wte": model.vocab_size * D,
        "wpe": model.block_size * D if learned else 0,
        "ln_1": L * norm,
        "attn/qkv": L * 3 * D * (D + bias),
        "attn/proj": L * D * (D + bias),
        "ln_2": L * norm,
        "mlp/fc": L * 4 * D * (D + bias),
        "mlp/proj": L * D * (4 * D + bias),
        "ln_f": norm,
        "head": 0 if model.tie_word_embeddings else model.vocab_size * D,
        "residual_scalars": 2 * L if model.residual_scalars else 0,
        "value_embeddings": L * (model.vocab_size * D + model.n_head) * model.value_embeddings,
    }


def parameter_count(model: Any) -> int:
    """Count all parameters, each once: 124,439,808 for GPT-2, or 124,337,664 without biases."""
    return sum(parameters_by_component(model).values())


def used_parameters(model: Any) -> int:
    """Count the parameters that multiply: not `wpe`, value embeddings or, with an own head, `wte`.

    This is the N of PaLM's and Chinchilla's formulas as nanoGPT's notebooks read them: 123,653,376
    for GPT-2.
    """
    sizes = parameters_by_component(model)
    looked_up = sizes["wpe"] + sizes["value_embeddings"] + (sizes["wte"] if sizes["head"] else 0)
    return sum(sizes.values()) - looked_up


def flops_by_component(model: Any, causal: bool = False) -> dict[str, int]:
    """Count the FLOPs of the forward pass over one sequence of block_size tokens, over all layers.

    Only matrix products count, 2 FLOPs for a multiply-add: the 12 D^2 weights of each layer, the
    head, and in attention q·k and scores·v (2 T^2 D each). Looking up embeddings costs nothing;
    norms, biases, GELU and softmax are left out. `causal`: only the useful half of T x T counts.
    Source: nanoGPT's transformer_sizing.ipynb, whose figures are those with causal=False.
    """
    L, T, D = model.n_layer, model.block_size, model.n_embd
    pairs = T * T * D if causal else 2 * T * T * D
    return {
        "attn/qkv": L * 2 * T * 3 * D * D,
        "attn/scores": L * pairs,
        "attn/reduce": L * pairs,
        "attn/proj": L * 2 * T * D * D,
        "mlp/fc": L * 2 * T * 4 * D * D,
        "mlp/proj": L * 2 * T * 4 * D * D,
        "head": 2 * T * D * model.vocab_size,
    }


def forward_flops(model: Any, causal: bool = False) -> int:
    """Count the forward FLOPs of one sequence: 291,648,307,200 for GPT-2 as nanoGPT counts."""
    return sum(flops_by_component(model, causal).values())


def flops_per_token(model: Any, causal: bool = True) -> float:
    """Count the FLOPs of training on a token, both passes: 6 N + 12 L T D (6 L T D if causal).

    N: weights of matrix products, head included. The backward pass costs twice the forward pass;
    recomputation (remat) is not model work and is not counted. Source: PaLM, arXiv:2204.02311,
    appendix B, which counts full attention.
    """
    return 3 * forward_flops(model, causal) / model.block_size


def palm_flops_per_token(model: Any) -> int:
    """Compute PaLM's 6 N + 12 L H Q T as it stands, which counts norms and biases as products too.

    Source: PaLM, arXiv:2204.02311, appendix B, with N as in nanoGPT's transformer_sizing.ipynb.
    """
    return 6 * used_parameters(model) + 12 * model.n_layer * model.n_embd * model.block_size


# Dense TFLOP/s of 16-bit matrix products with float32 accumulation, for one *JAX device*. Vendors
# like to print the figure with 2:4 sparsity, twice as high: it is halved here. Names are what
# `jax.devices()[0].device_kind` says, or their first words ("NVIDIA A100" for every A100).
PEAK_TFLOPS = {
    # Per chip: Cloud TPU documentation; names: jax/_src/pallas/mosaic/tpu_info.py. A device is
    # one core, half a chip, on v2, v3 and tpu7x; on v4 and v5p it is a chip (megacore).
    "TPU v2": 45 / 2,
    "TPU v3": 123 / 2,  # the scaling book and JAX say 140 a chip; Google's own page says 123
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 2307 / 2,
    # NVIDIA data sheets. T4 and V100 have no bfloat16 units: theirs is the float16 figure.
    "NVIDIA GB200": 2500,
    "NVIDIA B200": 2250,  # HGX B200
    "NVIDIA GH200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100": 989.5,  # SXM: "NVIDIA H100 80GB HBM3"
    "NVIDIA A100": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,  # AWS's variant has 70, though many tables give it the A10's 125
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121,
    "Tesla V100-PCIE": 112,
    "Tesla V100": 125,  # SXM2
    "Tesla T4": 65,
    # GeForce: white papers of GA102 and AD102, the row "with FP32 Accumulate".
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    # AMD data sheets. A device of an MI250X is one of its two dies (383 together).
    "AMD Instinct MI250X": 383 / 2,
    "AMD Instinct MI300X": 1307.4,
}
# A slice of a GPU, a laptop or a cut-down part shares the name but not the figure.
_OTHER_PART = {"MIG", "Laptop", "Max-Q", "D", "Ti", "lite"}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Return the dense peak FLOP/s of one JAX device, or None where unknown, as for a CPU.

    The longest name that `device_kind` starts with, as whole words, decides: "TPU v5 lite" is not
    a "TPU v5", nor an L40S an L4. Only "bfloat16" and "float16" have figures: what float32
    products cost depends on jax_default_matmul_precision, so a ratio to a data sheet says nothing.
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        rest = device_kind.removeprefix(name)
        if rest == device_kind or rest[:1].isalnum():
            continue
        return None if _OTHER_PART & set(rest.split()) else PEAK_TFLOPS[name] * 1e12
    return None


def mfu(
    model: Any, tokens_per_second: float, device_kind: str, n_devices: int, dtype: str = "bfloat16"
) -> float | None:
    """Compute the model FLOPs utilisation, 0 to 1: useful FLOP/s over the peak of all devices.

    Attention is counted causally: PaLM's and nanoGPT's full count reads higher for the same speed
    (by 7 % for GPT-2 at T=1024). `tokens_per_second` is the whole run's. None means that no peak is
    known for products in `dtype`.
    """
    peak = peak_flops(device_kind, dtype)
    if peak is None:
        return None
    return flops_per_token(model) * tokens_per_second / (peak * n_devices)


def mfu_meter(
    model: Any,
    device_kind: str,
    n_devices: int,
    say: Callable[[str], None] = print,
    dtype: str = "bfloat16",
) -> Callable[[float], float | None]:
    """Return a function from tokens/s to MFU, or to None where no peak is known.

    The latter is said now, but on a CPU, where nobody misses MFU.
    """
    if device_kind != "cpu" and peak_flops(device_kind) is None:
        say(f"warning: no MFU: scalegpt/model/flops.py has no peak FLOP/s for {device_kind!r}")
    elif device_kind != "cpu" and peak_flops(device_kind, dtype) is None:
        say(f"note: no MFU in {dtype}, whose products have no one peak FLOP/s")
    return lambda tokens_per_second: mfu(model, tokens_per_second, device_kind, n_devices, dtype)

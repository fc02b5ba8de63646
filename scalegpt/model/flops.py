"""Count a run's parameters and FLOPs, and compare its speed with its devices' peak: MFU.

No device is touched. Padded rows of the tables are never counted.
"""

import re
from collections.abc import Callable

from scalegpt.config.recipe import ModelConfig
from scalegpt.model.parameters import parameters


def parameters_by_component(model: ModelConfig) -> dict[str, int]:
    """Count the parameters of each component, as "attn/qkv" with its bias, over all layers.

    They add up to `parameter_count`. A tied head is `wte` itself.
    """
    sizes: dict[str, int] = {}
    for path, parameter in parameters(model).items():
        name = _component(path)
        sizes[name] = sizes.get(name, 0) + parameter.size(model.vocab_size)
    return sizes


def _component(path: str) -> str:
    return re.sub(r"^h/|(_kernel|_bias|/scale|/bias)$", "", path)


def parameter_count(model: ModelConfig) -> int:
    """Count all parameters, each once: 124,439,808 for GPT-2, or 124,337,664 without biases."""
    return sum(parameters_by_component(model).values())


def embedding_count(model: ModelConfig) -> int:
    """Count the parameters of all embeddings; a tied head is one of them."""
    embeddings = (p for p in parameters(model).values() if p.kind == "embeddings")
    return sum(p.size(model.vocab_size) for p in embeddings)


def used_parameters(model: ModelConfig) -> int:
    """Count the parameters that multiply: all but embeddings, and the head, which may be tied.

    This is the N of PaLM's and Chinchilla's formulas as nanoGPT's notebooks read them: 123,653,376
    for GPT-2.
    """
    tied_head = model.vocab_size * model.n_embd * model.tie_word_embeddings
    return parameter_count(model) - embedding_count(model) + tied_head


def flops_by_component(model: ModelConfig, causal: bool = False) -> dict[str, int]:
    """Count the FLOPs of the forward pass over one sequence of block_size tokens, over all layers.

    Only matrix products count, 2 FLOPs for a multiply-add: the matrices of the layers, the head,
    and in attention q·k and scores·v (2 T W H K each, with W the layer's window, or T). Looking up
    embeddings costs nothing; norms, biases, GELU and softmax are left out. `causal`: only what is
    seen of T x W counts. Source: nanoGPT's transformer_sizing.ipynb, whose figures are those with
    causal=False.
    """
    T, D = model.block_size, model.n_embd
    windows = [min(T, window or T) for window in model.windows]
    pairs = sum(2 * T * w - (w * w if causal else 0) for w in windows)
    pairs *= model.n_head * model.head_dim
    matrices = {
        _component(path): 2 * T * parameter.size(model.vocab_size)
        for path, parameter in parameters(model).items()
        if parameter.kind == "matrices"
    }
    head = 2 * T * D * model.vocab_size
    return {"attn/scores": pairs, "attn/reduce": pairs, **matrices, "head": head}


def forward_flops(model: ModelConfig, causal: bool = False) -> int:
    """Count the forward FLOPs of one sequence: 291,648,307,200 for GPT-2 as nanoGPT counts."""
    return sum(flops_by_component(model, causal).values())


def flops_per_token(model: ModelConfig, causal: bool = True) -> float:
    """Count the FLOPs of training on a token, both passes: 6 N + 12 L T H K (half of it if causal).

    N: weights of matrix products, head included. The backward pass costs twice the forward pass;
    recomputation (remat) is not model work and is not counted. Source: PaLM, arXiv:2204.02311,
    appendix B, which counts full attention.
    """
    return 3 * forward_flops(model, causal) / model.block_size


def palm_flops_per_token(model: ModelConfig) -> int:
    """Compute PaLM's 6 N + 12 L H Q T as it stands, which counts norms and biases as products too.

    Source: PaLM, arXiv:2204.02311, appendix B, with N as in nanoGPT's transformer_sizing.ipynb.
    """
    pairs = model.n_layer * model.n_head * model.head_dim * model.block_size
    return 6 * used_parameters(model) + 12 * pairs


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
    model: ModelConfig,
    tokens_per_second: float,
    device_kind: str,
    n_devices: int,
    dtype: str = "bfloat16",
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
    model: ModelConfig,
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

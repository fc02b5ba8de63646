"""A preset is data: keys of the model section under a name; keys that are given override them.

Every key of `ModelConfig` may stand here, and the name alone makes it a value of `model.preset`.
"""

from typing import Any

# n_layer, n_head, n_embd of the GPT-2 paper's table 2; the rest is common to all four.
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
# modded-nanogpt and nanochat agree on these; left out is what pays only with custom kernels.
NANOCHAT = {
    "position": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "activation": "relu2",
    "init": "zero_out",
    "tie_word_embeddings": False,
    "embedding_norm": True,
    "logit_softcap": 15.0,
    "softcap": "tanh",
    "bias": False,
}
# What paid, too, in trainings of ours (configs/README.md); no format of others has these two.
MODERN = {**NANOCHAT, "smear": True, "residual_scalars": True}
# Keys that presets have not always set: a run that began without them goes on without.
LATER = {"softcap", "smear", "residual_scalars"}
# The architecture of arXiv:2302.13971, of any size.
LLAMA = {
    "position": "rope",
    "norm": "rmsnorm",
    "norm_gain": True,
    "mlp": "swiglu",
    "tie_word_embeddings": False,
    "bias": False,
}
_LLAMA3 = {**LLAMA, "block_size": 8192, "rope_base": 500_000.0, "norm_eps": 1e-5}
_LLAMA32 = {  # whose weights were trained on texts of up to 131,072 tokens in the end
    **_LLAMA3,
    "tie_word_embeddings": True,
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


def _size(n_layer: int, n_head: int, n_kv_head: int, n_embd: int, n_inner: int) -> dict[str, Any]:
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": n_embd,
        "n_inner": n_inner,
    }


PRESETS: dict[str, dict[str, Any]] = {
    **{
        name: {"n_layer": n, "n_head": h, "n_embd": d, "block_size": 1024, "bias": True}
        for name, (n, h, d) in GPT2_SIZES.items()
    },
    "modern": MODERN,
    "many_epochs": MODERN,  # with rates of its own, recipe.MUON_WITH
    # What NanoChatForCausalLM of transformers computes.
    "nanochat": NANOCHAT,
    "llama": LLAMA,
    # Of arXiv:2307.05695 (ReLoRA); GaLore and others compare on these.
    "llama-60m": {**LLAMA, "block_size": 1024, **_size(8, 8, 8, 512, 1376)},
    "llama-130m": {**LLAMA, "block_size": 1024, **_size(12, 12, 12, 768, 2048)},
    "llama-350m": {**LLAMA, "block_size": 1024, **_size(24, 16, 16, 1024, 2736)},
    # Llama 3.2 1B and 3B, and Llama 3 8B; vocabulary 128,256.
    "llama-1b": {**_LLAMA32, **_size(16, 32, 8, 2048, 8192)},
    "llama-3b": {**_LLAMA32, **_size(28, 24, 8, 3072, 8192)},
    "llama-8b": {**_LLAMA3, **_size(32, 32, 8, 4096, 14336)},
}

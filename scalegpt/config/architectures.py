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
MODERN = {
    "position": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "activation": "relu2",
    "init": "zero_out",
    "tie_word_embeddings": False,
    "embedding_norm": True,
    "logit_softcap": 15.0,
    "bias": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    **{
        name: {"n_layer": n, "n_head": h, "n_embd": d, "block_size": 1024, "bias": True}
        for name, (n, h, d) in GPT2_SIZES.items()
    },
    "modern": MODERN,
}

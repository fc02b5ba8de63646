"""A tiny random GPT-2 of transformers, as a folder for --hf; its weights are large, so that what it
predicts differs from place to place."""

from pathlib import Path
from typing import Any

import pytest

BLOCK = 96


def save(folder: Path, vocab_size: int = 50257) -> Any:
    """Write it; returns the torch model."""
    torch = pytest.importorskip("torch", reason="the second opinion on GPT-2 needs torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)  # more would only wait for each other, and for JAX's
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=BLOCK,
        vocab_size=vocab_size,
        initializer_range=0.3,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # else a bias or a scale that is not used would not show
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def log_probabilities(model: Any, ids: Any, last: int) -> Any:
    """Of every id after each of the last places, [last, V]: one text at a time."""
    import torch

    with torch.no_grad():
        scores = model(torch.tensor([ids]), logits_to_keep=last).logits[0]
        return torch.log_softmax(scores, -1).numpy()

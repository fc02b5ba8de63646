"""`model.depth` sets the whole recipe, by rules that others have measured; no JAX here.

At depth 12 it is the tuned recipe for a model of GPT-2's size (`recipe.MUON`, batches of 2^19
tokens); other depths follow from it: width 64 a layer, heads of 128, 12 tokens for each weight of
the layers and the head (Chinchilla, arXiv:2203.15556, has 20), the batch growing as the 0.383th
power of the tokens (arXiv:2505.13738), learning rates with the square root of the batch (the first
one where batch.growth is given) down to 2^17 tokens, AdamW's falling with the square root of the
width, weight decay such that its time scale stays the same share of the run. nanochat scales by the
same rules, but has no batches below 2^17: there, runs here were best with rates of larger ones.
"""

import math
from typing import Any

from pydantic import ValidationError

from scalegpt.config import types
from scalegpt.config.architectures import GPT2_SIZES, PRESETS
from scalegpt.config.recipe import MUON, ModelConfig, muons
from scalegpt.errors import Mistake

TOKENS_PER_WEIGHT = 12
BATCH, DEPTH = 2**19, 12  # tokens of an update at the depth that was tuned
WEIGHT_DECAY = 0.05
SMALL = 2**17  # tokens of an update; fewer have the rates of so many
# What follows from the batch. Runs that began before SMALL was a bound, 2026-11-29, keep theirs.
RATES = {"lr", "embedding_lr", "head_lr", "scalar_lr", "weight_decay"}
VOCABULARY = 50257  # GPT-2's, where model.vocab_size is not given: data are opened later


def derived(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys that follow from `model.depth`, as section -> key -> value.

    values: a run's sections as the user gave them. A key given there is not returned, and the rest
    follows from it: a given width, context or batch sets the tokens and rates. null is not given.
    Raises Mistake for a depth that is not a number from 1 to 1000, or differs from a given n_layer.
    """
    given = {
        name: {k: v for k, v in values.get(name, {}).items() if v is not None}
        for name in ("model", "batch", "optim")
    }
    model, batch, optim = ({**keys} for keys in given.values())
    depth = _whole("model.depth", model["depth"])
    if not 1 <= depth <= 1000:
        raise Mistake(f"model.depth={depth} must be 1 to 1000 layers")

    model.setdefault("preset", "modern")
    model.setdefault("n_layer", depth)
    model.setdefault("n_embd", width(depth))
    model.setdefault("block_size", 1024)
    layers = _whole("model.n_layer", model["n_layer"])
    # The preset "gpt2" may have any number of layers; others that have one are sizes.
    preset = str(model["preset"])
    size = None if preset == "gpt2" else PRESETS.get(preset, {}).get("n_layer")
    is_size = size is not None and "n_layer" not in given["model"]
    # Beside a width that follows from the depth, the rest of such a size would fit no longer.
    if depth != (size if is_size else layers) or (is_size and preset not in GPT2_SIZES):
        other = f"preset={preset}" if is_size else f"n_layer={layers}"
        raise Mistake(
            f"model.depth={depth} and model.{other} both set the number of layers; leave one out: "
            f"--model.{other.partition('=')[0]}=null, or --model.depth=null"
        )
    embd = _whole("model.n_embd", model["n_embd"])
    model.setdefault("n_head", heads(embd))
    vocabulary = _whole("model.vocab_size", model.get("vocab_size") or VOCABULARY)
    length = _whole("model.block_size", model["block_size"])

    try:
        tokens = TOKENS_PER_WEIGHT * weights(ModelConfig.model_validate(model), vocabulary)
    except ValidationError:  # whoever asked validates this model, too, and will say it
        return {"model": {k: v for k, v in model.items() if k not in given["model"]}}
    tuned = ModelConfig(n_layer=DEPTH, n_embd=width(DEPTH), n_head=1)
    tuned_tokens = TOKENS_PER_WEIGHT * weights(tuned, VOCABULARY)
    batch_tokens = 2 ** round(math.log2(BATCH * (tokens / tuned_tokens) ** 0.383))
    batch.setdefault("sequences", max(1, batch_tokens // length))
    batch_tokens = _whole("batch.sequences", batch["sequences"]) * length
    batch_factor = math.sqrt(max(batch_tokens, SMALL) / BATCH)
    adam_factor = batch_factor * math.sqrt(width(DEPTH) / embd)

    optim.setdefault("name", "muon")
    if "epochs" in optim and "steps" not in optim:
        raise Mistake(
            f"model.depth={depth} and optim.epochs={optim['epochs']} both set the updates; leave "
            "one out: --model.depth=null, or --optim.epochs=null"
        )
    growth = batch["growth"] if isinstance(batch.get("growth"), dict) else {}
    optim.setdefault("steps", updates(tokens / length, batch_tokens // length, growth))
    steps = _whole("optim.steps", optim["steps"])
    if optim["name"] != "muon":
        optim.setdefault("warmup_steps", steps // 20)
    else:
        optim.setdefault("lr", _round(MUON["lr"] * batch_factor))
        for key in ("embedding_lr", "head_lr", "scalar_lr"):
            optim.setdefault(key, _round(muons(model)[key] * adam_factor))
        decay = WEIGHT_DECAY * tuned_tokens / BATCH / steps / batch_factor
        optim.setdefault("weight_decay", _round(decay))
        optim.setdefault("cautious_decay", not _zero(optim["weight_decay"]))
        optim.setdefault("momentum", MUON["momentum"])  # as tuned, for the batches of such a model
        optim.setdefault("momentum_warmup", min(300, steps // 10))
    full = {"model": model, "batch": batch, "optim": optim}
    return {
        section: {k: v for k, v in keys.items() if k not in given[section]}
        for section, keys in full.items()
    }


def width(depth: int) -> int:
    """Return n_embd: 64 for each layer, rounded up to a whole number of heads of size 128."""
    return -(-64 * depth // 128) * 128


def heads(embd: int) -> int:
    """Return n_head: n_embd // 128, or where that fits not, heads of an even size nearest to 128.

    RoPE needs an even size.
    """
    even = [n for n in types.divisors(embd) if embd // n % 2 == 0]
    return min(even, key=lambda n: (n != embd // 128, abs(embd // n - 128)), default=1)


def updates(rows: float, sequences: int, growth: dict[Any, Any]) -> int:
    """Return the number of updates, at least 1, that see about so many rows of the data.

    sequences, growth: of the batch, as `BatchConfig` has them.
    """
    done = 0
    sizes = {_whole("batch.growth", k): _whole("batch.growth", v) for k, v in growth.items()}
    for first, larger in sorted(sizes.items()):
        before = (first - 1 - done) * sequences
        if before >= rows:
            break
        done, rows, sequences = first - 1, rows - before, larger
    return done + max(1, round(rows / sequences))


def weights(model: ModelConfig, vocabulary: int) -> int:
    """Return the number of weights in the layers' matrices and the head; tokens scale with it."""
    attention = 2 * (model.n_head + model.kv_heads) * model.head_dim
    mlp = (2 if model.mlp == "plain" else 3) * model.inner
    return (model.n_layer * (attention + mlp) + vocabulary) * model.n_embd


def _whole(key: str, value: Any) -> int:
    """Return a count that pydantic has not validated yet. Raises Mistake."""
    try:
        number = int(types.number(value))
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise Mistake(f"{key}={value!r} must be a whole number, 1 or more")
    return number


def _zero(value: Any) -> bool:
    try:
        return float(value) == 0
    except (TypeError, ValueError):  # which validation will say
        return False


def _round(x: float) -> float:
    return float(f"{x:.3g}")

"""Updates of ours against updates of nanoGPT's definition, written out in PyTorch in float64.

Its definition: pre-norm blocks of one fused linear layer for q, k and v, exact GELU, learned
positions, a head tied to the embedding; every microbatch's mean loss divided by their number; the
gradient clipped to norm 1; AdamW with betas 0.9 and 0.95, which decays what has two axes or more;
linear warm-up, then cosine. Ours runs on eight devices, from the same weights, on real text.
Tolerances are float32's rounding over sums of some hundred tokens: in the loss, and in a gradient
relative to the largest of its tensor.
"""

import argparse
import inspect
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from scalegpt.config import Config
from scalegpt.step import build_for_training, sharding

L, H, D, T, VOCAB = 2, 3, 48, 32, 128
ROWS, ACCUMULATION, UPDATES = 16, 2, 3
LR, MIN_LR, WARMUP, DECAY_STEPS, WEIGHT_DECAY = 1e-3, 1e-4, 2, 5, 0.1


def make_config(bias: bool, backend: str) -> Config:
    return Config(
        model=dict(n_layer=L, n_head=H, n_embd=D, block_size=T, bias=bias, activation="gelu")
        | dict(
            vocab_size=VOCAB, vocab_multiple=96, loss_chunk=8, dtype="float32", scan_layers=True
        ),
        mesh=dict(data=8),
        batch=dict(sequences=ROWS, microbatch=ROWS // 8 // ACCUMULATION),
        data=dict(path="unused"),
        optim=dict(lr=LR, min_lr=MIN_LR, warmup_steps=WARMUP, steps=DECAY_STEPS)
        | dict(weight_decay=WEIGHT_DECAY),
        run=dict(out_dir="unused", backend=backend),
    )


def batches() -> np.ndarray:
    """Windows of the standard library's source: [updates, microbatches, rows, T + 1]."""
    text = np.frombuffer(inspect.getsource(argparse).encode("ascii"), np.uint8).astype(np.int32)
    shape = (UPDATES, ACCUMULATION, ROWS // ACCUMULATION)
    starts = np.random.default_rng(0).integers(0, len(text) - T, shape)
    return text[starts[..., None] + np.arange(T + 1)]


def ours(bias: bool, backend: str) -> SimpleNamespace:
    """Parameters, metrics and Adam's first moment, after each update."""
    config = make_config(bias, backend)
    steps = build_for_training(config, sharding.make_mesh(config.mesh))
    assert steps.layout == (ACCUMULATION, ROWS // ACCUMULATION)
    state, found = steps.init(), []
    first = jax.tree.map(np.asarray, state.params)
    for batch in batches():
        state, metrics = steps.train(state, jax.device_put(batch, steps.batch_sharding))
        adam = next(s for s in state.opt_state if hasattr(s, "mu"))
        trees = jax.tree.map(np.asarray, (state.params, adam.mu))
        found.append((*trees, metrics))
    return SimpleNamespace(first=first, updates=found)


def as_torch_names(params) -> dict[str, np.ndarray]:
    """Our tree as the parameters of the module below: linear weights are [out, in]."""
    out = {"wte": params["wte"][:VOCAB], "wpe": params["wpe"]}

    def put(name, layer, at, last=()):
        for key, value in layer.items():
            if key.endswith("kernel"):
                out[f"{name}.weight"] = value[at].reshape(last).T
            elif key == "scale":
                out[f"{name}.weight"] = value[at]
            else:
                out[f"{name}.bias"] = value[at].reshape(-1)

    def pick(part, prefix):
        return {k.removeprefix(prefix): v for k, v in part.items() if k.startswith(prefix)}

    h = params["h"]
    for i in range(L):
        put(f"h.{i}.ln_1", h["ln_1"], i)
        put(f"h.{i}.c_attn", pick(h["attn"], "qkv_"), i, (D, 3 * D))
        put(f"h.{i}.c_proj", pick(h["attn"], "proj_"), i, (D, D))
        put(f"h.{i}.ln_2", h["ln_2"], i)
        put(f"h.{i}.c_fc", pick(h["mlp"], "up_"), i, (D, 4 * D))
        put(f"h.{i}.c_out", pick(h["mlp"], "down_"), i, (4 * D, D))
    put("ln_f", params["ln_f"], ...)
    return out


def theirs(first: dict[str, np.ndarray]) -> list[SimpleNamespace]:
    """The same updates in PyTorch: loss, gradients before clipping, norm and parameters of each."""
    torch = pytest.importorskip("torch", reason="nanoGPT's own definition needs torch")
    F = torch.nn.functional
    p = {k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for k, v in first.items()}

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p.get(f"{name}.bias"), 1e-5)

    def loss_of(tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        b = len(inputs)
        x = F.embedding(inputs, p["wte"]) + p["wpe"]
        for i in range(L):
            q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.c_attn").split(D, dim=2)
            q, k, v = (y.view(b, T, H, D // H).transpose(1, 2) for y in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(y.transpose(1, 2).reshape(b, T, D), f"h.{i}.c_proj")
            y = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.c_fc"))
            x = x + linear(y, f"h.{i}.c_out")
        scores = norm(x, "ln_f") @ p["wte"].T
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    def learning_rate(it):
        if it < WARMUP:
            return LR * (it + 1) / (WARMUP + 1)
        ratio = (it - WARMUP) / (DECAY_STEPS - WARMUP)
        return MIN_LR + 0.5 * (1 + math.cos(math.pi * ratio)) * (LR - MIN_LR)

    groups = [
        {"params": [x for x in p.values() if x.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [x for x in p.values() if x.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    found = []
    for it, microbatches in enumerate(batches()):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(it)
        adamw.zero_grad()
        total = 0.0
        for tokens in microbatches:
            loss = loss_of(torch.tensor(tokens, dtype=torch.long)) / ACCUMULATION
            loss.backward()
            total += loss.item()
        grads = {k: x.grad.numpy().copy() for k, x in p.items()}
        size = torch.nn.utils.clip_grad_norm_(p.values(), 1.0).item()
        adamw.step()
        params = {k: x.detach().numpy().copy() for k, x in p.items()}
        found.append(
            SimpleNamespace(loss=total, grads=grads, norm=size, lr=learning_rate(it), params=params)
        )
    return found


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("bias", "backend"), [(False, "jit"), pytest.param(True, "pmap", marks=pytest.mark.slow)]
)
def test_updates_are_those_of_nanogpts_definition(bias, backend):
    mine = ours(bias, backend)
    reference = theirs(as_torch_names(mine.first))
    assert all(want.norm > 1 for want in reference), "clipping is not tested"
    before = dict.fromkeys(reference[0].grads, 0.0)
    for want, (params, moment, metrics) in zip(reference, mine.updates, strict=True):
        np.testing.assert_allclose(metrics["train/loss"], want.loss, rtol=0, atol=2e-6)
        np.testing.assert_allclose(metrics["train/grad_norm"], want.norm, rtol=1e-6)
        np.testing.assert_allclose(metrics["train/lr"], want.lr, rtol=1e-6)
        params, moment = as_torch_names(params), as_torch_names(moment)
        assert params.keys() == want.params.keys()
        for name, grad in want.grads.items():
            # The gradient that the update itself used, before it was clipped.
            used = (moment[name] - 0.9 * before[name]) / 0.1 * metrics["train/grad_norm"]
            rounding = 5e-6 * np.abs(grad).max()
            np.testing.assert_allclose(used, grad, rtol=0, atol=rounding, err_msg=name)
            # AdamW divides rounding by the gradient's own size: an update of an entry, up to 1e-3,
            # has fewer digits than the gradient.
            close = dict(rtol=0, atol=5e-6, err_msg=name)
            np.testing.assert_allclose(params[name], want.params[name], **close)
        before = moment
    moved = {k: np.abs(want.params[k] - v).max() for k, v in as_torch_names(mine.first).items()}
    assert min(moved.values()) > 1e-3, "a parameter stood still, so its update is not tested"

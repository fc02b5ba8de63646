"""The arithmetic of flops.py against sums done by hand and figures printed by others."""

import subprocess
import sys

import pytest

from scalegpt.config.recipe import ModelConfig
from scalegpt.model import flops


def gpt(L=12, H=12, D=768, T=1024, V=50257, bias=False, position="learned", tied=True):
    return ModelConfig(
        n_layer=L,
        n_head=H,
        n_embd=D,
        block_size=T,
        vocab_size=V,
        bias=bias,
        position=position,
        tie_word_embeddings=tied,
    )


def leaf_sizes(m) -> list[int]:
    """Every array of a GPT-2, written out with its shape: a second count."""
    D, shapes = m.n_embd, [(m.vocab_size, m.n_embd)]
    if m.position == "learned":
        shapes.append((m.block_size, D))
    if not m.tie_word_embeddings:
        shapes.append((m.vocab_size, D))
    for _ in range(m.n_layer):
        shapes += [(D,), (D, 3 * D), (D, D), (D,), (D, 4 * D), (4 * D, D)]
        if m.bias:
            shapes += [(D,), (3 * D,), (D,), (D,), (4 * D,), (D,)]
    shapes += [(D,)] * (2 if m.bias else 1)
    return [a * (b[0] if b else 1) for a, *b in shapes]


@pytest.mark.parametrize(
    "model, published",
    [
        (gpt(), 124_337_664),  # nanoGPT's transformer_sizing notebook
        (gpt(bias=True), 124_439_808),  # GPT-2 on Hugging Face, and its three larger sizes
        (gpt(24, 16, 1024, bias=True), 354_823_168),
        (gpt(36, 20, 1280, bias=True), 774_030_080),
        (gpt(48, 25, 1600, bias=True), 1_557_611_200),
    ],
)
def test_parameter_count_is_the_published_one(model, published):
    assert flops.parameter_count(model) == published


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("size", [(1, 1, 2, 3, 5), (3, 5, 30, 17, 101), (2, 3, 48, 96, 257)])
def test_parameter_count_is_the_sum_of_the_leaves(size, position, bias):
    model = gpt(*size, bias=bias, position=position)
    assert flops.parameter_count(model) == sum(leaf_sizes(model))
    wpe = model.block_size * model.n_embd if position == "learned" else 0
    assert flops.parameters_by_component(model).get("wpe", 0) == wpe


def test_components_are_nanogpts():
    parts = flops.parameters_by_component(gpt())
    assert parts["wte"] == 38_597_376 and parts["wpe"] == 786_432
    assert parts["attn/qkv"] == 12 * 1_769_472 and parts["attn/proj"] == 12 * 589_824
    assert parts["mlp/up"] == parts["mlp/down"] == 12 * 2_359_296
    assert parts["ln_1"] == parts["ln_2"] == 12 * 768 and parts["ln_f"] == 768


def test_flops_are_nanogpts_notebook():
    assert flops.forward_flops(gpt()) == 291_648_307_200
    assert 1024 * flops.flops_per_token(gpt(), causal=False) == 874_944_921_600
    # Its PaLM formula 6 N + 12 L H Q T leaves wpe out of N and is 1.0001 of the count.
    n = flops.parameter_count(gpt()) - 1024 * 768
    palm = 6 * n + 12 * 12 * 12 * 64 * 1024
    assert palm / flops.flops_per_token(gpt(), causal=False) == pytest.approx(1.0001, abs=5e-5)


@pytest.mark.parametrize("size", [(1, 1, 2, 4, 5), (3, 5, 35, 18, 101), (24, 16, 1024, 2048, 503)])
def test_flops_are_the_sum_over_matrix_products(size):
    """Each product of m x k with k x n written out: 2 m k n forward, twice that backward."""
    L, H, D, T, V = size
    K = D // H
    layer = [(T, D, 3 * D), (T, D, D), (T, D, 4 * D), (T, 4 * D, D)]
    heads = [(T, K, T), (T, T, K)] * H
    count = L * sum(2 * m * k * n for m, k, n in layer + heads) + 2 * T * D * V
    model = gpt(*size)
    assert flops.forward_flops(model) == count
    assert flops.flops_per_token(model, causal=False) == pytest.approx(3 * count / T, rel=1e-15)
    saved = 3 * L * sum(2 * m * k * n for m, k, n in heads) / T / 2
    assert flops.flops_per_token(model) == pytest.approx(3 * count / T - saved, rel=1e-15)


def test_causal_flops_are_6n_plus_6ltd():
    m = gpt(5, 3, 48, 64, 97)
    n = 5 * 12 * 48 * 48 + 48 * 97
    assert flops.flops_per_token(m) == 6 * n + 6 * 5 * 64 * 48


def test_flops_of_shared_heads_a_gate_and_windows_are_the_sum_over_matrix_products():
    """Of what is seen only: a window's positions, and with fewer before them those."""
    T, D, K, F, V = 64, 48, 10, 100, 97
    keys = dict(n_head=4, n_kv_head=2, head_size=K, mlp="swiglu", n_inner=F)
    keys |= dict(window=16, window_pattern="SSL")
    model = ModelConfig(n_layer=4, n_embd=D, block_size=T, vocab_size=V, **keys)
    weights = 4 * (D * K * (4 + 2 + 2 + 4) + 3 * D * F) + D * V
    pairs = [sum(min(t + 0.5, w) for t in range(T)) for w in (16, 16, T, 16)]  # half of t itself
    assert flops.forward_flops(model, causal=True) == 2 * T * weights + sum(pairs) * 4 * 4 * K
    full = 16 + 16 + T + 16
    assert flops.forward_flops(model) == 2 * T * weights + T * full * 4 * 4 * K
    assert flops.parameter_count(model) == weights + T * D + (2 * 4 + 1) * D


def test_biases_norms_and_positions_are_not_flops():
    plain = flops.flops_per_token(gpt())
    assert plain == flops.flops_per_token(gpt(bias=True, position="rope"))


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v2", 22.5),  # half a chip: a JAX device is a core
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),  # and not a TPU v5
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI250X", 191.5),  # one of two dies
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peak_of_a_jax_device(kind, tflops):
    assert flops.peak_flops(kind) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "TPU v4 lite",
        "TPU v9",
        "NVIDIA A1000",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_a_part_that_is_not_in_the_table_has_no_peak(kind):
    assert flops.peak_flops(kind) is None
    assert flops.mfu(gpt(), 1e6, kind, 8) is None


def test_only_16_bit_products_have_a_peak():
    assert flops.peak_flops("NVIDIA H200", "float16") == flops.peak_flops("NVIDIA H200")
    assert flops.peak_flops("NVIDIA H200", "float32") is None


def test_mfu_normalises_a_published_run():
    """nanoGPT's GPT-2: 295e9 tokens in 4 days on 8 A100, about 29 % with full attention."""
    rate = 295e9 / (4 * 86400)
    full = flops.flops_per_token(gpt(), causal=False) * rate / (8 * 312e12)
    assert full == pytest.approx(0.29, abs=0.005)
    ratio = flops.flops_per_token(gpt()) / flops.flops_per_token(gpt(), causal=False)
    used = flops.mfu(gpt(), rate, "NVIDIA A100-SXM4-40GB", 8)
    assert used == pytest.approx(full * ratio)


def test_the_two_halves_of_a_tpu_v3_chip_are_two_devices():
    """A v3-8 is 4 chips of 123 TFLOP/s, and JAX counts 8 devices."""
    used = flops.mfu(gpt(), 200_000, "TPU v3", 8)
    assert used == pytest.approx(flops.flops_per_token(gpt()) * 200_000 / (4 * 123e12))


def test_unknown_device_has_no_mfu_and_one_warning():
    said = []
    meter = flops.mfu_meter(gpt(), "Quantum 9000", 8, said.append)
    assert [meter(1e6), meter(2e6)] == [None, None]
    assert len(said) == 1 and said[0].startswith("warning") and "'Quantum 9000'" in said[0]


def test_a_cpu_and_a_known_device_get_no_note():
    said = []
    assert flops.mfu_meter(gpt(), "cpu", 1, said.append)(1e3) is None
    meter = flops.mfu_meter(gpt(), "NVIDIA H200", 2, said.append)
    assert meter(1e6) == flops.mfu(gpt(), 1e6, "NVIDIA H200", 2) and not said
    meter = flops.mfu_meter(gpt(), "NVIDIA H200", 2, said.append, "float32")
    assert meter(1e6) is None and said[0].startswith("note: no MFU in float32")


def test_importing_metrics_brings_no_heavy_package():
    code = (
        "import sys, scalegpt.run.metrics\n"
        "assert not {'jax', 'wandb', 'tensorboardX'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_an_untied_head_is_counted_once_more_and_its_input_table_multiplies_nothing(position):
    tied = gpt(3, 5, 30, 17, 101, bias=True, position=position)
    untied = gpt(3, 5, 30, 17, 101, bias=True, position=position, tied=False)
    assert flops.parameter_count(untied) == sum(leaf_sizes(untied))
    assert flops.parameters_by_component(untied)["head"] == 101 * 30
    assert "head" not in flops.parameters_by_component(tied)
    assert flops.used_parameters(untied) == flops.used_parameters(tied)
    assert flops.forward_flops(untied) == flops.forward_flops(tied)


def test_parameters_that_multiply_are_those_of_nanogpts_scaling_notebook():
    assert flops.used_parameters(gpt(bias=True)) == 123_653_376


def test_flops_by_component_are_nanogpts_notebook():
    layer = {
        "attn/qkv": 3_623_878_656,
        "attn/scores": 1_610_612_736,
        "attn/reduce": 1_610_612_736,
        "attn/proj": 1_207_959_552,
        "mlp/up": 4_831_838_208,
        "mlp/down": 4_831_838_208,
    }
    published = {name: 12 * n for name, n in layer.items()} | {"head": 79_047_426_048}
    assert flops.flops_by_component(gpt()) == published
    half = {name: published[name] // 2 for name in ("attn/scores", "attn/reduce")}
    assert flops.flops_by_component(gpt(), causal=True) == published | half


def test_the_palm_formula_is_nanogpts():
    assert 1024 * flops.palm_flops_per_token(gpt()) == 875_062_886_400

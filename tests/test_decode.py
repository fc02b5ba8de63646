"""Decoding with a cache: the same logits and texts as without, whatever the lengths and mesh."""

import contextlib
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalegpt.config.loading import validate
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.model.attention import cached_attention
from scalegpt.model.gpt import Cache, head_table, logits, separate_layers
from scalegpt.step import build, sharding

VOCAB, BLOCK = 11, 20
GREEDY = Sampler(temperature=0.0)
PROMPTS = [[3], [1, 2, 3, 4, 5, 6], [7, 7, 2]]


def steps_of(model=None, mesh=None, devices=2):
    values = {
        "model": {
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 8,
            "block_size": BLOCK,
            "vocab_size": VOCAB,
            "vocab_multiple": 16,
            **(model or {}),
        },
        "mesh": mesh or {},
        "data": {"path": "x"},
        "run": {"out_dir": "y"},
    }
    config = validate(values, "test")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    return build.build_for_use(config, mesh, microbatch=1)


@pytest.fixture(scope="module")
def steps():
    return steps_of()


def params_of(steps, scale, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, steps.abstract.params)
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, steps.abstract.params))


def write(steps, params, prompts, new, sampler=GREEDY, vocab=VOCAB):
    """New ids, [N][new]."""
    return np.stack(list(decoder(steps, params, sampler, vocab).ids(prompts, new)), 1)


@partial(jax.jit, static_argnums=0)
def hidden_states(model, params, tokens):
    return model.apply({"params": params}, tokens)


def naive(steps, params, prompt, new):
    """Greedy, the whole text anew for every token."""
    local, text = jax.tree.map(jnp.asarray, jax.device_get(params)), list(prompt)
    block = steps.model.config.block_size
    for _ in range(new):
        window = text[-block:]
        tokens = np.array([window + [0] * (block - len(window))])  # nothing looks to the right
        hidden = np.asarray(hidden_states(steps.model, local, tokens))[0, len(window) - 1]
        text.append(int((hidden @ np.asarray(head_table(local)).T)[:VOCAB].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "kind",
    [
        {"bias": True},
        {"bias": True, "position": "rope"},
        {"preset": "modern", "residual_scalars": True, "value_embeddings": True},
        {"bias": True, "smear": True, "backout": True, "ngram_rows": 50, "ngram": 3}
        | {"value_embeddings": True, "value_gates": True},
        {"preset": "llama", "n_head": 4, "n_kv_head": 1, "window": 5, "window_pattern": "SL"},
    ],
)
@pytest.mark.parametrize(
    "chunks", [[20], pytest.param([1] * 20, marks=pytest.mark.slow), [7, 1, 1, 4, 1, 6]]
)
def test_cached_logits_are_the_uncached_ones_at_every_position(kind, chunks):
    """Also of texts that begin later: left padding is never seen, whatever stands there."""
    steps = steps_of(kind)
    params = jax.tree.map(jnp.asarray, jax.device_get(params_of(steps, 0.4, seed=1)))
    apart, first = separate_layers(params), np.array([0, 3, 6])
    texts = np.random.default_rng(2).integers(0, VOCAB, (3, BLOCK), dtype=np.int32)
    c = steps.model.config
    empty = jnp.full(
        (3, c.kv_heads, 24, c.head_dim), 1e3
    )  # slots that are never written, but must not be seen
    recent = jnp.full((3, c.lookback), 4)
    cache = Cache(((empty, empty),) * 2, jnp.asarray(first), jnp.int32(0), recent)
    advance = jax.jit(lambda x, cache: steps.model.apply({"params": apart}, x, cache=cache))
    hidden, at = [], 0
    for chunk in chunks:
        part, cache = advance(texts[:, at : at + chunk], cache)
        hidden.append(part)
        at += chunk
    got = logits(jnp.concatenate(hidden, 1), head_table(params), steps.model.config)
    for row, start in enumerate(first):
        alone = steps.model.apply({"params": params}, texts[None, row, start:])
        want = logits(alone[0], head_table(params), steps.model.config)
        np.testing.assert_allclose(got[row, start:], want, atol=1e-5, rtol=0)
        assert np.ptp(want[:, :VOCAB]) > 1
    assert int(cache.used) == BLOCK


def test_rotations_are_made_for_the_cache_and_not_for_all_of_block_size():
    """Which is a million positions and more in some models."""
    steps = steps_of({"position": "rope", "block_size": 2**20})
    empty, recent = jnp.zeros((1, 2, 8, 4)), jnp.zeros((1, 0), jnp.int32)
    cache = Cache(((empty,) * 2,) * 2, jnp.array([0]), jnp.int32(0), recent)

    def advance(params):
        tokens = jnp.array([[1, 2, 3]])
        return steps.model.apply({"params": separate_layers(params)}, tokens, cache=cache)[0]

    traced = jax.make_jaxpr(advance)(steps.abstract.params)
    assert traced.out_avals[0].shape == (1, 3, 8)
    assert sum(np.size(x) for x in traced.consts) < 1000


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_is_a_naive_loop_over_the_model(tied):
    """Also past block_size: from then on the model sees the last block_size tokens."""
    steps = steps_of({"tie_word_embeddings": tied})
    params = params_of(steps, 0.5, seed=5)
    prompts = [*PROMPTS, list(range(VOCAB)) * 2 + [4]]
    want = [naive(steps, params, prompt, 30) for prompt in prompts]
    parts = decoder(steps, params, GREEDY, VOCAB)
    for n in (4, 3):  # with a prompt beyond block_size, and without
        assert np.stack(list(parts.ids(prompts[:n], 30)), 1).tolist() == want[:n]
    assert len(set(want[0])) > 3  # a model that repeats one id would prove little


@pytest.mark.parametrize("used", [5, 127, 128, 299])
def test_the_part_that_is_filled_is_as_good_as_the_whole_cache(used):
    """A server's cache has slots for the longest text; of these 300, 128, 256 or all are read."""
    keys = jax.random.split(jax.random.key(used), 5)
    q, k, v = (jax.random.normal(key, (2, 1, 2, 4)) for key in keys[:3])
    past = tuple(jax.random.normal(key, (2, 2, 300, 4)) for key in keys[3:])
    arguments = q, k, v, past, jnp.array([0, 3]), jnp.int32(used)
    part, whole = (cached_attention(*arguments, whole=whole)[0] for whole in (False, True))
    np.testing.assert_allclose(part, whole, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_cache_that_grows_gives_the_same_text():
    """From 128 slots on it doubles when it is full: here to 256 and 512."""
    steps = steps_of({"block_size": 300}, devices=1)
    params = params_of(steps, 0.5, seed=5)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 120).tolist()
    want = naive(steps, params, prompt, 180)
    assert write(steps, params, [prompt, [3]], 180)[0].tolist() == want
    assert len(set(want)) > 3


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        ({"temperature": 0.0}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"temperature": 0.3, "repetition_penalty": 1.3}, {"data": 1}),
    ],
)
@pytest.mark.slow
def test_prompt_lookup_writes_the_same_texts_in_fewer_steps(options, mesh):
    """Whatever is proposed; also where texts are of several lengths, have windows, keys that read
    the tokens before, and a cache that grows, and go on past block_size."""
    kind = {"position": "rope", "window": 9, "window_pattern": "SL", "n_head": 4, "n_kv_head": 2}
    kind |= {"smear": True, "backout": True, "ngram_rows": 52, "ngram": 3, "block_size": 150}
    steps = steps_of(kind, mesh, math.prod(mesh.values()))
    params, written, taken = params_of(steps, 0.5, seed=5), [], []
    prompts = [[3], [1, 2, 3, 4, 5, 6] * 3, [7, 7, 2]]
    for most in (0, 4):
        parts = decoder(steps, params, Sampler(**options, prompt_lookup=most), VOCAB)
        taken.append([])

        def ahead(*given, taken=taken[-1], parts=parts):
            taken.append(given[2].shape)
            return parts.ahead(*given)

        parts = replace(parts, ahead=ahead)
        for seed in (1, [1, 2, 3]):
            written.append(np.stack(list(parts.ids(prompts, 160, seed)), 1))
    np.testing.assert_array_equal(written[0], written[2])
    np.testing.assert_array_equal(written[1], written[3])
    assert not taken[0] and 0 < len(taken[1]) < 2 * 132, "132 tokens of each come from the cache"
    assert len({*written[0].ravel().tolist()}) > 3


def test_weights_that_need_not_be_kept_are_deleted_as_they_are_copied(steps):
    params = params_of(steps, 0.5)
    kept = jax.tree.map(np.asarray, params)
    parts = decoder(steps, params, GREEDY, VOCAB, keep=False)
    assert all(x.is_deleted() for x in jax.tree.leaves(params["h"]))
    want = separate_layers(kept)
    jax.tree.map(np.testing.assert_array_equal, parts.params, want)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing_and_keeps_weights_and_cache_split(mesh):
    one, many = steps_of(devices=1), steps_of(mesh=mesh, devices=8)
    params = [params_of(steps, 0.5, seed=5) for steps in (one, many)]
    np.testing.assert_array_equal(
        write(one, params[0], PROMPTS, 25), write(many, params[1], PROMPTS, 25)
    )
    sampler = Sampler(temperature=1.0, top_k=5, top_p=0.9, repetition_penalty=1.1)
    np.testing.assert_array_equal(
        write(one, params[0], PROMPTS, 9, sampler), write(many, params[1], PROMPTS, 9, sampler)
    )
    parts = decoder(many, params[1], GREEDY, VOCAB)
    shards = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    kernel = parts.params["h_1"]["mlp"]["up_kernel"]
    assert kernel.addressable_shards[0].data.size * shards == kernel.size
    _, (cache, _) = parts._read([[1]] * 8, jax.random.key(0), 0, 1)
    keys = cache.layers[1][0]
    assert keys.addressable_shards[0].data.size * 8 == keys.size  # rows x heads


def test_fault_22_neither_length_nor_prompt_compiles_anew(steps):
    parts = decoder(steps, params_of(steps, 0.3), Sampler(), VOCAB)
    with compilations() as first:
        list(parts.ids([[1, 2]], 12))
    assert (parts.prefill._cache_size(), parts.step._cache_size()) == (1, 1) and len(first) >= 2
    with compilations() as more:
        list(parts.ids([[1, 2]], 3))
        list(parts.ids([[3, 4, 5, 6, 1], [1]], 9))
    assert more == []
    with compilations() as longer:  # from position 16 of 20, and ever on: windows of 20
        list(parts.ids([[1, 2] * 8], 40))
    assert len(longer) == 1 and parts.step._cache_size() == 1
    from_nothing = decoder(steps, params_of(steps, 0.3), Sampler(), VOCAB)
    list(from_nothing.ids([[1], [2]], 12))
    sizes = from_nothing.step._cache_size(), from_nothing.prefill._cache_size()
    assert sizes == (1, 0), "one token each needs no prefill"


@contextlib.contextmanager
def compilations():
    """A list that grows by one with every compilation."""
    seen: list = []
    listening = True

    def listen(event: str, *_: object, **__: object) -> None:
        if listening and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    listening = False


def test_fault_06_every_token_has_its_own_key(steps):
    """nanogpt-jax: with one key a flat distribution gave the same id nineteen times in twenty."""
    params = jax.tree.map(jnp.zeros_like, params_of(steps, 0.0))  # all logits 0: uniform
    got = write(steps, params, [[1]] * 40, 40, Sampler(temperature=1.0, top_k=0))
    assert got.shape == (40, 40) and got.max() < VOCAB
    chance = 1 / VOCAB
    error = 5 * math.sqrt(chance * (1 - chance) / got.size)
    for a, b in ((got[:, 1:], got[:, :-1]), (got[1:], got[:-1])):  # steps, rows
        assert abs((a == b).mean() - chance) < error
    np.testing.assert_allclose(np.bincount(got.ravel()) / got.size, chance, atol=error)


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    """nanoGPT's habit of vocab_size 50304 for a tokenizer of 50257."""
    steps = steps_of({"vocab_size": 16})
    params = jax.tree.map(jnp.zeros_like, params_of(steps, 0.0))
    got = write(steps, params, [[1]] * 40, 20, Sampler(temperature=1.0, top_k=0))
    assert got.max() == VOCAB - 1
    assert write(steps, params, [[1]] * 40, 20, Sampler(1.0, 0), vocab=99).max() == 15


def test_seed_decides_and_other_texts_do_not(steps):
    parts = decoder(steps, params_of(steps, 0.3), Sampler(1.0), VOCAB)
    run = lambda seed, n=2: np.stack(list(parts.ids([[1]] * n, 12, seed)), 1)  # noqa: E731
    assert (run(1) == run(1)).all() and (run(1) != run(2)).any()
    one, five = run(1, 1), run(1, 5)
    assert (five[0] == one[0]).all() and len({tuple(ids) for ids in five.tolist()}) == 5
    # With a seed of its own, a text does not depend on its place either.
    own = run([7, 8])
    assert (run([8, 7]) == own[::-1]).all() and (own[0] != own[1]).any()


@pytest.mark.oracle
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_that_of_transformers(penalty):
    """Same weights; prompts of several lengths in one batch, which transformers masks too."""
    torch = pytest.importorskip("torch", reason="transformers generates with torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    steps = steps_of({"bias": True, "n_layer": 3, "n_embd": 12, "block_size": 64})
    params = params_of(steps, 0.5, seed=2)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=12, n_layer=3, n_head=2)
    ).eval()
    theirs.load_state_dict(as_transformers(jax.device_get(params), torch), strict=True)
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with torch.inference_mode():
        want = theirs.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )[:, width:]
    got = write(steps, params, PROMPTS, 40, Sampler(temperature=0.0, repetition_penalty=penalty))
    if penalty != 1:  # transformers also punishes id 0 where it pads
        got, want = got[1:2], want[1:2]
    np.testing.assert_array_equal(got, want.numpy())
    assert len(np.unique(got[-1])) >= 4


def as_transformers(params, torch):
    """Conv1D layout: kernels are [in, out] there too."""
    tensor = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    h, state = params["h"], {}
    for i in range(len(h["ln_1"]["scale"])):
        layer, size = jax.tree.map(lambda x, i=i: x[i], h), params["wte"].shape[1]
        a, m = layer["attn"], layer["mlp"]
        parts = {
            "ln_1.weight": layer["ln_1"]["scale"],
            "ln_1.bias": layer["ln_1"]["bias"],
            "ln_2.weight": layer["ln_2"]["scale"],
            "ln_2.bias": layer["ln_2"]["bias"],
            "attn.c_attn.weight": a["qkv_kernel"].reshape(size, -1),
            "attn.c_attn.bias": a["qkv_bias"].reshape(-1),
            "attn.c_proj.weight": a["proj_kernel"].reshape(-1, size),
            "attn.c_proj.bias": a["proj_bias"],
            "mlp.c_fc.weight": m["up_kernel"],
            "mlp.c_fc.bias": m["up_bias"],
            "mlp.c_proj.weight": m["down_kernel"],
            "mlp.c_proj.bias": m["down_bias"],
        }
        state |= {f"transformer.h.{i}.{name}": tensor(x) for name, x in parts.items()}
    wte = tensor(params["wte"][:VOCAB])
    return state | {
        "transformer.wte.weight": wte,
        "lm_head.weight": wte,
        "transformer.wpe.weight": tensor(params["wpe"]),
        "transformer.ln_f.weight": tensor(params["ln_f"]["scale"]),
        "transformer.ln_f.bias": tensor(params["ln_f"]["bias"]),
    }

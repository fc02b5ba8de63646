"""Sampling: the distribution drawn from, what is kept, keys, windows past block_size, compiles."""

import contextlib
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalegpt import generate, sharding, step
from scalegpt.command_line import validate
from scalegpt.generate import continuations, sample_token

VOCAB, BLOCK = 11, 6
DRAWS = 20_000

sample = jax.jit(sample_token, static_argnums=(2, 3))


def draws(scores, temperature, top_k, seed=0, count=DRAWS):
    """Frequencies of the ids in `count` rows with the same scores."""
    rows = jnp.tile(jnp.asarray(scores, jnp.float32), (count, 1))
    ids = np.asarray(sample(rows, jax.random.key(seed), temperature, top_k))
    assert ids.shape == (count,) and ids.min() >= 0 and ids.max() < len(scores)
    return np.bincount(ids, minlength=len(scores)) / count


def softmax(x):
    p = np.exp(np.asarray(x, np.float64) - np.max(x))
    return p / p.sum()


# --- one token


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_scores_over_temperature(temperature):
    scores = np.array([0.3, -1.0, 2.0, 0.0, 1.5, -3.0])
    got, want = draws(scores, temperature, 0), softmax(scores / temperature)
    chi_square = DRAWS * ((got - want) ** 2 / want).sum()
    assert chi_square < 30  # 5 degrees of freedom: p = 1.5e-5
    wrong = softmax(scores / (temperature * 1.2))
    assert DRAWS * ((got - wrong) ** 2 / wrong).sum() > 30  # that this test would notice


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_top_k_keeps_exactly_k_and_their_proportions(top_k):
    scores = np.array([0.3, 0.1, 0.9, 0.0, 0.5, -0.2, 0.7])
    got = draws(scores, 0.7, top_k)
    kept = np.sort(np.argsort(scores)[-top_k:])
    assert np.flatnonzero(got).tolist() == kept.tolist()
    want = softmax(scores[kept] / 0.7)
    assert np.abs(got[kept] - want).max() < 5 * math.sqrt(0.25 / DRAWS)


def test_top_k_of_0_or_of_everything_keeps_all():
    scores = np.array([0.3, 0.1, 0.9, 0.0])
    assert (draws(scores, 1.0, 0) > 0).all()
    np.testing.assert_array_equal(draws(scores, 1.0, 0), draws(scores, 1.0, 4))
    np.testing.assert_array_equal(draws(scores, 1.0, 0), draws(scores, 1.0, 200))


def test_temperature_0_is_the_likeliest_id():
    scores = jax.random.normal(jax.random.key(0), (50, 7))
    for key in (1, 2):
        got = sample(scores, jax.random.key(key), 0.0, 3)
        np.testing.assert_array_equal(got, np.asarray(scores).argmax(-1))


def test_low_temperature_comes_close_to_it():
    assert draws([0.3, 0.1, 0.9, 0.0], 0.01, 0)[2] == 1


def test_rows_and_keys_draw_independently():
    flat = jnp.zeros((64, 1000))
    first, second = (np.asarray(sample(flat, jax.random.key(k), 1.0, 0)) for k in (1, 2))
    for a, b in ((first[1:], first[:-1]), (first, second)):
        assert (a == b).mean() < 0.1  # 1/1000 by chance
    assert len(np.unique(first)) > 50  # of 64 draws out of 1000
    np.testing.assert_array_equal(first, sample(flat, jax.random.key(1), 1.0, 0))


def test_fault_22_padded_ids_are_never_drawn():
    from scalegpt.model import logits

    # 5 real ids of 128, all scores 0: without the mask 96 draws in 100 would be padding.
    scores = np.asarray(logits(jnp.zeros((1, 4)), jnp.zeros((128, 4)), 5))[0]
    for temperature, top_k in ((1.0, 0), (1e6, 0), (1e-3, 0), (1.0, 200), (1.0, 7)):
        got = draws(scores, temperature, top_k, count=2000)
        assert got[5:].sum() == 0 and (got[:5] > 0).all()


# --- continuations


@pytest.fixture(scope="module")
def steps():
    values = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": BLOCK,
                  "vocab_size": VOCAB, "vocab_multiple": 16},
        "batch": {"sequences": 2}, "data": {"path": "x"}, "run": {"out_dir": "y"},
    }  # fmt: skip
    config = validate(values, "test")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
    return step.build_for_use(config, mesh, microbatch=1)


def params_of(steps, scale, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, steps.abstract.params)
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, steps.abstract.params))


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


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6], list(range(10))])
def test_greedy_continuation_is_a_naive_loop_over_the_model(steps, prompt):
    """Also past block_size: from then on the model sees the last block_size tokens."""
    params = params_of(steps, 0.5, seed=5)
    local = jax.tree.map(jnp.asarray, jax.device_get(params))
    text = list(prompt)
    apply = jax.jit(lambda x: steps.model.apply({"params": local}, x))
    for _ in range(12):
        window = np.array([text[-BLOCK:]], np.int32)
        hidden = np.asarray(apply(window))[0, -1]
        text.append(int((hidden @ local["wte"].T)[:VOCAB].argmax()))
    got = continuations(
        steps, params, np.array(prompt), samples=3, max_new_tokens=12, temperature=0.0
    )
    assert got == [text[len(prompt) :]] * 3
    assert len(set(got[0])) > 3  # a model that repeats one id would prove little


def test_fault_22_a_continuation_is_one_compilation(steps, monkeypatch):
    made = []
    original = generate._next_token

    def keep(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(generate, "_next_token", keep)
    params = params_of(steps, 0.3)
    run = lambda n: continuations(  # noqa: E731
        steps, params, np.array([1, 2]), samples=2, max_new_tokens=n, temperature=1.0, top_k=5
    )
    with compilations() as first:
        run(1)
    with compilations() as short:
        run(2)
    with compilations() as long:
        run(3 * BLOCK)
    assert len(first) >= 1 and [f._cache_size() for f in made] == [1, 1, 1]
    # The one function that every call makes anew, and nothing for every token.
    assert len(short) == len(long) == 1


def test_fault_06_every_token_has_its_own_key(steps):
    """nanogpt-jax: with one key a flat distribution gave the same id nineteen times in twenty."""
    params = jax.tree.map(jnp.zeros_like, params_of(steps, 0.0))  # all logits 0: uniform
    got = np.array(
        continuations(
            steps, params, np.array([1]), samples=40, max_new_tokens=40, temperature=1.0, top_k=0
        )
    )
    assert got.shape == (40, 40) and got.max() < VOCAB
    chance = 1 / VOCAB
    error = 5 * math.sqrt(chance * (1 - chance) / got.size)
    for a, b in ((got[:, 1:], got[:, :-1]), (got[1:], got[:-1])):  # steps, rows
        assert abs((a == b).mean() - chance) < error
    np.testing.assert_allclose(np.bincount(got.ravel()) / got.size, chance, atol=error)


def test_seed_decides(steps):
    params = params_of(steps, 0.3)

    def run(seed):
        return continuations(
            steps, params, np.array([1]), samples=2, max_new_tokens=12, temperature=1.0, seed=seed
        )

    assert run(1) == run(1) != run(2)


def test_a_sample_does_not_depend_on_how_many_there_are(steps):
    params = params_of(steps, 0.3)
    one, five = (
        continuations(steps, params, np.array([1]), samples=n, max_new_tokens=8) for n in (1, 5)
    )
    assert len(one) == 1 and len(five) == 5 and five[0] == one[0]
    assert len({tuple(ids) for ids in five}) == 5


def test_stop_ends_a_continuation_and_is_not_part_of_it(steps):
    params = jax.tree.map(jnp.zeros_like, params_of(steps, 0.0))
    arguments = dict(samples=6, max_new_tokens=30, temperature=1.0, seed=3)
    whole = continuations(steps, params, np.array([1]), **arguments)
    stopped = continuations(steps, params, np.array([1]), **arguments, stop=4)
    assert any(4 in ids for ids in whole)
    for ids, cut in zip(whole, stopped, strict=True):
        assert cut == (ids[: ids.index(4)] if 4 in ids else ids)
    # A stop id in the prompt ends nothing.
    assert continuations(steps, params, np.array([4]), **arguments, stop=-1) == continuations(
        steps, params, np.array([4]), **arguments
    )


# --- the command


def test_fault_02_every_flag_of_the_command_has_its_effect(monkeypatch, capsys, tmp_path):
    """nanogpt-jax parsed --init_from and the rest, and then ran with a fresh default config."""
    seen: dict = {}

    class Codec:
        eot = None

        def encode_prompt(self, text):
            return np.array([ord(c) for c in text])

        def decode(self, ids):
            return "".join(map(chr, ids))

    def load(flags, **kwargs):
        seen.update(run=flags.run, checkpoint=flags.checkpoint)
        return SimpleNamespace(tokenizer="t", steps="s", params="p")

    def fake(steps, params, prompt, **kwargs):
        seen.update(kwargs, prompt=prompt.tolist())
        return [[88, 89]] * kwargs["samples"]

    monkeypatch.setattr(generate.trained, "load", load)
    monkeypatch.setattr(generate, "continuations", fake)
    monkeypatch.setattr(generate.tokenizer, "load", lambda description: Codec())
    flags = ["--num-samples=2", "--max-new-tokens=7", "--temperature=0.3", "--top-k=9", "--seed=5"]
    assert generate.main(["--run=out/x", "--checkpoint=latest", "--prompt=AB", *flags]) == 0
    expected = dict(
        run="out/x", checkpoint="latest", prompt=[65, 66], samples=2, max_new_tokens=7,
        temperature=0.3, top_k=9, seed=5,
    )  # fmt: skip
    assert expected.items() <= seen.items()
    assert capsys.readouterr().out.count("ABXY") == 2
    (tmp_path / "p.txt").write_text("CD", encoding="utf-8")
    assert generate.main(["--run=out/x", f"--prompt-file={tmp_path / 'p.txt'}"]) == 0
    assert seen["prompt"] == [67, 68] and seen["checkpoint"] == "best" and seen["samples"] == 1


@pytest.mark.parametrize(
    "flag", ["--num-samples=0", "--max-new-tokens=0", "--temperature=-1", "--top-k=-1"]
)
def test_flag_out_of_range_is_named(flag):
    with pytest.raises(ValueError, match=f"{flag.split('=')[0]}=.* must be at least"):
        generate.main(["--run=out/none", "--prompt=x", flag])


def test_unreadable_prompt_file_is_named(tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "none", bad):
        with pytest.raises(ValueError, match="cannot read --prompt-file"):
            generate.main(["--run=out/none", f"--prompt-file={path}"])

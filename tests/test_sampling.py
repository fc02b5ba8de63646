"""One token: the distribution drawn from, what is kept, keys."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalegpt.config.recipe import ModelConfig
from scalegpt.inference.sampling import Sampler, keys_at, sample_token
from scalegpt.model.gpt import logits

DRAWS = 20_000
# 6 ids, the sums of whose likeliest are nowhere near a top_p of the tests.
SCORES = np.array([0.3, -1.0, 2.0, 0.0, 1.5, -3.0])
ALL = dict(temperature=1.0, top_k=0)


@partial(jax.jit, static_argnums=2)
def sample(scores, key, sampler, seen=None):
    return sample_token(scores, keys_at(key, jnp.zeros(len(scores), int)), sampler, seen)


def draws(scores, seen=None, count=DRAWS, **options):
    """Frequencies of the ids in `count` rows with the same scores."""
    rows = jnp.tile(jnp.asarray(scores, jnp.float32), (count, 1))
    seen = None if seen is None else jnp.tile(jnp.asarray(seen), (count, 1))
    ids = np.asarray(sample(rows, jax.random.key(0), Sampler(**options), seen))
    assert ids.shape == (count,) and ids.min() >= 0 and ids.max() < len(scores)
    return np.bincount(ids, minlength=len(scores)) / count


def softmax(x):
    p = np.exp(np.asarray(x, np.float64) - np.max(x))
    return p / p.sum()


def assert_drawn_from(want, got):
    """Nothing that has no probability, and the rest by chi-square."""
    assert (got[want == 0] == 0).all()
    real = want > 0
    assert DRAWS * ((got - want)[real] ** 2 / want[real]).sum() < 30  # 5 degrees: p = 1.5e-5


def reference(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=()):
    """The definitions, one id after the other."""
    scores = scores.copy()
    for i in np.flatnonzero(seen):
        scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
    p = softmax(scores / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    so_far = 0.0
    for i in order:
        if so_far >= top_p:
            p[i] = 0
        so_far += p[i]
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_scores_over_temperature(temperature):
    got = draws(SCORES, temperature=temperature, top_k=0)
    assert_drawn_from(softmax(SCORES / temperature), got)
    wrong = softmax(SCORES / (temperature * 1.2))
    assert DRAWS * ((got - wrong) ** 2 / wrong).sum() > 30  # that this test would notice


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": k} for k in (1, 2, 5, 6, 200)),
        *({"top_p": p} for p in (0.01, 0.5, 0.8, 0.99)),
        *({"min_p": p} for p in (0.1, 0.5, 1.0)),
        {"top_k": 4, "top_p": 0.85},  # top_p of what top_k has left, as transformers does
        {"top_k": 5, "top_p": 0.97, "min_p": 0.15, "temperature": 1.3},
    ],
)
def test_what_is_kept_and_its_proportions_follow_the_definitions(options):
    assert_drawn_from(reference(SCORES, **options), draws(SCORES, **(ALL | options)))


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(penalty):
    seen = np.array([True, True, False, False, True, False])
    got = draws(SCORES, seen=seen, repetition_penalty=penalty, **ALL)
    assert_drawn_from(reference(SCORES, penalty=penalty, seen=seen), got)
    assert DRAWS * np.abs(got - softmax(SCORES)).max() > 400
    scores = np.array([[1.0, 0.9, -1.0]])  # and before the greedy choice
    greedy = Sampler(temperature=0.0, repetition_penalty=1.5)
    for first_seen, likeliest in ((False, 0), (True, 1)):
        seen = jnp.array([[first_seen, False, False]])
        assert sample(jnp.asarray(scores), jax.random.key(0), greedy, seen) == likeliest


def test_temperature_0_is_the_likeliest_id():
    scores = jax.random.normal(jax.random.key(0), (50, 7))
    for key in (1, 2):
        got = sample(scores, jax.random.key(key), Sampler(temperature=0.0, top_k=3))
        np.testing.assert_array_equal(got, np.asarray(scores).argmax(-1))
    assert draws(SCORES, temperature=0.01, top_k=0)[2] == 1


def test_rows_and_keys_draw_independently():
    flat = jnp.zeros((64, 1000))
    for options in ({"top_k": 0}, {"top_k": 1000}):
        sampler = Sampler(temperature=1.0, **options)
        first, second = (np.asarray(sample(flat, jax.random.key(k), sampler)) for k in (1, 2))
        for a, b in ((first[1:], first[:-1]), (first, second)):
            assert (a == b).mean() < 0.1  # 1/1000 by chance
        assert len(np.unique(first)) > 50  # of 64 draws out of 1000
        np.testing.assert_array_equal(first, sample(flat, jax.random.key(1), sampler))


@pytest.mark.parametrize("temperature", [1.0, 1e6, 1e-3])
@pytest.mark.parametrize("options", [{}, {"top_k": 200}, {"top_k": 7}, {"top_p": 0.999}])
def test_fault_22_padded_ids_are_never_drawn(temperature, options):
    # 5 real ids of 128, all scores 0: without the mask 96 draws in 100 would be padding.
    config = ModelConfig(vocab_size=5)
    scores = np.asarray(logits(jnp.zeros((1, 4)), jnp.zeros((128, 4)), config))[0]
    got = draws(scores, count=2000, **(ALL | options | {"temperature": temperature}))
    assert got[5:].sum() == 0 and (got[:5] > 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_value_without_a_meaning_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}={value} must be"):
        Sampler(**wrong)

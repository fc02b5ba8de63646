"""Slots: the same text whoever else is served, drawn as `sample_token` does, by two programs."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import hidden_states, params_of, steps_of
from test_sampling import ALL, DRAWS, SCORES, assert_drawn_from, reference

from scalegpt.data import tokenizer
from scalegpt.inference.continuation import Continuation
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.model.gpt import head_table
from scalegpt.server import slots as server
from scalegpt.server.generation import Generation, Order
from scalegpt.server.slots import READ, Slots

CODEC = tokenizer.load({"kind": "ids", "vocab_size": 263})
SAMPLERS = [
    Sampler(),
    Sampler(temperature=0.0),
    Sampler(1.0, 0, 0.9),
    Sampler(1.0, 0, 1.0, 0.1, 1.3),
    Sampler(1.0, 5, 0.5),
    Sampler(1.0, 0),
    Sampler(1e-38, 0),
    Sampler(1e38, 2**31 - 1, 1e-40, 1.0, 1e-40),
]


def model_of(mesh=None, devices=1):
    """Steps, parameters and decoder of a model of 256 places, whose attention has two sizes."""
    size = {"n_embd": 32, "n_head": 4, "block_size": 4 * READ, "vocab_size": CODEC.vocab_size}
    parts = {"vocab_multiple": 8, "smear": True, "ngram_rows": 52, "ngram": 4}
    steps = steps_of(size | parts, mesh, devices)
    params = params_of(steps, 0.2)
    return steps, params, decoder(steps, params, Sampler(), CODEC.vocab_size)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.mark.slow
def test_a_text_is_what_it_would_be_alone_and_nothing_is_compiled_for_it(model):
    rng = np.random.default_rng(0)
    lengths = [1, 7, READ, READ + 1, 130, 3 * READ, 30, 2]
    slots = Slots(model[2], len(lengths))
    slots.compile()
    generation = Generation(slots)

    def ask(number: int) -> tuple[list, threading.Event]:
        """Order a text; the list takes its tokens until the event."""
        sampler, tokens, done = SAMPLERS[number], [], threading.Event()
        prompt = prompts[number]

        def take(token) -> None:
            tokens.append(token)
            if token.finish:
                done.set()

        text = Continuation(CODEC, (), prompt)
        generation.place(Order(prompt, text, 20 + 5 * number, sampler, number, take))
        return tokens, done

    def wait(tokens: list, done: threading.Event) -> list:
        assert done.wait(60)
        return tokens

    prompts = [rng.integers(0, CODEC.vocab_size, size=n).astype(np.int32) for n in lengths]
    alone = [wait(*ask(number)) for number in range(8)]
    together = [wait(*asked) for asked in [ask(number) for number in range(8)]]
    assert together == alone  # with the probabilities, bit for bit
    order = [3, 0, 7, 5, 1, 6, 2, 4]  # in other slots, and each beside others
    again = dict(zip(order, [wait(*a) for a in [ask(number) for number in order]], strict=True))
    assert [again[number] for number in range(8)] == alone
    assert [len(tokens) for tokens in alone] == [20 + 5 * number for number in range(8)]
    # Eight ways to draw, eight lengths: the two programs that `compile` has made.
    assert (slots.reader._cache_size(), slots.writer._cache_size()) == (1, 1)
    generation.stop()
    generation.join()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_greedy_texts_and_probabilities_are_those_of_the_whole_text(model, mesh):
    decode = model_of(mesh, 8)[2] if mesh else model[2]
    local = model[1]
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, CODEC.vocab_size, size=n).astype(np.int32) for n in (2, 100)]
    slots, tokens = Slots(decode, 3), {0: [], 2: []}
    for slot, prompt in zip(tokens, prompts, strict=True):
        slots.open(slot, prompt, Sampler(temperature=0.0), 0, 0)
        while not slots.read(slot):
            pass
    for _ in range(40):
        for slot, drawn in zip(tokens, slots.write([*tokens]), strict=True):
            slots.append(slot, drawn.id)
            tokens[slot].append(drawn)
    for prompt, drawn in zip(prompts, tokens.values(), strict=True):
        text = [*prompt, *(token.id for token in drawn)]
        padded = np.array([text + [0] * (256 - len(text))])  # nothing looks to the right
        hidden = np.asarray(hidden_states(model[0].model, local, padded))[0]
        scores = hidden[len(prompt) - 1 : len(text) - 1] @ np.asarray(head_table(local)).T
        want = np.asarray(jax.nn.log_softmax(scores[:, : CODEC.vocab_size]))
        for row, token in zip(want, drawn, strict=True):
            ids, logprobs = zip(*token.top, strict=True)
            assert token.id == ids[0] == row.argmax() and token.logprob == logprobs[0]
            assert len(set(ids)) == 20 and [*logprobs] == sorted(logprobs, reverse=True)
            np.testing.assert_allclose(logprobs, row[[*ids]], atol=2e-5)
            np.testing.assert_allclose(logprobs, np.sort(row)[::-1][:20], atol=2e-5)


@pytest.mark.slow
def test_a_token_is_drawn_from_the_distribution_of_sample_token(monkeypatch):
    monkeypatch.setattr(server, "LIKELIEST", 3)  # so that both sorts are taken
    seen = np.array([0, 1, 1, 0, 0, 0], bool)
    text = jnp.array([*np.flatnonzero(seen), -1], jnp.int32)
    draw = jax.jit(jax.vmap(partial(server._draw, jnp.asarray(SCORES, jnp.float32), text)))
    defaults = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    for options in (
        ALL,
        ALL | {"temperature": 0.5},
        ALL | {"top_k": 2},
        ALL | {"top_k": 4},
        ALL | {"top_p": 0.7},
        ALL | {"top_k": 3, "top_p": 0.7, "temperature": 2.0},
        ALL | {"min_p": 0.2},
        ALL | {"repetition_penalty": 1.7},
        ALL | {"repetition_penalty": 0.5, "top_k": 5, "min_p": 0.1},
    ):
        values = defaults | options
        given = {name: jnp.full(DRAWS, value) for name, value in values.items()}
        given |= {"seed": jnp.arange(DRAWS, dtype=jnp.uint32), "index": jnp.ones(DRAWS, jnp.int32)}
        got = np.bincount(np.asarray(draw(given)), minlength=6) / DRAWS
        penalty = values.pop("repetition_penalty")
        assert_drawn_from(reference(SCORES, **values, penalty=penalty, seen=seen), got)

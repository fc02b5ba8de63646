"""Learning from rewards: gradients against NumPy, rollouts against the decoder, whole runs."""

import hashlib
import json
import math
from functools import partial
from types import SimpleNamespace

import crash_test
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import test_sft
import tiny_run

from scalegpt import train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import Config, GrpoConfig
from scalegpt.data.datasets import resolved
from scalegpt.data.prompts import Prompts
from scalegpt.data.token_files import Dataset
from scalegpt.inference import rollouts as rolling
from scalegpt.inference.decode import decoder
from scalegpt.inference.rollouts import Rollouts
from scalegpt.inference.sampling import Sampler
from scalegpt.model.gpt import head_table
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import Interrupted, StopRequest
from scalegpt.run import rewarded
from scalegpt.run.history import read_history
from scalegpt.run.ledger import Ledger
from scalegpt.step import build, build_for_training, sharding
from scalegpt.step.objective import advantages, divisor, log_probs_read, policy_loss

CHAT = {"kind": "chat", "base": {"kind": "char", "chars": "abc"}}
VOCAB, END = 11, 7  # a b c, then bos system user assistant end call result back


def given(grpo=None, **sections):
    grpo = {"reward": "exact", "prompts": 4, "samples": 8, "max_new_tokens": 2, **(grpo or {})}
    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": VOCAB}
    model |= {"vocab_multiple": 16, "tie_word_embeddings": False, "dtype": "float32"}
    values = {
        "objective": {"name": "grpo", "width": 8},
        "grpo": grpo,
        "data": {"path": "x"},
        "mesh": {"data": 1},
        "run": {"out_dir": "y", "init_from": "z"},
        **sections,
    }
    return Config.model_validate({**values, "model": {**model, **sections.get("model", {})}})


def steps_of(config, devices=1):
    return build_for_training(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))


# --- the objective


def toy(grpo):
    """A model of 4 ids, of which 3 ends an answer, the prompt [0, 1], and all answers of up to two
    tokens with their probabilities, from logits that NumPy has turned into them."""
    model = {"vocab_size": 4, "vocab_multiple": 4, "n_embd": 8}
    config = given(grpo, model=model)
    gpt = build.GPT(config.model, jnp.float32, "xla")
    params = jax.eval_shape(gpt.init, jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(
        lambda x: jnp.asarray(0.7 * np.random.default_rng(x.size).normal(size=x.shape), x.dtype),
        jax.tree.map(
            lambda x: getattr(x, "value", x), params, is_leaf=lambda x: hasattr(x, "value")
        ),
    )
    answers = [[a] if a == 3 else [a, b] for a in range(4) for b in range(4 if a < 3 else 1)]
    tokens = np.full((len(answers), 5), -1, np.int32)
    for row, answer in zip(tokens, answers, strict=True):
        row[: 2 + len(answer)] = [~0, ~1, *answer]
    inputs = np.where(tokens[:, :-1] < 0, ~tokens[:, :-1], tokens[:, :-1])
    hidden = np.asarray(jax.jit(gpt.apply)({"params": params}, inputs), np.float64)
    scores = hidden @ np.asarray(head_table(params), np.float64).T / grpo["temperature"]
    chance = np.exp(scores - scores.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    return SimpleNamespace(
        config=config.grpo, gpt=gpt, params=params, answers=answers, tokens=tokens,
        hidden=hidden, chance=chance,
        log_probs=np.array(
            [[np.log(chance[i, 1 + t, a]) for t, a in enumerate(x)] + [0] * (2 - len(x))
             for i, x in enumerate(answers)]
        ),
    )  # fmt: skip


def batch_of(toy, advantage, **more):
    zeros = np.zeros((len(toy.answers), 4), np.float32)
    sampled = zeros.copy()
    sampled[:, 1:3] = toy.log_probs
    return {"tokens": toy.tokens, "advantage": np.float32(advantage), "sampled": sampled, **more}


@partial(jax.jit, static_argnums=(0, 1))
def compiled(config, gpt, params, batch):
    def loss(params):
        return policy_loss(config, gpt, params, batch, None)

    return jax.value_and_grad(loss, has_aux=True)(params)


def learned(toy, batch, config=None):
    """Loss, figures, and the gradient of the head's table."""
    (loss, figures), gradient = compiled(config or toy.config, toy.gpt, toy.params, batch)
    return loss, figures, np.asarray(gradient["head_kernel"])


def test_the_expected_gradient_over_all_answers_is_the_exact_policy_gradient():
    case = toy({"temperature": 0.7})
    probability = np.exp(case.log_probs.sum(1))
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-6)
    reward = np.random.default_rng(1).normal(size=len(case.answers))
    value = probability @ reward
    exact = np.zeros((4, 8))  # of the expected reward, in the head's table
    for i, answer in enumerate(case.answers):
        for t, token in enumerate(answer):
            slope = (np.arange(4) == token) - case.chance[i, 1 + t]
            exact += (probability[i] * (reward[i] - value) / 0.7) * np.outer(
                slope, case.hidden[i, 1 + t]
            )
    figures, found = learned(case, batch_of(case, probability * (reward - value)))[1:]
    np.testing.assert_allclose(-found, exact, atol=1e-6)
    assert np.abs(exact[3]).max() > 0.01  # the mark that ends an answer is learned
    gap, count = figures["rl/logp_gap"]
    assert gap / count < 1e-5 and count == sum(map(len, case.answers))


@pytest.mark.parametrize("divide", ["constant", "tokens", "sequences"])
def test_what_an_answers_tokens_count(divide):
    case = toy({"temperature": 1.0, "divide": divide, "max_new_tokens": 2})
    advantage = np.random.default_rng(2).normal(size=len(case.answers)).astype(np.float32)
    batch = batch_of(case, advantage)
    loss = learned(case, batch)[0]
    size = np.array([len(x) for x in case.answers])
    sums = -advantage * case.log_probs.sum(1)
    expected, count = {
        "constant": (sums.sum(), 2 * len(size)),
        "tokens": (sums.sum(), size.sum()),
        "sequences": ((sums / size).sum(), len(size)),
    }[divide]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert divisor(case.config, batch) == count


def test_several_updates_from_the_same_answers_are_clipped():
    case = toy({"temperature": 1.0, "updates": 2, "clip_low": 0.1, "clip_high": 0.3})
    rng = np.random.default_rng(4)
    advantage = rng.normal(size=len(case.answers)).astype(np.float32)
    old = np.zeros((len(case.answers), 4), np.float32)
    old[:, 1:3] = case.log_probs + rng.normal(0, 0.4, case.log_probs.shape)
    batch = batch_of(case, advantage, old=old)
    loss, figures, _ = learned(case, batch)
    expected = clipped = 0
    for i, answer in enumerate(case.answers):
        for t in range(len(answer)):
            ratio = math.exp(case.log_probs[i, t] - old[i, 1 + t])
            gains = ratio * advantage[i], min(max(ratio, 0.9), 1.3) * advantage[i]
            expected -= min(gains)
            clipped += gains[1] < gains[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert figures["rl/clipped"][0] == clipped > 0


def test_the_distance_from_the_reference():
    case = toy({"temperature": 1.0, "kl": 1.0, "kl_estimator": "k2"})
    single = [i for i, answer in enumerate(case.answers) if len(answer) == 1 or answer[1] == 0]
    case.answers = [case.answers[i][:1] for i in single]  # one token: each of the four ids
    case.tokens, case.log_probs = case.tokens[single], case.log_probs[single]
    case.tokens[:, 3:] = -1
    case.log_probs[:, 1] = 0
    probability = np.exp(case.log_probs[:, 0])
    other = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    reference = np.zeros((4, 4), np.float32)
    reference[:, 1] = other
    divergence = probability @ (case.log_probs[:, 0] - other)
    estimates, found = [], np.zeros((4, 8))
    for i in range(4):
        batch = {k: v[i : i + 1] for k, v in batch_of(case, np.zeros(4)).items()}
        figures, gradient = learned(case, batch | {"reference": reference[i : i + 1]})[1:]
        estimates.append(float(figures["rl/kl"][0]))
        found += probability[i] * gradient
    assert min(estimates) >= 0
    np.testing.assert_allclose(probability @ estimates, divergence, rtol=1e-5)
    # The expected gradient of k2 is that of the divergence itself.
    slope = probability * (case.log_probs[:, 0] - other - divergence)
    np.testing.assert_allclose(found, np.outer(slope, case.hidden[single[0], 1]), atol=1e-6)
    # A policy that has left the reference behind overflows nothing.
    far = batch_of(case, np.zeros(4), reference=np.full((4, 4), 1e4, np.float32))
    loss, _, gradient = learned(case, far, case.config.model_copy(update={"kl_estimator": "k3"}))
    assert math.isfinite(loss) and np.isfinite(gradient).all()


def test_advantages():
    values = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    plain = advantages(GrpoConfig(), values)
    np.testing.assert_array_equal(plain, np.float32([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]))
    scaled = advantages(GrpoConfig(scale="group"), values)
    spread = math.sqrt(4 * 0.25 / 3)
    np.testing.assert_allclose(scaled[:4], np.array([1, -1, -1, 1]) * 0.5 / (spread + 1e-4))
    assert not scaled[4:].any()


# --- rollouts


@pytest.fixture(scope="module")
def steps():
    return steps_of(given({"temperature": 0.8}, model={"logit_softcap": 15.0}))


@pytest.fixture(scope="module")
def source(steps):
    return source_of(given({"temperature": 0.8}, model={"logit_softcap": 15.0}), steps)


def source_of(config, steps, texts=("a", "cab", "bb"), answer="b", **options):
    examples = [
        {"messages": [{"role": "user", "content": text}], "answer": answer} for text in texts
    ]
    prompts = Prompts(examples, CHAT, 7)
    dataset = Dataset("x", CHAT, VOCAB, prompts, prompts, None, "", "prompts")
    phases, stop = Phases(config.run), options.get("check_stop", lambda: None)
    return rewarded.rewarded_source(
        config, [dataset], steps, phases, stop, options.get("reference")
    )


def lively(steps, seed=0):
    """A state whose head is not 0, so that ids differ in their probability."""
    rng, state = np.random.default_rng(seed), steps.init()
    head = state.params["head_kernel"]
    new = jnp.asarray(rng.normal(0, 0.5, head.shape), head.dtype)
    return state.replace(params={**state.params, "head_kernel": new})


@pytest.mark.slow
def test_each_prompt_is_read_once_and_its_answers_are_those_of_the_decoder(steps, monkeypatch):
    shapes, next_scores = [], rolling.next_scores

    def noted(model, vocab_size, params, tokens, cache):
        shapes.append(tokens.shape)
        return next_scores(model, vocab_size, params, tokens, cache)

    monkeypatch.setattr(rolling, "next_scores", noted)
    params = lively(steps).params
    prompts = [np.array(ids, np.int32) for ids in ([3, 5, 0, 7, 6], [3, 5, 1, 2, 1, 7, 6])]
    roll = rolling.rollouts(steps, VOCAB, END, 3, 6, 1e-5)  # so cold that it is greedy
    found = roll(params, prompts, jax.random.key(0))
    assert shapes == [(2, 16), (6, 1)]
    write = decoder(steps, params, Sampler(temperature=0), VOCAB)
    own = np.stack(list(write.ids([p for p in prompts for _ in range(3)], 6)), 1)
    for answer, ended, row in zip(found.answers, found.ended, own, strict=True):
        expected = row[: np.argmax(row == END) + 1] if END in row else row
        np.testing.assert_array_equal(answer, expected)
        assert ended == (END in row)


def test_an_update_learns_from_the_probabilities_that_were_drawn_from(steps, source):
    state = lively(steps)
    batch, figures = source(state, 1)
    again = source_of(given({"temperature": 0.8}, model={"logit_softcap": 15.0}), steps)
    jax.tree.map(np.testing.assert_array_equal, batch, again(state, 1)[0])
    assert {row[0] for row in figures["answers"]} == {"a", "cab", "bb"}
    tokens, sampled = (np.asarray(batch[k]).reshape(32, -1) for k in ("tokens", "sampled"))
    np.testing.assert_array_equal(sampled != 0, tokens[:, 1:] >= 0)
    assert len({tuple(row[row >= 0]) for row in tokens}) > 8  # the rows of a group differ
    rewards_ = np.array([row[2] for row in figures["answers"]]).reshape(4, 8)
    assert figures["rl/reward"] == rewards_.mean() and 0 < figures["rl/silent_groups"] < 1
    size = (tokens >= 0).sum(1)
    ended = (tokens == END).any(1)
    assert figures["rl/ended"] == ended.mean() and 0 < ended.mean() < 1
    assert figures["rl/length"] == (size - ended).mean()
    # The entropy of what is drawn from is near the mean of -log p over the draws.
    assert abs(figures["rl/entropy"] + sampled.sum() / size.sum()) < 0.4

    silent = {**batch, "advantage": jnp.zeros_like(batch["advantage"])}
    _, metrics = steps.train(steps.init(), silent)
    assert metrics["train/grad_norm"] == 0 and metrics["train/loss"] == 0
    _, metrics = steps.train(state, batch)
    assert metrics["train/grad_norm"] > 0 and 0 < metrics["rl/logp_gap"] < 1e-4


def test_rows_hold_prompt_and_answer_and_may_leave_out_what_did_not_end():
    drawn = Rollouts(
        [np.array([1, END]), np.array([2, 2])],
        np.array([True, False]),
        np.array([[-0.5, -0.25], [-1.0, -2.0]], np.float32),
        0.0,
        1.0,
    )
    prompts = [np.array([3, 5, 0], np.int32), np.array([3, 5], np.int32)]
    better = np.float32([0.5, -0.5])
    rows = rewarded._rows(given(), prompts, drawn, better)
    assert rows["tokens"].tolist() == [
        [~3, ~5, ~0, 1, END, -1, -1, -1, -1],
        [~3, ~5, 2, 2, -1, -1, -1, -1, -1],
    ]
    assert rows["sampled"].tolist() == [[0, 0, -0.5, -0.25, 0, 0, 0, 0], [0, -1, -2, 0, 0, 0, 0, 0]]
    masked = rewarded._rows(given({"mask_truncated": True}), prompts, drawn, better)["tokens"]
    assert masked[0].tolist() == rows["tokens"][0].tolist() and (masked[1] < 0).all()


def test_a_request_to_stop_is_heard_in_the_midst_of_a_rollout(steps):
    def stop():
        raise Interrupted

    config = given({"temperature": 0.8}, model={"logit_softcap": 15.0})
    with pytest.raises(Interrupted):
        source_of(config, steps, check_stop=stop)(steps.init(), 1)


@pytest.mark.slow
def test_a_bandit_learns_the_one_answer_that_is_rewarded_and_to_end_it():
    config = given(
        {"prompts": 4, "samples": 16, "max_new_tokens": 4},
        objective={"name": "grpo", "width": 12},
        optim={"lr": 0.02, "min_lr": 0.02, "schedule": "constant", "warmup_steps": 0, "steps": 60},
    )
    steps = steps_of(config)
    source, state, figures = source_of(config, steps), steps.init(), []
    for step in range(1, 61):
        batch, row = source(state, step)
        state, _ = steps.train(state, batch)
        figures.append(row)
    assert figures[0]["rl/reward"] < 0.3
    assert figures[-1]["rl/reward"] > 0.95 and figures[-1]["rl/length"] < 1.1


def one_update(backend="jit", mesh=None, microbatch=None, devices=1, **grpo):
    batch = {"microbatch": microbatch}
    config = given(
        {"updates": 2, "kl": 0.5, "kl_estimator": "k2", **grpo},
        batch=batch,
        mesh=mesh or {"data": 1},
        run={"out_dir": "y", "init_from": "z", "backend": backend},
        optim={"lr": 1e-2, "warmup_steps": 0, "steps": 1000},
    )
    steps, rng = steps_of(config, devices), np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (32, 9), dtype=np.int32)
    for i, row in enumerate(tokens):  # answers as uneven as 1 and 6
        row[:3] = ~row[:3]
        row[4 + i % 6 :] = -1
    rows = {"tokens": tokens, "advantage": rng.normal(size=32).astype(np.float32)}
    for name in log_probs_read(config.grpo):
        rows[name] = (-rng.random((32, 8))).astype(np.float32) * (tokens[:, 1:] >= 0)
    rows = jax.tree.map(lambda x: x.reshape(*steps.layout, *x.shape[1:]), rows)
    batch = jax.device_put(rows, steps.batch_sharding)
    state, metrics = steps.train(lively(steps), batch)
    return jax.tree.map(np.asarray, state.params), {
        k: float(v) for k, v in metrics.items() if "/" in k
    }


@pytest.mark.slow
@pytest.mark.parametrize("divide", ["constant", "tokens", "sequences"])
def test_neither_accumulation_nor_mesh_nor_backend_changes_an_update(divide):
    expected, figures = one_update(divide=divide)
    cases = [
        {"microbatch": 16},
        {"microbatch": 8},
        {"mesh": {"data": 8}, "devices": 8, "microbatch": 2},
        {"mesh": {"data": 1, "fsdp": 8}, "devices": 8},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "devices": 8, "microbatch": 4},
        {"mesh": {"data": 8}, "devices": 8, "microbatch": 1, "backend": "pmap"},
    ]
    for case in cases if divide == "constant" else cases[1:3]:
        params, metrics = one_update(divide=divide, **case)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)
        assert metrics == pytest.approx(figures, rel=1e-5, abs=1e-5), case


# --- mistakes, and what follows from other keys


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"out_dir": "y"}}, "run.init_from is missing"),
        ({"grpo": {"reward": None}}, "grpo.reward is missing"),
        ({"model": {"dropout": 0.1}}, "model.dropout=0.1"),
        ({"batch": {"sequences": 30}}, "not grpo.prompts=4 x grpo.samples=8"),
        ({"batch": {"growth": {5: 64}}}, "batch.growth"),
        ({"grpo": {"updates": 3}}, "eval.every=1000 is not a multiple of grpo.updates=3"),
        ({"objective": {"name": "sft", "width": 8}}, "objective.width=8 is of pairs"),
        ({"objective": {"name": "text"}}, "grpo.reward=exact is read with objective.name=grpo"),
        ({"grpo": {"samples": 1}}, "greater than or equal to 2"),
        ({"run": {"out_dir": "y", "init_from": "z", "skip_spikes": True}}, "run.skip_spikes"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        given(changes.get("grpo"), **{k: v for k, v in changes.items() if k != "grpo"})


def test_the_batch_follows_from_rollouts_and_not_from_a_depth():
    config = given(model={"depth": 2, "n_layer": 2})
    assert config.batch.sequences == 4 * 8 and "sequences" not in config.batch.model_fields_set


def test_epochs_make_updates_of_whole_rollouts():
    config = given(
        {"updates": 7, "prompts": 1},
        optim={"epochs": 1},
        eval={"every": 7},
        checkpoint={"every": 7},
        model={"vocab_size": None},
    )
    examples = [{"messages": [{"role": "user", "content": c}]} for c in "abc"]
    split = Prompts(examples, CHAT, 5)
    dataset = Dataset("x", CHAT, VOCAB, split, split, None, "", "prompts")
    assert resolved(config, [dataset]).optim.steps == 3 * 7


def test_a_ledger_from_before_there_were_rollouts_goes_on():
    old = {f"time/{name}": 1.0 for name in ("startup", "restore", "compile", "data", "step")}
    old |= {f"time/{name}": 1.0 for name in ("evaluation", "save", "lost", "down")}
    phases = Phases(given().run, age=0)
    row = Ledger(phases, [{"step": 5, "time": 0.0, **old}], 5).row()
    assert row["time/rollout"] == 0 and row["time/step"] == 1
    assert row["perf/goodput"] == pytest.approx(1 / 8, abs=0.01)


# --- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that has learned a little, and prompts with the same tokenizer."""
    folder = tmp_path_factory.mktemp("rewarded")
    data = test_sft.write_chat(folder / "chats", test_sft.TALKS[:-12], test_sft.TALKS[-12:])
    keys = {"objective.name": "sft", "model.block_size": 63, "model.dropout": 0, "optim.steps": 40}
    keys |= {"eval.every": 40, "eval.answers": 0, "checkpoint.every": 40, "batch.microbatch": 2}
    assert train.main(tiny_run.arguments(data, folder / "sft", **keys)) == 0
    meta = {"format": 1, "kind": "prompts", "tokenizer": test_sft.CHAT, "dtype": "int32"}
    (folder / "prompts").mkdir()
    for split, n in (("train", 20), ("val", 6)):
        lines = [
            {"messages": [{"role": "user", "content": f"Say sun{i}"}], "answer": f"sun{i}"}
            for i in range(n)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "prompts" / f"{split}.jsonl").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        meta[split] = {"documents": n, "tokens": 14 * n, "longest": 14, "sha256": digest}
    (folder / "prompts" / "meta.json").write_text(
        json.dumps({**meta, "vocab_size": test_sft.VOCAB})
    )
    return folder


def arguments(base, out, **changes):
    keys = {
        "objective.name": "grpo",
        "grpo.reward": "in_place",
        "grpo.prompts": 4,
        "grpo.samples": 4,
        "grpo.max_new_tokens": 8,
        "grpo.kl": 0.01,
        "run.init_from": base / "sft",
        "model.block_size": 63,
        "model.dropout": 0,
        "batch.sequences": None,
        "batch.microbatch": 1,
        "optim.lr": 1e-3,
        "optim.steps": 6,
        "eval.every": 3,
        "checkpoint.every": 2,
        **changes,
    }
    return tiny_run.arguments(base / "prompts", out, **keys)


KEYS = ("train/loss", "train/grad_norm", "rl/reward", "rl/length", "rl/kl", "val/reward")


def numbers(out):
    return {key: tiny_run.rows(out, key) for key in KEYS}


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_rollout_goes_on_bitwise(base, tmp_path, monkeypatch, capsys):
    assert train.main(arguments(base, tmp_path / "whole")) == 0
    expected = numbers(tmp_path / "whole")
    assert list(expected["rl/reward"]) == list(range(1, 7))
    assert list(expected["val/reward"]) == [0, 3, 6]
    said = " ".join(capsys.readouterr().out.split())  # the line of times is folded
    assert "val reward" in said and "done: best val reward" in said and "writing answers" in said
    gaps = tiny_run.rows(tmp_path / "whole", "rl/logp_gap")
    assert 0 < max(gaps.values()) < 1e-4
    samples = [json.loads(x) for x in (tmp_path / "whole/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 6 + [3] * 6 + [6] * 6
    assert all(s["prompt"].startswith("Say sun") and 0 <= s["reward"] <= 1 for s in samples)
    run = read_history(str(tmp_path / "whole"))
    best = tiny_run.rows(tmp_path / "whole", "val/best_reward")[6]
    assert best == max(expected["val/reward"][step] for step in (3, 6))
    assert run.checkpoints[run.best]["val_loss"] == -best

    calls, check = [0], StopRequest.check

    def stopped(request):
        calls[0] += 1
        if calls[0] == 7:  # of a rollout, or of an evaluation
            request.ask("SIGTERM")
            request._last_call = 0
        check(request)

    monkeypatch.setattr(StopRequest, "check", stopped)
    assert train.main(arguments(base, tmp_path / "stopped")) == 3
    left = len(tiny_run.rows(tmp_path / "stopped"))
    assert 0 < left < 6 and left in open_checkpoints(tmp_path / "stopped").steps
    monkeypatch.setattr(StopRequest, "check", check)
    assert train.main(arguments(base, tmp_path / "stopped")) == 0
    assert numbers(tmp_path / "stopped") == expected

    capsys.readouterr()
    assert train.main(arguments(base, tmp_path / "whole", **{"run.replay": 5})) == 0
    said = capsys.readouterr().out
    assert said.count("'Say sun") == 16 and "reward    advantage  answer" in said
    assert f"loss {expected['train/loss'][5]:.6f}" in said


@pytest.mark.slow
def test_kills_in_rollouts_leave_the_unbroken_run_digit_for_digit(base, tmp_path, capsys):
    keys = {"optim.steps": 30, "eval.every": 10, "checkpoint.every": 5}
    keys |= {"batch.microbatch": 8, "grpo.updates": 5}
    flags = ["--kills=3", "--moments", "step", "evaluation", "--json"]
    assert crash_test.main([*arguments(base, tmp_path / "crash", **keys), *flags]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kills"] == 3 and report["faults"] == []


@pytest.mark.slow
def test_two_processes_write_and_learn_from_the_answers_together(base, tmp_path):
    keys = {"optim.steps": 2, "eval.every": 2, "checkpoint.every": 2, "batch.microbatch": None}
    argv = arguments(base, tmp_path / "run", **keys)
    outputs = processes.run("scalegpt.train", *argv, devices=2)
    assert "2 processes" in outputs[0][0]
    assert len(tiny_run.rows(tmp_path / "run", "rl/reward")) == 2
    assert max(tiny_run.rows(tmp_path / "run", "rl/logp_gap").values()) < 1e-4


@pytest.mark.slow
def test_lora_learns_from_rewards_too(base, tmp_path, monkeypatch):
    """Its rollouts are those of the model that learns, and its reference is the base."""
    lora = {"lora.rank": 4, "optim.lr": 1e-2, "optim.steps": 4, "eval.every": 0}
    assert train.main(arguments(base, whole := tmp_path / "whole", **lora)) == 0
    gap, distance = (tiny_run.rows(whole, f"rl/{key}") for key in ("logp_gap", "kl"))
    assert max(gap.values()) < 1e-4 and abs(distance[1]) < 1e-9 < distance[4]
    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 2)
        assert train.main(arguments(base, parts := tmp_path / "parts", **lora)) == 3
    assert train.main(arguments(base, parts, **lora)) == 0
    assert numbers(parts) == numbers(whole)

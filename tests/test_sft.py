"""Conversations: packed into rows, kept apart, learned from the answers alone, from a base run."""

import json
import math
import re
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import convert_hf
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from scalegpt import evaluate, train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import BatchConfig, Config
from scalegpt.config.command_line import parse
from scalegpt.config.differences import curve_diff
from scalegpt.config.recipe import ModelConfig
from scalegpt.data.batches import EvalBatches, TrainBatches
from scalegpt.data.chat import encode_conversation
from scalegpt.data.datasets import open_datasets, resolved, windows_of
from scalegpt.data.packing import end_id, pack
from scalegpt.data.tokenizer import load
from scalegpt.inference import answers
from scalegpt.model.gpt import GPT, Cache, head_table, logits, separate_layers
from scalegpt.run.reports import unread_line
from scalegpt.step import build_for_training, sharding, update
from scalegpt.step.loss import row_losses
from scalegpt.step.objective import target_count
from scalegpt.weights import init_from

# Ids of bytes with the marks of a chat.
BOS, SYSTEM, USER, ASSISTANT, END, VOCAB = 0, 256, 257, 258, 259, 263
CHAT = {"kind": "chat", "base": {"kind": "byte"}}


def conversation(*turns):
    """The signed ids of (question, answer) pairs."""
    ids = [~BOS]
    for question, answer in turns:
        ids += [~USER, *(~b for b in question.encode()), ~END, ~ASSISTANT, *answer.encode(), END]
    return np.array(ids, "<i4")


def test_conversations_here_are_those_of_the_template():
    codec, turns = load(CHAT), [("Why?", "So."), ("And?", "No.")]
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, sum(turns, ()), strict=True)]
    np.testing.assert_array_equal(encode_conversation(codec, messages), conversation(*turns))
    assert end_id(codec.vocab_size) == codec.marks["end"] == END and codec.vocab_size == VOCAB


def write_chat(folder, train, val, **changes):
    """A data set of conversations, as prepare would write it."""
    folder.mkdir(parents=True)
    meta = {"format": 1, "kind": "chat", "tokenizer": CHAT, "dtype": "int32", "vocab_size": VOCAB}
    for split, conversations in (("train", train), ("val", val)):
        ids = np.concatenate(conversations)
        ids.tofile(folder / f"{split}.bin")
        trained = int((ids >= 0).sum())
        text = trained - int((ids == END).sum())  # of one byte each
        meta[split] = {"tokens": len(ids), "trained": trained, "bytes": text}
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))
    return folder


WORDS = ("sun", "moon", "star", "sky", "sea", "wind", "rain", "snow", "fire", "stone")
TALKS = [
    conversation(*[(f"Say {word}{i}", f"{word}{i}")] * (1 + i % 3))
    for i in range(9)
    for word in WORDS
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("data") / "chats", TALKS[:-12], TALKS[-12:])


def given(data, out="out", **changes):
    keys = {"objective.name": "sft", "model.block_size": 63, "model.dropout": 0, **changes}
    return parse(tiny_run.arguments(data, out, **keys), "test", {})[0]


# --- packing


def test_each_conversation_is_in_one_row_once_and_the_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    talks = [conversation(("a", "b" * n)) for n in lengths]
    packed = pack("x", np.concatenate(talks), VOCAB, 63)
    rows = [packed[i] for i in range(len(packed))]
    assert all(len(row) == 64 and row[0] == ~BOS for row in rows)
    parts = [part for row in rows for part in np.split(row, np.flatnonzero(row == ~BOS)[1:])]
    found = sorted(tuple(part.tolist()) for part in parts if len(part) > 1)
    # Padding is -1, which is ~BOS of bytes, so that it looks like conversations of one token.
    assert found == sorted(tuple(talk.tolist()) for talk in talks)
    fill = sum(map(len, talks)) / (64 * len(packed))
    assert fill > 0.97
    assert str(packed) == f"200 conversations in {len(packed)} rows, {fill:.1%} full"
    # Some of the rows stand for all, and not those of the longest conversations, the first.
    some = EvalBatches(packed, 63, 4, np.arange(4), windows=4)[0]
    assert [row.tolist() for row in some] == [
        packed[i * (len(packed) // 4)].tolist() for i in range(4)
    ]


def test_rows_are_filled_with_the_longest_that_still_fits():
    talks = [np.array([~BOS] + [7] * (n - 1), np.int32) for n in (4, 10, 3, 6, 7, 5, 10)]
    packed = pack("x", np.concatenate(talks), VOCAB, 9)
    assert [packed.lengths[a:b].tolist() for a, b in pairwise(packed.firsts)] == [
        [10],
        [10],
        [7, 3],
        [6, 4],
        [5],
    ]
    assert packed.first_token(0) == 4 and packed.first_token(1) == 35


def test_a_conversation_that_is_too_long_loses_turns_then_is_cut_then_left_out():
    turns = [("ab", "cd"), ("ef", "gh"), ("ij", "kl")]
    three, two, one = (conversation(*turns[:n]) for n in (3, 2, 1))
    short, long_prompt = conversation(("a", "b")), conversation(("a" * 40, "b"))
    long_answer = conversation(("a", "b" * 40))
    tokens = np.concatenate([three, long_prompt, short, long_answer])
    for block, kept in ((len(two) - 1, two), (len(two), two), (len(two) - 2, one)):
        packed = pack("x", tokens, VOCAB, block)
        rows = [packed[i] for i in range(len(packed))]
        assert any(np.array_equal(row[: len(kept)], kept) for row in rows)
        assert any(np.array_equal(row, long_answer[: block + 1]) for row in rows)
        assert packed.shortened == 2 and packed.left_out == 1
        assert "2 shortened to model.block_size=" in str(packed) and "1 left out" in str(packed)
    # Where only the last answer is trained, dropping its turn would leave nothing: it is cut.
    last = np.concatenate([np.where(two >= 0, ~two, two), conversation(("i", "k" * 40))[1:]])
    packed = pack("x", last, VOCAB, len(two) + 10)
    assert (packed[0] == last[: len(two) + 11]).all() and packed.shortened == 1
    with pytest.raises(
        ValueError, match="x: no answer of its 1 conversation begins within model.block_size=20"
    ):
        pack("x", long_prompt, VOCAB, 20)
    with pytest.raises(ValueError, match="does not begin with the mark"):
        pack("x", short[1:] * 0 + 5, VOCAB, 20)


def test_an_epoch_of_rows_visits_each_once_whatever_the_hosts():
    packed = pack("x", np.concatenate(TALKS), VOCAB, 63)
    n, batch = len(packed), BatchConfig(sequences=len(packed))

    def epoch(step, rows, microbatch=n, seed=1):
        source = TrainBatches([packed], [1.0], 63, seed, batch, microbatch, rows)
        return source[step].reshape(-1, 64)

    expected = sorted(packed[i].tolist() for i in range(n))
    first, second = (epoch(step, np.arange(n)) for step in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == expected
    assert (first != second).any() and (first != epoch(0, np.arange(n), seed=2)).any()
    halves = np.concatenate([epoch(1, np.arange(n)[part]) for part in (slice(9), slice(9, n))])
    np.testing.assert_array_equal(halves, second)


def test_validation_reads_each_row_and_counts_what_is_predicted():
    packed = pack("x", np.concatenate(TALKS), VOCAB, 63)
    batches = EvalBatches(packed, 63, 8, np.arange(8))
    rows = np.concatenate(list(batches))
    np.testing.assert_array_equal(rows[: len(packed)], [packed[i] for i in range(len(packed))])
    assert (rows[len(packed) :] == -1).all()
    assert batches.tokens == (rows[:, 1:] >= 0).sum() == sum((talk >= 0).sum() for talk in TALKS)
    few = EvalBatches(packed, 63, 8, np.arange(8), windows=4, spread=True)
    assert few.tokens == (few[0] >= 0).sum() and len(few) == 1
    np.testing.assert_array_equal(few[0][1], packed[len(packed) // 4])


# --- the configuration that follows from the data


def test_objective_and_data_have_to_agree(chats, plays):
    with pytest.raises(ValueError, match="objective.name=text, but .* chats holds conversations: "):
        open_datasets(given(chats, **{"objective.name": "text"}))
    with pytest.raises(
        ValueError, match="=sft, but the data set plays holds plain text: set --obj"
    ):
        open_datasets(given(plays))


@pytest.mark.parametrize("changes", [{"dtype": "uint32"}, {"kind": "text"}, {"kind": "poems"}])
def test_a_meta_file_of_another_kind_is_refused(chats, tmp_path, changes):
    data = write_chat(tmp_path / "odd", TALKS[:1], TALKS[:1], **changes)
    with pytest.raises(ValueError, match="no data are of kind"):
        open_datasets(given(data))


def test_what_follows_from_conversations_is_stored(chats, capsys):
    asked = given(chats, **{"optim.steps": None, "optim.epochs": 2.5, "batch.sequences": 6})
    assert asked.optim.counts_epochs and "steps: null" in asked.to_yaml()
    datasets = open_datasets(asked)
    config = resolved(asked, datasets)
    rows = len(datasets[0].train)
    assert config.optim.steps == math.ceil(2.5 * rows / 6) and config.optim.epochs is None
    assert (config.model.isolate, config.model.bos) == (True, BOS)
    assert config.model.vocab_size == VOCAB
    stored = Config.model_validate(config.model_dump())
    assert curve_diff(stored, resolved(asked, datasets)) == []
    assert curve_diff(stored, resolved(stored, datasets)) == []
    apart = asked.model_copy(update={"model": asked.model.model_copy(update={"isolate": False})})
    assert curve_diff(stored, resolved(apart, datasets)) == ["model.isolate: True -> False"]
    assert resolved(apart, datasets).model.bos is None
    grown = given(chats, **{"optim.steps": None, "optim.epochs": 1, "batch.sequences": 6})
    batch = grown.batch.model_copy(update={"growth": {2: 12}})
    updates = resolved(grown.model_copy(update={"batch": batch}), datasets).optim.steps
    assert 6 + 12 * (updates - 2) < rows <= 6 + 12 * (updates - 1)
    # Given steps win, and the start says so.
    both = resolved(given(chats, **{"optim.epochs": 2}), datasets)
    assert both.optim.steps == tiny_run.STEPS
    assert "optim.epochs=2.0 (optim.steps=12)" in unread_line(both)
    late = given(chats, **{"optim.steps": None, "optim.epochs": 1, "optim.warmup_steps": 90})
    fitted = resolved(late, datasets)
    assert fitted.optim.warmup_steps == fitted.optim.steps // 10
    assert "warmup_steps=90 is shortened to" in capsys.readouterr().err
    assert curve_diff(fitted, resolved(late, datasets)) == []


def test_text_has_epochs_and_isolation_where_documents_have_a_mark(plays):
    keys = {"objective.name": "text", "optim.steps": None, "optim.epochs": 1}
    datasets = open_datasets(config := given(plays, **keys))
    windows = (len(datasets[0].train) - 63) // 63
    found = resolved(config, datasets)
    assert found.optim.steps == math.ceil(windows / tiny_run.ROWS)
    assert (found.model.isolate, found.model.bos) == (None, None)
    with pytest.raises(ValueError, match="isolate=true .* plays has no end-of-text mark"):
        resolved(given(plays, **keys, **{"model.isolate": "true"}), datasets)
    with pytest.raises(ValueError, match="model.depth=2 and optim.epochs=2 both set the updates"):
        parse(["--model.depth=2", "--optim.epochs=2", "--data.path=x", "--run.out_dir=y"], "", {})


# --- the model


TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=20, vocab_multiple=8)
MODELS = {
    "learned": dict(bias=True),
    "rope": dict(position="rope", value_embeddings=True, tie_word_embeddings=False)
    | dict(smear=True, backout=True, ngram_rows=30),
}
FIRST, SECOND = [0, 3, 4, 5, 6, 7, 8], [0, 10, 11, 12, 13, 14, 15, 16, 17]


@cache
def model_and_params(kind, bos=0, attention="xla"):
    model = GPT(ModelConfig(**TINY, **MODELS[kind], bos=bos), jnp.dtype("float32"), attention)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes
    )


@cache
def scores_of(kind, bos=0, attention="xla"):
    model, params = model_and_params(kind, bos, attention)

    def scores(tokens):
        hidden = model.apply({"params": params}, tokens)
        return logits(hidden, head_table(params), model.config)

    return jax.jit(scores)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["xla", pytest.param("flax", marks=pytest.mark.slow)])
def test_packed_conversations_have_the_logits_that_each_has_alone(kind, attention):
    packed = np.array(FIRST + SECOND + [0, 0])
    alone = np.array(SECOND + [0] * (len(packed) - len(SECOND)))
    both = np.stack([packed, alone])
    here = slice(len(FIRST), len(FIRST) + len(SECOND))
    got, want = scores_of(kind, 0, attention)(both)
    np.testing.assert_allclose(got[here], want[: len(SECOND)], rtol=0, atol=1e-5)
    without, _ = scores_of(kind, None, attention)(both)
    assert np.abs(without[here] - want[: len(SECOND)]).max() > 0.1
    np.testing.assert_allclose(without[: len(FIRST)], got[: len(FIRST)], rtol=0, atol=1e-5)


def test_a_conversation_is_decoded_as_it_was_learned():
    """Also one that does not begin at slot 0: learned positions count from its begin there too."""
    model, params = model_and_params("learned")
    tokens, slots = np.array([[0, 0, *FIRST], [5, *SECOND][: len(FIRST) + 2]]), 16
    tokens[1, 0] = 0
    empty = jnp.zeros((2, 2, slots, 8))
    recent = jnp.zeros((2, 0), jnp.int32)
    cache = Cache(((empty, empty),) * 2, jnp.array([2, 1]), jnp.array(0), recent)
    hidden, _ = jax.jit(model.apply)({"params": separate_layers(params)}, tokens, cache=cache)
    got = logits(hidden, head_table(params), model.config)
    for row, first in ((0, 2), (1, 1)):
        alone = np.zeros((1, tokens.shape[1]), int)
        alone[0, : tokens.shape[1] - first] = tokens[row, first:]
        want = scores_of("learned")(alone)[0, : tokens.shape[1] - first]
        np.testing.assert_allclose(got[row, first:], want, rtol=0, atol=1e-5)


def test_nothing_learns_from_another_conversation():
    model, params = model_and_params("rope")
    tokens = jnp.array([[~t for t in FIRST] + SECOND])  # of the second alone, all but its first

    def loss(params):
        return row_losses(model, params, tokens.at[0, len(FIRST)].set(~0), None).sum()

    grads = jax.jit(jax.grad(loss))(params)
    for table in (grads["wte"], grads["h"]["attn"]["value_table"]):
        assert (table[..., jnp.array(FIRST[1:]), :] == 0).all()
        assert (jnp.abs(table[..., jnp.array(SECOND[1:-1]), :]).max(-1) > 0).all()


def test_signed_ids_are_read_and_not_predicted():
    """Sums over microbatches of 1, 0 and all targets are those of the whole, as NumPy has them."""
    model, params = model_and_params("learned")
    rows = np.random.default_rng(1).integers(1, 20, (4, 17))
    signed = np.stack([rows[0], ~rows[1], ~rows[2], rows[3]]).astype(np.int32)
    signed[2, 9], signed[3, 12:] = rows[2, 9], -1
    read = np.where(signed < 0, ~signed, signed)
    losses = -np.asarray(jax.nn.log_softmax(scores_of("learned")(read[:, :-1])))
    picked = np.take_along_axis(losses, read[:, 1:, None], -1)[..., 0]
    expected = np.where(signed[:, 1:] >= 0, picked, 0).sum(-1)

    def loss(params, tokens, rows):
        return row_losses(model, params, tokens, None).sum(), {}

    @jax.jit
    def sums(tokens):
        (total, _), grads = update.accumulate(loss, params, tokens, jnp.zeros(tokens.shape[:2]))
        return total, grads, target_count(tokens)

    one, grads, count = sums(signed.reshape(1, 4, 17))
    np.testing.assert_allclose(one, expected.sum(), rtol=1e-6)
    assert count == 16 + 0 + 1 + 11 and expected[1] == 0
    for parts in (2, 4):
        total, other, same = sums(signed.reshape(parts, -1, 17))
        np.testing.assert_allclose(total, one, rtol=1e-6)
        assert same == count
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grads, other)
    total, other, count = sums(signed[1:2].reshape(1, 1, 17))
    assert (total, count) == (0, 0)
    assert all((x == 0).all() for x in jax.tree.leaves(other))


# --- tables that grow


@pytest.mark.parametrize("kind, vocab_size", [("rope", 31), ("learned", 24)])
def test_new_ids_begin_improbable_in_a_table_that_grows_or_had_padding(kind, vocab_size):
    old, params = model_and_params(kind)  # 24 rows: 20 ids, and rubbish that may become 4 more
    model = old.clone(config=old.config.model_copy(update={"vocab_size": vocab_size}))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rows = model.config.padded_vocab
    tables = {"wte", "head_kernel", "value_table"}

    def like(path, x):
        shape = (*x.shape[:-2], rows, x.shape[-1]) if path[-1].key in tables else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=here)

    grown = init_from.grown(params, 20, 1, jax.tree_util.tree_map_with_path(like, params))
    tokens = np.array([FIRST])
    hidden = jax.jit(model.apply)({"params": grown}, tokens)
    new = jax.nn.softmax(logits(hidden, head_table(grown), model.config))[0]
    before = jax.nn.softmax(scores_of(kind)(tokens))[0]
    assert (new[:, 20:vocab_size] <= 1 / 20).all()
    drop = np.log(before[:, :20]) - np.log(new[:, :20])
    assert (drop > 0).all() and (drop < math.log(vocab_size / 20)).all()
    for name, table in jax.tree_util.tree_leaves_with_path(grown):
        if name[-1].key in tables:
            added = np.asarray(table[..., 20:rows, :])
            mean, std = table[..., :20, :].mean(-2), table[..., :20, :].std(-2)
            assert (np.abs(added - mean[..., None, :]) < 0.06 * std[..., None, :]).all()
            assert (np.ptp(added, axis=-2) > 0).all(), "nothing tells the new ids apart"


def test_only_marks_of_the_source_s_own_tokenizer_may_be_new(chats, tmp_path):
    source = tmp_path / "source"
    text = given(chats, source, **{"objective.name": "text"}).with_vocab(256)

    def meta(spec):
        return {"config": text.model_dump(), "tokenizer": spec}

    class Stored:
        def __init__(self, spec):
            self.meta = lambda step: meta(spec)
            self.find, self.close = lambda *_: 1, lambda: None

    (source / "checkpoints").mkdir(parents=True)
    wanted = resolved(config := given(chats, run__init_from=source), open_datasets(config))
    with pytest.MonkeyPatch.context() as patch:
        for spec, problem in (("byte", None), (CHAT, "vocab_size: 256 -> 263"), ("gpt2", "tokens")):
            patch.setattr(init_from, "open_checkpoints", lambda name, spec=spec: Stored(spec))
            if problem is None:
                init_from.check(wanted, CHAT)
                with pytest.raises(ValueError, match="n_layer: 2 -> 3"):
                    model = wanted.model.model_copy(update={"n_layer": 3})
                    init_from.check(wanted.model_copy(update={"model": model}), CHAT)
            else:
                with pytest.raises(ValueError, match=problem):
                    init_from.check(wanted, CHAT)


# --- do answers end


def test_the_share_of_answers_that_end_is_of_held_out_prompts(monkeypatch):
    """Of the four that leave room for one, which may be twice as long as the longest of theirs."""
    talks = [conversation((q, a)) for q, a in (("a", "bc"), ("d", "efgh"), ("i" * 40, "j"))]
    talks += [conversation(("k", "l"), ("m", "n")), conversation(("o", "p"))]
    asked, wide = {}, SimpleNamespace(config=SimpleNamespace(block_size=40))

    class Scripted:
        def with_params(self, params):
            return self

        def ids(self, prompts, new_tokens):
            asked.update(prompts=[prompt.tolist() for prompt in prompts], new=new_tokens)
            for ids in ([END, 5, 5, 6], [7, END, 5, 6], [7, 5, 5, 6]):
                yield np.array(ids[: len(prompts)])

    monkeypatch.setattr(answers, "decoder", lambda *_: Scripted())
    packed = pack("x", np.concatenate(talks), VOCAB, 50)
    share = answers.ended_share(SimpleNamespace(model=wide), [packed], VOCAB, 16)
    assert share(None) == share(None) == 0.5
    head = [BOS, USER]
    assert asked["prompts"] == [[*head, ord(c), END, ASSISTANT] for c in "adko"]
    assert asked["new"] == 2 * len("efgh.")
    few = answers.ended_share(SimpleNamespace(model=wide), [packed], VOCAB, 2)
    few(None)
    assert len(asked["prompts"]) == 2
    wide.config.block_size = 6
    assert answers.ended_share(SimpleNamespace(model=wide), [packed], VOCAB, 16) is None


# --- runs


@pytest.mark.slow
def test_eight_conversations_are_learned_by_heart_and_end(tmp_path, with_sample):
    talks = [conversation((f"Say {word}", word)) for word in WORDS[:8]]
    data = write_chat(tmp_path / "eight", talks, talks)
    keys = {"objective.name": "sft", "model.block_size": 31, "model.dropout": 0}
    keys |= {"optim.steps": 120, "eval.every": 0, "checkpoint.every": 0}
    assert train.main(tiny_run.arguments(data, tmp_path / "run", **keys)) == 0
    ended, loss = (tiny_run.rows(tmp_path / "run", f"val/{key}") for key in ("ended", "loss"))
    assert ended[0] == 0 and ended[120] == 1 and loss[120] < 0.02
    (sample,) = (json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl"))
    assert sample["text"] == "<|bos|><|user|>Say sun<|end|><|assistant|>sun"


@pytest.mark.slow
def test_losses_and_weights_do_not_depend_on_mesh_accumulation_or_backend(chats):
    def trained(backend, mesh, accumulation):
        shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
        keys = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
        keys |= {"run.backend": backend, "batch.microbatch": 16 // shards // accumulation}
        asked = given(chats, **keys, **{"model.dtype": "float32", "optim.lr": 1e-3})
        datasets = open_datasets(asked)
        config = resolved(asked, datasets)
        devices = jax.devices()[: math.prod(mesh.values())]
        steps = build_for_training(config, sharding.make_mesh(config.mesh, devices))
        packed, state, losses = datasets[0].train, steps.init(), []
        for step in range(4):
            rows = np.stack([packed[(16 * step + i) % len(packed)] for i in range(16)])
            rows[0, :-3] = np.where(rows[0, :-3] < 0, rows[0, :-3], ~rows[0, :-3])
            rows[2:4] = np.where(rows[2:4] < 0, rows[2:4], ~rows[2:4])  # no target at all
            batch = jax.device_put(rows.reshape(*steps.layout, -1), steps.batch_sharding)
            state, metrics = steps.train(state, batch)
            losses.append(float(metrics["train/loss"]))
        return losses, jax.tree.map(np.asarray, state.params)

    losses, params = trained("jit", {}, 1)
    assert losses[0] - losses[-1] > 0.02
    for case in (
        ("jit", {}, 4),
        ("jit", {"data": 8}, 2),
        ("jit", {"fsdp": 8}, 1),
        ("jit", {"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ("pmap", {"data": 8}, 2),
    ):
        others, weights = trained(*case)
        np.testing.assert_allclose(others, losses, rtol=0, atol=1e-5, err_msg=str(case))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), weights, params)


@pytest.mark.slow
def test_a_base_learns_to_answer(chats, tmp_path, capsys, monkeypatch):
    """From bytes to answers: growth, two epochs, a stop and its continuation, its evaluation."""
    text = "".join(f"Say {word}{i} {word}{i}\n" for i in range(40) for word in WORDS)
    ids = np.frombuffer(text.encode(), np.uint8).astype("<u2")
    (plain := tmp_path / "plain").mkdir()
    meta = {"format": 1, "tokenizer": {"kind": "byte"}, "dtype": "uint16", "vocab_size": 256}
    for split, part in (("train", ids[:-400]), ("val", ids[-400:])):
        part.tofile(plain / f"{split}.bin")
        meta[split] = {"tokens": len(part), "bytes": len(part)}
    (plain / "meta.json").write_text(json.dumps(meta))
    shape = {"model.block_size": 63, "model.dropout": 0}
    base = tiny_run.arguments(plain, tmp_path / "base", **shape)
    assert train.main(base) == 0
    source = {"run.init_from": tmp_path / "base", "objective.name": "sft", **shape}
    source |= {"optim.steps": None, "optim.epochs": 4, "checkpoint.every": 3}

    def argv(name):
        return tiny_run.arguments(chats, tmp_path / name, **source)

    # The same weights in a folder of Hugging Face's kind grow to the same tables.
    export = ["export", "--run", str(tmp_path / "base"), "--format", "scalegpt"]
    assert convert_hf.main([*export, "--out", str(tmp_path / "exported")]) == 0
    config = parse(argv("whole"), "test", {})[0]
    config = resolved(config, open_datasets(config))
    abstract = build_for_training(config, sharding.make_mesh(config.mesh)).abstract.params
    loaded = []
    for place in ("base", "exported"):
        run = config.run.model_copy(update={"init_from": str(tmp_path / place)})
        config = config.model_copy(update={"run": run})
        init_from.check(config, CHAT)
        loaded.append(init_from.weights(config, abstract)[0])
    jax.tree.map(np.testing.assert_array_equal, *loaded)

    assert train.main(argv("whole")) == 0
    said = capsys.readouterr().out
    assert "78 conversations in" in said and "7 new ids begin as the mean" in said
    assert "within each conversation" in said
    losses = tiny_run.rows(tmp_path / "whole")
    last = max(losses)
    epoch = tiny_run.rows(tmp_path / "whole", "train/epoch")
    assert 4 <= epoch[last] < 4 + 16 / 20 and losses[last] < losses[1]
    val, bits = (
        tiny_run.rows(tmp_path / "whole", f"val/{key}") for key in ("loss", "bits_per_byte")
    )
    facts = json.loads((chats / "meta.json").read_text())["val"]
    ratio = facts["trained"] / facts["bytes"] / math.log(2)
    assert bits[last] == pytest.approx(val[last] * ratio, rel=1e-6) and val[0] < 8

    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 4)
        assert train.main(argv("parts")) == 3
    assert train.main(argv("parts")) == 0
    assert tiny_run.rows(tmp_path / "parts") == losses
    one, other = (
        open_checkpoints(tmp_path / name).read_item(last, "params") for name in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)

    capsys.readouterr()
    assert evaluate.main(["--run", str(tmp_path / "whole"), "--checkpoint=latest", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["val/loss"] == pytest.approx(val[last], abs=1e-5)
    assert row["val/tokens"] == facts["trained"]
    assert train.main([*argv("whole"), "--run.replay=4"]) == 0
    said = capsys.readouterr().out
    config = parse(argv("whole"), "test", {})[0]
    rows = windows_of(config, open_datasets(config), 4)
    shown = [int(first) for first in re.findall(r"chats:(\d+)", said)]
    assert len(shown) == 10 and {("chats", first) for first in shown} <= set(rows)
    assert said.count("'Say ") == 10
    assert f"loss {losses[4]:.6f}" in said

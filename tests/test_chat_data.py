"""Conversations against data written by hand: every format, every way a file may hold them."""

import bz2
import gzip
import json
import lzma
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from test_prepare import bins, module

from scalegpt.config import BatchConfig
from scalegpt.data import chat, conversations, datasets
from scalegpt.data.batches import TrainBatches
from scalegpt.data.token_files import open_dataset, open_split
from scalegpt.data.tokenizer import load

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
BYTES = load("byte").chat()


def read(row, **options):
    row = conversations.parse(json.dumps(row))
    return conversations.messages_of(row, conversations.format_of(row), **options)


def prepare(tmp_path, rows, *argv, tokenizer="byte", out="out"):
    """What prepare.py makes of rows."""
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = [f"--input={tmp_path / 'c.jsonl'}", f"--out={tmp_path / out}"]
    assert module("chat").main([*files, f"--tokenizer={tokenizer}", *argv]) == 0
    return bins(tmp_path / out)


def split_up(ids):
    """The conversations of a token file of bytes, each with its <|bos|>."""
    assert ids[0] == ~0
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == ~0)[1:])]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {
            "messages": [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES
            ]
        },
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"conversations": [{"from": "user", "value": "Why?"}, {"from": "bot", "value": "So."}]},
        {"conversations": MESSAGES},
        MESSAGES,
        {"instruction": "Why?", "output": "So."},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": "Why?", "response": "So."},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": MESSAGES[:1], "response": "So."},
        {"question": "Why?", "answer": "So."},
    ],
    ids=lambda row: "+".join(row) if isinstance(row, dict) else "list",
)
def test_every_format_says_the_same(row):
    assert read(row) == MESSAGES
    assert not conversations.unread(row, conversations.format_of(row))
    if isinstance(row, dict):
        assert read(row | {"system": "S"}) == [{"role": "system", "content": "S"}, *MESSAGES]


def test_what_the_formats_have_of_their_own():
    assert read({"instruction": "Sum", "input": "1 2", "output": "3"})[0]["content"] == "Sum\n\n1 2"
    weighed = [MESSAGES[0], MESSAGES[1] | {"weight": 0}, *MESSAGES]
    assert read({"messages": weighed}) == weighed
    named = {"messages": [MESSAGES[0] | {"name": "Ann"}, MESSAGES[1]], "tools": [], "id": None}
    assert conversations.unread(named, "messages") == {"tools", "message.name"}
    text = "A is 48/2 = <<48/2=24>>24.\n<<no call>> #### 24"
    question = {"question": "Why?", "answer": text}
    call = {"call": "48/2", "result": "24"}
    assert read(question)[1]["content"] == ["A is 48/2 = ", call, "24.\n<<no call>> #### 24"]
    assert read(question, tools=False)[1]["content"] == "A is 48/2 = 24.\n<<no call>> #### 24"


def test_calls_of_tools_become_parts_of_the_answer_in_the_order_of_their_results():
    def called(id_, arguments):
        function = {"name": "add", "arguments": arguments}
        return {"id": id_, "type": "function", "function": function}

    openai = [
        MESSAGES[0],
        {"role": "assistant", "content": "Let me", "tool_calls": [called("a", '{"x": "é"}')]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [called("b", {"x": 1}), called("c", {"x": 2})],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "3"}]},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "assistant", "content": "So."},
    ]
    parts = ["Let me"]
    for x, result in (('"é"', "1"), ("2", "3"), ("1", "")):
        parts.append({"call": f'{{"name": "add", "arguments": {{"x": {x}}}}}', "result": result})
    expected = [MESSAGES[0], {"role": "assistant", "content": [*parts, "So."]}]
    assert read({"messages": openai}) == read({"messages": expected}) == expected
    sharegpt = [("human", "Why?"), ("gpt", "Let me see"), ("human", "?"), ("function_call", "x")]
    sharegpt += [("observation", "y"), ("gpt", "So.")]
    values = [{"from": sender, "value": value} for sender, value in sharegpt]
    content = read({"conversations": values})[-1]["content"]
    assert content == [{"call": "x", "result": "y"}, "So."]


def test_a_file_is_read_whatever_way_it_holds_its_rows(tmp_path):
    rows = [{"messages": MESSAGES, "id": i, "é": "🙂\u2028"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=i == 1) for i, row in enumerate(rows)]
    height = json.dumps(rows[0], indent=1).count("\n") + 1
    for name, text, numbers in [
        ("lines", "\n".join(lines), [1, 2, 3]),
        ("Windows' lines", "\ufeff" + "\r\n".join(lines) + "\r\n", [1, 2, 3]),
        ("lines with gaps", "\n\n" + "\n \n".join(lines), [3, 5, 7]),
        ("an array in a line", json.dumps(rows), [1, 1, 1]),
        ("a pretty array", f"\n{json.dumps(rows, indent=1)}", [3, 3 + height, 3 + 2 * height]),
        ("lists", "\n".join([json.dumps(MESSAGES)] * 3), [1, 2, 3]),
        ("an array of lists", json.dumps([MESSAGES] * 3), [1, 1, 1]),
    ]:
        for pack in (bytes, gzip.compress, lzma.compress, bz2.compress):
            (tmp_path / "file").write_bytes(pack(text.encode()))
            found = [*conversations.rows(tmp_path / "file")]
            expected = [MESSAGES] * 3 if "lists" in name else rows
            assert [conversations.parse(text) for _, text in found] == expected, name
            assert [number for number, _ in found] == numbers, name
    for text in ("", "\n \n", "[]", " [\n ] "):
        (tmp_path / "file").write_text(text)
        assert not [*conversations.rows(tmp_path / "file")]


def test_an_answer_loses_the_end_that_another_program_has_left_in_its_text():
    end = conversations.without_end_marks
    for mark in ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end|>", "</s>\n<|end|> "):
        answered = [MESSAGES[0], {"role": "assistant", "content": f"So.{mark}"}]
        assert end(answered) == (MESSAGES, 1)
    call = {"call": "1", "result": "2"}
    assert end([{"role": "assistant", "content": [call, "a</s>"]}])[0][0]["content"] == [call, "a"]
    for text in ("So </s> it is", "</s> So", "<|end|"):
        kept = [{"role": "user", "content": "x</s>"}, {"role": "assistant", "content": text}]
        assert end(kept) == (kept, 0)


def test_prepared_conversations_are_the_templates_ids_split_by_their_questions(tmp_path, capsys):
    rows = [{"prompt": f"n {i % 40}", "completion": f"{i}é"} for i in range(50)]
    ids, meta = prepare(tmp_path, rows, "--val-fraction=0.2")
    assert meta["kind"] == "chat" and meta["dtype"] == "int32" and meta["vocab_size"] == 263
    assert meta["tokenizer"] == {"kind": "chat", "base": {"kind": "byte"}} and meta["format"] == 1

    def by_hand(i):
        question, answer = f"n {i % 40}".encode(), f"{i}é".encode()
        return [*(~x for x in (0, 257, *question, 259, 258)), *answer, 259]

    found = {split: split_up(ids[split]) for split in ids}
    everything = [by_hand(i) for i in range(50)]
    assert sorted(found["train"] + found["val"]) == sorted(everything)
    questions = {s: {BYTES.decode([~i for i in c if i < 0]) for c in found[s]} for s in found}
    assert not questions["train"] & questions["val"] and 2 <= len(questions["val"]) <= 16
    for split, conversations_ in found.items():
        facts, learned = meta[split], [i for c in conversations_ for i in c if i >= 0]
        assert facts["documents"] == len(conversations_) and facts["tokens"] == len(ids[split])
        assert facts["trained"] == len(learned) and facts["max_id"] == 259
        assert facts["bytes"] == len(learned) - len(conversations_)  # <|end|> is no text
    out = capsys.readouterr().out
    assert "format completion: 50 conversations with 50 answers" in out
    assert "<|bos|><|user|>n 0<|end|><|assistant|>[[0é<|end|>]]" in out
    again, _ = prepare(tmp_path, rows, "--val-fraction=0.2")
    assert "already prepared" in capsys.readouterr().out
    shuffled, _ = prepare(tmp_path, rows[::-1], "--val-fraction=0.2", "--force")
    assert sorted(split_up(shuffled["val"])) == sorted(found["val"])


def test_one_conversation_of_few_is_held_out_and_only_the_last_answer_learned(tmp_path):
    more = [*MESSAGES, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    rows = [{"messages": more}, {"messages": MESSAGES}, {"messages": [*more[2:], *MESSAGES]}]
    ids, meta = prepare(tmp_path, rows, "--val-fraction=1e-9", "--train=last")
    assert {meta[s]["documents"] for s in meta if s in ids} == {1, 2}  # of "Why?" there are two
    learned = [BYTES.decode([i for i in c if i >= 0]) for s in ids for c in split_up(ids[s])]
    assert sorted(learned) == ["No.", "So.", "So."]


def test_what_may_be_wrong_with_the_data_is_said_with_its_place(tmp_path, capsys):
    rows = [{"prompt": f"{i}", "completion": "a<|endoftext|>", "source": 1} for i in range(9)]
    rows[3] |= {"completion": " spelt <|im_end|> here", "id": 7}
    rows += [rows[0], {"prompt": "x", "completion": ""}, {"prompt": 5, "completion": "y"}]
    ids, meta = prepare(tmp_path, rows, "--skip-bad=2")
    assert sum(meta[split]["documents"] for split in ids) == 10
    out = capsys.readouterr().out
    place = f"{tmp_path}/c.jsonl, line"
    for line in (
        f"left out 2 bad rows, the first 2:\n  {place} 11: message 2 (assistant) is empty",
        f"\n  {place} 12: message 1 (user) has the content 5, not text",
        "of 9 answers a mark at the end, as <|endoftext|>, is left out",
        f"warning: the text of 1 conversation spells a mark, as <|im_end|>, first {place} 4",
        "warning: space around 1 answer is learned",
        "1 conversation repeated from before, and kept",
        "keys that are not read: source (10 rows), id (1 row)",
    ):
        assert line in out, out


def test_an_example_marks_what_is_learned_and_obeys_no_terminal():
    ids = chat.encode_conversation(
        BYTES, [MESSAGES[0], {"role": "assistant", "content": "a\x1b[2J\n" + "b" * 3000}]
    )
    script = module("chat")
    shown = script.example_text(BYTES, ids, False)
    start = "<|bos|><|user|>Why?<|end|><|assistant|>"
    assert shown.startswith(f"{start}[[a\\x1b[2J\nbbb") and shown.endswith("b...]]")
    assert len(shown) == script.SHOWN + len("[[...]]")
    green = script.example_text(BYTES, ids[:-2990], True)
    assert green == f"{start}\x1b[32ma\\x1b[2J\n{'b' * 11}\x1b[0m"


def test_characters_of_the_texts_are_a_tokenizer(tmp_path):
    rows = [{"question": q, "answer": "<<1=2>>c"} for q in "ba"]
    ids, meta = prepare(tmp_path, rows, tokenizer="char")
    assert meta["tokenizer"] == {"kind": "chat", "base": {"kind": "char", "chars": "12abc"}}
    both = np.concatenate([ids["train"], ids["val"]])
    assert load(meta["tokenizer"]).decode(both[both >= 0]) == "1c1c"
    _, again = prepare(tmp_path, rows, tokenizer=tmp_path / "out", out="again")
    assert again["tokenizer"] == meta["tokenizer"] and again["val"] == meta["val"]


def test_real_data_of_three_formats(shared_data, tmp_path, capsys):
    source = shared_data / "sft/instructions_1100.json"
    argv = [f"--input={source}", "--tokenizer=byte", f"--out={tmp_path / 'a'}"]
    assert module("chat").main(argv) == 0
    ids, meta = bins(tmp_path / "a")
    rows = json.loads(source.read_text())
    learned = Counter(BYTES.decode([i for i in c if i >= 0]) for s in ids for c in split_up(ids[s]))
    assert learned == Counter(row["output"] for row in rows)
    assert 30 < meta["val"]["documents"] < 80

    def head(name, n):
        with lzma.open(shared_data / f"sft/{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, n)]

    rows = head("gsm8k_test", 200)
    ids, _ = prepare(tmp_path, rows, out="b")
    answers = sum(row["answer"].count("<<") for row in rows)
    for split in ids:  # the model writes each call, and reads each result
        assert (
            (ids[split] == BYTES.marks["call"]).sum()
            == (ids[split] == BYTES.marks["result"]).sum()
            == (ids[split] == ~BYTES.marks["back"]).sum()
        )
        answers -= (ids[split] == BYTES.marks["call"]).sum()
    assert answers == 0
    capsys.readouterr()
    rows = head("t0_pairs", 500)
    ids, _ = prepare(tmp_path, rows, out="c")
    assert "of 500 answers a mark at the end" in capsys.readouterr().out
    for split in ids:
        for conversation in split_up(ids[split]):
            text = BYTES.decode([i for i in conversation if i >= 0], marks=True)
            assert text.endswith("<|end|>") and "endoftext" not in text


# --- pairs

ASKED = MESSAGES[:1]
NO = {"role": "assistant", "content": "No."}
TALK = "\n\nHuman: Hi\n\nAssistant: Ho?\n\nHuman: Why?\n\nAssistant:"
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho?"}]


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, []),
        ({"question": "Why?", "chosen": "So.</s>", "rejected": "No.<|im_end|>"}, []),
        ({"messages": ASKED, "chosen": "So.", "rejected": "No."}, []),
        ({"prompt": ASKED, "chosen": MESSAGES[1:], "rejected": [NO]}, []),
        ({"prompt": "Why?", "chosen": MESSAGES, "rejected": [*ASKED, NO]}, []),
        ({"chosen": MESSAGES, "rejected": [*ASKED, NO]}, []),
        ({"prompt": "Why?", "chosen": [*HI, *MESSAGES], "rejected": [*HI, *ASKED, NO]}, HI),
        ({"chosen": [*HI, *MESSAGES], "rejected": [*HI, *ASKED, NO]}, HI),
        ({"prompt": [*HI, *ASKED], "chosen": "So.", "rejected": [NO]}, HI),
        ({"chosen": f"{TALK} So.", "rejected": f"{TALK} No.\n"}, HI),
        ({"prompt": TALK, "chosen": "So.", "rejected": "No."}, HI),
    ],
)
def test_every_form_of_a_pair_says_the_same(row, before):
    for more in ({}, {"system": "S"}):
        first = [{"role": "system", "content": "S"}] if more else []
        found = conversations.pair_of(conversations.parse(json.dumps(row | more)))
        chosen, rejected = (conversations.without_end_marks(messages)[0] for messages in found)
        conversations.check_pair(chosen, rejected)
        assert chosen == [*first, *before, *MESSAGES]
        assert rejected == [*first, *before, *ASKED, NO]
    assert conversations.format_of(row) == "preferences"
    assert not conversations.unread(row, "preferences")


def test_a_prompt_of_speakers_is_a_conversation_in_every_format():
    messages = [*HI, *MESSAGES]
    row = {"prompt": TALK, "completion": "So."}
    assert conversations.messages_of(row, "completion") == messages
    assert conversations.prompt_of(row, "prompts")["messages"] == messages[:-1]


def test_an_answer_in_feedback_is_text_even_if_it_spells_speakers():
    row = {"messages": ASKED, "chosen": "\n\nHuman: Hi", "rejected": "\n\nAssistant: No."}
    found = conversations.pair_of(row)
    assert [messages[-1]["content"] for messages in found] == [row["chosen"], row["rejected"]]


def pairs(n):
    """Rows of pairs, some of one question."""
    return [{"prompt": f"n {i % 20}", "chosen": f"{i}é", "rejected": "x" * (i % 7 + 1)}
            for i in range(n)]  # fmt: skip


def test_prepared_pairs_are_neighbours_of_which_the_last_answer_is_learned(tmp_path, capsys):
    rows = [{"prompt": [*HI, *ASKED], "chosen": "So.", "rejected": "No."}, *pairs(40)]
    ids, meta = prepare(tmp_path, rows, "--val-fraction=.2")
    assert meta["kind"] == "pairs" and meta["dtype"] == "int32"

    def by_hand(row):
        talks = []
        for side in ("chosen", "rejected"):
            hi = [257, *b"Hi", 259, 258, *b"Ho?", 259] if row["prompt"][0] != "n" else []
            question = b"Why?" if hi else row["prompt"].encode()
            read = [0, *hi, 257, *question, 259, 258]
            talks.append([*(~i for i in read), *row[side].encode(), 259])
        return talks

    n_pairs = 0
    for split, facts in ((s, meta[s]) for s in ids):
        talks = split_up(ids[split])
        found = [talks[i : i + 2] for i in range(0, len(talks), 2)]
        assert facts["pairs"] == len(found) and facts["documents"] == len(talks)
        assert all(pair in map(by_hand, rows) for pair in found)
        assert facts["trained"] == (ids[split] >= 0).sum()
        n_pairs += len(found)
    assert n_pairs == 41
    out = capsys.readouterr().out
    assert (
        "<|bos|><|user|>Hi<|end|><|assistant|>Ho?<|end|><|user|>Why?<|end|><|assistant|>[[" in out
    )
    assert "[[So.<|end|>]]\n" in out and "[[No.<|end|>]]\n" in out
    assert "format preferences: 41 pairs with 84 answers" in out
    chosen = [len(row["chosen"].encode()) + 1 for row in rows]
    assert f"a chosen answer has {np.mean(chosen):.1f} tokens on average" in out
    assert "\nto train on these: " in out and " --config dpo --data.path=" in out


def test_pairs_are_read_a_conversation_a_row_and_drawn_together(tmp_path):
    prepare(tmp_path, [*pairs(40), {"prompt": "long", "chosen": "y" * 99, "rejected": "n"}])
    data = datasets._in_rows(open_dataset(tmp_path / "out"), 60)
    rows = {len(split): split for split in (data.train, data.val)}
    assert sum(rows) == 80 and sum(split.left_out for split in rows.values()) == 1
    (wide,) = datasets._as_wide([data])
    assert wide.train.width == wide.val.width == 17 and "pairs in rows of 16" in str(wide.train)
    n = len(wide.train)
    texts = [BYTES.decode([~i for i in wide.train[i] if i < -1]) for i in range(n)]
    assert texts[::2] == texts[1::2]
    batches = TrainBatches([wide.train], [1], 16, 3, BatchConfig(sequences=8), 4, np.arange(4))
    found = np.concatenate([batches[step]["tokens"].reshape(-1, 17) for step in range(-(-n // 8))])[
        :n
    ]
    order = [next(i for i in range(n) if (wide.train[i] == row).all()) for row in found]
    assert order[::2] != sorted(order[::2]) and len({*order[::2]}) == n // 2
    assert all((found[i + 1] == wide.train[order[i] + 1]).all() for i in range(0, n, 2))
    mixed = TrainBatches([wide.val, wide.train], [1, 3], 16, 3, BatchConfig(sequences=8), 8,
                         np.arange(8))  # fmt: skip
    chosen, index = mixed.windows(0)
    assert chosen.tolist().count(0) == 2 and (chosen[::2] == chosen[1::2]).all()
    assert (index[::2] % 2 == 0).all() and (index[1::2] == index[::2] + 1).all()
    with pytest.raises(ValueError, match="none of its .* pairs fits within model.block_size=9"):
        datasets._in_rows(open_dataset(tmp_path / "out"), 9)


# --- prompts


def prompts(tmp_path, rows, *argv, out="prompts"):
    """What `open_dataset` and a reader of lines find in the prompts of rows."""
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = [f"--input={tmp_path / 'p.jsonl'}", f"--out={tmp_path / out}", "--tokenizer=byte"]
    assert module("chat").main([*files, "--prompts", *argv]) == 0
    lines = {
        split: [json.loads(line) for line in (tmp_path / out / f"{split}.jsonl").open()]
        for split in ("train", "val")
    }
    return open_dataset(tmp_path / out), lines


def test_prompts_keep_what_a_reward_needs_and_are_split_by_their_questions(tmp_path, capsys):
    asked = [{"role": "user", "content": f"n {i % 30}\u2028é"} for i in range(40)]
    rows = [{"prompt": m["content"], "answer": str(i), "of": [i]} for i, m in enumerate(asked)]
    data, lines = prompts(tmp_path, rows, "--val-fraction=.2")
    assert data.kind == "prompts" and data.vocab_size == 263
    assert [*data.train] == lines["train"] and [*data.val] == lines["val"]
    expected = [{"messages": [m], "answer": str(i), "of": [i]} for i, m in enumerate(asked)]
    assert sorted(lines["train"] + lines["val"], key=lambda x: int(x["answer"])) == expected
    questions = [{x["messages"][0]["content"] for x in part} for part in lines.values()]
    assert not questions[0] & questions[1] and len(questions[1]) >= 2
    for split in (data.train, data.val):
        ids = [split.ids(i) for i in range(len(split))]
        for example, prompt in zip(split, ids, strict=True):
            text = example["messages"][0]["content"].encode()
            assert prompt.tolist() == [0, 257, *text, 259, 258] and prompt.dtype == np.int32
        assert split.longest == max(map(len, ids))
        facts = json.loads((tmp_path / "prompts/meta.json").read_text())
        facts = facts["train" if split is data.train else "val"]
        assert facts["tokens"] == sum(map(len, ids)) and facts["documents"] == len(ids)
    out = capsys.readouterr().out
    assert "format prompts: 40 prompts with 40 answers" in out and "<|assistant|>\n" in out
    # The same questions in a conversation's data go to the same side.
    ids, _ = prepare(tmp_path, [{"prompt": m["content"], "completion": "x"} for m in asked],
                     "--val-fraction=.2")  # fmt: skip
    assert len(split_up(ids["val"])) == len(lines["val"])


@pytest.mark.parametrize(
    ("row", "messages", "more"),
    [
        ({"question": "Why?", "answer": "<<1=1>>1"}, MESSAGES[:1], {"answer": "<<1=1>>1"}),
        ({"prompt": MESSAGES[:1], "level": None}, MESSAGES[:1], {"level": None}),
        ({"messages": [*MESSAGES, *MESSAGES[:1]]}, [*MESSAGES, *MESSAGES[:1]], {}),
        (
            {"prompt": "Why?", "chosen": "a", "system": "S"},
            [{"role": "system", "content": "S"}, *MESSAGES[:1]],
            {"chosen": "a"},
        ),
    ],
)
def test_what_becomes_a_prompt(row, messages, more):
    row = conversations.parse(json.dumps(row))
    example = conversations.prompt_of(row, conversations.format_of(row, prompts=True))
    assert example == {"messages": messages, **more} and [*example][0] == "messages"


def test_prompts_are_whole_and_take_the_place_of_other_data_only_by_force(tmp_path, capsys):
    rows = [{"prompt": f"{i}"} for i in range(9)]
    before = prompts(tmp_path, rows)[0].fingerprint
    assert prompts(tmp_path, rows)[0].fingerprint == before
    assert "already prepared" in capsys.readouterr().out
    assert prompts(tmp_path, rows[:8], out="fewer")[0].fingerprint != before
    file = tmp_path / "prompts/train.jsonl"
    file.write_text(file.read_text().replace('"1"', '"2"'))
    with pytest.raises(ValueError, match="not the file that meta.json beside it describes"):
        open_dataset(tmp_path / "prompts")
    with pytest.raises(ValueError, match="holds prompts, .* give --task"):
        open_split(tmp_path / "prompts", "val")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/val.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="holds a val.jsonl of another origin"):
        prompts(tmp_path, rows, "--force", out="own")
    assert [*(tmp_path / "own").iterdir()] == [tmp_path / "own/val.jsonl"]
    with pytest.raises(ValueError, match="see --force"):
        prompts(tmp_path, rows[:8], "--skip-bad=1")
    prompts(tmp_path, rows[:8], "--force")
    pairs = [{"prompt": f"{i}", "completion": "x"} for i in range(9)]
    prepare(tmp_path, pairs, "--force", out="prompts")
    assert {p.name for p in (tmp_path / "prompts").iterdir()} == {
        "meta.json", "train.bin", "val.bin"
    }  # fmt: skip
    with pytest.raises(ValueError, match="--format alpaca goes without --prompts"):
        prompts(tmp_path, rows, "--format=alpaca", out="no")
    with pytest.raises(ValueError, match="--format prompts goes with --prompts"):
        prepare(tmp_path, rows, "--format=prompts", out="no")


def test_an_objective_learns_from_its_own_kind_of_data(tmp_path):
    data, _ = prompts(tmp_path, [{"prompt": f"{i}"} for i in range(9)])
    for name, fitting in (("text", "data/text/prepare.py"), ("sft", "data/chat/prepare.py ")):
        config = SimpleNamespace(objective=SimpleNamespace(name=name))
        with pytest.raises(ValueError, match=f"={name}, but .* holds prompts: .*=grpo.*{fitting}"):
            datasets._check_kind(config, data)
    datasets._check_kind(SimpleNamespace(objective=SimpleNamespace(name="grpo")), data)

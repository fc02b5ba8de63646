"""The calculator against values known beforehand, and against those who would break it; then what
it writes into answers."""

import json
import lzma
import re
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_tasks import TINY, tiny_steps

from scalegpt.data import chat, tokenizer
from scalegpt.data.calculator import LARGEST, Results, calculate
from scalegpt.errors import Mistake
from scalegpt.inference.decode import Decoder
from scalegpt.inference.sampling import Sampler

BYTES = tokenizer.load("byte").chat()
MARKS = BYTES.marks


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("48/2", "24"), ("12/60", "0.2"), ("1.1*3", "3.3"), ("10.0", "10"), ("2.50+.5", "3")],
        *[("1/3", "0.3333333333"), ("-2/3", "-0.6666666667"), ("2e3*5", "10000")],
        *[("7//2", "3"), ("-7//2", "-4"), ("7%3", "1"), ("-7 % 3", "2"), ("7.5%2", "1.5")],
        *[("2**10", "1024"), ("2**-1", "0.5"), ("16**.5", "4"), ("2**.5", "1.414213562")],
        *[("(1+2)*(3-5)", "-6"), ("--5", "5"), ("+5", "5"), (" 1 + 1 ", "2"), ("2**3**2", "512")],
        *[("1,000*2", "2000"), ("$1,250,000/5", "250000"), ("10**30", "1" + "0" * 30)],
        *[("'strawberry'.count('r')", "3"), ('"abc".count("d")', "0"), ("'aa'.count('a')*2", "4")],
        *[("1/3-1/3", "0"), ("0.1+0.2", "0.3"), ("1/10**30", "0." + "0" * 29 + "1")],
    ],
)
def test_values(text, value):
    assert calculate(text) == value


REFUSED = {
    "no expression": ["", "2+", "1 2", "1=1", "1;2", "x:=1", "05", "1\n2", "\0", "\udcff"]
    + ["(" * 100 + "1" + ")" * 99, "(" * 200],
    "divides by 0": ["1/0", "1%0", "1//0", "0**-1"],
    "the exponent": ["9**9**9", "2**101", "2**-101", "1**(9**9)"],
    "larger than 1e+30": ["9**99", "((9**9)**9)**9", "1e31", "1e999", "-1e999", "9" * 40]
    + ["1e29*1e29", "1/9e29/9e29/9e29"],
    "too large": ["9e29**99.5"],
    "below 0": ["(-8)**.5"],
    "only numbers": ["two", "1<2", "1j", "True", "None", "'a'", "'a'*9", "[1]*9", "1 if 1 else 2"]
    + ["1<<99", "~1", "not 1", "1@2", "abs(-1)", "'a'.upper()", "(1).real", "().__class__"]
    + ["__import__('os').system('id')", "'a'.count(*['a'])", "'a'.count('a', 0)", "lambda: 1"]
    + ["'a'.count(sub='a')", "f'{1}'.count('1')", "(yield)", "b'a'.count(b'a')", "{1: 2}[1]"],
    "characters, at most": ["1+" * 101 + "1", "(" * 9999, "9" * 10**7],
}


@pytest.mark.parametrize(
    ("text", "message"),
    [(text, message) for message, texts in REFUSED.items() for text in texts],
    ids=lambda text: text[:20],
)
def test_what_is_no_arithmetic_is_refused_soon(text, message):
    began = time.process_time()
    with pytest.raises(Mistake) as error:
        calculate(text)
    assert time.process_time() - began < 0.5
    assert str(error.value).startswith(f"cannot calculate {text[:60]!r}: ")
    assert message in str(error.value)


def test_random_text_is_a_value_or_a_mistake():
    """Of bounded length, whatever is put together from what a calculator knows."""
    rng = np.random.default_rng(0)
    parts = [*"0123456789+-*/%().,$ e'", "**", "//", "99", "1e9", "'a'.count('a')", "**-", "1/3"]
    for _ in range(3000):
        text = "".join(rng.choice(parts, rng.integers(1, 25)))
        try:
            value = calculate(text)
        except Mistake:
            continue
        assert re.fullmatch(r"-?\d+(\.\d+)?", value) and abs(float(value)) <= LARGEST
        assert len(value) <= 80


def test_the_calls_of_gsm8k_have_their_values(shared_data):
    """All but how many zeros there are: 12 for 12.00, 0.5 for .5."""
    with lzma.open(shared_data / "sft/gsm8k_test.jsonl.xz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file][:300]
    calls = [c for text in answers for c in re.findall(r"<<([^<>=]+)=([^<>=]+)>>", text)]
    assert len(calls) > 800
    for call, result in calls:
        assert float(calculate(call)) == pytest.approx(float(result.replace(",", "")), abs=1e-9)


# --- within an answer


def answered(text, calculated=True):
    """The ids of an answer: what stands in [ ] is a mark, and what must follow is put in."""
    results, ids = Results(BYTES), []
    for part in re.split(r"(\[\w+\])", text):
        for token in [MARKS[part[1:-1]]] if part[:1] == "[" else part.encode():
            ids.append(token)
            while calculated and (following := results.add(ids[-1])) is not None:
                ids.append(following)
    return ids


def test_a_result_is_written_after_a_call():
    text = "A[call]48/2[result] is, [call]1/0[result][call]1+1[call]2+2[result].[end]"
    whole = "A<|call|>48/2<|result|>24<|back|> is, <|call|>1/0<|result|><|back|>"
    whole += "<|call|>1+1<|call|>2+2<|result|>4<|back|>.<|end|>"
    assert BYTES.decode(answered(text), marks=True) == whole
    assert BYTES.decode(answered("[result]a[back]"), marks=True) == "<|result|>a<|back|>"
    letters = tokenizer.char_tokenizer("01/").chat()
    results = Results(letters)
    ids = [letters.marks["call"], *letters.encode("1/10"), letters.marks["result"]]
    following = [results.add(token) for token in ids]
    assert following[-1] == letters.marks["back"]  # 0.1 has a "." that the tokenizer has not


def test_the_calls_of_an_answer_are_parts_of_its_content():
    call = {"call": "48/2", "result": "24"}
    for content in ("So.", ["A é", call, "b", call], [call, "", "b"][::2], ""):
        ids = chat.encode_conversation(BYTES, [{"role": "assistant", "content": content}])[2:]
        ids = np.where(ids < 0, ~ids, ids)
        found = chat.content_of(BYTES, ids)
        assert found == content or [found] == content
        assert chat.spoken(found) == "".join(part for part in content if part != call)
    for cut in ("a[call]1+", "a[call]1+1[result]", "a[call]", "a[end]", "a[end]b"):
        assert chat.content_of(BYTES, answered(cut, False)) == "a"


def test_a_decoder_reads_the_results_that_it_is_given():
    """Two answers of a model that writes a script; only the first calls."""
    scripts = [
        answered("a[call]12*12[result]", False) + [120] * 9,  # what it would write itself
        [*b"no call here at all"],
    ]
    read, state = [], (SimpleNamespace(slots=40), None)  # a cache that need not grow

    def draw(i):
        return np.array([script[i] for script in scripts], np.int32)

    def prefill(params, tokens, first, seen, key, i, slots):
        return draw(i), state

    def step(params, ids, state, key, i):
        read.append(np.asarray(ids).tolist())
        return draw(i), state

    steps = tiny_steps({"data": 1}, 1, jax.devices()[:1], TINY | {"block_size": 40})
    write = Decoder(steps, None, Sampler(0), 263, None, prefill, step, None, None)
    found = np.stack([*write.ids([[0, 1], [0, 2]], 13, codec=BYTES)], 1)
    assert BYTES.decode(found[0], marks=True) == "a<|call|>12*12<|result|>144<|back|>x"
    assert bytes(found[1].astype(np.uint8)) == b"no call here "
    assert read == found.T[:-1].tolist()
    read.clear()
    found = np.stack([*write.ids([[0, 1], [0, 2]], 13, codec=BYTES.within(256))], 1)
    assert found[0].tolist() == scripts[0][:13]  # a tokenizer without marks has no calls

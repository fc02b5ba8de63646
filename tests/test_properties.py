"""What holds for any input, by hypothesis: configurations, tokenizers, the order of windows.

Examples are the same in every run, few, and without a time limit each, so that a slow machine
fails nothing.
"""

import json
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalegpt.config import BatchConfig, Config, MeshConfig, command_line, loading
from scalegpt.config.recipe import RopeScaling
from scalegpt.config.types import Name, Place, Text, Which, divisors
from scalegpt.data import tokenizer
from scalegpt.data.batches import TrainBatches, TrainOrder, mixture_index
from scalegpt.data.token_files import read_meta
from scalegpt.files import json_files
from scalegpt.processes.command import exit_code
from scalegpt.train import FLAGS
from scalegpt.weights.tokenizer_files import tokenizer_files

few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    database=None,
)

# --- configurations

# Of no control characters; a command line reads null as none, { as the start of a mixture and ~ as
# the home folder.
LETTERS = st.characters(exclude_categories=["Cc", "Cs"])
NAMES = st.text(LETTERS, min_size=1, max_size=20).filter(
    lambda name: name.strip() and name not in ("null", "None") and name[0] not in "{[\"'~"
)
# Values under which any other key may have any value of its type.
BASE = {
    "model": {"n_head": 1, "n_embd": 64, "window": 8},
    "mesh": {"data": 1},
    "optim": {"name": "muon", "min_lr": 0.0, "warmup_steps": 0, "weight_decay": 0.1},
    "checkpoint": {"every": 1},
    "data": {"path": "d"},
    "run": {"out_dir": "o"},
}
RUN = {**BASE["run"], "init_from": "r"}
PAIRS = {"objective": {"name": "dpo"}, "run": RUN}
# What a key, or those of a section, need; without it they are refused.
NEEDED = {
    "objective.width": PAIRS,
    "dpo": PAIRS,
    "grpo": {"objective": {"name": "grpo"}, "grpo": {"reward": "exact"}, "run": RUN},
    "lora": {"optim": {**BASE["optim"], "name": "adamw"}, "run": RUN},
}
ALONE = {  # keys whose values another key limits, too
    "model.preset": st.sampled_from(["gpt2", "gpt2-xl", "modern", "many_epochs", "nanochat"]),
    "objective.name": st.sampled_from(["text", "sft"]),
    "grpo.max_new_tokens": st.integers(1, 1023),
    "grpo.updates": st.just(1),
    "grpo.prompts": st.integers(1, 9999),
    "model.n_head": st.sampled_from(divisors(64)),
    "model.n_kv_head": st.just(1),
    "model.window": st.integers(1, 9999),
    "model.window_pattern": st.text("SL", min_size=1, max_size=9),
    "model.rope_scaling": st.builds(
        RopeScaling,
        rope_type=st.sampled_from(["linear", "llama3", "yarn"]),
        factor=st.floats(1, 64),
        original_max_position_embeddings=st.integers(1, 9999),
    ),
    "model.n_embd": st.integers(1, 1000).map(lambda n: 2 * n),
    **{f"mesh.{axis}": st.integers(1, 64) for axis in MeshConfig.model_fields},
    "optim.min_lr": st.just(0.0),
    "optim.momentum_slow": st.just(0.0) | st.floats(0.85, 0.999),
    "optim.warmup_steps": st.just(0),
    "checkpoint.every": st.just(1),
    "eval.tasks": st.dictionaries(st.sampled_from(["hellaswag", "lambada"]), NAMES, max_size=2),
    "batch.growth": st.dictionaries(st.integers(2, 99), st.integers(1, 99), max_size=2),
    "data.path": NAMES,
    "run.allow_config_change": st.booleans()
    | st.lists(st.sampled_from(["optim.lr", "data.path"]), min_size=1),
}


def values_of(annotation: Any, limits: tuple[Any, ...] = ()) -> st.SearchStrategy:
    """Values of a type as config.py writes them."""
    if annotation in (Name, Place, Text) or (annotation is str and not limits):
        return NAMES
    if annotation == Which:
        return st.sampled_from(["best", "latest", "0", "1200"])
    if hasattr(annotation, "__metadata__"):
        inner, *more = get_args(annotation)
        return values_of(inner, (*limits, *more))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [a for a in get_args(annotation) if a is not types.NoneType]
        return st.none() | st.one_of(*(values_of(part) for part in parts))
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation is bool:
        return st.booleans()
    bounds: dict[str, Any] = {}
    for limit in [part for x in limits for part in getattr(x, "metadata", [x])]:
        for kind, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt")):
            if isinstance(limit, kind):
                bounds[name] = getattr(limit, name)
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if annotation is int:
        return st.integers(low, high - ("lt" in bounds))
    assert annotation is float, annotation
    return st.floats(
        low, 1e30 if high is None else high, exclude_min="gt" in bounds, exclude_max="lt" in bounds
    )


KEYS = {
    f"{section}.{key}": ALONE[name] if (name := f"{section}.{key}") in ALONE else values_of(hint)
    for section, field in Config.model_fields.items()
    for key, hint in typing.get_type_hints(field.annotation, include_extras=True).items()
    if key in field.annotation.model_fields
}


def base_of(name: str) -> dict[str, Any]:
    return {**BASE, **NEEDED.get(name, NEEDED.get(name.partition(".")[0], {}))}


def with_key(name: str, value: Any) -> dict[str, Any]:
    section, key = name.split(".")
    base = base_of(name)
    return {**base, section: {**base.get(section, {}), key: value}}


@st.composite
def configurations(draw: Any) -> Config:
    """Any number of keys, each with any value."""
    values = {name: dict(keys) for name, keys in BASE.items()}
    for name in draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=12)):
        section, key = name.split(".")
        # These limit each other, or what else there may be.
        if not {name, section} & NEEDED.keys() and name not in (
            "model.n_head",
            "model.n_embd",
            "model.position",
            "model.depth",
            "optim.name",
            "optim.weight_decay",
        ):
            values.setdefault(section, {})[key] = draw(KEYS[name])
    return loading.validate(values, "here")


@few
@given(configurations())
def test_any_configuration_survives_its_yaml(config):
    again = loading.validate(loading.parse_yaml(config.to_yaml()), "there")
    assert again == config and again.to_yaml() == config.to_yaml()


@pytest.mark.parametrize("name", sorted(KEYS))
@settings(few, max_examples=8)
@given(data=st.data())
def test_any_value_of_the_right_type_is_accepted_and_lands(name, data):
    section, key = name.split(".")
    value = data.draw(KEYS[name].filter(lambda value: value is not None))
    expected = getattr(getattr(loading.validate(with_key(name, value), "here"), section), key)
    base = [f"--{s}.{k}={v}" for s, keys in base_of(name).items() for k, v in keys.items()]
    plain = value.model_dump() if isinstance(value, RopeScaling) else value
    text = json.dumps(plain, ensure_ascii=False) if isinstance(plain, dict) else str(plain)
    config, _ = command_line.parse([*base, f"--{name}={text}"], "test", {})
    found = getattr(getattr(config, section), key)
    assert found == expected == value


def only_messages(argv: list[str], capsys: Any) -> None:
    """A run, or one message, or help; anything else is raised."""

    def main(argv: list[str]) -> int:
        command_line.parse(argv, "test", FLAGS)
        return 0

    try:
        code = exit_code(main, argv)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 0 and not err or code == 2 and err.startswith("error: "), (code, err)


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "--",
            "-",
            "--config",
            "--optim",
            "--optim.lr",
            "--print-config",
            "--help",
            "--compile-only",
            "--model",
            "--data.path={",
            "--eval.tasks=[",
        ]
    ),
    st.builds("--{}={}".format, st.sampled_from(sorted(KEYS)), st.text(max_size=12)),
    st.builds("--{}={}".format, st.sampled_from(sorted(Config.model_fields)), st.text(max_size=12)),
    st.builds(
        "--{}={}".format,
        st.sampled_from(sorted(KEYS)),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=3),
            lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        ).map(json.dumps),
    ),
)


@settings(few, max_examples=150)
@given(st.lists(WORDS, max_size=4))
def test_no_command_line_gives_a_traceback(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    only_messages(argv, capsys)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Config.model_fields, *(k.split(".")[1] for k in KEYS)])
            | st.integers(),
            x,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@few
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode())
    | st.text("{}[]:,&*!|>%@`#-?'\" \n\ta1", max_size=40).map(lambda text: text.encode())
    | VALUES.map(lambda values: yaml.safe_dump(values, allow_unicode=True).encode())
)
def test_no_yaml_gives_a_traceback(tmp_path, capsys, content):
    (tmp_path / "c.yaml").write_bytes(content)
    only_messages([f"--config={tmp_path}/c.yaml"], capsys)


@few
@given(
    st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v, default=str).encode()),
    st.sampled_from(["meta.json", "meta.pkl"]),
)
def test_no_meta_file_gives_a_traceback(tmp_path, capsys, content, name):
    for old in tmp_path.glob("meta.*"):
        old.unlink()
    (tmp_path / name).write_bytes(content)

    def main(argv: list[str]) -> int:
        tokenizer.check(read_meta(tmp_path)[0]["tokenizer"])
        return 0

    assert exit_code(main, []) in (0, 2)


@few
@given(VALUES)
def test_a_tokenizer_is_made_of_what_is_checked_and_of_nothing_else(spec):
    try:
        tokenizer.check(spec)
    except ValueError:
        with pytest.raises(ValueError):
            tokenizer.load(spec)


@few
@given(st.text(max_size=60))
def test_json_is_a_value_or_a_value_error(text):
    try:
        json_files.parse(text)
    except ValueError:
        pass


# --- tokenizers


@settings(few, max_examples=200)
@given(st.text(max_size=200))
def test_text_survives_every_tokenizer(text):
    codecs = [tokenizer.load("byte"), tokenizer.char_tokenizer([text or "x"]), gpt2()]
    for codec in codecs:
        ids = codec.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert not len(ids) or (0 <= ids.min() and ids.max() < codec.vocab_size)
        assert codec.decode(ids) == text, codec.name
        again = tokenizer.load(json.loads(json.dumps(codec.spec())))
        assert again.encode(text).tolist() == ids.tolist()


@settings(few, max_examples=30)
@given(st.text(min_size=1, max_size=60))
def test_text_survives_the_tokenizer_json_that_is_exported(text):
    pytest.importorskip("tokenizers")
    for codec in (tokenizer.load("byte"), tokenizer.char_tokenizer([text])):
        content = tokenizer_files(codec.spec(), 16)["tokenizer.json"]
        exported = tokenizer.load({"kind": "tokenizer.json", "name": "t", "json": content})
        assert exported.encode(text).tolist() == codec.encode(text).tolist()
        assert exported.decode(codec.encode(text)) == text


@few
@given(st.lists(st.text(max_size=20), max_size=4))
def test_marks_in_a_prompt_are_marks_and_the_rest_is_text(parts):
    for codec in (tokenizer.load("byte"), gpt2()):
        ids = codec.encode_prompt(tokenizer.END_OF_TEXT.join(parts) if parts else "")
        expected = [i for part in parts for i in [codec.eot, *codec.encode(part).tolist()]][1:]
        if not any(tokenizer.END_OF_TEXT in part for part in parts):
            assert ids.tolist() == expected


def gpt2() -> tokenizer.Tokenizer:
    try:
        return tokenizer.load("gpt2")
    except ValueError as error:
        pytest.skip(f"gpt2's files are not here: {error}")


# --- the order of windows

ORDERS = st.tuples(st.integers(1, 12), st.integers(0, 150), st.integers(0, 2**32 - 1))


def make(block: int, extra: int, seed: int, stream: int = 0) -> tuple[TrainOrder, int]:
    length = block + 1 + extra
    return TrainOrder(length, block, seed, stream), length


@few
@given(ORDERS, st.integers(0, 10**6))
def test_every_window_comes_once_an_epoch(order, epoch):
    order, length = make(*order)
    starts = order.window(epoch * order.n_windows + np.arange(order.n_windows))
    assert len(set(starts.tolist())) == order.n_windows
    assert 0 <= starts.min() and starts.max() + order.block_size < length
    grid = np.sort(starts)
    assert (np.diff(grid) == order.block_size).all(), "side by side: none overlaps another"


@few
@given(ORDERS, st.lists(st.integers(0, 3000), min_size=1, max_size=20))
def test_random_access_is_the_sequence(order, asked):
    order, _ = make(*order)
    sequence = order.window(np.arange(3001))
    assert order.window(np.array(asked)).tolist() == sequence[asked].tolist()


@few
@given(
    ORDERS,
    st.integers(1, 3),
    st.integers(0, 10**9),
    st.sampled_from([(a, hosts, m) for a in (1, 2, 3, 4) for hosts in (1, 2, 3) for m in (1, 2)]),
)
def test_a_batch_depends_neither_on_accumulation_nor_on_hosts(order, sets, step, layout):
    block, extra, seed = order
    accumulation, hosts, each = layout
    sequences = accumulation * hosts * each
    tokens = [np.arange(block + 1 + extra + i, dtype="<u2") + 300 * i for i in range(sets)]
    weights = [1.0 + i for i in range(sets)]

    def batch(accumulation: int, rows: np.ndarray) -> np.ndarray:
        micro = sequences // accumulation
        size = BatchConfig(sequences=sequences)
        return TrainBatches(tokens, weights, block, seed, size, micro, rows)[step]

    whole = batch(1, np.arange(sequences))[0]
    parts = [batch(accumulation, h * each + np.arange(each)) for h in range(hosts)]
    assert np.concatenate(parts, axis=1).reshape(whole.shape).tolist() == whole.tolist()
    assert (np.diff(whole, axis=1) == 1).all(), "each row is one window of the text"


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**12))
def test_a_mixture_has_exactly_its_parts(parts, rounds):
    total = sum(parts)
    rows = rounds * total + np.arange(3 * total)
    dataset, within = mixture_index(rows, parts)
    for d, part in enumerate(parts):
        mine = within[dataset == d]
        assert mine.tolist() == list(range(rounds * part, rounds * part + 3 * part)), "none twice"
        for begin in range(2 * total):  # of any so many rows in line
            count = (dataset[begin : begin + total] == d).sum()
            assert abs(count - part) <= len(parts)
        assert (dataset[:total] == d).sum() == part

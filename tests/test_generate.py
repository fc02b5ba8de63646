"""Text: where a continuation ends, what is shown meanwhile, and every flag of the command."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from scalegpt import generate
from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config.loading import validate
from scalegpt.data import tokenizer
from scalegpt.inference import continuation
from scalegpt.inference.continuation import Continuation
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.step import build, sharding, update
from scalegpt.weights import trained

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTE = tokenizer.load({"kind": "byte"})
FALLBACK = {  # a tokenizer.json with SentencePiece's byte tokens, and nothing else
    "model": {
        "type": "BPE",
        "vocab": {f"<0x{byte:02X}>": byte for byte in range(256)},
        "merges": [],
        "byte_fallback": True,
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
}
FALLBACK = tokenizer.load({"kind": "tokenizer.json", "name": "t.json", "json": FALLBACK})
BLOCK = 32


def written(text: bytes, stops=(), codec=BYTE):
    """The state of a continuation after each of these bytes."""
    continuation, seen = Continuation(codec, stops), []
    for token in text:
        continuation.add(token)
        seen.append((continuation.text, continuation.finish))
    return continuation, seen


# --- where a text ends


@pytest.mark.parametrize("codec", [BYTE, FALLBACK], ids=["byte", "byte fallback"])
def test_what_is_shown_is_only_ever_added_to(codec):
    text = "Größe: 3 € 🙂 end."
    continuation, seen = written(text.encode(), codec=codec)
    shown = [part for part, _ in seen]
    assert all(later.startswith(part) for part, later in zip(shown, shown[1:], strict=False))
    assert "\ufffd" not in "".join(shown) and shown[-1] == text
    assert shown[2] == "Gr" and shown[3] == "Grö"  # not half a character
    assert continuation.finish is None


def test_the_text_of_the_prompt_is_not_part_of_what_was_added():
    """A SentencePiece-like tokenizer drops the space before the first word that it decodes."""
    pieces = ["</s>", *"▁Once ▁upon ▁a ▁time ▁there".split()]
    content = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[p, -1.0] for p in pieces]},
        "added_tokens": [
            {"id": 0, "content": "</s>", "special": True} | dict.fromkeys(FLAGS, False)
        ],
        "pre_tokenizer": METASPACE,
        "decoder": METASPACE,
    }
    codec = tokenizer.load({"kind": "tokenizer.json", "name": "t.json", "json": content})
    prompt = continuation.prompt_ids(codec, "Once upon a time")
    assert prompt.tolist() == [1, 2, 3, 4] and codec.decode([5]) == "there" and codec.eot == 0
    for ids, want in ((prompt, " there a"), ([1, 0], "there a"), ([0], "there a"), ([], "there a")):
        text = Continuation(codec, prompt=ids)
        text.add(5)
        text.add(3)
        assert text.text == want
    text = Continuation(codec, stops=[" a"], prompt=prompt)
    text.add(3)
    assert (text.text, text.finish) == ("", "stop")
    for codec in (BYTE, FALLBACK):  # the tail begins within a character
        text = Continuation(codec, prompt=[*"🙂🙂🙂🙂a".encode()])
        text.add(66)
        assert text.text == "B"


@pytest.mark.parametrize("codec", [BYTE, FALLBACK], ids=["byte", "byte fallback"])
def test_an_unfinished_character_is_shown_as_such_in_the_end(codec):
    continuation, _ = written("a€".encode()[:-1], codec=codec)
    assert continuation.text == "a"
    continuation.end("length")
    assert (continuation.text, continuation.finish) == ("a\ufffd", "length")


def test_a_stop_string_ends_the_text_and_is_not_part_of_it():
    continuation, seen = written(b"one. Two\n\nthree", stops=["\n\n", "THREE", "\nx"])
    assert (continuation.text, continuation.finish) == ("one. Two", "stop")
    # A single newline could be the beginning of one and is held back.
    assert seen[8] == ("one. Two", None) and continuation.ids == list(b"one. Two\n\n")
    held, _ = written(b"a\nb", stops=["\n\n"])
    assert held.text == "a\nb"


def test_of_several_stop_strings_the_first_in_the_text_counts():
    assert written(b"xabcy", stops=["cy", "abc"])[0].text == "x"
    assert written(b"xTHE END", stops=["END", "THE END"])[0].text == "x"


def test_what_may_become_a_stop_string_is_text_when_it_does_not():
    continuation, _ = written(b"the E", stops=["END"])
    assert continuation.text == "the "
    continuation.end("length")
    assert continuation.text == "the E"


def test_end_of_text_ends_it_and_later_tokens_are_ignored():
    continuation, _ = written(b"ab\0cd")
    assert (continuation.text, continuation.finish) == ("ab", "end_of_text")
    assert continuation.ids == list(b"ab")
    chat = BYTE.chat()
    continuation, _ = written([*b"ab", chat.marks["call"], *b"c", chat.end, *b"d"], codec=chat)
    assert (continuation.text, continuation.finish) == ("ab", "end_of_text")  # a call is hidden


# --- the command


@pytest.fixture(scope="module")
def model():
    """A byte model of random weights, whose texts are lively."""
    values = {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": BLOCK, "vocab_size": 256},
        "data": {"path": "x"},
        "run": {"out_dir": "y"},
    }
    config = validate(values, "test")
    steps = build.build_for_use(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), 1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), steps.abstract.params
    )
    return trained.Trained("tiny", config, BYTE.spec(), None, steps, params)


@pytest.fixture
def command(model, monkeypatch, capsys):
    """Runs the command on the model; gives (standard output, standard error)."""

    def load(flags, microbatch):  # a copy, since the command deletes what it has no more use for
        return replace(model, params=jax.tree.map(jnp.copy, model.params))

    monkeypatch.setattr(generate.trained, "load", load)

    def run(*argv: str) -> tuple[str, str]:
        assert generate.main(["--run=out/x", *argv]) == 0
        return capsys.readouterr()

    return run


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_every_prompt_gets_its_samples_each_printed_after_it(command):
    asked = ["--prompt=AB", "--prompt=C", "--num-samples=2", "--max-new-tokens=9"]
    found = objects(command(*asked, "--json")[0])
    assert [row["prompt"] for row in found] == ["AB", "AB", "C", "C"]
    assert {row["new_tokens"] for row in found} <= set(range(10))
    assert [row["prompt_tokens"] for row in found] == [2, 2, 1, 1]
    assert len({row["text"] for row in found}) == 4
    text, err = command(*asked)
    assert text == "\n---------------\n".join(row["prompt"] + row["text"] for row in found) + "\n"
    assert "2 + 1 tokens of prompt" in err and "tokens/s" in err


def test_fault_02_every_flag_of_the_command_has_its_effect(command):
    """nanogpt-jax parsed --init_from and the rest, and then ran with a fresh default config."""
    base = ["--prompt=x", "--max-new-tokens=24", "--json"]
    plain = objects(command(*base)[0])[0]
    assert plain["finish"] == "length" and plain["new_tokens"] == 24
    stop = next(c for c in plain["text"][3:] if c.isprintable())
    changes = [
        "--max-new-tokens=5",
        "--temperature=0",
        "--top-k=1",
        "--top-p=0.1",
        "--min-p=0.9",
        "--repetition-penalty=9",
        f"--stop={stop}",
        "--seed=5",
        "--num-samples=2",
    ]
    texts = {change: objects(command(*base, change)[0]) for change in changes}
    for change, found in texts.items():
        assert found[-1] != plain, change
    for change in ("--top-p=1e-9", "--min-p=1"):
        texts[change] = objects(command(*base, change)[0])
    same = ("--temperature=0", "--top-k=1", "--top-p=1e-9", "--min-p=1")
    assert len({texts[change][0]["text"] for change in same}) == 1
    assert texts[f"--stop={stop}"][0]["finish"] == "stop"


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A run whose best checkpoint is step 1, and whose latest, of other weights, step 2."""
    out_dir = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(out_dir)
    meta = {"config": model.config.model_dump(), "tokenizer": model.tokenizer}
    for at, sign in ((1, 1.0), (2, -1.0)):
        params = jax.tree.map(lambda x, sign=sign: sign * x, model.params)
        state = update.State(jnp.int32(at), params, {}, {})
        checkpoints.save(state, at, meta, val_loss=float(at))
    checkpoints.wait()
    checkpoints.close()
    return out_dir


@pytest.mark.slow
def test_fault_02_the_checkpoint_asked_for_is_the_one_that_writes(run, model, capsys, monkeypatch):
    """nanogpt-jax's `--init_from resume --checkpoint_type best` ran OpenAI's GPT-2 instead."""
    common = ["--run", str(run), "--prompt=x", "--max-new-tokens=20", "--temperature=0"]

    def text(*argv: str) -> str:
        assert generate.main([*common, *argv]) == 0
        return capsys.readouterr().out

    best, latest = text(), text("--checkpoint=latest")
    for sign, want in ((1.0, best), (-1.0, latest)):
        params = jax.tree.map(lambda x, sign=sign: sign * x, model.params)
        greedy = decoder(model.steps, params, Sampler(temperature=0.0), 256)
        (done,) = continuation.continuations(greedy, BYTE, [BYTE.encode("x")], max_new_tokens=20)
        assert want == f"x{done.text}\n"
    assert text("--checkpoint=best") == text("--checkpoint=1") == best != latest
    assert text("--checkpoint=2", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2") == latest
    seen = []
    monkeypatch.setattr(
        generate,
        "decoder",
        lambda steps, *args, **keys: (
            seen.append(steps.model.dtype),
            decoder(steps, *args, **keys),
        )[1],
    )
    text("--dtype=bfloat16")
    assert seen == [jnp.bfloat16]


@pytest.mark.slow
def test_two_processes_write_the_text_of_one_and_the_first_prints_it(run, capsys, tmp_path):
    argv = ["--run", str(run), "--prompt=AB", "--prompt=C", "--max-new-tokens=12", "--json"]
    assert generate.main(argv) == 0
    alone = capsys.readouterr().out
    mesh = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    first, second = processes.run("scalegpt.generate", *argv, *mesh)
    assert first[0] == alone and second == ("", "")
    each = [["--seed=1"], ["--seed=2"]]
    two = processes.start(["-m", "scalegpt.generate", *argv, *mesh], 2, 4, each)
    for _, said in processes.finish(two):
        assert "--seed: process 0" in said and "has 2" in said
    assert [process.returncode for process in two] == [2, 2]
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_text(file.name)
    argv, each = argv[:2], [[f"--prompt-file={file}"] for file in files]
    two = processes.start(["-m", "scalegpt.generate", *argv], 2, 4, each)
    assert all("prompts: process 0" in said for _, said in processes.finish(two))


def test_text_past_block_size_slides_or_is_refused(command):
    asked = ["--prompt=" + "x" * 30, "--max-new-tokens=8", "--json"]
    assert objects(command(*asked)[0])[0]["new_tokens"] == 8
    with pytest.raises(ValueError, match="30 tokens of prompt and --max-new-tokens=8 are"):
        command(*asked, "--past-block=error")
    assert command("--prompt=x", "--max-new-tokens=31", "--past-block=error")


def test_the_prompt_comes_from_a_file_or_standard_input(command, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("CD", encoding="utf-8")
    common = ["--max-new-tokens=6", "--temperature=0"]
    want = command("--prompt=CD", *common)[0]
    assert command(f"--prompt-file={tmp_path / 'p.txt'}", *common)[0] == want
    monkeypatch.setattr(sys, "stdin", io.StringIO("CD"))
    assert command(*common)[0] == want
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # an empty prompt begins a new text
    assert objects(command("--json", *common)[0])[0]["prompt_tokens"] == 1


def test_at_a_terminal_one_prompt_after_the_other_is_asked_for(command, monkeypatch):
    typed = iter(["AB", "", "C", KeyboardInterrupt, "D", EOFError])

    def ask(shown):
        assert shown == "prompt> "
        text = next(typed)
        if not isinstance(text, str):
            raise text
        return text

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    common = ["--max-new-tokens=6", "--temperature=0"]
    out = command(*common)[0]  # Ctrl-C at the prompt leaves
    assert out == "".join(command(f"--prompt={p}", *common)[0] for p in ("AB", "C")) + "\n"
    interrupted = iter([True, False])
    real = continuation.continued

    def once(*args, **kwargs):
        if next(interrupted):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(generate, "continued", once)
    typed = iter(["AB", "\udcff", "C", EOFError])
    out = command(*common)[0]  # and while a text is made, only that text
    monkeypatch.setattr(generate, "continued", real)
    first, error, rest = out.split("\n", 2)
    assert first == "AB" and error.startswith("error: the prompt") and "UTF-8" in error
    assert rest == command("--prompt=C", *common)[0] + "\n"


@pytest.mark.parametrize(
    "flag",
    ["--num-samples=0", "--max-new-tokens=0", "--temperature=-1", "--top-k=-1", "--top-p=0"]
    + ["--prompt-lookup=-1"],
)
def test_flag_out_of_range_is_named(flag):
    with pytest.raises(ValueError, match=f"{flag.split('=')[0]}=.* must be"):
        generate.main(["--run=out/none", "--prompt=x", flag])


def test_an_empty_stop_string_and_an_unreadable_prompt_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="--stop='' would end every text"):
        generate.main(["--run=out/none", "--prompt=x", "--stop="])
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "none", bad):
        with pytest.raises(ValueError, match="cannot read --prompt-file"):
            generate.main(["--run=out/none", f"--prompt-file={path}"])
    for flag in ("--prompt", "--start"):  # nanoGPT's --start=FILE:p.txt, whether it is there or not
        with pytest.raises(ValueError, match="--prompt-file"):
            generate.main(["--run=out/none", f"{flag}=FILE:p.txt"])


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfOnce")
    prompts, _ = generate._prompts(SimpleNamespace(prompt=None, prompt_file=file))
    monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text("utf-8")))
    assert list(prompts) == list(generate._piped_prompt()) == [["Once"]]


def test_a_prompt_that_is_no_text_and_a_model_that_knows_none_are_told(command, model):
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        command("--prompt=a\udcff")
    with pytest.raises(ValueError, match="--seed=4294967296 must be"):
        command("--prompt=a", "--seed=4294967296")
    with pytest.raises(ValueError, match="tiny came without a tokenizer"):
        replace(model, tokenizer=None).codec()
    smaller = model.config.model.model_copy(update={"vocab_size": 80})
    smaller = replace(model, config=model.config.model_copy(update={"model": smaller}))
    with pytest.raises(ValueError, match="gives id 120 for 'x', but the model has only 80"):
        continuation.prompt_ids(smaller.codec(), "x")


def test_an_empty_prompt_needs_a_mark_to_start_from():
    codec = tokenizer.load({"kind": "char", "chars": "ab"})
    with pytest.raises(ValueError, match="the prompt is empty"):
        continuation.prompt_ids(codec, "")
    assert continuation.prompt_ids(BYTE, "").tolist() == [0]

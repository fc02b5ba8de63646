"""tools/lm_eval.py: its figures are those of scalegpt.evaluate, and its answers are those of the
harness's own backend, transformers."""

import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_gpt2
from test_tasks import TINY, placed, tiny_steps
from test_templates import TALK, write_tokenizer

from scalegpt import evaluate
from scalegpt.config import MeshConfig
from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_prompt
from scalegpt.errors import Mistake
from scalegpt.inference.tasks import encode_pair
from scalegpt.processes.command import exit_code
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import export, trained
from scalegpt.weights.tokenizer_files import named

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
SENTENCES = [
    sentence.strip()
    for sentence in (ROOT / "scalegpt" / "README.md").read_text().split(".")
    if len(sentence) > 30
]


def forget(patch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command, with the package of the same name behind it as when Python runs the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [p for p in sys.path if Path(p) != TOOLS] + [str(TOOLS)])
        forget(patch)
        pytest.importorskip("lm_eval.evaluator", reason="the harness itself")
        import datasets
        import lm_eval.tasks

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        index = functools.cache(lm_eval.tasks.TaskManager)  # reading it takes 5 s
        patch.setattr(lm_eval.tasks, "TaskManager", index)
        spec = importlib.util.spec_from_file_location("command", TOOLS / "lm_eval.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    for name in [name for name in sys.modules if name.split(".")[0] in ("lm_eval", "lm_evals")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 with a tokenizer of its own, exported by us."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=600, special_tokens=["<|endoftext|>"])
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "exported"))
    tiny_gpt2.save(source, bpe.get_vocab_size())
    bpe.save(str(source / "tokenizer.json"))
    export.export_hf(trained.from_hugging_face(str(source), make_mesh(MeshConfig()), 1), out)
    return out


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """A folder of tasks: the harness's HellaSwag and LAMBADA over a few rows, and two others."""
    import lm_eval

    folder = tmp_path_factory.mktemp("tasks")
    harness = Path(lm_eval.__file__).parent / "tasks"
    rng = np.random.default_rng(0)

    def text(most):
        return " ".join(rng.choice(SENTENCES, rng.integers(1, most)))

    rows = {
        "hellaswag": [
            {
                "activity_label": "Reading [header]",
                "ctx_a": text(5),
                "ctx_b": text(2).lower(),
                "endings": [f"{text(2)[: rng.integers(9, 60)]} [title] end" for _ in range(4)],
                "label": str(rng.integers(4)),
            }
            for _ in range(48)
        ],
        "lambada": [{"text": text(5)} for _ in range(12)],
        "rolling": [{"text": text(8)} for _ in range(6)],
        "written": [{"text": text(5)} for _ in range(6)],
    }
    for name, values in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(lines)
    common = "task: own_{0}\ndataset_path: json\ndataset_name: null\ntest_split: test\n"
    common += "dataset_kwargs: {{data_files: {{test: {1}/{0}.jsonl}}}}\n"
    metric = "metric_list: [{{metric: {}, aggregation: {}, higher_is_better: false}}]\n"
    for name, more in {
        "hellaswag": f"include: {harness}/hellaswag/hellaswag.yaml\ntraining_split: null\n"
        "validation_split: null\n",
        "lambada": f"include: {harness}/lambada/lambada_openai.yaml\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\n" + metric.format("bits_per_byte", "bits_per_byte"),
        "written": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: x\n"
        "generation_kwargs: {until: [the], max_gen_toks: 12}\n" + metric.format("bleu", "bleu"),
    }.items():
        (folder / f"own_{name}.yaml").write_text(common.format(name, folder) + more)
    return folder


def language_model(source, microbatch=3, mesh=None, chat=False):
    from lm_evals.language_model import LanguageModel

    if isinstance(source, Path):
        mesh = make_mesh(MeshConfig(**mesh or {}))
        source = trained.from_hugging_face(str(source), mesh, microbatch)
    return LanguageModel(source, seed=5, chat=chat)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, ("a task", i, 1)) for i, args in enumerate(arguments)]


PAIRS = [
    *((" ".join(SENTENCES[i : i + 4]), f" {SENTENCES[i + 4][:20]}") for i in range(9)),
    ("", "A text from its beginning"),
    ("", " word"),
    ("the space moves to the ", "continuation"),
    ("so does the line\n\n", "continuation"),
    ("a token is cut: pro", "cesses that follow"),
]
TEXTS = ["", "one", *(" ".join(SENTENCES[: i * i]) for i in range(1, 5))]
STOPS = {"until": ["the", "e e"], "max_gen_toks": 20}


def asked(lm, sampled):
    """All answers of a language model: pairs, texts, and what it writes."""
    kwargs = STOPS | ({"do_sample": True, "temperature": 0.9} if sampled else {})
    contexts = [(context, kwargs) for context, _ in PAIRS if context]
    return (
        lm.loglikelihood(requests("loglikelihood", *PAIRS)),
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS))),
        lm.generate_until(requests("generate_until", *contexts)),
    )


def test_answers_are_those_of_the_harness_own_backend(command, folder):
    pytest.importorskip("accelerate", reason="the harness's backend imports it")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=2)
    lm = language_model(folder)
    (pairs, texts, written), (pairs_, texts_, written_) = asked(lm, False), asked(theirs, False)
    np.testing.assert_allclose([x for x, _ in pairs], [x for x, _ in pairs_], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in pairs] == [greedy for _, greedy in pairs_]
    np.testing.assert_allclose(texts, texts_, atol=1e-4, rtol=1e-7)
    assert len(lm.tok_encode(TEXTS[-1])) > 2 * tiny_gpt2.BLOCK and texts[0] == 0
    assert written == written_
    assert len({len(text) for text in written}) > 5, "no text was stopped"
    # Of all tokens one is the likeliest, and their probabilities add up to 1.
    context, size = lm.tok_encode("one"), lm.codec.vocab_size
    scores = lm._loglikelihood_tokens([(None, context, [i]) for i in range(size)])
    sums, greedy = map(np.array, zip(*scores, strict=True))
    assert greedy.sum() == 1 and greedy[sums.argmax()] and np.exp(sums).sum() == pytest.approx(1)


def test_a_token_before_each_text_is_there_as_by_the_harness_own_backend(command, tmp_path):
    """As Llama's, which knows no text without it."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("accelerate", reason="the harness's backend imports it")
    from lm_eval.models.huggingface import HFLM

    mark, words = "<|endoftext|>", tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator(SENTENCES, vocab_size=600, special_tokens=[mark])
    template = tokenizers.processors.TemplateProcessing(f"{mark} $A", special_tokens=[(mark, 0)])
    words._tokenizer.post_processor = template
    tiny_gpt2.save(tmp_path / "source", words.get_vocab_size())
    words.save(str(tmp_path / "source" / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    source = trained.from_hugging_face(str(tmp_path / "source"), make_mesh(MeshConfig()), 1)
    export.export_hf(source, tmp_path / "out")
    lm = language_model(tmp_path / "out")
    theirs = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2)
    assert lm.tok_encode("one")[0] == lm.codec.bos == theirs.prefix_token_id
    (pairs, texts, written), (pairs_, texts_, written_) = asked(lm, False), asked(theirs, False)
    np.testing.assert_allclose([x for x, _ in pairs], [x for x, _ in pairs_], atol=1e-4, rtol=0)
    np.testing.assert_allclose(texts, texts_, atol=1e-4, rtol=1e-7)
    assert written == written_
    for context, continuation in PAIRS:
        row = encode_pair(lm.codec, context, continuation, lm.max_length)
        if context:
            whole = sum(lm._encode_pair(context, continuation), [])
            assert row.ids.tolist() == whole[-lm.max_length - 1 :]


def test_answers_depend_neither_on_microbatch_nor_on_mesh(command, folder):
    first = asked(language_model(folder, 1, {"data": 1, "fsdp": 8}), True)
    other = asked(language_model(folder, 5, {"data": 2, "tensor": 2, "fsdp": 2}), True)
    for one, two in zip(first[:2], other[:2], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    assert first[2] == other[2] and len({*first[2]}) == len(first[2])


def test_figures_are_those_of_evaluate(command, folder, own_tasks, tmp_path, capsys):
    out, names = tmp_path / "out.json", "own_hellaswag,own_lambada,own_rolling,own_written"
    argv = ["--hf", str(folder), "--include-path", str(own_tasks), "--tasks", names]
    assert command.main([*argv, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    files = [x for n in ("hellaswag", "lambada") for x in ("--task", n, "--file", f"{n}.jsonl")]
    files = [str(own_tasks / x) if x.endswith(".jsonl") else x for x in files]
    assert evaluate.main(["--hf", str(folder), *files, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    for task, figures in {
        "hellaswag": ("acc", "acc_norm"),
        "lambada": ("acc", "perplexity"),
    }.items():
        for figure in figures:
            theirs = found["results"][f"own_{task}"][f"{figure},none"]
            assert theirs == pytest.approx(row[f"{task}/{figure}"], rel=1e-6), (task, figure)
            assert f"{theirs:.4f}" in table
    assert row["hellaswag/acc"] != row["hellaswag/acc_norm"]
    # The bits of all texts over their bytes.
    texts = [json.loads(line)["text"] for line in open(own_tasks / "rolling.jsonl")]
    sums = language_model(folder).loglikelihood_rolling(requests("", *((t,) for t in texts)))
    bits = -sum(sums) / np.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["own_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    facts = found["scalegpt"]
    assert facts["model"] == str(folder) and facts["step"] is None
    assert 0 < facts["contexts_cut"] < facts["requests"]
    assert f"{facts['contexts_cut']} of {facts['requests']} contexts are longer" in table


def test_a_mistake_is_one_line_and_nothing_is_computed(
    command, folder, own_tasks, tmp_path, monkeypatch, capsys
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", None)
    silent = tmp_path / "silent"  # a model without a tokenizer
    silent.mkdir()
    for name in ("config.json", "model.safetensors"):
        (silent / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "broken.yaml").write_text("task: x\n y: [")
    (tmp_path / "there.json").write_text("kept")
    for source, task, flags, message in (
        (folder, "own_helaswag", (), "no task own_helaswag; near it are own_hellaswag"),
        (
            folder,
            "arc_easy",
            (),
            "arc_easy cannot be loaded.*HF_DATASETS_OFFLINE=1.*--include-path",
        ),
        (folder, str(tmp_path / "broken.yaml"), (), "broken.yaml cannot be loaded: ScannerError"),
        (folder, ",", (), "names no task"),
        (silent, "own_lambada", (), "came without a tokenizer"),
        (folder, "own_lambada", ("--apply-chat-template",), "has no marks of a chat"),
        (
            folder,
            "own_written",
            ("--gen-kwargs=max_gen_toks=96",),
            "max_gen_toks=96 leaves no room",
        ),
        (folder, "own_written", ("--gen-kwargs=num_beams=4",), "num_beams=4 is not known"),
        (folder, "own_written", ("--gen-kwargs=do_sample=True,top_p=2.0",), "top-p=2.0 must be"),
        (folder, "own_lambada", (f"--out={tmp_path}/there.json",), "must be a new file"),
        (folder, "own_lambada", (f"--out={tmp_path}/no/x.json",), "must be a new file"),
        (folder, "own_lambada", ("--limit=0",), "--limit=0.0 must be above 0"),
        (folder, "own_lambada", ("--num-fewshot=-1",), "must be at least 0"),
    ):
        argv = ["--hf", str(source), "--tasks", task, "--include-path", str(own_tasks), *flags]
        assert exit_code(command.main, argv) == 2, message
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and re.search(message, last), last
    assert (tmp_path / "there.json").read_text() == "kept"
    argv = ["--hf", str(folder), "--tasks", "own_lambada", "--include-path", "/none"]
    with pytest.raises(Mistake, match="there is no such folder"):
        command.main(argv)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(Mistake, match=r"pip install 'scalegpt\[lm-eval\]'"):
        command.tasks(SimpleNamespace(include_path=None))


def test_a_conversation_is_asked_in_our_marks(command):
    steps = tiny_steps({}, 2, model=TINY | {"vocab_size": 263})
    weights = jax.tree.map(np.asarray, steps.init().params)
    codec = tokenizer.load("byte").chat()
    base = trained.config_of(steps.model.config)
    model = trained.Trained("chat", base, codec.spec(), None, steps, placed(steps, weights))
    lm = language_model(model, chat=True)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1+1?"},
    ]
    prompt = lm.apply_chat_template(talk)
    assert lm.tok_encode(prompt) == encode_prompt(codec, talk).tolist()
    begun = [*talk, {"role": "assistant", "content": "It is"}]
    going_on = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert going_on == f"{prompt}It is"
    # The boundary is where the answer begins, whatever stands there.
    context, answer = lm._encode_pair(prompt, " 2")
    assert context == lm.tok_encode(prompt) and answer == codec.encode(" 2").tolist()
    assert len(lm.generate_until(requests("", (prompt, {"max_gen_toks": 5})))[0]) <= 5
    plain = language_model(model)  # without the flag, a mark is text
    assert plain.tok_encode("<|end|>") == codec.encode("<|end|>").tolist()


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_a_conversation_is_asked_in_a_models_own_template(command, name, tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, name)
    codec, theirs = named(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    steps = tiny_steps({}, 2, model=TINY | {"vocab_size": codec.vocab_size})
    spec, base = {**codec.spec(), "template": codec.template}, trained.config_of(steps.model.config)
    lm = language_model(trained.Trained("chat", base, spec, None, steps, None), chat=True)
    prompt = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert lm.apply_chat_template(TALK) == prompt
    assert lm.tok_encode(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"]
    begun = theirs.apply_chat_template(TALK[:2], tokenize=False, continue_final_message=True)
    assert lm.apply_chat_template(TALK[:2], add_generation_prompt=False) == begun

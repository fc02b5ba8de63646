"""Files and names from elsewhere are data: nothing in them is executed or leads out of its folder.

What a whole command does with such a file is in test_bad_input.py, which would see what it wrote.
"""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from scalegpt.config import loading
from scalegpt.data import token_files, tokenizer
from scalegpt.weights import predecessors, tensor_files
from scalegpt.weights.tokenizer_files import named, tokenizer_files

SOURCES = sorted(p for f in ("scalegpt", "tools", "data") for p in (ROOT / f).rglob("*.py"))
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tarfile.extractall",
    "shutil.unpack_archive",
    "np.load",
    "torch.load",
    "pickle.Unpickler",
}
ALLOWED = {  # (file, call) -> keywords that make it harmless
    ("loading.py", "yaml.load"): {"Loader": "_Loader"},
    ("tensor_files.py", "torch.load"): {"weights_only": "True"},
    ("reference.py", "np.load"): {"allow_pickle": "False"},
    ("parity.py", "np.load"): {},  # what the tool's own process wrote; arrays only, by default
}


def name_of(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def faults(path: Path, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"
        if given.get("shell", "False") != "False":
            found.append(where)
        if given.get("allow_pickle", "False") != "False":
            found.append(where)
        if name.split(".")[-1] in ("extractall", "extract") or name in FORBIDDEN:
            allowed = ALLOWED.get((path.name, name))
            if allowed is None or not allowed.items() <= given.items():
                found.append(where)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    assert faults(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)",
        "os.system('ls')",
        "subprocess.run(x, shell=True)",
        "yaml.load(x, Loader=Other)",
        "pickle.loads(x)",
        "torch.load(x)",
        "np.load(x, allow_pickle=True)",
        "archive.extractall()",
    ],
)
def test_the_search_finds_each_of_them(line):
    assert faults(Path("loading.py"), line)


def test_the_only_loaders_are_the_safe_ones():
    assert issubclass(loading._Loader, yaml.SafeLoader)
    assert loading._Loader.yaml_constructors == yaml.SafeLoader.yaml_constructors
    users = [p.name for p in SOURCES if "import pickle" in p.read_text(encoding="utf-8")]
    assert users == ["token_files.py"]


class Malice:
    """Unpickled, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_meta_pkl_is_refused_and_not_executed(tmp_path, protocol):
    executed = tmp_path / "executed"
    meta = {"vocab_size": 1, "itos": {0: "a"}, "stoi": Malice(executed)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    with pytest.raises(ValueError, match="meta.pkl is not nanoGPT's .*it asks for"):
        token_files.read_meta(tmp_path)
    assert not executed.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert executed.exists(), "the same file would have been executed by pickle"


def test_of_a_pickle_not_even_harmless_objects_are_made(tmp_path):
    for thing in (Path("x"), pytest.raises, complex, {1, 2} and frozenset, Exception()):
        content = pickle.dumps({"vocab_size": 1, "itos": {0: "a"}, "more": thing})
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="it asks for"):
            token_files.read_meta(tmp_path)


@pytest.mark.oracle
def test_a_malicious_pytorch_model_is_refused_and_not_executed(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch's own format needs torch")
    executed, file = tmp_path / "executed", tmp_path / tensor_files.TORCH
    torch.save({"wte.weight": torch.zeros(1), "more": Malice(executed)}, file)
    with pytest.raises(ValueError, match="cannot read .*pytorch_model.bin"):
        tensor_files.open_tensors(tmp_path)
    with pytest.raises(ValueError, match="cannot read .*pytorch_model.bin"):
        predecessors.read(file, None, None)
    file.write_bytes(pickle.dumps(Malice(executed)))
    with pytest.raises(ValueError, match="cannot read .*as a checkpoint of nanoGPT"):
        predecessors.read(file, None, None)
    with pytest.raises(ValueError, match="cannot read .*pytorch_model.bin"):
        tensor_files.open_tensors(tmp_path)
    assert not executed.exists()
    for other in ([1, 2], torch.zeros(2), {"a": 1}, {1: torch.zeros(1)}):
        torch.save(other, file)
        with pytest.raises(ValueError, match="holds no named tensors"):
            tensor_files.open_tensors(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "model.bin",
        "",
        "..",
        7,
        None,
    ],
)
def test_shards_are_beside_their_index(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(ValueError, match="weight_map"):
        tensor_files.open_tensors(folder)


def test_a_spec_is_never_a_path_and_a_name_that_is_typed_is(tmp_path):
    pytest.importorskip("tokenizers")
    file = tmp_path / "t.json"
    file.write_text(json.dumps(tokenizer_files("byte", 8)["tokenizer.json"]))
    for spec in (str(file), {"kind": str(file)}, {"kind": "tokenizer.json", "name": str(file)}):
        with pytest.raises(ValueError, match="no tokenizer"):
            tokenizer.load(spec)
    assert named(str(file)).encode("a").tolist() == [97]


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/new:os.system ['touch executed']",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch executed']",
        "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\n!os.system ['touch executed']",
    ],
)
def test_yaml_makes_plain_values_only(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        loading.parse_yaml(text)
    assert not list(tmp_path.iterdir())

"""What a user can get wrong, through the real commands: each is one message and changes nothing.

A row is a name, a command line, words that the message must hold, and the files it is given.
Commands run in this process through `exit_code`, which is all that `run_command`
adds to a main; at the end a few real processes show that it is.
"""

import errno
import fcntl
import gzip
import hashlib
import importlib
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import yaml
from conftest import ROOT
from safetensors import SafetensorError

from scalegpt.checkpoints import manifest
from scalegpt.data import prepare
from scalegpt.errors import Mistake
from scalegpt.processes.command import exit_code
from scalegpt.weights import export, huggingface

TINY = "--model.n_layer=1 --model.n_head=2 --model.n_embd=32 --model.block_size=16".split()
BATCH = "--batch.sequences=8 --optim.steps=2 --optim.warmup_steps=0 --log.tensorboard=false".split()
NEW = ["--data.path={world}/data", "--run.out_dir=new", *TINY, *BATCH]
SAME = ["--data.path={world}/data", "--run.out_dir={world}/run", *TINY, *BATCH]
YAML = """
model: {n_layer: 1, n_head: 2, n_embd: 32, block_size: 16}
batch: {sequences: 8}
optim: {steps: 2, warmup_steps: 0}
log: {tensorboard: false}
"""
NOISE = random.Random(0).randbytes(4096)
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + NOISE
DEEP = "[" * 100_000


class Case(NamedTuple):
    name: str
    command: str
    argv: list[str]
    words: list[str]
    files: dict[str, Any]  # name -> content, or a function that makes it there from the world
    code: int


CASES: list[Case] = []


def bad(name: str, command: str, argv: Any, *words: str, code: int = 2, **files: Any) -> None:
    """One row; `argv` is a list, or a text without spaces in its words."""
    argv = argv.split() if isinstance(argv, str) else argv
    CASES.append(Case(name, command, argv, list(words), files.pop("files", files), code))


def main_of(command: str) -> Any:
    """train, tools/sizing.py or data/text/prepare.py: its main."""
    if "/" not in command:
        return importlib.import_module(f"scalegpt.{command}").main
    path = ROOT / command
    if command.startswith("tools/"):
        return importlib.import_module(path.stem).main
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(command: str, argv: list[str], capsys: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); anything but an exit with a code is a traceback, and raised."""
    capsys.readouterr()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = exit_code(main_of(command), argv)
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, *capsys.readouterr()


def tree(folder: Path) -> dict[str, str]:
    """Every file with its content, every folder and every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def place(files: dict[str, Any], folder: Path, world: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path, world)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def world(bottles, tmp_path_factory) -> Path:
    """Before any mistake: a data set, a finished run, a model of Hugging Face's kind."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(bottles, folder / "data")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    argv = [a.replace("{world}", str(folder)) for a in SAME]
    assert main_of("train")([*argv, "--eval.windows=4"]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    export = ["export", "--run", f"{folder}/run", "--out"]
    assert main_of("tools/convert_hf.py")([*export, f"{folder}/hf"]) == 0
    assert main_of("tools/convert_hf.py")([*export, f"{folder}/own", "--format=scalegpt"]) == 0
    return folder


# fmt: off
# A table: a case a line or two.
# --- the rows


def copy(what: str, edits: dict[str, Any] | None = None) -> Any:
    """A part of the world to damage: file in it -> new content, None to delete it, or a function
    of its bytes."""

    def make(path: Path, world: Path) -> None:
        shutil.copytree(world / what, path, dirs_exist_ok=True)
        for name, content in (edits or {}).items():
            (file,) = path.glob(name) if "*" in name else (path / name,)
            if content is None:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            elif callable(content):
                file.write_bytes(content(file.read_bytes()))
            elif isinstance(content, bytes | str):
                file.write_bytes(content.encode() if isinstance(content, str) else content)
            else:
                file.write_text(json.dumps({**json.loads(file.read_text()), **content}))

    return make


def of_another_version(text: bytes) -> bytes:
    """A manifest of a configuration with a key that this version has not."""
    content = json.loads(text.replace(b'"n_layer"', b'"n_lager"'))
    del content["sha256"]
    return json.dumps({**content, "sha256": manifest._digest(content)}).encode()


def link(target: str) -> Any:
    return lambda path, world: path.symlink_to(target)


# Keys and values of the configuration.
for name, argv, *words in [
    ("key mistyped", "--optim.lrr=1", "unknown argument --optim.lrr=1", "mean --optim.lr?"),
    ("section mistyped", "--optin.lr=1", "--optin.lr=1", "mean --optim.lr?"),
    ("key without its section", "--lr=1", "--lr=1", "mean --optim.lr?"),
    ("flag mistyped", "--print-confg", "--print-confg", "mean --print-config?"),
    ("flag shortened", "--print-conf", "--print-conf", "mean --print-config?"),
    ("word without a flag", "demo.yaml", "did you mean --config demo.yaml?"),
    ("one dash", "-optim.lr=1", "-optim.lr=1"),
    ("float for an int", "--optim.steps=1.5", "optim.steps='1.5'", "integer"),
    ("word for an int", "--model.n_layer=many", "model.n_layer='many'", "integer"),
    ("word for a float", "--optim.lr=fast", "optim.lr='fast'", "number"),
    ("word for a bool", "--model.bias=perhaps", "model.bias='perhaps'", "boolean"),
    ("number for a bool", "--model.bias=2", "model.bias='2'", "boolean"),
    ("list for an int", "--batch.sequences=[8]", "batch.sequences='[8]'"),
    ("two numbers", "--batch.sequences=8,16", "batch.sequences='8,16'"),
    ("word for a choice", "--optim.schedule=cos", "optim.schedule='cos'", "'cosine'"),
    ("capitals of a choice", "--model.dtype=BFloat16", "model.dtype='BFloat16'", "'bfloat16'"),
    ("no layers by the dial", "--model.depth=0", "model.depth='0'", "1 or more"),
    ("layers by the dial in words", "--model.depth=deep", "model.depth='deep'", "whole number"),
    ("Muon's rate for AdamW", "--optim.head_lr=0.1", "optim.head_lr=0.1 is Muon's", "=muon"),
    ("no rate for Muon", ["--optim.name=muon", "--optim.head_lr=0"], "head_lr='0'", "greater"),
    ("optimizer of another time", "--optim.name=sgd", "optim.name='sgd'", "'muon'"),
    ("cap below zero", "--model.logit_softcap=-1", "model.logit_softcap='-1'", "greater"),
    ("unknown preset", "--model.preset=gpt4", "model.preset='gpt4'", "'gpt2-xl'"),
    ("unknown backend", "--run.backend=pmpa", "run.backend='pmpa'", "'jit' or 'pmap'"),
    ("unknown task in YAML", ["--eval.tasks={hellaswg: x}"], "eval.tasks", "hellaswg"),
    ("unknown task", '--eval.tasks={"hellaswg":"x"}', "eval.tasks", "hellaswg", "'hellaswag'"),
    ("value missing", "--optim.lr=", "optim.lr=''", "number"),
    ("int missing", "--optim.steps=", "optim.steps=''", "integer"),
    ("value forgotten", "--optim.lr", "--optim.lr", "expected one argument"),
    ("empty path", "--data.path=", "data.path is empty", "train.bin"),
    ("empty folder name", "--run.out_dir=", "run.out_dir=''", "is blank"),
    ("blank folder name", ["--run.out_dir= "], "run.out_dir=' '"),
    ("empty init_from", "--run.init_from=", "run.init_from=''"),
    ("newline in a path", ["--run.out_dir=new\nold"], r"run.out_dir='new\nold'", r"'\n'"),
    ("newline in a number", ["--optim.steps=5\n000"], r"optim.steps='5\n000'"),
    ("escape in a name", ["--log.wandb_name=\x1b[31m"], "log.wandb_name", "character"),
    ("bytes that are no text", ["--run.out_dir=\udcff"], "run.out_dir", "character"),
    ("negative count", "--batch.sequences=-8", "batch.sequences='-8'",
     "greater than or equal to 1"),
    ("zero", "--model.n_layer=0", "model.n_layer='0'", "greater than or equal to 1"),
    ("negative rate", "--optim.lr=-1e-3", "optim.lr='-1e-3'", "greater than 0"),
    ("nan", "--optim.lr=nan", "optim.lr='nan'"),
    ("infinity", "--optim.weight_decay=inf", "optim.weight_decay='inf'", "finite"),
    ("minus infinity", "--optim.min_lr=-inf", "optim.min_lr='-inf'"),
    ("nan of a share", "--model.dropout=nan", "model.dropout='nan'"),
    ("dropout of all", "--model.dropout=1", "model.dropout='1'", "less than 1"),
    ("int beyond int32", "--optim.steps=2147483648", "optim.steps='2147483648'", "2147483647"),
    ("int of 30 digits", "--batch.sequences=" + "9" * 30, "batch.sequences='999", "2147483647"),
    ("int of 5000 digits", "--model.n_embd=" + "9" * 5000, "model.n_embd='999"),
    ("too many layers", "--model.n_layer=1000000000", "model.n_layer='1000000000'", "10000"),
    ("too wide", "--model.n_embd=1000000007", "model.n_embd='1000000007'", "1048576"),
    ("float beyond float64", "--optim.lr=1e999", "optim.lr='1e999'", "finite"),
    ("prefetch of everything", "--data.prefetch=1000000000", "data.prefetch", "1000"),
    ("seed beyond uint32", "--run.seed=4294967296", "run.seed='4294967296'", "4294967296"),
    ("heads that do not divide", "--model.n_head=5", "model.n_head=5", "could be 2 or 4"),
    ("min_lr above lr", "--optim.lr=1e-9", "optim.min_lr=6e-05", "set --optim.min_lr too"),
    ("warm-up beyond the end", "--optim.warmup_steps=9", "optim.warmup_steps=9", "update 2"),
    ("keep_every that never comes", "--checkpoint.keep_every=7", "keep_every=7", "every=1000"),
    ("a section as a value", "--optim=3", "optim=3"),
    ("mixture cut short", "--data.path={a: 1", "--data.path={a: 1", "{name: value, ...}"),
    ("tasks cut short", "--eval.tasks={lambada: x", "--eval.tasks={lambada: x", "name: value"),
    ("mixture with a weight of 0", ["--data.path={a: 0, b: 1}"], "data.path.a=0", "greater"),
    ("mixture with a nan", ["--data.path={a: .nan}"], "data.path.a=nan"),
    ("mixture naming one twice", ["--data.path={a: 1, a: 2}"], "'a' is there twice"),
    ("mixture of nothing", "--data.path={}", "data.path={}", "at least 1"),
    ("which checkpoint", "--run.init_checkpoint=last", "run.init_checkpoint='last'", "latest"),
]:
    bad(name, "train", [*NEW, *([argv] if isinstance(argv, str) else argv)], *words)

# The mesh and the batch, on the eight devices here.
for name, argv, *words in [
    ("mesh of 3", "--mesh.data=3", "data 3", "does not fit 8 cpu device(s)", "may be -1"),
    ("mesh too large", "--mesh.data=16", "data 16", "multiply to 8"),
    ("mesh of a billion", "--mesh.fsdp=1000000000 --mesh.data=1", "fsdp 1000000000",
     "multiply to 8"),
    ("two sizes left open", "--mesh.fsdp=-1", "only one mesh axis can be -1", "data, fsdp"),
    ("mesh of 0", "--mesh.tensor=0", "mesh.tensor=0", "1 or more, or -1"),
    ("mesh of -2", "--mesh.data=-2", "mesh.data='-2'", "greater than or equal to -1"),
    ("heads over tensor", "--mesh.data=1 --mesh.tensor=8", "n_head=2", "mesh.tensor=8"),
    ("width over fsdp", "--mesh.data=1 --mesh.fsdp=8 --model.n_embd=36", "n_embd=36", "fsdp=8"),
    ("batch over devices", "--batch.sequences=12", "batch.sequences=12", "nearest that does is 16"),
    ("batch below devices", "--batch.sequences=4", "batch.sequences=4", "nearest that does is 8"),
    ("microbatch", "--batch.sequences=96 --batch.microbatch=5", "microbatch=5",
     "1, 2, 3, 4, 6, 12"),
    ("microbatch above batch", "--batch.microbatch=2", "batch.microbatch=2", "could be 1"),
    ("huge prime batch", "--batch.sequences=2147483640 --batch.microbatch=7", "microbatch=7",
     "could be 1, 3,"),
    ("pmap cannot split", "--run.backend=pmap --mesh.data=1 --mesh.fsdp=8", "fsdp=8",
     "--mesh.fsdp=1"),
    ("vocabulary below the data's", "--model.vocab_size=10", "model.vocab_size=10", "leave it out"),
    ("window beyond the data", "--model.block_size=2147483647", "2147483647",
     "Lower model.block_size", "--val-fraction"),
    ("attention not for this machine", "--model.attention=cudnn", "cudnn", "GPU"),
    ("coordinator alone", "--distributed.coordinator=localhost:1", "belong together", "all three"),
    ("coordinator without a port",
     "--distributed.coordinator=here --distributed.num_processes=2 --distributed.process_id=0",
     "distributed.coordinator=here", "HOST:PORT"),
    ("coordinator with a bad port", "--distributed.coordinator=here:99999 "
     "--distributed.num_processes=2 --distributed.process_id=0", "here:99999", "HOST:PORT"),
    ("process of none", "--distributed.coordinator=localhost:9 --distributed.num_processes=2 "
     "--distributed.process_id=2", "process_id=2", "below distributed.num_processes=2"),
    ("topology", "--compile-only=v9-9", "--compile-only=v9-9", "v5e:4x4"),
]:
    bad(name, "train", [*NEW, *argv.split()], *words)

# Configuration files.
for name, text, *words in [
    ("not UTF-8", b"data: {path: \xff\xfe}", "c.yaml is not UTF-8"),
    ("UTF-16", "data: 1".encode("utf-16"), "c.yaml is not UTF-8"),
    ("an image", JPEG, "c.yaml is not UTF-8"),
    ("gzip", gzip.compress(YAML.encode()), "c.yaml is not UTF-8"),
    ("NUL", "data: \0", "c.yaml is not valid YAML", "#x0000"),
    ("bracket left open", "optim: {lr: 1", "c.yaml is not valid YAML", "line 1"),
    ("indentation", "optim:\n  lr: 1\n   steps: 2", "c.yaml is not valid YAML", "line 3"),
    ("tabs", "optim:\n\tlr: 1", "c.yaml is not valid YAML", "line 2"),
    ("two documents", "optim: {}\n---\nmodel: {}", "c.yaml is not valid YAML", "another document"),
    ("section twice", "optim: {lr: 1}\nmodel: {}\noptim: {steps: 2}", "'optim' is there twice",
     "line 3"),
    ("key twice", "optim: {lr: 1.0, steps: 2, lr: 2.0}", "'lr' is there twice", "line 1"),
    ("a list", "- optim\n- model", "c.yaml holds a list", "sections"),
    ("an empty list", "[]", "c.yaml holds a list", "sections"),
    ("a scalar", "just text", "c.yaml holds a str", "sections"),
    ("zero", "0", "c.yaml holds a int", "sections"),
    ("a python object", "optim: !!python/object/apply:os.system ['touch executed']",
     "not valid YAML", "python/object"),
    ("a python name", "optim: {lr: !!python/name:os.system ''}", "not valid YAML", "python/name"),
    ("a python tuple", "optim: !!python/tuple [1]", "not valid YAML", "python/tuple"),
    ("an alias of nothing", "optim: *x", "not valid YAML", "undefined alias"),
    ("a thousand million aliases", "optm: [&a [x,x,x,x,x,x,x,x,x]" +
     "".join(f", &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi",
     strict=True)) + "]", "unknown key optm", "mean optim?"),
    ("an alias of itself", "optim: &x {lr: *x}", "optim.lr="),
    ("nested without end", "optim: " + DEEP, "not valid YAML", "nested too deeply"),
    ("a date that is none", "run: {out_dir: 2024-13-45}", "not valid YAML", "month"),
    ("a date", "run: {out_dir: 2024-12-24}", "run.out_dir=", "string"),
    ("a huge number", "optim: {steps: " + "9" * 5000 + "}", "not valid YAML"),
    ("a huge hexadecimal number", "optim: {decay_steps: 0x" + "f" * 9000 + "}",
     "optim.decay_steps=a huge number"),
    ("a key that is a list", "? [a]\n: 1", "not valid YAML", "unhashable"),
    ("an unknown key", "model: {n_layr: 1}", "unknown key model.n_layr=1", "mean model.n_layer?"),
    ("an unknown section", "optm: {lr: 1}", "unknown key optm", "mean optim?"),
    ("a section that is a text", "optim: fast", "optim='fast'"),
    ("a path that is a number", "data: {path: 7}", "data.path=7", "string"),
    ("a NUL in a path", 'run: {out_dir: "a\\0b"}', "run.out_dir=", "character"),
    ("nothing in a required key", "run: {out_dir: }", "run.out_dir=None", "string"),
    ("a wrong type of each kind",
     "{model: {vocab_size: [], bias: {}, dropout: x, dtype: 1}, run: {seed: a}}",
     "model.vocab_size=[]", "model.bias={}", "model.dropout='x'", "model.dtype=1", "run.seed='a'"),
]:
    argv = [w for w in NEW if "out_dir" not in w and "data.path" not in w]
    argv += [] if "run: {out_dir" in str(text) else ["--run.out_dir=new"]
    argv += [] if "data: {path" in str(text) else ["--data.path={world}/data"]
    bad(f"config: {name}", "train", [*argv, "--config=c.yaml"], *words, files={"c.yaml": text})
bad("config: missing", "train", "--config=configs/nowhere.yaml", "configs/nowhere.yaml",
    "No such file", "configs/")
bad("config: a folder", "train", "--config=sub", "cannot read config sub", "directory",
    files={"sub/x": ""})
bad("config: empty name", "train", [*NEW, "--config="], "--config='' is empty")
bad("config: twice", "train", "--config=a.yaml --config=b.yaml", "--config is given twice",
    "'b.yaml'")
bad("config: name with a NUL", "train", ["--config=a\0b"], "cannot read config", "null")
bad("config: empty file", "train", "--config=c.yaml", "data.path is missing",
    "run.out_dir is missing", "configs/demo.yaml", files={"c.yaml": ""})
bad("nothing at all", "train", [], "data.path is missing; give --data.path=", "configs/demo.yaml")
bad("topology without a value twice", "train", [*NEW, "--compile-only=a", "--compile-only=b"],
    "twice")

# Token files.
DATA = ["--data.path=bad", *NEW[1:]]
for name, edits, *words in [
    ("empty", {"train.bin": b""}, "train.bin is empty", "prepare.py"),
    ("truncated", {"val.bin": lambda b: b[:-10]}, "val.bin has 2,990 bytes", "truncated"),
    ("half an id", {"train.bin": lambda b: b[:-1]}, "not a multiple of 2", "truncated"),
    ("too long", {"train.bin": lambda b: b * 2}, "longer than it should be"),
    ("an id outside", {"train.bin": lambda b: b[:-2] + b"\xff\x7f"}, "is 32767, outside",
     "prepare.py"),
    ("missing split", {"val.bin": None}, "bad has no val.bin", "prepare.py"),
    ("meta.json not JSON", {"meta.json": "{"}, "meta.json is not JSON", "prepare.py"),
    ("meta.json not UTF-8", {"meta.json": b"\xff"}, "meta.json is not JSON", "prepare.py"),
    ("meta.json empty", {"meta.json": ""}, "meta.json is not JSON", "prepare.py"),
    ("meta.json a list", {"meta.json": "[]"}, "meta.json holds a list", "prepare.py"),
    ("meta.json nested without end", {"meta.json": DEEP}, "nested too deeply"),
    ("meta.json a huge number", {"meta.json": {"vocab_size": 10**40}}, "bad/meta.json: vocab_size"),
    ("meta.json without keys", {"meta.json": "{}"}, "meta.json lacks format, tokenizer",
     "prepare.py"),
    ("meta.json of another type", {"meta.json": {"vocab_size": "65"}}, "vocab_size is '65'"),
    ("vocabulary too small", {"meta.json": {"vocab_size": 3}}, "outside the vocabulary of 3"),
    ("dtype unknown", {"meta.json": {"dtype": "float32"}}, "dtype 'float32'", "uint16, uint32"),
    ("dtype a list", {"meta.json": {"dtype": []}}, "dtype []", "uint16, uint32"),
    ("tokenizer unknown", {"meta.json": {"tokenizer": "klingon"}},
     "meta.json: no tokenizer 'klingon'"),
    ("tokenizer a number", {"meta.json": {"tokenizer": 7}}, "meta.json: no tokenizer '7'"),
    ("tokenizer without characters", {"meta.json": {"tokenizer": {"kind": "char"}}},
     "no tokenizer"),
    ("tokenizer with one character twice", {"meta.json": {"tokenizer": {"kind": "char", "chars":
     "aa"}}}, "distinct characters"),
    ("tokenizer elsewhere", {"meta.json": {"tokenizer": "/etc/passwd"}},
     "no tokenizer '/etc/passwd'"),
]:
    bad(f"data: {name}", "train", DATA, *words, files={"bad": copy("data", edits)})
for name, content, *words in [
    ("an image", JPEG, "a JPEG image"),
    ("gzip", gzip.compress(NOISE), "gzip"),
    ("random bytes", NOISE, "outside the vocabulary of 50257"),
    ("plain text", b"To be, or not to be? " * 10, "is plain text", "data/text/prepare.py"),
    ("a .npy file", b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', }" + b" " * 99, "NumPy .npy"),
    ("uint32", np.arange(999, dtype="<u4").tobytes(), "uint32 read as uint16", "meta.json"),
]:
    bad(f"data: {name}", "train", DATA, "bad/train.bin", *words, files={"bad/train.bin": content,
        "bad/val.bin": bytes(2000)})
BINS = {"bad/train.bin": bytes(2000), "bad/val.bin": bytes(2000)}
bad("data: a folder for a file", "train", DATA, "bad has no train.bin", "prepare.py",
    files={"bad/train.bin/x": "", "bad/val.bin": b"12"})
bad("data: no folder", "train", DATA, "there is no folder", "bad", "prepare.py")
bad("data: a file", "train", DATA, "bad is a file", "at its folder", files={"bad": "text"})
bad("data: a file that cannot be read", "train", DATA, "cannot read", "bad/train.bin",
    files={**BINS, "bad/train.bin": link("/sys/kernel/mm/transparent_hugepage/enabled")})
bad("data: a meta.json that leads nowhere", "train", DATA, "cannot read", "bad/meta.json",
    "prepare.py", files={**BINS, "bad/meta.json": link("nowhere")})
bad("data: a meta.json that cannot be read", "train", DATA, "cannot read", "bad/meta.json",
    files={**BINS, "bad/meta.json": link("/proc/self/mem")})
bad("data: a meta.json that is a folder", "train", DATA, "cannot read", "bad/meta.json",
    files={**BINS, "bad/meta.json/x": ""})
bad("data: a malicious meta.pkl", "train", DATA, "meta.pkl is not nanoGPT's", "posix.system",
    files={**BINS, "bad/meta.pkl": b"cposix\nsystem\n(S'touch executed'\ntR."})
bad("data: a meta.pkl of noise", "train", DATA, "meta.pkl is not nanoGPT's", "meta.json",
    files={**BINS, "bad/meta.pkl": NOISE})
bad("data: a URL of an unknown kind", "train", ["--data.path=nonsense://x", *NEW[1:]],
    "nonsense://x", "cannot read")
bad("data: a URL without its package", "train", ["--data.path=s3://bucket/x", *NEW[1:]],
    "s3://bucket/x", "pip install")
bad("data: a URL that nobody serves", "train", ["--data.path=ftp://127.0.0.1:9/x", *NEW[1:],
    "--data.cache_dir=cache"], "ftp://127.0.0.1:9/x", "cannot read")
bad("data: a cache that is a file", "train", ["--data.path=file://{world}/data",
    "--data.cache_dir=cache", *NEW[1:]], "cache", "cannot", files={"cache": "mine"})
bad("data: tasks that are not there", "train", [*NEW, '--eval.tasks={"lambada": "nowhere"}'],
    "cannot read nowhere")

# The run's folder.
for name, argv, files, *words in [
    ("a file", "--run.out_dir=mine", {"mine": "text"}, "run.out_dir=mine", "cannot write"),
    ("below a file", "--run.out_dir=mine/run", {"mine": "text"}, "run.out_dir=mine/run",
     "cannot write"),
    ("in /proc", "--run.out_dir=/proc/run", {}, "run.out_dir=/proc/run", "cannot write"),
    ("too long a name", "--run.out_dir=" + "x" * 300, {}, "xxx", "File name too long",
     "choose another folder"),
    ("a URL of an unknown kind", "--run.out_dir=nonsense://x/run", {}, "nonsense://x/run"),
    ("another run's rows", "--run.out_dir=mine", {"mine/metrics.jsonl": '{"step": 1}\n'},
     "metrics.jsonl is another run's", "choose a new run.out_dir"),
    ("a config.yaml of noise", "--run.out_dir=mine", {"mine/config.yaml": NOISE},
     "mine/config.yaml", "not UTF-8"),
    ("a config.yaml cut short", "--run.out_dir=mine", {"mine": copy("run", {"config.yaml":
     "model: {"})}, "mine/config.yaml", "not valid YAML"),
    ("a config.yaml with nothing in it", "--run.out_dir=mine", {"mine": copy("run", {"config.yaml":
     "{}"})}, "mine/config.yaml", "data.path"),
    ("another model", "--model.n_embd=64", {}, "model.n_embd: 32 -> 64", "another --run.out_dir"),
    ("another batch", "--batch.sequences=16", {}, "batch.sequences: 8 -> 16",
     "allow_config_change"),
    ("another seed", "--run.seed=1", {}, "run.seed: 1337 -> 1", "allow_config_change"),
]:
    base = SAME if "out_dir" not in argv else NEW
    bad(f"out_dir: {name}", "train", [*base, argv], *words, files=files)
bad("out_dir: other tokens", "train", [SAME[0].replace("{world}", "."), *SAME[1:]], "other tokens",
    files={"data": copy("data", {"val.bin": lambda b: bytes(len(b))})})

# init_from.
for name, argv, files, *words in [
    ("nowhere", "nowhere/at/all", {}, "nowhere/at/all is not the folder of a run", "Hugging Face"),
    ("a file", "mine", {"mine": "text"}, "mine is not"),
    ("an empty folder", "mine", {"mine/x": ""}, "mine is not the folder of a run", "config.json"),
    ("a run without checkpoints", "mine", {"mine/checkpoints/x": ""}, "no checkpoint in", "mine"),
    ("another model", "{world}/run --model.n_layer=2", {}, "model.n_layer: 1 -> 2",
     "--model.n_layer=1"),
    ("another vocabulary", "{world}/run --model.vocab_size=300", {}, "vocab_size",
     "--model.vocab_size="),
    ("more positions", "{world}/hf --model.bias=true --model.block_size=32", {},
     "block_size: 16 -> 32"),
    ("a checkpoint that is not there", "{world}/run --run.init_checkpoint=99", {}, "'99'",
     "steps 2"),
]:
    bad(f"init_from: {name}", "train", [*NEW, *f"--run.init_from={argv}".split()], *words,
        files=files)

# Commands that use a trained model: which one.
CKPT = "checkpoints/2/"
# What a word without its flag is.
for command, word, near in [
    ("generate", "configs/demo.yaml", "--run out/demo"), ("evaluate", "demo", "--run out/demo"),
    ("evaluate", "eval_gpt2", "--config eval_gpt2"), ("generate", "gpt2", "--hf gpt2"),
    ("generate", "runs/a", "--run runs/a"), ("generate", "To be", "--prompt 'To be'"),
]:
    bad(f"the word {word}", command, [word], f"unknown argument {word}; did you mean {near}?")
for command, rest in (("generate", ["--prompt=green"]), ("evaluate", [])):
    for name, argv, files, *words in [
        ("no model", [], {}, "--run", "--hf", "required"),
        ("two models", ["--run=a", "--hf=b"], {}, "--hf", "not allowed with argument --run"),
        ("an empty name", ["--run="], {}, "--run='' is empty"),
        ("a model given twice", ["--run=a", "--run=b"], {}, "--run is given twice", "'a' and 'b'"),
        ("a run that is nowhere", ["--run=nowhere"], {}, "nowhere is not the folder of a run"),
        ("a run that is a file", ["--run=mine"], {"mine": "x"}, "mine is not the folder of a run"),
        ("a run without checkpoints", ["--run=mine"], {"mine/checkpoints/x": ""},
         "no checkpoint in"),
        ("a checkpoint that is not there", ["--run={world}/run", "--checkpoint=99"], {},
         "no checkpoint '99'", "there are steps 2"),
        ("a checkpoint of 5000 digits", ["--run={world}/run", "--checkpoint=" + "9" * 5000], {},
         "--checkpoint=999", "best, latest"),
        ("a checkpoint that is no digit", ["--run={world}/run", "--checkpoint=\xb2"], {},
         "--checkpoint=\xb2", "best, latest"),
        ("a checkpoint elsewhere", ["--run={world}/run", "--checkpoint=../../run"], {},
         "--checkpoint=../../run", "best, latest"),
        ("a mesh that does not fit", ["--run={world}/run", "--mesh.data=3"], {},
         "does not fit 8 cpu"),
        ("a mesh that is no number", ["--run={world}/run", "--mesh.data=x"], {}, "mesh.data='x'"),
        ("an unknown dtype", ["--run={world}/run", "--dtype=float8"], {}, "'float8'", "bfloat16"),
        ("a flag mistyped", ["--run={world}/run", "--checkpont=best"], {}, "mean --checkpoint?"),
        ("a checkpoint without its meta", ["--run=mine"], {"mine": copy("run", {CKPT +
         "manifest.json": None})}, "there is no checkpoint in", "mine"),
        ("a checkpoint whose meta is cut short", ["--run=mine"], {"mine": copy("run", {CKPT +
         "manifest.json": lambda b: b[:50]})}, "mine/checkpoints/2 is damaged", "manifest.json"),
        ("a checkpoint of another version", ["--run=mine"], {"mine": copy("run", {CKPT +
         "manifest.json": of_another_version})}, "step 2 of mine", "unknown key model.n_lager"),
        ("a checkpoint without its weights", ["--run=mine"], {"mine": copy("run", {CKPT + "params":
         None})}, "mine/checkpoints/2 is damaged", "params"),
        ("a checkpoint of noise", ["--run=mine"], {"mine": copy("run", {CKPT + "params/_METADATA":
         NOISE})}, "mine/checkpoints/2 is damaged", "params/_METADATA"),
        ("a name that is none", ["--hf=not a name", "--text=t"], {"t": "x"}, "not a name",
         "OWNER/NAME"),
        ("a path that leads out", ["--hf=../../etc", "--text=t"], {"t": "x"}, "../../etc",
         "OWNER/NAME"),
        ("a folder that is a run", ["--hf={world}/run", "--text=t"], {"t": "x"},
         "is the folder of a run"),
        ("a config.json not JSON", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"config.json": "{"})}, "mine/config.json is not JSON"),
        ("a config.json nested without end", ["--hf=mine", "--text=t"], {"t": "x", "mine":
         copy("hf", {"config.json": DEEP})}, "nested too deeply"),
        ("a config.json of another model", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"config.json": {"model_type": "bert"}})}, "model_type is 'bert', and only gpt2, "),
        ("sizes of another model", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"config.json": {"n_embd": 64}})}, "does not hold the model", "(64,)"),
        ("sizes that are bools", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"config.json": {"n_layer": True}})}, "n_layer is True: Input should be"),
        ("sizes without end", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"config.json": {"n_layer": 10**9}})}, "model.n_layer=1000000000", "10000"),
        ("weights missing", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"model.safetensors": None})}, "has no model.safetensors"),
        ("weights cut short", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"model.safetensors": lambda b: b[:-9]})}, "cannot read mine/model.safetensors"),
        ("weights of noise", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"model.safetensors": NOISE})}, "cannot read mine/model.safetensors"),
        ("weights listed elsewhere", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"model.safetensors": None}), "mine/model.safetensors.index.json": {"weight_map":
         {"wte.weight": "../../x.safetensors"}}}, "'../../x.safetensors'", "beside it"),
        ("weights listed by an absolute name", ["--hf=mine", "--text=t"], {"t": "x", "mine":
         copy("hf", {"model.safetensors": None}), "mine/model.safetensors.index.json":
         {"weight_map": {"wte.weight": "/etc/x.safetensors"}}}, "'/etc/x.safetensors'",
         "beside it"),
        ("an index of nothing", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"model.safetensors": None}), "mine/model.safetensors.index.json": {"weight_map": [1]}},
         "has no weight_map"),
        ("a tokenizer elsewhere", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("own",
         {"config.json": {"tokenizer": "/etc/passwd"}})}, "no tokenizer '/etc/passwd'"),
        ("a tokenizer.json not JSON", ["--hf=mine", "--text=t"], {"t": "x", "mine": copy("hf",
         {"tokenizer.json": "{"})}, "mine/tokenizer.json is not JSON"),
        ("a tokenizer.json of something else", ["--hf=mine", "--text=t"], {"t": "x", "mine":
         copy("hf", {"tokenizer.json": '{"model": [], "added_tokens": 3}'})},
         "tokenizer.json is not"),
    ]:
        argv = [a for a in argv if command == "evaluate" or a != "--text=t"]
        bad(f"{command}: {name}", command, [*argv, *rest], *words, files=files)

RUN = "--run={world}/run"
for name, argv, *words in [
    ("a number that is none", "--top-k=many", "--top-k", "'many'", "int"),
    ("a float for an int", "--max-new-tokens=1e3", "--max-new-tokens", "'1e3'"),
    ("no tokens", "--max-new-tokens=0", "--max-new-tokens=0", "at least 1"),
    ("less than no samples", "--num-samples=-1", "--num-samples=-1", "at least 1"),
    ("samples without end", "--num-samples=1000000000", "--num-samples=1000000000", "at most"),
    ("negative temperature", "--temperature=-1", "--temperature=-1.0", "from 0"),
    ("temperature nan", "--temperature=nan", "--temperature=nan", "from 0"),
    ("temperature infinite", "--temperature=inf", "--temperature=inf", "from 0"),
    ("top-p of 2", "--top-p=2", "--top-p=2.0", "at most 1"),
    ("top-p nan", "--top-p=nan", "--top-p=nan", "at most 1"),
    ("min-p nan", "--min-p=nan", "--min-p=nan", "to 1"),
    ("penalty nan", "--repetition-penalty=nan", "--repetition-penalty=nan", "above 0"),
    ("penalty infinite", "--repetition-penalty=inf", "--repetition-penalty=inf", "above 0"),
    ("an empty stop", "--stop=", "--stop=''"),
    ("seed below 0", "--seed=-1", "--seed=-1", "from 0"),
    ("seed of 5000 digits", "--seed=" + "9" * 5000, "--seed", "int"),
    ("a choice that is none", "--past-block=wrap", "'wrap'", "slide"),
    ("a prompt that begins with a dash", ["--prompt", "-five"], "--prompt", "write FLAG=VALUE"),
    ("two sources of prompts", "--prompt=a --prompt-file=b", "--prompt-file", "not allowed with"),
    ("a prompt that is too long", ["--past-block=error", "--max-new-tokens=9",
     "--prompt=green bottles"], "block_size=16", "--past-block=slide"),
    ("a character that the model has not", "--prompt=\u00e9", "'\u00e9'", "U+00E9"),
    ("a prompt that is no text", ["--prompt=\udcff"], "is not UTF-8 text"),
    ("an empty prompt without a mark", ["--prompt="], "the prompt is empty"),
]:
    argv = argv.split() if isinstance(argv, str) else argv
    argv = [*argv, *([] if any(a.startswith("--prompt") for a in argv) else ["--prompt=green"])]
    bad(f"generate: {name}", "generate", [RUN, *argv], *words)
for name, content, *words in [
    ("missing", None, "cannot read --prompt-file p", "No such file"),
    ("broken UTF-8", b"green \xff", "cannot read --prompt-file p", "utf-8"),
    ("an image", JPEG, "cannot read --prompt-file p", "utf-8"),
    ("empty", b"", "the prompt is empty"),
    ("that cannot be read", link("/proc/self/mem"), "cannot read --prompt-file p"),
]:
    bad(f"generate: a prompt file {name}", "generate", [RUN, "--prompt-file=p"], *words, files={} if
        content is None else {"p": content})
bad("generate: a prompt file that is a folder", "generate", [RUN, "--prompt-file=p"],
    "--prompt-file p", "directory", files={"p/x": ""})
bad("generate: empty name of a prompt file", "generate", [RUN, "--prompt-file="], "--prompt-file")

TASK = [RUN, "--task=lambada", "--file=t"]
LINE = '{"text": "green bottles on the wall"}\n'
for name, argv, files, *words in [
    ("text that is not there", [RUN, "--text=nowhere"], {}, "there is no file nowhere"),
    ("text that is empty", [RUN, "--text=t"], {"t": ""}, "t holds no text"),
    ("text of broken UTF-8", [RUN, "--text=t"], {"t": b"green \xe9"}, "t is not UTF-8 text"),
    ("text that is an image", [RUN, "--text=t.gz"], {"t.gz": JPEG}, "t.gz is a JPEG"),
    ("text that the model has no characters for", [RUN, "--text=t"], {"t": "\u00e9"}, "U+00E9"),
    ("text that cannot be read", [RUN, "--text=t"], {"t": link("/proc/self/mem")}, "cannot read t"),
    ("data that is not there", [RUN, "--data=nowhere"], {}, "there is no folder", "nowhere"),
    ("data of noise", [RUN, "--data=x.bin"], {"x.bin": NOISE}, "x.bin"),
    ("data of another vocabulary", [RUN, "--data=x.bin"], {"x.bin": bytes([1, 0] * 99)}, "50257",
     "tokenizer"),
    ("data of another tokenizer", [RUN, "--data=d"], {"d": copy("data", {"meta.json": {"tokenizer":
     "byte"}})}, "made with tokenizer byte", "prepare the text again"),
    ("windows below 1", [RUN, "--windows=0"], {}, "--windows=0", "at least 1"),
    ("microbatch of words", [RUN, "--microbatch=some"], {}, "--microbatch", "'some'"),
    ("microbatch without end", [RUN, "--microbatch=1000000000"], {}, "--microbatch=1000000000",
     "at most"),
    ("limit without a task", [RUN, "--limit=3"], {}, "--limit=3", "--windows"),
    ("an unknown split", [RUN, "--split=test"], {}, "'test'", "train"),
    ("an unknown task", [RUN, "--task=mmlu", "--file=t"], {"t": LINE}, "'mmlu'", "hellaswag"),
    ("a task without a file", [RUN, "--task=lambada"], {}, "--file"),
    ("a task whose file is missing", TASK, {}, "there is no file t"),
    ("core without a mark between texts", [RUN, "--task=core", "--file=t"], {"t/x": ""},
     "tokenizer char has none"),
    ("a task of nothing", TASK, {"t": "\n"}, "t is empty"),
    ("a task not JSON", TASK, {"t": LINE + '{"te'}, "t, line 2,", "not JSON"),
    ("a task nested without end", TASK, {"t": DEEP}, "t, line 1,", "nested too deeply"),
    ("a task of broken UTF-8", TASK, {"t": b"\xff"}, "t is not UTF-8"),
    ("a task of lists", TASK, {"t": "[1]"}, "t, line 1,", "not an object"),
    ("a task of other fields", TASK, {"t": '{"question": "?"}'}, "t, line 1,", "'text'"),
    ("a task of numbers", TASK, {"t": '{"text": 5}'}, "t, line 1,", "text is 5"),
    ("a task with half a character", TASK, {"t": '{"text": "a \\ud800"}'}, "t, line 1,"),
    ("a label beyond the choices", [RUN, "--task=multiple_choice", "--file=t"], {"t":
     '{"context": "green", "choices": ["a", "b"], "label": 2}'}, "t, line 1,", "label is 2"),
    ("a config that names no weights", ["--config=c.yaml"], {"c.yaml": YAML +
     "data: {path: d}\nrun: {out_dir: o}"}, "no run.init_from"),
    ("a config of another model", ["--config=c.yaml"], {"c.yaml": YAML.replace("n_layer: 1",
     "n_layer: 2") + "data: {path: WORLD/data}\nrun: {out_dir: o, init_from: WORLD/run}"},
     "model.n_layer=2", "has 1"),
    ("a config not YAML", ["--config=c.yaml"], {"c.yaml": "{"}, "c.yaml is not valid YAML"),
    ("a config that is empty", ["--config=c.yaml"], {"c.yaml": ""}, "data.path is missing"),
    ("an empty name of a config", ["--config="], {}, "--config='' is empty"),
    ("a model without data", ["--hf={world}/hf"], {}, "has no data of its own", "--text"),
]:
    bad(f"evaluate: {name}", "evaluate", argv, *words, files=files)

CONVERT = "tools/convert_hf.py"
for name, argv, files, *words in [
    ("no command", "", {}, "import", "export", "check"),
    ("an unknown command", "convert", {}, "'convert'", "import"),
    ("no --out", "import gpt2", {}, "--out", "required"),
    ("an empty --out", "import {world}/hf --out=", {}, "--out: '' must be a local folder"),
    ("--out that is there", "import {world}/hf --out=mine", {"mine/x": "text"},
     "mine is there already", "another --out"),
    ("--out that is a file", "export --run={world}/run --out=mine", {"mine": "text"},
     "mine is there already"),
    ("--out below a file", "export --run={world}/run --out=mine/x", {"mine": "text"},
     "--out=mine/x"),
    ("--out in /proc", "import {world}/hf --out=/proc/x", {}, "cannot write to --out=/proc/x"),
    ("--out with a NUL", "import {world}/hf --out=a\0b", {}, "run.out_dir"),
    ("no such model", "import nowhere/at/all --out=x", {}, "nowhere/at/all", "OWNER/NAME"),
    ("an empty source", ["import", "", "--out=x"], {}, "OWNER/NAME"),
    ("too many positions", "import {world}/hf --out=x --block-size=17", {}, "block_size=17",
     "cropped"),
    ("a bucket", "import {world}/hf --out=gs://b/x", {}, "'gs://b/x' must be a local folder"),
    ("no positions", "import {world}/hf --out=x --block-size=0", {}, "model.block_size=0"),
    ("dropout of 2", "import {world}/hf --out=x --dropout=2", {}, "model.dropout=2.0",
     "less than 1"),
    ("dropout nan", "import {world}/hf --out=x --dropout=nan", {}, "model.dropout=nan"),
    ("a number that is none", "import {world}/hf --out=x --vocab-multiple=a", {},
     "--vocab-multiple", "'a'"),
    ("export of no run", "export --run={world}/hf --out=x", {}, "is not the folder of a run"),
    ("export of no checkpoint", "export --run={world}/run --out=x --checkpoint=7", {}, "'7'",
     "steps 2"),
    ("an unknown format", "export --run={world}/run --out=x --format=onnx", {}, "'onnx'",
     "scalegpt"),
    ("check of nothing", "check {world}/run nowhere/at/all", {}, "nowhere/at/all", "OWNER/NAME"),
    ("check with a foreign prompt", "check {world}/run {world}/hf --prompt=\u00e9", {}, "U+00E9"),
    ("check with an empty prompt", "check {world}/run {world}/hf --prompt=", {}, "prompt"),
    ("check on no data", "check {world}/run {world}/hf --data=nowhere", {}, "nowhere"),
    ("check with a tolerance of nan", "check {world}/run {world}/hf --tolerance=nan", {},
     "--tolerance=nan"),
    ("check with a negative tolerance", "check {world}/run {world}/hf --tolerance=-1", {},
     "--tolerance=-1.0"),
]:
    bad(f"convert: {name}", CONVERT, argv, *words, files=files)

# What a download may be: the model is `mine`, and what is changed there is said.
SAFE, INDEX, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def shards(*parts: dict[str, float], **weight_map: str) -> dict[str, Any]:
    """Files of tensors of one number each, and their index, instead of model.safetensors."""
    tensors = ({k: np.float32([x]) for k, x in part.items()} for part in parts)
    files = {f"{i}.safetensors": safetensors.numpy.save(part) for i, part in enumerate(tensors)}
    return {SAFE: None, INDEX: json.dumps({"weight_map": weight_map}), **files}


def header(length: int | None = None, **offsets: list[int]) -> bytes:
    """A safetensors file of 8 bytes of numbers, whose header says what it will."""
    text = {k: {"dtype": "F32", "shape": [1], "data_offsets": x} for k, x in offsets.items()}
    return struct.pack("<Q", length or len(json.dumps(text))) + json.dumps(text).encode() + bytes(8)


def with_number(number: float) -> Any:
    """The last number of the file becomes this one."""
    return lambda content: content[:-4] + struct.pack("<f", number)


HTML, POINTER = "<!DOCTYPE html>\n<html>", "version https://git-lfs.github.com/spec/v1\noid sha:0"
for name, edits, *words in [
    *((f"{key}={value}", {"config.json": {key: value}}, f"config.json: {key} is", said)
      for said, key, values in (
          ("valid integer", "n_embd", ("32", 32.0, None, [32], {}, True)),
          ("greater than", "n_embd", (0, -1)), ("less than", "n_embd", (2**40, 10**30)),
          ("valid integer", "n_positions", (None, "16")), ("valid integer", "vocab_size", (None,)),
          ("number", "layer_norm_epsilon", ("1e-5", math.nan, math.inf)),
          ("greater", "layer_norm_epsilon", (0, -1e-5)),
          ("it has 'gelu_new'", "activation_function", ("quick_gelu", None, ["relu"])),
          ("valid boolean", "scale_attn_weights", (1, "yes")),
          ("quantised; take them as", "quantization_config", ({"bits": 4}, {"method": "awq"})),
          ("and only gpt2, ", "model_type", (None, "", 5, ["gpt2"], {}, "gpt3")),
      ) for value in values),
    # Sizes that no disk would hold are never allocated.
    ("layers", {"config.json": {"n_layer": 2000}}, "does not hold", "missing: h.", " more"),
    ("rows", {"config.json": {"vocab_size": 2**30}}, "wte.weight is (", ", not (1073741824, "),
    ("positions", {"config.json": {"n_positions": 2**31 - 1}}, "wpe.weight is (", "(2147483647,"),
    ("width in the MLP", {"config.json": {"n_inner": 2**20}}, "c_fc.bias is (", "not (1048576,)"),
    ("an empty object", {"config.json": "{}"}, "model_type is None"),
    ("sizes left out", {"config.json": '{"model_type": "gpt2"}'}, "json: vocab_size is missing",
     "  n_layer is missing"),
    ("no config.json", {"config.json": None}, "cannot read mine/config.json", "nanoGPT"),
    *((f"{what} for {file}", {file: text, **{x: None for x in gone}}, f"mine/{file}", said, again)
      for file, *gone in (["config.json"], [SAFE], [INDEX, SAFE])
      for what, text, said, again in (
          ("a web page", HTML, "it is a web page", "; download it again"),
          ("a pointer", POINTER, "it is a Git LFS pointer", "git lfs pull"),
          ("nothing", "", "it is an empty file", "; download it again"),
      )),
    ("an adapter", {"config.json": None, SAFE: None, "adapter_config.json": "{}"}, "PEFT adapter",
     "merge_and_unload"),
    *((f"{file} alone", {SAFE: None, file: "x"}, f"has no {SAFE}", f"; {file} is {said}")
      for file, said in (
          ("model.gguf", "llama.cpp's"), ("model.onnx", "ONNX"), ("tf_model.h5", "TensorFlow's"),
          ("flax_model.msgpack", "Flax's"), (f"{TORCH}.index.json", "PyTorch's in parts"),
          ("1-of-2.safetensors", "of another name"))),
    ("a header of 2^60 bytes", {SAFE: header(2**60, a=[0, 8])}, f"read mine/{SAFE}", "again"),
    ("overlapping tensors", {SAFE: header(a=[0, 4], b=[0, 4])}, f"cannot read mine/{SAFE}"),
    ("tensors beyond the end", {SAFE: header(a=[0, 4], b=[4, 12])}, f"cannot read mine/{SAFE}"),
    ("no tensors", {SAFE: safetensors.numpy.save({})}, "does not hold", "missing: wte.weight"),
    ("numbers of 64 bits", {SAFE: safetensors.numpy.save({"wte.weight": np.zeros(1)})}, "as F64"),
    ("NaN", {SAFE: with_number(math.nan)}, "holds numbers that are not finite", "take others"),
    ("infinity", {SAFE: with_number(-math.inf)}, "holds numbers that are not finite"),
    ("a missing shard", shards({"a": 1}, a="0.safetensors", b="1.safetensors"),
     "cannot read mine/1.safetensors", "again"),
    ("a tensor in another shard", shards({"a": 1}, {"b": 1}, a="1.safetensors", b="0.safetensors"),
     "mine/0.safetensors has no b, which", "again"),
    ("a tensor in no shard", shards({"a": 1}, a="0.safetensors", b="0.safetensors"), "has no b"),
    ("a tensor in two shards", shards({"a": 1}, {"a": 2, "b": 1}, a="0.safetensors",
     b="1.safetensors"), "both mine/1.safetensors and another file", "have a", "again"),
    ("an index of no tensors", shards(), "has no weight_map", "again"),
    ("a tokenizer of nothing", {"tokenizer.json": "{}"}, "is not a Hugging Face tokenizer.json"),
    ("merges that are none", {"tokenizer.json": None, "vocab.json": '{"a": 0}', "merges.txt":
     b"\xff"}, "cannot read mine/merges.txt", "again"),
    ("a tensor twice", shards({"wte.weight": 1, "transformer.wte.weight": 1},
     **{"wte.weight": "0.safetensors"}), "with and without the prefix of"),
]:
    files = {"mine": copy("hf", edits)}
    bad(f"convert: {name}", CONVERT, "import mine --out=out/x", *words, files=files)
for name, source, *words in [
    ("a file of llama.cpp", "mine/x.gguf", "x.gguf is llama.cpp's"),
    ("a file of weights", f"mine/{SAFE}", "give its folder, mine"),
    ("a config.json", "mine/config.json", "give its folder, mine"),
]:
    bad(f"convert: {name}", CONVERT, f"import {source} --out=out/x", *words,
        files={"mine": copy("hf", {"x.gguf": "GGUF"})})

for name, argv, *words in [
    ("no command", "", "list", "prune", "required"),
    ("an unknown command", "show {world}/run", "'show'", "list"),
    ("no run", "list nowhere", "nowhere is not the folder of a run"),
    ("a step that is not there", "verify {world}/run --step=7", "no step 7", "there are 2"),
    ("a step that is a word", "verify {world}/run --step=best", "--step", "'best'"),
    ("one that is nowhere", "diff {world}/run nowhere", "nowhere is not the folder of a run"),
    ("which that is none", "diff {world}/run {world}/run:first", "first"),
    ("which of 5000 digits", "diff {world}/run {world}/run:" + "9" * 5000, "999"),
    ("which that is no digit", "diff {world}/run {world}/run:\u00b2", "\u00b2"),
    ("nothing to keep", "prune {world}/run --keep=0", "--keep=0", "at least 1"),
    ("less than nothing", "prune {world}/run --keep=1 --keep-every=-1", "--keep-every=-1"),
    ("a flag mistyped", "prune {world}/run --keeep=1", "--keep"),
]:
    bad(f"checkpoint: {name}", "tools/checkpoint.py", argv, *words)

SIZING = "tools/sizing.py"
for name, argv, files, *words in [
    ("an unknown device", ["--device=Abacus"], {}, "'Abacus'", "NVIDIA A100"),
    ("no devices", ["--devices=0"], {}, "--devices=0"),
    ("devices without end", ["--devices=" + "9" * 400], {}, "--devices=999", "at most"),
    ("devices that are words", ["--devices=few"], {}, "--devices", "'few'"),
    ("an MFU in percent", ["--mfu=40"], {}, "--mfu=40.0", "0.4"),
    ("an MFU of nan", ["--mfu=nan"], {}, "--mfu=nan"),
    ("a budget below 0", ["--budget=-1"], {}, "--budget=-1.0", "1e21"),
    ("a budget beyond float64", ["--budget=1e999"], {}, "--budget=inf", "1e21"),
    ("a budget near its end", ["--budget=1e308"], {}, "--budget=1e+308"),
    ("a budget near zero", ["--budget=1e-300"], {}, "--budget=1e-300"),
    ("a plot of another kind", ["--plot=a.jpg"], {}, "--plot=a.jpg", ".png"),
    ("a plot nowhere", ["--plot=nowhere/a.png"], {}, "there is no folder nowhere"),
    ("a plot onto a folder", ["--plot=a.png"], {"a.png/x": ""}, "--plot=a.png"),
    ("a plot in /proc", ["--plot=/proc/a.png"], {}, "--plot=/proc/a.png"),
    ("a model too large", ["--model.n_layer=99999999999"], {}, "model.n_layer='99999999999'"),
    ("heads over a mesh", ["--mesh.tensor=5", "--mesh.data=1"], {}, "n_head=12", "mesh.tensor=5"),
    ("a mesh that does not fit", ["--mesh.fsdp=3", "--mesh.data=1", "--devices=8"], {}, "fsdp 3",
     "8 NVIDIA"),
    ("a broken meta.json", ["--data.path=d"], {"d/meta.json": "{"}, "d/meta.json is not JSON",
     "prepare.py"),
    ("a broken meta.pkl", ["--data.path=d"], {"d/meta.pkl": NOISE}, "d/meta.pkl is not nanoGPT's"),
    ("a broken config", ["--config=c.yaml"], {"c.yaml": "\t"}, "c.yaml is not valid YAML"),
]:
    bad(f"sizing: {name}", SIZING, argv, *words, files=files)

for name, argv, *words in [
    ("no steps", ["--steps=0"], "--steps=0", "at least 1"),
    ("steps that are words", ["--steps=all"], "--steps", "'all'"),
    ("a tolerance of nan", ["--tolerance=nan"], "--tolerance=nan"),
    ("a tolerance of all", ["--tolerance=inf"], "--tolerance=inf"),
    ("a key mistyped", ["--model.n_haed=2"], "mean --model.n_head?"),
    ("no data", ["--data.path=nowhere"], "there is no folder", "nowhere"),
    ("no config", ["--config=nowhere.yaml"], "cannot read config nowhere.yaml"),
]:
    bad(f"parity: {name}", "tools/parity.py", [*NEW, *argv], *words)

PREPARE = "data/text/prepare.py"
for name, argv, files, *words in [
    ("no --input", [], {}, "--input is missing"),
    ("an empty --input", ["--input="], {}, "--input='' is empty"),
    ("an --input that is not there", ["--input=nowhere.txt"], {}, "'nowhere.txt'", "check --input"),
    ("an empty text", ["--input=t.txt"], {"t.txt": ""}, "no text in t.txt"),
    ("broken UTF-8", ["--input=t.txt"], {"t.txt": b"green \xff bottles"}, "t.txt is not UTF-8",
     "offset 6", "--errors replace"),
    ("an image", ["--input=t.txt"], {"t.txt": JPEG}, "t.txt is a JPEG image, not UTF-8 text"),
    ("gzip that is none", ["--input=t.gz"], {"t.gz": NOISE}, "t.gz is binary data"),
    ("gzip cut short", ["--input=t.gz"], {"t.gz": gzip.compress(NOISE)[:99]}, "cannot read t.gz"),
    ("lines not JSON", ["--input=t.jsonl"], {"t.jsonl": '{"text": "a"}\n{"te'},
     "t.jsonl, line 2 is not JSON"),
    ("lines nested without end", ["--input=t.jsonl"], {"t.jsonl": DEEP},
     "t.jsonl, line 1 is not JSON"),
    ("lines without the key", ["--input=t.jsonl", "--key=body"], {"t.jsonl": '{"text": "a"}'},
     "'body'", "['text']"),
    ("text too short to split", ["--input=t.jsonl"], {"t.jsonl": '{"text": "a"}\n{"text": "b"}'},
     "--val-fraction", "--val-input"),
    ("a file that cannot be read", ["--input=t.txt"], {"t.txt": link("/proc/self/mem")},
     "cannot read t.txt"),
    ("an unknown tokenizer", ["--input=t.txt", "--tokenizer=gpt5"], {"t.txt": "text"}, "'gpt5'",
     "gpt2, byte"),
    ("a tokenizer that is an image", ["--input=t.txt", "--tokenizer=j.json"], {"t.txt": "text",
     "j.json": JPEG}, "j.json is not JSON"),
    ("a tokenizer of nothing", ["--input=t.txt", "--tokenizer=j.json"], {"t.txt": "text", "j.json":
     "{}"}, "j.json is not a Hugging Face tokenizer.json"),
    ("a share of 2", ["--input=t.txt", "--val-fraction=2"], {"t.txt": "text"}, "--val-fraction",
     "2.0"),
    ("a share of nan", ["--input=t.txt", "--val-fraction=nan"], {"t.txt": "text"},
     "--val-fraction", "nan"),
    ("workers that are words", ["--input=t.txt", "--workers=all"], {"t.txt": "text"}, "--workers",
     "'all'"),
    ("workers below 0", ["--input=t.txt", "--workers=-1"], {"t.txt": "text"}, "--workers=-1", "0"),
    ("an unknown flag", ["--input=t.txt", "--tokeniser=byte"], {"t.txt": "text"},
     "mean --tokenizer?"),
    ("a flag twice", ["--input=a.txt", "--input=b.txt"], {"a.txt": "a", "b.txt": "b"},
     "--input is given twice"),
    ("--out that is a file", ["--input=t.txt", "--out=mine"], {"t.txt": "text", "mine": "x"},
     "--out=mine"),
    ("--out below a file", ["--input=t.txt", "--out=mine/x"], {"t.txt": "text", "mine": "x"},
     "--out=mine/x"),
    ("--out in a bucket", ["--input=t.txt", "--out=gs://b/x"], {"t.txt": "text"}, "--out",
     "'gs://b/x' must be a local folder"),
    ("--out in /proc", ["--input=t.txt", "--out=/proc/x"], {"t.txt": "text"}, "--out=/proc/x"),
    ("--out with the input", ["--input=t.txt", "--out=."], {"t.txt": "text"},
     "--out . holds input files"),
    ("other data in --out", ["--input=t.txt", "--out=d"], {"t.txt": "text", "d": copy("data")},
     "d", "--force"),
    ("a broken meta.json in --out", ["--input=t.txt", "--out=d"], {"t.txt": "text", "d":
     copy("data", {"meta.json": "{"})}, "d/meta.json is not JSON", "--force"),
]:
    argv = argv if any(a.startswith("--out") for a in argv) else [*argv, "--out=prepared"]
    argv = argv if any(a.startswith("--tok") for a in argv) else [*argv, "--tokenizer=byte"]
    bad(f"prepare: {name}", PREPARE, argv, *words, files=files)


def turns(*messages: Any, **more: Any) -> dict[str, Any]:
    """A row of OpenAI's: messages are (role, content), or as they are."""
    pairs = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) else m for m in messages]
    return {"messages": pairs, **more}


Q, A = ("user", "Why?"), ("assistant", "So.")
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "function": {"name": "add", "arguments": "{}"}}]}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
for name, second, *words in [
    ("not JSON", '{"messages": [', "not JSON: Expecting value at column 15", "one row is one JSON"),
    ("nested without end", DEEP, "not JSON", "nested too deeply"),
    ("a number of 5,000 digits", '{"messages": ' + "9" * 5000 + "}", "not JSON"),
    ("not UTF-8", b'{"messages": "\xe9"}', "byte 0xe9 at column 15 is not UTF-8", "iconv"),
    ("half a character", '{"messages": [{"role": "user", "content": "\\ud800"}]}',
     "\\ud800 is half a character", "write it whole"),
    ("a number", 5, "5 is not of format messages", "rows of one format go together"),
    ("a list of messages", [turns(Q, A)["messages"][0]], "is not of format messages"),
    ("another format", {"instruction": "a", "output": "b"}, "no messages among its keys instru",
     "rows of one format go together"),
    ("no messages", turns(), "it has no messages", "leave the row out"),
    ("messages that are a text", {"messages": "Why?"}, '"Why?" where the list of messages'),
    ("a message that is a text", turns("Why?", A), 'message 1 is "Why?", no object with role'),
    ("a message without role", turns({"content": "Why?"}), "message 1 is", "no object with role"),
    ("an unknown role", turns(("human", "Why?"), A), 'message 1 has the role "human"',
     "system, user, assistant and tool: rename it"),
    ("a role that is a list", turns(([], "Why?"), A), "message 1 has the role []"),
    ("system not first", turns(Q, ("system", "S"), A), "message 2 (system) is not the first"),
    ("system twice", turns(("system", "S"), Q, A, system="S"), "message 2 (system) is not"),
    ("two of the user", turns(Q, Q, A), "message 2 (user) follows another of the user: join them"),
    ("two answers", turns(Q, A, A), "message 3 (assistant) follows another answer: join them"),
    ("an answer first", turns(A), "message 1 (assistant) answers before any question"),
    ("an answer to the system", turns(("system", "S"), A), "message 2 (assistant) answers before"),
    ("no answer at last", turns(Q, A, Q), "its last message, of user, is no answer: add one"),
    ("no answer at all", turns(("system", "S")), "of system, is no answer"),
    ("no content", turns({"role": "user"}, A), "message 1 (user) has the content null, not text"),
    ("content that is a number", turns(Q, ("assistant", 5)), "message 2 (assistant)", "content 5"),
    ("empty content", turns(("user", ""), A), "message 1 (user) is empty: write a text"),
    ("content of spaces", turns(Q, ("assistant", " \n")), "message 2 (assistant) is empty"),
    ("content without parts", turns(Q, ("assistant", [])), "message 2 (assistant) is empty"),
    ("a picture", turns(("user", [IMAGE]), A), 'a part of type "image_url": only text'),
    ("an answer that is a mark", turns(Q, ("assistant", "</s>\n")), "is empty but for </s>"),
    ("a weight of a half", turns(Q, {**turns(A)["messages"][0], "weight": 0.5}), "the weight 0.5",
     "1 is learned, 0 only read"),
    ("nothing to learn", turns(("user", "?"), {**turns(A)["messages"][0], "weight": 0}),
     "nothing to learn"),
    ("a result without a call", turns(Q, A, ("tool", "4")), "message 3 (tool) is a result"),
    ("a call without a result", turns(Q, CALL, A), "message 3 (assistant) comes before the result"),
    ("a call at last", turns(Q, CALL), "of assistant, is no answer"),
    ("a result at last", turns(Q, CALL, ("tool", "4")), "its last message, of tool, is no answer"),
    ("a result of another call", turns(Q, CALL, {"role": "tool", "content": "4", "tool_call_id":
     "c2"}), 'the tool_call_id "c2", which was not called'),
    ("a call by the user", turns({**CALL, "role": "user"}, A), "calls a tool: only an assistant"),
    ("a call without a name", turns(Q, {**CALL, "tool_calls": [{"id": "c"}]}), "no function with"),
    ("calls that are a text", turns(Q, {**CALL, "tool_calls": "add"}), "\"add\", no list"),
    ("arguments not JSON", turns(Q, {**CALL, "tool_calls": [{"function": {"name": "add",
     "arguments": "{"}}]}), "calls add with", "not JSON"),
    ("two calls of one id", turns(Q, {**CALL, "tool_calls": CALL["tool_calls"] * 2}), "two tool"),
    ("a NUL for bytes", turns(("user", "a\0b"), A), "'a\\x00b' holds '\\x00'", "take it out"),
]:
    content = second if isinstance(second, bytes | str) else json.dumps(second)
    first = json.dumps(turns(Q, A)).encode() + b"\n"
    files = {"c.jsonl": first + (content if isinstance(content, bytes) else content.encode())}
    bad(f"chat: {name}", "data/chat/prepare.py", "--input=c.jsonl --tokenizer=byte --out=prepared",
        "c.jsonl, line 2: ", "--skip-bad 1", *words, files=files)



def pair(chosen: Any, rejected: Any, prompt: Any = "Why?", **more: Any) -> dict[str, Any]:
    """A row of preferences; without its prompt where that is None."""
    asked = {} if prompt is None else {"prompt": prompt}
    return {**asked, "chosen": chosen, "rejected": rejected, **more}


HH = "\n\nHuman: Why?\n\nAssistant:"
WHY, SO, NO = [{"role": role, "content": content} for role, content in (Q, A, ("assistant", "No."))]
for flag, first, rows in [
    ("", pair("So.", "No."), [
        ("the same answers", pair("So.", "So."), "chosen and rejected are the same: leave the row"),
        ("the same but for a mark", pair("So.", "So.</s>"), "chosen and rejected are the same"),
        ("the same conversations", pair([WHY, SO], [WHY, SO], None), "are the same"),
        ("other prompts alone", pair([{**WHY, "content": "Who?"}, SO], [WHY, SO], None),
         "have one answer, only what is before it differs, from message 1 on"),
        ("other prompts, too", pair([{**WHY, "content": "Who?"}, SO], [WHY, NO], None),
         "differ from message 1 on, before their last answers", "the same prompt"),
        ("an answer more", pair([WHY, SO, WHY, SO], [WHY, NO], None), "differ from message 2 on"),
        ("a text with another prompt", pair(f"{HH} So.", f"{HH} No.".replace("Why", "Who"), None),
         "differ from message 1 on"),
        ("no prompt", pair("So.", "No.", None), 'chosen is "So.", and no prompt is beside',
         "Human: Why?"),
        ("an empty prompt", pair("So.", "No.", ""), "no prompt is beside: add it as prompt"),
        ("no rejected answer", {"prompt": "Why?", "chosen": "So."}, "no rejected among its keys"),
        ("no question", pair([SO], [NO], None), "chosen: message 1 (assistant) answers before any"),
        ("a question alone", pair([WHY], [WHY], None), "chosen: its last message, of user, is no"),
        ("a text of one speaker", pair("\n\nHuman: Why?", "\n\nHuman: Who?", None),
         "chosen: its last message, of user, is no answer"),
        ("a speaker twice", pair(f"{HH} a\n\nAssistant: b", f"{HH} c", None),
         "chosen: message 3 (assistant) follows another answer"),
        ("a text without an answer", pair(f"{HH} So.", HH, None), "rejected: message 2 (assistant)",
         "is empty"),
        ("an answer that is a number", pair("So.", 5), "rejected: message 2 (assistant) has the",
         "content 5"),
        ("an answer that is null", pair(None, "No."), "chosen: message 2 (assistant)", "null"),
        ("an answer of spaces", pair("So.", " "), "rejected: message 2 (assistant) is empty"),
        ("an answer that is a mark", pair("So.", "</s>"), "is empty but for </s>"),
        ("another prompt within", pair([WHY, SO], [WHY, NO], [SO]), "chosen does not begin with"),
        ("a prompt that is a number", pair("So.", "No.", 5), "chosen: message 1 (user)", "5"),
        ("a prompt that is answered", pair("So.", "No.", [WHY, SO]), "follows another answer"),
        ("a prompt of no role", pair("So.", "No.", [{"from": "x"}]), "chosen: message 1 is"),
        ("messages alone", turns(Q, A), "no chosen and no rejected among its keys messages"),
        ("a NUL for bytes", pair("So.", "a\0b", "Who?"), "'a\\x00b' holds", "take it out"),
        ("an answer of weight 0", pair([{**SO, "weight": 0}], [NO], [{**WHY, "content": "Who?"}]),
         "nothing to learn"),
    ]),
    ("--prompts", {"prompt": "Why?", "answer": "So."}, [
        ("a prompt that is null", {"prompt": None}, "message 1 (user) has the content null"),
        ("a prompt of spaces", {"prompt": " "}, "message 1 (user) is empty: write a text"),
        ("a prompt of no messages", {"prompt": []}, "it has no messages"),
        ("a prompt that is answered", {"prompt": [WHY, SO]}, "its last message, of assistant, is",
         "not the user's, which the run shall answer: leave it out"),
        ("a prompt of the system alone", {"prompt": [{"role": "system", "content": "S"}]},
         "its last message, of system, is not the user's"),
        ("an answer that is a number", {"prompt": "a", "answer": 5}, "its answer is 5, not text"),
        ("another format", {"question": "Why?", "answer": "So."}, "no prompt among its keys quest"),
        ("a list of messages", [WHY], "is not of format prompts, as the first row is"),
        ("a NUL for bytes", {"prompt": "a\0b"}, "'a\\x00b' holds", "take it out"),
        ("half a character", '{"prompt": "\\ud800"}', "\\ud800 is half a character"),
        ("no JSON", '{"prompt": "', "not JSON: Unterminated string"),
        ("not UTF-8", b'{"prompt": "\xe9"}', "byte 0xe9 at column 13 is not UTF-8"),
    ]),
]:
    for name, second, *words in rows:
        content = second if isinstance(second, bytes | str) else json.dumps(second)
        content = content if isinstance(content, bytes) else content.encode()
        argv = f"--input=c.jsonl --tokenizer=byte --out=prepared {flag}"
        bad(f"{flag[2:] or 'pairs'}: {name}", "data/chat/prepare.py", argv, "c.jsonl, line 2: ",
            "--skip-bad 1", *words, **{"c.jsonl": json.dumps(first).encode() + b"\n" + content})

SHAREGPT = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
for name, argv, content, *words in [
    ("an empty file", "", "", "no conversation in c.jsonl"),
    ("an empty array", "", "[]", "no conversation in c.jsonl"),
    ("one conversation", "", json.dumps(turns(Q, A)), "1 conversation with one first question in"),
    ("one question", "", f"{json.dumps(turns(Q, A))}\n" * 3, "3 conversations with one", "another"),
    ("plain texts", "", '{"text": "a"}', "line 1: text is no conversation", "data/text/prepare.py"),
    ("preferences", "", '{"chosen": "a", "rejected": "b"}', 'line 1: chosen is "a", and no'),
    ("prompts", "", '{"prompt": "a"}', "line 1: a prompt without completion", "--prompts makes"),
    ("unknown keys", "", '{"q": "a", "a": "b"}', "line 1: its keys q, a are of no known format",
     "question"),
    ("numbers", "", "5\n6", "line 1: 5 is neither an object nor a list"),
    ("an array that ends early", "", '[\n{"instruction": "a", "output": "b"}',
     "line 2: this array is not JSON"),
    ("an array without comma", "", '[{"instruction": "a", "output": "b"}\n{"a"', "no comma or ]"),
    ("an array with more", "", '[\n]\n{}', "line 3: this array is not JSON: more after its end"),
    ("an array that breaks", "", '[{"instruction": "a", "output": "b"},\n{"a" 1}]',
     "line 2: this array is not JSON: Expecting ':' delimiter at column 6"),
    ("a format that is not of prompts", "--prompts --format=alpaca", "",
     "--format alpaca goes without --prompts", "messages, question, prompts"),
    ("texts for prompts", "--prompts", '{"text": "a"}', "line 1: its keys text are of no known"),
    ("one prompt", "--prompts", '{"prompt": "a"}', "1 conversation with one first question in"),
    ("one pair", "", json.dumps(pair("So.", "No.")), "1 conversation with one first question in"),
    ("a format that it has not", "--format=alpaca", json.dumps(turns(Q, A)), "no instruction"),
    ("an unknown format", "--format=vicuna", json.dumps(turns(Q, A)), "--format", "'vicuna'"),
    ("a sender that is unknown", "", json.dumps(SHAREGPT).replace("gpt", "claude"),
     'line 1: message 2 is from "claude"', "human", "rename it"),
    ("a sender that is missing", "", json.dumps(SHAREGPT).replace("from", "by"), "from and value"),
    ("an input that is a number", "", '{"instruction": "a", "input": 5, "output": "b"}',
     "line 1: its input is 5, not text"),
    ("an answer that is a number", "", '{"question": "a", "answer": 5}', "the content 5, not text"),
    ("a completion that is null", "", '{"prompt": "a", "completion": null}', "content null"),
    ("more bad rows than allowed", "--skip-bad=1", '{"prompt": "a", "completion": null}\n' * 3,
     "line 1: ", "2 more bad rows, the next c.jsonl, line 2", "--skip-bad 3"),
    ("fewer than no bad rows", "--skip-bad=-1", "", "--skip-bad=-1 must be 0 or more"),
    ("a character that is new", "--tokenizer={world}/data", "".join(
        json.dumps(turns(("user", text), A)) + "\n" for text in ("€", "b")),
     "line 1: char tokenizer has no '€'"),
    ("ids without a text", "--tokenizer=ids", json.dumps(turns(Q, A)), "not beside ids"),
    ("an image", "", JPEG, "c.jsonl is a JPEG image, not UTF-8 text"),
    ("gzip cut short", "", gzip.compress(NOISE)[:99], "cannot read c.jsonl"),
    ("a share of 1", "--val-fraction=1", "", "--val-fraction", "1.0"),
    ("other data in --out", "--out=d", json.dumps(turns(Q, A)), "d", "--force"),
]:
    argv = ["--input=c.jsonl", *argv.split()]
    argv += [d for d in ("--tokenizer=byte", "--out=prepared") if not any(
        a.startswith(d[:5]) for a in argv)]
    ids = {"format": 1, "tokenizer": {"kind": "ids", "vocab_size": 9}, "vocab_size": 9, "dtype":
           "uint16", "train": {"tokens": 0}, "val": {"tokens": 0}}
    files = {"c.jsonl": content, "ids/meta.json": ids} | ({"d": copy("data")} if "--out=d" in argv
                                                          else {})
    bad(f"chat: {name}", "data/chat/prepare.py", argv, *words, files=files)
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.command.split('/')[-1]}, {c.name}")
def test_a_mistake_is_one_message_and_changes_nothing(case, world, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    files = {
        k: v.replace("WORLD", str(world)) if isinstance(v, str) else v
        for k, v in case.files.items()
    }
    place(files, here, world)
    monkeypatch.chdir(here)
    before = tree(here), tree(world)
    code, out, err = run(
        case.command, [a.replace("{world}", str(world)) for a in case.argv], capsys
    )
    assert code == case.code, out + err
    assert f"\n{err}".count("\nerror: ") == 1 and "Traceback" not in err + out, err
    for word in case.words:
        assert word in err, err
    message = err[err.index("error: ") :]
    assert len(message.splitlines()) <= 20 and len(message) < 2500, message
    assert (tree(here), tree(world)) == before


def test_there_are_enough_cases_and_each_has_its_own_name():
    assert len({(c.command, c.name) for c in CASES}) == len(CASES) >= 120


# --- what a row cannot say


def mistake(command: str, argv: list[str], capsys: Any) -> str:
    """The one message of a command."""
    code, out, err = run(command, argv, capsys)
    assert code == 2 and f"\n{err}".count("\nerror: ") == 1 and "Traceback" not in err + out, err
    return err[err.index("error: ") :]


def in_world(argv: list[str], world: Path) -> list[str]:
    return [a.replace("{world}", str(world)) for a in argv]


def test_a_folder_that_another_process_trains_in_is_left_alone(world, capsys):
    lock = world / "run" / ".lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = tree(world)
        argv = in_world([*SAME, "--optim.steps=3", "--run.allow_config_change=true"], world)
        message = mistake("train", argv, capsys)
        assert "another process is training in" in message and "another run.out_dir" in message
        assert tree(world) == before
    lock.unlink()


def test_a_disk_that_is_full_is_one_message_and_leaves_nothing(
    world, tmp_path, monkeypatch, capsys
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "train.bin.partial")

    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("green bottles")
    monkeypatch.setattr(prepare, "write_bins", full)
    argv = ["--input=t.txt", "--tokenizer=byte", "--out=a/b"]
    # EFBIG: the file system, or a limit of the shell, has no larger files.
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = mistake("data/text/prepare.py", argv, capsys)
        assert f"train.bin.partial: {os.strerror(number)}; free some room" in message
        assert not Path("a").exists()

    def full_for_safetensors(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full_for_safetensors)
    argv = in_world(["export", "--run={world}/run", "--out=weights"], world)
    message = mistake("tools/convert_hf.py", argv, capsys)
    assert "cannot write model.safetensors" in message and "No space left" in message
    assert tree(tmp_path).keys() == {"t.txt"}


@pytest.mark.parametrize("network", ["refused", "silent", "offline", "nobody's name"])
def test_without_a_network_a_model_is_asked_for_in_words_and_soon(
    network, tmp_path, monkeypatch, capsys
):
    """A server that takes the call and says nothing, as behind some firewalls, counts as none."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(huggingface, "HUB_SECONDS", 1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if network == "silent":
            server.listen(9)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", network == "offline")
        real = huggingface_hub.HfApi

        def api(*_: Any, **__: Any) -> Any:
            return real(endpoint=f"http://127.0.0.1:{port}")

        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        name = "nobody/none" if network == "nobody's name" else "gpt2"
        began = time.monotonic()
        message = mistake("generate", [f"--hf={name}", "--prompt=x"], capsys)
        assert time.monotonic() - began < 20
    for word in (name, "Hugging Face", "without a network", "put config.json", "HF_HOME"):
        assert word in message, message


def test_names_beyond_ascii_are_names_like_others(world, tmp_path, monkeypatch, capsys):
    here = tmp_path / "Bücher 数据 🙂"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("täxt.txt").write_text("grüne Flaschen\n" * 99, encoding="utf-8")
    assert (
        run(
            "data/text/prepare.py",
            ["--input=täxt.txt", "--tokenizer=byte", "--val-fraction=.2", "--out=dätä"],
            capsys,
        )[0]
        == 0
    )
    assert (here / "dätä" / "meta.json").is_file()
    shutil.copytree(world / "data", "данные")
    Path("ünsere.yaml").write_text(
        YAML + "data: {path: данные}\nrun: {out_dir: läuf 🙂}\n", "utf-8"
    )
    code, _, err = run("train", ["--config=ünsere.yaml", "--eval.windows=4"], capsys)
    assert code == 0, err
    code, out, err = run("evaluate", ["--run=läuf 🙂", "--windows=4"], capsys)
    assert code == 0 and "läuf 🙂, step 2, on данные" in out, err


COMMANDS = [
    "plan",
    "train",
    "evaluate",
    "generate",
    "tools/convert_hf.py",
    "tools/sizing.py",
    "tools/parity.py",
    "tools/checkpoint.py",
    "tools/tpu.py",
    "data/chat/prepare.py",
    "data/text/prepare.py",
    "data/shakespeare/prepare.py",
    "data/openwebtext/prepare.py",
    "data/python_stdlib/prepare.py",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_help(command, capsys):
    code, out, err = run(command, ["--help"], capsys)
    assert code == 0 and "usage: " in out and err == ""
    assert "--" in out


def test_a_configuration_is_printed_and_the_later_of_a_key_counts(capsys):
    argv = ["--data.path=d", *NEW[1:], "--optim.lr=1e-3", "--optim.lr=2e-3", "--print-config"]
    code, out, err = run("train", argv, capsys)
    assert code == 0 and err == "" and yaml.safe_load(out)["optim"]["lr"] == 2e-3


def test_a_message_is_of_bounded_size_whatever_it_quotes(capsys):
    def main(argv: list[str]) -> int:
        raise Mistake("\n".join(["x" * 10_000] * 1000))

    assert exit_code(main, []) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) < 40 and len(err) < 40_000 and "965 more lines" in err


def test_a_fault_of_ours_keeps_its_traceback():
    """A library's ValueError tells of a case that nobody thought of: never of a user's mistake."""
    for fault in (
        lambda argv: json.loads("{"),
        lambda argv: {}["x"],
        lambda argv: 1 / 0,
        lambda argv: open("/nowhere/at/all"),
    ):
        with pytest.raises((ValueError, KeyError, ArithmeticError, OSError)):
            exit_code(fault, [])


# --- the real commands


def real(argv: list[str], cwd: Path, **more: Any) -> tuple[int, str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, env=env, **more)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode()


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["-m", "scalegpt.train", *NEW, "--optim.lrr=1"], "--optim.lr?"),
        pytest.param(
            ["-m", "scalegpt.evaluate", "--run=nowhere"],
            "nowhere is not the folder of a run",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [str(ROOT / "tools/sizing.py"), "--devices=0"], "--devices=0", marks=pytest.mark.slow
        ),
        ([str(ROOT / "data/text/prepare.py"), "--input=nowhere"], "'nowhere'"),
    ],
)
def test_a_real_command_says_the_same(argv, word, tmp_path):
    code, out, err = real(argv, tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: ") and word in err
    assert "Traceback" not in err and tree(tmp_path) == {}


@pytest.mark.slow
def test_a_real_prompt_of_broken_utf8_and_a_terminal_without_it(world, tmp_path):
    argv = ["-m", "scalegpt.generate", f"--run={world}/run", "--max-new-tokens=2"]
    env = {"PYTHONIOENCODING": "utf-8"}
    code, out, err = real(argv, tmp_path, input=b"green \xff", env=env)
    assert code == 2 and out == "" and "Traceback" not in err
    assert "standard input is not UTF-8 text" in err
    code, out, err = real([*argv, "--prompt=\u00e9"], tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert code == 2 and "U+00E9" in err and "Traceback" not in err

"""Each program that tools/bench.py measures scalegpt against works in a process of its own.

Two frameworks, or JAX twice, in one process compete for threads, so each program has its process,
and only one of them works at a time. The process answers JSON lines on its standard input: the
settings by what it built; then each {"updates": N} by the time of an update.
"""

import contextlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalegpt.config import Config
from scalegpt.errors import Mistake

MODES = ("eager", "compiled")  # of PyTorch


@dataclass(frozen=True)
class Program:
    """A program is a checkout that the user names, or an installed package."""

    packages: dict[str, str]
    """modules that it imports, and what pip calls them"""
    repository: str | None = None
    """its name on GitHub; None: an installed package"""
    file: str = ""
    """where the checkout has what is imported from it"""
    mark: str = ""
    """text of that file; other programs have files of the same name"""
    root: str = "."
    """the folder of the checkout that is imported from"""
    jax: bool = False
    """it trains on all devices with JAX; else with PyTorch"""
    always: dict[str, Any] = field(default_factory=dict)
    """keys of a config whose value there cannot be chosen"""
    notes: tuple[str, ...] = ()
    """what else differs, for the person who reads the ratio"""


PROGRAMS = {
    "nanogpt": Program(
        packages={"torch": "torch"},
        repository="karpathy/nanoGPT",
        file="model.py",
        mark="import torch",
        always={"model.activation": "gelu", "optim.decay": "matrices"},
    ),
    "transformers": Program(
        packages={"torch": "torch", "transformers": "transformers"},
        always={"model.bias": True, "optim.decay": "matrices"},
    ),
    "nanogpt-jax": Program(
        packages={"wandb": "wandb"},
        repository="plippmann/nanogpt-jax",
        file="nanogpt/train.py",
        mark="def init_train_state",
        root="nanogpt",
        jax=True,
        always={
            "model.position": "rope",
            "model.activation": "gelu_tanh",
            "optim.decay": "all",
            "optim.beta1": 0.9,
            "optim.beta2": 0.95,
            "optim.eps": 1e-8,
        },
    ),
    "gpt-jax": Program(
        packages={"wandb": "wandb", "tyro": "tyro", "tensorflow": "tensorflow"},
        repository="jenkspt/gpt-jax",
        file="train.py",
        mark="def init_train_state",
        jax=True,
        always={
            "model.activation": "gelu_tanh",
            "optim.decay": "no_embeddings",
            "optim.eps": 1e-8,
        },
        notes=(
            "attention has biases always",
            "more than one microbatch: AdamW runs after each, and its updates are added up",
            "so that it runs with this Flax: flax_return_frozendict=True",
        ),
    ),
    "nanodo": Program(
        packages={
            "absl": "absl-py",
            "clu": "clu",
            "ml_collections": "ml_collections",
            "sentencepiece": "sentencepiece",
            "tensorboard": "tensorboard",
            "tensorflow": "tensorflow",
            "tensorflow_datasets": "tensorflow_datasets",
        },
        repository="google-deepmind/nanodo",
        file="nanodo/train.py",
        mark="class Trainer",
        jax=True,
        always={
            "model.activation": "gelu_tanh",
            "model.bias": False,
            "model.dropout": 0.0,
            "model.norm_eps": 1e-6,
            "optim.decay": "all",
        },
        notes=(
            "of T tokens the second to the last are predicted, and not the one after",
            "its step also takes statistics of all tensors (log_internal_metrics, its default)",
        ),
    ),
}
# What of a model all programs have alike, or cannot have.
SHARED = {
    "position": ["learned"],
    "norm": ["layernorm"],
    "activation": ["gelu", "gelu_tanh"],
    "tie_word_embeddings": [True],
    "logit_softcap": [0.0],
    "norm_eps": [None],
    "qkv_bias": [False],
    "window": [None],
    "attention_scale": [None],
    "mlp": ["plain"],
    "n_inner": [None],
    "n_kv_head": [None],
    "head_size": [None],
    "qk_norm": [False],
    "embedding_norm": [False],
    "residual_scalars": [False],
    "value_embeddings": [False],
    "smear": [False],
    "backout": [False],
    "ngram_rows": [0],
}


class Child:
    """A child is the parent's end of the process; its methods raise Mistake when it fails."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Else JAX's hint about tracebacks is the last line, and not the error.
            env={**os.environ, "JAX_TRACEBACK_FILTERING": "off"},
        )
        self.name = " ".join([settings["program"], *{settings["mode"]} - {None}])
        self.differs = settings["differs"]
        try:
            self.built = self._ask(settings)
        except BaseException:
            self.close()
            raise

    def block(self, updates: int) -> dict[str, Any]:
        return self._ask({"updates": updates})

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # standard error tells below why it died
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["it said nothing"]
        raise Mistake(f"{self.name} failed: {lines[-1]}")


def rss() -> int:
    """Return the peak bytes of memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve() -> None:
    """Answer requests on a copy of standard output, to which others' code prints as well."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    if PROGRAMS[settings["program"]].jax:
        import predecessors as module
    else:
        import pytorch as module
    worker = module.Writer(settings) if "texts" in settings else module.Trainer(settings)
    began = time.perf_counter()
    worker.block(settings.get("tokens", 1))
    first = time.perf_counter() - began
    built = {"parameters": sum(math.prod(p.shape) for p in worker.parameters), "first": first}
    built["devices"] = getattr(worker, "devices", 1)
    print(json.dumps(built), file=answers, flush=True)
    for line in sys.stdin:
        block = {"memory": rss(), **worker.block(json.loads(line)["updates"])}
        print(json.dumps(block), file=answers, flush=True)


def check(against: str, config: Config, decode: bool) -> None:
    """Raise Mistake unless `against` is a program, is here and can train the config's model."""
    name, equals, folder = against.partition("=")
    program = PROGRAMS.get(name)
    if program is None or bool(program.repository) != bool(equals):
        forms = [f"{x}=DIR" if PROGRAMS[x].repository else x for x in PROGRAMS]
        raise Mistake(f"--against={against} is neither {', '.join(forms[:-1])} nor {forms[-1]}")
    missing = [x for x in program.packages if importlib.util.find_spec(x) is None]
    if missing:
        pip = " ".join(program.packages[x] for x in missing)
        raise Mistake(f"--against={against} needs {', '.join(missing)}: pip install {pip}")
    if program.repository:
        file = Path(folder, program.file)
        clone = f"for a checkout, git clone https://github.com/{program.repository}"
        if not file.is_file():
            raise Mistake(f"--against={against}: there is no {program.file} in {folder}; {clone}")
        if program.mark not in file.read_text(errors="replace"):
            raise Mistake(f"--against={against}: {file} is not of {name}; {clone}")
    if program.jax and decode:
        raise Mistake(f"--against={against}: --decode is not measured against {name}")
    for key, values in SHARED.items():
        value = getattr(config.model, key)
        if value not in values and f"model.{key}" not in program.always:
            raise Mistake(f"--against={against}: {name} has no model.{key}={value}")


def differences(name: str, config: Config) -> list[str]:
    """Return what the program does otherwise than the config says."""
    program = PROGRAMS[name]
    always = {"optim.name": "adamw", **program.always}
    own = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in always}
    return [f"{key}={x}" for key, x in always.items() if x != own[key]] + list(program.notes)


if __name__ == "__main__":
    serve()

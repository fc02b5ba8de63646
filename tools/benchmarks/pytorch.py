"""One trainer in PyTorch, as a process that makes updates when it is asked to: for tools/bench.py.
Or a writer, which continues texts.

torch and JAX in one process fight over threads, so each trainer has a process of its own, and only
one of them works at a time. Standard input and output are a pipe of JSON lines: the settings (see
`Trainer`), answered by what was built; then {"updates": N}, answered by how long each took.
"""

import contextlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake

MODES = ("eager", "compiled")


class Child:
    """The process, seen from outside. Raises ValueError with its last words when it fails."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._words = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        self.name = f"{settings['trainer'].partition('=')[0]} {settings['mode']}"
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
        self._words.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # what it died of is in its last words
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._words.seek(0)
        words = self._words.read().strip().splitlines() or ["it said nothing"]
        raise Mistake(f"{self.name} failed: {words[-1]}")


class Trainer:
    """A model with nanoGPT's optimizer, and random tokens to train it on.

    settings: what tools/bench.py makes of a Config. trainer: "nanogpt=DIR" or "transformers"; mode:
    one of MODES; shape: what GPTConfig of nanoGPT takes; rows: sequences of a microbatch.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, optim = settings, settings["optim"]
        self.torch, self.device, self.context = prepare(settings)
        model = build(settings).to(self.device)
        if settings["trainer"] == "transformers":
            self.optimizer = adamw(model, optim, fused=settings["gpu"])
            self.losses = self.cross_entropy
        else:
            self.optimizer = model.configure_optimizers(
                optim["weight_decay"], optim["lr"], tuple(optim["betas"]), self.device
            )
            self.losses = lambda x, y: self.model(x, y)[1]
        model.train()
        self.parameters = list(model.parameters())
        self.model = self.torch.compile(model) if settings["mode"] == "compiled" else model
        shape = (4, settings["microbatches"], settings["rows"], settings["shape"]["block_size"] + 1)
        self.batches = self.torch.randint(settings["shape"]["vocab_size"], shape)
        self.done = 0

    def cross_entropy(self, x: Any, y: Any) -> Any:
        scores = self.model(input_ids=x, use_cache=False).logits
        return self.torch.nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())

    def update(self) -> Any:
        """As nanoGPT's train.py makes it. Returns the last microbatch's loss, not waited for."""
        batch = self.batches[self.done % len(self.batches)]
        for tokens in batch:
            if self.settings["gpu"]:
                tokens = tokens.pin_memory().to(self.device, non_blocking=True)
            with self.context:
                loss = self.losses(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
                loss = loss / len(batch)
            loss.backward()
        if clip := self.settings["optim"]["grad_clip"]:
            self.torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()

    def block(self, updates: int) -> dict[str, Any]:
        """Seconds of an update, and bytes of memory at their peak.

        An update's loss is read once the next update is on its way, as for scalegpt.
        """
        began, pending = time.perf_counter(), None
        for _ in range(updates):
            loss = self.update()
            if pending is not None:
                pending.item()
            pending = loss
        pending.item()
        seconds = (time.perf_counter() - began) / updates
        peak = self.torch.cuda.max_memory_allocated if self.settings["gpu"] else rss
        return {"seconds": seconds, "memory": peak()}


class Writer:
    """A model that continues random prompts by its own `generate`, as scalegpt.generate would.

    settings: those of a Trainer; besides, texts: how many at a time; prompt, tokens: of each.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.torch, self.device, self.context = prepare(settings)
        self.model = build(settings).to(self.device).eval()
        if settings["trainer"] == "transformers" and settings["dtype"] != "float32":
            # As it is loaded for use; autocast would round the weights anew for every token.
            self.model.to(getattr(self.torch, settings["dtype"]))
        shape = (settings["texts"], settings["prompt"])
        self.prompts = self.torch.randint(settings["shape"]["vocab_size"], shape).to(self.device)
        self.parameters = list(self.model.parameters())

    def block(self, tokens: int) -> dict[str, Any]:
        """Seconds of a token, prefill included."""
        sampled = {"max_new_tokens": tokens, "temperature": 0.8, "top_k": 200}
        if self.settings["trainer"] == "transformers":
            sampled |= {"do_sample": True, "pad_token_id": 0}
        began = time.perf_counter()
        with self.torch.no_grad(), self.context:
            ids = self.model.generate(self.prompts, **sampled)
        ids.tolist()  # waits for a GPU
        seconds = (time.perf_counter() - began) / tokens
        assert ids.shape[1] == self.settings["prompt"] + tokens
        return {"seconds": seconds}


def prepare(settings: dict[str, Any]) -> tuple[Any, str, Any]:
    """torch, its device, and the context of its precision."""
    import torch

    device = "cuda" if settings["gpu"] else "cpu"
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if settings["dtype"] == "float32":
        return torch, device, contextlib.nullcontext()
    return torch, device, torch.autocast(device, dtype=getattr(torch, settings["dtype"]))


def build(settings: dict[str, Any]) -> Any:
    """The model, on the CPU."""
    trainer, _, folder = settings["trainer"].partition("=")
    if trainer == "transformers":
        return transformers_gpt2(settings)
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    shape = dict(settings["shape"])
    if shape["vocab_size"] == 50257:
        shape["vocab_size"] = 50304  # as its train.py does
    return GPT(GPTConfig(**shape))


def transformers_gpt2(settings: dict[str, Any]) -> Any:
    """GPT-2 of the same shape: it always has biases, and no vocabulary is padded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = settings["shape"]
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape["dropout"])
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocab_size"],
            n_positions=shape["block_size"],
            n_embd=shape["n_embd"],
            n_layer=shape["n_layer"],
            n_head=shape["n_head"],
            attn_implementation="sdpa",
            activation_function="gelu_new" if settings["activation"] == "gelu_tanh" else "gelu",
            **drop,
            bos_token_id=None,
            eos_token_id=None,  # else it may end a text early
        )
    )


def adamw(model: Any, optim: dict[str, Any], fused: bool) -> Any:
    """nanoGPT's optimizer for any model: what has two axes or more decays."""
    import torch

    parts: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        parts[parameter.dim() >= 2].append(parameter)
    groups = [
        {"params": parts[decays], "weight_decay": optim["weight_decay"] if decays else 0.0}
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=optim["lr"], betas=tuple(optim["betas"]), fused=fused)


def rss() -> int:
    """Most bytes of memory that this process ever held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def serve() -> None:
    """Answer on what was standard output: nanoGPT and torch.compile print to it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    trainer = Writer(settings) if "texts" in settings else Trainer(settings)
    began = time.perf_counter()
    trainer.block(settings.get("tokens", 1))
    first = time.perf_counter() - began
    built = {"parameters": sum(p.numel() for p in trainer.parameters), "first": first}
    print(json.dumps(built), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.block(json.loads(line)["updates"])), file=answers, flush=True)


def check(what: str, model: Any) -> None:
    """Raises ValueError when `what` is no trainer, is not here, or cannot be of the model's shape.

    model: a ModelConfig.
    """
    trainer, equals, folder = what.partition("=")
    if trainer not in ("nanogpt", "transformers") or (trainer == "nanogpt") != bool(equals):
        raise Mistake(f"--against={what} is neither nanogpt=DIR nor transformers")
    for package in ("torch", *{"transformers"} & {trainer}):
        if importlib.util.find_spec(package) is None:
            raise Mistake(f"--against={what} needs {package}: pip install {package}")
    if trainer == "nanogpt" and not Path(folder, "model.py").is_file():
        raise Mistake(
            f"--against={what}: there is no model.py in {folder}; for a checkout, "
            "git clone https://github.com/karpathy/nanoGPT"
        )
    wanted = {
        "position": ["learned"],
        "norm": ["layernorm"],
        "activation": ["gelu", "gelu_tanh"],
        "tie_word_embeddings": [True],
        "logit_softcap": [0.0],
        "qk_norm": [False],
        "embedding_norm": [False],
        "residual_scalars": [False],
        "value_embeddings": [False],
    }
    for key, values in wanted.items():
        if (found := getattr(model, key)) not in values:
            raise Mistake(f"--against={what}: {trainer} has no model.{key}={found}")


if __name__ == "__main__":
    serve()

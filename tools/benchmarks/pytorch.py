"""nanoGPT and transformers train, or write texts, with PyTorch in a process of tools/bench.py."""

import contextlib
import sys
import time
from typing import Any


class Trainer:
    """A trainer has a PyTorch model, nanoGPT's optimizer and random tokens to train on.

    settings: those of bench's `settings_of_programs`, among them program, "nanogpt" or
    "transformers"; mode, eager or compiled; shape, the arguments of nanoGPT's GPTConfig; rows, the
    sequences of a microbatch.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, optim = settings, settings["optim"]
        self.torch, self.device, self.context = prepare(settings)
        model = build(settings).to(self.device)
        if settings["program"] == "transformers":
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
        """Make an update as nanoGPT's train.py does; return the last loss, not waited for."""
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
        """Measure seconds of an update, and peak bytes of memory.

        As for scalegpt, an update's loss is read after the next update has been launched.
        """
        began, pending = time.perf_counter(), None
        for _ in range(updates):
            loss = self.update()
            if pending is not None:
                pending.item()
            pending = loss
        pending.item()
        seconds = (time.perf_counter() - began) / updates
        gpu = self.settings["gpu"]
        memory = {"memory": self.torch.cuda.max_memory_allocated()} if gpu else {}
        return {"seconds": seconds, **memory}


class Writer:
    """A writer's PyTorch model continues random prompts by its own `generate`.

    settings: those of a Trainer and texts, how many at a time; prompt and tokens, lengths of each.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.torch, self.device, self.context = prepare(settings)
        self.model = build(settings).to(self.device).eval()
        if settings["program"] == "transformers" and settings["dtype"] != "float32":
            # As one loads a model for use; autocast would round the weights again for each token.
            self.model.to(getattr(self.torch, settings["dtype"]))
        shape = (settings["texts"], settings["prompt"])
        self.prompts = self.torch.randint(settings["shape"]["vocab_size"], shape).to(self.device)
        self.parameters = list(self.model.parameters())

    def block(self, tokens: int) -> dict[str, Any]:
        """Measure seconds of a token, prefill included."""
        sampled = {"max_new_tokens": tokens, "temperature": 0.8, "top_k": 200}
        if self.settings["program"] == "transformers":
            sampled |= {"do_sample": True, "pad_token_id": 0}
        began = time.perf_counter()
        with self.torch.no_grad(), self.context:
            ids = self.model.generate(self.prompts, **sampled)
        ids.tolist()  # waits for a GPU
        seconds = (time.perf_counter() - began) / tokens
        assert ids.shape[1] == self.settings["prompt"] + tokens
        return {"seconds": seconds}


def prepare(settings: dict[str, Any]) -> tuple[Any, str, Any]:
    """Return torch, its device, and an autocast context for the precision."""
    import torch

    device = "cuda" if settings["gpu"] else "cpu"
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if settings["dtype"] == "float32":
        return torch, device, contextlib.nullcontext()
    return torch, device, torch.autocast(device, dtype=getattr(torch, settings["dtype"]))


def build(settings: dict[str, Any]) -> Any:
    """Build the model on the CPU."""
    if settings["program"] == "transformers":
        return transformers_gpt2(settings)
    sys.path.insert(0, settings["folder"])
    from model import GPT, GPTConfig

    return GPT(GPTConfig(**settings["shape"]))


def transformers_gpt2(settings: dict[str, Any]) -> Any:
    """Build a GPT-2 of the same shape, but with biases and without padding of the vocabulary."""
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
            eos_token_id=None,  # so that no text ends early
        )
    )


def adamw(model: Any, optim: dict[str, Any], fused: bool) -> Any:
    """Make nanoGPT's optimizer for any model: parameters with two axes or more decay."""
    import torch

    parts: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        parts[parameter.dim() >= 2].append(parameter)
    groups = [
        {"params": parts[decays], "weight_decay": optim["weight_decay"] if decays else 0.0}
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=optim["lr"], betas=tuple(optim["betas"]), fused=fused)

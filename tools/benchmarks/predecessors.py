"""nanogpt-jax, gpt-jax and nanodo train by their own code, in a process of tools/bench.py.

State and update are made by their own functions, with this run's shapes and optimizer as far as
their configs let these be chosen; programs.py says what they do not. Their data pipelines, logs and
checkpoints are left out, which is in their favour.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

# From tokens [devices, rows, T + 1], a microbatch, to its loss; and the model's parameters.
Program = tuple[Callable[[np.ndarray], jax.Array], Any]


class Trainer:
    """A trainer has a predecessor's state on all devices and random tokens in the host's memory.

    settings: those of bench's `settings_of_programs`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        jax.config.update("jax_enable_compilation_cache", False)
        if not settings["gpu"]:
            jax.config.update("jax_platforms", "cpu")
        sys.path.insert(0, settings["folder"])
        make = {"nanogpt-jax": nanogpt_jax, "gpt-jax": gpt_jax, "nanodo": nanodo}
        self.settings, self.devices = settings, jax.device_count()
        if settings["rows"] % self.devices:
            raise ValueError(
                f"{settings['rows']} sequences do not divide over {self.devices} devices"
            )
        self.step, parameters = make[settings["program"]](settings)
        self.parameters = jax.tree.leaves(parameters)
        shape = (4, settings["microbatches"], self.devices, settings["rows"] // self.devices)
        length, vocabulary = settings["shape"]["block_size"] + 1, settings["shape"]["vocab_size"]
        tokens = np.random.default_rng(0).integers(0, vocabulary, (*shape, length), np.int32)
        self.batches, self.done = tokens, 0

    def update(self) -> jax.Array:
        """Make an update as their training loop does; return the last loss, not waited for."""
        for tokens in self.batches[self.done % len(self.batches)]:
            loss = self.step(tokens)
        self.done += 1
        return loss

    def block(self, updates: int) -> dict[str, Any]:
        """Measure seconds of an update; an update's loss is read after the next was dispatched."""
        began, pending = time.perf_counter(), None
        for _ in range(updates):
            loss = self.update()
            if pending is not None:
                np.asarray(pending)
            pending = loss
        np.asarray(pending)
        seconds = (time.perf_counter() - began) / updates
        stats = jax.devices()[0].memory_stats() if self.settings["gpu"] else None
        memory = {"memory": stats["peak_bytes_in_use"]} if stats else {}
        return {"seconds": seconds, **memory}


def nanogpt_jax(settings: dict[str, Any]) -> Program:
    """Build what nanogpt/train.py trains."""
    import train
    from flax.jax_utils import replicate
    from model import GPT2Config

    shape, optim, devices = settings["shape"], settings["optim"], jax.device_count()
    model = GPT2Config(
        block_size=shape["block_size"],
        vocab_size=shape["vocab_size"],
        n_embd=shape["n_embd"],
        n_layers=shape["n_layer"],
        n_heads=shape["n_head"],
        dropout=shape["dropout"],
        use_bias=shape["bias"],
        dtype=settings["dtype"],
    )
    config = train.TrainConfig(
        model_config=model,
        batch_size=settings["rows"] // jax.device_count(),
        weight_decay=optim["weight_decay"],
        peak_lr=optim["lr"],
        grad_clip=optim["grad_clip"] or math.inf,
        gradient_accumulation_steps=settings["microbatches"],
        tpu=False,
    )
    state, _, _ = train.init_train_state(jax.random.PRNGKey(0), config, None, None)
    parameters, state = state.params, replicate(state)
    keys, counter = jax.random.split(jax.random.PRNGKey(1), devices), np.zeros(devices, np.int32)

    def step(tokens: np.ndarray) -> jax.Array:
        nonlocal state
        loss, state, _ = train.train_step(state, (tokens[..., :-1], tokens[..., 1:]), keys, counter)
        return loss

    return step, parameters


def gpt_jax(settings: dict[str, Any]) -> Program:
    """Build what train.py and bench.py train."""
    import flax
    import optax

    # Its mask of what decays is a FrozenDict, as what `init` returned was up to Flax 0.6.
    flax.config.update("flax_return_frozendict", True)
    import train
    from flax.jax_utils import replicate
    from model import GPTConfig

    shape, optim = settings["shape"], settings["optim"]
    config = train.TrainConfig(
        model=GPTConfig(
            block_size=shape["block_size"],
            vocab_size=shape["vocab_size"],
            num_layers=shape["n_layer"],
            num_heads=shape["n_head"],
            num_embeds=shape["n_embd"],
            dropout_rate=shape["dropout"],
            use_bias=shape["bias"],
            dtype=settings["dtype"],
        ),
        batch_size=settings["rows"] // jax.device_count(),
        weight_decay=optim["weight_decay"],
        grad_clip=optim["grad_clip"] or math.inf,
        betas=tuple(optim["betas"]),
        gradient_accumulation_steps=settings["microbatches"],
        learning_rate=train.CosineDecayScheduleConfig(peak_value=optim["lr"]),
    )
    schedule = optax.warmup_cosine_decay_schedule(**asdict(config.learning_rate))
    state = train.init_train_state(jax.random.PRNGKey(0), config, schedule)
    parameters, state = state.params, replicate(state)
    keys = jax.random.split(jax.random.PRNGKey(1), jax.device_count())

    def step(tokens: np.ndarray) -> jax.Array:
        nonlocal state
        loss, state = train.train_step(state, tokens, keys)
        return loss

    return step, parameters


def nanodo(settings: dict[str, Any]) -> Program:
    """Build what nanodo/train.py trains with nanodo/configs/default.py."""
    from jax.experimental import mesh_utils
    from nanodo import model_factory, train
    from nanodo.configs import default

    shape, optim = settings["shape"], settings["optim"]
    c = default.get_config()
    c.model.update(
        D=shape["n_embd"],
        H=shape["n_head"],
        L=shape["block_size"],
        N=shape["n_layer"],
        F=4 * shape["n_embd"],
        dtype=settings["dtype"],
    )
    c.opt.update(
        peak_learning_rate=optim["lr"],
        weight_decay=optim["weight_decay"],
        clip_by_global_norm=optim["grad_clip"] or None,
        b1=optim["betas"][0],
        b2=optim["betas"][1],
        eps=optim["eps"],
        grad_accumulation_steps=settings["microbatches"],
    )
    mesh = jax.sharding.Mesh(mesh_utils.create_device_mesh((jax.device_count(),)), ("data",))
    model, get_loss = model_factory.get_model_and_loss(c, shape["vocab_size"])
    shardings, state = train._init_train_state(c, model, jax.random.PRNGKey(0), mesh)
    trainer = train.Trainer(c, state, mesh, shardings, get_loss)
    updates = iter(range(sys.maxsize))

    def step(tokens: np.ndarray) -> jax.Array:
        rows = tokens[..., :-1].reshape(-1, shape["block_size"])
        return trainer.do_step(next(updates), rows)["train_loss"]

    return step, state.params

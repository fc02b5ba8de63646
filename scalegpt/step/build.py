"""Build the compiled functions of a run on a mesh: initial state, training and evaluation step.

Shapes: A microbatches, M sequences of a microbatch over all devices, T positions, D embed, V vocab.
Token arrays are [A, M, T+1] int32: inputs are [..., :-1], targets [..., 1:]; `row_losses` says what
is below 0. A batch is that, or what objective.py says.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from scalegpt.config import BatchConfig, Config, EvalConfig, ObjectiveConfig
from scalegpt.config.limits import VOID
from scalegpt.config.recipe import NO_LORA
from scalegpt.errors import Mistake
from scalegpt.model import attention
from scalegpt.model.flops import parameter_count
from scalegpt.model.gpt import GPT
from scalegpt.model.lora import is_trained, parted
from scalegpt.model.parameters import parameters
from scalegpt.step import health, sharding, update
from scalegpt.step.loss import row_losses
from scalegpt.step.objective import Batch, Objective, objective_of
from scalegpt.step.optimizer import optimizer
from scalegpt.step.update import State

# A CPU's microbatch: few enough tokens that the backward pass finds a layer's values in a cache.
CPU_TOKENS = 1024
# Options of the TPUs' compiler where fsdp splits the weights, unless LIBTPU_INIT_ARGS names them.
# Else it may send the weights around a ring within each product ("windowed einsum"), which becomes
# as many products as fsdp has shards: for configs/v4_32.yaml it expects 1.06 s of an update, and
# with this 0.47 s, in the same memory (libtpu 0.0.52). Over tensor those rings hide traffic.
FSDP_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# And of a CPU's, unless XLA_FLAGS does. Else it copies all moments before they are written over, as
# the weights read them: 0.5 of 28.7 ms a core. It is XLA's default for GPUs and TPUs.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@dataclass(frozen=True)
class Steps:
    """Steps are the compiled functions of a run on a mesh, and the shardings of their arguments.

    init() -> State; train(state, batch [A, M, ...]) -> (State, metrics), which reuses the buffers
    of the old state; evaluate(params, tokens [M, T+1]) -> ([M] sums of cross-entropy, [M] counts).
    metrics: keys of metrics.jsonl, `nonfinite`, `void`, and `norms`, the gradient's by
    `layer_norms`.
    eval_model: what `evaluate` runs, which may keep documents apart where `model` does not.
    """

    mesh: Mesh
    model: GPT
    eval_model: GPT
    objective: Objective
    layout: tuple[int, int]
    abstract: State
    batch_sharding: NamedSharding
    eval_sharding: NamedSharding
    jit_init: Any
    jit_train: Any
    jit_evaluate: Any

    @property
    def parameters(self) -> int:
        """Count the parameters of the model, each once."""
        return parameter_count(self.model.config)

    def init(self) -> State:
        with jax.set_mesh(self.mesh):
            return self.jit_init()

    def train(self, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        # jax.set_mesh, not `with mesh`: under the latter sharding constraints silently do nothing.
        with jax.set_mesh(self.mesh):
            return self.jit_train(state, batch)

    def evaluate(self, params: Any, tokens: Array) -> tuple[Array, Array]:
        with jax.set_mesh(self.mesh):
            return self.jit_evaluate(params, tokens)

    @property
    def abstract_batch(self) -> Any:
        """The shapes of a batch [A, M, ...] and how they are split."""

        def rows(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*self.layout, *one.shape)
            return jax.ShapeDtypeStruct(shape, one.dtype, sharding=self.batch_sharding)

        return jax.tree.map(rows, self.objective.row)

    def lower(self) -> Any:
        """Lower the training step for the mesh's devices; returns jax.stages.Lowered."""
        with jax.set_mesh(self.mesh):
            return self.jit_train.lower(self.abstract, self.abstract_batch)


def build_steps(config: Config, mesh: Mesh, dtype: str, implementation: str) -> Steps:
    """Make the functions of a run; nothing is compiled or put on a device yet.

    dtype, implementation (of attention): as `resolve` returns them. Raises Mistake when the model
    or the batch does not fit the mesh.
    """
    sharding.check_divisible(config.model, mesh)
    if config.row_width % mesh.shape["context"]:
        raise Mistake(
            f"sequences of {config.row_width} tokens (objective.width) do not divide over "
            f"mesh.context={mesh.shape['context']}"
        )
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    most = max(1, CPU_TOKENS // config.row_width) if on_cpu else None
    objective = objective_of(config)
    rolls = config.objective.name == "grpo"
    key = "grpo.prompts x grpo.samples" if rolls else "batch.sequences"
    layout = sharding.batch_layout(config.batch, mesh, most, objective.group, key)
    model = eval_model = GPT(config.model, jnp.dtype(dtype), implementation, config.lora)
    if (evaluated := config.evaluated_model) != config.model:
        kernel = resolve(config.model_copy(update={"model": evaluated}), mesh)[1]
        eval_model = model.clone(config=evaluated, attention=kernel)
    init = jax.jit(partial(initial_state, config, model))  # within another jit: traced once
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(init)
    shardings = sharding.shardings(sharding.specs(boxed, sharding.RULES), mesh)
    abstract = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        nn.unbox(boxed),
        shardings,
    )
    sums = gradient_sums_on(mesh, objective, model)
    replicated = NamedSharding(mesh, P())
    batches, windows = (sharding.batch_sharding(mesh, accumulated) for accumulated in (True, False))
    return Steps(
        mesh,
        model,
        eval_model,
        objective,
        layout,
        abstract,
        batches,
        windows,
        jit_init=jax.jit(
            lambda: nn.unbox(init()),
            out_shardings=shardings,
            # It runs once: LLVM's costlier passes would take longer than they save.
            compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None,
        ),
        jit_train=jax.jit(
            partial(train_step, config, model, sums),
            in_shardings=(shardings, batches),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
        ),
        jit_evaluate=jax.jit(
            # On a CPU a loop over the layers is as fast without gradients, and compiles in two
            # thirds of the time.
            partial(evaluate_step, looped(eval_model) if on_cpu else eval_model),
            in_shardings=(shardings.params, windows),
            out_shardings=replicated,
        ),
    )


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Return the options of XLA with which a training step is compiled for a mesh.

    These are CPU_OPTIONS, or FSDP_OPTIONS where they are of use, without those that the compiler
    does not know: it warns of these, as the step is the same without, but may be slower.
    """
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    wanted, options = {}, {}
    if device.platform == "cpu":
        wanted = CPU_OPTIONS
    elif device.platform == "tpu" and mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1:
        wanted = FSDP_OPTIONS
    named = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    where = SingleDeviceSharding(device)
    for name, value in wanted.items():
        if name in named:
            continue
        option = {name: value}
        try:
            jax.jit(lambda: 0, out_shardings=where, compiler_options=option).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            warnings.warn(f"this XLA has no option {name}; the step may be slower", stacklevel=2)
        else:
            options |= option
    return options


def looped(model: GPT) -> GPT:
    """Return the same model with a loop over its layers; its values are the same up to rounding."""
    return model.clone(config=model.config.model_copy(update={"scan_layers": True}))


def initial_state(config: Config, model: GPT) -> State:
    """Make the state before the first update; its arrays are boxed with their logical axes."""
    # Attention has no parameters, and its kernels refuse a batch of one row. A loop over the layers
    # makes the same values, and compiles faster.
    plain = looped(model).clone(attention="xla")
    params = plain.init(jax.random.key(config.run.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    trained = parted(params, partial(is_trained, config.lora))[0]
    opt_state = optimizer(config.optim, parameters(config.model, config.lora)).init(trained)
    return State(jnp.zeros((), jnp.int32), params, opt_state, health.initial())


def gradient_sums_on(mesh: Mesh, objective: Objective, model: GPT) -> Callable:
    """Run `update.reduced_sums` on a mesh: each part along replica and data sums its own rows.

    Plain jit would reduce every layer's gradient in every microbatch, over the slow links too. With
    those axes manual (shard_map), there is one reduction an update, after the scan.
    """
    # Axes of size 1 stay out: XLA fails on a manual reduction over nothing beside automatic axes.
    manual = tuple(axis for axis in sharding.REDUCED if mesh.shape[axis] > 1)
    sums = partial(_sums_of_part, objective, model, manual)
    if not manual:
        return sums
    rows = P(None, manual)
    return jax.shard_map(
        sums, mesh=mesh, in_specs=(P(), rows, rows, P()), out_specs=P(), axis_names=set(manual)
    )


def _sums_of_part(
    objective: Objective,
    model: GPT,
    manual: tuple,
    params: Any,
    batch: Batch,
    rows: Array,
    key: Array,
) -> tuple:
    # shard_map itself would reduce the gradient of a parameter that is the same in all parts, in
    # each microbatch. It does not for a parameter that is marked as varying between them.
    params, key = jax.lax.pcast((params, key), manual, to="varying")
    with nn.logical_axis_rules(tuple(sharding.rules_within(manual).items())):
        return update.reduced_sums(objective, model, manual, params, batch, rows, key)


def train_step(
    config: Config,
    model: GPT,
    sums: Callable,
    state: State,
    batch: Batch,
) -> tuple[State, dict[str, Array]]:
    """Do one update from a batch [A, M, ...]; sums: what `gradient_sums_on` returned."""
    layout = jax.tree.leaves(batch)[0].shape[:2]
    rows = jnp.arange(layout[0] * layout[1], dtype=jnp.uint32).reshape(layout)
    return update.train_step(config, model, sums, rows, state, batch)


def evaluate_step(model: GPT, params: Any, tokens: Array) -> tuple[Array, Array]:
    """Sum the cross-entropies of each row of tokens [M, T+1], and count them, -1 if it is void."""
    counts = jnp.where(tokens[:, 0] == VOID, -1, (tokens[:, 1:] >= 0).sum(-1))
    with nn.logical_axis_rules(tuple(sharding.RULES.items())):
        return row_losses(model, params, tokens, None), counts


def resolve(config: Config, mesh: Mesh) -> tuple[str, str]:
    """Choose the dtype of matrix products and the attention implementation for the mesh."""
    c, device = config.model, mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", "") or "unknown"
    dtype = c.dtype
    if dtype == "auto":
        # XLA computes bfloat16 products of NVIDIA's GPUs before Ampere (V100, T4) in float32.
        old = (attention.compute_capability(capability) or attention.AMPERE) < attention.AMPERE
        dtype = "float32" if device.platform == "cpu" or old else "bfloat16"
    return dtype, attention.resolve(
        c.attention,
        device.platform,
        config.row_width,
        c.dropout,
        dtype,
        c.head_dim,
        device.device_kind,
        capability,
        bool(c.isolate),
        mesh.shape["context"],
    )


def build_for_use(config: Config, mesh: Mesh, microbatch: int) -> Steps:
    """Build the functions of a trained run for evaluation or sampling, on whatever mesh is here.

    Their parameters have LoRA's changes merged in, as `adapters.restore` returns them.
    """
    sequences = microbatch * sharding.row_shards(mesh)
    # Nothing here trains, so that neither the objective matters nor the dropout rate, which decides
    # which kernels can train.
    documents = config.eval.document_mask if config.objective.name == "text" else None
    sections = {
        "eval": EvalConfig(document_mask=documents),
        "batch": BatchConfig(sequences=sequences, microbatch=microbatch),
        "objective": ObjectiveConfig(),
        "lora": NO_LORA,
        "model": config.model.model_copy(update={"dropout": 0.0}),
    }
    config = config.model_copy(update=sections)
    try:
        resolved = resolve(config, mesh)
    except Mistake:  # the kernel of the machine that trained is not there on this one
        model = config.model.model_copy(update={"attention": "auto"})
        config = config.model_copy(update={"model": model})
        resolved = resolve(config, mesh)
    return build_steps(config, mesh, *resolved)

"""The heart: loss, accumulation, the jitted update and the jitted evaluation.

Shapes: A microbatches, M sequences of a microbatch over all devices, T positions, D embed, V vocab.
Token arrays are [A, M, T+1] int32: inputs are [..., :-1], targets [..., 1:]; -1 is masked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scalegpt import attention, health, sharding
from scalegpt.config import BatchConfig, Config, ModelConfig
from scalegpt.gradients import logsumexp
from scalegpt.layers import constrain
from scalegpt.model import GPT, head_table, logits
from scalegpt.optim import optimizer, schedule, swap_average

# Of a microbatch on a CPU, about: what the backward pass needs of a layer is then still in a cache.
CPU_TOKENS = 1024


@struct.dataclass
class State:
    """What an update changes. `step`: updates made so far."""

    step: Array
    params: Any
    opt_state: Any
    health: health.Health

    def swapped(self) -> "State":
        """As checkpoints hold it: with the weights to evaluate and to use, which optim.average may
        have averaged, in `params`. Twice is as before."""
        params, opt_state = swap_average(self.params, self.opt_state)
        return self.replace(params=params, opt_state=opt_state)


def token_losses(hidden: Array, table: Array, targets: Array, config: ModelConfig) -> Array:
    """Sum of the cross-entropies of each row, [B] float32, from hidden [B, T, D].

    Logits exist for `loss_chunk` positions at a time and are computed again for the gradient, so
    that [B, T, V] never does. Masked targets (-1) count nothing.
    """

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("logsumexp"))
    def part(hidden: Array, targets: Array) -> Array:
        scores = logits(hidden, table, config)
        scores = constrain(scores, "batch", "position", "act_vocab")
        # Not a gather: XLA cannot split one over a vocabulary sharded inside manual axes.
        is_target = jnp.arange(scores.shape[-1]) == targets[..., None]
        right = jnp.where(is_target, scores, 0).sum(-1)
        return jnp.where(targets >= 0, logsumexp(scores) - right, 0).sum(-1)

    (b, t, d), chunk = hidden.shape, config.loss_chunk
    if t <= chunk:
        return part(hidden, targets)
    pad = -t % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1)
    hidden = hidden.reshape(b, -1, chunk, d).swapaxes(0, 1)
    targets = targets.reshape(b, -1, chunk).swapaxes(0, 1)
    first = part(hidden[0], targets[0])
    return jax.lax.scan(lambda c, x: (c + part(*x), None), first, (hidden[1:], targets[1:]))[0]


def row_losses(model: GPT, params: Any, tokens: Array, dropout_keys: Array | None) -> Array:
    """Sum of the cross-entropies of each row of tokens [B, T+1]: [B] float32."""
    inputs, targets = jnp.maximum(tokens[:, :-1], 0), tokens[:, 1:]
    hidden = model.apply({"params": params}, inputs, dropout_keys)
    table = head_table(params)
    losses = partial(token_losses, config=model.config)
    mesh = jax.sharding.get_abstract_mesh()
    split = {a for a in sharding.ROWS if mesh.shape.get(a, 1) > 1} - set(mesh.manual_axes)
    if split != {"fsdp"}:
        return losses(hidden, table, targets)

    # The compiler would reduce the table's gradient over fsdp in every chunk. So each shard of the
    # rows gets the copy that it has anyway as one of its own, and they are summed once.
    shards = mesh.shape["fsdp"]
    copies = jnp.broadcast_to(table, (shards, *table.shape))
    copies = jax.lax.with_sharding_constraint(copies, P("fsdp", sharding.RULES["act_vocab"]))
    hidden, targets = (x.reshape(shards, -1, *x.shape[1:]) for x in (hidden, targets))
    with nn.logical_axis_rules(tuple(sharding.rules_within(sharding.ROWS).items())):
        return jax.vmap(losses)(hidden, copies, targets).reshape(-1)


def accumulate(loss: Callable, params: Any, tokens: Array, rows: Array) -> tuple[Array, Any]:
    """Sums of loss and gradient over the microbatches of tokens [A, M, T+1]; nothing is divided.

    loss: (params, tokens [M, T+1], rows [M]) -> scalar. rows: [A, M] global row numbers.
    """
    gradient = jax.value_and_grad(loss)
    if tokens.shape[0] == 1:
        return gradient(params, tokens[0], rows[0])

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    # From the rows, so that the zero varies over the same manual mesh axes as the gradients; from
    # a parameter, it would gather that parameter.
    zero = jnp.float32(0) * rows[0, 0]
    return jax.lax.scan(add, (zero, jax.tree.map(jnp.zeros_like, params)), (tokens, rows))[0]


def sums(
    config: Config, model: GPT, params: Any, tokens: Array, rows: Array, key: Array
) -> tuple[Array, Any]:
    """`accumulate` for a run: key is the update's, from which each row's dropout key follows."""

    def loss(params: Any, tokens: Array, rows: Array) -> Array:
        keys = None
        if config.model.dropout > 0:
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return row_losses(model, params, tokens, keys).sum()

    return accumulate(loss, params, tokens, rows)


def target_count(tokens: Array) -> Array:
    """Targets of tokens [..., T+1] that count; float32, to be reduced together with gradients."""
    return (tokens[..., 1:] >= 0).sum(dtype=jnp.float32)


def dropout_key(config: Config, step: Array) -> Array:
    """Of all rows of update `step`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.run.seed), 1), step)


def update(
    config: Config, dtype: Any, state: State, total: Array, grads: Any, count: Array
) -> tuple[State, dict[str, Array]]:
    """The optimizer's part, from the sums of loss and gradient over `count` tokens. dtype: of
    matrix products.

    The update is not applied where `health.judge` says so; the step counts all the same.
    """
    share = 1 / jnp.maximum(count, 1)  # divisions would not be fused into their uses
    grads = jax.tree.map(lambda g: g * share, grads)
    tx = optimizer(config.optim, dtype)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    loss, norm = total * share, optax.tree.norm(grads)
    apply, deviation, after = health.judge(config.run, state.health, loss, norm)
    metrics = {
        "train/loss": loss,
        "train/lr": schedule(config.optim)(state.step),
        "train/grad_norm": norm,
        "train/spike": deviation,
        "train/skipped": after.nonfinite + after.spikes,
        "nonfinite": after.nonfinite,
        "norms": health.layer_norms(grads),
    }
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = health.choose(apply, new, (state.params, state.opt_state))
    return State(state.step + 1, params, opt_state, after), metrics


@dataclass(frozen=True)
class Steps:
    """The compiled functions of a run on a mesh, and where their arguments lie.

    init() -> State; train(state, tokens [A, M, T+1]) -> (State, metrics), the old state's buffers
    are reused; evaluate(params, tokens [M, T+1]) -> ([M] sums of cross-entropy, [M] counts).
    metrics: rows of metrics.jsonl, `nonfinite`, and `norms`, the gradient's by `layer_norms`.
    """

    mesh: Mesh
    model: GPT
    layout: tuple[int, int]
    abstract: State
    batch_sharding: NamedSharding
    eval_sharding: NamedSharding
    jit_init: Any
    jit_train: Any
    jit_evaluate: Any

    def init(self) -> State:
        with jax.set_mesh(self.mesh):
            return self.jit_init()

    def train(self, state: State, tokens: Array) -> tuple[State, dict[str, Array]]:
        # jax.set_mesh, not `with mesh`: under the latter sharding constraints silently do nothing.
        with jax.set_mesh(self.mesh):
            return self.jit_train(state, tokens)

    def evaluate(self, params: Any, tokens: Array) -> tuple[Array, Array]:
        with jax.set_mesh(self.mesh):
            return self.jit_evaluate(params, tokens)

    @property
    def abstract_tokens(self) -> jax.ShapeDtypeStruct:
        shape = (*self.layout, self.model.config.block_size + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)

    def lower(self) -> Any:
        """The training step as jax.stages.Lowered, for the machine that the mesh describes."""
        with jax.set_mesh(self.mesh):
            return self.jit_train.lower(self.abstract, self.abstract_tokens)


def build(config: Config, mesh: Mesh, dtype: str, implementation: str) -> Steps:
    """Make the functions of a run; nothing is compiled or put on a device yet.

    dtype and attention implementation: as `resolve` gives them. Raises ValueError when model or
    batch do not fit the mesh.
    """
    sharding.check_divisible(config, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    most = max(1, CPU_TOKENS // config.model.block_size) if on_cpu else None
    layout = sharding.batch_layout(config.batch, mesh, most)
    model = GPT(config.model, jnp.dtype(dtype), implementation)

    def init() -> State:
        # Attention has no parameters, and kernels refuse a batch of one row.
        plain = model.clone(attention="xla")
        root = jax.random.key(config.run.seed)
        params = plain.init(root, jnp.zeros((1, 1), jnp.int32))["params"]
        opt_state = optimizer(config.optim).init(params)
        return State(jnp.zeros((), jnp.int32), params, opt_state, health.initial())

    boxed = jax.eval_shape(init)
    places = sharding.shardings(sharding.specs(boxed, sharding.RULES), mesh)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        nn.unbox(boxed),
        places,
    )

    def reduced_gradients(params: Any, tokens: Array, rows: Array, key: Array) -> tuple:
        """Runs on each (replica, data) part with its own rows; one reduction after the scan."""
        params, key = jax.lax.pcast((params, key), manual, to="varying")
        with nn.logical_axis_rules(tuple(sharding.rules_within(manual).items())):
            total, grads = sums(config, model, params, tokens, rows, key)
        return jax.lax.psum((total, grads, target_count(tokens)), manual)

    # Plain jit would reduce every layer's gradient in every microbatch, over the slow links too.
    # Axes of size 1 stay out: XLA fails on a manual reduction over nothing beside automatic axes.
    manual = tuple(axis for axis in sharding.REDUCED if mesh.shape[axis] > 1)
    gradients = reduced_gradients
    if manual:
        parts = (P(), P(None, manual), P(None, manual), P())
        gradients = jax.shard_map(
            reduced_gradients, mesh=mesh, in_specs=parts, out_specs=P(), axis_names=set(manual)
        )

    def train(state: State, tokens: Array) -> tuple[State, dict[str, Array]]:
        rows = jnp.arange(layout[0] * layout[1], dtype=jnp.uint32).reshape(layout)
        key = dropout_key(config, state.step)
        return update(config, model.dtype, state, *gradients(state.params, tokens, rows, key))

    def evaluate(params: Any, tokens: Array) -> tuple[Array, Array]:
        with nn.logical_axis_rules(tuple(sharding.RULES.items())):
            return row_losses(model, params, tokens, None), (tokens[:, 1:] >= 0).sum(-1)

    replicated = NamedSharding(mesh, P())
    batches, windows = (sharding.batch_sharding(mesh, accumulated) for accumulated in (True, False))
    return Steps(
        mesh, model, layout, abstract, batches, windows,
        jit_init=jax.jit(lambda: nn.unbox(init()), out_shardings=places),
        jit_train=jax.jit(
            train,
            in_shardings=(places, batches),
            out_shardings=(places, replicated),
            donate_argnums=0,
        ),
        jit_evaluate=jax.jit(
            evaluate, in_shardings=(places.params, windows), out_shardings=replicated
        ),
    )  # fmt: skip


def resolve(config: Config, mesh: Mesh) -> tuple[str, str]:
    """(dtype of matrix products, attention implementation) for the devices of the mesh."""
    c, device = config.model, mesh.devices.flat[0]
    dtype = c.dtype
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    return dtype, attention.resolve(
        c.attention, device.platform, c.block_size, c.dropout, dtype, c.head_dim, device.device_kind
    )


def build_for_use(config: Config, mesh: Mesh, microbatch: int) -> Steps:
    """The functions of a trained run for evaluation or sampling, on a mesh of its own."""
    sequences = microbatch * sharding.row_shards(mesh)
    batch = BatchConfig(sequences=sequences, microbatch=microbatch)
    # The dropout rate decides which kernels can train, and nothing here trains.
    model = config.model.model_copy(update={"attention": "auto", "dropout": 0.0})
    config = config.model_copy(update={"batch": batch, "model": model})
    return build(config, mesh, *resolve(config, mesh))

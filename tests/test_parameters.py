"""A parameter that is new is counted, sharded, decayed and trained by Muon without being listed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from scalegpt.config import Config
from scalegpt.model import flops, gpt
from scalegpt.model.layers import project
from scalegpt.model.parameters import Parameter, _parameters, parameters
from scalegpt.planning import memory
from scalegpt.step import build, sharding
from scalegpt.step.optimizer import decay_mask, optimizer
from scalegpt.weights import export, gpt2

L, D, T = 3, 32, 16
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
GATE, GAIN = "h/mlp/gate_kernel", "h/mlp/gain"


class GatedMLP(gpt.MLP):
    """As somebody who adds SwiGLU would write it, with a gain beside it."""

    @nn.compact
    def __call__(self, x, layer, keys):
        d, f = D, 4 * D
        gate = project("btd,df->btf", x, self.weight("gate_kernel", (d, f), ("embed", "mlp"), d))
        x = project("btd,df->btf", x, self.weight("up_kernel", (d, f), ("embed", "mlp"), d))
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("mlp",))
        x = nn.silu(gate) * x * self.param("gain", ones, (f,), jnp.float32)
        return project("btf,fd->btd", x, self.weight("down_kernel", (f, d), ("mlp", "embed")))


@pytest.fixture
def config(monkeypatch) -> Config:
    monkeypatch.setattr(gpt, "MLP", GatedMLP)
    _parameters.cache_clear()
    yield Config(
        model=dict(n_layer=L, n_head=2, n_embd=D, block_size=T, vocab_size=60, vocab_multiple=8),
        mesh=MESH,
        batch=dict(sequences=8),
        data=dict(path=""),
        optim=dict(name="muon", weight_decay=0.1, steps=10),
        run=dict(out_dir="unused"),
    )
    _parameters.cache_clear()


def test_a_new_matrix_is_counted_sharded_decayed_and_muons(config):
    known, model = parameters(config.model), config.model
    assert known[GATE].kind == "matrices" and known[GAIN].kind == "scalars"

    mesh = sharding.make_mesh(config.mesh)
    leaves = flatten_dict(
        build.build_steps(config, mesh, "float32", "xla").abstract.params, sep="/"
    )
    assert known.keys() == leaves.keys()
    padding = 4 * D
    assert flops.parameter_count(model) == sum(x.size for x in leaves.values()) - padding
    on_device = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves.values())
    assert memory.parameters_on_device(model, MESH) == on_device
    layers = {name: L * 4 * D * D for name in ("mlp/gate", "mlp/up", "mlp/down")}
    layers |= {"attn/qkv": L * 3 * D * D, "attn/proj": L * D * D}
    assert flops.parameters_by_component(model).items() >= layers.items()
    weights = sum(layers.values()) + 60 * D  # and the head
    assert flops.flops_per_token(model) == 6 * weights + 6 * L * T * D
    assert memory.checkpoint_bytes(model, config.optim) == (
        12 * flops.parameter_count(model) - 4 * sum(layers.values())
    )

    mask = decay_mask(config.optim, known)(leaves)
    assert mask[GATE] and not mask[GAIN]

    # With the gradient of a matrix that Muon has always known, both move alike.
    gradient = np.random.default_rng(0).normal(size=(L, D, 4 * D)).astype(np.float32)
    params = {"h": {"mlp": {"up_kernel": gradient, "gate_kernel": gradient}}}
    tx = optimizer(config.optim, known)
    update = jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params)["h"]["mlp"]
    np.testing.assert_array_equal(update["gate_kernel"], update["up_kernel"])
    moved = update["up_kernel"] / config.optim.lr + 0.1 * gradient
    values = np.linalg.svd(moved / 2, compute_uv=False)  # 2: the root of fan out / fan in
    assert 0.5 < values.min() and values.max() < 1.3


def test_a_new_matrix_does_not_vanish_from_gpt2s_format(config):
    shapes = {path: np.zeros(x.shape, np.float32) for path, x in parameters(config.model).items()}
    with pytest.raises(AssertionError, match="gate_kernel"):
        export.tensors_of(gpt2.FORMAT, config.model, shapes)


@pytest.mark.parametrize(
    "axes", [("layers", "mlp", "mlp"), ("layers", "rank", "heads", "kv"), ("layers", "norm", "mlp")]
)
def test_a_matrix_that_would_pass_for_a_bias_is_refused(axes):
    with pytest.raises(ValueError, match="do not say what a parameter is: a matrix needs"):
        _ = Parameter((2,) * len(axes), axes).kind

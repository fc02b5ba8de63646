"""What a run is: a frozen, typed configuration in sections; no JAX here."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalegpt.value_types import (
    Amount,
    MeshAxis,
    Name,
    Positive,
    Rate,
    Seconds,
    Share,
    Text,
    Which,
    Whole,
    Width,
    divisors_near,
)

# n_layer, n_head, n_embd of the GPT-2 paper's table 2; the rest is common to all four.
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """The GPT. Defaults are nanoGPT's 124M model; `preset` gives the GPT-2 sizes."""

    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """GPT-2 size: sets n_layer, n_head, n_embd, block_size 1024, bias; other keys override it."""
    n_layer: Annotated[int, Field(ge=1, le=10_000)] = 12
    n_head: Width = 12
    n_embd: Width = 768
    """width of the residual stream"""
    block_size: Positive = 1024
    """context length, in tokens"""
    vocab_size: Positive | None = None
    """number of token ids; taken from the data set when not given"""
    vocab_multiple: Width = 128
    """the embedding table is padded to a multiple of this (50257 -> 50304); the tail is masked"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: bool = False
    """biases in linear layers and LayerNorms (GPT-2: true, nanoGPT: false)"""
    tie_word_embeddings: bool = True
    """the head is the embedding table itself (GPT-2, nanoGPT); false: a table of its own"""
    position: Literal["learned", "rope"] = "learned"
    rope_base: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GPT-2's tanh approximation, or the exact GELU of nanoGPT"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products; auto: bfloat16 on accelerators, float32 on CPU"""
    attention: Literal["auto", "xla", "flax", "cudnn", "splash"] = "auto"
    scan_layers: bool = False
    """compile one layer and loop over it (fast compile), or unroll (fast step on CPU)"""
    remat: Literal["none", "dots", "full"] = "none"
    """what the backward pass recomputes: nothing, all but matrix products, whole layers"""
    loss_chunk: Positive = 128
    """positions whose logits are held at a time, in each sequence"""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and (name := values.get("preset")) in GPT2_SIZES:
            size = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES[name], strict=True))
            values = {**size, "block_size": 1024, "bias": True, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; "
                f"n_head could be {divisors_near(self.n_embd, self.n_head)}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"model.position=rope needs an even head size, n_embd/n_head={self.head_dim}"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        assert self.vocab_size is not None, "the vocabulary is known once the data is open"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1: all devices that are left."""

    replica: MeshAxis = 1
    """whole copies across slices, over the data-centre network"""
    data: MeshAxis = -1
    """copies of the model, each with its own rows"""
    fsdp: MeshAxis = 1
    """shards of parameters and optimizer state, each with its own rows"""
    tensor: MeshAxis = 1
    """shards of heads, MLP width and vocabulary; they share rows"""

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        sizes = self.model_dump()
        if zero := [name for name, size in sizes.items() if size == 0]:
            raise ValueError(f"mesh.{zero[0]}=0: a size is 1 or more, or -1 for what is left")
        if len(free := [name for name, size in sizes.items() if size == -1]) > 1:
            raise ValueError(f"only one mesh axis can be -1, got {', '.join(free)}")
        return self


class BatchConfig(Section):
    sequences: Positive = 480
    """of an optimizer update, over all devices: the run's batch, whatever the machine"""
    microbatch: Positive | None = None
    """sequences a device holds at a time; accumulation follows from it. Default: all at once, on a
    CPU about 2048 tokens"""


class DataConfig(Section):
    path: Text | Annotated[dict[Name, Share], Field(min_length=1)]
    """folder or URL with train.bin, val.bin, meta.json; or a mixture {path: weight, ...}"""
    prepare: bool = False
    """run the folder's prepare.py first when its token files are missing"""
    prefetch: Annotated[int, Field(ge=1, le=1000)] = 2
    """batches read ahead"""
    cache_dir: Name | None = None
    """where files of a URL are staged; default: the user's cache folder"""

    @property
    def weights(self) -> dict[str, float]:
        """Data set -> share of the rows."""
        if isinstance(self.path, str):
            return {self.path: 1.0}
        return {name: w / sum(self.path.values()) for name, w in self.path.items()}


class OptimConfig(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6e-4
    """peak learning rate"""
    min_lr: Amount = 6e-5
    """learning rate at the end of the decay"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """after the warm-up; wsd stays at lr, then falls linearly in the last part"""
    steps: Positive = 600_000
    """optimizer updates of the whole run"""
    warmup_steps: Whole = 2000
    decay_steps: Positive | None = None
    """update at which min_lr is reached; default: steps"""
    cooldown: Rate = 0.2
    """share of decay_steps in which wsd falls"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    weight_decay: Amount = 0.1
    decay: Literal["matrices", "no_embeddings", "all"] = "matrices"
    """what decays: matrices and embeddings (nanoGPT), matrices only, every parameter"""
    grad_clip: Amount = 1.0
    """largest global gradient norm; 0: no clipping"""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        end = self.decay_steps or self.steps
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}; set --optim.min_lr too"
            )
        if self.warmup_steps > end:
            raise ValueError(
                f"optim.warmup_steps={self.warmup_steps} is beyond the end of the decay, "
                f"update {end}; lower it or raise optim.steps"
            )
        return self


class EvalConfig(Section):
    every: Whole = 1000
    """updates between evaluations; 0: only at the end"""
    windows: Positive | None = None
    """evaluate on the first so many windows of val.bin; default: the whole file"""
    tasks: dict[Literal["hellaswag", "lambada", "multiple_choice"], Name] = {}
    """also score these, {task: jsonl file}; see `python -m scalegpt.evaluate --help`"""
    task_examples: Positive | None = None
    """of each task the first so many examples; default: all"""


class CheckpointConfig(Section):
    every: Whole = 1000
    """updates between checkpoints; 0: only at the end. The best one is kept besides"""
    keep: Positive = 2
    """how many of the latest are kept"""
    keep_every: Whole = 0
    """those of every so many updates are kept for good, a multiple of `every`; 0: none"""
    patience: Seconds = 3600.0
    """seconds that training goes on while no checkpoint can be written; then exit code 5"""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of "
                f"checkpoint.every={self.every}"
            )
        return self


class LogConfig(Section):
    every: Positive = 10
    """updates between rows of metrics.jsonl"""
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: Name = "scalegpt"
    wandb_entity: Name | None = None
    wandb_name: Name | None = None
    """default: the name of out_dir"""


class RunConfig(Section):
    out_dir: Name
    """the run's folder; a second start with the same folder continues the run"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    backend: Literal["jit", "pmap"] = "jit"
    """what runs the update; pmap: copies of the whole model, to compare with"""
    init_from: Name | None = None
    """start from the weights of another run (its out_dir), or of Hugging Face: gpt2-xl, a folder"""
    init_checkpoint: Which = "best"
    """which of its checkpoints: best, latest or a step"""
    allow_config_change: bool = False
    """continue although model, batch, data or optimizer differ from the stored run"""
    skip_nonfinite: Whole = 0
    """updates whose loss or gradient is not finite that are left out before the run stops"""
    skip_spikes: bool = False
    """leave out an update whose loss is a spike; otherwise it is only warned of"""
    spike: Share = 10.0
    """a loss so many deviations above the median of the last 128 updates is a spike"""
    replay: Positive | None = None
    """run this update's batch again for a post-mortem: the loss of each example; writes nothing"""
    deadline_start: Seconds = 900.0
    """seconds for each phase of the start: processes, devices, mesh"""
    deadline_data: Seconds = 7200.0
    """of opening the data, maybe copied from a URL; and of waiting for the hosts that still do"""
    deadline_restore: Seconds = 3600.0
    deadline_compile: Seconds = 3600.0
    """of the first update"""
    deadline_step: Seconds = 1800.0
    """of any other, and of its data"""
    deadline_evaluation: Seconds = 7200.0
    deadline_save: Seconds = 1800.0


class DistributedConfig(Section):
    """Where the other processes are; found by itself on TPU pods, Slurm and Open MPI."""

    coordinator: Name | None = None
    """HOST:PORT of process 0"""
    num_processes: Positive | None = None
    process_id: Whole | None = None


class Config(Section):
    """A run."""

    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run: RunConfig
    distributed: DistributedConfig = DistributedConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def with_vocab(self, vocab_size: int) -> "Config":
        """The same run with the vocabulary of its data filled in; an explicit larger one stays."""
        asked = self.model.vocab_size
        if asked is not None and asked < vocab_size:
            raise ValueError(
                f"model.vocab_size={asked} is smaller than the data's {vocab_size} token ids; "
                "leave it out to take the data's"
            )
        model = self.model.model_copy(update={"vocab_size": asked or vocab_size})
        return self.model_copy(update={"model": model})

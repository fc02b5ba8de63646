"""`Config` describes a run: frozen, typed keys in sections; no JAX here."""

import contextlib
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from scalegpt.config.depth import RATES, derived
from scalegpt.config.recipe import LoraConfig, ModelConfig, OptimConfig, following
from scalegpt.config.types import (
    Amount,
    Integer,
    MeshAxis,
    Name,
    Place,
    Positive,
    Seconds,
    Section,
    Share,
    Text,
    Which,
    Whole,
)
from scalegpt.errors import Mistake


class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1: all devices that are left."""

    replica: MeshAxis = 1
    """whole copies across slices, over the data-centre network"""
    data: MeshAxis = -1
    """copies of the model, each with its own rows"""
    fsdp: MeshAxis = 1
    """shards of parameters and optimizer state, each with its own rows"""
    context: MeshAxis = 1
    """shards of each sequence, for long ones, and of parameters and optimizer state"""
    tensor: MeshAxis = 1
    """shards of heads, MLP width and vocabulary; they share rows"""

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        sizes = self.model_dump()
        if zero := [name for name, size in sizes.items() if size == 0]:
            raise Mistake(f"mesh.{zero[0]}=0: a size is 1 or more, or -1 for what is left")
        if len(free := [name for name, size in sizes.items() if size == -1]) > 1:
            raise Mistake(f"only one mesh axis can be -1, got {', '.join(free)}")
        return self


class BatchConfig(Section):
    """The batch of one optimizer update, and how much of it a device computes at a time."""

    sequences: Positive = 480
    """sequences of one optimizer update, over all devices; the same on every machine"""
    microbatch: Positive | None = None
    """sequences a device computes at a time; gradient accumulation follows from it. Default: all of
    the device's at once, on a CPU about 1024 tokens"""
    growth: dict[Positive, Positive] = {}
    """later batches, {update: sequences}: from that update on, each has so many sequences"""

    @model_validator(mode="after")
    def _check(self) -> "BatchConfig":
        if isinstance(self.growth, dict) and 1 in self.growth:  # on a command line it is a text
            raise Mistake("batch.growth begins at update 1, whose batch is batch.sequences")
        return self

    def sequences_at(self, step: int) -> int:
        """Return the sequences of update `step`, which counts from 1."""
        begun = [update for update in self.growth if update <= step]
        return self.growth[max(begun)] if begun else self.sequences

    def rows_after(self, step: int) -> int:
        """Return the sequences of the updates 1 to `step` together."""
        begins = [1, *sorted(update for update in self.growth if update <= step), step + 1]
        return sum(self.sequences_at(a) * (b - a) for a, b in pairwise(begins))


class DataConfig(Section):
    """The data sets that a run trains on, and how they are read."""

    path: Text | Annotated[dict[Name, Share], Field(min_length=1)]
    """folder or URL of a data set (data/README.md); or a mixture {path: weight, ...}"""
    prepare: bool = False
    """make missing token files with scalegpt's data/NAME/prepare.py, where NAME is the folder's"""
    shuffle: Literal["windows", "documents"] = "windows"
    """what each epoch has in a new order: the windows of the file, or also its documents, before
    they are cut into windows; documents need train.idx, which prepare.py writes"""
    shuffle_span: Share | None = None
    """so many tokens, as 1e10, are shuffled among themselves before others come: 16 pieces of the
    text, drawn anew in each epoch; null: windows are shuffled over all of it"""
    pack: Literal["windows", "best_fit"] = "windows"
    """how documents fill the rows of a batch: cut into windows wherever these end, or whole where
    they fit, by best fit"""
    document_mask: bool = False
    """attention stays within a document, positions begin anew with each, and nothing is predicted
    from another one; documents are as train.idx says, else as end-of-text marks do"""
    prefetch: Annotated[Integer, Field(ge=1, le=1000)] = 2
    """batches read ahead"""
    cache_dir: Place | None = None
    """where files of a URL are staged; default: the user's cache folder"""
    disk_limit: Share | None = None
    """GB on the disk for copies of each data set in parts behind a URL: parts are copied when they
    are needed, instead of those unused for longest; null: all are copied before training"""

    @property
    def weights(self) -> dict[str, float]:
        """The share of a batch's rows that each data set gives; the shares sum to 1."""
        if isinstance(self.path, str):
            return {self.path: 1.0}
        return {name: w / sum(self.path.values()) for name, w in self.path.items()}


class ObjectiveConfig(Section):
    """What a run learns from its data."""

    name: Literal["text", "sft", "dpo", "grpo"] = "text"
    """text: every token; sft: the answers in conversations, as data/chat/prepare.py makes them;
    dpo: which of two answers is better, from pairs of them; grpo: answers that the model writes to
    prompts, by a reward"""
    width: Positive | None = None
    """tokens of a sequence, where these are shorter than block_size; follows from the data"""


class DpoConfig(Section):
    """How a run learns from pairs of answers (arXiv:2305.18290), with objective.name=dpo."""

    beta: Share = 0.1
    """how strongly a log-probability that leaves its reference counts; larger stays nearer to it"""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """the share of pairs that may be the wrong way round"""
    chosen_weight: Amount = 0.0
    """adds the chosen answer's cross-entropy, a token's mean, to the loss with this weight"""


class GrpoConfig(Section):
    """Learning from rewards for the model's own answers, as objective.name=grpo has it."""

    reward: Name | None = None
    """what says how good an answer is: exact, in_place, number, last_number, or module:function of
    your own Python, f(example, answer) -> float"""
    prompts: Positive = 16
    """prompts of an update"""
    samples: Annotated[Integer, Field(ge=2, le=100_000)] = 8
    """answers to each prompt, which are compared with each other"""
    max_new_tokens: Positive = 64
    """tokens that an answer may have, with the mark that ends it"""
    temperature: Share = 1.0
    """of the distribution that answers are drawn from and that is learned"""
    divide: Literal["constant", "tokens", "sequences"] = "constant"
    """by what the sum over tokens is divided: answers x max_new_tokens (Dr. GRPO), the update's
    tokens (DAPO), or each answer's own, then the answers (GRPO, which favours long wrong ones)"""
    scale: Literal["none", "group"] = "none"
    """group: rewards are also divided by their deviation within the group (GRPO)"""
    updates: Positive = 1
    """updates from the same answers; with several, the ratio of probabilities is clipped"""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """with updates: a token counts no more once its probability has fallen by this share"""
    clip_high: Share = 0.2
    """with updates: or has risen by this share (DAPO: 0.28)"""
    kl: Amount = 0.0
    """weight of the distance from the weights of run.init_from, which then stay in memory"""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """with kl: how the distance is estimated; k2 has the gradient of the reverse KL divergence"""
    mask_truncated: bool = False
    """leave answers that did not end out of what is learned"""


FileTask = Literal["hellaswag", "lambada", "multiple_choice", "core", "gsm8k"]
GeneratedTask = Literal["reverse", "sort", "add", "spell", "count"]
Task = Literal[FileTask, GeneratedTask]


def _with_their_files(tasks: dict[Task, Name | None]) -> dict[Task, Name | None]:
    for name, file in tasks.items():
        if file is None and name in get_args(FileTask):
            raise Mistake(f"eval.tasks: {name} needs a file, {{{name}: FILE}}")
        if file is not None and name in get_args(GeneratedTask):
            raise Mistake(f"eval.tasks: {name} has no file; write {{{name}: null}}, not {file}")
    return tasks


class EvalConfig(Section):
    """When and on what a run is evaluated."""

    every: Whole = 1000
    """updates between evaluations; 0: only at the start and the end"""
    windows: Positive | None = None
    """evaluate on the first so many windows of val.bin, or pairs; default: the whole file"""
    train_windows: Positive | None = None
    """evaluate on so many windows of train.bin, spread over it: train/eval_loss; default: none"""
    document_mask: bool | None = None
    """evaluate on text with documents kept apart, or without, so that the losses of runs that train
    differently compare; default: as data.document_mask"""
    answers: Whole = 16
    """with conversations: how many held-out prompts are answered, for val/ended; 0: none"""
    sample_every: Whole = 0
    """updates between texts that the model writes, for samples.jsonl and the logs; 0: at the end"""
    sample_prompt: str = ""
    """the text that samples continue, with conversations the question that they answer; by default
    none, they begin anew or answer a held-out question"""
    tasks: Annotated[dict[Task, Name | None], AfterValidator(_with_their_files)] = {}
    """also score these tasks, {task: jsonl file}, core with its folder, or null for one that has no
    file; see `python -m scalegpt.evaluate --help`"""
    task_examples: Positive | None = None
    """how many examples of each task are scored, from its first on; default: all of its file, or
    200"""


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every: Whole = 1000
    """updates between checkpoints; 0: only at the end"""
    keep: Positive = 2
    """how many of the latest checkpoints are kept; the best one is kept, too"""
    keep_every: Whole = 0
    """each checkpoint at a multiple of so many updates is kept for good; 0: none"""
    patience: Seconds = 3600.0
    """seconds that training goes on while no checkpoint can be written; then it ends with code 5"""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise Mistake(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of "
                f"checkpoint.every={self.every}"
            )
        return self


class LogConfig(Section):
    """What a run reports, and where to."""

    every: Positive = 10
    """updates between rows of metrics.jsonl"""
    norms_every: Whole = 0
    """updates between rows with the gradient's norm in each parameter and layer; 0: never"""
    tensorboard: bool = True
    """also write TensorBoard files to out_dir/tensorboard"""
    wandb: bool = False
    """also send the metrics to W&B, offline where there is no account"""
    trackio: bool = False
    """also show the metrics on trackio's local page, which needs no account"""
    wandb_project: Name = "scalegpt"
    """with wandb or trackio: the project's name"""
    wandb_entity: Name | None = None
    """with wandb: the user or team; default: the account's own"""
    wandb_name: Name | None = None
    """with wandb or trackio: the name of the run; default: that of out_dir"""
    wandb_tags: Name | None = None
    """with wandb: tags of the run, with commas between them"""
    report: bool = False
    """write report.html into out_dir when the run ends, as scalegpt.report does"""


_TRUTH = "true t yes y on 1 false f no n off 0".split()  # as pydantic reads a command line


class RunConfig(Section):
    """Where a run is kept, what it starts from, how it treats faults, and its deadlines."""

    out_dir: Place
    """the run's folder; a second start with the same folder continues the run"""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 1337
    """decides the initial weights, the order of the data and dropout"""
    backend: Literal["jit", "pmap"] = "jit"
    """what compiles the update; pmap: a copy of the whole model on each device, for comparison"""
    init_from: Place | None = None
    """start from the weights of another run (its out_dir), or of Hugging Face: gpt2-xl, a folder;
    keys of model that are not given are then those of these weights"""
    init_checkpoint: Which = "best"
    """which checkpoint of init_from's run: best, latest or a step"""
    allow_config_change: bool | list[Name] = False
    """true, or the keys that may differ from the stored run's, as optim.steps,data.path"""
    skip_nonfinite: Whole = 0
    """how many updates with a loss or gradient that is not finite are left out before a stop"""
    skip_spikes: bool = False
    """leave out an update whose loss is a spike; otherwise it is only warned of"""
    spike: Share = 10.0
    """a loss so many deviations above the median of the last 128 updates is a spike"""
    replay: Positive | None = None
    """compute this update's batch again and print the loss of each example; writes nothing"""
    deadline_start: Seconds = 900.0
    """seconds for each phase of the start: processes, devices, mesh"""
    deadline_data: Seconds = 7200.0
    """seconds to open the data, maybe copied from a URL, and to wait for hosts that still do"""
    deadline_restore: Seconds = 3600.0
    """seconds to verify and read a checkpoint, or the weights to start from"""
    deadline_compile: Seconds = 3600.0
    """seconds for the first update, which is compiled"""
    deadline_step: Seconds = 1800.0
    """seconds for any other update, with reading its data"""
    deadline_rollout: Seconds = 1800.0
    """with grpo: seconds for an update's answers to be written"""
    deadline_evaluation: Seconds = 7200.0
    """seconds for an evaluation, for the reference of pairs, or for the sample at the end"""
    deadline_save: Seconds = 1800.0
    """seconds for a checkpoint to be written"""

    @field_validator("allow_config_change", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        """Read keys from a command line, with commas or as a YAML list."""
        if not isinstance(value, str) or value.lower() in _TRUTH:
            return value
        return re.findall(r"[^\s,\[\]'\"]+", value) or value

    def allows(self, key: str) -> bool:
        """Tell whether a run that continues may have another value of `key` than it began with."""
        allowed = self.allow_config_change
        return allowed if isinstance(allowed, bool) else key in allowed


class DistributedConfig(Section):
    """Where the other processes are; found by itself on TPU pods, Slurm and Open MPI."""

    coordinator: Name | None = None
    """HOST:PORT of process 0"""
    num_processes: Positive | None = None
    """how many processes there are"""
    process_id: Whole | None = None
    """which of them this one is, from 0"""


class Config(Section):
    """A run: its model, data, batch, optimizer, and where and how it is trained and kept."""

    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    dpo: DpoConfig = DpoConfig()
    grpo: GrpoConfig = GrpoConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run: RunConfig
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _fill(cls, values: Any, make: Callable[[Any], "Config"]) -> "Config":
        """Fill in keys that follow from other sections: model.depth's, some of Muon's, and the
        batch of rollouts."""
        if not isinstance(values, dict):
            return make(values)
        sections = ("model", "batch", "optim", "objective", "grpo")
        given = {s: values.get(s) for s in sections if s in values}
        if not all(isinstance(keys, dict) for keys in given.values()):
            return make(values)  # validation of that section will report it
        model, objective, batch = (given.get(s, {}) for s in ("model", "objective", "batch"))
        own = {key for key, value in given.get("optim", {}).items() if value is not None}
        by_depth = RATES - own if model.get("depth") is not None else set()
        rolls = objective.get("name") == "grpo" and batch.get("sequences") is None
        if rolls:  # before what follows from model.depth, which has another batch
            with contextlib.suppress(ValidationError):  # which that section will report
                sizes = GrpoConfig.model_validate(values.get("grpo", {}))
                given["batch"] = {**batch, "sequences": sizes.prompts * sizes.samples}
        if model.get("depth") is not None:
            filled = {s: {**given.get(s, {}), **keys} for s, keys in derived(given).items()}
            given = given | filled
        model, optim = given.get("model", {}), given.get("optim", {})
        follows = following(model, optim) if optim.get("name") == "muon" else {}
        if follows:
            given["optim"] = {**optim, **follows}
        config = make({**values, **given})
        config.optim.model_fields_set.difference_update(follows, by_depth)
        if rolls:
            config.batch.model_fields_set.discard("sequences")
        return config

    @model_validator(mode="after")
    def _check_objective(self) -> "Config":
        name = self.objective.name
        if self.objective.width and name not in ("dpo", "grpo"):
            raise Mistake(
                f"objective.width={self.objective.width} is of pairs and of prompts, and follows "
                "from them: leave it out; model.block_size is the length of other sequences"
            )
        for other, section in (("dpo", self.dpo), ("grpo", self.grpo)):
            for key, value in section:
                if name != other and value != type(section).model_fields[key].default:
                    raise Mistake(
                        f"{other}.{key}={value} is read with objective.name={other}, and this run "
                        f"has {name}; leave it out, or set --objective.name={other}"
                    )
        if name == "dpo":
            self._check_dpo()
        if name == "grpo":
            self._check_grpo()
        return self

    def _check_dpo(self) -> None:
        if not self.run.init_from:
            raise Mistake(
                "objective.name=dpo measures how far a model moves from the weights it starts from,"
                " and run.init_from is missing: name a run that answers, --run.init_from=out/sft"
            )
        if self.model.dropout:
            raise Mistake(
                f"model.dropout={self.model.dropout:g}: with objective.name=dpo log-probabilities "
                "are compared with those of a reference, and dropout would be most of the "
                "difference; set --model.dropout=0"
            )

    def _check_grpo(self) -> None:
        grpo, sequences = self.grpo, self.grpo.prompts * self.grpo.samples
        if grpo.reward is None:
            raise Mistake(
                "grpo.reward is missing: it says how good an answer is, as --grpo.reward=exact, "
                "in_place, number, last_number, or module:function of your own"
            )
        if not self.run.init_from:
            raise Mistake(
                "objective.name=grpo makes a model that answers better, and run.init_from is "
                "missing: name a run that answers, --run.init_from=out/sft"
            )
        if self.model.dropout:
            raise Mistake(
                f"model.dropout={self.model.dropout:g}: with objective.name=grpo the model that "
                "learns must be the one that has answered; set --model.dropout=0"
            )
        if self.batch.sequences != sequences:
            raise Mistake(
                f"batch.sequences={self.batch.sequences} is not grpo.prompts={grpo.prompts} x "
                f"grpo.samples={grpo.samples}: leave it out, as it follows from them"
            )
        if self.batch.growth:
            raise Mistake("batch.growth is of fixed batches, and grpo's are grpo.prompts x samples")
        if self.run.skip_spikes:
            raise Mistake(
                "run.skip_spikes=true judges an update by its loss, which with objective.name=grpo "
                "says nothing: leave it out"
            )
        periods = {
            "optim.steps": 0 if self.optim.counts_epochs else self.optim.steps,
            "eval.every": self.eval.every,
            "checkpoint.every": self.checkpoint.every,
        }
        for key, value in periods.items():
            if value % grpo.updates:
                raise Mistake(
                    f"{key}={value} is not a multiple of grpo.updates={grpo.updates}: a run cannot "
                    "continue between two updates from the same answers"
                )

    @model_validator(mode="after")
    def _check_lora(self) -> "Config":
        rank = self.lora.rank
        if rank and not self.run.init_from:
            raise Mistake(
                f"lora.rank={rank} trains a change of weights that are there; set --run.init_from "
                "to a run or to a model such as gpt2-xl"
            )
        if rank and self.optim.name != "adamw":
            source = ", which model.depth chooses," if self.model.depth else ""
            raise Mistake(
                f"optim.name={self.optim.name}{source} is for whole matrices, and lora.rank={rank} "
                "trains two factors of each; set --optim.name=adamw"
            )
        if rank and self.optim.average:
            raise Mistake(
                f"optim.average={self.optim.average} would average the factors that "
                f"lora.rank={rank} trains, not the weights; leave one of them out"
            )
        return self

    @property
    def row_width(self) -> int:
        """The number of targets in a sequence of a batch."""
        return self.objective.width or self.model.block_size

    @property
    def evaluated_model(self) -> ModelConfig:
        """The model by which text is evaluated, with documents apart as eval.document_mask says."""
        apart = self.eval.document_mask
        if apart is None or self.objective.name != "text":
            return self.model
        return self.model.model_copy(update={"isolate": apart or None, "bos": None})

    def examples_after(self, step: int) -> int:
        """Return how many windows, rows or prompts of the data the updates 1 to `step` read."""
        if self.objective.name == "grpo":
            return self.grpo.prompts * -(-step // self.grpo.updates)
        return self.batch.rows_after(step)

    @property
    def goal(self) -> str:
        """What decides which weights are the best: the lowest val/loss, or highest val/reward."""
        return "reward" if self.objective.name == "grpo" else "loss"

    def as_goal(self, loss: float) -> float:
        """Turn what checkpoints keep as a loss into the goal, or back: a reward is its negative."""
        return loss if self.goal == "loss" else 0.0 - loss

    def to_yaml(self) -> str:
        """Return the text of a YAML file that `loading.load` reads as this run."""
        values = self.model_dump()
        if self.optim.counts_epochs:  # the file would say that the default number is given
            values["optim"]["steps"] = None
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def with_vocab(self, vocab_size: int) -> "Config":
        """Return the same run with the data's vocabulary size; an explicit larger one stays."""
        explicit = self.model.vocab_size
        if explicit is not None and explicit < vocab_size:
            raise Mistake(
                f"model.vocab_size={explicit} is smaller than the data's {vocab_size} token ids; "
                "leave it out to take the data's"
            )
        model = self.model.model_copy(update={"vocab_size": explicit or vocab_size})
        return self.model_copy(update={"model": model})

"""Train from Python, `scalegpt.train("demo")`, and use a model: `scalegpt.load("out/demo")`."""

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from scalegpt import train as command
from scalegpt.config import Config, loading
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.run_folder import is_run
from scalegpt.inference.continuation import Continuation, continued, prompt_ids
from scalegpt.inference.decode import Decoder, decoder
from scalegpt.inference.likelihood import token_logits
from scalegpt.inference.results import Figures
from scalegpt.inference.sampling import Sampler
from scalegpt.inference.text_loss import encoded_text, text_evaluator
from scalegpt.processes.exits import Exit
from scalegpt.processes.group import Guest, Left
from scalegpt.run.curves import draw
from scalegpt.run.history import History, read_history, state
from scalegpt.run.metrics import EVAL_KEYS, TRAIN_KEYS
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import trained


def train(config: str | Path | Config | Mapping[str, Any] | None = None, **overrides: Any) -> "Run":
    """Train a model to the end of its run, or continue the run in its folder; return that run.

    config: a YAML file, the name of one in configs/, sections of keys, or a `Config`. overrides:
    keys that win over it, as optim={"steps": 4} or **{"optim.steps": 4}. It is the very loop of
    `python -m scalegpt.train`, in one process on all its devices, and in any thread.

    Ctrl-C, or another signal that the main thread gets, lets the run save and end; then the
    program's own handler has it, which raises KeyboardInterrupt. The same call continues. A second
    one does not wait; nor does the first before there is anything to save. Raises Mistake, and
    RunFailed where the command's exit code would be 4 or 5.

    >>> run = scalegpt.train("configs/demo.yaml", optim={"steps": 4}, run={"out_dir": "out/short"})
    model    ...
    done: best val loss ...
    >>> run
    <scalegpt.Run of out/short: done>
    >>> steps, losses = run.curve("val/loss")
    >>> len(run.load().generate("def ", max_new_tokens=20)) > 0
    True
    """
    if isinstance(config, Config):
        values = loading.given(config)
    else:
        values = dict(config or {}) if isinstance(config, Mapping | None) else loading.load(config)
    sections = {name: keys for name, keys in overrides.items() if "." not in name}
    for name in overrides.keys() - sections.keys():
        section, _, key = name.partition(".")
        sections[section] = {**sections.get(section, {}), key: overrides[name]}
    settings = loading.with_overrides(values, sections, "scalegpt.train")
    guest = Guest()
    try:
        code = command.run(settings, "scalegpt.train(...), from Python", guest)
    except Left:
        raise RunFailed(guest.why) from None
    if code in (Exit.NOT_FINITE, Exit.FAILED):
        raise RunFailed(f"the run in {settings.run.out_dir} did not get to its end; see above why")
    return Run.read(settings.run.out_dir)


class RunFailed(RuntimeError):
    """A run could not go on: its loss is not finite, a deadline passed, or nothing was saved."""


@dataclass(frozen=True, repr=False)
class Run(History):
    """A run as its folder has it: what it has measured, its samples, and its trained model."""

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read a run's folder or bucket, also of a run that is going on. Raises Mistake."""
        return cls(**vars(read_history(folder)))

    def __repr__(self) -> str:
        return f"<scalegpt.Run of {self.name}: {state(self.rows, self.config.optim.steps)}>"

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps [N] and values [N] of a key of metrics.jsonl. Raises Mistake for no key."""
        if key not in (*TRAIN_KEYS, *EVAL_KEYS) and not any(key in row for row in self.rows):
            known = {*TRAIN_KEYS, *EVAL_KEYS, *(key for row in self.rows for key in row)}
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise Mistake(f"no metric {key!r}; {hint}")
        return super().curve(key)

    def dataframe(self) -> Any:
        """Return the metrics as a pandas DataFrame, a row for each step. Raises Mistake."""
        try:
            import pandas
        except ImportError:
            raise Mistake("dataframe needs a package: pip install pandas") from None
        rows: dict[int, dict[str, Any]] = {}
        for row in self.rows:  # those of training, evaluation and time have no key in common
            rows.setdefault(row["step"], {}).update(row)
        columns = list(rows.values()) or {"step": []}
        return pandas.DataFrame(columns).set_index("step").sort_index()

    def plot(self) -> Any:
        """Return a matplotlib figure of the run's curves, which a notebook shows."""
        figure = draw([self])

        def as_png() -> bytes:
            figure.savefig(picture := io.BytesIO(), format="png")
            return picture.getvalue()

        figure._repr_png_ = as_png  # IPython asks for it; it knows only the figures of pyplot
        return figure

    def load(self, checkpoint: str | int | None = None, **options: Any) -> "Model":
        """Load the trained model; as the function `load`."""
        if not self.checkpoints:
            raise Mistake(f"{self.name} has no checkpoint yet")
        return load(self.name, checkpoint, **options)


def load(
    source: str,
    checkpoint: str | int | None = None,
    mesh: dict[str, int] | None = None,
    dtype: str | None = None,
) -> "Model":
    """Load a trained model, ready to write and to judge texts.

    source: the folder or bucket of a run, or a model in Hugging Face's format: a name as "gpt2", or
    a folder. checkpoint: of a run, "best" (the default; before the first evaluation the latest),
    "latest" or a step. mesh: sizes of the mesh's axes, {"data": 1, "fsdp": 4}; by default each
    device has a copy. dtype: of the matrix products, "float32" or "bfloat16". Raises Mistake.

    >>> model = scalegpt.load("out/demo")
    >>> text = model.generate("def ", max_new_tokens=20)
    >>> loss = model.loss("def main():")
    """
    asked = {"mesh": mesh or {}, "model": {"dtype": dtype or "auto"}}
    grid = make_mesh(loading.validate_sections(asked, "scalegpt.load").mesh)
    if is_run(source):
        which = None if checkpoint is None else str(checkpoint)
        trained.check_checkpoint(which)
        return Model(trained.from_run(source, which, grid, 1, dtype))
    if checkpoint is not None:
        raise Mistake(f"checkpoint={checkpoint} is of a run, and {source} is none")
    try:
        return Model(trained.from_hugging_face(source, grid, 1, dtype))
    except Mistake as error:
        raise Mistake(
            f"{source} is not the folder of a run, and as another model: {error}"
        ) from None


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model writes texts and says how likely a text is.

    Every process of a run must make the same calls.
    """

    trained: trained.Trained
    _decoders: dict[Sampler, Decoder] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        of = self.trained
        step = "" if of.step is None else f", step {of.step}"
        return f"<scalegpt.Model of {of.name}{step}: {of.steps.parameters:,} parameters>"

    @property
    def config(self) -> Config:
        """The configuration of the run, or one made from Hugging Face's."""
        return self.trained.config

    @property
    def params(self) -> Any:
        """The parameters, a nested dictionary of arrays on the mesh."""
        return self.trained.params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises Mistake for a model that came without one."""
        return self.trained.codec()

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int = 200,
        *,
        seed: int = 1337,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        **sampling: float,
    ) -> str | list[str] | Iterator[str]:
        """Return what the model writes after a prompt, or after each of several: a str or a list.

        stop: a text, or texts, before which the writing ends. stream: return an iterator over the
        pieces of one text instead, as they are written. sampling: temperature (0.8; 0 is greedy),
        top_k, top_p, min_p, repetition_penalty and prompt_lookup, as of `Sampler`. Raises Mistake.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if stream and not isinstance(prompt, str):
            raise Mistake("stream=True is of one prompt, not of a list")
        if max_new_tokens < 1 or not prompts:
            raise Mistake(f"max_new_tokens={max_new_tokens} and the prompts must be at least 1")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise Mistake("stop='' would end every text before it begins; give some text")
        if unknown := set(sampling) - {field.name for field in fields(Sampler)}:
            raise Mistake(f"there is no option {', '.join(sorted(unknown))} of sampling")
        codec, write = self.tokenizer, self._decoder(Sampler(**sampling))
        ids = [prompt_ids(codec, text) for text in prompts]
        texts = continued(write, codec, ids, max_new_tokens=max_new_tokens, seed=seed, stops=stops)
        if stream:
            return _pieces(texts)
        *_, written = texts
        return written[0].text if isinstance(prompt, str) else [x.text for x in written]

    def _decoder(self, sampler: Sampler) -> Decoder:
        """Return the decoder of the last call where the sampler is the same: it is compiled."""
        if sampler not in self._decoders:
            self._decoders.clear()  # each holds a copy of the parameters
            steps, size = self.trained.steps, self.tokenizer.vocab_size
            self._decoders[sampler] = decoder(steps, self.params, sampler, size)
        return self._decoders[sampler]

    def loss(self, text: str) -> float:
        """Return the mean cross-entropy of a text, in nats a token; its perplexity is exp of that.

        The text is read in windows of block_size tokens. Raises Mistake for one without a target.
        """
        return self._figures(text)["loss"][0]

    def bits_per_byte(self, text: str) -> float:
        """Return the same per UTF-8 byte, in bits, so that models of other tokenizers compare."""
        figures = self._figures(text)
        if "bits_per_byte" not in figures:
            raise Mistake("the ids of this tokenizer stand for no text, which has no bytes")
        return figures["bits_per_byte"][0]

    def _figures(self, text: str) -> Figures:
        split = encoded_text(text, self.tokenizer, "the text")
        evaluate, _ = text_evaluator(self.trained.steps, [split], [1.0], None, shown=False)
        return evaluate(self.params)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the logits [T, V] float32 after each of `ids` [T], at most block_size of them."""
        ids, config = np.asarray(ids, np.int32), self.config.model
        if ids.ndim != 1 or not 0 < len(ids) <= config.block_size:
            raise Mistake(f"ids of shape {ids.shape} must be 1 to block_size={config.block_size}")
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise Mistake(f"ids must be from 0 to {config.vocab_size - 1}")
        return token_logits(self.trained.steps, self.params, ids)


def _pieces(texts: Iterator[list[Continuation]]) -> Iterator[str]:
    written = ""
    for (text,) in texts:
        if piece := text.text[len(written) :]:
            yield piece
        written = text.text

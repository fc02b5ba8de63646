"""Use a trained model from Python: `scalegpt.load("out/demo").generate("def ")`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from scalegpt.config import Config
from scalegpt.config.loading import validate_sections
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.run_folder import is_run
from scalegpt.inference.continuation import Continuation, continued, prompt_ids
from scalegpt.inference.decode import Decoder, decoder
from scalegpt.inference.likelihood import token_logits
from scalegpt.inference.sampling import Sampler
from scalegpt.inference.text_loss import encoded_text, text_evaluator
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import trained


def load(
    source: str,
    checkpoint: str | int | None = None,
    mesh: dict[str, int] | None = None,
    dtype: str | None = None,
) -> "Model":
    """Load a trained model, ready to write and to judge texts.

    source: the folder or bucket of a run, or a model in Hugging Face's format: a name as "gpt2", or
    a folder. checkpoint: of a run, "best" (the default), "latest" or a step. mesh: sizes of the
    mesh's axes, {"data": 1, "fsdp": 4}; by default each device has a copy. dtype: of the matrix
    products, "float32" or "bfloat16". Raises Mistake.

    >>> model = scalegpt.load("out/demo")                       # doctest: +SKIP
    >>> model.generate("def ", max_new_tokens=20)               # doctest: +SKIP
    'write_bytes(self, path)'
    """
    asked = {"mesh": mesh or {}, "model": {"dtype": dtype or "auto"}}
    grid = make_mesh(validate_sections(asked, "scalegpt.load").mesh)
    if is_run(source):
        which = "best" if checkpoint is None else str(checkpoint)
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
        stop: Sequence[str] = (),
        stream: bool = False,
        **sampling: float,
    ) -> str | list[str] | Iterator[str]:
        """Return what the model writes after a prompt, or after each of several: a str or a list.

        stop: texts before which the writing ends. stream: return an iterator over the pieces of one
        text instead, as they are written. sampling: temperature (0.8; 0 is greedy), top_k, top_p,
        min_p and repetition_penalty, as of `Sampler`. Raises Mistake.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if stream and not isinstance(prompt, str):
            raise Mistake("stream=True is of one prompt, not of a list")
        if max_new_tokens < 1 or not prompts:
            raise Mistake(f"max_new_tokens={max_new_tokens} and the prompts must be at least 1")
        if unknown := set(sampling) - {field.name for field in fields(Sampler)}:
            raise Mistake(f"there is no option {', '.join(sorted(unknown))} of sampling")
        codec, write = self.tokenizer, self._decoder(Sampler(**sampling))
        ids = [prompt_ids(codec, text) for text in prompts]
        texts = continued(
            write, codec, ids, max_new_tokens=max_new_tokens, seed=seed, stops=tuple(stop)
        )
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
        split = encoded_text(text, self.tokenizer, "the text")
        evaluate, _ = text_evaluator(self.trained.steps, [split], [1.0], None, shown=False)
        return evaluate(self.params)["loss"][0]

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

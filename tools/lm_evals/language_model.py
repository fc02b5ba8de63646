"""The language model that lm-evaluation-harness asks: a trained model of ours.

What the harness decides is left to it: which ids are the context and which the continuation, and
the windows of a text that is longer than block_size.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from scalegpt.data import templates
from scalegpt.data.chat import pieces
from scalegpt.errors import Mistake
from scalegpt.inference.continuation import continuations
from scalegpt.inference.decode import Decoder, batches, decoder
from scalegpt.inference.likelihood import row_of, scorer
from scalegpt.inference.results import progress
from scalegpt.inference.sampling import Sampler
from scalegpt.processes import startup
from scalegpt.weights.trained import Trained

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Of Hugging Face's generate: what these ask for is what is done anyway.
_WITHOUT_EFFECT = {"do_sample": (True, False), "num_beams": (1,)}


class LanguageModel(TemplateLM):
    """A language model answers lists of requests; all processes of a run must be asked together.

    chat: whether prompts are conversations, whose marks are spelt as `<|user|>` in them. seed: of
    answers that are drawn. cut: how many contexts have lost their beginning, of how many `asked`.
    """

    def __init__(self, model: Trained, seed: int, chat: bool) -> None:
        super().__init__()
        self.model, self.codec, self.seed = model, model.codec(), seed
        self.cut = self.asked = 0
        if chat and not self.codec.chats:
            raise Mistake(
                f"--apply-chat-template: the tokenizer of {model.name} has no marks of a chat, so "
                "that it has not learned to answer in one; leave the flag out"
            )
        if chat:
            self.codec = templates.with_end(self.codec)
        self._marks = self.codec.spelt if chat else None
        self._score = scorer(model.steps)
        self._write: Decoder | None = None

    @property
    def eot_token_id(self) -> int:
        """The id that stands for an empty context."""
        if self.codec.begin is None:
            raise Mistake(
                f"a context is empty, and tokenizer {self.codec.name} has no end-of-text mark to "
                "take its place; leave this task out"
            )
        return self.codec.begin

    @property
    def max_length(self) -> int:
        return self.model.config.model.block_size

    @property
    def tokenizer_name(self) -> str:
        return self.codec.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if self._marks and self.codec.template and self.codec.encode_special:
            return self.codec.encode_special(string)
        parts = self._marks.split(string) if self._marks else [string]
        first = self.codec.bos  # which conversations spell
        alone = first is None or self._marks or add_special_tokens is False
        ids = [[] if alone else [first], self.codec.encode(parts[0]).tolist()]
        for mark, text in zip(parts[1::2], parts[2::2], strict=True):
            ids += [[self.codec.special[mark]], self.codec.encode(text).tolist()]
        return sum(ids, [])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Spell a conversation; without a prompt for an answer, the last message goes on."""
        if self.codec.template:
            text = templates.rendered(self.codec, chat_history, add_generation_prompt)
            if add_generation_prompt:
                return text
            last = chat_history[-1]["content"]
            last = last if last in text else last.strip()
            return text[: text.rindex(last) + len(last)]
        parts = [f"<|{mark}|>" if mark else text for mark, text, _ in pieces(chat_history)]
        return "".join([*parts, "<|assistant|>"] if add_generation_prompt else parts[:-1])

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows, block = [], self.max_length
        for texts, context, continuation in requests:
            # White space alone has moved from the context to the continuation.
            context = context or [self.eot_token_id]
            rows.append(row_of(context, continuation, block, texts[1] if texts else ""))
            self.cut += len(context) + len(continuation) > block + 1
        self.asked += len(rows)
        _refuse_other_requests([row.ids for row in rows])
        sums, greedy = self._score(self.model.params, rows, "log-likelihoods")
        if not np.isfinite(sums).all():
            raise Mistake(
                f"a log-likelihood of {self.model.name} is not finite: its weights are broken"
            )
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows, texts = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(number)
        sums = [total for total, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(texts, sums, minlength=len(requests)).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context to one of the strings `until`, an end of text or max_gen_toks.

        Each has a seed of its own, so that no text depends on those it is written together with.
        """
        found, alike = [""] * len(requests), dict[str, list[int]]()
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for options, numbers in alike.items():
            sampler, new_tokens, stops = self.generation(json.loads(options))
            prompts = [self._prompt(requests[i].args[0], new_tokens) for i in numbers]
            _refuse_other_requests(prompts)
            write, size = self._decoder(sampler), self.model.steps.layout[1]
            with progress("answers", len(prompts), "answer") as bar:
                for batch in batches(prompts, size):
                    rows = [*batch, *[batch[0]] * (size - len(batch))]  # all of one size
                    texts = continuations(
                        write,
                        self.codec,
                        [prompts[i] for i in rows],
                        max_new_tokens=new_tokens,
                        seed=[(self.seed + numbers[i]) % 2**32 for i in rows],
                        stops=stops,
                    )
                    for i, text in zip(batch, texts, strict=False):
                        found[numbers[i]] = text.text
                    bar.update(len(batch))
        return found

    def generation(self, options: dict[str, Any]) -> tuple[Sampler, int, list[str]]:
        """Return what a task's generation_kwargs ask for: sampler, most new tokens, stop strings.

        Raises Mistake for what is not known, and for more tokens than fit.
        """
        known = dict(normalize_gen_kwargs(options))
        stops, new_tokens = known.pop("until"), known.pop("max_gen_toks")
        given = {name: known.pop(name) for name in _SAMPLING if known.get(name) is not None}
        for name, value in known.items():
            if value is not None and value not in _WITHOUT_EFFECT.get(name, ()):
                raise Mistake(
                    f"generation_kwargs {name}={value!r} is not known here; known are until, "
                    f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
                )
        if not 0 < new_tokens < self.max_length:
            raise Mistake(
                f"generation_kwargs max_gen_toks={new_tokens} leaves no room for a context within "
                f"block_size={self.max_length}; give fewer: --gen-kwargs max_gen_toks="
                f"{max(1, self.max_length // 4)}"
            )
        sampler = Sampler(**{"temperature": 0.0, "top_k": 0, **given})
        return sampler, new_tokens, [stop for stop in stops if stop]

    def _prompt(self, context: str, new_tokens: int) -> np.ndarray:
        ids, room = self.tok_encode(context) or [self.eot_token_id], self.max_length - new_tokens
        self.asked += 1
        self.cut += len(ids) > room
        return np.array(ids[-room:], np.int32)

    def _decoder(self, sampler: Sampler) -> Decoder:
        if self._write is None or self._write.sampler != sampler:
            steps, params = self.model.steps, self.model.params
            self._write = decoder(steps, params, sampler, self.codec.vocab_size)
        return self._write


def _refuse_other_requests(ids: list[np.ndarray]) -> None:
    """Raise Mistake, in all processes, if they would not compute the same: they would wait."""
    digest = hashlib.sha256(b" ".join(x.tobytes() for x in ids)).hexdigest()[:16]
    startup.same_everywhere({"requests of the tasks": f"{len(ids)}, SHA-256 {digest}"})

"""Held-out prompts are answered while a run learns from conversations: do its answers end?

An answer that never ends is the first sign of a template or a mask that is wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scalegpt.data.packing import PackedRows, end_id
from scalegpt.inference.decode import Decoder, decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.step.build import Steps


def for_any_parameters(steps: Steps, sampler: Sampler, vocab_size: int) -> Callable[[Any], Decoder]:
    """Return a function from parameters to a decoder for them, which is compiled once."""
    kept = list[Decoder]()

    def decoder_for(params: Any) -> Decoder:
        if kept:
            decode = kept[0].with_params(params)
        else:
            decode = decoder(steps, params, sampler, vocab_size)
        # Between two evaluations there is no second copy of the parameters.
        kept[:] = [decode.with_params(None)]
        return decode

    return decoder_for


def held_out(split: PackedRows, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the first `count` conversations of a file, each as its first prompt and what follows.
    Of pairs these are the chosen ones.

    A prompt ends with the mark of the answer, which is read; the answer's text is predicted.
    """
    places = sorted(zip(split.starts.tolist(), split.lengths.tolist(), strict=True))
    places = places[:: split.together][:count]
    talks = [split.tokens[start : start + length] for start, length in places]
    begins = [int(np.argmax(ids >= 0)) for ids in talks]
    return [(~ids[:begin], ids[begin:]) for ids, begin in zip(talks, begins, strict=True)]


def ended_share(
    steps: Steps, splits: Sequence[PackedRows], vocab_size: int, count: int
) -> Callable[[Any], float] | None:
    """Return a function from parameters to the share of greedy answers that end; None for none.

    The prompts are `held_out` ones of each split, where that leaves an answer half of block_size.
    It may have twice the tokens of the longest of their answers. vocab_size: the tokenizer's. Every
    process of a run must call the function together.
    """
    block, end = steps.model.config.block_size, end_id(vocab_size)
    talks = [talk for split in splits for talk in held_out(split, count)]
    talks = [(prompt, answer) for prompt, answer in talks if len(prompt) <= block // 2]
    if not talks:
        return None
    prompts, answers = zip(*talks, strict=True)
    longest = max(int(np.argmax(answer == end)) + 1 for answer in answers)
    new_tokens = min(2 * longest, block + 1 - max(map(len, prompts)))
    decoder_for = for_any_parameters(steps, Sampler(temperature=0), vocab_size)

    def share(params: Any) -> float:
        decode = decoder_for(params)
        ended = np.zeros(len(prompts), bool)
        for ids in decode.ids(prompts, new_tokens):
            ended |= ids == end
            if ended.all():
                break
        return float(ended.mean())

    return share

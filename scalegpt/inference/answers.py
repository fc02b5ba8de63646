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


def ended_share(
    steps: Steps, splits: Sequence[PackedRows], vocab_size: int, count: int
) -> Callable[[Any], float] | None:
    """Return a function from parameters to the share of greedy answers that end; None for none.

    The prompts are what comes before the first answer in the first `count` conversations of each
    split, where that is at most half of block_size. An answer may have twice the tokens of their
    longest. vocab_size: the tokenizer's. Every process of a run must call the function together.
    """
    block, end = steps.model.config.block_size, end_id(vocab_size)
    prompts, longest = list[np.ndarray](), 1
    for split in splits:
        places = sorted(zip(split.starts.tolist(), split.lengths.tolist(), strict=True))
        talks = [split.tokens[start : start + length] for start, length in places[:count]]
        for ids in talks:
            begin = int(np.argmax(ids >= 0))  # the answer's mark is not predicted, its text is
            if begin <= block // 2:
                prompts.append(~ids[:begin])
                longest = max(longest, int(np.argmax(ids[begin:] == end)) + 1)
    if not prompts:
        return None
    new_tokens = min(2 * longest, block + 1 - max(map(len, prompts)))
    kept = list[Decoder]()

    def share(params: Any) -> float:
        if kept:  # so that nothing is compiled again
            decode = kept[0].with_params(params)
        else:
            decode = decoder(steps, params, Sampler(temperature=0), vocab_size)
        # Between two evaluations there is no second copy of the parameters.
        kept[:] = [decode.with_params(None)]
        ended = np.zeros(len(prompts), bool)
        for ids in decode.ids(prompts, new_tokens):
            ended |= ids == end
            if ended.all():
                break
        return float(ended.mean())

    return share

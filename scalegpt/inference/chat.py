"""A conversation becomes a prompt that fits the model, and the model's answer."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

from scalegpt.data.chat import encode_prompt
from scalegpt.data.conversations import Message
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.inference.continuation import Continuation, continued
from scalegpt.inference.decode import Decoder

ROOM = 16  # tokens that an answer has at least


class TooLong(Mistake):
    """A question leaves no room for an answer."""


def prompt_that_fits(
    codec: Tokenizer, messages: Sequence[Message], block_size: int, answered: int = 0
) -> tuple[np.ndarray, int]:
    """Return the ids of a conversation to be answered, and how many messages had to be left out.

    The oldest turns are left out, each a question with its answer; a system message stays.
    answered: tokens that there are of the answer, beside which there must be room for more. Raises
    TooLong where the last question alone leaves no room for an answer.
    """
    need = ROOM + answered
    n_system = sum(message["role"] == "system" for message in messages[:1])
    questions = [i for i, m in enumerate(messages) if m["role"] == "user" and i > n_system]
    begins = [n_system, *questions]

    def prompt(begin: int) -> np.ndarray:
        return encode_prompt(codec, [*messages[:n_system], *messages[begin:]])

    # The first that fits; the last question is tried in any case.
    first = bisect_left(begins[:-1], True, key=lambda i: len(prompt(i)) <= block_size - need)
    ids = prompt(begins[first])
    if len(ids) > block_size - need:
        raise TooLong(
            f"the message has {len(ids)} tokens with its marks"
            f"{' and the system message' * n_system}; the model reads block_size={block_size}, of "
            f"which an answer needs {need}: shorten it"
        )
    return ids, begins[first] - n_system


def answer(
    write: Decoder, codec: Tokenizer, prompt: np.ndarray, max_new_tokens: int, seed: int
) -> Iterator[Continuation]:
    """Yield the answer after each of its tokens, one object that grows, until its end mark.

    It ends at block_size at the latest: an answer does not push its own question out of sight.
    """
    room = write.steps.model.config.block_size - len(prompt)
    texts = continued(write, codec, [prompt], max_new_tokens=min(max_new_tokens, room), seed=seed)
    for (text,) in texts:
        yield text

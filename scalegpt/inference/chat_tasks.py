"""Tasks for a model that answers: it writes an answer to each prompt, which is right or not.

They are asked in a conversation, in the template that the model was trained with:
gsm8k            question and answer, a file as published
reverse, sort, add, spell, count
                 words and numbers that data/tasks/prepare.py keeps for tests; without a file
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config import EvalConfig
from scalegpt.data import asked, conversations, generated, rewards, tokenizer
from scalegpt.data.chat import content_of, encode_conversation, encode_prompt, spoken
from scalegpt.data.prompts import Example
from scalegpt.data.token_files import Dataset
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake, counted
from scalegpt.inference.answers import for_any_parameters
from scalegpt.inference.decode import Decoder, batches
from scalegpt.inference.results import Figures, mean, progress
from scalegpt.inference.sampling import Sampler
from scalegpt.step.build import Steps

COUNT = 200  # examples of a generated task, where nothing else is asked for
NAMES = ("gsm8k", *generated.TASKS)
# Names of figures before "pass@1", which answers count as right, and what of them is voted on.
_REWARDS = {
    "gsm8k": {
        "": (rewards.number, rewards.stated),
        "flexible_": (rewards.last_number, rewards.last),
    }
}
_EXACT = {"": (rewards.exact, str.strip)}


@dataclass(frozen=True)
class ChatTask:
    """A task is a list of examples with the ids of their prompts.

    new_tokens: how many an answer may have, twice as many as the longest of the right answers.
    """

    name: str
    examples: list[Example]
    ids: list[np.ndarray]
    new_tokens: int

    @property
    def count(self) -> int:
        return len(self.examples)


def open_task(
    name: str, path: str | None, codec: Tokenizer, block_size: int, limit: int | None = None
) -> ChatTask:
    """Make or read a task, or its first `limit` examples, as prompts for a model.

    Raises Mistake for a tokenizer without marks of a chat, a row that is no example, and a prompt
    that leaves no room for an answer.
    """
    if not codec.chats:
        raise Mistake(
            f"the task {name} is asked in a conversation, and the model has not learned to answer "
            "in one: its tokenizer has no marks for it. See data/chat/prepare.py, configs/sft.yaml"
        )
    if path is None:
        made = generated.examples(name, 0, limit or COUNT, "test")
        rows = [(f"example {i} of {name}", x, x["answer"]) for i, x in enumerate(made, 1)]
    else:
        rows = _gsm8k(path, limit)
    examples, prompts, longest = [], [], 0
    for place, example, written in rows:
        whole = [*example["messages"], {"role": "assistant", "content": written}]
        try:
            prompt = encode_prompt(codec, example["messages"])
            if codec.template:
                size = len(codec.encode(spoken(written))) + 1
            else:
                size = len(encode_conversation(codec, whole)) - len(prompt)
            longest = max(longest, size)
        except Mistake as error:
            raise Mistake(f"{place}: {error}") from None
        if len(prompt) > block_size:
            raise Mistake(
                f"{place}: the prompt has {len(prompt)} tokens, which leave no room for an answer "
                f"within block_size={block_size}: leave it out, or take another model"
            )
        examples.append(example)
        prompts.append(prompt)
    return ChatTask(name, examples, prompts, 2 * longest)


def refuse_seen(task: ChatTask, codec: Tokenizer, datasets: Sequence[Dataset]) -> None:
    """Raise Mistake for a task of a file whose questions one of the data sets trains on."""
    if task.name in generated.TASKS:  # no word of a test is trained on
        return
    questions = [example["messages"][-1]["content"] for example in task.examples]
    for dataset in datasets:
        if found := asked.seen(codec, questions, dataset):
            raise Mistake(
                f"{len(found):,} of {counted(task.count, 'question')} of {task.name} are trained "
                f"on in the data set {dataset.name}, the first {found[0][:60]!r}, so that figures "
                "would be of what is known by heart: take another file, or leave them out"
            )


def _gsm8k(path: str, limit: int | None) -> list[tuple[str, Example, Any]]:
    """Return place, example and the right answer in full of each row. Raises Mistake."""
    rows = []
    for line, text in conversations.rows(Path(path)):
        place = f"{path}, line {line}, is no example of gsm8k"
        try:
            row = conversations.parse(text)
            *messages, answer = conversations.messages_of(row, "question")
            if rewards.last(row["answer"]) is None:
                raise Mistake("its answer has no number")
        except Mistake as error:
            raise Mistake(f"{place}: {error}") from None
        rows.append((place, {"messages": messages, "answer": row["answer"]}, answer["content"]))
        if len(rows) == limit:
            break
    if not rows:
        raise Mistake(f"{path} is empty")
    return rows


def answers(
    write: Decoder,
    codec: Tokenizer,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    what: str = "",
    check_stop: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Return the ids of the answer to each prompt, with the end mark if it was written.

    Prompts of about one length are answered together, and each answer ends at block_size at the
    latest. Greedy ones depend neither on microbatch nor on mesh, but for rounding. what: the
    progress bar's label, "" for none. check_stop: called before each batch. Every process of a run
    must call this together.
    """
    block, batch = write.steps.model.config.block_size, write.steps.layout[1]
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    with progress(what, len(prompts), "answer") as bar:
        for number, indices in enumerate(batches(prompts, batch)):
            check_stop()
            rows = [prompts[i] for i in indices]
            rows += [rows[0]] * (batch - len(rows))  # so that all batches are of one size
            most = min(new_tokens, block + 1 - min(map(len, rows)))
            ids, ended = [], np.zeros(len(rows), bool)
            for new in write.ids(rows, most, number, codec):
                ids.append(new)
                ended |= np.isin(new, [*codec.ends])
                if ended.all():
                    break
            for i, row in zip(indices, np.stack(ids, 1), strict=False):
                row = row[: block + 1 - len(prompts[i])]
                ends = np.isin(row, [*codec.ends])
                found[i] = row[: np.argmax(ends) + 1] if ends.any() else row
            bar.update(len(indices))
    return found


def pass_at(k: int, n: int, correct: int) -> float:
    """Return the chance that one of k answers, drawn from n of which some are correct, is correct.

    It has no bias (Chen et al., arXiv:2107.03374, section 2.1).
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def _winner(votes: list[Any], right: list[bool]) -> bool:
    """Tell whether the most frequent vote is right; None is no vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    return bool(counts) and right[votes.index(max(counts, key=counts.get))]


def figures(task: ChatTask, codec: Tokenizer, found: list[np.ndarray], samples: int) -> Figures:
    """Compute the task's figures from `samples` answers to each prompt, one after the other.

    pass@k for k = 1, 2, 4 ... up to samples; of several, maj@samples, the share of examples whose
    most frequent answer is right, the first of equals; the share of answers that ended; and their
    mean length in tokens, end marks not counted. Standard errors are over examples.
    """
    ended = np.array([not codec.ends.isdisjoint(ids) for ids in found]).reshape(-1, samples)
    size = np.array([len(ids) for ids in found]).reshape(-1, samples) - ended
    texts = [spoken(content_of(codec, ids)) for ids in found]
    repeated = [example for example in task.examples for _ in range(samples)]
    row: Figures = {}
    for prefix, (reward, vote) in _REWARDS.get(task.name, _EXACT).items():
        right = [reward(x, text) == 1 for x, text in zip(repeated, texts, strict=True)]
        correct = np.array(right).reshape(-1, samples).sum(1).tolist()
        for k in (1 << i for i in range(samples.bit_length())):
            row[f"{prefix}pass@{k}"] = mean([pass_at(k, samples, c) for c in correct])
        if samples > 1:
            votes, groups = [*map(vote, texts)], range(0, len(texts), samples)
            won = [_winner(votes[i : i + samples], right[i : i + samples]) for i in groups]
            row[f"{prefix}maj@{samples}"] = mean(won)
    return row | {"ended": mean(ended.mean(1)), "length": mean(size.mean(1))}


def run(
    task: ChatTask,
    write: Decoder,
    codec: Tokenizer,
    samples: int = 1,
    shown: bool = False,
    check_stop: Callable[[], None] = lambda: None,
) -> Figures:
    """Have a task answered and compute its figures; shown: with a progress bar."""
    prompts = [prompt for prompt in task.ids for _ in range(samples)]
    what = task.name if shown else ""
    found = answers(write, codec, prompts, task.new_tokens, what, check_stop)
    return figures(task, codec, found, samples)


def in_training(
    config: EvalConfig,
    datasets: Sequence[Dataset],
    steps: Steps,
    check_stop: Callable[[], None],
) -> Callable[[Any], dict[str, float]]:
    """Return a function from parameters to the figures of eval.tasks here, such as sort/pass@1.

    Answers are greedy. check_stop: called before each batch. Raises Mistake as `open_task`, and for
    questions that are trained on.
    """
    files = {name: path for name, path in config.tasks.items() if name in NAMES}
    if not files:
        return lambda params: {}
    codec, block_size = tokenizer.load(datasets[0].tokenizer), steps.model.config.block_size
    opened = [
        open_task(name, path, codec, block_size, config.task_examples)
        for name, path in files.items()
    ]
    for task in opened:
        refuse_seen(task, codec, datasets)
    decoder_for = for_any_parameters(steps, Sampler(temperature=0), codec.vocab_size)

    def evaluate(params: Any) -> dict[str, float]:
        row, write = {}, decoder_for(params)
        for task in opened:
            scores = run(task, write, codec, check_stop=check_stop)
            row |= {f"{task.name}/{key}": value for key, (value, _) in scores.items()}
        return row

    return evaluate

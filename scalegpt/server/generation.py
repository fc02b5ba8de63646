"""One thread owns JAX and writes all texts, a token of each in turn.

Requests come from the server's event loop, and each takes its tokens back by a function that may be
called from here. Who no longer wants a text says so, and its slot is free after a token.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from scalegpt.data.calculator import Results
from scalegpt.inference.continuation import Continuation
from scalegpt.inference.sampling import Sampler
from scalegpt.server.slots import Drawn, Slots

MOST_WAITING = 32


class Written(NamedTuple):
    """A token of a text: what it adds that no later token can change, and why the text has ended,
    as in `Continuation`."""

    text: str
    drawn: Drawn
    finish: str | None


@dataclass(eq=False)
class Order:
    """An order for a text: what is read, how it goes on, and who takes it.

    ids: the prompt and what there is of the text. text: the same of the text, which grows.
    take: gets each token, or an error after which none comes.
    """

    ids: np.ndarray
    text: Continuation
    max_tokens: int
    sampler: Sampler
    seed: int
    take: Callable[[Written | Exception], None]
    left: bool = False

    def __post_init__(self) -> None:
        self.begun = len(self.text.ids)
        self._results = Results(self.text.codec) if self.text.codec.marks else None
        self._must = None  # the id that has to come next
        for token in self.text.ids if self._results else ():
            self._must = self._results.add(token)

    def add(self, drawn: Drawn) -> int:
        """Add a token to the text, and give it to whom has ordered it; return its id.

        It is the one that was drawn, or of the result that a calculator writes, which is certain.
        """
        if self._must is not None:
            drawn = replace(drawn, id=self._must, logprob=0.0)
        self._must = self._results.add(drawn.id) if self._results else None
        known = len(self.text.text)
        self.text.add(drawn.id)
        if len(self.text.ids) == self.begun + self.max_tokens:
            self.text.end("length")
        self.take(Written(self.text.text[known:], drawn, self.text.finish))
        return drawn.id


class Full(Exception):
    """As many orders wait as may."""


class Stopped(Exception):
    """Nothing more is written."""


class Generation:
    """The thread that writes, and the orders that wait for it."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.failure: BaseException | None = None  # which has ended the thread
        self._waiting: list[Order] = []
        self._served: dict[int, Order] = {}
        self._writing: set[int] = set()  # the slots whose prompts have been read
        self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> int:
        return len(self._served)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def stopped(self) -> bool:
        return self._stop or self.failure is not None

    def place(self, order: Order) -> None:
        """Have a text written. Raises Full or Stopped."""
        with self._changed:
            if self.stopped:
                raise Stopped
            if len(self._waiting) >= MOST_WAITING:
                raise Full
            self._waiting.append(order)
            self._changed.notify()

    def leave(self, order: Order) -> None:
        """Write no more of a text, if there is more."""
        with self._changed:
            order.left = True
            if order in self._waiting:
                self._waiting.remove(order)

    def stop(self) -> None:
        """Let the thread end; whoever waits for a text gets Stopped."""
        with self._changed:
            self._stop = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of the thread. Raises what has ended it before `stop`."""
        self._thread.join()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._stop:
                self._turn()
        except BaseException as error:  # whoever waits must know
            self.failure = error
        with self._changed:
            orders = [*self._served.values(), *self._waiting]
            self._served, self._waiting = {}, []
        for order in orders:
            order.take(Stopped())

    def _turn(self) -> None:
        """Read a part of one prompt, and write a token of each text whose prompt has been read."""
        with self._changed:
            for slot in [slot for slot, order in self._served.items() if order.left]:
                self._free(slot)
            while self._waiting and len(self._served) < self.slots.count:
                self._begin(self._waiting.pop(0))
            if not self._served:
                self._changed.wait()
                return
        reading = [slot for slot in self._served if slot not in self._writing]
        if reading and self.slots.read(reading[0]):
            self._writing.add(reading[0])
        if not self._writing:
            return
        slots = sorted(self._writing)
        for slot, drawn in zip(slots, self.slots.write(slots), strict=True):
            order = self._served[slot]
            token = order.add(drawn)
            if order.text.finish:
                self._free(slot)
            else:
                self.slots.append(slot, token)

    def _begin(self, order: Order) -> None:
        slot = next(slot for slot in range(self.slots.count) if slot not in self._served)
        self.slots.open(slot, order.ids, order.sampler, order.seed, order.begun)
        self._served[slot] = order

    def _free(self, slot: int) -> None:
        self.slots.close(slot)
        self._writing.discard(slot)
        del self._served[slot]

"""Collectives of small JSON values among the processes of a run, without their devices.

They go through the key-value store of JAX's coordination service. A collective on the devices would
get in between those of training, which must come in the same order everywhere; these may be called
from any thread. All processes make the same calls under the same name in the same order; a process
alone gets its own value back.
"""

import json
import threading
import time
from typing import Any

import jax

# Seconds, for JAX's store wants a number: what only waits for a process that is dead or hangs may
# wait for good, as the link and the deadlines of the phases end such a run.
UNLIMITED = 7 * 24 * 3600.0


class Deadline:
    """A point in time, so many seconds from now, which several waits may share."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; at least 0.1, to read what the others have written already."""
        return max(0.1, self._end - time.monotonic())

    def __str__(self) -> str:
        return f"{self._seconds:g} s"


def from_first(name: str, value: Any, deadline: Deadline) -> Any:
    """Return process 0's value in all processes. Raises TimeoutError."""
    key = _next_key(name)
    if _state().process_id == 0:
        _write(key, value)
        return value
    return _read(key, 0, deadline)


def to_first(name: str, value: Any, deadline: Deadline) -> list[Any]:
    """Return the values of all processes in process 0; the others get none and do not wait.

    Raises TimeoutError.
    """
    if _state().process_id == 0:
        return gather(name, value, deadline)
    _write(_next_key(name), value)
    return []


def gather(name: str, value: Any, deadline: Deadline) -> list[Any]:
    """Return the values of all processes, in their order, in all of them. Raises TimeoutError."""
    key = _next_key(name)
    if _state().num_processes == 1:
        return [value]
    _write(key, value)
    return [_read(key, process, deadline) for process in range(_state().num_processes)]


def occasion(name: str) -> str:
    """Return `name` with a number, as the first part of the names of all collectives of one save.

    A process that has failed leaves out the rest of them. With the next number it is in step with
    the others again.
    """
    return _next_key(name).removeprefix("scalegpt/")


def forget(name: str) -> None:
    """Free the memory of all collectives of an occasion, once no process reads them any more."""
    with _lock:
        for known in [known for known in _calls if known.startswith(f"{name}/")]:
            del _calls[known]
    if _state().num_processes > 1 and _state().process_id == 0:
        _store().key_value_delete(f"scalegpt/{name}")


# Name -> calls so far. As JAX's store, whose keys can be written once only, there is one of these
# in a process.
_calls: dict[str, int] = {}
_lock = threading.Lock()


def _next_key(name: str) -> str:
    with _lock:
        _calls[name] = _calls.get(name, 0) + 1
        return f"scalegpt/{name}/{_calls[name]}"


def _write(key: str, value: Any) -> None:
    if _state().num_processes > 1:
        _store().key_value_set(f"{key}/{_state().process_id}", json.dumps(value))


def _read(key: str, process: int, deadline: Deadline) -> Any:
    try:
        text = _store().blocking_key_value_get(f"{key}/{process}", int(deadline.left * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"process {process} did not answer within {deadline}") from None
    return json.loads(text)


def _state() -> Any:
    # Private, for JAX's public functions between processes (jax.experimental.multihost_utils,
    # jax.process_count) use the devices. Orbax takes the client from the same place.
    from jax._src import distributed  # noqa: TID251

    return distributed.global_state


def _store() -> Any:
    return _state().client

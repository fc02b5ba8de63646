"""Several processes come to one answer without their devices, from any thread, within a time.

Through JAX's coordination service, which carries text: a collective on the devices would get in
between those of training. Every process makes the same calls under the same names; a name is used
once. One process answers itself.
"""

import json
import time
from typing import Any

import jax


class Deadline:
    """So many seconds from now for all that follows."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, at least a little: what has happened already may still be asked for."""
        return max(0.1, self._end - time.monotonic())

    def __str__(self) -> str:
        return f"{self._seconds:g} s"


def from_first(name: str, value: Any, deadline: Deadline) -> Any:
    """Process 0's value, JSON, in all of them. Raises TimeoutError."""
    if jax.process_count() == 1:
        return value
    if jax.process_index() == 0:
        _client().key_value_set(f"{name}/0", json.dumps(value))
        return value
    return _get(name, 0, deadline)


def gather(name: str, value: Any, deadline: Deadline) -> list[Any]:
    """The values, JSON, of all processes in all of them, in order. Raises TimeoutError."""
    if jax.process_count() == 1:
        return [value]
    _client().key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    return [_get(name, i, deadline) for i in range(jax.process_count())]


def forget(name: str) -> None:
    """What has been said under this name, which nobody asks for any more: it takes memory."""
    if jax.process_count() > 1 and jax.process_index() == 0:
        _client().key_value_delete(name)


def _get(name: str, process: int, deadline: Deadline) -> Any:
    try:
        text = _client().blocking_key_value_get(f"{name}/{process}", int(deadline.left * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"process {process} did not answer within {deadline}") from None
    return json.loads(text)


def _client() -> Any:
    # Private, for JAX's public functions between processes (jax.experimental.multihost_utils) use
    # the devices. Orbax takes the client from the same place.
    from jax._src import distributed  # noqa: TID251

    return distributed.global_state.client

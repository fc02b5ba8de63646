"""tools/bench.py --profile traces updates for TensorBoard or xprof, and names costly operations."""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from scalegpt.errors import Mistake

COSTLIEST = 10


def check(folder: str) -> None:
    """Make the folder. Raises Mistake when no trace could be written there, or taken here."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"cannot write --profile={folder}: {error.strerror}") from None
    no_tpu = jax.default_backend() != "tpu" and not jax.config.jax_platforms
    if no_tpu and importlib.util.find_spec("libtpu"):
        platform = jax.default_backend().replace("gpu", "cuda")
        raise Mistake(
            "--profile: JAX's profiler crashes where libtpu is installed and no TPU is here; "
            f"run it with JAX_PLATFORMS={platform}"
        )


def trace(trainer: Any, updates: int, folder: str) -> list[dict[str, Any]]:
    """Trace a block of bench's Trainer into the folder, and return its operations, costliest first.

    name: in the compiled program. place: the operation's source in the model; a fusion has several,
    of which one is named. seconds: of an update, summed over devices and threads.
    """
    before = set(Path(folder).rglob("*.xplane.pb"))
    with jax.profiler.trace(folder):
        trainer.block(updates)
    (file,) = set(Path(folder).rglob("*.xplane.pb")) - before
    seconds = operations(ProfileData.from_file(str(file)))
    program = trainer.steps.lower().compile().as_text()
    places = dict(re.findall(r'%(\S+) = .*op_name="([^"]*)"', program))
    return [
        {"name": name, "place": places.get(name, ""), "seconds": total / updates}
        for name, total in seconds.most_common(COSTLIEST)
    ]


def operations(profile: ProfileData) -> Counter:
    """Return the seconds of each operation in the trace, by name."""
    seconds: Counter = Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if operation := dict(event.stats).get("hlo_op"):
                    seconds[operation] += event.duration_ns / 1e9
    return seconds

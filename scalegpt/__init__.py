"""scalegpt: a sharding-first GPT trainer in JAX. Importing it touches no device."""

import os

# Simulated CPU devices share a pool of as many threads as devices. Collectives that wait at once,
# as fsdp has, can fill it while a device has none left to join them with: XLA aborts after 40 s.
_devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
if _devices.isdigit() and int(_devices) > 1 and "NPROC" not in os.environ:
    os.environ.setdefault("PJRT_NPROC", str(8 * int(_devices)))

from typing import Any  # noqa: E402

from scalegpt.errors import Mistake  # noqa: E402

__all__ = ["Config", "Mistake", "Model", "load"]
_WHERE = {"Config": "scalegpt.config", "Model": "scalegpt.api", "load": "scalegpt.api"}


def __getattr__(name: str) -> Any:
    """Import what is asked for only now: JAX takes seconds, and `scalegpt.Mistake` needs none."""
    if name not in _WHERE:
        raise AttributeError(f"module 'scalegpt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


__version__ = "0.1.0"

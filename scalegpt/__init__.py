"""scalegpt: a sharding-first GPT trainer in JAX. Importing it touches no device."""

import os

# Simulated CPU devices share a pool of as many threads as devices. Collectives that wait at once,
# as fsdp has, can fill it while a device has none left to join them with: XLA aborts after 40 s.
_devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
if _devices.isdigit() and int(_devices) > 1 and "NPROC" not in os.environ:
    os.environ.setdefault("PJRT_NPROC", str(8 * int(_devices)))

from types import ModuleType  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from scalegpt.errors import Mistake  # noqa: E402

if TYPE_CHECKING:
    from scalegpt.api import Model, Run, RunFailed, load, train
    from scalegpt.config import Config

__all__ = ["Config", "Mistake", "Model", "Run", "RunFailed", "load", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for only now: JAX takes seconds, and `scalegpt.Mistake` needs none."""
    import importlib

    if name in ("api", "train"):
        return importlib.import_module(f"scalegpt.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'scalegpt' has no attribute {name!r}")
    room = "scalegpt.config" if name == "Config" else "scalegpt.api"
    return getattr(importlib.import_module(room), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]  # completion shows what is not imported yet, too


class CallableModule(ModuleType):
    """The class of the module `scalegpt.train`: a call of it is one of `api.train`.

    The command `python -m scalegpt.train` and the function `scalegpt.train` share one name, and
    Python puts the module there as soon as anybody imports it.
    """

    def __call__(self, *args: Any, **keywords: Any) -> "Run":
        """Train a model, or continue a run, and return it; see `scalegpt.api.train`."""
        return __getattr__("api").train(*args, **keywords)

    def __reduce__(self) -> Any:  # modules cannot be pickled, functions for other processes can
        return __getattr__, ("train",)

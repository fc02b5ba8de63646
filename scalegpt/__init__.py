"""scalegpt: a sharding-first GPT trainer in JAX. Importing it touches no device."""

import os

# Simulated CPU devices share a pool of as many threads as devices. Collectives that wait at once,
# as fsdp has, can fill it while a device has none left to join them with: XLA aborts after 40 s.
_devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
if _devices.isdigit() and int(_devices) > 1 and "NPROC" not in os.environ:
    os.environ.setdefault("PJRT_NPROC", str(8 * int(_devices)))

from scalegpt.errors import Mistake  # noqa: E402

__all__ = ["Mistake"]
__version__ = "0.1.0"

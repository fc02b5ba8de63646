"""The user's cache folder: copies of what is elsewhere, and compiled programs."""

import hashlib
import os
import platform
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/scalegpt`, else `~/.cache/scalegpt`, and what is below; it makes nothing."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "scalegpt", *parts)


def keep_compiled() -> None:
    """Let JAX keep compiled programs for the next process, unless the user has said where or not:
    JAX_COMPILATION_CACHE_DIR=DIR, JAX_ENABLE_COMPILATION_CACHE=false. Before anything compiles.

    They hold instructions of this kind of CPU, which a home folder may share with other kinds.
    """
    import jax  # not above: who only copies files needs none

    if jax.config.jax_compilation_cache_dir is None:
        kind = hashlib.sha256(_cpu().encode()).hexdigest()[:12]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled", kind)))
        # JAX's second leaves out most of a small run's programs, which are seconds together.
        ours = {
            "jax_compilation_cache_max_size": 4 * 2**30,
            "jax_persistent_cache_min_compile_time_secs": 0.1,
        }
        for name, value in ours.items():
            if name.upper() not in os.environ:
                jax.config.update(name, value)


def _cpu() -> str:
    """What it is and can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        return platform.processor() or platform.machine()
    said = [line for line in lines if line.startswith(("flags", "Features"))]
    return "\n".join(dict.fromkeys(said))

"""The user's cache folder holds copies of files behind URLs, and compiled programs."""

import contextlib
import hashlib
import os
import platform
import posixpath
from pathlib import Path

from scalegpt.errors import Mistake


def cache_folder(*parts: str) -> Path:
    """Return `$XDG_CACHE_HOME/scalegpt/parts`, or `~/.cache/scalegpt/parts`; create nothing.

    Raises Mistake for a user without a home, as of a container that runs under any number: a folder
    for temporary files, where others can write, is no place for programs.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if home.startswith("~"):
        raise Mistake("this user has no home folder for copies: set XDG_CACHE_HOME to a folder")
    return Path(home, "scalegpt", *parts)


def name_of_url(url: str) -> str:
    """Return a folder name for copies of what is at `url`: its last part and a hash of all of it.

    The hash keeps `gs://a/run` and `gs://b/run` apart.
    """
    url = url.rstrip("/")
    return f"{posixpath.basename(url)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def keep_compiled() -> None:
    """Make JAX store compiled programs for later processes; call it before anything compiles.

    The user's own settings win: JAX_COMPILATION_CACHE_DIR=DIR, or
    JAX_ENABLE_COMPILATION_CACHE=false. Each kind of CPU has its own folder, because compiled
    programs hold that CPU's instructions, and machines of several kinds may share a home folder.
    """
    import jax  # not at the top: a process that only copies files needs no JAX

    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = cache_folder("compiled", kind_of_cpu())
        except Mistake:  # no home: each process compiles for itself
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # JAX stores only what took a second to compile, which leaves out most programs of a small
        # run; together they take seconds.
        settings = {
            "jax_compilation_cache_max_size": 4 * 2**30,
            "jax_persistent_cache_min_compile_time_secs": 0.1,
        }
        for name, value in settings.items():
            if name.upper() not in os.environ:
                jax.config.update(name, value)
        if jax.config.jax_compilation_cache_max_size == -1:
            return
        # JAX writes a program, then the time of its last use. What a process has left that was
        # killed before that would never be replaced, and JAX would fail to add any other program.
        with contextlib.suppress(OSError):
            used = {path.name.removesuffix("-atime") for path in folder.glob("*-atime")}
            for path in folder.glob("*-cache"):
                if path.name.removesuffix("-cache") not in used:
                    path.unlink()


def kind_of_cpu() -> str:
    """Return a short name of this CPU's instruction sets, for a folder of compiled programs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        features = platform.processor() or platform.machine()
    else:
        listed = [line for line in lines if line.startswith(("flags", "Features"))]
        features = "\n".join(dict.fromkeys(listed))
    return hashlib.sha256(features.encode()).hexdigest()[:12]

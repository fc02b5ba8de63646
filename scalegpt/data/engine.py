"""Ray prepares the parts of a text on the machines of its cluster.

Ray starts, spreads and repeats the work; what a part is, and whether it is whole, `parts` decides.
"""

import os
import runpy
from argparse import Namespace
from typing import Any

from tqdm import tqdm

from scalegpt.data.parts import Part
from scalegpt.errors import Mistake

RETRIES = 10  # of a part whose worker died


def prepare_parts(script: str, args: Namespace, n: int) -> None:
    """Make all n parts by a prepare.py, each in a process of the cluster of RAY_ADDRESS, or here.

    args: what the `prepare` of that script takes; each machine must see the same files by these
    names. Raises Mistake as that does, and for a part whose workers died `RETRIES` times.
    """
    try:
        import ray
    except ImportError:
        raise Mistake("--engine=ray needs ray: pip install 'scalegpt[ray]'") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    cpus = args.workers = max(1, args.workers or 1)
    part = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_make)
    waiting = [part.remote(script, os.getcwd(), vars(args), str(Part(i, n))) for i in range(n)]
    try:
        with tqdm(total=n, unit=" parts", disable=None) as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                bar.update(len(done))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Mistake):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise Mistake(
            f"a worker of Ray died {RETRIES + 1} times with one part ({type(error).__name__}); the "
            "same command goes on with the parts that are not whole"
        ) from error
    finally:
        ray.shutdown()


def _make(script: str, folder: str, args: dict[str, Any], part: str) -> None:
    os.chdir(folder)
    runpy.run_path(script)["prepare"](Namespace(**{**args, "part": part}))

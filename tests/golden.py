"""A small checkpoint that an earlier scalegpt has written, and what is known about it.

Made anew, when the format changes on purpose, from the root of the repository by

    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/golden.py
"""

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scalegpt import evaluate, train
from scalegpt.config import MeshConfig
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import trained

FOLDER = Path(__file__).parent / "golden_checkpoint"
SAVED, STEPS = 4, 6


def write_data(folder: Path) -> None:
    text = "".join(f"{n} times {n} is {n * n}.\n" for n in range(200)).encode()
    ids = np.frombuffer(text, np.uint8).astype("<u2")
    meta: dict[str, Any] = {
        "format": 1,
        "tokenizer": {"kind": "byte"},
        "dtype": "uint16",
        "vocab_size": 256,
    }
    for split, part in (("train", ids[:-400]), ("val", ids[-400:])):
        part.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(part)}
    (folder / "meta.json").write_text(json.dumps(meta))


def arguments(steps: int) -> list[str]:
    """The run, in the current folder; with biases, so that there is one array of each kind."""
    values = {
        "data.path": "data",
        "run.out_dir": "run",
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 8,
        "model.block_size": 8,
        "model.bias": "true",
        "model.vocab_multiple": 8,
        "batch.sequences": 8,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 0,
        "optim.steps": steps,
        "optim.decay_steps": STEPS,
        "eval.every": 0,
        "eval.windows": 16,
        "checkpoint.every": 0,
        "checkpoint.keep": 1,
        "log.every": 1,
        "log.tensorboard": "false",
        "run.allow_config_change": "true",
    }
    return [f"--{key}={value}" for key, value in values.items()]


def figures(capture: Any) -> dict[str, Any]:
    """Of the run in the current folder: sha256 of each array of the weights, and the loss.

    capture: calls what it is given and returns what that printed.
    """
    loaded = trained.from_run("run", "latest", make_mesh(MeshConfig(), jax.devices()[:1]), 1)
    leaves = jax.tree_util.tree_flatten_with_path(loaded.params)[0]
    hashes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(
            np.asarray(x).tobytes()
        ).hexdigest()
        for path, x in leaves
    }
    argv = ["--run", "run", "--checkpoint", "latest", "--windows", "16", "--json"]
    row = json.loads(capture(lambda: evaluate.main(argv)).splitlines()[-1])
    return {"step": row["step"], "params": hashes, "val_loss": row["val/loss"]}


def train_losses() -> dict[str, float]:
    rows = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    return {str(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def make() -> None:
    import io

    def capture(function: Any) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            function()
        return printed.getvalue()

    FOLDER.mkdir(exist_ok=True)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        Path("data").mkdir()
        write_data(Path("data"))
        assert train.main(arguments(SAVED)) == 0
        known = figures(capture)
        with tarfile.open(FOLDER / "run.tar.gz", "w:gz") as archive:
            for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
                archive.add(f"run/{name}", filter=anonymous)
        assert train.main(arguments(STEPS)) == 0
        known["train_losses"] = train_losses()
        (FOLDER / "expected.json").write_text(json.dumps(known, indent=1) + "\n")
        os.chdir(before)


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    make()

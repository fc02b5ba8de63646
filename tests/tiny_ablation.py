"""An ablation so small that a test can make it: two arms of tiny_run, two seeds."""

from pathlib import Path

import tiny_run
import yaml

ARMS = {"plain": {}, "wide": {"model": {"n_embd": 64}}}
SEEDS = [1, 2]
# What compiles soonest.
CHANGES = {
    "run.out_dir": None,
    "model.n_layer": 1,
    "model.dropout": 0.0,
    "model.scan_layers": None,
    "batch.microbatch": None,
}
TOKENS = tiny_run.ROWS * tiny_run.T  # of an update


def write(folder: Path, data: Path | str, arms=ARMS, **more) -> Path:
    """The file of an ablation of tiny runs."""
    sections: dict = {}
    for argument in tiny_run.arguments(data, "unused", **CHANGES):
        key, value = argument.removeprefix("--").split("=", 1)
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = yaml.safe_load(value)
    file = folder / "tiny.yaml"
    sections |= {"arms": arms, "seeds": SEEDS} | more
    file.write_text(yaml.safe_dump(sections, sort_keys=False))
    return file

"""A record holds what an ablation's runs measured; it is read from their folders or from a file.

The file is JSON and small enough for a repository; tables and pictures can be made from it.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from ablations.plan import Plan, Run
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scalegpt.checkpoints import manifest
from scalegpt.config import Config, loading
from scalegpt.config.differences import curve_diff, resolved_as
from scalegpt.errors import Mistake
from scalegpt.files import json_files
from scalegpt.files.folder import open_folder
from scalegpt.files.run_folder import FOLDER
from scalegpt.model import flops
from scalegpt.run import history
from scalegpt.run.history import DONE, state, training_seconds

# A difference in these means another arm or another measurement, although scalegpt.train would
# continue the run.
_COMPARED = (
    "data.path",
    "eval.windows",
    "eval.document_mask",
    "run.init_from",
    "run.init_checkpoint",
    "run.skip_nonfinite",
    "run.skip_spikes",
    "run.spike",
)
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curve(_Part):
    """A curve is the evaluations of a run, by ascending step.

    val_loss: nats a token. seconds: spent in updates until then. state: DONE, or how far it came.
    others_cpu: the share of the machine that other programs used meanwhile, None if not known.
    """

    state: str
    step: list[Count]
    val_loss: list[Finite]
    seconds: list[Finite] | None
    bits_per_byte: list[Finite] | None
    others_cpu: Finite | None = None

    @model_validator(mode="after")
    def _check(self) -> "Curve":
        for name in ("val_loss", "seconds", "bits_per_byte"):
            if (values := getattr(self, name)) is not None and len(values) != len(self.step):
                raise Mistake(f"{len(values)} {name} of {len(self.step)} steps")
        if any(a >= b for a, b in pairwise(self.step)):
            raise Mistake("steps are not ascending")
        if self.state == DONE and not self.step:
            raise Mistake("a run that is done has evaluations")
        return self


class Arm(_Part):
    """An arm has the curve of each seed whose run has begun."""

    parameters: Count
    flops_per_token: Finite
    tokens_per_update: Count
    curves: dict[int, Curve] = Field(min_length=1)


class Record(_Part):
    """A record holds the arms in the plan's order, None for one of which no run has begun."""

    format: Literal[1] = 1
    name: str
    reference: str
    seeds: list[int]
    arms: dict[str, Arm | None]

    @model_validator(mode="after")
    def _check(self) -> "Record":
        if self.reference not in self.arms:
            raise Mistake(f"the reference {self.reference} is none of the arms")
        return self

    @property
    def evaluated(self) -> bool:
        """Return whether any run has been evaluated."""
        return any(run.step for arm in self.arms.values() if arm for run in arm.curves.values())


def measure(plan: Plan) -> Record:
    """Record what the plan's runs have measured so far.

    Raises Mistake as `stored_config` and `rows_of` do.
    """
    arms = {}
    for name in plan.arms:
        runs = [run for run in plan.runs if run.arm == name]
        begun = {run.seed: (run, stored) for run in runs if (stored := stored_config(run))}
        curves = {seed: curve(rows_of(run), stored) for seed, (run, stored) in begun.items()}
        arms[name] = arm(next(iter(begun.values()))[1], curves) if begun else None
    return Record(name=plan.name, reference=plan.reference, seeds=plan.seeds, arms=arms)


def arm(config: Config, curves: dict[int, Curve]) -> Arm:
    """Return the arm with these curves, whose runs have this config."""
    return Arm(
        parameters=flops.parameter_count(config.model),
        flops_per_token=flops.flops_per_token(config.model),
        tokens_per_update=config.batch.sequences * config.model.block_size,
        curves=curves,
    )


def stored_config(run: Run) -> Config | None:
    """Return the config of the run in this run's folder; None where there is no run yet.

    Raises Mistake where that config is not the plan's, or where there can be no folder.
    """
    if not (parent := existing(run.folder)).is_dir():
        raise Mistake(
            f"{parent} is no folder, so no run can be in {run.folder}; give another --out"
        )
    path = run.folder / "config.yaml"
    if not path.exists():
        return None
    stored = loading.validate(loading.load(path), str(path))
    planned = resolved_as(stored, run.config)
    changes = curve_diff(stored, planned)
    for key in _COMPARED:
        section, name = key.split(".")
        old, new = (getattr(getattr(config, section), name) for config in (stored, planned))
        if old != new and not any(line.startswith(f"{key}:") for line in changes):
            changes.append(f"{key}: {old} -> {new}")
    if changes:
        first = f"arm {run.arm}: {run.folder} holds a run that differs:"
        last = "give another --out, or move that folder away"
        raise Mistake("\n  ".join([first, *changes]) + f"\n{last}")
    return stored


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def finished(run: Run) -> bool:
    """Return whether the run has saved and evaluated its last checkpoint.

    A manifest alone is not enough: a stop during the last evaluation saves before it leaves.
    """
    steps = run.config.optim.steps
    saved = (run.folder / FOLDER / str(steps) / manifest.NAME).is_file()
    return saved and state(rows_of(run), steps) == DONE


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl. Raises Mistake for rows that no run writes."""
    return history.read_rows(open_folder(run.folder))


def curve(rows: list[dict[str, Any]], config: Config) -> Curve:
    """Return the curve in the rows of metrics.jsonl."""
    evaluations = {row["step"]: row for row in rows if row.get("val/loss") is not None}
    steps = sorted(evaluations)
    bits = [evaluations[step].get("val/bits_per_byte") for step in steps]
    shares = [x for row in rows if (x := row.get("perf/others_cpu")) is not None]
    return Curve(
        state=state(rows, config.optim.steps),
        step=steps,
        val_loss=[round(evaluations[step]["val/loss"], 6) for step in steps],
        seconds=training_seconds(rows, steps),
        bits_per_byte=None if None in bits else [round(x, 6) for x in bits],
        others_cpu=shares[-1] if shares else None,
    )


def read_record(file: str) -> Record:
    """Read the file that `write_record` wrote. Raises Mistake for any other."""
    try:
        return Record.model_validate(json_files.read_object(Path(file)))
    except ValidationError as error:
        first = error.errors()[0]
        reason = ".".join(map(str, first["loc"])) + ": " if first["loc"] else ""
        reason += first["msg"].removeprefix("Value error, ")
        raise Mistake(f"{file} is no record of tools/ablation.py: {reason}") from None


def write_record(record: Record, file: str) -> None:
    """Write a record as JSON in one line. Raises OSError."""
    text = json.dumps(record.model_dump(mode="json"), separators=(",", ":"))
    Path(file).write_text(f"{text}\n", encoding="utf-8")

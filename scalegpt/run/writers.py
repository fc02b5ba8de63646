"""Write rows of metrics to metrics.jsonl always, to TensorBoard, W&B and trackio if asked for."""

import json
import math
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake, counted
from scalegpt.files import json_files
from scalegpt.files.folder import replace_file

Row = dict[str, Any]
Say = Callable[[str], None]


class JsonlWriter:
    """The writer appends rows to a JSON-lines file, each at once and as a whole line.

    Lines are strict JSON: NaN and infinity, which JSON lacks, are written as null.
    A run that continues after step s (`resume_step`) first drops what a killed process left: rows
    of later steps, the ledger's row of s, which a new one replaces, and a torn last line. So the
    loop goes on with s + 1 and no row is there twice. `earlier`: the rows as they were before.
    Lines that a full disk does not take are held back until it does; `say` warns once.
    Raises Mistake on a new run (`resume_step=None`) whose file exists: runs never overwrite.
    """

    def __init__(
        self, path: str | Path, resume_step: int | None = None, say: Say = lambda text: None
    ) -> None:
        if "://" in str(path):  # Path() would quietly make a local folder named "gs:"
            raise Mistake(f"run.out_dir holds files that grow, so it must be local: {path}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.earlier: list[Row] = []
        if path.is_dir():
            raise Mistake(f"{path} is a folder; rows go to a file of that name: move it away")
        if resume_step and resume_step > 0 and not path.exists():
            say(f"warning: {path} is not there: the rows that this run has written are lost")
        if path.exists() and resume_step is not None:
            self.earlier = json_files.complete_rows(path.read_text(errors="replace").splitlines())
            rows = [
                row for row in self.earlier if row["step"] < resume_step + ("time/step" not in row)
            ]
            replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        elif path.exists() and path.stat().st_size:
            raise Mistake(f"{path} is another run's: choose a new run.out_dir, or move it away")
        # Unbuffered, so that `write` knows to the byte what the disk took.
        self._file, self._held, self._say = path.open("ab", buffering=0), b"", say
        self._warned = False

    def write(self, row: Row) -> None:
        strict = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._held += json.dumps(strict, allow_nan=False).encode() + b"\n"
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._say(
                    f"warning: {self._file.name} was deleted while the run goes on; it is "
                    "made anew, without the rows so far"
                )
                self._file.close()
                Path(self._file.name).parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._file.name, "ab", buffering=0)
            while self._held:
                self._held = self._held[self._file.write(self._held) :]
        except OSError as error:
            if not self._warned:
                self._say(
                    f"warning: cannot write {self._file.name} ({error.strerror}); its rows "
                    "are held back until the disk takes them"
                )
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        if self._held:
            rows = self._held.count(b"\n")
            self._say(f"warning: {self._file.name} lacks the last {counted(rows, 'row')}")
        self._file.close()


class Apart:
    """Hand rows to a writer in a thread of its own, so that it neither ends nor holds up a run.

    make: creates the writer, in that thread. A writer that fails, as on a full disk, or that takes
    no rows while MOST_WAITING of them come, is off from then on, with one warning: metrics.jsonl
    has the rows anyway.
    """

    MOST_WAITING = 20_000  # some 20 MB
    PATIENCE = 90.0  # seconds at the end; W&B's service gets 60

    def __init__(self, name: str, make: Callable[[], Any], say: Say) -> None:
        self._name, self._make, self._say, self._off = name, make, say, False
        self._rows: queue.Queue[Row | None] = queue.Queue(self.MOST_WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def _run(self) -> None:
        # Any exception, on purpose: a bad key, a full disk, a fault of W&B's server or client must
        # not end days of training.
        try:
            writer = self._make()
            while (row := self._rows.get()) is not None and not self._off:
                writer.write(row)
            writer.close()
        except Exception as error:
            self._turn_off(f"{type(error).__name__}: {error}")

    def _turn_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            self._say(f"warning: {self._name} is off from here on ({why})")

    def write(self, row: Row | None) -> None:
        if not self._off:
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                self._turn_off(f"{self.MOST_WAITING} rows wait for it")

    def close(self) -> None:
        self.write(None)
        if not self._off:
            self._thread.join(self.PATIENCE)
            if self._thread.is_alive():
                self._turn_off(f"not done {self.PATIENCE:.0f} s after the last row")


class TensorBoardWriter:
    """The writer makes TensorBoard scalars of rows; TensorBoard hides those after `resume_step`."""

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        # Where they are installed, tensorboardX imports torch for the name of a type, and Google's
        # client for buckets, which it is not to write to: for seconds.
        costly = ("torch", "google.cloud.storage")
        hidden = [name for name in costly if sys.modules.setdefault(name, None) is None]
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.summary import text
        finally:
            for name in hidden:
                del sys.modules[name]

        Path(folder).mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter, whose own thread dies on a full disk and lets the run wait for ever.
        self._events = EventsWriter(str(Path(folder, "events")))
        self._event, self._summary, self._text = event_pb2.Event, summary_pb2.Summary, text
        self._flushed = 0.0
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(resume_step + 1, time.time(), session_log=start)  # hidden from this step on

    def _add(self, step: int, at: float, **content: Any) -> None:
        self._events.write_event(self._event(step=step, wall_time=at, **content))
        if time.monotonic() > self._flushed + 10:
            self._events.flush()
            self._flushed = time.monotonic()

    def write(self, row: Row) -> None:
        if "text" in row:
            shown = self._text("sample", row["prompt"] + row["text"])
            return self._add(row["step"], row["time"], summary=shown)
        # One event a row costs less than one a value.
        values = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in row.items()
            if key not in ("step", "time")
        ]
        self._add(row["step"], row["time"], summary=self._summary(value=values))

    def close(self) -> None:
        self._events.close()


class WandbWriter:
    """The writer sends rows to Weights & Biases; without credentials it logs offline.

    A continued run keeps its W&B id, in out_dir/wandb_id.txt, and W&B ignores steps that it has.
    """

    def __init__(
        self,
        config: Row,
        out_dir: str | Path,
        project: str,
        name: str | None = None,
        resume: bool = False,
        *,
        entity: str | None = None,
        say: Say = print,
        tags: Sequence[str] = (),
    ) -> None:
        import wandb

        mode = wandb.setup().settings.mode  # from WANDB_MODE or W&B's settings files
        online = mode not in ("offline", "dryrun", "disabled")
        # wandb.init would ask for a key and wait; this neither asks nor goes to the network.
        if online and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            say(
                "warning: no W&B credentials, so W&B logs offline; to upload later: "
                f"wandb login && wandb sync {out_dir}/wandb/offline-run-*"
            )
        id_file = Path(out_dir) / "wandb_id.txt"
        run_id = _kept_id(id_file, resume)
        self._run = wandb.init(
            project=project,
            name=name,
            entity=entity,
            tags=tags,
            config=config,
            dir=str(out_dir),
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            # Without this limit a run whose network died waits for ever at its end.
            settings=wandb.Settings(finish_timeout=60),
        )
        id_file.write_text(self._run.id + "\n")
        self.close = self._run.finish

    def write(self, row: Row) -> None:
        if "text" in row:
            row = {"step": row["step"], "sample": row["prompt"] + row["text"]}
        self._run.log(row, step=row["step"])


class TrackioWriter:
    """The writer adds rows to trackio's project of this name, a database that `trackio show` shows.

    It lies in TRACKIO_DIR, by default in Hugging Face's cache. A continued run keeps its id, in
    out_dir/trackio_id.txt. A row of an update that is made again has the log_id of the first one,
    and trackio ignores it.
    """

    def __init__(
        self, config: Row, out_dir: str | Path, project: str, name: str, resume: bool = False
    ) -> None:
        # Not trackio.init, whose run prints between our lines, asks huggingface.co for the user's
        # name, is found again by its name alone, and adds rows that it has. This is the way of rows
        # that trackio's clients have kept for later.
        from trackio import Markdown, fragments, utils

        self._markdown, self._format = Markdown, fragments.metric_record
        self._add: Callable[[list[Row]], Any] = fragments.import_records
        if utils.get_storage_mode() != "sqlite":  # on a network disk, where SQLite is not safe
            self._add = fragments.FragmentWriter().write_local
        id_file = Path(out_dir) / "trackio_id.txt"
        run_id = _kept_id(id_file, resume) or uuid.uuid4().hex
        id_file.write_text(run_id + "\n")
        self._run: Row = {"project": project, "run": name, "run_id": run_id, "config": config}

    def write(self, row: Row) -> None:
        values = {key: value for key, value in row.items() if key not in ("step", "time")}
        log_id = f"{self._run['run_id']}/{row['step']}/{next(iter(values))}"
        if "text" in row:
            text = (row["prompt"] + row["text"]).replace("\n", "\n\n")  # else the page joins lines
            values = {"sample": self._markdown(text)._to_dict()}
        at = datetime.fromtimestamp(row["time"], UTC).isoformat()
        entry = {"metrics": values, "step": row["step"], "timestamp": at, "log_id": log_id}
        self._add([self._format(self._run | entry)])

    def close(self) -> None:
        pass  # each row is on the disk


def _kept_id(file: Path, resume: bool) -> str | None:
    return file.read_text().strip() if resume and file.exists() else None

"""Lay out a page of HTML that shows one or several runs, without scripts or the network."""

import html
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from scalegpt.errors import Mistake
from scalegpt.files.folder import open_folder
from scalegpt.run.curves import NOT_COMPARABLE, draw, ledger_of
from scalegpt.run.history import History, Row, comparable, state

# Every page begins so: other files are not overwritten by one.
MARK = "<!-- a report of scalegpt -->"
NAME = "report.html"  # in a run's folder
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: .5em 0 1.5em }
th, td { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre, code { background: #f4f4f4; white-space: pre-wrap; overflow-wrap: anywhere }
pre { padding: .6em; margin: 0; max-height: 20em; overflow: auto }
svg { width: 100%; height: auto }
.wide { overflow-x: auto }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Keys that tell where a run is kept and what it says, not what it computes.
_UNIMPORTANT = ("run.out_dir", "log.", "distributed.", "run.deadline_")


def page(histories: Sequence[History]) -> str:
    """Return the page's text: a table of the runs, their curves, settings, checkpoints, samples."""
    names = ", ".join(run.name for run in histories)
    heading = _text(names) if len(histories) == 1 else f"{len(histories)} runs"
    sections = [
        ("", _runs(histories)),
        ("", f'<div class="wide">{_svg(histories)}</div>'),
        ("What differs in their settings", _differences(histories)),
        ("Samples", _each(histories, _samples)),
        ("Checkpoints", _each(histories, _checkpoints)),
        (
            "How they were made" if len(histories) > 1 else "How it was made",
            _each(histories, _origin),
        ),
    ]
    body = "\n".join(
        (f"<h2>{title}</h2>\n" if title else "") + content for title, content in sections if content
    )
    return (
        f'<!DOCTYPE html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{_text(names)}</title>\n"
        # The browser itself refuses whatever would leave the page; without an icon it asks for one.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style></head>\n<body>\n'
        f"<h1>{heading}</h1>\n<p>As of {_date(time.time())}, by scalegpt.report.</p>\n"
        f"{body}\n</body></html>\n"
    )


def write_page(out: str, histories: Sequence[History]) -> None:
    """Write the page to a file or a bucket, over an earlier one. Raises Mistake."""
    name = out.rpartition("/")[2]
    if not name.endswith((".html", ".htm")):
        raise Mistake(f"--out={out} must end in .html")
    folder, text = open_folder(out.removesuffix(name) or "."), page(histories)
    try:
        if folder.has(name) and MARK.encode() not in folder.read(name)[:1000]:
            raise Mistake(f"{out} exists and is no report of scalegpt; give another --out")
        # A folder's name that is not UTF-8 and a sample may have halves of characters.
        folder.write(name, text.encode(errors="replace"))
    except OSError as error:
        raise Mistake(f"cannot write {out}: {error.strerror or error}") from None


def facts(run: History) -> dict[str, str]:
    """Return what one line says of a run: title -> text, "" where it is not known."""

    def last(key: str, form: str) -> str:
        values = run.curve(key)[1]
        return form.format(values[-1]) if len(values) and math.isfinite(values[-1]) else ""

    def best(key: str) -> str:
        # The untrained weights are evaluated too, but are never the best.
        values = zip(*run.curve(key), strict=True)
        losses = [(run.config.as_goal(x), int(step)) for step, x in values if step and x == x]
        if not losses:
            return ""
        loss, step = min(losses)
        return f"{run.config.as_goal(loss):.4f} at step {step:,}"

    seconds, speeds = sum(ledger_of(run).values()), run.curve("perf/tokens_per_second")[1]
    return {
        "state": state(run.rows, run.config.optim.steps),
        "tokens": last("train/tokens", "{:,.0f}"),
        "train loss": last("train/loss", "{:.4f}"),
        "val loss": last("val/loss", "{:.4f}"),
        "best val loss": best("val/loss"),
        "reward": last("rl/reward", "{:.4f}"),
        "val reward": last("val/reward", "{:.4f}"),
        "best val reward": best("val/reward"),
        "bits/byte": last("val/bits_per_byte", "{:.4f}"),
        "time": tqdm.format_interval(seconds) if seconds else "",
        "tokens/s": f"{np.median(speeds):,.0f}" if len(speeds) else "",
        "MFU": last("perf/mfu", "{:.1%}"),
    }


def _runs(histories: Sequence[History]) -> str:
    rows = {run.name: facts(run) for run in histories}
    titles = [t for t in next(iter(rows.values())) if any(row[t] for row in rows.values())]
    table = _table(["run", *titles], [[n, *(row[t] for t in titles)] for n, row in rows.items()])
    if len(comparable(histories)) > 1:
        table += f"<p>Beware: {NOT_COMPARABLE}. Bits per byte compare between tokenizers.</p>"
    return table


def _svg(histories: Sequence[History]) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        draw(histories).savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    # What stands before the element belongs to a file of its own, and names a file of the network.
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _differences(histories: Sequence[History]) -> str:
    """Return a table of the keys whose values differ between the runs; "" for a single run."""
    settings = [
        {
            f"{s}.{k}": value
            for s, keys in run.config.model_dump().items()
            for k, value in keys.items()
        }
        for run in histories
    ]
    rows = [
        [key, *(str(values[key]) for values in settings)]
        for key in settings[0]
        if not key.startswith(_UNIMPORTANT)
        and any(values[key] != settings[0][key] for values in settings)
    ]
    if len(histories) == 1:
        return ""
    if not rows:
        return "<p>Nothing that changes what they compute.</p>"
    return _table(["key", *(run.name for run in histories)], rows)


def _each(histories: Sequence[History], section: Callable[[History], str]) -> str:
    """Return this section of each run that has it, under the run's name if there are several."""
    parts = {run.name: content for run in histories if (content := section(run))}
    return "\n".join(
        (f"<h3>{_text(name)}</h3>\n" if len(histories) > 1 else "") + content
        for name, content in parts.items()
    )


def _samples(run: History) -> str:
    rows = [
        f'<tr><td class="n">{sample["step"]:,}</td><td><pre>{_text(_shown(sample))}</pre></td></tr>'
        for sample in run.samples
    ]
    return f"<table><tr><th>step</th><th>text</th></tr>\n{''.join(rows)}</table>" if rows else ""


def _shown(sample: Row) -> str:
    if "reward" not in sample:
        return sample["text"]
    return f"{sample.get('prompt', '')}\n{sample['text']}\nreward {sample['reward']:.2f}"


def _checkpoints(run: History) -> str:
    whole = {step: m for step, m in run.checkpoints.items() if not isinstance(m, str)}
    latest = max(whole, default=None)
    rows = []
    for step, content in run.checkpoints.items():
        if isinstance(content, str):
            rows.append([f"{step:,}", "", "", "", content])
            continue
        tags = [tag for tag, s in (("best", run.best), ("latest", latest)) if s == step]
        size = sum(size for size, _ in content["files"].values())
        known = content["val_loss"] is not None
        loss = f"{run.config.as_goal(content['val_loss']):.4f}" if known else ""
        saved = _date(content["time"])
        rows.append([f"{step:,}", loss, f"{size / 1e6:,.1f} MB", saved, ", ".join(tags)])
    return _table(["step", f"val {run.config.goal}", "size", "saved", ""], rows) if rows else ""


def _origin(run: History) -> str:
    """Return the command and the versions of packages that the newest checkpoint names."""
    whole = [m for m in run.checkpoints.values() if not isinstance(m, str)]
    command = (whole[-1]["meta"].get("command") if whole else None) or ""
    versions = ", ".join(f"{k} {v}" for k, v in whole[-1]["versions"].items()) if whole else ""
    settings = _text(run.config.to_yaml())
    return (
        (f"<pre>{_text(command)}</pre>\n" if command else "")
        + f"<p>{_text(versions)}</p>\n"
        + f"<details><summary>config.yaml</summary><pre>{settings}</pre></details>"
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; cells that begin with a digit are numbers."""
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    lines = [
        "<tr>"
        + "".join(f"<td{' class=n' if x[:1].isdigit() else ''}>{_text(x)}</td>" for x in row)
        + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def _text(value: str) -> str:
    return html.escape(value)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

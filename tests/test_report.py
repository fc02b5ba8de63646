"""Pages of runs are read back: their numbers against the rows, their markup, and in a browser."""

import dataclasses
import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import tiny_run
from matplotlib import image
from PIL import Image

from scalegpt import report
from scalegpt.checkpoints import manifest
from scalegpt.config import command_line
from scalegpt.errors import Mistake
from scalegpt.model import flops
from scalegpt.run import curves, page
from scalegpt.run.history import comparable, read_history

STEPS, TOKENS = 20, tiny_run.ROWS * tiny_run.T


def write_run(folder, lr=1e-2, until=STEPS, every=5):
    """A run's folder as training writes it, with made-up numbers."""
    argv = tiny_run.arguments("d", folder, optim__lr=lr, optim__steps=STEPS, model__vocab_size=32)
    config = command_line.parse(argv, "test", {})[0]
    rows = [{"step": 0, "val/loss": 5.0, "time": 1.0}]
    for step in range(1, until + 1):
        row = {"step": step, "train/loss": 5 / step, "train/lr": lr, "train/grad_norm": 1.0}
        row |= {"train/tokens": step * TOKENS, "time": 1.0 + step}
        rows.append(
            row | ({"perf/step_seconds": 0.5, "perf/tokens_per_second": 512} if step > 1 else {})
        )
        if step % every == 0:
            rows.append({"step": step, "val/loss": 1 + (step - 15) ** 2 / 100, "time": 2.0 + step})
            rows.append({"step": step, "time/step": step * 0.5, "time/compile": 3.0, "time": 3.0})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": until, "prompt": "", "text": "</pre><script>alert('é')</script>"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    for step, loss in ((15, 1.0), (until, None)):
        place = folder / "checkpoints" / str(step)
        place.mkdir(parents=True)
        meta = {"command": "python -m scalegpt.train --config <mine>", "best_loss": 1.0}
        content = manifest.encode(step, loss, meta, {}, {"params/x": [2_000_000, "0"]})
        (place / manifest.NAME).write_bytes(content)
    (folder / "checkpoints" / "7").mkdir()
    return folder


class Page(html.parser.HTMLParser):
    """Collects a page's words and what a browser would ask the network for."""

    def __init__(self, text):
        super().__init__()
        self.words, self.requests, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.requests += [
            f"{tag} {key}={value}"
            for key, value in attributes
            if key in ("src", "href", "xlink:href") and not value.startswith(("#", "data:"))
        ]
        assert tag != "script"
        self.open += [tag] if tag not in ("meta", "link", "br") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_shows_what_the_runs_have_written_and_asks_the_network_for_nothing(tmp_path, capsys):
    first, second = write_run(tmp_path / "a & b"), write_run(tmp_path / "b", lr=3e-3, until=10)
    out = tmp_path / "both.html"
    assert report.main([str(first), str(second), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    page = Page(out.read_text())
    assert not page.open and not page.requests and "url(http" not in out.read_text()
    text = " ".join(" ".join(page.words).split())
    assert f"{first} done 5,120 0.2500 1.2500 1.0000 at step 15 00:13 512" in text
    assert f"{second} step 10 of 20 2,560 0.5000 1.2500 1.2500 at step 10 00:08 512" in text
    assert curves.NOT_COMPARABLE not in text
    assert "optim.lr 0.01 0.003" in text and "run.out_dir 0" not in text
    assert "15 1.0000 2.0 MB" in text and "best" in text and "7 it is an empty folder" in text
    assert "python -m scalegpt.train --config <mine>" in text
    assert "</pre><script>alert('é')</script>" in text


def test_curves_are_those_of_the_rows_and_their_costs_those_of_the_definitions(tmp_path):
    run = read_history(str(write_run(tmp_path / "a")))
    steps, losses = run.curve("val/loss")
    assert steps.tolist() == [0, 5, 10, 15, 20]
    np.testing.assert_allclose(losses, [5.0, 2.0, 1.25, 1.0, 1.25])
    tokens = np.array([0, 5, 10, 15, 20]) * TOKENS
    np.testing.assert_allclose(run.cost("tokens", steps), tokens)
    each = flops.flops_per_token(run.config.model)
    np.testing.assert_allclose(run.cost("flops", steps), tokens * each)
    np.testing.assert_allclose(run.cost("seconds", steps), steps / 2)
    panel = curves.draw([run]).axes[0]
    drawn = {tuple(line.get_ydata()) for line in panel.lines}
    assert tuple(losses) in drawn and tuple(5 / np.arange(1, 21)) in drawn


def test_a_long_curve_keeps_its_mean():
    x, y = np.arange(12345.0), np.random.default_rng(0).normal(size=12345)
    few_x, few_y = curves.thinned(x, y)
    counts = np.diff([*np.linspace(0, len(x), len(few_x) + 1).astype(int)])
    assert len(few_x) == curves.MOST_POINTS
    np.testing.assert_allclose([few_x @ counts, few_y @ counts], [x.sum(), y.sum()])


def test_of_one_run_the_page_lies_with_it_and_is_written_anew_and_a_picture_is_a_picture(tmp_path):
    folder = write_run(tmp_path / "a")
    for _ in range(2):
        assert report.main([str(folder)]) == 0
    assert "best" in (folder / report.NAME).read_text()
    assert report.main([str(folder), "--png", str(tmp_path / "a.png")]) == 0
    picture = image.imread(tmp_path / "a.png")
    assert picture.shape[1] == 1440 and picture[..., :3].std() > 0.05


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_run_that_has_only_begun_is_shown_and_one_that_gave_up_says_so(tmp_path, rows):
    folder = write_run(tmp_path / "a", until=1)
    lines = ['{"step": 0, "val/loss": 5.0}', '{"step": 1, "train/loss": null, "val/loss": null}']
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:rows]))
    assert report.main([str(folder)]) == 0
    assert ["step 0 of 20", "step 0 of 20", "not finite at step 1"][rows] in (
        folder / report.NAME
    ).read_text()


def test_runs_whose_losses_do_not_compare_share_no_axis_but_that_of_bits_per_byte(tmp_path):
    def run(name, bits=False, fingerprint=None, **changes):
        folder = write_run(tmp_path / name)
        text = (folder / "config.yaml").read_text()
        for key, value in changes.items():
            text = re.sub(rf"\b{key}: .*", f"{key}: {value}", text)
        (folder / "config.yaml").write_text(text)
        history = read_history(str(folder))
        rows = [row | ({BITS: 2.0} if bits and "val/loss" in row else {}) for row in history.rows]
        meta = {"data": {"d": fingerprint}} if fingerprint else {}
        saved = {15: history.checkpoints[15] | {"meta": meta}} if fingerprint else {}
        return dataclasses.replace(history, rows=rows, checkpoints=saved)

    (BITS,) = curves.BITS
    first, same = run("a"), run("b", lr=0.5)
    for other in (run("text", path="e"), run("windows", windows=3), run("length", block_size=8)):
        assert comparable([first, same, other]) == [[first, same], [other]]
        rows = curves.loss_rows([first, same, other])
        assert [(keys, runs) for _, keys, runs in rows] == [
            (curves.LOSSES, [first, same]),
            (curves.LOSSES, [other]),
        ]
    # A folder of the same name may hold other tokens, and one elsewhere the same.
    here, there, new = run("1", fingerprint="x"), run("2", True, "x", path="z"), run("3", True, "y")
    assert comparable([here, there, new]) == [[here, there], [new]]
    assert comparable([here, there, first]) == [[here, first], [there]]
    ((_, keys, runs),) = curves.loss_rows([there, new])
    assert keys == curves.BITS and runs == [there, new]
    assert len(curves.loss_rows([here, new])) == 2  # of the first, bits are not known
    figure = curves.draw([here, new])
    drawn = [len(panel.lines) for panel in figure.axes[:6]]
    assert drawn == [2] * 6  # one run's training and validation in each of two rows
    assert figure.legends[0].get_title().get_text() == curves.NOT_COMPARABLE
    assert curves.NOT_COMPARABLE in page.page([here, new])


def test_long_and_odd_names_of_runs_leave_the_curves_their_room(tmp_path):
    names = [f"modern_124m_openwebtext_lr_6e-4_seed_00{i}" for i in range(4)]
    names += ["$\\frac$", os.fsdecode(b"\xff")]
    for name in names:
        write_run(tmp_path / "new").rename(tmp_path / name)
    runs = [read_history(str(tmp_path / name)) for name in names]
    assert report.main([*(run.name for run in runs), "--out", str(tmp_path / "x.html")]) == 0
    figure = curves.draw(runs)
    figure.draw_without_rendering()  # a warning, as of axes without room, is an error
    assert min(axes.get_position().height * figure.get_figheight() for axes in figure.axes) > 1.4
    said = [text.get_text().replace(r"\$", "$") for text in figure.axes[-1].texts]
    assert said == [*names[:-1], "\N{REPLACEMENT CHARACTER}"]
    edges = [text.get_window_extent() for text in figure.axes[-1].texts]
    assert all(figure.bbox.x0 < edge.x0 and edge.x1 < figure.bbox.x1 for edge in edges)


def test_what_no_run_writes_is_one_line_and_what_ends_meanwhile_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "out/a")
    metrics, samples = folder / "metrics.jsonl", folder / "samples.jsonl"
    (folder / "gone").symlink_to("nowhere")
    huge = '{"step": 1' + "0" * 400 + '}\n{"step": ' + "[" * 100_000
    metrics.write_text(metrics.read_text() + huge)
    assert " done " in report.listing("out")
    metrics.write_text('{"step": 1, "train/loss": 1e304, "val/loss": -1e304}\n')
    samples.write_text(r'{"step": 3, "prompt": "", "text": "half \ud800"}')
    assert report.main(["out/a"]) == 0
    assert "half ?" in (folder / report.NAME).read_text()
    for row in ('{"step": 3}', '{"step": 3, "text": 5}'):
        samples.write_text(row)
        with pytest.raises(Mistake, match="samples.jsonl: text=(None|5) at step 3 is no text"):
            report.main(["out/a"])
    metrics.write_text('{"step": 1, "train/loss": 1.7e308}')
    with pytest.raises(Mistake, match="train/loss=1.7e.308 at step 1 is no number"):
        report.main(["out/a"])


def test_without_a_run_those_in_out_are_listed_with_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match="none is in out/"):
        report.main([])
    for age, (name, until) in enumerate({"ab/arm/seed-1": 20, "b c": 10, "a": 20}.items()):
        for file in write_run(tmp_path / "out" / name, until=until).iterdir():
            os.utime(file, (age, age))
    (tmp_path / "out/a/metrics.jsonl").write_text('{"step": 3, "val/loss": "low"}\n')
    assert report.main([]) == 0
    head, first, second, third, _, line = capsys.readouterr().out.splitlines()[:6]
    assert first.split() == ["out/ab/arm/seed-1", "done", *"1.0000 at step 15".split()]
    assert second.split() == ["out/b", "c", *"step 10 of 20 1.2500 at step 10".split()]
    assert third.startswith("out/a ") and "val/loss='low'" in third
    assert line.endswith("-m scalegpt.report out/ab/arm/seed-1 'out/b c'")


def test_mistakes_are_named_and_no_other_file_is_overwritten(tmp_path):
    folder = write_run(tmp_path / "a")
    (tmp_path / "notes.html").write_text("mine")
    for argv, message in {
        (str(tmp_path),): "is not the folder of a run: it has no config.yaml",
        (str(folder), str(folder)): "given twice",
        ("--png", str(tmp_path / "x.png")): "name its run.out_dir",
        (str(folder), "--out", str(tmp_path / "notes.html")): "is no report of scalegpt",
        (str(folder), "--out", str(tmp_path / "x.pdf")): "must end in .html",
        (str(folder), "--png", str(tmp_path / "x.pdf")): "must end in .png",
        (str(folder), "--out", str(tmp_path / "no" / "x.html")): "No such file",
        (str(folder), "--png", str(tmp_path / "no" / "x.png")): "No such file",
    }.items():
        with pytest.raises(Mistake, match=re.escape(message)):
            report.main(list(argv))
    assert (tmp_path / "notes.html").read_text() == "mine"
    (folder / "metrics.jsonl").write_text('{"step": 3, "val/loss": "low"}\n')
    with pytest.raises(Mistake, match="val/loss='low' at step 3 is no number"):
        report.main([str(folder)])


@pytest.mark.slow
def test_a_browser_shows_it_without_complaint_or_request(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    folder = write_run(tmp_path / "a")
    assert report.main([str(folder)]) == 0
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync"
    options += " --disable-background-networking --disable-component-update --window-size=1280,1800"
    command = [browser, *options.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"--screenshot={tmp_path / 'shot.png'}"]
    done = subprocess.run(
        [*command, f"file://{folder / report.NAME}"], capture_output=True, text=True, timeout=120
    )
    # The page's own policy forbids every request, and a browser reports what it forbids.
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    colours = {colour for _, colour in shot.getcolors(1 << 20)}
    assert (31, 119, 180) in colours and len(colours) > 50  # the first run's blue

    page = (folder / report.NAME).read_text()
    (folder / "bad.html").write_text(page.replace("<h1>", '<img src="http://127.0.0.1:9/x"><h1>'))
    done = subprocess.run(
        [*command, f"file://{folder / 'bad.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" in done.stderr

"""The notebook runs as it is, can be interrupted, and goes on where it was in a new kernel."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny_run import rows

import scalegpt

nbclient = pytest.importorskip("nbclient", reason="a notebook is run by nbclient")
NOTEBOOK = ROOT / "configs" / "notebooks" / "tpu_v5e.ipynb"
CHANGES = {
    "optim": {"steps": 30, "warmup_steps": 5},
    "eval": {"every": 20, "windows": 16, "sample_every": 20},
    "log": {"every": 1},
}


def execute(folder: Path, interrupt_at: int | None = None) -> list[Any]:
    """Run the notebook in a kernel of its own; return what each of its cells shows."""
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.source.startswith("SOURCE ="))
    parameters.source += f"\nCHANGES = {CHANGES!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    over = threading.Event()

    def interrupt() -> None:
        out_dir = folder / "out" / "notebook"
        while not over.wait(0.05):
            if (out_dir / "metrics.jsonl").exists() and max(
                rows(out_dir), default=0
            ) >= interrupt_at:
                return os.kill(client.km.provisioner.pid, signal.SIGINT)  # as Jupyter's button does

    if interrupt_at:
        threading.Thread(target=interrupt, daemon=True).start()
    try:
        client.execute()
    finally:
        over.set()
    return [cell.get("outputs", []) for cell in notebook.cells]


@pytest.mark.oracle
def test_it_is_interrupted_and_goes_on_in_a_new_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="KeyboardInterrupt"):
        execute(tmp_path, interrupt_at=8)
    out_dir = tmp_path / "out" / "notebook"
    stopped = scalegpt.Run.read(str(out_dir))
    assert 8 <= max(stopped.checkpoints) < 30
    outputs = execute(tmp_path)
    texts = ["".join(o.get("text", "") for o in cell) for cell in outputs]
    assert any(f"continuing from step {max(stopped.checkpoints)} in" in text for text in texts)
    assert not any(o["output_type"] == "error" for cell in outputs for o in cell)
    shown = [o["data"] for cell in outputs for o in cell if "data" in o]
    assert any("image/png" in data for data in shown)  # the curves
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)  # the live bar
    assert any(data["text/plain"].endswith("notebook: done>") for data in shown)
    assert sorted(rows(out_dir)) == [*range(1, 31)]
    assert any("--- after update 30" in text for text in texts)
    assert any("(best)" in text for text in texts)

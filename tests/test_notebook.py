"""docs/pipeline.ipynb runs from top to bottom (slow; a small model), and keeps the outputs of a longer run."""

import json

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "pipeline.ipynb"


def printed(cells) -> str:
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def test_its_outputs_are_in_place():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert printed(code).count(" before, ") == 4 and "it fits" in printed(code)
    assert "Traceback" not in json.dumps(code) and "image/png" in json.dumps(code)


@pytest.mark.slow
def test_it_runs(tiny, warm_python, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("MODEL", tiny("llama"))
    monkeypatch.setenv("PYTHON", warm_python)
    monkeypatch.setenv("NOTEBOOK_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("NOTEBOOK_STEPS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert printed(notebook.cells).count(" before, ") == 4

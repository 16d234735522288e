"""The notebooks in recipes/notebooks run from the first to the last cell and show what their text claims."""

import pytest

from tests.commands import ROOT, environment

NOTEBOOKS = ROOT / "recipes" / "notebooks"
HOLDS = {  # what must hold after the last cell
    "grpo_from_python": "assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.2, curve",
    "one_step_by_hand": "assert any(advantages) and len(advantages) == 8 and change.any(), (advantages, change)",
}


def test_every_notebook_is_tested_and_committed_with_its_outputs():
    nbformat = pytest.importorskip("nbformat")
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == HOLDS.keys()
    for path in NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"][0] == 1, "not executed"
        assert outputs and not any(output.output_type == "error" for output in outputs)
        assert path.stat().st_size < 60_000, "an output is large"


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLDS)
def test_a_notebook_runs(name, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(HOLDS[name]))
    notebook.cells.append(nbformat.v4.new_code_cell("import asyncio; asyncio.get_running_loop()"))
    client = nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3")
    client.execute(cwd=str(tmp_path), env=environment(HF_HUB_OFFLINE="1"))

"""The workshop's notebook: it runs from top to bottom, shortened, and leaves nothing behind.

Without nbclient that test is skipped, which pytest says.
"""

import ast
import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "workshop.ipynb"
INSTALL = "pip install -r requirements-workshop.txt"


def cells(kind):
    """The cells of a kind ("code", "markdown") of the notebook as it is committed."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def is_solution(cell):
    return "solution" in cell["metadata"].get("tags", [])


# ---- as it is committed ----


def test_the_notebook_is_committed_without_what_running_it_leaves():
    for cell in cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, source(cell)


def test_every_exercise_has_a_solution_that_is_folded_up():
    asked = [cell for cell in cells("markdown") if source(cell).startswith("### Exercise ")]
    solved = [cell for cell in cells("code") if is_solution(cell)]
    assert len(asked) == len(solved) == 5
    assert all(cell["metadata"]["jupyter"]["source_hidden"] for cell in solved)


def test_no_line_of_the_notebook_is_over_100_columns():
    for cell in cells("code") + cells("markdown"):
        assert [line for line in source(cell).splitlines() if len(line) > 100] == []


def test_the_notebook_calls_the_modules_and_copies_no_function_of_them():
    ours = set()
    for place in (".", "app", "corpora", "lab", "support", "tiny"):
        for path in (ROOT / place).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            ours |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for cell in cells("code"):
        lines = [line for line in source(cell).splitlines() if not line.startswith("%")]
        for node in ast.parse("\n".join(lines)).body:
            assert not (isinstance(node, ast.FunctionDef) and node.name in ours), node.name


def test_the_page_for_teachers_has_every_chapter_and_every_exercise_in_order():
    page = (ROOT / "docs" / "workshop.md").read_text(encoding="utf-8")
    assert len(page.split()) <= 900
    at = 0
    for cell in cells("markdown"):
        first = source(cell).splitlines()[0]
        if first.startswith(("## ", "### Exercise ")):
            at = page.find(first.lstrip("# "), at)
            assert at >= 0, first


# ---- as it runs ----


def everything_in(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def copy_the_checkout(folder):
    """What git knows, and what is new and not ignored, as a fresh clone would have it."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def test_it_runs_to_the_end_shortened_and_leaves_nothing_in_the_checkout(tmp_path):
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"no {name}: {INSTALL}")
    import nbclient
    import nbformat

    checkout, temporary = tmp_path / "checkout", tmp_path / "temporary"
    copy_the_checkout(checkout)
    temporary.mkdir()
    before = everything_in(checkout)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"WORKSHOP_SHORT": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"IPYTHONDIR": str(tmp_path / "ipython")}
    env |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    client = nbclient.NotebookClient(
        nbformat.read(checkout / "workshop.ipynb", as_version=4),
        timeout=600,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(checkout)}},
    )
    notebook = client.execute(env=env)  # an exception, if a cell raises one

    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    assert all(cell.outputs for cell in ran if is_solution(cell))
    shown = []
    for cell in ran:
        assert all(out.output_type != "error" for out in cell.outputs), source(cell)
        shown += [str(out.get("data", {})) for out in cell.outputs]
    assert sum("image/png" in data for data in shown) >= 15  # plots
    assert sum("<audio" in data for data in shown) >= 5

    assert everything_in(checkout) == before
    named = {path.parts[0] for path in everything_in(temporary)}
    assert len([name for name in named if name.startswith("workshop-")]) == 1

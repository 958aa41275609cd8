"""Protects walkthrough.ipynb: it runs from top to bottom, and its saved outputs show the code as it is. Run: pytest tests/test_walkthrough.py (3 minutes)"""
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
AGAIN = "jupyter nbconvert --to notebook --execute --inplace walkthrough.ipynb"


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)


def shown(book) -> list:
    """The sources that its cells print, in order."""
    return [out.data["text/markdown"] for cell in book.cells for out in cell.get("outputs", []) if "text/markdown" in out.get("data", {})]


def sections(book) -> dict:
    found = {}
    for cell in book.cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"## (\d+) (.*)", cell.source)):
            found[heading[1]] = []
        elif found and cell.cell_type == "code":
            found[next(reversed(found))].append(cell)
    return found


def test_each_section_ends_in_an_assertion_and_outputs_are_saved(saved):
    found = sections(saved)
    assert list(found) == [str(n) for n in range(1, 14)]
    for number, cells in found.items():
        assert "assert " in cells[-1].source, number
    for cell in saved.cells:
        if cell.cell_type == "code":
            assert cell.execution_count and not any(out.output_type == "error" for out in cell.outputs)
    assert sum("image/png" in out.get("data", {}) for cell in saved.cells for out in cell.get("outputs", [])) >= 15


def test_every_equation_names_its_variables(saved):
    text = "\n".join(cell.source for cell in saved.cells if cell.cell_type == "markdown")
    equations = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    assert {int(n) for eq in equations for n in re.findall(r"\\tag\{(\d+)\}", eq)} == set(range(1, 11))
    for eq in equations:
        assert "underbrace" in eq and r"\mathtt" in eq and eq.count("{") == eq.count("}"), eq


def test_it_runs_and_shows_the_code_as_it_is(saved, cache, monkeypatch):
    monkeypatch.setenv("AGRPO_CACHE", str(cache))
    book = nbformat.from_dict(saved)
    before = shown(book)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()      # raises at the first error or failed assertion
    assert shown(book) == before, f"agrpo.py has changed: {AGAIN}"

"""Protects walkthrough.ipynb: it runs from top to bottom, and its saved outputs show the code as it
is. Run: pytest tests/test_walkthrough.py --all (3 minutes)"""
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


def outputs(book, kind) -> list:
    """All outputs of a MIME type, in order."""
    found = (out.get("data", {}) for cell in book.cells for out in cell.get("outputs", []))
    return [data[kind] for data in found if kind in data]


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
    assert list(found) == [str(n) for n in range(1, 15)]
    for number, cells in found.items():
        assert "assert " in cells[-1].source, number
    for cell in saved.cells:
        if cell.cell_type == "code":
            assert cell.execution_count
            assert all(out.output_type != "error" for out in cell.outputs)
    assert len(outputs(saved, "image/png")) >= 15


def test_it_is_short_enough_to_be_read(saved):
    markdown, code = ([cell.source for cell in saved.cells if cell.cell_type == kind]
                      for kind in ("markdown", "code"))
    lines = [len(text.splitlines()) for text in code]
    assert sum(len(text.split()) for text in markdown) <= 2500
    assert sum(lines) <= 450 and max(lines) <= 20
    assert not [line for text in code for line in text.splitlines() if len(line) > 100]


def test_every_equation_names_its_variables(saved):
    text = "\n".join(cell.source for cell in saved.cells if cell.cell_type == "markdown")
    equations = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    tags = re.findall(r"\\tag\{(\d+)\}", "".join(equations))
    assert set(map(int, tags)) == set(range(1, 11))
    for eq in equations:
        assert "underbrace" in eq and r"\mathtt" in eq and eq.count("{") == eq.count("}"), eq


@pytest.mark.whole
def test_it_runs_and_shows_the_code_as_it_is(saved, cache, monkeypatch):
    monkeypatch.setenv("AGRPO_CACHE", str(cache))
    before, place = outputs(saved, "text/markdown"), {"metadata": {"path": str(ROOT)}}
    book = nbformat.from_dict(saved)
    NotebookClient(book, timeout=600, resources=place).execute()       # raises at the first error
    assert outputs(book, "text/markdown") == before, f"the code has changed: {AGAIN}"

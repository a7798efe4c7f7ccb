"""Write a notebook of every page that has examples.

    python docs/tools/notebooks.py FOLDER

Examples become cells, without prompts and output; what is between them stays Markdown.  Needs
jupytext (extra docs).
"""

import doctest
import re
import sys
from pathlib import Path

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
_EXAMPLES = re.compile(r"^```python\n(>>> .*?)^```\n", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SOURCE_COMMENT = re.compile(r"^<!-- (?:source: .*|end of source) -->\n", re.MULTILINE)
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def pages() -> list[Path]:
    """Give the pages that have examples."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if _EXAMPLES.search(page.read_text("utf-8"))]


def notebook_of(page: str) -> NotebookNode:
    """Give the text of a page as a notebook."""
    cells = []
    for index, part in enumerate(_EXAMPLES.split(page)):  # prose, examples, prose, …
        if index % 2:
            cells += _cells_of(part)
        elif part.strip():
            cells.append(new_markdown_cell(_prose_of(part)))
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"  # else drawn at random
    return new_notebook(cells=cells, metadata={"kernelspec": _KERNEL})


def _cells_of(examples: str) -> list[NotebookNode]:
    """Cut examples where there is output, since a cell shows the last value only."""
    cells, code = [], ""
    for example in doctest.DocTestParser().get_examples(examples):
        code += example.source
        if example.want:
            # Jupyter goes on behind an error that is meant.
            tags = {"tags": ["raises-exception"]} if example.exc_msg else {}
            cells.append(new_code_cell(code.rstrip(), metadata=tags))
            code = ""
    return [*cells, new_code_cell(code.rstrip())] if code else cells


def _prose_of(part: str) -> str:
    with_formulas = _FORMULA.sub(lambda formula: f"$$\n{formula[1]}$$", part)
    return _SOURCE_COMMENT.sub("", with_formulas).strip()


def write(folder: Path, of_pages: list[Path]) -> None:
    """Write the notebooks of pages into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in of_pages:
        notebook = notebook_of(page.read_text("utf-8"))
        jupytext.write(notebook, folder / f"{page.stem}.ipynb")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/tools/notebooks.py FOLDER")
    write(Path(sys.argv[1]), pages())

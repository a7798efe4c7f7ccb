"""What the site makes of the pages: formulas in MathML, and notebooks that run."""

import contextlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
FENCED_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`]+`")
INLINE = re.compile(r"(?<!\\)\$(?!\s)([^$]+?)(?<!\s)\$")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    yield
    for name in ("formulas", "notebooks"):
        sys.modules.pop(name, None)


@pytest.fixture
def mathml(tools):
    pytest.importorskip("latex2mathml", reason="extra docs")
    from formulas import mathml

    return mathml


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\mathrm{d}y", '<mi mathvariant="normal">d</mi><mi>y</mi>'),
        (r"\mathrm{Var}[x]", "<mi>Var</mi>"),
        (r"\operatorname{softmax}(x)", "<mi>softmax</mi>"),
        (r"x \log x", '<mi>x</mi><mspace width="0.167em" /><mi>log</mi>'),
        (r"\max_i x", '</msub><mspace width="0.167em" /><mi>x</mi>'),
        (r"\partial L / \partial y", "<mi>∂</mi><mi>L</mi><mi>/</mi><mi>∂</mi>"),
        (r"x \sim y", "<mo>∼</mo>"),
        (r"\begin{aligned} a &= b \\ &= c \end{aligned}", 'style="text-align: -webkit-right"'),
        (r"x = -3", '<mo form="prefix">−</mo>'),
        (r"x - 3", "<mo>−</mo>"),
        (r"1 / |M|", '<mo stretchy="false" lspace="0" rspace="0">|</mo>'),
        (r"f'(x)", "<mrow><mi>f</mi><mi>′</mi></mrow>"),
        (r"a < b", "<mo>&lt;</mo>"),
    ],
)
def test_a_formula_becomes_mathml_that_browsers_draw_well(mathml, latex, expected):
    assert expected in mathml(latex)


@pytest.mark.parametrize(
    ("latex", "message"),
    [
        (r"\nosuch x", r"does not know \\nosuch"),
        (r"\frac{a}", "an argument is missing"),
        (r"\operatorname{arg\,max}", "letters only"),
        ("a & b", "& is for aligned"),
        (r"a \\ b", "breaks lines in"),
        (r"\begin{gather} a \end{gather}", "environment gather"),
        (r"\left( a", "ExtraLeftOrMissingRight"),
    ],
)
def test_a_formula_that_cannot_be_converted_is_an_error_that_names_it(mathml, latex, message):
    with pytest.raises(ValueError, match=message) as error:
        mathml(latex)
    assert repr(latex) in str(error.value)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_formula_of_a_page_can_be_converted(mathml, path):
    text = path.read_text("utf-8")
    for language, body in FENCED_BLOCK.findall(text):
        if language == "math":
            mathml(body, display=True)
    for formula in INLINE.findall(CODE.sub("", FENCED_BLOCK.sub("", text))):
        mathml(formula)


@pytest.fixture
def notebooks(tools):
    pytest.importorskip("jupytext", reason="extra docs")
    import notebooks

    return notebooks


PAGE = """# A page

It says $x$:

```math
x = 1
```

<!-- source: some.function -->
```py
x = 1
```
<!-- end of source -->

```python
>>> x = 1
>>> def twice(x):
...     return 2 * x
>>> twice(x)
2
>>> x
1
```

The end.
"""


def test_a_page_becomes_cells_of_prose_and_of_code(notebooks):
    cells = [(cell.cell_type, cell.source) for cell in notebooks.notebook_of(PAGE).cells]
    prose = "# A page\n\nIt says $x$:\n\n$$\nx = 1\n$$\n\n```py\nx = 1\n```"
    assert cells == [
        ("markdown", prose),
        ("code", "x = 1\ndef twice(x):\n    return 2 * x\ntwice(x)"),
        ("code", "x"),
        ("markdown", "The end."),
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_notebook_of_a_page_runs_from_top_to_bottom(notebooks, tmp_path, monkeypatch, path):
    import jupytext

    notebook = notebooks.notebook_of(path.read_text("utf-8"))
    jupytext.write(notebook, tmp_path / "page.ipynb")
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in jupytext.read(tmp_path / "page.ipynb").cells:
        if cell.cell_type == "code":
            meant = "raises-exception" in cell.metadata.get("tags", ())
            with pytest.raises(Exception) if meant else contextlib.nullcontext():  # noqa: PT011
                exec(cell.source, names)
    assert names


def test_the_same_pages_give_the_same_notebooks_one_a_page(notebooks, tmp_path):
    for folder in ("one", "two"):
        notebooks.write(tmp_path / folder, notebooks.pages())
    written = sorted((tmp_path / "one").iterdir())
    assert {path.stem for path in written} == {path.stem for path in PAGES}
    for path in written:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

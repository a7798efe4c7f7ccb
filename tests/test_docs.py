"""The documentation: its examples run as printed, and its links lead where they say."""

import ast
import doctest
import importlib
import re
import runpy
from pathlib import Path

import pytest

import marref
from benchmarks import pictures

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "marref"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING"))]
PICTURES = sorted((ROOT / "docs").glob("*.png"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text("utf-8"))

LAYERS = sorted((PACKAGE / "layers").glob("[!_]*.py"))

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
PAGE_OF_MODULE = re.compile(r"Page:\s+(docs/[\w-]+\.md)\.$")


def name_of(path):
    return str(path.relative_to(ROOT))


def examples_of(text):
    """The examples of a page, with the line numbers of the page."""
    parser = doctest.DocTestParser()
    examples = []
    for block in PYTHON_BLOCK.finditer(text):
        first_line = text.count("\n", 0, block.start(1))
        for example in parser.get_examples(block.group(1)):
            example.lineno += first_line
            examples.append(example)
    return examples


def failures_of(test):
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    runner.run(test, out=report.append)
    return "".join(report)


def links_of(path):
    """The files that a page links to, without the web and places within the page itself."""
    targets = LINK.findall(FENCED_BLOCK.sub("", path.read_text("utf-8")))
    relative = (target.split("#")[0] for target in targets if ":" not in target)
    return {(path.parent / target).resolve() for target in relative if target}


def anchors_of(path):
    """The names of a page's sections, as code hosts make them."""
    text = FENCED_BLOCK.sub("", path.read_text("utf-8"))
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        shown = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        again = found.count(name)
        found.append(f"{name}-{again}" if again else name)
    return found


def page_of(module):
    """The page that a module's docstring names in its last words, or None."""
    found = PAGE_OF_MODULE.search(ast.get_docstring(ast.parse(module.read_text("utf-8"))) or "")
    return found and ROOT / found[1]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_examples_of_a_page_print_what_it_says(path):
    text = path.read_text("utf-8")
    test = doctest.DocTest(examples_of(text), {}, path.name, str(path), 0, text)
    assert failures_of(test) == ""


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_a_docs_page_has_examples_and_every_python_block_is_one(path):
    blocks = PYTHON_BLOCK.findall(path.read_text("utf-8"))
    assert blocks
    assert [block for block in blocks if not block.startswith(">>> ")] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_examples_of_a_module_print_what_it_says(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    assert "".join(failures_of(test) for test in tests) == ""


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_to_files(path):
    assert [target for target in sorted(links_of(path)) if not target.exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_sections_that_a_page_links_to_are_there(path):
    targets = LINK.findall(FENCED_BLOCK.sub("", path.read_text("utf-8")))
    for target in targets:
        page, _, section = target.partition("#")
        if section and ":" not in page:
            linked = (path.parent / page).resolve() if page else path
            assert section in anchors_of(linked), target


@pytest.fixture(scope="module")
def sources():
    return runpy.run_path(str(ROOT / "docs" / "tools" / "sources.py"))


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_the_code_of_a_page_is_that_of_the_package(path, sources):
    text = path.read_text("utf-8")
    # Else: python docs/tools/sources.py
    assert sources["updated"](text) == text


@pytest.fixture(scope="module")
def figures():
    return runpy.run_path(str(ROOT / "docs" / "tools" / "figures.py"))


@pytest.mark.parametrize("path", PICTURES, ids=name_of)
def test_a_picture_says_which_commit_and_which_command_of_a_page_drew_it(path):
    said = pictures.metadata(path)
    # Else: python docs/tools/figures.py --stamp COMMAND PICTURE
    assert re.fullmatch("[0-9a-f]{40}", said["Commit"])
    assert any(said["Command"] in page.read_text("utf-8") for page in PAGES)


def test_no_figure_is_older_than_its_code(figures):
    drawn = [path for path in PICTURES if path.stem in figures["FIGURES"]]
    stale = [
        path.name
        for path in drawn
        if pictures.metadata(path)["Digest"] != figures["digest"](path.stem)
    ]
    assert stale == []  # Else: python docs/tools/figures.py NAME


def test_stamping_a_picture_replaces_what_it_said_and_leaves_its_pixels(tmp_path):
    path = tmp_path / "picture.png"
    original = PICTURES[0].read_bytes()
    path.write_bytes(original)
    for command in ("draw twice", "draw once"):
        pictures.stamp(path, command, Commit="0" * 40)
    said = pictures.metadata(path)
    assert (said["Command"], said["Commit"]) == ("draw once", "0" * 40)
    pixels = original[original.index(b"IDAT") :]
    assert path.read_bytes().endswith(pixels)


def test_citation_and_changes_are_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {marref.__version__}\n" in citation
    newest = re.search(
        r"^## (\S+?),?( |$)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert newest[1] == marref.__version__


def test_the_index_links_every_page():
    index = ROOT / "docs" / "index.md"
    assert set(DOCS) - {index} <= links_of(index)


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE.rglob("*.py") if page_of(path)], ids=name_of
)
def test_the_page_that_a_module_names_links_back_to_it(path):
    assert path in links_of(page_of(path))


@pytest.mark.parametrize("path", LAYERS, ids=name_of)
def test_the_page_of_a_layer_runs_its_backward_and_checks_it(path):
    assert f"{path.stem}.backward" in page_of(path).read_text("utf-8")
    assert "check_layer(" in page_of(path).read_text("utf-8")

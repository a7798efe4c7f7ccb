"""What the site makes of the pages, which stay plain Markdown: MkDocs calls the `on_` functions.

- Links into the repository lead to pages: of a module, its reference and its source, or of a file.
- Formulas become MathML.
- Every module has its page in the reference, every page with examples its notebook.
- Nothing is fetched from elsewhere: the site can be read from a folder.
"""

import html
import posixpath
import re
from pathlib import Path

import notebooks
from formulas import mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "marref"
_LINK = re.compile(r"(?<=\]\()([^()\s:#]+)(?=[#)])")
_NAMED_PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# The dash of mkdocstrings after an argument that needs no words.
_NO_DESCRIPTION = re.compile(r'–\s*<div class="doc-md-description">\s*</div>')
_FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="(?:https?:)?//[^"]*')
_LANGUAGES = {".py": "py", ".c": "c", ".toml": "toml", ".js": "js", ".html": "html"}


def site_uri(path: Path) -> str:
    """Give the page of the site that shows a file, or a folder that is a package."""
    if path.is_relative_to(DOCS) and not path.is_relative_to(DOCS / "tools"):
        return path.relative_to(DOCS).as_posix()
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "marref" and (path / "__init__.py").exists():
        return f"api/{relative.as_posix()}/index.md"
    if relative.parts[0] == "marref" and path.suffix == ".py":
        name = "index" if path.stem == "__init__" else path.stem
        return f"api/{relative.parent.as_posix()}/{name}.md"
    return f"repository/{relative.as_posix()}{'' if path.suffix == '.md' else '.md'}"


def shown_file(uri: str) -> Path:
    """Give the file that a page of the site, but of the reference, shows."""
    if uri.startswith("repository/"):
        return ROOT / uri.removeprefix("repository/")
    return DOCS / uri


def linked_files() -> list[Path]:
    """Give the files outside of docs/ and the package that pages link to, the README first."""
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    for page in pages:  # which grows by what is found
        for target in _LINK.findall(page.read_text("utf-8")) if page.suffix == ".md" else ():
            path = (page.parent / target).resolve()
            shown = path.is_file() and site_uri(path).startswith("repository/")
            if shown and path not in pages:
                pages.append(path)
    return [page for page in pages if not page.is_relative_to(DOCS)]


def listing(path: Path) -> str:
    """Give a file as a page: Markdown as it is, any other as code."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return text
    name = path.relative_to(ROOT).as_posix()
    return f"# `{name}`\n\n`````{_LANGUAGES.get(path.suffix, 'text')}\n{text}`````\n"


def modules(package: Path) -> list[Path]:
    """Give the files and folders of a package that are modules, and public."""
    return [
        path
        for path in sorted(package.iterdir())
        if not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    ]


def navigation(module: Path) -> dict[str, object]:
    """Give the entry of a module, with its submodules below it."""
    if module.is_file():
        return {module.stem: site_uri(module)}
    return {module.name: [site_uri(module), *map(navigation, modules(module))]}


def references(module: Path) -> dict[str, str]:
    """Give the pages of a module and its submodules: what docstrings say, and the file itself."""
    file = module if module.is_file() else module / "__init__.py"
    name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    heading, source = listing(file).split("\n", 1)
    text = f"# {name}\n\n::: {name}\n\n#{heading} {{ data-search-exclude }}\n{source}"
    pages = {site_uri(module): text}
    for below in modules(module) if module.is_dir() else ():
        pages |= references(below)
    return pages


def on_config(config: MkDocsConfig) -> None:
    """Add the reference to the navigation; find out once which pages have a notebook."""
    config.extra["notebooks"] = notebooks.pages()
    assert config.nav is not None
    config.nav.append({"Reference": [navigation(PACKAGE)]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are no files of docs/."""
    shown = {site_uri(path): listing(path) for path in linked_files()}
    for uri, content in {**shown, **references(PACKAGE)}.items():
        files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Take what code hosts and this site say in different ways."""
    uri = page.file.src_uri
    if uri.startswith("api/") or shown_file(uri).suffix != ".md":
        return markdown
    path = shown_file(uri)
    if path in config.extra["notebooks"]:
        page.meta["notebook"] = f"notebooks/{path.stem}.ipynb"

    def site_link(link: re.Match[str]) -> str:
        target = (path.parent / link[1]).resolve()
        if not target.exists():
            return link[1]  # which MkDocs reports
        return posixpath.relpath(site_uri(target), posixpath.dirname(uri))

    markdown = _LINK.sub(site_link, markdown)
    markdown = markdown.replace("<details>", '<details markdown="1">')
    return markdown.replace("```python\n>>> ", "```pycon\n>>> ")


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Turn formulas into MathML; of the reference, tidy what mkdocstrings makes."""

    def formula(found: re.Match[str]) -> str:
        display = found[1] == "div"
        try:
            converted = mathml(html.unescape(found[2]), display=display)
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error
        return f'<div class="formula">{converted}</div>' if display else converted

    content = _FORMULA.sub(formula, content)
    if 'class="arithmatex"' in content:
        raise PluginError(f"{page.file.src_uri}: a formula has been left as it is")
    if page.file.src_uri.startswith("api/"):
        content = _NO_DESCRIPTION.sub("", content)
        up = "../" * page.file.src_uri.count("/")
        content = _NAMED_PAGE.sub(rf'<a href="{up}\1.html">\1</a>', content)
    return content


def on_post_page(output: str, page: Page, **_: object) -> None:
    """See that the page is whole without a network."""
    if fetched := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: fetches from elsewhere: {fetched[0]}")


def on_post_build(config: MkDocsConfig) -> None:
    """Put the notebooks beside the pages."""
    notebooks.write(Path(config.site_dir) / "notebooks", config.extra["notebooks"])

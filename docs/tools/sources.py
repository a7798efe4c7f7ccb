"""Put the package's own code into the pages, between the comments that ask for it.

    python docs/tools/sources.py          write what is not as in the package
    python docs/tools/sources.py --check  name it and fail, without writing

A page asks with ``<!-- source: marref.layers.linear.forward -->``; up to ``<!-- end of source -->``
follows that function, without its docstring, whose formulas the page has.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parents[1]
_ASKED = re.compile(r"<!-- source: ([\w.]+) -->\n.*?<!-- end of source -->", re.DOTALL)


def updated(text: str) -> str:
    """Give the text of a page with every function as it is in the package."""
    return _ASKED.sub(
        lambda asked: (
            f"<!-- source: {asked[1]} -->\n```py\n{code_of(asked[1])}\n```\n<!-- end of source -->"
        ),
        text,
    )


def code_of(name: str) -> str:
    """Give the code of a function, named with its module, without its docstring."""
    module, _, function = name.rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(module), function))
    lines = textwrap.dedent(source).splitlines()
    body = ast.parse("\n".join(lines)).body[0].body  # type: ignore[attr-defined]
    docstring = body[0]
    if isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant):
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    return "\n".join(lines)


def main() -> int:
    """Update the pages, or check that they are up to date."""
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text("utf-8")
        if updated(text) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(updated(text), "utf-8")
    if stale:
        print("\n".join(f"{name}: code is not as in the package" for name in stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

"""LaTeX as MathML, which a browser draws and a screen reader reads without JavaScript.

latex2mathml lets pass what it does not know; here that is an error.
"""

import re
import xml.etree.ElementTree as ET

from latex2mathml import converter

_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
_SIZES = {
    **dict.fromkeys(("mfrac", "mroot", "msub", "msup", "munder", "mover"), 2),
    **dict.fromkeys(("msubsup", "munderover"), 3),
}
# Others it drops without a word.
_ENVIRONMENTS = (
    "aligned",
    "align*",
    "split",
    "array",
    "cases",
    "matrix",
    "pmatrix",
    "bmatrix",
    "vmatrix",
)
# It takes these for identifiers, and the first for the character of the keyboard, …
_OPERATORS = {"~": "∼", "±": "±"}
# … and these for operators, with space on both sides.
_IDENTIFIERS = ("∂", "/")
# It writes an upright letter as a character reference, any other as the letter itself.
_UPRIGHT = re.compile(r"<mi>&#x000([46][1-9A-F]|[57][0-9A]);</mi>")

ET.register_namespace("", _NAMESPACE)


def mathml(latex: str, *, display: bool = False) -> str:
    """Give a formula as MathML; a ValueError says what of it cannot be converted."""
    try:
        for environment in re.findall(r"\\begin\{(.*?)\}", latex):
            if environment not in _ENVIRONMENTS:
                raise ValueError(f"environment {environment} is none of {_ENVIRONMENTS}")
        # What it calls align* is aligned, which it does not know.
        known = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{align*}", latex)
        converted = converter.convert(known, display="block" if display else "inline")
        upright = _UPRIGHT.sub(
            lambda letter: f'<mi mathvariant="normal">{chr(int(letter[1], 16))}</mi>', converted
        )
        root = ET.fromstring(upright)
        for element in root.iter():
            _check(element)
    except ET.ParseError as error:
        message = "& is for aligned, cases and matrices only, \\& for the sign"
        raise ValueError(f"formula {latex.strip()!r}: {message}") from error
    except Exception as error:  # its own have no common class, and often no message
        message = str(error) or type(error).__name__
        raise ValueError(f"formula {latex.strip()!r}: {message}") from error
    for element in root.iter():
        _mend(element)
    for element in root.iter():
        _space(element)
    return ET.tostring(root, encoding="unicode")


def _name(element: ET.Element) -> str:
    return element.tag.removeprefix(f"{{{_NAMESPACE}}}")


def _rename(element: ET.Element, name: str) -> None:
    element.tag = f"{{{_NAMESPACE}}}{name}"


def _check(element: ET.Element) -> None:
    name, text = _name(element), element.text or ""
    if "\\" in text:
        raise ValueError(f"latex2mathml does not know {text}")
    if name == "mo" and not text:
        raise ValueError("an operator's name may have letters only")
    if len(element) != _SIZES.get(name, len(element)):
        raise ValueError("an argument is missing")
    if element.get("linebreak"):
        raise ValueError(r"\\ breaks lines in aligned, cases and matrices only")


def _mend(element: ET.Element) -> None:
    """Mend what browsers would draw badly."""
    if "columnalign" in element.attrib:  # Firefox knows it, Chromium this alone:
        element.set("style", f"text-align: -webkit-{element.attrib['columnalign']}")
    name, text = _name(element), element.text or ""
    if name == "mi" and text in _OPERATORS:
        _rename(element, "mo")
        element.text = _OPERATORS[text]
    word = len(text) > 1 and text.isalpha()  # softmax is no sign between two things either
    if name == "mo" and (word or text in _IDENTIFIERS):
        _rename(element, "mi")
    if name == "mo" and text == "|":  # of |M|, a fence
        element.attrib |= {"lspace": "0", "rspace": "0"}
    if name == "msup" and element[1].text == "′":  # which is raised by itself
        _rename(element, "mrow")
    if len(element) > 1 and all(child.get("mathvariant") == "normal" for child in element):
        word = "".join(child.text or "" for child in element)
        if name == "mrow" and word.isalpha():  # a screen reader would spell it
            element.clear()
            _rename(element, "mi")
            element.text = word


def _space(row: ET.Element) -> None:
    """Put thin spaces around log and its like, and none behind a sign, as LaTeX does."""
    if _name(row) not in ("mrow", "mtd"):
        return
    for index in range(len(row) - 2, -1, -1):
        before, after = row[index], row[index + 1]
        names = _is_name(before) or _is_name(after)
        if names and not any(_name(one) in ("mo", "mspace") for one in (before, after)):
            row.insert(index + 1, ET.Element(f"{{{_NAMESPACE}}}mspace", width="0.167em"))
        ends = (before.text or "") in (")", "]", "|")
        if after.text == "−" and _name(before) == "mo" and not ends:
            after.set("form", "prefix")


def _is_name(element: ET.Element) -> bool:
    if _name(element) in _SIZES and _name(element) != "mfrac":
        return _is_name(element[0])
    return _name(element) == "mi" and len(element.text or "") > 1

"""Words of strangers in cards, pages, figures and terminals: escaped in one place.

Names of classes, data, models and groups come from files that anyone may have written.
"""

import re
from typing import Literal

from markupsafe import Markup, escape

from sosp_hub.errors import printable

Form = Literal["figure", "html", "markdown", "terminal"]
_LONGEST_IN_FIGURE = 60  # characters; what is left out is in the middle, names differ at their ends
_LINE_ENDS = re.compile(r"\s*[\r\n]+\s*|[ \t]{2,}")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_MARKS = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")
_LIST_MARK = re.compile(r"^([-+=]|\d+[.)])(?=\s|$|[-=])")


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""

    __slots__ = ()


def escaped(text: str, form: Form) -> str:
    r"""Text of which nothing is obeyed where it is shown; it reads as it was written.

    Args:
        text: Anything.
        form: ``terminal`` for text without markup; ``figure`` for matplotlib's.

    >>> print(escaped("<b>my_class</b> [x](javascript:y) | $a$", "markdown"))
    &lt;b&gt;my_class&lt;/b&gt; \[x\](javascript:y) \| \$a\$
    """
    text = printable(text)
    if form == "html":
        return escape(text)
    if form == "terminal":
        return text
    text = _LINE_ENDS.sub(" ", text)
    if form == "figure":
        if len(text) > _LONGEST_IN_FIGURE:
            text = f"{text[: _LONGEST_IN_FIGURE // 3]}…{text[-2 * _LONGEST_IN_FIGURE // 3 :]}"
        return text.replace("$", r"\$")
    text = _ENTITY.sub("&amp;", _MARKS.sub(r"\\\g<0>", text))
    text = _LIST_MARK.sub(lambda mark: f"{mark[0][:-1]}\\{mark[0][-1]}", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def markdown(value: object) -> str:
    """A value in Markdown; `Markdown` stays as it is."""
    return value if isinstance(value, Markdown) else escaped(str(value), "markdown")


def html(value: object) -> Markup:
    """A value in HTML; ``Markup`` stays as it is."""
    return value if isinstance(value, Markup) else Markup(escaped(str(value), "html"))


def code(text: str) -> Markdown:
    """Text in a line of Markdown as code, as it is written."""
    text = _LINE_ENDS.sub(" ", printable(text)).strip()
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{ticks}{pad}{text}{pad}{ticks}")


def block(text: str, language: str = "") -> Markdown:
    """Lines of code in Markdown, as they are written."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{ticks}{language}\n{printable(text)}\n{ticks}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)

"""A build hook of the documentation: formulas become MathML, which browsers render themselves, without any script.

Arithmatex marks the formulas of a page; this rewrites them in the finished page. A theme with a renderer of its own
makes it unnecessary.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def as_mathml(tex: str, *, block: bool) -> str:
    """Return a formula as a MathML element that keeps its LaTeX as the accessible name.

    Raises:
        ValueError: LaTeX that the converter does not know, which would stand in the page as letters.

    Example:
        >>> as_mathml("x_1", block=False)
        '<math aria-label="x_1" xmlns="http://www.w3.org/1998/Math/MathML" display="inline">...</math>'
    """
    rendered = convert(tex, display="block" if block else "inline")
    unknown = re.findall(r"\\[A-Za-z]+|<mi>&</mi>", rendered)
    if unknown:
        raise ValueError(f"site_math: a formula must be LaTeX that latex2mathml knows, got {unknown} in {tex!r}.")
    return rendered.replace("<math ", f'<math aria-label="{html.escape(tex)}" ', 1)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""

    def replace(found: re.Match[str]) -> str:
        block = found["open"] == "["
        rendered = as_mathml(html.unescape(found["tex"]).strip(), block=block)
        return f'<div class="formula">{rendered}</div>' if block else rendered

    return _FORMULA.sub(replace, content)

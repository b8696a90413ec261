"""A Griffe extension of the documentation: sections that our docstrings have and Google's style does not know.

`Example:` holds doctests and is rendered as Griffe renders `Examples:`, as code. `Shape:`, `Units:` and `Source:`
become short definitions instead of boxes.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

_OURS = re.compile(r"^(Shape|Units|Source):[ \t]*(.*\n(?:[ \t]+\S.*\n|[ \t]*\n(?=[ \t]+\S))*)", re.MULTILINE)
_TENSOR = re.compile(
    r"(?:^|(?<=[.;]) )((?:\w+(?:, |, and | and |\.)?)+(?: of the result)?): (?=[(\[]|as |one |like |a )"
)


def for_griffe(text: str) -> str:
    """Return a docstring with our own sections written as Markdown, and its doctests under the heading Griffe knows.

    Example:
        >>> print(for_griffe("Shape:" + chr(10) + "    x: (B, N), float. mask: (B, N), bool."), end="")
        **Shape**
        <BLANKLINE>
        - `x`: (B, N), float.
        - `mask`: (B, N), bool.
    """

    def markdown(found: re.Match[str]) -> str:
        name, body = found[1], " ".join(found[2].split())
        if name == "Shape" and _TENSOR.search(body):
            return "**Shape**\n" + _TENSOR.sub(lambda one: f"\n- `{one[1]}`: ", body) + "\n\n"
        return f"**{name}**: {body}\n\n"

    text = _OURS.sub(markdown, text.rstrip() + "\n")
    text = re.sub(r"^\*\*Shape\*\*$", "**Shape**\n", text, flags=re.MULTILINE).replace(
        "**Shape**\n\n\n", "**Shape**\n\n"
    )
    return re.sub(r"^Example:[ \t]*$", "Examples:", text, flags=re.MULTILINE).rstrip() + "\n"


class HouseSections(griffe.Extension):
    """Rewrites each docstring before Griffe parses it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = for_griffe(inspect.cleandoc(obj.docstring.value))

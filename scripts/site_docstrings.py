"""A Griffe extension of the documentation: sections that our docstrings have and Google's style does not know.

`Example:` holds doctests and is rendered as Griffe renders `Examples:`, as code. `Shape:`, `Units:` and `Source:` become
short definitions instead of boxes.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

_OURS = re.compile(r"^(Shape|Units|Source):[ \t]*(.*\n(?:[ \t]+\S.*\n|[ \t]*\n(?=[ \t]+\S))*)", re.MULTILINE)
_TENSOR = re.compile(r"(?:^|(?<=[.;]) )((?:\w+(?:, |, and | and |\.)?)+(?: of the result)?): (?=[(\[]|as |one |like |a )")


def for_griffe(text: str) -> str:
    """Return a docstring with our own sections written as Markdown, and its doctests under the heading Griffe knows.

    Example:
        >>> print(for_griffe("Say.\\n\\nShape:\\n    x: (B, N), float. mask: (B, N),\\n    bool.\\nUnits:\\n    nats.\\n"))
        Say.
        <BLANKLINE>
        **Shape**
        <BLANKLINE>
        - `x`: (B, N), float.
        - `mask`: (B, N), bool.
        <BLANKLINE>
        **Units**: nats.
        <BLANKLINE>
    """

    def markdown(found: re.Match[str]) -> str:
        name, body = found[1], " ".join(found[2].split())
        if name == "Shape" and _TENSOR.search(body):
            return f"**Shape**\n{_TENSOR.sub(lambda one: f'{chr(10)}- `{one[1]}`: ', body)}\n\n".replace("\n- ", "\n\n- ", 1)
        return f"**{name}**: {body}\n\n"

    lines = re.sub(r"^Example:[ \t]*$", "Examples:", _OURS.sub(markdown, text.rstrip() + "\n"), flags=re.MULTILINE)
    return lines.rstrip() + "\n"


class HouseSections(griffe.Extension):
    """Rewrites each docstring before Griffe parses it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = for_griffe(inspect.cleandoc(obj.docstring.value))

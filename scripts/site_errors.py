"""A build hook of the documentation: the error catalogue, read from the `raise` statements of the package.

It fills the marker in `docs/reference/errors.md`, so the page cannot list an error that the code no longer raises.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "tinyalign"
MARKER = "<!-- catalogue of errors -->"
# Of the house form `<who>: <argument> must <rule>, got <value>. <what to do>`; what is filled in is an ellipsis.
_FORM = re.compile(r"(?P<who>[^:]+): (?P<rule>.+?\bmust\b.+?), got (?P<got>.+?)\. (?P<todo>.+)", re.DOTALL)
_INTERNAL = ("AssertionError", "AttributeError", "EOFError", "_")  # none of them is about what a user passed


class Raised(NamedTuple):
    """One `raise` with a message of its own."""

    package: str
    kind: str
    message: str


def raised(package: Path = PACKAGE) -> list[Raised]:
    """Return every `raise Kind("message")` of a package, in the order of files and lines."""
    found = []
    for path in sorted(package.glob("**/*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise)]
        for node in sorted(nodes, key=lambda node: node.lineno):
            if isinstance(node.exc, ast.Call) and node.exc.args:
                kind, message = ast.unparse(node.exc.func), template(node.exc.args[0])
                if message and not kind.startswith(_INTERNAL):
                    part = path.relative_to(package).parts[0].removesuffix(".py")
                    found.append(Raised(part.strip("_"), kind, message))
    return found


def template(node: ast.expr) -> str:
    """Return a message with an ellipsis for everything that is filled in; empty where it is made elsewhere.

    Example:
        >>> template(ast.parse("f'attend: q must be {x}, got {y!r}. Cast it.'", mode="eval").body)
        'attend: q must be …, got …. Cast it.'
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join("…" if isinstance(part, ast.FormattedValue) else str(part.value) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return ""


def catalogue(rows: list[Raised]) -> str:
    """Write one Markdown table per package."""
    parts = []
    for package in dict.fromkeys(row.package for row in rows):
        parts.append(f"\n## {package}\n\n| who | what must hold | what to do | class |\n| --- | --- | --- | --- |\n")
        for row in dict.fromkeys(row for row in rows if row.package == package):
            form = _FORM.fullmatch(row.message)
            cells = (form["who"], form["rule"], form["todo"]) if form else ("", row.message, "")
            parts.append("| " + " | ".join(_cell(cell) for cell in cells) + f" | `{row.kind}` |\n")
    return "".join(parts)


def _cell(text: str) -> str:
    for letter in "\\|*_<>[]`$":
        text = text.replace(letter, f"&#{ord(letter)};")
    return " ".join(text.split())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    return markdown.replace(MARKER, catalogue(raised())) if MARKER in markdown else markdown

"""Small faults for a Python source: every place where one operator, constant or statement can be changed.

A mutant is an edit of the text between two offsets, so that everything else stays as it was written. Docstrings,
annotations, imports, `__all__`, protocols and the wording of messages are left alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip
LOGIC: dict[type[ast.boolop], str] = {ast.And: "or", ast.Or: "and"}


class Mutant(NamedTuple):
    """One fault: which characters become what, on which line, and the kind of change."""

    start: int
    stop: int
    text: str
    line: int
    kind: str

    def apply(self, source: str) -> str:
        """The source with the fault in it."""
        return source[: self.start] + self.text + source[self.stop :]


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a source, in reading order; each compiles and differs from the source."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    whole = ast.dump(ast.parse(source))
    good = []
    for mutant in sorted(set(finder.found)):
        try:
            changed = ast.dump(ast.parse(mutant.apply(source)))
        except SyntaxError:
            continue
        if changed != whole:
            good.append(mutant)
    return good


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[Mutant] = []
        self._bytes = source.encode()
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line.encode()))

    def offset(self, line: int, column: int) -> int:
        """Characters before a position; the syntax tree counts columns in bytes."""
        return len(self._bytes[: self._lines[line - 1] + column].decode())

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def replace(self, node: ast.expr | ast.stmt, text: str, kind: str) -> None:
        self.found.append(Mutant(*self.span(node), text, node.lineno, kind))

    def between(self, left: ast.expr, right: ast.expr, text: str, kind: str) -> None:
        """Replace what stands between two operands, brackets around them aside."""
        start, stop = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:stop]
        operator = gap.strip(" ()\n")
        at = gap.find(operator)
        if operator and "#" not in operator:
            self.found.append(Mutant(start + at, start + at + len(operator), text, left.end_lineno or 0, kind))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
            self._statements(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *(value for value in node.args.kw_defaults if value is not None)]:
            self.visit(default)
        self._statements(node.body)

    def visit_Module(self, node: ast.Module) -> None:
        self._statements(node.body)

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            documents = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not documents and not isinstance(statement, ast.Import | ast.ImportFrom):
                self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace(node, "pass", "drop statement")
        text = ARITHMETIC.get(type(node.op))
        if text:
            self.between(node.target, node.value, text + "=", "arithmetic")
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.replace(node, "pass", "drop statement")
        self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace(node, "pass", "drop statement")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace(node, "return None", "drop result")
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        start, stop = self.span(node.test)
        self.replace(node.test, f"not ({self.source[start:stop]})", "negate condition")
        self.visit(node.test)
        self._statements(node.body)
        self._statements(node.orelse)

    def visit_Assert(self, node: ast.Assert) -> None:
        """An assertion guards our own invariants: nothing a user does reaches it."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """The wording of a message."""

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
            self.between(left, right, COMPARISONS[type(operator)], "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = ARITHMETIC.get(type(node.op))
        wording = isinstance(node.left, ast.JoinedStr) or (
            isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        )
        if text and not wording:
            self.between(node.left, node.right, text, "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, LOGIC[type(node.op)], "logic")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.UAdd):
            start, stop = self.span(node.operand)
            inside = self.source[start:stop]
            self.replace(node, f"({inside})", {ast.Not: "remove not"}.get(type(node.op), "remove sign"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.replace(node, str(not node.value), "constant")
        elif isinstance(node.value, int | float):
            self.replace(node, f"({node.value!r} + 1)", "constant")


def count_by_kind(mutants: list[Mutant]) -> Iterator[tuple[str, int]]:
    """How many of each kind, most frequent first."""
    kinds = [mutant.kind for mutant in mutants]
    yield from sorted(((kind, kinds.count(kind)) for kind in set(kinds)), key=lambda pair: (-pair[1], pair[0]))

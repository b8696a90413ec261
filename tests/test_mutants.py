"""`scripts/mutate.py`: which faults it makes, and that it tells those that tests notice from those they do not."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants_script", SCRIPTS / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def changes(mutants, source):
    """Every line that some mutant of a one-line function body turns into, without its indentation."""
    return {mutant.apply(source).splitlines()[mutant.line - 1].strip() for mutant in mutants.mutants_of(source)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("return a < b", {"return a <= b", "return None"}),
        ("return (a) == (b)", {"return (a) != (b)", "return None"}),
        ("return a is not b", {"return a is b", "return None"}),
        ("return a + b", {"return a - b", "return None"}),
        ("return a // 2", {"return a * 2", "return a // (2 + 1)", "return None"}),
        ("return not a", {"return (a)", "return None"}),
        ("return ~a", {"return (a)", "return None"}),
        ("return a and b or c", {"return a or b or c", "return a and b and c", "return None"}),
        ("return True", {"return False", "return None"}),
        ("return None", set()),
        ("return 'é' < b", {"return 'é' <= b", "return None"}),
        ("a += b", {"a -= b", "pass"}),
        ("print(a)", {"pass"}),
        ("raise ValueError(f'{a + 1} is {b < 2}')", {"pass"}),
        ("a: int = 3", {"a: int = (3 + 1)"}),
        ("assert a < b", set()),
        ("return a <= b < c", {"return a < b < c", "return a <= b <= c", "return None"}),
        ("return 'a%s' % b", {"return None"}),
    ],
)
def test_the_faults_of_one_line(mutants, line, expected):
    assert changes(mutants, f"def f(a, b, c):\n    {line}\n") == expected


def test_what_is_no_behaviour_stays(mutants):
    source = (
        '"""One 1 < 2."""\nfrom typing import Protocol, TYPE_CHECKING\n__all__ = ["a"] * 2\n'
        "if TYPE_CHECKING:\n    x = 1\n"
        "class P(Protocol):\n    def f(self, a: int = 3) -> int: ...\n"
    )
    assert mutants.mutants_of(source) == []


def test_conditions_are_negated_and_both_branches_visited(mutants):
    source = "def f(a):\n    if a:\n        return 1\n    elif a > 2:\n        a.go()\n    else:\n        del a\n"
    found = [(mutant.line, mutant.kind) for mutant in mutants.mutants_of(source)]
    assert found == [
        (2, "negate condition"), (3, "drop result"), (3, "constant"), (4, "negate condition"), (4, "comparison"),
        (4, "constant"), (5, "drop statement"),
    ]  # fmt: skip


def test_every_mutant_of_the_library_compiles_and_differs(mutants):
    for path in sorted((REPOSITORY / "tinyalign" / "connectors").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for mutant in mutants.mutants_of(source):
            assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_run_tells_noticed_faults_from_others_and_goes_on_where_it_stopped(tmp_path):
    package, tests = tmp_path / "tinyalign" / "toy", tmp_path / "tests" / "toy"
    for folder in (package, tests, tmp_path / "scripts"):
        folder.mkdir(parents=True)
    for name in ("mutate.py", "mutants.py"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    source = (
        "def minus(a, b):\n    return a - b\n\n\ndef executed(a, b):\n    return a < b\n\n\ndef forgotten(a):\n"
        "    return not a\n\n\ndef endless(n):\n    while n > 0:\n        n -= 1\n    return n\n"
    )
    (tmp_path / "tinyalign" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "part.py").write_text(source)
    (tests / "test_part.py").write_text(
        "from tinyalign.toy.part import endless, executed, minus\n"
        "def test_minus(): assert minus(5, 3) == 2\n"
        "def test_executed(): executed(1, 2)\n"
        "def test_endless(): assert endless(3) == 0\n"
    )
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow", "gpu"]\n')
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    command = [
        sys.executable,
        "scripts/mutate.py",
        "toy",
        "--mutants",
        "99",
        "--results",
        "found.jsonl",
        "--patience",
        "5",
    ]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    entries = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    found = {(int(entry["place"].rpartition(":")[2]), entry["change"]): entry for entry in entries}
    assert found[2, "- -> +"]["result"] == "killed"
    assert found[2, "- -> +"]["by"] == "tests/toy/test_part.py::test_minus"
    assert found[6, "< -> <="]["result"] == "survived"
    assert found[10, "not a -> (a)"]["by"] == "no test executes it"
    assert found[15, "n -= 1 -> pass"]["result"] == "timeout"
    killed = sum(entry["result"] != "survived" for entry in entries)
    share = round(100 * killed / len(entries))
    row = f"| toy | {len(entries)} | {len(entries)} | {killed} | {len(entries) - killed} | {share} |"
    assert row in said
    assert (package / "part.py").read_text() == source
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert row in again
    assert not re.search(r"^(killed|survived)", again, re.MULTILINE)

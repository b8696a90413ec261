"""Who may import whom, and what an import must not do: each checked in a fresh interpreter or on the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinyalign

PACKAGE = Path(tinyalign.__file__).parent
LEAVES = ("connectors", "perceiver", "memory", "theory", "data")
HEAVY = ("transformers", "sentence_transformers", "xformers", "matplotlib", "pymilvus")


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_packages_do_not_import_each_other(leaf):
    forbidden = {f"tinyalign.{other}" for other in (*LEAVES, "models") if other != leaf}
    files = sorted((PACKAGE / leaf).glob("**/*.py"))
    assert files
    for path in files:
        crossing = {name for name in imports_of(path) if any(name == f or name.startswith(f + ".") for f in forbidden)}
        assert not crossing, f"{path.relative_to(PACKAGE)} imports {sorted(crossing)}"


def test_the_bottom_imports_nothing_above_it():
    bottom = [path for path in PACKAGE.glob("_*.py") if path.name != "__init__.py"]
    bottom += PACKAGE.glob("_*/*.py")
    assert {"_checks.py", "dispatch.py"} <= {path.name for path in bottom}
    for path in bottom:
        assert not {name for name in imports_of(path) if name.startswith("tinyalign.") and "._" not in name}, path


def in_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_loads_alone_and_light(leaf):
    others = [f"tinyalign.{other}" for other in (*LEAVES, "models") if other != leaf]
    loaded = in_fresh_interpreter(
        f"import sys, tinyalign.{leaf}\nprint([m for m in {[*others, *HEAVY]!r} if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_importing_changes_and_prints_nothing():
    state = "(dict(os.environ), list(warnings.filters), list(logging.getLogger().handlers), torch.get_rng_state())"
    parts = ", ".join(f"tinyalign.{leaf}" for leaf in LEAVES)
    printed = in_fresh_interpreter(
        f"import os, logging, warnings, torch\nbefore = {state}\nimport tinyalign, {parts}\nafter = {state}\n"
        "assert before[:3] == after[:3] and torch.equal(before[3], after[3])\n"
    )
    assert printed == ""


def test_the_top_level_names_lead_to_the_parts():
    names = [name for name in tinyalign.__all__ if name != "__version__"]
    assert {"MemoryBank", "TinyAlignVLM", "RAGConnector", "PerceiverCompressor", "attach_memory"} <= set(names)
    for name in names:
        assert getattr(tinyalign, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = tinyalign.Nonsense

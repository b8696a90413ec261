"""Names load on first use: every one resolves, none is hidden by a module of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tinyalign.theory as theory


def test_every_public_name_resolves_and_none_is_a_modules() -> None:
    files = {path.stem for path in Path(theory.__file__).parent.glob("*.py")}
    assert not files & set(theory.__all__)
    for name in theory.__all__:
        assert getattr(theory, name).__module__.startswith("tinyalign.theory."), name
    assert dir(theory) == sorted(theory.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'mutual_infomation'"):
        theory.mutual_infomation  # noqa: B018


def test_importing_the_package_loads_neither_scipy_nor_scikit_learn() -> None:
    code = "import sys, tinyalign.theory; print([m for m in ('scipy', 'sklearn', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Every Python block of the README and the documentation runs, one namespace per page, and every page is reachable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_commands_in_the_docs_name_files_that_exist():
    for page in PAGES:
        for script in re.findall(r"python ((?:examples|benchmarks|scripts)/\w+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_every_public_name_is_documented():
    import importlib

    for package in ("connectors", "memory", "perceiver", "theory", "data", "models"):
        module = importlib.import_module(f"tinyalign.{package}")
        assert (ROOT / "docs" / "reference" / f"{package}.md").is_file()
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or (value.__doc__ or "").strip(), f"tinyalign.{package}.{name} has no docstring"

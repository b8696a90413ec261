"""What keeps the documentation true: its code runs, its pages are reachable, and its lists are those of the code."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
PACKAGES = ("connectors", "memory", "perceiver", "theory", "data", "models", "training", "evaluation")
KINDS = ("tutorials", "how-to", "reference", "explanation")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCES = sorted((ROOT / "tinyalign").glob("**/*.py"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def load_script(name: str, monkeypatch):
    """A module of scripts/, imported as the documentation build imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    text = read(page)
    blocks = BLOCK.findall(text)
    # A block that the expression above does not see would never run.
    assert len(blocks) == len(re.findall(r"^[ \t]*(?:```|~~~)[ \t]*\{?\.?py\w*", text, flags=re.MULTILINE))
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYALIGN_CACHE", str(tmp_path))
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_commands_in_the_docs_name_files_that_exist():
    for page in PAGES:
        for script in re.findall(r"\b((?:examples|benchmarks|scripts)/\w+\.py)", read(page)):
            assert (ROOT / script).is_file(), f"{page.name} names {script}"
        for target in re.findall(r"^make ([\w-]+)", read(page), flags=re.MULTILINE):
            assert f"\n{target}:" in read(ROOT / "Makefile"), f"{page.name} names make {target}"


def test_every_page_is_in_the_navigation_and_in_a_folder_of_its_kind():
    listed = re.findall(r"^ *- [^:]+: ([\w/-]+\.md)$", read(ROOT / "mkdocs.yml"), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md")}
    assert set(listed) == pages
    assert {page.split("/")[0] for page in pages} == {*KINDS, "index.md"}


def test_the_site_needs_nothing_from_elsewhere():
    settings = read(ROOT / "mkdocs.yml")
    assert "font: false" in settings
    assert "custom_dir" not in settings, "no theme overrides"
    assert set(re.findall(r"https?://[^\s/]+", settings)) == {"https://tinyalign.readthedocs.io"}
    for page in PAGES:
        assert not re.findall(r"<script|<iframe|src=\"http|!\[[^\]]*\]\(http", read(page)), page
    assert not re.findall(r"url\(|@import", read(DOCS / "stylesheets" / "site.css"))


def test_every_public_name_has_a_reference():
    for package in PACKAGES:
        module = importlib.import_module(f"tinyalign.{package}")
        assert f"::: tinyalign.{package}\n" in read(DOCS / "reference" / f"{package}.md")
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or (value.__doc__ or "").strip(), f"tinyalign.{package}.{name} has no docstring"


def test_names_that_pages_refer_to_exist():
    for page in PAGES:
        for target in re.findall(r"\]\[(tinyalign(?:\.\w+)+)\]", read(page)):
            module, name = target.rsplit(".", 1)
            assert hasattr(importlib.import_module(module), name), f"{page.name} refers to {target}"


def test_the_configuration_page_lists_what_there_is():
    from tinyalign.models import TinyAlignConfig

    page = read(DOCS / "reference" / "configuration.md")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE))
    fields = [name for name in vars(TinyAlignConfig)["__annotations__"] if not name.startswith("_")]
    assert fields
    for name in fields:
        default = getattr(TinyAlignConfig(), name)
        shown = rows[name].strip().strip("`").strip('"')
        assert name.endswith("_config") or shown == str(default), f"{name}: {shown} is not {default}"
    source = "\n".join(map(read, SOURCES))
    read_from = set(re.findall(r"environ(?:\.get\(|\[)\s*\"(\w+)\"", source))
    read_from |= set(re.findall(r"^ENVIRONMENT_VARIABLE = \"(\w+)\"", source, flags=re.MULTILINE))
    assert {"TINYALIGN_ATTENTION_BACKEND", "TINYALIGN_CACHE", "RANK"} <= read_from
    for name in read_from:
        assert f"`{name}`" in page, f"the environment variable {name} is read and not documented"
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", read(ROOT / "pyproject.toml"), re.DOTALL)[1]
    for name in set(re.findall(r"^(\w+) = \[", extras, flags=re.MULTILINE)) - {"dev", "docs", "examples", "pyright"}:
        assert f"`{name}`" in page, f"the extra {name} is not documented"


def test_the_error_page_lists_every_class_and_finds_every_message(monkeypatch):
    page = read(DOCS / "reference" / "errors.md")
    trees = [ast.parse(read(path)) for path in SOURCES]
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    errors = {name for name in classes if name.endswith(("Error", "Mismatch")) and not name.startswith("_")}
    assert "BankError" in errors
    assert errors == set(re.findall(r"^\| \[`(\w+)`\]", page, flags=re.MULTILINE))
    site_errors = load_script("site_errors", monkeypatch)
    assert page.count(site_errors.MARKER) == 1
    rows = site_errors.raised()
    raises = sum(isinstance(node, ast.Raise) and node.exc is not None for tree in trees for node in ast.walk(tree))
    assert 0.9 * raises < len(rows) <= raises
    shown = site_errors.on_page_markdown(page)
    assert "backend must be one of" in shown
    assert site_errors.MARKER not in shown


def test_every_message_says_what_must_hold_and_what_to_do(monkeypatch):
    site_errors = load_script("site_errors", monkeypatch)
    elsewhere = (
        "LlavaCollator: sample …: …",  # hands on what the record's own error says
        "the constant …",  # becomes part of a longer message
        "EmbeddingPlug.use: only one set",
    )
    loose = [row.message for row in site_errors.raised() if not site_errors._FORM.fullmatch(row.message)]
    assert [message for message in loose if not message.startswith(elsewhere)] == []
    assert len(loose) == len(elsewhere)


@pytest.mark.parametrize("name", ["site_docstrings", "site_errors", "site_links", "site_math"])
def test_examples_of_the_build_hooks(name, monkeypatch):
    for needed in {"site_docstrings": ("griffe",), "site_math": ("latex2mathml",)}.get(name, ()):
        pytest.importorskip(needed, reason="the extra [docs] is not installed")
    result = doctest.testmod(load_script(name, monkeypatch), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_formula_is_one_that_can_be_rendered(monkeypatch):
    pytest.importorskip("latex2mathml", reason="the extra [docs] is not installed")
    site_math = load_script("site_math", monkeypatch)
    formulas = []
    for page in DOCS.glob("**/*.md"):
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", read(page), flags=re.MULTILINE | re.DOTALL)
        formulas += re.findall(r"(?<![\\$\w])\$([^$\s][^$\n]*?)\$(?!\w)", text)
    assert len(formulas) > 20
    for formula in formulas:
        assert site_math.as_mathml(formula, block=False).startswith("<math")
    with pytest.raises(ValueError, match=r"\\nosuch"):
        site_math.as_mathml(r"\nosuch{x}", block=False)
    seen = site_math.on_page_content('<p><span class="arithmatex">\\(x &lt; y\\)</span></p>')
    assert "arithmatex" not in seen
    assert "&lt;" in seen


def test_broken_links_are_found(tmp_path, monkeypatch):
    site_links = load_script("site_links", monkeypatch)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<h1 id="top">A</h1><a href="../b.html#there">b</a><img src="../x.png">')
    (tmp_path / "b.html").write_text(
        '<p id="here"><a href="a/#top">a</a><a href="a/#gone">a</a><a href="https://x.y">x</a>'
    )
    assert site_links.broken_links(tmp_path) == [
        "a/index.html: '../b.html#there' names no anchor of b.html",
        "a/index.html: '../x.png' leads to no file",
        "b.html: 'a/#gone' names no anchor of a/index.html",
    ]

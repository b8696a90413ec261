"""What is uploaded: wheel and source archive are built, and the wheel is used in an environment of its own.

The environment is fresh and holds nothing but the wheel; its dependencies are read from this one's site-packages, which
a `.pth` line adds to the path behind its own. Torch is not installed a second time.
"""

from __future__ import annotations

import re
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("connectors", "memory", "perceiver", "theory", "data", "models", "training", "evaluation")
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the archives")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter that has the wheel installed."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    interpreter = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", "--quiet", wheel)
    own = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    others = {sysconfig.get_path("purelib"), *site.getsitepackages()}
    (own / "dependencies.pth").write_text("\n".join(sorted(others)) + "\n", encoding="utf-8")
    return interpreter


def names_of(archive: zipfile.ZipFile | tarfile.TarFile) -> set[str]:
    names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else archive.getnames()
    return {name for name in names if not name.endswith("/")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = names_of(archive)
        metadata = Parser().parsestr(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        )
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tinyalign").glob("**/*.py")}
    assert modules | {"tinyalign/py.typed"} == {name for name in names if ".dist-info/" not in name}
    assert metadata["Name"] == "tinyalign-vlm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"xformers", "train", "eval", "milvus", "plot"} <= set(metadata.get_all("Provides-Extra"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in required if "==" in line or "<" in line], "lower bounds only"


def test_the_source_archive_builds_the_same_wheel(built, wheel, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = names_of(archive)
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    for path in (
        "LICENSE",
        "README.md",
        "tests/test_package.py",
        "mkdocs.yml",
        "scripts/check_site.py",
        "docs/index.md",
    ):
        assert path in inside, path
    assert not [name for name in inside if re.search(r"__pycache__|\.pyc$|(^|/)runs/|(^|/)site/", name)]
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=unpacked)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(next((tmp_path / "again").glob("*.whl"))) as other:
        assert names_of(one) == names_of(other)


def test_every_public_name_is_imported_from_the_wheel(python, tmp_path):
    code = (
        "import importlib, tinyalign\n"
        "print(tinyalign.__file__)\n"
        f"for package in {PACKAGES!r}:\n"
        "    module = importlib.import_module(f'tinyalign.{package}')\n"
        "    for name in module.__all__:\n"
        "        getattr(module, name)\n"
        "for name in tinyalign.__all__:\n"
        "    getattr(tinyalign, name)\n"
        "from importlib.metadata import version\n"
        "assert version('tinyalign-vlm') == tinyalign.__version__\n"
    )
    place = Path(run(python, "-c", code, cwd=tmp_path).splitlines()[0])
    assert place.is_relative_to(python.parent.parent)


def test_the_snippet_of_the_readme_runs_with_the_wheel(python, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        run(python, "-c", block, cwd=tmp_path)


def test_a_typed_script_type_checks(tmp_path):
    pytest.importorskip("mypy")
    script = ROOT / "tests" / "typed_user_script.py"
    run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, script, cwd=ROOT)
    broken = tmp_path / "broken.py"
    broken.write_text(script.read_text(encoding="utf-8").replace("  # type: ignore[arg-type]", ""), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, str(broken)],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("[arg-type]") == 2

"""Does any test notice? Break one line at a time in a copy of the repository and run the tests that execute it.

    python scripts/mutate.py perceiver connectors --mutants 60 --results runs/mutants.jsonl
    python scripts/mutate.py perceiver --mutants 60 --results runs/mutants.jsonl --seconds 240  # again until done
    python scripts/mutate.py perceiver --mutants 60 --results runs/mutants.jsonl --survivors    # after writing tests

A sample of all mutants of a package is drawn by seed (`scripts/mutants.py` says which there are). The default tests run
once with coverage to learn which test executes which line; a mutant then meets only those, quickest first, and is
killed by the first failure. One that no test executes has survived. What hangs for ten times as long as all tests took
counts as killed. The working tree is never edited. POSIX only: every run is a fork that finds the libraries loaded.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]
# Sources and tests of a package, where they are more than tinyalign/NAME and tests/NAME.
SOURCES = {"perceiver": ("tinyalign/perceiver", "tinyalign/_attention")}
SHARED_TESTS = ("tests/test_contract.py",)
PRELOAD = ("torch", "transformers", "transformers.models.perceiver", "hypothesis", "scipy.stats", "sklearn", "faiss")
COPIED = ("tinyalign", "tests", "examples", "scripts", "benchmarks", "pyproject.toml", "README.md", "docs")


class Target(NamedTuple):
    """A mutant and where it lives."""

    package: str
    path: str
    mutant: Mutant
    source: str

    @property
    def key(self) -> str:
        """Changes when the file or the fault does."""
        return hashlib.sha256(f"{self.path}|{self.source}|{self.mutant}".encode()).hexdigest()[:16]

    @property
    def change(self) -> str:
        """Before and after, on one line."""
        before = " ".join(self.source[self.mutant.start : self.mutant.stop].split())
        return f"{before[:60]} -> {' '.join(self.mutant.text.split())[:60]}"


def sample(package: str, count: int, seed: int) -> tuple[list[Target], int]:
    """`count` mutants of a package in random order, and how many there are."""
    targets = []
    for folder in SOURCES.get(package, (f"tinyalign/{package}",)):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            source = path.read_text(encoding="utf-8")
            name = str(path.relative_to(ROOT))
            targets += [Target(package, name, mutant, source) for mutant in mutants_of(source)]
    return random.Random(seed).sample(targets, min(count, len(targets))), len(targets)


def tests_of(package: str) -> list[str]:
    folders = (f"tests/{package}", *SHARED_TESTS, *SOURCES.get(package, (f"tinyalign/{package}",)))
    return [folder for folder in folders if (ROOT / folder).exists()]


class Recorder:
    """A pytest plugin: how long each test took, and which failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for setup, call and teardown of each test."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(copy: Path, arguments: list[str], timeout: float) -> dict[str, Any]:
    """Pytest in a fork, inside the copy: its exit status, seconds per test, failures; status None when it hung."""
    answer = copy / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 70
        with contextlib.suppress(BaseException):
            os.setsid()
            sink = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            import pytest

            recorder = Recorder()
            plain = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu"]
            status = int(pytest.main([*plain, *arguments], plugins=[recorder]))
            answer.write_text(json.dumps({"seconds": recorder.seconds, "failed": recorder.failed}))
        os._exit(status)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            found = json.loads(answer.read_text()) if answer.exists() else {"seconds": {}, "failed": []}
            return {"status": os.waitstatus_to_exitcode(code), **found}
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"status": None, "seconds": {}, "failed": []}


class Bench:
    """A copy of the repository in which one package's tests pass, and who executes which line."""

    def __init__(self, copy: Path, package: str, remembered: Path | None) -> None:
        self.copy, self.tests = copy, tests_of(package)
        state = hashlib.sha256()
        for folder in [*self.tests, *SOURCES.get(package, (f"tinyalign/{package}",))]:
            for path in sorted((copy / folder).glob("**/*.py")) or [copy / folder]:
                state.update(path.read_bytes())
        known = json.loads(remembered.read_text()) if remembered and remembered.exists() else {}
        if known.get("state") != state.hexdigest():
            known = {"state": state.hexdigest(), **self._run_whole(package)}
            if remembered:
                remembered.parent.mkdir(parents=True, exist_ok=True)
                remembered.write_text(json.dumps(known))
        self.took: float = known["took"]
        self.seconds: dict[str, float] = known["seconds"]
        self.by_line: dict[str, dict[str, list[str]]] = known["by_line"]

    def _run_whole(self, package: str) -> dict[str, Any]:
        """All tests of the package under coverage."""
        import coverage

        sources = [f"--cov={self.copy / folder}" for folder in SOURCES.get(package, (f"tinyalign/{package}",))]
        began = time.monotonic()
        result = run_tests(
            self.copy,
            [*sources, "--cov-context=test", "--cov-report=", "--cov-fail-under=0", *self.tests],
            timeout=3600,
        )
        if result["status"] != 0:
            said = (self.copy / "output.txt").read_text(errors="replace")[-3000:]
            raise SystemExit(f"the tests of {package} must pass before anything is broken; they said:\n{said}")
        data = coverage.CoverageData(str(self.copy / ".coverage"))
        data.read()
        lines = {
            str(Path(name).relative_to(self.copy)): data.contexts_by_lineno(name) for name in data.measured_files()
        }
        took = time.monotonic() - began
        return json.loads(json.dumps({"took": took, "seconds": result["seconds"], "by_line": lines}))

    def tests_for(self, path: str, lines: range) -> list[str] | None:
        """Tests that execute one of the lines, quickest first; None when a line runs at import: all of them."""
        contexts = {context for line in lines for context in self.by_line.get(path, {}).get(str(line), [])}
        if "" in contexts:
            return None
        names = {context.rpartition("|")[0] for context in contexts} & self.seconds.keys()
        return sorted(names, key=lambda name: self.seconds[name])

    def try_mutant(self, target: Target, patience: float) -> tuple[str, str]:
        """("killed" or "survived" or "timeout", the test that noticed)."""
        stop = target.mutant.line + target.source[target.mutant.start : target.mutant.stop].count("\n")
        names = self.tests_for(target.path, range(statement_start(target), stop + 1))
        if names is not None and not names:
            return "survived", "no test executes it"
        chosen = self.tests if names is None else [f"@{self.write_names(names)}"]
        place = self.copy / target.path
        place.write_text(target.mutant.apply(target.source), encoding="utf-8")
        try:
            result = run_tests(self.copy, ["-x", *chosen], timeout=patience + 10 * self.took)
        finally:
            place.write_text(target.source, encoding="utf-8")
            for compiled in self.copy.glob(str(Path(target.path).parent / "__pycache__" / f"{place.stem}.*")):
                compiled.unlink()  # written within the same second, it would pass for the next mutant's
        if result["status"] is None:
            return "timeout", "hung"
        return ("survived", "") if result["status"] == 0 else ("killed", (result["failed"] or ["at collection"])[0])

    def write_names(self, names: list[str]) -> Path:
        """A file that pytest reads arguments from: there may be hundreds."""
        path = self.copy / "names.txt"
        path.write_text("\n".join(names))
        return path


def statement_start(target: Target) -> int:
    """First line of the innermost statement around a mutant: coverage knows statements by that line."""
    lines = [
        node.lineno
        for node in ast.walk(ast.parse(target.source))
        if isinstance(node, ast.stmt) and node.lineno <= target.mutant.line <= (node.end_lineno or node.lineno)
    ]
    return max(lines)


def copy_repository(to: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *COPIED], cwd=ROOT, check=True,
        capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def table(packages: dict[str, tuple[list[Target], int]], results: dict[str, dict[str, str]]) -> str:
    rows = ["| package | possible mutants | tried | killed | survived | killed, % |", "| --- " * 6 + "|"]
    for package, (targets, possible) in packages.items():
        tried = [results[target.key]["result"] for target in targets if target.key in results]
        killed = sum(result != "survived" for result in tried)
        share = f"{100 * killed / len(tried):.0f}" if tried else "-"
        rows.append(f"| {package} | {possible} | {len(tried)} | {killed} | {len(tried) - killed} | {share} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE")
    parser.add_argument("--mutants", type=int, default=60, help="sampled per package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="JSON lines; what stands there is not repeated")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="per package, start no mutant after this long"
    )
    parser.add_argument("--patience", type=float, default=30.0, help="seconds beyond ten times what the tests took")
    parser.add_argument("--survivors", action="store_true", help="try those again that survived before")
    arguments = parser.parse_args()
    began = time.monotonic()
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    results: dict[str, dict[str, str]] = {}
    if arguments.results and arguments.results.exists():
        for line in arguments.results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            results[entry["key"]] = entry
    if arguments.survivors:
        results = {key: entry for key, entry in results.items() if entry["result"] != "survived"}
    packages = {package: sample(package, arguments.mutants, arguments.seed) for package in arguments.packages}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve()
        copy_repository(copy)
        for package, (targets, _) in packages.items():
            left = [target for target in targets if target.key not in results]
            if not left:
                continue
            beside = arguments.results and arguments.results.with_suffix(f".{package}.json")
            bench = Bench(copy, package, beside)
            began = time.monotonic()
            for target in left:
                if time.monotonic() - began > arguments.seconds:
                    break
                result, noticed = bench.try_mutant(target, arguments.patience)
                place = f"{target.path}:{target.mutant.line}"
                entry = {"key": target.key, "result": result, "place": place, "change": target.change, "by": noticed}
                results[target.key] = entry
                print(f"{result:9s} {place} {target.mutant.kind}: {target.change}   {noticed}", flush=True)
                if arguments.results:
                    arguments.results.parent.mkdir(parents=True, exist_ok=True)
                    with arguments.results.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(entry) + "\n")
    print(f"\nseed {arguments.seed}, {arguments.mutants} mutants per package\n")
    print(table(packages, results))


if __name__ == "__main__":
    main()

"""examples/measure_alignment.py as a user runs it: its smoke run says what its docstring predicts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinyalign.theory import NLLTable, delta_emi

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "measure_alignment.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.mark.slow
def test_smoke_reaches_what_it_predicts_and_its_tables_give_the_same(tmp_path: Path) -> None:
    done = run("--smoke", "--save", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    image = re.search(r"^image +([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] nats/token, above zero", done.stdout, re.M)
    assert image is not None
    assert 0.2 < float(image[1]) < 0.4
    gain = re.search(r"^baseline -> bank +([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", done.stdout, re.M)
    assert gain is not None
    base, judged = (NLLTable.load(tmp_path / f"{name}-full.safetensors") for name in ("a", "b"))
    again = delta_emi(base, judged, per="token")
    assert [float(gain[at]) for at in (1, 2, 3)] == pytest.approx([again.value, again.low, again.high], abs=1e-4)
    for control in ("shuffled", "random", "constant", "off"):
        assert re.search(rf"^{control} -> bank", done.stdout, re.M)


@pytest.mark.slow
def test_it_says_what_is_missing() -> None:
    done = run("--a", "somewhere")
    assert done.returncode == 2
    assert "--b is required (or --digits, --smoke)" in done.stderr

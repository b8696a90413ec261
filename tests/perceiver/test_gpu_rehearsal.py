"""What needs a GPU, run on a CPU that answers to its name (`stand_in_cuda.py`): calls and results, not speed.

So that on the day a GPU is at hand nothing is run for the first time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
BENCHMARK = HERE.parents[1] / "benchmarks" / "attention.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real thing is here: run pytest -m gpu")


def run(*command):
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_every_gpu_test_passes_on_the_stand_in():
    out = run(
        *("-m", "pytest", "-p", "stand_in_cuda", "-p", "no:xdist", "-p", "no:cacheprovider"),
        *("-o", "addopts=--import-mode=importlib", "-m", "gpu", "-v", str(HERE / "test_gpu.py")),
    )
    outcomes = re.findall(r"::(test_\w+).* (PASSED|SKIPPED)", out)
    skipped = {name for name, outcome in outcomes if outcome == "SKIPPED"}
    assert skipped <= {"test_compiles_whole_on_the_device"}  # where torch was not built for CUDA
    names = set(re.findall(r"^def (test_\w+)", (HERE / "test_gpu.py").read_text(), re.M))
    assert {name for name, _ in outcomes} == names


BENCH = """
import runpy, sys
import pytest
import stand_in_cuda
stand_in_cuda.install(pytest.MonkeyPatch())
sys.argv = sys.argv[1:]
with stand_in_cuda.DEVICE_MODE:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_benchmark_of_kernels_runs_to_its_end_and_writes_its_file(tmp_path):
    file = tmp_path / "results" / "attention.json"
    out = run("-c", BENCH, str(BENCHMARK), "--smoke", "--output", str(file))
    assert f"written to {file}" in out
    written = json.loads(file.read_text())
    assert written["device"] == "Stand-in"
    assert written["versions"]["xformers"] == "stand-in"
    assert set(written["versions"]) == {"python", "torch", "cuda", "cudnn", "transformers", "xformers"}
    assert set(written["results"]) == {"float32", "float16", "bfloat16"}
    for dtype, rows in written["results"].items():
        by_name = {row["workload"].split(",")[0]: row for row in rows}
        assert set(by_name) == {
            "latents read 729 patches",
            "latents read ragged captions",
            "latents among themselves",
            "encoder",
            "ragged captions",
        }
        for name, row in by_name.items():
            assert row["declined"] == {}, dtype
            packed = {"xformers, packed", "sdpa, packed"} if "ragged" in name else set()
            eager = set() if name == "ragged captions" else {"transformers, eager"}
            assert set(row["sides"]) == {"xformers", "sdpa", "reference"} | packed | eager
            assert row["automatic"] == "xformers"
            assert row["fastest"] in row["sides"]
            assert all(set(side) == {"seconds", "device_seconds", "peak_bytes"} for side in row["sides"].values())

"""The example scripts as a user runs them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.slow


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(command(script, *arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_build_memory_smoke_reaches_what_it_predicts(tmp_path: Path) -> None:
    said = run("build_memory.py", "--smoke", "--output", tmp_path / "memory")
    assert float(re.findall(r"compressor step 59: image ([\d.]+)", said)[0]) < 1.1
    assert re.search(r"with exclusion: themselves 0\.0%", said)
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {"bank", "compressor", "memory.json"}


def test_train_smoke_reaches_what_it_predicts(tmp_path: Path) -> None:
    run("train_llava_format.py", "--smoke", "--output", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 3.0 < summary["eval_loss_before"] < 3.7
    assert summary["eval_loss"] < 1.2


def test_generate_smoke_agrees_with_itself() -> None:
    said = run("generate.py", "--smoke")
    assert "the second answer agrees: True" in said
    assert len(re.findall(r"memory \d: a \w+ \d and a \w+ \d", said)) == 5


def test_a_killed_run_goes_on_and_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    arguments = ("--smoke", "--max-steps", 120, "--save-steps", 10)
    run("train_llava_format.py", *arguments, "--output", tmp_path / "whole")
    killed = subprocess.Popen(
        command("train_llava_format.py", *arguments, "--output", tmp_path / "killed"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("checkpoint-*/whole.json")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert "going on from" in run("train_llava_format.py", *arguments, "--output", tmp_path / "killed")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("arm", ["off", "prompt", "shuffled"])
def test_other_arms_train_and_answer(tmp_path: Path, arm: str) -> None:
    run("train_llava_format.py", "--smoke", "--retrieval", arm, "--max-steps", 3, "--output", tmp_path / "model")
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    asked = ("--model", tmp_path / "model", "--image", tmp_path / "red.png", "--max-new-tokens", 4)
    assert "answer:" in run("generate.py", *asked, *(() if arm != "shuffled" else ("--retrieval", "bank")))


def test_lora_trains_and_is_merged_on_saving(tmp_path: Path) -> None:
    run("train_llava_format.py", "--smoke", "--lora", 2, "--max-steps", 30, "--save-steps", 10, "--output", tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name]
    assert json.loads((tmp_path / "summary.json").read_text())["eval_loss"] < 3.2
    from tinyalign.models import TinyAlignVLM

    assert TinyAlignVLM.from_pretrained(tmp_path).config.num_neighbours == 5


def test_attach_smoke_reaches_what_it_predicts(tmp_path: Path) -> None:
    said = run("attach_to_vlm.py", "--smoke", "--output", tmp_path)
    assert float(re.findall(r"the last ten steps: ([\d.]+)", said)[0]) < 1.2
    assert "the detached model computes what it did without retrieval: True" in said
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "compressor", "adapter"}


def test_a_loop_of_ones_own_reaches_what_it_predicts() -> None:
    said = run("own_training_loop.py", "--smoke")
    held_out = [float(loss) for loss in re.findall(r"held-out ([\d.]+)", said)]
    assert len(held_out) == 2
    assert max(held_out) < 2.0
    assert len(re.findall(r"says: .*\b(?:red|green|blue|yellow)\b", said)) == 2  # both have learnt to speak

"""The recipes as a user runs them: in processes of their own, in several at once, and killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

pytestmark = pytest.mark.slow


def command(script: str, *arguments: object, processes: int = 1) -> list[str]:
    launcher = TORCHRUN if processes == 2 else ()
    return [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]


def run(script: str, *arguments: object, processes: int = 1, fails: bool = False) -> str:
    done = subprocess.run(
        command(script, *arguments, processes=processes), capture_output=True, text=True, env=ENVIRONMENT, timeout=600
    )
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    """The same global batch: 16 samples by one process, twice 8 by two. The goal is 1e-4 for stage 1."""
    arguments = ("--smoke", "--max-steps", 12, "--logging-steps", 1)
    run("pretrain.py", *arguments, "--per-device-batch", 16, "--output", tmp_path / "one")
    said = run("pretrain.py", *arguments, "--per-device-batch", 8, "--output", tmp_path / "two", processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert one[-1] < one[0] - 0.05  # there was something to agree on
    for name, value in load_file(tmp_path / "one" / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "two" / "model.safetensors")[name], value, rtol=1e-3, atol=1e-4)
    assert said.count("retrieval bank:") == 1


def test_pretrain_then_finetune_then_ask(tmp_path: Path) -> None:
    """What the scripts predict, and a kill of the second in between."""
    run("pretrain.py", "--smoke", "--output", tmp_path / "stage1")
    summary = json.loads((tmp_path / "stage1" / "summary.json").read_text())
    assert 3.0 < summary["eval_loss"] < 3.2 < summary["eval_loss_before"] < 3.6

    arguments = ("--smoke", "--max-steps", 60, "--save-steps", 5, "--output")
    run("finetune.py", *arguments, tmp_path / "whole")
    killed = subprocess.Popen(
        command("finetune.py", *arguments, tmp_path / "killed"), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("checkpoint-*/whole.json")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "going on from" in run("finetune.py", *arguments, tmp_path / "killed")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["eval_loss"] < 1.5 < 3.0 < summary["eval_loss_before"]

    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    said = run("generate.py", "--model", tmp_path / "whole", "--image", tmp_path / "red.png", "--max-new-tokens", 4)
    assert len(re.findall(r"memory \d: ", said)) == 5
    assert "answer:" in said


def test_smoke_runs_in_two_processes(tmp_path: Path) -> None:
    """Each rank once made a folder of its own and waited in it for the other's files."""
    for script, steps in (("train_llava_format.py", 6), ("finetune.py", 6)):
        folder = tmp_path / script
        run(script, "--smoke", "--max-steps", steps, "--output", folder, processes=2)
        assert json.loads((folder / "summary.json").read_text())["eval_loss"] > 0


ON_CPU = """
import runpy, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
made = PartialState.__init__
def make(self, *args, **kwargs):  # accelerate shards on accelerators alone; torch's FSDP2 does on a CPU too
    made(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = make
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("kind", "shards"), [("fsdp", "pytorch_model_fsdp_0/*.distcp"), ("deepspeed", "global_step2/zero_pp_rank_*")]
)
def test_sharded_training_gives_the_model_of_ddp_and_goes_on_bit_for_bit(
    tmp_path: Path, kind: str, shards: str
) -> None:
    """The files of examples/accelerate, but for two processes and float32."""
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    (tmp_path / "on_cpu.py").write_text(ON_CPU)
    arguments = ("--smoke", "--max-steps", 4, "--save-steps", 2, "--output")
    launch = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        "--config_file", EXAMPLES / "accelerate" / f"{kind}.yaml", "--num_processes", 2, "--mixed_precision", "no",
        *([tmp_path / "on_cpu.py"] if kind == "fsdp" else []), EXAMPLES / "finetune.py", *arguments, tmp_path / "parts",
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}

    def sharded() -> dict[str, torch.Tensor]:
        done = subprocess.run(list(map(str, launch)), capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(tmp_path / "parts" / "model.safetensors")

    found = sharded()
    assert len(list((tmp_path / "parts" / "checkpoint-2").glob(shards))) == 2
    run("finetune.py", *arguments, tmp_path / "whole", processes=2)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert max(float((found[name] - whole[name]).abs().max()) for name in found) < 1e-5
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    (tmp_path / "parts" / "model.safetensors").unlink()
    again = sharded()
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_evaluate_smoke_scores_what_it_predicts() -> None:
    """Through lmms-eval where it is installed, else without; an untrained model is right twice in 64 questions."""
    assert run("evaluate.py", "--smoke").count("0.0312") >= 2


def bank_of(folder: Path) -> tuple[dict[str, object], np.ndarray]:
    from tinyalign.memory import MemoryBank

    bank = MemoryBank.load(folder / "bank")
    return dict(bank.fingerprint), bank.keys().float().numpy()


def test_a_bank_of_a_hugging_face_data_set_by_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from tinyalign.data import DigitScenes

    rows = [{"picture": scene.images[0], "caption": scene.turns[1].text} for scene in DigitScenes("memory", 60)]
    features = datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    arguments = (
        "--smoke", "--dataset", tmp_path / "hub", "--image-column", "picture", "--text-column", "caption",
        "--max-samples", 40, "--batch-size", 8, "--seed", 5, "--output",
    )  # fmt: skip
    said = run("build_memory.py", *arguments, tmp_path / "one")
    run("build_memory.py", *arguments, tmp_path / "two", processes=2)
    (facts, keys), (again, other) = bank_of(tmp_path / "one"), bank_of(tmp_path / "two")
    assert facts == again
    assert np.array_equal(keys, other)
    assert (facts["data.drawn"], facts["data.of"], facts["data.seed"]) == (40, 60, 5)
    assert "with exclusion: themselves 0.0%" in said
    assert len(json.loads((tmp_path / "one" / "records" / "data.json").read_text())) == 40


def test_bad_records_are_named_before_the_first_step(tmp_path: Path) -> None:
    from tinyalign.training import write_tiny_experiment

    made = write_tiny_experiment(tmp_path, 8)
    arguments = (
        "--images", made.images, "--llm", made.llm, "--memory", made.memory, "--max-steps", 1, "--per-device-batch", 2,
        "--global-batch", 2, "--workers", 0, "--output", tmp_path / "run", "--data",
    )  # fmt: skip
    records = json.loads(made.train.read_text())
    records[3]["conversations"][1]["value"] = ""
    (tmp_path / "empty.json").write_text(json.dumps(records))
    name = re.escape(records[3]["id"])
    error = run("pretrain.py", *arguments, tmp_path / "empty.json", fails=True)
    assert re.search(
        rf"record '{name}' \(number 3\) must be one to learn from, got one where an answer is empty", error
    )
    assert f"left out {records[3]['id']}" in run("pretrain.py", *arguments, tmp_path / "empty.json", "--skip-bad")
    records[5]["image"] = "nowhere.png"
    (tmp_path / "gone.json").write_text(json.dumps(records))
    assert "must name images that exist" in run("pretrain.py", *arguments, tmp_path / "gone.json", fails=True)
    records[5]["conversations"][0]["value"] = "<image> <image> describe"
    (tmp_path / "two.json").write_text(json.dumps(records))
    error = run("pretrain.py", *arguments, tmp_path / "two.json", fails=True)
    assert "must hold one <image> per image, got 2 placeholders for 1 images" in error
    other = write_tiny_experiment(tmp_path / "other", 8)
    (other.memory / "bank").rename(tmp_path / "bank")
    from tinyalign.models.tiny import write_tiny_parts

    write_tiny_parts(tmp_path / "tower", ["a"], seed=1)
    vision = ("--vision", tmp_path / "tower" / "vision")
    assert "key.encoder_weights" in run("pretrain.py", *arguments, made.train, *vision, fails=True)


FILL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
sys.argv = sys.argv[2:]
import tinyalign.training.trainer as module
real, count = module.save_trained, [0]
def save(*args, **kwargs):
    count[0] += 1
    if count[0] == 2:  # from the second checkpoint on, no file may grow beyond the limit: a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return real(*args, **kwargs)
module.save_trained = save
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("limit", [1 << 10, 80 << 10])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, limit: int) -> None:
    """1 KB stops the weights, 80 KB (connectors of 57 KB) the optimizer's state, which torch writes."""
    arguments = [str(EXAMPLES / "pretrain.py"), "--smoke", "--max-steps", "8", "--save-steps", "3", "--output"]
    full = [sys.executable, "-c", FILL, str(limit), *arguments, str(tmp_path / "run")]
    done = subprocess.run(full, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode
    assert re.search(
        r"CheckpointError: .*checkpoint-6 must be writable to its end, got .*goes on from .*checkpoint-3", done.stderr
    )
    assert not (tmp_path / "run" / "checkpoint-6").exists()
    assert f"going on from {tmp_path / 'run' / 'checkpoint-3'}" in run(
        *("pretrain.py", *arguments[1:], tmp_path / "run")
    )

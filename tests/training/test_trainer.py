"""Runs that stop, break and go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from tinyalign.memory import MemoryBank
from tinyalign.models import TinyAlignProcessor, TinyAlignVLM
from tinyalign.training import CheckpointError, StageTrainer, TinyExperiment, last_whole_checkpoint
from tinyalign.training import trainer as module

Make = Callable[..., StageTrainer]


class StopAt(TrainerCallback):
    """Ends a run as a kill would: after a step, without another checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("instruct", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_ends_bit_for_bit_where_it_would_have(trainer: Make, tmp_path: Path, stage: str) -> None:
    whole = trainer(tmp_path / "whole", stage=stage).run()
    killed = trainer(tmp_path / "killed", stage=stage)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert last_whole_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    again = trainer(tmp_path / "killed", stage=stage)
    assert again.opening().startswith(f"going on from {tmp_path / 'killed' / 'checkpoint-4'}\n24 samples, ")
    resumed = again.run()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (resumed["eval_loss"], resumed["eval_loss_before"]) == (whole["eval_loss"], whole["eval_loss_before"])
    assert whole["eval_loss"] < whole["eval_loss_before"]
    said = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert said["retrieval"] == "bank"
    assert said["eval_loss"] == whole["eval_loss"]


def test_a_checkpoint_holds_what_trained_and_a_bank_nearby(trainer: Make, tiny: TinyExperiment, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", max_steps=2)
    started, numbers = run.opening().split("\n")
    run.run()
    assert started == "from the start"
    saved = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert set(saved) == {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in saved} == {"connector", "rag_connector"}
    assert f" {sum(value.numel() for value in saved.values()):,} parameters train; of the first, " in numbers
    longest = max(len(row) for row in run.data_collator([*run.train_dataset])["attention_mask"])
    assert f"longest={longest + 8})" in numbers  # the rows as collated, and two neighbours of four latents
    config = json.loads((tmp_path / "run/checkpoint-2/config.json").read_text())
    assert not os.path.isabs(config["memory_path"])
    assert (tmp_path / "run/checkpoint-2" / config["memory_path"]).resolve() == (tiny.memory / "bank").resolve()


def test_a_finished_model_moves_with_its_bank(trainer: Make, tiny: TinyExperiment, tmp_path: Path) -> None:
    run = trainer(tmp_path / "here" / "run", max_steps=1)
    bank = tmp_path / "here" / "bank"
    shutil.copytree(tiny.memory / "bank", bank)
    run.model.memory = MemoryBank.load(bank)
    run.run()
    assert not list((tmp_path / "here").glob(".run.saving*"))
    (tmp_path / "here").rename(tmp_path / "there")
    again = TinyAlignVLM.from_pretrained(tmp_path / "there" / "run")
    assert again.memory.path.resolve() == (tmp_path / "there" / "bank").resolve()
    for (name, one), (_, two) in zip(run.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert TinyAlignProcessor.from_pretrained(tmp_path / "there" / "run").num_retrieval_tokens == 8


@pytest.mark.slow
def test_lora_is_resumed_and_merged(trainer: Make, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def with_lora(folder: Path) -> StageTrainer:
        run = trainer(folder, stage="pretrain", max_steps=4)
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=True)
        run.model.language_model = get_peft_model(run.model.language_model, lora)
        run.model.freeze_for("instruct")
        return run

    with_lora(tmp_path / "whole").run()
    killed = with_lora(tmp_path / "killed")
    killed.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    saved = load_file(tmp_path / "killed/checkpoint-2/model.safetensors")
    assert any("lora_A" in name for name in saved)
    assert not any("base_layer" in name for name in saved)
    with_lora(tmp_path / "killed").run()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert not any("lora" in name for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_lora_is_not_sharded(trainer: Make, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.is_fsdp_enabled = True
    run.model.language_model.merge_and_unload = lambda: None
    with pytest.raises(ValueError, match="LoRA must not be sharded by FSDP, got both"):
        run.run()


def test_a_checkpoint_of_another_stage_is_refused(trainer: Make, tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).run()
    with pytest.raises(
        CheckpointError, match=r"must hold what this run trains, got one that misses language_model.* Go on"
    ):
        trainer(tmp_path, stage="instruct").run()
    with pytest.raises(CheckpointError, match=r"got one that also holds rag_connector"):
        trainer(tmp_path, arm="off").run()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
        pytest.param(OSError(28, "No space left on device"), marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = trainer(tmp_path)
    real, calls = torch.save, []

    def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(str(path))
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise error
        real(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 must be writable to its end, got .*goes on from .*checkpoint-2"
    ):
        run.run()
    assert not (tmp_path / "checkpoint-4").exists()
    monkeypatch.undo()
    assert trainer(tmp_path).run()["eval_loss"] is not None
    assert any("checkpoint-4" in path for path in calls)


def test_the_last_checkpoint_goes_only_when_the_next_is_sealed(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the last file and the seal: with a limit of one checkpoint, the one before must still be there."""
    run = trainer(tmp_path, max_steps=4, save_total_limit=1)
    real = module.seal

    def killed(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        real(folder)

    monkeypatch.setattr(module, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    monkeypatch.undo()
    trainer(tmp_path, max_steps=4, save_total_limit=1).run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_an_error_that_is_not_the_disks_stays_what_it_is(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, max_steps=2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        run.run()


def test_no_room_for_the_model_leaves_an_earlier_one(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run", max_steps=1)
    run.run()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()

    def full(self: Any, folder: Path, **kwargs: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TinyAlignVLM, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"save_whole: .*run must have room for the model, got .*No space left"):
        run.save_whole(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_processes_that_would_not_exchange_gradients_are_stopped(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate takes a model that was evaluated for prepared, and never wraps it: every rank trains its own."""
    run = trainer(tmp_path)
    run.evaluate()
    monkeypatch.setattr(type(run.args), "world_size", 2)
    with pytest.raises(RuntimeError, match="must not have been evaluated before in 2 processes"):
        run.train()


def test_another_model_is_refused() -> None:
    with pytest.raises(TypeError, match="StageTrainer: model must be a TinyAlignVLM, got Linear"):
        StageTrainer(nn.Linear(1, 1))


@pytest.mark.parametrize(
    "arm", ["off", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("shuffled", "prompt", "random", "constant"))]
)
def test_every_arm_trains(trainer: Make, tmp_path: Path, arm: str) -> None:
    summary = trainer(tmp_path, arm=arm, max_steps=1, save_steps=5).run()
    assert 2.0 < summary["eval_loss"] < 4.0
    assert bool(list(tmp_path.glob("neighbours-*"))) == (arm == "bank")

"""Whole, broken and foreign checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyalign.training import CheckpointError, last_whole_checkpoint, load_trained, save_trained
from tinyalign.training.checkpoints import SEAL, faults_of, prune, seal, trained_names


def model(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, width))


def checkpoint(output: Path, step: int, *, sealed: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    save_trained(model(), folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "optimizer.pt").write_bytes(b"state")
    if sealed:
        seal(folder)
    return folder


def test_the_newest_whole_one_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, sealed=False)
    broken = checkpoint(tmp_path, 50)
    (broken / "deep" / "optimizer.pt").write_bytes(b"sta")
    (tmp_path / "checkpoint-best").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-100 is passed over: it was not written to its end" in caplog.text
    assert "deep/optimizer.pt has 3 bytes, not 5" in caplog.text
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


@pytest.mark.parametrize("keep", [None, 0, 1, 2])
def test_old_ones_go(tmp_path: Path, keep: int | None) -> None:
    for step in (5, 10, 15):
        checkpoint(tmp_path, step)
    prune(tmp_path, keep)
    left = sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())
    assert left == ([5, 10, 15] if keep is None else [5, 10, 15][-max(keep, 1) :])


def test_what_trains_is_saved_and_read_back(tmp_path: Path) -> None:
    one, two = model(), model()
    frozen = two[0].weight.detach().clone()
    save_trained(one, tmp_path)
    load_trained(two, tmp_path)
    assert trained_names(one) == ["1.bias", "1.weight"]
    assert torch.equal(one[1].weight, two[1].weight)
    assert torch.equal(two[0].weight, frozen)
    wrapped = {f"_orig_mod.{name}": torch.full_like(value, 7.0) for name, value in one.state_dict().items()}
    save_trained(one, tmp_path, wrapped)
    load_trained(two, tmp_path)
    assert (two[1].weight == 7).all()


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    save_trained(model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"one that holds 1.bias as \(3,\), not \(4,\); holds 1.weight"):
        load_trained(model(4), tmp_path)
    with pytest.raises(CheckpointError, match=r"one that misses 0.bias; misses 0.weight\. Go on"):
        load_trained(model().requires_grad_(True), tmp_path)
    with pytest.raises(CheckpointError, match=r"one that also holds 1.bias; also holds 1.weight"):
        load_trained(model().requires_grad_(False), tmp_path)


def test_a_seal_does_not_count_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    seal(folder)
    assert faults_of(folder) == []
    assert SEAL not in (folder / SEAL).read_text()

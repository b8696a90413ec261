"""Neighbours laid ready for training equal what the model would search for itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tinyalign.data import LlavaDataset, Sample, Turn
from tinyalign.memory import MemoryBank
from tinyalign.models import TinyAlignProcessor, TinyAlignVLM
from tinyalign.training import (
    NeighbourFeed,
    TinyExperiment,
    collator_for,
    compose,
    find_neighbours,
    neighbours,
    open_memory,
)

Parts = tuple[TinyAlignVLM, TinyAlignProcessor, LlavaDataset]


@pytest.fixture(scope="module")
def parts(tiny: TinyExperiment) -> Parts:
    model, processor = compose(str(tiny.vision), str(tiny.llm), open_memory(tiny.memory), num_neighbours=3)
    return model, processor, LlavaDataset(tiny.train, tiny.images)


@pytest.mark.parametrize("arm", ["bank", "shuffled", "random", "constant"])
def test_the_feed_gives_what_the_model_would_find(parts: Parts, tmp_path: Path, arm: str) -> None:
    model, processor, samples = parts
    model.config.retrieval = arm
    collate = collator_for(model, processor, samples, tmp_path)
    batch = collate(samples[:6])
    model.train()
    fed = model(**batch)
    live = {name: value for name, value in batch.items() if name not in ("retrieved", "causal_only")}
    searched = model(**live)
    model.config.retrieval = "bank"
    assert torch.equal(fed.neighbour_ids, searched.neighbour_ids)
    torch.testing.assert_close(fed.per_sample_nll, searched.per_sample_nll, rtol=1e-5, atol=1e-5)
    if arm == "bank":
        torch.testing.assert_close(fed.neighbour_scores, searched.neighbour_scores, rtol=1e-5, atol=1e-6)
    assert batch["causal_only"] is True


def test_a_sample_of_the_bank_never_finds_itself_or_its_twin(parts: Parts, tmp_path: Path) -> None:
    model, processor, samples = parts
    bank, regrouped = (MemoryBank(key_dim=64, value_shape=(4, 32)) for _ in range(2))
    keys = torch.cat([neighbours.SampleEncoder(model.query_encoder, processor.image_processor, None).queries([sample])
                      for sample in samples[:8]])  # fmt: skip
    bank.add(keys.repeat(2, 1), torch.zeros(16, 4, 32), ids=torch.arange(16),
             groups=torch.tensor([sample.group for sample in samples[:8]] * 2))  # fmt: skip
    regrouped.add(keys.repeat(2, 1), torch.zeros(16, 4, 32), ids=torch.arange(16))
    own = [sample._replace(sample_id=at) for at, sample in enumerate(samples[:8])]
    before, model.memory = model.memory, bank
    try:
        table = find_neighbours(model, processor.image_processor, own, tmp_path)
        model.memory = regrouped
        twins = find_neighbours(model, processor.image_processor, own, tmp_path)
    finally:
        model.memory = before
    found = table.lookup(torch.arange(8)).ids
    assert ((found % 8) != torch.arange(8)[:, None]).all()
    assert (twins.lookup(torch.arange(8)).ids[:, 0] == torch.arange(8) + 8).all()


def test_a_search_that_is_killed_goes_on(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, samples = parts
    monkeypatch.setattr(neighbours, "CHUNK", 8)
    whole = find_neighbours(model, processor.image_processor, samples, tmp_path / "whole")
    asked = list[int]()
    real = neighbours.SampleEncoder.queries

    def queries(self: Any, batch: Any) -> torch.Tensor:
        if len(asked) == 2 and not os.environ.get("ON"):
            raise KeyboardInterrupt
        asked.append(len(batch))
        return real(self, batch)

    monkeypatch.setattr(neighbours.SampleEncoder, "queries", queries)
    with pytest.raises(KeyboardInterrupt):
        find_neighbours(model, processor.image_processor, samples, tmp_path / "killed")
    monkeypatch.setenv("ON", "1")
    table = find_neighbours(model, processor.image_processor, samples, tmp_path / "killed")
    assert asked == [8, 8, 8]  # 24 samples, none twice
    assert torch.equal(table.lookup(whole.sample_ids).ids, whole.lookup(whole.sample_ids).ids)
    assert [path.name.split("-")[0] for path in (tmp_path / "killed").iterdir()] == ["neighbours"]
    find_neighbours(model, processor.image_processor, samples, tmp_path / "killed")
    assert len(asked) == 3  # the table is there
    find_neighbours(model, processor.image_processor, samples[:8], tmp_path / "killed")
    assert len(asked) == 4  # other samples are another table


def test_ranks_share_the_queries(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 makes its files and waits; rank 0 finds them and searches: the same table as by one process."""
    model, processor, samples = parts
    monkeypatch.setattr(neighbours, "CHUNK", 8)
    alone = find_neighbours(model, processor.image_processor, samples, tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Exception, match="waiting for rank 0 to search"):
        find_neighbours(model, processor.image_processor, samples, tmp_path / "two", timeout=0.0)
    (folder,) = (tmp_path / "two").glob(".queries-*")
    assert [path.name for path in folder.iterdir()] == ["000000008.safetensors"]
    assert load_file(folder / "000000008.safetensors")["queries"].shape == (8, 64)
    monkeypatch.setenv("RANK", "0")
    table = find_neighbours(model, processor.image_processor, samples, tmp_path / "two")
    assert torch.equal(table.lookup(alone.sample_ids).ids, alone.lookup(alone.sample_ids).ids)
    assert torch.equal(table.lookup(alone.sample_ids).scores, alone.lookup(alone.sample_ids).scores)
    assert [path.name for path in folder.iterdir()] == ["000000008.safetensors"]  # rank 1 deletes its own
    monkeypatch.setenv("RANK", "1")
    assert find_neighbours(model, processor.image_processor, samples, tmp_path / "two").k == 3


def test_text_alone_retrieves_nothing_and_needs_a_mask(parts: Parts, tmp_path: Path) -> None:
    model, processor, samples = parts
    text = Sample("t", 1, 1, (), (Turn("user", "which ?"), Turn("assistant", "a red 3 .")))
    collate = collator_for(model, processor, samples, tmp_path)
    batch = collate([samples[0], text])
    assert batch["causal_only"] is False
    values, mask, _, ids = batch["retrieved"]
    assert (ids[1] == -1).all()
    assert mask.tolist() == [[True] * 3, [False] * 3]
    assert (values[1] == 0).all()
    drawn = NeighbourFeed(model.memory, "random", k=2)([samples[0], text])
    assert drawn["retrieved"][1].tolist() == [[True, True], [False, False]]
    assert NeighbourFeed(None, "off")([text]) == {"causal_only": True}


def test_what_cannot_be_fed(parts: Parts, tmp_path: Path, tiny: TinyExperiment) -> None:
    model, processor, samples = parts
    with pytest.raises(ValueError, match=r"NeighbourFeed: table must be given for the arm 'bank'.*got 'bank' and None"):
        NeighbourFeed(model.memory, "bank")
    with pytest.raises(ValueError, match="the arm must not be 'self', got 'self'"):
        NeighbourFeed(model.memory, "self")
    with pytest.raises(ValueError, match=r"samples must have images, got MemoryBank.* and 0 samples"):
        find_neighbours(model, processor.image_processor, [samples[0]._replace(images=())], tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    broken = samples[1]._replace(images=(tmp_path / "bad.png",))
    with pytest.raises(ValueError, match=r"must be a readable picture, got .*bad.png"):
        find_neighbours(model, processor.image_processor, [samples[0], broken], tmp_path)
    shutil.rmtree(tmp_path)


def test_the_length_budget_is_the_smaller_of_both(parts: Parts, tmp_path: Path) -> None:
    model, processor, samples = parts
    assert collator_for(model, processor, samples, tmp_path, max_length=100).max_length == 100
    assert collator_for(model, processor, samples, tmp_path, max_length=9999).max_length == 512
    assert collator_for(model, processor, samples, tmp_path).max_length == 512


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_device_waits_for_nothing(tiny: TinyExperiment, tmp_path: Path) -> None:
    """Forward and backward of a batch as the collator lays it ready: no copy from the device, no mask to ask about."""
    model, processor = compose(str(tiny.vision), str(tiny.llm), open_memory(tiny.memory), num_neighbours=3)
    samples = LlavaDataset(tiny.train, tiny.images)
    batch = collator_for(model, processor, samples, tmp_path)(samples[:4])
    expected = model.train()(**batch).loss.item()
    model.to("cuda")

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(part) for part in value)
        return value.to("cuda") if isinstance(value, torch.Tensor) else value

    batch = {name: moved(value) for name, value in batch.items()}
    model(**batch).loss.backward()  # the tower finds its last layer, and allocations
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model(**batch).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(expected, rel=1e-3)

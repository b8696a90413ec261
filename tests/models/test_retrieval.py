"""The arms, against sorts and sets over the whole bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinyalign.memory import MemoryBank
from tinyalign.models import ARMS, arm_neighbours
from tinyalign.models.retrieval import BANK_ARMS, clear_rows


def nearest(bank: MemoryBank, query: torch.Tensor, k: int, banned: set[int]) -> list[int]:
    """A full sort by cosine."""
    unit = torch.nn.functional.normalize(query.double(), dim=0)
    scores = {int(i): float(bank[int(i)].key.double() @ unit) for i in bank.ids if int(i) not in banned}
    return sorted(scores, key=lambda i: -scores[i])[:k]


def test_bank_is_the_nearest_without_self_and_twins(build: Any) -> None:
    bank, queries = build.bank(), torch.randn(4, 16)
    own = torch.tensor([0, 7, 19, 55])
    found = arm_neighbours(bank, "bank", queries, k=3, sample_ids=own)
    for at, name in enumerate(own.tolist()):
        twins = {name, name ^ 1} if name < 20 else set()
        assert found.ids[at].tolist() == nearest(bank, queries[at], 3, twins)
    given = arm_neighbours(bank, "bank", queries, k=3, sample_ids=own, groups=torch.tensor([-1, -1, -1, 2]))
    assert given.ids[3].tolist() == nearest(bank, queries[3], 3, {4, 5})
    assert arm_neighbours(bank, "bank", queries, k=3).ids[0].tolist() == nearest(bank, queries[0], 3, set())


def test_self_is_the_leak_itself(build: Any) -> None:
    bank = build.bank()
    own = torch.tensor([3, 8])
    found = arm_neighbours(bank, "self", bank.keys(own), k=2, sample_ids=own)
    assert found.ids[:, 0].tolist() == [3, 8]
    with pytest.raises(ValueError, match="sample_ids must be in the bank for arm 'self', got 77 which is not"):
        arm_neighbours(bank, "self", torch.randn(1, 16), sample_ids=torch.tensor([77]))


def test_shuffled_are_real_neighbours_of_another_entry(build: Any) -> None:
    bank = build.bank(40)
    own = torch.arange(0, 40, 2)
    found = arm_neighbours(bank, "shuffled", torch.randn(20, 16), k=2, sample_ids=own)
    others = set()
    for at, name in enumerate(own.tolist()):
        sources = [
            other
            for other in range(40)
            if other // 2 != name // 2
            and nearest(bank, bank[other].key, 2, {name, name ^ 1, other}) == found.ids[at].tolist()
        ]
        assert sources
        others.add(sources[0])
    assert len(others) > 8  # different samples, different strangers


@pytest.mark.parametrize("arm", ["random", "shuffled", "constant"])
def test_controls_do_not_look_at_the_query(build: Any, arm: str) -> None:
    bank, own = build.bank(), torch.arange(20)
    first = arm_neighbours(bank, arm, torch.randn(20, 16), k=3, sample_ids=own)
    second = arm_neighbours(bank, arm, torch.randn(20, 16), k=3, sample_ids=own)
    assert torch.equal(first.ids, second.ids)
    assert first.mask.all()


@pytest.mark.parametrize("arm", BANK_ARMS)
def test_rows_are_independent_of_batch_and_of_bank_order(build: Any, arm: str) -> None:
    bank, queries, own = build.bank(), torch.randn(20, 16), torch.arange(20)
    order = torch.randperm(20)
    whole = arm_neighbours(bank, arm, queries, k=3, sample_ids=own)
    alone = [arm_neighbours(bank, arm, queries[i : i + 1], k=3, sample_ids=own[i : i + 1]).ids[0] for i in range(20)]
    assert torch.equal(whole.ids, torch.stack(alone))
    shuffled = MemoryBank(key_dim=16, value_shape=(3, 8))
    values, _ = bank.gather(order)
    shuffled.add(bank.keys(order), values, ids=order, groups=order // 2)
    assert torch.equal(arm_neighbours(shuffled, arm, queries, k=3, sample_ids=own).ids, whole.ids)


@pytest.mark.parametrize("arm", ["bank", "shuffled", "random"])
def test_no_arm_but_self_and_constant_shows_a_sample_to_itself(build: Any, arm: str) -> None:
    own = torch.arange(20)
    found = arm_neighbours(build.bank(), arm, build.bank().keys(own), k=18, sample_ids=own)
    assert (found.ids // 2 != own[:, None] // 2).all()
    assert all(len(set(row)) == 18 for row in found.ids.tolist())


@pytest.mark.parametrize("arm", ["bank", "shuffled", "random"])
def test_a_bank_without_groups_still_hides_the_sample(arm: str) -> None:
    bank = MemoryBank(key_dim=4, value_shape=(3, 8))
    bank.add(torch.randn(6, 4), torch.randn(6, 3, 8))
    found = arm_neighbours(bank, arm, bank.keys(), k=4, sample_ids=torch.arange(6))
    assert (found.ids != torch.arange(6)[:, None]).all()


def test_random_and_constant_are_spread_and_seeded(build: Any) -> None:
    bank, queries, own = build.bank(), torch.randn(20, 16), torch.arange(20)
    drawn = arm_neighbours(bank, "random", queries, k=3, sample_ids=own)
    assert len({tuple(row) for row in drawn.ids.tolist()}) > 15
    assert not torch.equal(drawn.ids, arm_neighbours(bank, "random", queries, k=3, sample_ids=own, seed=1).ids)
    same = arm_neighbours(bank, "constant", queries, k=3, sample_ids=own)
    assert len({tuple(row) for row in same.ids.tolist()}) == 1
    assert (same.scores == 0).all()
    assert (drawn.scores == 0).all()


def test_random_draws_are_uniform(build: Any) -> None:
    """4,000 samples that are not in the bank, k = 2 of 20: each entry 400 times; 5 standard deviations is 95."""
    own = torch.arange(1000, 5000)
    drawn = arm_neighbours(build.bank(), "random", torch.zeros(4000, 16), k=2, sample_ids=own)
    counts = torch.bincount(drawn.ids.flatten(), minlength=20)
    assert (counts - 400).abs().max() < 95


def test_a_small_bank_runs_out(build: Any) -> None:
    bank, own = build.bank(4), torch.tensor([0])
    for arm in ("bank", "random"):
        found = arm_neighbours(bank, arm, torch.randn(1, 16), k=4, sample_ids=own)
        assert sorted(found.ids[0].tolist()) == [-1, -1, 2, 3]
        assert found.mask[0].tolist() == [True, True, False, False]
    with pytest.raises(
        ValueError, match="memory must hold an entry of another group for arm 'shuffled', got 2 entries"
    ):
        arm_neighbours(build.bank(2), "shuffled", torch.randn(1, 16), sample_ids=own)


def test_what_is_asked_wrongly(build: Any) -> None:
    with pytest.raises(ValueError, match=r"arm must be one of .*got 'off'. 'off' and 'prompt' need no bank"):
        arm_neighbours(build.bank(), "off", torch.randn(1, 16))
    with pytest.raises(ValueError, match="sample_ids must be given for arm 'random', got None"):
        arm_neighbours(build.bank(), "random", torch.randn(1, 16))


def test_cleared_rows_are_empty(build: Any) -> None:
    found = arm_neighbours(build.bank(), "bank", torch.randn(2, 16), k=2)
    cleared = clear_rows(found, torch.tensor([True, False]))
    assert torch.equal(cleared.ids[0], found.ids[0])
    assert cleared.ids[1].tolist() == [-1, -1]
    assert not cleared.mask[1].any()
    assert (cleared.scores[1] == 0).all()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_gives_the_same_number_of_tokens(build: Any, arm: str) -> None:
    model = build.model(rag_gate=True, retrieval_seed=3)
    ids = torch.tensor([build.row(1, "image", 5)])
    features = model.vision(torch.randn(1, 3, 16, 16))
    output = model(ids, image_features=features, sample_ids=torch.tensor([3]), retrieval=arm)
    assert output.logits.shape[1] == ids.shape[1] + (0 if arm == "off" else 6)
    if arm in BANK_ARMS:
        unit = torch.nn.functional.normalize(features, dim=-1)[0]
        query = torch.softmax(unit @ unit.T, dim=-1).mean(dim=0) @ unit  # the paper's key, written out
        expected = arm_neighbours(model.memory, arm, query[None], k=2, sample_ids=torch.tensor([3]), seed=3)
        assert torch.equal(output.neighbour_ids, expected.ids)
        torch.testing.assert_close(output.neighbour_scores, expected.scores)


def test_prompt_is_learned_and_needs_no_bank(build: Any) -> None:
    model = build.model(retrieval="prompt").freeze_for("pretrain").train()
    model.memory = None
    ids = torch.tensor([build.row(1, "image", 5, 6)])
    model(ids, torch.randn(1, 3, 16, 16), labels=ids.clamp(min=-100)).loss.backward()
    assert model.prompt_latents is not None
    assert model.prompt_latents.grad.abs().sum() > 0  # type: ignore[union-attr]

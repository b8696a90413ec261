"""Deep copies and pickles of banks, in memory and mapped."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tinyalign.memory import KeyTransform, MemoryBank


@pytest.fixture(params=["memory", "saved", "changed"])
def bank(request, random_bank, tmp_path):
    transform = KeyTransform.fit(torch.randn(50, 8), whiten=True, dim=5)
    bank = random_bank(value_dtype=torch.int8, transform=transform, fingerprint={"key.a": 1})
    if request.param != "memory":
        bank.save(tmp_path / "bank")
    if request.param != "saved":
        bank.remove([105])
        bank.add(torch.randn(2, 8), torch.randn(2, 2, 3), metadata=[{"new": 1}, None])
    return bank


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_copy_is_the_same_and_its_own(bank, same, twin_of):
    twin = twin_of(bank)
    same(twin, bank)
    assert twin.fingerprint == bank.fingerprint
    before = len(bank)
    twin.add(torch.randn(1, 8), torch.randn(1, 2, 3), ids=[7000])
    twin.remove([110])
    assert 7000 not in bank
    assert 110 in bank
    bank.add(torch.randn(1, 8), torch.randn(1, 2, 3), ids=[8000])
    assert 8000 not in twin
    assert len(bank) == before + 1
    assert bank.add(torch.randn(1, 8), torch.randn(1, 2, 3)).tolist() == [8001]
    assert twin.add(torch.randn(1, 8), torch.randn(1, 2, 3)).tolist() == [7001]


def test_a_saved_bank_travels_as_its_path(random_bank, tmp_path):
    bank = random_bank(2000)
    bank.save(tmp_path / "bank")
    assert len(pickle.dumps(bank)) < 500
    bank.remove([105])
    assert len(pickle.dumps(bank)) > 2000 * (8 * 2 + 6 * 2)
    twin = copy.deepcopy(bank)
    assert twin.commit() == 2  # the copy takes its uncommitted changes along
    assert 105 not in MemoryBank.load(tmp_path / "bank")

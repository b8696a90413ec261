"""The neighbour table against searching again, and the bank it is tied to."""

from __future__ import annotations

import json

import pytest
import torch

from tinyalign.memory import BankError, FingerprintMismatch, MemoryBank, NeighbourTable, precompute_neighbours


def test_table_equals_searching(random_bank, tmp_path):
    bank = random_bank()
    queries = bank.keys()
    table = precompute_neighbours(
        bank, queries, 4, sample_ids=bank.ids, exclude_ids=bank.ids, exclude_groups=bank.groups,
        path=tmp_path / "t", batch_size=7,
    )  # fmt: skip
    assert (len(table), table.k) == (40, 4)
    wanted = torch.tensor([139, 100, 117, 100])
    expected = bank.neighbours(
        bank.keys(wanted), 4, exclude_ids=wanted, exclude_groups=torch.tensor([bank[int(i)].group for i in wanted])
    )
    for one, two in zip(table.lookup(wanted), expected, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(table.sample_ids, bank.ids)
    again = NeighbourTable.load(tmp_path / "t", bank=bank)
    assert torch.equal(again.lookup([117]).ids, table.lookup([117]).ids)
    again.verify(tmp_path / "t")


def test_samples_may_come_in_any_order(random_bank, tmp_path):
    bank = random_bank()
    names = [70, 3, 900, 41]
    table = precompute_neighbours(bank, bank.keys()[:4], 1, sample_ids=names, path=tmp_path / "t")
    assert table.lookup([3, 900, 70, 41]).ids[:, 0].tolist() == [101, 102, 100, 103]


def test_queries_may_come_from_a_generator(random_bank, tmp_path):
    bank = random_bank()
    queries = torch.randn(10, 8)
    streamed = precompute_neighbours(bank, (queries[a : a + 3] for a in range(0, 10, 3)), 3, path=tmp_path / "a")
    whole = precompute_neighbours(bank, queries, 3, path=tmp_path / "b")
    for one, two in zip(streamed.lookup(range(10)), whole.lookup(range(10)), strict=True):
        assert torch.equal(one, two)


def test_missing_neighbours_stay_masked(random_bank, tmp_path):
    table = precompute_neighbours(random_bank(3), torch.randn(2, 8), 5, exclude_ids=[[100], []], path=tmp_path / "t")
    found = table.lookup([0, 1])
    assert found.mask.sum(1).tolist() == [2, 3]
    assert (found.ids[~found.mask] == -1).all()


def test_tied_to_keys_and_ids_but_not_to_how_they_are_stored(random_bank, tmp_path):
    bank = random_bank()
    precompute_neighbours(bank, torch.randn(2, 8), 2, path=tmp_path / "t")
    bank.save(tmp_path / "bank")
    NeighbourTable.load(tmp_path / "t", bank=MemoryBank.load(tmp_path / "bank"))
    bank.remove([100])
    with pytest.raises(FingerprintMismatch, match=r"generation 0, 40 entries.*with 39 entries. Run precompute"):
        NeighbourTable.load(tmp_path / "t", bank=bank)
    with pytest.raises(FingerprintMismatch):
        NeighbourTable.load(tmp_path / "t", bank=random_bank(seed=3))
    other = random_bank()
    other.fingerprint["key.encoder"] = "clip"
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder"):
        NeighbourTable.load(tmp_path / "t", bank=other)


def test_what_is_damaged_is_named(random_bank, tmp_path):
    bank = random_bank()
    path = tmp_path / "t"
    with pytest.raises(BankError, match="path must be a tinyalign-neighbour-table"):
        NeighbourTable.load(path)
    table = precompute_neighbours(bank, torch.randn(5, 8), 2, path=path)
    blob = bytearray((path / "ids.bin").read_bytes())
    blob[3] ^= 1
    (path / "ids.bin").write_bytes(blob)
    with pytest.raises(BankError, match=r"ids\.bin: 1 damaged block"):
        table.verify(path)
    (path / "scores.bin").write_bytes(b"")
    with pytest.raises(BankError, match=r"scores\.bin must have 40 bytes, got 0"):
        NeighbourTable.load(path)
    facts = json.loads((path / "table.json").read_text())
    for change, message in [
        ({"version": 9}, "must have version 1, got 9"),
        ({"rows": -1}, "must have a count 'rows', got -1"),
        ({"format": "x"}, "got something else"),
    ]:
        (path / "table.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(BankError, match=message):
            NeighbourTable.load(path)
    del facts["content"]
    (path / "table.json").write_text(json.dumps(facts))
    with pytest.raises(BankError, match="must name 'content'"):
        NeighbourTable.load(path)
    (path / "table.json").write_text("{")
    with pytest.raises(BankError, match="must be JSON"):
        NeighbourTable.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"sample_ids": [1, 2]}, r"sample_ids must have shape \(4,\), got \(2,\)"),
        ({"sample_ids": [1, 2, 2, 3]}, "sample_ids must be distinct"),
        ({"exclude_ids": [1, 2]}, "exclude_ids must have one row per query, got 2"),
        ({"exclude_groups": torch.ones(9).long()}, "exclude_groups must have one row per query, got 9 for 4"),
    ],
)
def test_bad_input_leaves_an_old_table(random_bank, tmp_path, options, message):
    bank, path = random_bank(), tmp_path / "t"
    precompute_neighbours(bank, torch.randn(3, 8), 2, path=path)
    with pytest.raises(ValueError, match=message):
        precompute_neighbours(bank, torch.randn(4, 8), **{"k": 2, "path": path, **options})
    assert len(NeighbourTable.load(path)) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]


def test_an_unknown_sample_is_named(random_bank, tmp_path):
    table = precompute_neighbours(random_bank(), torch.randn(3, 8), 2, path=tmp_path / "t")
    with pytest.raises(KeyError, match="sample_ids must be in the table, got 3"):
        table.lookup([0, 3])

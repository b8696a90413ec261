"""The neighbour table against searching again, and the bank it is tied to."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
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


def test_queries_and_counts_may_be_of_numpy(random_bank, tmp_path):
    bank = random_bank()
    queries = torch.randn(10, 8).numpy()
    whole = precompute_neighbours(bank, queries, np.int64(3), path=tmp_path / "a")
    parts = precompute_neighbours(bank, iter([queries[:4], queries[4:]]), 3, path=tmp_path / "b")
    expected = bank.neighbours(queries, 3)
    for table in (whole, parts):
        assert torch.equal(table.lookup(range(10)).ids, expected.ids)


def test_queries_made_by_something_else_are_refused_before_any_search(random_bank, tmp_path):
    bank = random_bank(fingerprint={"key.encoder": "clip", "value.encoder": "other"})
    precompute_neighbours(bank, torch.randn(2, 8), 2, path=tmp_path / "t", fingerprint={"key.encoder": "clip"})
    unread = iter([torch.randn(2, 8)])
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder \(bank: 'clip', given: 'dino'\)"):
        precompute_neighbours(bank, unread, 2, path=tmp_path / "t", fingerprint={"key.encoder": "dino"})
    assert len([*unread]) == 1


def test_a_table_never_takes_the_place_of_anything_else(random_bank, tmp_path):
    bank, queries = random_bank(), torch.randn(2, 8)
    bank.save(tmp_path / "out" / "bank")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "table.json").write_text("{}")
    for path, holding in [
        ("out", r"out' holding 'bank'"),
        ("out/bank", r"bank' holding 'lock'"),
        ("file", r"the file '.*file'"),
        ("other", r"other' holding 'table\.json'"),
    ]:
        with pytest.raises(BankError, match=f"path must be free, or hold a neighbour table alone, got .*{holding}"):
            precompute_neighbours(bank, queries, 2, path=tmp_path / path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "other", "out"]
    MemoryBank.load(tmp_path / "out" / "bank").verify()
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        precompute_neighbours(bank, queries, 2, path=tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert precompute_neighbours(bank, queries, 1, path=tmp_path / "link").k == 1
    assert NeighbourTable.load(tmp_path / "empty").k == 1
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match=r"holding 'notes\.txt'"):
        precompute_neighbours(bank, queries, 2, path=tmp_path / "empty")


def test_a_damaged_table_can_be_made_anew(random_bank, tmp_path):
    bank, queries, path = random_bank(), torch.randn(2, 8), tmp_path / "t"
    precompute_neighbours(bank, queries, 2, path=path)
    whole = (path / "table.json").read_bytes()
    for left in (0, 1, len(whole) // 2):
        (path / "table.json").write_bytes(whole[:left])
        with pytest.raises(BankError, match=r"table\.json"):
            NeighbourTable.load(path)
        (path / "notes.txt").write_text("mine")
        with pytest.raises(BankError, match=r"hold a neighbour table alone, got .*holding 'notes\.txt'"):
            precompute_neighbours(bank, queries, 2, path=path)
        (path / "notes.txt").unlink()
        assert len(precompute_neighbours(bank, queries, 2, path=path)) == 2
    (path / "ids.bin").unlink()
    precompute_neighbours(bank, queries, 2, path=path).verify(path)


def test_a_full_disk_leaves_the_old_table(random_bank, tmp_path, monkeypatch):
    bank, path = random_bank(), tmp_path / "t"
    precompute_neighbours(bank, torch.randn(3, 8), 2, path=path)

    def full(error):
        def write(*args):
            raise OSError(error, os.strerror(error))

        return write

    monkeypatch.setattr("tinyalign.memory.neighbours.write_blocks", full(errno.ENOSPC))
    with pytest.raises(BankError, match=r"disk of .*t must have room for the table, got 'No space left on device'"):
        precompute_neighbours(bank, torch.randn(4, 8), 2, path=path)
    monkeypatch.setattr("tinyalign.memory.neighbours.write_blocks", full(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        precompute_neighbours(bank, torch.randn(4, 8), 2, path=path)
    assert len(NeighbourTable.load(path)) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]


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


def test_tied_to_the_groups_only_where_some_were_excluded(random_bank, tmp_path):
    bank, regrouped = random_bank(), random_bank(group_of=2)
    queries, groups = bank.keys()[:4], bank.groups[:4]
    precompute_neighbours(bank, queries, 2, path=tmp_path / "free")
    assert "groups" not in NeighbourTable.load(tmp_path / "free", bank=regrouped).facts
    precompute_neighbours(bank, queries, 2, exclude_groups=groups, path=tmp_path / "bound")
    NeighbourTable.load(tmp_path / "bound", bank=random_bank())
    with pytest.raises(FingerprintMismatch, match=r"bank must have the groups that were excluded .* Run precompute"):
        NeighbourTable.load(tmp_path / "bound", bank=regrouped)


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
        ({"fingerprint": [1]}, "must hold a fingerprint of fields, got none"),
        ({"fingerprint": {"key.a": []}}, "must hold plain fields, got another"),
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

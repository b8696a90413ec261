"""What every bank must do, whether it lives in files or in Milvus."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from tinyalign.memory import (
    BankError,
    FingerprintMismatch,
    MemoryBank,
    NeighbourTable,
    UnknownIdError,
    leakage_report,
    precompute_neighbours,
    retrieval_report,
    score_report,
)

WITH_MILVUS = importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite")
PRINT = {"key.encoder": "test", "data.n": 3}


def milvus(path, **options):
    from tinyalign.memory.milvus import MilvusMemoryBank

    return MilvusMemoryBank(str(path), **options)


@pytest.fixture(
    params=[
        "files",
        pytest.param("milvus", marks=pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")),
    ]
)
def make(request, tmp_path):
    """Make an empty bank of keys (8,) and values (2, 3)."""

    def build(metric="cosine"):
        if request.param == "files":
            return MemoryBank(8, (2, 3), metric=metric, fingerprint=PRINT)
        return milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3), metric=metric, fingerprint=PRINT)

    return build


@pytest.fixture
def filled(make):
    """Sixty entries, ids from 100, three to a group, every other one with metadata."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(60, 8, generator=generator), torch.randn(60, 2, 3, generator=generator).half()
    ids = torch.arange(100, 160)
    bank = make()
    notes = [{"n": i} if i % 2 else None for i in ids.tolist()]
    assert torch.equal(bank.add(keys, values, ids=ids, groups=ids // 3, metadata=notes), ids)
    return bank, keys, values


def naive(keys, queries, k, hidden):
    keys, queries = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (keys, queries))
    scores = queries @ keys.T
    for row, ids in enumerate(hidden):
        scores[row, [i - 100 for i in ids]] = float("-inf")
    best = scores.topk(min(k, keys.shape[0]))
    return best.values, best.indices + 100


@pytest.mark.parametrize("k", [1, 5])
def test_search_equals_a_full_sort(filled, k):
    bank, keys, values = filled
    queries = torch.randn(7, 8)
    hits = bank.search(queries, k)
    scores, ids = naive(keys, queries, k, [[]] * 7)
    assert torch.equal(hits.ids, ids)
    torch.testing.assert_close(hits.scores.double(), scores, atol=2e-3, rtol=0)
    assert torch.equal(hits.values.half(), values[ids - 100])
    assert hits.mask.all()


def test_exclusions_are_per_query_and_exact(filled):
    bank, keys, _ = filled
    queries = keys[:4]
    by_id = bank.neighbours(queries, 5, exclude_ids=[[100], list(range(100, 130)), [], [103, 7]])
    hidden = [[100], list(range(100, 130)), [], [103]]
    assert torch.equal(by_id.ids, naive(keys, queries, 5, hidden)[1])
    groups = torch.tensor([[33, -1], [33, 34], [-1, -1], [40, 50]])
    by_group = bank.neighbours(queries, 5, exclude_groups=groups)
    hidden = [[i for i in range(100, 160) if i // 3 in row] for row in groups.tolist()]
    assert torch.equal(by_group.ids, naive(keys, queries, 5, hidden)[1])
    many = bank.neighbours(queries[:1], 3, exclude_groups=[list(range(33, 53))])
    assert set(many.ids[many.mask].tolist()) == {i for i in range(100, 160) if i // 3 == 53}


def test_filters_by_metadata_and_by_mask(filled):
    bank, keys, _ = filled
    queries = keys[:3]
    hidden = [i for i in range(100, 160) if i % 2 == 0 or i > 140]
    by_note = bank.neighbours(queries, 4, where=lambda note: 0 < note.get("n", 0) <= 140)
    assert torch.equal(by_note.ids, naive(keys, queries, 4, [hidden] * 3)[1])
    by_mask = bank.search(queries, 4, where=(bank.ids % 2 == 1) & (bank.ids <= 140), exclude_ids=[101, 101, 101])
    assert torch.equal(by_mask.ids, naive(keys, queries, 4, [[*hidden, 101]] * 3)[1])
    few = bank.neighbours(queries, 4, where=lambda note: note.get("n") in (111, 115), exclude_groups=[[37], [], [38]])
    assert few.mask.sum(1).tolist() == [1, 2, 1]
    assert few.ids[0].tolist() == [115, -1, -1, -1]
    groups = [list(range(33, 50))] * 3  # more than are asked for to spare
    both = bank.neighbours(queries, 4, where=bank.ids % 2 == 1, exclude_groups=groups)
    hidden = [i for i in range(100, 160) if i % 2 == 0 or i < 150]
    assert torch.equal(both.ids, naive(keys, queries, 4, [hidden] * 3)[1])
    assert not bank.neighbours(queries, 4, where=lambda note: False).mask.any()
    with pytest.raises(ValueError, match=r"where must be a bool tensor of shape \(60,\), got torch.bool \(3,\)"):
        bank.search(queries, where=torch.ones(3, dtype=torch.bool))


def test_near_duplicates_are_left_out_by_score(filled):
    bank, keys, values = filled
    queries = keys[:3]
    scores, ids = naive(keys, queries, 5, [[]] * 3)
    between = float(scores[:, 0].min() + scores[:, 1].max()) / 2
    found = bank.search(queries, 4, max_score=between)
    assert torch.equal(found.ids, ids[:, 1:])
    assert torch.equal(found.values.half(), values[ids[:, 1:] - 100])
    both = bank.neighbours(queries, 3, max_score=between, exclude_ids=ids[:, 1:2], where=bank.ids > 0)
    assert torch.equal(both.ids, ids[:, 2:])
    assert not bank.neighbours(queries, 3, max_score=-1.5).mask.any()


def test_fewer_than_k(filled):
    bank, keys, _ = filled
    hits = bank.search(keys[:2], 70, exclude_ids=[[100], []])
    assert hits.mask.sum(1).tolist() == [59, 60]
    assert (hits.ids[~hits.mask] == -1).all()
    assert (hits.values[~hits.mask] == 0).all()
    assert (hits.scores[~hits.mask] == 0).all()
    assert bank.search(keys[:2], 0).ids.shape == (2, 0)
    assert bank.search(keys[:0], 3).values.shape == (0, 3, 2, 3)


def test_entries_by_id(filled):
    bank, keys, values = filled
    assert len(bank) == 60
    assert 100 in bank
    assert 7 not in bank
    assert "100" not in bank
    assert True not in bank
    assert bank.metadata([101, 100]) == [{"n": 101}, {}]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    torch.testing.assert_close(bank.keys([105, 101]), unit[[5, 1]], atol=1e-3, rtol=0)
    found, mask = bank.gather(torch.tensor([[159, -1], [100, 100]]))
    assert mask.tolist() == [[True, False], [True, True]]
    assert torch.equal(found[1, 0].half(), values[0])
    assert (found[0, 1] == 0).all()
    assert torch.equal(bank.ids, torch.arange(100, 160))
    assert torch.equal(bank.groups, torch.arange(100, 160) // 3)


def test_one_entry_as_a_whole(filled):
    bank, keys, values = filled
    entry = bank[np.int64(101)]
    assert (entry.id, entry.group, entry.metadata) == (101, 33, {"n": 101})
    assert torch.equal(entry.value.half(), values[1])
    torch.testing.assert_close(entry.key, torch.nn.functional.normalize(keys[1], dim=-1), atol=1e-3, rtol=0)
    assert (entry.key.dtype, bank.value_dtype) == (torch.float32, torch.float16)
    with pytest.raises(UnknownIdError, match=r"\[id\]: ids must be in the bank, got 7"):
        bank[7]


def test_lists_and_arrays_do_as_well_as_tensors(filled):
    bank, keys, values = filled
    hits = bank.search(keys[:3].numpy(), np.int64(2), exclude_ids=np.arange(100, 103))
    assert torch.equal(hits.ids, naive(keys, keys[:3], 2, [[100], [101], [102]])[1])
    found, mask = bank.gather([159, -1])
    assert torch.equal(found[0].half(), values[59])
    assert mask.tolist() == [True, False]


def test_exclusions_may_be_given_by_place(filled):
    bank, keys, _ = filled
    ids, groups = [[100], [], [102]], [[], [40], [50, 51]]
    expected = bank.neighbours(keys[:3], 4, exclude_ids=ids, exclude_groups=groups)
    assert torch.equal(bank.search(keys[:3], 4, ids, groups).ids, expected.ids)
    assert torch.equal(bank.neighbours(keys[:3], 4, ids, groups).ids, expected.ids)


def test_keys_and_queries_as_they_are_compared(filled):
    bank, keys, _ = filled
    assert torch.equal(bank.keys(), bank.keys(bank.ids))
    projected = bank.project(keys[:5] * 3)
    torch.testing.assert_close(projected, torch.nn.functional.normalize(keys[:5], dim=-1))
    scores = projected @ bank.keys().T
    torch.testing.assert_close(bank.neighbours(keys[:5], 3).scores, scores.topk(3).values, atol=1e-3, rtol=0)


def test_reports_on_retrieval_and_leakage(filled):
    bank, keys, _ = filled
    scores = score_report(bank, keys[:5], k=3)
    assert scores.kth < scores.best == pytest.approx(1, abs=1e-3)
    leaks = leakage_report(bank, keys, bank.ids, bank.groups, k=3)
    assert (leaks.without_exclusion.self_hits, leaks.with_exclusion.self_hits) == (60, 0)
    found = retrieval_report(bank, keys, bank.groups, "group", 3, exclude_ids=bank.ids, where=bank.ids < 159)
    allowed = (bank.ids < 159) & (bank.ids != bank.ids[:, None])
    right = allowed & (bank.groups == bank.groups[:, None])
    misses = [math.comb(n - m, 3) / math.comb(n, 3) for n, m in zip(allowed.sum(1), right.sum(1), strict=True)]
    assert found.chance_at_k == pytest.approx(1 - sum(misses) / 60)
    assert retrieval_report(bank, keys[1::2], bank.ids[1::2], "n", 1).recall_at_k == 1.0


def test_the_fingerprint_is_required_by_fields(filled):
    bank, _, _ = filled
    bank.require_fingerprint({"key.encoder": "test"}, "key.")
    with pytest.raises(
        FingerprintMismatch, match=r"require_fingerprint: .* difference in data\.n \(bank: 3, given: 4\)"
    ):
        bank.require_fingerprint({**PRINT, "data.n": 4})


def test_the_content_hash_names_keys_and_ids(filled):
    bank, keys, values = filled
    before = bank.content_hash()
    assert len(before) == 32
    bank.remove([159])
    without = bank.content_hash()
    bank.add(keys[59:], values[59:] + 1, ids=[159], groups=[4])
    assert bank.content_hash() == before
    bank.remove([159])
    bank.add(keys[59:], values[59:], ids=[160])
    assert len({bank.content_hash(), before, without}) == 3
    bank.remove([160])
    bank.add(-keys[59:], values[59:], ids=[159])
    assert bank.content_hash() not in (before, without)


def test_a_table_of_neighbours_is_tied_to_the_bank(filled, tmp_path):
    bank, keys, _ = filled
    options = {"k": 3, "sample_ids": bank.ids, "exclude_ids": bank.ids, "fingerprint": {"key.encoder": "test"}}
    table = precompute_neighbours(bank, keys, path=tmp_path / "table", **options)
    expected = bank.neighbours(keys[3:5], 3, exclude_ids=[103, 104])
    assert torch.equal(table.lookup([103, 104]).ids, expected.ids)
    NeighbourTable.load(tmp_path / "table", bank=bank)
    bank.remove([100])
    with pytest.raises(FingerprintMismatch, match=r"generation 0, 60 entries.*with 59 entries"):
        NeighbourTable.load(tmp_path / "table", bank=bank)
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder \(bank: 'test', given: 'other'\)"):
        precompute_neighbours(
            bank, keys, **{**options, "path": tmp_path / "b", "fingerprint": {"key.encoder": "other"}}
        )


def test_removing(filled):
    bank, keys, values = filled
    assert bank.remove([100, 104]) == 2
    assert len(bank) == 58
    assert 104 not in bank.neighbours(keys[4:5], 58).ids
    with pytest.raises(UnknownIdError, match="ids must be in the bank, got 104"):
        bank.remove([101, 104])
    assert 101 in bank
    bank.add(keys[4:5], values[4:5], ids=[104])
    assert bank.add(keys[:0], values[:0], ids=[], groups=[]).shape == (0,)
    assert int(bank.neighbours(keys[4:5], 1).ids) == 104
    assert bank.add(keys[:2], values[:2]).tolist() == [160, 161]


def test_refusals(filled):
    bank, keys, values = filled
    with pytest.raises(ValueError, match="ids must be new, got 101 which the bank holds"):
        bank.add(keys[:2], values[:2], ids=[500, 101])
    assert 500 not in bank
    with pytest.raises(ValueError, match="ids must be distinct, got 3 twice"):
        bank.add(keys[:2], values[:2], ids=[3, 3])
    with pytest.raises(ValueError, match="keys must be non-zero"):
        bank.add(torch.zeros(1, 8), values[:1])
    with pytest.raises(TypeError, match="keys must be a tensor, got list"):
        bank.add([[1.0] * 8], values[:1])
    with pytest.raises(ValueError, match=r"keys must have shape \(M, 8\), got \(1, 7\)"):
        bank.add(keys[:1, :7], values[:1])
    with pytest.raises(ValueError, match=r"k must be an integer from 0.*, got -1"):
        bank.search(keys[:1], -1)
    with pytest.raises(ValueError, match=r"queries must have shape \(M, 8\), got \(1, 3\)"):
        bank.search(keys[:1, :3])
    with pytest.raises(ValueError, match="NaN or infinity in row 0"):
        bank.search(keys[:1] * float("nan"))
    with pytest.raises(ValueError, match="exclude_ids must have one row per query"):
        bank.search(keys[:2], exclude_ids=[1])
    with pytest.raises(UnknownIdError, match="got 7"):
        bank.gather(torch.tensor([7]))
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder \(bank: 'test', given: 'other'\)"):
        bank.search(keys[:1], fingerprint={"key.encoder": "other"})
    with pytest.raises(TypeError, match="fingerprint must be a dict of plain values, got str"):
        bank.search(keys[:1], fingerprint="key.encoder")
    bank.search(keys[:1], fingerprint={"key.encoder": "test"})
    assert len(bank) == 60


def test_an_empty_bank_and_inner_products(make):
    bank = make("ip")
    with pytest.raises(BankError, match="the bank must hold entries, got 0"):
        bank.search(torch.ones(1, 8))
    assert bank.add(torch.zeros(0, 8), torch.zeros(0, 2, 3)).tolist() == []
    bank.add(torch.eye(8) * torch.arange(8.0)[:, None], torch.ones(8, 2, 3))
    assert bank.neighbours(torch.ones(1, 8), 3).ids.tolist() == [[7, 6, 5]]
    assert bank.neighbours(torch.ones(1, 8), 3).scores.tolist() == [[7.0, 6.0, 5.0]]

"""What every bank must do, whether it lives in files or in Milvus."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from tinyalign.memory import (
    BankError,
    FingerprintMismatch,
    KeyTransform,
    MemoryBank,
    NeighbourTable,
    UnknownIdError,
    leakage_report,
    precompute_neighbours,
    retrieval_report,
    score_report,
)
from tinyalign.memory.collection import FORMAT, PROPERTY

WITH_MILVUS = importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite")
PRINT = {"key.encoder": "test", "data.n": 3}


def milvus(path, *sizes, **options):
    from tinyalign.memory.milvus import MilvusMemoryBank

    return MilvusMemoryBank(str(path), *sizes, **options)


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


@pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")
def test_transfer_and_reopening(random_bank, tmp_path):
    bank = random_bank(700, fingerprint=PRINT)  # more than one insert
    remote = milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3), fingerprint=PRINT)
    assert remote.add_bank(bank) == 700
    remote.commit()
    queries = torch.randn(4, 8)
    exclude = {"exclude_groups": torch.arange(4)[:, None] + 40}
    expected = bank.search(queries, 5, **exclude)
    found = remote.search(queries, 5, **exclude)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.values, expected.values)
    remote.close()
    again = milvus(tmp_path / "bank.db")
    assert (again.key_dim, again.value_shape, again.metric, again.fingerprint) == (8, (2, 3), "cosine", PRINT)
    back = again.to_bank()
    assert torch.equal(back.ids, bank.ids)
    assert torch.equal(back.groups, bank.groups)
    assert torch.equal(back.gather(back.ids)[0], bank.gather(bank.ids)[0])
    torch.testing.assert_close(back.keys(), bank.keys(), atol=1e-3, rtol=0)
    assert back.metadata(back.ids) == bank.metadata(bank.ids)
    with pytest.raises(FingerprintMismatch, match=r"key.encoder"):
        again.add_bank(random_bank(3, start=9000, fingerprint={**PRINT, "key.encoder": "other"}))
    with pytest.raises(BankError, match="add_bank: bank must have metric 'cosine', got 'ip'"):
        again.add_bank(random_bank(3, start=9000, fingerprint=PRINT, metric="ip"))
    centred = random_bank(3, start=9000, fingerprint=PRINT, transform=KeyTransform.fit(bank.keys()))
    with pytest.raises(BankError, match=r"add_bank: bank must have no key transform.*search with bank.project"):
        again.add_bank(centred)
    assert len(again) == 700
    again.close()


@pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")
def test_a_transform_goes_to_milvus_by_hand(random_bank, tmp_path):
    transform = KeyTransform.fit(random_bank().keys() + 3, whiten=True, dim=6)
    bank, queries = random_bank(transform=transform), torch.randn(5, 8)
    remote = milvus(tmp_path / "bank.db", key_dim=6, value_shape=(2, 3))
    remote.add(bank.keys(), bank.gather(bank.ids)[0], bank.ids, bank.groups)
    assert torch.equal(remote.neighbours(bank.project(queries), 4).ids, bank.neighbours(queries, 4).ids)
    remote.close()


@pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")
def test_expressions_and_values_in_the_same_call(random_bank, tmp_path, monkeypatch):
    bank = random_bank(70)
    remote = milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3))
    remote.add_bank(bank)
    queries = torch.randn(4, 8)
    expected = bank.search(queries, 5, where=lambda note: note["even"] and note["caption"] != "entry 104")
    found = remote.search(queries, 5, where='note["even"] == true and note["caption"] != "entry 104"')
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.values, expected.values)
    by_group = remote.neighbours(queries, 5, where="group < 40", exclude_ids=[[120], [], [], []])
    assert torch.equal(by_group.ids, bank.neighbours(queries, 5, where=bank.groups < 40).ids)
    client, calls = remote._collection.client, []
    for name in ("search", "query"):
        asked = getattr(client, name)
        monkeypatch.setattr(client, name, lambda *a, _n=name, _f=asked, **o: calls.append(_n) or _f(*a, **o))
    assert len(bank) == len(remote)
    calls.clear()
    remote.search(queries, 5, exclude_ids=torch.arange(100, 104))
    assert calls == ["query", "search"]  # is it empty? then everything at once
    calls.clear()
    remote.search(queries, 5, exclude_groups=torch.arange(4) + 33)
    assert calls == ["query", "search", "query"]  # many more asked for than wanted: values by id
    monkeypatch.setattr("tinyalign.memory.milvus.MOST_LISTED", 10)
    with pytest.raises(BankError, match="where must keep at most 10 entries when it is no expression, got 35"):
        remote.neighbours(queries, where=lambda note: note["even"])
    remote.close()


@pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")
def test_a_server_holds_values_in_16_bits(tmp_path, monkeypatch):
    """What would be sent to a server and what it would send back; milvus-lite has 32 bits only."""
    bank = milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3))
    collection, sent = bank._collection, []
    value = torch.arange(6.0).reshape(1, 2, 3) / 3
    monkeypatch.setattr(collection, "half", True)
    monkeypatch.setattr(collection.client, "insert", lambda name, rows: sent.extend(rows))
    bank.add(torch.ones(1, 8), value, ids=[7])
    assert sent[0]["value"].dtype == np.float16
    stored = sent[0]["value"].tobytes()
    for answer in (stored, [stored], value.flatten().tolist()):
        assert torch.equal(collection.value({"value": answer}), value.flatten().half())
    bank.close()


@pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")
def test_a_collection_of_another_make(tmp_path):
    with pytest.raises(BankError, match="collection must exist, or key_dim and value_shape be given, got 'tinyalign'"):
        milvus(tmp_path / "bank.db")
    milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3), fingerprint=PRINT).close()
    ours = r"sizes and metric must be those of 'tinyalign', \(8, \(2, 3\), 'cosine'\), got "
    with pytest.raises(BankError, match=ours + r"\(9, \(2, 3\), 'cosine'\)"):
        milvus(tmp_path / "bank.db", key_dim=9)
    with pytest.raises(BankError, match=ours + r"\(8, \(2, 3\), 'ip'\)"):
        milvus(tmp_path / "bank.db", metric="ip")
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder \(bank: 'test', given: 'other'\)"):
        milvus(tmp_path / "bank.db", fingerprint={**PRINT, "key.encoder": "other"})
    milvus(tmp_path / "bank.db", 8, (2, 3), metric="cosine", fingerprint=PRINT).close()
    from pymilvus import MilvusClient

    client = MilvusClient(uri=str(tmp_path / "bank.db"))
    client.create_collection("strange", dimension=4)
    facts = {PROPERTY: json.dumps({"format": FORMAT, "version": 1})}
    client.create_collection("old", dimension=4, properties=facts)
    client.close()
    with pytest.raises(BankError, match=r"collection must have format version 2, got 1. Copy it with to_bank"):
        milvus(tmp_path / "bank.db", collection="old")
    with pytest.raises(BankError, match="collection must be a memory bank, got 'strange'"):
        milvus(tmp_path / "bank.db", collection="strange")


def test_without_pymilvus_the_error_names_the_extra(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"Install tinyalign-vlm\[milvus\]"):
        milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3))

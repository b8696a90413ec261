"""Search against a full sort, and exclusion against sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyalign.memory import FingerprintMismatch, MemoryBank, certified, retrieval
from tinyalign.memory import search as engine


def same_as_sort(found, expected, k):
    """Compare hits with a sorted list; entries whose scores differ by less than rounding may change places."""
    for row, (scores, ids, mask) in enumerate(zip(found.scores, found.ids, found.mask, strict=True)):
        best = expected[row][:k]
        assert int(mask.sum()) == len(best)
        assert scores[mask].tolist() == pytest.approx([score for score, _ in best], abs=1e-6)
        score_of = dict((entry, score) for score, entry in expected[row])
        assert [score_of[entry] for entry in ids[mask].tolist()] == pytest.approx([s for s, _ in best], abs=1e-6)
        assert len(set(ids[mask].tolist())) == int(mask.sum())
        assert ids[~mask].tolist() == [-1] * int((~mask).sum())
        assert scores[~mask].tolist() == [0.0] * int((~mask).sum())


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("key_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_queries", [1, 2, 300])
def test_equals_a_full_sort(random_bank, full_sort, metric, key_dtype, num_queries):
    bank = random_bank(200, metric=metric, key_dtype=key_dtype)
    queries = torch.randn(num_queries, 8)
    same_as_sort(bank.neighbours(queries, 7), full_sort(bank, queries, [set()] * num_queries), 7)


def test_equals_a_full_sort_over_many_blocks(random_bank, full_sort, monkeypatch):
    for name, size in {"ROWS_AT_ONCE": 64, "BYTES_CONVERTED": 512, "CHUNK": 2, "QUERIES_AT_ONCE": 3}.items():
        monkeypatch.setattr(engine, name, size)
    bank = random_bank(333)
    bank.remove(bank.ids[5:50:3])
    bank.add(torch.randn(70, 8), torch.randn(70, 2, 3))
    queries = torch.randn(10, 8)
    hidden = [{100, 101}, set(), {107}, {432}, *[set()] * 6]
    found = bank.neighbours(queries, 1, exclude_ids=[list(h) for h in hidden])
    same_as_sort(found, full_sort(bank, queries, hidden), 1)
    same_as_sort(bank.neighbours(queries, 9), full_sort(bank, queries, [set()] * 10), 9)


def test_best_of_looks_at_every_column():
    scores = torch.randn(5, 1000)
    scores[1, 960], scores[2, 999], scores[3, 0] = 9.0, 9.0, 9.0  # the columns after the last whole chunk
    best, at = engine.best_of(scores, 3)
    expected = scores.sort(dim=1, descending=True)
    assert torch.equal(best, expected.values[:, :3])
    assert torch.equal(at, expected.indices[:, :3])


@settings(max_examples=80)
@given(
    keys=hnp.arrays("float32", st.tuples(st.integers(1, 60), st.just(3)), elements=st.integers(-2, 2).map(float)),
    queries=hnp.arrays("float32", st.tuples(st.integers(1, 5), st.just(3)), elements=st.integers(-8, 8).map(float)),
    k=st.integers(0, 35),
    max_score=st.none() | st.integers(-20, 20),
    data=st.data(),
)
def test_laws_of_exclusion(keys, queries, k, max_score, data):
    """Small integers make every product exact and many equal: ids and scores are those of a full sort to the bit."""
    count, rows = len(keys), len(queries)
    ids = data.draw(st.lists(st.integers(0, 90), min_size=count, max_size=count, unique=True))
    groups = data.draw(st.lists(st.integers(-1, 5), min_size=count, max_size=count))
    hidden_ids = data.draw(st.lists(st.lists(st.integers(0, 60), max_size=4), min_size=rows, max_size=rows))
    hidden_groups = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=rows, max_size=rows))
    bank = MemoryBank(3, (1,), metric="ip")
    bank.add(torch.from_numpy(keys), torch.ones(count, 1), ids=ids, groups=groups)
    found = bank.neighbours(torch.from_numpy(queries), k, hidden_ids, hidden_groups, max_score=max_score)
    assert tuple(found.ids.shape) == (rows, k)
    for row in range(rows):
        allowed = [
            (-float(keys[i] @ queries[row]), i)
            for i in range(count)
            if ids[i] not in hidden_ids[row] and groups[i] not in hidden_groups[row]
        ]
        best = [each for each in sorted(allowed) if max_score is None or -each[0] <= max_score][:k]
        assert found.scores[row][found.mask[row]].tolist() == [-score for score, _ in best]
        assert found.ids[row][found.mask[row]].tolist() == [ids[i] for _, i in best]


@pytest.mark.parametrize("method", ["exact", "certified"])
@pytest.mark.parametrize(("others", "kept"), [(300, 410), (3000, 200)])
def test_equal_keys_go_by_row_whatever_the_batch(monkeypatch, method, others, kept):
    searched, top_rows = [], certified.CertifiedSearch.top_rows
    monkeypatch.setattr(retrieval, "int8_pays", lambda: True)
    monkeypatch.setattr(certified.CertifiedSearch, "top_rows", lambda *a: searched.append(1) or top_rows(*a))
    torch.manual_seed(0)
    bank = MemoryBank(48, (1,))
    keys = torch.cat([torch.randn(10, 48), torch.randn(1, 48).expand(100, 48), torch.randn(others, 48)])
    bank.add(keys, torch.zeros(len(keys), 1))
    where = torch.arange(len(keys)) < kept
    queries = keys[10] + 0.1 * torch.randn(7, 48)
    for options in ({"method": method}, {"where": where}, {"where": where.numpy()}):
        assert bank.neighbours(queries, 5, **options).ids.tolist() == [list(range(10, 15))] * 7
        assert bank.neighbours(queries[:1], 5, **options).ids.tolist() == [list(range(10, 15))]
    assert len(searched) == (2 if method == "certified" else 0)


def test_a_score_limit_with_many_duplicates_still_finds_the_rest():
    torch.manual_seed(0)
    twin = torch.randn(1, 16)
    bank = MemoryBank(16, (1,), key_dtype=torch.float32)
    bank.add(torch.cat([twin.expand(300, 16), torch.randn(100, 16)]), torch.zeros(400, 1))
    scores = (bank.project(twin).double() @ bank.keys().double().T)[0]
    assert (scores[:300] > 0.9999999).all()
    found = bank.neighbours(twin.expand(3, 16), 5, max_score=0.9999999)
    best = scores[300:].topk(5)
    assert found.mask.all()
    assert found.ids.tolist() == [(best.indices + 300).tolist()] * 3


def test_a_score_limit_holds_for_long_keys():
    """Products of long vectors are rounded by more than any fixed slack."""
    torch.manual_seed(0)
    keys = 1000 * torch.randn(200, 64)
    bank = MemoryBank(64, (1,), metric="ip", key_dtype=torch.float32)
    bank.add(keys, torch.zeros(200, 1))
    queries = 1000 * torch.randn(20, 64)
    exact = (queries.double() @ keys.double().T).float()
    for row in range(20):
        limit = float(exact[row].sort(descending=True).values[50])
        found = bank.neighbours(queries[row : row + 1], 5, max_score=limit)
        assert found.scores[0].tolist() == exact[row].sort(descending=True).values[50:55].tolist()


def test_exclusion_forms_agree(random_bank):
    bank = random_bank()
    queries = bank.keys()[:3]
    mine = bank.ids[:3]
    expected = bank.neighbours(queries, 5, exclude_ids=mine)
    padded = torch.stack([mine, torch.full((3,), -1)], dim=1)
    for form in (mine.tolist(), padded, [[i] for i in mine.tolist()], [{i} for i in mine.tolist()], mine.numpy()):
        assert torch.equal(bank.neighbours(queries, 5, exclude_ids=form).ids, expected.ids)
    assert (expected.ids != mine[:, None]).all()
    assert (bank.neighbours(queries, 1).ids[:, 0] == mine).all()


def test_padding_does_not_exclude_entries_without_a_group():
    bank = MemoryBank(2, (1,))
    bank.add(torch.eye(2), torch.ones(2, 1), groups=[-1, 4])
    assert bank.neighbours(torch.eye(2), 2, exclude_groups=[-1, 4]).mask.tolist() == [[True, True], [True, False]]


def test_a_query_does_not_depend_on_its_batch(random_bank):
    bank = random_bank(500)
    queries = torch.randn(64, 8)
    together = bank.search(queries, 5)
    for row in range(0, 64, 9):
        alone = bank.search(queries[row : row + 1], 5)
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one[0], many[row])


def test_permuting_the_bank_permutes_nothing_but_rows(random_bank):
    bank = random_bank()
    order = torch.randperm(len(bank))
    other = MemoryBank(8, (2, 3))
    values, _ = bank.gather(bank.ids)
    other.add(bank.keys()[order], values[order], ids=bank.ids[order])
    queries = torch.randn(6, 8)
    for one, two in zip(bank.search(queries, 4), other.search(queries, 4), strict=True):
        torch.testing.assert_close(one, two, atol=2e-3, rtol=0)  # unit length is rounded to fp16 twice


def test_fewer_than_k_are_masked(random_bank):
    bank = random_bank(3)
    hits = bank.search(torch.randn(2, 8), 5, exclude_ids=[[100], []])
    assert hits.mask.sum(1).tolist() == [2, 3]
    assert hits.ids[~hits.mask].tolist() == [-1] * 5
    assert hits.scores[~hits.mask].tolist() == [0.0] * 5
    assert (hits.values[~hits.mask] == 0).all()
    assert (hits.values[hits.mask] != 0).any(-1).all()
    everything = bank.search(torch.randn(1, 8), 2, exclude_ids=[[100, 101, 102]])
    assert not everything.mask.any()


def test_no_queries_and_k_zero(random_bank):
    bank = random_bank(3)
    assert tuple(bank.search(torch.randn(2, 8), 0).values.shape) == (2, 0, 2, 3)
    assert tuple(bank.search(torch.zeros(0, 8), 4).values.shape) == (0, 4, 2, 3)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_filter_by_metadata_and_by_mask(random_bank, full_sort, share):
    bank = random_bank(200)
    last = 100 + int(200 * share)
    queries = torch.randn(3, 8)
    hidden = set(range(last, 300)) | {100}
    by_note = bank.neighbours(queries, 3, exclude_ids=[100] * 3, where=lambda n: int(n["caption"][6:]) < last)
    by_mask = bank.neighbours(queries, 3, exclude_ids=[100] * 3, where=bank.ids < last)
    same_as_sort(by_note, full_sort(bank, queries, [hidden] * 3), 3)
    assert torch.equal(by_note.ids, by_mask.ids)
    assert not bank.neighbours(queries, 3, where=lambda note: False).mask.any()


def test_near_duplicates_are_left_out_by_score(random_bank):
    bank = random_bank()
    queries = bank.keys()[:4]
    scores = bank.neighbours(queries, 2).scores
    found = bank.neighbours(queries, 1, max_score=0.999)
    assert torch.equal(found.scores[:, 0], scores[:, 1])
    crowd = MemoryBank(8, (1,), key_dtype=torch.float32)
    crowd.add(torch.cat([queries[:1].repeat(30, 1), torch.randn(20, 8)]), torch.ones(50, 1))
    assert (crowd.neighbours(queries[:1], 5, max_score=0.999).ids >= 30).all()
    with_filter = bank.neighbours(queries, 1, max_score=0.999, where=bank.ids < 102)
    assert (with_filter.scores <= 0.999).all()


def test_half_precision_queries_and_numpy_free_inputs(random_bank):
    bank = random_bank()
    queries = torch.randn(4, 8)
    expected = bank.neighbours(queries.half().float(), 3).ids
    assert torch.equal(bank.neighbours(queries.half(), 3).ids, expected)
    assert bank.neighbours(queries.to(torch.bfloat16), 3).ids.shape == (4, 3)
    strided = torch.randn(8, 4).T
    assert torch.equal(bank.neighbours(strided, 3).ids, bank.neighbours(strided.contiguous(), 3).ids)
    assert torch.equal(bank.neighbours(queries.double(), 3).ids, bank.neighbours(queries, 3).ids)


def test_cosine_ignores_length_even_at_the_ends_of_the_range(random_bank):
    bank = random_bank()
    queries = torch.randn(3, 8)
    expected = bank.neighbours(queries, 3)
    for factor in (1e-40, 1e30):
        found = bank.neighbours(queries.double() * factor, 3)
        assert torch.equal(found.ids, expected.ids)


def test_fingerprint_of_a_query(random_bank):
    bank = random_bank(fingerprint={"key.encoder": "siglip", "value.compressor": "a"})
    queries = torch.randn(1, 8)
    bank.search(queries, fingerprint={"key.encoder": "siglip", "value.compressor": "b"})
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder \(bank: 'siglip', given: 'clip'\)"):
        bank.search(queries, fingerprint={"key.encoder": "clip"})
    with pytest.raises(FingerprintMismatch, match=r"key\.crop \(bank: 'nothing', given: None\)"):
        bank.search(queries, fingerprint={"key.encoder": "siglip", "key.crop": None})
    with pytest.raises(FingerprintMismatch, match=r"key\.layer \(bank: 'nothing', given: -2\)"):
        bank.search(queries, fingerprint={"key.encoder": "siglip", "key.layer": -2})
    with pytest.raises(FingerprintMismatch, match=r"value.compressor"):
        bank.require_fingerprint({"key.encoder": "siglip", "value.compressor": "b"})


@pytest.mark.parametrize(
    ("queries", "options", "error", "message"),
    [
        (torch.zeros(2, 7), {}, ValueError, r"queries must have shape \(M, 8\), got \(2, 7\)"),
        (torch.zeros(8), {}, ValueError, r"got \(8,\)"),
        ([[0.0] * 8], {}, TypeError, "queries must be a tensor, got list"),
        (torch.zeros(2, 8, dtype=torch.int64), {}, TypeError, "floating point, got torch.int64"),
        (torch.tensor([[1.0] * 8, [float("nan")] * 8]), {}, ValueError, "NaN or infinity in row 1"),
        (torch.zeros(2, 8), {}, ValueError, "queries must be non-zero for metric 'cosine', got zeros in row 0"),
        (torch.ones(2, 8), {"k": -1}, ValueError, "k must be an integer from 0, got -1"),
        (torch.ones(2, 8), {"k": True}, ValueError, "got True"),
        (torch.ones(2, 8), {"max_score": "high"}, ValueError, "max_score must be a number, got 'high'"),
        (torch.ones(2, 8), {"max_score": float("nan")}, ValueError, "max_score must be a number, got nan"),
        (torch.ones(2, 8), {"where": "all"}, ValueError, "where must be a bool tensor .* got 'all'"),
        (
            torch.ones(2, 8),
            {"where": [True, None] * 20},
            ValueError,
            r"where must be a bool tensor .* got \[True, None,",
        ),
        (torch.ones(2, 8), {"where": np.array(["a"] * 40)}, ValueError, r"where must be a bool tensor .* got array\("),
        (torch.ones(2, 8), {"where": [[True], [True, False]]}, ValueError, r"where must be .* got \[\[True\], \[True,"),
        (torch.ones(2, 8), {"exclude_ids": [1]}, ValueError, r"one row per query, got shape \(1, 1\) for 2 queries"),
        (torch.ones(2, 8), {"exclude_ids": [[1.5], []]}, TypeError, "exclude_ids must hold integers, got 1.5"),
        (torch.ones(1, 8), {"exclude_ids": 100}, TypeError, "exclude_ids must be a list or tensor, got 100. Pass one"),
        (
            torch.ones(2, 8),
            {"exclude_groups": [3, 2**70]},
            ValueError,
            r"exclude_groups must be below 2\*\*63, got 118",
        ),
        (
            torch.ones(2, 8),
            {"exclude_groups": torch.ones(2)},
            TypeError,
            "exclude_groups must hold integers, got float32",
        ),
        (torch.ones(2, 8), {"exclude_ids": torch.ones(2, 1, 1).long()}, ValueError, "one row per query"),
        (
            torch.ones(2, 8),
            {"where": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"shape \(40,\), got torch.bool \(3,\)",
        ),
    ],
)
def test_bad_queries(random_bank, queries, options, error, message):
    with pytest.raises(error, match=message):
        random_bank().search(queries, **options)


def test_an_empty_bank_says_so():
    with pytest.raises(ValueError, match="the bank must hold entries, got 0"):
        MemoryBank(4, (1,)).search(torch.ones(1, 4))


def test_sixteen_exclusions_of_every_row_are_exact(random_bank, full_sort):
    bank = random_bank(150)
    queries = torch.randn(20, 8)
    hidden = [set(range(100 + r, 100 + 7 * r + 16, 7)) for r in range(20)]
    found = bank.neighbours(queries, 10, exclude_ids=[sorted(h) for h in hidden])
    same_as_sort(found, full_sort(bank, queries, hidden), 10)
    for row, other in itertools.product(range(20), repeat=2):  # what one row hides, another may see
        if row != other:
            assert not (hidden[row] & set(found.ids[row].tolist()))

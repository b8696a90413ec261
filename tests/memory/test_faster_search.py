"""Certified search equals exact search on keys made to break it; approximate search is measured and re-ranked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign.memory import BankError, MemoryBank, certified, retrieval
from tinyalign.memory.contents import Contents


@pytest.fixture(autouse=True)
def _int8(monkeypatch):
    """The bound is tested on every processor, also where it would not pay."""
    monkeypatch.setattr(retrieval, "int8_pays", lambda: True)


def bank_of(keys, **options):
    bank = MemoryBank(keys.shape[1], (1,), **options)
    bank.add(keys, torch.zeros(len(keys), 1))
    return bank


def agree(bank, queries, k, **exclude):
    exact = bank.neighbours(queries, k, **exclude)
    found = bank.neighbours(queries, k, method="certified", **exclude)
    assert torch.equal(found.scores, exact.scores)
    assert torch.equal(found.mask, exact.mask)
    same = found.ids == exact.ids
    tied = torch.zeros_like(same)  # entries of equal score may stand for one another
    tied[:, 1:] |= exact.scores[:, 1:] == exact.scores[:, :-1]
    tied[:, :-1] |= exact.scores[:, 1:] == exact.scores[:, :-1]
    tied[:, -1:] = True
    assert bool((same | tied).all())


KEYS = {
    "clustered": lambda n, d: torch.randn(10, d)[torch.randint(10, (n,))] + 0.3 * torch.randn(n, d),
    "all nearly one": lambda n, d: torch.ones(n, d) + 1e-3 * torch.randn(n, d),
    "copies": lambda n, d: torch.randn(3, d)[torch.randint(3, (n,))],
    "one loud dimension": lambda n, d: torch.cat([1000 * torch.randn(n, 1), torch.randn(n, d - 1)], dim=1),
    "many sizes": lambda n, d: torch.randn(n, d) * torch.logspace(-2, 2, n)[:, None],
}


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("num", [3, 70, 1500])
def test_certified_equals_exact(kind, num, metric):
    keys = KEYS[kind](num, 24)
    bank = bank_of(keys, metric=metric)
    queries = torch.cat([keys[:3], torch.randn(4, 24)])
    for k in (0, 1, 5, 100):
        agree(bank, queries, k)
    assert bank.neighbours(queries[:0], 3, method="certified").ids.shape == (0, 3)
    agree(bank, queries, 4, exclude_ids=[list(range(r, min(num, r + 90))) for r in range(7)][: len(queries)])


def test_approximate_search_does_not_measure_all_keys(monkeypatch):
    bank = bank_of(torch.randn(200, 8), metric="ip")
    bank.build_index("Flat")
    queries = torch.randn(3, 8)
    expected = bank.neighbours(queries, 4)

    def measured(self):
        raise AssertionError("all keys were measured")

    monkeypatch.setattr(Contents, "longest_key", measured)
    assert torch.equal(bank.neighbours(queries, 4, method="approximate").ids, expected.ids)
    for options in ({}, {"method": "certified"}):
        with pytest.raises(AssertionError, match="all keys were measured"):
            bank.neighbours(queries, 4, **options)


def test_certified_over_batches_segments_and_changes(monkeypatch):
    monkeypatch.setattr(certified, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(certified, "QUERIES_AT_ONCE", 3)
    monkeypatch.setattr("tinyalign.memory.search.QUERIES_AT_ONCE", 3)
    one, two = bank_of(torch.randn(300, 16)), MemoryBank(16, (1,))
    two.add(torch.randn(200, 16), torch.zeros(200, 1), ids=range(1000, 1200))
    bank = MemoryBank.merge([one, two])
    queries = torch.randn(10, 16)
    exclude = {"exclude_ids": [[r, 1000 + r] for r in range(10)]}
    agree(bank, queries, 7, **exclude)
    bank.remove([5, 1005])
    bank.add(queries[:1], torch.zeros(1, 1), ids=[7777])
    agree(bank, queries, 7, **exclude)
    assert int(bank.neighbours(queries[:1], 1, method="certified").ids) == 7777


def test_every_row_is_scored_where_the_proof_fails(monkeypatch):
    monkeypatch.setattr(certified, "CANDIDATES", 0)
    bank, queries = bank_of(KEYS["one loud dimension"](500, 16)), torch.randn(9, 16)
    agree(bank, queries, 5)
    assert bank._contents.certified.fallbacks == 0  # more rows, but not all
    monkeypatch.setattr(certified, "MOST_CANDIDATES", 0)
    agree(bank, queries, 5, exclude_ids=[[r] for r in range(9)])
    assert 5 <= bank._contents.certified.fallbacks <= 9  # one each


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.1, 1.0, 30.0]), st.sampled_from([0.0, 1.0, 100.0]))
def test_no_score_exceeds_its_bound(seed, spread, mean):
    generator = torch.Generator().manual_seed(seed)
    keys = mean + spread * torch.randn(80, 12, generator=generator)
    bank = bank_of(keys, metric="ip", key_dtype=torch.float32)
    queries = torch.randn(5, 12, generator=generator) * 10
    search = certified.CertifiedSearch(bank._contents.table)
    upper = torch.empty(5, 80)
    search._bounds(queries, upper, retrieval.banned_rows(bank._contents.table, None, None, bank._contents.table.dead))
    assert bool((upper.double() >= queries.double() @ keys.double().T).all())


def test_int8_pays_is_measured():
    assert certified.int8_pays() in (True, False)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,Flat", "SQ8", "IVF4,PQ4x4"])
def test_approximate_search(factory):
    torch.manual_seed(1)
    keys = KEYS["clustered"](600, 16)
    bank = bank_of(keys)
    bank.remove([0, 1])
    parameters = {"nprobe": 8} if factory.startswith("IVF") else {}
    bank.build_index(factory, candidates=150, parameters=parameters)
    queries = keys[5:30]
    exclude = [[i, i + 1, 599] for i in range(5, 30)]
    found = bank.search(queries, 5, method="approximate", exclude_ids=exclude)
    assert found.mask.all()
    for row, hidden in enumerate(exclude):
        assert not set(found.ids[row].tolist()) & {*hidden, 0, 1}
    exact = bank.neighbours(queries, 5, exclude_ids=exclude)
    share = (found.ids[:, :, None] == exact.ids[:, None]).any(-1).float().mean()
    assert share >= (1.0 if factory == "Flat" else 0.9)
    scores = torch.einsum("bkd,bd->bk", bank.keys(found.ids.flatten()).reshape(25, 5, 16), bank.keys(range(5, 30)))
    torch.testing.assert_close(found.scores, scores, atol=2e-3, rtol=0)  # re-ranked by the stored keys
    assert bank.neighbours(queries[:0], 3, method="approximate").ids.shape == (0, 3)
    recall = bank.recall(queries, 5)
    assert 0.9 <= recall <= 1.0
    assert bank.recall(queries, 5, method="certified") == 1.0


def test_recall_counts_what_is_missed():
    keys = torch.randn(400, 16)
    bank = bank_of(keys)
    bank.build_index("IVF40,Flat", parameters={"nprobe": 1})
    queries = torch.randn(50, 16)
    exact = bank.neighbours(queries, 5).ids
    found = bank.neighbours(queries, 5, method="approximate").ids
    by_hand = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)) / 250
    assert bank.recall(queries, 5) == pytest.approx(by_hand)
    assert by_hand < 0.9


def test_filters_and_score_limits_are_exact_whatever_the_method():
    bank = bank_of(torch.randn(200, 16))
    queries = bank.keys()[:4]
    bank.build_index("IVF20,Flat")
    for method in ("approximate", "certified"):
        found = bank.neighbours(queries, 3, method=method, max_score=0.99)
        assert torch.equal(found.ids, bank.neighbours(queries, 3, max_score=0.99).ids)
        found = bank.neighbours(queries, 3, method=method, where=bank.ids > 100)
        assert torch.equal(found.ids, bank.neighbours(queries, 3, where=bank.ids > 100).ids)


def test_what_an_index_refuses():
    bank = bank_of(torch.randn(20, 16))
    with pytest.raises(ValueError, match="method must be one of exact, certified, approximate, got 'fast'"):
        bank.search(torch.randn(1, 16), method="fast")
    with pytest.raises(BankError, match=r"an index for 'approximate', got none. Call build_index"):
        bank.search(torch.randn(1, 16), method="approximate")
    with pytest.raises(
        BankError, match="factory must be one that faiss builds over 20 entries of width 16, got 'Nonsense'"
    ):
        bank.build_index("Nonsense")
    with pytest.raises(BankError, match=r"'IVF64,Flat'.*20"):
        bank.build_index("IVF64,Flat")
    with pytest.raises(BankError, match="'bananas': 3"):
        bank.build_index("Flat", parameters={"bananas": 3})
    for wrong in (-3, "x"):
        with pytest.raises(
            BankError, match=f"got 'IVF2,Flat' with {{'nprobe': {wrong!r}}}: .*See faiss's index_factory"
        ):
            bank.build_index("IVF2,Flat", parameters={"nprobe": wrong})
    for wrong in (-5, 2.5, "x"):
        with pytest.raises(ValueError, match=f"candidates must be an integer from 0, got {wrong!r}. Leave it out"):
            bank.build_index("Flat", candidates=wrong)
    with pytest.raises(BankError, match="the bank must hold entries, got 0"):
        MemoryBank(4, (1,)).build_index("Flat")
    bank.build_index("Flat")
    bank.remove([3])
    with pytest.raises(BankError, match="got 'Flat' of entries that have changed since"):
        bank.recall(torch.randn(1, 16))


def test_what_two_codes_of_a_query_miss_is_in_the_bound():
    """Keys that int8 holds exactly leave no residual to hide behind."""
    half = torch.randint(-126, 127, (40, 12)).float()
    half[:, 0] = 127
    keys = torch.cat([half, -half])  # mean 0, scale 1
    bank = bank_of(keys, metric="ip", key_dtype=torch.float32)
    search = certified.CertifiedSearch(bank._contents.table)
    assert float(search.parts[0].residuals.max()) == 0
    queries, upper = torch.randn(50, 12), torch.empty(50, 80)
    search._bounds(queries, upper, retrieval.banned_rows(bank._contents.table, None, None, bank._contents.table.dead))
    assert bool((upper.double() >= queries.double() @ keys.double().T).all())

"""Rows of ids against a dictionary, dense and sparse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.memory import lookup
from tinyalign.memory.lookup import IdLookup

LARGEST = 2**63 - 1


@given(
    st.lists(st.integers(0, 40) | st.integers(0, LARGEST), unique=True, max_size=60),
    st.lists(st.integers(-2, 45) | st.integers(0, LARGEST), max_size=150),
    st.randoms(use_true_random=False),
)
def test_equals_a_dictionary(ids, wanted, draw):
    wanted = wanted + draw.sample(ids, len(ids) // 2)
    rows = draw.sample(range(3 * len(ids)), len(ids))
    found = IdLookup(np.array(ids, dtype=np.int64), np.array(rows, dtype=np.int64)).find(
        np.array(wanted, dtype=np.int64)
    )
    known = dict(zip(ids, rows, strict=True))
    assert found.dtype == np.int64
    assert found.tolist() == [known.get(each, -1) for each in wanted]


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_many_ids(step):
    ids = 7 + step * np.random.default_rng(0).permutation(500)
    found = IdLookup(ids, np.arange(500))
    assert np.array_equal(found.find(ids), np.arange(500))
    assert np.array_equal(found.find(ids[::-1][:3]), [499, 498, 497])
    assert (found.find(np.array([6, 7 + 500 * step, -1, LARGEST, *[8] * (step > 2)])) == -1).all()


def test_the_table_is_used_where_ids_are_dense_and_stays_small(monkeypatch):
    assert IdLookup(np.arange(5, 105), np.arange(100))._table.nbytes == 400
    assert IdLookup(np.arange(0, 200, 2), np.arange(100))._table is not None
    assert IdLookup(np.arange(0, 300, 3), np.arange(100))._table is None
    assert IdLookup(np.arange(3), np.array([0, 1, 2**31]))._table is None  # a row that 32 bits cannot hold
    assert IdLookup(np.arange(3), np.array([0, 1, 2**31])).find(np.array([2])).tolist() == [2**31]
    monkeypatch.setattr(lookup, "SPREAD", 0)
    assert IdLookup(np.arange(5, 105), np.arange(100)).find(np.array([7])).tolist() == [2]

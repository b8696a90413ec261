"""Small banks with known contents, and the naive search they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyalign.memory import MemoryBank

SHAPE = (2, 3)
WIDTH = 8


def _random_bank(num: int = 40, *, seed: int = 0, start: int = 100, group_of: int = 3, **options: Any) -> MemoryBank:
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(WIDTH, SHAPE, **options)
    keys = torch.randn(num, WIDTH, generator=generator)
    values = torch.randn(num, *SHAPE, generator=generator)
    ids = torch.arange(start, start + num)
    notes = [{"caption": f"entry {i}", "even": i % 2 == 0} for i in ids.tolist()]
    bank.add(keys, values, ids=ids, groups=ids // group_of, metadata=notes)
    return bank


def _full_sort(bank: MemoryBank, queries: Tensor, banned: list[set[int]]) -> list[list[tuple[float, int]]]:
    keys, queries = bank.keys().double(), queries.double()
    if bank.metric == "cosine":
        queries = queries / queries.norm(dim=-1, keepdim=True)
    found = []
    for query, hidden in zip(queries, banned, strict=True):
        scored = [(float(query @ key), i) for key, i in zip(keys, bank.ids.tolist(), strict=True) if i not in hidden]
        found.append(sorted(scored, key=lambda pair: -pair[0]))
    return found


@pytest.fixture
def random_bank() -> Callable[..., MemoryBank]:
    """Make a bank of random entries: ids from ``start``, every ``group_of`` in a row of one group."""
    return _random_bank


@pytest.fixture
def full_sort() -> Callable[..., list[list[tuple[float, int]]]]:
    """Score every allowed entry of each query, best first: a Python loop over float64 products."""
    return _full_sort

"""Small banks with known contents, the naive search they are compared with, kills at random moments, spoilt files."""

from __future__ import annotations

import os
import random
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
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


def _same(one: MemoryBank, two: MemoryBank) -> None:
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.groups, two.groups)
    assert torch.equal(one.keys(), two.keys())
    assert torch.equal(one.gather(one.ids)[0], two.gather(two.ids)[0])
    assert one.metadata(one.ids) == two.metadata(two.ids)
    queries = torch.randn(3, one.key_dim)
    assert not len(one) or torch.equal(one.neighbours(queries, 3).ids, two.neighbours(queries, 3).ids)


@pytest.fixture(scope="session")
def same() -> Callable[[MemoryBank, MemoryBank], None]:
    """Assert that two banks hold the same entries and find the same neighbours."""
    return _same


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[Any, ...]]:
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, inner in items:
        yield from _places(inner, (*path, name))


def _edited(content: Any, draw: Callable[[Any], Any]) -> Any:
    where = draw(st.sampled_from(sorted(_places(content), key=repr)))
    new = draw(_json_values)
    if not where:
        return new
    inner = content
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = new
    return content


@pytest.fixture(scope="session")
def edited() -> Callable[[Any, Callable[[Any], Any]], Any]:
    """Put any JSON value anywhere into what was read from JSON, as hypothesis draws it."""
    return _edited


def _mutated(blob: bytes, draw: random.Random) -> bytes:
    changed = bytearray(blob)
    for _ in range(draw.randint(1, 4)):
        at, how = draw.randrange(len(changed) + 1), draw.randrange(5)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            changed[at : at + 8] = draw.randbytes(8)
        elif how == 2:
            number = draw.choice([0, -1, 7, 2**63 - 1, -(2**63), 10**9])
            changed[at : at + 8] = number.to_bytes(8, "little", signed=True)
        elif how == 3:
            del changed[at : at + draw.randrange(1, 20)]
        else:
            changed[at:at] = draw.randbytes(draw.randrange(1, 20))
    return bytes(changed)


@pytest.fixture(scope="session")
def mutated() -> Callable[[bytes, random.Random], bytes]:
    """Flip, overwrite, delete or insert a few bytes at random."""
    return _mutated


def _seconds(write: Callable[[], object]) -> float:
    begin = time.perf_counter()
    write()
    return time.perf_counter() - begin


def _killed(rounds: Callable[[], Iterable[object]], seed: int, span: float) -> bool:
    draw = random.Random(seed)
    started, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(told, b"x")
            for _ in rounds():
                os.write(told, b"x")
        except Exception:  # noqa: BLE001 (told to whoever reads the log; the parent sees that nothing had to be killed)
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(told)
    for _ in range(1 + draw.randrange(3)):
        if not select.select([started], [], [], 300)[0]:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError("the child has not finished a round within five minutes")
        os.read(started, 1)  # at the end of a child that finished: returns at once
    time.sleep(draw.uniform(0.0, span))
    os.kill(child, signal.SIGKILL)
    os.close(started)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def seconds() -> Callable[[Callable[[], object]], float]:
    """Say how long one round of writing takes on this machine, now."""
    return _seconds


@pytest.fixture
def killed() -> Callable[[Callable[[], Iterable[object]], int, float], bool]:
    """Run the generator ``rounds()`` in a child and kill it within ``span`` seconds of the start of a drawn round.

    The child tells of each round's start (each ``yield`` and the beginning), so that the kill falls into the first, the
    second or the third round or soon after, however slow the machine is: of the seeds 0 to 19, twelve let a whole round
    pass. True if it had to be killed.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    return _killed


@pytest.fixture
def kills() -> int:
    """Kills per kind of writing: 100 over save, add and commit, merge and compact, build, refresh."""
    return 100 // 5

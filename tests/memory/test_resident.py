"""Search on a device equals search of the bank; it never looks at data on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyalign.memory import BankError, FingerprintMismatch, KeyTransform, MemoryBank, resident


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(resident, "ROWS_AT_ONCE", 16)


def agree(bank, moved, queries, k, **exclude):
    expected, found = bank.search(queries, k, **exclude), moved.search(queries, k, **exclude)
    assert torch.equal(found.ids.cpu(), expected.ids)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, atol=1e-6, rtol=0)
    assert torch.equal(found.mask.cpu(), expected.mask)
    torch.testing.assert_close(found.values.cpu(), expected.values)


@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu", "cpu"]])
@pytest.mark.parametrize("value_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_equals_the_bank(random_bank, small_blocks, devices, value_dtype, metric):
    bank = random_bank(100, value_dtype=value_dtype, metric=metric)
    bank.remove([105, 111])
    moved = bank.to(devices)
    assert len(moved) == 98
    queries = torch.randn(6, 8)
    agree(bank, moved, queries, 5)
    agree(bank, moved, queries, 0)
    agree(bank, moved, queries, 120)
    agree(bank, moved, queries[:0], 3)
    exclude_ids = [[100, 199, 7], [], [150], list(range(100, 116)), [101], [102]]
    exclude_groups = torch.tensor([[33, -1], [40, 41], [-1, -1], [34, 60], [35, 36], [50, 51]])
    agree(bank, moved, queries, 5, exclude_ids=exclude_ids, exclude_groups=exclude_groups)
    agree(bank, moved, bank.keys()[:6], 2, exclude_ids=bank.ids[:6])
    ids = torch.tensor([[100, -1], [199, 150]])
    for one, two in zip(moved.gather(ids), bank.gather(ids), strict=True):
        torch.testing.assert_close(one, two)


def test_padding_does_not_exclude_entries_without_a_group():
    bank = MemoryBank(2, (1,))
    bank.add(torch.eye(2), torch.ones(2, 1), groups=[-1, 4])
    found = bank.to("cpu").neighbours(torch.eye(2), 2, exclude_groups=torch.tensor([-1, 4]))
    assert found.mask.tolist() == [[True, True], [True, False]]


# Fakes can only be of a kind of device that torch is built for; where that is no GPU, one that stands for it.
KIND = "cuda" if torch.backends.cuda.is_built() else "lazy"


class OnDevices(TorchDispatchMode):
    """Sees every operation: none may take or make a tensor on the host."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.seen = kind, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, made)):
            assert not isinstance(each, torch.Tensor) or each.device.type == self.kind, func
        self.seen.add(func)
        return made


@pytest.mark.parametrize("devices", [[f"{KIND}:0"], [f"{KIND}:0", f"{KIND}:1", f"{KIND}:2"]])
@pytest.mark.parametrize("key_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("whitened", [False, True])
def test_nothing_is_looked_at_and_nothing_leaves_the_devices(
    random_bank, small_blocks, devices, key_dtype, value_dtype, whitened
):
    """Fake tensors hold no data and know their device: reading one, sizing one by another, or mixing devices raises.

    The bank lies on three devices at most, the queries and exclusions on the first; every result must be there, too.
    """
    transform = KeyTransform.fit(random_bank().keys(), whiten=True, dim=5) if whitened else None
    bank = random_bank(100, key_dtype=key_dtype, value_dtype=value_dtype, transform=transform)
    moved = bank.to(["cpu"] * len(devices))
    queries, ids = torch.randn(3, 8), torch.ones(3, 2).long()
    expected = moved.search(queries, 4, exclude_ids=ids, exclude_groups=ids)
    with FakeTensorMode() as mode:
        moved._shards = [
            type(shard)(*(None if t is None else mode.from_tensor(t).to(device) for t in shard))
            for shard, device in zip(moved._shards, devices, strict=True)
        ]
        queries, ids = (mode.from_tensor(t).to(devices[0]) for t in (queries, ids))
        if moved._transform:  # its tensors are made fake by hand, too: made on the host, they would be seen
            moved._transform.mean, moved._transform.projection = (
                mode.from_tensor(t).to(devices[0]) for t in (moved._transform.mean, moved._transform.projection)
            )
        with OnDevices(KIND) as watched:
            hits = moved.search(queries, 4, exclude_ids=ids, exclude_groups=ids)
            found = moved.neighbours(queries.bfloat16(), 300)
            moved.search(queries[:0], 0)
            values, mask = moved.gather(hits.ids)
    assert moved.devices == tuple(torch.device(each) for each in devices)
    for made in (*hits, *found, values, mask):
        assert made.device == torch.device(devices[0])
    for made, right in zip((*hits, values), (*expected, expected.values), strict=True):
        assert (made.shape, made.dtype) == (right.shape, right.dtype)
    assert tuple(found.ids.shape) == (3, 300)
    assert {torch.ops.aten.searchsorted.Tensor, torch.ops.aten.topk.default} <= watched.seen


def test_the_transform_comes_along(random_bank):
    bank = random_bank(transform=KeyTransform.fit(random_bank().keys(), whiten=True, dim=5))
    moved = bank.to("meta")
    with OnDevices("meta"):
        hits = moved.search(torch.randn(3, 8, device="meta"), 4)
    assert tuple(hits.values.shape) == (3, 4, 2, 3)
    assert bank.search(torch.randn(3, 8), 4).mask.all()  # the bank's own stayed


def test_a_query_that_is_not_finite_finds_nothing(random_bank):
    moved = random_bank().to("cpu")
    queries = torch.randn(3, 8)
    queries[1, 2], queries[2] = float("nan"), 0.0
    assert moved.search(queries, 2).mask.tolist() == [[True, True], [False, False], [False, False]]


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("whitened", [False, True])
def test_queries_of_any_length_and_kind_find_what_the_bank_finds(random_bank, metric, whitened):
    transform = KeyTransform.fit(random_bank().keys(), metric=metric, whiten=True, dim=5) if whitened else None
    bank = random_bank(metric=metric, transform=transform)
    moved, queries = bank.to("cpu"), torch.randn(6, 8)
    for scale in (1e-30, 1e30) if metric == "cosine" else (1e-3, 1e3):
        agree(bank, moved, queries * scale, 3)
    agree(bank, moved, queries.double() * (1e-200 if metric == "cosine" else 1), 3)
    agree(bank, moved, queries.half(), np.int64(3))
    agree(bank, moved, queries.numpy(), 3)


def test_exclusions_by_place(random_bank):
    bank = random_bank()
    moved, queries, ids = bank.to("cpu"), bank.keys()[:3], bank.ids[:3]
    expected = bank.neighbours(queries, 4, exclude_ids=ids, exclude_groups=[[], [], [34]])
    for found in (moved.neighbours(queries, 4, ids, [[], [], [34]]), moved.search(queries, 4, ids, [[], [], [34]])):
        assert torch.equal(found.ids, expected.ids)


def test_queries_made_by_something_else_are_refused(random_bank):
    bank = random_bank(fingerprint={"key.encoder": "clip", "value.encoder": "other"})
    moved = bank.to("cpu")
    assert moved.search(torch.randn(2, 8), fingerprint={"key.encoder": "clip"}).mask.all()
    for search in (moved.search, moved.neighbours):
        with pytest.raises(FingerprintMismatch, match=r"key\.encoder \(bank: 'clip', given: 'dino'\)"):
            search(torch.randn(2, 8), fingerprint={"key.encoder": "dino"})


def test_without_values(random_bank):
    bank = random_bank()
    moved, whole = bank.to("cpu", values=False), bank.to("cpu")
    assert moved.num_bytes == whole.num_bytes - 40 * 6 * 2
    queries = torch.randn(2, 8)
    assert torch.equal(moved.neighbours(queries, 3).ids, bank.neighbours(queries, 3).ids)
    with pytest.raises(ValueError, match="moved with values=True, got values=False"):
        moved.search(queries)
    assert moved.devices == (torch.device("cpu"),)


def test_bad_input(random_bank):
    moved = random_bank().to("cpu")
    with pytest.raises(ValueError, match="k must be an integer from 0, got -1"):
        moved.search(torch.randn(1, 8), -1)
    with pytest.raises(ValueError, match=r"queries must be float \(B, 8\), got torch.float32 \(1, 7\)"):
        moved.search(torch.randn(1, 7))
    with pytest.raises(
        ValueError, match=r"exclude_ids must be integers with one row per query, got torch.int64 \(3, 1\)"
    ):
        moved.search(torch.randn(1, 8), exclude_ids=torch.ones(3).long())
    with pytest.raises(TypeError, match="queries must be a tensor, got list"):
        moved.search([[1.0] * 8])
    with pytest.raises(ValueError, match=r"MemoryBank.to: device must name at least one device, got \[\]"):
        random_bank(transform=KeyTransform.fit(random_bank().keys())).to([])
    with pytest.raises(BankError, match=r"MemoryBank.to: the bank must hold entries, got 0"):
        MemoryBank(3, (1,)).to("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("key_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_cuda_equals_the_bank_without_a_sync(random_bank, key_dtype):
    bank = random_bank(500, key_dtype=key_dtype)
    moved = bank.to("cuda")
    queries, hide = torch.randn(20, 8), bank.ids[:20]
    agree(bank, moved, queries.cuda(), 5)
    moved.search(queries.cuda(), 5, exclude_ids=hide.cuda())  # warm up
    cuda_queries, cuda_hide = queries.cuda(), hide.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = moved.search(cuda_queries, 5, exclude_ids=cuda_hide, exclude_groups=cuda_hide)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = bank.neighbours(queries, 5, exclude_ids=hide, exclude_groups=hide)
    assert torch.equal(found.ids.cpu(), expected.ids)

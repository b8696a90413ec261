"""Memory of results: used again once nobody holds them, and never before."""

from __future__ import annotations

import gc
import random
import threading

import numpy as np
import pytest
import torch

from tinyalign.memory import MemoryBank
from tinyalign.memory.rooms import LARGEST, MOST, SMALLEST, Rooms

SHAPE = (256, 1024)  # half a megabyte of float16


def test_memory_that_was_left_is_used_again():
    rooms = Rooms()
    held = rooms.empty(SHAPE, torch.float16)
    places = [rooms.empty(SHAPE, torch.float16).data_ptr() for _ in range(20)]
    assert len(set(places)) == 1
    assert held.data_ptr() not in places


def test_a_large_result_and_its_smaller_parts_find_their_places_again(monkeypatch):
    made, empty = [], np.empty
    monkeypatch.setattr(np, "empty", lambda size, dtype: made.append(size) or empty(size, dtype))
    rooms = Rooms()
    held = rooms.empty(SHAPE, torch.float16)
    for rows in (200, 190, 195, 180, 200):
        whole = rooms.empty(SHAPE, torch.float16)
        part = rooms.empty((rows, SHAPE[1]), torch.float16)
        held = whole  # noqa: F841 - as a caller holds a result while the next is made
        del whole, part
    assert len(made) == MOST


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t,
        lambda t: t[3:5],
        lambda t: t.numpy()[1:2],
        lambda t: t.view(torch.int16),
        lambda t: memoryview(t.numpy()),
        lambda t: t.untyped_storage(),
    ],
)
def test_what_is_held_is_left_alone(hold):
    rooms = Rooms()
    tensor = rooms.empty(SHAPE, torch.float16).fill_(7)
    kept = hold(tensor)
    del tensor
    for _ in range(4):
        rooms.empty(SHAPE, torch.float16).zero_()
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.tensor([], dtype=torch.float16).set_(kept)
    numbers = np.unique(np.asarray(kept))
    assert numbers.tolist() in ([7], [0x4700])  # the bits of 7.0


def test_what_the_graph_needs_is_left_alone():
    rooms = Rooms()
    weight = torch.ones(1024, requires_grad=True)
    loss = (rooms.empty(SHAPE, torch.float32).fill_(3) * weight).sum()  # backward reads the 3
    rooms.empty(SHAPE, torch.float32).zero_()
    loss.backward()
    assert weight.grad.tolist() == [3.0 * SHAPE[0]] * 1024


def test_any_order_of_making_and_dropping():
    draw, rooms, held = random.Random(0), Rooms(), {}
    for number in range(1, 600):
        size = draw.choice([SMALLEST // 4, SMALLEST, 3 * SMALLEST, 8 * SMALLEST])
        tensor = rooms.empty((size,), torch.int16).fill_(number)
        assert len(rooms._kept) <= MOST
        if draw.random() < 0.5:
            held[number] = tensor[draw.randrange(size) :]
        if len(held) > draw.randrange(8):
            del held[draw.choice(list(held))]
        del tensor
        for stamp, view in held.items():
            assert int(view.min()) == int(view.max()) == stamp


def test_small_and_very_large_results_are_not_kept():
    rooms = Rooms()
    rooms.empty((SMALLEST - 1,), torch.uint8)
    rooms.empty((LARGEST + 1,), torch.uint8)
    assert not rooms._kept
    assert rooms.empty((0, 3), torch.int8).shape == (0, 3)


def test_results_that_are_held_for_good_do_not_end_it():
    rooms = Rooms()
    held = [rooms.empty(SHAPE, torch.float16) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in held}) == 5
    assert len({rooms.empty(SHAPE, torch.float16).data_ptr() for _ in range(20)}) == 1


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_gathered_values_stay_as_they_were(tmp_path, value_dtype):
    bank = MemoryBank(4, (32, 96), value_dtype=value_dtype)
    numbers = torch.arange(200)
    bank.add(torch.ones(200, 4), numbers[:, None, None].expand(200, 32, 96).float())
    bank.save(tmp_path / "bank")
    bank.add(torch.ones(50, 4), torch.full((50, 32, 96), 9.0))  # a second segment, in memory
    batches = torch.randint(250, (12, 20, 5), generator=torch.Generator().manual_seed(0))
    expected = [batch.where(batch < 200, 9).float() for batch in batches]
    results = [bank.gather(batch)[0] for batch in batches]
    for values, right in zip(results, expected, strict=True):
        torch.testing.assert_close(values.float().mean((-2, -1)), right, atol=0.01, rtol=0)
    places = set()
    for batch in batches:
        values = bank.gather(batch)[0]  # the last result is held while the next is made, as in a training loop
        places.add(values.data_ptr())
    assert len(places) <= MOST


class Gathered(torch.utils.data.Dataset):
    def __init__(self):
        self.bank = MemoryBank(2, (32, 96))
        self.bank.add(torch.ones(64, 2), torch.arange(64)[:, None, None].expand(64, 32, 96).float())

    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.randint(64, (40,), generator=torch.Generator().manual_seed(index))
        return ids, self.bank.gather(ids)[0]


def test_results_reach_another_process_whole():
    for ids, values in list(torch.utils.data.DataLoader(Gathered(), batch_size=None, num_workers=1)):
        assert torch.equal(values.amax((1, 2)).long(), ids)
        assert torch.equal(values.amin((1, 2)).long(), ids)


def test_threads_never_share_memory():
    bank = MemoryBank(2, (32, 96))
    bank.add(torch.ones(64, 2), torch.arange(64)[:, None, None].expand(64, 32, 96).float())
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(150):
            ids = torch.randint(64, (40,), generator=generator)
            values = bank.gather(ids)[0]
            if not torch.equal(values.amax((1, 2)).long(), ids) or not torch.equal(values.amin((1, 2)).long(), ids):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert len(bank._contents.table.rooms._kept) <= MOST

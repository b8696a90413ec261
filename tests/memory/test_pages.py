"""Mapped values: a cold gather reads what it needs, a warm file is mapped in at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tinyalign.memory import MemoryBank
from tinyalign.memory.pages import Pages

ROWS, SHAPE = 6000, (32, 96)
pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")


def bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def drop(folder):
    for path in folder.rglob("*.bin"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "bank"
    bank = MemoryBank(4, SHAPE)
    numbers = torch.arange(ROWS).remainder(1024).half()
    bank.add(torch.ones(ROWS, 4), numbers[:, None, None].expand(ROWS, *SHAPE))
    bank.save(path)
    return path


def test_a_cold_gather_reads_little_more_than_its_payload(folder):
    payload = 16 * 5 * 2 * 32 * 96
    ids = torch.randperm(ROWS)[:80].reshape(16, 5)
    drop(folder)
    bank = MemoryBank.load(folder)
    before = bytes_read()
    values, _ = bank.gather(ids)
    read = bytes_read() - before
    assert torch.equal(values[:, :, 0, 0], ids.remainder(1024).half())
    assert read <= 4 * payload
    if read < payload:  # not all of it was cold
        pytest.skip("this file system does not count what it reads, or keeps files in memory")


def test_resident_tells_warm_from_cold(folder):
    (path,) = folder.rglob("values.bin")
    pages = Pages(path)
    path.read_bytes()
    assert pages.resident()
    assert pages.map_in() in (True, False)  # an older kernel cannot
    del pages
    drop(folder)
    if Pages(path).resident():
        pytest.skip("this file system keeps everything in memory")
    cold = Pages(path)
    before = bytes_read()
    assert not cold.resident()
    assert bytes_read() - before <= 4096 * 32  # looking does not read the file


def test_a_warm_file_is_mapped_in_by_the_first_gather(folder):
    (path,) = folder.rglob("values.bin")
    path.read_bytes()
    bank = MemoryBank.load(folder)
    pages = bank._contents.table.segments[0].pages
    if not pages.map_in():
        pytest.skip("this kernel has no MADV_POPULATE_READ")
    pages._mapped_in = False
    bank.gather(torch.arange(80).reshape(16, 5))
    assert pages._mapped_in


def test_advice_that_the_kernel_refuses_is_only_advice(folder):
    (path,) = folder.rglob("values.bin")
    pages = Pages(path)
    assert pages._advise(9999) is False
    assert pages._advise(None) is False

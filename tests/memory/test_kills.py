"""SIGKILL at random moments of every kind of writing: what remains is the old bank or the new one."""

from __future__ import annotations

from functools import partial

import torch

from tinyalign.memory import BuildOptions, EncodedBatch, MemoryBank, build_memory_bank


def stamped(stamp: int, num: int = 60, start: int = 0) -> MemoryBank:
    """A bank whose keys, values and metadata all carry one number."""
    bank = MemoryBank(4, (16, 16), metric="ip")
    keys = torch.full((num, 4), float(stamp))
    note = [{"stamp": stamp}] * num
    bank.add(keys, torch.full((num, 16, 16), float(stamp)), ids=range(start, start + num), metadata=note)
    return bank


def stamps(bank: MemoryBank, ids: torch.Tensor) -> set[float]:
    """Every number that keys, values and metadata of some entries carry."""
    values, _ = bank.gather(ids)
    return {*bank.keys(ids).unique().tolist(), *values.unique().tolist(), *(n["stamp"] for n in bank.metadata(ids))}


def test_kills_during_save(tmp_path, kills, killed, seconds):
    path = tmp_path / "bank"
    span = 2 * seconds(lambda: stamped(0).save(path))

    def overwrite(stamp):
        while True:
            stamped(stamp).save(path)
            yield

    states = [0]
    for seed in range(kills):
        assert killed(partial(overwrite, seed + 1), seed, span)
        bank = MemoryBank.load(path)
        bank.verify()
        found = stamps(bank, bank.ids)
        assert len(found) == 1
        states.append(int(found.pop()))
    assert states == sorted(states)
    assert len(set(states)) > kills // 2  # most kills came after a switch, and none mixed


def test_kills_during_add_and_commit(tmp_path, kills, killed, seconds):
    path = tmp_path / "bank"
    span = 2 * seconds(lambda: stamped(0).save(path))
    done = tmp_path / "done"
    done.write_text("0")

    def grow():
        bank = MemoryBank.load(path)
        while True:
            stamp = bank.generation
            new = stamped(stamp, start=60 * stamp)
            bank.add(new.keys(), new.gather(new.ids)[0], ids=new.ids, metadata=new.metadata(new.ids))
            bank.remove([60 * stamp - 1])
            bank.commit()
            done.write_text(str(stamp))
            yield

    for seed in range(kills):
        assert killed(grow, seed, span)
        bank = MemoryBank.load(path)
        bank.verify()
        promised = int(done.read_text() or 0)
        assert bank.generation - 1 >= promised  # what commit() returned from is there
        for stamp in range(bank.generation):
            ids = bank.ids[bank.ids // 60 == stamp]
            assert len(ids) == (60 if stamp == bank.generation - 1 else 59)
            assert stamps(bank, ids) == {float(stamp)}
    assert bank.generation > kills // 2


def test_kills_during_merge_and_compact(tmp_path, kills, killed, seconds):
    path = tmp_path / "bank"
    parts = [stamped(1), stamped(1, start=60)]
    span = 3 * seconds(lambda: MemoryBank.merge(parts).save(path))

    def rewrite():
        while True:
            MemoryBank.merge([stamped(2), stamped(2, start=60)]).save(path)
            bank = MemoryBank.load(path)
            bank.remove([0, 119])
            bank.commit()
            bank.compact()
            yield

    sizes = set()
    for seed in range(kills):
        assert killed(rewrite, seed, span)
        bank = MemoryBank.load(path)
        bank.verify()
        assert len(bank) in (118, 120)
        assert stamps(bank, bank.ids) in ({1.0}, {2.0})
        sizes.add(len(bank))
    assert stamps(bank, bank.ids) == {2.0}


def test_kills_during_build(tmp_path, kills, killed, seconds):
    path, unfinished = tmp_path / "bank", tmp_path / ".bank.build"
    log = tmp_path / "log"

    def told(line):
        with open(log, "a") as stream:
            stream.write(line)

    def encode(records):
        told("encoded\n" * len(records))
        keys = torch.full((len(records), 4), 5.0)
        notes = [{"stamp": 5}] * len(records)
        return EncodedBatch(keys, torch.full((len(records), 16, 16), 5.0), ids=records, metadata=notes)

    def build():
        while True:
            told("resumed\n" if unfinished.exists() else "fresh\n")
            options = BuildOptions(metric="ip", commit_every=10)
            yield build_memory_bank(range(30), encode, path, batch_size=5, progress=False, options=options)

    span = seconds(lambda: next(build()))
    found = set()
    for seed in range(kills):
        stamped(7).save(path)
        assert killed(build, seed, span)
        bank = MemoryBank.load(path)
        bank.verify()
        found.add(len(bank))
        assert (len(bank), stamps(bank, bank.ids)) in ((60, {7.0}), (30, {5.0}))
    assert 30 in found
    next(build())
    bank = MemoryBank.load(path)
    bank.verify()
    assert bank.ids.tolist() == list(range(30))
    lines = log.read_text().splitlines()
    assert lines.count("encoded") <= 30 * lines.count("fresh") + 15 * kills  # a kill costs the block under way

"""Saved banks: generations, writers, what damage is named, and full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tinyalign.memory import (
    BankCorruptedError,
    BankError,
    BankLockedError,
    MemoryBank,
    StaleBankError,
    store,
)
from tinyalign.memory.lock import writer_lock
from tinyalign.memory.manifest import BLOCK_BYTES
from tinyalign.memory.saving import fold_point


def files_of(path):
    return sorted(p for p in (path / "segments").rglob("*.bin"))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_save_then_load_is_the_identity(random_bank, tmp_path, dtype, mmap, same):
    bank = random_bank(value_dtype=dtype, key_dtype=torch.bfloat16, fingerprint={"key.a": "b", "data.n": 3})
    expected = random_bank(value_dtype=dtype, key_dtype=torch.bfloat16, fingerprint={"key.a": "b", "data.n": 3})
    bank.save(tmp_path / "bank")
    loaded = MemoryBank.load(tmp_path / "bank", mmap=mmap)
    same(bank, expected)
    same(loaded, expected)
    assert loaded.fingerprint == bank.fingerprint == expected.fingerprint
    assert (loaded.metric, loaded.value_dtype, loaded.key_dtype) == ("cosine", dtype, torch.bfloat16)
    queries = torch.randn(3, 8)
    for one, two in zip(loaded.search(queries, 4), expected.search(queries, 4), strict=True):
        assert torch.equal(one, two)


def test_an_empty_bank_and_one_without_metadata_survive(tmp_path):
    bank = MemoryBank(3, (1,))
    bank.save(tmp_path / "bank")
    bank.add(torch.eye(3), torch.ones(3, 1))
    assert bank.commit() == 2
    loaded = MemoryBank.load(tmp_path / "bank")
    assert loaded.ids.tolist() == [0, 1, 2]
    assert loaded.metadata([2]) == [{}]
    loaded.remove([0, 1, 2])
    loaded.commit()
    empty = MemoryBank.load(tmp_path / "bank")
    assert len(empty) == 0
    assert empty.add(torch.eye(3), torch.ones(3, 1)).tolist() == [3, 4, 5]  # an id is not used twice


def test_generations(random_bank, tmp_path, same):
    path = tmp_path / "bank"
    bank = random_bank()
    bank.save(path)
    reader = MemoryBank.load(path)
    before = reader.gather(reader.ids)[0]
    assert bank.commit() == 1  # nothing to do
    bank.remove([100, 101])
    bank.add(torch.randn(3, 8), torch.randn(3, 2, 3), ids=[1, 2, 100], metadata=[None, {"a": 1}, None])
    assert (bank.commit(), bank.generation) == (2, 2)
    current = MemoryBank.load(path)
    assert current.ids.tolist() == [*range(102, 140), 1, 2, 100]
    assert current.metadata([2, 100, 102])[:2] == [{"a": 1}, {}]
    same(current, bank)
    assert bank.compact() == 2
    assert bank.generation == 3
    assert len(list((path / "segments").iterdir())) == 1
    same(MemoryBank.load(path), current)
    assert torch.equal(reader.gather(reader.ids)[0], before)  # the first generation's reader goes on undisturbed
    assert len(reader) == 40
    with pytest.raises(StaleBankError, match=r"verify: .* must still be at generation 1, got generation 3"):
        reader.verify()
    bank.fingerprint["data.note"] = "x"
    bank.save(path)
    assert MemoryBank.load(path).fingerprint == {"data.note": "x"}
    random_bank(5).save(path)
    assert (len(MemoryBank.load(path)), MemoryBank.load(path).generation) == (5, 5)


def test_a_writer_that_fell_behind_is_refused(random_bank, tmp_path):
    path = tmp_path / "bank"
    random_bank().save(path)
    one, two = MemoryBank.load(path), MemoryBank.load(path)
    one.remove([100])
    two.remove([101])
    one.commit()
    for write in (two.commit, two.compact, lambda: two.save(path)):
        with pytest.raises(StaleBankError, match=r"must still be at generation 1, got generation 2.*load it again"):
            write()
    assert 101 in MemoryBank.load(path)
    shutil.rmtree(path)
    one.remove([102])
    path.mkdir()
    path.rmdir()
    with pytest.raises(BankError, match="must be there, got no such directory"):
        one.commit()
    path.mkdir()
    with pytest.raises(StaleBankError, match="got no bank"):
        one.commit()


def test_a_second_writer_at_once_is_refused_with_the_owners_name(random_bank, tmp_path):
    path = tmp_path / "bank"
    bank = random_bank()
    bank.save(path)
    bank.remove([100])
    with writer_lock(path, "test"), pytest.raises(BankLockedError, match=f"process {os.getpid()} on .* holds it"):
        bank.commit()
    with writer_lock(path, "test"), pytest.raises(BankLockedError, match=r"MemoryBank.save: .* one writer at a time"):
        random_bank().save(path)
    assert bank.commit() == 2
    (path / "lock").write_text("?")
    with writer_lock(path, "test"):
        (path / "lock").write_text("?")
        with pytest.raises(BankLockedError, match="another process holds it"):
            random_bank().save(path)


def test_a_reader_that_meets_a_new_generation_opens_that(random_bank, tmp_path, monkeypatch):
    path = tmp_path / "bank"
    bank = random_bank()
    bank.save(path)
    opened = store._open
    calls = []

    def replaced_meanwhile(*args, **kwargs):
        if not calls:
            calls.append(1)
            bank.compact()
        return opened(*args, **kwargs)

    monkeypatch.setattr(store, "_open", replaced_meanwhile)
    assert MemoryBank.load(path).generation == 2


def test_what_is_not_a_bank_is_left_alone(random_bank, tmp_path):
    with pytest.raises(BankError, match=r"path must be a saved bank, got '.*nowhere' without manifest.json"):
        MemoryBank.load(tmp_path / "nowhere")
    (tmp_path / "photo.jpg").write_bytes(b"1")
    with pytest.raises(BankError, match=r"must be a bank or an empty directory, got .* holding 'photo.jpg'"):
        random_bank().save(tmp_path)
    with pytest.raises(BankError, match="must be a directory, got the file"):
        random_bank().save(tmp_path / "photo.jpg")
    assert [e.name for e in tmp_path.iterdir()] == ["photo.jpg"]
    for method in ("commit", "verify"):
        with pytest.raises(BankError, match=f"MemoryBank.{method}: the bank must have been saved"):
            getattr(random_bank(), method)()


@pytest.fixture
def saved(tmp_path):
    """A bank of two generations with every kind of file, its values in several blocks."""
    bank = MemoryBank(64, (32, 64), value_dtype=torch.int8)
    bank.add(torch.randn(1500, 64), torch.randn(1500, 32, 64), metadata=[{"n": n} for n in range(1500)])
    bank.save(tmp_path / "bank")
    bank.remove([3, 77])
    bank.add(torch.randn(2, 64), torch.randn(2, 32, 64))
    bank.commit()
    assert (1500 * 32 * 64) // BLOCK_BYTES >= 2
    return tmp_path / "bank"


def test_every_kind_of_damage_is_named(saved):
    begin = time.perf_counter()
    report = MemoryBank.load(saved).verify()
    assert 0 < report.seconds <= time.perf_counter() - begin
    assert (report.generation, report.files) == (2, len(files_of(saved)))
    assert report.bytes == sum(p.stat().st_size for p in files_of(saved))
    generator = torch.Generator().manual_seed(0)
    for path in files_of(saved):
        whole = path.read_bytes()
        at = int(torch.randint(len(whole), (1,), generator=generator))
        flipped = whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :]
        page = at // 4096 * 4096
        zeroed = whole[:page] + bytes(len(whole[page : page + 4096])) + whole[page + 4096 :]
        for content, sizes_change in ((flipped, False), (zeroed, False), (whole[:at], True), (whole + b"\0", True)):
            if content == whole:
                continue
            path.write_bytes(content)
            name = path.relative_to(saved).as_posix().replace(".", r"\.")
            with pytest.raises(BankCorruptedError, match=name) as caught:
                MemoryBank.load(saved).verify()
            if sizes_change:
                assert "MemoryBank.load" in str(caught.value)
        path.unlink()
        with pytest.raises(BankCorruptedError, match=f"{path.name} must have .* bytes, got no such file"):
            MemoryBank.load(saved)
        path.write_bytes(whole)
    MemoryBank.load(saved).verify()


def test_damage_after_loading_and_swapped_files_are_named(saved):
    bank = MemoryBank.load(saved)
    first, second = sorted((saved / "segments").iterdir())
    values = (first / "values.bin").read_bytes()
    blocks = [values[:BLOCK_BYTES], values[BLOCK_BYTES : 2 * BLOCK_BYTES], values[2 * BLOCK_BYTES :]]
    (first / "values.bin").write_bytes(blocks[1] + blocks[0] + blocks[2])
    with pytest.raises(BankCorruptedError, match=r"values\.bin: 2 damaged block\(s\) of 1048576 bytes: 0, 1\. Restore"):
        bank.verify()
    (first / "values.bin").write_bytes(values)
    bank.verify()
    swapped = [(folder / "ids.bin").read_bytes() for folder in (first, second)]
    (first / "ids.bin").write_bytes(swapped[1])
    with pytest.raises(BankCorruptedError, match=r"ids\.bin must have 12000 bytes, got 16"):
        MemoryBank.load(saved)
    (first / "ids.bin").write_bytes(swapped[0])
    with open(first / "values.bin", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(BankCorruptedError, match=r"values\.bin: 3072004 bytes instead of 3072000"):
        bank.verify()
    (first / "values.bin").write_bytes(values)
    assert bank.path == saved
    shutil.rmtree(second)
    with pytest.raises(BankCorruptedError, match=r"missing"):
        bank.verify()


def test_every_edit_of_the_manifest_is_refused(saved):
    manifest = saved / "manifest.json"
    whole = manifest.read_bytes()
    content = json.loads(whole)
    for at in range(0, len(whole), 97):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BankError, match=r"manifest\.json"):
            MemoryBank.load(saved)
    for cut in (b"", whole[:50], whole[:-1], b"[]", b"\xff", b"[" * 100_000, b'{"a": NaN}'):
        manifest.write_bytes(cut)
        with pytest.raises(BankCorruptedError, match=r"manifest\.json"):
            MemoryBank.load(saved)
    manifest.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(BankError, match=r"must have format version 1, got 2. Update tinyalign"):
        MemoryBank.load(saved)


def test_a_kill_before_the_switch_leaves_rubbish_that_the_next_writer_sweeps(random_bank, tmp_path, same):
    path = tmp_path / "bank"
    bank = random_bank()
    bank.save(path)
    (path / "segments" / "00000002-deadbeef").mkdir()
    (path / "segments" / "00000002-deadbeef" / "keys.bin").write_bytes(b"half")
    (path / ".manifest.json.abc").write_bytes(b"half")
    same(MemoryBank.load(path), bank)
    bank.remove([100])
    bank.commit()
    assert sorted(e.name for e in path.iterdir()) == ["lock", "manifest.json", "segments"]
    assert not (path / "segments" / "00000002-deadbeef").exists()


FULL = """
import resource, signal, sys, torch
from tinyalign.memory import BankError, MemoryBank
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
bank = MemoryBank.load(sys.argv[1])
bank.add(torch.randn(4000, 64), torch.randn(4000, 32, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for write in (bank.commit, bank.compact, lambda: bank.save(sys.argv[1] + "-new")):
    try:
        write()
    except BankError as error:
        print(error)
"""


def test_a_full_disk_fails_cleanly(saved):
    before = MemoryBank.load(saved).content_hash()
    run = subprocess.run([sys.executable, "-c", FULL, str(saved)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("must have room for the new entries, got 'File too large'") == 3, run.stdout
    bank = MemoryBank.load(saved)
    bank.verify()
    assert bank.content_hash() == before
    assert len(list((saved / "segments").iterdir())) == 2


def test_a_full_disk_at_the_manifest(random_bank, tmp_path, monkeypatch):
    bank = random_bank()
    bank.save(tmp_path / "bank")
    bank.remove([100])

    def no_room(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_json", no_room)
    with pytest.raises(BankError, match=r"room for a manifest, got 'No space left on device'.*as it was"):
        bank.commit()
    assert 100 in MemoryBank.load(tmp_path / "bank")
    monkeypatch.undo()
    assert bank.commit() == 2


@pytest.mark.parametrize("part", ["write_blocks", "write_json"])
def test_any_other_error_of_the_disk_comes_through_and_leaves_nothing(random_bank, tmp_path, monkeypatch, part):
    bank = random_bank()
    bank.save(tmp_path / "bank")
    bank.add(torch.ones(1, 8), torch.ones(1, 2, 3))

    def broken(path, content):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(store, part, broken)
        with pytest.raises(OSError, match="Input/output error"):
            bank.commit()
    stored = MemoryBank.load(tmp_path / "bank")
    stored.verify()
    assert len(stored) == 40
    if part == "write_blocks":
        assert len(list((tmp_path / "bank" / "segments").iterdir())) == 1
    assert bank.commit() == 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_the_middle_of_a_segment(random_bank, tmp_path, monkeypatch, error):
    bank = random_bank()
    bank.save(tmp_path / "bank")
    bank.add(torch.ones(1, 8), torch.ones(1, 2, 3))
    write = store.write_blocks

    def fills_up(path, parts):
        if path.name == "values.bin":
            raise OSError(error, "no room")
        return write(path, parts)

    monkeypatch.setattr(store, "write_blocks", fills_up)
    with pytest.raises(BankError, match=r"MemoryBank.commit: the disk of .* room for the new entries, got 'no room'"):
        bank.commit()
    assert len(list((tmp_path / "bank" / "segments").iterdir())) == 1


def test_loading_maps_keys_and_values(saved):
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("needs /proc")
    bank = MemoryBank.load(saved)
    names = [
        f"{saved}/segments/{each.name}/{file}"
        for each in (saved / "segments").iterdir()
        for file in ("keys.bin", "values.bin")
    ]
    assert all(name in mapped.read_text() for name in names)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    del bank
    whole = MemoryBank.load(saved, mmap=False)
    assert not any(name in mapped.read_text() for name in names)
    whole.verify()


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([], 0),
        ([5] * 31, 31),
        ([5] * 32, 0),
        ([1000] + [5] * 31, 1),
        ([1000, 400] + [5] * 30, 2),
        ([3, 1000] + [5] * 30, 2),
        ([10, 1000, 0, 0] + [1] * 60, 2),
    ],
)
def test_fold_point(rows, kept):
    assert fold_point(rows) == kept


def test_many_commits_keep_few_segments_and_every_entry(tmp_path, same):
    path, model = tmp_path / "bank", {}
    bank = MemoryBank(4, (2,), metric="ip")
    bank.save(path)
    for step in range(70):
        bank.add(torch.full((2, 4), float(step)), torch.full((2, 2), float(step)), ids=[2 * step, 2 * step + 1])
        model.update({2 * step: step, 2 * step + 1: step})
        if step % 3 == 2:
            gone = sorted(model)[step % 7]
            bank.remove([gone])
            del model[gone]
        bank.commit()
        assert len(list((path / "segments").iterdir())) <= 33
    loaded = MemoryBank.load(path)
    loaded.verify()
    assert {i: float(loaded[i].value[0]) for i in loaded.ids.tolist()} == model
    assert {i: float(loaded[i].key[0]) for i in loaded.ids.tolist()} == model
    same(loaded, bank)

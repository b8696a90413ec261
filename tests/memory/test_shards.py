"""How records are divided over ranks, and how ranks wait."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.memory import BankError, MemoryBank, manifest, shards, store, tables
from tinyalign.memory.shards import Share, share_of, start_anew, wait_until


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 9))
def test_shares_cover_all_records_once_and_cut_between_batches(records, batch, ranks):
    shares = [share_of(records, batch, {"RANK": str(r), "WORLD_SIZE": str(ranks)}) for r in range(ranks)]
    assert [s.begin for s in shares] == [0, *[s.end for s in shares[:-1]]]
    assert shares[-1].end == records
    assert all(s.begin % batch == 0 or s.begin == records for s in shares)
    batches = [-(-(s.end - s.begin) // batch) for s in shares]
    assert max(batches) - min(batches) <= 1


def test_alone_there_is_one_rank():
    assert share_of(10, 3, {}) == Share(0, 1, 0, 10)


@pytest.mark.parametrize(("rank", "ranks"), [("3", "3"), ("-1", "2")])
def test_a_rank_out_of_range(rank, ranks):
    with pytest.raises(BankError, match=f"RANK must be from 0 to WORLD_SIZE - 1, got {rank} of {ranks}"):
        share_of(10, 3, {"RANK": rank, "WORLD_SIZE": ranks})


def test_waiting_ends_with_the_condition_or_the_time():
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() > begin + 0.1, 120, "a while")
    with pytest.raises(BankError, match="waiting for rank 0 must end within 0 s, got no sign"):
        wait_until(lambda: False, 0.05, "rank 0")


def test_rank_zero_waits_until_all_have_seen_the_bank(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    first, second = Share(0, 2, 0, 5), Share(1, 2, 5, 10)
    follower = threading.Thread(target=second.follow, args=(work, 120.0))
    follower.start()
    first.finish(work, 120.0)
    follower.join()
    assert not work.exists()
    with pytest.raises(BankError, match="rank 0 to publish the bank"):
        second.follow(tmp_path, 0.05)
    work.mkdir()
    (work / "published-of-00003.json").touch()  # by a build over three ranks, killed before it had cleaned up
    with pytest.raises(BankError, match="rank 0 to publish the bank"):
        second.follow(work, 0.05)


def test_starting_anew(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(BankError, match=r"resume=False must find no leftovers when several ranks build, got '.*work'"):
        start_anew(work, Share(0, 2, 0, 5))
    start_anew(work, Share(0, 1, 0, 5))
    assert not work.exists()
    start_anew(work, Share(1, 2, 0, 5))


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_builder import encode
from tinyalign.memory import BuildOptions, build_memory_bank
options = BuildOptions(timeout=60.0)
if sys.argv[3] == "group":
    torch.distributed.init_process_group("gloo")
build_memory_bank(
    range(50), encode, sys.argv[2], batch_size=3, progress=False, options=options, resume=sys.argv[3] != "group"
)
"""


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "group"), [("torchrun", "group"), ("torchrun", "alone"), ("accelerate", "group")])
def test_under_a_launcher(tmp_path, launcher, group):
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    if group == "group":  # what a killed build of another plan would leave
        (tmp_path / ".bank.build").mkdir()
        (tmp_path / ".bank.build" / "shard-00000-of-00002.done.json").write_text('{"plan": {}, "skipped": []}')
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(script), str(Path(__file__).parent)]
    run = subprocess.run([*command, str(tmp_path / "bank"), group], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    alone = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "one"), "alone"]
    subprocess.run(alone, check=True, timeout=600)
    together, one = MemoryBank.load(tmp_path / "bank"), MemoryBank.load(tmp_path / "one")
    assert together.ids.tolist() == list(range(10, 60))
    assert together.content_hash() == one.content_hash()
    for entry, other in zip(together.gather(together.ids), one.gather(one.ids), strict=True):
        assert entry.equal(other)
    assert together.metadata(together.ids) == one.metadata(one.ids)


def test_what_is_too_large_or_never_still(random_bank, tmp_path, monkeypatch):
    bank = random_bank()
    bank.save(tmp_path / "bank")
    monkeypatch.setattr(manifest, "LARGEST_MANIFEST", 100)
    with pytest.raises(BankError, match="must stay under 100 bytes, got"):
        MemoryBank.load(tmp_path / "bank")
    monkeypatch.undo()
    (tmp_path / "table.json").write_text(" " * 200)
    monkeypatch.setattr(tables, "LARGEST_MANIFEST", 100)
    with pytest.raises(BankError, match="must be small, got 200 bytes"):
        tables.read_facts(tmp_path, "any", 1, "test")
    monkeypatch.undo()

    def always_replaced(*args, **kwargs):
        (tmp_path / "bank").joinpath("manifest.json").read_text()
        other = MemoryBank.merge([random_bank(3)])
        monkeypatch.undo()
        other.save(tmp_path / "bank")
        monkeypatch.setattr(store, "_open", always_replaced)
        raise FileNotFoundError("gone")

    monkeypatch.setattr(store, "_open", always_replaced)
    bank = random_bank(2)
    with pytest.raises(BankError, match="must stay still long enough to be opened, got 16 new generations"):
        store.open_generation(tmp_path / "bank", "test", mapped=True)


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    work = tmp_path / ".bank.build"
    for name in (work, tmp_path / ".bank.build.old"):
        name.mkdir()
        (name / "shard").touch()
    rmtree, states = shutil.rmtree, []

    def watched(path, **options):
        rmtree(path, **options)
        states.append(sorted(e.name for e in tmp_path.iterdir()))

    monkeypatch.setattr(shutil, "rmtree", watched)
    shards.discard(work)
    assert states == [[".bank.build"], []]
    work.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: states.append(path.name))  # killed before it deletes
    shards.discard(work)
    assert not work.exists()
    shards.discard(work)

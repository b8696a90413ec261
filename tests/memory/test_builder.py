"""Building: batches, kills, ranks, records that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tinyalign.memory import BankError, BuildOptions, EncodedBatch, MemoryBank, build_memory_bank, skipped_records


def encode(records):
    """Every record is a number; its key and value are made from it alone."""
    keys = torch.stack([torch.tensor([r + 1.0, r * r + 1.0, (r % 5) + 1.0]) for r in records])
    notes = [{"record": r} for r in records]
    return EncodedBatch(
        keys, keys[:, None] / 100, ids=[10 + r for r in records], groups=[r // 2 for r in records], metadata=notes
    )


class Encoder:
    """``encode`` that counts what it sees and can die."""

    def __init__(self, dies_at=None, bad=()):
        self.seen, self.dies_at, self.bad = [], dies_at, set(bad)

    def __call__(self, records):
        if self.dies_at is not None and self.dies_at in records:
            raise KeyboardInterrupt
        if self.bad & set(records):
            raise ValueError(f"cannot read {sorted(self.bad & set(records))}")
        self.seen += records
        return encode(records)


@pytest.fixture
def expected():
    bank = MemoryBank(3, (1, 3))
    bank.add(*encode(list(range(50))))
    return bank


def test_build_equals_adding(tmp_path, expected, same):
    bank = build_memory_bank(
        range(50), encode, tmp_path / "bank", batch_size=7, fingerprint={"key.a": 1}, progress=False
    )
    same(bank, expected)
    assert bank.fingerprint == {"key.a": 1}
    assert bank.generation == 1
    bank.verify()
    assert [e.name for e in tmp_path.iterdir()] == ["bank"]
    assert skipped_records(tmp_path / "bank") == []


def test_resumes_without_encoding_again(tmp_path, expected, same):
    options = BuildOptions(commit_every=10)
    first = Encoder(dies_at=33)
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(range(50), first, tmp_path / "bank", batch_size=5, options=options, progress=False)
    assert not (tmp_path / "bank").exists()
    second = Encoder()
    bank = build_memory_bank(range(50), second, tmp_path / "bank", batch_size=5, options=options, progress=False)
    assert second.seen == [*range(5), *range(30, 50)]  # a finished batch is compared
    same(bank, expected)
    third = Encoder(dies_at=20)
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(range(50), third, tmp_path / "bank", batch_size=5, options=options, progress=False)
    same(MemoryBank.load(tmp_path / "bank"), expected)  # the old bank stays in use
    fourth = Encoder()
    build_memory_bank(range(50), fourth, tmp_path / "bank", batch_size=5, options=options, resume=False, progress=False)
    assert fourth.seen == list(range(50))


def test_another_plan_is_not_continued(tmp_path):
    options = BuildOptions(commit_every=5)
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(range(50), Encoder(dies_at=33), tmp_path / "b", batch_size=5, options=options, progress=False)
    with pytest.raises(BankError, match=r"same plan.*build\.batch_size.*key\.a.*resume=False"):
        build_memory_bank(
            range(50), encode, tmp_path / "b", batch_size=4, options=options, fingerprint={"key.a": 2}, progress=False
        )


def test_another_plan_takes_the_place_of_a_build_that_was_published(tmp_path, expected, monkeypatch, same):
    """A kill between the switch to the new bank and the end of the call leaves blocks that nobody needs."""
    from tinyalign.memory import shards

    def killed(work):
        raise KeyboardInterrupt

    def build(**options):
        options = {"batch_size": 5, "progress": False, **options}
        return build_memory_bank(range(50), options.pop("encode", encode), tmp_path / "bank", **options)

    monkeypatch.setattr(shards, "discard", killed)
    with pytest.raises(KeyboardInterrupt):
        build()
    same(MemoryBank.load(tmp_path / "bank"), expected)
    with pytest.raises(KeyboardInterrupt):  # again, and the plan is the same: nothing new is encoded
        build(encode=Encoder(dies_at=5))
    monkeypatch.undo()
    other = build(batch_size=4, fingerprint={"key.a": 2})
    same(other, expected)
    assert other.fingerprint == {"key.a": 2}
    assert [e.name for e in tmp_path.iterdir()] == ["bank"]


def test_a_build_that_was_not_published_is_kept_from_another_plan(tmp_path, expected, monkeypatch):
    from tinyalign.memory import saving

    expected.save(tmp_path / "bank")

    def killed(*args, **options):
        raise KeyboardInterrupt

    save_all = saving.save_all
    monkeypatch.setattr(
        saving,
        "save_all",
        lambda c, f, path, *a, **o: (killed if path.name == "bank" else save_all)(c, f, path, *a, **o),
    )
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(range(50), encode, tmp_path / "bank", batch_size=5, progress=False)
    monkeypatch.undo()
    with pytest.raises(BankError, match=r"same plan, got a difference in build\.batch_size.*resume=False"):
        build_memory_bank(range(50), encode, tmp_path / "bank", batch_size=4, progress=False)
    again = Encoder()
    build_memory_bank(range(50), again, tmp_path / "bank", batch_size=5, progress=False)
    assert again.seen == list(range(5))


def test_blocks_of_another_number_of_ranks_are_not_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = BuildOptions(commit_every=5)
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(range(50), Encoder(dies_at=25), tmp_path / "b", batch_size=5, options=options, progress=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(BankError, match=r"in build\.ranks \(bank: 3, given: 1\)\. Pass resume=False"):
        build_memory_bank(range(50), encode, tmp_path / "b", batch_size=5, progress=False)
    bank = build_memory_bank(range(50), encode, tmp_path / "b", batch_size=5, resume=False, progress=False)
    assert len(bank) == 50
    assert [e.name for e in tmp_path.iterdir()] == ["b"]


def test_int8_is_quantised_around_the_mean_of_all(tmp_path, expected):
    options = BuildOptions(value_dtype=torch.int8, commit_every=8)
    bank = build_memory_bank(range(50), encode, tmp_path / "b", batch_size=4, options=options, progress=False)
    assert bank.value_dtype == torch.int8
    assert torch.equal(bank.ids, expected.ids)
    values, floats = bank.gather(bank.ids)[0], encode(list(range(50))).values
    step = (floats - floats.mean(0)).flatten(1).abs().amax(1) / 127
    assert ((values - floats).abs().flatten(1).amax(1) <= 0.51 * step + 1e-4).all()
    bank.verify()
    again = MemoryBank.load(tmp_path / "b")
    again.add(torch.ones(1, 3), floats[:1], ids=[999])
    again.commit()
    torch.testing.assert_close(MemoryBank.load(tmp_path / "b")[999].value, floats[0], atol=0.1, rtol=0)


def test_a_kill_at_the_last_moment_encodes_one_batch_again(tmp_path, expected, monkeypatch, same):
    from tinyalign.memory import saving

    save_all = saving.save_all

    def killed(contents, fingerprint, path, *args, **options):
        if path.name == "bank":
            raise KeyboardInterrupt
        return save_all(contents, fingerprint, path, *args, **options)

    monkeypatch.setattr(saving, "save_all", killed)
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(range(50), encode, tmp_path / "bank", batch_size=8, progress=False)
    monkeypatch.undo()
    again = Encoder()
    same(build_memory_bank(range(50), again, tmp_path / "bank", batch_size=8, progress=False), expected)
    assert again.seen == list(range(8))


def test_a_bad_record_is_named(tmp_path):
    with pytest.raises(
        BankError, match=r"record 13 must be readable and encodable, got ValueError: cannot read \[13\]"
    ):
        build_memory_bank(range(50), Encoder(bad=[13]), tmp_path / "b", batch_size=8, progress=False)
    assert not (tmp_path / "b").exists()


def test_bad_records_are_skipped_when_asked_and_listed(tmp_path):
    class Records:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index in (4, 16, 17, 18, 19):  # one of a batch, and a whole batch
                raise OSError("cut off image")
            return index

    bank = build_memory_bank(
        Records(), Encoder(bad=[13, 14]), tmp_path / "b", batch_size=4, on_error="skip", progress=False
    )
    assert bank.ids.tolist() == [10 + r for r in range(16) if r not in (4, 13, 14)]
    found = skipped_records(tmp_path / "b")
    assert [each.record for each in found] == [4, 13, 14, 16, 17, 18, 19]
    assert found[0].error == "OSError: cut off image"
    with pytest.raises(BankError, match="record 4 must be readable and encodable, got OSError: cut off image"):
        build_memory_bank(Records(), encode, tmp_path / "c", batch_size=4, progress=False)
    with pytest.raises(BankError, match="some records must be encodable, got 20 skipped"):
        build_memory_bank(Records(), Encoder(bad=range(20)), tmp_path / "d", on_error="skip", progress=False)


def test_a_record_whose_entry_is_refused_is_named(tmp_path):
    def spoils(records):
        made = encode(records)
        made.keys[[r in (13, 14) for r in records]] = float("nan")
        return made

    with pytest.raises(BankError, match=r"record 13 must be .*keys must be finite.* that row\. Repair it, or"):
        build_memory_bank(range(50), spoils, tmp_path / "b", batch_size=8, progress=False)
    bank = build_memory_bank(range(50), spoils, tmp_path / "b", batch_size=8, on_error="skip", progress=False)
    assert bank.ids.tolist() == [10 + r for r in range(50) if r not in (13, 14)]
    assert [each.record for each in skipped_records(tmp_path / "b")] == [13, 14]


def test_what_encode_returns_is_checked(tmp_path):
    def build(encode, on_error="raise"):
        return build_memory_bank(range(9), encode, tmp_path / "b", on_error=on_error, progress=False)

    for on_error in ("raise", "skip"):  # no record is to blame
        with pytest.raises(TypeError, match=r"build_memory_bank: encode must return an EncodedBatch, got tuple\. Put"):
            build(lambda records: tuple(encode(records)), on_error)
    with pytest.raises(BankError, match=r"record 0 to record 8 .* return 9 rows, got 2\. .* a smaller batch_size"):
        build(lambda records: encode(records[:2]))

    def thins(records):
        made, kept = encode(records), [row for row, record in enumerate(records) if record != 3]
        return made._replace(keys=made.keys[kept], values=made.values[kept])

    with pytest.raises(BankError, match=r"record 3 must be .* encode must return 1 rows, got 0\. Return one per"):
        build(thins)


def test_nothing_is_encoded_for_a_path_that_is_taken(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    idle = Encoder()
    for name, message in (("file", "path must be a directory, got the file"), ("folder", "holding 'thesis.tex'")):
        with pytest.raises(BankError, match=message):
            build_memory_bank(range(50), idle, tmp_path / name, progress=False)
    assert idle.seen == []
    assert sorted(e.name for e in tmp_path.iterdir()) == ["file", "folder"]


def test_a_build_in_which_everything_failed_leaves_nothing_behind(tmp_path, expected, same):
    def spoils(records):
        made = encode(records)
        return made._replace(keys=made.keys * float("nan"))

    for broken in (Encoder(bad=range(50)), spoils):
        with pytest.raises(BankError, match=r"got 50 skipped, record 0 for ValueError.*Repair what reads or encodes"):
            build_memory_bank(range(50), broken, tmp_path / "b", on_error="skip", progress=False)
    assert list(tmp_path.iterdir()) == []
    same(build_memory_bank(range(50), encode, tmp_path / "b", progress=False), expected)


def test_records_left_out_before_a_kill_are_not_forgotten(tmp_path):
    options = {"batch_size": 5, "options": BuildOptions(commit_every=5), "progress": False}
    build = partial(build_memory_bank, range(50), path=tmp_path / "b", **options)
    with pytest.raises(KeyboardInterrupt):
        build(encode=Encoder(bad=[0, 1, 2, 3, 4, 6], dies_at=33), on_error="skip")
    with pytest.raises(BankError, match=r"on_error must be 'skip' as before, for record 0 was left out \(ValueError"):
        build(encode=encode)
    again = Encoder(bad=[0, 1, 2, 3, 4, 6])
    assert len(build(encode=again, on_error="skip")) == 44
    assert again.seen == [5, 7, 8, 9, *range(30, 50)]  # the first batch that has entries is compared
    assert [each.record for each in skipped_records(tmp_path / "b")] == [0, 1, 2, 3, 4, 6]


def changed(**change):
    return lambda records: encode(records)._replace(**{name: make(records) for name, make in change.items()})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            changed(values=lambda r: encode(r).values + 1),
            r"difference of [0-9.]+ times .* record 0 on \(another encoder",
        ),
        (changed(keys=lambda r: encode(r).keys.repeat(1, 2)), r"a difference of inf .*another encoder"),
        (changed(ids=lambda r: [5000 + n for n in r]), r"a difference of inf .*another encoder"),
        (
            changed(values=lambda r: torch.rand(len(r), 1, 3)),
            r"each call makes others: is dropout .*eval mode, to go on",
        ),
        (Encoder(bad=range(50)), r"record 0 must be readable .* got ValueError: cannot read \[0\]\. Repair it\.$"),
    ],
)
def test_another_encoder_does_not_go_on_with_a_killed_build(tmp_path, expected, same, second, message):
    options = {"batch_size": 8, "options": BuildOptions(commit_every=8), "progress": False}
    build = partial(build_memory_bank, range(50), path=tmp_path / "b", **options)
    with pytest.raises(KeyboardInterrupt):
        build(encode=Encoder(dies_at=33))
    with pytest.raises(BankError, match=message):
        build(encode=second)
    nearly = build(encode=changed(values=lambda r: 1.02 * encode(r).values))  # half precision elsewhere, say
    assert torch.allclose(nearly.gather(nearly.ids)[0], expected.gather(expected.ids)[0], rtol=0.03)
    same(build(encode=encode, resume=False), expected)


def test_a_batch_that_only_fails_together_is_not_blamed_on_a_record(tmp_path):
    def fails_in_company(records):
        if len(records) > 1:
            raise RuntimeError("out of memory")
        return encode(records)

    with pytest.raises(BankError, match="record 0 to record 3 must be encodable together, got RuntimeError: out"):
        build_memory_bank(range(8), fails_in_company, tmp_path / "b", batch_size=4, progress=False)


def test_loader_processes_and_the_global_generator(tmp_path, expected, same):
    torch.manual_seed(5)
    draw = torch.rand(1)
    torch.manual_seed(5)
    options = BuildOptions(num_workers=1)
    bank = build_memory_bank(range(50), encode, tmp_path / "b", batch_size=8, options=options, progress=False)
    assert torch.equal(torch.rand(1), draw)
    same(bank, expected)


def test_shows_rate_and_time_left(tmp_path, capsys):
    build_memory_bank(range(20), encode, tmp_path / "b", batch_size=4)
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "record/s" in shown


RANK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_builder import encode
from tinyalign.memory import BuildOptions, build_memory_bank
bank = build_memory_bank(range(50), encode, sys.argv[2], batch_size=3, progress=False,
                         options=BuildOptions(commit_every=6, timeout=60.0))
assert len(bank) == 50
"""


def test_ranks_build_the_bank_of_one_process(tmp_path, expected, same):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "out" / "bank")]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"})
        for rank in range(3)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0, 0]
    bank = MemoryBank.load(tmp_path / "out" / "bank")
    same(bank, expected)
    alone = build_memory_bank(range(50), encode, tmp_path / "alone", batch_size=3, progress=False)
    assert bank.content_hash() == alone.content_hash()
    assert [e.name for e in (tmp_path / "out").iterdir()] == ["bank"]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "records must hold at least one record, got none"),
        ([1], {"batch_size": 0}, "batch_size and commit_every must be positive, got 0"),
        ([1], {"options": BuildOptions(commit_every=0)}, "got 32, 0"),
        ([1], {"options": BuildOptions(metric="l2")}, "^MemoryBank: metric must be 'cosine' or 'ip', got 'l2'"),
        ([1], {"options": BuildOptions(value_dtype="int8")}, "^MemoryBank: value_dtype must be one of .*, got int8"),
        ([1], {"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ([1, 1], {}, r"record 1 must be .* ids must be new, got 11 which the bank holds"),
    ],
)
def test_bad_settings(tmp_path, records, options, message):
    with pytest.raises(ValueError, match=message):
        build_memory_bank(records, encode, tmp_path / "b", progress=False, **options)

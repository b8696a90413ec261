"""Drift of an encoder is reported; a refresh makes keys, values or both anew, and survives kills."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch

from tinyalign.memory import BankError, EncodedBatch, KeyTransform, MemoryBank, StaleBankError
from tinyalign.memory import refresh as engine


def made_by(turn, shift=0.0):
    """An encoder whose keys turn with ``turn`` and whose values move with ``shift``; a record is ``{"n": number}``."""

    def encode(records):
        angle = torch.tensor([0.3 * r["n"] for r in records]) + turn
        keys = torch.stack([angle.cos(), angle.sin(), torch.ones(len(records))], dim=1)
        values = torch.tensor([[r["n"] + 1.0 + shift, 1.0] for r in records])
        return EncodedBatch(keys, values, ids=[0] * len(records))

    return encode


def bank_by(encode, num=20, **options):
    bank = MemoryBank(3, (2,), **options)
    records = [{"n": n} for n in range(num)]
    made = encode(records)
    bank.add(made.keys, made.values, ids=range(100, 100 + num), groups=[n // 2 for n in range(num)], metadata=records)
    return bank


def test_check_finds_none_for_the_same_encoder_and_drift_for_another():
    bank = bank_by(made_by(0.0))
    same = bank.check(made_by(0.0), n=8)
    assert same.num_entries == 8
    assert same.key_largest < 1e-6
    assert same.value_largest < 1e-3
    turned = bank.check(made_by(0.5), n=100)
    assert turned.num_entries == 20
    expected = 1 - (torch.tensor(0.5).cos() + 1) / 2  # a turn about the third axis
    assert turned.key_mean == pytest.approx(float(expected), abs=1e-3)
    moved = bank.check(made_by(0.0, shift=1.0), n=100)
    assert moved.key_largest < 1e-6
    assert moved.value_largest == pytest.approx(1 / 2**0.5, rel=1e-3)  # the entry whose value is (1, 1)
    by_id = bank.check(made_by(0.0), n=5, records={100 + n: {"n": n} for n in range(20)})
    assert by_id.key_largest < 1e-6
    one_moved = bank.check(made_by(0.0), n=100, records=lambda entry: {"n": entry - 100 + 3 * (entry == 107)})
    assert one_moved.worst_id == 107
    assert one_moved.key_largest > 0.1
    assert one_moved.key_mean == pytest.approx(one_moved.key_largest / 20, rel=1e-3)
    by_call = bank.check(made_by(0.0), n=5, records=lambda entry: {"n": entry - 99})
    assert by_call.key_mean > 0.01
    assert by_call.worst_id in bank


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_check_sees_scale_where_it_counts_and_the_value_that_moved_most(metric):
    bank = bank_by(made_by(0.0), metric=metric)

    def tripled(records):
        made = made_by(0.0)(records)
        return made._replace(keys=3 * made.keys)

    assert bank.check(tripled, n=100).key_largest == pytest.approx(0.0 if metric == "cosine" else 2.0, abs=1e-2)

    def one_value(records):
        made = made_by(0.0)(records)
        made.values[13] *= 50
        return made

    report = bank.check(one_value, n=100)
    assert report.worst_id == 113
    assert report.value_largest == pytest.approx(49, rel=1e-2)
    zeros = MemoryBank(3, (2,), metric="ip")
    zeros.add(torch.zeros(4, 3), torch.ones(4, 2))
    same = zeros.check(lambda records: EncodedBatch(torch.zeros(4, 3), torch.ones(4, 2), []), n=4)
    assert (same.key_largest, same.value_largest) == (0.0, 0.0)


def test_check_of_a_transformed_bank():
    keys = made_by(0.0)([{"n": n} for n in range(20)]).keys
    bank = bank_by(made_by(0.0), transform=KeyTransform.fit(keys))
    assert bank.check(made_by(0.0), n=20).key_largest < 1e-5
    assert bank.check(made_by(0.5), n=20).key_mean > 0.05


def test_check_refuses_what_cannot_be_compared():
    bank = bank_by(made_by(0.0))
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        bank.check(made_by(0.0), n=0)
    with pytest.raises(BankError, match="the bank must hold entries, got 0"):
        MemoryBank(3, (2,)).check(made_by(0.0))
    with pytest.raises(BankError, match="keys must hold 3 numbers, got 2"):
        bank.check(lambda records: EncodedBatch(torch.ones(len(records), 2), torch.ones(len(records), 2), []))
    with pytest.raises(BankError, match="values must hold 2 numbers, got 5"):
        bank.check(lambda records: EncodedBatch(torch.ones(len(records), 3), torch.ones(len(records), 5), []))
    with pytest.raises(BankError, match="keys must hold 3 numbers, got 2"):
        bank_by(made_by(0.0), transform=KeyTransform(torch.zeros(3))).check(
            lambda records: EncodedBatch(torch.ones(len(records), 2), torch.ones(len(records), 2), [])
        )
    with pytest.raises(TypeError, match=r"MemoryBank\.check: encode must return an EncodedBatch, got tuple"):
        bank.check(lambda records: tuple(made_by(0.0)(records)))
    with pytest.raises(ValueError, match="encode must return 20 rows, got 1"):
        bank.check(lambda records: EncodedBatch(torch.ones(1, 3), torch.ones(1, 2), []))


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("part", ["keys", "values", "both"])
def test_refresh_equals_building_anew(tmp_path, part, value_dtype):
    bank = bank_by(made_by(0.0), value_dtype=value_dtype, fingerprint={"key.encoder": "old", "data.n": 20})
    bank.save(tmp_path / "bank")
    bank.remove([105])
    old_keys, old_values = bank.keys(), bank.gather(bank.ids)[0]
    reader = MemoryBank.load(tmp_path / "bank")
    generation = bank.refresh(
        made_by(0.5, shift=3.0), part=part, fingerprint={"key.encoder": "new"}, batch_size=6, progress=False
    )
    assert generation == bank.generation == 3
    fresh = bank_by(made_by(0.5, shift=3.0), key_dtype=torch.float16, value_dtype=torch.float32)
    ids = [100 + n for n in range(20) if n != 5]
    assert bank.ids.tolist() == ids
    assert bank.groups.tolist() == [n // 2 for n in range(20) if n != 5]
    assert bank.metadata([103]) == [{"n": 3}]
    values = bank.gather(bank.ids)[0].float()
    assert torch.equal(bank.keys(), fresh.keys(ids) if part != "values" else old_keys)
    if part == "keys":
        assert torch.equal(values, old_values.float())
    else:
        torch.testing.assert_close(values, fresh.gather(torch.tensor(ids))[0], atol=0.1, rtol=1e-3)
    assert bank.value_dtype == value_dtype
    assert bank.metric == "cosine"
    assert bank.fingerprint == {"key.encoder": "new", "data.n": 20}
    bank.verify()
    assert len(reader) == 20
    assert [e.name for e in tmp_path.iterdir()] == ["bank"]
    assert int(bank.neighbours(bank.keys([107]), 1).ids) == 107


def test_refresh_with_a_transform_and_another_width(tmp_path):
    records = [{"n": n} for n in range(20)]
    keys = made_by(0.0)(records).keys
    bank = bank_by(made_by(0.0), transform=KeyTransform.fit(keys, whiten=True, dim=2))
    bank.save(tmp_path / "bank")
    for part in ("values", "keys", "both"):
        bank.refresh(made_by(0.0), part=part, progress=False)
        assert bank.check(made_by(0.0), n=20).key_largest < 1e-4
    plain = bank_by(made_by(0.0))
    plain.save(tmp_path / "plain")

    def wider(records):
        made = made_by(0.0)(records)
        return made._replace(keys=torch.cat([made.keys, made.keys], dim=1))

    plain.refresh(wider, part="keys", progress=False)
    assert plain.key_dim == 6
    assert plain.keys().shape == (20, 6)


def test_refresh_refuses(tmp_path):
    bank = bank_by(made_by(0.0))
    with pytest.raises(BankError, match=r"MemoryBank.refresh: the bank must have been saved"):
        bank.refresh(made_by(0.0), progress=False)
    bank.save(tmp_path / "bank")
    with pytest.raises(ValueError, match="part must be one of both, keys, values, got 'half'"):
        bank.refresh(made_by(0.0), part="half", progress=False)

    def overtaken(records):
        other = MemoryBank.load(tmp_path / "bank")
        if 100 in other:
            other.remove([100])
            other.commit()
        return made_by(0.0)(records)

    with pytest.raises(StaleBankError, match=r"MemoryBank\.refresh: .* generation 1, got generation 2"):
        bank.refresh(overtaken, progress=False)
    assert len(MemoryBank.load(tmp_path / "bank")) == 19


def test_kills_during_refresh(tmp_path, kills, killed, seconds):
    path = tmp_path / "bank"
    bank = bank_by(made_by(0.0), 60)
    bank.save(path)

    def again(seed):
        for shift in itertools.count(seed, 100):
            encode, print_ = made_by(0.0, shift=float(shift)), {"value.shift": shift}
            MemoryBank.load(path).refresh(encode, batch_size=20, progress=False, resume=False, fingerprint=print_)
            yield

    span = 2 * seconds(lambda: next(again(0)))
    shifts = []
    for seed in range(1, 1 + kills):
        assert killed(partial(again, seed), seed, span)
        bank = MemoryBank.load(path)
        bank.verify()
        shifts.append(bank.fingerprint["value.shift"])
        assert bank.check(made_by(0.0, shift=float(shifts[-1])), n=60).value_largest < 1e-3
    assert len(set(shifts)) > kills // 2  # most kills came after a switch, and none mixed


def test_a_killed_refresh_goes_on_where_it_was(tmp_path):
    bank = bank_by(made_by(0.0))
    bank.save(tmp_path / "bank")
    seen = []

    def dies(records):
        seen.extend(r["n"] for r in records)
        if len(seen) > 12:
            raise KeyboardInterrupt
        return made_by(0.5)(records)

    with pytest.raises(KeyboardInterrupt):
        bank.refresh(dies, batch_size=4, commit_every=8, progress=False)
    bank = MemoryBank.load(tmp_path / "bank")
    assert bank.check(made_by(0.0), n=20).key_largest < 1e-6
    with pytest.raises(BankError, match=r"same plan.*build.refresh.*Pass resume=False"):
        bank.refresh(made_by(0.5), part="keys", batch_size=4, progress=False)
    seen.clear()
    bank.refresh(
        lambda records: [seen.extend(r["n"] for r in records), made_by(0.5)(records)][1], batch_size=4, progress=False
    )
    assert seen == [*range(4), *range(8, 20)]  # a finished batch is compared
    assert bank.check(made_by(0.5), n=20).key_largest < 1e-6


@pytest.mark.parametrize("part", ["keys", "values", "both"])
def test_another_encoder_does_not_go_on_with_a_killed_refresh(tmp_path, part):
    bank_by(made_by(0.0)).save(tmp_path / "bank")

    def refresh(encode, **options):
        bank = MemoryBank.load(tmp_path / "bank")
        bank.refresh(encode, part=part, batch_size=4, commit_every=8, progress=False, **options)
        return bank

    def dies(records):
        if records[0]["n"] == 12:
            raise KeyboardInterrupt
        return made_by(0.5, shift=1.0)(records)

    with pytest.raises(KeyboardInterrupt):
        refresh(dies)
    with pytest.raises(
        BankError, match=r"MemoryBank\.refresh: encode must make .* entry 100 on \(another.*resume=False"
    ):
        refresh(made_by(0.9, shift=2.0))
    report = refresh(made_by(0.9, shift=2.0), resume=False).check(made_by(0.9, shift=2.0), n=20)
    assert part == "values" or report.key_largest < 1e-6
    assert part == "keys" or report.value_largest < 1e-3


def test_an_entry_that_cannot_be_encoded_again_is_named_and_no_skipping_advised(tmp_path):
    bank = bank_by(made_by(0.0))
    bank.save(tmp_path / "bank")

    def spoils(records):
        made = made_by(0.0)(records)
        made.keys[[r["n"] == 13 for r in records]] = float("nan")
        return made

    with pytest.raises(BankError, match=r"refresh: entry 113 must be .*keys must be finite.* that row\. Repair it\.$"):
        bank.refresh(spoils, progress=False)
    with pytest.raises(TypeError, match=r"MemoryBank\.refresh: encode must return an EncodedBatch, got tuple"):
        bank.refresh(lambda records: tuple(made_by(0.0)(records)), progress=False)
    assert len(MemoryBank.load(tmp_path / "bank")) == 20


def test_a_fingerprint_that_no_longer_holds_is_warned_of(tmp_path):
    bank = bank_by(made_by(0.0), fingerprint={"key.encoder": "old", "data.n": 20})
    bank.save(tmp_path / "bank")

    def wider(records):
        made = made_by(0.0)(records)
        return made._replace(keys=made.keys.repeat(1, 2))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bank.refresh(made_by(0.0), progress=False)  # by the same encoder
        bank.refresh(made_by(0.0, shift=1.0), progress=False)  # nothing says what made the values
        bank.refresh(made_by(0.5), part="values", progress=False)
        bank.refresh(made_by(0.5), fingerprint={"key.encoder": "new"}, progress=False)
    message = r"fingerprint must name what made the new keys, got the old fields .* by 0\.[0-9]+ times .*'key\.encoder'"
    with pytest.warns(UserWarning, match=message) as caught:
        bank.refresh(made_by(0.0), part="keys", progress=False)
    assert [each.filename for each in caught if each.category is UserWarning] == [__file__]
    with pytest.warns(UserWarning, match="moved by inf times their size"):
        bank.refresh(wider, progress=False)


def test_a_warning_made_an_error_leaves_the_bank_where_it_can_be_mended(tmp_path):
    bank = bank_by(made_by(0.0), fingerprint={"key.encoder": "old"})
    bank.save(tmp_path / "bank")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match=r"Set bank\.fingerprint\['key\.encoder'\]"):
            bank.refresh(made_by(0.5), progress=False)
    assert bank.generation == 2
    assert bank.check(made_by(0.5), n=20).key_largest < 1e-6
    bank.fingerprint["key.encoder"] = "new"
    assert bank.commit() == 3
    assert MemoryBank.load(tmp_path / "bank").fingerprint == {"key.encoder": "new"}


def test_one_batch_says_whether_the_encoder_moved(tmp_path, monkeypatch):
    bank, asked, moved = bank_by(made_by(0.0), fingerprint={"key.a": 1, "value.a": 1}), [], engine._moved
    bank.save(tmp_path / "bank")
    monkeypatch.setattr(engine, "_moved", lambda *given: asked.append(given[3]) or moved(*given))
    with pytest.warns(UserWarning, match="moved by") as caught:
        bank.refresh(made_by(0.5, shift=1.0), batch_size=4, progress=False)
    assert sorted(asked) == ["keys", "values"]
    told = [str(each.message) for each in caught if each.category is UserWarning]
    assert [message.split("the new ")[1].split(",")[0] for message in told] == ["keys", "values"]


def test_what_a_refresh_of_an_earlier_generation_left_is_cleared_away(tmp_path, monkeypatch):
    """Killed between publishing and cleaning up; the next one starts anew instead of serving what that one made."""
    bank = bank_by(made_by(0.0))
    bank.save(tmp_path / "bank")

    def killed(self, work, timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tinyalign.memory.shards.Share.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            bank.refresh(made_by(0.0, shift=1.0), part="values", progress=False)
    (tmp_path / ".bank.refresh-1.of.mine").mkdir()
    bank = MemoryBank.load(tmp_path / "bank")
    assert bank.generation == 2  # it was published
    assert sorted(e.name for e in tmp_path.iterdir()) == [".bank.refresh-1", ".bank.refresh-1.of.mine", "bank"]
    assert bank.refresh(made_by(0.0, shift=2.0), part="values", progress=False) == 3
    assert bank.check(made_by(0.0, shift=2.0), n=20).value_largest < 1e-3
    assert sorted(e.name for e in tmp_path.iterdir()) == [".bank.refresh-1.of.mine", "bank"]

"""The table of sums and counts: its checks, its averages and its file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinyalign.theory import Bounds, Estimate, NLLTable
from tinyalign.theory.estimate import convert_unit


def full_table() -> NLLTable:
    return NLLTable(
        [1.0, 3.0], [3, 5], sample_ids=[2**62, 4], groups=[9, 9], bytes=[10, 11], targets=[-5, 6],
        condition="no_image", tokenizer="abc",
    )  # fmt: skip


def test_averages_are_ratios_of_sums_not_averages_of_averages() -> None:
    table = full_table()
    assert table.per_sequence == 2.0
    assert table.per_token == 4.0 / 8
    assert table.per_byte == 4.0 / 21
    assert table.per_token != pytest.approx(np.mean([1.0 / 3, 3.0 / 5]))
    assert len(table) == 2
    assert table.clusters().tolist() == [0, 0]
    assert table.clusters([1, 0]).tolist() == [1, 0]


def test_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    table = full_table()
    table.save(tmp_path / "deep" / "table.safetensors")
    again = NLLTable.load(tmp_path / "deep" / "table.safetensors")
    for name in ("nll", "tokens", "sample_ids", "groups", "bytes", "targets"):
        assert np.array_equal(getattr(table, name), getattr(again, name)), name
        assert getattr(table, name).dtype == getattr(again, name).dtype
    assert (again.condition, again.tokenizer) == ("no_image", "abc")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table.safetensors"]
    assert (tmp_path / "deep" / "table.safetensors").stat().st_mode & 0o777 == 0o644


def test_absent_columns_stay_absent(tmp_path: Path) -> None:
    NLLTable([1.0], [2]).save(tmp_path / "t")
    again = NLLTable.load(tmp_path / "t")
    assert again.bytes is None
    assert again.targets is None
    with pytest.raises(ValueError, match="bytes must be known for per='byte', got none"):
        again.weights("byte")


def test_truncated_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    full_table().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"must be a whole table file, got .*table\.safetensors"):
        NLLTable.load(path)
    save_file({"nll": np.ones(2)}, path, metadata={"kind": "Other", "format": "1"})
    with pytest.raises(ValueError, match="format 1, got kind 'Other'"):
        NLLTable.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table"
    full_table().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        NLLTable([9.0], [1]).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_bad_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens must have shape \(2,\) like nll, got \(1,\)"):
        NLLTable([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="sample_ids must be unique, got 3 2 times"):
        NLLTable([1.0, 2.0], [1, 1], sample_ids=[3, 3])
    with pytest.raises(ValueError, match="tokens must be positive, got 0 for sample 8"):
        NLLTable([1.0, 2.0], [1, 0], sample_ids=[7, 8])
    with pytest.raises(ValueError, match="groups must be integers, got dtype float64"):
        NLLTable([1.0, 2.0], [1, 1], groups=[0.5, 1.0])
    with pytest.raises(ValueError, match="nll must be finite"):
        NLLTable([1.0, np.inf], [1, 1])
    with pytest.raises(ValueError, match="per must be 'sequence', 'token' or 'byte', got 'word'"):
        full_table().weights("word")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        full_table() - np.zeros(2)


def test_units_convert_and_denominators_do_not() -> None:
    estimate = Estimate(1.0, 0.5, 2.0, unit="nats/token", samples=[1.0], candidates={"a": 2.0}, std_error=0.1)
    bits = estimate.to("bits")
    assert bits.unit == "bits/token"
    assert bits.value == pytest.approx(1 / np.log(2))
    assert (bits.low, bits.high) == pytest.approx((0.5 / np.log(2), 2 / np.log(2)))
    assert bits.samples[0] == bits.value
    assert bits.candidates["a"] == pytest.approx(2 / np.log(2))
    assert bits.to("nats").value == pytest.approx(1.0)
    assert convert_unit(1.0, "hartleys", "nats") == pytest.approx(np.log(10))
    with pytest.raises(ValueError, match="target must count per token as the source does"):
        convert_unit(1.0, "nats/token", "bits/byte")
    with pytest.raises(ValueError, match=r"unit must be one of nats, bits, hartleys, .* got 'shannons'"):
        estimate.to("shannons")


def test_the_record_is_frozen_and_plain() -> None:
    estimate = Estimate(1.0, samples=np.ones(3), warnings=("ties: many",))
    with pytest.raises(AttributeError):
        estimate.value = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        estimate.samples[0] = 2.0
    rich = Estimate(1.0, candidates={"ksg": 1.0}, details={"k": 4})
    for part in (rich.candidates, rich.details):
        for write in (lambda part=part: part.update(k=5), lambda part=part: part.__setitem__("k", 5)):
            with pytest.raises(TypeError, match="candidates and details must stay as they were found, got a write"):
                write()
    again = pickle.loads(pickle.dumps(rich.to("bits")))
    assert (again.details, again.candidates) == ({"k": 4}, {"ksg": pytest.approx(1 / np.log(2))})
    given = np.array([1.0, 2.0])
    table = NLLTable(given, [1, 1])
    for column in (table.nll, table.tokens, table.ids):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 3
    given[0] = 5.0
    assert table.nll[0] == 1.0
    assert estimate.warned("ties")
    assert not estimate.warned("tie")
    assert float(estimate) == 1.0
    record = estimate.to_dict()
    assert record["low"] is None
    assert record["warnings"] == ["ties: many"]
    assert str(Estimate(1.0, 0.5, 1.5, method="t", n=3)) == "1.0000 [0.5000, 1.5000] nats (t, n=3)"
    with pytest.raises(ValueError, match="kind must be one of point, lower, upper, usable, got 'guess'"):
        Estimate(1.0, kind="guess")  # type: ignore[arg-type]
    bounds = Bounds(Estimate(1.0, 0.9, 1.1), Estimate(2.0, 1.9, 2.1)).to("bits")
    assert (bounds.unit, bounds.low) == ("bits", pytest.approx(0.9 / np.log(2)))

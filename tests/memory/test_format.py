"""Banks of every format version load forever; files that were made to mislead raise the documented errors only."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyalign.memory import BankError, MemoryBank
from tinyalign.memory.manifest import BLOCK_BYTES

FIXTURES = Path(__file__).parent / "fixtures"
NUMBERS = [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["bank-v1-float16", "bank-v1-int8"])
def test_stored_banks_load(name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "bank")
    bank = MemoryBank.load(tmp_path / "bank")
    bank.verify()
    assert bank.ids.tolist() == NUMBERS
    assert bank.groups.tolist() == [n // 2 for n in NUMBERS]
    assert bank.metadata(bank.ids) == [{"n": n} for n in NUMBERS]
    assert bank.fingerprint == {"key.encoder": "fixture", "data.n": 7}
    assert (bank.metric, bank.key_dim, bank.value_shape, bank.generation) == ("ip", 4, (2, 2), 2)
    keys = torch.tensor([[1.0, n, n * n, 1.0] for n in NUMBERS])
    values = torch.tensor([[[n, -n], [2.0 * n, 0.5]] for n in NUMBERS])
    if name.endswith("int8"):
        matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])
        keys = (keys - torch.tensor([1.0, 2.0, 3.0, 4.0])) @ matrix
    assert torch.equal(bank.keys(), keys)
    torch.testing.assert_close(bank.gather(bank.ids)[0].float(), values, atol=0.05, rtol=0)
    assert bank.add(torch.ones(1, 4), torch.ones(1, 2, 2)).tolist() == [7]
    bank.commit()


def sealed(content):
    """Give a manifest the checksum that its own loader would."""
    content.pop("checksum", None)
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = xxhash.xxh3_128_hexdigest(body.encode())
    return json.dumps(content) + "\n"


def exercise(path):
    """Do everything a reader does; whatever is wrong must surface as the documented error."""
    try:
        bank = MemoryBank.load(path)
        bank.verify()
        ids = bank.ids
        bank.search(torch.ones(2, bank.key_dim), 3, exclude_ids=[[0], []], exclude_groups=[0, 1])
        bank.gather(ids)
        bank.metadata(ids)
        bank.content_hash()
    except ValueError as error:  # BankError is one
        problem = str(error)
    else:
        return None
    assert problem.startswith(("MemoryBank", "KeyTransform")), problem
    return problem


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_manifest_of_any_content_is_refused_or_harmless(tmp_path_factory, edited, data):
    path = tmp_path_factory.mktemp("fuzz") / "bank"
    shutil.copytree(FIXTURES / data.draw(st.sampled_from(["bank-v1-float16", "bank-v1-int8"])), path)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("checksum")
    content = edited(content, data.draw)
    content = content if isinstance(content, dict) else {"format": content}
    (path / "manifest.json").write_text(sealed(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exercise(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["segments"][0].update(name="../../etc"), "a segment called '../../etc'"),
        (lambda m: m.update(pointers=[1]), "pointers that are not named"),
        (lambda m: m["segments"][0].update(name="00000001-aaaaaaaa\n"), "a segment called"),
        (
            lambda m: m["segments"][0]["files"].update({"../x.bin": {"bytes": 0, "xxh3": ""}}),
            "a file called '../x.bin'",
        ),
        (lambda m: m["segments"][0].update(rows=10**15), "a row count|a size of"),
        (lambda m: m.update(key_dim=2**40), "a size of 'keys.bin'"),
        (lambda m: m.update(next_id=-1), "a next id that is not one"),
        (lambda m: m.update(next_id="7"), "a next id that is not one"),
        (lambda m: m.update(value_shape=[2**30, 2**30]), "an empty or enormous value shape"),
        (lambda m: m.update(value_shape=[]), "an empty or enormous value shape|a size of"),
        (lambda m: m["segments"].append(m["segments"][0]), "a segment twice"),
        (lambda m: m["pointers"].update(removed="00000009-aaaaaaaa"), "a pointer 'removed' to no segment"),
        (lambda m: m["pointers"].update(bananas=m["segments"][0]["name"]), "a pointer 'bananas'"),
        (lambda m: m.update(metric="l2"), "an unknown metric"),
        (lambda m: m.update(generation=True), "a generation that is not a count"),
    ],
)
def test_lies_of_a_manifest(tmp_path, change, message):
    shutil.copytree(FIXTURES / "bank-v1-float16", tmp_path / "bank")
    content = json.loads((tmp_path / "bank" / "manifest.json").read_text())
    change(content)
    (tmp_path / "bank" / "manifest.json").write_text(sealed(content))
    with pytest.raises(BankError, match=f"manifest.json must describe a bank, got ({message})"):
        MemoryBank.load(tmp_path / "bank")


def same_json(target, blob, whole):
    """Another space in the manifest says nothing else."""
    try:
        return target.suffix == ".json" and json.loads(blob) == json.loads(whole)
    except ValueError:
        return False


def reseal(path, target):
    """Make sizes and checksums agree with what a file holds now."""
    blob = target.read_bytes()
    content = json.loads((path / "manifest.json").read_text())
    for segment in content["segments"]:
        if segment["name"] == target.parent.name:
            blocks = [blob[a : a + BLOCK_BYTES] for a in range(0, len(blob), BLOCK_BYTES)]
            sums = "".join(xxhash.xxh3_64_hexdigest(block) for block in blocks)
            segment["files"][target.name] = {"bytes": len(blob), "xxh3": sums}
    (path / "manifest.json").write_text(sealed(content))


@pytest.mark.parametrize("rows", [[3, 2], [2, 2], [-1, 2], [2, 7], [2**62, -(2**62)], [-(2**63), 2**63 - 1]])
def test_removed_rows_of_a_forger(tmp_path, rows):
    shutil.copytree(FIXTURES / "bank-v1-float16", tmp_path / "bank")
    (target,) = (tmp_path / "bank").rglob("removed.bin")
    target.write_bytes(b"".join(row.to_bytes(8, "little", signed=True) for row in rows))
    reseal(tmp_path / "bank", target)
    with pytest.raises(BankError, match=r"removed.bin of .* must list rows in order"):
        MemoryBank.load(tmp_path / "bank")


@pytest.mark.parametrize(
    "offsets",
    [[0, 7, 7, 7, 7, 7, 3], [1, 7, 42, 42, 42, 42, 42], [0, 7, 41, 41, 41, 41, 41], [0, 14, 7, 42, 42, 42, 42]],
)
def test_note_offsets_of_a_forger(tmp_path, offsets):
    shutil.copytree(FIXTURES / "bank-v1-float16", tmp_path / "bank")
    target = min((tmp_path / "bank").rglob("note_offsets.bin"))
    assert len(offsets) == target.stat().st_size // 8
    assert target.with_name("notes.bin").stat().st_size == 42
    target.write_bytes(b"".join(offset.to_bytes(8, "little") for offset in offsets))
    reseal(tmp_path / "bank", target)
    with pytest.raises(BankError, match=r"note_offsets.bin must divide notes.bin"):
        MemoryBank.load(tmp_path / "bank")


def test_no_notes_of_a_forger(tmp_path):
    """An empty file cannot be mapped."""
    shutil.copytree(FIXTURES / "bank-v1-float16", tmp_path / "bank")
    offsets = min((tmp_path / "bank").rglob("note_offsets.bin"))
    offsets.write_bytes(bytes(offsets.stat().st_size))
    reseal(tmp_path / "bank", offsets)
    (offsets.parent / "notes.bin").write_bytes(b"")
    reseal(tmp_path / "bank", offsets.parent / "notes.bin")
    bank = MemoryBank.load(tmp_path / "bank")
    assert bank.metadata([0]) == [{}]
    bank.verify()


def test_notes_of_a_forger(tmp_path):
    for note, message in ((b"[123456", "JSON"), (b"[12345]", "dicts"), (b"\xff123456", "JSON")):
        shutil.rmtree(tmp_path / "bank", ignore_errors=True)
        shutil.copytree(FIXTURES / "bank-v1-float16", tmp_path / "bank")
        target = min((tmp_path / "bank").rglob("notes.bin"))
        target.write_bytes(note + target.read_bytes()[7:])
        reseal(tmp_path / "bank", target)
        with pytest.raises(BankError, match=f"notes.bin must hold {message}"):
            MemoryBank.load(tmp_path / "bank").metadata([0])


@pytest.mark.parametrize("rounds", [60, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resealed", [False, True])
def test_mutated_files(tmp_path, mutated, rounds, resealed):
    """Change files at random; with ``resealed``, a forger also makes sizes and checksums agree."""
    draw = random.Random(0)
    outcomes = set()
    for number in range(rounds):
        source = FIXTURES / draw.choice(["bank-v1-float16", "bank-v1-int8"])
        path = tmp_path / str(number % 7)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        target = draw.choice(sorted(p for p in path.rglob("*") if p.is_file()))
        whole = target.read_bytes()
        blob = mutated(whole, draw)
        target.write_bytes(blob)
        if resealed and target.suffix == ".bin":
            reseal(path, target)
        problem = exercise(path)
        if not resealed and blob != whole and not same_json(target, blob, whole):
            assert problem is not None, f"{target} was changed and nobody noticed"
        outcomes.add(None if problem is None else problem[:24])
    assert len(outcomes) >= 2


def test_files_hold_no_code_and_loading_runs_none(tmp_path):
    for name in ("bank-v1-float16", "bank-v1-int8"):
        for file in (FIXTURES / name).rglob("*"):
            assert file.is_dir() or file.suffix in (".json", ".bin")
    source = Path(__file__).parents[2] / "tinyalign" / "memory"
    for module in source.glob("*.py"):
        text = module.read_text()
        assert "import pickle" not in text
        assert "pickle.load" not in text
        assert "torch.load" not in text
        assert "eval(" not in text.replace("model.eval(", "")
    assert os.path.isdir(source)

"""A neighbour table changed at random, its own checksums made to agree or not, raises the documented errors only."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyalign.memory import BankError, MemoryBank, NeighbourTable, precompute_neighbours


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    bank = MemoryBank(4, (1, 2), fingerprint={"key.a": 1})
    bank.add(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.ones(9, 1, 2))
    path = tmp_path_factory.mktemp("table") / "table"
    hidden = {"exclude_ids": bank.ids, "exclude_groups": bank.groups}
    precompute_neighbours(bank, bank.keys(), k=3, sample_ids=bank.ids, path=path, **hidden)
    return bank, path


def exercise(path, bank):
    """Do everything a reader does; return what was said, None if all was well."""
    try:
        table = NeighbourTable.load(path, bank)
        table.verify(path)
        bank.gather(table.lookup(table.sample_ids).ids)
    except ValueError as error:  # BankError is one
        problem = str(error)
        assert problem.startswith(("NeighbourTable", "MemoryBank")), problem
        return problem
    return None


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_facts_of_any_content_are_refused_or_harmless(made, tmp_path_factory, edited, data):
    bank, source = made
    path = tmp_path_factory.mktemp("fuzz") / "table"
    shutil.copytree(source, path)
    content = json.loads((path / "table.json").read_text())
    (path / "table.json").write_text(json.dumps(edited(content, data.draw)))
    exercise(path, bank)


@pytest.mark.parametrize("rounds", [60, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resealed", [False, True])
def test_mutated_tables(made, tmp_path, mutated, rounds, resealed):
    bank, source = made
    draw = random.Random(0)
    said = set()
    for number in range(rounds):
        path = tmp_path / str(number % 5)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        target = draw.choice(sorted(p for p in path.iterdir() if p.suffix == ".bin" or not resealed))
        whole = target.read_bytes()
        blob = mutated(whole, draw)
        target.write_bytes(blob)
        if resealed:
            content = json.loads((path / "table.json").read_text())
            content["files"][target.name] = {"bytes": len(blob), "xxh3": xxhash.xxh3_64_hexdigest(blob)}
            (path / "table.json").write_text(json.dumps(content))
        problem = exercise(path, bank)
        if target.suffix == ".bin" and not resealed and blob != whole:
            assert problem is not None, f"{target.name} was changed and nobody noticed"
        said.add(None if problem is None else problem[:30])
    assert len(said) >= 2


def test_a_table_that_names_no_files_says_so(made, tmp_path):
    bank, source = made
    for files in ({}, [], {"ids.bin": 3}, {"ids.bin": {"bytes": "x", "xxh3": 1}}):
        shutil.copytree(source, tmp_path / "table", dirs_exist_ok=True)
        content = json.loads((tmp_path / "table" / "table.json").read_text())
        (tmp_path / "table" / "table.json").write_text(json.dumps({**content, "files": files}))
        with pytest.raises(BankError, match=r"table.json must name .*bytes and checksums"):
            NeighbourTable.load(tmp_path / "table", bank)

"""What a bank in Milvus does beyond the contract: reopening, transfers, expressions, 16 bits on a server."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from tinyalign.memory import BankError, FingerprintMismatch, KeyTransform
from tinyalign.memory.collection import FORMAT, PROPERTY

WITH_MILVUS = importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite")
needs_milvus = pytest.mark.skipif(not WITH_MILVUS, reason="needs pymilvus and milvus-lite")
PRINT = {"key.encoder": "test", "data.n": 3}


def milvus(path, *sizes, **options):
    from tinyalign.memory.milvus import MilvusMemoryBank

    return MilvusMemoryBank(str(path), *sizes, **options)


@needs_milvus
def test_transfer_and_reopening(random_bank, tmp_path):
    bank = random_bank(700, fingerprint=PRINT)  # more than one insert
    remote = milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3), fingerprint=PRINT)
    assert remote.add_bank(bank) == 700
    remote.commit()
    queries = torch.randn(4, 8)
    exclude = {"exclude_groups": torch.arange(4)[:, None] + 40}
    expected = bank.search(queries, 5, **exclude)
    found = remote.search(queries, 5, **exclude)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.values, expected.values)
    remote.close()
    again = milvus(tmp_path / "bank.db")
    assert (again.key_dim, again.value_shape, again.metric, again.fingerprint) == (8, (2, 3), "cosine", PRINT)
    back = again.to_bank()
    assert torch.equal(back.ids, bank.ids)
    assert torch.equal(back.groups, bank.groups)
    assert torch.equal(back.gather(back.ids)[0], bank.gather(bank.ids)[0])
    torch.testing.assert_close(back.keys(), bank.keys(), atol=1e-3, rtol=0)
    assert back.metadata(back.ids) == bank.metadata(bank.ids)
    with pytest.raises(FingerprintMismatch, match=r"key.encoder"):
        again.add_bank(random_bank(3, start=9000, fingerprint={**PRINT, "key.encoder": "other"}))
    with pytest.raises(BankError, match="add_bank: bank must have metric 'cosine', got 'ip'"):
        again.add_bank(random_bank(3, start=9000, fingerprint=PRINT, metric="ip"))
    centred = random_bank(3, start=9000, fingerprint=PRINT, transform=KeyTransform.fit(bank.keys()))
    with pytest.raises(BankError, match=r"add_bank: bank must have no key transform.*search with bank.project"):
        again.add_bank(centred)
    assert len(again) == 700
    again.close()


@needs_milvus
def test_a_transform_goes_to_milvus_by_hand(random_bank, tmp_path):
    transform = KeyTransform.fit(random_bank().keys() + 3, whiten=True, dim=6)
    bank, queries = random_bank(transform=transform), torch.randn(5, 8)
    remote = milvus(tmp_path / "bank.db", key_dim=6, value_shape=(2, 3))
    remote.add(bank.keys(), bank.gather(bank.ids)[0], bank.ids, bank.groups)
    assert torch.equal(remote.neighbours(bank.project(queries), 4).ids, bank.neighbours(queries, 4).ids)
    remote.close()


@needs_milvus
def test_expressions_and_values_in_the_same_call(random_bank, tmp_path, monkeypatch):
    bank = random_bank(70)
    remote = milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3))
    remote.add_bank(bank)
    queries = torch.randn(4, 8)
    expected = bank.search(queries, 5, where=lambda note: note["even"] and note["caption"] != "entry 104")
    found = remote.search(queries, 5, where='note["even"] == true and note["caption"] != "entry 104"')
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.values, expected.values)
    by_group = remote.neighbours(queries, 5, where="group < 40", exclude_ids=[[120], [], [], []])
    assert torch.equal(by_group.ids, bank.neighbours(queries, 5, where=bank.groups < 40).ids)
    client, calls = remote._collection.client, []
    for name in ("search", "query"):
        asked = getattr(client, name)
        monkeypatch.setattr(client, name, lambda *a, _n=name, _f=asked, **o: calls.append(_n) or _f(*a, **o))
    assert len(bank) == len(remote)
    calls.clear()
    remote.search(queries, 5, exclude_ids=torch.arange(100, 104))
    assert calls == ["query", "search"]  # is it empty? then everything at once
    calls.clear()
    remote.search(queries, 5, exclude_groups=torch.arange(4) + 33)
    assert calls == ["query", "search", "query"]  # many more asked for than wanted: values by id
    monkeypatch.setattr("tinyalign.memory.milvus.MOST_LISTED", 10)
    with pytest.raises(BankError, match="where must keep at most 10 entries when it is no expression, got 35"):
        remote.neighbours(queries, where=lambda note: note["even"])
    remote.close()


@needs_milvus
def test_a_server_holds_values_in_16_bits(tmp_path, monkeypatch):
    """What would be sent to a server and what it would send back; milvus-lite has 32 bits only."""
    bank = milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3))
    collection, sent = bank._collection, []
    value = torch.arange(6.0).reshape(1, 2, 3) / 3
    monkeypatch.setattr(collection, "half", True)
    monkeypatch.setattr(collection.client, "insert", lambda name, rows: sent.extend(rows))
    bank.add(torch.ones(1, 8), value, ids=[7])
    assert sent[0]["value"].dtype == np.float16
    stored = sent[0]["value"].tobytes()
    for answer in (stored, [stored], value.flatten().tolist()):
        assert torch.equal(collection.value({"value": answer}), value.flatten().half())
    bank.close()


@needs_milvus
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4.7, (1, 2)), "key_dim must be an integer, got 4.7"),
        ((True, (1, 2)), "key_dim must be an integer, got True"),
        ((4, (1, 2.5)), r"value_shape must be integers, got \(1, 2.5\)"),
    ],
)
def test_sizes_that_are_none_are_refused_before_a_collection_is_made(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        milvus(tmp_path / "bank.db", *sizes)
    with pytest.raises(BankError, match="collection must exist"):
        milvus(tmp_path / "bank.db")


@needs_milvus
@pytest.mark.parametrize("flags", [[True, None, False], np.array(["a", "b", "c"]), [[True], [True, False]]])
def test_flags_that_no_tensor_holds_are_refused(tmp_path, flags):
    bank = milvus(tmp_path / "bank.db", 3, (1,))
    bank.add(torch.eye(3), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"where must be .*, got (\[|array\()"):
        bank.neighbours(torch.eye(3), where=flags)
    bank.close()


@needs_milvus
def test_a_collection_of_another_make(tmp_path):
    with pytest.raises(BankError, match="collection must exist, or key_dim and value_shape be given, got 'tinyalign'"):
        milvus(tmp_path / "bank.db")
    milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3), fingerprint=PRINT).close()
    ours = r"sizes and metric must be those of 'tinyalign', \(8, \(2, 3\), 'cosine'\), got "
    with pytest.raises(BankError, match=ours + r"\(9, \(2, 3\), 'cosine'\)"):
        milvus(tmp_path / "bank.db", key_dim=9)
    with pytest.raises(BankError, match=ours + r"\(8, \(2, 3\), 'ip'\)"):
        milvus(tmp_path / "bank.db", metric="ip")
    with pytest.raises(FingerprintMismatch, match=r"^MilvusMemoryBank: .* \(bank: 'test', given: 'other'\)"):
        milvus(tmp_path / "bank.db", fingerprint={**PRINT, "key.encoder": "other"})
    milvus(tmp_path / "bank.db", 8, (2, 3), metric="cosine", fingerprint=PRINT).close()
    from pymilvus import MilvusClient

    client = MilvusClient(uri=str(tmp_path / "bank.db"))
    client.create_collection("strange", dimension=4)
    facts = {PROPERTY: json.dumps({"format": FORMAT, "version": 1})}
    client.create_collection("old", dimension=4, properties=facts)
    client.close()
    with pytest.raises(BankError, match=r"collection must have format version 2, got 1. Copy it with to_bank"):
        milvus(tmp_path / "bank.db", collection="old")
    with pytest.raises(BankError, match="collection must be a memory bank, got 'strange'"):
        milvus(tmp_path / "bank.db", collection="strange")


def test_without_pymilvus_the_error_names_the_extra(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"Install tinyalign-vlm\[milvus\]"):
        milvus(tmp_path / "bank.db", key_dim=8, value_shape=(2, 3))

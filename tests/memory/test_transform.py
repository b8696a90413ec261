"""Centring and whitening, alone and saved with a bank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyalign.memory import BankError, KeyTransform, MemoryBank


@pytest.fixture
def crowded():
    """Keys with a large common part and directions of very different spread."""
    return 10 + torch.randn(400, 6) @ torch.diag(torch.tensor([5.0, 1.0, 1.0, 0.3, 0.3, 0.1])) @ torch.randn(6, 6)


def test_whitened_keys_have_unit_covariance(crowded):
    whitened = KeyTransform.fit(crowded, metric="ip", whiten=True)(crowded).double()
    torch.testing.assert_close(whitened.mean(0), torch.zeros(6).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened.T @ whitened / 400, torch.eye(6).double(), atol=1e-3, rtol=0)


def test_centring_takes_the_mean_of_unit_keys_away(crowded):
    transform = KeyTransform.fit(crowded)
    torch.testing.assert_close(transform.mean, F.normalize(crowded.double(), dim=-1).mean(0).float())
    assert (transform.input_dim, transform.output_dim) == (6, 6)


def test_fewer_dimensions_keep_the_widest(crowded):
    transform = KeyTransform.fit(crowded, metric="ip", dim=2)
    assert KeyTransform.fit(crowded, metric="ip", dim=np.int64(2)) == transform
    kept = transform(crowded).double()
    spread = torch.linalg.svdvals(crowded.double() - crowded.double().mean(0)) ** 2
    assert float((kept - kept.mean(0)).square().sum()) == pytest.approx(float(spread[:2].sum()), rel=1e-4)


def test_a_flat_direction_is_not_blown_up():
    keys = torch.randn(50, 3) * torch.tensor([1.0, 1.0, 1e-9])
    assert KeyTransform.fit(keys, metric="ip", whiten=True, floor=1e-2)(keys)[:, 2].abs().max() < 1e-3
    same = KeyTransform.fit(torch.ones(5, 3), metric="ip", whiten=True)
    assert torch.isfinite(same(torch.ones(5, 3))).all()


@pytest.mark.parametrize("options", [{}, {"whiten": True}, {"whiten": True, "dim": 3}])
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_a_bank_searches_in_the_mapped_space_and_keeps_the_map(crowded, tmp_path, options, metric):
    transform = KeyTransform.fit(crowded, metric=metric, **options)
    bank = MemoryBank(6, (1,), metric=metric, transform=transform, key_dtype=torch.float32)
    bank.add(crowded, torch.ones(400, 1))
    queries = 10 + torch.randn(5, 6)

    def mapped(rows):
        rows = transform(F.normalize(rows, dim=-1) if metric == "cosine" else rows)
        return F.normalize(rows, dim=-1) if metric == "cosine" else rows

    expected = (mapped(queries) @ mapped(crowded).T).topk(4)
    found = bank.neighbours(queries, 4)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.scores, expected.values, atol=1e-4, rtol=1e-5)
    assert bank.key_dim == 6
    assert bank.keys().shape == (400, transform.output_dim)
    assert torch.equal(bank.to("cpu").search(queries, 4).ids, found.ids)

    bank.save(tmp_path / "bank")
    bank.remove([0])
    bank.add(crowded[:1], torch.ones(1, 1), ids=[1000])
    bank.commit()
    loaded = MemoryBank.load(tmp_path / "bank")
    loaded.verify()
    assert torch.equal(loaded.neighbours(queries, 4).ids.clamp_max(399), expected.indices.clamp_max(399))
    loaded.add(crowded[:1], torch.ones(1, 1), ids=[1001])
    torch.testing.assert_close(loaded.keys([1001]), mapped(crowded[:1]), atol=1e-5, rtol=1e-5)
    assert loaded.compact() == 1
    again = MemoryBank.load(tmp_path / "bank").neighbours(queries, 4)
    assert torch.equal(again.ids.clamp_max(399), expected.indices.clamp_max(399))


def test_a_key_is_mapped_alike_alone_and_among_others():
    torch.manual_seed(0)
    keys = torch.randn(300, 96)
    transform = KeyTransform.fit(keys, whiten=True, dim=32)
    together = transform(keys)
    alone = torch.cat([transform(keys[row : row + 1]) for row in range(300)])
    assert torch.equal(alone, together)


def test_banks_of_different_maps_are_not_merged(crowded):
    banks = []
    for number, sample in enumerate((crowded, crowded + 1)):
        bank = MemoryBank(6, (1,), transform=KeyTransform.fit(sample))
        bank.add(crowded[:3], torch.ones(3, 1), ids=range(10 * number, 10 * number + 3))
        banks.append(bank)
    with pytest.raises(BankError, match="banks must share one key transform, got another at 1"):
        MemoryBank.merge(banks)
    assert len(MemoryBank.merge(banks[:1])) == 3


def test_packed_is_undone():
    for transform in (KeyTransform(torch.randn(4)), KeyTransform(torch.randn(4), torch.randn(4, 2))):
        again = KeyTransform.unpacked(transform.packed(), transform.output_dim)
        assert again == transform
        assert again.name() == transform.name()
    assert KeyTransform(torch.zeros(4)) != KeyTransform(torch.ones(4))
    assert KeyTransform(torch.zeros(4)) != "map"
    with pytest.raises(ValueError, match="packed must fit width 2, got 4 numbers"):
        KeyTransform.unpacked(torch.zeros(4), 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyTransform(torch.zeros(2, 2)), r"mean must have shape \(D,\), got \(2, 2\)"),
        (
            lambda: KeyTransform(torch.zeros(2), torch.zeros(3, 2)),
            r"projection must have shape \(2, D'\), got \(3, 2\)",
        ),
        (lambda: KeyTransform.fit(torch.zeros(0, 3)), r"keys must have shape \(M, D\), got \(0, 3\)"),
        (lambda: KeyTransform.fit(torch.ones(2, 3), dim=4), "dim must be from 1 to 3, got 4"),
        (lambda: KeyTransform.fit(torch.ones(2, 3), dim=1.5), "dim must be from 1 to 3, got 1.5"),
        (lambda: KeyTransform.fit(torch.ones(2, 3), dim=2.0), "dim must be from 1 to 3, got 2.0"),
        (lambda: KeyTransform.fit(torch.ones(2, 3), dim=True), "dim must be from 1 to 3, got True"),
        (lambda: KeyTransform.fit(torch.tensor([[1.0], [float("nan")]])), "keys must be finite, .* in row 1"),
        (lambda: KeyTransform.fit(torch.ones(2, 3), metric="l2"), "metric must be 'cosine' or 'ip', got 'l2'. Pass"),
        (lambda: MemoryBank(3, (1,), transform=KeyTransform(torch.zeros(2))), "keys of width 3, got 2"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

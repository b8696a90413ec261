"""Diagnostics against other libraries, naive refits, and compressors whose memory is known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from tinyalign.perceiver import CompressorRecord, PerceiverCompressor, PerceiverSizes, compressor_diagnostics, probes
from tinyalign.perceiver.probes import RidgeProbe, area_under_roc, effective_rank, explained_variance, spread_over_norm


@pytest.mark.parametrize(("rows", "columns"), [(40, 6), (20, 60)])
@pytest.mark.parametrize("penalty", [0.1, 100.0])
def test_ridge_equals_scikit_learn(monkeypatch, rows, columns, penalty):
    monkeypatch.setattr(probes, "PENALTIES", (penalty,))
    inputs, targets = torch.randn(rows, columns) * 3 + 1, torch.randn(rows, 2) + 5
    fresh = torch.randn(7, columns)
    mean, std = inputs.mean(0), inputs.std(0)
    theirs = Ridge(alpha=penalty).fit(((inputs - mean) / std).double().numpy(), targets.double().numpy())
    expected = theirs.predict(((fresh - mean) / std).double().numpy())
    np.testing.assert_allclose(RidgeProbe(inputs, targets)(fresh).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_penalty_is_the_one_that_naive_refits_choose(grouped):
    """Each group left out in turn, a ridge fitted to the rest with the standardisation of all rows."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 15, generator=generator, dtype=torch.float64)
    targets = inputs[:, :2] * 0.7 + torch.randn(24, 2, generator=generator, dtype=torch.float64)
    groups = torch.arange(24) // 3 if grouped else torch.arange(24)
    scaled = ((inputs - inputs.mean(0)) / inputs.std(0)).numpy()
    errors = {}
    for penalty in probes.PENALTIES:
        errors[penalty] = 0.0
        for group in groups.unique():
            kept = (groups != group).numpy()
            ridge = Ridge(alpha=penalty).fit(scaled[kept], targets.numpy()[kept])
            errors[penalty] += float(((ridge.predict(scaled[~kept]) - targets.numpy()[~kept]) ** 2).sum())
    probe = RidgeProbe(inputs, targets, groups)
    assert probe.penalty == min(errors, key=errors.__getitem__)
    for penalty, error in errors.items():
        assert math.isclose(probe.errors[penalty], error / 48, rel_tol=1e-5)


def test_columns_that_never_change_are_left_out():
    inputs = torch.randn(30, 3)
    with_constant = torch.cat((inputs, torch.full((30, 1), 7.0)), 1)
    targets = inputs[:, :1]
    fresh = torch.cat((inputs, torch.full((30, 1), 1e6)), 1)
    torch.testing.assert_close(RidgeProbe(with_constant, targets)(fresh), RidgeProbe(inputs, targets)(inputs))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_area_under_roc_equals_scikit_learn(rows):
    scores, labels = torch.tensor([s for s, _ in rows]), torch.tensor([label for _, label in rows])
    if labels.all() or not labels.any():
        return
    expected = roc_auc_score(labels.numpy(), scores.numpy())
    assert math.isclose(area_under_roc(scores[:, None], labels[:, None]).item(), expected, abs_tol=1e-12)


def test_spectra_by_hand():
    assert math.isclose(effective_rank(torch.randn(10, 1) @ torch.randn(1, 30)), 1.0, abs_tol=1e-5)
    # Variances 3 to 1 in two directions: the entropy of (3/4, 1/4).
    vectors = torch.tensor([[math.sqrt(3), 0.0], [-math.sqrt(3), 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert math.isclose(effective_rank(vectors), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel_tol=1e-6)
    assert spread_over_norm(torch.ones(4, 3)) == 0.0
    assert math.isclose(spread_over_norm(torch.tensor([[1.0], [-1.0]])), 1.0)
    assert explained_variance(torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(1)) == 0.0


def test_probe_refuses_what_does_not_pair():
    with pytest.raises(ValueError, match=r"same number of rows, at least 2, got \(3, 2\) and \(4, 2\)"):
        RidgeProbe(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"at least 2, got \(1, 2\) and \(1, 2\)"):
        RidgeProbe(torch.zeros(1, 2), torch.zeros(1, 2))


def make_records(count=200, ragged=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        patches = 9 + int(torch.randint(0, 4, (), generator=generator)) * ragged
        words = 3 + int(torch.randint(0, 3, (), generator=generator)) * ragged
        records.append(
            CompressorRecord(
                torch.randn(patches, 4, generator=generator), torch.randint(0, 12, (words,), generator=generator)
            )
        )
    return records


def bag_of_words(text, mask, size=12):
    counts = torch.nn.functional.one_hot(text, size).float() * mask[..., None]
    return counts.sum(1, keepdim=True)


def test_a_value_that_is_the_caption_says_all_words_and_no_patch():
    got = compressor_diagnostics(lambda image, text, im, tm: bag_of_words(text, tm), make_records())
    assert got.word_recovery > 0.99
    assert got.words_found > 0.97
    assert got.words_found_by_frequency < 0.5
    assert got.num_words == 12
    assert abs(got.patch_recovery) < 0.1
    assert got.image_sensitivity == 0.0
    assert got.caption_sensitivity > 0.3
    assert got.num_records == 200


def test_a_value_that_is_the_image_says_all_patches_and_no_word():
    got = compressor_diagnostics(lambda image, text, im, tm: image.flatten(1)[:, None], make_records(400))
    assert got.patch_recovery > 0.99
    # 12 words, each over about 45 positive of 200 held-out rows: one standard error of the mean area is 0.013.
    assert abs(got.word_recovery - 0.5) < 0.05
    assert got.caption_sensitivity == 0.0
    assert abs(got.image_sensitivity - 1.0) < 0.1
    assert got.shared_energy < 0.02
    assert got.effective_rank > 30  # of 36 independent directions


def test_a_large_common_part_is_seen_and_hurts_uncentred_int8_only():
    common = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3)) * 1000

    def compressor(image, text, image_mask, text_mask):
        return bag_of_words(text, text_mask) + common

    got = compressor_diagnostics(compressor, make_records())
    assert got.shared_energy > 0.999
    assert got.caption_sensitivity < 0.01
    assert got.word_recovery > 0.99
    assert got.storage["fp32"].word_recovery == pytest.approx(got.word_recovery)
    assert got.storage["int8"].word_recovery > 0.99
    assert got.storage["int8 uncentred"].word_recovery < 0.8
    assert [stored.bytes_per_item for stored in got.storage.values()] == [48, 24, 16, 16]


def test_captions_of_one_image_stay_on_one_side():
    """Words drawn per group and a value that only names the group: nothing carries over to unseen groups."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for group in range(40):
        text = torch.randint(0, 12, (3,), generator=generator)
        name = torch.zeros(1, 40)
        name[0, group] = 1.0
        records += [CompressorRecord(name, text, group=group)] * 5
    grouped = compressor_diagnostics(lambda image, *_: image, records)
    alone = compressor_diagnostics(lambda image, *_: image, [record._replace(group=None) for record in records])
    assert grouped.word_recovery == 0.5
    assert alone.word_recovery > 0.95


def test_ragged_records_are_padded_with_masks():
    seen = []

    def compressor(image, text, image_mask, text_mask):
        seen.append((image_mask.sum(1).tolist(), text_mask.sum(1).tolist()))
        return (image * image_mask[..., None]).sum(1, keepdim=True) + bag_of_words(text, text_mask)[..., :4]

    records = make_records(40, ragged=True)
    compressor_diagnostics(compressor, records, batch_size=40, min_count=2)
    assert seen[0] == ([len(r.image) for r in records], [len(r.text) for r in records])


def test_the_real_compressor_gets_its_words_through_balanced_fusion():
    """Untrained, at the same size and seed: text with a cross-attention of its own against text among many patches."""
    sizes = PerceiverSizes(token_dim=32, num_latents=8, latent_dim=32, num_self_attends=2, num_heads=4)
    generator = torch.Generator().manual_seed(0)
    records = [
        CompressorRecord(torch.randn(196, 4, generator=generator), torch.randint(0, 12, (3,), generator=generator))
        for _ in range(300)
    ]
    balanced, joint = (
        compressor_diagnostics(PerceiverCompressor(4, vocab_size=12, sizes=sizes, fusion=fusion), records)
        for fusion in ("balanced", "joint")
    )
    assert balanced.caption_sensitivity > 5 * joint.caption_sensitivity
    # In float32 a linear probe still finds the joint one's words; one byte per number no longer holds them.
    assert balanced.storage["int8 uncentred"].word_recovery > joint.storage["int8 uncentred"].word_recovery + 0.2


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_value_that_never_changes_is_measured_as_such(constant):
    got = compressor_diagnostics(lambda image, *_: torch.full((len(image), 2, 3), constant), iter(make_records()))
    assert (got.image_sensitivity, got.caption_sensitivity) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert (got.shared_energy, got.effective_rank) == (pytest.approx(1.0), 0.0)
    assert (got.word_recovery, got.storage["int8"].word_recovery) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"words": "red dog"}, TypeError, "words must be a sequence of words, got 'red dog' at record 5"),
        ({"image": torch.zeros(0, 4)}, ValueError, r"patches must hold at least one, got shape \(0, 4\) at record 5"),
        ({"patches": torch.zeros(0, 4)}, ValueError, r"patches must hold at least one, got shape \(0, 4\) at record 5"),
        ({"image": np.zeros((9, 4))}, TypeError, "image must be a tensor with rows, got ndarray at record 5"),
        ({"text": [1, 2]}, TypeError, "text must be a tensor with rows, got list at record 5"),
        ({"patches": np.zeros((9, 4))}, TypeError, "patches must be a tensor with rows, got ndarray at record 5"),
    ],
)
def test_a_record_that_does_not_fit_is_named(change, error, message):
    records = make_records(30)
    records[5] = records[5]._replace(**change)
    with pytest.raises(error, match=f"compressor_diagnostics: {message}"):
        compressor_diagnostics(lambda image, *_: image[:, :9], records)


@pytest.mark.parametrize("form", [tuple, lambda record: record._asdict(), lambda record: record.image])
def test_records_are_compressor_records(form):
    with pytest.raises(TypeError, match=r"records must be CompressorRecord, got (tuple|dict|Tensor) at 0"):
        compressor_diagnostics(lambda image, *_: image, [form(record) for record in make_records(30)])


@pytest.mark.parametrize(("setting", "least"), [("batch_size", 1), ("num_probes", 2), ("min_count", 1)])
def test_counts_are_counts(setting, least):
    with pytest.raises(ValueError, match=f"{setting} must be an integer of at least {least}, got {least - 1}"):
        compressor_diagnostics(lambda image, *_: image, make_records(30), **{setting: least - 1})


def test_what_cannot_be_measured_is_refused():
    records = make_records(30)
    silent = [record._replace(words=()) for record in records]
    with pytest.raises(ValueError, match=r"at least min_count=4 times .* got none of 0 that does"):
        compressor_diagnostics(lambda image, *_: image, silent)
    with pytest.raises(ValueError, match="records must be at least 40 for min_count=10, got 30"):
        compressor_diagnostics(lambda *a: None, records, min_count=10)
    broken = [record._replace(image=record.image * (math.nan if i == 7 else 1.0)) for i, record in enumerate(records)]
    with pytest.raises(ValueError, match="got NaN or infinity for 1 records, first 7"):
        compressor_diagnostics(lambda image, *_: image, broken)
    same = [record._replace(words=("always",)) for record in records]
    with pytest.raises(ValueError, match=r"at least min_count=4 times .* got none of 1 that does"):
        compressor_diagnostics(lambda image, *_: image, same)
    embedded = [record._replace(text=torch.zeros(3, 2)) for record in records]
    with pytest.raises(ValueError, match=r"words must be given .* got text of shape \(3, 2\) without words"):
        compressor_diagnostics(lambda image, *_: image, embedded)

"""What holds of the Perceiver for every input: permutations, padding, scales, round trips."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign._attention import attend
from tinyalign.perceiver import PerceiverCompressor, PerceiverEncoder, PerceiverSizes, diagnostics
from tinyalign.perceiver.positions import sinusoids
from tinyalign.perceiver.probes import RidgeProbe, area_under_roc, effective_rank, explained_variance, spread_over_norm

SIZES = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
seeds = st.integers(0, 2**20)


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loud(module, seed):
    """Weights large enough that every path shows."""
    with torch.no_grad():
        for offset, weight in enumerate(module.parameters()):
            weight.add_(0.3 * drawn(seed + offset, *weight.shape))
    return module.eval()


@settings(max_examples=40)
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.sampled_from(["sdpa", "reference"]))
def test_attention_ignores_the_order_of_keys_and_what_is_common_to_all_scores(seed, batch, heads, keys, backend):
    q, k, v = (drawn(seed + i, batch, heads, n, 4) for i, n in enumerate((3, keys, keys)))
    keep = drawn(seed + 9, batch, keys) < 0.5
    whole = attend(q, k, v, keep=keep, backend=backend)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    shuffled = attend(q, k[:, :, order], v[:, :, order], keep=keep[:, order], backend=backend)
    torch.testing.assert_close(shuffled, whole)
    shifted = attend(q, k + drawn(seed + 7, batch, heads, 1, 4), v, keep=keep, backend=backend)
    torch.testing.assert_close(shifted, whole)
    # Weights sum to one, so a constant passes through; a row without keys gives zeros instead.
    ones = attend(q, k, torch.ones_like(v), keep=keep, backend=backend)
    torch.testing.assert_close(ones, keep.any(1).double()[:, None, None, None].expand_as(ones))
    assert (whole.abs().amax() <= v.abs().amax() + 1e-12).item()


@settings(max_examples=40)
@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2))
def test_the_encoder_ignores_order_padding_and_other_rows(seed, batch, length, padding, num_blocks):
    encoder = PerceiverEncoder(
        5, num_latents=3, latent_dim=8, num_self_attends=1, num_blocks=num_blocks, num_heads=2, qk_channels=8,
        v_channels=4,
    )  # fmt: skip
    encoder = loud(encoder.double(), seed)
    inputs = drawn(seed, batch, length, 5)
    whole = encoder(inputs)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(encoder(inputs[:, order]), whole)  # tokens carry their positions themselves
    rows = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(encoder(inputs[rows]), whole[rows])
    padded = torch.cat((inputs, torch.full((batch, padding, 5), float("inf"))), dim=1)
    torch.testing.assert_close(encoder(padded, torch.arange(length + padding).expand(batch, -1) < length), whole)


@settings(max_examples=40)
@given(
    seeds,
    st.sampled_from(["balanced", "joint"]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_a_value_is_that_of_its_own_patches_and_words(seed, fusion, embedded, lengths, left, right):
    """Rows of any length, text padded on either side: the same as every row alone and whole."""
    text_dim = 6 if embedded else None
    compressor = PerceiverCompressor(5, vocab_size=11, text_dim=text_dim, sizes=SIZES, fusion=fusion).double()
    compressor = loud(compressor, seed)
    patches, words = max(n for n, _ in lengths), left + right + max(t for _, t in lengths)
    image, image_mask = drawn(seed, len(lengths), patches, 5), torch.zeros(len(lengths), patches, dtype=torch.bool)
    text = drawn(seed + 1, len(lengths), words, 6) if embedded else torch.full((len(lengths), words), -7)
    text_mask = torch.zeros(len(lengths), words, dtype=torch.bool)
    alone = []
    for row, (n, t) in enumerate(lengths):
        own = text[row, left : left + t]
        if not embedded:
            own = torch.randint(0, 11, (t,), generator=torch.Generator().manual_seed(seed + row))
            text[row, left : left + t] = own
        image_mask[row, :n], text_mask[row, left : left + t] = True, True
        alone.append(compressor(image[row : row + 1, :n], own[None]))
    torch.testing.assert_close(compressor(image, text, image_mask, text_mask), torch.cat(alone))


@settings(max_examples=12)
@given(
    seeds,
    st.sampled_from(["balanced", "joint"]),
    st.sampled_from([None, 3]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([None, 4, 6]),
    st.integers(0, 2),
)
def test_save_then_load_is_the_identity(seed, fusion, text_dim, dtype, channels, num_blocks):
    sizes = SIZES._replace(qk_channels=channels, v_channels=channels, num_blocks=num_blocks)
    compressor = PerceiverCompressor(
        5, vocab_size=9, text_dim=text_dim, sizes=sizes, fusion=fusion, seed=seed, dtype=dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        compressor.save_pretrained(Path(folder) / "compressor")
        loaded = PerceiverCompressor.from_pretrained(Path(folder) / "compressor")
    assert loaded.config() == compressor.config()
    assert loaded.fingerprint() == compressor.fingerprint()
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in compressor.state_dict().items())


@given(seeds, st.integers(1, 9), st.integers(-50, 50))
def test_positions_turn_with_the_distance(seed, width, shift):
    """The angle between two positions depends on their distance alone, at any even width."""
    places = torch.randint(0, 500, (4,), generator=torch.Generator().manual_seed(seed))
    one, other = (sinusoids(p, 2 * width).double() for p in (places, places + shift))
    assert one.shape == (4, 2 * width)
    products = (one * other).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(one.square().sum(-1), torch.full((4,), float(width), dtype=torch.float64))
    assert torch.equal(sinusoids(places, 2 * width - 1), sinusoids(places, 2 * width)[..., :-1])


@given(seeds, st.integers(2, 12), st.integers(1, 3))
def test_areas_see_ranks_only(seed, rows, columns):
    scores = drawn(seed, rows, columns).round(decimals=1)  # with ties
    labels = drawn(seed + 1, rows, columns) < 0
    labels[0], labels[1] = True, False
    area = area_under_roc(scores, labels)
    assert ((area >= 0) & (area <= 1)).all()
    torch.testing.assert_close(area_under_roc(scores.exp() * 3, labels), area)
    torch.testing.assert_close(area_under_roc(-scores, labels), 1 - area)
    torch.testing.assert_close(area_under_roc(scores, ~labels), 1 - area)


@given(seeds, st.integers(2, 8), st.integers(1, 6), st.floats(0.1, 10))
def test_rank_and_spread_ignore_rotation_and_scale(seed, rows, width, scale):
    vectors = drawn(seed, rows, width)
    turn = torch.linalg.qr(drawn(seed + 1, width, width)).Q
    assert 1 - 1e-9 <= effective_rank(vectors) <= min(rows - 1, width) + 1e-9
    torch.testing.assert_close(effective_rank(vectors @ turn * scale + 5), effective_rank(vectors), rtol=1e-6, atol=0)
    torch.testing.assert_close(spread_over_norm(vectors @ turn * scale), spread_over_norm(vectors))
    assert 0 <= spread_over_norm(vectors) <= 1
    assert spread_over_norm(vectors[:1].expand(rows, -1)) < 1e-9


@settings(max_examples=20)
@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_the_probe_ignores_units_and_follows_its_targets(seed, scale, offset):
    inputs, targets, fresh = drawn(seed, 15, 4), drawn(seed + 1, 15, 2), drawn(seed + 2, 6, 4)
    probe = RidgeProbe(inputs, targets)
    moved = RidgeProbe(inputs * scale + offset, targets)
    torch.testing.assert_close(moved(fresh * scale + offset), probe(fresh), rtol=1e-6, atol=1e-6)
    doubled = RidgeProbe(inputs, targets * scale + offset)
    torch.testing.assert_close(doubled(fresh), probe(fresh) * scale + offset, rtol=1e-6, atol=1e-6)
    assert explained_variance(targets, targets, targets.mean(0)) == 1.0
    assert abs(explained_variance(targets.mean(0).expand_as(targets), targets, targets.mean(0))) < 1e-9


@given(seeds, st.integers(1, 5), st.integers(1, 20), st.floats(1e-3, 1e3))
def test_one_byte_per_number_errs_by_half_a_step_at_most(seed, rows, width, scale):
    values = drawn(seed, rows, width) * scale
    back = diagnostics._through_int8(values)
    step = values.abs().amax(dim=1, keepdim=True) / 127
    assert ((back - values).abs() <= step * 0.5000001).all()
    assert ((back / step).round() - back / step).abs().max() < 1e-9
    torch.testing.assert_close(diagnostics._through_int8(back), back)
    assert not diagnostics._through_int8(torch.zeros(1, 3)).any()

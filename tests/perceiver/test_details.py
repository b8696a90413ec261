"""Numbers that the documentation promises: defaults, scales of drawn weights, limits at their exact place."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from tinyalign._attention import attend, attend_packed, pack
from tinyalign.perceiver import (
    CompressorRecord,
    FoldedPixelPerceiver,
    LossWeights,
    PerceiverCompressor,
    PerceiverEncoder,
    PerceiverPretrainer,
    PerceiverSizes,
    PixelPerceiver,
    caption_bytes,
    compressor_diagnostics,
    diagnostics,
)
from tinyalign.perceiver.positions import sinusoids
from tinyalign.perceiver.probes import RidgeProbe
from tinyalign.perceiver.reader import LatentReader

SIZES = PerceiverSizes(token_dim=64, num_latents=4, latent_dim=32, num_self_attends=1, num_heads=4)
PAPER = {  # Table 3, and the sizes of the release's inputs
    PerceiverEncoder: {
        "num_latents": 32, "latent_dim": 96, "num_self_attends": 8, "num_blocks": 1, "num_heads": 8, "qk_channels": 96,
        "v_channels": 96,
    },
    PixelPerceiver: {"image_size": 384, "vocab_size": 30522, "max_text_tokens": 512, "seed": 0},
    PerceiverCompressor: {"vocab_size": 30522, "text_dim": None, "fusion": "balanced", "seed": 0},
    caption_bytes: {"max_tokens": 512},
    FoldedPixelPerceiver: {"chunk": 2048},
    LatentReader: {"hidden_dim": 128, "num_heads": 8},
    PerceiverPretrainer: {
        "loss_weights": (1.0, 1.0, 3.0, 0.0), "caption_dropout": 0.0, "mixed_captions": 0.5, "num_patches": None,
        "hidden_dim": 128, "seed": 0,
    },
    LossWeights: {"image": 1.0, "text": 1.0, "bag": 3.0, "contrastive": 0.0},
    compressor_diagnostics: {"seed": 0, "batch_size": 32, "num_probes": 10, "min_count": 4},
}  # fmt: skip


@pytest.mark.parametrize("called", PAPER, ids=lambda called: called.__name__)
def test_defaults_are_the_documented_ones(called):
    parameters = inspect.signature(called).parameters
    assert {name: parameters[name].default for name in PAPER[called]} == PAPER[called]


def test_the_vocabulary_may_come_after_the_width():
    assert PerceiverCompressor(64, 1000).text_embedding.num_embeddings == 1000


@pytest.mark.parametrize("width", [1, 6, 7])
def test_positions_are_those_of_vaswani(width):
    half = (width + 1) // 2
    angles = torch.tensor([[p / 10000 ** (i / half) for i in range(half)] for p in (0, 1, 7, 900)], dtype=torch.float64)
    expected = torch.cat((angles.sin(), angles.cos()), 1)[:, :width]
    torch.testing.assert_close(sinusoids(torch.tensor([0, 1, 7, 900]), width).double(), expected, atol=1e-4, rtol=0)


def spread(weight):
    return weight.detach().double().std().item()


def near(value, expected, count):
    """Within five standard errors of a normal sample's standard deviation."""
    return abs(value / expected - 1) < 5 / math.sqrt(2 * count)


def test_weights_are_drawn_at_their_scale():
    compressor = PerceiverCompressor(144, vocab_size=500, sizes=SIZES)
    embedded = PerceiverCompressor(144, text_dim=100, sizes=SIZES)
    pretrainer = PerceiverPretrainer(compressor, hidden_dim=64, loss_weights=LossWeights(contrastive=1.0))
    alone = LatentReader(32, 40, hidden_dim=64)
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=32), image_size=8, vocab_size=99)
    for weight, expected in (
        (compressor.image_projection.weight, 1 / 12),
        (compressor.text_embedding.weight, 1.0),
        (embedded.text_embedding[1].weight, 1 / 10),
        (compressor.encoder.latents, 0.02),
        (compressor.encoder.cross_attention.query.weight, 0.02),
        (compressor.text_attention.key.weight, 0.02),
        (pretrainer.text_reader.output.weight, 1 / 8),
        (pretrainer.image_reader.output.weight, 0.1 / 8),
        (pretrainer.bag_reader.weight, (4 * 32) ** -0.5),
        (alone.output.weight, 1 / 8),
        (alone.read.key.weight, 1 / 8),
        (pixels.pixel_projection.weight, 0.02),
        (pixels.position_projection.weight, 0.02),
        (pixels.pixel_positions, 0.02),
        (pixels.caption.embedding.weight, 0.02),
        (pixels.caption.positions, 0.02),
    ):
        assert near(spread(weight), expected, weight.numel())
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel())
    assert pretrainer.log_temperature.item() == -2.0
    for module in (compressor, pretrainer, pixels, alone):
        for name, weight in module.named_parameters():
            if name.endswith("bias"):
                assert not weight.any(), name


def test_the_order_of_draws_does_not_depend_on_earlier_training():
    """Norms and biases are put back too, so that one seed gives one compressor."""
    fresh, used = (PerceiverCompressor(6, text_dim=5, sizes=SIZES) for _ in range(2))
    with torch.no_grad():
        for weight in used.parameters():
            weight.add_(1.0)
    used.reset_parameters(0)
    assert used.fingerprint() == fresh.fingerprint()
    used.reset_parameters(1)
    assert used.seed == 1


def test_channels_that_hardly_vary_are_not_blown_up():
    compressor = PerceiverCompressor(4, vocab_size=9, sizes=SIZES)
    features = torch.zeros(1, 3, 4, dtype=torch.float64)
    features[0, :, 0] = torch.tensor([-1.0, 0.0, 1.0]) * 4  # standard deviation 4
    features[0, :, 1] = torch.tensor([-1.0, 0.0, 1.0]) * 1e-3
    compressor.fit_image_scale(features)
    floor = 0.01 * (4 + 1e-3) / 4
    expected = torch.tensor([1 / 4, 1 / floor, 1 / floor, 1 / floor])
    torch.testing.assert_close(compressor.image_scale, expected)
    compressor.fit_image_scale(torch.ones(1, 2, 4))
    torch.testing.assert_close(compressor.image_scale, torch.full((4,), 1e6))
    torch.testing.assert_close(compressor.image_mean, torch.ones(4))
    assert compressor.image_scale_is_fitted
    assert compressor.image_scale_is_fitted.dtype == torch.bool


def test_channels_follow_the_latent_width_unless_given():
    assert PerceiverCompressor(4, vocab_size=9, sizes=SIZES).sizes == SIZES._replace(qk_channels=32, v_channels=32)
    given = SIZES._replace(qk_channels=8, v_channels=12)
    compressor = PerceiverCompressor(4, vocab_size=9, sizes=given)
    assert compressor.sizes == given
    for layer in (compressor.text_attention, compressor.encoder.cross_attention, compressor.encoder.self_attends[0]):
        assert (layer.query.out_features, layer.key.out_features, layer.value.out_features) == (8, 8, 12)
    assert (compressor.num_latents, compressor.latent_dim) == (4, 32)


def test_the_default_scale_of_attention_is_that_of_the_head():
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    expected = ((q @ k.mT) / 2).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected)
    packed = pack(torch.zeros(1, 3, 1), torch.ones(1, 3, dtype=torch.bool))
    flat_k, flat_v = (tensor[0].transpose(0, 1) for tensor in (k, v))
    torch.testing.assert_close(attend_packed(q, flat_k, flat_v, packed), expected)


def records_where(first_half, second_half):
    """Captions by record; groups are single records, so that the split is the test's to know."""
    return [CompressorRecord(torch.zeros(1, 1), torch.tensor([0]), words) for words in [*first_half, *second_half]]


@pytest.mark.parametrize(("said", "usable"), [(4, True), (3, False), (16, True), (17, False)])
def test_a_word_counts_from_exactly_min_count_on(said, usable):
    """It must also be missing as often: 20 records a side, four of each at least."""
    train = torch.arange(40) < 20
    half = [("word", "always")] * said + [("always",)] * (20 - said)
    records = records_where(half, half)
    if usable:
        labels = diagnostics._choose_words(records, train, 4)
        assert labels.sum(0).tolist() == [2 * said]
    else:
        with pytest.raises(ValueError, match="got none of 2 that does"):
            diagnostics._choose_words(records, train, 4)


def test_four_records_per_min_count_are_enough():
    draw = torch.Generator().manual_seed(0)
    records = [
        CompressorRecord(torch.randn(2, 3, generator=draw), torch.tensor([int(i % 3 == 0), 2 + int(i % 2)]))
        for i in range(8)
    ]

    def bag(image, text, image_mask, text_mask):
        return torch.nn.functional.one_hot(text, 4).sum(1, keepdim=True).float()

    assert compressor_diagnostics(bag, records, min_count=2, seed=3).num_records == 8
    with pytest.raises(ValueError, match="records must be at least 8 for min_count=2, got 7"):
        compressor_diagnostics(bag, records[:7], min_count=2)


def test_half_of_the_groups_train_the_odd_one_included():
    for count in (2, 5, 8):
        groups = torch.arange(count).repeat_interleave(3)
        train = diagnostics._split(groups, torch.Generator().manual_seed(1))
        assert train.view(count, 3).all(1).sum() == (count + 1) // 2
        assert (train.view(count, 3) == train.view(count, 3)[:, :1]).all()
    assert not torch.equal(train, diagnostics._split(groups, torch.Generator().manual_seed(5)))


def test_patches_are_taken_at_nine_even_places():
    image = torch.arange(17.0)[:, None] * torch.tensor([1.0, 10.0])
    given = CompressorRecord(torch.zeros(3, 1), torch.tensor([0]), None, image)
    targets = diagnostics._patch_targets([given, given._replace(image=image, patches=None)])
    expected = (torch.arange(9.0) * 2)[:, None] * torch.tensor([1.0, 10.0])
    assert torch.equal(targets, expected.flatten().double().expand(2, -1))


def test_sensitivities_cross_images_and_captions_of_the_chosen():
    """A value that is (image, caption) itself: each moves its own part, and the spread is that of the chosen pairs."""
    records = [CompressorRecord(torch.full((1, 1), 3.0 + i), torch.tensor([i])) for i in range(6)]
    seen = []

    def compressor(image, text, image_mask, text_mask):
        seen.extend(zip(image.flatten().tolist(), text.flatten().tolist(), strict=True))
        return image

    by_image, by_caption = diagnostics._sensitivities(compressor, records, 6, 4, torch.Generator().manual_seed(0))
    assert sorted(seen) == sorted((3.0 + i, j) for i in range(6) for j in range(6))
    values = torch.arange(6.0, dtype=torch.float64) + 3
    assert by_image == pytest.approx((values.std(unbiased=False) / values.square().mean().sqrt()).item())
    assert by_caption == 0.0
    seen.clear()
    diagnostics._sensitivities(compressor, records, 2, 4, torch.Generator().manual_seed(0))
    assert len(seen) == 4


def test_words_found_takes_as_many_as_were_said():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.9, 0.8], [0.5, 0.4, 0.3]])
    labels = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert diagnostics._found(scores, labels) == pytest.approx((0.5 + 1.0) / 2)  # who says nothing is not asked


def test_the_probe_tries_penalties_over_eleven_decades():
    probe = RidgeProbe(torch.randn(9, 2), torch.randn(9, 1))
    assert list(probe.errors) == [10.0**power for power in range(-2, 10)]
    assert probe.penalty in probe.errors
    two = RidgeProbe(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]))  # two rows are the fewest
    assert two(torch.tensor([[0.5]])).item() == pytest.approx(0.5)

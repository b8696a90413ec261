"""The LLM-free training objective: what its losses mean, and that it teaches the latents both modalities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.perceiver import LossWeights, PerceiverCompressor, PerceiverPretrainer, PerceiverSizes
from tinyalign.perceiver.pretrainer import shuffled_places

SIZES = PerceiverSizes(token_dim=32, num_latents=4, latent_dim=32, num_self_attends=1, num_heads=4)


def build(seed=0, text_dim=None, weights=LossWeights(bag=0.3), mixed_captions=0.0, **arguments):  # noqa: B008
    compressor = PerceiverCompressor(12, vocab_size=30, text_dim=text_dim, sizes=SIZES, seed=seed)
    arguments = {"loss_weights": weights, "mixed_captions": mixed_captions, **arguments}
    return PerceiverPretrainer(compressor, hidden_dim=32, seed=seed, **arguments)


def example(batch=8, patches=9, words=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, patches, 12, generator=generator),
        torch.randint(1, 30, (batch, words), generator=generator),
    )


def test_losses_are_the_errors_of_the_decoder_by_hand():
    pretrainer = build().eval()
    image, text = example(2)
    pretrainer.compressor.fit_image_scale(image)
    image_mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    text_mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    out = pretrainer(image, text, image_mask, text_mask)
    latents = pretrainer.compressor(image, text, image_mask, text_mask)
    errors, nll, bag = [], [], []
    for row in range(2):
        for place in range(9):
            if image_mask[row, place]:
                guess = pretrainer.image_reader(latents[row : row + 1], torch.tensor([[place]]))[0, 0]
                target = (image[row, place] - pretrainer.compressor.image_mean) * pretrainer.compressor.image_scale
                errors.append(((guess - target) ** 2).mean())
        for place in range(6):
            if text_mask[row, place]:
                read = pretrainer.text_reader(latents[row : row + 1], torch.tensor([[place]]))[0, 0]
                logits = pretrainer.compressor.text_embedding.weight @ read / math.sqrt(32)
                nll.append(-logits.log_softmax(0)[text[row, place]])
                scores = pretrainer.compressor.text_embedding.weight @ pretrainer.bag_reader(latents[row].flatten())
                bag.append(-(scores / math.sqrt(32)).log_softmax(0)[text[row, place]])
    torch.testing.assert_close(out.image_loss, torch.stack(errors).mean())
    torch.testing.assert_close(out.text_loss, torch.stack(nll).mean())
    torch.testing.assert_close(out.bag_loss, torch.stack(bag).mean())
    torch.testing.assert_close(out.loss, out.image_loss + out.text_loss + 0.3 * out.bag_loss)
    assert out.contrastive_loss == 0


def test_weights_scale_the_parts_and_zero_leaves_them_out():
    image, text = example()
    out = build(weights=LossWeights(image=0.0, text=3.0, bag=0.5)).eval()(image, text)
    assert out.image_loss == 0
    torch.testing.assert_close(out.loss, 3.0 * out.text_loss + 0.5 * out.bag_loss)
    out = build(weights=LossWeights(bag=2.0)).eval()(image, text)
    torch.testing.assert_close(out.loss, out.image_loss + out.text_loss + 2.0 * out.bag_loss)
    out = build(weights=LossWeights(text=0.0, bag=0.0, contrastive=2.0)).eval()(image, text)
    assert out.text_loss == out.bag_loss == 0
    torch.testing.assert_close(out.loss, out.image_loss + 2.0 * out.contrastive_loss)


def test_padding_and_batch_mates_do_not_enter_the_loss():
    pretrainer = build(weights=LossWeights(contrastive=1.0)).eval()
    image, text = example()
    expected = pretrainer(image, text)
    padded_image = torch.cat((image, torch.full((8, 3, 12), float("nan"))), 1)
    padded_text = torch.cat((text, torch.full((8, 2), -100)), 1)
    image_mask, text_mask = (torch.arange(12) < 9).expand(8, -1), (torch.arange(8) < 6).expand(8, -1)
    got = pretrainer(padded_image, padded_text, image_mask, text_mask)
    for before, after in zip(expected, got, strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("num_patches", [None, 4])
@pytest.mark.parametrize("text_dim", [None, 10])
def test_padding_of_any_content_leaves_the_same_gradients(text_dim, num_patches):
    weights = LossWeights(bag=0.3, contrastive=1.0)
    twins = [build(text_dim=text_dim, weights=weights, num_patches=num_patches, caption_dropout=0.3) for _ in range(2)]
    image, text = example()
    text = text if text_dim is None else torch.randn(8, 6, text_dim)
    image_mask, text_mask = torch.rand(8, 9) < 0.6, torch.rand(8, 6) < 0.6
    image_mask[0] = text_mask[1] = False
    for pretrainer, junk in zip(twins, (0.0, float("nan")), strict=True):
        image = image.masked_fill(~image_mask[..., None], junk)
        text = text if text_dim is None else text.masked_fill(~text_mask[..., None], junk)
        pretrainer(image, text, image_mask, text_mask, generator=torch.Generator().manual_seed(0)).loss.backward()
    for (name, clean), dirty in zip(twins[0].named_parameters(), twins[1].parameters(), strict=True):
        assert torch.equal(clean.grad, dirty.grad), name


def test_rows_without_caption_count_for_the_image_only():
    pretrainer = build(weights=LossWeights(contrastive=1.0)).eval()
    image, text = example()
    text_mask = torch.ones(8, 6, dtype=torch.bool)
    text_mask[3] = False
    out = pretrainer(image, text, None, text_mask)
    kept = [row for row in range(8) if row != 3]
    torch.testing.assert_close(out.text_loss, pretrainer(image[kept], text[kept]).text_loss)
    torch.testing.assert_close(out.contrastive_loss, pretrainer(image[kept], text[kept]).contrastive_loss)
    assert pretrainer(image, text, None, torch.zeros_like(text_mask)).loss.isfinite()
    assert pretrainer(image).text_loss == 0
    assert pretrainer(image[:0], text[:0]).loss == 0  # no rows at all


def test_gradients_reach_every_weight():
    pretrainer = build(weights=LossWeights(contrastive=1.0))
    pretrainer(*example()).loss.backward()
    unreached = [name for name, weight in pretrainer.named_parameters() if weight.grad is None or not weight.grad.any()]
    # A key's bias adds the same to every score of a query, and a softmax does not see it.
    assert [name for name in unreached if not name.endswith("key.bias")] == []


def train(pretrainer, steps, seed=0, rate=3e-3):
    """Images and captions that are unrelated, so that neither can be guessed from the other."""
    optimiser = torch.optim.AdamW(pretrainer.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(3, 9 * 12, generator=generator)
    scenes = (torch.randn(256, 3, generator=generator) @ basis).view(256, 9, 12)
    captions = torch.randint(1, 30, (256, 6), generator=generator)
    for _ in range(steps):
        rows = torch.randint(0, 192, (32,), generator=generator)
        loss = pretrainer(scenes[rows], captions[rows], generator=generator).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    pretrainer.eval()
    with torch.no_grad():
        return pretrainer(scenes[192:], captions[192:]), (scenes[192:], captions[192:])


def test_training_makes_the_latents_carry_image_and_caption():
    pretrainer = build()
    with torch.no_grad():
        before = pretrainer.eval()(*example())
    pretrainer.train()
    after, _ = train(pretrainer, 250)
    assert before.text_loss > 3.0  # ln 29 = 3.4 for who knows nothing
    assert (
        after.text_loss < 1.7
    )  # half of it, on held-out captions of independent random words: only the latents can tell
    assert after.image_loss < 0.5  # 1 for who knows only the mean


def test_equal_seeds_train_to_equal_weights():
    one, same, other = build(1), build(1), build(2)
    for pretrainer in (one, same, other):
        train(pretrainer, 3)
    assert one.compressor.fingerprint() == same.compressor.fingerprint() != other.compressor.fingerprint()


def test_caption_dropout_hides_the_caption_from_the_compressor_but_still_asks_for_it():
    image, text = example(64)
    seen = []
    pretrainer = build(caption_dropout=0.5)
    pretrainer.compressor.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[3]))
    out = pretrainer(image, text, generator=torch.Generator().manual_seed(0))
    hidden = ~seen[0].any(1)
    assert 16 < hidden.sum() < 48
    assert (seen[0].all(1) | hidden).all()
    assert out.text_loss > 0
    pretrainer.eval()(image, text)
    assert seen[1].all()
    other = build(caption_dropout=0.5)(image, text, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.loss, other.loss)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5), st.integers(0, 99))
def test_shuffling_permutes_the_kept_places(rows, seed):
    mask = torch.tensor(rows)
    places = shuffled_places(mask, torch.Generator().manual_seed(seed))
    assert places.shape == mask.shape
    assert sorted(places[mask].tolist()) == mask.flatten().nonzero().flatten().tolist()


def test_every_order_of_the_kept_places_is_drawn():
    mask = torch.tensor([[True, False], [True, True]])
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(shuffled_places(mask, generator)[mask].tolist()) for _ in range(200)}
    assert len(drawn) == 6  # of 3 places; each misses 200 draws with probability (5/6)^200


def test_mixed_captions_hold_the_words_of_the_batch_and_are_what_is_asked_for():
    image, text = example(64)
    text_mask = torch.arange(6) < torch.randint(0, 7, (64, 1))
    seen = []
    pretrainer = build(mixed_captions=0.5, caption_dropout=0.3, weights=LossWeights(contrastive=1.0))
    pretrainer.compressor.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    out = pretrainer(image, text, None, text_mask)
    asked, shown = seen[0][1], seen[0][3]
    changed = ((asked != text) & shown).any(1)
    assert 8 < changed.sum() < 40  # about a half of those that are shown and long enough
    assert torch.equal(asked[~changed], text[~changed])
    assert not changed[text_mask.any(1) & ~shown.any(1)].any()  # a hidden caption is guessed from its image: its own
    assert set(asked[shown].tolist()) <= set(text[shown].tolist())
    with torch.no_grad():
        latents = pretrainer.compressor(image, asked, None, shown)
        expected = pretrainer._text_errors(pretrainer.text_reader, latents, asked, text_mask)[text_mask].mean()
    torch.testing.assert_close(out.text_loss.detach(), expected)
    assert torch.equal(seen[2][1], text)  # the contrastive view of the caption is the pair's own
    seen.clear()
    pretrainer.eval()(image, text, None, text_mask)
    assert torch.equal(seen[0][1], text)


def test_mixing_all_rows_keeps_every_word_once():
    image, text = example(16)
    seen = []
    pretrainer = build(mixed_captions=1.0)
    pretrainer.compressor.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    pretrainer(image, text)
    assert sorted(seen[0].flatten().tolist()) == sorted(text.flatten().tolist())
    embedded = build(mixed_captions=1.0, text_dim=10)
    embedded.compressor.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    rows = torch.randn(16, 6, 10)
    embedded(image, rows)
    assert not torch.equal(seen[1], rows)
    assert torch.equal(seen[1].flatten(0, 1).sort(0).values, rows.flatten(0, 1).sort(0).values)


def test_an_id_outside_the_table_is_named_even_where_the_caption_is_hidden():
    pretrainer = build(caption_dropout=0.99)
    image, text = example()
    text[2, 4] = 30
    with pytest.raises(ValueError, match=r"PerceiverPretrainer.forward: .* ids from 0 to 29, got 30 at row 2, place 4"):
        pretrainer(image, text)
    with pytest.raises(ValueError, match=r"text_mask must have shape \(8, 6\), got \(8, 5\)"):
        pretrainer(image, text, None, torch.ones(8, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"text must be token ids of shape \(B, T\), got torch.float32"):
        pretrainer(image, text.float())


def test_a_sample_of_patches_estimates_the_whole_loss():
    image, text = example(64, 36)
    whole = build()
    sampled = build(num_patches=4)
    expected = whole(image, text).image_loss
    draws = torch.stack([sampled(image, text).image_loss.detach() for _ in range(20)])
    assert len(draws.unique()) > 10
    # 20 draws of 256 patches each: the standard error of the mean is below 1 % of the loss.
    assert abs(draws.mean() / expected - 1) < 0.03
    torch.testing.assert_close(sampled.eval()(image, text).image_loss, whole.eval()(image, text).image_loss)


@pytest.mark.parametrize("num_patches", [9, 10, np.int64(40)])
def test_asking_for_as_many_patches_as_there_are_takes_all(num_patches):
    image, text = example()
    expected = build()(image, text).image_loss
    torch.testing.assert_close(build(num_patches=num_patches)(image, text).image_loss, expected, atol=0, rtol=0)


def test_sampled_patches_are_compared_with_themselves():
    """A stand-in decoder that knows every patch by its position leaves no error; padding stays out of it."""
    pretrainer = build(num_patches=5, weights=LossWeights(text=0.0, bag=0.0))
    image, _ = example(6)
    image_mask = torch.arange(9)[None].expand(6, -1) < torch.tensor([9, 8, 7, 6, 5, 4])[:, None]
    pretrainer.compressor.fit_image_scale(image)
    normal = pretrainer.compressor.normalise(image)
    asked = []

    class KnowsAll(torch.nn.Module):
        def forward(self, latents, positions):
            asked.append(positions)
            return normal.gather(1, positions[..., None].expand(-1, -1, 12))

    pretrainer.image_reader = KnowsAll()
    spoilt = image.masked_fill(~image_mask[..., None], float("nan"))
    assert pretrainer(spoilt, None, image_mask).image_loss.item() < 1e-10
    assert asked[0].shape == (6, 5)
    assert all(len(set(row.tolist())) == 5 for row in asked[0])


def test_each_contrastive_view_sees_one_modality():
    pretrainer = build(weights=LossWeights(contrastive=1.0))
    seen = []
    pretrainer.compressor.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    pretrainer(*example())
    _, image_view, text_view = seen
    assert image_view[1] is None
    assert text_view[1] is not None
    assert not text_view[2].any()


def test_contrastive_views_learn_to_find_each_other():
    pretrainer = build(weights=LossWeights(0.0, 0.0, 0.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(29, 9, 12, generator=generator)
    optimiser = torch.optim.AdamW(pretrainer.parameters(), lr=3e-3)

    def batch(size):
        kind = torch.randperm(29, generator=generator)[:size]
        return kinds[kind] + 0.1 * torch.randn(size, 9, 12, generator=generator), (kind + 1)[:, None].expand(-1, 6)

    for _ in range(150):
        loss = pretrainer(*batch(16)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert pretrainer.eval()(*batch(16)).contrastive_loss < 0.5 * math.log(16)


def test_text_embeddings_are_reconstructed_too():
    pretrainer = build(text_dim=10)
    image, text = torch.randn(4, 9, 12), torch.randn(4, 6, 10) * 5 + 2
    out = pretrainer(image, text)
    out.loss.backward()
    normal = (text - text.mean(-1, keepdim=True)) / text.std(-1, unbiased=False, keepdim=True)
    guess = pretrainer.text_reader(pretrainer.compressor(image, text), torch.arange(6)[None])
    torch.testing.assert_close(out.text_loss, ((guess - normal) ** 2).mean(), atol=1e-4, rtol=0)


def test_the_scale_is_fitted_once_on_the_first_training_batch():
    pretrainer = build()
    image, text = example()
    pretrainer.eval()(image, text)
    assert not pretrainer.compressor.image_scale_is_fitted
    pretrainer.train()(image * 3 + 1, text)
    torch.testing.assert_close(pretrainer.compressor.image_mean, (image * 3 + 1).mean((0, 1)))
    pretrainer(image, text)
    torch.testing.assert_close(pretrainer.compressor.image_mean, (image * 3 + 1).mean((0, 1)))


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_first_batch_without_patches_leaves_the_scale_to_a_later_one(rows, kept):
    pretrainer = build().train()
    image, text = example()
    few = torch.zeros(rows, 9, dtype=torch.bool)
    few[:1, :kept] = True
    for out in (
        pretrainer(image[:rows], text[:rows], few),
        pretrainer(image[: min(rows, 1), :kept], text[: min(rows, 1)]),
    ):
        assert out.loss.isfinite()
        out.loss.backward()
    assert not pretrainer.compressor.image_scale_is_fitted
    pretrainer(image * 3 + 1, text)
    torch.testing.assert_close(pretrainer.compressor.image_mean, (image * 3 + 1).mean((0, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": LossWeights(image=-1.0)}, "loss_weights.image must be finite and not negative, got -1.0"),
        (
            {"weights": LossWeights(contrastive=math.nan)},
            "loss_weights.contrastive must be finite and not negative, got nan",
        ),
        ({"caption_dropout": 1.0}, r"caption_dropout must lie in \[0, 1\), got 1.0"),
        ({"weights": LossWeights(bag=-0.1)}, "loss_weights.bag must be finite and not negative, got -0.1"),
        ({"mixed_captions": 1.5}, r"mixed_captions must lie in \[0, 1\], got 1.5"),
        ({"num_patches": 0}, "num_patches must be an integer of at least 1, got 0"),
        ({"num_patches": 1.5}, "num_patches must be an integer of at least 1, got 1.5"),
        ({"num_patches": True}, "num_patches must be an integer of at least 1, got True"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_ids_may_be_any_integers(kind):
    image, text = example()
    pretrainer = build().eval()
    assert torch.equal(pretrainer(image, text.to(kind)).loss, pretrainer(image, text).loss)


def test_weights_come_by_name():
    with pytest.raises(TypeError, match=r"loss_weights must be LossWeights, got {'image': 0.1}. Write LossWeights"):
        build(weights={"image": 0.1})


def test_what_has_no_weight_is_not_built():
    names = {name.split(".")[0] for name, _ in build(weights=LossWeights(image=0.0)).named_parameters()}
    assert names == {"compressor", "text_reader", "bag_reader"}
    names = {name.split(".")[0] for name, _ in build(weights=LossWeights(bag=0.0)).named_parameters()}
    assert names == {"compressor", "image_reader", "text_reader"}
    names = {name.split(".")[0] for name, _ in build(weights=LossWeights(text=0.0, contrastive=1.0)).named_parameters()}
    assert names == {"compressor", "image_reader", "bag_reader", "log_temperature"}

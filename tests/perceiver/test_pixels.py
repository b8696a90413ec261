"""The pixel encoder of the paper against transformers' classes, straightforward and folded."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PerceiverConfig, PerceiverModel, PerceiverTokenizer, SiglipVisionConfig, SiglipVisionModel
from transformers.models.perceiver.modeling_perceiver import (
    PerceiverImagePreprocessor,
    PerceiverMultimodalPreprocessor,
    PerceiverTextPreprocessor,
)

from tinyalign.models import PairEncoder
from tinyalign.perceiver import (
    CompressorRecord,
    FoldedPixelPerceiver,
    PerceiverCompressor,
    PerceiverEncoder,
    PixelPerceiver,
    caption_bytes,
    compressor_diagnostics,
)
from tinyalign.perceiver.layers import PerceiverLayer
from tinyalign.perceiver.pixels import CaptionTokens


def transformers_model(image_size, vocab_size=300, max_text=40, num_self_attends=2, num_latents=32):
    """The composition that the paper's release builds."""
    config = PerceiverConfig(
        num_latents=num_latents,
        d_latents=96,
        d_model=128,
        num_blocks=1,
        num_self_attends_per_block=num_self_attends,
        num_self_attention_heads=8,
        num_cross_attention_heads=8,
        qk_channels=96,
        v_channels=96,
        image_size=image_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_text,
        attention_probs_dropout_prob=0.0,
    )
    image = PerceiverImagePreprocessor(
        config,
        prep_type="conv1x1",
        spatial_downsample=1,
        out_channels=256,
        position_encoding_type="trainable",
        concat_or_add_pos="concat",
        project_pos_dim=256,
        trainable_position_encoding_kwargs={"num_channels": 256, "index_dims": image_size**2},
    )
    both = PerceiverMultimodalPreprocessor(
        {"image": image, "text": PerceiverTextPreprocessor(config)}, min_padding_size=4
    )
    return PerceiverModel(config, input_preprocessor=both).eval()


def randomise(model, scale, seed=0):
    """Weights and norms away from their initial values, where nothing cancels by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def expected_values(model, image, ids, mask):
    whole = torch.cat((torch.ones(image.shape[0], image.shape[2] * image.shape[3]), mask.float()), dim=1)
    with torch.no_grad():
        return model({"image": image, "text": ids}, attention_mask=whole).last_hidden_state


@settings(max_examples=12)
@given(
    image_size=st.integers(1, 12),
    batch=st.integers(1, 3),
    scale=st.sampled_from([0.0, 0.05]),
    chunk=st.sampled_from([1, 7, 64, 4096]),
    captions=st.lists(st.text(max_size=9), min_size=3, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_both_forms_equal_transformers(image_size, batch, scale, chunk, captions, seed):
    torch.manual_seed(seed)
    model = randomise(transformers_model(image_size), scale, seed)
    ours = PixelPerceiver.from_hf_state_dict(model.state_dict())
    image = torch.randn(batch, 3, image_size, image_size)
    ids, mask = caption_bytes(captions[:batch], 40)
    expected = expected_values(model, image, ids, mask)
    assert (ours(image, ids, text_mask=mask) - expected).abs().max() <= 1e-5
    assert (FoldedPixelPerceiver(ours, chunk=chunk)(image, ids, text_mask=mask) - expected).abs().max() <= 1e-5


@pytest.mark.slow
def test_both_forms_equal_transformers_at_the_paper_s_size():
    model = randomise(transformers_model(384, 30522, 512, 8), 0.02)
    assert sum(weight.numel() for weight in model.parameters()) == 42_379_344
    ours = PixelPerceiver.from_hf_state_dict(model.state_dict())
    image = torch.rand(1, 3, 384, 384)
    ids, mask = caption_bytes(["a family is sitting down at a table to have cake"])
    expected = expected_values(model, image, ids, mask)
    with torch.no_grad():
        assert (ours(image, ids, text_mask=mask) - expected).abs().max() <= 1e-5
    assert (FoldedPixelPerceiver(ours)(image, ids, text_mask=mask) - expected).abs().max() <= 1e-5


def test_default_sizes_are_the_paper_s():
    with torch.device("meta"):
        pixels = PixelPerceiver()
    assert sum(weight.numel() for weight in pixels.parameters()) == 42_379_344
    assert sum(weight.numel() for weight in pixels.encoder.parameters()) == 587_976 + 32 * 96


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_an_encoder_that_was_given_keeps_its_weights(seed):
    encoder = PerceiverEncoder(516, num_latents=4, num_self_attends=1)
    before = copy.deepcopy(encoder)
    pixels = PixelPerceiver(encoder, image_size=4, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before.parameters(), strict=True))
    pixels.reset_parameters(7)
    again = PixelPerceiver(encoder, image_size=4, seed=7)
    assert not torch.equal(encoder.latents, before.latents)
    again.reset_parameters(7)
    assert all(torch.equal(a, b) for a, b in zip(pixels.parameters(), again.parameters(), strict=True))


def small_pixels(seed=0, **sizes):
    encoder = PerceiverEncoder(516, **{"num_latents": 4, "num_self_attends": 1, **sizes})
    pixels = PixelPerceiver(encoder, image_size=4, vocab_size=300, max_text_tokens=16)
    pixels.reset_parameters(seed)
    return pixels.eval()


def test_weights_travel_to_transformers_strictly():
    ours = randomise(PixelPerceiver(PerceiverEncoder(516, num_self_attends=2), image_size=4, vocab_size=300), 0.1)
    theirs = transformers_model(4, max_text=512)
    theirs.load_state_dict(ours.to_hf_state_dict(), strict=True)
    image, (ids, mask) = torch.rand(2, 3, 4, 4), caption_bytes(["a red 7", "two"])
    with torch.no_grad():
        assert (ours(image, ids, text_mask=mask) - expected_values(theirs, image, ids, mask)).abs().max() <= 1e-5
    back = PixelPerceiver.from_hf_state_dict(ours.to_hf_state_dict())
    assert back.fingerprint() == ours.fingerprint()


def test_an_input_weight_of_another_shape_is_named():
    state = small_pixels().to_hf_state_dict()
    state["input_preprocessor.padding.image"] = torch.zeros(1, 5)
    with pytest.raises(ValueError, match=r"padding.image must have shape \(1, 4\) .* got \(1, 5\)"):
        PixelPerceiver.from_hf_state_dict(state)


def test_save_then_load_is_the_identity(tmp_path):
    pixels = randomise(small_pixels(num_blocks=2, num_heads=4, latent_dim=24, qk_channels=8, v_channels=16), 0.1)
    pixels.save_pretrained(tmp_path / "pixels")
    loaded = PixelPerceiver.from_pretrained(tmp_path / "pixels").eval()
    assert loaded.fingerprint() == pixels.fingerprint()
    image, (ids, mask) = torch.rand(2, 3, 4, 4), caption_bytes(["a red 7", "two"])
    assert torch.equal(loaded(image, ids, text_mask=mask), pixels(image, ids, text_mask=mask))
    with pytest.raises(ValueError, match="must describe class PerceiverCompressor in format 1, got class 'PixelPerc"):
        PerceiverCompressor.from_pretrained(tmp_path / "pixels")


def test_the_fingerprint_sees_weights_heads_and_blocks():
    kinds = [small_pixels(), small_pixels(1), small_pixels(num_heads=4), small_pixels(num_blocks=2)]
    for module in (kinds, [FoldedPixelPerceiver(pixels) for pixels in kinds]):
        assert len({part.fingerprint() for part in module}) == 4
        assert copy.deepcopy(module[0]).fingerprint() == module[0].fingerprint()
    assert FoldedPixelPerceiver(kinds[0]).fingerprint() == FoldedPixelPerceiver(small_pixels()).fingerprint()


def test_the_fingerprint_of_a_fold_is_that_of_its_weights_however_they_were_rounded():
    pixels = small_pixels()
    folded, elsewhere = FoldedPixelPerceiver(pixels), FoldedPixelPerceiver(small_pixels(), chunk=3)
    for constant in elsewhere.buffers():
        constant += 1e-7  # as another machine might
    assert elsewhere.fingerprint() == folded.fingerprint() != pixels.fingerprint()
    kinds = {folded.fingerprint()}
    for part in ("pixel_projection", "position_projection", "encoder.cross_attention.key"):
        changed = small_pixels()
        with torch.no_grad():
            changed.get_submodule(part).weight[0, 0] += 1e-3
        kinds.add(FoldedPixelPerceiver(changed).fingerprint())
    assert len(kinds) == 4
    with torch.no_grad():
        folded.encoder.latents += 1e-3  # a shared weight that changes later
    assert folded.fingerprint() not in kinds


@pytest.mark.parametrize("fold", [False, True])
def test_the_library_calls_it_as_any_compressor(fold):
    pixels = FoldedPixelPerceiver(small_pixels()) if fold else small_pixels()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 4, 4, generator=generator)
    captions = [" ".join(word for i, word in enumerate(("red", "two", "dog")) if n >> i & 1) for n in range(60)]
    texts, mask = caption_bytes(captions, 16)
    records = [
        CompressorRecord(image, text[kept], words=caption.split(), patches=image.flatten(1).T)
        for image, text, kept, caption in zip(images, texts, mask, captions, strict=True)
    ]
    assert compressor_diagnostics(pixels, records, min_count=2).num_words == 3
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower = SiglipVisionModel(SiglipVisionConfig(image_size=4, patch_size=2, **size))
    pair = PairEncoder(tower, pixels, torch.nn.Identity())
    value = pair.value(images, texts, text_mask=mask)
    assert torch.equal(value, pixels(images, texts, None, mask))
    everything = torch.ones(60, 9, dtype=torch.bool)
    assert torch.equal(pixels(images, texts, everything, mask), value)
    with pytest.raises(ValueError, match="image_mask must keep everything, got 60 places hidden"):
        pixels(images, texts, everything & (torch.arange(9) > 0), mask)
    with pytest.raises(ValueError, match=r"image_mask must have shape \(60, 9\), got \(59, 9\)"):
        pixels(images, texts, everything[1:], mask)
    with pytest.raises(TypeError, match="image_mask must be boolean"):
        pixels(images, texts, everything.float(), mask)


def test_the_algebra_holds_for_extreme_pixels():
    """In float64, where what is left is algebra and not rounding."""
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=4, num_self_attends=0), image_size=6)
    randomise(pixels, 0.1).double()
    folded = FoldedPixelPerceiver(pixels)
    for image in (torch.zeros(1, 3, 6, 6), torch.full((1, 3, 6, 6), 255.0), torch.randn(1, 3, 6, 6) * 1e3):
        with torch.no_grad():
            torch.testing.assert_close(folded(image), pixels(image), atol=1e-11, rtol=1e-9)


def test_text_of_any_kind_folds():
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=4, num_self_attends=1), image_size=4)
    folded, image = FoldedPixelPerceiver(pixels), torch.rand(2, 3, 4, 4)
    ids, mask = caption_bytes(["a", "longer"])
    with torch.no_grad():
        torch.testing.assert_close(folded(image), pixels(image))
        torch.testing.assert_close(folded(image, ids), pixels(image, ids))
        for kind in (torch.uint8, torch.int32):
            torch.testing.assert_close(folded(image, ids.to(kind)), pixels(image, ids.to(kind)))
        for kept in (None, mask[:, :0]):  # captions of no length are no captions
            torch.testing.assert_close(folded(image, ids[:, :0], text_mask=kept), pixels(image))
            torch.testing.assert_close(pixels(image, ids[:, :0], text_mask=kept), pixels(image))
        empty = torch.zeros_like(mask)
        torch.testing.assert_close(folded(image, ids - 100, text_mask=empty), pixels(image))
        torch.testing.assert_close(pixels(image, ids - 100, text_mask=empty), pixels(image))


def test_half_precision_images_run():
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=4, num_self_attends=1), image_size=4)
    image = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        expected = pixels(image)
        for dtype in (torch.float16, torch.bfloat16):
            assert (pixels(image.to(dtype)) - expected).abs().max() < 1e-3
            assert (FoldedPixelPerceiver(pixels)(image.to(dtype)) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_run(dtype):
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=4, num_self_attends=1), image_size=4)
    image = torch.rand(2, 3, 4, 4)
    expected = FoldedPixelPerceiver(pixels)(image)
    folded_first = FoldedPixelPerceiver(pixels).to(dtype)  # which turns what they share
    for folded in (folded_first, FoldedPixelPerceiver(pixels.to(dtype))):
        value = folded(image)
        assert value.dtype == dtype
        assert (value.float() - expected).abs().max() < (1e-3 if dtype == torch.float16 else 8e-3)


def test_autocast_leaves_the_stream_of_pixels_alone(monkeypatch):
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=4, num_self_attends=0), image_size=4)
    folded, mixed = FoldedPixelPerceiver(pixels), []
    absorb = PerceiverLayer.absorb
    monkeypatch.setattr(PerceiverLayer, "absorb", lambda *given: mixed.append(given[2]) or absorb(*given))
    image, (ids, mask) = torch.rand(2, 3, 4, 4), caption_bytes(["a", "longer"])
    folded(image, ids, text_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded(image, ids, text_mask=mask)
    assert torch.equal(*mixed)


def test_the_sums_over_all_places_fit_whatever_the_dtype():
    """82,944 places of nearly equal weight: float16 ends at 65,504."""
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=1, num_self_attends=0), image_size=288, vocab_size=9)
    folded, image = FoldedPixelPerceiver(pixels, chunk=20000), torch.rand(1, 3, 288, 288)
    expected = folded(image)
    assert (folded.half()(image) - expected).abs().max() < 1e-3


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_bytes_are_numbered_as_transformers_does(captions):
    ids, mask = caption_bytes(captions)
    tokenizer = PerceiverTokenizer()
    for row, kept, caption in zip(ids, mask, captions, strict=True):
        assert row[kept].tolist() == [4, *(byte + 6 for byte in caption.encode()), 5]
        if caption.isascii() and caption.isprintable() and "[" not in caption:  # the tokenizer strips and merges others
            assert tokenizer(caption).input_ids == row[kept].tolist()
        assert not row[~kept].any()


def test_long_captions_are_cut_with_both_markers_left():
    ids, mask = caption_bytes(["abcdef"], 5)
    assert ids.tolist() == [[4, 103, 104, 105, 5]]
    assert mask.all()
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        caption_bytes(["a"], 1)


def test_the_seed_decides_the_weights():
    one, same, other = (PixelPerceiver(image_size=2, vocab_size=9, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.pixel_positions, other.pixel_positions)
    assert not torch.equal(one.encoder.latents, other.encoder.latents)


def test_what_does_not_fit_is_refused():
    pixels = PixelPerceiver(PerceiverEncoder(516, num_latents=2, num_self_attends=0), image_size=4, max_text_tokens=5)
    folded = FoldedPixelPerceiver(pixels)
    for form in (pixels, folded):
        with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, 4, 4\), got \(1, 3, 5, 4\)"):
            form(torch.zeros(1, 3, 5, 4))
        with pytest.raises(ValueError, match=r"with T at most 5, got torch.int64 of shape \(1, 6\). Truncate"):
            form(torch.zeros(1, 3, 4, 4), torch.zeros(1, 6, dtype=torch.long))
        for stray in (torch.bool, torch.float32):
            with pytest.raises(ValueError, match=f"text must be token ids .* got {stray} of shape"):
                form(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, dtype=stray))
        for images, captions in ((2, 1), (1, 2)):
            with pytest.raises(ValueError, match=rf"batch of pixel_values, got \({captions}, 3\) and {images} images"):
                form(torch.zeros(images, 3, 4, 4), torch.zeros(captions, 3, dtype=torch.long))
        with pytest.raises(TypeError, match=r"pixel_values must be floating point, got torch.uint8"):
            form(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="PixelPerceiver: image_size must be an integer of at least 1, got 0"):
        PixelPerceiver(image_size=0)
    with pytest.raises(TypeError, match="captions must be a sequence of texts, got 'abc'"):
        caption_bytes("abc")
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 3\), got \(1, 2\)"):
        CaptionTokens(9, 5)(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"CaptionTokens.forward: .* ids from 0 to 8, got 9 at row 0, place 1"):
        CaptionTokens(9, 5)(torch.tensor([[8, 9]]))
    with pytest.raises(ValueError, match="encoder must read tokens of width 516, got 128"):
        PixelPerceiver(PerceiverEncoder(128))
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        FoldedPixelPerceiver(pixels, chunk=0)
    state = transformers_model(2).state_dict()
    state.pop("input_preprocessor.padding.text")
    with pytest.raises(ValueError, match=r"missing \['input_preprocessor.padding.text'\] and unexpected \[\]"):
        PixelPerceiver.from_hf_state_dict(state)

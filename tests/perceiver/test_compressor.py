"""The compressor: what a value depends on, what it ignores, and what is saved."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyalign.perceiver import PerceiverCompressor, PerceiverEncoder, PerceiverSizes
from tinyalign.perceiver.ids import may_look
from tinyalign.perceiver.positions import sinusoids

SIZES = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)


def build(seed=0, **arguments):
    compressor = PerceiverCompressor(12, **{"vocab_size": 40, "sizes": SIZES, **arguments}, seed=seed)
    # Weights large enough that every path shows in the output.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in compressor.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return compressor.eval()


def example(batch=3, patches=6, words=5, text_dim=None):
    image = torch.randn(batch, patches, 12)
    text = torch.randint(1, 40, (batch, words)) if text_dim is None else torch.randn(batch, words, text_dim)
    return image, text


def test_default_is_table_3():
    compressor = PerceiverCompressor(1152)
    assert compressor.sizes == PerceiverSizes(128, 32, 96, 8, 1, 8, 96, 96)
    assert compressor.vocab_size == 30522
    assert compressor(torch.randn(1, 4, 1152), torch.tensor([[101, 30521]])).shape == (1, 32, 96)


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
@pytest.mark.parametrize("text_dim", [None, 10])
def test_image_and_caption_both_move_the_value(fusion, text_dim):
    compressor = build(fusion=fusion, text_dim=text_dim)
    image, text = example(text_dim=text_dim)
    value = compressor(image, text)
    assert value.shape == (3, 4, 8)
    assert (compressor(image.flip(0), text) - value).abs().max() > 1e-3
    assert (compressor(image, text.flip(0)) - value).abs().max() > 1e-3
    assert (compressor(image, text.flip(1)) - value).abs().max() > 1e-3  # word order counts
    assert (compressor(image.flip(1), text) - value).abs().max() > 1e-3  # and so does the place of a patch


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
def test_a_row_depends_on_itself_only(fusion):
    compressor = build(fusion=fusion)
    image, text = example()
    text_mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    image_mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] * 6])
    together = compressor(image, text, image_mask, text_mask)
    for row, (patches, words) in enumerate([(6, 5), (3, 2), (6, 0)]):
        alone = compressor(image[row : row + 1, :patches], text[row : row + 1, :words])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
@pytest.mark.parametrize("text_dim", [None, 10])
def test_padding_on_either_side_and_of_any_content_changes_nothing(fusion, text_dim):
    compressor = build(fusion=fusion, text_dim=text_dim)
    image, text = example(text_dim=text_dim)
    value = compressor(image, text)
    junk = torch.full_like(text[:, :2], -100 if text_dim is None else float("nan"))
    for padded, mask in (
        (torch.cat((text, junk), 1), torch.arange(7) < 5),
        (torch.cat((junk, text), 1), torch.arange(7) >= 2),
    ):
        torch.testing.assert_close(compressor(image, padded, None, mask.expand(3, -1)), value)


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
@pytest.mark.parametrize("text_dim", [None, 10])
def test_masked_nan_reaches_neither_value_nor_gradient(fusion, text_dim):
    compressor = build(fusion=fusion, text_dim=text_dim)
    image, text = example(text_dim=text_dim)
    image_mask, text_mask = torch.rand(image.shape[:2]) < 0.5, torch.rand(text.shape[:2]) < 0.5
    image_mask[0] = text_mask[1] = False
    found = []
    for junk in (0.0, float("nan")):
        image = image.masked_fill(~image_mask[..., None], junk)
        text = text if text_dim is None else text.masked_fill(~text_mask[..., None], junk)
        value = compressor(image, text, image_mask, text_mask)
        grads = torch.autograd.grad(value.square().sum(), list(compressor.parameters()), allow_unused=True)
        with torch.no_grad():
            assert torch.equal(compressor(image, text, image_mask, text_mask), value)
        found.append([value, *(grad for grad in grads if grad is not None)])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*found, strict=True))


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
def test_no_text_is_the_same_in_each_of_its_forms(fusion):
    compressor = build(fusion=fusion)
    image, text = example()
    none = compressor(image)
    torch.testing.assert_close(compressor(image, text[:, :0]), none)
    torch.testing.assert_close(compressor(image, text, None, torch.zeros_like(text, dtype=torch.bool)), none)


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
def test_text_alone_ignores_the_image(fusion):
    compressor = build(fusion=fusion)
    image, text = example()
    nothing = torch.zeros(3, 6, dtype=torch.bool)
    value = compressor(image, text, nothing)
    torch.testing.assert_close(compressor(image * 7 + 1, text, nothing), value)
    torch.testing.assert_close(compressor(image[:, :0], text), value)
    assert value.isfinite().all()
    neither = compressor(image, text, nothing, torch.zeros_like(text, dtype=torch.bool))
    torch.testing.assert_close(neither, neither[:1].expand_as(neither))


def test_text_alone_is_its_own_reading_undiluted():
    compressor = build()
    image, text = example()
    heard = compressor.text_attention(compressor.encoder.latents[None], compressor._embed(text, None, 3))
    nothing = torch.zeros(3, 6, dtype=torch.bool)
    torch.testing.assert_close(compressor(image, text, nothing), compressor.encoder.refine(heard))


def test_balanced_is_the_average_of_two_readings():
    compressor = build()
    image, text = example()
    encoder: PerceiverEncoder = compressor.encoder
    seen = encoder.read(compressor._project(image))
    heard = compressor.text_attention(encoder.latents[None], compressor._embed(text, None, 3))
    torch.testing.assert_close(compressor(image, text), encoder.refine((seen + heard) / 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_features_of_any_precision_run(dtype, weights):
    compressor = build(dtype=weights)
    image, text = example()
    value = compressor(image.to(dtype), text)
    assert value.dtype == weights
    expected = build()(image, text)
    assert (value.float() - expected).abs().max() < 0.15 * expected.abs().max()


def test_a_long_caption_is_an_ordinary_input():
    compressor = build()
    image, _ = example(1)
    text = torch.randint(0, 40, (1, 1300))
    changed = text.clone()
    changed[0, 1299] = (text[0, 1299] + 1) % 40
    assert compressor(image, text).isfinite().all()
    assert not torch.equal(compressor(image, text), compressor(image, changed))


def test_nan_in_one_row_stays_there():
    compressor = build()
    image, text = example()
    value = compressor(image, text)
    image[1, 2, 3] = float("nan")
    spoilt = compressor(image, text)
    assert spoilt[1].isnan().all()
    torch.testing.assert_close(spoilt[[0, 2]], value[[0, 2]])


def test_fitted_scale_makes_the_value_blind_to_units():
    image, _ = example(8, 20)
    units, offset = torch.logspace(-2, 2, 12), torch.linspace(-50, 50, 12)
    plain, rescaled = build(), build()
    plain.fit_image_scale(image)
    rescaled.fit_image_scale(image * units + offset)
    # The floor under the scale of nearly constant channels depends on the units; lift it out of play.
    normal = plain.normalise(image)
    torch.testing.assert_close(normal.mean((0, 1)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 1)), torch.ones(12), atol=1e-2, rtol=0)
    kept = units > 0.02 * units.mean()
    got = rescaled.normalise(image * units + offset)[..., kept]
    torch.testing.assert_close(got, normal[..., kept], atol=2e-3, rtol=0)
    # The normalisation that is folded into the projection is this one.
    places = sinusoids(torch.arange(20), 16)
    torch.testing.assert_close(plain._project(image), plain.image_projection(normal) + places, atol=1e-5, rtol=0)


def test_scale_skips_padding_and_refuses_nan():
    compressor = build()
    image, _ = example(8, 20)
    mask = torch.arange(20)[None].expand(8, -1) < 15
    spoilt = image.masked_fill(~mask[..., None], float("nan"))
    compressor.fit_image_scale(spoilt, mask)
    torch.testing.assert_close(compressor.image_mean, image[:, :15].mean((0, 1)))
    with pytest.raises(ValueError, match="all finite, got 160 of which 120 are finite"):
        compressor.fit_image_scale(spoilt)
    with pytest.raises(ValueError, match="at least two kept patches, all finite, got 1"):
        compressor.fit_image_scale(image[:1, :1])


def test_the_seed_decides_every_weight_and_the_value():
    image, text = example()
    one, same, other = (PerceiverCompressor(12, vocab_size=40, sizes=SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one(image, text), same(image, text))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    drawn = {name for name, weight in one.named_parameters() if weight.dim() > 1}
    assert all(not torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in drawn)


def test_the_fingerprint_sees_a_single_weight_and_the_number_of_heads():
    one, other = build(), build()
    assert one.fingerprint() == other.fingerprint()
    other.encoder.latents.data[0, 0] += 1e-6
    assert one.fingerprint() != other.fingerprint()
    heads = PerceiverCompressor(12, vocab_size=40, sizes=SIZES._replace(num_heads=4))
    assert heads.fingerprint() != PerceiverCompressor(12, vocab_size=40, sizes=SIZES).fingerprint()


@pytest.mark.parametrize("arguments", [{}, {"text_dim": 10}, {"fusion": "joint"}, {"dtype": torch.bfloat16}], ids=str)
def test_save_then_load_is_the_identity(tmp_path, arguments):
    compressor = build(seed=5, **arguments)
    image, text = example(text_dim=arguments.get("text_dim"))
    compressor.fit_image_scale(image)
    compressor.save_pretrained(tmp_path / "compressor")
    loaded = PerceiverCompressor.from_pretrained(tmp_path / "compressor")
    assert loaded.fingerprint() == compressor.fingerprint()
    assert torch.equal(loaded(image, text), compressor(image, text))
    assert sorted(p.name for p in (tmp_path / "compressor").iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    folder = tmp_path / "compressor"
    with pytest.raises(FileNotFoundError, match=r"got no config.json in .*compressor"):
        PerceiverCompressor.from_pretrained(folder)
    build().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")

    def edited(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    edited(format=2)
    with pytest.raises(ValueError, match="in format 1, got class 'PerceiverCompressor' in format 2"):
        PerceiverCompressor.from_pretrained(folder)
    edited(dtype="load")
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'load'"):
        PerceiverCompressor.from_pretrained(folder)
    edited(depth=3)
    with pytest.raises(ValueError, match=r"missing \[\] and unexpected \['depth'\]"):
        PerceiverCompressor.from_pretrained(folder)
    edited(image_dim=13)
    with pytest.raises(ValueError, match=r"image_mean must be torch.float32 of shape \(13,\), got .* shape \(12,\)"):
        PerceiverCompressor.from_pretrained(folder)
    edited()
    del weights["encoder.latents"]
    save_file({**weights, "stray": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['encoder.latents'\] and unexpected \['stray'\]"):
        PerceiverCompressor.from_pretrained(folder)


def test_a_damaged_file_is_named(tmp_path):
    folder = tmp_path / "compressor"
    build().save_pretrained(folder)
    config = (folder / "config.json").read_text()
    for text in ("", config[:-9], "[1, 2]", "3"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"compressor/config.json must be a JSON object, got .+ copy it"):
            PerceiverCompressor.from_pretrained(folder)
    (folder / "config.json").write_text(config)
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, len(whole) // 2):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"compressor/model.safetensors must be a whole safetensors file, got \w+"):
            PerceiverCompressor.from_pretrained(folder)


def test_wrong_inputs_are_refused():
    compressor, embedding = build(), build(text_dim=10)
    image, text = example()
    with pytest.raises(ValueError, match=r"last size 12, got \(3, 6, 11\)"):
        compressor(image[..., :11], text)
    with pytest.raises(TypeError, match=r"image_features must be floating point, got torch.int64"):
        compressor(image.long(), text)
    with pytest.raises(ValueError, match=r"token ids of shape \(B, T\), got torch.float32 of shape \(3, 5, 10\)"):
        compressor(image, torch.zeros(3, 5, 10))
    with pytest.raises(ValueError, match=r"last size 10, got \(3, 5\)"):
        embedding(image, text)
    with pytest.raises(ValueError, match="text must have the batch of image_features, got 2 and 3"):
        compressor(image, text[:2])
    with pytest.raises(ValueError, match=r"text_mask must have shape \(3, 5\), got \(3, 4\)"):
        compressor(image, text, None, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="image_mask must be boolean"):
        compressor(image, text, torch.ones(3, 6))
    with pytest.raises(ValueError, match="fusion must be 'balanced' or 'joint', got 'sum'"):
        build(fusion="sum")
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 1, got 0"):
        build(vocab_size=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stray", [40, -1])
def test_an_id_outside_the_table_is_named(training, stray):
    compressor = build().train(training)
    image, text = example()
    text[1, 2] = stray
    with pytest.raises(ValueError, match=f"ids from 0 to 39, got {stray} at row 1, place 2"):
        compressor(image, text)
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[1, 2] = False
    assert compressor(image, text, None, mask).isfinite().all()  # padding may be any number


def test_ids_are_looked_at_only_where_nobody_waits_for_it(monkeypatch):
    """Stand-ins for tensors elsewhere: what counts is where they are, and what the step is for."""
    compressor, image = build(), example()[0]
    text = torch.full((3, 5), 99)
    compiled = torch.compile(compressor, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"index out of range|out of bounds"):  # torch's own: nothing looked before
        compiled(image, text)
    here, meta = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long, device="meta")
    assert may_look(here, training=True)
    assert not may_look(meta, training=False)
    cuda = types.SimpleNamespace(is_meta=False, is_cuda=True, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not may_look(cuda, training=True)
    assert may_look(cuda, training=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not may_look(cuda, training=False)


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
@pytest.mark.parametrize(("patches", "words"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_shortest_sequences_are_ordinary_inputs(fusion, patches, words):
    compressor = build(fusion=fusion)
    image, text = example()
    value = compressor(image[:, :patches], text[:, :words])
    assert value.shape == (3, 4, 8)
    assert value.isfinite().all()
    moved = (value[0] - value[1]).abs().max() > 1e-4
    assert moved == (patches + words > 0)


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
def test_a_batch_without_rows_is_an_ordinary_input(fusion):
    image, text = example()
    mask = torch.zeros(0, 5, dtype=torch.bool)
    assert build(fusion=fusion)(image[:0], text[:0], None, mask).shape == (0, 4, 8)


def test_the_config_names_every_argument_of_the_constructor():
    config = build(seed=3, text_dim=10, dtype=torch.bfloat16).config()
    assert config == {
        "image_dim": 12,
        "vocab_size": 0,
        "text_dim": 10,
        "sizes": {**SIZES._asdict(), "qk_channels": 8, "v_channels": 8},
        "fusion": "balanced",
        "seed": 3,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("fusion", ["balanced", "joint"])
@pytest.mark.parametrize("text_dim", [None, 10])
def test_autocast_changes_the_precision_only(fusion, text_dim):
    compressor = PerceiverCompressor(12, vocab_size=40, text_dim=text_dim, sizes=SIZES, fusion=fusion)
    image = torch.randn(3, 7, 12)
    text = torch.randint(0, 40, (3, 5)) if text_dim is None else torch.randn(3, 5, text_dim)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    expected = compressor(image, text, None, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compressor(image, text, None, mask)
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().sum().backward()


def test_sizes_come_by_name():
    with pytest.raises(TypeError, match=r"sizes must be PerceiverSizes, got {'num_latents': 4}. Write PerceiverSizes"):
        PerceiverCompressor(12, sizes={"num_latents": 4})


def test_ids_may_be_any_integers_and_a_mask_is_none():
    compressor = PerceiverCompressor(12, vocab_size=40, sizes=SIZES)
    image, ids = torch.randn(2, 7, 12), torch.randint(0, 40, (2, 5))
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(compressor(image, ids.to(kind)), compressor(image, ids))
    with pytest.raises(ValueError, match=r"text must be token ids of shape \(B, T\), got torch.bool of shape \(2, 5\)"):
        compressor(image, ids.bool())


def test_the_scale_is_not_fitted_under_a_mask_that_does_not_fit():
    compressor, image = PerceiverCompressor(12, vocab_size=40, sizes=SIZES), torch.randn(2, 7, 12)
    with pytest.raises(ValueError, match=r"fit_image_scale: image_mask must have shape \(2, 7\), got \(2, 6\)"):
        compressor.fit_image_scale(image, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"fit_image_scale: image_mask must be boolean .* got torch.int64"):
        compressor.fit_image_scale(image, torch.ones(2, 7, dtype=torch.long))
    assert not compressor.image_scale_is_fitted

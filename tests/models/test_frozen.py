"""Features computed once: the same losses, answers and neighbours as the long way gives."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import DigitScenes, LlavaCollator
from tinyalign.memory import AttentionPooledKey, Neighbours
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.frozen import (
    FoundNeighbours,
    caption_recall,
    compress_samples,
    find_neighbours,
    freeze_samples,
    frozen_bank,
    pixel_latents,
)
from tinyalign.models.frozen_training import (
    SMALL_SIZES,
    fit_compressor,
    fit_frozen,
    fit_small_compressor,
    score_frozen,
    small_encoder,
)
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import (
    LossWeights,
    PerceiverCompressor,
    PerceiverEncoder,
    PerceiverPretrainer,
    PerceiverSizes,
    PixelPerceiver,
)
from tinyalign.perceiver.pixels import TOKEN_CHANNELS

SIZES = PerceiverSizes(token_dim=16, num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scenes = DigitScenes("train", 12, task="both")
    parts = write_tiny_parts(tmp_path_factory.mktemp("parts"), [t.text for sample in scenes for t in sample.turns])
    pictures, words = AutoImageProcessor.from_pretrained(parts.vision), AutoTokenizer.from_pretrained(parts.llm)
    compressor = PerceiverCompressor(64, vocab_size=len(words), sizes=SIZES)
    encode = SampleEncoder(
        PairEncoder(AutoModel.from_pretrained(parts.vision), compressor, AttentionPooledKey()), pictures, words
    )
    frozen = freeze_samples(scenes, encode)
    bank = frozen_bank(frozen, compress_samples(frozen, encode))

    def model(arm: str = "bank") -> TinyAlignVLM:
        built: TinyAlignVLM = TinyAlignVLM.from_parts(
            encode.encoder.vision.tower,
            AutoModelForCausalLM.from_pretrained(parts.llm),
            tokenizer=words,
            memory=bank,
            num_neighbours=2,
            retrieval=arm,
        )
        return built

    return SimpleNamespace(scenes=scenes, encode=encode, frozen=frozen, bank=bank, model=model, words=words)


def test_images_are_encoded_once_and_belong_to_their_samples(world: Any) -> None:
    assert world.frozen.features.shape[0] == 12
    assert len(world.frozen) == len(world.scenes)
    for row in (0, 7, 33):
        features, _ = world.encode.features([world.scenes[row]])
        torch.testing.assert_close(world.frozen.features[world.frozen.image_of[row]], features[0])
        torch.testing.assert_close(
            world.frozen.queries[world.frozen.image_of[row]], world.encode.queries([world.scenes[row]])[0]
        )


def test_loss_equals_the_collators_with_pixels_and_live_search(world: Any) -> None:
    model = world.model().eval()
    rows = torch.tensor([2, 11, 40])
    processor = TinyAlignProcessor.for_model(model, world.encode.image_processor, world.words)
    live = model(**LlavaCollator(processor)([world.scenes[i] for i in rows.tolist()]))
    found = find_neighbours(world.bank, world.frozen, k=2)
    again = model(**world.frozen.batch(rows), **found.batch(rows))
    torch.testing.assert_close(again.per_sample_nll, live.per_sample_nll)
    assert torch.equal(found.neighbours.ids[rows], live.neighbour_ids)
    assert torch.equal(found.take([11]).neighbours.ids[0], live.neighbour_ids[1])
    scores = score_frozen(model, world.frozen.take(rows), found.take(rows))
    torch.testing.assert_close(scores.nll.float(), live.per_sample_nll)
    assert scores.per_token == pytest.approx(float(live.loss.detach()), rel=1e-5)


def test_samples_never_find_themselves_or_their_twins(world: Any) -> None:
    group_of = dict(zip(world.bank.ids.tolist(), world.bank.groups.tolist(), strict=True))
    found = find_neighbours(world.bank, world.frozen, k=4).neighbours
    own = world.frozen.rows["groups"]
    assert all(group_of[i] != int(own[row]) for row, ids in enumerate(found.ids) for i in ids.tolist())
    leak = find_neighbours(world.bank, world.frozen, arm="self", k=5).neighbours  # five samples per scene
    assert all(group_of[i] == int(own[row]) for row, ids in enumerate(leak.ids) for i in ids.tolist())


def test_correct_is_what_greedy_generation_writes(world: Any) -> None:
    model = world.model().freeze_for("instruct")
    part = world.frozen.take([i for i in range(len(world.scenes)) if i % 5 == 1])  # one question per scene
    found = find_neighbours(world.bank, part, k=2)
    curve = fit_frozen(model, part, found, steps=25, rate=3e-3, batch_size=6)
    assert curve[-1] < curve[0]
    assert not model.training
    scores = score_frozen(model, part, found, batch_size=5)
    processor = TinyAlignProcessor.for_model(model, world.encode.image_processor, world.words)
    prompts = processor(
        text=[processor.prompt(sample.turns[0].text) for sample in part.samples],
        images=[sample.images[0] for sample in part.samples],
    )
    said = model.generate(**prompts, **found.batch(torch.arange(len(part))), max_new_tokens=5, do_sample=False)
    wanted = [row[row != -100].tolist() for row in part.rows["labels"]]
    right = [new[: len(want)].tolist() == want for new, want in zip(said, wanted, strict=True)]
    assert scores.correct.tolist() == right
    assert 0 < sum(right) < len(right)
    assert scores.accuracy == sum(right) / len(right)


def test_arms_see_the_same_batches_and_runs_repeat(world: Any) -> None:
    first, second = (fit_frozen(world.model("off"), world.frozen, steps=3, rate=1e-3, seed=4) for _ in range(2))
    other = fit_frozen(world.model("off"), world.frozen, steps=3, rate=1e-3, seed=5)
    assert first == second != other
    generator = torch.Generator().manual_seed(4)
    rows = torch.randperm(len(world.frozen), generator=generator)[:16]
    assert first[0] == pytest.approx(world.model("off").train()(**world.frozen.batch(rows)).loss.item(), rel=1e-6)


def test_padding_that_no_row_needs_is_left_out(world: Any) -> None:
    lengths = world.frozen.rows["attention_mask"].sum(dim=1)
    short = int(lengths.argmin())
    assert world.frozen.batch(torch.tensor([short]))["input_ids"].shape[1] == int(lengths.min()) < int(lengths.max())


def test_the_compressor_learns_and_is_frozen_afterwards(world: Any) -> None:
    encode = copy.deepcopy(world.encode)
    pretrainer = PerceiverPretrainer(encode.encoder.compressor, hidden_dim=16)
    curve = fit_compressor(pretrainer, world.frozen, encode, steps=30, batch_size=16)
    assert sum(curve[-5:]) < 0.95 * sum(curve[:5])
    assert not any(weight.requires_grad for weight in encode.encoder.compressor.parameters())
    texts = [note["text"] for note in world.bank.metadata(world.bank.ids)]
    assert texts[0] == world.scenes[0].turns[1].text


def test_the_papers_values_read_pixels_and_bytes(world: Any) -> None:
    encoder = PerceiverEncoder(TOKEN_CHANNELS, num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2)
    perceiver = PixelPerceiver(encoder, image_size=32, vocab_size=262).eval()
    part = world.frozen.take([0, 5, 9, 10, 31])
    found = pixel_latents(part, perceiver, world.encode.image_processor, batch_size=2)
    assert found.shape == (5, 3, 8)
    for row, sample in enumerate(part.samples):
        pixels = world.encode.image_processor(images=[sample.images[0]], return_tensors="pt")["pixel_values"]
        text = " ".join(turn.text for turn in sample.turns if turn.role == "assistant")
        ids = torch.tensor([[4, *(6 + byte for byte in text.encode()), 5]])  # the byte vocabulary of Perceiver IO
        torch.testing.assert_close(found[row], perceiver(pixels, ids)[0], rtol=1e-4, atol=1e-5)


def test_recall_counts_samples_with_a_neighbour_of_the_same_words(world: Any) -> None:
    """By hand: neighbours are given as places in the bank, which holds the samples in their order."""
    part = world.frozen.take([0, 1, 2, 5])
    texts = [note["text"] for note in world.bank.metadata(world.bank.ids)]
    other = next(at for at, text in enumerate(texts) if text != texts[2])
    rows = torch.tensor([[0, 7], [3, 1], [other, -1], [-1, -1]])
    ids = torch.where(rows < 0, -1, world.bank.ids[rows])
    found = FoundNeighbours(world.bank, Neighbours(torch.zeros(4, 2), ids, ids >= 0))
    assert caption_recall(part, found) == 0.5


def test_bad_input_is_named(world: Any) -> None:
    with pytest.raises(ValueError, match=r"freeze_samples: samples must hold at least one sample, got none\."):
        freeze_samples([], world.encode)
    two = world.scenes[0]._replace(images=world.scenes[0].images * 2)
    with pytest.raises(ValueError, match=r"samples must have one image each, got 2 in 'train/0/2/0/caption'\."):
        freeze_samples([two], world.encode)
    with pytest.raises(ValueError, match=r"fit_frozen: steps must be .* got 0"):
        fit_frozen(world.model("off"), world.frozen, steps=0, rate=1e-3)
    with pytest.raises(ValueError, match=r"fit_compressor: steps must be .* got -1"):
        fit_compressor(PerceiverPretrainer(world.encode.encoder.compressor), world.frozen, world.encode, steps=-1)
    broken = world.model("off")
    torch.nn.init.constant_(broken.connector.layers[0].weight, float("nan"))
    with pytest.raises(RuntimeError, match=r"fit_frozen: the loss must stay finite, got nan at step 0"):
        fit_frozen(broken, world.frozen, steps=2, rate=1e-3)


def test_an_experiments_compressor_trains_as_its_parts_by_hand(world: Any) -> None:
    def build() -> SampleEncoder:
        return small_encoder(world.encode.encoder.vision.tower, world.encode.image_processor, world.words, seed=4)

    encode, by_hand = build(), build()
    curve = fit_small_compressor(encode, world.frozen, steps=3, seed=5)
    pretrainer = PerceiverPretrainer(
        by_hand.encoder.compressor,
        loss_weights=LossWeights(image=0.1, bag=0.3),
        mixed_captions=0.0,
        hidden_dim=64,
        seed=5,
    )
    assert curve == fit_compressor(pretrainer, world.frozen, by_hand, steps=3, seed=5)
    trained = encode.encoder.compressor
    assert not any(weight.requires_grad for weight in trained.parameters())
    for one, other in zip(trained.parameters(), by_hand.encoder.compressor.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert compress_samples(world.frozen, encode).shape[1:] == (SMALL_SIZES.num_latents, SMALL_SIZES.latent_dim)

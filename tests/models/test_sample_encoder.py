"""From samples to a bank, to a model that asks it: the whole way, with every part in its real form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import DigitScenes, LlavaCollator, LlavaDataset, Sample, Turn, stable_id, write_llava
from tinyalign.memory import AttentionPooledKey, MemoryBank, build_memory_bank
from tinyalign.models import PairEncoder, SampleEncoder, TinyAlignProcessor, TinyAlignVLM
from tinyalign.models.sample_encoder import caption_of
from tinyalign.models.tiny import write_tiny_parts
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LLaVA file of six scenes with five samples each, its bank, and a model over that bank."""
    folder = tmp_path_factory.mktemp("world")
    scenes = DigitScenes("memory", 6, task="both")
    dataset = LlavaDataset(write_llava(scenes, folder / "data.json", folder / "images"), folder / "images")
    parts = write_tiny_parts(folder, [turn.text for sample in scenes for turn in sample.turns])
    tower, tokenizer = AutoModel.from_pretrained(parts.vision), AutoTokenizer.from_pretrained(parts.llm)
    pictures = AutoImageProcessor.from_pretrained(parts.vision)
    sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=16, num_self_attends=1, num_heads=2)
    compressor = PerceiverCompressor(64, vocab_size=len(tokenizer), sizes=sizes)
    encode = SampleEncoder(PairEncoder(tower, compressor, AttentionPooledKey()), pictures, tokenizer)
    bank = build_memory_bank(
        dataset, encode, folder / "bank", batch_size=7, fingerprint=encode.fingerprint(), progress=False
    )
    llm = AutoModelForCausalLM.from_pretrained(parts.llm)
    model = TinyAlignVLM.from_parts(tower, llm, tokenizer=tokenizer, memory=bank, compressor=compressor)
    processor = TinyAlignProcessor.for_model(model, pictures, tokenizer)
    return {
        "dataset": dataset,
        "encode": encode,
        "bank": bank,
        "model": model,
        "processor": processor,
        "folder": folder,
    }


def test_the_model_asks_with_the_very_keys_of_the_bank(world: dict[str, Any]) -> None:
    """Keys of another encoder, layer or pooling collapse retrieval; here a sample finds its own entry with score 1."""
    batch = LlavaCollator(world["processor"])(world["dataset"][:10])
    leak = world["model"].eval()(**batch, retrieval="self")
    torch.testing.assert_close(leak.neighbour_scores[:, 0], torch.ones(10), rtol=0, atol=2e-3)
    groups = {int(i): int(g) for i, g in zip(world["bank"].ids, world["bank"].groups, strict=True)}
    assert [groups[int(i)] for i in leak.neighbour_ids[:, 0]] == batch["groups"].tolist()
    whole = world["encode"].queries(world["dataset"][:10])
    alone = torch.cat([world["encode"].queries([sample]) for sample in world["dataset"][:10]])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-6)


def test_no_sample_is_shown_its_own_picture_in_training(world: dict[str, Any]) -> None:
    batch = LlavaCollator(world["processor"])(list(world["dataset"]))
    found = world["model"].train()(**batch).neighbour_ids
    groups = {int(i): int(g) for i, g in zip(world["bank"].ids, world["bank"].groups, strict=True)}
    for row, group in zip(found.tolist(), batch["groups"].tolist(), strict=True):
        assert group not in {groups[entry] for entry in row}
        assert len(row) == 5
    unnamed = {name: value for name, value in batch.items() if name != "groups"}  # the bank knows the groups, too
    assert torch.equal(world["model"](**unnamed).neighbour_ids, found)


def test_the_bank_says_what_it_holds(world: dict[str, Any]) -> None:
    bank, dataset = world["bank"], world["dataset"]
    assert len(bank) == len(dataset) == 30
    (note,) = bank.metadata([dataset[0].sample_id])
    assert note == {"id": dataset[0].id, "text": dataset[0].turns[1].text}
    assert bank.fingerprint["value.tokenizer"].endswith(f":{len(world['encode'].tokenizer)}")
    again = MemoryBank.load(world["folder"] / "bank", mmap=True)
    world["model"].memory = again
    assert again.fingerprint == bank.fingerprint


def test_captions_are_in_the_values_and_not_in_the_keys(world: dict[str, Any]) -> None:
    sample = world["dataset"][0]
    other = sample._replace(turns=(sample.turns[0], Turn("assistant", "a green 9 .")))
    one, two = world["encode"]([sample]), world["encode"]([other])
    assert torch.equal(one.keys, two.keys)
    assert not torch.allclose(one.values, two.values, atol=1e-4)


def test_padding_and_batch_mates_change_no_value(world: dict[str, Any]) -> None:
    """Captions of different lengths and samples of one and two images, together and alone."""
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    turns = (Turn("user", "<image><image>"), Turn("assistant", "a red 3 and a blue 7 ."))
    samples = [Sample("two", 1, 1, (red, blue), turns), world["dataset"][0], world["dataset"][1]]
    together = world["encode"](samples)
    for at, sample in enumerate(samples):
        alone = world["encode"]([sample])
        torch.testing.assert_close(together.values[at], alone.values[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.keys[at], alone.keys[0], rtol=0, atol=1e-6)


def test_a_caption_of_any_length_is_cut_and_not_refused(world: dict[str, Any]) -> None:
    encode = SampleEncoder(
        world["encode"].encoder, world["encode"].image_processor, world["encode"].tokenizer, max_text_tokens=6
    )
    sample = world["dataset"][0]._replace(turns=(Turn("user", "<image>"), Turn("assistant", "a red 3 " * 600)))
    cut = sample._replace(turns=(Turn("user", "<image>"), Turn("assistant", "a red 3 " * 2)))
    assert torch.equal(encode([sample]).values, encode([cut]).values)
    silent = sample._replace(turns=(Turn("user", "<image>"), Turn("assistant", "")))
    assert torch.isfinite(encode([silent, sample]).values).all()


def test_a_sample_without_an_image_has_no_key(world: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="samples must have an image to be found by, got 'words' without"):
        world["encode"]([Sample("words", 1, 1, (), (Turn("assistant", "x"),))])


def test_a_caption_is_what_is_said() -> None:
    def sample(*turns: Turn) -> Sample:
        return Sample("a", 1, 1, (), turns)

    assert (
        caption_of(sample(Turn("system", "Be brief."), Turn("user", "Describe.<image>"), Turn("assistant", "A rose.")))
        == "A rose."
    )
    several = sample(
        Turn("user", "<image>\nRed?"), Turn("assistant", "yes"), Turn("user", "Blue?"), Turn("assistant", "no")
    )
    assert caption_of(several) == "Red? yes Blue? no"


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    turns = (Turn("system", "Be brief."), Turn("user", "<image> or <image>?"), Turn("assistant", "Red."))
    samples = [
        Sample("two", stable_id("two"), 7, (red, blue), turns),
        Sample("none", stable_id("none"), 8, (), (Turn("user", "Why?"), Turn("assistant", "So."))),
    ]
    read = LlavaDataset(write_llava(samples, tmp_path / "x" / "data.json", tmp_path / "y"), tmp_path / "y")
    assert [sample.turns for sample in read] == [sample.turns for sample in samples]
    assert [Image.open(path).getpixel((0, 0)) for path in read[0].images] == [(255, 0, 0), (0, 0, 255)]
    assert [sample.sample_id for sample in read] == [sample.sample_id for sample in samples]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_backbones_ask_the_same_bank(world: dict[str, Any], dtype: torch.dtype) -> None:
    """A float16 image used to crash the compressor, and a bfloat16 query numpy."""
    import copy

    batch = LlavaCollator(world["processor"])(world["dataset"][:4])
    exact = world["model"].eval()(**batch)
    half = copy.deepcopy(world["model"])
    half.vision.to(dtype)
    half.language_model.to(dtype)
    found = half(**batch)
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    assert (found.neighbour_scores - exact.neighbour_scores).abs().max() < 0.02

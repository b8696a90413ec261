from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tinyalign.data import DigitScenes, LlavaCollator, PlainRenderer, Sample, Turn, stable_id


def sample(name: str, ask: str, answer: str | None, *colours: int) -> Sample:
    images = tuple(Image.new("RGB", (2, 2), (colour, 0, 0)) for colour in colours)
    turns = (Turn("user", ask),) if answer is None else (Turn("user", ask), Turn("assistant", answer))
    return Sample(name, stable_id(name), 5, images, turns)


@pytest.mark.parametrize("bos", [False, True])
def test_a_batch_by_hand(build_tokenizer: Any, build_processor: Any, bos: bool) -> None:
    tokenizer = build_tokenizer(bos=bos)
    batch = LlavaCollator(build_processor(tokenizer))([sample("a", "<image>Q", "yes", 10), sample("b", "Q", "n")])
    head = [1] if bos else []

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    first = head + ids("USER: ") + [-200] * 3 + ids("Q ASSISTANT:") + ids(" yes</s>")
    second = head + ids("USER: Q ASSISTANT:") + ids(" n</s>")
    pad = [0] * (len(first) - len(second))
    assert batch["input_ids"].tolist() == [first, second + pad]
    assert batch["attention_mask"].tolist() == [[True] * len(first), [True] * len(second) + [False] * len(pad)]
    assert batch["attention_mask"].dtype == torch.bool
    expected = [
        [-100] * (len(row) - len(ids(end))) + ids(end) for row, end in ((first, " yes</s>"), (second, " n</s>"))
    ]
    assert batch["labels"].tolist() == [expected[0], expected[1] + [-100] * len(pad)]
    assert batch["image_counts"].tolist() == [1, 0]
    assert batch["sample_ids"].tolist() == [stable_id("a"), stable_id("b")]
    assert batch["groups"].tolist() == [5, 5]
    assert batch["max_supervised_tokens"] == 5
    assert batch["pixel_values"].shape == (1, 3, 2, 2)


def test_images_come_in_row_order(build_tokenizer: Any, build_processor: Any) -> None:
    rows = [sample("a", "<image> <image>?", "x", 10, 20), sample("b", "?", "x"), sample("c", "?<image>", "x", 30)]
    batch = LlavaCollator(build_processor(build_tokenizer(bos=True)))(rows)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [10.0, 20.0, 30.0]
    assert batch["image_counts"].tolist() == [2, 0, 1]


def test_a_batch_without_images_has_no_pixels(build_tokenizer: Any, build_processor: Any) -> None:
    assert "pixel_values" not in LlavaCollator(build_processor(build_tokenizer(bos=True)))([sample("a", "?", "x")])


def test_rows_do_not_depend_on_their_batch(build_tokenizer: Any, build_processor: Any) -> None:
    collate = LlavaCollator(build_processor(build_tokenizer(bos=True)))
    short, long = sample("a", "?", "x"), sample("b", "<image> " + "long " * 20, "y" * 30, 1)
    alone, together = collate([short]), collate([long, short])
    width = alone["input_ids"].shape[1]
    assert torch.equal(together["input_ids"][1, :width], alone["input_ids"][0])
    assert torch.equal(together["labels"][1, :width], alone["labels"][0])
    assert not together["attention_mask"][1, width:].any()


@pytest.mark.parametrize("bos", [False, True])
def test_a_sample_without_answer_tokens_is_named(build_tokenizer: Any, build_processor: Any, bos: bool) -> None:
    with pytest.raises(ValueError, match=r"sample 'silent' must have answer tokens to learn from, got \['user'\]"):
        LlavaCollator(build_processor(build_tokenizer(bos=bos)))([sample("silent", "?", None)])


def test_placeholders_and_images_must_match(build_tokenizer: Any, build_processor: Any) -> None:
    with pytest.raises(
        ValueError, match=r"sample 'odd' must hold one <image> per image, got 2 placeholders for 1 images"
    ):
        LlavaCollator(build_processor(build_tokenizer(bos=True)))([sample("odd", "<image><image>", "x", 1)])


def test_an_unreadable_image_names_its_sample(build_tokenizer: Any, build_processor: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    broken = sample("torn", "<image>", "x", 1)._replace(images=(tmp_path / "bad.png",))
    with pytest.raises(ValueError, match=r"sample 'torn': load_image: image must be a readable picture"):
        LlavaCollator(build_processor(build_tokenizer(bos=True)))([broken])


def test_an_empty_batch_is_refused(build_tokenizer: Any, build_processor: Any) -> None:
    with pytest.raises(ValueError, match="samples must hold at least one sample, got none"):
        LlavaCollator(build_processor(build_tokenizer(bos=True)))([])


def test_retrieval_tokens_count_before_anything_is_cut(build_tokenizer: Any, build_processor: Any) -> None:
    """320 retrieval tokens silently cut answers in earlier code; here they are part of the budget, and it is said."""
    tokenizer = build_tokenizer(bos=True)
    row = sample("a", "<image>?", "0123456789", 1)
    whole = LlavaCollator(build_processor(tokenizer))([row])["input_ids"].shape[1]
    fits = LlavaCollator(build_processor(tokenizer, num_retrieval_tokens=20), max_length=whole + 20)
    assert fits([row])["input_ids"].shape[1] == whole
    assert fits.measure([row]) == (1, 0, 0, 0, whole + 20)
    tight = LlavaCollator(build_processor(tokenizer, num_retrieval_tokens=20), max_length=whole + 17)
    with pytest.warns(UserWarning, match=r"sample 'a' loses 3 tokens to max_length=.*20 of it for retrieval"):
        cut = tight([row])
    assert cut["input_ids"].shape[1] == whole - 3
    assert tight.measure([row, row]) == (2, 2, 6, 6, whole + 20)


def test_an_image_is_never_cut(build_tokenizer: Any, build_processor: Any) -> None:
    processor = build_processor(build_tokenizer(bos=True), num_image_tokens=50)
    with pytest.raises(ValueError, match=r"sample 'a' must keep its images and an answer token within max_length=40"):
        LlavaCollator(processor, max_length=40)([sample("a", "<image>?", "yes", 1)])
    turns = (Turn("user", "?"), Turn("assistant", "x"), Turn("user", "<image>?"), Turn("assistant", "y"))
    late = sample("late", "?", "x", 1)._replace(turns=turns)  # an answer fits, the image after it does not
    with pytest.raises(ValueError, match=r"sample 'late' must keep its images"):
        LlavaCollator(processor, max_length=40)([late])
    with pytest.raises(ValueError, match=r"LlavaCollator: max_length must be an integer of at least 1, got 0"):
        LlavaCollator(processor, max_length=0)


def test_further_entries_are_made_beside_the_batch(build_tokenizer: Any, build_processor: Any) -> None:
    collate = LlavaCollator(
        build_processor(build_tokenizer(bos=True)),
        renderer=PlainRenderer(build_tokenizer(bos=True)),
        extra=lambda samples: {"neighbour_ids": torch.tensor([[len(s.turns), 7] for s in samples])},
    )
    batch = collate([sample("a", "<image> Describe.", "x", 1)])
    assert batch["neighbour_ids"].tolist() == [[2, 7]]
    assert "Describe" not in collate.processor.tokenizer.decode(batch["input_ids"][0].clamp(min=0))


def test_a_tokenizer_without_padding_gets_any_id(build_tokenizer: Any, build_processor: Any) -> None:
    tokenizer = build_tokenizer(bos=True)
    tokenizer.pad_token = None
    batch = LlavaCollator(build_processor(tokenizer))([sample("a", "?", "x"), sample("b", "?", "longer")])
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
    assert (batch["labels"][0][~batch["attention_mask"][0]] == -100).all()


def test_digit_scenes_collate_like_any_data(build_tokenizer: Any, build_processor: Any) -> None:
    scenes = DigitScenes("train", 3, seed=1)
    batch = LlavaCollator(build_processor(build_tokenizer(bos=True)))(scenes[:3])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["sample_ids"].tolist() == [scene.sample_id for scene in scenes]

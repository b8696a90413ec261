from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinyalign.data import LlavaCollator, PlainRenderer, Sample, Turn
from tinyalign.models import TinyAlignProcessor


def tokenizer() -> PreTrainedTokenizerFast:
    words = {
        w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "?", "USER", "ASSISTANT", ":", "what", "is", "it", "red"])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pictures() -> Any:
    return SiglipImageProcessorPil(size={"height": 16, "width": 16})


def make(**options: Any) -> TinyAlignProcessor:
    options.setdefault("num_image_tokens", 4)
    return TinyAlignProcessor(pictures(), tokenizer(), **options)


RED, BLUE = Image.new("RGB", (20, 30), "red"), Image.new("RGB", (8, 8), "blue")


def test_prompts_become_left_padded_rows() -> None:
    inputs = make()(images=[RED], text=["<image> what is it", "red"])
    assert inputs["input_ids"].tolist() == [[-200] * 4 + [7, 8, 9], [0] * 6 + [10]]
    assert inputs["attention_mask"].tolist() == [[True] * 7, [False] * 6 + [True]]
    assert inputs["image_counts"].tolist() == [1, 0]
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    right = make()(images=RED, text=["<image> what is it", "red"], padding_side="right")
    assert right["attention_mask"][1].tolist() == [True] + [False] * 6


def test_pictures_keep_their_order_and_colour() -> None:
    inputs = make()(images=[[RED, BLUE], [], [BLUE]], text=["<image> <image> red", "red", "it <image>"])
    assert inputs["image_counts"].tolist() == [2, 0, 1]
    means = inputs["pixel_values"].mean(dim=(2, 3))  # SigLIP maps 0 to -1 and 255 to 1
    expected = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=0)


def test_the_prompt_is_what_the_collator_trains_on(build: Any) -> None:
    """One row of a training batch, up to its answer, is the row that generation gets."""
    processor = make(num_retrieval_tokens=6)
    for renderer in (None, PlainRenderer(processor.tokenizer)):
        turns = (Turn("user", "<image>\nwhat is it ?"), Turn("assistant", "red"))
        batch = LlavaCollator(processor, renderer=renderer)([Sample("a", 1, 1, (RED,), turns)])
        prompt = processor.prompt("what is it ?", renderer=renderer)
        asked = processor(images=RED, text=prompt)["input_ids"][0].tolist()
        answer = int((batch["labels"][0] != -100).nonzero()[0])
        assert batch["input_ids"][0, :answer].tolist() == asked


def test_a_prompt_gets_the_placeholders_it_lacks() -> None:
    assert make().prompt("it ?", num_images=2) == "USER: <image>\n<image>\nit ? ASSISTANT:"
    assert make().prompt("it <image> ?") == "USER: it <image> ? ASSISTANT:"
    assert make().prompt("it ?", num_images=0) == "USER: it ? ASSISTANT:"


def test_a_saved_processor_is_the_same(build: Any, tmp_path: Path) -> None:
    model = build.model()
    processor = TinyAlignProcessor.for_model(model, pictures(), tokenizer())
    assert (processor.num_image_tokens, processor.num_retrieval_tokens) == (4, 6)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is TinyAlignProcessor
    assert (again.num_image_tokens, again.num_retrieval_tokens, again.image_token_id) == (4, 6, -200)
    mine, theirs = (p(images=RED, text="<image> red") for p in (processor, again))
    assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert torch.equal(mine["pixel_values"], theirs["pixel_values"])


def test_its_inputs_are_the_models(build: Any) -> None:
    model = build.model()
    inputs = make()(images=[RED], text=["<image> what is it", "red"])
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    assert model(**inputs).logits.shape == (2, 7 + 6, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": [], "images": None}, "text must hold at least one prompt, got none"),
        (
            {"text": "<image>", "images": None},
            r"match the <image> placeholders of each text, got \[1\] placeholders and 0",
        ),
        ({"text": "red", "images": RED}, r"got \[0\] placeholders and 1 images"),
        (
            {"text": ["<image>", "<image>"], "images": [[RED, RED], []]},
            r"got \[1, 1\] placeholders and \[2, 0\] images",
        ),
        ({"text": "red", "return_tensors": "np"}, "rows must become padded torch tensors, got return_tensors='np'"),
        ({"text": "red", "padding_side": "top"}, "padding_side='top'"),
    ],
)
def test_what_does_not_match(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**call)


def test_a_corrupt_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"image must be a readable picture, got '.*torn\.png'"):
        make()(images=tmp_path / "torn.png", text="<image>")


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="num_image_tokens must be an integer of at least 1, got 0"):
        make(num_image_tokens=0)
    with pytest.raises(ValueError, match="num_retrieval_tokens must be an integer of at least 0, got -1"):
        make(num_retrieval_tokens=-1)


def test_a_gray_picture_is_read_as_colour() -> None:
    gray = Image.fromarray(np.full((9, 9), 255, dtype=np.uint8))
    assert (make()(images=gray, text="<image>")["pixel_values"] > 0.99).all()

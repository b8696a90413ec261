"""Processors of several families, with a tokenizer of words: what they make is spliced, read and asked with."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import attach_families as F
import pytest
import torch
import transformers as hf
from PIL import Image

SIDE = {"height": 16, "width": 16}
# Beside 120 rows a tokenizer of fewer words leaves row 119; Mllama has 8 rows more, PaliGemma's knows 1,253 words.
RAG = {"mllama": 127, "paligemma": 1253}


def words(*markers: str, **named: Any) -> Any:
    """A tokenizer in which w5 is 5, and whose markers begin at 100."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ordinary = {f"w{at}": at for at in range(4, 100)}
    special = {name: 100 + at for at, name in enumerate(markers)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, **ordinary, **special}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<pad>", "<s>", "</s>", *markers])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **named
    )


def pictures(family: str, kind: str, **options: Any) -> Any:
    """The image processor that needs no torchvision."""
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{kind}ImageProcessorPil")(**options)


def llava_like(kind: Any, images: Any) -> Any:
    return kind(
        images, words("<image>"), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    )  # fmt: skip


def paligemma() -> Any:
    images = pictures("siglip", "Siglip", size=SIDE)
    images.image_seq_length = 4
    return hf.PaliGemmaProcessor(images, words("<image>", "<loc0000>"))


def gemma3() -> Any:
    named = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = words("<image>", "<101>", "<boi>", "<eoi>", extra_special_tokens=named)
    return hf.Gemma3Processor(pictures("gemma3", "Gemma3", size=SIDE), tokenizer, image_seq_length=4)


def idefics3() -> Any:
    images = pictures(
        "idefics3", "Idefics3", size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    markers = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    return hf.Idefics3Processor(images, words(*markers), image_seq_len=1)


CROP = {"size": {"shortest_edge": 16}, "crop_size": SIDE}
# The processor, how a prompt names an image, and what an image becomes.
PROCESSORS: dict[str, tuple[Callable[[], Any], str, list[int]]] = {
    "llava": (lambda: llava_like(hf.LlavaProcessor, pictures("clip", "CLIP", **CROP)), "<image>", [100] * 4),
    "llava_next": (
        lambda: llava_like(
            hf.LlavaNextProcessor, pictures("llava_next", "LlavaNext", image_grid_pinpoints=[[16, 16]], **CROP)
        ),
        "<image>",
        [100] * 10,
    ),
    "paligemma": (paligemma, "<image>", [100] * 4),
    "gemma3": (gemma3, "<boi>", [102, *[100] * 4, 103]),
    "idefics3": (idefics3, "<image>", [101, 102, 100, 101]),
    "mllama": (
        lambda: hf.MllamaProcessor(
            pictures("mllama", "Mllama", size=SIDE, max_image_tiles=1), words("<|image|>", "<|python_tag|>")
        ),
        "<|image|>",
        [100],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_models_own_processor_places_the_tokens(name: str) -> None:
    make, marker, run = PROCESSORS[name]
    aligned = F.attach(F.build(name), processor=make())
    assert aligned.rag_token_id == RAG.get(name, 119)
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    text = [f"<s> {marker} w5 w6", f"<s> w7 w8 {marker} w9"]
    close = [1] if name == "paligemma" else []  # its processor writes BOS behind the image
    rag = [aligned.rag_token_id] * F.K * F.L
    inputs = aligned.processor(images=[[red], [blue]], text=text, padding=True, padding_side="left")
    assert inputs["input_ids"].tolist() == [[0, 1, *run, *rag, *close, 5, 6], [1, 7, 8, *run, *rag, *close, 9]]
    assert inputs["attention_mask"].tolist() == [[int(token > 0) for token in row] for row in inputs["input_ids"]]
    # read as the family tests do
    values, mask = F.latents()
    tokens = aligned.connector(values, mask).tokens.detach()
    bare, spelled = F.reference(aligned.model, dict(inputs), aligned.rag_token_id, tokens)
    keep = inputs["attention_mask"].bool()
    columns = [column for column in F.COLUMNS if column != aligned.rag_token_id]
    with torch.no_grad():
        found, expected = aligned(**inputs, retrieved=(values, mask)).logits, bare(**spelled).logits
    torch.testing.assert_close(found[keep][:, columns], expected[keep][:, columns], rtol=2e-4, atol=2e-4)
    # asked with: pictures and words move the query, the batch does not
    asked, has_query = aligned.queries(inputs)
    assert has_query.all()
    assert (asked[0] - asked[1]).abs().max() > 1e-4
    one = aligned.processor(images=[[blue]], text=text[1:])
    torch.testing.assert_close(aligned.queries(one)[0][0], asked[1], rtol=1e-4, atol=1e-5)
    given = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [100]}
    together = F.new_ids(aligned.generate(**inputs, **given), dict(inputs))
    alone = F.new_ids(aligned.generate(**one, **given), dict(one))
    assert together[1:] == alone
    plain = aligned.processor(images=[[red]], text=text[:1], retrieval="off")
    assert plain["input_ids"].tolist() == [[1, *run, *close, 5, 6]]
    assert torch.equal(aligned(**plain, retrieval="off").logits, aligned.model(**plain).logits)


@pytest.mark.parametrize("name", ["llava", "idefics3", "mllama"])
def test_two_images_and_text_alone_from_a_processor(name: str) -> None:
    make, marker, run = PROCESSORS[name]
    aligned = F.attach(F.build(name), processor=make())
    red = Image.new("RGB", (16, 16), "red")
    inputs = aligned.processor(
        images=[[red, red], [red]], text=[f"<s> {marker} {marker} w5", f"<s> w8 {marker}"], padding=True,
        padding_side="left",
    )  # fmt: skip
    rag = [aligned.rag_token_id] * F.K * F.L
    ids = [[token for token in row if token] for row in inputs["input_ids"].tolist()]
    assert ids == [[1, *run, *run, *rag, 5], [1, 8, *run, *rag]]
    assert aligned.queries(inputs)[1].tolist() == [True, True]
    assert torch.isfinite(aligned(**inputs).logits).all()
    alone = aligned.processor(text=["<s> w5"])
    assert alone["input_ids"].tolist() == [[1, *rag, 5]]
    assert aligned.queries(alone)[1].tolist() == [False]
    assert torch.isfinite(aligned(**alone).logits).all()

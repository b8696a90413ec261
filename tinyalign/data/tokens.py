"""From a rendered conversation to token ids, with the images' places kept and the supervised tokens marked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from tinyalign.data.prompts import Rendered
from tinyalign.data.records import IMAGE_PLACEHOLDER


class EncodedText(NamedTuple):
    """Token ids of one conversation.

    Args:
        input_ids: token ids; `num_image_tokens` copies of the image id stand for each image.
        supervised: which ids the model is to learn; never an image.
        num_images: placeholders met.
    """

    input_ids: list[int]
    supervised: list[bool]
    num_images: int


def encode_text(tokenizer: Any, rendered: Rendered, *, num_image_tokens: int, image_token_id: int) -> EncodedText:
    """Tokenize a rendered conversation piece by piece between its images.

    The placeholder never reaches the tokenizer, so no tokenizer needs to know it. Whatever the tokenizer puts before a
    sequence by itself (BOS) is put there once, unless the text already begins with it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rendered: the text and the ranges to learn.
        num_image_tokens: how many language-model positions one image takes.
        image_token_id: the id that marks them; not a vocabulary id.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "what": 1, "red": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> encode_text(tokenizer, Rendered("<image> what red", ((12, 16),)), num_image_tokens=2, image_token_id=-200)
        EncodedText(input_ids=[-200, -200, 1, 2], supervised=[False, False, False, True], num_images=1)
    """
    text = rendered.text
    ids: list[int] = []
    supervised: list[bool] = []
    bos = getattr(tokenizer, "bos_token", None)
    if not (bos and text.startswith(bos)):
        ids += prefix_ids(tokenizer)
        supervised += [False] * len(ids)
    position, num_images = 0, 0
    for index, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            ids += [image_token_id] * num_image_tokens
            supervised += [False] * num_image_tokens
            position += len(IMAGE_PLACEHOLDER)
            num_images += 1
        for token, end in _chunk_tokens(tokenizer, chunk, position, rendered):
            ids.append(token)
            supervised.append(any(start < position + end <= stop for start, stop in rendered.spans))
        position += len(chunk)
    return EncodedText(ids, supervised, num_images)


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer itself puts before a text: ``[BOS]``, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _chunk_tokens(tokenizer: Any, chunk: str, position: int, rendered: Rendered) -> list[tuple[int, int]]:
    """Token ids of a chunk, each with the end of its characters in the chunk."""
    if not chunk:
        return []
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
        return [(token, end) for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
    # Without offsets the chunk is cut at the borders of the supervised ranges.
    borders = {0, len(chunk), *(edge - position for span in rendered.spans for edge in span)}
    cuts = sorted(cut for cut in borders if 0 <= cut <= len(chunk))
    tokens = []
    for start, end in pairwise(cuts):
        tokens += [(token, end) for token in tokenizer(chunk[start:end], add_special_tokens=False)["input_ids"]]
    return tokens

"""From samples to one padded batch in which only the answers are supervised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tinyalign._checks import check_positive
from tinyalign.data.prompts import ChatRenderer, Renderer
from tinyalign.data.records import Sample, load_image
from tinyalign.data.tokens import EncodedText, encode_text

IGNORE_INDEX = -100


class ImageTextProcessor(Protocol):
    """What a collator needs of a processor; `tinyalign.models.TinyAlignProcessor` is one."""

    tokenizer: Any
    image_processor: Any
    num_image_tokens: int
    num_retrieval_tokens: int
    image_token_id: int


class LengthReport(NamedTuple):
    """How the samples fit the length budget, retrieval tokens included.

    Args:
        num_samples: samples measured.
        num_cut: samples that lose tokens.
        tokens_cut: tokens lost in all.
        answer_tokens_cut: supervised tokens among them.
        longest: positions the longest sample would need.
    """

    num_samples: int
    num_cut: int
    tokens_cut: int
    answer_tokens_cut: int
    longest: int


class LlavaCollator:
    """Make a training batch of samples: tokens padded on the right, labels on the answers alone, images in row order.

    The batch holds `input_ids`, `attention_mask` (bool), `labels`, `image_counts`, `sample_ids`, `groups`,
    `max_supervised_tokens` (a plain int, so that a model can size its loss without asking the device) and, when there
    is any image, `pixel_values`.

    Args:
        processor: holds the tokenizer, the image processor and how many tokens an image takes.
        renderer: writes a conversation as text; `ChatRenderer` of the processor's tokenizer when None.
        max_length: most positions a row may take in the language model, retrieval tokens included; longer answers
            are cut from the right, with a warning. Images are never cut.
        extra: called with the samples, returns further entries of the batch (precomputed `neighbour_ids`, say), so
            that a data-loader worker can prepare them.

    Shape:
        input_ids, attention_mask, labels: (B, S). pixel_values: (num_images, C, H, W). image_counts, sample_ids,
        groups: (B,).

    Raises:
        ValueError: an empty batch, a sample with no supervised token, one whose placeholders do not match its images,
            one whose images alone exceed `max_length`, or an unreadable image; each names the sample.

    Example:
        >>> from types import SimpleNamespace
        >>> from tinyalign.data import Turn
        >>> class Letters:
        ...     is_fast, chat_template, bos_token, eos_token, pad_token_id = False, None, None, ".", 0
        ...     def __call__(self, text, **_):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> processor = SimpleNamespace(tokenizer=Letters(), image_processor=None, num_image_tokens=1,
        ...                             num_retrieval_tokens=0, image_token_id=-200)
        >>> sample = Sample("a", 1, 1, (), (Turn("user", "Red?"), Turn("assistant", "no")))
        >>> batch = LlavaCollator(processor)([sample])
        >>> "".join(chr(label) for label in batch["labels"].flatten() if label != IGNORE_INDEX)
        ' no.'
    """

    def __init__(
        self,
        processor: ImageTextProcessor,
        *,
        renderer: Renderer | None = None,
        max_length: int | None = None,
        extra: Callable[[Sequence[Sample]], Mapping[str, Any]] | None = None,
    ) -> None:
        if max_length is not None:
            check_positive("LlavaCollator", "max_length", max_length)
        self.processor, self.max_length, self.extra = processor, max_length, extra
        self.renderer: Renderer = ChatRenderer(processor.tokenizer) if renderer is None else renderer
        self._warned = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate the samples."""
        if not samples:
            raise ValueError("LlavaCollator: samples must hold at least one sample, got none. Check the sampler.")
        encoded = [self._fit(sample, self._encode(sample)) for sample in samples]
        pad = pad_token_id(self.processor.tokenizer)
        labels = [
            [token if learn else IGNORE_INDEX for token, learn in zip(row.input_ids, row.supervised, strict=True)]
            for row in encoded
        ]
        batch: dict[str, Any] = {
            "input_ids": _pad_right([row.input_ids for row in encoded], pad),
            "attention_mask": _pad_right([[True] * len(row.input_ids) for row in encoded], False),
            "labels": _pad_right(labels, IGNORE_INDEX),
            "image_counts": torch.tensor([row.num_images for row in encoded]),
            "sample_ids": torch.tensor([sample.sample_id for sample in samples]),
            "groups": torch.tensor([sample.group for sample in samples]),
            "max_supervised_tokens": max(sum(row.supervised) for row in encoded),
        }
        images = [_load(sample, image) for sample in samples for image in sample.images]
        if images:
            batch["pixel_values"] = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        if self.extra is not None:
            batch.update(self.extra(samples))
        return batch

    def measure(self, samples: Sequence[Sample]) -> LengthReport:
        """Say, before training, what the length budget would cut."""
        lost, lost_answers, num_cut, longest = 0, 0, 0, 0
        for sample in samples:
            row = self._encode(sample)
            longest = max(longest, len(row.input_ids) + self.processor.num_retrieval_tokens)
            if self.max_length is not None and len(row.input_ids) > self._budget:
                num_cut += 1
                lost += len(row.input_ids) - self._budget
                lost_answers += sum(row.supervised[self._budget :])
        return LengthReport(len(samples), num_cut, lost, lost_answers, longest)

    @property
    def _budget(self) -> int:
        assert self.max_length is not None
        return self.max_length - self.processor.num_retrieval_tokens

    def _encode(self, sample: Sample) -> EncodedText:
        row = encode_text(
            self.processor.tokenizer,
            self.renderer(sample.turns),
            num_image_tokens=self.processor.num_image_tokens,
            image_token_id=self.processor.image_token_id,
        )
        if row.num_images != len(sample.images):
            raise ValueError(
                f"LlavaCollator: sample {sample.id!r} must hold one <image> per image, got {row.num_images} "
                f"placeholders for {len(sample.images)} images. Correct the record, or the renderer that lost one."
            )
        if not any(row.supervised):
            raise ValueError(
                f"LlavaCollator: sample {sample.id!r} must have answer tokens to learn from, got "
                f"{[turn.role for turn in sample.turns]} turns and none. Add an answer or drop the record."
            )
        return row

    def _fit(self, sample: Sample, row: EncodedText) -> EncodedText:
        if self.max_length is None or len(row.input_ids) <= self._budget:
            return row
        kept = EncodedText(
            row.input_ids[: max(self._budget, 0)], row.supervised[: max(self._budget, 0)], row.num_images
        )
        image = self.processor.image_token_id
        if kept.input_ids.count(image) != row.input_ids.count(image) or not any(kept.supervised):
            raise ValueError(
                f"LlavaCollator: sample {sample.id!r} must keep its images and an answer token within "
                f"max_length={self.max_length}, got {len(row.input_ids)} tokens and "
                f"{self.processor.num_retrieval_tokens} retrieval tokens. Raise max_length, retrieve fewer tokens, or "
                f"drop the record."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"LlavaCollator: sample {sample.id!r} loses {len(row.input_ids) - self._budget} tokens to "
                f"max_length={self.max_length} ({self.processor.num_retrieval_tokens} of it for retrieval). Later cuts "
                f"are silent; LlavaCollator.measure(dataset) counts them all.",
                stacklevel=3,
            )
        return kept


def pad_token_id(tokenizer: Any) -> int:
    """Return an id to fill rows with; attention and labels ignore it, so any id of the vocabulary will do."""
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def _load(sample: Sample, image: Any) -> Any:
    try:
        return load_image(image)
    except ValueError as error:
        raise ValueError(f"LlavaCollator: sample {sample.id!r}: {error}") from error


def _pad_right(rows: Sequence[Sequence[int]], fill: int | bool) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

"""From samples to keys and values: what `build_memory_bank` calls on every batch of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinyalign.data import IMAGE_PLACEHOLDER, Sample, load_image
from tinyalign.memory import EncodedBatch
from tinyalign.models.pair_encoder import PairEncoder, pool_queries
from tinyalign.models.vision import pack_images


class SampleEncoder:
    """Encode image-text samples for a memory bank: images to features, what is said about them to tokens.

    The value of a sample reads everything the assistant says in it, with the questions that it answers; the key reads
    the images alone (and, with a text encoder, nothing of the text either: the caption is what retrieval brings).

    Args:
        encoder: makes keys and values.
        image_processor: a Hugging Face image processor.
        tokenizer: of the captions; the compressor's vocabulary must hold its ids.
        max_text_tokens: captions are cut there.

    Raises:
        ValueError: a sample without an image; it has no key.

    Example:
        >>> import tempfile
        >>> from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        >>> from tinyalign.data import DigitScenes
        >>> from tinyalign.memory import AttentionPooledKey
        >>> from tinyalign.models.tiny import write_tiny_parts
        >>> from tinyalign.perceiver import PerceiverCompressor
        >>> parts = write_tiny_parts(tempfile.mkdtemp(), ["a red 3 and a blue 7 ."])
        >>> tokenizer = AutoTokenizer.from_pretrained(parts.llm)
        >>> compressor = PerceiverCompressor(64, vocab_size=len(tokenizer))
        >>> encoder = PairEncoder(AutoModel.from_pretrained(parts.vision), compressor, AttentionPooledKey())
        >>> encode = SampleEncoder(encoder, AutoImageProcessor.from_pretrained(parts.vision), tokenizer)
        >>> batch = encode(DigitScenes("memory", 2)[:2])
        >>> batch.keys.shape, batch.values.shape
        (torch.Size([2, 64]), torch.Size([2, 32, 96]))
    """

    def __init__(
        self, encoder: PairEncoder, image_processor: Any, tokenizer: Any, *, max_text_tokens: int = 512
    ) -> None:
        self.encoder, self.image_processor, self.tokenizer = encoder, image_processor, tokenizer
        self.max_text_tokens = max_text_tokens

    def __call__(self, samples: Sequence[Sample]) -> EncodedBatch:
        """Encode a batch of samples, with their ids, groups and texts."""
        features, counts = self.features(samples)
        rows, image_mask = pack_images(features, counts)
        texts = [caption_of(sample) for sample in samples]
        ids, text_mask = self.tokens(texts)
        values = self.encoder.value(rows, ids.to(rows.device), image_mask, text_mask.to(rows.device))
        return EncodedBatch(
            keys=pool_queries(self.encoder, features, counts),
            values=values,
            ids=[sample.sample_id for sample in samples],
            groups=[sample.group for sample in samples],
            metadata=[{"id": sample.id, "text": text} for sample, text in zip(samples, texts, strict=True)],
        )

    def queries(self, samples: Sequence[Sample]) -> Tensor:
        """Keys to search by, (B, D): what the model would ask with for these samples."""
        return pool_queries(self.encoder, *self.features(samples))

    def features(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Image features of all samples, (num_images, N, D), and the images per sample, (B,)."""
        for sample in samples:
            if not sample.images:
                raise ValueError(
                    f"SampleEncoder: samples must have an image to be found by, got {sample.id!r} without. Leave "
                    "text-only samples out of the bank."
                )
        images = [load_image(image) for sample in samples for image in sample.images]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        device = next(self.encoder.vision.parameters()).device
        counts = torch.tensor([len(sample.images) for sample in samples], device=device)
        return self.encoder.image_features(pixels.to(device)), counts

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of captions, (B, T), and their mask."""
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_text_tokens] for text in texts]
        width = max(1, *(len(row) for row in rows)) if rows else 1
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])

    def fingerprint(self) -> dict[str, str | int | float | bool | None]:
        """What makes keys and values, the captions' tokenizer included."""
        name = f"{type(self.tokenizer).__name__}:{len(self.tokenizer)}"
        return {**self.encoder.fingerprint(), "value.tokenizer": name, "value.max_text_tokens": self.max_text_tokens}


def caption_of(sample: Sample) -> str:
    """All that is said in a sample, without placeholders: the caption, or questions with their answers.

    A prompt that asks for a caption says nothing about the image; it is kept only where several answers need telling
    apart.

    Example:
        >>> from tinyalign.data import Turn
        >>> caption_of(Sample("a", 1, 1, (), (Turn("user", "<image> Describe."), Turn("assistant", "A rose."))))
        'A rose.'
        >>> turns = (Turn("user", "Red?"), Turn("assistant", "yes"), Turn("user", "Blue?"), Turn("assistant", "no"))
        >>> caption_of(Sample("a", 1, 1, (), turns))
        'Red? yes Blue? no'
    """
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    said = answers if len(answers) == 1 else [turn.text for turn in sample.turns if turn.role != "system"]
    return " ".join(text.replace(IMAGE_PLACEHOLDER, "").strip() for text in said)

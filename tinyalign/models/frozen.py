"""Samples with everything that no training changes computed once: what experiments with many small runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tinyalign.data import LlavaCollator, Sample, load_image
from tinyalign.memory import KeyTransform, MemoryBank, Neighbours
from tinyalign.models.processor import TinyAlignProcessor
from tinyalign.models.retrieval import arm_neighbours
from tinyalign.models.sample_encoder import SampleEncoder, caption_of
from tinyalign.perceiver import caption_bytes


@dataclass(frozen=True, eq=False)
class FrozenSamples:
    """Samples as tensors: tokens with labels, and the features and queries of their images, each image once.

    Args:
        samples: the samples themselves.
        rows: what `LlavaCollator` made of them, one row each: token ids, masks, labels, ids and groups.
        features: tower features of the distinct images.
        queries: the keys that these images ask by.
        image_of: which image each sample shows.

    Shape:
        rows: each (n, ...). features: (num_images, N, D). queries: (num_images, key_dim). image_of: (n,), int64.
    """

    samples: tuple[Sample, ...]
    rows: dict[str, Tensor]
    features: Tensor
    queries: Tensor
    image_of: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: Tensor | Sequence[int]) -> FrozenSamples:
        """The samples at these places; features and queries are shared, not copied."""
        at = torch.as_tensor(index, dtype=torch.int64)
        return replace(
            self,
            samples=tuple(self.samples[i] for i in at.tolist()),
            rows={name: value[at] for name, value in self.rows.items()},
            image_of=self.image_of[at],
        )

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Arguments of `TinyAlignVLM.forward` for these places, without the padding that none of them needs."""
        rows = {name: value[index] for name, value in self.rows.items()}
        width = int(rows["attention_mask"].sum(dim=1).max())
        for name in ("input_ids", "attention_mask", "labels"):
            rows[name] = rows[name][:, :width]
        most = int((rows["labels"] != -100).sum(dim=1).max())
        moved = {name: value.to(device) for name, value in rows.items()}
        return {
            **moved,
            "image_features": self.features[self.image_of[index]].to(device),
            "max_supervised_tokens": most,
        }


def freeze_samples(
    samples: Sequence[Sample], encode: SampleEncoder, *, batch_size: int = 256, renderer: Any = None
) -> FrozenSamples:
    """Tokenize samples and run the frozen tower over their images, once per image.

    Samples of one group show the same image, as `LlavaDataset` and `DigitScenes` promise, so that many questions about
    an image cost one pass.

    Args:
        samples: each with exactly one image.
        encode: holds the tower, the key, the image processor and the tokenizer.
        batch_size: images in the tower at once.
        renderer: writes conversations as text; see `LlavaCollator`.

    Raises:
        ValueError: no samples, or one that has not exactly one image.

    Example:
        >>> import tempfile
        >>> from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        >>> from tinyalign.data import DigitScenes
        >>> from tinyalign.memory import AttentionPooledKey
        >>> from tinyalign.models import PairEncoder
        >>> from tinyalign.models.tiny import write_tiny_parts
        >>> scenes = DigitScenes("train", 2, task="question")
        >>> parts = write_tiny_parts(tempfile.mkdtemp(), [turn.text for sample in scenes for turn in sample.turns])
        >>> encoder = PairEncoder(AutoModel.from_pretrained(parts.vision), None, AttentionPooledKey())
        >>> pictures, words = AutoImageProcessor.from_pretrained(parts.vision), AutoTokenizer.from_pretrained(parts.llm)
        >>> frozen = freeze_samples(scenes, SampleEncoder(encoder, pictures, words))
        >>> len(frozen), tuple(frozen.features.shape)  # four questions about each of two images
        (8, (2, 16, 64))
    """
    where = "freeze_samples"
    kept = tuple(samples[i] for i in range(len(samples)))
    if not kept:
        raise ValueError(f"{where}: samples must hold at least one sample, got none. Check the file or the split.")
    for sample in kept:
        if len(sample.images) != 1:
            raise ValueError(
                f"{where}: samples must have one image each, got {len(sample.images)} in {sample.id!r}. Leave it out, "
                f"or train with the collator and the model as usual."
            )
    images: dict[int, int] = {}
    for sample in kept:
        images.setdefault(sample.group, len(images))
    first = {images[sample.group]: sample for sample in reversed(kept)}
    shown = [first[at] for at in range(len(images))]
    features = torch.cat([encode.features(shown[at : at + batch_size])[0] for at in range(0, len(shown), batch_size)])
    processor = TinyAlignProcessor(
        encode.image_processor, encode.tokenizer, num_image_tokens=encode.encoder.vision.num_tokens
    )
    # Pixels of every row are neither needed nor held: the collator gets a stand-in for each picture.
    blank = Image.new("RGB", (1, 1))
    pictures: Any = SimpleNamespace(
        tokenizer=processor.tokenizer,
        image_processor=lambda images, return_tensors: {"pixel_values": None},  # noqa: ARG005
        num_image_tokens=processor.num_image_tokens,
        num_retrieval_tokens=0,
        image_token_id=processor.image_token_id,
    )
    rows = LlavaCollator(pictures, renderer=renderer)([sample._replace(images=(blank,)) for sample in kept])
    return FrozenSamples(
        samples=kept,
        rows={name: value for name, value in rows.items() if isinstance(value, Tensor)},
        features=features,
        queries=torch.cat([encode.encoder.query(part) for part in torch.split(features, batch_size)]),
        image_of=torch.tensor([images[sample.group] for sample in kept]),
    )


def compress_samples(part: FrozenSamples, encode: SampleEncoder, *, batch_size: int = 256) -> Tensor:
    """Latents of every sample, (n, L, latent_dim): its image with everything the assistant says in it.

    Shape:
        returns: (n, L, latent_dim), dtype of the compressor.
    """
    ids, mask = encode.tokens([caption_of(sample) for sample in part.samples])
    return torch.cat(
        [
            encode.encoder.value(part.features[part.image_of[at]], ids[at], text_mask=mask[at])
            for at in torch.split(torch.arange(len(part)), batch_size)
        ]
    )


@torch.no_grad()
def pixel_latents(part: FrozenSamples, perceiver: nn.Module, image_processor: Any, *, batch_size: int = 100) -> Tensor:
    """Latents of every sample as the paper's release makes them: from raw pixels and the bytes of the caption.

    Args:
        part: the samples.
        perceiver: a `PixelPerceiver`, or the faster `FoldedPixelPerceiver` of one.
        image_processor: gives its pixels.
        batch_size: samples at once.

    Shape:
        returns: (n, L, latent_dim).
    """
    found = []
    for at in range(0, len(part), batch_size):
        samples = part.samples[at : at + batch_size]
        pixels = image_processor(images=[load_image(s.images[0]) for s in samples], return_tensors="pt")["pixel_values"]
        ids, mask = caption_bytes([caption_of(sample) for sample in samples])
        found.append(perceiver(pixels, ids, text_mask=mask))
    return torch.cat(found)


def frozen_bank(
    part: FrozenSamples,
    values: Tensor,
    *,
    keys: Tensor | None = None,
    transform: KeyTransform | None = None,
    fingerprint: dict[str, Any] | None = None,
) -> MemoryBank:
    """A bank in memory that holds these samples, with their texts as metadata.

    Args:
        part: the samples.
        values: their latents.
        keys: what they are found by; their images' queries when None.
        transform: see `MemoryBank`.
        fingerprint: see `MemoryBank`.

    Shape:
        values: (n, L, latent_dim). keys: (n, key_dim).
    """
    keys = part.queries[part.image_of] if keys is None else keys
    bank = MemoryBank(keys.shape[1], tuple(values.shape[1:]), transform=transform, fingerprint=fingerprint)
    notes = [{"id": sample.id, "text": caption_of(sample)} for sample in part.samples]
    bank.add(keys, values, part.rows["sample_ids"], part.rows["groups"], notes)
    return bank


class FoundNeighbours:
    """What was found for every sample of a part: ids and scores now, values when a batch asks for them.

    Args:
        memory: the bank that the neighbours are of.
        neighbours: one row per sample, in the order of the part.
    """

    def __init__(self, memory: MemoryBank, neighbours: Neighbours) -> None:
        self.memory, self.neighbours = memory, neighbours

    def take(self, index: Tensor | Sequence[int]) -> FoundNeighbours:
        """The rows at these places."""
        at = torch.as_tensor(index, dtype=torch.int64)
        found = self.neighbours
        return FoundNeighbours(self.memory, Neighbours(found.scores[at], found.ids[at], found.mask[at]))

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Arguments of `TinyAlignVLM.forward` that hand these rows over."""
        ids = self.neighbours.ids[index]
        values, mask = self.memory.gather(ids)
        scores = self.neighbours.scores[index].to(device)
        return {"retrieved": (values.float().to(device), mask.to(device), scores), "retrieval": "bank"}


def find_neighbours(
    memory: MemoryBank, part: FrozenSamples, *, arm: str = "bank", k: int = 5, seed: int = 0, queries: Any = None
) -> FoundNeighbours:
    """Find what an arm retrieves for every sample of a part; a sample's own entries and its twins' only in ``self``.

    Args:
        memory: the bank.
        part: the samples that ask.
        arm: one of `arm_neighbours`'.
        k: entries per sample.
        seed: of the control arms' draws.
        queries: (n, key_dim), one per sample; the images' own when None.
    """
    queries = part.queries[part.image_of] if queries is None else queries
    ids, groups = part.rows["sample_ids"], part.rows["groups"]
    return FoundNeighbours(memory, arm_neighbours(memory, arm, queries, k=k, sample_ids=ids, groups=groups, seed=seed))


def caption_recall(part: FrozenSamples, found: FoundNeighbours) -> float:
    """Share of samples one of whose neighbours says the very same of its image.

    Args:
        part: the samples.
        found: their neighbours, in a bank whose entries carry their caption, as `build_memory_bank` leaves them.
    """
    said = [{note["text"] for note in found.memory.metadata(row[row >= 0])} for row in found.neighbours.ids]
    hits = [caption_of(sample) in texts for sample, texts in zip(part.samples, said, strict=True)]
    return sum(hits) / len(hits)

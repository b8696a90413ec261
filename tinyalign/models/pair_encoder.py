"""From an image and its caption to a key and a value: what fills a bank, and what asks it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyalign._files import hash_tensors
from tinyalign.models.vision import VisionFeatures


class EncodedPair(NamedTuple):
    """A key and a value per pair.

    Shape:
        key: (B, D). value: (B, L, latent_dim).
    """

    key: Tensor
    value: Tensor


class PairEncoder(nn.Module):
    """Encode image-caption pairs with frozen parts: the key to search by, and the latents to retrieve.

    One object serves the bank and the model that asks it, so that their keys agree; `fingerprint` names everything that
    they depend on. Keys are pooled from image features, and from text only where a frozen text encoder of the same
    width is given; values always read the caption as well, which is what retrieval has to offer beyond the image
    itself.

    Args:
        vision_tower: a Hugging Face vision tower, or `VisionFeatures` that already holds one.
        compressor: makes the values; None for an encoder that only asks.
        key: pools features into a key, such as `AttentionPooledKey`.
        text_encoder: maps token ids and their mask to features of the tower's width, for keys that read text.
        vision_layer: hidden state that features are read from.

    Shape:
        image_features: (B, N, D). text: (B, T), as the compressor takes it. masks: bool, True = keep.

    Raises:
        ValueError: text for a key without a text encoder, or a value without a compressor.

    Source:
        TinyAlign, sections 4.1 and 4.2.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> from tinyalign.memory import AttentionPooledKey
        >>> from tinyalign.perceiver import PerceiverCompressor
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> tower = SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **sizes))
        >>> encoder = PairEncoder(tower, PerceiverCompressor(32), AttentionPooledKey())
        >>> features = encoder.image_features(torch.randn(2, 3, 16, 16))
        >>> encoder.value(features, torch.randint(0, 30522, (2, 4))).shape
        torch.Size([2, 32, 96])
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        compressor: nn.Module | None,
        key: nn.Module,
        *,
        text_encoder: nn.Module | None = None,
        vision_layer: int = -2,
    ) -> None:
        super().__init__()
        if isinstance(vision_tower, VisionFeatures):
            self.vision = vision_tower
        else:
            self.vision = VisionFeatures(vision_tower, layer=vision_layer)
        self.compressor, self.key, self.text_encoder = compressor, key, text_encoder

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower: (n, C, H, W) to (n, N, D)."""
        with torch.no_grad():
            return self.vision(pixel_values)  # type: ignore[no-any-return]

    @torch.no_grad()
    def query(
        self,
        image_features: Tensor,
        text_ids: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Pool a key, (B, D), from what is known before any answer: the image, and the instruction's tokens if any."""
        if text_ids is None:
            return self.key(image_features, image_mask=image_mask)  # type: ignore[no-any-return]
        if self.text_encoder is None:
            raise ValueError(
                f"PairEncoder.query: text_ids must be None without a text_encoder, got shape {tuple(text_ids.shape)}. "
                f"Give a frozen text encoder of the tower's width, or query by image."
            )
        text = self.text_encoder(text_ids, text_mask)
        return self.key(image_features, text, image_mask=image_mask, text_mask=text_mask)  # type: ignore[no-any-return]

    @torch.no_grad()
    def value(
        self,
        image_features: Tensor,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Compress image and caption into latents, (B, L, latent_dim)."""
        if self.compressor is None:
            raise ValueError(
                "PairEncoder.value: compressor must be given to make values, got None. Pass the compressor that the "
                "bank's values come from."
            )
        return self.compressor(  # type: ignore[no-any-return]
            image_features.to(_dtype_of(self.compressor)), text, image_mask=image_mask, text_mask=text_mask
        )

    def forward(
        self,
        image_features: Tensor,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        key_text_ids: Tensor | None = None,
        key_text_mask: Tensor | None = None,
    ) -> EncodedPair:
        """Encode pairs; `key_text_ids` are the caption in the text encoder's own vocabulary."""
        return EncodedPair(
            self.query(image_features, key_text_ids, image_mask, key_text_mask),
            self.value(image_features, text, image_mask, text_mask),
        )

    def fingerprint(self) -> dict[str, str | int | float | bool | None]:
        """Name what the keys (`key.`) and the values (`value.`) are made by, as flat fields for a bank."""
        vision = self.vision.fingerprint()
        fields: dict[str, str | int | float | bool | None] = {f"key.{name}": value for name, value in vision.items()}
        fields.update(_key_fields(self.key))
        fields["key.text_encoder"] = None if self.text_encoder is None else _weights_of(self.text_encoder)
        if self.compressor is not None:
            fields.update({f"value.{name}": value for name, value in vision.items()})
            own: Any = getattr(self.compressor, "fingerprint", None)
            fields["value.compressor"] = str(own()) if own is not None else _weights_of(self.compressor)
        return fields

    def key_fingerprint(self) -> dict[str, str | int | float | bool | None]:
        """The `key.` fields alone: what a query must share with the bank."""
        return {name: value for name, value in self.fingerprint().items() if name.startswith("key.")}


def pool_queries(encoder: PairEncoder, features: Tensor, counts: Tensor) -> Tensor:
    """Pool one query per row from the images of all rows; a row without images gets a stand-in of ones.

    Rows are pooled together with rows of as many images, never padded to the longest, so that a query is the same to
    the last bit whatever else is in the batch.

    Shape:
        features: (num_images, N, D). counts: (B,), int. returns: (B, key width).
    """
    first = counts.cumsum(0) - counts
    pooled: list[tuple[Tensor, Tensor]] = []
    for count in sorted(set(counts.tolist()) - {0}):
        alike = (counts == count).nonzero()[:, 0]
        index = first[alike, None] + torch.arange(count, device=first.device)
        pooled.append((alike, encoder.query(features[index].flatten(1, 2))))  # (b, count * N, D)
    width = pooled[0][1].shape[1] if pooled else features.shape[2]
    queries = features.new_ones(len(counts), width)
    for alike, keys in pooled:
        queries[alike] = keys.to(queries.dtype)
    return queries


def _key_fields(key: nn.Module) -> dict[str, str | int | float | bool | None]:
    """What a key module says about itself, else its class, numbers and weights."""
    own = getattr(key, "fingerprint", None)
    if callable(own):
        said: Any = own()
        if isinstance(said, dict):
            return {name if name.startswith("key.") else f"key.{name}": value for name, value in said.items()}
        return {"key.pooling": str(said)}
    fields: dict[str, str | int | float | bool | None] = {"key.pooling": type(key).__name__}
    for name, value in sorted(vars(key).items()):
        if not name.startswith("_") and name != "training" and isinstance(value, (str, int, float, bool)):
            fields[f"key.pooling.{name}"] = value
    if key.state_dict():
        fields["key.pooling.weights"] = hash_tensors(key.state_dict())
    return fields


def _weights_of(module: nn.Module) -> str:
    return f"{type(module).__name__}:{hash_tensors(module.state_dict())}"


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)

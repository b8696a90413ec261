"""Queries of a model that exists already: its frozen vision tower, and the words of the instruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyalign._files import hash_tensors
from tinyalign.memory import AttentionPooledKey
from tinyalign.models.rag_inputs import image_markers, instruction_of, pad_of
from tinyalign.models.rag_towers import has_tower, read_tower, tower_of

Words = Callable[[Tensor, int], Tensor]


class Query(Protocol):
    """Anything that makes queries from a batch: (B, D), or those and which rows have anything to ask by."""

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Return queries, (B, D), or (queries, has_query) with has_query (B,) bool."""
        ...


def token_codes(ids: Tensor, width: int) -> Tensor:
    """Give every token id a fixed code of signs, nearly orthogonal to the code of any other id.

    Two texts are as alike as their tokens overlap. Nothing is learned or stored, so that keys made of codes cannot
    drift while a language model trains, and do not depend on which one it is (though on its vocabulary).

    Args:
        ids: of the tokens.
        width: of a code.

    Shape:
        ids: (T,), int64. returns: (T, width), float32, of 1 and -1.

    Source:
        Random indexing: Kanerva et al. 2000. Signs are the lowest bit of a 32-bit integer hash of (id, column).

    Example:
        >>> codes = token_codes(torch.tensor([5, 9, 5]), 4096)
        >>> bool((codes[0] == codes[2]).all()), bool((codes[0] @ codes[1]).abs() < 0.1 * 4096)
        (True, True)
    """
    column = torch.arange(width, device=ids.device)
    mixed = (ids[:, None] * 2654435761 + column * 2246822519) & 0xFFFFFFFF
    for shift, factor in ((16, 2146121005), (15, 2221713035), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return (mixed & 1).float() * 2 - 1


class TowerQuery:
    """Pool queries from what a vision-language model's own tower sees, and from the instruction's tokens.

    Image tokens are taken before the projector, which may be training; words enter by codes that never train
    (`token_codes`). Answers, padding, image placeholders and retrieval tokens are left out. A row is read by itself:
    its batch mates change nothing. Several images per row are read together; a row without images asks for nothing.

    With the paper's key every token has about the same say, so that hundreds of image tokens outweigh a short
    instruction; ``AttentionPooledKey(balance=True)`` gives both an equal say, for questions that ask different things
    of one image. Build the bank's keys with the same object.

    Args:
        model: the model.
        key: pools tokens; the paper's by default.
        words: maps token ids, (T,), and the tower's width D to features, (T, D), that do not train; None to ask by the
            image alone.

    Shape:
        returns: (B, D) of the tower's width, and (B,), bool, True for rows with an image.

    Raises:
        ValueError: a tower whose tokens cannot be told apart by image.

    Source:
        TinyAlign, section 4.2. Deviation: codes stand for the instruction, whose embeddings have another width.
    """

    def __init__(self, model: nn.Module, key: nn.Module | None = None, *, words: Words | None = token_codes) -> None:
        self.model, self.key, self.words = model, AttentionPooledKey() if key is None else key, words

    @classmethod
    def of(cls, model: nn.Module) -> TowerQuery | None:
        """Make one for a model whose tower can be read; None for any other."""
        return cls(model) if has_tower(model) else None

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return queries and which rows have an image."""
        ids: Tensor = inputs["input_ids"]
        B = len(ids)
        has_query = torch.zeros(B, dtype=torch.bool, device=ids.device)
        queries = torch.ones(B, self.width, device=ids.device)
        if inputs.get("pixel_values") is None:
            return queries, has_query
        images, owners = read_tower(self.model, inputs)
        asked = instruction_of(inputs, image_ids=image_markers(self.model), pad_id=pad_of(self.model))
        said = asked["attention_mask"].bool()
        for row in sorted(set(owners)):
            seen = torch.cat([image for image, owner in zip(images, owners, strict=True) if owner == row])
            has_query[row] = True
            queries[row] = self._pool(seen[None].float(), ids[row, said[row]])
        return queries, has_query

    @torch.no_grad()
    def image_tokens(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tower's tokens, (T, D), of every image in the batch: what values can be made of."""
        return read_tower(self.model, inputs).images

    def _pool(self, image: Tensor, words: Tensor) -> Tensor:
        if self.words is None or not len(words):
            return self.key(image)[0]  # type: ignore[no-any-return]
        return self.key(image, self.words(words, image.shape[2])[None].to(image))[0]  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """Width of the queries."""
        config: Any = self.model.config
        vision = getattr(config, "vision_config", config)
        return int(getattr(vision, "vision_output_dim", None) or vision.hidden_size)

    def fingerprint(self) -> dict[str, str | int | float | bool | None]:
        """Name the tower, the words and the key as the fields of a bank's fingerprint."""
        tower, text = tower_of(self.model), _text_config(self.model)
        state = {  # what Qwen calls merger is its projector: no query passes it
            name: value.to(torch.bfloat16)
            for name, value in tower.state_dict().items()
            if value.is_floating_point() and "merger" not in name
        }
        own: Any = getattr(self.key, "fingerprint", None)
        pooling = dict(own()) if own is not None else {"key.pooling": type(self.key).__name__}
        words = getattr(self.words, "__qualname__", type(self.words).__name__)
        vocabulary = f"{text.model_type}:{text.vocab_size}"
        return {
            "key.encoder": type(tower).__name__,
            "key.encoder_weights": hash_tensors(state),
            "key.words": None if self.words is None else words,
            "key.vocabulary": None if self.words is None else vocabulary,
            **pooling,
        }


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config

"""Queries from the frozen vision tower that a model already has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyalign._files import hash_tensors
from tinyalign.memory import AttentionPooledKey


class Query(Protocol):
    """Anything that makes queries from a batch: (B, D), or those and which rows have anything to ask by."""

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Return queries, (B, D), or (queries, has_query) with has_query (B,) bool."""
        ...


class TowerQuery:
    """Pool queries from what a vision-language model's own tower sees, before its projector.

    transformers 5 gives most models ``get_image_features``, whose output holds the tower's tokens (`last_hidden_state`)
    beside the projected ones (`pooler_output`), which a query must not use: the projector may be training. Rows get
    their images by counting placeholders, so several images per row and rows without are fine.

    Args:
        model: the model.
        key: pools tokens; the paper's by default.

    Raises:
        ValueError: a tower whose tokens cannot be told apart by image.
    """

    def __init__(self, model: nn.Module, key: nn.Module | None = None) -> None:
        self.model, self.key = model, AttentionPooledKey() if key is None else key

    @classmethod
    def of(cls, model: nn.Module) -> TowerQuery | None:
        """Make one for a model that has ``get_image_features``; None for any other."""
        return cls(model) if _reader(model) is not None else None

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return queries and which rows have an image."""
        ids: Tensor = inputs["input_ids"]
        if inputs.get("pixel_values") is None:
            blank = torch.ones(len(ids), self.width, device=ids.device)
            return blank, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        images, lengths = self._read(inputs)
        owners = _owners(self._placeholders(ids), lengths)
        queries, has_query = [], []
        for row in range(len(ids)):
            seen = [images[at] for at, owner in enumerate(owners) if owner == row]
            has_query.append(bool(seen))
            tokens = torch.cat(seen) if seen else images[0]
            queries.append(self.key(tokens[None].float())[0])
        return torch.stack(queries), torch.tensor(has_query, device=ids.device)

    @torch.no_grad()
    def image_tokens(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tower's tokens, (T, D), of every image in the batch: what values can be made of."""
        return self._read(inputs)[0]

    def _read(self, inputs: Mapping[str, Any]) -> tuple[list[Tensor], list[int]]:
        """Tokens of each image, and how many positions it takes in the prompt."""
        reader = _reader(self.model)
        taken = inspect.signature(reader).parameters
        given = {name: value for name, value in inputs.items() if name in taken and value is not None}
        given = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask", "labels")}
        output = reader(**given, return_dict=True)
        lengths = _lengths(output.pooler_output)
        return _per_image(output.last_hidden_state, lengths, inputs), lengths

    @property
    def width(self) -> int:
        """Width of the queries."""
        config: Any = self.model.config
        return int(getattr(config, "vision_config", config).hidden_size)

    def fingerprint(self) -> dict[str, str | int | float | bool | None]:
        """Name the tower and the key as the fields of a bank's fingerprint."""
        tower = _tower(self.model)
        state = {n: v.to(torch.bfloat16) for n, v in tower.state_dict().items() if v.is_floating_point()}
        own: Any = getattr(self.key, "fingerprint", None)
        pooling = dict(own()) if own is not None else {"key.pooling": type(self.key).__name__}
        return {"key.encoder": type(tower).__name__, "key.encoder_weights": hash_tensors(state), **pooling}

    def _placeholders(self, ids: Tensor) -> list[int]:
        config: Any = self.model.config
        for name in ("image_token_id", "image_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return [int(count) for count in (ids == token).sum(dim=1)]
        raise ValueError(
            f"TowerQuery: model must say which id is an image, got {type(self.model).__name__} without image_token_id. "
            f"Give attach_memory a query= of your own."
        )


def _reader(model: nn.Module) -> Any:
    for owner in (getattr(model, "base_model", None), model):
        reader = getattr(owner, "get_image_features", None)
        if callable(reader):
            return reader
    return None


def _tower(model: Any) -> nn.Module:
    get = getattr(model, "get_encoder", None)
    if callable(get) and "modality" in inspect.signature(get).parameters:
        found = get(modality="image")
        if isinstance(found, nn.Module) and found is not model:
            return found
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("vision_tower", "vision_model", "visual"):
            return module  # type: ignore[no-any-return]
    raise ValueError(
        f"TowerQuery: model must have a vision tower, got {type(model).__name__} without. Give attach_memory a query=."
    )


def _lengths(projected: Any) -> list[int]:
    """Tokens that each image takes in the prompt."""
    if isinstance(projected, Tensor) and projected.dim() == 2:
        return [len(projected)]
    return [len(image) for image in projected]


def _per_image(features: Any, lengths: list[int], inputs: Mapping[str, Any]) -> list[Tensor]:
    """The tower's tokens of each image, whichever way the family lays them out."""
    count = len(lengths)
    if isinstance(features, (list, tuple)) and len(features) == count:
        return [image.flatten(0, -2) for image in features]
    if isinstance(features, Tensor) and features.dim() in (2, 3):
        if features.dim() == 3 and features.shape[0] == count:
            return list(features)
        if features.dim() == 3 and features.shape[0] % count == 0 and features.shape[0] > count:  # tiles of an image
            return list(features.reshape(count, -1, features.shape[2]))
        flat = features.flatten(0, -2)
        grid = inputs.get("image_grid_thw")
        sizes = [int(size) for size in grid.prod(dim=1)] if isinstance(grid, Tensor) else lengths
        if len(flat) % sum(sizes) == 0:
            factor = len(flat) // sum(sizes)
            return list(torch.split(flat, [size * factor for size in sizes]))
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise ValueError(
        f"TowerQuery: tower must give tokens that can be told apart by image, got {shape} for {count} images. Give "
        f"attach_memory a query= of your own."
    )


def _owners(placeholders: list[int], lengths: list[int]) -> list[int]:
    """The row of each image, by counting placeholders."""
    owners, at = [], 0
    for row, count in enumerate(placeholders):
        while count > 0 and at < len(lengths):
            count -= lengths[at]
            owners.append(row)
            at += 1
        if count != 0:
            raise ValueError(
                f"TowerQuery: placeholders must match the image tokens, got {placeholders} placeholders for images of "
                f"{lengths} tokens. Let the processor expand the images, or give attach_memory a query= of your own."
            )
    return owners

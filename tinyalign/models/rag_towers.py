"""What a vision-language model's own tower sees in a batch, image by image, whichever way the family lays it out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TowerTokens(NamedTuple):
    """The tower's tokens of every image of a batch, and the row that each image belongs to.

    Shape:
        images: each (T, D). owners: as many row numbers, ascending.
    """

    images: list[Tensor]
    owners: list[int]


def has_tower(model: nn.Module) -> bool:
    """Whether the tower of this model can be read: most have ``get_image_features``, Mllama a ``vision_model``."""
    return _reader(model) is not None or _mllama(model) is not None


@torch.no_grad()
def read_tower(model: nn.Module, inputs: Mapping[str, Any]) -> TowerTokens:
    """Run the tower, in evaluation mode, on the pictures of a batch.

    transformers 5 gives most models ``get_image_features``, whose output holds the tower's tokens (`last_hidden_state`)
    beside the projected ones (`pooler_output`). Only the lengths of the latter are read: they say how many placeholders
    an image takes, and with them which row it belongs to.

    Raises:
        ValueError: tokens that cannot be told apart by image, or placeholders that do not fit them.
    """
    ids: Tensor = inputs["input_ids"]
    counts = _placeholders(model, ids)
    tower = _mllama(model)
    with _evaluating(tower_of(model)):
        if tower is not None:
            return _read_mllama(tower, inputs, counts)
        reader = _reader(model)
        taken = inspect.signature(reader).parameters
        given = {name: value for name, value in inputs.items() if name in taken and value is not None}
        given = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask", "labels")}
        output = reader(**given, return_dict=True)
        lengths = _lengths(output.pooler_output)
        features, tiles = output.last_hidden_state, given["pixel_values"].shape[:-3].numel()
        if isinstance(features, Tensor) and tiles > 1 and len(features) < tiles:  # padded to the most images or tiles
            there = [at for at, length in enumerate(lengths) if length]
            images = [_read_one(reader, given, at, len(lengths)) for at in there]
            lengths = [lengths[at] for at in there]
        else:
            images = _per_image(features, lengths, inputs)
    return TowerTokens(images, _owners(counts, lengths))


def tower_of(model: Any) -> nn.Module:
    """The vision tower as a module.

    Raises:
        ValueError: a model without one.
    """
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


def _reader(model: nn.Module) -> Any:
    for owner in (getattr(model, "base_model", None), model):
        reader = getattr(owner, "get_image_features", None)
        if callable(reader):
            return reader
    return None


def _mllama(model: Any) -> nn.Module | None:
    """The tower of Mllama, which has no ``get_image_features``."""
    if _reader(model) is not None or getattr(getattr(model, "config", None), "model_type", None) != "mllama":
        return None
    return tower_of(model)


def _read_mllama(tower: nn.Module, inputs: Mapping[str, Any], counts: list[int]) -> TowerTokens:
    """Rows come with their own images here, padded to the longest row and to the most tiles; one placeholder each."""
    tiles: Tensor = inputs["aspect_ratio_mask"].bool()  # (B, images, tiles)
    features = tower(
        pixel_values=inputs["pixel_values"],
        aspect_ratio_ids=inputs["aspect_ratio_ids"],
        aspect_ratio_mask=inputs["aspect_ratio_mask"],
    ).last_hidden_state  # (B, images, tiles, T, D)
    if max(counts, default=0) > features.shape[1] or len(counts) != len(features):
        raise ValueError(
            f"TowerQuery: placeholders must match the images of each row, got {counts} placeholders for "
            f"{features.shape[1]} images in each of {len(features)} rows. Let the processor place them."
        )
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    places = [(row, at) for row, count in enumerate(counts) for at in range(count)]
    return TowerTokens([features[row, at][tiles[row, at]].flatten(0, 1) for row, at in places], owners)


def _read_one(reader: Any, given: Mapping[str, Any], at: int, count: int) -> Tensor:
    """Read one image alone (Idefics: one row), of a batch in which they have different numbers of tiles (images)."""
    own = {n: v[at : at + 1] if isinstance(v, Tensor) and len(v) == count else v for n, v in given.items()}
    features: Tensor = reader(**own, return_dict=True).last_hidden_state
    return features.flatten(0, 1)


@contextmanager
def _evaluating(tower: nn.Module) -> Iterator[None]:
    """Queries must not vary: no dropout in the tower, whatever the rest of the model does."""
    training = [module for module in tower.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _placeholders(model: Any, ids: Tensor) -> list[int]:
    for name in ("image_token_id", "image_token_index"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return [int(count) for count in (ids == token).sum(dim=1)]
    raise ValueError(
        f"TowerQuery: model must say which id is an image, got {type(model).__name__} without image_token_id. Give "
        f"attach_memory a query= of your own."
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

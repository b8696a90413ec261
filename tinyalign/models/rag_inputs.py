"""Placing retrieval tokens in a processed batch: every per-token tensor is extended by name, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinyalign.models.splice import insertion_points, splice_tokens

# What a retrieval token gets beside its id. Token types: an ordinary text token, as every family spells it.
FILL: dict[str, float] = {
    "attention_mask": 1,
    "labels": -100,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "image_embeds_position_mask": 0,
    "qformer_input_ids": 0,
}
_NOT_PER_TOKEN = (
    "pixel", "image_sizes", "image_grid", "aspect_ratio", "num_tiles", "image_counts", "sample_ids", "groups",
    "neighbour", "query_", "qformer_", "video", "second_per_grid", "num_crops", "max_supervised",
)  # fmt: skip
_IMAGE_IDS = ("image_token_id", "image_token_index", "media_token_id")
_START_IDS = ("vision_start_token_id", "boi_token_id", "boi_token_index")
_END_IDS = ("vision_end_token_id", "eoi_token_id", "eoi_token_index", "image_end_token_id", "end_image_token_id")
_END_TOKENS = (
    "image_end_token",
    "end_image_token",
    "eoi_token",
    "vision_end_token",
    "fake_image_token",
    "image_break_end_token",
)


def splice_rag(
    batch: Mapping[str, Any],
    rag_token_id: int,
    num_tokens: int,
    *,
    image_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
    bos_id: int | None = None,
) -> dict[str, Any]:
    """Insert retrieval ids behind each row's last image (and its closing marker), or behind BOS in a row without.

    Args:
        batch: what a processor or collator made; `input_ids` and tensors beside them.
        rag_token_id: the id to insert.
        num_tokens: how many per row.
        image_ids: ids of image placeholders.
        end_ids: ids that close an image; one directly behind the image stays with it.
        bos_id: id of BOS.

    Raises:
        ValueError: a tensor of one entry per token whose name is not known, so that nothing is shifted in silence; or a
            batch that holds retrieval tokens already.

    Example:
        >>> batch = {"input_ids": torch.tensor([[1, 9, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        >>> splice_rag(batch, 99, 2, image_ids=[9])["input_ids"].tolist()
        [[1, 9, 99, 99, 5]]
    """
    ids = batch["input_ids"]
    if bool((ids == rag_token_id).any()):
        raise ValueError(
            f"splice_rag: input_ids must hold no retrieval token yet, got {rag_token_id} in them. Splice a batch once."
        )
    B, S = ids.shape
    keep = batch["attention_mask"].bool() if batch.get("attention_mask") is not None else torch.ones_like(ids).bool()
    image = (
        torch.isin(ids, torch.tensor(list(image_ids), device=ids.device))
        if len(image_ids)
        else ids.new_zeros(ids.shape).bool()
    )
    closing = (
        torch.isin(ids, torch.tensor(list(end_ids), device=ids.device)) if len(end_ids) else torch.zeros_like(image)
    )
    behind = image.roll(1, dims=1)
    behind[:, 0] = False
    last = image | (closing & behind)
    first = ids.gather(1, keep.to(torch.int8).argmax(dim=1, keepdim=True))[:, 0]
    place = insertion_points(keep, last, first == bos_id if bos_id is not None else None)
    companions: dict[str, tuple[Tensor, Tensor | float]] = {"input_ids": (ids, rag_token_id)}
    for name, value in batch.items():
        if name == "input_ids" or not isinstance(value, Tensor) or value.shape[:2] != (B, S):
            continue
        if name in FILL:
            companions[name] = (value, FILL[name])
        elif name == "cross_attention_mask":  # Mllama: what the token before may look at
            source = (place - 1).clamp(min=0).view(B, 1, *[1] * (value.dim() - 2)).expand(B, 1, *value.shape[2:])
            companions[name] = (value, value.gather(1, source).expand(B, num_tokens, *value.shape[2:]))
        elif name == "position_ids" or not name.startswith(_NOT_PER_TOKEN):
            raise ValueError(
                f"splice_rag: tensors beside input_ids must be known by name, got {name!r} of shape "
                f"{tuple(value.shape)}. "
                f"Extend it yourself, or leave it out before splicing (known: {sorted(FILL)}, cross_attention_mask)."
            )
    blank = torch.zeros(B, S, 1, device=ids.device)
    spliced = splice_tokens(blank, blank.new_zeros(B, num_tokens, 1), place, companions)
    return {**batch, **spliced.companions}


def instruction_of(
    batch: Mapping[str, Any], *, image_ids: Sequence[int] = (), rag_token_id: int | None = None, pad_id: int = 0
) -> dict[str, Any]:
    """Return a batch as it was before anything was answered, for whatever makes queries of it.

    `labels` are gone, supervised ids are blanked, and `attention_mask` keeps the instruction alone: neither padding,
    nor image placeholders, nor retrieval tokens, nor anything from the first supervised token on. Shapes stay.

    Args:
        batch: `input_ids` and what stands beside them.
        image_ids: ids of image placeholders, and of what closes an image; they stay in `input_ids`.
        rag_token_id: id of retrieval tokens, blanked as well.
        pad_id: what ids are blanked with; padding where there is no `attention_mask`.

    Example:
        >>> ids, labels = torch.tensor([[1, 9, 5, 6]]), torch.tensor([[-100, -100, -100, 6]])
        >>> asked = instruction_of({"input_ids": ids, "labels": labels}, image_ids=[9])
        >>> asked["input_ids"].tolist(), asked["attention_mask"].tolist()
        ([[1, 9, 5, 0]], [[1, 0, 1, 0]])
    """
    ids, labels, given = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    image = torch.isin(ids, torch.tensor(list(image_ids), dtype=torch.long, device=ids.device))
    keep = given.bool() if isinstance(given, Tensor) and given.shape == ids.shape else ids != pad_id
    keep = keep & ~image
    blank = torch.zeros_like(image) if rag_token_id is None else ids == rag_token_id
    if labels is not None:
        keep = keep & ((labels != -100).cumsum(dim=1) == 0)
        blank = blank | ((labels != -100) & ~image)
    asked = {name: value for name, value in batch.items() if name != "labels"}
    return {**asked, "input_ids": ids.masked_fill(blank, pad_id), "attention_mask": (keep & ~blank).to(ids.dtype)}


def check_companions(ids: Tensor, batch: Mapping[str, Any], where: str) -> None:
    """Refuse tensors beside `input_ids` that have another length: models read some of them without an error.

    Raises:
        ValueError: one of them is shorter or longer, by name.
    """
    for name in (*FILL, "cross_attention_mask"):
        value = batch.get(name)
        own_mask = name == "attention_mask" and isinstance(value, Tensor) and value.dim() != 2  # a user's (B, 1, S, S)
        if not isinstance(value, Tensor) or name.startswith("qformer_") or own_mask:
            continue
        if value.shape[:2] != ids.shape:
            raise ValueError(
                f"{where}: {name} must have the shape of input_ids {tuple(ids.shape)}, got {tuple(value.shape)}. "
                f"Splice it with the batch: aligned.splice(batch)."
            )


def placement_of(model: Any, processor: Any) -> dict[str, Any]:
    """Read off a model and its processor which ids are images, which close them, and which is BOS."""
    tokenizer = getattr(processor, "tokenizer", None) if processor is not None else None
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    image_ids = _ids_of((config, processor), _IMAGE_IDS)
    end_ids = _ids_of((config, processor), _END_IDS)
    if tokenizer is not None:
        named = (getattr(processor, name, None) for name in _END_TOKENS)
        end_ids |= {tokenizer.convert_tokens_to_ids(str(token)) for token in named if token is not None}
    bos = getattr(tokenizer, "bos_token_id", None) if tokenizer is not None else getattr(text, "bos_token_id", None)
    return {"image_ids": sorted(image_ids), "end_ids": sorted(i for i in end_ids if isinstance(i, int)), "bos_id": bos}


def image_markers(model: Any) -> list[int]:
    """Ids of placeholders and of what opens and closes an image: none of them is a word of the instruction."""
    return sorted(_ids_of((model.config,), (*_IMAGE_IDS, *_START_IDS, *_END_IDS)))


def pad_of(model: Any) -> int:
    """Id of padding, 0 where a model names none."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) else 0


def _ids_of(owners: Sequence[Any], names: Sequence[str]) -> set[int]:
    found = (getattr(owner, name, None) for owner in owners if owner is not None for name in names)
    return {value for value in found if isinstance(value, int) and not isinstance(value, bool)}

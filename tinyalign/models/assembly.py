"""From a batch to what the language model reads: ``[H_V, H_R, H_I]``, with masks and labels beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tinyalign.models.outputs import Retrieved
from tinyalign.models.pair_encoder import pool_queries
from tinyalign.models.retrieval import arm_neighbours, clear_rows
from tinyalign.models.splice import fill_placeholders, insertion_points, position_ids_of, splice_tokens
from tinyalign.models.vision import pack_images

if TYPE_CHECKING:
    from tinyalign.models.vlm import TinyAlignVLM


class Batch(NamedTuple):
    """The arguments of `TinyAlignVLM.forward` that say what is in the batch."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    pixel_values: Tensor | None = None
    image_features: Tensor | None = None
    image_counts: Tensor | None = None
    sample_ids: Tensor | None = None
    groups: Tensor | None = None
    neighbour_ids: Tensor | None = None
    neighbour_scores: Tensor | None = None
    retrieved: Any = None
    query_text_ids: Tensor | None = None
    query_text_mask: Tensor | None = None
    causal_only: bool = False


class Embedded(NamedTuple):
    """What the language model reads.

    Shape:
        embeds: (B, S + T, D). attention_mask: (B, S + T), bool, and position_ids: (B, S + T), both None where
        causality hides all padding. labels: (B, S + T) or None.
    """

    embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor | None
    retrieved: Retrieved | None


def embed_batch(model: TinyAlignVLM, batch: Batch, arm: str) -> Embedded:
    """Embed text and images, retrieve, and insert the retrieval tokens."""
    ids = batch.input_ids
    if ids.dim() != 2:
        raise ValueError(
            f"TinyAlignVLM.forward: input_ids must have shape (B, S), got {tuple(ids.shape)}. Add the batch dimension."
        )
    for name in ("attention_mask", "labels"):
        beside = getattr(batch, name)
        if beside is not None and beside.shape != ids.shape:
            raise ValueError(
                f"TinyAlignVLM.forward: {name} must have the shape of input_ids {tuple(ids.shape)}, got "
                f"{tuple(beside.shape)}. Retrieval tokens are added by the model, to all of them."
            )
    keep = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    is_image = ids == model.config.image_token_id
    features, counts = _image_features(model, batch, is_image)
    embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
    if features.shape[0]:
        visual = model.connector(features.to(model.connector.weight_dtype))  # (num_images, N, d)
    else:
        visual = embeds.new_zeros(0, max(features.shape[1], 1), embeds.shape[2])
    embeds = fill_placeholders(embeds, is_image, visual.flatten(0, 1), counts * visual.shape[1])
    if not features.shape[0] and model.training:
        # A data-parallel rank without images must still take part in the connector's reduction.
        blank = features.new_zeros(1, model.connector.input_dim, dtype=model.connector.weight_dtype)
        embeds = embeds + 0.0 * model.connector(blank).sum().to(embeds.dtype)
    retrieved = _retrieve(model, batch, arm, features, counts)
    labels = batch.labels
    if retrieved is not None:
        assert model.rag_connector is not None
        tokens, token_mask = model.rag_connector(retrieved.values, retrieved.mask, retrieved.scores)
        companions: dict[str, tuple[Tensor, Tensor | float]] = {"attention_mask": (keep, token_mask)}
        if labels is not None:
            companions["labels"] = (labels, -100)
        place = insertion_points(keep, is_image, _starts_with_bos(model, ids, keep))
        embeds, extended, _ = splice_tokens(embeds, tokens, place, companions)
        keep, labels = extended["attention_mask"], extended.get("labels")
    if batch.causal_only:
        _check_causal_only(keep)
        return Embedded(embeds, None, None, labels, retrieved)
    return Embedded(embeds, keep, position_ids_of(keep), labels, retrieved)


def _check_causal_only(keep: Tensor) -> None:
    """On the CPU, where asking costs nothing: padding stands on the right alone."""
    if keep.device.type != "cpu":
        return
    gaps = ((keep[:, 1:] & ~keep[:, :-1]).any(dim=1) | ~keep[:, 0]).nonzero().flatten()
    if gaps.numel():
        raise ValueError(
            f"TinyAlignVLM.forward: causal_only must be False where a position before a kept one is masked, got such a "
            f"gap in rows {gaps.tolist()}. Leave it out for left padding and for rows with too few neighbours."
        )


def _image_features(model: TinyAlignVLM, batch: Batch, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """Features of all images (num_images, N, D), and how many images each row has."""
    if batch.pixel_values is not None and batch.image_features is not None:
        raise ValueError(
            "TinyAlignVLM.forward: pixel_values must be None when image_features are given, got both. Pass one of them."
        )
    if batch.image_features is not None:
        features = batch.image_features
        if features.dim() != 3 or features.shape[-1] != model.connector.input_dim:
            raise ValueError(
                f"TinyAlignVLM.forward: image_features must have shape (num_images, N, {model.connector.input_dim}), "
                f"got {tuple(features.shape)}. Use model.vision(pixel_values), or the tower the model was built with."
            )
    elif batch.pixel_values is not None and batch.pixel_values.shape[0]:
        features = model.vision(batch.pixel_values)
    else:
        width, dtype = model.connector.input_dim, model.connector.weight_dtype
        features = torch.zeros(0, 1, width, dtype=dtype, device=is_image.device)
    if batch.image_counts is None:
        counts = (
            is_image.sum(dim=1) // max(features.shape[1], 1)
            if features.shape[0]
            else is_image.new_zeros(len(is_image), dtype=torch.long)
        )
        return features, counts
    if batch.image_counts.shape != is_image.shape[:1]:
        raise ValueError(
            f"TinyAlignVLM.forward: image_counts must have shape ({is_image.shape[0]},), got "
            f"{tuple(batch.image_counts.shape)}. Give the number of images of each row."
        )
    return features, batch.image_counts.to(is_image.device)


def _retrieve(model: TinyAlignVLM, batch: Batch, arm: str, features: Tensor, counts: Tensor) -> Retrieved | None:
    """What the arm gives each row; None where no token is to be inserted."""
    if arm == "off":
        return None
    config = model.config
    if model.rag_connector is None or model.prompt_latents is None:
        raise ValueError(
            f"TinyAlignVLM.forward: retrieval must be 'off' for a model without a retrieval branch, got {arm!r}. "
            "Build it with memory= or compressor=."
        )
    B, K, device = len(batch.input_ids), config.num_neighbours, batch.input_ids.device
    if arm == "prompt":
        values = model.prompt_latents.expand(B, -1, -1, -1)
        return Retrieved(
            values, torch.ones(B, values.shape[1], dtype=torch.bool, device=device), values.new_ones(B, values.shape[1])
        )
    if batch.retrieved is not None:
        return _given(model, batch.retrieved, B)
    if batch.neighbour_ids is not None:
        values, mask = _bank(model).gather(batch.neighbour_ids)
        return Retrieved(values, mask, batch.neighbour_scores, batch.neighbour_ids)
    if arm == "bank" and model.training and batch.sample_ids is None:
        raise ValueError(
            "TinyAlignVLM.forward: sample_ids must be given in training, got None. Without them a sample could "
            "retrieve itself; pass sample_ids (LlavaCollator does), or neighbour_ids made with exclusion, or call "
            "model.eval()."
        )
    memory = _bank(model)
    with torch.no_grad():
        queries, has_query = _queries(model, batch, features.detach(), counts)
        found = clear_rows(
            arm_neighbours(
                memory, arm, queries, k=K, sample_ids=batch.sample_ids, groups=batch.groups, seed=config.retrieval_seed
            ),
            has_query,
        )
        values, mask = memory.gather(found.ids)
    return Retrieved(values, mask, found.scores, found.ids)


def _queries(model: TinyAlignVLM, batch: Batch, features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A query per row, and whether the row has anything to ask by."""
    encoder, B = model.query_encoder, len(counts)
    if batch.query_text_ids is not None:
        everything = torch.ones_like(counts, dtype=torch.bool)
        if features.shape[0]:
            rows, mask = pack_images(features, counts)
        else:
            rows, mask = features.new_zeros(B, 1, features.shape[2]), ~everything[:, None]
        return encoder.query(rows, batch.query_text_ids, mask, batch.query_text_mask), everything
    queries = pool_queries(encoder, features, counts)
    if not features.shape[0]:
        queries = features.new_ones(B, _bank(model).key_dim)
    return queries, counts > 0


def _given(model: TinyAlignVLM, retrieved: Any, B: int) -> Retrieved:
    values, mask, *rest = retrieved
    expected = (B, model.config.num_latents, model.config.latent_dim)
    if values.dim() != 4 or (values.shape[0], *values.shape[2:]) != expected:
        raise ValueError(
            f"TinyAlignVLM.forward: retrieved must begin with values of shape ({B}, K, {expected[1]}, {expected[2]}), "
            f"got {tuple(values.shape)}. Take them from memory.gather(neighbour_ids)."
        )
    return Retrieved(values, mask, *rest)


def _bank(model: TinyAlignVLM) -> Any:
    if model.memory is None:
        where = model.config.memory_path
        raise ValueError(
            "TinyAlignVLM.forward: memory must be attached to retrieve, got "
            f"None{'' if where is None else f' (nothing was found at {where!r} beside the checkpoint)'}. Set "
            "model.memory = MemoryBank.load(path), pass memory= to from_pretrained, or use retrieval='off'."
        )
    return model.memory


def _starts_with_bos(model: TinyAlignVLM, ids: Tensor, keep: Tensor) -> Tensor:
    bos = model.config.bos_token_id
    first = keep.to(torch.int8).argmax(dim=1, keepdim=True)
    if bos is None:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    starts: Tensor = ids.gather(1, first) == bos
    return starts[:, 0]

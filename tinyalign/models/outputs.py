"""What the composed model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils.generic import ModelOutput


class Retrieved(NamedTuple):
    """Bank values for every row of a batch.

    Shape:
        values: (B, K, L, latent_dim). mask: (B, K), bool, False where nothing was found. scores: (B, K) or None.
        ids: (B, K), int64, -1 for nothing, or None.
    """

    values: Tensor
    mask: Tensor
    scores: Tensor | None = None
    ids: Tensor | None = None


@dataclass
class TinyAlignOutput(ModelOutput):  # type: ignore[misc]  # transformers is untyped here
    """Loss, logits and what was retrieved.

    Args:
        loss: mean negative log-likelihood of the supervised tokens, in nats.
        logits: (B, S + T, V) with T retrieval tokens in every row; None in training, where only supervised positions
            pass through the head (ask for them with ``return_logits=True``).
        past_key_values: the language model's cache.
        hidden_states: the language model's, when asked for.
        attentions: the language model's, when asked for.
        labels: (B, S + T), -100 at the retrieval tokens.
        neighbour_ids: (B, K), -1 for nothing.
        neighbour_scores: (B, K).
        per_sample_nll: (B,), sum over each row's supervised tokens, in nats, float32.
        per_sample_tokens: (B,), how many those are.

    Shape:
        loss: (). logits: (B, S + T, V). labels: (B, S + T). neighbour_ids, neighbour_scores: (B, K).
        per_sample_nll, per_sample_tokens: (B,).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    labels: Tensor | None = None
    neighbour_ids: Tensor | None = None
    neighbour_scores: Tensor | None = None
    per_sample_nll: Tensor | None = None
    per_sample_tokens: Tensor | None = None

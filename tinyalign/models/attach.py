"""Retrieval for a model that exists already: attached as adapters are, and detached without a trace."""

from __future__ import annotations

from typing import Any

from torch import nn

from tinyalign.connectors import RAGConnector
from tinyalign.memory import MemoryBank
from tinyalign.models.attached import AttachedVLM
from tinyalign.models.configuration import check_arm
from tinyalign.models.rag_hook import is_plugged
from tinyalign.models.rag_query import Query, TowerQuery

_SECOND_TABLE = "embed_tokens_per_layer"


def attach_memory(
    vlm: nn.Module,
    processor: Any = None,
    *,
    memory: MemoryBank | None = None,
    connector: RAGConnector,
    k: int = 5,
    query: Query | None = None,
    rag_token: str = "<rag>",
    retrieval: str = "bank",
) -> AttachedVLM:
    """Attach a retrieval branch to a model that exists, without subclassing or changing it.

    Args:
        vlm: any Hugging Face model with ``get_input_embeddings()``: a vision-language model or a causal language model.
        processor: the model's processor (or tokenizer), so that `AttachedVLM.processor` can place the tokens.
        memory: the bank.
        connector: as wide as the model's embeddings.
        k: entries per row.
        query: makes queries (B, D) from a batch without its answers (see `instruction_of`); by default from the model's
            own frozen tower and the instruction, see `TowerQuery`.
        rag_token: its name; it must not be a token of the tokenizer already.
        retrieval: the arm used when a call names none.

    Raises:
        TypeError: a model without input embeddings.
        ValueError: a model that is attached already, a tokenizer that knows `rag_token`, a connector of another width,
            or a model that looks ids up in a second table.
        FingerprintMismatch: queries that are not made as the bank's keys were.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> llm = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                                    num_attention_heads=1, vocab_size=9))
        >>> aligned = attach_memory(llm, connector=RAGConnector(4, 8), k=1)
        >>> aligned.num_latents
        32
    """
    where = "attach_memory"
    embeddings: Any = vlm.get_input_embeddings() if hasattr(vlm, "get_input_embeddings") else None  # type: ignore[operator]
    if not isinstance(embeddings, nn.Module) or getattr(embeddings, "weight", None) is None:
        raise TypeError(
            f"{where}: vlm must have input embeddings, got {type(vlm).__name__}. For a model of your own use "
            f"splice_tokens in its forward."
        )
    if is_plugged(vlm):
        raise ValueError(
            f"{where}: vlm must not be attached already, got {type(vlm).__name__} with a branch. Detach it."
        )
    table: Any = embeddings.weight
    rows, width = int(table.shape[0]), int(table.shape[1])
    if connector.output_dim != width:
        raise ValueError(
            f"{where}: connector must be as wide as the model's embeddings, {width}, got {connector.output_dim}. Build "
            f"RAGConnector(latent_dim, {width})."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is not None and rag_token in tokenizer.get_vocab():
        raise ValueError(
            f"{where}: rag_token must be new to the tokenizer, got {rag_token!r} which it knows. Choose another name."
        )
    known = rows if tokenizer is None else len(tokenizer)
    inside = known < rows
    if not inside and any(name.rpartition(".")[2] == _SECOND_TABLE for name, _ in vlm.named_modules()):
        raise ValueError(
            f"{where}: vlm must have an unused row in its embeddings, got {type(vlm).__name__}, which looks ids up in "
            f"a second table and has {rows} rows for {known} tokens. Resize its embeddings by one row first."
        )
    latents = 32 if memory is None else int(memory.value_shape[0])
    if memory is not None and tuple(memory.value_shape) != (latents, connector.latent_dim):
        raise ValueError(
            f"{where}: connector must read the bank's values, of shape {tuple(memory.value_shape)}, got latents of "
            f"width {connector.latent_dim}. Build it with the width of the bank's latents."
        )
    aligned = AttachedVLM(
        vlm,
        connector,
        rows - 1 if inside else max(rows, known),
        num_neighbours=k,
        num_latents=latents,
        retrieval=retrieval,
    )
    check_arm(where, retrieval)
    aligned._processor = processor
    aligned._query = TowerQuery.of(vlm) if query is None else query
    aligned._memory.value = memory
    check_query(aligned)
    aligned.plug.install()
    return aligned.train(vlm.training)  # so that a model opened to be used can be used


def check_query(aligned: AttachedVLM) -> None:
    """Refuse a bank whose keys were made otherwise than the queries of this model are."""
    if aligned.memory is not None and aligned.memory.fingerprint:
        made_by = aligned.query_fingerprint()
        if made_by:
            aligned.memory.require_fingerprint(made_by, "key.")

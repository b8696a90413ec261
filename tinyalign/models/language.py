"""Running the language model over embeddings, with its head on the supervised positions where that is enough."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from tinyalign.models.assembly import Batch, Embedded
from tinyalign.models.loss import IGNORE_INDEX, labelled_rows, rows_before_head, token_nll
from tinyalign.models.outputs import TinyAlignOutput

_KNOWN = ("output_attentions", "output_hidden_states", "output_router_logits", "cache_position", "is_causal")


def check_keywords(language_model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse an argument that nobody reads: Hugging Face models would swallow a misspelt one in silence."""
    if not kwargs:
        return
    taken = set(inspect.signature(language_model.forward).parameters) | set(_KNOWN)
    taken -= {"input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids"}
    for name, value in kwargs.items():
        if name not in taken and value is not None:
            raise TypeError(
                f"TinyAlignVLM.forward: arguments must be known to the model, got {name!r}. Check the spelling; "
                "input_ids is what places images and retrieval, not inputs_embeds."
            )


def read_language(
    language_model: Any,
    embedded: Embedded,
    kwargs: dict[str, Any],
    *,
    logits_everywhere: bool,
    max_supervised_tokens: int | None,
    num_items_in_batch: Tensor | int | None,
) -> TinyAlignOutput:
    """Run the language model and, where there are labels, take the loss in float32.

    Args:
        language_model: a causal language model.
        embedded: what it reads.
        kwargs: further arguments for it.
        logits_everywhere: pass every position through the head; otherwise only those that predict a label.
        max_supervised_tokens: see `labelled_rows`.
        num_items_in_batch: what the loss is divided by; this batch's supervised tokens when None.
    """
    labels, retrieved = embedded.labels, embedded.retrieved
    given = {name: value for name, value in kwargs.items() if value is not None}
    if "position_ids" in inspect.signature(_unwrapped(language_model).forward).parameters:
        given |= {} if embedded.position_ids is None else {"position_ids": embedded.position_ids}
    if labels is not None:
        given.setdefault("use_cache", False)
    given |= {"inputs_embeds": embedded.embeds, "attention_mask": embedded.attention_mask}
    found = {
        "labels": labels,
        "neighbour_ids": None if retrieved is None else retrieved.ids,
        "neighbour_scores": None if retrieved is None else retrieved.scores,
    }
    if labels is None:
        return _output(language_model(**given), found)
    rows = labelled_rows(labels, max_supervised_tokens)
    if logits_everywhere:
        output = language_model(**given)
        found["logits"], row_logits = output.logits, _gather(output.logits, rows.positions)
    else:
        with rows_before_head(language_model.get_output_embeddings(), rows.positions) as chosen:
            output = language_model(**given)
        row_logits = output.logits if chosen else _gather(output.logits, rows.positions)
    nll = token_nll(row_logits, rows.targets)
    counts = (rows.targets != IGNORE_INDEX).sum(dim=1)
    total = counts.sum() if num_items_in_batch is None else num_items_in_batch
    found |= {"loss": nll.sum() / total, "per_sample_nll": nll.sum(dim=1), "per_sample_tokens": counts}
    return _output(output, found)


def continue_language(
    language_model: Any, batch: Batch, cache: Any, use_cache: bool | None, kwargs: dict[str, Any]
) -> TinyAlignOutput:
    """Take one more step from a cache that already holds image and retrieval tokens."""
    if batch.pixel_values is not None or batch.image_features is not None or batch.labels is not None:
        raise ValueError(
            "TinyAlignVLM.forward: pixel_values, image_features and labels must be None when past_key_values hold a "
            "prompt, got one of them. Pass only the new ids."
        )
    output = language_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        past_key_values=cache,
        use_cache=use_cache,
        **kwargs,
    )
    return _output(output, {})


def write_language(language_model: Any, embedded: Embedded, kwargs: dict[str, Any]) -> Any:
    """Generate behind the embeddings; a language model without a pad token pads with its end of sequence."""
    settings = kwargs.get("generation_config", language_model.generation_config)
    if "pad_token_id" not in kwargs and getattr(settings, "pad_token_id", None) is None:
        ends = getattr(settings, "eos_token_id", None)
        kwargs["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    assert embedded.attention_mask is not None  # prompts are padded on the left
    mask = embedded.attention_mask.long()
    return language_model.generate(inputs_embeds=embedded.embeds, attention_mask=mask, **kwargs)


def _output(output: Any, found: dict[str, Any]) -> TinyAlignOutput:
    logits = found.pop("logits", None) if "loss" in found else output.logits
    return TinyAlignOutput(
        logits=logits,
        past_key_values=output.get("past_key_values"),
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        **found,
    )


def _gather(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))


def _unwrapped(language_model: Any) -> Any:
    """The model under PEFT's wrapper, whose own forward takes anything."""
    return language_model.get_base_model() if hasattr(language_model, "get_base_model") else language_model

"""Run a model over a loader and keep what each sample's target cost, under one condition."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyalign.theory._input import as_numpy
from tinyalign.theory.likelihood import IGNORED, sequence_nll
from tinyalign.theory.nll import NLLTable, integers
from tinyalign.theory.null_input import NullInput

__all__ = ["ARMS", "CONDITIONS", "collect_nll", "without_images"]

ARMS = ("bank", "off", "shuffled", "random", "constant", "self", "prompt")
CONDITIONS = ("full", "no_image", "null", "retrieval", *ARMS)
_IMAGE_KEYS = frozenset(
    {
        "pixel_values",
        "image_features",
        "image_counts",
        "image_sizes",
        "image_grid_thw",
        "pixel_attention_mask",
        "image_attention_mask",
        "mm_token_type_ids",
        "neighbour_ids",
        "neighbour_scores",
        "retrieved",
        "queries",
        "query_text_ids",
        "query_text_mask",
        "position_ids",
    }
)
_RECORD_KEYS = frozenset({"sample_ids", "groups", "group_ids", "target_bytes", "ids"})
_PLACEHOLDER = -200


def collect_nll(
    model: Any,
    loader: Iterable[Mapping[str, Any]],
    *,
    condition: str = "full",
    tokenizer: Any = None,
    null_input: NullInput | None = None,
    progress: bool = False,
    chunk: int = 16384,
) -> NLLTable:
    """Collect the summed NLL, token and byte counts of every sample's target.

    Conditions: ``"full"`` calls the model as it is; ``"no_image"`` takes the image, its placeholders and retrieval away
    and leaves the instruction; ``"null"`` leaves only a trained ``NullInput``; ``"retrieval"`` (or ``"bank"``) and the
    control arms ``"off"``, ``"shuffled"``, ``"random"``, ``"constant"``, ``"self"`` and ``"prompt"`` are passed on as
    the model's ``retrieval=`` argument.

    Args:
        model: a ``TinyAlignVLM`` or anything whose output has ``per_sample_nll`` and ``per_sample_tokens``; otherwise
            any causal language model that returns ``logits`` aligned with the labels.
        loader: batches with ``"labels"`` (-100 where unsupervised) and, if known, ``"sample_ids"``, ``"groups"`` and
            ``"target_bytes"``; without ids the running number of the record stands for it.
        condition: one of the names above.
        tokenizer: counts target bytes and names the tokenizer; without it bytes are unknown.
        null_input: the trained prompt for ``condition="null"``.
        progress: show a progress bar.
        chunk: vocabulary entries per float32 chunk.

    Units:
        nats.

    Raises:
        ValueError: an unknown condition, no null input where one is needed, a batch without labels, a sample without
            a target token, ids or groups that are not integers, or an empty loader.
        TypeError: an arm is asked of a model whose forward takes no ``retrieval``.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
        >>> ids = torch.randint(3, 20, (4, 6))
        >>> table = collect_nll(model, [{"input_ids": ids, "labels": ids, "sample_ids": torch.arange(4)}])
        >>> len(table), table.tokens.tolist()  # the first token of a row is predicted by nothing
        (4, [5, 5, 5, 5])
    """
    if condition not in CONDITIONS:
        raise ValueError(
            f"collect_nll: condition must be one of {', '.join(CONDITIONS)}, got {condition!r}. Use one of them."
        )
    if condition == "null" and null_input is None:
        raise ValueError(
            "collect_nll: null_input must be given for condition='null', got None. Train one with train_null_input: an "
            "untrained null model adds its own error to V-information."
        )
    accepted = _accepted_arguments(model)
    arm = _arm(condition, accepted, model)
    dropped = _image_tokens(model) if condition == "no_image" else ()
    if arm == "off" and getattr(model, "rag_token_id", None) is not None:
        dropped += (int(model.rag_token_id),)
    columns: dict[str, list[np.ndarray[Any, Any]]] = {
        name: [] for name in ("nll", "tokens", "sample_ids", "groups", "bytes", "targets")
    }
    count = 0
    was_training = bool(getattr(model, "training", False))
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.inference_mode():
            for raw in _progress(loader, progress, condition):
                batch = _to_device(raw, model)
                labels = _labels(batch, count)
                if condition == "null":
                    assert null_input is not None
                    result = null_input(getattr(model, "language_model", model), labels)
                    nll, tokens = result.nll, result.tokens
                else:
                    inputs = dict(batch)
                    if condition == "no_image":
                        inputs = without_images(inputs, dropped)
                    elif dropped:
                        inputs = _closed_up(inputs, dropped)
                    nll, tokens = _forward(model, inputs, arm, accepted, chunk)
                _record(columns, batch, labels, nll, tokens, tokenizer, count)
                count += len(labels)
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
    if count == 0:
        raise ValueError("collect_nll: loader must yield at least one batch, got none. Check the data set and sampler.")
    stacked = {name: np.concatenate(parts) if parts else None for name, parts in columns.items()}
    return NLLTable(**stacked, condition=condition, tokenizer=_tokenizer_name(tokenizer, model))  # type: ignore[arg-type]


def without_images(batch: Mapping[str, Any], image_tokens: tuple[int, ...] = (_PLACEHOLDER,)) -> dict[str, Any]:
    """Return the batch with images and their placeholder tokens gone, each row closed up on its padding side.

    Args:
        batch: ``input_ids``, and any of ``attention_mask``, ``labels`` and image entries.
        image_tokens: the ids that stand for image features.

    Shape:
        input_ids, attention_mask, labels: (B, T) -> (B, T'), T' the longest row that is left.

    Example:
        >>> batch = {"input_ids": torch.tensor([[1, -200, 5]]), "labels": torch.tensor([[-100, -100, 5]])}
        >>> without_images(batch)["labels"].tolist()
        [[-100, 5]]
    """
    return _closed_up({name: value for name, value in batch.items() if name not in _IMAGE_KEYS}, image_tokens)


def _closed_up(batch: Mapping[str, Any], tokens: tuple[int, ...]) -> dict[str, Any]:
    """Drop some token ids from every row and move the rest together."""
    ids = batch["input_ids"]
    shown = batch.get("attention_mask")
    keep = torch.ones_like(ids, dtype=torch.bool) if shown is None else shown.bool()
    left_padded = shown is not None and bool((~keep[:, 0]).any())
    for token in tokens:
        keep = keep & (ids != token)
    width = int(keep.sum(dim=1).max())
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    kept = keep.gather(1, order)
    if left_padded:
        shift = kept.to(torch.int8).argsort(dim=1, stable=True)
        order, kept = order.gather(1, shift), kept.gather(1, shift)
    result = dict(batch)
    result["input_ids"] = torch.where(kept, ids.gather(1, order), torch.zeros_like(order))
    result["attention_mask"] = kept.long()
    if batch.get("labels") is not None:
        labels = batch["labels"].gather(1, order)
        result["labels"] = torch.where(kept, labels, torch.full_like(labels, IGNORED))
    return result


def _forward(
    model: Any, inputs: dict[str, Any], arm: str | None, accepted: set[str], chunk: int
) -> tuple[Tensor, Tensor]:
    call = {name: value for name, value in inputs.items() if name not in _RECORD_KEYS or name in accepted}
    if arm is not None:
        call["retrieval"] = arm
    output = model(**call)
    if getattr(output, "per_sample_nll", None) is not None:
        return output.per_sample_nll, output.per_sample_tokens
    labels = getattr(output, "labels", None)
    result = sequence_nll(output.logits, inputs["labels"] if labels is None else labels, chunk=chunk)
    return result.nll, result.tokens


def _arm(condition: str, accepted: set[str], model: Any) -> str | None:
    takes_retrieval = "retrieval" in accepted
    if condition in ("full", "null"):
        return None
    if condition == "no_image":
        return "off" if takes_retrieval else None
    if not takes_retrieval:
        raise TypeError(
            f"collect_nll: condition {condition!r} must be asked of a model whose forward takes retrieval=, got "
            f"{type(model).__name__}. Use 'full', 'no_image' or 'null' for a model without retrieval."
        )
    return "bank" if condition == "retrieval" else condition


def _accepted_arguments(model: Any) -> set[str]:
    """Names that the model's forward takes; a wrapper that names its arm takes retrieval's own arguments as well."""
    names = set(inspect.signature(getattr(model, "forward", model)).parameters)
    if hasattr(model, "rag_token_id"):
        names |= {"retrieval", "sample_ids", "groups"}
    return names


def _labels(batch: Mapping[str, Any], count: int) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"collect_nll: every batch must hold labels, got keys {sorted(batch)}. Supervise the answer tokens and set "
            "all others to -100."
        )
    # The first token of a row is never predicted by a causal model, so it cannot be a target.
    labels = labels.clone()
    labels[:, 0] = IGNORED
    empty = (labels != IGNORED).sum(dim=1) == 0
    if bool(empty.any()):
        row = int(empty.nonzero()[0, 0])
        ids = batch.get("sample_ids")
        name = f"sample {as_numpy(ids)[row]}" if ids is not None else f"record {count + row}"
        raise ValueError(
            f"collect_nll: labels must leave a target token in every row, got none for {name}. The label mask or the "
            "length limit removed its answer; drop it or raise the limit."
        )
    return labels  # type: ignore[no-any-return]


def _record(
    columns: dict[str, list[np.ndarray[Any, Any]]],
    batch: Mapping[str, Any],
    labels: Tensor,
    nll: Tensor,
    tokens: Tensor,
    tokenizer: Any,
    count: int,
) -> None:
    import xxhash

    size = len(labels)
    columns["nll"].append(nll.double().cpu().numpy())
    columns["tokens"].append(tokens.long().cpu().numpy())
    ids = batch.get("sample_ids")
    ids = np.arange(count, count + size) if ids is None else integers(ids, size, "sample_ids")
    columns["sample_ids"].append(ids)
    groups = batch.get("groups", batch.get("group_ids"))
    columns["groups"].append(ids if groups is None else integers(groups, size, "groups"))
    targets = [row[row != IGNORED].tolist() for row in labels.cpu()]
    hashes = [xxhash.xxh3_64_intdigest(np.asarray(row, dtype=np.int64).tobytes()) >> 1 for row in targets]
    columns["targets"].append(np.asarray(hashes, dtype=np.int64))
    if batch.get("target_bytes") is not None:
        columns["bytes"].append(integers(batch["target_bytes"], size, "target_bytes"))
    elif tokenizer is not None:
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in targets]
        columns["bytes"].append(np.asarray([max(1, len(text.encode())) for text in texts], dtype=np.int64))


def _to_device(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    moved = {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "iufb" else value
        for name, value in batch.items()
    }
    if parameter is None:
        return moved
    return {name: value.to(parameter.device) if isinstance(value, Tensor) else value for name, value in moved.items()}


def _image_tokens(model: Any) -> tuple[int, ...]:
    config = getattr(model, "config", None) or getattr(getattr(model, "model", None), "config", None)
    named = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return (_PLACEHOLDER, *(int(token) for token in named if token is not None))


def _tokenizer_name(tokenizer: Any, model: Any) -> str:
    import xxhash

    if tokenizer is not None:
        words = sorted(tokenizer.get_vocab().items())
        return f"{len(words)}:{xxhash.xxh3_64_hexdigest(repr(words).encode())}"
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    size = getattr(text, "vocab_size", None)
    return "" if size is None else f"vocab:{size}"


def _progress(loader: Iterable[Mapping[str, Any]], show: bool, condition: str) -> Iterable[Mapping[str, Any]]:
    if not show:
        return loader
    from tqdm.auto import tqdm

    return tqdm(loader, desc=f"NLL ({condition})", leave=False)  # type: ignore[no-any-return]

"""Keys from any sentence-transformers model: text, or images and text in one space."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tinyalign._files import hash_tensors
from tinyalign.memory.fingerprint import Fingerprint

# Settings of this name say where a model lies and what it has done so far, not what it does.
PASSING = ("path", "file", "version", "commit", "dtype", "architectures", "warnings", "cache", "init_")


class SentenceTransformerKey:
    """A key and query encoder that knows nothing of the language model being trained.

    Wraps a sentence-transformers model: for texts, or, with a CLIP-style one, for images and texts alike. Queries and
    keys may have prompts of their own, as retrieval models ask for.

    Args:
        model: a ``SentenceTransformer``, or the folder or name that one is loaded from.
        batch_size: inputs encoded at once.
        query_prompt: put before every query.
        key_prompt: put before every key.
        device: where the model runs; its own choice when absent.

    Raises:
        ValueError: the batch size is not positive.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int = 32,
        query_prompt: str | None = None,
        key_prompt: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"SentenceTransformerKey: batch_size must be positive, got {batch_size}. Pass at least 1.")
        if isinstance(model, (str, Path)):
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(str(model), device=None if device is None else str(device))
        self.model = model.eval()
        self.batch_size, self.device = batch_size, device
        self.query_prompt, self.key_prompt = query_prompt, key_prompt

    def keys(self, inputs: Sequence[Any]) -> Tensor:
        """Return keys (n, D) float32 of texts or images."""
        return self._encode(inputs, self.key_prompt)

    def queries(self, inputs: Sequence[Any]) -> Tensor:
        """Return queries (n, D) float32 of texts or images."""
        return self._encode(inputs, self.query_prompt)

    def _encode(self, inputs: Sequence[Any], prompt: str | None) -> Tensor:
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            found = type(inputs).__name__
            raise TypeError(f"SentenceTransformerKey: inputs must be a list, got {found}. Wrap a single one: [text].")
        if not inputs:
            return torch.zeros(0, self.key_dim)
        with torch.no_grad():
            encoded = self.model.encode(
                list(inputs),
                prompt=prompt,
                batch_size=self.batch_size,
                show_progress_bar=False,
                convert_to_tensor=True,
                device=None if self.device is None else str(self.device),
            )
        keys: Tensor = encoded.detach().to("cpu", torch.float32).clone()
        return keys

    @property
    def key_dim(self) -> int:
        """Width D of keys and queries."""
        ask = getattr(self.model, "get_embedding_dimension", None) or self.model.get_sentence_embedding_dimension
        dim = ask()
        if dim is None:  # a model that does not say
            dim = self.model.encode(["a"], convert_to_tensor=True, show_progress_bar=False).shape[-1]
        return int(dim)

    def fingerprint(self) -> Fingerprint:
        """Return the ``key.`` fields of a bank made with this model: all that decides what keys and queries come out.

        These are its weights, its modules and their configurations, tokenizer and image processing, the prompts (the
        model's default one where none was given), the length of texts and of keys.
        """
        parts = [part for part in self.model.modules() if hasattr(part, "get_config_dict") and part is not self.model]
        configs = [(_plain(part.get_config_dict()), _settings(_config_of(part))) for part in parts]
        processors = {id(p): p for part in parts for p in _processors_of(part)}
        prompts, default = getattr(self.model, "prompts", None) or {}, getattr(self.model, "default_prompt_name", None)
        length = getattr(self.model, "max_seq_length", None)
        return {
            "key.encoder": "sentence-transformers",
            "key.modules": "+".join(type(module).__name__ for module in self.model),
            "key.config": _named(configs),
            "key.processor": _named([_settings(processor) for processor in processors.values()]),
            "key.weights": hash_tensors(self.model.state_dict()),
            "key.key_prompt": prompts.get(default) if self.key_prompt is None else self.key_prompt,
            "key.query_prompt": prompts.get(default) if self.query_prompt is None else self.query_prompt,
            "key.max_length": length if isinstance(length, int) else None,
            "key.truncate_dim": getattr(self.model, "truncate_dim", None),
        }


def _config_of(part: Any) -> Any:
    model = getattr(part, "auto_model", None)  # where sentence-transformers 5 keeps it
    return getattr(part, "config", None) or getattr(model, "config", None)


def _processors_of(part: Any) -> list[Any]:
    found = [getattr(part, "processor", None), getattr(part, "tokenizer", None)]
    return [processor for processor in found if processor is not None]


def _settings(part: Any) -> Any:
    """Return what decides how a configuration, tokenizer or image processor works, as plain JSON."""
    core = getattr(part, "backend_tokenizer", part)
    if hasattr(core, "to_str"):
        sides = {name: getattr(part, f"{name}_side", None) for name in ("padding", "truncation")}
        return {**json.loads(core.to_str()), **sides}  # the lengths are set at every call
    for ask in ("to_diff_dict", "to_dict"):
        if hasattr(part, ask):
            return _plain(_lasting(getattr(part, ask)()))
    return _plain(_lasting(vars(part))) if hasattr(part, "__dict__") else _plain(part)


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if not any(word in name for word in PASSING)}
    return {n: _lasting(v) if n.endswith("_config") and isinstance(v, Mapping) else v for n, v in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(each) for each in value)
    plain = value is None or isinstance(value, (str, int, float, bool))
    return value if plain else getattr(value, "__qualname__", type(value).__qualname__)


def _named(settings: list[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())


def concatenate_keys(keys: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Join keys of several encoders so that the cosine of the whole is the weighted mean of their cosines.

    Each part is brought to unit length and scaled by the square root of its weight, so that fusing keys and fusing
    scores are one and the same. Queries must be joined with the same weights, in the same order.

    Args:
        keys: one tensor per encoder, of the same entries.
        weights: one per encoder, at least 0; equal when absent.

    Shape:
        keys: each (n, D_i). returns: (n, sum of D_i), float32, rows of unit length.

    Raises:
        ValueError: there are no keys, their rows differ in number, or the weights do not fit.

    Example:
        >>> image, text = torch.eye(2), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> joined = concatenate_keys([image, text], weights=[3, 1])
        >>> round(float(joined[0] @ joined[1]), 4)  # 3/4 * 0 + 1/4 * 0.8
        0.2
    """
    where = "concatenate_keys"
    weights = [1.0] * len(keys) if weights is None else [float(weight) for weight in weights]
    if not keys or any(part.ndim != 2 or part.shape[0] != keys[0].shape[0] for part in keys):
        shapes = [tuple(part.shape) for part in keys]
        raise ValueError(f"{where}: keys must be (n, D) tensors of the same n, got {shapes}. Encode the same entries.")
    if len(weights) != len(keys) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"{where}: weights must be {len(keys)} numbers from 0, not all 0, got {weights}. Give one per key."
        )
    parts = [
        torch.nn.functional.normalize(part.to(torch.float32), dim=-1) * (weight / sum(weights)) ** 0.5
        for part, weight in zip(keys, weights, strict=True)
    ]
    return torch.cat(parts, dim=-1)

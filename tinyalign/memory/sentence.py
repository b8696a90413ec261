"""Keys from any sentence-transformers model: text, or images and text in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyalign._files import hash_tensors
from tinyalign.memory.fingerprint import Fingerprint


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
        """Return the ``key.`` fields of a bank made with this model: its weights, modules, prompts and length."""
        modules = "+".join(type(module).__name__ for module in self.model)
        length = getattr(self.model, "max_seq_length", None)
        return {
            "key.encoder": "sentence-transformers",
            "key.modules": modules,
            "key.weights": hash_tensors(self.model.state_dict()),
            "key.key_prompt": self.key_prompt,
            "key.query_prompt": self.query_prompt,
            "key.max_length": length if isinstance(length, int) else None,
        }


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

"""What can be read off the parts that a model is composed of."""

from __future__ import annotations

from typing import Any

from torch import nn

from tinyalign.memory import AttentionPooledKey, MemoryBank
from tinyalign.models.pair_encoder import PairEncoder


def latent_sizes(memory: MemoryBank | None, compressor: Any) -> tuple[int, int] | None:
    """(L, latent_dim) of the values, from the bank and the compressor, which must agree."""
    if memory is not None and len(memory.value_shape) != 2:
        raise ValueError(
            f"TinyAlignVLM.from_parts: memory must hold values of shape (L, latent_dim), got "
            f"{tuple(memory.value_shape)}. "
            f"Build it with a PerceiverCompressor."
        )
    made = None if compressor is None else (int(compressor.num_latents), int(compressor.latent_dim))
    if memory is None:
        return made
    held = (int(memory.value_shape[0]), int(memory.value_shape[1]))
    if made is not None and made != held:
        raise ValueError(
            f"TinyAlignVLM.from_parts: compressor must make the bank's values of shape {held}, got {made}. Pass the "
            f"compressor that the bank was built with."
        )
    return held


def settings_of(key: nn.Module) -> dict[str, Any]:
    """What rebuilds the paper's key; of a key of another class the name alone."""
    if isinstance(key, AttentionPooledKey):
        return {"alpha": key.alpha, "scale": key.scale, "balance": key.balance}
    return {"class": type(key).__name__}


def key_from(settings: dict[str, Any] | None, given: nn.Module | None) -> nn.Module:
    """Return the key that a checkpoint speaks of: the given one, or the paper's with the saved settings.

    Raises:
        ValueError: a key of another class that is not given.
    """
    if given is not None:
        return given
    if settings and "class" in settings:
        raise ValueError(
            f"TinyAlignVLM.from_pretrained: key must be given for a checkpoint with a key of its own, got None where "
            f"{settings['class']!r} was used. Pass key= as it was when the bank was built."
        )
    return AttentionPooledKey(**(settings or {}))


def check_memory(memory: MemoryBank, config: Any, encoder: PairEncoder) -> None:
    """Raise unless the bank's values fit the connector and its keys were made as the model makes its queries."""
    expected = (config.num_latents, config.latent_dim)
    if tuple(memory.value_shape) != expected:
        raise ValueError(
            f"TinyAlignVLM.memory: memory must hold values of shape {expected}, got {tuple(memory.value_shape)}. "
            f"Build the model with this bank, or the bank with this model's compressor."
        )
    if isinstance(encoder.key, AttentionPooledKey) and memory.key_dim != encoder.vision.dim:
        raise ValueError(
            f"TinyAlignVLM.memory: memory must be as wide as its queries, {encoder.vision.dim}, got keys of width "
            f"{memory.key_dim}. Build the bank with this model's vision tower."
        )
    if memory.fingerprint:
        memory.require_fingerprint(encoder.key_fingerprint(), "key.")

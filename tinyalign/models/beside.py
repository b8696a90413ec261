"""What a model carries beside its weights, and the seeds its weights are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Shared:
    """A reference that copies of a model share: a bank is data, and is not copied with the weights."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return Shared(self.value)


class Beside:
    """The bank, the key and the text encoder of a model: needed to retrieve, absent from its state dict."""

    def __init__(self) -> None:
        self.memory = Shared()
        self.key: nn.Module | None = None
        self.text_encoder: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Beside:
        twin = Beside()
        twin.key = copy.deepcopy(self.key, memo)
        twin.memory = copy.deepcopy(self.memory, memo)
        twin.text_encoder = copy.deepcopy(self.text_encoder, memo)
        return twin


@contextmanager
def seeded(seed: int, part: int) -> Iterator[None]:
    """Draw new weights from (seed, part) on the CPU and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + part)
        yield

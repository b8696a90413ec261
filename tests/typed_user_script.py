"""What a user with mypy writes. `make types` checks it strictly; a call that must not type-check carries an ignore,
which is an error of its own as soon as it is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from tinyalign.connectors import MLPConnector, RAGConnector
from tinyalign.connectors.rag import RAGTokens
from tinyalign.data import DigitScenes, Sample
from tinyalign.memory import AttentionPooledKey, Hits, LeakageReport, MemoryBank, Neighbours, leakage_report
from tinyalign.models import SplicedBatch, arm_neighbours, splice_tokens
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes
from tinyalign.theory import Estimate, NLLTable, delta_emi


class Reader(nn.Module):
    """A model of the user's own with a retrieval branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = MLPConnector(768, width)
        self.retrieved = RAGConnector(96, width, num_tokens=8)

    def forward(self, features: Tensor, words: Tensor, hits: Hits) -> SplicedBatch:
        tokens, mask = self.retrieved(hits.values.float(), hits.mask, hits.scores)
        behind = torch.full((len(words),), features.shape[1])
        embeds = torch.cat([self.image(features), words], dim=1)
        return splice_tokens(embeds, tokens, behind, {"mask": (torch.ones(embeds.shape[:2]).bool(), mask)})


def build(features: Tensor, captions: Tensor) -> MemoryBank:
    """Fill a bank."""
    key, bank = AttentionPooledKey(alpha=0.4), MemoryBank(key_dim=768, value_shape=(32, 96))
    compressor = PerceiverCompressor(768, vocab_size=30522, sizes=PerceiverSizes(token_dim=128), seed=0)
    assert_type(bank.add(key(features), compressor(features, captions)), Tensor)
    return bank


def use(bank: MemoryBank, queries: Tensor, ids: Tensor) -> None:
    """Search it, and compare two models."""
    assert_type(bank.search(queries, k=5, exclude_ids=ids), Hits)
    assert_type(bank.neighbours(queries, 5), Neighbours)
    assert_type(arm_neighbours(bank, "shuffled", queries, sample_ids=ids), Neighbours)
    assert_type(leakage_report(bank, queries, ids), LeakageReport)
    assert_type(RAGConnector(96, 64).forward(torch.zeros(1, 1, 2, 96), torch.ones(1, 1).bool()), RAGTokens)
    gain = delta_emi(NLLTable.load("a.safetensors"), NLLTable.load("b.safetensors"), per="token")
    assert_type(gain, Estimate)
    assert_type(gain.low, float)
    assert_type(DigitScenes("train", 4)[0], Sample)
    assert_type(DigitScenes("train", 4)[:2], list[Sample])


def mistakes(bank: MemoryBank, queries: Tensor) -> None:
    """Calls that a type checker must refuse."""
    bank.search(queries, k="five")  # type: ignore[arg-type]
    bank.search(queries, neighbours=5)  # type: ignore[call-arg]
    MemoryBank(key_dim=768)  # type: ignore[call-arg]
    delta_emi([1.0], [2.0], per="word")  # type: ignore[arg-type]

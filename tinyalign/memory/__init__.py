"""Keys to search and values to retrieve: the memory bank, its keys, its builder and its leakage report."""

from tinyalign.memory.bank import Entry, MemoryBank
from tinyalign.memory.builder import BuildOptions, EncodedBatch, SkippedRecord, build_memory_bank, skipped_records
from tinyalign.memory.errors import (
    BankCorruptedError,
    BankError,
    BankLockedError,
    FingerprintMismatch,
    StaleBankError,
    UnknownIdError,
)
from tinyalign.memory.keys import AttentionPooledKey
from tinyalign.memory.leakage import LeakageCounts, LeakageReport, leakage_report
from tinyalign.memory.neighbours import NeighbourTable, precompute_neighbours
from tinyalign.memory.retrieval import Hits, Neighbours
from tinyalign.memory.verification import VerifyReport

__all__ = [
    "AttentionPooledKey",
    "BankCorruptedError",
    "BankError",
    "BankLockedError",
    "BuildOptions",
    "EncodedBatch",
    "Entry",
    "FingerprintMismatch",
    "Hits",
    "LeakageCounts",
    "LeakageReport",
    "MemoryBank",
    "NeighbourTable",
    "Neighbours",
    "SkippedRecord",
    "StaleBankError",
    "UnknownIdError",
    "VerifyReport",
    "build_memory_bank",
    "leakage_report",
    "precompute_neighbours",
    "skipped_records",
]

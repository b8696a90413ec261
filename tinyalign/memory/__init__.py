"""Keys to search and values to retrieve: the memory bank, its keys, its builder and its leakage report."""

from tinyalign.memory.bank import MemoryBank
from tinyalign.memory.builder import build_memory_bank, skipped_records
from tinyalign.memory.diagnostics import (
    AnisotropyReport,
    HubReport,
    RetrievalReport,
    ScoreReport,
    anisotropy_report,
    hub_report,
    retrieval_report,
    score_report,
)
from tinyalign.memory.encoding import BuildOptions, EncodedBatch, SkippedRecord
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
from tinyalign.memory.milvus import MilvusMemoryBank
from tinyalign.memory.neighbours import NeighbourTable, precompute_neighbours
from tinyalign.memory.refresh import DriftReport
from tinyalign.memory.resident import ResidentBank
from tinyalign.memory.retrieval import Entry, Hits, Neighbours
from tinyalign.memory.sentence import SentenceTransformerKey, concatenate_keys
from tinyalign.memory.sheet import neighbour_sheet
from tinyalign.memory.transform import KeyTransform
from tinyalign.memory.verification import VerifyReport

__all__ = [
    "AnisotropyReport",
    "AttentionPooledKey",
    "BankCorruptedError",
    "BankError",
    "BankLockedError",
    "BuildOptions",
    "DriftReport",
    "EncodedBatch",
    "Entry",
    "FingerprintMismatch",
    "Hits",
    "HubReport",
    "KeyTransform",
    "LeakageCounts",
    "LeakageReport",
    "MemoryBank",
    "MilvusMemoryBank",
    "NeighbourTable",
    "Neighbours",
    "ResidentBank",
    "RetrievalReport",
    "ScoreReport",
    "SentenceTransformerKey",
    "SkippedRecord",
    "StaleBankError",
    "UnknownIdError",
    "VerifyReport",
    "anisotropy_report",
    "build_memory_bank",
    "concatenate_keys",
    "hub_report",
    "leakage_report",
    "neighbour_sheet",
    "precompute_neighbours",
    "retrieval_report",
    "score_report",
    "skipped_records",
]

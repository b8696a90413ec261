"""Building a bank from records: in batches, over ranks, resumable after a kill, published in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tinyalign._files import write_json
from tinyalign.memory import saving
from tinyalign.memory.bank import MemoryBank
from tinyalign.memory.codec import ValueCodec
from tinyalign.memory.contents import BankSpec, Contents
from tinyalign.memory.encoding import BuildOptions, EncodedBatch, SkippedRecord, encode_all
from tinyalign.memory.fingerprint import checked_fingerprint
from tinyalign.memory.store import current, prepare

WHERE = "build_memory_bank"
SKIPPED = "skipped.json"
PUBLISHING = "publishing.json"


def build_memory_bank(
    records: Sequence[Any],
    encode: Callable[[list[Any]], EncodedBatch],
    path: str | Path,
    *,
    batch_size: int = 32,
    resume: bool = True,
    fingerprint: Mapping[str, Any] | None = None,
    options: BuildOptions | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> MemoryBank:
    """Encode records in batches and publish them as a bank at ``path``.

    Finished blocks are kept beside ``path`` until the end, so that a killed build continues where it was; those of
    another plan are refused, unless their bank was published before the kill, and so are those of another encoder: one
    finished batch is encoded again and compared. A bank that stands at ``path`` stays in use until the new one replaces
    it in one step. Under ``torchrun`` or ``accelerate launch`` each rank encodes its share of the batches and rank 0
    joins them in order: the same bank as from one process.

    Args:
        records: anything with a length and ``[index]``, such as a dataset of samples.
        encode: turns a list of records into an ``EncodedBatch``; the vision tower, compressor and device live in it.
        path: directory of the bank.
        batch_size: records per call of ``encode``.
        resume: continue a killed build of the same plan; False starts anew.
        fingerprint: what made keys (``key.*``), values (``value.*``) and data (``data.*``).
        options: dtypes, metric, loader processes and how often to commit.
        on_error: ``raise``, or ``skip`` records that cannot be read or encoded and list them (``skipped_records``).
        progress: show a bar with rate and time left.

    Raises:
        ValueError: there are no records, or a setting is out of range.
        TypeError: ``encode`` returns something else than an ``EncodedBatch``.
        BankError: a record cannot be encoded (``raise``) or none can, the path holds something else, or a killed build
            of another plan or encoder stands there.

    Example:
        >>> import tempfile
        >>> def encode(records):
        ...     keys = torch.tensor([[1.0, float(r)] for r in records])
        ...     return EncodedBatch(keys, keys[:, None], ids=records)
        >>> bank = build_memory_bank(range(10), encode, tempfile.mkdtemp() + "/bank", batch_size=4, progress=False)
        >>> len(bank), bank.value_shape
        (10, (1, 2))
    """
    options = options or BuildOptions()
    if not len(records):
        raise ValueError(f"{WHERE}: records must hold at least one record, got none. Check the data file.")
    if batch_size < 1 or options.commit_every < 1:
        raise ValueError(
            f"{WHERE}: batch_size and commit_every must be positive, got {batch_size}, {options.commit_every}. "
            "Pass at least 1."
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"{WHERE}: on_error must be 'raise' or 'skip', got {on_error!r}. Choose one of them.")
    BankSpec(1, (1,), options.metric, options.key_dtype, options.value_dtype)  # refuses what no bank is stored as
    target = Path(path).absolute()
    if target.exists():
        prepare(target, WHERE)  # before anything is encoded
    work = target.parent / f".{target.name}.build"
    prints = checked_fingerprint(fingerprint, WHERE)
    codec = ValueCodec(torch.int8) if options.value_dtype == torch.int8 else None

    def generation() -> int:
        manifest = current(target, WHERE)
        return manifest.generation if manifest else 0

    def publish(contents: Contents, skipped: list[SkippedRecord]) -> None:
        write_json(work / PUBLISHING, {"generation": generation() + 1})
        saving.save_all(contents, prints, target, WHERE, codec=codec)
        if skipped:
            write_json(target / SKIPPED, {"skipped": [list(each) for each in skipped]})
        else:
            (target / SKIPPED).unlink(missing_ok=True)

    def published() -> bool:
        noted = work / PUBLISHING
        return noted.is_file() and generation() >= json.loads(noted.read_text(encoding="utf-8"))["generation"]

    encode_all(
        records,
        encode,
        work,
        prints,
        publish,
        batch_size=batch_size,
        options=options,
        resume=resume,
        skip=on_error == "skip",
        progress=progress,
        over=published,
    )
    return MemoryBank.load(target)


def skipped_records(path: str | Path) -> list[SkippedRecord]:
    """Return the records that a build with ``on_error="skip"`` left out of the bank.

    Args:
        path: of the bank.

    Example:
        >>> import tempfile
        >>> skipped_records(tempfile.mkdtemp())
        []
    """
    listing = Path(path) / SKIPPED
    if not listing.is_file():
        return []
    return [SkippedRecord(*each) for each in json.loads(listing.read_text(encoding="utf-8"))["skipped"]]

"""Building a bank from records: in batches, over ranks, resumable after a kill, published in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tinyalign._files import write_json
from tinyalign.memory import saving
from tinyalign.memory.bank import MemoryBank
from tinyalign.memory.codec import ValueCodec, dtype_name
from tinyalign.memory.errors import BankError
from tinyalign.memory.fingerprint import Fingerprint, checked_fingerprint, differing_fields
from tinyalign.memory.manifest import MANIFEST
from tinyalign.memory.shards import Share, share_of, start_anew, wait_until

WHERE = "build_memory_bank"
DONE = "build.done"  # fields of a shard's fingerprint, committed together with its entries: records finished,
LEFT_OUT = "build.skipped"  # and those that could not be
SKIPPED = "skipped.json"


class EncodedBatch(NamedTuple):
    """What ``encode`` makes of a list of n records."""

    keys: Tensor  # (n, D)
    values: Tensor  # (n, *value_shape)
    ids: Sequence[int] | Tensor  # (n,)
    groups: Sequence[int] | Tensor | None = None  # (n,)
    metadata: Sequence[Mapping[str, Any] | None] | None = None


class SkippedRecord(NamedTuple):
    """A record that could not be read or encoded, by its position."""

    record: int
    error: str


class BuildOptions(NamedTuple):
    """How the bank stores what was encoded.

    ``commit_every`` records (rounded up to whole batches) are the most that a kill loses.
    """

    metric: str = "cosine"
    value_dtype: torch.dtype = torch.float16
    key_dtype: torch.dtype = torch.float16
    commit_every: int = 4096
    num_workers: int = 0
    timeout: float = 24 * 3600.0


class _Unreadable(NamedTuple):
    record: int
    error: str  # as text, for it may come from another process


class _Numbered(torch.utils.data.Dataset[Any]):
    """Records with their index; one that cannot be read comes back as ``_Unreadable``."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        try:
            return index, self.records[index]
        except Exception as error:  # noqa: BLE001 (whatever reading a record may raise)
            return _Unreadable(index, f"{type(error).__name__}: {error}")


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

    Finished blocks are kept beside ``path`` until the end, so that a killed build continues where it was; a bank that
    stands at ``path`` stays in use until the new one replaces it in one step. Under ``torchrun`` or ``accelerate
    launch`` each rank encodes its share of the batches and rank 0 joins them in order: the same bank as from one
    process.

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
        BankError: a record cannot be encoded (``raise``), or a killed build of another plan stands there.

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
            f"{WHERE}: batch_size and commit_every must be positive, got {batch_size}, {options.commit_every}."
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"{WHERE}: on_error must be 'raise' or 'skip', got {on_error!r}. Choose one of them.")
    target = Path(path).absolute()
    work = target.parent / f".{target.name}.build"
    share = share_of(len(records), batch_size)
    prints = checked_fingerprint(fingerprint, WHERE)
    plan = {
        **prints,
        "build.records": len(records),
        "build.batch_size": batch_size,
        "build.ranks": share.ranks,
        "build.metric": options.metric,
        "build.key_dtype": dtype_name(options.key_dtype),
        "build.value_dtype": dtype_name(options.value_dtype),
    }
    if not resume:
        start_anew(work, share)
    work.mkdir(parents=True, exist_ok=True)
    shard = _Shard(share, work, plan, options)
    shard.build(records, encode, batch_size, skip=on_error == "skip", progress=progress)
    if share.rank == 0:
        _publish(work, target, share, prints, options)
        share.finish(work, options.timeout)
    else:
        share.follow(work, options.timeout)
    return MemoryBank.load(target)


def skipped_records(path: str | Path) -> list[SkippedRecord]:
    """Return the records that a build with ``on_error="skip"`` left out of the bank at ``path``."""
    listing = Path(path) / SKIPPED
    if not listing.is_file():
        return []
    return [SkippedRecord(*each) for each in json.loads(listing.read_text(encoding="utf-8"))["skipped"]]


class _Shard:
    """A rank's entries on the way: a bank of its own whose commits are the state to resume from."""

    def __init__(self, share: Share, work: Path, plan: Fingerprint, options: BuildOptions) -> None:
        self.share, self.work, self.plan, self.options = share, work, plan, options
        self.folder = share.folder(work)
        self.bank: MemoryBank | None = None
        self.done, self.skipped = share.begin, list[SkippedRecord]()
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        theirs: Mapping[str, Any] | None = None
        if (self.folder / MANIFEST).exists():
            self.bank = MemoryBank.load(self.folder)
            theirs = dict(self.bank.fingerprint)
            self.done = theirs.pop(DONE)
            self.skipped = [SkippedRecord(*each) for each in json.loads(theirs.pop(LEFT_OUT))]
        for marker in self.share.finished(self.work):
            theirs = marker["plan"] if marker else theirs
            differences = [] if theirs is None else differing_fields(self.plan, theirs)
            if differences:
                raise BankError(
                    f"{WHERE}: {self.work} must hold a killed build of the same plan, got a difference in "
                    f"{'; '.join(differences)} (bank: now). Pass resume=False to start anew."
                )

    def build(
        self,
        records: Sequence[Any],
        encode: Callable[[list[Any]], EncodedBatch],
        batch_size: int,
        *,
        skip: bool,
        progress: bool,
    ) -> None:
        """Encode what is left of the share, committing now and then."""
        begin, end = self.done, self.share.end
        if self.share.marker(self.work).exists():
            return
        batches = [list(range(at, min(at + batch_size, end))) for at in range(begin, end, batch_size)]
        loader = DataLoader(
            _Numbered(records),
            batch_sampler=batches,
            collate_fn=list,
            num_workers=self.options.num_workers,
            generator=torch.Generator(),  # the global one stays as it was
        )
        total = end - self.share.begin
        bar = tqdm(total=total, initial=begin - self.share.begin, unit="record", disable=not progress, desc="encode")
        with bar:
            for span, batch in zip(batches, loader, strict=True):
                self._take(span, batch, encode, skip=skip)
                bar.update(len(span))
                stop = span[-1] + 1
                if self.done + self.options.commit_every <= stop or stop == end:
                    self._commit(stop)
        skipped = [list(each) for each in self.skipped]
        write_json(self.share.marker(self.work), {"plan": self.plan, "skipped": skipped})

    def _take(
        self, span: list[int], batch: list[Any], encode: Callable[[list[Any]], EncodedBatch], *, skip: bool
    ) -> None:
        for each in batch:
            if isinstance(each, _Unreadable):
                self._fail(each.record, each.error, skip=skip)
        readable = [each for each in batch if not isinstance(each, _Unreadable)]
        if not readable:
            return
        try:
            self._add(encode([record for _, record in readable]))
            return
        except Exception as error:  # noqa: BLE001 (whatever encoding may raise)
            failure = error
        for index, record in readable:  # find the culprit, and keep its batch mates where that is asked
            try:
                encoded = encode([record])
                if skip:
                    self._add(encoded)
            except Exception as error:  # noqa: BLE001 (whatever encoding a record may raise)
                self._fail(index, f"{type(error).__name__}: {error}", skip=skip, cause=error)
        if not skip:
            raise BankError(
                f"{WHERE}: records {span[0]} to {span[-1]} must be encodable together, got "
                f"{type(failure).__name__}: {failure}. Each alone can be: try a smaller batch_size."
            ) from failure

    def _fail(self, index: int, error: str, *, skip: bool, cause: Exception | None = None) -> None:
        if not skip:
            raise BankError(
                f"{WHERE}: record {index} must be readable and encodable, got {error}. "
                "Repair it, or pass on_error='skip' to leave such records out and list them."
            ) from cause
        self.skipped.append(SkippedRecord(index, error))

    def _add(self, encoded: EncodedBatch) -> None:
        if self.bank is None:
            floats = self.options.value_dtype != torch.int8
            self.bank = MemoryBank(
                encoded.keys.shape[-1],
                encoded.values.shape[1:],
                metric=self.options.metric,
                key_dtype=self.options.key_dtype,
                value_dtype=self.options.value_dtype if floats else torch.float16,
            )
        self.bank.add(encoded.keys, encoded.values, encoded.ids, encoded.groups, encoded.metadata)

    def _commit(self, done: int) -> None:
        self.done = done
        if self.bank is not None:
            self.bank.fingerprint = {**self.plan, DONE: done, LEFT_OUT: json.dumps(self.skipped)}
            self.bank.save(self.folder)


def _publish(work: Path, target: Path, share: Share, fingerprint: Fingerprint, options: BuildOptions) -> None:
    wait_until(lambda: all(share.finished(work)), options.timeout, "the other ranks to finish their shares")
    markers = [marker for marker in share.finished(work) if marker]
    shards = [share.folder(work, rank) for rank in range(share.ranks)]
    opened = [saving.load(shard, mapped=True, caller=WHERE) for shard in shards if (shard / MANIFEST).exists()]
    skipped = sorted(tuple(each) for marker in markers for each in marker["skipped"])
    if not opened:
        raise BankError(f"{WHERE}: some records must be encodable, got {len(skipped)} skipped. First: {skipped[:1]}.")
    contents = saving.merged([(each.contents, {}) for each in opened], WHERE)
    codec = ValueCodec(torch.int8) if options.value_dtype == torch.int8 else None
    saving.save_all(contents, fingerprint, target, WHERE, codec=codec)
    if skipped:
        write_json(target / SKIPPED, {"skipped": [list(each) for each in skipped]})
    else:
        (target / SKIPPED).unlink(missing_ok=True)

"""Encoding records into finished entries: in batches, over ranks, and so that a kill loses little."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tinyalign._files import write_json
from tinyalign.memory import saving
from tinyalign.memory.codec import dtype_name
from tinyalign.memory.contents import BankSpec, Contents
from tinyalign.memory.errors import BankError
from tinyalign.memory.fingerprint import Fingerprint, differing_fields
from tinyalign.memory.manifest import MANIFEST
from tinyalign.memory.shards import Share, discard, share_of, start_anew, wait_until
from tinyalign.memory.transform import KeyTransform

DONE = "build.done"  # fields of a shard's fingerprint, committed together with its entries: records finished,
LEFT_OUT = "build.skipped"  # and those that could not be
SAME = 0.05  # of the size of what was made: far above what half precision does to it, far below another encoder


class EncodedBatch(NamedTuple):
    """What ``encode`` makes of a list of n records.

    Args:
        keys: to search by.
        values: to retrieve.
        ids: of the samples.
        groups: which samples show the same image; -1 or None for none.
        metadata: JSON-like, one per record, or None.

    Shape:
        keys: (n, D). values: (n, *value_shape). ids, groups: (n,).
    """

    keys: Tensor  # (n, D)
    values: Tensor  # (n, *value_shape)
    ids: Sequence[int] | Tensor  # (n,)
    groups: Sequence[int] | Tensor | None = None  # (n,)
    metadata: Sequence[Mapping[str, Any] | None] | None = None


class SkippedRecord(NamedTuple):
    """A record that could not be read or encoded.

    Args:
        record: its position among the records.
        error: what was raised, in words.
    """

    record: int
    error: str


class BuildOptions(NamedTuple):
    """How the bank stores what was encoded.

    Args:
        metric: ``"cosine"`` or ``"ip"``.
        value_dtype: values are stored so; ``torch.int8`` for a byte per number.
        key_dtype: keys are stored so.
        commit_every: records (rounded up to whole batches) between commits, the most that a kill loses.
        num_workers: processes that read records ahead.
        timeout: seconds that ranks wait for one another.
        transform: put between the keys as they are made and as they are stored.
    """

    metric: str = "cosine"
    value_dtype: torch.dtype = torch.float16
    key_dtype: torch.dtype = torch.float16
    commit_every: int = 4096
    num_workers: int = 0
    timeout: float = 24 * 3600.0
    transform: KeyTransform | None = None


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


Publish = Callable[[Contents, list[SkippedRecord]], None]


class _OtherPlanError(BankError):
    """What a killed build left was made by another plan."""


class _NoBatchError(TypeError):
    """``encode`` returned something else than an ``EncodedBatch``: no record is to blame."""


def as_batch(encoded: object, where: str) -> EncodedBatch:
    """Return what ``encode`` returned, or say that it is no ``EncodedBatch``."""
    if not isinstance(encoded, EncodedBatch):
        found = type(encoded).__name__
        raise _NoBatchError(
            f"{where}: encode must return an EncodedBatch, got {found}. Put keys, values and ids in one."
        )
    return encoded


def encode_all(
    records: Sequence[Any],
    encode: Callable[[list[Any]], EncodedBatch],
    work: Path,
    plan: Fingerprint,
    publish: Publish,
    *,
    batch_size: int,
    options: BuildOptions,
    resume: bool = True,
    skip: bool | None = None,
    progress: bool = True,
    where: str = "build_memory_bank",
    called: Callable[[int], str] = "record {}".format,
    over: Callable[[], bool] = lambda: False,
) -> None:
    """Encode this rank's share into ``work``; rank 0 then publishes the entries of all ranks, in order.

    What another plan left in ``work`` is refused, or deleted where ``over`` says that nothing can come of it any more;
    what another encoder left is refused. ``skip`` is None where the caller cannot ask for it, and ``called`` names the
    record of an index in errors.
    """
    share = share_of(len(records), batch_size)
    plan = {
        **plan,
        "build.records": len(records),
        "build.batch_size": batch_size,
        "build.ranks": share.ranks,
        "build.metric": options.metric,
        "build.key_dtype": dtype_name(options.key_dtype),
        "build.value_dtype": dtype_name(options.value_dtype),
        "build.transform": None if options.transform is None else options.transform.name(),
    }
    if not resume:
        start_anew(work, share)
    try:
        shard = _Shard(share, work, plan, options, where, called)
    except _OtherPlanError:
        if not over():
            raise
        start_anew(work, share)
        shard = _Shard(share, work, plan, options, where, called)
    work.mkdir(parents=True, exist_ok=True)
    shard.build(records, encode, batch_size, skip=skip, progress=progress)
    if share.rank:
        share.follow(work, options.timeout)
        return
    wait_until(lambda: all(share.finished(work)), options.timeout, "the other ranks to finish their shares")
    shards = [share.folder(work, rank) for rank in range(share.ranks)]
    opened = [saving.load(shard, mapped=True, caller=where) for shard in shards if (shard / MANIFEST).exists()]
    skipped = [SkippedRecord(*each) for marker in share.finished(work) if marker for each in marker["skipped"]]
    if not opened:
        discard(work)  # nothing was finished: the next build tries them all again
        raise BankError(
            f"{where}: some records must be encodable, got {len(skipped)} skipped, {called(skipped[0].record)} for "
            f"{skipped[0].error.rstrip('.')}. Repair what reads or encodes them."
        )
    publish(saving.merged([(each.contents, {}) for each in opened], where), skipped)
    share.finish(work, options.timeout)


class _Shard:
    """A rank's entries on the way: a bank of its own whose commits are the state to resume from."""

    def __init__(
        self,
        share: Share,
        work: Path,
        plan: Fingerprint,
        options: BuildOptions,
        where: str,
        called: Callable[[int], str],
    ) -> None:
        self.share, self.work, self.plan, self.options, self.where = share, work, plan, options, where
        self.called = called
        self.folder = share.folder(work)
        self.contents: Contents | None = None
        self.home: saving.Home | None = None
        self.done, self.skipped = share.begin, list[SkippedRecord]()
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        theirs: Mapping[str, Any] | None = None
        if (self.folder / MANIFEST).exists():
            self.contents, found, self.home = saving.load(self.folder, mapped=True, caller=self.where)
            theirs = dict(found)
            self.done = theirs.pop(DONE)
            self.skipped = [SkippedRecord(*each) for each in json.loads(theirs.pop(LEFT_OUT))]
        plans = [marker["plan"] if marker else theirs for marker in self.share.finished(self.work)]
        plans += [{**self.plan, "build.ranks": ranks} for ranks in self.share.other_counts(self.work)]
        for plan in plans:
            differences = [] if plan is None else differing_fields(plan, self.plan)
            if differences:
                raise _OtherPlanError(
                    f"{self.where}: {self.work} must hold a killed build of the same plan, got a difference in "
                    f"{'; '.join(differences)}. Pass resume=False to start anew, or what was given then to go on."
                )

    def build(
        self,
        records: Sequence[Any],
        encode: Callable[[list[Any]], EncodedBatch],
        batch_size: int,
        *,
        skip: bool | None,
        progress: bool,
    ) -> None:
        """Encode what is left of the share, committing now and then."""
        begin, end = self.done, self.share.end
        finished = self.share.finished(self.work)[self.share.rank]
        left_out = [SkippedRecord(*each) for each in finished["skipped"]] if finished else self.skipped
        if left_out and not skip:
            raise BankError(
                f"{self.where}: on_error must be 'skip' as before, for {self.called(left_out[0].record)} was left out "
                f"({left_out[0].error}), got 'raise'. Pass resume=False to start anew."
            )
        if self.contents is not None:
            self._check_encoder(records, encode, batch_size)
        if finished:
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
        shown: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()  # a hidden bar would start a thread
        if progress:
            shown = tqdm(total=total, initial=begin - self.share.begin, unit="record", desc="encode")
        with shown as bar:
            for span, batch in zip(batches, loader, strict=True):
                self._take(span, batch, encode, skip=skip)
                if bar is not None:
                    bar.update(len(span))
                stop = span[-1] + 1
                if self.done + self.options.commit_every <= stop or stop == end:
                    self._commit(stop)
        skipped = [list(each) for each in self.skipped]
        write_json(self.share.marker(self.work), {"plan": self.plan, "skipped": skipped})

    def _check_encoder(
        self, records: Sequence[Any], encode: Callable[[list[Any]], EncodedBatch], batch_size: int
    ) -> None:
        """Encode a finished batch again: what another encoder makes must not be mixed in."""
        left_out = {each.record for each in self.skipped}
        starts = range(self.share.begin, self.done, batch_size)
        spans = (list(range(at, min(at + batch_size, self.done))) for at in starts)
        span = next(each for each in spans if not left_out.issuperset(each))
        numbered = _Numbered(records)
        batch = [numbered[index] for index in span]

        def again() -> Contents | None:
            probe = self._afresh()
            probe._take(span, batch, encode, skip=True)
            if probe.contents is None:
                self._fail(*probe.skipped[0], skip=None)
            return probe.contents

        made = again()
        apart = _apart(made, self.contents)
        if apart > SAME:
            steady = _apart(made, again()) <= SAME
            cause = (
                "another encoder made them" if steady else "each call makes others: is dropout on, or a random crop?"
            )
            raise BankError(
                f"{self.where}: encode must make the entries that the killed run made, got a difference of {apart:.2g} "
                f"times their size from {self.called(span[0])} on ({cause}). Pass resume=False to start anew, or the "
                "encoder of then, in eval mode, to go on."
            )

    def _afresh(self) -> _Shard:
        probe = copy.copy(self)
        probe.contents, probe.skipped = None, []
        return probe

    def _take(
        self, span: list[int], batch: list[Any], encode: Callable[[list[Any]], EncodedBatch], *, skip: bool | None
    ) -> None:
        for each in batch:
            if isinstance(each, _Unreadable):
                self._fail(each.record, each.error, skip=skip)
        readable = [each for each in batch if not isinstance(each, _Unreadable)]
        if not readable:
            return
        try:
            self._add(encode([record for _, record in readable]), len(readable))
            return
        except _NoBatchError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever encoding may raise)
            failure = error
        for index, record in readable:  # find the culprit, and keep its batch mates where that is asked
            try:
                self._add(encode([record]), 1)
            except Exception as error:  # noqa: BLE001 (whatever encoding a record may raise)
                self._fail(index, f"{type(error).__name__}: {error}", skip=skip, cause=error)
        if not skip:
            raise BankError(
                f"{self.where}: {self.called(span[0])} to {self.called(span[-1])} must be encodable together, got "
                f"{type(failure).__name__}: {str(failure).rstrip('.')}. Each alone can be: try a smaller batch_size."
            ) from failure

    def _fail(self, index: int, error: str, *, skip: bool | None, cause: Exception | None = None) -> None:
        if not skip:
            advice = "" if skip is None else ", or pass on_error='skip' to leave such records out and list them"
            raise BankError(
                f"{self.where}: {self.called(index)} must be readable and encodable, got {error.rstrip('.')}. "
                f"Repair it{advice}."
            ) from cause
        self.skipped.append(SkippedRecord(index, error))

    def _add(self, encoded: EncodedBatch, count: int) -> None:
        given = as_batch(encoded, self.where)
        if len(given.keys) != count:
            raise ValueError(
                f"{self.where}: encode must return {count} rows, got {len(given.keys)}. Return one per record."
            )
        contents = self._empty(given) if self.contents is None else self.contents
        contents.append(given.keys, given.values, given.ids, given.groups, given.metadata, self.where)
        self.contents = contents  # only now: what was refused settles no sizes

    def _empty(self, encoded: EncodedBatch) -> Contents:
        options = self.options
        width = encoded.keys.shape[-1] if options.transform is None else options.transform.output_dim
        quantised = options.value_dtype == torch.int8  # its center is the mean of all values: known at the end
        dtype = torch.float32 if quantised else options.value_dtype
        spec = BankSpec(width, tuple(encoded.values.shape[1:]), options.metric, options.key_dtype, dtype)
        return Contents(spec, transform=options.transform)

    def _commit(self, done: int) -> None:
        self.done = done
        if self.contents is None:
            return
        state: Fingerprint = {**self.plan, DONE: done, LEFT_OUT: json.dumps(self.skipped)}
        if self.home is None:
            saving.save_all(self.contents, state, self.folder, self.where)
        else:
            saving.commit(self.contents, state, self.home, self.where)
        self.contents, _, self.home = saving.load(self.folder, mapped=True, caller=self.where)


def _apart(made: Contents | None, stored: Contents | None) -> float:
    """Return how far entries of the same ids lie apart, over their size; infinity where none can be compared."""
    if made is None or stored is None or made.spec != stored.spec:
        return math.inf
    rows = stored.table.find(made.table.column("ids"))
    there = rows >= 0
    if not there.any():
        return math.inf
    mine, theirs = torch.from_numpy(np.flatnonzero(there)), torch.from_numpy(rows[there])
    pairs = (
        (made.keys_at(mine).double(), stored.keys_at(theirs).double()),
        (made.values_at(mine).double(), stored.values_at(theirs).double()),
    )
    tiny = torch.finfo(torch.float64).tiny
    return max(float((new - old).norm() / old.norm().clamp_min(tiny)) for new, old in pairs)

"""Per-sample negative log-likelihoods: sums and counts, never averages of averages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinyalign._files import write_bytes
from tinyalign.theory._input import as_clusters, as_numpy, as_vector

__all__ = ["NLLTable", "Per", "TableMismatch", "integers"]

FORMAT = 1
Per = Literal["sequence", "token", "byte"]


class TableMismatch(ValueError):  # noqa: N818 - the name says what it is, as FingerprintMismatch does
    """Two tables that do not speak of the same targets."""


@dataclass(frozen=True, eq=False)
class NLLTable:
    """Summed negative log-likelihood of each sample's target under one condition.

    Sums, token and byte counts are kept per sample so that any average (per sequence, token or byte) is a ratio of
    sums. ``targets`` names each sample's target tokens, so that a difference between two tables is a difference in how
    the same target was predicted, and never anything else.

    Attributes:
        nll: (n,) sums over target tokens, in nats.
        tokens: (n,) number of target tokens.
        sample_ids: (n,) int64, unique.
        groups: (n,) int64 cluster of each sample, such as its image; the sample itself when None is given.
        bytes: (n,) UTF-8 length of the target text, or None where no tokenizer was at hand.
        targets: (n,) int64 hash of the target tokens, or None.
        condition: what the model saw, such as ``"full"`` or ``"no_image"``.
        tokenizer: name of the tokenizer by content; tables of different ones are not subtracted per token.

    Shape:
        nll: (n,), float64. tokens, sample_ids, groups, bytes, targets: (n,), int64.

    Units:
        nats.

    Raises:
        ValueError: lengths differ, a value is not finite, an id occurs twice, or a count is not positive.

    Example:
        >>> table = NLLTable([4.0, 6.0], [2, 3], sample_ids=[7, 8], condition="full")
        >>> table.per_token
        2.0
        >>> (table - NLLTable([1.0, 1.0], [3, 2], sample_ids=[8, 7])).tolist()
        [3.0, 5.0]
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    sample_ids: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    bytes: NDArray[np.int64] | None = None
    targets: NDArray[np.int64] | None = None
    condition: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        nll = as_vector(self.nll, "NLLTable", "nll")
        n = len(nll)
        ids = np.arange(n) if self.sample_ids is None else as_numpy(self.sample_ids)
        columns: dict[str, Any] = {
            "tokens": self.tokens,
            "sample_ids": ids,
            "groups": ids if self.groups is None else self.groups,
            "bytes": self.bytes,
            "targets": self.targets,
        }
        object.__setattr__(self, "nll", _frozen(nll))
        for name, column in columns.items():
            if column is not None:
                object.__setattr__(self, name, _frozen(integers(column, n, name)))
        if len(np.unique(self.ids)) != n:
            ids, counts = np.unique(self.ids, return_counts=True)
            raise ValueError(
                f"NLLTable: sample_ids must be unique, got {ids[counts > 1][0]} {counts.max()} times. Give every "
                "record its own id and tie records of one image together with groups."
            )
        for name in ("tokens", "bytes"):
            counts = getattr(self, name)
            if counts is not None and counts.min() < 1:
                row = int(counts.argmin())
                raise ValueError(
                    f"NLLTable: {name} must be positive, got {counts[row]} for sample {self.ids[row]}. "
                    "A label mask that leaves no target has no likelihood; drop the sample."
                )

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The sample ids, (n,) int64."""
        assert self.sample_ids is not None
        return self.sample_ids

    @property
    def per_sequence(self) -> float:
        """Mean over samples of the summed NLL, in nats: the L of the paper's equations."""
        return float(self.nll.mean())

    @property
    def per_token(self) -> float:
        """All nats over all target tokens."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def per_byte(self) -> float:
        """All nats over all target bytes: comparable between tokenizers."""
        return float(self.nll.sum() / self.weights("byte").sum())

    def weights(self, per: Per) -> NDArray[np.float64]:
        """Return (n,) the denominator of each sample: 1, its tokens or its bytes."""
        if per == "sequence":
            return np.ones(len(self))
        if per == "token":
            return self.tokens.astype(np.float64)
        if per == "byte":
            if self.bytes is None:
                raise ValueError(
                    "NLLTable.weights: bytes must be known for per='byte', got none. Pass tokenizer= to collect_nll."
                )
            return self.bytes.astype(np.float64)
        raise ValueError(
            f"NLLTable.weights: per must be 'sequence', 'token' or 'byte', got {per!r}. Use one of the three."
        )

    def aligned_to(self, other: NLLTable, per: Per = "sequence") -> NLLTable:
        """Return this table's rows in the order of ``other``, once both are known to speak of the same targets.

        Raises:
            TableMismatch: other samples, other targets, or another tokenizer (which only ``per="byte"`` can compare).
        """
        mine, theirs = self.ids, other.ids
        if not np.array_equal(np.sort(mine), np.sort(theirs)):
            missing = np.setdiff1d(theirs, mine)
            extra = np.setdiff1d(mine, theirs)
            raise TableMismatch(
                f"NLLTable.aligned_to: both tables must hold the same samples, got {len(missing)} only in "
                f"{other.condition!r} and {len(extra)} only in {self.condition!r} (first {[*missing, *extra][:3]}). "
                "Collect both from the same records."
            )
        foreign = bool(self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer)
        if foreign and per != "byte":
            raise TableMismatch(
                f"NLLTable.aligned_to: both tables must use one tokenizer, got {self.tokenizer!r} and "
                f"{other.tokenizer!r}. Compare them with per='byte'."
            )
        order = np.argsort(mine, kind="stable")[np.argsort(np.argsort(theirs, kind="stable"), kind="stable")]
        rows = self._take(order)
        compared = ["bytes"] if foreign else ["tokens", "targets"]
        for name in compared:
            left, right = getattr(rows, name), getattr(other, name)
            if left is not None and right is not None and not np.array_equal(left, right):
                row = int(np.flatnonzero(left != right)[0])
                raise TableMismatch(
                    f"NLLTable.aligned_to: both tables must predict the same targets, got different {name} for sample "
                    f"{theirs[row]} and {int((left != right).sum()) - 1} more. Collect both with the same labels."
                )
        return rows

    def __sub__(self, other: object) -> NDArray[np.float64]:
        """Return (n,) per-sample differences in nats, in this table's order."""
        if not isinstance(other, NLLTable):
            return NotImplemented
        return self.nll - other.aligned_to(self).nll

    def _take(self, order: NDArray[np.int64]) -> NLLTable:
        columns: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[order]
            for name in ("nll", "tokens", "sample_ids", "groups", "bytes", "targets")
        }
        return replace(self, **columns)

    def save(self, path: str | Path) -> None:
        """Write the table to one ``.safetensors`` file, atomically and without pickle."""
        from safetensors.numpy import save

        path = Path(path)
        columns = {
            name: np.ascontiguousarray(getattr(self, name))
            for name in ("nll", "tokens", "sample_ids", "groups", "bytes", "targets")
            if getattr(self, name) is not None
        }
        header = {"format": str(FORMAT), "kind": "NLLTable", "condition": self.condition, "tokenizer": self.tokenizer}
        content = save(columns, metadata=header)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)

    @classmethod
    def load(cls, path: str | Path) -> NLLTable:
        """Read a table that ``save`` wrote.

        Raises:
            ValueError: not such a file, or a truncated one, or of a newer format.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as stream:
                header = stream.metadata() or {}
                columns = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"NLLTable.load: path must be a whole table file, got {path} ({error}). Collect the table again."
            ) from error
        if header.get("kind") != "NLLTable" or header.get("format") != str(FORMAT):
            raise ValueError(
                f"NLLTable.load: path must hold an NLLTable of format {FORMAT}, got kind {header.get('kind')!r} format "
                f"{header.get('format')!r} in {path}. Use the release that wrote it."
            )
        return cls(**columns, condition=header["condition"], tokenizer=header["tokenizer"])

    def clusters(self, groups: Any = None) -> NDArray[np.int64]:
        """Return (n,) cluster numbers 0..G-1, from ``groups`` in this table's order or from the table itself."""
        return as_clusters(self.groups if groups is None else groups, len(self), "NLLTable.clusters")


def _frozen(column: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written; both sources are copies already."""
    column.flags.writeable = False
    return column


def integers(column: Any, n: int, name: str) -> NDArray[np.int64]:
    """Return a column of n whole numbers as int64."""
    array = as_numpy(column)
    if array.shape != (n,):
        raise ValueError(f"NLLTable: {name} must have shape ({n},) like nll, got {array.shape}. Align the columns.")
    if array.dtype.kind not in "iub" and (array.dtype.kind != "f" or not np.array_equal(array, np.round(array))):
        raise ValueError(f"NLLTable: {name} must be integers, got dtype {array.dtype}. Hash text ids to int64 first.")
    return array.astype(np.int64)

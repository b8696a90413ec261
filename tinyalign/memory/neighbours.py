"""The neighbours of every training sample, found once and looked up in each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tinyalign._files import replace_directory, write_json
from tinyalign.memory.blockfile import bad_blocks, map_file, read_file, tensor_bytes, write_blocks
from tinyalign.memory.errors import BankCorruptedError, BankError, FingerprintMismatch, UnknownIdError
from tinyalign.memory.inputs import int_vector, is_whole, query_ids
from tinyalign.memory.manifest import FileEntry
from tinyalign.memory.milvus import AnyBank
from tinyalign.memory.retrieval import Neighbours
from tinyalign.memory.store import NO_ROOM
from tinyalign.memory.tables import read_facts

FORMAT = "tinyalign-neighbour-table"
VERSION = 1
COLUMNS = {"sample_ids.bin": torch.int64, "ids.bin": torch.int64, "scores.bin": torch.float32}


class NeighbourTable:
    """A table sample -> ids and scores of its neighbours, mapped from disk and tied to the bank it came from.

    Made by ``precompute_neighbours``; a training step then needs a lookup and a gather in place of a search.

    Args:
        sample_ids: names for lookup.
        ids: of the neighbours; -1 for none.
        scores: of the neighbours.
        facts: content hash, generation and fingerprint of the bank, and of its groups if some were excluded.

    Shape:
        sample_ids: (N,), int64. ids: (N, K), int64. scores: (N, K), float32.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> import tempfile
        >>> bank = MemoryBank(4, (1, 2))
        >>> ids = bank.add(torch.eye(4), torch.ones(4, 1, 2))
        >>> table = precompute_neighbours(bank, torch.eye(4), k=2, sample_ids=ids, exclude_ids=ids,
        ...                               path=tempfile.mkdtemp() + "/table")
        >>> tuple(table.lookup(torch.tensor([3, 0])).ids.shape)
        (2, 2)
    """

    def __init__(self, sample_ids: Tensor, ids: Tensor, scores: Tensor, facts: Mapping[str, Any]) -> None:
        self._sample_ids, self._ids, self._scores = sample_ids, ids, scores
        self.facts = dict(facts)
        order = np.argsort(sample_ids.numpy(), kind="stable")
        self._known, self._order = sample_ids.numpy()[order], order

    def __len__(self) -> int:
        return int(self._sample_ids.shape[0])

    @property
    def k(self) -> int:
        """Neighbours per sample."""
        return int(self._ids.shape[1])

    @property
    def sample_ids(self) -> Tensor:
        """Ids of the samples in the table, (N,) int64."""
        return self._sample_ids.clone()

    def lookup(self, sample_ids: Tensor | Sequence[int]) -> Neighbours:
        """Return the neighbours of samples (B,), on the device of ``sample_ids``."""
        where = "NeighbourTable.lookup"
        wanted = query_ids(sample_ids, where).reshape(-1)
        at = np.minimum(np.searchsorted(self._known, wanted), max(len(self._known) - 1, 0))
        missing = self._known[at] != wanted if len(self._known) else np.ones(len(wanted), dtype=bool)
        if missing.any():
            raise UnknownIdError(
                f"{where}: sample_ids must be in the table, got {int(wanted[missing][0])}. "
                "Make the table for all samples with precompute_neighbours."
            )
        rows = torch.from_numpy(self._order[at])
        ids, scores = self._ids.index_select(0, rows), self._scores.index_select(0, rows)
        device = sample_ids.device if isinstance(sample_ids, Tensor) else torch.device("cpu")
        return Neighbours(scores.to(device), ids.to(device), (ids >= 0).to(device))

    def require_bank(self, bank: AnyBank) -> None:
        """Refuse a bank whose keys or ids, or groups that were excluded, are not those the table was made from."""
        if bank.content_hash() != self.facts["content"]:
            raise FingerprintMismatch(
                f"NeighbourTable.require_bank: bank must be the one the table was made from (generation "
                f"{self.facts['generation']}, {self.facts['entries']} entries), got generation {bank.generation} "
                f"with {len(bank)} entries. Run precompute_neighbours again."
            )
        if self.facts.get("groups") not in (None, _named_groups(bank)):
            raise FingerprintMismatch(
                "NeighbourTable.require_bank: bank must have the groups that were excluded when the table was made, "
                "got others. Run precompute_neighbours again."
            )
        bank.require_fingerprint(self.facts["fingerprint"])

    @classmethod
    def load(cls, path: str | Path, bank: AnyBank | None = None) -> NeighbourTable:
        """Open a table, mapped from its files; with ``bank``, refuse one made from other keys, ids or groups.

        Raises:
            BankError: there is no table at ``path``.
            BankCorruptedError: a file is missing, cut or (for the small ones) damaged.
            FingerprintMismatch: the table was made from another bank.
        """
        where = "NeighbourTable.load"
        directory = Path(path)
        facts = read_facts(directory, FORMAT, VERSION, where, COLUMNS)
        rows, k = facts["rows"], facts["k"]
        columns = {}
        for name, dtype in COLUMNS.items():
            shape = (rows,) if name == "sample_ids.bin" else (rows, k)
            size = math.prod(shape) * dtype.itemsize
            file = directory / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise BankCorruptedError(f"{where}: {file} must have {size} bytes, got {found}. Make the table anew.")
            columns[name] = map_file(file, dtype, shape)[0] if len(shape) == 2 else read_file(file, dtype, shape)
        table = cls(columns["sample_ids.bin"], columns["ids.bin"], columns["scores.bin"], facts)
        if bank is not None:
            table.require_bank(bank)
        return table

    def verify(self, path: str | Path) -> None:
        """Compare the table's files at ``path`` with their checksums and name each that differs."""
        found = []
        for name in COLUMNS:
            facts = self.facts["files"][name]
            found += [f"{name}: {p}" for p in bad_blocks(Path(path) / name, FileEntry(facts["bytes"], facts["xxh3"]))]
        if found:
            raise BankCorruptedError(
                f"NeighbourTable.verify: {path} must be as written, got {'; '.join(found)}. Make it anew."
            )


def precompute_neighbours(
    bank: AnyBank,
    queries: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    k: int = 5,
    *,
    sample_ids: Tensor | Sequence[int] | None = None,
    exclude_ids: Any = None,
    exclude_groups: Any = None,
    path: str | Path,
    batch_size: int = 256,
    fingerprint: Mapping[str, Any] | None = None,
) -> NeighbourTable:
    """Search once for every sample and write the neighbours to ``path``.

    Memory stays bounded by one batch: ``queries`` may be a generator, and results go to disk as they come.

    Args:
        bank: what to search.
        queries: (N, D), or an iterable of (n, D) batches; tensors or NumPy arrays.
        k: neighbours per sample.
        sample_ids: (N,) names for lookup; 0 to N - 1 when absent.
        exclude_ids: per query as in ``MemoryBank.search``: usually ``sample_ids``, so that none retrieves itself.
        exclude_groups: per query: usually the groups of the samples.
        path: directory of the table; an old table there is replaced in one step, anything else is left as it is.
        batch_size: queries searched at once.
        fingerprint: what made the queries; its ``key.`` fields must equal the bank's.

    Shape:
        queries: (N, D). sample_ids, exclude_ids, exclude_groups: (N,).

    Raises:
        ValueError: ``k`` is not positive, or there are not as many sample ids or exclusions as queries.
        BankError: the path holds something else than a table, or the disk is full.
        FingerprintMismatch: the queries were made by something else.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> import tempfile
        >>> bank = MemoryBank(4, (1, 2))
        >>> ids = bank.add(torch.eye(4), torch.ones(4, 1, 2))
        >>> table = precompute_neighbours(bank, torch.eye(4), k=1, sample_ids=ids, path=tempfile.mkdtemp() + "/table")
        >>> table.lookup(ids).ids.flatten().tolist() == ids.tolist()  # without exclusion: themselves
        True
    """
    where = "precompute_neighbours"
    if not is_whole(k) or k < 1:
        raise ValueError(f"{where}: k must be positive, got {k!r}. Ask for at least one neighbour.")
    if batch_size < 1:
        raise ValueError(f"{where}: batch_size must be positive, got {batch_size}. Pass at least 1.")
    if fingerprint is not None:
        bank.require_fingerprint(fingerprint, "key.")
    directory = _free(Path(path).resolve(), where)
    try:
        with replace_directory(directory) as folder:
            rows = _search_all(bank, _batches(queries, batch_size), int(k), exclude_ids, exclude_groups, folder)
            names = np.arange(rows) if sample_ids is None else int_vector(sample_ids, rows, where, "sample_ids")
            if len(np.unique(names)) != rows:
                raise ValueError(
                    f"{where}: sample_ids must be distinct, got duplicates among {rows}. Name each sample once."
                )
            files = {
                "ids.bin": _with_checksums(folder, "ids"),
                "scores.bin": _with_checksums(folder, "scores"),
                "sample_ids.bin": write_blocks(folder / "sample_ids.bin", [tensor_bytes(torch.from_numpy(names))]),
            }
            facts = {
                "format": FORMAT,
                "version": VERSION,
                "rows": rows,
                "k": int(k),
                "generation": bank.generation,
                "entries": len(bank),
                "content": bank.content_hash(),
                "fingerprint": bank.fingerprint,
                "files": {name: {"bytes": f.size, "xxh3": f.checksums} for name, f in files.items()},
            }
            write_json(
                folder / "table.json", facts if exclude_groups is None else {**facts, "groups": _named_groups(bank)}
            )
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise BankError(
            f"{where}: the disk of {directory} must have room for the table, got {error.strerror!r}. Free some space "
            "and search again; an old table is as it was."
        ) from error
    return NeighbourTable.load(directory)


def _free(directory: Path, where: str) -> Path:
    """Return a directory that does not exist, is empty or holds a table; nothing else may be replaced."""
    facts, inside = directory / "table.json", {e.name for e in directory.iterdir()} if directory.is_dir() else set()
    ours = facts.is_file() and (inside >= set(COLUMNS) or FORMAT.encode() in facts.read_bytes())  # damaged or not
    found = sorted(inside - {facts.name, *COLUMNS} if ours else inside)
    if found or (directory.exists() and not directory.is_dir()):
        holding = f"{str(directory)!r} holding {found[0]!r}" if found else f"the file {str(directory)!r}"
        raise BankError(
            f"{where}: path must be free, or hold a neighbour table alone, got {holding}. Choose another path."
        )
    return directory


def _named_groups(bank: AnyBank) -> str:
    return xxhash.xxh3_128_hexdigest(tensor_bytes(bank.groups))


def _search_all(
    bank: AnyBank, batches: Iterable[Any], k: int, exclude_ids: Any, exclude_groups: Any, folder: Path
) -> int:
    """Write ids and scores of all queries to files in ``folder`` and return how many queries there were."""
    rows, where = 0, "precompute_neighbours"
    with open(folder / "ids.part", "wb") as ids_stream, open(folder / "scores.part", "wb") as scores_stream:
        for batch in batches:
            cut = slice(rows, rows + batch.shape[0])
            found = bank.neighbours(
                batch,
                k,
                exclude_ids=_share(exclude_ids, cut, where, "exclude_ids"),
                exclude_groups=_share(exclude_groups, cut, where, "exclude_groups"),
            )
            ids_stream.write(tensor_bytes(found.ids.cpu()))
            scores_stream.write(tensor_bytes(found.scores.cpu()))
            rows += batch.shape[0]
    for name, given in (("exclude_ids", exclude_ids), ("exclude_groups", exclude_groups)):
        if given is not None and len(given) != rows:
            raise ValueError(
                f"{where}: {name} must have one row per query, got {len(given)} for {rows} queries. Give -1 for none."
            )
    return rows


def _batches(queries: Any, batch_size: int) -> Iterator[Tensor | np.ndarray]:
    for part in [queries] if isinstance(queries, (Tensor, np.ndarray)) else queries:
        for at in range(0, part.shape[0], batch_size):
            yield part[at : at + batch_size]


def _share(exclude: Any, cut: slice, where: str, name: str) -> Any:
    if exclude is None:
        return None
    if len(exclude) < cut.stop:
        raise ValueError(
            f"{where}: {name} must have one row per query, got {len(exclude)} for at least {cut.stop} queries. "
            "Give one entry, list or padded row per sample."
        )
    return exclude[cut]


def _with_checksums(folder: Path, name: str) -> FileEntry:
    part = folder / f"{name}.part"

    def blocks() -> Iterator[memoryview]:
        with open(part, "rb") as stream:
            while block := stream.read(1 << 22):
                yield memoryview(block)

    entry = write_blocks(folder / f"{name}.bin", blocks())
    part.unlink()
    return entry

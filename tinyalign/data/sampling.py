"""Drawing N of M records by a seed, so that the draw can be named, repeated and nested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from tinyalign._checks import check_positive


class Draw(NamedTuple):
    """Which records were taken, and the facts by which the same ones are found again.

    Args:
        indices: positions of the records taken, ascending.
        drawn: how many were taken, N.
        of: how many there were, M.
        seed: of the draw.
        digest: 32 hex digits over the ids taken, in order.
    """

    indices: tuple[int, ...]
    drawn: int
    of: int
    seed: int
    digest: str

    def fingerprint(self, source: str) -> dict[str, str | int]:
        """Return the draw as `data.` fields for a bank's manifest; ``source`` names where the records came from."""
        return {
            "data.source": source,
            "data.drawn": self.drawn,
            "data.of": self.of,
            "data.seed": self.seed,
            "data.ids": self.digest,
        }


def draw_records(ids: Sequence[str], count: int | None = None, *, seed: int = 0) -> Draw:
    """Draw ``count`` of the records that ``ids`` name, uniformly.

    Every id has a priority from (`seed`, id) alone and the lowest are taken. The draw therefore does not depend on the
    order of the records, can be made in one pass over a stream, and is nested: the 20 % that a seed draws are among
    its 40 %, so that a curve over fractions adds data and never exchanges it.

    Args:
        ids: the records' ids, all different.
        count: how many to take; all when None or when there are no more.
        seed: another seed draws others.

    Raises:
        ValueError: ``count`` is not positive, or an id occurs twice.

    Example:
        >>> ids = [f"record {n}" for n in range(100)]
        >>> small, large = draw_records(ids, 20, seed=1), draw_records(ids, 40, seed=1)
        >>> small.drawn, small.of, set(small.indices) <= set(large.indices)
        (20, 100, True)
    """
    if count is not None:
        check_positive("draw_records", "count", count)
    if len(set(ids)) != len(ids):
        twice = next(name for at, name in enumerate(ids) if name in set(ids[:at]))
        raise ValueError(f"draw_records: ids must be distinct, got {twice!r} twice. Name every record once.")
    order = sorted(range(len(ids)), key=lambda at: (priority(ids[at], seed), ids[at]))
    indices = tuple(sorted(order[: len(ids) if count is None else count]))
    return Draw(indices, len(indices), len(ids), seed, digest_of([ids[at] for at in indices]))


def priority(name: str, seed: int) -> int:
    """Return the number by which ``seed`` ranks the record; the lowest are drawn first."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode())


def digest_of(ids: Sequence[str]) -> str:
    """Name a list of ids by 32 hex digits."""
    return xxhash.xxh3_128_hexdigest("\n".join(ids).encode())

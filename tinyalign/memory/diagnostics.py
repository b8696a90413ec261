"""Is the retrieval any good? Recall of labels, hubs, the spread of scores, and how crowded the keys are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.exclusion import padded_ids
from tinyalign.memory.inputs import float_rows, normalised
from tinyalign.memory.milvus import AnyBank
from tinyalign.memory.transform import KeyTransform


class RetrievalReport(NamedTuple):
    """How well a set of queries retrieves, averaged over queries.

    Args:
        num_queries: how many were asked.
        k: neighbours of each.
        recall_at_k: share of queries with at least one of k neighbours of their label.
        precision_at_k: share of neighbours of the query's label.
        chance_at_k: recall of k entries drawn at random from those the query may retrieve, the level to beat.
    """

    num_queries: int
    k: int
    recall_at_k: float
    precision_at_k: float
    chance_at_k: float


class HubReport(NamedTuple):
    """How unevenly entries are retrieved: counts of how often each of the M entries is among the k neighbours.

    Args:
        skewness: of the counts; near 0 without hubs, above 1 with marked ones.
        top_share: share of all retrievals that goes to the 1 % most retrieved entries.
        never_retrieved: share of entries that nobody found.
        busiest_id: the entry that was retrieved most often.
        busiest_count: how often that was.
    """

    skewness: float
    top_share: float
    never_retrieved: float
    busiest_id: int
    busiest_count: int


class ScoreReport(NamedTuple):
    """Mean scores of neighbours and of random entries: the gap is what the ranking rests on.

    Args:
        best: of the best neighbour.
        kth: of the k-th.
        random: of random entries.
        random_deviation: standard deviation of the random ones.
    """

    best: float
    kth: float
    random: float
    random_deviation: float


class AnisotropyReport(NamedTuple):
    """How crowded keys of unit length are.

    ``mean_cosine`` between random pairs (0 when directions are spread out); ``mean_share``: squared length of the mean
    key, what all share; ``effective_dim``: participation ratio of the covariance spectrum, D when all directions count
    alike.
    """

    mean_cosine: float
    mean_share: float
    effective_dim: float


def retrieval_report(
    bank: AnyBank,
    queries: Tensor,
    labels: Sequence[Any] | Tensor,
    label_of: Mapping[int, Any] | str,
    k: int = 5,
    **search: Any,
) -> RetrievalReport:
    """Compare the labels of k neighbours with those of the queries: same answer, same group, same caption, ...

    Entries without a label (no group, no such field, not in the mapping) are never what a query should find.

    Args:
        bank: what is searched.
        queries: (B, D).
        labels: what each query should find.
        label_of: id -> label of the bank's entries, ``"group"`` for their groups, or the name of a metadata field.
        k: neighbours per query.
        search: passed on to ``MemoryBank.neighbours``, such as ``exclude_ids``. Chance is that of drawing from what
            ``exclude_ids``, ``exclude_groups`` and ``where`` leave; ``max_score`` and an expression of Milvus, which
            only the search can tell, are not counted in it.

    Shape:
        queries: (B, D).

    Raises:
        ValueError: there are no queries, or not as many labels, one of them is "no group", or no entry has a label.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> bank = MemoryBank(2, (1,))
        >>> ids = bank.add(torch.eye(2), torch.ones(2, 1), metadata=[{"digit": 3}, {"digit": 7}])
        >>> retrieval_report(bank, torch.eye(2), [3, 3], "digit", k=1).recall_at_k
        0.5
    """
    where = "retrieval_report"
    if not len(labels) or queries.shape[0] != len(labels):
        raise ValueError(
            f"{where}: labels must be one per query, got {len(labels)} for {queries.shape[0]} queries. "
            "Give each its own."
        )
    wanted = _plain(labels)
    if label_of == "group" and -1 in wanted:
        raise ValueError(
            f"{where}: labels must name groups, got -1 (no group) for query {wanted.index(-1)}. Leave such queries out."
        )
    ids = bank.ids.tolist()
    known = _labels(bank, ids, label_of)
    if ids and not known:
        raise ValueError(
            f"{where}: label_of must give entries of the bank a label, got {label_of!r:.60} for none of {len(ids)}. "
            "Name a metadata field that they have, 'group', or map their ids."
        )
    found = bank.neighbours(queries, k, **search)
    recalled = right = given = 0
    for label, hits, mask in zip(wanted, found.ids.tolist(), found.mask.tolist(), strict=True):
        same = [hit in known and known[hit] == label for hit, kept in zip(hits, mask, strict=True) if kept]
        recalled += any(same)
        right += sum(same)
        given += len(same)
    chance = sum(_none_of(*counts, k) for counts in _allowed(bank, ids, wanted, known, search))
    n = len(wanted)
    return RetrievalReport(n, k, recalled / n, right / max(given, 1), 1 - chance / n)


def _plain(labels: Any) -> list[Any]:
    values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)
    return [value.tolist() if isinstance(value, Tensor) else value for value in values]


def _labels(bank: AnyBank, ids: list[int], label_of: Mapping[int, Any] | str) -> dict[int, Any]:
    """Return the labels of those entries that have one."""
    if not isinstance(label_of, str):
        kept = [i for i in ids if i in label_of]
        return dict(zip(kept, _plain([label_of[i] for i in kept]), strict=True))
    if label_of == "group":
        return {i: group for i, group in zip(ids, bank.groups.tolist(), strict=True) if group != -1}
    notes = zip(ids, bank.metadata(ids), strict=True)
    return {i: note[label_of] for i, note in notes if label_of in note}


def _allowed(
    bank: AnyBank, ids: list[int], wanted: list[Any], known: dict[int, Any], search: Mapping[str, Any]
) -> Iterator[tuple[int, int]]:
    """Yield how many entries each query may retrieve, and how many of them bear its label."""
    own, twins = (_rows(search.get(name), len(wanted), name) for name in ("exclude_ids", "exclude_groups"))
    of_group: dict[int, list[int]] = {}
    for i, group in zip(ids, bank.groups.tolist(), strict=True) if any(twins) else ():
        of_group.setdefault(group, []).append(i)
    keep = search.get("where")
    if callable(keep):
        ids = [i for i, note in zip(ids, bank.metadata(ids), strict=True) if keep(note)]
    elif keep is not None and not isinstance(keep, str):
        ids = [i for i, kept in zip(ids, _plain(keep), strict=True) if kept]
    allowed, counts = set(ids), Counter(known[i] for i in ids if i in known)
    for label, hidden, groups in zip(wanted, own, twins, strict=True):
        gone = {*hidden, *(i for group in groups for i in of_group.get(group, ()))} & allowed
        same = sum(i in known and known[i] == label for i in gone)
        yield len(allowed) - len(gone), counts[label] - same


def _rows(exclude: Any, count: int, name: str) -> list[list[int]]:
    table = padded_ids(exclude, count, "retrieval_report", name)
    return [[]] * count if table is None else [[each for each in row if each != -1] for row in table.tolist()]


def _none_of(total: int, labelled: int, k: int) -> float:
    """Return the chance that k entries drawn without replacement hold none of the labelled ones."""
    chance = 1.0
    for drawn in range(min(k, total)):
        chance *= max(total - labelled - drawn, 0) / (total - drawn)
    return chance


def hub_report(bank: AnyBank, queries: Tensor, k: int = 5, **search: Any) -> HubReport:
    """Count how often each entry is retrieved and describe the counts.

    Args:
        bank: what is searched.
        queries: of the training samples, say.
        k: neighbours per query.
        search: passed on to ``MemoryBank.neighbours``, such as ``exclude_ids``.

    Shape:
        queries: (B, D).

    Raises:
        ValueError: there are no queries.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> bank = MemoryBank(2, (1,))
        >>> ids = bank.add(torch.eye(2), torch.ones(2, 1), ids=[7, 8])
        >>> report = hub_report(bank, torch.tensor([[1.0, 0.1], [1.0, 0.0]]), k=1)
        >>> report.busiest_id, report.busiest_count, report.never_retrieved
        (7, 2, 0.5)
    """
    if not queries.shape[0]:
        raise ValueError("hub_report: queries must hold at least one row, got 0. Pass the training queries.")
    found = bank.neighbours(queries, k, **search)
    ids = bank.ids.sort().values
    rows = torch.searchsorted(ids, found.ids[found.mask].cpu())
    counts = torch.bincount(rows, minlength=len(ids)).double()
    centred = counts - counts.mean()
    spread = centred.square().mean()
    skewness = float(centred.pow(3).mean() / spread.pow(1.5)) if float(spread) > 0 else 0.0
    busiest = int(counts.argmax())
    top = counts.sort(descending=True).values[: max(1, len(ids) // 100)]
    return HubReport(
        skewness=skewness,
        top_share=float(top.sum() / counts.sum().clamp_min(1)),
        never_retrieved=float((counts == 0).double().mean()),
        busiest_id=int(ids[busiest]),
        busiest_count=int(counts[busiest]),
    )


def score_report(bank: AnyBank, queries: Tensor, k: int = 5, *, seed: int = 0, **search: Any) -> ScoreReport:
    """Compare the scores of neighbours with those of 1,000 random entries, averaged over queries.

    Args:
        bank: what is searched.
        queries: of the training samples, say.
        k: neighbours per query.
        seed: of the random entries.
        search: passed on to ``MemoryBank.neighbours``, such as ``exclude_ids``.

    Shape:
        queries: (B, D).

    Raises:
        ValueError: ``k`` or the number of queries is 0.

    Example:
        >>> from tinyalign.memory import MemoryBank
        >>> bank = MemoryBank(2, (1,))
        >>> ids = bank.add(torch.eye(2), torch.ones(2, 1))
        >>> report = score_report(bank, torch.eye(2), k=2)
        >>> report.best, report.kth
        (1.0, 0.0)
    """
    if k < 1 or not queries.shape[0]:
        raise ValueError(
            f"score_report: k and queries must not be empty, got k={k} and {queries.shape[0]} queries. Pass some."
        )
    found = bank.neighbours(queries, k, **search)
    generator = torch.Generator().manual_seed(seed)
    sample = bank.ids[torch.randint(len(bank), (1000,), generator=generator)]
    random = bank.project(queries).double() @ bank.keys(sample).double().T
    scores = found.scores.double().cpu()
    last = found.mask.sum(1).sub(1).clamp_min(0).cpu()
    return ScoreReport(
        best=float(scores[:, 0].mean()),
        kth=float(scores.gather(1, last[:, None]).mean()),
        random=float(random.mean()),
        random_deviation=float(random.std(dim=1).mean()),
    )


def anisotropy_report(keys: Tensor, transform: KeyTransform | None = None) -> AnisotropyReport:
    """Describe keys, optionally after a transform, as if for the cosine metric.

    Args:
        keys: of a bank, or pooled features that may become keys.
        transform: applied first, to see what it would do.

    Shape:
        keys: (M, D).

    Raises:
        ValueError: there are fewer than two keys.

    Example:
        >>> round(anisotropy_report(torch.eye(4) + 100).mean_cosine, 3)
        1.0
    """
    where = "anisotropy_report"
    if keys.ndim != 2 or keys.shape[0] < 2:
        raise ValueError(
            f"{where}: keys must be at least two rows (M, D), got {tuple(keys.shape)}. Pass the keys of a bank."
        )
    rows = normalised(float_rows(keys, (keys.shape[1],), where, "keys"), where, "keys")
    if transform is not None:
        rows = normalised(transform(rows), where, "keys")
    rows = rows.double()
    count, mean = rows.shape[0], rows.mean(0)
    share = float(mean @ mean)
    spectrum = torch.linalg.eigvalsh((rows - mean).T @ (rows - mean) / count).clamp_min(0)
    return AnisotropyReport(
        mean_cosine=(share * count - 1) / (count - 1),  # all pairs but those of a key with itself
        mean_share=share,
        effective_dim=float(spectrum.sum().square() / spectrum.square().sum().clamp_min(1e-300)),
    )

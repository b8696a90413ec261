"""Exact nearest neighbours by blocks of a matrix product, without ever holding all scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyalign.memory.exclusion import Banned, hide
from tinyalign.memory.rows import RowTable

QUERIES_AT_ONCE = 256
ROWS_AT_ONCE = 16384  # scores of one pass: 16 MB at 256 queries
BYTES_CONVERTED = 2 << 20  # fp16 keys are turned to fp32 in pieces that stay in cache
BYTES_RESCORED = 4 << 20  # candidates' keys are turned to fp64 in pieces that stay in cache
CHUNK = 64  # the maxima of chunks are compared before their members
SPARE = 8  # candidates beyond k, so that the exact scores decide the order
ROUNDING = 2e-6  # of |query| |key|: forty times what float32 products of 1,152 numbers were seen to miss
UNIT = 1.01  # no unit key is longer when rounded to 16 bits
SCORES_HELD = 16 << 20  # of queries that are searched again, at most,
FEWEST_HELD = 8  # but of so many queries, however many rows


class TopRows(NamedTuple):
    """The best rows of each query, best first; row -1 and score -inf where there are fewer."""

    scores: Tensor  # (B, k) float32
    rows: Tensor  # (B, k) int64


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest of each row and where they are; exact, by the maxima of chunks first.

    The k largest entries lie in the k chunks of largest maximum, so only those need to be looked at.
    """
    width = scores.shape[1]
    whole = width // CHUNK * CHUNK
    if whole < 4 * k * CHUNK:
        best, at = scores.topk(min(k, width))
        return best, at
    maxima = scores[:, :whole].reshape(scores.shape[0], -1, CHUNK).amax(-1)  # (B, width / CHUNK)
    chunks = maxima.topk(k, sorted=False).indices  # (B, k)
    at = (chunks[:, :, None] * CHUNK + torch.arange(CHUNK, device=scores.device)).flatten(1)  # (B, k * CHUNK)
    tail = torch.arange(whole, width, device=scores.device).expand(scores.shape[0], -1)
    at = torch.cat([at, tail], dim=1)
    best, within = scores.gather(1, at).topk(k)
    return best, at.gather(1, within)


def score_blocks(queries: Tensor, blocks: Iterable[tuple[int, Tensor]]) -> Iterable[tuple[int, Tensor]]:
    """Yield (first row, scores (B, m)) over key blocks (n, D) of any float dtype; each is overwritten by the next."""
    room = torch.empty(queries.shape[0], ROWS_AT_ONCE)
    work: Tensor | None = None
    for first, keys in blocks:
        for start in range(0, keys.shape[0], ROWS_AT_ONCE):
            part = keys[start : start + ROWS_AT_ONCE]
            scores = room[:, : part.shape[0]]
            if part.dtype == torch.float32:
                torch.mm(queries, part.T, out=scores)
                yield first + start, scores
                continue
            if work is None:
                work = torch.empty(max(1, BYTES_CONVERTED // (4 * keys.shape[1])), keys.shape[1])
            for begin in range(0, part.shape[0], work.shape[0]):
                converted = work[: min(work.shape[0], part.shape[0] - begin)]
                converted.copy_(part[begin : begin + work.shape[0]])
                target = scores[:, begin : begin + converted.shape[0]]
                if queries.shape[0] == 1:
                    torch.mv(converted, queries[0], out=target[0])
                else:
                    torch.mm(queries, converted.T, out=target)
            yield first + start, scores


class Bounds(NamedTuple):
    """What a search must know of scores.

    Args:
        max_score: rows above are left out.
        longest: no key is longer.
    """

    max_score: float | None
    longest: float

    def slack(self, queries: Tensor) -> Tensor:
        """Return how far a float32 score may be from the exact one, (B, 1)."""
        lengths: Tensor = queries.norm(dim=-1, keepdim=True)
        return ROUNDING * self.longest * lengths


def exact_top_rows(queries: Tensor, table: RowTable, k: int, banned: Banned, bounds: Bounds) -> TopRows:
    """Return the k rows of largest inner product for each query, best first; the earlier of equal ones.

    Candidates come from float32 products, k + 8 of them; their scores are then recomputed in float64 one query at a
    time, which makes them independent of the other rows of the batch, and ordered by score and row. Where a row that
    was left out may still be among the k best, as with many equal keys, that query is searched among all that may.

    Shape:
        queries: (B, D), float32. returns: (B, k).
    """
    parts = [
        _some_queries(queries[at : at + QUERIES_AT_ONCE], table, k, share_of_batch(banned, at), bounds)
        for at in range(0, queries.shape[0], QUERIES_AT_ONCE)
    ]
    if not parts:
        return TopRows(torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64))
    return TopRows(torch.cat([p.scores for p in parts]), torch.cat([p.rows for p in parts]))


def share_of_batch(banned: Banned, at: int) -> Banned:
    """Return the pairs of the queries from ``at`` on that are searched at once, numbered from 0."""
    mine = (banned.queries >= at) & (banned.queries < at + QUERIES_AT_ONCE)
    if mine.all():
        return banned if at == 0 else Banned(banned.rows, banned.queries - at, banned.everywhere)
    return Banned(banned.rows[mine], banned.queries[mine] - at, banned.everywhere)


def _some_queries(queries: Tensor, table: RowTable, k: int, banned: Banned, bounds: Bounds) -> TopRows:
    wanted = k + SPARE
    best = torch.full((queries.shape[0], 0), float("-inf"))
    rows = torch.zeros(queries.shape[0], 0, dtype=torch.int64)
    slack = bounds.slack(queries)
    for first, scores in _allowed_scores(queries, table, banned, bounds, slack):
        found, at = best_of(scores, wanted)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, at + first], dim=1)
        if best.shape[1] > wanted:
            best, at = best.topk(wanted)
            rows = rows.gather(1, at)
    top = rescored(queries, table, best, rows, k, bounds.max_score)
    open_ = unsettled(best, top, slack) if best.shape[1] == wanted else []
    held = max(FEWEST_HELD, SCORES_HELD // max(1, table.total))
    for begin in range(0, len(open_), held):
        some = open_[begin : begin + held]
        mine = np.isin(banned.queries, some)
        again = Banned(banned.rows[mine], np.searchsorted(some, banned.queries[mine]), banned.everywhere)
        blocks = _allowed_scores(queries[some], table, again, bounds, slack[some])
        _search_again(top, queries, table, k, some, torch.cat([s.clone() for _, s in blocks], dim=1), bounds)
    return top


def _allowed_scores(
    queries: Tensor, table: RowTable, banned: Banned, bounds: Bounds, slack: Tensor
) -> Iterable[tuple[int, Tensor]]:
    """Yield (first row, scores (B, m)), -inf where a row is banned or surely above the largest score."""
    blocks = ((start, columns.keys) for start, columns in table.blocks())
    for first, scores in score_blocks(queries, blocks):
        hide(scores, banned, first)
        if bounds.max_score is not None:
            scores.masked_fill_(scores > bounds.max_score + slack, float("-inf"))
        yield first, scores


def unsettled(best: Tensor, top: TopRows, slack: Tensor) -> list[int]:
    """Return the queries of which a row scored below ``best`` (B, C) may be among the k best, in order."""
    if not top.scores.shape[1]:
        return []
    last = best[:, -1]
    return ((last > float("-inf")) & (last + slack[:, 0] >= top.scores[:, -1])).nonzero()[:, 0].tolist()


def _search_again(
    top: TopRows, queries: Tensor, table: RowTable, k: int, some: list[int], scores: Tensor, bounds: Bounds,
    rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Replace the top rows of some queries by the best of all that may be, by their scores (len(some), M)."""
    slack = bounds.slack(queries[some])
    sure = scores if bounds.max_score is None else scores.masked_fill(scores > bounds.max_score - slack, float("-inf"))
    least = best_of(sure, min(k, sure.shape[1]))[0][:, -1:] - 2 * slack
    for each, query in enumerate(some):
        may = ((scores[each] >= least[each]) & (scores[each] > float("-inf"))).nonzero()[:, 0]
        at = may if rows is None else rows[may]
        one = rescored(queries[query : query + 1], table, scores[each, may][None], at[None], k, bounds.max_score)
        top.scores[query], top.rows[query] = one.scores[0], one.rows[0]


def rescored(
    queries: Tensor, table: RowTable, best: Tensor, rows: Tensor, k: int, max_score: float | None = None
) -> TopRows:
    """Order candidate rows (B, C) by their float64 scores and row, and keep k; ``best`` of -inf marks no candidate."""
    exact = _exact_scores(queries, table, rows)
    none = best == float("-inf")
    if max_score is not None:
        none |= exact > max_score
    exact = exact.masked_fill(none, float("-inf"))
    by_row = rows.argsort(dim=1, stable=True)
    by_score = exact.gather(1, by_row).argsort(dim=1, descending=True, stable=True)
    order = by_row.gather(1, by_score)[:, :k]
    scores, rows = exact.gather(1, order), rows.gather(1, order)
    rows = rows.masked_fill(scores == float("-inf"), -1)
    if scores.shape[1] < k:
        short = (0, k - scores.shape[1])
        scores = torch.nn.functional.pad(scores, short, value=float("-inf"))
        rows = torch.nn.functional.pad(rows, short, value=-1)
    return TopRows(scores, rows)


def _exact_scores(queries: Tensor, table: RowTable, rows: Tensor) -> Tensor:
    """Return float64 products of each query with its own rows (B, C), rounded to float32; some of them at a time."""
    count, candidates = rows.shape
    width = queries.shape[1]
    most = max(1, BYTES_RESCORED // (8 * width))
    step = max(1, most // max(candidates, 1))
    scores = torch.empty(count, candidates)
    for at in range(0, count, step):
        wide = queries[at : at + step, None].to(torch.float64)
        for begin in range(0, candidates, most):
            some = rows[at : at + step, begin : begin + most]
            keys = table.gather(some.reshape(-1), "keys").reshape(*some.shape, width)
            keys = keys.to(torch.float32).to(torch.float64)  # by way of fp32, 16 bits are converted in vectors
            scores[at : at + step, begin : begin + most] = keys.mul_(wide).sum(-1)
    return scores


def few_rows(queries: Tensor, table: RowTable, k: int, allowed: np.ndarray, banned: Banned) -> TopRows:
    """The same when a filter leaves only ``allowed`` rows: gather them once instead of scoring all rows."""
    rows = torch.from_numpy(allowed)
    keys = table.gather(rows, "keys").to(torch.float32)
    scores = queries @ keys.T  # (B, allowed)
    position = np.searchsorted(allowed, banned.rows)
    inside = np.append(allowed, -1)[position] == banned.rows
    scores[torch.from_numpy(banned.queries[inside]), torch.from_numpy(position[inside])] = float("-inf")
    best, at = best_of(scores, k + SPARE)
    top = rescored(queries, table, best, rows[at], k)
    bounds = Bounds(None, float(keys.norm(dim=-1).max()) if len(keys) else 0.0)
    some = unsettled(best, top, bounds.slack(queries)) if best.shape[1] == k + SPARE else []
    if some:
        _search_again(top, queries, table, k, some, scores[some], bounds, rows)
    return top

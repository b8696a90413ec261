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


def exact_top_rows(queries: Tensor, table: RowTable, k: int, banned: Banned, max_score: float | None = None) -> TopRows:
    """Return the k rows of largest inner product for each query, best first.

    Candidates come from float32 products, k + 8 of them; their scores are then recomputed in float64 one query at a
    time, which makes them independent of the other rows of the batch, and ordered by score and row.

    Shape:
        queries: (B, D), float32. returns: (B, k).
    """
    parts = [
        _some_queries(queries[at : at + QUERIES_AT_ONCE], table, k, share_of_batch(banned, at), max_score)
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


def _some_queries(queries: Tensor, table: RowTable, k: int, banned: Banned, max_score: float | None) -> TopRows:
    wanted = k + SPARE
    best = torch.full((queries.shape[0], 0), float("-inf"))
    rows = torch.zeros(queries.shape[0], 0, dtype=torch.int64)
    blocks = ((start, columns.keys) for start, columns in table.blocks())
    for first, scores in score_blocks(queries, blocks):
        hide(scores, banned, first)
        if max_score is not None:
            scores.masked_fill_(scores > max_score + 1e-5, float("-inf"))
        found, at = best_of(scores, wanted)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, at + first], dim=1)
        if best.shape[1] > wanted:
            best, at = best.topk(wanted)
            rows = rows.gather(1, at)
    return rescored(queries, table, best, rows, k, max_score)


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
    """Return float64 products of each query with its own rows (B, C), rounded to float32; some queries at a time."""
    count, candidates = rows.shape
    width = queries.shape[1]
    step = max(1, BYTES_RESCORED // max(8 * candidates * width, 1))
    scores = torch.empty(count, candidates)
    for at in range(0, count, step):
        some = rows[at : at + step]
        keys = table.gather(some.reshape(-1), "keys").reshape(*some.shape, width)
        keys = keys.to(torch.float32).to(torch.float64)  # by way of fp32, 16 bits are converted in vectors
        scores[at : at + step] = keys.mul_(queries[at : at + step, None].to(torch.float64)).sum(-1)
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
    return rescored(queries, table, best, rows[at], k)

"""Exact search that reads a quarter of the bytes: int8 scores with a proof, row by row, of what they cannot miss."""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tinyalign.memory.exclusion import Banned, hide
from tinyalign.memory.rows import RowTable
from tinyalign.memory.search import QUERIES_AT_ONCE, Bounds, TopRows, best_of, exact_top_rows, rescored, share_of_batch

ROWS_AT_ONCE = 8192
CANDIDATES = 64  # rows rescored per query at first; where the proof needs more, all it needs
MOST_CANDIDATES = 4096
ROUNDING = 1e-6  # of |q| (|m| + |s c|): a dozen float32 roundings of 6e-8 each


class Codes(NamedTuple):
    """Keys (n, D) of one segment as ``center + scale * code + residual``."""

    codes: Tensor  # (n, D) int8
    scales: Tensor  # (n,) float32
    residuals: Tensor  # (n,) length of the residual
    lengths: Tensor  # (n,) length of scale * code
    start: int


class CertifiedSearch:
    """Int8 copies of the keys, and the bound that makes them exact.

    With ``k = m + s c + r`` and ``q = q' + e`` (q' the sum of two int8 vectors), ``q.k`` differs from
    ``q.m + s (q'.c)`` by at most ``|e| |s c| + |q| |r|`` (Cauchy-Schwarz). A row whose bound lies under the exact
    score of the k-th best candidate cannot be among the k best; where that is not so for every row that was left out,
    more rows are scored, in the end all of them.

    Args:
        table: the bank's rows; codes are made for those present now.
    """

    def __init__(self, table: RowTable) -> None:
        self.version = table.version
        self.center = _mean_key(table)
        self.parts = [_encode(keys, self.center, start) for start, keys in _pieces(table)]
        self.fallbacks = 0  # queries for which every row was scored

    def top_rows(self, queries: Tensor, table: RowTable, k: int, banned: Banned, bounds: Bounds) -> TopRows:
        """Return what ``exact_top_rows`` returns."""
        found = [
            self._some_queries(queries[at : at + QUERIES_AT_ONCE], table, k, share_of_batch(banned, at), bounds)
            for at in range(0, queries.shape[0], QUERIES_AT_ONCE)
        ]
        if not found:
            return TopRows(torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64))
        return TopRows(torch.cat([f.scores for f in found]), torch.cat([f.rows for f in found]))

    def _some_queries(self, queries: Tensor, table: RowTable, k: int, banned: Banned, bounds: Bounds) -> TopRows:
        count, wanted = queries.shape[0], min(k + CANDIDATES, table.total)
        upper = torch.empty(count, table.total)
        self._bounds(queries, upper, banned)
        best, rows = best_of(upper, min(wanted + 1, table.total))
        top = rescored(queries, table, best[:, :wanted], rows[:, :wanted], k)
        if best.shape[1] == wanted or not k:
            return top  # every row was scored
        proven = (best[:, wanted] < top.scores[:, -1]) | (best[:, wanted] == float("-inf"))
        for row in (~proven).nonzero().squeeze(1).tolist():
            hidden = banned.queries == row
            mine = Banned(banned.rows[hidden], banned.queries[hidden] * 0, banned.everywhere)
            one = self._more(queries[row : row + 1], table, k, upper[row], float(top.scores[row, -1]), mine, bounds)
            top.scores[row], top.rows[row] = one.scores[0], one.rows[0]
        return top

    def _more(
        self, query: Tensor, table: RowTable, k: int, upper: Tensor, least: float, banned: Banned, bounds: Bounds
    ) -> TopRows:
        rows = (upper >= least).nonzero().squeeze(1)
        if least > float("-inf") and rows.shape[0] <= MOST_CANDIDATES:
            return rescored(query, table, upper[rows][None], rows[None], k)
        self.fallbacks += 1
        return exact_top_rows(query, table, k, banned, bounds)

    def _bounds(self, queries: Tensor, upper: Tensor, banned: Banned) -> None:
        count = queries.shape[0]
        first, first_scale, rest, rest_scale, missing = _two_codes(queries)
        codes = torch.cat([first, rest])  # (2B, D)
        offset = (queries.double() @ self.center.double()).float()[:, None]
        lengths, middle = queries.norm(dim=-1, keepdim=True), float(self.center.norm())
        for part in self.parts:
            for at in range(0, part.codes.shape[0], ROWS_AT_ONCE):
                stop = min(at + ROWS_AT_ONCE, part.codes.shape[0])
                products = torch._int_mm(codes, part.codes[at:stop].T).to(torch.float32)
                target = upper[:, part.start + at : part.start + stop]
                torch.mul(products[:count], first_scale, out=target)
                target.addcmul_(products[count:], rest_scale)
                target.mul_(part.scales[at:stop]).add_(offset)
                slack = part.residuals[at:stop] + ROUNDING * (middle + part.lengths[at:stop])
                target.addcmul_(lengths, slack).addcmul_(missing, part.lengths[at:stop])
                hide(target, banned, part.start + at)


def _pieces(table: RowTable) -> list[tuple[int, Tensor]]:
    return [(start, columns.keys) for start, columns in table.blocks() if columns.keys.shape[0]]


def _mean_key(table: RowTable) -> Tensor:
    pieces = _pieces(table)
    total, count = torch.zeros(pieces[0][1].shape[1] if pieces else 0, dtype=torch.float64), 0
    for _, keys in pieces:
        for at in range(0, keys.shape[0], ROWS_AT_ONCE):
            part = keys[at : at + ROWS_AT_ONCE]
            total, count = total + part.to(torch.float32).double().sum(0), count + part.shape[0]
    return (total / max(count, 1)).to(torch.float32)


def _encode(keys: Tensor, center: Tensor, start: int) -> Codes:
    codes = torch.empty(keys.shape, dtype=torch.int8)
    scales, residuals, lengths = (torch.empty(keys.shape[0]) for _ in range(3))
    for at in range(0, keys.shape[0], ROWS_AT_ONCE):
        cut = slice(at, at + ROWS_AT_ONCE)
        centred = keys[cut].to(torch.float32) - center
        scale = centred.abs().amax(-1, keepdim=True).div(127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (centred / scale).round().clamp(-127, 127)
        codes[cut], scales[cut] = rounded.to(torch.int8), scale[:, 0]
        residuals[cut] = (centred - rounded * scale).norm(dim=-1)
        lengths[cut] = (rounded * scale).norm(dim=-1)
    return Codes(codes, scales, residuals, lengths, start)


def _two_codes(queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tiny = torch.finfo(torch.float32).tiny
    first_scale = queries.abs().amax(-1, keepdim=True).div(127).clamp_min(tiny)
    first = (queries / first_scale).round().clamp(-127, 127)
    left = queries.double() - first.double() * first_scale.double()
    rest_scale = left.abs().amax(-1, keepdim=True).div(127).clamp_min(tiny).float()
    rest = (left / rest_scale).round().clamp(-127, 127)
    missing = (left - rest * rest_scale.double()).norm(dim=-1, keepdim=True).float()
    return first.to(torch.int8), first_scale, rest.to(torch.int8), rest_scale, missing


@cache
def int8_pays() -> bool:
    """Say whether this processor multiplies int8 matrices faster than float32 ones; measured once."""
    keys, queries = torch.randint(-127, 127, (512, 256), dtype=torch.int8), torch.ones(16, 256, dtype=torch.int8)
    floats = keys.to(torch.float32)

    def seconds(twice: bool) -> float:
        best = float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            _ = torch._int_mm(torch.cat([queries, queries]), keys.T) if twice else queries.float() @ floats.T
            best = min(best, time.perf_counter() - begin)
        return best

    return seconds(True) < seconds(False)

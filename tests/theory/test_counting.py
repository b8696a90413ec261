"""Counts in boxes against the full matrix: every way of counting, ties, edges, several radii and parts of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.theory import counting
from tinyalign.theory.counting import count_within, counts_within, distance_blocks


def naive(points: np.ndarray, radii: np.ndarray, strict: bool, rows: np.ndarray) -> np.ndarray:
    matrix = np.abs(points[rows][:, None] - points[None]).max(axis=2)
    inside = [(matrix < r[:, None]) if strict else (matrix <= r[:, None]) for r in radii.T]
    return np.maximum(np.stack([part.sum(axis=1) - 1 for part in inside], axis=1), 0)


@given(st.integers(0, 9999), st.integers(1, 5), st.integers(2, 90), st.booleans(), st.booleans())
def test_boxes_hold_what_the_matrix_says(seed: int, width: int, n: int, strict: bool, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 4, (n, width)).astype(float) if tied else rng.normal(size=(n, width))
    rows = rng.permutation(n)[: max(1, n // 2)]
    radii = rng.integers(0, 4, (len(rows), 3)).astype(float) if tied else rng.uniform(0, 2, (len(rows), 3))
    np.testing.assert_array_equal(
        counts_within(points, radii, strict=strict, rows=rows), naive(points, radii, strict, rows)
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("width", "way"), [(3, "bits"), (3, "tree"), (6, "tree"), (14, "bits"), (14, "blocks")])
def test_every_way_of_counting_gives_the_same(
    width: int, way: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_BIT_POINTS", 10**9 if way == "bits" else 0)
    monkeypatch.setattr(counting, "_BIT_CHUNK", 70)  # several tables, the last one not full
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, width)).astype(np.float32).astype(np.float64)
    matrix = np.sort(np.abs(points[:, None] - points[None]).max(axis=2), axis=1)
    radii = matrix[:, [3, 20]]  # a neighbour lies at each radius itself
    expected = naive(points, radii, strict, np.arange(300))
    np.testing.assert_array_equal(counts_within(points, radii, strict=strict), expected)
    np.testing.assert_array_equal(
        counts_within(points, radii[::7], strict=strict, rows=np.arange(0, 300, 7)), expected[::7]
    )
    np.testing.assert_array_equal(count_within(points, radii[:, 0], strict=strict), expected[:, 0])


def test_before_numpy_2_trees_count(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).normal(size=(200, 3))
    radii = np.full((200, 1), 0.4)
    expected = counts_within(points, radii)
    monkeypatch.setattr(counting, "_COUNTS_BITS", False)
    np.testing.assert_array_equal(counts_within(points, radii), expected)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_radius_of_zero_holds_ties_only_when_it_is_closed(width: int) -> None:
    points = np.repeat(np.array([[0.0], [1.0], [1.0], [2.0]]), width, axis=1)
    zero = np.zeros((4, 1))
    assert counts_within(points, zero).ravel().tolist() == [0, 0, 0, 0]
    assert counts_within(points, zero, strict=False).ravel().tolist() == [0, 1, 1, 0]
    assert counts_within(points, np.full((4, 1), 9.0)).ravel().tolist() == [3, 3, 3, 3]


def test_blocks_are_the_distance_matrix() -> None:
    rng = np.random.default_rng(0)
    points, queries = rng.normal(size=(40, 5)), rng.normal(size=(300, 5))
    blocks = np.concatenate([block.numpy() for block in distance_blocks(queries, points)])
    np.testing.assert_allclose(blocks, np.abs(queries[:, None] - points).max(axis=2), rtol=1e-5, atol=1e-6)

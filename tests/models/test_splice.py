from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.models import pack_images, splice_tokens
from tinyalign.models.splice import fill_placeholders, insertion_points, position_ids_of


@st.composite
def batches(draw: Any) -> tuple[list[list[float]], list[list[float]], list[int]]:
    B, S, T = draw(st.integers(1, 4)), draw(st.integers(0, 5)), draw(st.integers(0, 4))
    number = st.integers(-50, 50)
    old = [draw(st.lists(number, min_size=S, max_size=S)) for _ in range(B)]
    new = [draw(st.lists(number, min_size=T, max_size=T)) for _ in range(B)]
    return old, new, [draw(st.integers(0, S)) for _ in range(B)]


@given(batches())
def test_splicing_is_list_insertion(batch: Any) -> None:
    old, new, places = batch
    width = len(old[0])
    embeds = torch.tensor(old, dtype=torch.float32).view(len(old), width, 1).expand(-1, -1, 3)
    tokens = torch.tensor(new, dtype=torch.float64).view(len(new), len(new[0]), 1).expand(-1, -1, 3)
    ids = torch.tensor(old, dtype=torch.long).view(len(old), width)
    keep = ids > 0
    new_keep = torch.tensor(new).view(len(new), -1) > 0
    spliced = splice_tokens(embeds, tokens, torch.tensor(places), {"labels": (ids, -100), "mask": (keep, new_keep)})
    expected = [row[:at] + fresh + row[at:] for row, fresh, at in zip(old, new, places, strict=True)]
    labels = [row[:at] + [-100] * len(fresh) + row[at:] for row, fresh, at in zip(old, new, places, strict=True)]
    inserted = [[at <= j < at + len(new[0]) for j in range(width + len(new[0]))] for at in places]
    assert spliced.embeds[..., 2].tolist() == expected
    assert spliced.companions["labels"].tolist() == labels
    assert spliced.companions["mask"].tolist() == [[value > 0 for value in row] for row in expected]
    assert spliced.inserted.tolist() == inserted
    assert spliced.embeds.dtype == torch.float32


def test_gradients_reach_old_and_new_tokens() -> None:
    embeds, tokens = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True)
    splice_tokens(embeds, tokens, torch.tensor([0, 3])).embeds.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(embeds.grad, torch.ones(2, 3, 4))  # type: ignore[arg-type]
    assert torch.equal(tokens.grad, torch.ones(2, 2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 1, 5)}, r"tokens must have shape \(B, T, D\).*got \(2, 1, 5\) and \(2, 3, 4\)"),
        ({"tokens": torch.zeros(3, 1, 4)}, r"tokens must have shape"),
        ({"position": torch.tensor([1])}, r"position must have shape \(2,\), got \(1,\)"),
        (
            {"companions": {"types": (torch.zeros(2, 4), 0)}},
            r"companion 'types' must begin with shape \(2, 3\), got \(2, 4\)",
        ),
        (
            {"companions": {"types": (torch.zeros(2, 3), torch.zeros(2, 2))}},
            r"companion 'types' must get entries of shape \(2, 1\) for the new tokens, got \(2, 2\)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {
        "embeds": torch.zeros(2, 3, 4), "tokens": torch.zeros(2, 1, 4), "position": torch.tensor([0, 1]), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        splice_tokens(**given_)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_filling_is_a_loop_over_places(holes: list[list[bool]]) -> None:
    is_hole = torch.tensor(holes)
    counts = is_hole.sum(dim=1)
    tokens = torch.arange(1.0, int(counts.sum()) + 1)[:, None]
    filled = fill_placeholders(torch.zeros(len(holes), 4, 1), is_hole, tokens, counts)
    expected, following = [], 1.0
    for row in holes:
        line = []
        for hole in row:
            line.append(following if hole else 0.0)
            following += float(hole)
        expected.append(line)
    assert filled[..., 0].tolist() == expected


def test_a_row_with_too_many_places_does_not_take_from_the_next() -> None:
    """masked_scatter over the flattened batch would shift every later row; here the row itself is named."""
    holes = torch.tensor([[True, True, False], [True, False, False]])
    with pytest.raises(ValueError, match=r"got 2 placeholders for 1 image tokens in row 0.*do not cut rows inside"):
        fill_placeholders(torch.zeros(2, 3, 1), holes, torch.ones(3, 1), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"got 4 image tokens where the rows count 3"):
        fill_placeholders(torch.zeros(2, 3, 1), holes, torch.ones(4, 1), torch.tensor([2, 1]))


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4), st.booleans())
def test_the_place_is_behind_the_last_image_or_bos(rows: list[list[int]], left: bool) -> None:
    """0 padding, 1 BOS, 2 image, 3 text; a naive walk over each row is the reference."""
    lines = [sorted(row, key=lambda t: (t > 0) == left) for row in rows]
    keep = torch.tensor(lines) > 0
    first = [next((i for i, token in enumerate(line) if token), 0) for line in lines]
    expected = []
    for line, at in zip(lines, first, strict=True):
        images = [i for i, token in enumerate(line) if token == 2]
        expected.append(images[-1] + 1 if images else at + (line[at] == 1))
    bos = torch.tensor([line[at] == 1 for line, at in zip(lines, first, strict=True)])
    assert insertion_points(keep, torch.tensor(lines) == 2, bos).tolist() == expected


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_positions_count_kept_tokens(mask: list[bool]) -> None:
    positions = position_ids_of(torch.tensor([mask]))[0].tolist()
    kept = [position for position, keep in zip(positions, mask, strict=True) if keep]
    assert kept == list(range(len(kept)))
    if all(mask[: sum(mask)]):  # no gap and no padding on the left: as if no mask had been given
        assert positions == (list(range(len(mask))))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_images_are_packed_row_by_row(counts: list[int]) -> None:
    features = torch.arange(float(sum(counts) * 2)).view(sum(counts), 2, 1)
    rows, mask = pack_images(features, torch.tensor(counts))
    assert rows.shape[1] == mask.shape[1] == 2 * max(counts)
    values = iter(range(sum(counts) * 2))
    for row, keep, count in zip(rows, mask, counts, strict=True):
        assert row[keep, 0].tolist() == [float(next(values)) for _ in range(2 * count)]
        assert int(keep.sum()) == 2 * count
        assert (row[~keep] == 0).all()

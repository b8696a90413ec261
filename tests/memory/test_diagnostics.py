"""Diagnostics on banks whose recall, hubs and crowding are known."""

from __future__ import annotations

import itertools

import pytest
import torch

from tinyalign.memory import (
    KeyTransform,
    MemoryBank,
    anisotropy_report,
    hub_report,
    neighbour_sheet,
    retrieval_report,
    score_report,
)


@pytest.fixture
def labelled():
    """Ten entries on the axes, two to an axis: labels 0 to 4, group 10 + label, metadata the same."""
    bank = MemoryBank(5, (1,))
    keys = torch.eye(5).repeat_interleave(2, 0) + 0.01 * torch.randn(10, 5)
    labels = [i // 2 for i in range(10)]
    bank.add(keys, torch.ones(10, 1), groups=[10 + n for n in labels], metadata=[{"label": n} for n in labels])
    return bank


def test_recall_and_chance(labelled):
    queries = torch.eye(5)
    by_field = retrieval_report(labelled, queries, [0, 1, 2, 3, 0], "label", k=2)
    assert by_field[:4] == (5, 2, 0.8, 0.8)
    by_group = retrieval_report(labelled, queries, [10, 11, 12, 13, 10], "group", k=2)
    by_table = retrieval_report(labelled, queries, "abcda", {i: "abcde"[i // 2] for i in range(10)}, k=2)
    assert by_group == by_table == by_field
    pairs = list(itertools.combinations(range(10), 2))
    chance = sum(any(i in (0, 1) for i in pair) for pair in pairs) / len(pairs)
    assert by_field.chance_at_k == pytest.approx(chance)
    assert retrieval_report(labelled, queries, range(5), "label", k=2, exclude_ids=[[2 * n] for n in range(5)])[
        2:4
    ] == (
        1.0,
        0.5,
    )
    assert retrieval_report(labelled, queries, [9] * 5, "label", k=20).chance_at_k == 0.0
    with pytest.raises(ValueError, match="labels must be one per query, got 2 for 5"):
        retrieval_report(labelled, queries, [1, 2], "label")


def test_hubs():
    keys = torch.eye(200)
    bank = MemoryBank(200, (1,), metric="ip")
    bank.add(keys, torch.ones(200, 1))
    even = hub_report(bank, keys, k=1)
    assert even[:4] == (0.0, 0.01, 0.0, 0)
    bank.add(torch.full((1, 200), 5.0), torch.ones(1, 1), ids=[777])
    hub = hub_report(bank, keys, k=1)
    assert (hub.busiest_id, hub.busiest_count) == (777, 200)
    assert hub.skewness > 10
    assert hub.top_share == 1.0
    assert hub.never_retrieved == pytest.approx(200 / 201)
    few = MemoryBank(2, (1,), metric="ip")
    few.add(torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [0.1, 1.0]]), torch.ones(4, 1))
    shunned = hub_report(few, torch.tensor([[1.0, 0.0]] * 9), k=3)  # counts 9, 9, 9, 0
    assert shunned.skewness == pytest.approx(-2 / 3**0.5)
    with pytest.raises(ValueError, match="queries must hold at least one row, got 0"):
        hub_report(bank, keys[:0])


def test_scores(labelled):
    report = score_report(labelled, torch.eye(5), k=2)
    expected = torch.eye(5) @ labelled.keys().T
    top = expected.topk(2).values
    assert report.best == pytest.approx(float(top[:, 0].mean()), abs=1e-6)
    assert report.kth == pytest.approx(float(top[:, 1].mean()), abs=1e-6)
    assert report.random == pytest.approx(float(expected.mean()), abs=0.03)
    assert report.random_deviation == pytest.approx(float(expected.std(dim=1).mean()), abs=0.05)
    with pytest.raises(ValueError, match="k and queries must not be empty, got k=0 and 5"):
        score_report(labelled, torch.eye(5), k=0)


def test_anisotropy_before_and_after_centring():
    torch.manual_seed(0)
    keys = torch.randn(300, 12) + 3
    before = anisotropy_report(keys)
    unit = torch.nn.functional.normalize(keys, dim=-1).double()
    cosines = [float(a @ b) for a, b in itertools.combinations(unit, 2)]
    assert before.mean_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    after = anisotropy_report(keys, KeyTransform.fit(keys))
    assert before.mean_cosine > 0.8
    assert abs(after.mean_cosine) < 0.01
    assert after.mean_share < 0.01 < before.mean_share
    stretched = torch.randn(3000, 4) * torch.tensor([30.0, 1.0, 1.0, 1.0])
    assert anisotropy_report(stretched).effective_dim < 1.5
    assert anisotropy_report(torch.randn(3000, 4)).effective_dim == pytest.approx(4, abs=0.1)
    with pytest.raises(ValueError, match=r"at least two rows \(M, D\), got \(1, 3\)"):
        anisotropy_report(torch.ones(1, 3))


def test_sheet_shows_everything_once_and_escapes(labelled, tmp_path):
    from PIL import Image

    picture = tmp_path / "blue.png"
    Image.new("RGB", (400, 300), "blue").save(picture)
    found = labelled.neighbours(torch.eye(5)[:2], 3, exclude_ids=[list(range(8)), []])
    path = neighbour_sheet(
        found,
        [(Image.new("L", (9, 9)), "a <query>"), (None, "text only")],
        lambda entry: (picture, f"entry number {entry}"),
        tmp_path / "sheet.html",
        title="A & B",
    )
    page = path.read_text()
    assert "A &amp; B" in page
    assert "a &lt;query&gt;" in page
    for entry, kept in zip(found.ids.flatten().tolist(), found.mask.flatten().tolist(), strict=True):
        assert (f"entry number {entry}" in page) == kept
    assert page.count("none left") == 1
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
    with pytest.raises(ValueError, match="queries must be one per row of neighbours, got 0 for 2"):
        neighbour_sheet(found, [], lambda entry: (None, ""), tmp_path / "x.html")

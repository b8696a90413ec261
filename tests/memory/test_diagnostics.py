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
    notes = [{"label": n, "even": i % 2 == 0} for i, n in enumerate(labels)]
    bank.add(keys, torch.ones(10, 1), groups=[10 + n for n in labels], metadata=notes)
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


def drawn(allowed, wanted, k):
    """Chance of a right entry among k of the allowed ones, by drawing every set of k."""
    sets = list(itertools.combinations(allowed, min(k, len(allowed))))
    return sum(bool(wanted & {*some}) for some in sets) / len(sets)


def test_chance_is_that_of_what_may_be_retrieved(labelled):
    queries, ids, k = torch.eye(5).repeat_interleave(2, 0), range(10), 3
    groups = [{2 * (i // 2), 2 * (i // 2) + 1} for i in ids]

    def chance(hidden, **search):
        allowed = [[j for j in ids if j not in hide] for hide in hidden]
        report = retrieval_report(labelled, queries, labelled.groups, "group", k=k, **search)
        expected = [drawn(some, group, k) for some, group in zip(allowed, groups, strict=True)]
        assert report.chance_at_k == pytest.approx(sum(expected) / 10)
        return report.chance_at_k

    free = chance([[]] * 10)
    assert chance([[i] for i in ids], exclude_ids=ids) < free
    assert chance([[i, 3, 5] for i in ids], exclude_ids=[[i, 3, 5, 77, -1] for i in ids]) < free
    assert chance(groups, exclude_groups=labelled.groups) == 0.0
    some = {0, 1, 2, 5, 9}
    rest = [[i for i in ids if i not in some]] * 10
    chance(rest, where=torch.tensor([i in some for i in ids]))
    odd = [[*range(1, 10, 2), i] for i in ids]
    chance(odd, where=lambda note: note["even"], exclude_ids=labelled.ids)
    chance([[*range(10)]] * 10, where=lambda note: False)


def test_labels_may_be_tensors_and_arrays(labelled):
    queries = torch.eye(5)
    expected = retrieval_report(labelled, queries, [10, 11, 12, 13, 10], "group", k=2)
    assert expected.chance_at_k > 0
    labels = torch.tensor([10, 11, 12, 13, 10])
    for same in (labels, labels.numpy(), [*labels]):
        assert retrieval_report(labelled, queries, same, "group", k=2) == expected
    by_table = retrieval_report(labelled, queries, labels, dict(enumerate(labelled.groups)), k=2)
    assert by_table == expected
    assert type(by_table.precision_at_k) is float


def test_what_has_no_label_is_never_right():
    bank = MemoryBank(2, (1,))
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    bank.add(keys, torch.ones(3, 1), groups=[-1, -1, 5], metadata=[{"a": 1}, {}, {"a": None}])
    assert retrieval_report(bank, keys[1:2], [None], "a", k=2)[2:] == (0.0, 0.0, pytest.approx(2 / 3))
    assert retrieval_report(bank, keys[:1], [4], {1: 4}, k=2)[2:] == (1.0, 0.5, pytest.approx(2 / 3))
    assert retrieval_report(bank, keys[2:], [5], "group", k=1).recall_at_k == 1.0
    with pytest.raises(ValueError, match=r"labels must name groups, got -1 \(no group\) for query 1. Leave such"):
        retrieval_report(bank, keys[:2], [5, -1], "group")
    for nothing, shown in (("b", "'b'"), ({"0": 4}, "{'0': 4}")):
        with pytest.raises(ValueError, match=f"label_of must give entries .* a label, got {shown} for none of 3"):
            retrieval_report(bank, keys, [1, 1, 1], nothing)


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

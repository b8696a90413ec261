from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyalign.models import loss as module
from tinyalign.models.loss import labelled_rows, rows_before_head, token_nll

ROWS = st.lists(st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=5, max_size=5), min_size=1, max_size=4)


@given(ROWS)
def test_rows_are_those_that_predict_a_label(labels: list[list[int]]) -> None:
    found = labelled_rows(torch.tensor(labels))
    for row, positions, targets in zip(labels, found.positions.tolist(), found.targets.tolist(), strict=True):
        expected = [(at, row[at + 1]) for at in range(4) if row[at + 1] != -100]
        assert [(at, target) for at, target in zip(positions, targets, strict=True) if target != -100] == expected


@given(ROWS)
def test_nll_is_cross_entropy(labels: list[list[int]]) -> None:
    logits = torch.randn(len(labels), 5, 3, dtype=torch.float32)
    rows = labelled_rows(torch.tensor(labels))
    nll = token_nll(logits.gather(1, rows.positions[..., None].expand(-1, -1, 3)), rows.targets)
    shifted = torch.tensor(labels)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), shifted, reduction="none").sum(dim=1)
    torch.testing.assert_close(nll.sum(dim=1), expected)


def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 7, 11, dtype=torch.float64)
    targets = torch.randint(0, 11, (3, 7))
    targets[1, 3:] = -100
    results = []
    for chunk in (1024, 4):
        monkeypatch.setattr(module, "CHUNK", chunk)
        leaf = logits.clone().requires_grad_()
        nll = token_nll(leaf, targets)
        nll.sum().backward()  # type: ignore[no-untyped-call]
        results.append((nll.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    assert (results[0][0][1, 3:] == 0).all()


def test_half_precision_logits_are_summed_in_float32() -> None:
    """1e4 equal logits: in bfloat16 the log-sum-exp would be off by more than a hundredth."""
    nll = token_nll(torch.zeros(1, 1, 10_000, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.long))
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(9.210340371976184, abs=1e-5)


def test_the_head_sees_the_chosen_rows_only() -> None:
    head = nn.Linear(4, 6)
    hidden = torch.randn(2, 5, 4)
    seen: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    positions = torch.tensor([[0, 3], [4, 1]])
    with rows_before_head(head, positions) as chosen:
        few = head(hidden)
    assert chosen
    assert seen == [(2, 2, 4)]
    torch.testing.assert_close(few, torch.stack([head(hidden)[0, [0, 3]], head(hidden)[1, [4, 1]]]))
    assert head(hidden).shape == (2, 5, 6)  # the selection is gone
    with rows_before_head(None, positions) as chosen:
        assert not chosen


def test_the_selection_is_gone_after_an_error() -> None:
    head = nn.Linear(4, 6)
    with pytest.raises(RuntimeError, match="boom"), rows_before_head(head, torch.zeros(1, 1, dtype=torch.long)):
        raise RuntimeError("boom")
    assert not head._forward_pre_hooks


def test_too_small_a_count_is_refused() -> None:
    labels = torch.tensor([[-100, 1, 2, 3]])
    with pytest.raises(
        ValueError, match=r"max_supervised_tokens must cover every row, got 2 where a row has 3 supervised"
    ):
        labelled_rows(labels, 2)
    assert labelled_rows(labels, 3).positions.shape == (1, 3)


def test_no_labels_at_all_is_nan_and_not_zero() -> None:
    rows = labelled_rows(torch.full((2, 4), -100))
    assert rows.positions.shape == (2, 0)
    nll = token_nll(torch.zeros(2, 0, 3), rows.targets)
    assert torch.isnan(nll.sum() / (rows.targets != -100).sum())


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma2"])
def test_causality_alone_hides_what_stands_on_the_right(build: Any, family: str) -> None:
    """Right-padded rows without any mask: the same losses and gradients as with it, and no mask reaches the model."""
    ids, keep = build.pad([build.row(1, "image", 5, 6, 7, 8), build.row(1, "image", 5, 6)])
    labels = ids.where(keep & (ids > 4), -100)
    batch = {
        "input_ids": ids, "attention_mask": keep, "labels": labels, "pixel_values": torch.randn(2, 3, 16, 16),
        "sample_ids": torch.tensor([0, 1]),
    }  # fmt: skip
    found = []
    for causal_only in (False, True):
        model = build.model(family).train()
        given: dict[str, Any] = {}
        model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs, given=given: given.update(kwargs), with_kwargs=True
        )
        output = model(**batch, causal_only=causal_only)
        output.loss.backward()
        assert (given["attention_mask"] is None, given.get("position_ids") is None) == (causal_only, causal_only)
        found.append((output.per_sample_nll.detach(), model.connector.layers[0].weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_gap_is_not_hidden_by_causality(build: Any) -> None:
    ids, keep = build.pad([build.row(1, "image", 5, 6, 7), build.row(1, "image", 5)], left=True)
    inputs = {"input_ids": ids, "attention_mask": keep, "pixel_values": torch.zeros(2, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"causal_only must be False where .* got such a gap in rows \[1\]"):
        build.model()(**inputs, causal_only=True)
    model = build.model(bank=build.bank(3))  # two neighbours wanted, one is left beside a sample and its twin
    ids, keep = build.pad([build.row(1, "image", 5)])
    inputs = {"input_ids": ids, "attention_mask": keep, "pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"got such a gap in rows \[0\]"):
        model(**inputs, sample_ids=torch.tensor([0]), causal_only=True)

"""The attention-pooled key against attention written out, and its masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinyalign.memory import AttentionPooledKey


def written_out(image, text, alpha, scale=1.0):
    """The paper's key of one sample, by a Python loop over queries."""
    rows = [alpha * row / row.norm() for row in image] + [(1 - alpha) * row / row.norm() for row in text]
    attended = []
    for query in rows:
        logits = torch.stack([scale * query @ row for row in rows])
        weights = logits.exp() / logits.exp().sum()
        attended.append(sum(w * row for w, row in zip(weights, rows, strict=True)))
    return sum(attended) / len(attended)


@pytest.mark.parametrize(("alpha", "scale"), [(0.4, 1.0), (0.4, 20.0), (0.0, 1.0), (1.0, 1.0)])
def test_equals_attention_written_out(alpha, scale):
    image, text = torch.randn(2, 9, 6).double(), torch.randn(2, 4, 6).double()
    found = AttentionPooledKey(alpha=alpha, scale=scale)(image, text)
    assert found.dtype == torch.float64
    for row in range(2):
        torch.testing.assert_close(found[row], written_out(image[row], text[row], alpha, scale))


def test_without_text_the_weight_falls_away():
    image = torch.randn(1, 9, 6).double()
    rows = F.normalize(image[0], dim=-1)
    expected = (torch.softmax(rows @ rows.T, -1) @ rows).mean(0)
    torch.testing.assert_close(AttentionPooledKey()(image)[0], expected)


def test_query_chunks_do_not_show(monkeypatch):
    image = torch.randn(2, 50, 6)
    whole = AttentionPooledKey()(image)
    monkeypatch.setattr(AttentionPooledKey, "CHUNK", 7)
    torch.testing.assert_close(AttentionPooledKey()(image), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("balance", [False, True])
def test_a_key_depends_on_its_own_kept_rows_to_the_last_bit(balance, dtype):
    key = AttentionPooledKey(balance=balance)
    image, text = torch.randn(20, 150, 48).to(dtype), torch.randn(20, 31, 48).to(dtype)
    image_mask, text_mask = torch.rand(20, 150) < 0.8, torch.rand(20, 31) < 0.5
    text_mask[3] = False
    found = key(image, text, image_mask, text_mask)
    for row in range(20):
        kept, words = image[row, image_mask[row]][None], text[row, text_mask[row]][None]
        assert torch.equal(key(kept, words if row != 3 else None)[0], found[row])
    image[~image_mask], text[~text_mask] = 1e4, float("nan")
    assert torch.equal(key(image, text, image_mask, text_mask), found)


def test_a_sample_that_keeps_nothing_is_zero():
    nothing = torch.tensor([[True] * 4, [False] * 4])
    found = AttentionPooledKey(balance=True)(torch.randn(2, 4, 8), torch.randn(2, 4, 8), nothing, nothing)
    assert found[1].tolist() == [0.0] * 8
    assert found[0].norm() > 0
    assert AttentionPooledKey()(torch.randn(0, 4, 8)).shape == (0, 8)


def test_balance_gives_each_modality_an_equal_say():
    image, text = torch.randn(1, 40, 8), torch.randn(1, 4, 8)
    mean_of_means = (F.normalize(image, dim=-1).mean(1) + F.normalize(text, dim=-1).mean(1)) / 4
    found = AttentionPooledKey(alpha=0.5, scale=0.0, balance=True)(image, text)
    torch.testing.assert_close(found, mean_of_means)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    image = torch.randn(2, 5, 8)
    found = AttentionPooledKey()(image.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), AttentionPooledKey()(image), atol=0.02, rtol=0)


def test_the_default_dtype_does_not_show():
    key, image, text = AttentionPooledKey(0.3), torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    expected = key(image.double(), text.double(), text_mask=mask)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert torch.equal(key(image.double(), text.double(), text_mask=mask), expected)
    finally:
        torch.set_default_dtype(before)


def test_compiles_whole_and_has_no_weights():
    key = AttentionPooledKey()
    assert not list(key.parameters())
    assert not key.state_dict()
    compiled = torch.compile(key, fullgraph=True, backend="eager")
    image = torch.randn(2, 5, 8)
    torch.testing.assert_close(compiled(image, image), key(image, image))


def test_fingerprint_holds_what_changes_the_key():
    assert AttentionPooledKey(0.3).fingerprint()["key.alpha"] == 0.3
    assert AttentionPooledKey(scale=4).fingerprint() != AttentionPooledKey().fingerprint()
    assert AttentionPooledKey(balance=True).fingerprint() != AttentionPooledKey().fingerprint()
    assert "alpha=0.4" in repr(AttentionPooledKey())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3),), r"image_features must be float \(B, S, D\), got torch.float32 \(2, 3\)"),
        ((torch.ones(2, 3, 4).long(),), "got torch.int64"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 5)), r"batch and width \(2, 4\), got \(2, 3, 5\)"),
        ((torch.ones(2, 3, 4), torch.ones(1, 3, 4)), r"got \(1, 3, 4\)"),
        (
            (torch.ones(2, 3, 4), None, torch.ones(2, 3)),
            r"image_mask must be bool of shape \(2, 3\), got torch.float32",
        ),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), None, torch.ones(2, 2) > 0), "text_mask must be bool"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        AttentionPooledKey()(*args)


def test_bad_alpha():
    with pytest.raises(ValueError, match=r"alpha must be within \[0, 1\], got 1.5"):
        AttentionPooledKey(1.5)
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        AttentionPooledKey(scale=float("nan"))

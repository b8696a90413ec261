"""RAGConnector against a loop over items, and what it does with items that were not found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign._attention import AttentionBackendError, dispatch, use_attention_backend
from tinyalign.connectors import RAGConnector


def normalised(latent: torch.Tensor) -> torch.Tensor:
    return (latent - latent.mean()) / (latent.var(unbiased=False) + 1e-5).sqrt()


@settings(max_examples=25)
@given(B=st.integers(1, 3), K=st.integers(1, 4), L=st.integers(1, 3), data=st.data())
def test_equals_a_loop_over_rows_items_and_latents(B, K, L, data):
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=K, max_size=K), min_size=B, max_size=B)))
    connector = RAGConnector(6, 8, num_ranks=K, gate=True)
    with torch.no_grad():
        connector.rank.normal_()
        connector.gate.normal_()
    latents, scores = torch.randn(B, K, L, 6), torch.randn(B, K)
    tokens, keep = connector(latents, mask, scores)
    assert tokens.shape == (B, connector.tokens_for(K, L), 8)
    for b in range(B):
        for k in range(K):
            for j in range(L):
                place = k * L + j
                assert bool(keep[b, place]) == bool(mask[b, k])
                expected = torch.zeros(8)
                if mask[b, k]:
                    weight = 2 / (1 + torch.exp(-(connector.gate[0] * scores[b, k] + connector.gate[1])))
                    expected = weight * connector.mlp(normalised(latents[b, k, j]) + connector.rank[k])
                torch.testing.assert_close(tokens[b, place], expected, rtol=1e-4, atol=1e-5)


def test_pooling_equals_softmax_over_found_latents():
    connector = RAGConnector(6, 8, num_tokens=3)
    latents, mask = torch.randn(2, 4, 2, 6), torch.tensor([[True, False, True, False], [False] * 4])
    tokens, keep = connector(latents, mask)
    pool = connector.pool
    found = torch.stack([normalised(latent) for k in (0, 2) for latent in latents[0, k]])
    normed = pool.norm(found)
    attention = torch.softmax(pool.queries @ pool.key(normed).T / 6**0.5, dim=-1)
    torch.testing.assert_close(tokens[0], connector.mlp(attention @ pool.value(normed)), rtol=1e-4, atol=1e-5)
    assert keep.tolist() == [[True] * 3, [False] * 3]
    assert not tokens[1].any()


def test_pooling_runs_through_the_kernel_that_is_chosen(monkeypatch):
    """One head as wide as a latent, one key mask per row; the same tokens from whichever kernel."""
    connector = RAGConnector(6, 8, num_tokens=3)
    latents, mask = torch.randn(2, 4, 2, 6), torch.tensor([[True, False, True, False], [False] * 4])
    monkeypatch.setattr(dispatch, "_last_run", {})
    tokens, _ = connector(latents, mask)
    with use_attention_backend("reference"):
        torch.testing.assert_close(connector(latents, mask).tokens, tokens)
    spec = dispatch.AttentionSpec("cpu", torch.float32, 6, 6, "dense")
    assert dispatch.attention_report().ran == {spec: ("reference", "use_attention_backend")}
    with use_attention_backend("xformers"), pytest.raises(AttentionBackendError, match="no kernels for cpu tensors"):
        connector(latents, mask)


@pytest.mark.parametrize("num_tokens", [None, 3])
def test_nothing_retrieved_at_all_is_an_ordinary_input(num_tokens):
    tokens, keep = RAGConnector(6, 8, num_tokens=num_tokens, gate=True)(
        torch.zeros(2, 0, 4, 6), None, torch.zeros(2, 0)
    )
    assert tokens.shape == (2, num_tokens or 0, 8)
    assert not keep.any()
    assert not tokens.any()


def test_depth_and_budget_may_come_after_the_widths():
    connector = RAGConnector(6, 8, 1, 3)
    assert (sum(w.dim() == 2 for w in connector.mlp.parameters()), connector.tokens_for(5, 4)) == (1, 3)


def test_gate_and_rank_start_as_if_absent():
    torch.manual_seed(1)
    plain = RAGConnector(6, 8)
    full = RAGConnector(6, 8, gate=True, num_ranks=5)
    full.load_state_dict(plain.state_dict(), strict=False)
    latents, scores = torch.randn(2, 5, 3, 6), torch.randn(2, 5)
    torch.testing.assert_close(full(latents, None, scores).tokens, plain(latents).tokens)


def test_what_was_not_found_may_be_nan():
    connector = RAGConnector(6, 8, num_tokens=2, gate=True)
    latents, scores = torch.randn(1, 2, 3, 6), torch.rand(1, 2)
    latents[0, 1], scores[0, 1] = float("nan"), float("nan")
    tokens, _ = connector(latents, torch.tensor([[True, False]]), scores)
    assert torch.isfinite(tokens).all()
    tokens.sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in connector.parameters())


@pytest.mark.parametrize(
    ("arguments", "call", "error", "said"),
    [
        ({}, (torch.zeros(2, 3, 6),), ValueError, r"\(B, K, L, latent_dim\) with last size 6, got \(2, 3, 6\)"),
        ({}, (torch.zeros(2, 3, 4, 7),), ValueError, r"last size 6, got \(2, 3, 4, 7\)"),
        ({}, (torch.zeros(2, 3, 4, 6), torch.ones(2, 3)), TypeError, "mask must be boolean .*got torch.float32"),
        ({}, (torch.zeros(2, 3, 4, 6), torch.ones(2, 4).bool()), ValueError, r"shape \(2, 3\), got \(2, 4\)"),
        ({"num_ranks": 2}, (torch.zeros(2, 3, 4, 6),), ValueError, "at most num_ranks=2 items, got 3"),
        ({"gate": True}, (torch.zeros(2, 3, 4, 6),), ValueError, "for a gated connector, got None"),
        ({"gate": True}, (torch.zeros(2, 3, 4, 6), None, torch.ones(2, 1)), ValueError, r"got \(2, 1\)"),
    ],
)
def test_bad_input_is_named(arguments, call, error, said):
    with pytest.raises(error, match=said):
        RAGConnector(6, 8, **arguments)(*call)


@pytest.mark.parametrize("arguments", [{"num_tokens": 0}, {"num_ranks": -1}])
def test_sizes_are_positive(arguments):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        RAGConnector(6, 8, **arguments)


def test_what_is_learned_by_each_option_and_how_the_queries_start():
    names = {name for name, _ in RAGConnector(6, 8, num_tokens=2, gate=True, num_ranks=3).named_parameters()}
    mlp = {f"mlp.layers.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")}
    pool = {"pool.queries", "pool.norm.weight", "pool.norm.bias", "pool.key.weight", "pool.value.weight"}
    # Keys have no bias: it would add the same to every score of a query.
    assert names == mlp | pool | {"pool.value.bias", "gate", "rank"}
    assert {name for name, _ in RAGConnector(6, 8).named_parameters()} == mlp
    queries = RAGConnector(96, 8, num_tokens=64).pool.queries.detach()
    # Length one on average: a standard deviation of 96 ** -0.5, known to 5 standard errors of 6144 numbers.
    assert abs(queries.std().item() * 96**0.5 - 1) < 5 / (2 * queries.numel()) ** 0.5


def test_the_gate_weighs_what_the_pool_reads():
    connector = RAGConnector(6, 8, num_tokens=3, gate=True)
    with torch.no_grad():
        connector.gate.copy_(torch.tensor([1.5, -0.5]))
    latents, scores = torch.randn(1, 2, 2, 6), torch.tensor([[0.9, -0.4]])
    pool = connector.pool
    normed = pool.norm(torch.stack([normalised(latent) for item in latents[0] for latent in item]))
    attention = torch.softmax(pool.queries @ pool.key(normed).T / 6**0.5, dim=-1)
    weight = (2 / (1 + torch.exp(-(1.5 * scores[0] - 0.5)))).repeat_interleave(2)
    expected = connector.mlp(attention @ (pool.value(normed) * weight[:, None]))
    torch.testing.assert_close(connector(latents, None, scores).tokens[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"num_tokens": 2}, {"num_tokens": 2, "gate": True, "num_ranks": 3}], ids=str)
def test_autocast_changes_the_precision_only(arguments):
    """The learned queries are float32 parameters, and what they read is not."""
    connector = RAGConnector(6, 8, **arguments)
    latents, mask = torch.randn(2, 3, 4, 6), torch.tensor([[True, True, False], [False, True, True]])
    expected = connector(latents, mask, torch.ones(2, 3)).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = connector(latents, mask, torch.ones(2, 3)).tokens
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in connector.parameters())

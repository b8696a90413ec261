"""What holds of the connectors for every input: items are independent, order and absence are what they should be."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyalign.connectors import MLPConnector, RAGConnector

seeds = st.integers(0, 2**20)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask(seed, rows, items):
    return drawn(seed + 77, rows, items) < 0.3


@given(seeds, st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_the_mlp_maps_every_token_alone(seed, depth, leading):
    connector = MLPConnector(5, 7, depth=depth).double()
    features = drawn(seed, *leading, 5)
    tokens = connector(features)
    assert tokens.shape == (*leading, 7)
    torch.testing.assert_close(connector(features.flatten(0, -2)), tokens.flatten(0, -2))
    torch.testing.assert_close(connector(features.flip(0)), tokens.flip(0))
    again = MLPConnector.from_llava_state_dict({f"x.{k[7:]}": v for k, v in connector.state_dict().items()})
    assert again.depth == depth
    assert torch.equal(again(features), tokens)


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_unpooled_tokens_follow_their_items(seed, rows, items, latents, gate):
    connector = RAGConnector(6, 8, gate=gate).double()
    if gate:
        torch.nn.init.normal_(connector.gate)
    # Of unit spread: what the norm adds to the variance is then 1e-5 of it, whatever was drawn.
    values = torch.nn.functional.layer_norm(drawn(seed, rows, items, latents, 6), [6])
    mask, scores = some_mask(seed, rows, items), drawn(seed + 1, rows, items)
    tokens, keep = connector(values, mask, scores)
    assert torch.equal(keep, mask.repeat_interleave(latents, 1))
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    shuffled, _ = connector(values[:, order], mask[:, order], scores[:, order])
    grid = tokens.view(rows, items, latents, 8)
    torch.testing.assert_close(shuffled.view_as(grid), grid[:, order])
    scaled, _ = connector(values * 3.0 + 2.0, mask, scores)  # the scale of a bank is its own
    torch.testing.assert_close(scaled, tokens, atol=1e-4, rtol=1e-4)


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_pooled_tokens_ignore_the_order_of_items_and_those_not_found(seed, rows, items, latents, num_tokens, gate):
    connector = RAGConnector(6, 8, num_tokens=num_tokens, gate=gate).double()
    if gate:
        torch.nn.init.normal_(connector.gate)
    values, mask = drawn(seed, rows, items, latents, 6), some_mask(seed, rows, items)
    scores = drawn(seed + 1, rows, items)
    tokens, keep = connector(values, mask, scores)
    assert tokens.shape == (rows, num_tokens, 8)
    assert torch.equal(keep, mask.any(1, keepdim=True).expand(-1, num_tokens))
    assert not tokens[~keep].any()
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(connector(values[:, order], mask[:, order], scores[:, order]).tokens, tokens)
    for row in range(rows):
        found = mask[row]
        if found.any():
            alone = connector(values[row : row + 1, found], None, scores[row : row + 1, found]).tokens
            torch.testing.assert_close(tokens[row : row + 1], alone)

"""The encoder against transformers' Perceiver, whose maths and weights it shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PerceiverConfig, PerceiverForMaskedLM, PerceiverModel
from transformers.models.perceiver.modeling_perceiver import PerceiverEncoder as HFEncoder

from tinyalign.perceiver import PerceiverEncoder


def hf_config(num_latents=32, latent_dim=96, input_dim=128, num_self_attends=8, num_blocks=1, num_heads=8):
    return PerceiverConfig(
        num_latents=num_latents,
        d_latents=latent_dim,
        d_model=input_dim,
        num_self_attends_per_block=num_self_attends,
        num_blocks=num_blocks,
        num_self_attention_heads=num_heads,
        num_cross_attention_heads=num_heads,
        qk_channels=latent_dim,
        v_channels=latent_dim,
        attention_probs_dropout_prob=0.0,
    )


def randomise(module, seed, scale=0.15):
    """Norms, biases and weights away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return module.eval()


def hf_forward(encoder, latents, inputs, mask):
    additive = None if mask is None else torch.where(mask, 0.0, torch.finfo(inputs.dtype).min)[:, None, None, :]
    hidden = latents.expand(inputs.shape[0], -1, -1)
    with torch.no_grad():
        return encoder(hidden, inputs=inputs, inputs_mask=additive).last_hidden_state


@settings(max_examples=25)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 70),
    num_blocks=st.integers(0, 3),
    num_heads=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    masked=st.booleans(),
    scale=st.sampled_from([0.0, 0.02, 0.05]),
    seed=st.integers(0, 2**20),
)
def test_equals_transformers_at_table_3_sizes(batch, length, num_blocks, num_heads, masked, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = hf_config(num_blocks=num_blocks, num_heads=num_heads)
    theirs = randomise(PerceiverModel(config), seed, scale).encoder
    latents = torch.randn(32, 96, generator=generator)
    ours = PerceiverEncoder.from_hf_state_dict(
        theirs.state_dict(), latents=latents, num_heads=num_heads, num_blocks=num_blocks
    )
    inputs = torch.randn(batch, length, 128, generator=generator)
    mask = None
    if masked:
        mask = torch.rand(batch, length, generator=generator) < 0.6
        mask[:, seed % length] = True
    expected = hf_forward(theirs, latents, inputs, mask)
    got = ours(inputs, mask)
    assert (got - expected).abs().max().item() <= 5e-6


def test_equals_transformers_with_its_own_initial_weights():
    theirs = PerceiverModel(hf_config()).eval()
    ours = PerceiverEncoder.from_hf_state_dict(theirs.state_dict())
    inputs = torch.randn(3, 57, 128)
    mask = torch.rand(3, 57) < 0.7
    with torch.no_grad():
        expected = theirs(inputs, attention_mask=mask.long()).last_hidden_state
    assert (ours(inputs, mask) - expected).abs().max().item() <= 5e-6


def test_weights_travel_both_ways_strictly():
    ours = randomise(
        PerceiverEncoder(
            24, num_latents=5, latent_dim=16, num_self_attends=2, qk_channels=16, v_channels=16, num_heads=4
        ),
        3,
    )
    theirs = HFEncoder(hf_config(5, 16, 24, 2, 1, 4), kv_dim=24)
    theirs.load_state_dict(ours.to_hf_state_dict(), strict=True)
    back = PerceiverEncoder.from_hf_state_dict(theirs.state_dict(), latents=ours.latents, num_heads=4)
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    inputs = torch.randn(2, 9, 24)
    assert torch.equal(back(inputs), ours(inputs))


def test_table_3_has_the_documented_number_of_weights():
    hf = PerceiverModel(hf_config())
    assert sum(p.numel() for p in PerceiverEncoder(128).parameters()) == sum(p.numel() for p in hf.parameters())


def test_all_sizes_may_be_given_in_order():
    encoder = PerceiverEncoder(24, 5, 16, 2, 3, 4, 8, 12)
    assert (encoder.latents.shape, len(encoder.self_attends), encoder.num_blocks) == ((5, 16), 2, 3)
    layer = encoder.cross_attention
    assert (layer.key.weight.shape, layer.value.weight.shape, layer.num_heads) == ((8, 24), (12, 24), 4)


def test_a_row_without_kept_tokens_is_finite_and_ignores_the_input():
    encoder = randomise(
        PerceiverEncoder(8, num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2, qk_channels=8, v_channels=8),
        0,
    )
    mask = torch.tensor([[True] * 5, [False] * 5])
    first = encoder(torch.randn(2, 5, 8), mask)
    second = encoder(torch.randn(2, 5, 8).fill_(float("nan")), torch.zeros(2, 5, dtype=torch.bool))
    assert first.isfinite().all()
    assert torch.equal(first[1], second[0])
    torch.testing.assert_close(first[1], encoder(torch.empty(1, 0, 8))[0])


def test_padding_with_nan_changes_nothing():
    encoder = randomise(
        PerceiverEncoder(8, num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2, qk_channels=8, v_channels=8),
        0,
    )
    inputs = torch.randn(2, 5, 8)
    padded = torch.cat((inputs, torch.full((2, 3, 8), float("nan"))), dim=1)
    mask = torch.arange(8)[None].expand(2, -1) < 5
    value = encoder(padded, mask)
    torch.testing.assert_close(value, encoder(inputs))
    with torch.no_grad():  # where keys and values are blanked in place of the inputs
        assert torch.equal(encoder(padded, mask), value)
    value.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())


def test_one_token_moves_every_latent_alike_in_attention():
    """With a single key the softmax is 1: the reading is the value projection, whatever the queries."""
    encoder = randomise(
        PerceiverEncoder(8, num_latents=3, latent_dim=8, num_self_attends=0, num_heads=2, qk_channels=8, v_channels=8),
        0,
    )
    layer, token = encoder.cross_attention, torch.randn(1, 1, 8)
    read = layer.output(layer.value(layer.input_norm(token)))
    after = encoder.latents + read
    expected = after + layer.mlp_out(torch.nn.functional.gelu(layer.mlp_in(layer.mlp_norm(after))))
    torch.testing.assert_close(encoder(token), expected)


def test_reset_with_a_generator_repeats():
    sizes = dict(num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2, qk_channels=8, v_channels=8)
    first, second = PerceiverEncoder(8, **sizes), PerceiverEncoder(8, **sizes)
    assert not torch.equal(first.latents, second.latents)
    for encoder in (first, second):
        encoder.reset_parameters(torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_latents": 0}, "num_latents must be an integer of at least 1, got 0"),
        ({"num_heads": 7}, "qk_channels must be a positive multiple of num_heads, got 96 and 7"),
        ({"v_channels": 90}, "v_channels must be a positive multiple of num_heads, got 90 and 8"),
        ({"num_blocks": -1}, "num_blocks must be an integer of at least 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerceiverEncoder(128, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_another_precision_run_in_that_of_the_weights(dtype):
    encoder = PerceiverEncoder(
        8, num_latents=3, latent_dim=8, num_self_attends=1, num_heads=2, qk_channels=8, v_channels=8
    )
    inputs = torch.randn(2, 5, 8).to(dtype)
    assert torch.equal(encoder(inputs), encoder(inputs.float()))


def test_wrong_inputs_are_refused():
    encoder = PerceiverEncoder(
        8, num_latents=3, latent_dim=8, num_self_attends=0, num_heads=2, qk_channels=8, v_channels=8
    )
    with pytest.raises(ValueError, match=r"inputs must have shape .* last size 8, got \(2, 5, 9\)"):
        encoder(torch.zeros(2, 5, 9))
    with pytest.raises(TypeError, match=r"inputs must be floating point, got torch.int64"):
        encoder(torch.zeros(2, 5, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(5, 8\)"):
        encoder(torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\), got \(2, 4\)"):
        encoder(torch.zeros(2, 5, 8), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be boolean with True = keep, got torch.float32"):
        encoder(torch.zeros(2, 5, 8), torch.ones(2, 5))


def test_arrays_are_refused_as_such():
    encoder = PerceiverEncoder(
        8, num_latents=3, latent_dim=8, num_self_attends=0, num_heads=2, qk_channels=8, v_channels=8
    )
    with pytest.raises(TypeError, match=r"inputs must be a tensor, got ndarray. Use torch.as_tensor\(inputs\)"):
        encoder(np.zeros((2, 5, 8), np.float32))
    with pytest.raises(TypeError, match=r"mask must be a tensor, got ndarray. Use torch.as_tensor\(mask\)"):
        encoder(torch.zeros(2, 5, 8), np.ones((2, 5), bool))


def test_the_weights_of_a_model_with_a_head_load():
    theirs = randomise(PerceiverForMaskedLM(hf_config(5, 16, 24, 1, 1, 4)), 0)
    ours = PerceiverEncoder.from_hf_state_dict(theirs.state_dict(), num_heads=4)
    inputs = torch.randn(2, 9, 24)
    expected = hf_forward(theirs.perceiver.encoder, theirs.perceiver.embeddings.latents, inputs, None)
    assert (ours(inputs) - expected).abs().max() <= 5e-6


@pytest.mark.parametrize("name", ["self_attends.0.attention.self.query.weight", "cross_attention.mlp.dense2.bias"])
def test_a_weight_of_another_shape_is_named(name):
    state = HFEncoder(hf_config(5, 16, 24, 1, 1, 4), kv_dim=24).state_dict()
    state[name] = torch.zeros(3, *state[name].shape[1:])
    with pytest.raises(ValueError, match=rf"{name} must have shape \(16,.* beside the other weights, got \(3,"):
        PerceiverEncoder.from_hf_state_dict(state, latents=torch.zeros(5, 16), num_heads=4)


def test_a_foreign_state_dict_is_refused_by_name():
    state = HFEncoder(hf_config(5, 16, 24, 2, 1, 4), kv_dim=24).state_dict()
    latents = torch.zeros(5, 16)
    with pytest.raises(ValueError, match=r"latents must be given .* got None"):
        PerceiverEncoder.from_hf_state_dict(state)
    with pytest.raises(ValueError, match=r"latents must have shape \(L, 16\), got \(5, 15\)"):
        PerceiverEncoder.from_hf_state_dict(state, latents=torch.zeros(5, 15))
    less = {name: weight for name, weight in state.items() if name != "self_attends.1.mlp.dense2.bias"}
    with pytest.raises(ValueError, match=r"missing \['self_attends.1.mlp.dense2.bias'\]"):
        PerceiverEncoder.from_hf_state_dict(less, latents=latents)
    with pytest.raises(ValueError, match=r"unexpected \['pooler'\]"):
        PerceiverEncoder.from_hf_state_dict({**state, "pooler": latents}, latents=latents)
    config = hf_config(5, 16, 24, 2, 1, 4)
    config.self_attention_widening_factor = 4
    wide = HFEncoder(config, kv_dim=24).state_dict()
    with pytest.raises(ValueError, match=r"widening factors 1, got .*\(64, 16\)"):
        PerceiverEncoder.from_hf_state_dict(wide, latents=latents)

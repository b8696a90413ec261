"""Ragged rows end to end equal the masked form, through every kernel's own way of being told where rows begin."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign._attention.backends import Sdpa, Xformers
from tinyalign._attention.dispatch import AttentionBackendError, attend_packed
from tinyalign._attention.packing import pack, unpack
from tinyalign.perceiver import PerceiverCompressor, PerceiverSizes, attend, layers
from tinyalign.perceiver.layers import PerceiverLayer, padded_width

masks = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 7).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
)


@given(masks)
def test_packing_keeps_order_and_comes_back(rows):
    keep = torch.tensor(rows)
    tokens = torch.arange(keep.numel()).view(*keep.shape, 1).double() + 1
    packed = pack(tokens, keep)
    expected = [
        tokens[b, t].item()
        for b, row in enumerate(rows)
        for t, kept in enumerate(row)
        if kept or (t == 0 and not any(row))
    ]
    assert packed.tokens.flatten().tolist() == expected
    assert packed.lengths == [max(1, sum(row)) for row in rows]
    assert packed.starts.tolist() == [sum(packed.lengths[:i]) for i in range(len(rows) + 1)]
    assert packed.empty.tolist() == [not any(row) for row in rows]
    back = unpack(packed.tokens[:, None, :], packed.keep)
    assert torch.equal(back[:, 0], tokens * packed.keep[..., None])


def project(tokens, packed, heads, width, seed):
    """Random keys per token: the same numbers padded and packed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(tokens.shape[2], heads * width, generator=generator, dtype=tokens.dtype)
    full = (tokens @ weight).view(*tokens.shape[:2], heads, width).transpose(1, 2)
    return full, (packed.tokens @ weight).view(-1, heads, width)


def case(rows, seed, dtype=torch.float64, width=8):
    keep = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(*keep.shape, 5, generator=generator, dtype=dtype)
    packed = pack(tokens, keep)
    q = torch.randn(1, 2, 3, width, generator=generator, dtype=dtype)
    k, packed_k = project(tokens, packed, 2, width, seed + 1)
    v, packed_v = project(tokens, packed, 2, width, seed + 2)
    return keep, packed, q, (k, v), (packed_k, packed_v)


@settings(max_examples=40)
@given(masks, st.sampled_from(["auto", "sdpa", "reference"]), st.sampled_from([None, 0.3]), st.integers(0, 999))
def test_packed_equals_masked(rows, backend, scale, seed):
    keep, packed, q, (k, v), packed_kv = case(rows, seed)
    expected = attend(q, k, v, keep=keep, scale=scale, backend="reference")
    got = attend_packed(q, *packed_kv, packed, scale=scale, backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


ROWS = [[True, True, False, True], [False] * 4, [False, False, False, True], [True] * 4]


def test_torch_s_varlen_kernel_is_told_the_rows_and_the_scale(monkeypatch):
    """A stand-in with the kernel's contract: (tokens, heads, width), cumulative starts, scale width ** -0.5."""
    calls = []

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k):
        calls.append((starts_q.tolist(), starts_k.tolist(), longest_q, longest_k, starts_q.dtype, starts_k.dtype))
        out = []
        for row in range(len(starts_q) - 1):
            one, other = slice(*starts_q[row : row + 2]), slice(*starts_k[row : row + 2])
            scores = torch.einsum("mhd,nhd->hmn", q[one], k[other]) * q.shape[2] ** -0.5
            out.append(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v[other]))
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(Sdpa, "packs", lambda self, spec: True)
    keep, packed, q, (k, v), packed_kv = case(ROWS, 0)
    got = attend_packed(q, *packed_kv, packed, scale=0.3, backend="sdpa")
    torch.testing.assert_close(got, attend(q, k, v, keep=keep, scale=0.3, backend="reference"))
    assert calls == [([0, 3, 6, 9, 12], [0, 3, 4, 5, 9], 3, 4, torch.int32, torch.int32)]


def test_xformers_is_told_the_rows_by_a_block_diagonal_mask(monkeypatch):
    """A stand-in with the library's contract: batch 1, tokens before heads, lengths as Python numbers."""
    made = []

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_lengths, k_lengths, *, device=None):
            made.append((list(q_lengths), list(k_lengths), device))
            return torch.block_diag(*(torch.ones(m, n) for m, n in zip(q_lengths, k_lengths, strict=True))).bool()

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        assert q.shape[0] == k.shape[0] == 1
        return attend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            keep=attn_bias[None, None],
            scale=scale,
            backend="reference",
        ).transpose(1, 2)

    ops, fmha, bias = type(sys)("xformers.ops"), type(sys)("xformers.ops.fmha"), type(sys)("attn_bias")
    ops.memory_efficient_attention, ops.fmha, fmha.attn_bias = memory_efficient_attention, fmha, bias
    bias.BlockDiagonalMask = BlockDiagonalMask
    package = type(sys)("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    keep, packed, q, (k, v), packed_kv = case(ROWS, 0)
    got = Xformers().run_packed(q.expand(4, -1, -1, -1), *packed_kv, packed, 0.3)
    expected = attend(q, k, v, keep=packed.keep, scale=0.3, backend="reference")
    torch.testing.assert_close(got, expected)
    assert made == [([3, 3, 3, 3], [3, 1, 1, 4], q.device)]
    assert keep.sum() == packed.keep.sum() - 1


def test_an_import_that_warns_is_silenced_only_while_it_lasts(monkeypatch, tmp_path, caplog, recwarn):
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import logging, warnings\nlogging.getLogger('xformers').warning('cannot load')\nwarnings.warn('old')\n"
    )
    (package / "ops.py").write_text("def memory_efficient_attention(*a, **k): raise NotImplementedError('no kernel')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="no kernel"):
        Xformers().run(q, q, q, None, 1.0)
    assert not caplog.records
    assert not recwarn.list
    import logging

    logging.getLogger("xformers").warning("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]
    for name in ("xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_compressor_hears_packed_captions_as_masked_ones():
    sizes = PerceiverSizes(token_dim=16, num_latents=4, latent_dim=8, num_self_attends=1, num_heads=2)
    compressor = PerceiverCompressor(12, vocab_size=40, sizes=sizes).double()
    words = torch.randn(4, 4, 16, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor(ROWS)
    masked, packed = (compressor.hear(words, keep, packed=packed) for packed in (False, True))
    torch.testing.assert_close(packed, masked)
    upstream = torch.randn_like(masked)
    (one,), (other,) = (
        torch.autograd.grad((out * upstream).sum(), words, retain_graph=True) for out in (masked, packed)
    )
    torch.testing.assert_close(one, other)
    assert not one[~keep].any()


@pytest.mark.parametrize("cross", [False, True])
def test_padded_heads_give_identical_results_and_stay_out_of_the_weights(monkeypatch, cross):
    layer = PerceiverLayer(24, qk_channels=24, v_channels=36, num_heads=3, input_dim=7 if cross else None).double()
    latents = torch.randn(2, 5, 24, dtype=torch.float64)
    inputs = torch.randn(2, 6, 7, dtype=torch.float64) if cross else None
    names = {name: weight.shape for name, weight in layer.state_dict().items()}
    plain = layer(latents, inputs)
    plain_grads = torch.autograd.grad(plain.square().sum(), list(layer.parameters()))
    widths = []
    run = Sdpa.run

    def spy(self, q, k, v, keep, scale):
        widths.append((q.shape[3], k.shape[3], v.shape[3]))
        return run(self, q, k, v, keep, scale)

    monkeypatch.setattr(Sdpa, "run", spy)
    monkeypatch.setattr(layers, "padded_width", lambda width, device, dtype: 16)
    padded = layer(latents, inputs)
    assert widths == [(16, 16, 16)]
    torch.testing.assert_close(padded, plain, atol=1e-13, rtol=0)
    for one, other in zip(
        plain_grads, torch.autograd.grad(padded.square().sum(), list(layer.parameters())), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert {name: weight.shape for name, weight in layer.state_dict().items()} == names


def test_only_odd_widths_in_16_bit_on_cuda_are_padded():
    half = (torch.float16, torch.bfloat16)
    assert [padded_width(w, "cuda", d) for w in (4, 12, 16, 20, 32) for d in half] == [
        16,
        16,
        16,
        16,
        16,
        16,
        24,
        24,
        32,
        32,
    ]
    assert [padded_width(12, "cuda", torch.float32), padded_width(12, "cpu", torch.float16)] == [12, 12]


def test_autocast_decides_the_dtype_that_is_padded_for():
    tensor = torch.zeros(1)
    assert layers.compute_dtype(tensor) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers.compute_dtype(tensor) == torch.bfloat16
        for kept in (torch.float64, torch.int64):  # what torch's autocast leaves alone
            assert layers.compute_dtype(tensor.to(kept)) == kept


@pytest.mark.parametrize(("batch", "keys"), [(0, 3), (2, 0)])
@pytest.mark.parametrize(("backend", "reason"), [("xformers", "no kernels for cpu tensors"), ("flash", "got 'flash'")])
def test_a_choice_is_checked_where_there_is_nothing_to_do(batch, keys, backend, reason):
    k = torch.randn(batch, 2, keys, 4)
    with pytest.raises(AttentionBackendError, match=reason):
        attend(torch.randn(1, 2, 5, 4), k, k, backend=backend)
    packed = pack(torch.zeros(0, 3, 1), torch.zeros(0, 3, dtype=torch.bool))
    with pytest.raises(AttentionBackendError, match=reason):
        attend_packed(torch.randn(1, 2, 5, 4), torch.zeros(0, 2, 4), torch.zeros(0, 2, 4), packed, backend=backend)


def test_keys_of_another_number_are_refused():
    _, packed, q, _, (k, v) = case(ROWS, 0)
    with pytest.raises(ValueError, match=r"shape \(9, heads, width\), one per packed token, got \(8, 2, 8\)"):
        attend_packed(q, k[1:], v, packed)

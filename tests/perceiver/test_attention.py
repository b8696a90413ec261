"""`attend`: every kernel against a loop in float64, and who decides which one runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyalign
from tinyalign._attention import dispatch
from tinyalign._attention.backends import AttentionSpec, Reference, Xformers, aligned_rows
from tinyalign._attention.dispatch import BACKENDS, ENVIRONMENT_VARIABLE, AttentionBackendError
from tinyalign.perceiver import attend, attention_report, use_attention_backend


def by_hand(q, k, v, keep, scale):
    """One query at a time, in float64, looking only at the keys it may see."""
    batch, heads, queries, _ = q.shape
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for m in range(queries):
                seen = range(k.shape[2]) if keep is None else keep[b, h, m].nonzero().flatten().tolist()
                if not len(seen):
                    continue
                scores = [(q[b, h, m].double() @ k[b, h, n].double()).item() * scale for n in seen]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                out[b, h, m] = sum(w * v[b, h, n].double() for w, n in zip(weights, seen, strict=True))
    return out


@settings(max_examples=60)
@given(
    backend=st.sampled_from(["sdpa", "reference", "auto"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9)),
    widths=st.tuples(st.sampled_from([1, 3, 8, 12, 16]), st.sampled_from([1, 5, 12, 16])),
    mask=st.sampled_from(["none", "keys", "full", "heads shared"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**20),
)
def test_every_backend_equals_the_loop(backend, shape, widths, mask, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, queries, keys = shape
    q = torch.randn(batch, heads, queries, widths[0], generator=generator).to(dtype)
    k = torch.randn(batch, heads, keys, widths[0], generator=generator).to(dtype)
    v = torch.randn(batch, heads, keys, widths[1], generator=generator).to(dtype)
    keep = None
    if mask == "keys":
        keep = torch.rand(batch, keys, generator=generator) < 0.6
    elif mask == "full":
        keep = torch.rand(batch, heads, queries, keys, generator=generator) < 0.6
    elif mask == "heads shared":
        keep = torch.rand(1, 1, queries, keys, generator=generator) < 0.6
    full = None
    if keep is not None:
        full = (keep[:, None, None] if keep.dim() == 2 else keep).expand(batch, heads, queries, keys)
    expected = by_hand(q, k, v, full, widths[0] ** -0.5 if scale is None else scale)
    got = attend(q, k, v, keep=keep, scale=scale, backend=backend)
    # Unit roundoff of the dtype times the handful of roundings on the way of a value of order 3.
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max().item() <= tolerance if got.numel() else True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_rounds_once(dtype):
    q, k, v = ((torch.randn(1, 1, 40, 16) * 2).to(dtype) for _ in range(3))
    exact = attend(q.double(), k.double(), v.double(), backend="reference").to(dtype)
    got = attend(q, k, v, backend="reference")
    # Double rounding may flip a tie here and there; any rounding on the way would change most entries.
    assert (got != exact).double().mean() < 0.02


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_takes_its_dtype_once(backend):
    """Learned queries are float32 where projected keys are bfloat16; the reference stays exact inside all the same."""
    q, k, v = (torch.randn(1, 1, 40, 16) * 2 for _ in range(3))
    exact = attend(*(tensor.bfloat16() for tensor in (q, k, v)), backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(q, k.bfloat16(), v, backend=backend)
        assert torch.equal(attend(q, k, v, backend="reference"), exact)
        wide = attend(q.double(), k.double(), v.double(), backend=backend)  # torch's autocast leaves these alone too
        assert wide.dtype == torch.float64
        with pytest.raises(TypeError, match=r"got torch.int64, torch.int64, torch.int64"):
            attend(q.long(), k.long(), v.long(), backend=backend)
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact.float()).abs().max() < 6e-2


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("keys", [0, 3])
def test_nothing_to_do_needs_no_kernel(monkeypatch, batch, keys):
    """A CUDA kernel cannot be launched over no rows at all."""
    spy = Spy("reference")
    monkeypatch.setattr(dispatch, "BACKENDS", {"reference": spy})
    k = torch.randn(batch, 2, keys, 4)
    got = attend(torch.randn(1, 2, 5, 4), k, k, keep=torch.ones(batch, keys, dtype=torch.bool))
    assert got.shape == (batch, 2, 5, 4)
    assert spy.calls == int(batch > 0 and keys > 0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_are_right_and_finite_in_a_fully_masked_row(backend):
    q, k, v = (torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keep = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, keep=keep, backend=backend), (q, k, v))
    attend(q, k, v, keep=keep, backend=backend).sum().backward()
    assert (v.grad[1] == 0).all()
    assert (v.grad[0, :, 1] == 0).all()


def test_one_set_of_queries_serves_the_batch():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 6, 4), torch.randn(5, 2, 6, 4)
    torch.testing.assert_close(attend(q, k, v), attend(q.expand(5, -1, -1, -1), k, v))


class Spy(Reference):
    """A stand-in kernel that claims what it is told to and counts its calls."""

    def __init__(self, name, *reasons):
        self.name, self.reasons, self.calls = name, reasons, 0

    def reasons_against(self, spec):
        return self.reasons

    def run(self, *arguments):
        self.calls += 1
        return super().run(*arguments)


@pytest.fixture
def spies(monkeypatch):
    spies = {"xformers": Spy("xformers", "wrong moon", "no fuel"), "sdpa": Spy("sdpa"), "reference": Spy("reference")}
    monkeypatch.setattr(dispatch, "BACKENDS", spies)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    return spies


def ran(spies):
    names = [name for name, spy in spies.items() if spy.calls]
    for spy in spies.values():
        spy.calls = 0
    return names


def test_argument_beats_context_beats_environment_beats_auto(spies, monkeypatch):
    q = torch.randn(1, 1, 2, 4)
    attend(q, q, q)
    assert ran(spies) == ["sdpa"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    attend(q, q, q)
    assert ran(spies) == ["reference"]
    with use_attention_backend("sdpa"):
        attend(q, q, q)
        assert ran(spies) == ["sdpa"]
        attend(q, q, q, backend="reference")
        assert ran(spies) == ["reference"]
        with use_attention_backend("auto"):
            attend(q, q, q)
            assert ran(spies) == ["sdpa"]
    attend(q, q, q)
    assert ran(spies) == ["reference"]


def test_auto_takes_the_first_that_can_and_is_silent(spies, recwarn, caplog, capfd):
    q = torch.randn(1, 1, 2, 4)
    spies["xformers"].reasons = ()
    attend(q, q, q)
    assert ran(spies) == ["xformers"]
    spies["xformers"].reasons = spies["sdpa"].reasons = ("no",)
    attend(q, q, q)
    assert ran(spies) == ["reference"]
    assert not recwarn.list
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_an_explicit_choice_that_cannot_run_raises_with_every_reason(spies, monkeypatch):
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(AttentionBackendError, match=r"got 'xformers' from the argument, .*: wrong moon; no fuel"):
        attend(q, q, q, backend="xformers")
    with (
        use_attention_backend("xformers"),
        pytest.raises(AttentionBackendError, match=r"from use_attention_backend, .*: wrong moon; no fuel"),
    ):
        attend(q, q, q)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "xformers")
    with pytest.raises(AttentionBackendError, match=f"from {ENVIRONMENT_VARIABLE}, .*: wrong moon; no fuel"):
        attend(q, q, q)
    assert ran(spies) == []


def test_a_wrong_name_is_refused_wherever_it_comes_from(monkeypatch):
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(AttentionBackendError, match="got 'flash' from the argument"):
        attend(q, q, q, backend="flash")
    with (
        pytest.raises(AttentionBackendError, match=r"use_attention_backend: .* got 'flash'"),
        use_attention_backend("flash"),
    ):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    with pytest.raises(AttentionBackendError, match=f"got 'flash' from {ENVIRONMENT_VARIABLE}"):
        attend(q, q, q)


def test_an_empty_variable_is_as_good_as_none(spies, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    q = torch.randn(1, 1, 2, 4)
    attend(q, q, q)
    assert (ran(spies), attention_report().chosen_by) == (["sdpa"], "auto")


def test_the_context_stays_in_its_thread():
    seen = []
    with use_attention_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(attention_report().backend))
        thread.start()
        thread.join()
        seen.append(attention_report().backend)
    assert seen == ["sdpa", "reference"]


def test_the_report_says_what_ran_and_why():
    q = torch.randn(1, 1, 2, 6)
    attend(q, q, q, backend="reference")
    report = attention_report("cpu", torch.float16)
    assert report.backend == "sdpa"
    assert report.chosen_by == "auto"
    assert report.reasons["xformers"] == (
        "it has no kernels for cpu tensors",
        "head widths must be multiples of 8 in torch.float16, got 12 and 12",
    )
    assert report.ran[AttentionSpec("cpu", torch.float32, 6, 6, "none")] == ("reference", "the argument")
    assert "sdpa runs (chosen by auto)" in str(report)
    assert "  ran reference (the argument): AttentionSpec(device='cpu', dtype=torch.float32, head_dim=6," in str(report)
    assert "xformers: it has no kernels for cpu tensors; head widths" in str(report)


def test_the_report_explains_a_choice_that_cannot_run(monkeypatch):
    for asked in ("xformers", "flash"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, asked)
        report = attention_report("cpu")
        assert (report.backend, report.chosen_by, report.asked) == (None, ENVIRONMENT_VARIABLE, asked)
        assert str(report).startswith(f"nothing runs, asked for '{asked}' (chosen by {ENVIRONMENT_VARIABLE})\n")
    with use_attention_backend("xformers"):
        assert (attention_report("cpu").backend, attention_report("cpu").chosen_by) == (None, "use_attention_backend")
    with use_attention_backend("reference"):
        assert str(attention_report("cpu")).startswith("reference runs (chosen by use_attention_backend)\n")


def test_the_real_xformers_backend_declines_on_the_cpu_without_an_import():
    q = torch.randn(1, 1, 2, 12)
    with pytest.raises(AttentionBackendError, match="it has no kernels for cpu tensors"):
        attend(q, q, q, backend="xformers")
    code = (
        "import sys, torch, tinyalign.perceiver as p\n"
        "q = torch.ones(1, 1, 2, 8)\n"
        "p.attend(q, q, q)\n"
        "try: p.attend(q, q, q, backend='xformers')\n"
        "except p.AttentionBackendError: pass\n"
        "assert not any(m.split('.')[0] in ('xformers', 'transformers') for m in sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("no module"), "it is not installed or does not load (no module)"),
        (AttributeError("no memory_efficient_attention"), "lacks the operator (no memory_efficient_attention)"),
        (
            NotImplementedError("No operator found\nwith details"),
            "a trial call failed (NotImplementedError: No operator found with details)",
        ),
        (RuntimeError(), "a trial call failed (RuntimeError: "),
    ],
)
def test_a_failed_trial_call_becomes_the_reason_and_is_made_once(monkeypatch, error, reason):
    backend, calls = Xformers(), []

    def trial(spec):
        calls.append(spec)
        raise error

    monkeypatch.setattr(backend, "_trial_call", trial)
    spec = AttentionSpec("cuda", torch.float16, 16, 16, "dense")
    for _ in range(3):
        (said,) = backend.reasons_against(spec)
        assert reason in said
    assert calls == [spec]
    assert backend.reasons_against(spec._replace(dtype=torch.float64)) == ("it does not take torch.float64",)
    assert backend.reasons_against(spec._replace(value_dim=12)) == (
        "head widths must be multiples of 8 in torch.float16, got 16 and 12",
    )
    assert calls == [spec]
    backend.reasons_against(spec._replace(head_dim=256))  # a width of its own may meet a kernel of its own
    assert calls == [spec, spec._replace(head_dim=256)]


def test_xformers_gets_its_own_layout_and_an_aligned_full_bias(monkeypatch):
    """A stand-in for the library checks what it documents: [B, M, H, K] inputs and a bias of the full shape."""
    seen = {}

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        seen.update(
            q=q.shape,
            bias=attn_bias.shape,
            strides=[attn_bias.stride(axis) % 8 for axis in range(3)],
            dtype=attn_bias.dtype,
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_bias, scale=scale
        )
        return out.transpose(1, 2)

    ops = type(sys)("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    package = type(sys)("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 13, 8), torch.randn(2, 3, 13, 8)
    keep = torch.rand(2, 1, 1, 13) < 0.7
    keep[..., 0] = True
    got = Xformers().run(q, k, v, keep, 0.3)
    torch.testing.assert_close(got, Reference().run(q, k, v, keep, 0.3))
    assert seen == {"q": (2, 5, 3, 8), "bias": (2, 3, 5, 13), "strides": [0, 0, 0], "dtype": torch.float32}


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_aligned_rows_keep_the_content(length):
    mask = torch.rand(2, 1, 3, length) < 0.5
    aligned = aligned_rows(mask)
    assert torch.equal(aligned, mask)
    assert aligned.stride(-2) % 8 == 0


def test_wrong_tensors_are_refused():
    q = torch.randn(2, 2, 3, 4)
    with pytest.raises(ValueError, match=r"k must have four axes .* got shape \(2, 3, 4\)"):
        attend(q, q[:, 0], q)
    with pytest.raises(TypeError, match=r"share a floating dtype, got torch.float32, torch.float16, torch.float32"):
        attend(q, q.half(), q)
    with pytest.raises(ValueError, match=r"q and k heads and width, got .*\(2, 2, 3, 5\)"):
        attend(q, torch.randn(2, 2, 3, 5), q)
    with pytest.raises(ValueError, match=r"q and k must have a width of at least 1, got \(2, 2, 3, 0\)"):
        attend(q[..., :0], q[..., :0], q)
    with pytest.raises(ValueError, match="q must have the batch of k or a batch of 1, got 2 and 3"):
        attend(q, torch.randn(3, 2, 3, 4), torch.randn(3, 2, 3, 4))
    with pytest.raises(TypeError, match=r"keep must be boolean, True = keep, got torch.float32"):
        attend(q, q, q, keep=torch.zeros(2, 3))
    for wrong in ((2, 4), (3, 3), (2, 1, 3), (2, 2, 3, 1), (2, 3, 1, 3)):
        with pytest.raises(ValueError, match=r"keep must have shape \(2, 3\) or broadcast to \(2, 2, 3, 3\), got"):
            attend(q, q, q, keep=torch.ones(wrong, dtype=torch.bool))


def test_who_attends_goes_through_the_dispatcher_and_nobody_else_carries_it():
    """The Perceiver and the pooling of the connectors; what a library already does stays with that library."""
    package = Path(tinyalign.__file__).parent
    users, own_calls = set(), []
    for path in package.glob("*/**/*.py"):
        source = path.read_text(encoding="utf-8")
        part = path.relative_to(package).parts[0]
        if part != "_attention":
            users |= {part} if "tinyalign._attention" in source else set()
            own_calls += [path] if "scaled_dot_product_attention" in source else []
    assert users == {"perceiver", "connectors"}
    assert own_calls == []


def test_every_backend_has_its_own_name():
    assert list(BACKENDS) == ["xformers", "sdpa", "reference"]
    assert all(name == backend.name for name, backend in BACKENDS.items())


def test_compiles_whole_with_the_choice_frozen_at_trace_time():
    torch.compiler.reset()
    keep = torch.tensor([[True, True, False]])
    q = torch.randn(1, 2, 3, 4)
    whole = torch.compile(lambda x: attend(x, x, x, keep=keep), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(q), attend(q, q, q, keep=keep, backend="reference"))
    torch.compiler.reset()
    with use_attention_backend("reference"):
        torch.testing.assert_close(whole(q), attend(q, q, q, keep=keep))

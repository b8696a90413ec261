"""Adding, removing, reading; and what a bank refuses without changing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyalign.memory import MemoryBank, UnknownIdError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_come_back_as_stored(dtype):
    bank = MemoryBank(4, (2, 3), value_dtype=dtype)
    values = torch.randn(5, 2, 3)
    ids = bank.add(torch.randn(5, 4), values)
    found, mask = bank.gather(ids)
    assert found.dtype == dtype
    assert torch.equal(found, values.to(dtype))
    assert mask.all()


def test_int8_values_are_within_half_a_step_of_each_entry():
    bank = MemoryBank(4, (2, 3), value_dtype=torch.int8)
    values = torch.randn(50, 2, 3) + 20
    values[7] *= 100
    ids = bank.add(torch.randn(50, 4), values)
    found, _ = bank.gather(ids)
    center = values.double().mean(0).float()
    step = (values - center).flatten(1).abs().amax(1) / 127
    assert found.dtype == torch.float32
    assert ((found - values).abs().flatten(1).amax(1) <= 0.5001 * step + 1e-5).all()
    later = bank.add(torch.randn(1, 4), values[:1] + 5)
    assert (bank.gather(later)[0] - values[:1] - 5).abs().max() < 1


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.int8])
def test_gather_from_an_empty_bank_is_all_zeros(value_dtype):
    values, mask = MemoryBank(8, (2, 3), value_dtype=value_dtype).gather(torch.tensor([[-1, -1]]))
    assert values.tolist() == torch.zeros(1, 2, 2, 3).tolist()
    assert mask.tolist() == [[False, False]]


def test_gather_keeps_shape_and_masks_what_is_not_there(random_bank):
    bank = random_bank()
    values, mask = bank.gather(torch.tensor([[100, -1, 139], [-1, -1, 101]]))
    assert values.shape == (2, 3, 2, 3)
    assert mask.tolist() == [[True, False, True], [False, False, True]]
    assert (values[~mask] == 0).all()
    assert torch.equal(values[0, 2], bank[139].value)
    with pytest.raises(UnknownIdError, match="ids must be in the bank or -1, got 7"):
        bank.gather(torch.tensor([[7]]))
    assert bank.gather(torch.zeros(0, 3, dtype=torch.int64))[0].shape == (0, 3, 2, 3)
    with pytest.raises(TypeError, match="ids must be integers, got float32"):
        bank.gather(torch.ones(2))


def test_entries_by_id(random_bank):
    bank = random_bank()
    entry = bank[105]
    assert (entry.id, entry.group) == (105, 35)
    assert entry.metadata == {"caption": "entry 105", "even": False}
    assert torch.equal(entry.key, bank.keys([105])[0])
    assert float(entry.key.norm()) == pytest.approx(1, abs=1e-3)
    assert 105 in bank
    assert 7 not in bank
    assert "105" not in bank
    assert True not in bank
    with pytest.raises(KeyError, match="ids must be in the bank, got 7"):
        bank[7]
    assert bank.metadata([101, 100])[1] == {"caption": "entry 100", "even": True}
    assert bank.keys().shape == (40, 8)
    assert "40 entries" in repr(bank)


def test_ids_are_given_or_counted():
    bank = MemoryBank(2, (1,))
    assert bank.add(torch.eye(2), torch.ones(2, 1)).tolist() == [0, 1]
    assert bank.add(torch.eye(2), torch.ones(2, 1), ids=[7, 5]).tolist() == [7, 5]
    assert bank.add(torch.eye(2), torch.ones(2, 1)).tolist() == [8, 9]
    assert bank.groups.tolist() == [-1] * 6
    bank.add(torch.eye(2)[:1], torch.ones(1, 1), ids=[2**63 - 1])
    with pytest.raises(ValueError, match=r"ids must be given after an id of 9223372036854775807"):
        bank.add(torch.eye(2), torch.ones(2, 1))
    assert bank.add(torch.zeros(0, 2), torch.zeros(0, 1)).tolist() == []


def test_removed_entries_are_gone_and_their_ids_free(random_bank):
    bank = random_bank()
    key = bank.keys([105])
    assert bank.remove([105, 110, 105]) == 2
    assert len(bank) == 38
    assert 105 not in bank
    assert 105 not in bank.neighbours(key, 38).ids
    assert bank.neighbours(key, 40).mask.sum() == 38
    with pytest.raises(UnknownIdError, match="got 110"):
        bank.remove([100, 110])
    assert 100 in bank
    bank.add(key, torch.ones(1, 2, 3), ids=[105])
    assert int(bank.neighbours(key, 1).ids) == 105
    assert (bank[105].value == 1).all()
    assert bank.compact() == 2
    assert len(bank) == 39
    assert int(bank.neighbours(key, 1).ids) == 105


ones = torch.ones(2, 4), torch.ones(2, 2, 3)


@pytest.mark.parametrize(
    ("keys", "values", "options", "error", "message"),
    [
        (torch.ones(2, 5), ones[1], {}, ValueError, r"keys must have shape \(M, 4\), got \(2, 5\)"),
        (ones[0], torch.ones(2, 6), {}, ValueError, r"values must have shape \(M, 2, 3\), got \(2, 6\)"),
        (ones[0], torch.ones(3, 2, 3), {}, ValueError, "values must have 2 rows as keys do, got 3"),
        (ones[0].long(), ones[1], {}, TypeError, "keys must be floating point, got torch.int64"),
        (None, ones[1], {}, TypeError, "keys must be a tensor, got NoneType"),
        (torch.tensor([[1.0] * 4, [float("inf")] * 4]), ones[1], {}, ValueError, "keys must be finite.* in row 1"),
        (torch.zeros(2, 4), ones[1], {}, ValueError, "keys must be non-zero for metric 'cosine', got zeros in row 0"),
        (ones[0], ones[1] * float("nan"), {}, ValueError, "values must be finite.* in row 0"),
        (ones[0], ones[1] * 1e6, {}, ValueError, r"range of torch.float16, got 1e\+06 in row 0. Use value_dtype="),
        (*ones, {"ids": [3, 3]}, ValueError, "ids must be distinct, got 3 twice"),
        (*ones, {"ids": [0, 3]}, ValueError, "ids must be new, got 0 which the bank holds"),
        (*ones, {"ids": [3]}, ValueError, r"ids must have shape \(2,\), got \(1,\)"),
        (*ones, {"ids": [-3, 4]}, ValueError, "ids must be from 0 to 2.*, got -3"),
        (*ones, {"ids": ["a", "b"]}, TypeError, "ids must be integers"),
        (*ones, {"ids": torch.ones(2)}, TypeError, "ids must be integers, got float32"),
        (*ones, {"groups": [1]}, ValueError, r"groups must have shape \(2,\)"),
        (*ones, {"groups": [-2, 1]}, ValueError, "groups must be from -1 .*, got -2"),
        (*ones, {"metadata": [{}]}, ValueError, "metadata must be a list of 2 dicts, got 1"),
        (*ones, {"metadata": {"a": 1}}, ValueError, "metadata must be a list of 2 dicts"),
        (*ones, {"metadata": [{}, "text"]}, TypeError, "metadata must be dicts, got str in row 1"),
        (*ones, {"metadata": [{}, {"a": torch.ones(1)}]}, TypeError, "metadata must be plain JSON.* in row 1"),
        (*ones, {"metadata": [{}, {"a": float("nan")}]}, TypeError, "metadata must be plain JSON"),
        (*ones, {"metadata": [{}, {1: 2}]}, TypeError, "metadata must have text as keys, got 1 in row 1"),
        (*ones, {"metadata": [{"a": [{None: 2}]}, {}]}, TypeError, "must have text as keys, got None in row 0"),
        (ones[0].to_sparse(), ones[1], {}, TypeError, "keys must be dense, got torch.sparse_coo. Convert it with"),
    ],
)
def test_a_refused_add_changes_nothing(keys, values, options, error, message):
    bank = MemoryBank(4, (2, 3))
    bank.add(torch.eye(4)[:1], torch.ones(1, 2, 3))
    before = bank.content_hash()
    with pytest.raises(error, match=message):
        bank.add(keys, values, **options)
    assert len(bank) == 1
    assert bank.content_hash() == before
    assert bank.add(*ones).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((0, (1,)), {}, ValueError, "key_dim must be positive, got 0"),
        ((4, ()), {}, ValueError, r"value_shape must be positive sizes, got \(\)"),
        ((4, (2, 0)), {}, ValueError, r"got \(2, 0\)"),
        (("4", (1,)), {}, ValueError, "key_dim must be an integer, got '4'. Give the width"),
        ((4.5, (1,)), {}, ValueError, "key_dim must be an integer, got 4.5"),
        ((True, (1,)), {}, ValueError, "key_dim must be an integer, got True"),
        ((4, 5), {}, ValueError, r"value_shape must be integers, got 5. Give \(L, D\)"),
        ((4, (2.5, 3)), {}, ValueError, r"value_shape must be integers, got \(2.5, 3\)"),
        ((4, (1,)), {"metric": "l2"}, ValueError, "metric must be 'cosine' or 'ip', got 'l2'"),
        ((4, (1,)), {"key_dtype": torch.int8}, ValueError, "key_dtype must be one of .*, got torch.int8"),
        ((4, (1,)), {"value_dtype": torch.int64}, ValueError, "value_dtype must be one of .*, got torch.int64"),
        ((4, (1,)), {"fingerprint": {"a": [1]}}, TypeError, r"fingerprint must map names .* got 'a': \[1\]"),
        ((4, (1,)), {"fingerprint": {"a": float("nan")}}, TypeError, "got 'a': nan"),
        ((4, (1,)), {"fingerprint": "x"}, TypeError, "fingerprint must be a dict of plain values, got str"),
    ],
)
def test_bad_settings(args, options, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_layout_is_taken(dtype):
    keys, values = torch.randn(4, 6).T.to(dtype), torch.randn(3, 2, 6).permute(2, 1, 0).to(dtype)
    bank, other = MemoryBank(4, (2, 3)), MemoryBank(4, (2, 3))
    bank.add(keys.requires_grad_(), values)
    other.add(keys.detach().contiguous().float(), values.contiguous().float())
    assert torch.equal(bank.gather(bank.ids)[0], other.gather(other.ids)[0])
    torch.testing.assert_close(bank.keys(), other.keys(), atol=2e-3, rtol=0)


def test_adding_does_not_keep_the_callers_tensors():
    keys, values, ids = torch.eye(2), torch.ones(2, 1), torch.tensor([4, 5])
    bank = MemoryBank(2, (1,), key_dtype=torch.float32, value_dtype=torch.float32, metric="ip")
    out = bank.add(keys, values, ids=ids)
    keys.zero_(), values.zero_(), ids.zero_(), out.zero_()
    assert bank.ids.tolist() == [4, 5]
    assert torch.equal(bank.keys(), torch.eye(2))
    assert (bank.gather(torch.tensor([4, 5]))[0] == 1).all()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_a_bank_behaves_as_a_dict(steps):
    bank, model = MemoryBank(3, (1,), metric="ip", key_dtype=torch.float32, value_dtype=torch.float32), {}
    for number, (add, entry) in enumerate(steps):
        key = torch.tensor([[float(number), 1.0, 0.0]])
        if add and entry not in model:
            bank.add(key, key[:, :1], ids=[entry])
            model[entry] = number
        elif not add and entry in model:
            bank.remove([entry])
            del model[entry]
    assert dict(zip(bank.ids.tolist(), bank.keys()[:, 0].tolist(), strict=True)) == model
    assert len(bank) == len(model)
    for entry in range(13):
        assert (entry in bank) == (entry in model)
        if entry in model:
            assert float(bank[entry].value) == model[entry]
    if model:
        best = bank.neighbours(torch.tensor([[1.0, 0.0, 0.0]]), 20)
        assert best.scores[0][best.mask[0]].tolist() == sorted(map(float, model.values()), reverse=True)


def test_merge_keeps_order_and_refuses_strangers(random_bank):
    one, two = random_bank(10), random_bank(10, seed=1, start=500)
    two.remove([503])
    joined = MemoryBank.merge([one, two])
    assert joined.ids.tolist() == one.ids.tolist() + two.ids.tolist()
    assert torch.equal(joined.keys(), torch.cat([one.keys(), two.keys()]))
    assert joined[504].metadata == two[504].metadata
    joined.add(torch.ones(1, 8), torch.ones(1, 2, 3), ids=[503])
    assert 503 not in two
    with pytest.raises(ValueError, match="banks must not share ids, got 100 in two"):
        MemoryBank.merge([one, one])
    shares = random_bank(3, seed=2, start=105)  # after five ids that the first has for itself
    with pytest.raises(ValueError, match="banks must not share ids, got 105 in two"):
        MemoryBank.merge([one, shares])
    with pytest.raises(ValueError, match="banks must hold at least one bank, got none"):
        MemoryBank.merge([])
    with pytest.raises(ValueError, match="banks must agree, got BankSpec"):
        MemoryBank.merge([one, random_bank(2, start=900, metric="ip")])
    with pytest.raises(ValueError, match=r"key.a"):
        MemoryBank.merge([one, random_bank(2, start=900, fingerprint={"key.a": 1})])


def test_numpy_arrays_are_taken_too():
    bank = MemoryBank(4, (2, 3))
    ids = bank.add(torch.eye(4).numpy(), torch.ones(4, 2, 3).numpy(), ids=torch.arange(4).numpy())
    assert bank.neighbours(torch.eye(4).numpy()[::2], 1).ids.tolist() == [[0], [2]]
    assert bank.gather(ids.numpy())[0].shape == (4, 2, 3)
    assert bank.path is None


def test_merge_of_int8_banks_of_which_some_share_a_center(random_bank):
    one, two, three = (random_bank(10, seed=s, start=100 * s, value_dtype=torch.int8) for s in (1, 2, 3))
    same = MemoryBank(8, (2, 3), value_dtype=torch.int8)
    same._contents.codec.center = one._contents.codec.center.clone()
    same.add(three.keys(), three.gather(three.ids)[0], ids=three.ids)
    joined = MemoryBank.merge([one, two, same])
    assert joined.ids.tolist() == [*one.ids.tolist(), *two.ids.tolist(), *three.ids.tolist()]
    for bank in (one, two, same):
        torch.testing.assert_close(joined.gather(bank.ids)[0], bank.gather(bank.ids)[0], atol=0.05, rtol=0)
    assert 205 in joined
    joined.remove([205])
    assert 205 not in joined


def test_merge_of_int8_banks_with_centers_of_their_own(random_bank):
    one, two = (random_bank(10, seed=s, start=100 * s, value_dtype=torch.int8) for s in (1, 2))
    joined = MemoryBank.merge([one, two])
    for bank in (one, two):
        torch.testing.assert_close(joined.gather(bank.ids)[0], bank.gather(bank.ids)[0], atol=0.05, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_tensors_are_taken_and_results_come_back_there():
    keys, values, ids = torch.randn(6, 4), torch.randn(6, 2, 3), torch.arange(6)
    bank, moved = MemoryBank(4, (2, 3)), MemoryBank(4, (2, 3))
    bank.add(keys, values, ids=ids, groups=ids // 2)
    moved.add(keys.cuda(), values.cuda(), ids=ids.cuda(), groups=ids.cuda() // 2)
    assert torch.equal(moved.keys(), bank.keys())
    found = moved.search(keys.cuda(), 2, exclude_ids=ids.cuda(), exclude_groups=[[0]] * 6)
    expected = bank.search(keys, 2, exclude_ids=ids, exclude_groups=[[0]] * 6)
    for one, other in zip(found, expected, strict=True):
        assert one.is_cuda
        assert torch.equal(one.cpu(), other)
    assert moved.gather(ids.cuda())[0].is_cuda
    assert moved.remove(ids[:2].cuda()) == 2


@pytest.mark.parametrize("value", [[1], {"b": 1}, float("nan"), b"x"])
def test_a_fingerprint_that_cannot_be_read_back_is_not_written(random_bank, tmp_path, value):
    saved = random_bank().save(tmp_path / "bank")
    bank = MemoryBank.load(saved)
    bank.fingerprint["a"] = value
    bank.remove(bank.ids[:1])
    for write in (bank.commit, bank.compact, lambda: bank.save(saved), lambda: bank.save(saved.with_name("other"))):
        with pytest.raises(TypeError, match="fingerprint must map names to str, int, finite float, bool or None, got"):
            write()
    assert len(MemoryBank.load(saved)) == len(bank) + 1
    assert not saved.with_name("other").exists()
    del bank.fingerprint["a"]
    bank.commit()
    assert len(MemoryBank.load(saved)) == len(bank)

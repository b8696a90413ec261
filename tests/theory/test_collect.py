"""Collecting NLLs: against torch's own cross-entropy, over padded batches, arms, null inputs and any causal LM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyalign.theory import NullInput, collect_nll, pvi, sequence_nll, train_null_input
from tinyalign.theory.collect import without_images
from tinyalign.theory.likelihood import log_normalizer

VOCAB = 11


class TinyLM(nn.Module):
    """A causal mean-of-the-past model: small, but honest about masks and order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.head = nn.Linear(6, VOCAB)
        self.config = SimpleNamespace(vocab_size=VOCAB)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, inputs_embeds: Tensor | None = None,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        mask = torch.ones(inputs_embeds.shape[:2]) if attention_mask is None else attention_mask.float()
        total = (inputs_embeds * mask[..., None]).cumsum(1)
        return SimpleNamespace(logits=self.head(total / mask.cumsum(1).clamp(min=1)[..., None]))


def batch(ids: list[list[int]], labels: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **more}


def reference(model: TinyLM, ids: list[int], labels: list[int]) -> float:
    """One unpadded row at a time, through torch's cross_entropy."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum").item()


def test_any_causal_lm_row_by_row() -> None:
    model = TinyLM().train()
    rows = [([1, 2, 3, 4], [-100, -100, 3, 4]), ([5, 6, 7, 8], [-100, 6, 7, 8])]
    loader = [batch([row[0]], [row[1]], sample_ids=torch.tensor([9 - i]), groups=[3]) for i, row in enumerate(rows)]
    table = collect_nll(model, loader)
    np.testing.assert_allclose(table.nll, [reference(model, *row) for row in rows], rtol=1e-5)
    assert table.tokens.tolist() == [2, 3]
    assert table.sample_ids.tolist() == [9, 8]
    assert table.groups.tolist() == [3, 3]
    assert (table.condition, table.tokenizer, table.bytes) == ("full", f"vocab:{VOCAB}", None)
    assert model.training


def test_padding_on_either_side_changes_nothing() -> None:
    model = TinyLM()
    right = batch([[1, 2, 3, 0, 0]], [[-100, 2, 3, -100, -100]], attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    left = batch([[0, 0, 1, 2, 3]], [[-100, -100, -100, 2, 3]], attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    bare = collect_nll(model, [batch([[1, 2, 3]], [[-100, 2, 3]])])
    for padded in (right, left):
        table = collect_nll(model, [padded])
        assert table.nll[0] == pytest.approx(bare.nll[0], rel=1e-6)
        assert table.targets.tolist() == bare.targets.tolist()


@pytest.mark.parametrize("chunk", [1, 7, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_chunks_and_types_agree_with_float64(chunk: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 5, 50) * 8).to(dtype)
    labels = torch.randint(0, 50, (3, 5))
    labels[0, 2] = -100
    result = sequence_nll(logits, labels, chunk=chunk)
    wide = -logits.double().log_softmax(-1)
    expected = sum(
        wide[:, t].gather(1, labels[:, t + 1, None].clamp(min=0))[:, 0] * (labels[:, t + 1] >= 0) for t in range(4)
    )
    torch.testing.assert_close(result.nll.double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(
        log_normalizer(logits, chunk=chunk).double(), logits.double().logsumexp(-1), rtol=2e-6, atol=1e-5
    )


def test_sequence_nll_refuses_labels_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \(B, T\) of logits .* got \(1, 2\)"):
        sequence_nll(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.long))


class ArmModel(nn.Module):
    """Answers with per-sample sums and remembers which arm it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[str]]] = []

    def forward(self, input_ids: Tensor, labels: Tensor, retrieval: str = "default", **rest: Any) -> Any:
        self.calls.append((retrieval, sorted(rest)))
        size = len(input_ids)
        return SimpleNamespace(per_sample_nll=torch.full((size,), 2.0), per_sample_tokens=torch.full((size,), 3))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("full", "default"), ("retrieval", "bank"), ("bank", "bank"), ("off", "off"), ("shuffled", "shuffled"),
     ("random", "random"), ("constant", "constant"), ("self", "self"), ("prompt", "prompt"), ("no_image", "off")],
)  # fmt: skip
def test_each_arm_reaches_the_model(condition: str, expected: str) -> None:
    model = ArmModel()
    rows = batch([[1, -200, 3]], [[-100, -100, 3]], pixel_values=torch.zeros(1, 3, 2, 2), groups=torch.tensor([4]))
    table = collect_nll(model, [rows], condition=condition)
    arm, inputs = model.calls[0]
    assert arm == expected
    assert ("pixel_values" in inputs) == (condition != "no_image")
    assert "groups" not in inputs
    assert (table.nll[0], table.tokens[0], table.groups[0]) == (2.0, 3, 4)


def test_an_arm_needs_a_model_with_retrieval() -> None:
    with pytest.raises(
        TypeError, match=r"condition 'shuffled' must be asked of a model whose forward takes retrieval="
    ):
        collect_nll(TinyLM(), [batch([[1, 2]], [[-100, 2]])], condition="shuffled")


def test_no_image_equals_the_text_alone() -> None:
    model = TinyLM()
    ids = [[1, -200, -200, 4, 5], [0, 0, 6, -200, 7]]
    labels = [[-100, -100, -100, -100, 5], [-100, -100, -100, -100, 7]]
    shown = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    table = collect_nll(model, [batch(ids, labels, attention_mask=shown)], condition="no_image")
    expected = [reference(model, [1, 4, 5], [-100, -100, 5]), reference(model, [6, 7], [-100, 7])]
    np.testing.assert_allclose(table.nll, expected, rtol=1e-5)
    closed = without_images(batch(ids, labels, attention_mask=shown))
    assert closed["input_ids"].tolist() == [[1, 4, 5], [0, 6, 7]]
    assert closed["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert closed["labels"].tolist() == [[-100, -100, 5], [-100, -100, 7]]


def test_image_token_of_a_hugging_face_config_is_removed() -> None:
    model = TinyLM()
    model.config.image_token_id = 10
    table = collect_nll(model, [batch([[1, 10, 5]], [[-100, -100, 5]])], condition="no_image")
    assert table.nll[0] == pytest.approx(reference(model, [1, 5], [-100, 5]), rel=1e-5)


def null_loader() -> list[dict[str, Any]]:
    # The target is token 3 three times in four, token 4 otherwise; the instruction (token 1 or 2) tells which.
    rows = [[1, 3]] * 30 + [[2, 4]] * 10
    return [batch(rows, [[-100, row[1]] for row in rows], sample_ids=torch.arange(40))]


def test_a_trained_null_input_reaches_the_entropy_of_the_targets() -> None:
    model = TinyLM()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    null = train_null_input(model, null_loader(), num_tokens=2, steps=1500, learning_rate=1.0)
    table = collect_nll(model, null_loader(), condition="null", null_input=null)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    # A frozen linear head over a 6-wide prompt can express any logits of two tokens, up to the others' mass.
    assert entropy - 1e-9 <= table.per_token < entropy + 0.05
    assert len(set(np.round(table.nll, 5))) == 2
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(pvi(table, collect_nll(model, null_loader()))) == 40


def test_a_null_input_takes_the_steps_that_it_is_asked_for_and_comes_to_rest() -> None:
    model = TinyLM()
    prompts: list[torch.Tensor] = []
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        prompts.append(kwargs["inputs_embeds"][0, :2].detach().clone())
        return forward(*args, **kwargs)

    model.forward = watched  # type: ignore[method-assign]
    loader = null_loader() * 3
    null = train_null_input(model, loader, num_tokens=2, steps=7, learning_rate=1.0)  # two rounds and one batch
    assert len(prompts) == 7
    moved = [
        float((after - before).detach().norm())
        for before, after in zip(prompts, [*prompts[1:], null.prompt], strict=True)
    ]
    assert min(moved) > 0
    assert moved[-1] < 0.5 * moved[0]  # the last step has a seventh of the first one's rate


def test_null_input_reads_targets_only_and_every_supervised_token() -> None:
    model, null = TinyLM(), NullInput(6, num_tokens=1, generator=torch.Generator().manual_seed(1))
    spread = torch.tensor([[-100, 3, -100, 5], [-100, 3, 5, -100]])
    first, second = null(model, spread).nll.tolist()
    assert first == pytest.approx(second, rel=1e-6)
    embeds = torch.cat([null.prompt, model.embed(torch.tensor([3, 5]))])[None]
    wide = -model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    assert first == pytest.approx((wide[0, 3] + wide[1, 5]).item(), rel=1e-5)


def test_numpy_batches_are_read_as_tensors_are() -> None:
    model = TinyLM()
    tensors = batch([[1, 2, 3], [3, 4, 5]], [[-100, 2, 3], [-100, -100, 5]], sample_ids=torch.tensor([70, 71]))
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    one, other = collect_nll(model, [tensors]), collect_nll(model, [arrays])
    assert (other - one).tolist() == [0.0, 0.0]
    assert other.ids.tolist() == [70, 71]


def test_errors_name_the_sample_and_the_remedy() -> None:
    model = TinyLM()
    empty = batch([[1, 2], [3, 4]], [[-100, 2], [3, -100]], sample_ids=torch.tensor([70, 71]))
    with pytest.raises(ValueError, match="must leave a target token in every row, got none for sample 71"):
        collect_nll(model, [empty])
    del empty["sample_ids"]
    with pytest.raises(ValueError, match="got none for record 1"):
        collect_nll(model, [empty])
    with pytest.raises(ValueError, match=r"every batch must hold labels, got keys \['input_ids'\]"):
        collect_nll(model, [{"input_ids": torch.ones(1, 2, dtype=torch.long)}])
    with pytest.raises(ValueError, match="loader must yield at least one batch, got none"):
        collect_nll(model, [])
    with pytest.raises(ValueError, match=r"condition must be one of full, .* got 'blank'"):
        collect_nll(model, [], condition="blank")
    with pytest.raises(ValueError, match="null_input must be given for condition='null', got None"):
        collect_nll(model, [], condition="null")
    for name in ("sample_ids", "groups"):
        text = batch([[1, 2]], [[-100, 2]], **{name: ["790_0"]})
        with pytest.raises(ValueError, match=rf"{name} must be integers, got dtype <U5. Hash text ids to int64 first"):
            collect_nll(model, [text])
    with pytest.raises(ValueError, match="got none for sample 790_0"):
        collect_nll(model, [batch([[1, 2]], [[-100, -100]], sample_ids=["790_0"])])
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        NullInput(4, num_tokens=0)
    with pytest.raises(ValueError, match="labels must supervise a token in every row, got none in row 1"):
        NullInput(6)(model, torch.tensor([[-100, 2], [-100, -100]]))
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        train_null_input(model, [])


class Letters:
    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(VOCAB)}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("é" if i == 4 else chr(97 + i) for i in ids)


def test_bytes_are_utf8_lengths_of_the_target() -> None:
    rows = batch([[1, 4, 3], [1, 2, 3]], [[-100, 4, 3], [-100, -100, 3]])
    table = collect_nll(TinyLM(), [rows], tokenizer=Letters())
    assert table.bytes.tolist() == [3, 1]
    assert table.tokenizer.startswith(f"{VOCAB}:")
    rows["target_bytes"] = torch.tensor([8, 9])
    assert collect_nll(TinyLM(), [rows]).bytes.tolist() == [8, 9]


@pytest.mark.gpu
def test_on_a_gpu_the_table_is_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, rows = TinyLM(), batch([[1, 2, 3]], [[-100, 2, 3]])
    here = collect_nll(model, [rows])
    there = collect_nll(model.cuda(), [rows])
    np.testing.assert_allclose(here.nll, there.nll, rtol=1e-5)


class Wrapped(nn.Module):
    """What `attach_memory` makes, as far as collecting sees it: named arms, and placeholders among the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rag_token_id, self.model, self.seen = 9, TinyLM(), []

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        self.seen.append((inputs.pop("retrieval", None), inputs.pop("sample_ids", None), inputs["input_ids"].tolist()))
        inputs.pop("groups", None)
        return self.model(labels=labels, **inputs)


def test_an_attached_model_is_asked_for_its_arms_and_loses_its_placeholders_when_off() -> None:
    model = Wrapped()
    rows = batch([[1, 9, 9, 3]], [[-100, -100, -100, 3]], sample_ids=torch.tensor([5]), groups=torch.tensor([2]))
    collect_nll(model, [rows], condition="shuffled")
    off = collect_nll(model, [rows], condition="off")
    assert model.seen[0][0] == "shuffled"
    assert model.seen[0][1].tolist() == [5]
    assert model.seen[0][2] == [[1, 9, 9, 3]]
    assert (model.seen[1][0], model.seen[1][2]) == ("off", [[1, 3]])
    assert off.nll[0] == pytest.approx(reference(model.model, [1, 3], [-100, 3]), rel=1e-5)

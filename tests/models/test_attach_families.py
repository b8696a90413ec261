"""What an attached branch promises, held by every family.

The reference needs no hook: the same bare model, in which every retrieval token of every row is stored as the embedding
of a spare vocabulary id of its own, and is fed by that id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attach_families as F
import pytest
import torch
from torch import nn

from tinyalign.models import load_attached

TEXT_NEEDS_PICTURES = {"blip2", "instructblip"}  # the bare models demand pixel_values in every call


def prepared(name: str, rows: Any = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    aligned = F.attach(F.build(name), **options)
    return aligned, aligned.splice(F.batch_of(name, F.ROWS if rows is None else rows))


def assert_as_words(aligned: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The logits are those of the model that knows each retrieval token as a word."""
    values, mask = F.latents()
    tokens = aligned.connector(values, mask).tokens.detach()
    bare, words = F.reference(aligned.model, batch, aligned.rag_token_id, tokens)
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        found = aligned(**batch, retrieved=(values, mask)).logits
        expected = bare(**words).logits
    torch.testing.assert_close(found[keep][:, F.COLUMNS], expected[keep][:, F.COLUMNS], rtol=2e-4, atol=2e-4)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", F.EVERY)
def test_attached_retrieval_is_as_if_it_were_words(name: str) -> None:
    model = F.build(name)
    plain = F.batch_of(name, F.ROWS)
    with torch.no_grad():
        untouched = model(**plain).logits
    aligned = F.attach(model)
    spliced = aligned.splice(plain)
    found = assert_as_words(aligned, spliced)
    values, mask = F.latents()
    keep = spliced["attention_mask"].bool()
    with torch.no_grad():
        moved = aligned(**spliced, retrieved=(values.flip(0), mask)).logits  # the other row's
    assert (moved[keep] - found[keep]).abs().max() > 1e-2  # the latents matter
    # off, and detached: the untouched model to the bit
    with torch.no_grad():
        assert torch.equal(aligned(**plain, retrieval="off").logits, untouched)
        assert aligned.detach() is model
        assert torch.equal(model(**plain).logits, untouched)
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.get_input_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("name", F.EVERY)
def test_the_loss_counts_words_and_gradients_reach_the_connector_alone(name: str) -> None:
    aligned, batch = prepared(name)
    batch = F.supervised(batch)
    marked = batch["input_ids"] == aligned.rag_token_id
    values, mask = F.latents()
    values.requires_grad_()
    careless = {**batch, "labels": batch["labels"].masked_fill(marked, aligned.rag_token_id)}
    output = aligned.train()(**careless, retrieved=(values, mask))
    assert (careless["labels"] == aligned.rag_token_id).any()  # the caller's tensor is left as it was
    labels = batch["labels"][:, 1:]
    by_hand = nn.functional.cross_entropy(output.logits[:, :-1][labels != -100].float(), labels[labels != -100])
    torch.testing.assert_close(output.loss, by_hand, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    for parameter in aligned.connector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in aligned.model.parameters())
    aligned.zero_grad()
    values.grad = None
    aligned(**batch, retrieved=(values, mask)).logits[0].sum().backward()
    assert values.grad is not None
    assert values.grad[0].abs().sum() > 0
    assert (values.grad[1] == 0).all()  # a row depends on its own latents only


@pytest.mark.parametrize("name", F.EVERY)
@pytest.mark.parametrize("rows", [F.ROWS, [[1, -1, 5, -2, 6], [1, 8, 9]]], ids=["one image", "two images and none"])
def test_a_left_padded_batch_is_generated_as_its_rows_are(name: str, rows: Any) -> None:
    aligned, batch = prepared(name, rows)
    given = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [F.IMAGE]}  # a random model might write one
    values, mask = F.latents()
    together = F.new_ids(aligned.generate(**batch, retrieved=(values, mask), **given), batch)
    again = aligned.generate(**batch, retrieved=(values, mask), use_cache=False, **given)
    assert together == F.new_ids(again, batch)
    for at, row in enumerate(rows):
        if name in TEXT_NEEDS_PICTURES and min(row) > 0:
            continue
        one = aligned.splice(F.batch_of(name, [row]))
        alone = aligned.generate(**one, retrieved=(values[at : at + 1], mask[at : at + 1]), **given)
        assert F.new_ids(alone, one) == together[at : at + 1]
    assert not any(aligned.rag_token_id in row for row in together)


@pytest.mark.parametrize("name", F.EVERY)
def test_two_images_in_one_row_and_text_alone_in_another(name: str) -> None:
    aligned, batch = prepared(name, [[1, -1, 5, -2, 6], [1, 8, 9]])
    run = F.image_tokens(name) + (1 if name in F.CLOSED else 0)
    marked = (batch["input_ids"] == aligned.rag_token_id).nonzero()
    first = [int(marked[marked[:, 0] == row, 1][0]) for row in range(2)]
    pad = int((batch["attention_mask"][1] == 0).sum())
    words_alone = name in F.LANGUAGE
    assert first == [1 if words_alone else 2 * run + 2, pad + 1]  # behind the second image; behind BOS
    assert_as_words(aligned, batch)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", F.EVERY)
def test_checkpointing_and_half_precision_keep_the_gradient(name: str) -> None:
    values, mask = F.latents()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def gradient(before: Any = None, after: Any = None, *, autocast: bool = False) -> torch.Tensor:
        nonlocal calls
        model = F.build(name).train()
        if before is not None:
            before(model)
        aligned = F.attach(model).train()
        if after is not None:
            after(model)
        batch = F.supervised(aligned.splice(F.batch_of(name, F.ROWS)))
        if model.dtype == torch.bfloat16:
            batch = {n: v.bfloat16() if v.is_floating_point() else v for n, v in batch.items()}
        calls = 0
        for module in model.modules():
            module.register_forward_pre_hook(count)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = aligned(**batch, retrieved=(values, mask)).loss
        loss.backward()
        return aligned.connector.mlp.layers[0].weight.grad.clone()  # type: ignore[no-any-return]

    def checkpointing(reentrant: bool) -> Any:
        return lambda model: model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    plain, once = gradient(), calls
    for reentrant in (False, True):
        torch.testing.assert_close(gradient(after=checkpointing(reentrant)), plain, rtol=1e-4, atol=1e-6)
        assert calls > once  # layers ran again
        torch.testing.assert_close(gradient(before=checkpointing(reentrant)), plain, rtol=1e-4, atol=1e-6)
        assert calls > once
    for half in (gradient(autocast=True), gradient(before=lambda model: model.to(torch.bfloat16))):
        assert half.dtype == torch.float32
        assert nn.functional.cosine_similarity(half.flatten(), plain.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("first", ["peft", "attach"])
@pytest.mark.parametrize("name", F.EVERY)
def test_peft_in_either_order(name: str, first: str) -> None:
    """LoRA before or behind the branch; embeddings in modules_to_save are copied, hooks and all, and replaced."""
    from peft import LoraConfig, get_peft_model

    table = "embed_tokens"
    lora = LoraConfig(r=2, target_modules=r".*(q_proj|v_proj)", modules_to_save=[table], ensure_weight_tying=False)
    model = F.build(name)
    if first == "peft":
        aligned = outer = F.attach(get_peft_model(model, lora))
    else:
        aligned = F.attach(model)
        own = "connector.mlp" if name in ("idefics3", "smolvlm") else "connector"  # those have a connector themselves
        lora.modules_to_save = [table, own]
        outer = get_peft_model(aligned, lora)
    batch = aligned.splice(F.batch_of(name, F.ROWS))
    values, mask = F.latents()
    outer.eval()
    plain = F.attach(F.build(name))
    given = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [F.IMAGE], "retrieved": (values, mask)}
    with torch.no_grad():  # LoRA starts at zero
        logits = outer(**batch, retrieved=(values, mask)).logits
        torch.testing.assert_close(logits, plain(**batch, retrieved=(values, mask)).logits)
    assert torch.equal(aligned.generate(**batch, **given), plain.generate(**batch, **given))
    outer.train()
    outer(**F.supervised(batch), retrieved=(values, mask)).loss.backward()
    trained = {n for n, p in outer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in part for part in trained)
    assert any(part.endswith("layers.0.weight") and "connector" in part for part in trained)
    assert all("lora" in part or "modules_to_save" in part or "connector" in part for part in trained)


@pytest.mark.parametrize("name", F.EVERY)
def test_save_and_load_around_the_untouched_model(name: str, tmp_path: Path) -> None:
    aligned, batch = prepared(name)
    values, mask = F.latents()
    with torch.no_grad():
        for parameter in aligned.connector.parameters():
            parameter.add_(0.1)
        expected = aligned(**batch, retrieved=(values, mask)).logits
    aligned.save_pretrained(tmp_path / "adapter")
    again = load_attached(F.build(name), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch, retrieved=(values, mask)).logits, expected)
    model = aligned.detach()
    model.save_pretrained(tmp_path / "base")  # the model's own checkpoint holds nothing of ours
    opened, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    once_more = load_attached(opened.eval(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(once_more(**batch, retrieved=(values, mask)).logits, expected)

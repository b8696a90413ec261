"""What an attached branch promises beyond the families' forward and generate."""

from __future__ import annotations

import copy
from typing import Any

import attach_families as F
import pytest
import torch

from tinyalign.connectors import RAGConnector
from tinyalign.models import attach_memory


def prepared(name: str = "llava", rows: Any = None) -> tuple[Any, dict[str, Any]]:
    aligned = F.attach(F.build(name))
    return aligned, aligned.splice(F.batch_of(name, F.ROWS if rows is None else rows))


def test_a_row_without_neighbours_reads_as_if_nothing_were_there() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    mask[1] = False
    found = aligned(**batch, retrieved=(values, mask)).logits
    keep = batch["input_ids"][1] != aligned.rag_token_id
    plain = F.batch_of("llava", F.ROWS)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = aligned.model(
        **plain,
        position_ids=positions[:, batch["input_ids"][1] != aligned.rag_token_id][:, -plain["input_ids"].shape[1] :],
    )
    torch.testing.assert_close(found[1, keep][-3:], alone.logits[1, -3:], rtol=1e-3, atol=1e-3)


def test_a_context_serves_the_bare_model() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    expected = aligned(**batch, retrieved=(values, mask)).logits
    with aligned.use(values, mask):
        torch.testing.assert_close(aligned.model(**batch).logits, expected)
    with pytest.raises(ValueError, match="must hold no retrieval token 120 without latents"):
        aligned.model(**batch)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_repeat_a_rows_latents_beside_each_other(use_cache: bool) -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    given = {
        "max_new_tokens": 4, "num_beams": 4, "num_return_sequences": 2, "do_sample": False, "suppress_tokens": [100],
        "use_cache": use_cache,
    }  # fmt: skip
    width = batch["input_ids"].shape[1]
    together = aligned.generate(**batch, retrieved=(values, mask), **given)[:, width:].tolist()
    for at in range(2):
        one = aligned.splice(F.batch_of("llava", F.ROWS[at : at + 1]))
        alone = aligned.generate(**one, retrieved=(values[at : at + 1], mask[at : at + 1]), **given)
        assert together[2 * at : 2 * at + 2] == alone[:, one["input_ids"].shape[1] :].tolist()


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    aligned, batch = prepared("llama")
    values, mask = F.latents()
    with torch.no_grad(), aligned.use(values, mask):
        whole = aligned.model(**batch).logits[:, -1]
        cut = 5  # inside the retrieval run of both rows
        marked = batch["input_ids"] == aligned.rag_token_id
        assert marked[:, cut - 1 : cut + 1].any()
        keep = batch["attention_mask"]
        positions = (keep.cumsum(1) - 1).clamp(min=0)
        start = aligned.model(
            input_ids=batch["input_ids"][:, :cut],
            attention_mask=keep[:, :cut],
            position_ids=positions[:, :cut],
            use_cache=True,
        )
        rest = aligned.model(
            input_ids=batch["input_ids"][:, cut:], attention_mask=keep, position_ids=positions[:, cut:],
            past_key_values=start.past_key_values,
        )  # fmt: skip
    torch.testing.assert_close(rest.logits[:, -1], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "llama"])
def test_other_ways_to_generate(name: str) -> None:
    """Retrieval ids lie outside the vocabulary: whatever looks the prompt up by id must not stumble over them."""
    aligned = F.attach(F.build(name))
    values, mask = F.latents(1)
    batch = aligned.splice(F.batch_of(name, F.ROWS[:1]))
    given = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [F.IMAGE], "retrieved": (values, mask)}
    plain = aligned.generate(**batch, **given)
    assert torch.equal(aligned.generate(**batch, **given, prompt_lookup_num_tokens=2), plain)
    assert torch.equal(aligned.generate(**batch, **given, cache_implementation="static"), plain)
    penalised = aligned.generate(**batch, **given, repetition_penalty=50.0)[0, batch["input_ids"].shape[1] :]
    assert len(set(penalised.tolist())) == len(penalised)
    assert aligned.generate(**batch, **given, no_repeat_ngram_size=1).shape[0] == 1
    if name == "llama":
        assistant = F.build(name)
        with pytest.raises(ValueError, match="assistant_model must have a row for the retrieval id 120, got 120 rows"):
            aligned.generate(**batch, **given, assistant_model=assistant)
        inside = F.attach(F.build(name), processor=type("Words", (), {"get_vocab": dict, "__len__": lambda _: 119})())
        assert inside.rag_token_id == 119
        prompt = inside.splice(F.batch_of(name, F.ROWS[:1]))
        alone, assisted = (inside.generate(**prompt, **given, **more) for more in ({}, {"assistant_model": assistant}))
        assert torch.equal(alone[:, -6:], plain[:, -6:])
        assert torch.equal(assisted, alone)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llama"])
def test_decoding_by_hand_goes_on_from_the_cache(name: str) -> None:
    """The cache holds the retrieval run already; a step of words alone is no mistake then."""
    aligned, batch = prepared(name)
    words = torch.tensor([[11], [12]])
    with torch.no_grad():
        start = aligned(**batch, retrieved=F.latents(), use_cache=True)
        longer = {n: v for n, v in batch.items() if n in ("pixel_values", "image_grid_thw")}
        for part in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if part in batch:
                more = words if part == "input_ids" else torch.full((2, 1), int(part == "attention_mask"))
                longer[part] = torch.cat([batch[part], more], dim=1)
        whole = aligned(**longer, retrieved=F.latents()).logits[:, -1]
        step = {
            "input_ids": words,
            "attention_mask": longer["attention_mask"],
            "past_key_values": start.past_key_values,
        }
        if name == "qwen2_vl":
            step["position_ids"] = aligned.model.model.get_rope_index(
                longer["input_ids"], longer["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"],
                attention_mask=longer["attention_mask"],
            )[0][..., -1:]  # fmt: skip
        torch.testing.assert_close(aligned(**step).logits[:, -1], whole, rtol=1e-4, atol=1e-5)


def test_single_ids_are_looked_up_as_they_are() -> None:
    """transformers embeds the placeholder's id alone to find where images go."""
    aligned, _ = prepared()
    table = aligned.model.get_input_embeddings()
    with torch.no_grad(), aligned.use(*F.latents()):
        for ids in (torch.tensor(5), torch.tensor([5, 6])):
            assert torch.equal(table(ids), table.weight[ids])
        aligned.plug.calls = 1  # nothing was written, and here it need not be


@pytest.mark.parametrize("first", ["peft", "attach"])
@pytest.mark.parametrize("kind", ["lora", "rows"])
def test_peft_that_changes_the_embeddings_leaves_retrieval_alone(kind: str, first: str) -> None:
    """LoRA on the table adds nothing to a retrieval token, and trained rows of it replace none."""
    from peft import LoraConfig, get_peft_model

    target = (
        {"target_modules": ["embed_tokens"]} if kind == "lora" else {"trainable_token_indices": {"embed_tokens": [5]}}
    )
    if kind == "rows":
        target["target_modules"] = ["q_proj"]
    model = F.build("llama")
    if first == "peft":
        wrapped = get_peft_model(model, LoraConfig(r=2, **target))
        aligned = outer = F.attach(wrapped)
    else:
        aligned = F.attach(model)
        wrapped = outer = get_peft_model(aligned, LoraConfig(r=2, **target))
    with torch.no_grad():
        for part, parameter in wrapped.named_parameters():
            if "lora" in part or "delta" in part:
                parameter.add_(torch.randn_like(parameter))
    batch = aligned.splice(F.batch_of("llama", F.ROWS))
    values, mask = F.latents()
    found = outer(**batch, retrieved=(values, mask)).logits
    tokens = F.attach(F.build("llama")).connector(values, mask).tokens.detach()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    merged = merged.detach() if first == "attach" else merged
    bare, words = F.reference(merged, batch, aligned.rag_token_id, tokens)
    keep = batch["attention_mask"].bool()
    expected = bare(**words).logits
    torch.testing.assert_close(found[keep][:, F.COLUMNS], expected[keep][:, F.COLUMNS], rtol=2e-4, atol=2e-4)


def test_a_copy_of_the_bare_model_is_free_of_the_branch() -> None:
    aligned, batch = prepared()
    twin = copy.deepcopy(aligned.model)
    plain = F.batch_of("llava", F.ROWS)
    torch.testing.assert_close(twin(**plain).logits, aligned.model(**plain).logits)
    again = F.attach(twin)
    given = {**batch, "retrieved": F.latents()}
    torch.testing.assert_close(again(**given).logits, aligned(**given).logits)
    again.detach()
    assert not twin.get_input_embeddings()._forward_hooks
    assert not twin.get_input_embeddings()._forward_pre_hooks
    assert aligned.model.get_input_embeddings()._forward_hooks


def test_a_copy_carries_its_own_branch() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    expected = aligned(**batch, retrieved=(values, mask)).logits
    twin = copy.deepcopy(aligned)
    assert twin.memory is aligned.memory
    torch.testing.assert_close(twin(**batch, retrieved=(values, mask)).logits, expected)
    with torch.no_grad():
        for parameter in twin.connector.parameters():
            parameter.zero_()
    torch.testing.assert_close(aligned(**batch, retrieved=(values, mask)).logits, expected)
    assert not torch.allclose(twin(**batch, retrieved=(values, mask)).logits, expected)


@pytest.mark.parametrize("training", [False, True])
def test_the_branch_is_in_the_models_own_mode(training: bool) -> None:
    """A model that `from_pretrained` opened is in evaluation mode, and generates at once."""
    model = F.build("llama").train(training)
    aligned = attach_memory(model, connector=RAGConnector(F.LATENT, F.WIDTH))
    assert {module.training for module in aligned.modules()} == {training}


def test_every_arm_of_the_bank() -> None:
    aligned, batch = prepared()
    own = torch.tensor([0, 5])
    for arm in ("bank", "shuffled", "random", "constant", "self"):
        assert torch.isfinite(aligned(**batch, sample_ids=own, retrieval=arm).logits).all()
    assert (
        aligned(**batch, neighbour_ids=torch.tensor([[1, 2], [3, -1]])).logits.shape[1] == batch["input_ids"].shape[1]
    )
    asked = aligned(**batch, queries=aligned.memory.keys([4, 4]), sample_ids=own).logits
    values, mask = aligned.memory.gather(aligned.memory.neighbours(aligned.memory.keys([4, 4]), 2, exclude_ids=own).ids)
    torch.testing.assert_close(asked, aligned(**batch, retrieved=(values, mask)).logits)

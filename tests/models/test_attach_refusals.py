"""What cannot be attached, and calls that do not fit: each refusal by its message."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attach_families as F
import pytest
import torch
from torch import nn

from tinyalign.connectors import RAGConnector
from tinyalign.memory import MemoryBank
from tinyalign.models import attach_memory, splice_rag


def prepared(name: str = "llava") -> tuple[Any, dict[str, Any]]:
    aligned = F.attach(F.build(name))
    return aligned, aligned.splice(F.batch_of(name, F.ROWS))


class Words:
    """A tokenizer of any number of words."""

    bos_token_id = 1

    def __init__(self, size: int, *names: str) -> None:
        self.size, self.names = size, names

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {name: at for at, name in enumerate(self.names)}


def connector() -> RAGConnector:
    return RAGConnector(F.LATENT, F.WIDTH)


def test_an_unused_row_is_preferred_and_never_written() -> None:
    """With fewer tokens than rows the last row is free; the head could write it, so generation suppresses it."""
    model = F.build("llama")
    aligned = attach_memory(model, SimpleNamespace(tokenizer=Words(110)), connector=connector(), k=1).eval()
    assert aligned.rag_token_id == 119
    aligned.num_latents = F.L
    batch = aligned.splice(F.batch_of("llama", F.ROWS))
    with torch.no_grad():
        model.lm_head.weight[119] = 100 * model.lm_head.weight.abs().max()
        values, mask = F.latents()
    new = aligned.generate(**batch, retrieved=(values[:, :1], mask[:, :1]), max_new_tokens=4, do_sample=False)
    assert 119 not in new[:, batch["input_ids"].shape[1] :]


def test_what_cannot_be_attached() -> None:
    with pytest.raises(TypeError, match="vlm must have input embeddings, got Linear"):
        attach_memory(nn.Linear(2, 2), connector=connector())
    model = F.build("llava")
    with pytest.raises(ValueError, match="rag_token must be new to the tokenizer, got '<rag>' which it knows"):
        attach_memory(model, SimpleNamespace(tokenizer=Words(100, "<rag>")), connector=connector())
    with pytest.raises(ValueError, match="connector must be as wide as the model's embeddings, 32, got 31"):
        attach_memory(model, connector=RAGConnector(F.LATENT, 31))
    bank = MemoryBank(key_dim=32, value_shape=(F.L, 9))
    with pytest.raises(
        ValueError, match=r"connector must read the bank's values, of shape \(3, 9\), got latents of width 8"
    ):
        attach_memory(model, memory=bank, connector=connector())
    with pytest.raises(ValueError, match=r"attach_memory: retrieval must be one of .* got 'magic'"):
        attach_memory(model, connector=connector(), retrieval="magic")
    attach_memory(model, connector=connector())
    with pytest.raises(
        ValueError, match="vlm must not be attached already, got LlavaForConditionalGeneration with a branch"
    ):
        attach_memory(model, connector=connector())
    second = F.build("llama")
    second.model.embed_tokens_per_layer = nn.Embedding(120, 4)
    with pytest.raises(
        ValueError, match="vlm must have an unused row in its embeddings, got LlamaForCausalLM, which looks"
    ):
        attach_memory(second, connector=connector())
    attach_memory(second, SimpleNamespace(tokenizer=Words(119)), connector=connector())


def calls() -> Iterator[tuple[Any, str]]:
    values, mask = F.latents()
    yield (
        lambda a, b: a(**{**b, "input_ids": None, "inputs_embeds": torch.zeros(2, 3, 32)}),
        "input_ids must be given, got None",
    )
    yield (
        lambda a, b: a.generate(**b, inputs_embeds=torch.zeros(2, 3, 32)),
        "inputs_embeds must be None, got embeddings",
    )
    yield (
        lambda a, b: a(**b, retrieved=(values[:, :1], mask[:, :1])),
        "latents must give 6 tokens to each of 2 rows, got 3 for 2",
    )
    yield (
        lambda a, b: a(**b, retrieved=(values[:1], mask[:1])),
        "latents must give 6 tokens to each of 2 rows, got 6 for 1",
    )
    yield (
        lambda a, b: a(**b, neighbour_ids=torch.ones(2, 3, dtype=torch.long)),
        "latents must give 6 tokens to each of 2 rows, got 9 for 2",
    )
    short = {"attention_mask": torch.ones(2, 3)}
    yield lambda a, b: a(**{**b, **short}), r"attention_mask must have the shape of input_ids \(2, 15\), got \(2, 3\)"
    yield (
        lambda a, b: a.generate(**b, token_type_ids=torch.ones(2, 3)),
        r"token_type_ids must have the shape of input_ids \(2, 15\), got \(2, 3\)",
    )
    yield (
        lambda a, b: a.generate(**b, retrieved=(values, mask), encoder_repetition_penalty=1.2),
        "encoder_repetition_penalty must be 1 where retrieval ids lie outside the vocabulary, got 1.2",
    )
    yield lambda a, b: a.generate_batch([[1, 2]]), "must come as rows of one batch, got a call of continuous batching"
    yield lambda a, b: a.init_continuous_batching(), "got a call of continuous batching"
    yield lambda a, b: a.continuous_batching_context_manager(), "got a call of continuous batching"
    yield lambda a, b: a(**b, labels=torch.zeros(2, 3)), "labels must have the shape of input_ids .* got .2, 3."
    yield lambda a, b: a.train()(**b), "sample_ids must be given in training, got None"
    yield lambda a, b: a(**b, retrieval="prompt"), "retrieval must be an arm of the bank, got 'prompt'"
    yield lambda a, b: a(**b, retrieval="magic"), "retrieval must be one of"
    yield lambda a, b: a.splice(b), "input_ids must hold no retrieval token yet, got 120 in them"
    yield lambda a, b: a.processor(text="x"), "a processor must be attached, got None"
    yield lambda a, b: a(**b, retrieval="off"), "must hold no retrieval token 120 without latents"
    yield (
        lambda a, b: a(**F.batch_of("llava", F.ROWS), retrieved=(values, mask)),
        r"every row must hold 6 retrieval tokens, got \[0, 0\]",
    )


@pytest.mark.parametrize("case", range(len(list(calls()))))
def test_a_call_that_does_not_fit(case: int) -> None:
    call, message = list(calls())[case]
    aligned, batch = prepared()
    with pytest.raises(ValueError, match=message):
        call(aligned, batch)
    values, mask = F.latents()
    aligned.eval()(**batch, retrieved=(values, mask))  # and the next call is unharmed


@pytest.mark.parametrize(
    ("name", "meant"), [("neighbor_ids", "neighbour_ids"), ("sample_id", "sample_ids"), ("rag_latents", "retrieved")]
)
def test_a_slip_in_a_name_is_not_swallowed(name: str, meant: str) -> None:
    aligned, batch = prepared()
    with pytest.raises(TypeError, match=f"got '{name}', which the model would ignore. Say {meant}="):
        aligned(**batch, **{name: torch.zeros(2, 2)})


def test_more_retrieval_tokens_than_latents() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    message = "rows must hold at most the 3 retrieval tokens that were retrieved, got 6"
    with pytest.raises(ValueError, match=message), aligned.use(values[:, :1], mask[:, :1]):
        aligned.model(**batch)


def test_a_model_that_is_attached_inside_a_wrapper_is_not_attached_again() -> None:
    from peft import LoraConfig, get_peft_model

    model = F.build("llama")
    attach_memory(model, connector=connector())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="vlm must not be attached already, got PeftModel with a branch"):
        attach_memory(wrapped, connector=connector())


def test_no_bank_and_no_query() -> None:
    aligned, batch = prepared("llama")
    with pytest.raises(ValueError, match="query must be attached to search, got None"):
        aligned(**batch)
    aligned._memory.value = None
    with pytest.raises(ValueError, match="memory must be attached to retrieve, got None"):
        aligned(**batch)


def test_latents_that_are_never_read_are_noticed() -> None:
    aligned, _ = prepared("llama")
    embeds = aligned.model.get_input_embeddings()(torch.ones(2, 4, dtype=torch.long))
    message = "must look its input_ids up, got retrieved latents and no look-up"
    with pytest.raises(RuntimeError, match=message), aligned.use(*F.latents()):
        aligned.model(inputs_embeds=embeds)
    message = "only one set of tokens may be in use, got a second"
    with pytest.raises(RuntimeError, match=message), aligned.use(*F.latents()), aligned.use(*F.latents()):
        pass
    message = "input_ids must have 2 rows or a multiple, got 3"
    with pytest.raises(ValueError, match=message), aligned.use(*F.latents()):
        aligned.model(input_ids=torch.full((3, 8), 120))


def test_an_unknown_companion_is_refused() -> None:
    batch = {"input_ids": torch.tensor([[1, 5]]), "weights_per_token": torch.ones(1, 2)}
    with pytest.raises(
        ValueError, match=r"tensors beside input_ids must be known by name, got 'weights_per_token' of shape \(1, 2\)"
    ):
        splice_rag(batch, 120, 2)


def test_mllamas_mask_lets_retrieval_look_where_the_image_token_looks() -> None:
    looks = torch.tensor([[[0], [1], [0]], [[0], [0], [1]]])[..., None]  # (B, S, images, tiles)
    batch = {"input_ids": torch.tensor([[1, 100, 5], [1, 6, 100]]), "cross_attention_mask": looks}
    spliced = splice_rag(batch, 120, 2, image_ids=[100])["cross_attention_mask"][..., 0, 0]
    assert spliced.tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_companions_are_extended_by_name() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 100, 100, 103, 5], [0, 0, 1, 6, 7]]),
        "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 5], [-100, -100, -100, 6, 7]]),
        "token_type_ids": torch.tensor([[0, 1, 1, 0, 0], [0] * 5]),
        "pixel_values": torch.zeros(2, 5, 3),  # begins with (B, S) by chance
        "note": "kept",
    }
    spliced = splice_rag(batch, 120, 2, image_ids=[100], end_ids=[103], bos_id=1)
    assert spliced["input_ids"].tolist() == [[1, 100, 100, 103, 120, 120, 5], [0, 0, 1, 120, 120, 6, 7]]
    assert spliced["attention_mask"].tolist() == [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]
    assert spliced["labels"].tolist() == [[-100] * 6 + [5], [-100] * 5 + [6, 7]]
    assert spliced["token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert spliced["pixel_values"] is batch["pixel_values"]
    assert spliced["note"] == "kept"

"""What an attached branch promises beyond the families' forward and generate."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinyalign.connectors import RAGConnector
from tinyalign.memory import AttentionPooledKey, FingerprintMismatch, MemoryBank
from tinyalign.models import TowerQuery, attach_memory, load_attached, splice_rag


def _families() -> ModuleType:
    """The builders of the family tests, under a name that spawned processes can find as well."""
    spec = importlib.util.spec_from_file_location(
        "attach_families", Path(__file__).with_name("test_attach_families.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


F = _families()
VISION = [name for name in F.FAMILIES if name != "mllama"]  # Mllama has no get_image_features
TWO_IMAGES = ["llava", "pixtral", "llava_next", "paligemma", "qwen2_vl", "qwen3_vl", "internvl", "gemma3", "mistral3"]


def prepared(name: str = "llava", rows: Any = None, images: int = 2) -> tuple[Any, dict[str, Any]]:
    aligned = F.attach(F.build(name))
    return aligned, aligned.splice(F.batch_of(name, F.ROWS if rows is None else rows, F.pictures(name, images)))


@pytest.mark.parametrize("name", VISION)
def test_queries_are_the_towers_own_tokens_row_by_row(name: str) -> None:
    """Each row's query is pooled from its own images, before the projector, whatever layout the family has."""
    aligned, batch = prepared(name)
    queries, has_query = aligned.queries(batch)
    assert has_query.tolist() == [True, True]
    both = F.pictures(name, 2)
    for at, row in enumerate(F.ROWS):
        share = {n: v[at * (len(v) // 2) : (at + 1) * (len(v) // 2)] for n, v in both.items()}
        alone, _ = aligned.queries(aligned.splice(F.batch_of(name, [row], share)))
        torch.testing.assert_close(alone[0], queries[at], rtol=1e-4, atol=1e-5)
    assert (queries[0] - queries[1]).abs().max() > 1e-4
    bank = MemoryBank(key_dim=queries.shape[1], value_shape=(F.L, F.LATENT))
    bank.add(torch.randn(9, queries.shape[1]), torch.randn(9, F.L, F.LATENT))
    aligned._memory.value = bank
    found = aligned(**batch).logits
    values, mask = bank.gather(bank.neighbours(queries, F.K).ids)
    torch.testing.assert_close(found, aligned(**batch, retrieved=(values, mask)).logits)
    with torch.no_grad():  # a projector that learns must not move the queries
        for part, parameter in aligned.model.named_parameters():
            if "projector" in part or "connector" in part or "merger" in part:
                parameter.add_(torch.randn_like(parameter))
    if name != "qwen3_vl":  # its tower merges inside
        torch.testing.assert_close(aligned.queries(batch)[0], queries)


@pytest.mark.parametrize("name", TWO_IMAGES)
def test_two_images_in_one_row_and_text_alone_in_another(name: str) -> None:
    rows = [[1, -1, 5, -1, 6], [1, 8, 9]]
    aligned, batch = prepared(name, rows)
    run = F.image_tokens(name) + (1 if name in F.CLOSED else 0)
    marked = (batch["input_ids"] == aligned.rag_token_id).nonzero()
    first = [int(marked[marked[:, 0] == row, 1][0]) for row in range(2)]
    pad = int((batch["attention_mask"][1] == 0).sum())
    assert first == [2 * run + 2, pad + 1]  # behind the second image; behind BOS
    values, mask = F.latents()
    logits = aligned(**batch, retrieved=(values, mask)).logits
    bare, words = F.reference(
        aligned.model, batch, aligned.rag_token_id, aligned.connector(values, mask).tokens.detach()
    )
    columns = [c for c in range(120) if not F.SPARE <= c < F.SPARE + 12]
    keep = batch["attention_mask"].bool()
    expected = bare(**words).logits
    torch.testing.assert_close(logits[keep][:, columns], expected[keep][:, columns], rtol=2e-4, atol=2e-4)
    if name not in ("internvl",):
        assert aligned.queries(batch)[1].tolist() == [True, False]


def test_a_row_without_neighbours_reads_as_if_nothing_were_there() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    mask[1] = False
    found = aligned(**batch, retrieved=(values, mask)).logits
    keep = batch["input_ids"][1] != aligned.rag_token_id
    plain = F.batch_of("llava", F.ROWS, F.pictures("llava", 2))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = aligned.model(
        **plain,
        position_ids=positions[:, batch["input_ids"][1] != aligned.rag_token_id][:, -plain["input_ids"].shape[1] :],
    )
    torch.testing.assert_close(found[1, keep][-3:], alone.logits[1, -3:], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", F.EVERY)
def test_checkpointing_and_autocast_keep_the_gradient(name: str) -> None:
    values, mask = F.latents()

    def gradient(prepare: Any, **context: Any) -> torch.Tensor:
        aligned, batch = prepared(name)
        prepare(aligned.model.train())
        labels = torch.where(batch["input_ids"] < 50, batch["input_ids"], -100)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(context)):
            loss = aligned.train()(**batch, labels=labels, retrieved=(values, mask)).loss
        loss.backward()
        return aligned.connector.mlp.layers[0].weight.grad  # type: ignore[no-any-return]

    plain = gradient(lambda model: None)
    again = gradient(lambda model: model.gradient_checkpointing_enable())
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
    half = gradient(lambda model: None, autocast=True)
    assert torch.nn.functional.cosine_similarity(half.flatten(), plain.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("first", ["peft", "attach"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "idefics3", "llama"])
def test_peft_in_either_order(name: str, first: str) -> None:
    """LoRA before or behind the branch; embeddings in modules_to_save are copied, hooks and all, and replaced."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=r".*(q_proj|v_proj)", modules_to_save=["embed_tokens"])
    model = F.build(name)
    if first == "peft":
        aligned = F.attach(get_peft_model(model, lora))
        outer = aligned
    else:
        aligned = F.attach(model)
        lora.modules_to_save = ["embed_tokens", "connector"] if name != "idefics3" else ["embed_tokens"]
        outer = get_peft_model(aligned, lora)
    batch = aligned.splice(F.batch_of(name, F.ROWS, F.pictures(name, 2)))
    values, mask = F.latents()
    outer.eval()
    logits = outer(**batch, retrieved=(values, mask)).logits
    plain = F.attach(F.build(name))
    torch.testing.assert_close(logits, plain(**batch, retrieved=(values, mask)).logits)  # LoRA starts at zero
    new = aligned.generate(**batch, retrieved=(values, mask), max_new_tokens=3, do_sample=False)
    assert torch.equal(new, plain.generate(**batch, retrieved=(values, mask), max_new_tokens=3, do_sample=False))
    outer.train()
    labels = torch.where(batch["input_ids"] < 50, batch["input_ids"], -100)
    outer(**batch, labels=labels, retrieved=(values, mask)).loss.backward()
    trained = {n for n, p in outer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in part for part in trained)
    if first == "peft" or name != "idefics3":
        assert any("connector.mlp" in part or "connector.modules_to_save" in part for part in trained)


def test_save_and_load_around_the_untouched_model(tmp_path: Path) -> None:
    aligned, batch = prepared()
    aligned.memory.save(tmp_path / "run" / "bank")
    aligned.save_pretrained(tmp_path / "run" / "adapter")
    assert {path.name for path in (tmp_path / "run/adapter").iterdir()} == {
        "adapter_config.json",
        "adapter.safetensors",
    }
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["memory_path"] == "../bank"
    expected = aligned(**batch, sample_ids=torch.tensor([0, 5])).logits
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = load_attached(F.build("llava"), tmp_path / "moved" / "adapter").eval()
    assert len(again.memory) == 12  # type: ignore[arg-type]
    torch.testing.assert_close(again(**batch, sample_ids=torch.tensor([0, 5])).logits, expected)
    aligned.detach().save_pretrained(tmp_path / "base")  # the model's own checkpoint holds nothing of ours
    from transformers import LlavaForConditionalGeneration

    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


def test_what_else_was_trained_is_saved_too(tmp_path: Path) -> None:
    aligned, batch = prepared()
    projector = aligned.model.model.multi_modal_projector
    projector.requires_grad_(True)
    with torch.no_grad():
        for parameter in [*projector.parameters(), *aligned.connector.parameters()]:
            parameter.add_(0.1)
    aligned.save_pretrained(tmp_path)
    again = load_attached(F.build("llava"), tmp_path).eval()
    values, mask = F.latents()
    given = {**batch, "retrieved": (values, mask)}
    torch.testing.assert_close(again(**given).logits, aligned(**given).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_number": 7}, "format_number must be 1, got 7"),
        ({"model_class": "Other"}, "model_class must be 'LlavaForConditionalGeneration', got 'Other'"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    aligned, _ = prepared()
    aligned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_attached(F.build("llava"), tmp_path)


def test_an_adapter_with_other_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    aligned, _ = prepared()
    aligned.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter.safetensors")
    weights["connector.extra"] = weights.pop("connector.mlp.layers.0.bias")
    save_file(weights, tmp_path / "adapter.safetensors")
    model = F.build("llava")
    with pytest.raises(
        ValueError, match=r"missing \['connector\.mlp\.layers\.0\.bias'\] and unexpected \['connector\.extra'\]"
    ):
        load_attached(model, tmp_path)
    F.attach(model)  # and the model is free again


def test_a_context_serves_the_bare_model() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    expected = aligned(**batch, retrieved=(values, mask)).logits
    with aligned.use(values, mask):
        torch.testing.assert_close(aligned.model(**batch).logits, expected)
    with pytest.raises(ValueError, match="must hold no retrieval token 120 without latents"):
        aligned.model(**batch)


def test_beams_repeat_a_rows_latents_beside_each_other() -> None:
    aligned, batch = prepared()
    values, mask = F.latents()
    given = {
        "max_new_tokens": 4,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "suppress_tokens": [100],
    }
    together = F.new_ids(
        aligned.generate(**batch, retrieved=(values, mask), **given),
        {"input_ids": batch["input_ids"].repeat_interleave(2, 0)},
    )
    pictures = {n: v[1:] for n, v in F.pictures("llava", 2).items()}
    one = aligned.splice(F.batch_of("llava", F.ROWS[1:], pictures))
    alone = F.new_ids(
        aligned.generate(**one, retrieved=(values[1:], mask[1:]), **given), {"input_ids": one["input_ids"].repeat(2, 1)}
    )
    assert together[2:] == alone


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


def test_retrieval_positions_are_never_labels() -> None:
    """Labels copied from the ids hold retrieval ids, which no vocabulary has."""
    aligned, batch = prepared()
    ids, given = batch["input_ids"], {**batch, "retrieved": F.latents()}
    copied = ids.masked_fill(ids == F.IMAGE, -100)
    named = copied.masked_fill(ids == aligned.rag_token_id, -100)
    torch.testing.assert_close(aligned(**given, labels=copied).loss, aligned(**given, labels=named).loss)
    assert (copied == aligned.rag_token_id).any()  # the caller's tensor is left as it was


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


def test_a_query_of_ones_own_and_a_bank_that_does_not_fit_it() -> None:
    model = F.build("llava")
    named = {"key.encoder": "a", **AttentionPooledKey().fingerprint()}
    bank = MemoryBank(key_dim=32, value_shape=(F.L, F.LATENT), fingerprint=named)
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder "):
        attach_memory(model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH))
    attach_memory(
        model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH), query=lambda batch: torch.ones(2, 32)
    ).detach()
    own = TowerQuery(model).fingerprint()
    bank = MemoryBank(key_dim=32, value_shape=(F.L, F.LATENT), fingerprint=own)
    attach_memory(model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH)).detach()
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.add_(1.0)
    with pytest.raises(FingerprintMismatch, match=r"key\.encoder_weights"):
        attach_memory(model, memory=bank, connector=RAGConnector(F.LATENT, F.WIDTH))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a rank that waits for ever fails instead
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    aligned, _ = prepared()
    parallel = DistributedDataParallel(aligned.train())
    for _ in range(2):
        aligned.zero_grad()
        parallel(**_half(aligned, rank)).loss.backward()
    torch.save([p.grad for p in aligned.connector.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _half(aligned: Any, rank: int) -> dict[str, Any]:
    pictures = {n: v[rank : rank + 1] for n, v in F.pictures("llava", 2).items()}
    batch = aligned.splice(F.batch_of("llava", F.ROWS[rank : rank + 1], pictures))
    values, mask = F.latents()
    labels = torch.where(batch["input_ids"] < 50, batch["input_ids"], -100)
    return {**batch, "labels": labels, "retrieved": (values[rank : rank + 1], mask[rank : rank + 1])}


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    aligned, _ = prepared()
    halves = []
    for rank in range(2):
        aligned.zero_grad()
        aligned.train()(**_half(aligned, rank)).loss.backward()
        halves.append([p.grad.clone() for p in aligned.connector.parameters()])
    for found, other, one, two in zip(*(torch.load(tmp_path / f"{r}.pt") for r in range(2)), *halves, strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=0)
        torch.testing.assert_close(found, (one + two) / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_trainer_runs_and_resumes(tmp_path: Path, name: str) -> None:
    from transformers import Trainer, TrainingArguments

    aligned = F.attach(F.build(name))

    def collate(samples: list[int]) -> dict[str, Any]:
        batch = aligned.splice(F.batch_of(name, F.ROWS, F.pictures(name, 2, seed=samples[0])))
        labels = torch.where(batch["input_ids"] < 50, batch["input_ids"], -100)
        return {**batch, "labels": labels, "sample_ids": torch.tensor(samples[:2])}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, remove_unused_columns=False, prediction_loss_only=True, disable_tqdm=True, save_steps=4,
        seed=0, per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer = Trainer(
        model=aligned, args=arguments, train_dataset=list(range(8)), eval_dataset=[0, 1], data_collator=collate
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    resumed = F.attach(F.build(name))  # Gemma's head is tied to its embeddings, which safetensors would refuse
    trainer = Trainer(model=resumed, args=arguments, train_dataset=list(range(8)), data_collator=collate)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, two in zip(aligned.connector.parameters(), resumed.connector.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    twin = F.attach(F.build(name))
    twin.load_state_dict(aligned.state_dict())  # strictly


def _llava_processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, **{f"w{at}": at for at in range(4, 100)}, "<image>": 100}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<pad>", "<s>", "</s>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    )  # fmt: skip


def test_the_models_own_processor_places_the_tokens() -> None:
    from PIL import Image

    aligned = F.attach(F.build("llava"), processor=_llava_processor())
    red, text = Image.new("RGB", (20, 20), "red"), ["<s> <image> w5 w6", "<s> w7 <image> w8 w9"]
    inputs = aligned.processor(images=[red, red], text=text, padding=True, padding_side="left")
    rag = [aligned.rag_token_id] * 6
    assert inputs["input_ids"].tolist() == [
        [0, 1, *[100] * 4, *rag, 5, 6],
        [1, 7, *[100] * 4, *rag, 8, 9],
    ]
    assert inputs["attention_mask"].tolist() == [[0, *[1] * 13], [1] * 14]
    assert aligned.generate(**inputs, max_new_tokens=2, suppress_tokens=[100]).shape[0] == 2
    plain = aligned.processor(images=[red], text=text[:1], retrieval="off")
    assert plain["input_ids"].tolist() == [[1, *[100] * 4, 5, 6]]
    assert torch.equal(aligned(**plain, retrieval="off").logits, aligned.model(**plain).logits)
    alone = aligned.processor(text=["<s> w5"])
    assert alone["input_ids"].tolist() == [[1, *rag, 5]]


# What is refused


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
    batch = aligned.splice(F.batch_of("llama", F.ROWS, {}))
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
        "rows must hold at most the 3 retrieval tokens .* got 6",
    )
    yield lambda a, b: a(**b, labels=torch.zeros(2, 3)), "labels must have the shape of input_ids .* got .2, 3."
    yield lambda a, b: a.train()(**b), "sample_ids must be given in training, got None"
    yield lambda a, b: a(**b, retrieval="prompt"), "retrieval must be an arm of the bank, got 'prompt'"
    yield lambda a, b: a(**b, retrieval="magic"), "retrieval must be one of"
    yield lambda a, b: a.splice(b), "input_ids must hold no retrieval token yet, got 120 in them"
    yield lambda a, b: a.processor(text="x"), "a processor must be attached, got None"
    yield lambda a, b: a(**b, retrieval="off"), "must hold no retrieval token 120 without latents"
    yield (
        lambda a, b: a(**F.batch_of("llava", F.ROWS, F.pictures("llava", 2)), retrieved=(values, mask)),
        r"every row must hold 6 retrieval tokens, got \[0, 0\]",
    )


@pytest.mark.parametrize("case", range(11))
def test_a_call_that_does_not_fit(case: int) -> None:
    call, message = list(calls())[case]
    aligned, batch = prepared()
    with pytest.raises(ValueError, match=message):
        call(aligned, batch)
    values, mask = F.latents()
    aligned.eval()(**batch, retrieved=(values, mask))  # and the next call is unharmed


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


def test_towers_of_another_layout_are_refused() -> None:
    from tinyalign.models.rag_query import _owners, _per_image

    with pytest.raises(
        ValueError, match=r"tower must give tokens that can be told apart by image, got \(2, 3, 4, 4\) for 2"
    ):
        _per_image(torch.zeros(2, 3, 4, 4), [4, 4], {})
    with pytest.raises(
        ValueError, match=r"placeholders must match the image tokens, got \[3\] placeholders for images of"
    ):
        _owners([3], [4])


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

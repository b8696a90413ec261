from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tinyalign.models import TinyAlignVLM
from tinyalign.models.assembly import Batch, embed_batch

FAMILIES = ["llama", "phi", "qwen2", "gemma", "gemma2", "stablelm", "lfm2"]


def batch(build: Any) -> dict[str, Any]:
    """Three rows: one image, two images, text alone."""
    generator = torch.Generator().manual_seed(2)
    rows = [build.row(1, "image", 5, 6, 7), build.row(1, "image", 8, "image", 9, 10), [1, 11, 12]]
    ids, keep = build.pad(rows)
    labels = torch.where(keep & (ids > 5), ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": keep,
        "labels": labels,
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "image_counts": torch.tensor([1, 2, 0]),
        "sample_ids": torch.tensor([3, 8, 500]),
        "max_supervised_tokens": 3,
    }


def grads(model: TinyAlignVLM, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TRAINED = {
    ("pretrain", "bank"): {"connector", "rag_connector"},
    ("pretrain", "off"): {"connector"},
    ("pretrain", "prompt"): {"connector", "rag_connector", "prompt_latents"},
    ("instruct", "bank"): {"connector", "rag_connector", "language_model"},
}


@pytest.mark.parametrize(("stage", "arm"), TRAINED)
def test_each_stage_trains_its_parts_and_reaches_all_of_them(build: Any, stage: str, arm: str) -> None:
    model = build.model(retrieval=arm, rag_gate=True, rag_num_ranks=2).freeze_for(stage).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = grads(model, batch(build))
    assert {name.split(".")[0] for name in found} == TRAINED[stage, arm]
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == TRAINED[stage, arm]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_no_gradient(build: Any, family: str) -> None:
    inputs = batch(build)
    for stage in ("pretrain", "instruct"):
        plain = grads(build.model(family).freeze_for(stage).train(), inputs)
        model = build.model(family).freeze_for(stage).train()
        model.gradient_checkpointing_enable()
        again = grads(model, inputs)
        assert plain.keys() == again.keys()
        for name in plain:
            torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_trains(build: Any, family: str) -> None:
    """Autocast over float32 weights, and a bfloat16 backbone under float32 connectors."""
    inputs, exact = batch(build), build.model(family).train()(**batch(build)).loss.item()
    model = build.model(family).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.03)
    half = build.model(family).train()
    half.language_model.to(torch.bfloat16)
    half.vision.to(torch.bfloat16)
    output = half(**inputs)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact, rel=0.05)
    assert half.connector.layers[0].weight.grad.dtype == torch.float32
    assert torch.isfinite(half.connector.layers[0].weight.grad).all()


def test_a_row_learns_from_itself_alone(build: Any) -> None:
    """The gradient of one row's loss with respect to another row's retrieved latents is zero."""
    model, inputs = build.model().train(), batch(build)
    values = torch.randn(3, 2, 3, 8, requires_grad=True)
    output = model(**inputs, retrieved=(values, torch.ones(3, 2, dtype=torch.bool)))
    output.per_sample_nll[0].backward()
    assert values.grad is not None
    assert values.grad[0].abs().sum() > 0
    assert (values.grad[1:] == 0).all()


def test_peft_trains_saves_and_merges_with_the_connectors(build: Any, tmp_path: Path) -> None:
    """LoRA in earlier code never saved the retrieval connector."""
    from peft import LoraConfig, PeftModel, get_peft_model

    inputs = batch(build)
    lora = LoraConfig(
        r=2, target_modules=r"language_model\..*(q_proj|v_proj)", modules_to_save=["connector", "rag_connector"]
    )
    model = get_peft_model(build.model(), lora).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"connector", "rag_connector"} <= {part for name in trained for part in name.split(".")}
    assert any("lora_A" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    model.eval()
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_counts")}
    expected = model(**asked).logits
    again = PeftModel.from_pretrained(build.model(), tmp_path).eval()
    torch.testing.assert_close(again(**asked).logits, expected)
    assert not torch.allclose(build.model()(**asked).logits, expected, atol=1e-4)
    ids, keep = build.pad([build.row(1, "image", 5), [1, 7]], left=True)
    prompt = {"input_ids": ids, "attention_mask": keep, "pixel_values": inputs["pixel_values"][:1]}
    new = again.generate(**prompt, max_new_tokens=3, do_sample=False)
    merged = again.merge_and_unload()
    assert type(merged) is TinyAlignVLM
    torch.testing.assert_close(merged(**asked).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(**prompt, max_new_tokens=3, do_sample=False), new)


def test_peft_inside_keeps_its_choice(build: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = build.model()
    model.language_model = get_peft_model(model.language_model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.freeze_for("instruct").train()
    found = grads(model, batch(build))
    inner = {name for name in found if name.startswith("language_model")}
    assert inner
    assert all("lora_" in name for name in inner)


def test_a_batch_without_images_still_reaches_every_parameter(build: Any) -> None:
    """Under data parallelism a rank whose batch is text alone must join the reduction, or all ranks wait."""
    model = build.model().train()
    ids = torch.tensor([[1, 5, 6]])
    found = grads(model, {"input_ids": ids, "labels": ids, "sample_ids": torch.tensor([3])})
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all((grad == 0).all() for grad in found.values())  # it joins, and adds nothing


def _rank(rank: int, folder: str) -> None:
    """One of two processes: rank 0 has the rows with images, rank 1 text alone."""
    import importlib.util
    from types import SimpleNamespace

    spec = importlib.util.spec_from_file_location("model_builders", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a rank that waits for ever fails instead
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    build = SimpleNamespace(row=builders.image_row, pad=builders.pad_rows)
    model = builders.make_model().train()
    parallel = DistributedDataParallel(model)
    whole = batch(build)
    for _ in range(2):  # a second step fails if the first left a reduction unfinished
        model.zero_grad()
        parallel(**_half(whole, rank)).loss.backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/{rank}.pt")
    dist.barrier()
    # Taking a process group down from under DDP can wait for ever: its thread needs the lock that the destructor holds.
    os._exit(0)


def _half(whole: dict[str, Any], rank: int) -> dict[str, Any]:
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    part = {n: v[rows] for n, v in whole.items() if isinstance(v, torch.Tensor) and n != "pixel_values"}
    return part | ({"pixel_values": whole["pixel_values"]} if rank == 0 else {})


def test_two_processes_average_the_gradients_of_one(build: Any, tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = build.model().train()
    halves = [grads(model, _half(batch(build), rank)) for rank in range(2)]
    assert first.keys() == second.keys() == halves[0].keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_computes_what_the_processor_does(build: Any, family: str) -> None:
    inputs = batch(build)
    expected = build.model(family).train()(**inputs)
    model = build.model(family).train().to("cuda")
    moved = {n: v.to("cuda") if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    found = model(**moved)
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.neighbour_ids.cpu(), expected.neighbour_ids)
    found.loss.backward()
    assert model.rag_connector is not None
    assert model.rag_connector.mlp.layers[0].weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_assembling_a_batch_with_values_at_hand_waits_for_nothing(build: Any) -> None:
    """No device-to-host copy of ours before the language model (whose own mask code may ask the device)."""
    model = build.model().train().to("cuda")
    inputs = {n: v.to("cuda") for n, v in batch(build).items() if isinstance(v, torch.Tensor)}
    values = (torch.randn(3, 2, 3, 8, device="cuda"), torch.ones(3, 2, dtype=torch.bool, device="cuda"))
    features = model.vision(inputs.pop("pixel_values"))
    given = Batch(**inputs, image_features=features, retrieved=values)
    embed_batch(model, given, "bank")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        embed_batch(model, given, "bank")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _trainer(build: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [
        {"ids": build.row(1, "image", 5 + i, 6 + i, *range(7, 7 + i % 3)), "pixels": torch.randn(1, 3, 16, 16), "at": i}
        for i in range(12)
    ]

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        ids, keep = build.pad([sample["ids"] for sample in samples])
        labels = torch.where(keep & (ids > 4), ids, -100)
        pixels = torch.cat([sample["pixels"] for sample in samples])
        numbers = torch.tensor([sample["at"] for sample in samples])
        return {
            "input_ids": ids,
            "attention_mask": keep,
            "labels": labels,
            "pixel_values": pixels,
            "sample_ids": numbers,
        }

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=1e-2, seed=0, report_to=[], use_cpu=True, logging_steps=1,
        save_steps=2, remove_unused_columns=False, prediction_loss_only=True, disable_tqdm=True,
        lr_scheduler_type="constant",
        **{"per_device_train_batch_size": 4, **options},
    )  # fmt: skip
    model = build.model().freeze_for("pretrain")
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def test_trainer_trains_evaluates_and_resumes(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = _trainer(build, tmp_path / "whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    assert (tmp_path / "whole/checkpoint-2/model.safetensors").exists()
    torch.manual_seed(0)
    resumed = _trainer(build, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(two, one, msg=name)


def test_accumulated_batches_weigh_every_token_alike(build: Any, tmp_path: Path) -> None:
    """Rows have one to three answer tokens more than others: averaging per batch would weigh them wrongly."""
    torch.manual_seed(0)
    once = _trainer(build, tmp_path / "a", per_device_train_batch_size=4)
    once.train()
    torch.manual_seed(0)
    twice = _trainer(build, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    twice.train()
    for (name, one), (_, two) in zip(once.model.named_parameters(), twice.model.named_parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=2e-3, atol=2e-4, msg=name)

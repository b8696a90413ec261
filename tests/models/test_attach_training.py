"""Attached models in the training loops that people use: Trainer, two processes, checkpoints of whole calls."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import attach_families as F
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

QUICK = ["llava", "qwen2_vl", "mllama", "blip2", "llama"]
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in F.EVERY]


def collator(aligned: Any, name: str) -> Any:
    def collate(samples: list[int]) -> dict[str, Any]:
        rows = [[1, -1 - sample, 5 + sample, 20 + sample, 2] for sample in samples]
        batch = F.supervised(aligned.splice(F.batch_of(name, rows)))
        own = torch.tensor(samples)
        if name in F.LANGUAGE:  # no tower to ask by
            return {**batch, "neighbour_ids": torch.stack([own % 3 + 1, own % 5 + 1], dim=1)}
        return {**batch, "sample_ids": own}

    return collate


@pytest.mark.parametrize("name", EVERY)
def test_trainer_trains_evaluates_and_resumes(tmp_path: Path, name: str) -> None:
    from transformers import Trainer, TrainingArguments

    def trainer(aligned: Any, steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, remove_unused_columns=False, prediction_loss_only=True, disable_tqdm=True, save_steps=2,
            seed=0, per_device_eval_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        return Trainer(
            model=aligned, args=arguments, train_dataset=list(range(8)), eval_dataset=[0, 1, 2, 3],
            data_collator=collator(aligned, name),
        )  # fmt: skip

    aligned = F.attach(F.build(name))
    frozen = {n: p.clone() for n, p in aligned.model.named_parameters()}
    whole = trainer(aligned, 4)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    for part, parameter in aligned.model.named_parameters():
        assert torch.equal(parameter, frozen[part])
    resumed = F.attach(F.build(name))  # Gemma's head is tied to its embeddings, which safetensors would refuse
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, two in zip(aligned.connector.parameters(), resumed.connector.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    twin = F.attach(F.build(name))
    twin.load_state_dict(aligned.state_dict())  # strictly


def half(aligned: Any, name: str, rank: int) -> dict[str, Any]:
    batch = F.supervised(aligned.splice(F.batch_of(name, F.ROWS[rank : rank + 1])))
    values, mask = F.latents()
    return {**batch, "retrieved": (values[rank : rank + 1], mask[rank : rank + 1])}


def steady(aligned: Any) -> Any:
    """In training, but for dropout, so that one process can repeat what two did."""
    for module in aligned.modules():
        for name in ("dropout", "attention_dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return aligned.train()


def rank_main(rank: int, folder: str, names: list[str]) -> None:
    """Run families in turn; rank 1 finds nothing in the first step and does without retrieval in the last."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=240)  # a rank that waits for ever fails instead
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    gradients = {}
    for name in names:
        torch.manual_seed(0)
        aligned = F.attach(F.build(name))
        parallel = DistributedDataParallel(steady(aligned))
        gradients[name] = []
        for step in range(3):
            aligned.zero_grad()
            batch = half(aligned, name, rank)
            values, mask = batch.pop("retrieved")
            batch["retrieved"] = (values, mask & (rank == 0 or step > 0))
            if rank == 1 and step == 2:
                batch = {**F.supervised(F.batch_of(name, F.ROWS[1:])), "retrieval": "off"}
            parallel(**batch).loss.backward()
            gradients[name].append([p.grad.clone() for p in aligned.connector.parameters()])
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.barrier()
    # Taking a process group down from under DDP can wait for ever: its thread needs the lock that the destructor holds.
    os._exit(0)


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_every_family(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path), list(F.EVERY)), nprocs=2)
    written = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in F.EVERY:
        aligned = steady(F.attach(F.build(name)))
        for step, seen in enumerate(((0,), (0, 1), (0,))):
            halves = []
            for rank in seen:
                aligned.zero_grad()
                aligned(**half(aligned, name, rank)).loss.backward()
                halves.append([p.grad.clone() for p in aligned.connector.parameters()])
            for at, (found, other) in enumerate(zip(written[0][name][step], written[1][name][step], strict=True)):
                torch.testing.assert_close(found, other, rtol=0, atol=0, msg=name)
                expected = sum(gradient[at] for gradient in halves) / 2
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=f"{name} step {step}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_whole_call_finds_its_latents_again(reentrant: bool) -> None:
    """The call runs a second time in the backward pass, when any context around the first is gone."""
    aligned = F.attach(F.build("llava"))
    batch = F.supervised(aligned.splice(F.batch_of("llava", F.ROWS)))
    values, mask = F.latents()
    gradients = []
    for outside in (
        lambda call, given: call(given),
        lambda call, given: checkpoint(call, given, use_reentrant=reentrant),
    ):
        aligned.zero_grad()
        given = values.clone().requires_grad_()
        outside(lambda latents: aligned(**batch, retrieved=(latents, mask)).loss, given).backward()
        gradients.append([given.grad, *(p.grad.clone() for p in aligned.connector.parameters())])
    for one, two in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, two)


def test_a_step_without_retrieval_gives_zeros_and_changes_no_bit() -> None:
    aligned = F.attach(F.build("llava")).train()
    batch = F.supervised(F.batch_of("llava", F.ROWS))
    with torch.no_grad():
        untouched = aligned.model(**batch).loss
        next(aligned.connector.parameters()).fill_(torch.nan)  # even then
    loss = aligned(**batch, retrieval="off").loss
    assert torch.equal(loss, untouched)
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in aligned.connector.parameters())


def test_the_embeddings_of_a_model_that_trains_whole_learn_beside_the_branch() -> None:
    """Words get their gradient, retrieval positions none: what stands there is not the table's."""
    aligned = F.attach(F.build("llama").requires_grad_(True)).train()
    batch = F.supervised(aligned.splice(F.batch_of("llama", F.ROWS)))
    aligned(**batch, retrieved=F.latents()).loss.backward()
    gradient = aligned.model.get_input_embeddings().weight.grad
    read = sorted({token for row in F.ROWS for token in row[:-1] if token > 0})  # nothing follows the last one
    assert (gradient.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == read

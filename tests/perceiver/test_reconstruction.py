"""What can be read back from held-out pairs, and training on Hugging Face's Trainer, stopped and taken up again."""

from __future__ import annotations

import math

import pytest
import torch

from tinyalign.perceiver import (
    LossWeights,
    PerceiverCompressor,
    PerceiverPretrainer,
    PerceiverSizes,
    evaluate_reconstruction,
)

SIZES = PerceiverSizes(token_dim=32, num_latents=4, latent_dim=32, num_self_attends=1, num_heads=4)


def build(seed=0, text_dim=None, **arguments):
    compressor = PerceiverCompressor(12, vocab_size=30, text_dim=text_dim, sizes=SIZES, seed=seed)
    return PerceiverPretrainer(compressor, hidden_dim=32, seed=seed, **arguments)


def example(batch=8, patches=9, words=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, patches, 12, generator=generator),
        torch.randint(1, 30, (batch, words), generator=generator),
    )


def test_the_report_equals_totals_by_hand_whatever_the_batching():
    pretrainer = build().eval()
    image, text = example(6)
    pretrainer.compressor.fit_image_scale(image)
    text_mask = torch.arange(6)[None].expand(6, -1) < torch.tensor([6, 1, 3, 0, 2, 6])[:, None]
    image_mask = torch.arange(9)[None].expand(6, -1) < torch.tensor([9, 9, 2, 9, 1, 4])[:, None]
    with torch.no_grad():
        latents = pretrainer.compressor(image, text, image_mask, text_mask)
        target = pretrainer.compressor.normalise(image)[image_mask]
        guess = pretrainer.image_reader(latents, torch.arange(9)[None])[image_mask]
        logits = pretrainer.text_reader(latents, torch.arange(6)[None]) @ pretrainer.compressor.text_embedding.weight.T
        logp = (logits / math.sqrt(32)).log_softmax(-1)[text_mask]
    explained = 1 - (((guess - target) ** 2).sum() / (target**2).sum()).item()
    wanted = text[text_mask]
    whole = {"image_features": image, "text": text, "image_mask": image_mask, "text_mask": text_mask}
    for size in (1, 4, 6):
        batches = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 6, size)]
        report = evaluate_reconstruction(pretrainer.train(), batches)
        assert pretrainer.training
        assert report.num_tokens == 18
        assert report.num_patches == 34
        assert report.image_explained == pytest.approx(explained, abs=1e-5)
        assert report.token_nll == pytest.approx(-logp.gather(1, wanted[:, None]).mean().item(), abs=1e-5)
        assert report.token_accuracy == pytest.approx((logp.argmax(1) == wanted).double().mean().item())
        assert report.text_explained is None


@pytest.mark.parametrize("training", [True, False])
def test_the_report_is_made_out_of_training_whatever_the_mode_and_puts_it_back(training):
    pretrainer, modes = build().train(training), []
    pretrainer.compressor.register_forward_hook(lambda module, *_: modes.append(module.training))
    image, text = example(2)
    evaluate_reconstruction(pretrainer, [{"image_features": image, "text": text}])
    assert (modes, pretrainer.training) == ([False], training)
    with pytest.raises(ValueError, match="last size 12"):
        evaluate_reconstruction(pretrainer, [{"image_features": image[..., :3]}])
    assert pretrainer.training == training


def test_the_report_of_embeddings_and_of_missing_parts():
    image, text = torch.randn(4, 9, 12), torch.randn(4, 6, 10)
    embedded = evaluate_reconstruction(build(text_dim=10), [{"image_features": image, "text": text}])
    assert embedded.token_nll is None
    assert embedded.text_explained is not None
    assert embedded.text_explained < 0.5  # untrained
    known = build(text_dim=10)
    normal = (text - text.mean(-1, keepdim=True)) / text.std(-1, unbiased=False, keepdim=True)
    known.text_reader.forward = lambda latents, positions: 0.75 * normal  # what is left is a quarter, squared
    left = evaluate_reconstruction(known, [{"image_features": image, "text": text}])
    assert left.text_explained == pytest.approx(15 / 16, abs=1e-4)
    only_images = evaluate_reconstruction(build(), [{"image_features": image, "text": None}])
    assert only_images == evaluate_reconstruction(build(), [{"image_features": image}])
    assert (only_images.token_nll, only_images.num_tokens) == (None, 0)
    only_text = evaluate_reconstruction(
        build(loss_weights=LossWeights(image=0.0)), [{"image_features": image, "text": example(4)[1]}]
    )
    assert only_text.image_explained is None
    with pytest.raises(ValueError, match=r"batches must hold image_features, got \['text'\]"):
        evaluate_reconstruction(build(), [{"text": torch.ones(2, 3, dtype=torch.long)}])
    with pytest.raises(ValueError, match="batches must not be empty, got 0"):
        evaluate_reconstruction(build(), [])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_the_report_takes_any_integers(kind):
    image, text = example()
    pretrainer = build()
    batches = [[{"image_features": image, "text": ids}] for ids in (text, text.to(kind))]
    one, other = (evaluate_reconstruction(pretrainer, batch) for batch in batches)
    assert one == other


def test_batches_may_lie_on_another_device():
    """As those of a `Trainer` do, which a model that was moved to the CPU could not read."""

    class Elsewhere:
        def __init__(self, tensor):
            self.tensor = tensor

        def to(self, device):
            assert device == torch.device("cpu")
            return self.tensor

    image, text = example(2)
    pretrainer, here = build(), {"image_features": image, "text": text}
    there = {name: Elsewhere(tensor) for name, tensor in here.items()}
    assert evaluate_reconstruction(pretrainer, [there]) == evaluate_reconstruction(pretrainer, [here])


class Pairs(torch.utils.data.Dataset):
    def __init__(self, seed, size=48):
        self.image, self.text = example(size, seed=seed)

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        return {"image_features": self.image[index], "text": self.text[index]}


def trainer(folder, steps, **arguments):
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        prediction_loss_only=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **arguments,
    )
    model = build(3, caption_dropout=0.3, num_patches=4)  # and captions mixed, by default
    return Trainer(model, settings, train_dataset=Pairs(0), eval_dataset=Pairs(1))


def test_trainer_trains_evaluates_and_resumes_to_the_same_weights(tmp_path):
    """Dropout, mixing and patch choice draw from torch's generator, whose state the Trainer saves and restores."""
    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    trainer(tmp_path / "parts", 4).train()
    resumed = trainer(tmp_path / "parts", 8)
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = (t.model.compressor for t in (whole, resumed))
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name

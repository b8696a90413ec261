"""The short training loop against torch's own pieces, and the parts that are trained with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinyalign.data import Sample, Turn, answers_of
from tinyalign.models.descent import Descent, descend
from tinyalign.models.tiny import TinyParts
from tinyalign.models.word_parts import train_word_parts

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The rate, and the norm of the gradients, of every step that an AdamW takes."""
    found: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        group = self.param_groups[0]
        norm = torch.stack([weight.grad.norm() for weight in group["params"]]).norm()
        found.append((group["lr"], float(norm)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    return found


@pytest.mark.parametrize("to_zero", [False, True])
def test_the_rate_rises_and_falls_as_one_cycle(to_zero: bool, taken: list[tuple[float, float]]) -> None:
    place = torch.zeros(1, requires_grad=True)
    descend(lambda step: -place.sum(), [place], Descent(steps=20, rate=0.5, warmup=0.25, to_zero=to_zero))
    total = 20 if to_zero else 21
    peak, last = 0.25 * total - 1, total - 1

    def between(low: float, high: float, share: float) -> float:
        return high + (low - high) * (1 + math.cos(math.pi * share)) / 2

    wanted = [
        between(0.02, 0.5, at / peak) if at <= peak else between(0.5, 0.02e-4, (at - peak) / (last - peak))
        for at in range(20)
    ]
    assert [rate for rate, _ in taken] == pytest.approx(wanted)
    assert (wanted[-1] < 1e-4) == to_zero


def test_decay_clipping_and_what_is_frozen(taken: list[tuple[float, float]]) -> None:
    frozen, decayed = torch.ones(1), torch.full((1,), 100.0, requires_grad=True)
    curve = descend(lambda step: 0 * decayed.sum() + step, [frozen, decayed], Descent(3, 0.1, weight_decay=0.5))
    assert curve == [0.0, 1.0, 2.0]
    assert frozen.item() == 1.0
    shrunk = math.prod(1 - rate * 0.5 for rate, _ in taken)
    assert decayed.item() == pytest.approx(100 * shrunk)
    taken.clear()
    steep = torch.zeros(2, requires_grad=True)
    descend(lambda step: 1000 * steep.sum(), [steep], Descent(2, 0.1))
    assert [norm for _, norm in taken] == pytest.approx([1.0, 1.0], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_advice() -> None:
    weight = torch.ones(1, requires_grad=True)
    losses = [1.0, 1.0, float("inf")]
    with pytest.raises(RuntimeError, match=r"there: the loss must stay finite, got inf at step 2\. Rest\."):
        descend(lambda at: losses[at] + 0 * weight.sum(), [weight], Descent(4, 0.1), where="there", advice="Rest.")
    with pytest.raises(ValueError, match=r"descend: steps must be an integer of at least 1, got 0"):
        descend(lambda step: weight.sum(), [weight], Descent(0, 0.1))


@pytest.fixture(scope="module")
def asked() -> list[Sample]:
    """A coloured square on a ground of any brightness, and two questions about each."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(120):
        name = list(COLOURS)[number % 3]
        picture = torch.full((3, 16, 16), int(torch.randint(255, (1,), generator=generator)), dtype=torch.uint8)
        left, top = (torch.randint(2, (2,), generator=generator) * 8).tolist()
        picture[:, top : top + 8, left : left + 8] = torch.tensor(COLOURS[name], dtype=torch.uint8)[:, None, None]
        turns = (
            Turn("user", "<image> Which colour?"), Turn("assistant", name),
            Turn("user", "Is it blue?"), Turn("assistant", "yes" if name == "blue" else "no"),
        )  # fmt: skip
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        found.append(Sample(str(number), number, number, (image,), turns))
    return found


@pytest.fixture(scope="module")
def parts(asked: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    folder = tmp_path_factory.mktemp("word") / "parts"
    return train_word_parts(asked, folder, image_size=16, tower_steps=40, language_steps=100)


def test_the_tower_sees_what_is_said(asked: list[Sample], parts: TinyParts) -> None:
    """Pictures of one colour lie close together, whatever their ground; in an untrained tower they do not."""
    trained, pictures = AutoModel.from_pretrained(parts.vision), AutoImageProcessor.from_pretrained(parts.vision)
    pixels = pictures(images=[sample.images[0] for sample in asked], return_tensors="pt")["pixel_values"]
    same = torch.arange(len(asked))[:, None] % 3 == torch.arange(len(asked)) % 3
    spread = []
    for tower in (trained, AutoModel.from_config(trained.config)):
        with torch.no_grad():
            seen = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].mean(dim=1)
        apart = torch.cdist(seen, seen)
        spread.append(float(apart[same].mean() / apart[~same].mean()))
    assert spread[0] < 0.3 < 0.5 < spread[1]


def test_the_language_model_answers_from_words(asked: list[Sample], parts: TinyParts) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(parts.llm), AutoModelForCausalLM.from_pretrained(parts.llm)
    right = 0
    for colour in COLOURS:
        facts = " ".join([colour] * 6)
        ids = tokenizer(f"USER: {facts} Which colour? ASSISTANT:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            best = int(model(input_ids=ids).logits[0, -1].argmax())
        right += tokenizer.decode(best) == colour
    assert right == 3


def test_parts_in_the_folder_are_not_trained_again(asked: list[Sample], parts: TinyParts) -> None:
    labels: list[str] = []
    assert train_word_parts(asked, parts.vision.parent, track=lambda steps, label: labels.append(label)) == parts  # type: ignore[func-returns-value,return-value]
    assert labels == []


def test_a_training_that_is_stopped_leaves_nothing(asked: list[Sample], tmp_path: Path) -> None:
    def stop(steps: object, label: str) -> object:
        raise KeyboardInterrupt(label)

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="vision tower"):
        train_word_parts(asked, tmp_path / "parts", track=stop)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert answers_of(asked[0]).turns[1].text == "red no"

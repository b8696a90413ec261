"""Batched questions to a model, with what each of them retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tinyalign.data import ChatRenderer, LlavaCollator, Renderer, Sample, Turn, stable_id
from tinyalign.memory import Neighbours
from tinyalign.models import TinyAlignProcessor, TinyAlignVLM, arm_neighbours
from tinyalign.models.pair_encoder import pool_queries
from tinyalign.models.retrieval import BANK_ARMS, clear_rows


class Question(NamedTuple):
    """A question with its pictures.

    Args:
        name: what a control's draw goes by; must differ between questions.
        text: with or without ``<image>``.
        images: what it is about.
    """

    name: str
    text: str
    images: tuple[Image.Image | Path, ...] = ()


class Answer(NamedTuple):
    """What was answered, and what it was given to answer it.

    Args:
        text: the answer.
        neighbour_ids: of the bank entries, best first; empty without retrieval.
        scores: of those entries.
    """

    text: str
    neighbour_ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()


class Asker:
    """Ask a `TinyAlignVLM` questions by one arm, searching its bank live.

    Args:
        model: in evaluation mode, on the device to answer on.
        processor: of the model.
        arm: the retrieval arm; the model's own when None. ``self`` has no meaning for questions.
        renderer: writes prompts as training did; `ChatRenderer` when None.

    Raises:
        ValueError: the arm ``self``, or no questions.

    Example:
        >>> import tempfile
        >>> from tinyalign.training import compose, open_memory, write_tiny_experiment
        >>> made = write_tiny_experiment(tempfile.mkdtemp(), 8)
        >>> model, processor = compose(str(made.vision), str(made.llm), open_memory(made.memory), num_neighbours=2)
        >>> picture = Image.new("RGB", (32, 32))
        >>> (answer,) = Asker(model.eval(), processor)([Question("a", "which ?", (picture,))], max_new_tokens=2)
        >>> len(answer.neighbour_ids), len(answer.scores)
        (2, 2)
    """

    def __init__(
        self,
        model: TinyAlignVLM,
        processor: TinyAlignProcessor,
        *,
        arm: str | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.arm = model.config.retrieval if arm is None else arm
        if self.arm == "self":
            raise ValueError(
                "Asker: arm must not be 'self', got 'self'. A question is no entry of the bank; ask by 'bank', "
                "'off' or a control."
            )
        self.renderer: Renderer = ChatRenderer(processor.tokenizer) if renderer is None else renderer

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], **generation: Any) -> list[Answer]:
        """Answer a batch; ``generation`` goes to `generate`, which is greedy unless told otherwise."""
        if not questions:
            raise ValueError("Asker: questions must hold at least one, got none. Leave out empty batches.")
        prompts = [
            self.processor.prompt(question.text, num_images=len(question.images), renderer=self.renderer)
            for question in questions
        ]
        images = [list(question.images) for question in questions]
        given: dict[str, Any] = dict(self.processor(images=images if any(images) else None, text=prompts))
        given = {name: value.to(self.model.device) for name, value in given.items()}
        if "pixel_values" in given:
            given["image_features"] = self.model.vision(given.pop("pixel_values"))
        found = self._search(questions, given.get("image_features"), given["image_counts"])
        if found is not None:
            given |= {"neighbour_ids": found.ids, "neighbour_scores": found.scores}
        generation.setdefault("do_sample", False)
        new = self.model.generate(**given, retrieval=self.arm, **generation)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        if found is None:
            return [Answer(text.strip()) for text in texts]
        rows = zip(texts, found.ids.tolist(), found.scores.tolist(), strict=True)
        return [
            Answer(
                text.strip(),
                tuple(number for number in ids if number >= 0),
                tuple(score for score, number in zip(scores, ids, strict=True) if number >= 0),
            )
            for text, ids, scores in rows
        ]

    @torch.no_grad()
    def log_likelihood(self, question: Question, continuation: str) -> tuple[float, bool]:
        """Log-probability of an answer and its end, in nats, and whether each of its tokens is the likeliest."""
        turns = (Turn("user", self._with_places(question)), Turn("assistant", continuation.strip()))
        name = stable_id(question.name)
        collate = LlavaCollator(self.processor, renderer=self.renderer)
        batch = collate([Sample(question.name, name, -1, question.images, turns)])
        batch = {
            key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        features = self.model.vision(batch.pop("pixel_values")) if question.images else None
        found = self._search([question], features, batch["image_counts"])
        if found is not None:
            batch |= {"neighbour_ids": found.ids, "neighbour_scores": found.scores}
        output: Any = self.model(**batch, image_features=features, retrieval=self.arm, return_logits=True)
        wanted = output.labels[:, 1:]
        known = wanted != -100
        greedy = bool((output.logits[:, :-1].argmax(dim=-1)[known] == wanted[known]).all())
        return -float(output.per_sample_nll[0]), greedy

    def texts_of(self, answer: Answer) -> list[str]:
        """What the bank noted of the entries that an answer was given."""
        memory = self.model.memory
        if memory is None or not answer.neighbour_ids:
            return []
        notes = memory.metadata(torch.tensor(answer.neighbour_ids))
        return [str((note or {}).get("text", "")) for note in notes]

    def _with_places(self, question: Question) -> str:
        missing = len(question.images) - question.text.count("<image>")
        return "<image>\n" * missing + question.text

    def _search(self, questions: Sequence[Question], features: Tensor | None, counts: Tensor) -> Neighbours | None:
        """Neighbours of the questions' pictures, as the model itself would find them."""
        memory = self.model.memory
        if self.arm not in BANK_ARMS or memory is None:
            return None
        own = torch.tensor([stable_id(question.name) for question in questions])
        if features is None:
            queries = torch.ones(len(questions), memory.key_dim, device=counts.device)
        else:
            queries = pool_queries(self.model.query_encoder, features, counts)
        config = self.model.config
        found = arm_neighbours(
            memory,
            self.arm,
            queries,
            k=config.num_neighbours,
            sample_ids=None if self.arm == "bank" else own,
            seed=config.retrieval_seed,
        )
        return clear_rows(found, counts > 0)

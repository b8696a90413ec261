"""`TinyAlignVLM` for lmms-eval: ``--model tinyalign --model_args pretrained=runs/stage2,retrieval=bank``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinyalign.data import IMAGE_PLACEHOLDER, prompt_renderer
from tinyalign.evaluation.asking import Answer, Asker, Question
from tinyalign.models import TinyAlignProcessor, TinyAlignVLM

MAX_NEW_TOKENS = 128  # where a task names none
_PASSED = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")


class LmmsRequests:
    """Answer lmms-eval's requests in batches, by one arm, and log what every answer was given.

    lmms-eval wants a subclass of its own model class: that is ``TinyAlignLmms`` in this module, made when it is first
    asked for, so that the module can be imported without lmms-eval.

    Args:
        pretrained: a saved model's folder, or a model with its processor.
        memory: the bank's folder, if it is no longer where the model was told.
        retrieval: the arm; the model's own when None.
        device: where to answer; a GPU if there is one.
        dtype: of the weights, ``float32`` say; as saved when "auto".
        batch_size: questions answered at once.
        prompt_form: ``chat`` or ``plain``, as in training.
        log_path: a JSON-lines file that gets one line per answer: task, question, answer, ids and scores retrieved.

    Raises:
        ValueError: another prompt form.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | tuple[TinyAlignVLM, TinyAlignProcessor],
        memory: str | None = None,
        retrieval: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 1,
        prompt_form: str = "chat",
        log_path: str | Path | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self._rank: int = 0
        self._world_size: int = 1
        self.task_dict: dict[str, Any] = {}  # lmms-eval puts each task's documents here
        if prompt_form not in ("chat", "plain"):
            raise ValueError(
                f"TinyAlignLmms: prompt_form must be 'chat' or 'plain', got {prompt_form!r}. Take training's."
            )
        if isinstance(pretrained, tuple):
            model, processor = pretrained
        else:
            from tinyalign.training import open_memory

            bank = None if memory is None else open_memory(memory).bank
            model = TinyAlignVLM.from_pretrained(pretrained, memory=bank, dtype=dtype)
            processor = TinyAlignProcessor.from_pretrained(pretrained)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        renderer = prompt_renderer(prompt_form, processor.tokenizer)
        self.asker = Asker(model.to(where).eval(), processor, arm=retrieval, renderer=renderer)  # pyright: ignore[reportArgumentType]
        self.batch_size = int(batch_size)
        self.log_path = None if log_path is None else Path(log_path)
        self._join()

    @property
    def rank(self) -> int:
        """This process's place in the launcher."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many processes answer."""
        return self._world_size

    def _join(self) -> None:
        """Take this process's place among those of a launcher; lmms-eval gives each its share of the documents."""
        from accelerate import PartialState

        state = PartialState(cpu=self.asker.model.device.type == "cpu")
        self._rank, self._world_size = int(state.process_index), int(state.num_processes)
        if state.num_processes > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.asker.model.device.type == "cpu")
            if self.asker.model.device.type == "cuda":
                self.asker.model.to(state.device)  # pyright: ignore[reportArgumentType]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request; like lengths and like settings share a batch, the order is the requests'."""
        answers: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc=f"answers ({self.asker.arm})")
        with bar:
            for rows in self._batches(requests):
                questions = [self._question(requests[row]) for row in rows]
                settings = dict(requests[rows[0]].args[1])
                found = self.asker(questions, **_generation(settings))
                for row, question, answer in zip(rows, questions, found, strict=True):
                    answers[row] = _cut(answer.text, settings.get("until"))
                    self._log(requests[row], question, answer, answers[row])
                bar.update(len(rows))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each request's continuation with its end, and whether it is the likeliest."""
        found = []
        for request in requests:
            context, target, visuals, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(document)
            question = _question(context, visuals(document), f"{task}/{split}/{doc_id}")
            found.append(self.asker.log_likelihood(question, str(continuation)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: no round but the first has a prompt here."""
        raise NotImplementedError(
            f"TinyAlignLmms.generate_until_multi_round: tasks must ask once, got {len(requests)} requests of several "
            f"rounds. Leave such tasks out."
        )

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        groups: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(row)
        for rows in groups.values():
            rows.sort(key=lambda row: (-len(requests[row].args[0]), row))
            for at in range(0, len(rows), self.batch_size):
                yield rows[at : at + self.batch_size]

    def _question(self, request: Any) -> Question:
        context, _, visuals, doc_id, task, split = request.args
        return _question(context, visuals(self.task_dict[task][split][doc_id]), f"{task}/{split}/{doc_id}")

    def _log(self, request: Any, question: Question, answer: Answer, text: str) -> None:
        if self.log_path is None:
            return
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        path = self.log_path if self.world_size == 1 else self.log_path.with_suffix(f".rank{self.rank}.jsonl")
        line = {
            "task": request.args[4],
            "doc_id": request.args[3],
            "arm": self.asker.arm,
            "question": question.text,
            "answer": text,
            "neighbour_ids": list(answer.neighbour_ids),
            "scores": [round(score, 6) for score in answer.scores],
            "memories": self.asker.texts_of(answer),
        }
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def _question(context: str, visuals: Any, name: str) -> Question:
    images = tuple(visuals or ())
    text = context
    if text.count(IMAGE_PLACEHOLDER) != len(images):  # a task's own markers; pictures then stand before the question
        text = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return Question(name, text, images)


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's settings as `generate` takes them; a temperature of 0 means greedy."""
    chosen = {name: settings[name] for name in _PASSED if settings.get(name) is not None}
    chosen.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    chosen["do_sample"] = bool(chosen.get("do_sample")) or float(chosen.get("temperature", 0.0)) > 0
    if not chosen["do_sample"]:
        chosen.pop("temperature", None)
        chosen.pop("top_p", None)
    return chosen


def _cut(text: str, until: Any) -> str:
    """End an answer where the task says that it ends."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def __getattr__(name: str) -> Any:
    """Make ``TinyAlignLmms`` on first use (PEP 562)."""
    if name != "TinyAlignLmms":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    class TinyAlignLmms(LmmsRequests, lmms):  # type: ignore[misc]  # lmms-eval is untyped here
        """`LmmsRequests` as lmms-eval's registry takes it."""

    TinyAlignLmms.__qualname__ = name
    return globals().setdefault(name, TinyAlignLmms)

"""lmms-eval tasks over files at hand: LLaVA-format questions, or questions in POPE's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyalign._files import write_json
from tinyalign.data import IMAGE_PLACEHOLDER, LlavaDataset, load_image
from tinyalign.evaluation.scores import exact_match, says_yes, yes_no_scores

POPE = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def local_task(
    name: str, path: str | Path, images: str | Path, folder: str | Path, *, max_new_tokens: int = 16, suffix: str = ""
) -> Any:
    """Make an lmms-eval task of a file, to be passed to ``simple_evaluate(tasks=[...])`` beside the names of others.

    A LLaVA-format file (a JSON list) is scored by exact match of its first answer. JSON lines with `image`, `text` and
    `label` (yes or no) are POPE's form and get its five numbers.

    Args:
        name: of the task.
        path: the file.
        images: folder that its image paths start from.
        folder: gets the task's documents and lmms-eval's cache of them.
        max_new_tokens: of an answer.
        suffix: put behind every question, such as "Answer with one word."

    Raises:
        ImportError: lmms-eval is not installed.
        ValueError: the file is neither, or a record is faulty, by name.
    """
    try:
        from lmms_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise ImportError(
            "local_task: lmms-eval must be installed, got an import error. Install the extra: pip install "
            "'tinyalign-vlm[eval]'."
        ) from error
    path, folder = Path(path), Path(folder)
    pope = path.suffix == ".jsonl" and "label" in json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    documents = _pope_documents(path, Path(images)) if pope else _llava_documents(path, Path(images))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    write_json(file, {"data": documents})

    def question(document: dict[str, Any], *_: Any) -> str:
        return f"{document['question']} {suffix}".strip()

    metrics = POPE if pope else ("exact_match",)
    return ConfigurableTask(
        config={
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "field": "data", "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_visual": pictures_of,
            "doc_to_text": question,
            "doc_to_target": "answer",
            "process_results": pope_result if pope else exact_result,
            "generation_kwargs": {"max_new_tokens": max_new_tokens, "until": ["\n"], "do_sample": False},
            "metric_list": [
                {"metric": metric, "aggregation": _aggregation(metric) if pope else _mean, "higher_is_better": True}
                for metric in metrics
            ],
            "metadata": [{"version": 1}],
        }
    )


def pictures_of(document: dict[str, Any]) -> list[Any]:
    """Return a document's pictures."""
    return [load_image(Path(image)) for image in document["images"]]


def exact_result(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer by exact match."""
    return {"exact_match": float(exact_match(results[0], document["answer"]))}


def pope_result(document: dict[str, Any], results: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Keep one answer beside its label; POPE's numbers are of all answers together."""
    return dict.fromkeys(POPE, ("yes" if says_yes(results[0]) else "no", document["answer"]))


def _aggregation(metric: str) -> Any:
    def aggregate(pairs: Sequence[tuple[str, str]]) -> float:
        return float(getattr(yes_no_scores([a for a, _ in pairs], [b for _, b in pairs]), metric))

    return aggregate


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _llava_documents(path: Path, images: Path) -> list[dict[str, Any]]:
    documents = []
    for sample in LlavaDataset(path, images):
        asked = [turn.text for turn in sample.turns if turn.role == "user"]
        said = [turn.text.strip() for turn in sample.turns if turn.role == "assistant"]
        if not asked or not said or not said[0]:
            raise ValueError(
                f"local_task: record {sample.id!r} must have a question and its answer, got {sample.turns}. Correct it."
            )
        text = asked[0].replace(IMAGE_PLACEHOLDER, "").strip()
        where = [str(image) for image in sample.images]
        documents.append({"id": sample.id, "question": text, "answer": said[0], "images": where})
    return documents


def _pope_documents(path: Path, images: Path) -> list[dict[str, Any]]:
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        label = str(record.get("label", "")).lower()
        if label not in ("yes", "no") or not (images / str(record.get("image"))).is_file():
            raise ValueError(
                f"local_task: line {number + 1} of {path.name} must have a label of yes or no and an image that "
                f"exists, got {record}. Correct it."
            )
        where = str(images / record["image"])
        name = str(record.get("question_id", number))
        documents.append({"id": name, "question": record["text"], "answer": label, "images": [where]})
    return documents

"""The lmms-eval plugin over files at hand; skipped where the extra [eval] is not installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tinyalign.training import TinyExperiment, compose, open_memory, write_tiny_experiment

ROOT = Path(__file__).resolve().parents[2]


def entry_point() -> str:
    """As pyproject.toml declares it: a package that is installed editable may know an older declaration."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'\[project.entry-points."lmms_eval.models"\]\ntinyalign = "(.+)"', text)
    assert found is not None
    return found[1]


def test_the_manifest_is_where_the_entry_point_says_and_light() -> None:
    module, _, name = entry_point().partition(":")
    heavy = "[name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]"
    code = f"import sys, {module} as m; assert callable(m.{name}); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tinyalign.evaluation import local_task
    from tinyalign.evaluation.manifest import manifest

    for name in ("lmms_eval", "lmms_eval.models.registry_v2", "lmms_eval.api.task"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"manifest: lmms-eval must be installed.*tinyalign-vlm\[eval\]"):
        manifest()
    with pytest.raises(ImportError, match=r"local_task: lmms-eval must be installed.*tinyalign-vlm\[eval\]"):
        local_task("a", tmp_path / "a.json", tmp_path, tmp_path)


@pytest.fixture(scope="module")
def lmms() -> Any:
    pytest.importorskip("lmms_eval", reason="the extra [eval] is not installed")
    return import_module("tinyalign.evaluation.lmms_model")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyExperiment:
    return write_tiny_experiment(tmp_path_factory.mktemp("eval"), 12, task="question")


@pytest.fixture(scope="module")
def parts(made: TinyExperiment) -> Any:
    model, processor = compose(str(made.vision), str(made.llm), open_memory(made.memory), num_neighbours=3)
    return model.eval(), processor


def evaluate(lmms: Any, parts: Any, tasks: list[Any], arm: str, log: Path, limit: int | None = None) -> Any:
    from lmms_eval.evaluator import simple_evaluate

    model = lmms.TinyAlignLmms(parts, retrieval=arm, device="cpu", batch_size=4, log_path=log)
    return simple_evaluate(model, tasks=tasks, limit=limit, bootstrap_iters=0, log_samples=True)


def test_the_registry_finds_the_class(lmms: Any) -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    module, _, name = entry_point().partition(":")
    registry = ModelRegistryV2()
    registry.register_manifest(getattr(import_module(module), name)())
    assert registry.get_model_class("tinyalign") is lmms.TinyAlignLmms


def test_a_local_task_by_two_arms(lmms: Any, parts: Any, made: TinyExperiment, tmp_path: Path) -> None:
    from tinyalign.data import LlavaDataset
    from tinyalign.evaluation import Asker, Question, exact_match, local_task

    samples = LlavaDataset(made.heldout, made.images)
    rows = {}
    for arm in ("bank", "off"):
        task = local_task("scenes", made.heldout, made.images, tmp_path / arm, max_new_tokens=4)
        results = evaluate(lmms, parts, [task], arm, tmp_path / f"{arm}.jsonl")
        rows[arm] = [json.loads(line) for line in (tmp_path / f"{arm}.jsonl").read_text().splitlines()]
        rows[arm].sort(key=lambda row: row["doc_id"])
        assert [row["doc_id"] for row in rows[arm]] == list(range(len(samples)))
        right = [exact_match(row["answer"], s.turns[1].text) for row, s in zip(rows[arm], samples, strict=True)]
        assert results["results"]["scenes"]["exact_match,none"] == pytest.approx(sum(right) / len(right))
        assert results["n-samples"]["scenes"]["effective"] == len(samples)
    asker = Asker(*parts, arm="bank")
    for row, sample in zip(rows["bank"], samples, strict=True):  # one by one, as the batch answered them
        (answer,) = asker([Question("any", sample.turns[0].text, sample.images)], max_new_tokens=4)
        assert row["neighbour_ids"] == list(answer.neighbour_ids)
        assert row["scores"] == pytest.approx(answer.scores, abs=1e-5)
        assert row["answer"] == answer.text.split("\n")[0].strip()
        assert len(row["memories"]) == 3
    assert all(row["neighbour_ids"] == [] and row["arm"] == "off" for row in rows["off"])


def test_the_log_likelihood_is_the_models(lmms: Any, parts: Any, made: TinyExperiment) -> None:
    from types import SimpleNamespace

    from tinyalign.data import LlavaCollator, LlavaDataset

    model, processor = parts
    sample = LlavaDataset(made.heldout, made.images)[0]
    expected = model(
        **{k: v for k, v in LlavaCollator(processor)([sample]).items() if k not in ("sample_ids", "groups")}
    )
    plugin = lmms.TinyAlignLmms(parts, device="cpu")
    plugin.task_dict = {"t": {"test": [None]}}
    question = sample.turns[0].text.replace("<image>", "").strip()
    pictures = [Image.open(path) for path in sample.images]
    request = SimpleNamespace(args=(question, sample.turns[1].text, lambda _: pictures, 0, "t", "test"))
    ((found, greedy),) = plugin.loglikelihood([request])
    assert found == pytest.approx(-float(expected.per_sample_nll[0]), rel=1e-5)
    assert greedy is False
    with pytest.raises(NotImplementedError, match="tasks must ask once, got 1 requests of several rounds"):
        plugin.generate_until_multi_round([request])
    with pytest.raises(ValueError, match="prompt_form must be 'chat' or 'plain', got 'odd'"):
        lmms.TinyAlignLmms(parts, device="cpu", prompt_form="odd")


def test_settings_are_generates(lmms: Any) -> None:
    assert lmms._generation({"temperature": 0, "until": ["x"], "top_p": None}) == {
        "max_new_tokens": 128,
        "do_sample": False,
    }
    assert lmms._generation({"temperature": 0.7, "max_new_tokens": 3})["do_sample"] is True
    assert lmms._cut("yes\n\nno", ["\n\n"]) == "yes"
    assert lmms._cut("yes . no", ".") == "yes"
    assert lmms._question("<image 1> what?", [1, 2], "n").text == "<image 1> what?"
    assert lmms._question("<image> <image> what?", [1], "n").text == "what?"
    assert lmms._question("is <image> like <image>?", [1, 2], "n").text == "is <image> like <image>?"


@pytest.mark.slow
def test_real_files(lmms: Any, shared: Path, tmp_path: Path) -> None:
    """Shapes by exact match and photos in POPE's form, through a model of a real language model's weights."""
    from tinyalign.evaluation import local_task, yes_no_scores
    from tinyalign.models.tiny import write_tiny_parts

    vision = write_tiny_parts(tmp_path, ["a"]).vision
    built = compose(str(vision), str(shared / "models" / "stories260K"), retrieval="off")
    data = shared / "data"
    shapes = local_task("easy_vqa", data / "easy_vqa/eval.json", data / "easy_vqa/images", tmp_path / "a")
    photos = local_task("pope_mini", data / "coco_mini/pope_style.jsonl", data / "coco_mini/images", tmp_path / "b")
    found = evaluate(lmms, built, [shapes, photos], "off", tmp_path / "log.jsonl", limit=12)["results"]
    assert 0.0 <= found["easy_vqa"]["exact_match,none"] <= 1.0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    answers = {line["doc_id"]: line["answer"] for line in lines if line["task"] == "pope_mini"}
    truth = [json.loads(line)["label"] for line in (data / "coco_mini/pope_style.jsonl").read_text().splitlines()[:12]]
    expected = yes_no_scores([answers[at] for at in range(12)], truth)
    for name, value in expected._asdict().items():
        assert found["pope_mini"][f"{name},none"] == pytest.approx(value), name


def test_a_faulty_question_file_is_named(lmms: Any, tmp_path: Path) -> None:
    from tinyalign.evaluation import local_task

    (tmp_path / "a.jsonl").write_text('{"image": "gone.png", "text": "Is it?", "label": "yes"}\n')
    with pytest.raises(ValueError, match=r"line 1 of a.jsonl must have a label of yes or no and an image that exists"):
        local_task("a", tmp_path / "a.jsonl", tmp_path, tmp_path / "out")
    turns = [{"from": "human", "value": "Is it?"}]
    (tmp_path / "b.json").write_text(json.dumps([{"id": "q", "conversations": turns}]))
    with pytest.raises(ValueError, match="record 'q' must have a question and its answer"):
        local_task("b", tmp_path / "b.json", tmp_path, tmp_path / "out")


def test_the_scores() -> None:
    from tinyalign.evaluation import exact_match, yes_no_scores

    assert exact_match("A circle!", ["square", "circle"])
    assert not exact_match("circles", "circle")
    scores = yes_no_scores(["Yes", "no", "There is not. Yes", "maybe"], ["yes", "Yes", "no", "no"])
    assert scores == (0.5, 0.5, 0.5, 0.5, 0.5)
    assert yes_no_scores(["no"], ["yes"]) == (0.0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(
        ValueError, match=r"expected must hold yes or no for each of the answers, got 1 answers and .'ja'"
    ):
        yes_no_scores(["yes"], ["ja"])
    assert torch.get_num_threads() >= 1


def test_what_cannot_be_asked(parts: Any) -> None:
    from tinyalign.evaluation import Asker

    with pytest.raises(ValueError, match="Asker: arm must not be 'self', got 'self'"):
        Asker(*parts, arm="self")
    with pytest.raises(ValueError, match="Asker: questions must hold at least one, got none"):
        Asker(*parts)([])

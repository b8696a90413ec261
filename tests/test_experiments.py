"""The experiment recipes: what they compute beyond the library, and each of them as a user runs it."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tinyalign.data import DigitScenes
from tinyalign.evaluation import KeptRuns
from tinyalign.memory import MemoryBank, leakage_report
from tinyalign.models import TinyAlignVLM, count_flops

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return load("ablations")


@pytest.fixture(scope="module")
def efficiency() -> ModuleType:
    return load("data_efficiency")


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    return load("cost")


@pytest.fixture(scope="module")
def inspection() -> ModuleType:
    return load("inspect_retrieval")


# Ablations


def test_each_ablation_changes_one_thing_of_the_method(ablations: ModuleType) -> None:
    together = {"B asks B", "B, no bank", "B, random of A", "own pairs too, not excluded"}  # two by their nature
    for _, cells in ablations.TABLES.values():
        for label, cell in cells.items():
            alike = ablations.METHOD._replace(reader=cell.reader, pairs=cell.pairs)
            changed = [name for name in cell._fields if getattr(cell, name) != getattr(alike, name)]
            assert len(changed) <= (1 if label not in together and "prompt" not in label else 3), (label, changed)
    assert {"500", "2000", "8000"} <= set(ablations.TABLES["bank_size"][1])
    readers = {(cell.reader, cell.pairs, cell.arm) for cell in ablations.TABLES["reader"][1].values()}
    assert len(readers) == 18  # every pair of the two beside its own baseline and control
    assert all(
        ablations.Cell(reader=r, pairs=p).baseline() == ablations.Cell("off", reader=r, pairs=p) for r, p, _ in readers
    )


def test_a_row_pairs_a_cell_with_the_baseline_of_its_seed(ablations: ModuleType, tmp_path: Path) -> None:
    kept = KeptRuns(tmp_path / "cells.jsonl", "a", by=("cell", "seed"))
    rng = np.random.default_rng(0)
    for seed in range(3):
        base = rng.uniform(2, 4, 50)
        for cell, nll in ((ablations.BASELINE, base), (ablations.METHOD, base - 0.45 - 0.09 * seed)):
            facts = {"heldout_ce": nll.sum() / 450, "train_ce": 0.1 * seed, "exact_captions": 0.5}
            kept.add({"cell": cell._asdict(), "seed": seed, "nll": nll.tolist(), "tokens": [9] * 50, **facts})
    row, bar = ablations.summarise("bank", ablations.METHOD, kept, 3)
    assert row["gain"] == pytest.approx(0.54)
    assert row["train_ce"] == pytest.approx(0.1)
    assert bar.values == tuple(row[f"heldout_ce_seed_{seed}"] for seed in range(3))
    assert bar.half_width == pytest.approx((row["records_high"] - row["records_low"]) / 18)
    assert bar.relative == row["relative"] < 0
    assert np.isnan(row["recall"])
    said = ablations.in_words(row)
    assert list(said) == ["", "seed 0", "seed 1", "seed 2", "to baseline", "gain, nats per caption", "recall"]
    assert said["gain, nats per caption"].startswith("+0.54 [+0.5")
    assert said["recall"] == ""
    baseline, _ = ablations.summarise("off", ablations.BASELINE, kept, 3)
    assert (baseline["gain"], baseline["relative"]) == (0, 0)


# Data efficiency


def test_the_share_that_reaches_the_baseline_is_read_off_the_means(efficiency: ModuleType) -> None:
    accuracy = {
        ("off", 0.5): (0.5, 0.5),
        ("off", 1.0): (0.7, 0.8),
        ("bank", 0.5): (0.72, 0.79),
        ("bank", 1.0): (0.9, 0.9),
    }
    runs = [
        {"arm": arm, "share": share, "seed": seed, "samples": 10, "accuracy": value}
        for (arm, share), values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    rows = efficiency.summarise(runs, ("off", "bank"), (0.5, 1.0), 2)
    row = next(r for r in rows if r["arm"] == "bank" and r["share"] == 0.5)
    differences = [0.72 - 0.7, 0.79 - 0.8]
    low, high = stats.t.interval(0.95, 1, loc=np.mean(differences), scale=stats.sem(differences))
    assert (row["over_baseline_at_100_low"], row["over_baseline_at_100_high"]) == pytest.approx((low, high))
    said = efficiency.read_aloud(rows)
    assert said[0] == "'off' reaches the mean accuracy of the baseline with all data at 100% of the data."
    assert said[1] == "'bank' reaches the mean accuracy of the baseline with all data at 50% of the data."


# Cost


def test_the_sizes_are_the_published_ones(cost: ModuleType) -> None:
    published = {"phi-2": 2_779_683_840, "tinyllama": 1_100_048_384, "qwen2-0.5b": 494_032_768}
    with torch.device("meta"):
        for name, count in published.items():
            model = TinyAlignVLM(cost.config_of(cost.TOWER, cost.LANGUAGE[name], 32, {"retrieval": "off"}))
            assert sum(weight.numel() for weight in model.language_model.parameters()) == count
        assert sum(weight.numel() for weight in model.vision.parameters()) == 428_225_600
        assert model.vision.num_tokens == 729


def test_the_closed_form_equals_the_counter_at_real_widths(cost: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = copy.deepcopy(cost.LANGUAGE["qwen2-0.5b"])
    shallow.num_hidden_layers = 2  # all layers are alike
    monkeypatch.setitem(cost.LANGUAGE, "qwen2-0.5b", shallow)
    variants = {"baseline": cost.VARIANTS["baseline"], "pooled": cost.VARIANTS["K=5, pooled to 8"]}
    rows = [cost.cost("qwen2-0.5b", "pretrain", name, variants) for name in variants]
    for row in rows:
        assert row.flops == row.counted
    assert rows[1].positions == rows[0].positions + 8
    assert rows[0].kept_bytes < rows[1].kept_bytes
    # Training the language model keeps its layers' inputs, but no weight: that would be hundreds of megabytes here.
    tuned = cost.cost("qwen2-0.5b", "instruct", "baseline", variants)
    per_position = [row.kept_bytes / row.positions for row in (rows[0], tuned)]
    assert per_position[0] < per_position[1] < 3 * per_position[0]
    # Two weights and two biases of each connector, and no other parameter, train in stage 1.
    assert rows[0].trained == 1152 * 896 + 896 + 896 * 896 + 896


def test_what_k_costs_is_what_the_docs_say(cost: ModuleType) -> None:
    text, learned = cost.TEXT["pretrain"]

    def total(variant: str) -> int:
        config = cost.config_of(cost.TOWER, cost.LANGUAGE["phi-2"], cost.LATENTS, cost.VARIANTS[variant])
        return count_flops(config, text_tokens=text, supervised_tokens=learned, stage="pretrain").total

    assert 1.15 < total("K=5") / total("baseline") < 1.25
    assert total("K=5, pooled to 8") / total("baseline") < 1.02


# What is retrieved


def test_the_page_marks_leaks_and_stands_alone(inspection: ModuleType) -> None:
    samples = [DigitScenes("train", 3, task="both")[i] for i in (0, 1, 5, 10)]  # a caption, its twin, two others
    bank = MemoryBank(4, (1, 2))
    keys = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1.0, 0]])
    ids, groups = [s.sample_id for s in samples], [s.group for s in samples]
    notes = [{"text": "<b>hostile</b>"}, {"text": "twin"}, {"text": "other"}, {"text": "far"}]
    bank.add(keys, torch.ones(4, 1, 2), ids, groups, notes)
    case = inspection.Case(bank, samples, keys, lambda entry: samples[ids.index(entry)].images[0])
    kept = bank.neighbours(keys[:1], 2, exclude_ids=ids[:1], exclude_groups=groups[:1])
    page = inspection.page(case, [0], kept, bank.neighbours(keys[:1], 2), "counts & more")
    clean, leaky = page.split("without exclusion")
    assert page.count('class="leak"') == leaky.count('class="leak"') == 2
    assert "1.000, itself" in leaky
    assert ", same image" in leaky
    assert "other" in clean
    assert "excluding replaced 2 of 2" in clean
    assert "&lt;b&gt;hostile" in page
    assert "<b>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    report = leakage_report(bank, keys, ids, groups, k=2)
    assert inspection.reading(report).startswith("Without exclusion 100.0% of the queries would retrieve themselves")
    strangers = leakage_report(bank, keys, [1, 2, 3, 4], [11, 12, 13, 14], k=2)
    assert inspection.reading(strangers).startswith("None of these records is in the bank")


# Each recipe as a user runs it


def run(script: str, *arguments: Any, cache: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TINYALIGN_CACHE": str(cache)}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_ablations_run_once_and_are_kept(tmp_path: Path, cache: Path) -> None:
    said = run("ablations.py", "--smoke", "--output", tmp_path, cache=cache)
    assert "refused, and forced for this cell: MemoryBank.require_fingerprint" in said
    tables = sorted(path.stem for path in tmp_path.glob("*.csv"))
    assert tables == sorted(path.stem for path in tmp_path.glob("*.png"))
    assert tables == ["arms", "bank_size", "encoder", "exclusion", "key", "reader", "top_k", "value"]
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    again = run("ablations.py", "--smoke", "--only", "arms", "--output", tmp_path, cache=cache)
    assert "cell 1 of" not in again
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == lines
    (tmp_path / "cells.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as a kill in the last cell leaves it
    last = json.loads(lines[-1])
    again = run("ablations.py", "--smoke", "--output", tmp_path, cache=cache)
    assert "cell 1 of 1" in again
    assert json.loads((tmp_path / "cells.jsonl").read_text().splitlines()[-1])["heldout_ce"] == last["heldout_ce"]
    with open(tmp_path / "arms.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["cell"] for row in rows][:2] == ["off (baseline)", "bank"]
    assert float(rows[0]["gain"]) == 0


@pytest.mark.slow
def test_data_efficiency_runs_on_both_kinds_of_data(tmp_path: Path, cache: Path) -> None:
    run("data_efficiency.py", "--smoke", "--output", tmp_path, cache=cache)
    for folder in (tmp_path, tmp_path / "llava"):
        with open(folder / "accuracy.csv", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert {(row["arm"], row["share"]) for row in rows} == {
            (arm, share) for arm in ("off", "bank", "shuffled") for share in ("0.5", "1.0")
        }
        assert int(rows[0]["samples"]) * 2 == int(rows[1]["samples"])
        assert (folder / "accuracy.png").stat().st_size > 5000


@pytest.mark.slow
def test_inspection_and_cost_run(tmp_path: Path, cache: Path) -> None:
    said = run("inspect_retrieval.py", "--smoke", "--output", tmp_path / "page.html", cache=cache)
    assert "Without exclusion 100.0% of the queries would retrieve themselves" in said
    assert "with it none does" in said
    said = run("cost.py", "--smoke", "--output", tmp_path, cache=cache)
    assert "count_flops equals torch's counter in every row." in said
    assert "Stage-1 steps of" in said


@pytest.mark.slow
def test_alignment_is_drawn(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("umap")
    run("visualize_alignment.py", "--smoke", "--output", tmp_path, cache=cache)
    facts = json.loads((tmp_path / "alignment.json").read_text())
    assert list(facts) == ["unaligned", "baseline", "tinyalign", "prompt (control)"]
    assert (tmp_path / "alignment.png").stat().st_size > 5000


def test_alignment_names_the_extra_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    alignment = load("visualize_alignment")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(SystemExit, match=re.escape('umap-learn is missing: pip install "tinyalign-vlm[umap]"')):
        alignment.load_umap()


def test_alignment_is_measured_in_full_width() -> None:
    alignment = load("visualize_alignment")
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(60, 16, generator=generator).numpy()
    matched = alignment.measure(alignment.Clouds("a", text + 50.0, text))
    assert matched["own_caption_nearest"] == 1.0
    assert matched["mixed_neighbours"] == 0.0
    assert matched["apart"] == pytest.approx(50.0, rel=0.1)  # 50 in each of 16 directions of unit spread
    mixed = alignment.measure(alignment.Clouds("b", torch.randn(60, 16, generator=generator).numpy(), text))
    assert mixed["apart"] < 0.5
    assert 0.3 < mixed["mixed_neighbours"] < 0.7
    assert mixed["own_caption_nearest"] < 0.2

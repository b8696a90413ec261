"""The quickstart at its smallest: it runs from an empty cache, and leaves the files it promises."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyalign.data import DigitScenes
from tinyalign.models.digit_parts import DigitRecipe, load_digit_parts

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"
TINY = DigitRecipe(tower_steps=2, language_steps=2, batch_size=4, num_scenes=8, hidden_dim=48)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    environment = {**os.environ, "TINYALIGN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--smoke", "--arms", "all", "--seeds", "2", "--output", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Recall@5" in done.stdout
    return json.loads((folder / "run" / "summary.json").read_text()), folder / "run"


def test_the_summary_holds_what_is_promised(summary):
    content, _ = summary
    assert content["seconds"] > 0
    assert content["seed"] == 0
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    assert set(content["arms"]) == {"baseline", "tinyalign", "shuffled", "random", "constant", "prompt", "self"}
    for arm in content["arms"].values():
        assert arm["stage"] == 1
        assert all(math.isfinite(arm[name]) for name in ("train_ce", "heldout_ce"))
        assert 0 <= arm["accuracy"] <= 1
        assert arm["delta_emi"]["low"] <= arm["delta_emi"]["value"] <= arm["delta_emi"]["high"]
    assert content["arms"]["baseline"]["delta_emi"]["value"] == 0
    gain = content["arms"]["tinyalign"]["delta_emi"]["value"]
    # Captions have nine tokens, the end of text included.
    difference = content["arms"]["baseline"]["heldout_ce"] - content["arms"]["tinyalign"]["heldout_ce"]
    assert gain == pytest.approx(9 * difference, abs=1e-6)
    assert content["stage2"]["tinyalign"]["stage"] == 2
    assert all(0 <= content["told_in_words"][task] <= 1 for task in ("caption", "question"))
    assert content["retrieval"]["self_hits"] == 0 < content["retrieval"]["self_hits_without_exclusion"]


def test_the_report_needs_nothing_beside_it(summary):
    _, folder = summary
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for name in ("loss-curves.png", "heldout-emi.png", "neighbours.png"):
        assert (folder / name).stat().st_size > 5000


def test_parts_come_from_the_cache_unless_retrained(tmp_path):
    labels = []

    def track(steps, label):
        labels.append(label)
        return steps

    first = load_digit_parts(TINY, cache_dir=tmp_path, track=track)
    assert len(labels) == 2
    again = load_digit_parts(TINY, cache_dir=tmp_path, track=track)
    assert len(labels) == 2
    for one, other in zip(first.vision_tower.parameters(), again.vision_tower.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    load_digit_parts(TINY, cache_dir=tmp_path, track=track, retrain=True)
    assert len(labels) == 4


def test_a_failed_training_leaves_the_cache_as_it_was(tmp_path):
    def stop(steps, label):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_digit_parts(TINY, cache_dir=tmp_path, track=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_knows_every_word_of_the_scenes(tmp_path):
    parts = load_digit_parts(TINY, cache_dir=tmp_path)
    texts = [
        turn.text.replace("<image>", "") for sample in DigitScenes("train", 50, task="both") for turn in sample.turns
    ]
    ids = parts.tokenizer(texts)["input_ids"]
    assert parts.tokenizer.unk_token_id not in {token for row in ids for token in row}

"""Runs that are kept, intervals over seeds, and figures: what a study of many runs stands on."""

from __future__ import annotations

import base64
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tinyalign.evaluation import (
    ArmRow,
    KeptRuns,
    compare_seeds,
    markdown_table,
    over_seeds,
    page_figure,
    plot_arms,
    setting_name,
    write_csv,
    write_report,
)
from tinyalign.theory import NLLTable

BY = ("cell", "seed")


def run(k: int, seed: int, **more: Any) -> dict[str, Any]:
    return {"cell": {"k": k, "arm": "bank"}, "seed": seed, **more}


def test_a_finished_run_is_found_again_under_its_setting_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    kept = KeptRuns(path, "one", by=BY)
    assert kept.get(**run(5, 0)) is None
    for k, seed in ((5, 0), (5, 1), (1, 0)):
        kept.add(run(k, seed, ce=k + seed / 10))
    KeptRuns(path, "two", by=BY).add(run(5, 0, ce=-1.0))
    again = KeptRuns(path, "one", by=BY)
    assert [one["ce"] for one in again] == [5.0, 5.1, 1.0]
    assert len(again) == 3
    found = again.get(cell={"arm": "bank", "k": 5}, seed=1)  # in another order
    assert found is not None
    assert found["ce"] == 5.1
    assert again.get(cell={"arm": "bank", "k": 10}, seed=1) is None


@settings(max_examples=20)
@given(cut=st.integers(1, 40))
def test_a_line_that_a_kill_cut_off_costs_its_run_alone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    kept = KeptRuns(path, "one", by=BY)
    kept.add(run(5, 0, name="häuser"))
    whole = path.read_bytes()
    kept.add(run(5, 1))
    path.write_bytes(path.read_bytes()[:-cut])
    again = KeptRuns(path, "one", by=BY)
    assert len(again) == 1
    again.add(run(5, 1, ce=0.5))
    again.add(run(5, 2))
    assert path.read_bytes().startswith(whole)
    assert [one["seed"] for one in KeptRuns(path, "one", by=BY)] == [0, 1, 2]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    kept = KeptRuns(path, "one", by=BY)
    kept.add(run(5, 0))
    path.write_text("{oh\n" + path.read_text())
    with pytest.raises(ValueError, match=r"KeptRuns: .*runs\.jsonl must hold a JSON object .*, got '\{oh' on line 1"):
        KeptRuns(path, "one", by=BY)


def test_a_setting_is_named_by_all_its_facts() -> None:
    facts = (8000, {"rate": 1e-3}, ("a", Path("b")))
    names = {setting_name(facts), setting_name(facts[:2]), setting_name((8000, {"rate": 1e-4}, facts[2]))}
    assert len(names) == 3
    assert setting_name(facts) == setting_name([8000, {"rate": 0.001}, ["a", "b"]])


def test_seeds_give_student_intervals() -> None:
    values = [0.31, 0.29, 0.35, 0.30]
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_an_arm_is_compared_in_pairs_over_seeds_and_over_samples() -> None:
    rng = np.random.default_rng(0)
    base, better, gains, ratios = [], [], [], []
    for seed in range(3):
        nll, tokens = rng.uniform(2, 4, 50), rng.integers(5, 9, 50)
        lower = nll - 0.2 - 0.1 * seed + rng.normal(0, 0.05, 50)
        base.append(NLLTable(nll, tokens))
        better.append(NLLTable(lower, tokens))
        gains.append(float((nll - lower).mean()))
        ratios.append(lower.sum() / nll.sum())
    found = compare_seeds(better, base)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(gains), scale=stats.sem(gains))
    assert (found.gain.value, found.gain.low, found.gain.high) == pytest.approx((np.mean(gains), low, high))
    assert found.relative == pytest.approx(np.mean(ratios) - 1)
    assert found.gain_of_samples.value == pytest.approx(np.mean(gains))
    assert found.gain_of_samples.n == 150
    assert found.gain.low < found.gain_of_samples.low < found.gain.value < found.gain_of_samples.high < found.gain.high
    assert found.per_token.value == pytest.approx(np.mean([table.nll.sum() / table.tokens.sum() for table in better]))
    with pytest.raises(ValueError, match=r"compare_seeds: arm must have a table for each seed .*, got 2 for 3"):
        compare_seeds(better[:2], base)


def test_a_table_for_a_page() -> None:
    said = markdown_table([{"": "off", "ce": "0.3"}, {"": "bank", "ce": "0.2"}])
    assert said == "|  | ce |\n| --- | --- |\n| off | 0.3 |\n| bank | 0.2 |\n"


def test_a_table_is_read_back(tmp_path: Path) -> None:
    rows = [{"cell": "K=5, pooled", "ce": 0.25}, {"cell": 'a "b"', "ce": 1e-9}]
    with open(write_csv(tmp_path / "table.csv", rows), newline="", encoding="utf-8") as stream:
        assert [{**row, "ce": float(row["ce"])} for row in csv.DictReader(stream)] == rows


def test_the_picture_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off the drawn lines: dots are seeds, bars means, lines intervals, the dotted one the baseline."""
    from tinyalign.evaluation import plots

    made = []

    def keep(*args: Any, **options: Any) -> Any:
        made.append(page_figure(*args, **options))
        return made[-1]

    monkeypatch.setattr(plots, "page_figure", keep)
    rows = [ArmRow("x", (0.38, 0.42), 0, 0.25), ArmRow("bank", (0.2, 0.3), 0.04, -0.22), ArmRow("off", (0.32,), 0, 0.0)]
    path = plot_arms(tmp_path / "arms.png", "Arms", rows, xlabel="nats")
    ((_, (axes,)),) = made
    lines = [(line.get_xdata(), line.get_ydata(), line.get_color()) for line in axes.lines]
    interval, dots, bar = lines[3:6]
    assert list(interval[0]) == pytest.approx([0.21, 0.29])
    assert list(dots[0]) == [0.2, 0.3]
    assert list(bar[0]) == pytest.approx([0.25, 0.25])
    assert list(dots[1]) == [1, 1]
    assert [lines[at][2] for at in (0, 3, 6)] == [plots.WORSE, plots.BETTER, plots.GREY]
    assert lines[-1][0][0] == pytest.approx(0.32)
    assert [text.get_text() for text in axes.texts] == ["+25.0%", "-22.0%", "+0.0%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "bank", "off"]
    plot_arms(tmp_path / "several.png", "Arms", rows, xlabel="nats", one_baseline=False)
    assert len(made[1][1][0].lines) == len(lines) - 1
    from PIL import Image

    with Image.open(path) as picture:
        assert picture.mode == "RGBA"
        assert picture.getpixel((0, 0))[3] == 0  # clear, for light and dark pages
    with pytest.raises(ValueError, match="plot_arms: rows must hold at least one, got none"):
        plot_arms(tmp_path / "none.png", "", [], xlabel="")


def test_a_figure_leaves_matplotlib_as_it_was_and_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, tinyalign.evaluation as e; e.page_figure(3, 3); print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"page_figure: matplotlib must be installed.* 'tinyalign-vlm\[plot\]'"):
        page_figure(3, 3)


# A report


def test_a_report_holds_its_pictures_and_takes_words_as_words(tmp_path: Path) -> None:
    pixel = bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000100ffff0300"
        "0006000557bfabd40000000049454e44ae426082"
    )
    (tmp_path / 'a "curve".png').write_bytes(pixel)
    page = write_report(
        tmp_path / "report.html",
        "Is 1 < 2?",
        sentences=["<script>alert(1)</script>", "5 % & more"],
        tables="<pre>kept</pre>",
        pictures=[tmp_path / 'a "curve".png'],
    )
    text = page.read_text(encoding="utf-8")
    assert "<h1>Is 1 &lt; 2?</h1>" in text
    assert "<script>" not in text
    assert "<li>5 % &amp; more</li></ul><pre>kept</pre>" in text
    assert 'alt="a &quot;curve&quot;"' in text
    assert base64.b64encode(pixel).decode() in text
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write_report(tmp_path / "report.html", "t", sentences=[], pictures=[tmp_path / "missing.png"])
    assert page.read_text(encoding="utf-8") == text  # the old page stands


def test_panels_are_given_row_by_row() -> None:
    figure, panels = page_figure(4, 4, rows=2, panels=3)
    places = [panel.get_subplotspec() for panel in panels]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        (r, c) for r in (0, 1) for c in range(3)
    ]
    assert figure.get_axes() == panels

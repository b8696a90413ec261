"""Figures in grey on a clear ground, which read on a light page and on a dark one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GREY, BETTER, WORSE = "#808080", "#2a9d6f", "#d1495b"


class ArmRow(NamedTuple):
    """One line of `plot_arms`.

    Args:
        label: what stands beside it.
        values: one per seed.
        half_width: of the interval around their mean.
        relative: the change to the baseline, 0.1 for 10 % more; lower values are better ones.
    """

    label: str
    values: tuple[float, ...]
    half_width: float
    relative: float


def page_figure(
    width: float, height: float, *, rows: int = 1, panels: int = 1, sides: Sequence[str] = ("bottom", "left")
) -> Any:
    """Make a figure and its panels without touching matplotlib's global state.

    Args:
        width: inches.
        height: inches.
        rows: of panels.
        panels: how many side by side.
        sides: which edges of a panel are drawn.

    Returns:
        the figure, whose ``savefig`` writes it, and the list of its axes, row by row.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> figure, (left, right) = page_figure(6, 3, panels=2)
        >>> left.spines["top"].get_visible()
        False
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "page_figure: matplotlib must be installed, got an import error. Install the extra: pip install "
            "'tinyalign-vlm[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130, facecolor="none")
    found = figure.subplots(rows, panels, squeeze=False).ravel().tolist()
    for axes in found:
        axes.patch.set_alpha(0.0)
        axes.tick_params(colors=GREY)
        for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
            part.set_color(GREY)
        for side, spine in axes.spines.items():
            spine.set_visible(side in sides)
            spine.set_color(GREY)
    return figure, found


def plot_arms(path: str | Path, title: str, rows: Sequence[ArmRow], *, xlabel: str, one_baseline: bool = True) -> Path:
    """Draw what was measured in each arm or cell: a dot per seed, a bar at their mean, a line for the interval.

    Args:
        path: of the picture.
        title: above it.
        rows: from top to bottom; the change to the baseline is written beside each.
        xlabel: what the values are, and of what the interval is.
        one_baseline: whether all rows are compared with the same, which is then a dotted line.

    Raises:
        ValueError: no rows.
        ImportError: matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> rows = [ArmRow("off", (0.31, 0.30), 0.0, 0.0), ArmRow("bank", (0.24, 0.25), 0.01, -0.2)]
        >>> plot_arms(Path(tempfile.mkdtemp()) / "arms.png", "Arms", rows, xlabel="nats per token").exists()
        True
    """
    if not rows:
        raise ValueError("plot_arms: rows must hold at least one, got none. Pass what was measured.")
    figure, (axes,) = page_figure(7, 0.42 * len(rows) + 1.1, sides=("bottom",))
    for place, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        mean = sum(row.values) / len(row.values)
        colour = BETTER if row.relative < 0 else WORSE if row.relative > 0 else GREY
        axes.plot([mean - row.half_width, mean + row.half_width], [place, place], color=colour, lw=1)
        axes.plot(row.values, [place] * len(row.values), "o", color=colour, ms=5, alpha=0.6, mew=0)
        axes.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, lw=3)
        at = {"xy": (1.01, place), "xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(f"{row.relative:+.1%}", **at, color=GREY, fontsize=8)
    if one_baseline:
        first = rows[0]
        axes.axvline(sum(first.values) / len(first.values) / (1 + first.relative), color=GREY, ls=":", lw=1)
    axes.set_yticks(range(len(rows) - 1, -1, -1), [row.label for row in rows])
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_title(title, loc="left", fontsize=11, color=GREY)
    axes.grid(axis="x", color=GREY, alpha=0.25, lw=0.6)
    figure.savefig(path)
    return Path(path)

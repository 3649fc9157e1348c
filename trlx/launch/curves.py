"""Learning curves: one wide panel for the metrics of evaluations, and small panels for those of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trlx.optional import require
from trlx.report.records import PANELS, Series

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # colour-blind readers can tell them apart
GREY = "#666666"


def draw(metrics: dict[str, Series], title: str, path: Path) -> None:
    """Draws a run's curves into a PNG.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    require("matplotlib", extra="report", purpose="A picture of curves")
    from matplotlib import figure as figures

    evaluations = distinct({name: s for name, s in metrics.items() if name.startswith(("reward/mean", "metrics/"))})
    panels = _small_panels(metrics)
    rows = -(-len(panels) // 3)
    heights = [3.6, 2.3 * rows] if rows else [3.6]
    figure = figures.Figure(figsize=(11, sum(heights)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    # two subfigures, so that the labels to the right of the wide panel take no room from the small panels
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_evaluations(parts[0].subplots(), evaluations)
    for number, (name, series) in enumerate(panels.items()):
        _draw_small(parts[-1].add_subplot(rows, 3, number + 1), name, series)
    figure.savefig(path)


def distinct(metrics: dict[str, Series]) -> dict[str, Series]:
    """The curves by label. Equal curves share one label, since the reward often is one of the metrics too."""
    labels: dict[tuple, list[str]] = {}
    for name, series in metrics.items():
        labels.setdefault(tuple(series), []).append(name.removeprefix("metrics/").replace("reward/mean", "reward"))
    return {" = ".join(names): list(series) for series, names in labels.items()}


def _small_panels(metrics: dict[str, Series], most: int = 6) -> dict[str, Series]:
    found = {
        title: next(metrics[name] for name in names if name in metrics)
        for title, names in PANELS.items()
        if any(name in metrics for name in names)
    }
    return dict(list(found.items())[:most])


def _draw_evaluations(axes: Any, curves: dict[str, Series]) -> None:
    _plain_axes(axes, "Evaluation: mean over samples")
    axes.set_xlabel("optimizer step", color=GREY)
    for number, series in enumerate(curves.values()):
        steps, values = zip(*series, strict=True)
        axes.plot(steps, values, color=COLORS[number % len(COLORS)], lw=2, marker="o", ms=3.5, clip_on=False)
    axes.margins(x=0.01)
    values = [value for series in curves.values() for _, value in series]
    if values and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1)
    _label_ends(axes, curves)


def _label_ends(axes: Any, curves: dict[str, Series]) -> None:
    """Writes each curve's name and last value to the right of its end. Labels of close ends are pushed apart."""
    low, high = axes.get_ylim()
    gap, position = 0.085 * (high - low), -float("inf")
    ends = sorted((series[-1][1], number, name) for number, (name, series) in enumerate(curves.items()))
    for value, number, name in ends:
        position = max(value, position + gap)
        axes.annotate(
            f"{name}  {value:.3g}",
            (1.0, position),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLORS[number % len(COLORS)],
            va="center",
            fontweight="bold",
        )


def _draw_small(axes: Any, title: str, series: Series) -> None:
    _plain_axes(axes, title)
    steps, values = zip(*series, strict=True)
    smooth = len(values) > 40
    axes.plot(steps, values, color=COLORS[0], lw=1, alpha=0.3 if smooth else 1)
    if smooth:
        axes.plot(steps, moving_mean(values, len(values) // 20), color=COLORS[0], lw=1.8)
    axes.margins(x=0.01)


def moving_mean(values: tuple[float, ...], reach: int) -> list[float]:
    """For each value, the mean of it and of up to `reach` neighbours on each side."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _plain_axes(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color="#222222")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=GREY, labelsize=8.5)
    axes.grid(axis="y", color="#e8e8e8", lw=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", integer=True)

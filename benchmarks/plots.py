"""Pictures of the benchmarks' figures, in one style: bars side by side, and panels of lines over one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#666666")


def _started(count: int, width: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dsec"  # the same figures make the same file
    return plt.subplots(1, count, figsize=(width, 3.8), layout="constrained", squeeze=False)


def _saved(plot: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, metadata={"Date": None})


def bars(
    path: Path, places: Sequence[str], series: Mapping[str, Sequence[float]], *, ylabel: str, title: str, is_log: bool
) -> None:
    """At each place a bar of each series, with its number above."""
    plot, ((axes,),) = _started(1, 7.5)
    width = 0.8 / len(series)
    for number, ((label, values), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        left = [place - 0.4 + width * (number + 0.5) for place in range(len(places))]
        drawn = axes.bar(left, values, width * 0.95, label=label, color=colour)
        labels = [f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in values]
        axes.bar_label(drawn, labels, fontsize="x-small", padding=1)
    axes.set_xticks(range(len(places)), places, fontsize="small")
    axes.set(ylabel=ylabel, title=title, yscale="log" if is_log else "linear")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    _saved(plot, path)


def panels(
    path: Path, xlabel: str, over: Sequence[float], drawn: Mapping[str, Mapping[str, Sequence[float]]], *, title: str
) -> None:
    """A panel for each quantity, a line in it for each of its series, all over the same logarithmic axis."""
    plot, (row,) = _started(len(drawn), 3.6 * len(drawn))
    for axes, (quantity, series) in zip(row, drawn.items(), strict=True):
        for (label, values), colour in zip(series.items(), COLOURS, strict=False):
            axes.plot(over, values, "o-", label=label, color=colour)
        axes.set(xlabel=xlabel, ylabel=quantity, ylim=(0, None), xscale="log")
        axes.set_xticks(over, [f"{value:g}" for value in over], fontsize="x-small")
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize="small")
    plot.suptitle(title)
    _saved(plot, path)

"""The picture: losses and cosines between tasks over the training."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jaxjd.demo.data import Dataset
from jaxjd.demo.results import Curves, Result, curves

# Okabe and Ito's colours, which most colour-blind readers can tell apart, then some more.
_COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#7f3c8d", "#8c6d31", "#a50026", "#4d9221", "#8da0cb", "#737373",
)  # fmt: skip


def save_figure(path: Path, dataset: Dataset, results: list[Result]) -> None:
    """Draws the smoothed curves of all methods into a PNG; the baseline is the first result."""
    panels = [_panels(dataset, curves(result)) for result in results]
    titles = list(panels[0])
    shape, size = ((2, 2), (11, 7.8)) if len(titles) == 4 else ((1, len(titles)), (15, 4.8))
    with rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = np.ravel(figure.subplots(*shape))
        for axis, title in zip(axes, titles, strict=True):
            _draw(axis, title, [panel[title] for panel in panels], results)
        if dataset.num_tasks == 2:
            axes[1].sharey(axes[0])
            axes[0].autoscale()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
        figure.suptitle(f"{dataset.description}: moving averages of the training steps")
        figure.savefig(path, dpi=150)


def _panels(dataset: Dataset, series: Curves) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`title -> (steps, values)` of one method: each of two tasks, the mean and worst of more."""
    if dataset.num_tasks == 2:
        values = {
            f"training loss, {name}": column
            for name, column in zip(dataset.task_names, series.losses.T, strict=True)
        } | {"cosine between the tasks' gradients of the trunk": series.min_cosine}
    else:
        values = {
            "training loss, mean of the tasks": series.losses.mean(axis=1),
            "training loss, worst task": series.losses.max(axis=1),
            "cosine between gradients of the trunk, mean of all pairs": series.mean_cosine,
            "cosine between gradients of the trunk, smallest of all pairs": series.min_cosine,
        }
    return {title: (series.step, value) for title, value in values.items()}


def _draw(
    axis: Axes, title: str, lines: list[tuple[np.ndarray, np.ndarray]], results: list[Result]
) -> None:
    styles: list[dict[str, Any]] = [{"color": "black", "ls": "--", "lw": 1.8, "zorder": 3}]
    styles += [{"color": _COLORS[i % len(_COLORS)], "lw": 1.3} for i in range(len(lines) - 1)]
    for (steps, values), style, result in zip(lines, styles, results, strict=True):
        axis.plot(steps, values, label=result.name, **style)
    if "cosine" in title:
        axis.axhline(0, color="0.4", lw=0.8)
    elif _spans_orders([values for _, values in lines]):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    axis.grid(alpha=0.25)


def _spans_orders(series: list[np.ndarray]) -> bool:
    """Whether positive values differ so much that only a logarithmic axis shows the small ones."""
    values = np.concatenate(series)
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() > 5 * values.min()

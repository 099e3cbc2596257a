"""The table in the terminal and the numbers as JSON."""

import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxjd
from jaxjd.demo.data import Dataset
from jaxjd.demo.results import Result, curves, percent, summarize
from jaxjd.demo.train import ROUNDING

DEFINITIONS = {
    "plain mean": "one jax.value_and_grad of the mean of the losses, then adam: no Jacobian",
    "train_losses": "mean over the last twentieth of the steps of the losses of the step's batch",
    "test_losses": "on the whole test set, after the last step",
    "majority_accuracies": "test accuracy of always answering the training set's commonest class",
    "step_ms": "median wall time of a jitted step, without compilation and without measuring; "
    "the methods are timed in turns, in short blocks",
    "step_ms_quartiles": "the quartiles of the same times",
    "step_ratio": "step_ms over the step_ms of the plain mean",
    "compile_seconds": "time to trace and compile that step",
    "conflict_share": "share of the steps in which the gradients of some two tasks had a negative "
    "inner product",
    "conflicting_pairs_share": "share of all pairs of tasks with one, mean over the steps",
    "direction_raises_share": "share of the steps in which the direction d that goes into adam "
    f"raises a loss to first order: g_i . d < -{ROUNDING:g} |g_i| |d| for some task i",
    "update_raises_share": "the same for the update that comes out of adam",
    "curves": "moving averages over a twentieth of the steps, at the middle of each window; "
    "cosines are those of the gradients of the shared trunk, over all pairs of tasks",
}

_NUMBER_HEADERS = (
    "train\nloss",
    "test\nloss",
    "ms a\nstep",
    "times\nplain",
    "comp.\ns",
    "conflict\n% steps",
    "raising\nbefore",
    "raising\nafter",
)

_LEGEND = (
    "Losses: means over the tasks. comp.: tracing and compiling the step. conflict: steps in which "
    "two tasks' gradients had a negative inner product. raising: % of the steps that raised some "
    "loss to first order, before adam (the direction d that goes into it) and after (the update "
    "that comes out of it)."
)


def print_report(console: Console, dataset: Dataset, results: list[Result]) -> None:
    """Prints the table, what its columns mean, and what was found."""
    console.print()
    console.print(make_table(dataset, results, wide=console.width > 90))
    console.print()
    console.print(_LEGEND, style="dim", highlight=False)
    console.print()
    for sentence in summarize(dataset, results):
        console.print(sentence, highlight=False, markup=False)


def make_table(dataset: Dataset, results: list[Result], wide: bool = True) -> Table:
    """The table of all methods.

    Each of two tasks gets a column. Of more tasks it shows the mean and the worst.

    Args:
        dataset: The data.
        results: Of all methods, the baseline first.
        wide: Whether there is room for two spaces between columns; with one it has 80 characters.

    Returns:
        The table.
    """
    if dataset.num_tasks == 2:
        accuracy_headers = [f"{name}\nacc %" for name in dataset.task_names]
    else:
        accuracy_headers = ["mean\nacc %", "worst\nacc %"]
    table = Table(
        box=None, padding=(0, 2 if wide else 1, 0, 0), pad_edge=False, header_style="bold"
    )
    table.add_column("method", vertical="bottom", no_wrap=True)
    for header in (*accuracy_headers, *_NUMBER_HEADERS):
        table.add_column(header, justify="right")
    for i, result in enumerate(results):
        accuracies = _shown_accuracies(result.run.test_accuracies)
        numbers = _shown_numbers(result, results[0])
        table.add_row(result.name, *accuracies, *numbers, style="bold" if i == 0 else None)
    table.add_row("majority", *_shown_accuracies(dataset.majority_rates()), style="dim")
    return table


def as_json(
    settings: dict[str, Any], dataset: Dataset, results: list[Result], seconds: float
) -> dict[str, Any]:
    """The numbers as JSON types; `None` stands for a number that is not finite.

    Args:
        settings: The options of the run.
        dataset: The data.
        results: The baseline and the aggregators.
        seconds: Wall time of the whole run.

    Returns:
        The content of the file. `DEFINITIONS`, which is in it, says what the numbers are.
    """
    device = jax.devices()[0]
    return _plain(
        {
            "settings": settings,
            "versions": {"python": platform.python_version(), "jaxjd": jaxjd.__version__}
            | {name: version(name) for name in ("jax", "jaxlib", "optax", "numpy")},
            "machine": {
                "platform": device.platform,
                "device": device.device_kind,
                "cpu_count": os.cpu_count(),
            },
            "data": {
                "name": dataset.name,
                "description": dataset.description,
                "tasks": dataset.task_names,
                "num_train": len(dataset.train_inputs),
                "num_test": len(dataset.test_inputs),
                "majority_accuracies": dataset.majority_rates(),
            },
            "definitions": DEFINITIONS,
            "methods": [_method_as_json(result, results[0]) for result in results],
            "summary": summarize(dataset, results),
            "seconds": seconds,
        }
    )


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Writes strict JSON, in which NaN and Infinity do not exist."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _shown_accuracies(accuracies: np.ndarray) -> list[str]:
    shown = accuracies if len(accuracies) == 2 else (accuracies.mean(), accuracies.min())
    return [percent(float(x)) for x in shown]


def _shown_numbers(result: Result, baseline: Result) -> list[str]:
    return [
        f"{result.train_losses.mean():.3f}",
        f"{result.run.test_losses.mean():.3f}",
        f"{result.median_ms:.2f}",
        f"{result.median_ms / baseline.median_ms:.2f}",
        f"{result.compile_seconds:.1f}",
        percent(result.conflict_share),
        percent(result.direction_raises_share),
        percent(result.update_raises_share),
    ]


def _method_as_json(result: Result, baseline: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "test_accuracies": result.run.test_accuracies,
        "test_accuracy_mean": result.run.test_accuracies.mean(),
        "test_accuracy_worst": result.run.test_accuracies.min(),
        "test_losses": result.run.test_losses,
        "train_losses": result.train_losses,
        "step_ms": result.median_ms,
        "step_ms_quartiles": np.percentile(result.step_ms, [25, 75]),
        "step_ratio": result.median_ms / baseline.median_ms,
        "compile_seconds": result.compile_seconds,
        "conflict_share": result.conflict_share,
        "conflicting_pairs_share": result.conflicting_pairs_share,
        "direction_raises_share": result.direction_raises_share,
        "update_raises_share": result.update_raises_share,
        "curves": curves(result)._asdict(),
    }


def _plain(value: Any) -> Any:
    """The value in JSON types, numbers with six digits, `None` for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

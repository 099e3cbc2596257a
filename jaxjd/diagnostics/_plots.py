"""Pictures of diagnostics. They need matplotlib, which the extra ``plot`` installs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxjd.checks import type_name

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":", "-.")


def plot_conflict(cosines: Any, names: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draws a heat map of the cosines between tasks: red where they conflict.

    Args:
      cosines: What `cosine_matrix` returns, shape ``(m, m)``.
      names: The tasks' names; their numbers by default.
      ax: The matplotlib axes to draw into; new ones by default.

    Returns:
      The axes. Nothing is shown or saved.

    Raises:
      ImportError: If matplotlib is missing.
      ValueError: If `cosines` is not a square matrix, or there is not one name per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> cosines = jnp.array([[1.0, -0.8], [-0.8, 1.0]])
      >>> ax = jaxjd.diagnostics.plot_conflict(cosines, names=["left", "right"])
      >>> ax.get_xticklabels()[1].get_text()
      'right'
    """
    cosines = jax.device_get(cosines)
    shape = getattr(cosines, "shape", ())
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"`cosines` must have shape (m, m), got {type_name(cosines)}.")
    m = shape[0]
    labels = _task_names(names, m)
    ax = _new_axes(ax)
    image = ax.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
    ax.set_xticks(range(m), labels, rotation=45 if m > 4 else 0)
    ax.set_yticks(range(m), labels)
    if m <= 12:
        for row in range(m):
            for column in range(m):
                value = float(cosines[row, column])
                color = "white" if abs(value) > 0.6 else "black"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax


def plot_weights(history: Any, names: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draws the weight of every task over the steps.

    Args:
      history: The weights of every step, shape ``(steps, m)``, as a scan stacks them.
      names: The tasks' names; their numbers by default.
      ax: The matplotlib axes to draw into; new ones by default.

    Returns:
      The axes. Nothing is shown or saved.

    Raises:
      ImportError: If matplotlib is missing.
      ValueError: If `history` is not a matrix, or there is not one name per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> ax = jaxjd.diagnostics.plot_weights(jnp.ones((10, 3)))
      >>> len(ax.lines)
      3
    """
    history = jax.device_get(history)
    if len(getattr(history, "shape", ())) != 2:
        raise ValueError(f"`history` must have shape (steps, m), got {type_name(history)}.")
    labels = _task_names(names, history.shape[1])
    ax = _new_axes(ax)
    _draw_lines(ax, history, labels)
    ax.set_xlabel("step")
    ax.set_ylabel("weight")
    if labels:
        ax.legend(frameon=False, ncols=max(1, len(labels) // 4))
    return ax


def plot_diagnostics(history: Mapping[str, Any], names: Sequence[str] | None = None) -> Any:
    """Draws everything that `summary` returns over the steps, one panel each.

    Args:
      history: What `summary` returns, stacked over the steps, as a scan does it: each array has
        shape ``(steps,)``, ``(steps, m)``, or ``(steps, m, m)``, of which the upper triangle is
        drawn (for cosines: every pair of tasks once). Other arrays are left out.
      names: The tasks' names; their numbers by default.

    Returns:
      The figure. Nothing is shown or saved.

    Raises:
      ImportError: If matplotlib is missing.
      ValueError: If there is nothing to draw, or there is not one name per task.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> history = {"weights": jnp.ones((10, 3)), "conflict_rate": jnp.zeros(10)}
      >>> figure = jaxjd.diagnostics.plot_diagnostics(history)
      >>> [ax.get_title() for ax in figure.axes]
      ['weights', 'conflict_rate']
    """
    panels = {}
    for title, value in history.items():
        value = jax.device_get(value)
        shape = getattr(value, "shape", ())
        if len(shape) == 1:
            panels[title] = (value[:, None], [""])
        elif len(shape) == 2:
            panels[title] = (value, _task_names(names, shape[1]))
        elif len(shape) == 3 and shape[1] == shape[2] > 1:
            labels = _task_names(names, shape[1])
            pairs = [(i, j) for i in range(shape[1]) for j in range(i)]
            columns = value[:, [j for _, j in pairs], [i for i, _ in pairs]]
            panels[title] = (columns, [f"{labels[j]}, {labels[i]}" for i, j in pairs])
    if not panels:
        raise ValueError("`history` has nothing to draw: expected arrays of shape (steps, ...).")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for ax, (title, (values, labels)) in zip(axes.ravel(), panels.items(), strict=False):
        _draw_lines(ax, values, labels)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        if 1 < len(labels) <= 8:
            ax.legend(frameon=False, fontsize=8)
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    return figure


def plot_front(losses: Any, reference: Any = None, ax: Any = None) -> Any:
    """Draws the trade-offs between two losses that a population has found.

    Args:
      losses: The two losses of every member, shape ``(k, 2)``.
      reference: The true front to compare with, shape ``(p, 2)``, or None.
      ax: The matplotlib axes to draw into; new ones by default.

    Returns:
      The axes. Nothing is shown or saved.

    Raises:
      ImportError: If matplotlib is missing.
      ValueError: If `losses` or `reference` is not a matrix of two columns.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> t = jnp.linspace(0.0, 1.0, 20)
      >>> ax = jaxjd.diagnostics.plot_front(jnp.stack([t, 1.0 - t], axis=1))
      >>> ax.get_xlabel()
      'loss 0'
    """
    arrays = {"losses": losses} if reference is None else {"losses": losses, "reference": reference}
    arrays = {name: jax.device_get(value) for name, value in arrays.items()}
    for name, value in arrays.items():
        if len(getattr(value, "shape", ())) != 2 or value.shape[1] != 2:
            raise ValueError(f"`{name}` must have shape (k, 2), got {type_name(value)}.")
    ax = _new_axes(ax)
    if reference is not None:
        points = arrays["reference"]
        ax.plot(points[:, 0], points[:, 1], ".", ms=2, color="0.7", label="front")
    points = arrays["losses"]
    ax.plot(points[:, 0], points[:, 1], "o", ms=4, color=_COLORS[0], label="population")
    ax.set_xlabel("loss 0")
    ax.set_ylabel("loss 1")
    if reference is not None:
        ax.legend(frameon=False)
    return ax


def _pyplot() -> Any:
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "The plots of jaxjd.diagnostics need matplotlib: install it, or jaxjd with the extra "
            "`plot` (python -m pip install 'jaxjd[plot]')."
        ) from error


def _new_axes(ax: Any) -> Any:
    return _pyplot().subplots(layout="constrained")[1] if ax is None else ax


def _task_names(names: Sequence[str] | None, num_tasks: int) -> list[str]:
    if names is None:
        return [str(task) for task in range(num_tasks)]
    if len(names) != num_tasks:
        raise ValueError(f"`names` has {len(names)} entries, but there are {num_tasks} tasks.")
    return [str(name) for name in names]


def _draw_lines(ax: Any, values: Any, labels: Sequence[str]) -> None:
    for number, label in enumerate(labels):
        turn, color = divmod(number, len(_COLORS))
        style = _STYLES[turn % len(_STYLES)]
        ax.plot(values[:, number], style, color=_COLORS[color], lw=1.3, label=label)
    ax.grid(alpha=0.25)

"""Draws the pictures of docs/concepts.md and of README.md, from what jaxjd computes.

From the root of the repository::

    python docs/figures/draw.py    # docs/figures/*.svg and readme.png

Needs the extra `plot`. The pictures are committed, because README.md and the pages are also read
where nothing is built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import jaxjd
from jaxjd import diagnostics

HERE = Path(__file__).parent
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "svg.hashsalt": "jaxjd",  # The same file from every run.
}
# Okabe and Ito's colours, which most colour-blind readers can tell apart.
GRADIENT, CONE, FRONT = "0.25", "#cfe5f2", "#009e73"
COLORS = {"mean": "#d55e00", "upgrad": "#0072b2", "dualproj": "#cc79a7", "mgda": "#e69f00"}
NAMES = {"mean": "mean", "upgrad": "UPGrad", "dualproj": "DualProj", "mgda": "MGDA"}

# Two gradients in the plane of which the long one turns the mean against the short one.
GRADIENTS = jnp.array([[3.2, 0.5], [-1.0, 1.0]])

# Two quadratic losses of two parameters, (x - center)' H (x - center) / 2. The first is steep.
CENTERS = jnp.array([[1.5, -0.5], [-0.5, 0.5]])
HESSIANS = jnp.array([[[8.0, 0.0], [0.0, 0.5]], [[1.0, 0.6], [0.6, 1.0]]])
START = jnp.array([-1.5, 3.0])
RATE, STEPS = 0.02, 1500


def updates_of(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The update that each method makes of the two gradients."""

    @jax.jit
    def all_updates(jacobian: jax.Array) -> list[jax.Array]:
        aggregators = [getattr(jaxjd, name)() for name in names]
        return [tx.update(jacobian, tx.init(jacobian[0]))[0] for tx in aggregators]

    return dict(zip(names, map(np.asarray, all_updates(GRADIENTS)), strict=True))


def arrow(axis: Axes, end: np.ndarray, label: str, color: str, **text: Any) -> None:
    """An arrow from the origin with its name at the head."""
    axis.annotate(
        "",
        xy=end,
        xytext=(0, 0),
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0},
    )
    text = {"xytext": (4, 4), "ha": "left", "va": "bottom"} | text
    axis.annotate(label, xy=end, textcoords="offset points", color=color, **text)


def draw_plane(axis: Axes) -> None:
    """The two gradients and the dual cone of them."""
    size = 6.0
    g1, g2 = np.asarray(GRADIENTS)
    # The edges of the cone are at right angles to the gradients, on the side of the other one.
    edges = np.array([[-g1[1], g1[0]], [g2[1], -g2[0]]])
    edges /= np.linalg.norm(edges, axis=1)[:, None]
    corners = np.vstack([[0, 0], size * edges[0], size * edges.sum(0), size * edges[1]])
    axis.fill(*corners.T, color=CONE, lw=0)
    for edge in edges:
        axis.plot([0, size * edge[0]], [0, size * edge[1]], color="#7fb2d1", lw=0.8)
    arrow(axis, g1, "$g_1$", GRADIENT)
    arrow(axis, g2, "$g_2$", GRADIENT, xytext=(-4, 4), ha="right")
    axis.set(xlim=(-1.6, 3.8), ylim=(-0.35, 2.25), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.annotate("dual cone", xy=(0.5, 2.0), color="#4a86a8", ha="center")


def draw_cone(axes: np.ndarray) -> None:
    """The mean outside of the dual cone; three updates inside of it."""
    updates = updates_of(("mean", "upgrad", "dualproj", "mgda"))
    for axis in axes:
        draw_plane(axis)
    arrow(axes[0], updates["mean"], "mean", COLORS["mean"])
    axes[0].set_title("The mean conflicts with $g_2$")
    arrow(axes[1], updates["upgrad"], "UPGrad", COLORS["upgrad"], xytext=(-1, 4), ha="center")
    arrow(axes[1], updates["dualproj"], "DualProj", COLORS["dualproj"], va="center")
    arrow(axes[1], updates["mgda"], "MGDA", COLORS["mgda"], xytext=(0, 4), ha="center")
    axes[1].set_title("These conflict with neither")


class Training(NamedTuple):
    """What `train_network` returns.

    Attributes:
      losses: Shape ``(steps, tasks)``.
      cosines: Between the tasks' gradients of the trunk, shape ``(steps, tasks, tasks)``.
    """

    losses: np.ndarray
    cosines: np.ndarray


TASKS = {
    "$\\sin 2x$": lambda x: jnp.sin(2 * x),
    "$\\cos 2x$": lambda x: jnp.cos(2 * x),
    "$\\sin 3x$": lambda x: jnp.sin(3 * x),
    "$|x|$": jnp.abs,
}


def train_network(steps: int = 400) -> Training:
    """A trunk of six units with a linear head per task, trained on the mean of the losses."""
    x = jnp.linspace(-2, 2, 64)[:, None]
    targets = jnp.concatenate([target(x) for target in TASKS.values()], axis=1)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "trunk": {"kernel": 2 * jax.random.normal(keys[0], (1, 6)), "bias": jnp.zeros((1, 6))},
        "heads": 0.5 * jax.random.normal(keys[1], (6, len(TASKS))),
    }

    def losses_fn(params: Any) -> jax.Array:
        trunk = params["trunk"]
        features = jnp.tanh(x @ trunk["kernel"] + trunk["bias"])
        return jnp.mean((features @ params["heads"] - targets) ** 2, axis=0)

    tx = optax.chain(jaxjd.mean(), optax.adam(0.02))

    def step(carry: Any, _: None) -> Any:
        params, opt_state = carry
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(params)
        cosines = diagnostics.cosine_matrix(jaxjd.gramian(jacobian["trunk"]))
        updates, opt_state = tx.update(jacobian, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (losses, cosines)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[1])
    return Training(*map(np.asarray, run(params)))


def draw_cosines(axes: np.ndarray) -> None:
    """The cosines at three steps of a training, and those of all pairs over it."""
    losses, cosines = train_network()
    tasks = range(len(TASKS))
    for axis, step in zip(axes, (0, 40, len(losses) - 1), strict=False):
        axis.imshow(cosines[step], cmap="RdBu", vmin=-1, vmax=1)
        for i in tasks:
            for j in tasks:
                color = "white" if abs(cosines[step, i, j]) > 0.6 else "black"
                text = f"{cosines[step, i, j]:.1f}".replace("-0.0", "0.0")
                axis.text(j, i, text, ha="center", va="center", color=color)
        axis.set_xticks(tasks, TASKS)
        axis.set_yticks(tasks, TASKS if axis is axes[0] else [""] * len(TASKS))
        axis.tick_params(length=0, labelsize=8)
        axis.set_title(f"cosines, step {step}")
    axis = axes[-1]
    for i, j in zip(*np.triu_indices(len(TASKS), 1), strict=True):
        axis.plot(cosines[:, i, j], color="0.5", lw=0.8)
    axis.axhline(0, color="black", lw=0.8)
    axis.set(title="cosine of each pair", xlabel="step", ylim=(-1, 1))


def losses_fn(x: jax.Array) -> jax.Array:
    """The two quadratic losses at a point."""
    difference = x - CENTERS
    return jnp.einsum("ti,tij,tj->t", difference, HESSIANS, difference) / 2


def descend(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The path of gradient descent with an aggregator, and the losses on it."""
    tx = optax.chain(getattr(jaxjd, name)(), optax.sgd(RATE))

    def step(carry: Any, _: None) -> Any:
        x, opt_state = carry
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(x)
        updates, opt_state = tx.update(jacobian, opt_state, x)
        return (optax.apply_updates(x, updates), opt_state), (x, losses)

    run = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=STEPS)[1])
    path, losses = run(START)
    return np.asarray(path), np.asarray(losses)


def pareto_set() -> tuple[np.ndarray, np.ndarray]:
    """The minima of all convex combinations of the two losses, and the losses there."""
    weights = jnp.linspace(0, 1, 201)
    weights = jnp.stack([weights, 1 - weights], axis=1)
    matrices = jnp.einsum("kt,tij->kij", weights, HESSIANS)
    sides = jnp.einsum("kt,tij,tj->ki", weights, HESSIANS, CENTERS)
    points = jnp.linalg.solve(matrices, sides[..., None])[..., 0]
    return np.asarray(points), np.asarray(jax.vmap(losses_fn)(points))


def draw_paths(axes: np.ndarray) -> None:
    """Two paths to the Pareto set: in the plane of the parameters and in that of the losses."""
    methods = ("mean", "upgrad")
    front, front_losses = pareto_set()
    low, high = (-2.1, -1.3), (2.3, 3.4)
    grid = [np.linspace(low[i], high[i], 120) for i in range(2)]
    points = jnp.asarray(np.stack(np.meshgrid(*grid), -1).reshape(-1, 2), jnp.float32)
    values = np.asarray(jax.vmap(losses_fn)(points)).reshape(120, 120, 2)
    plane = axes[0]
    for task, style in enumerate(("solid", "dashed")):
        levels = np.quantile(values[..., task], [0.02, 0.08, 0.2, 0.4, 0.6, 0.8])
        plane.contour(
            *grid, values[..., task], levels, colors="0.75", linewidths=0.7, linestyles=style
        )
        plane.plot(*np.asarray(CENTERS[task]), "+", color="0.4")
        plane.annotate(
            f"least $L_{task + 1}$",
            xy=np.asarray(CENTERS[task]),
            xytext=(0, -5),
            textcoords="offset points",
            color="0.4",
            ha="center",
            va="top",
        )
    plane.plot(*front.T, color=FRONT, lw=3, alpha=0.7, zorder=1)
    plane.plot(*np.asarray(START), "o", color="black", ms=4)
    plane.annotate(
        "start", xy=np.asarray(START), xytext=(5, 2), textcoords="offset points", ha="left"
    )
    plane.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    plane.set_title("Parameters")
    for name in methods:
        path, losses = descend(name)
        style = {"color": COLORS[name], "lw": 1.6}
        plane.plot(*path.T, label=NAMES[name], **style)
        plane.plot(*path[-1], "*", color=COLORS[name], ms=9, mec="white", mew=0.5)
        if len(axes) > 1:
            axes[1].plot(*losses.T, **style)
            axes[1].plot(*losses[-1], "*", color=COLORS[name], ms=9, mec="white", mew=0.5)
    plane.plot([], [], color=FRONT, lw=3, alpha=0.7, label="Pareto set")
    plane.legend(frameon=False, loc="upper right")
    if len(axes) > 1:
        axis = axes[1]
        axis.plot(*front_losses.T, color=FRONT, lw=3, alpha=0.7, zorder=1)
        axis.plot(*np.asarray(losses_fn(START)), "o", color="black", ms=4)
        axis.set(xscale="log", xlim=(0.02, 60), ylim=(0, None))
        axis.set(xlabel="$L_1$", ylabel="$L_2$", title="Losses")


def draw_readme(axes: np.ndarray) -> None:
    """One gradient step and one training."""
    updates = updates_of(("mean", "upgrad"))
    draw_plane(axes[0])
    arrow(axes[0], updates["mean"], "mean", COLORS["mean"])
    arrow(axes[0], updates["upgrad"], "UPGrad", COLORS["upgrad"], xytext=(-1, 4), ha="center")
    axes[0].set_title("One step: two gradients and their combinations")
    draw_paths(axes[1:])
    axes[1].set_title("A training: two losses, two parameters")


class Picture(NamedTuple):
    """A picture: its size in inches, its columns and the function that fills them."""

    size: tuple[float, float]
    columns: int
    draw: Callable[[np.ndarray], None]


PICTURES = {
    "readme.png": Picture((8.4, 2.9), 2, draw_readme),
    "cone.svg": Picture((8.0, 2.4), 2, draw_cone),
    "cosines.svg": Picture((9.6, 2.5), 4, draw_cosines),
    "paths.svg": Picture((8.0, 3.3), 2, draw_paths),
}


def save(picture: Picture, path: Path) -> None:
    """Draws a picture into a file."""
    with rc_context(STYLE):
        figure = Figure(figsize=picture.size, layout="constrained")
        picture.draw(np.ravel(figure.subplots(1, picture.columns)))
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
            return
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(120)
        canvas.draw()
        # Few colours make the committed file small.
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_all(folder: Path = HERE) -> None:
    """Draws all pictures."""
    for name, picture in PICTURES.items():
        save(picture, folder / name)


if __name__ == "__main__":
    draw_all()

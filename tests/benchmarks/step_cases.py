"""The cases of `tests.benchmarks.steps`: sizes, and the same numbers for both frameworks.

It needs numpy only: a process that measures TorchJD's memory must not load JAX.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

Numbers = tuple[dict[str, Any], dict[str, Any]]


class Case(NamedTuple):
    """A model, a batch and a number of losses.

    Attributes:
      name: The name on the command line.
      kind: The model: "mlp", "features" (the same at its last layer, with heads), "transformer",
        "cnn", "examples" (an MLP with one loss per example) or "tensors"; or a shape of problem of
        `tests.benchmarks.shapes`: "heads" (an MLP with heads, all of them aggregated), "pinn",
        "own" (a batch for each loss), "stacked" (the same on one axis), "adapters" or
        "images" (the CNN with several losses).
      batch: The number of examples.
      m: The number of losses.
      depth: The number of layers.
      width: Their width.
      length: The length of the sequences.
      heads: The number of attention heads.
      inputs: The size of an example, where it is not `width`.
    """

    name: str
    kind: str
    batch: int
    m: int
    depth: int = 0
    width: int = 0
    length: int = 0
    heads: int = 0
    inputs: int = 0

    @property
    def tiny(self) -> bool:
        return self.name.startswith("tiny")

    @property
    def per_example(self) -> bool:
        return self.kind in ("cnn", "examples")

    @property
    def is_shape(self) -> bool:
        return any(self.name == case.name for case in (*_SHAPES, *_TINY_SHAPES))


CLASSES = 10

_ALL = (
    Case("a-32", "mlp", batch=32, m=8, depth=8, width=1024),
    Case("a-128", "mlp", batch=128, m=8, depth=8, width=1024),
    Case("b-2", "mlp", batch=128, m=2, depth=8, width=512),
    Case("b-32", "mlp", batch=128, m=32, depth=8, width=512),
    Case("c", "transformer", batch=8, m=6, depth=4, width=256, length=64, heads=4),
    Case("d-16", "cnn", batch=16, m=16),
    Case("d-32", "cnn", batch=32, m=32),
    Case("d-64", "cnn", batch=64, m=64),
    Case("d-mlp", "examples", batch=256, m=256, depth=3, width=512, inputs=784),
    Case("e", "tensors", batch=32, m=4, depth=100, width=32),
    Case("features-32", "features", batch=32, m=8, depth=8, width=1024),
    Case("features-128", "features", batch=128, m=8, depth=8, width=1024),
)
_SHAPES = (
    Case("heads-6", "heads", batch=96, m=6, depth=5, width=512),
    Case("heads-8", "heads", batch=32, m=8, depth=8, width=1024),
    Case("pinn", "pinn", batch=2000, m=3, depth=6, width=50),
    Case("own", "own", batch=64, m=8, depth=4, width=512),
    Case("own-384", "own", batch=64, m=8, depth=4, width=384),
    Case("stacked", "stacked", batch=64, m=8, depth=4, width=512),
    Case("cnn-4", "images", batch=24, m=4),
    Case("transformer", "transformer", batch=8, m=6, depth=4, width=256, length=64, heads=4),
    Case("adapters", "adapters", batch=64, m=6, depth=6, width=512),
    Case("mlp-32", "mlp", batch=32, m=8, depth=8, width=1024),
    Case("mlp-128", "mlp", batch=128, m=8, depth=8, width=1024),
    Case("mlp-2", "mlp", batch=128, m=2, depth=8, width=512),
    Case("mlp-32-losses", "mlp", batch=128, m=32, depth=8, width=512),
)
# For the tests of the benchmarks.
_TINY_SHAPES = (
    Case("tiny-heads", "heads", batch=4, m=3, depth=2, width=16),
    Case("tiny-pinn", "pinn", batch=8, m=3, depth=3, width=8),
    Case("tiny-own", "own", batch=4, m=3, depth=2, width=16),
    Case("tiny-stacked", "stacked", batch=4, m=3, depth=2, width=16),
    Case("tiny-images", "images", batch=2, m=2),
    Case("tiny-adapters", "adapters", batch=4, m=3, depth=2, width=16),
)
_TINY = (
    Case("tiny", "mlp", batch=4, m=3, depth=2, width=16),
    Case("tiny-transformer", "transformer", batch=2, m=3, depth=1, width=16, length=4, heads=2),
    Case("tiny-cnn", "cnn", batch=2, m=2),
    Case("tiny-examples", "examples", batch=4, m=4, depth=2, width=16, inputs=8),
    Case("tiny-tensors", "tensors", batch=4, m=2, depth=2, width=8),
    Case("tiny-features", "features", batch=4, m=3, depth=2, width=16),
)
NAMES = tuple(case.name for case in _ALL)
SHAPES = tuple(case.name for case in _SHAPES)
CASES = {case.name: case for case in (*_ALL, *_TINY, *_SHAPES, *_TINY_SHAPES)}
RANK = 8
"""Of the adapters."""


def torchjd_variants_of(case: Case) -> dict[str, str]:
    """TorchJD's ways of taking a step, each with its group, as in `step_jax.variants_of`."""
    if case.kind == "features":
        return {"plain": "plain", "features": "features", "features sequential": "features"}
    names = ("autojac", "autojac gramian", "autojac sequential", "autogram")
    if case.is_shape and case.kind in ("heads", "transformer"):
        # Of the whole Jacobian, as here, and of the trunk's as well, which is another gradient.
        variants = {"plain": "plain", **dict.fromkeys(names, "together")}
        return variants | dict.fromkeys(("mtl", "mtl sequential"), "trunk")
    variants = {"plain": "plain", **dict.fromkeys(names, "together")}
    if case.kind == "tensors":
        variants |= dict.fromkeys(("by tensor", "by tensor sequential"), "by tensor")
    return variants


def make_numbers(case: Case) -> Numbers:
    """Parameters and a batch: matrices have shape ``(inputs, outputs)``, convolutions' are HWIO."""
    generator = np.random.default_rng(0)
    make = {
        "mlp": _mlp,
        "features": _mlp,
        "transformer": _transformer,
        "cnn": _cnn,
        "examples": _examples,
        "tensors": _mlp,
        "heads": _mlp,
        "own": _mlp,
        "stacked": _mlp,
        "adapters": _adapters,
        "pinn": _pinn,
        "images": _cnn,
    }
    return make[case.kind](case, generator)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def _layer(
    generator: np.random.Generator, shape: tuple[int, ...], gain: float = 1.0
) -> dict[str, np.ndarray]:
    scale = math.sqrt(gain / math.prod(shape[:-1]))
    return {"kernel": _normal(generator, shape, scale), "bias": np.zeros(shape[-1], np.float32)}


def _mlp(case: Case, generator: np.random.Generator) -> Numbers:
    d = case.width
    layers = [_layer(generator, (d, d), gain=2.0) for _ in range(case.depth)]
    tasks = (case.m,) if case.kind in ("own", "stacked") else ()
    inputs = _normal(generator, (*tasks, case.batch, d), 1.0)
    heads = _normal(generator, (d, case.m), 1 / math.sqrt(d))
    if case.kind == "tensors":
        return {"trunk": layers}, {"inputs": inputs, "heads": heads}
    kernels = [layer["kernel"] for layer in layers]
    if case.kind in ("features", "heads"):
        return {"trunk": kernels, "heads": list(heads.T.copy())}, {"inputs": inputs}
    return {"trunk": kernels}, {"inputs": inputs, "heads": heads}


def _adapters(case: Case, generator: np.random.Generator) -> Numbers:
    """Low-rank additions to frozen kernels, which come with the batch."""
    params, batch = _mlp(case, generator)
    d = case.width
    pairs = [
        {
            "down": _normal(generator, (d, RANK), 1 / math.sqrt(d)),
            "up": _normal(generator, (RANK, d), 1 / math.sqrt(RANK)),
        }
        for _ in range(case.depth)
    ]
    return {"trunk": pairs}, {**batch, "base": params["trunk"]}


def _pinn(case: Case, generator: np.random.Generator) -> Numbers:
    """A network of ``(t, x)``, and points inside, at the start and at the boundary."""
    sizes = [2, *[case.width] * (case.depth - 1), 1]
    params = {"trunk": [_layer(generator, pair) for pair in itertools.pairwise(sizes)]}

    def points(number: int) -> np.ndarray:
        return generator.uniform(-1, 1, (number, 2)).astype(np.float32)

    few = max(2, case.batch // 40)
    return params, {"inside": points(case.batch), "start": points(few), "edge": points(few)}


def _transformer(case: Case, generator: np.random.Generator) -> Numbers:
    d = case.width

    def norm() -> dict[str, np.ndarray]:
        return {"scale": np.ones(d, np.float32), "bias": np.zeros(d, np.float32)}

    layers = [
        {
            "norm_1": norm(),
            "qkv": _layer(generator, (d, 3 * d)),
            "out": _layer(generator, (d, d)),
            "norm_2": norm(),
            "up": _layer(generator, (d, 4 * d)),
            "down": _layer(generator, (4 * d, d)),
        }
        for _ in range(case.depth)
    ]
    params = {
        "trunk": {"layers": layers, "norm": norm()},
        "heads": [_layer(generator, (d, 1)) for _ in range(case.m)],
    }
    batch = {
        "inputs": _normal(generator, (case.batch, case.length, d), 1.0),
        "targets": _normal(generator, (case.m, case.batch), 1.0),
    }
    return params, batch


def _cnn(case: Case, generator: np.random.Generator) -> Numbers:
    params = {
        "convolutions": [
            _layer(generator, (3, 3, 1, 32)),
            _layer(generator, (3, 3, 32, 64)),
            _layer(generator, (3, 3, 64, 64)),
        ],
        "dense": [_layer(generator, (576, 128)), _layer(generator, (128, CLASSES))],
    }
    inputs = _normal(generator, (case.batch, 28, 28, 1), 1.0)
    return params, {"inputs": inputs, "targets": _targets(case, generator)}


def _examples(case: Case, generator: np.random.Generator) -> Numbers:
    sizes = [case.inputs, *[case.width] * (case.depth - 1), CLASSES]
    params = {"dense": [_layer(generator, pair) for pair in itertools.pairwise(sizes)]}
    inputs = _normal(generator, (case.batch, case.inputs), 1.0)
    return params, {"inputs": inputs, "targets": _targets(case, generator)}


def _targets(case: Case, generator: np.random.Generator) -> np.ndarray:
    """A class per example; of "images" one for each loss."""
    shape = (case.m, case.batch) if case.kind == "images" else (case.batch,)
    return generator.integers(CLASSES, size=shape).astype(np.int32)

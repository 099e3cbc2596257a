"""Random functions with several losses, cut into what each loss owns, against ``jax.jacrev``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd.autodiff import _parts
from tests import random_losses

OPTIONS = (
    {"form": "auto"},
    {"form": "factored", "chunk_size": 2},
    {"form": "auto", "chunk_size": 1},
    {"form": "factored"},
)
# Short programs of all kinds.
QUICK = (14, 15, 20, 36, 56, 66, 71, 78, 94)


def assert_close(found, expected, tolerance, what):
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in pairs:
        leaf, wanted = np.asarray(leaf, np.float64), np.asarray(wanted, np.float64)
        assert leaf.shape == wanted.shape, (what, path)
        scale = max(np.max(np.abs(wanted), initial=0), 1e-8)
        error = np.max(np.abs(leaf - wanted), initial=0) / scale
        assert error <= tolerance, f"{what}{jax.tree_util.keystr(path)}: {error:.1e}"


def groups_of(labels, tree):
    pairs = list(zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True))
    return {
        name: [leaf for label, leaf in pairs if label == name]
        for name in sorted({label for label, _ in pairs})
    }


def weights_of(gramian):
    return jnp.arange(1.0, 1 + len(gramian), dtype=gramian.dtype)


def check(seed, dtype, tolerance):
    params, data, labels = random_losses.arguments(seed, dtype)
    fn = random_losses.losses_of(seed)
    losses_of = lambda params, data: fn(params, data)[0]
    options = OPTIONS[seed % len(OPTIONS)]

    def by_parts(params, data):
        if seed % 3 == 0:
            engine = jaxjd.value_and_gramian(losses_of, labels=labels, **options)
            values, gramians, pullback = engine(params, data)
            weights = weights_of(next(iter(gramians.values())))
            return values, gramians, pullback(weights)
        engine = jaxjd.value_and_jacobian(fn, has_aux=True, **options)
        (values, aux), jacobian = engine(params, data)
        assert aux.pop("name") == "x"
        gramian = jaxjd.gramian(jacobian)
        update = jaxjd.combine(weights_of(gramian), jacobian)
        return (values, aux), jaxjd.materialize(jacobian), gramian, update

    def by_jacrev(params, data):
        values, aux = fn(params, data)
        aux.pop("name")
        rows = jaxjd.stack_tasks(jax.jacrev(losses_of)(params, data), values)
        gramian = jaxjd.gramian(rows)
        update = jaxjd.combine(weights_of(gramian), rows)
        if seed % 3 == 0:
            groups = groups_of(labels, rows)
            return values, {name: jaxjd.gramian(leaves) for name, leaves in groups.items()}, update
        return (values, aux), rows, gramian, update

    run = jax.jit(lambda params, data: (by_parts(params, data), by_jacrev(params, data)))
    assert_close(*run(params, data), tolerance, f"seed {seed}, {options}: ")


@pytest.mark.parametrize(
    "seed",
    [seed if seed in QUICK else pytest.param(seed, marks=pytest.mark.slow) for seed in range(120)],
)
def test_equals_jacrev(seed, monkeypatch):
    monkeypatch.setattr(_parts, "pays", lambda *_: True)
    with jax.enable_x64(True):
        check(seed, "float64", 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 230))
def test_equals_jacrev_in_float32(seed, monkeypatch):
    monkeypatch.setattr(_parts, "pays", lambda *_: True)
    check(seed, "float32", 2e-4)

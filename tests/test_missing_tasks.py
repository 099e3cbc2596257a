"""A task without labels in a batch: its masked mean is a loss of zero with a gradient of zero."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import scalarizers as S
from jaxjd import weightings as W
from tests import registry
from tests.registry import AGGREGATORS, VARIANTS, M, by_name

PARAMS = registry.example_params()
LOSSES = jnp.array([1.0, 2.0, 0.5])
PRESENT = jnp.ones(M)
MISSING = jnp.array([1.0, 0.0, 1.0])
ROWS = jnp.array([[1.0, 2.0, 0.0], [2.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])


def jacobians(seed: int):
    leaves, treedef = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    rows = [jax.random.normal(k, (M, *x.shape)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, rows)


def numbers(tree) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


QUICK = [
    method
    for method in AGGREGATORS
    if (method.losses or method in VARIANTS) and method.name != "cagrad(rescale)"
]


@pytest.mark.parametrize(
    "method",
    [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in AGGREGATORS],
    ids=by_name,
)
def test_every_method_goes_on_when_a_task_is_missing(method):
    aggregator = method.aggregator(M)

    @jax.jit
    def step(present, jacobian, state):
        def masked(leaf):
            return jnp.expand_dims(present, tuple(range(1, leaf.ndim))) * leaf

        jacobian = jax.tree.map(masked, jacobian)
        extra = method.extra_args(jacobian)
        if method.losses:
            extra["losses"] = LOSSES * present
        return aggregator.update(jacobian, state, **extra)

    batches = [jacobians(seed) for seed in range(3)]
    for missing in (0, 1):
        state = aggregator.init(PARAMS)
        for call, jacobian in enumerate(batches):
            update, state = step(MISSING if call == missing else PRESENT, jacobian, state)
            for leaf in numbers((update, state)):
                assert np.isfinite(leaf).all()
        # A later call is no longer held up by the missing task.
        assert max(np.abs(leaf).max() for leaf in numbers(update)) > 1e-3
        if not (method.stateful or method.random):
            fresh, _ = step(PRESENT, batches[-1], aggregator.init(PARAMS))
            for leaf, other in zip(numbers(fresh), numbers(update), strict=True):
                np.testing.assert_array_equal(leaf, other)


def update_of(weighting, *calls):
    """The weights of every call, each a pair of what is present and a scale of the losses."""
    state = weighting.init(M, jnp.zeros(3))
    found = []
    for present, scale in calls:
        jacobian = ROWS * present[:, None]
        stat = jacobian if isinstance(weighting, jaxjd.JacobianWeighting) else None
        stat = jaxjd.gramian(jacobian) if stat is None else stat
        weights, state = weighting.update(stat, state, losses=LOSSES * present * scale)
        found.append(np.asarray(weights))
    return found, state


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_mgda_leaves_the_missing_task_out(normalization, scale):
    (weights,), _ = update_of(W.mgda(normalization), (MISSING, scale))
    rows = ROWS[::2] / LOSSES[::2, None]
    if normalization == "loss+":
        rows = rows / jnp.linalg.norm(ROWS[::2], axis=1, keepdims=True)
    a, b = np.asarray(rows, float)
    first = np.clip(b @ (b - a) / ((a - b) @ (a - b)), 0, 1)
    np.testing.assert_allclose(weights, [first, 0, 1 - first], rtol=1e-5)


def test_mgda_divides_none_where_all_losses_are_zero():
    gramian = jaxjd.gramian(ROWS)
    weights, _ = W.mgda("loss").update(gramian, (), losses=jnp.zeros(M))
    np.testing.assert_array_equal(weights, W.mgda().update(gramian, ())[0])


def test_what_is_relative_to_the_first_call_starts_with_the_first_gradient():
    """A missing task's reference is that of the call in which it comes."""
    late = [(MISSING, 1.0), (PRESENT, 1.0), (PRESENT, 1.0)]
    _, state = update_of(W.gradnorm(), *late)
    np.testing.assert_array_equal(state.initial_losses, LOSSES)
    _, state = update_of(W.stch(warmup_steps=1), *late)
    np.testing.assert_allclose(state.nadir, jnp.linalg.norm(ROWS, axis=1), rtol=1e-6)
    _, state = update_of(W.excess_mtl(), *late)
    # The first risk of a row is the sum of its absolute entries.
    np.testing.assert_allclose(state.baseline, jnp.sum(jnp.abs(ROWS), axis=1), rtol=1e-6)


SCALARIZERS = {
    "constant": functools.partial(S.constant, [0.2, 0.3, 0.5]),
    "cosmos": functools.partial(S.cosmos, 1.0, [0.2, 0.3, 0.5]),
    "dwa": S.dwa,
    "famo": S.famo,
    "geometric_mean": S.geometric_mean,
    "imtl_l": S.imtl_l,
    "mean": S.mean,
    "pbi": functools.partial(S.pbi, 1.0, [0.2, 0.3, 0.5]),
    "random": S.random,
    "stch": functools.partial(S.stch, 0.5),
    "stch(warmup)": functools.partial(S.stch, 0.5, warmup_steps=1),
    "sum": S.sum,
    "uw": S.uw,
}


def test_all_scalarizers_are_here():
    functions = {name for name in S.__all__ if name.islower()}
    assert {name.split("(")[0] for name in SCALARIZERS} == functions


@functools.cache
def scalarizer_and_step(name):
    scalarizer = SCALARIZERS[name]()

    @jax.jit
    def step(losses, state):
        value, gradient = jax.value_and_grad(scalarizer.apply)(losses, state)
        return value, gradient, scalarizer.update(losses, state)

    return scalarizer, step


@pytest.mark.parametrize("name", SCALARIZERS)
@pytest.mark.parametrize("missing", [0, 1])
def test_every_scalarizer_goes_on_when_a_task_is_missing(name, missing):
    scalarizer, step = scalarizer_and_step(name)
    state = scalarizer.init(M)
    for call in range(4):
        losses = (
            np.asarray(LOSSES) * np.asarray(MISSING if call == missing else PRESENT) * (1 + call)
        )
        value, gradient, state = step(losses, state)
        for leaf in numbers((value, gradient, state)):
            assert np.isfinite(leaf).all()
    assert np.all(gradient != 0)


def test_a_missing_task_tells_dwa_and_famo_nothing():
    """The other weights are those of a run without the task."""
    sequence = [LOSSES, LOSSES * jnp.array([0.5, 0.0, 0.9]), LOSSES]
    dwa, famo = S.dwa(), S.famo(weight_decay=0.0)
    state = dwa.init(M)
    for losses in sequence[:2]:
        state = dwa.update(losses, state)
    weights = jax.grad(dwa.apply)(LOSSES, state)
    expected = M * jax.nn.softmax(jnp.array([0.5, 1.0, 0.9]) / 2)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    state = famo.update(sequence[1], famo.init(M), previous_losses=sequence[0])
    assert state.logits[1] == 0
    pair = famo.update(sequence[1][::2], famo.init(2), previous_losses=sequence[0][::2])
    np.testing.assert_allclose(state.logits[::2], pair.logits, rtol=1e-5)

"""Steps that see some of the tasks, with weights that are kept between."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings as W
from tests.matrices import gaussian

TASKS, K, EVERY = 6, 2, 4
STEPS = jnp.array([[0, 1], [1, 0], [2, 1], [0, 2], [5, 0], [3, 4], [4, 1], [2, 3], [1, 5], [0, 3]])
# The first and every fourth call, and those with a task that was in none of these.
WITH_NEW_WEIGHTS = [0, 2, 4, 5, 8]
PARAMS = {"trunk": jnp.asarray(gaussian(0, 4, 6)), "heads": jnp.asarray(gaussian(1, TASKS, 6))}
BATCHES = jnp.asarray(gaussian(2, len(STEPS), K, 5, 4))
PREFERENCES = jnp.linspace(1.0, 2.0, TASKS)


def losses_fn(params, tasks, x):
    def loss(task, x):
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"][task] - 1.0) ** 2)

    return jax.vmap(loss)(tasks, x)


METHODS = {
    "upgrad": W.upgrad(),
    "gradnorm": W.gradnorm(lr=0.1),
    "preferences": lambda tasks: W.upgrad(PREFERENCES[tasks]),
    "smoothed": W.cr_mogm(W.upgrad(), 0.5),
}
QUICK = ("gradnorm", "preferences")


def slow_but(names, quick):
    marks = lambda name: () if name in quick else pytest.mark.slow
    return [pytest.param(name, marks=marks(name)) for name in names]


@pytest.mark.parametrize("name", slow_but(METHODS, QUICK))
def test_it_is_the_steps_by_hand(name):
    """A subset without `every` is called where weights are due, and plain gradients between."""
    subset = jaxjd.subset(METHODS[name], num_tasks=TASKS, num_present=K)
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, subset, every=EVERY)

    def step(state, inputs):
        tasks, x = inputs
        (losses, gradient), state = apply(state, PARAMS, tasks, x, tasks=tasks)
        return state, (losses, gradient, state.aggregator.weights)

    state, found = jax.jit(lambda state: jax.lax.scan(step, state, (STEPS, BATCHES)))(init(PARAMS))

    @jax.jit
    def update(state, tasks, x):
        losses, rows = losses_fn(PARAMS, tasks, x), jax.jacrev(losses_fn)(PARAMS, tasks, x)
        return losses, rows, subset.update(rows, state, PARAMS, losses=losses, tasks=tasks)

    inner, last = subset.init(PARAMS), np.full(TASKS, np.nan, np.float32)
    for number, (tasks, x) in enumerate(zip(np.asarray(STEPS), BATCHES, strict=True)):
        losses, rows, (gradient, after) = update(inner, jnp.asarray(tasks), x)
        if number in WITH_NEW_WEIGHTS:
            inner = after
            last[tasks] = inner.weights[tasks]
        else:
            gradient = jaxjd.combine(jnp.asarray(last[tasks]), rows)
        weights = np.zeros(TASKS, np.float32)
        weights[tasks] = last[tasks]
        here = jax.tree.map(lambda part, number=number: part[number], found)
        for a, b in zip(
            jax.tree.leaves(here), jax.tree.leaves((losses, gradient, weights)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    assert not np.isnan(last).any()
    np.testing.assert_allclose(state.kept[0], last, rtol=1e-4)
    assert state.kept[1].all()
    for a, b in zip(
        jax.tree.leaves(state.aggregator.weighting), jax.tree.leaves(inner.weighting), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_indices_that_are_no_tasks():
    subset = jaxjd.subset(W.mean(), num_tasks=TASKS, num_present=K)
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, subset, every=2)
    step = jax.jit(lambda state, tasks: apply(state, PARAMS, tasks, BATCHES[0], tasks=tasks))
    _, state = step(init(PARAMS), jnp.array([0, 1]))
    (_, gradient), after = step(state, jnp.array([1, 1]))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.isfinite(after.kept[0]).all()
    with pytest.raises(ValueError, match="`tasks` must be the indices of the 2 tasks"):
        apply(init(PARAMS), PARAMS, jnp.array([0, 1]), BATCHES[0])


@pytest.mark.parametrize(
    "aggregator",
    [
        jaxjd.subset(
            lambda tasks: jaxjd.graddrop(num_tasks=tasks.size), num_tasks=6, num_present=2
        ),
        jaxjd.subset(lambda tasks: jaxjd.moco(num_tasks=tasks.size), num_tasks=6, num_present=2),
        jaxjd.upgrad(num_tasks=2),
    ],
    ids=["graddrop", "moco", "no subset"],
)
def test_aggregators_have_no_weights_to_keep(aggregator):
    with pytest.raises(
        ValueError, match=r"`every` for `jaxjd\.subset` of one; found an aggregator"
    ):
        jaxjd.aggregated_value_and_grad(losses_fn, aggregator, every=2)

"""JAX's guards: compiled updates transfer nothing, and eager ones make no infinity on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.registry import AGGREGATORS, LINKS, M, by_name, example_losses, example_params

QUICK = {"mean", "upgrad", "multi_steps(excess_mtl)"}


@pytest.mark.parametrize(
    "method",
    [
        m if m.name in QUICK else pytest.param(m, marks=pytest.mark.slow)
        for m in AGGREGATORS + LINKS
    ],
    ids=by_name,
)
def test_a_compiled_update_transfers_nothing(method):
    params = example_params()
    jacobian = jax.jacrev(example_losses)(params)
    aggregator = method.aggregator(M)
    extra = method.extra_args(jacobian)
    update = jax.jit(aggregator.update)
    state = aggregator.init(params)
    expected, after = update(jacobian, state, params, **extra)
    again, _ = update(jacobian, after, params, **extra)
    with jax.transfer_guard("disallow"):
        found, after = update(jacobian, state, params, **extra)
        found_again, _ = update(jacobian, after, params, **extra)
    jax.tree.map(np.testing.assert_array_equal, (found, found_again), (expected, again))
    # The guard is on: an eager operation with a constant is refused.
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        jnp.ones(3) + np.ones(3)


@pytest.mark.slow
@pytest.mark.parametrize("method", AGGREGATORS + LINKS, ids=by_name)
def test_degenerate_rows_make_nothing_that_is_not_finite(method):
    params = example_params()
    jacobian = jax.jacrev(example_losses)(params)
    degenerate = (
        jax.tree.map(lambda rows: rows.at[1].set(0), jacobian),
        jax.tree.map(lambda rows: rows.at[1].set(-rows[0]), jacobian),
        jax.tree.map(jnp.zeros_like, jacobian),
    )
    aggregator = method.aggregator(M)
    for rows in degenerate:
        state = aggregator.init(params)
        # Eager, where the guard sees what a program computes on the way.
        with jax.debug_infs(True), jax.debug_nans(True):
            for _ in range(2):
                _, state = aggregator.update(rows, state, params, **method.extra_args(rows))

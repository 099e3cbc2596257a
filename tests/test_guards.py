"""JAX's guards around compiled updates: no implicit transfer between host and device."""

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

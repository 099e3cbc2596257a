"""MoDo and SDMGrad with factored Jacobians, against dense ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd

PARAMS = {"kernel": jnp.sin(jnp.arange(512.0)).reshape(16, 32), "bias": jnp.zeros(32)}
BATCHES = jax.random.normal(jax.random.key(0), (3, 4, 16))


def losses_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
    return jnp.stack([jnp.mean((hidden - level) ** 2) for level in (0.5, -0.5, 0.1)])


def jacobians(form):
    return [jaxjd.value_and_jacobian(losses_fn, form=form)(PARAMS, batch)[1] for batch in BATCHES]


@pytest.mark.parametrize("combine_pair", [True, False])
@pytest.mark.parametrize("make", [jaxjd.modo, jaxjd.sdmgrad])
def test_factored_jacobians_give_the_dense_update(make, combine_pair):
    tx = make(num_tasks=3, combine_pair=combine_pair)
    results = []
    for form in ("dense", "auto", "factored"):
        first, second, third = jacobians(form)
        results.append(tx.update(third, tx.init(PARAMS), PARAMS, cross_jacobians=(first, second)))
    assert not isinstance(first["kernel"], jax.Array)  # It is factored.
    (expected, state), *others = results
    first, second, third = jacobians("dense")
    rows = jax.tree.map(lambda a, b: (a + b) / 2, first, second) if combine_pair else third
    combined = jaxjd.combine(state.weights, rows)
    for update in (expected, *(update for update, _ in others)):
        for name in PARAMS:
            scale = float(jnp.abs(combined[name]).max())
            np.testing.assert_allclose(update[name], combined[name], rtol=0, atol=1e-3 * scale)


def test_a_pair_is_needed():
    with pytest.raises(ValueError, match="`combine_pair` is for a CrossGramianWeighting"):
        jaxjd.weighted(jaxjd.weightings.mean(), combine_pair=True)

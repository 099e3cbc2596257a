"""MoDo and SDMGrad with factored Jacobians, against dense ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests.matrices import gaussian

PARAMS = {"kernel": jnp.sin(jnp.arange(512.0)).reshape(16, 32), "bias": jnp.zeros(32)}
BATCHES = gaussian(0, 3, 4, 16)


def losses_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
    return jnp.stack([jnp.mean((hidden - level) ** 2) for level in (0.5, -0.5, 0.1)])


@pytest.mark.parametrize("combine_pair", [True, False])
@pytest.mark.parametrize("make", [jaxjd.modo, jaxjd.sdmgrad])
def test_factored_jacobians_give_the_dense_update(make, combine_pair):
    tx = make(num_tasks=3, combine_pair=combine_pair)

    @jax.jit
    def everything(params, batches):
        results, found = {}, {}
        for form in ("dense", "auto", "factored"):
            engine = jaxjd.value_and_jacobian(losses_fn, form=form)
            found[form] = first, second, third = [engine(params, batch)[1] for batch in batches]
            state = tx.init(params)
            results[form] = tx.update(third, state, params, cross_jacobians=(first, second))
        assert not isinstance(found["factored"][0]["kernel"], jax.Array)
        state = results["dense"][1]
        first, second, third = found["dense"]
        rows = jax.tree.map(lambda a, b: (a + b) / 2, first, second) if combine_pair else third
        return results, jaxjd.combine(state.weights, rows)

    results, combined = everything(PARAMS, list(BATCHES))
    for update, _ in results.values():
        for name in PARAMS:
            scale = float(np.abs(combined[name]).max())
            np.testing.assert_allclose(update[name], combined[name], rtol=0, atol=1e-3 * scale)


def test_a_pair_is_needed():
    with pytest.raises(ValueError, match="`combine_pair` is for a CrossGramianWeighting"):
        jaxjd.weighted(jaxjd.weightings.mean(), combine_pair=True)

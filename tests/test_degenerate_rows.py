"""Rows whose combination cancels, and zero rows: no noise, and no infinity on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings as W

JACOBIANS = {
    "a line": jnp.outer(jnp.array([1, -2, 0.5, -3]), jnp.array([1.0, 2, 3])),
    "two lines": jnp.array([[1.0, 2, 3], [-2.0, -4, -6], [3.0, 0, -1], [-0.3, 0, 0.1]]),
}


@pytest.mark.parametrize("name", JACOBIANS)
@pytest.mark.parametrize("weighting", [W.imtl_g, W.conflict_free])
def test_weights_are_zero_where_no_direction_is_defined(weighting, name):
    weights, _ = weighting().update(jaxjd.gramian(JACOBIANS[name]), ())
    np.testing.assert_array_equal(weights, jnp.zeros(4))


@pytest.mark.parametrize("jacobian", [jnp.zeros((3, 2)), jnp.array([[1.0, 2], [0, 0], [3, -1]])])
def test_zero_rows_make_no_infinity(jacobian):
    for weighting in (W.mgda(), W.mgda("loss"), W.imtl_g(), W.krum(n_byzantine=0, n_selected=1)):
        gramian, losses = jaxjd.gramian(jacobian), jnp.array([1.0, 0.0, 2.0])
        with jax.debug_infs(True), jax.debug_nans(True):
            weights, _ = weighting.update(gramian, (), losses=losses)
        assert np.isfinite(weights).all()

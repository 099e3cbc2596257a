"""Arguments with one number per task are read as a vector or laid out as the losses."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings
from tests.registry import slow_but

GRAMIAN = jnp.array([[2.0, -0.5, 0.3], [-0.5, 1.0, 0.1], [0.3, 0.1, 1.5]])
JACOBIAN = jnp.linalg.cholesky(GRAMIAN)
NUMBERS = (0.2, 0.7, 0.4)


class Losses(NamedTuple):
    first: object
    rest: object


LAYOUTS = {
    "dict": {"b": 0.7, "a": 0.2, "c": jnp.float32(0.4)},
    "tuple": NUMBERS,
    "list of arrays": [jnp.array(0.2), jnp.array([0.7, 0.4])],
    "equal arrays": [jnp.array([0.2]), jnp.array([0.7]), np.array([0.4])],
    "nested": Losses({"y": (0.7,), "x": 0.2}, np.array([[0.4]])),
}


def weights(make, value):
    weighting = make(value)
    return weighting.update(GRAMIAN, weighting.init(3))[0]


def update(make, value):
    aggregator = make(value)
    return aggregator.update(JACOBIAN, aggregator.init(jnp.zeros(3)))[0]


def crossed(value):
    weighting = weightings.sdmgrad(pref_vector=value)
    return weighting.update(GRAMIAN, weighting.init(3))[0]


PREFERRED = ("aligned_mtl", "conflict_free", "dualproj", "upgrad")
METHODS = {
    **{
        name: lambda value, name=name: weights(getattr(weightings, name), value)
        for name in PREFERRED
    },
    **{
        f"jaxjd.{name}": lambda value, name=name: update(getattr(jaxjd, name), value)
        for name in PREFERRED
    },
    "constant": lambda value: weights(weightings.constant, value),
    "jaxjd.constant": lambda value: update(jaxjd.constant, value),
    "sdmgrad": crossed,
    "cr_mogm": lambda value: weights(
        lambda value: weightings.cr_mogm(weightings.mean(), 0.5, value), value
    ),
    "graddrop": lambda value: update(jaxjd.graddrop, value),
    "momentum_conflict_free": lambda value: update(
        lambda value: jaxjd.momentum_conflict_free(pref_vector=value, num_tasks=3), value
    ),
}


QUICK = {"upgrad", "constant", "sdmgrad", "cr_mogm", "graddrop", "momentum_conflict_free"}


@pytest.mark.parametrize("method", slow_but(QUICK, METHODS))
def test_the_layout_of_the_losses_is_read_in_tree_order(method):
    expected = METHODS[method](jnp.array(NUMBERS))
    for layout in LAYOUTS.values():
        np.testing.assert_array_equal(METHODS[method](layout), expected)
    assert np.isfinite(expected).all()


def test_tau_of_the_secondary_tasks():
    expected = weights(weightings.pcd, jnp.array([0.2, 0.7]))
    for layout in ({"b": 0.7, "a": 0.2}, [jnp.array([0.2]), jnp.array([0.7])]):
        np.testing.assert_array_equal(weights(weightings.pcd, layout), expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_number_or_of_another_length_is_refused(method):
    for wrong in ({"a": 0.2, "b": None, "c": 0.4}, {"a": 0.2, "b": "x", "c": 0.4}, {"a": 0.2}):
        with pytest.raises(ValueError, match=r"`(pref_vector|weights|initial_weights|leak)`"):
            METHODS[method](wrong)


def test_numbers_out_of_range_are_found_in_any_layout():
    with pytest.raises(ValueError, match=r"`leak\[1\]` must be"):
        jaxjd.graddrop({"a": 0.5, "b": 1.5})
    with pytest.raises(ValueError, match=r"`tau\[0\]` must be"):
        weightings.pcd({"a": -0.5, "b": 0.5})

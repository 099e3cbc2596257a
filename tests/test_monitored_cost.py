"""What `monitored` adds to a program: counts of products and loops, and no clock."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxjd
from jaxjd import labels, weightings
from jaxjd.diagnostics import monitored
from tests.jaxprs import equations
from tests.matrices import gaussian

M = 5
PARAMS = {name: {"w": jnp.zeros((2, 3)), "b": jnp.zeros(7)} for name in "ab"}
# Whatever reads the Gramian or the cross-Gramian, and is quick to compile.
READS = [
    kind(lambda num_tasks=None, params=None: (), lambda stat, state, **_: (stat.mean(0), state))
    for kind in (jaxjd.Weighting, jaxjd.CrossGramianWeighting)
]
READER = jaxjd.weighted(READS[0])


def jacobian_of(seed, m=M):
    leaves, treedef = jax.tree.flatten(PARAMS)
    rows = [jnp.asarray(gaussian(seed + n, m, *leaf.shape)) for n, leaf in enumerate(leaves)]
    return treedef.unflatten(rows)


def partition(one):
    return jaxjd.partition({"a": one, "b": one}, labels.by_network)


SETTINGS = {
    "alone": READER,
    "a chain": optax.chain(READER, optax.scale(-1.0)),
    "grouped": jaxjd.grouped(READS[0], labels.by_network),
    "partition": partition(READER),
    "partition of a kind each": jaxjd.partition(
        {"a": READER, "b": jaxjd.weighted(READS[0], num_tasks=M)}, labels.by_network
    ),
    "a pair": jaxjd.weighted(READS[1], combine_pair=True),
}


def gramian_products(tx, pair=False):
    """How many products of rows with rows the compiled program has."""
    jacobian = jacobian_of(0)
    extra = {"cross_jacobians": (jacobian, jacobian_of(10))} if pair else {}
    lowered = jax.jit(tx.update).lower(jacobian, tx.init(PARAMS), PARAMS, **extra)
    text = lowered.compile().as_text()
    return len(re.findall(rf"f32\[{M},{M}\]\S* dot\(", text))


LEAVES = len(jax.tree.leaves(PARAMS))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gramian_of_the_rows_is_computed_once(setting):
    """One product per leaf; a pair is another Gramian."""
    tx, pair = SETTINGS[setting], setting == "a pair"
    assert gramian_products(tx, pair) == LEAVES
    assert gramian_products(monitored(tx, M), pair) == LEAVES + pair * LEAVES


def test_links_around_monitored_compute_it_once():
    tx = jaxjd.multi_steps(monitored(partition(READER), M), 2, M)
    assert gramian_products(tx) == LEAVES


METHODS = {
    "upgrad": lambda: jaxjd.upgrad(),
    "mgda": lambda: jaxjd.mgda(),
    "nash_mtl": lambda: jaxjd.nash_mtl(),
    "fairgrad": lambda: jaxjd.fairgrad(1.0),
    "grouped": lambda: jaxjd.grouped(weightings.upgrad(), labels.by_network),
    "partition": lambda: partition(jaxjd.upgrad()),
}


def loops(tx, m):
    """The loops and factorizations in the program as it is traced."""
    jacobian = jacobian_of(0, m)
    found = equations(lambda J: tx.update(J, tx.init(PARAMS), PARAMS), jacobian)
    names = [equation.primitive.name for equation in found]
    return {name: names.count(name) for name in ("while", "scan", "cholesky", "eigh")}


@pytest.mark.parametrize("m", [3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_monitored_adds_one_solver_and_one_decomposition(method, m):
    """Those of the gaps and the effective rank: the residual solves nothing again."""
    alone, around = loops(METHODS[method](), m), loops(monitored(METHODS[method](), m), m)
    inside = loops(monitored(READER, m), m)
    assert around == {name: alone[name] + inside[name] for name in alone}
    assert inside["while"] <= (m > 3)
    assert inside["cholesky"] <= 1
    assert inside["eigh"] == 1
    assert inside["scan"] == 0


@pytest.mark.parametrize("m", [2, 3, 8])
def test_what_monitored_adds_is_small(m):
    """Compiling takes about as long as there are equations."""
    jacobian, tx = jacobian_of(0, m), monitored(READER, m)
    assert len(list(equations(lambda J: tx.update(J, tx.init(PARAMS), PARAMS), jacobian))) < 800

"""Random trees, dtypes and shapes: a correct answer, or a ValueError that names what was wrong.

Most of it is traced only. Rank promotion is allowed here, as in a user's program, so that a silent
broadcast would show as a wrong shape and not as an error of the tests' settings.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxjd
from jaxjd import labels, scalarizers, weightings
from tests.registry import NAMED, UNWEIGHTED, VARIANTS, WRAPPED, Method
from tests.rounding import float16_works


def fuzzed(examples):
    """Deterministic, without a database or a deadline, so that it is the same test everywhere."""
    return hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Pair(NamedTuple):
    left: Any
    right: Any


FLOATS = ("float32", "bfloat16", *(["float16"] if float16_works() else []))
OTHERS = ("int32", "uint8", "bool", "float8_e4m3fn", jax.random.key(0).dtype)
NAMES = ("a", "b", "w/x", "value")

shapes = st.sampled_from([(), (1,), (2,), (3,), (2, 3), (3, 2), (0,), (2, 0), (1, 1), (2, 1, 2)])


def trees(leaves, max_leaves=4):
    """Dicts, lists, tuples, NamedTuples, holes and single leaves, nested."""
    return st.recursive(
        leaves | st.none(),
        lambda inner: (
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
            | st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.builds(Pair, inner, inner)
        ),
        max_leaves=max_leaves,
    )


@st.composite
def structs(draw, dtypes=FLOATS):
    return jax.ShapeDtypeStruct(draw(shapes), draw(st.sampled_from(dtypes)))


params_trees = trees(structs())


def rows_of(params, m):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((m, *leaf.shape), leaf.dtype), params)


class Damage(NamedTuple):
    """What is wrong with a Jacobian: the message must say one of the words."""

    jacobian: Any
    words: tuple[str, ...]


@st.composite
def damaged(draw, params, m):
    """A Jacobian that does not fit `params`, in one leaf."""
    leaves, treedef = jax.tree.flatten(rows_of(params, m))
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in path_leaves(params)]
    place = draw(st.integers(0, len(leaves) - 1))
    leaf = leaves[place]
    kind = draw(st.sampled_from(["dtype", "no task axis", "ragged", "shape", "scalar", "no array"]))
    words = (f"'{paths[place] or '<root>'}'",)
    if kind == "dtype":
        leaves[place] = jax.ShapeDtypeStruct(leaf.shape, draw(st.sampled_from(OTHERS)))
    elif kind == "no task axis":
        leaves[place] = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    elif kind == "ragged":
        leaves[place] = jax.ShapeDtypeStruct(
            (m + draw(st.integers(1, 3)), *leaf.shape[1:]), leaf.dtype
        )
    elif kind == "shape":
        leaves[place] = jax.ShapeDtypeStruct((*leaf.shape, draw(st.integers(0, 3))), leaf.dtype)
    elif kind == "scalar":
        leaves[place] = jax.ShapeDtypeStruct((), leaf.dtype)
    else:
        leaves[place] = draw(st.sampled_from([1.0, "x", 3]))
    if kind in ("no task axis", "ragged") and len(leaves) > 1:
        words = ("Jacobian leaf '",)  # Of two that disagree, the later one is named.
    return Damage(treedef.unflatten(leaves), words)


def path_leaves(tree):
    return jax.tree.leaves_with_path(tree)


def run_abstract(fn, *args):
    """Traces a function; what is no array is passed as it is."""
    leaves, treedef = jax.tree.flatten(args)
    arrays = [hasattr(leaf, "shape") for leaf in leaves]

    def run(*given):
        given = iter(given)
        full = [
            next(given) if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True)
        ]
        return fn(*treedef.unflatten(full))

    with jax.numpy_rank_promotion("allow"):
        return jax.eval_shape(
            run, *(leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array)
        )


def same_types(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


METHODS = NAMED + UNWEIGHTED + VARIANTS + WRAPPED
GROUPED = [
    Method(
        f"grouped(by_{kind})",
        None,
        lambda m, kind=kind: jaxjd.grouped(
            weightings.pcgrad(), getattr(labels, f"by_{kind}"), num_tasks=m
        ),
    )
    for kind in ("layer", "network", "tensor")
]
AGGREGATORS = {method.name: method.aggregator(3) for method in (*METHODS, *GROUPED)}


def step_of(method, aggregator):
    def step(jacobian, params):
        state = aggregator.init(params)
        extra = {}
        if method.stat == "cross":
            extra["cross_jacobians"] = (jacobian, jacobian)
        if method.losses:
            extra["losses"] = jnp.ones(3)
        return state, aggregator.update(jacobian, state, params, **extra)

    return step


ALL = [*METHODS, *GROUPED]


@fuzzed(60)
@hypothesis.given(method=st.sampled_from(ALL), params=params_trees)
def test_updates_have_the_structure_shapes_and_dtypes_of_the_parameters(method, params):
    hypothesis.assume(params is not None)  # Which means no parameters: a ValueError for some.
    step = step_of(method, AGGREGATORS[method.name])
    state, (updates, after) = run_abstract(step, rows_of(params, 3), params)
    same_types(updates, params)
    same_types(after, state)


@fuzzed(300)
@hypothesis.given(method=st.sampled_from(ALL), data=st.data())
@pytest.mark.slow
def test_a_damaged_jacobian_is_a_value_error_that_names_the_leaf(method, data):
    params = data.draw(params_trees.filter(lambda tree: jax.tree.leaves(tree)))
    bad = data.draw(damaged(params, 3))
    # A single leaf with more rows is a Jacobian of more tasks.
    expected = "|".join([*map(re.escape, bad.words), "num_tasks=3"])
    with pytest.raises(ValueError, match=expected):
        run_abstract(step_of(method, AGGREGATORS[method.name]), bad.jacobian, params)


# Values: a plain float64 reference


def flat(tree, m):
    leaves = [np.asarray(leaf, np.float64).reshape(m, -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1) if leaves else np.zeros((m, 0))


def filled(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.integers(-8, 9, leaf.shape) / 4, leaf.dtype), tree
    )


@fuzzed(15)
@hypothesis.given(params=params_trees, m=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_the_algebra_is_that_of_a_matrix(params, m, seed):
    jacobian, other = filled(rows_of(params, m), seed), filled(rows_of(params, m), seed + 1)
    weights = jnp.asarray(np.random.default_rng(seed).integers(-3, 4, m) / 2, jnp.float32)
    J, other_rows = flat(jacobian, m), flat(other, m)
    combined = jaxjd.combine(weights, jacobian)
    same_types(combined, params)
    if not jax.tree.leaves(params):
        with pytest.raises(ValueError, match="no leaves"):
            jaxjd.gramian(jacobian)
        return
    # All numbers are multiples of 1/16, so that float32 is exact.
    np.testing.assert_array_equal(jaxjd.gramian(jacobian), J @ J.T)
    np.testing.assert_array_equal(jaxjd.cross_gramian(jacobian, other), J @ other_rows.T)
    update = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(combined)])
    np.testing.assert_allclose(update, np.asarray(weights, np.float64) @ J, rtol=2**-7, atol=2**-7)
    same_types(jaxjd.materialize(jacobian), rows_of(params, m))
    for a, b in zip(
        jax.tree.leaves(jaxjd.materialize(jacobian)), jax.tree.leaves(jacobian), strict=True
    ):
        np.testing.assert_array_equal(a, b)


EAGER = {
    "sum": lambda J: np.ones(len(J)),
    "mean": lambda J: np.full(len(J), 1 / len(J)),
    "constant": lambda J: np.array([0.2, 0.3, 0.5]),
}


@pytest.mark.parametrize("name", EAGER)
@fuzzed(6)
@hypothesis.given(params=params_trees, seed=st.integers(0, 99))
def test_updates_are_the_weighted_sum_of_the_rows(name, params, seed):
    jacobian = filled(rows_of(params, 3), seed)
    aggregator = AGGREGATORS[name]
    with jax.numpy_rank_promotion("allow"):
        updates, state = aggregator.update(jacobian, aggregator.init(params), params)
    same_types(updates, params)
    J = flat(jacobian, 3)
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(updates)]
    if leaves:
        np.testing.assert_allclose(state.weights, EAGER[name](J), rtol=1e-6)
        found = np.concatenate(leaves)
        np.testing.assert_allclose(found, EAGER[name](J) @ J, rtol=2**-7, atol=2**-6)


# The weights that are logged are those that the update is made with, whatever the tree: one
# compiled weighting for all trees.
MGDA = weightings.mgda()
JITTED = jaxjd.weighted(jaxjd.Weighting(MGDA.init, jax.jit(MGDA.update)), num_tasks=3)


@fuzzed(12)
@hypothesis.given(params=params_trees, seed=st.integers(0, 99))
@pytest.mark.slow
def test_updates_belong_to_the_logged_weights(params, seed):
    jacobian = filled(rows_of(params, 3), seed)
    updates, state = JITTED.update(jacobian, JITTED.init(params), params)
    same_types(updates, params)
    J = flat(jacobian, 3)
    if J.shape[1]:
        found = np.concatenate(
            [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(updates)]
        )
        w = np.asarray(state.weights, np.float64)
        np.testing.assert_allclose(found, w @ J, rtol=2**-7, atol=2**-6)
        # The shortest convex combination: no row has a shorter product with it than itself.
        np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)
        d = w @ J
        assert (J @ d >= d @ d - 1e-4 * max(1, np.square(J).sum())).all()


# Groups


@fuzzed(15)
@hypothesis.given(
    params=params_trees,
    kind=st.sampled_from(["together", "by_network", "by_layer", "by_tensor"]),
    seed=st.integers(0, 99),
)
def test_a_partition_is_an_aggregator_for_each_group(params, kind, seed):
    tree = getattr(labels, kind)(params)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    found = jax.tree.leaves(tree)
    aggregators = {label: jaxjd.mean(num_tasks=3) for label in found} or {"all": jaxjd.mean()}
    aggregator = jaxjd.partition(aggregators, getattr(labels, kind))
    jacobian = filled(rows_of(params, 3), seed)
    updates, _ = aggregator.update(jacobian, aggregator.init(params), params)
    same_types(updates, params)
    expected = jax.tree.map(lambda rows: np.asarray(rows, np.float64).mean(axis=0), jacobian)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-7, atol=2**-7)


label_trees = trees(st.sampled_from(["one", "two"]) | st.integers(0, 1), max_leaves=3)


@fuzzed(25)
@hypothesis.given(params=params_trees, tree=label_trees)
def test_labels_fit_or_are_a_value_error(params, tree):
    aggregator = jaxjd.partition({"one": jaxjd.mean(), "two": jaxjd.mean()}, tree)
    grouped = jaxjd.grouped(weightings.mean(), tree)
    errors, states = [], []
    for tx in (aggregator, grouped):
        try:
            states.append(tx.init(params))
        except ValueError as error:
            errors.append(str(error))
    # Only a partition minds that one of its aggregators has no leaf.
    unused = [error for error in errors if error.startswith("The aggregators of")]
    assert all(re.search("[Ll]abel", error) for error in errors)
    assert len(errors) - len(unused) in (0, 2)
    if errors:
        return
    jacobian = filled(rows_of(params, 2), 0)
    for tx, start in zip((aggregator, grouped), states, strict=True):
        updates, _ = tx.update(jacobian, start, params)
        same_types(updates, params)


# Engines


def losses_fn(params):
    """Two losses that read every leaf, whatever the tree."""
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(params):
        total = total + jnp.sum(leaf.real.astype(jnp.float32) ** 2)
    return jnp.stack([total, 2 * total])


@pytest.mark.parametrize("form", ["dense", "auto", "factored"])
@fuzzed(12)
@hypothesis.given(params=params_trees)
def test_jacobians_of_any_tree(form, params):
    losses, jacobian = run_abstract(jaxjd.value_and_jacobian(losses_fn, form=form), params)
    same_types(jacobian, rows_of(params, 2))
    assert losses.shape == (2,)


@fuzzed(6)
@hypothesis.given(params=params_trees, seed=st.integers(0, 9))
def test_jacobians_have_the_values_of_the_derivative(params, seed):
    params = filled(params, seed)
    _, jacobian = jaxjd.value_and_jacobian(losses_fn)(params)
    for leaf, rows in zip(jax.tree.leaves(params), jax.tree.leaves(jacobian), strict=True):
        exact = 2 * np.asarray(leaf, np.float64)
        np.testing.assert_allclose(np.asarray(rows, np.float64), [exact, 2 * exact], rtol=2**-7)


@pytest.mark.parametrize("form", ["dense", "auto"])
@fuzzed(15)
@hypothesis.given(
    params=trees(structs((*FLOATS, "complex64", *OTHERS))).filter(
        lambda tree: jax.tree.leaves(tree)
    ),
)
def test_parameters_of_any_dtype_are_differentiated_or_named(form, params):
    named = [
        jax.tree_util.keystr(path, simple=True, separator="/") or "<root>"
        for path, leaf in path_leaves(params)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    engine = jaxjd.value_and_jacobian(losses_fn, form=form)
    if named:
        with pytest.raises(ValueError, match=re.escape(f"'{named[0]}'")):
            run_abstract(engine, params)
    else:
        _, jacobian = run_abstract(engine, params)
        same_types(jacobian, rows_of(params, 2))


# Scalarizers

SCALARIZERS = {
    "constant": lambda m: scalarizers.constant(np.ones(m)),
    "cosmos": lambda m: scalarizers.cosmos(1.0, np.ones(m)),
    "dwa": lambda m: scalarizers.dwa(),
    "famo": lambda m: scalarizers.famo(),
    "geometric_mean": lambda m: scalarizers.geometric_mean(),
    "imtl_l": lambda m: scalarizers.imtl_l(),
    "mean": lambda m: scalarizers.mean(),
    "pbi": lambda m: scalarizers.pbi(1.0, np.ones(m)),
    "random": lambda m: scalarizers.random(),
    "stch": lambda m: scalarizers.stch(1.0),
    "sum": lambda m: scalarizers.sum(),
    "uw": lambda m: scalarizers.uw(),
}


def test_every_scalarizer_is_fuzzed():
    functions = {name for name in scalarizers.__all__ if name.islower()}
    assert functions == set(SCALARIZERS)


@pytest.mark.parametrize("name", SCALARIZERS)
def test_losses_of_any_tree(name):
    @fuzzed(15)
    @hypothesis.given(losses=trees(structs((*FLOATS, "int32", "bool", "complex64"))))
    def check(losses):
        m = sum(leaf.size for leaf in jax.tree.leaves(losses))
        bad = [
            jax.tree_util.keystr(path, simple=True, separator="/") or "<root>"
            for path, leaf in path_leaves(losses)
            if not jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        scalarizer = SCALARIZERS[name](max(m, 1))

        def run(losses):
            state = scalarizer.init(max(m, 1))
            return state, scalarizer.apply(losses, state), scalarizer.update(losses, state)

        if bad or m == 0:
            expected = f"'{re.escape(bad[0])}'" if bad else "no losses"
            with pytest.raises(ValueError, match=expected):
                run_abstract(run, losses)
            return
        state, value, after = run_abstract(run, losses)
        assert (value.shape, value.dtype) == ((), jnp.float32)
        same_types(after, state)

    check()


def test_x64():
    with jax.enable_x64(True):

        @fuzzed(15)
        @hypothesis.given(params=trees(structs(("float64", "float32", "bfloat16"))))
        def check(params):
            dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
            step = step_of(NAMED[0], JITTED)
            state, (updates, after) = run_abstract(step, rows_of(params, 3), params)
            same_types(updates, params)
            same_types(after, state)
            wide = jnp.float64 if "float64" in map(str, dtypes) or not dtypes else jnp.float32
            assert state.weights.dtype == wide

        check()

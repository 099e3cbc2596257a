"""Factored Jacobian leaves: what reads them, what refuses them, and what they cost.

That the numbers are those of `jax.jacrev`, model by model, is in test_zoo.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxjd
from jaxjd.linalg.costs import dense_cost, factored_cost
from jaxjd.linalg.factored import FactoredLeaf
from tests import jaxprs
from tests.registry import AGGREGATORS, M, by_name, losses_of, slow_but
from tests.rounding import UNFUSED

X = jax.random.normal(jax.random.key(0), (5, 6))
PARAMS = {
    "first": {
        "kernel": jax.random.normal(jax.random.key(1), (6, 8)) / 2,
        "bias": jax.random.normal(jax.random.key(2), (8,)),
    },
    "second": {"kernel": jax.random.normal(jax.random.key(3), (8, M)) / 2},
}


def losses_fn(params, x):
    first = params["first"]
    hidden = jnp.tanh(x @ first["kernel"] + first["bias"][None])
    return jnp.mean((hidden @ params["second"]["kernel"]) ** 2, axis=0)


def jacobian_of(form, params=PARAMS, x=X):
    return jaxjd.value_and_jacobian(losses_fn, form=form)(params, x)[1]


DENSE = jacobian_of("dense")
FACTORED = jacobian_of("factored")
LEAF = FACTORED["first"]["kernel"]


def test_kernels_are_factored_and_look_like_arrays():
    found = jax.tree.map(lambda leaf: isinstance(leaf, FactoredLeaf), FACTORED)
    assert found == {"first": {"kernel": True, "bias": False}, "second": {"kernel": True}}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.ndim, leaf.size), FACTORED) == (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.ndim, leaf.size), DENSE)
    )
    dense = jaxjd.value_and_jacobian(losses_fn)(PARAMS, X)[1]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(dense))


def test_algebra():
    weights = jnp.array([1.0, 2.0, 3.0])
    other_x = X[:4] + 1.0
    other = jacobian_of("factored", x=other_x), jacobian_of("dense", x=other_x)
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=2e-6, atol=2e-6)
    close(jaxjd.gramian(FACTORED), jaxjd.gramian(DENSE))
    close(jaxjd.combine(weights, FACTORED), jaxjd.combine(weights, DENSE))
    close(jaxjd.materialize(FACTORED), DENSE)
    # The two batches differ in size.
    close(jaxjd.cross_gramian(FACTORED, other[0]), jaxjd.cross_gramian(DENSE, other[1]))
    close(jaxjd.cross_gramian(FACTORED, other[1]), jaxjd.cross_gramian(DENSE, other[1]))
    close(jaxjd.cross_gramian(DENSE, other[0]), jaxjd.cross_gramian(DENSE, other[1]))


@pytest.mark.slow
def test_cross_gramian_of_layers_that_use_a_parameter_differently():
    x = jax.random.normal(jax.random.key(5), (4, 6))
    plain = lambda w: jnp.mean((x @ w) ** 2, axis=0)
    transposed = lambda w: jnp.mean((x @ w.T) ** 2, axis=0)
    w = jax.random.normal(jax.random.key(6), (6, 6))

    def cross(form):
        pair = [jaxjd.value_and_jacobian(fn, form=form)(w)[1] for fn in (plain, transposed)]
        return jaxjd.cross_gramian(*pair)

    np.testing.assert_allclose(cross("factored"), cross("dense"), rtol=1e-5, atol=1e-6)


def pass_both_forms(method, update):
    """What `update` gives for the Jacobian in both forms."""
    aggregator = method.aggregator(M)
    state = aggregator.init(PARAMS)
    extra = {"losses": losses_of(DENSE)} if method.losses else {}
    pair = {"dense": (DENSE, DENSE), "factored": (FACTORED, FACTORED)}
    results = {}
    for name, jacobian in {"dense": DENSE, "factored": FACTORED}.items():
        if method.stat == "cross":
            extra["cross_jacobians"] = pair[name]
        results[name] = update(aggregator, jacobian, state, extra)
    return results


@pytest.mark.parametrize("method", AGGREGATORS, ids=by_name)
def test_every_aggregator_takes_factored_leaves(method):
    """Nothing is compiled."""

    def types(aggregator, jacobian, state, extra):
        run = lambda: aggregator.update(jacobian, state, PARAMS, **extra)[0]
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(run))

    results = pass_both_forms(method, types)
    assert results["factored"] == results["dense"]
    assert results["dense"] == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), PARAMS)


# What reads a Gramian and losses, a Jacobian, and two batches in groups.
QUICK = {"excess_mtl", "gradnorm", "grouped(modo)", "trimmed_mean"}


@pytest.mark.parametrize("method", slow_but(QUICK, AGGREGATORS), ids=by_name)
def test_every_aggregator_gives_the_same_for_factored_leaves(method):
    update = lambda aggregator, J, state, extra: aggregator.update(J, state, PARAMS, **extra)[0]
    results = pass_both_forms(method, update)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results["dense"]))
    chex.assert_trees_all_close(
        results["factored"], results["dense"], rtol=0, atol=UNFUSED * 2e-5 * max(largest, 1e-30)
    )


LAYOUTS = {
    "batch": (P(), P("d")),
    "batch and parameters": (P("d"), P("d")),
    "outputs": (P(None, "d"), P()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_arrays(layout, kind):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    spec, batch_spec = LAYOUTS[layout]
    x = jnp.concatenate([X, X[:1]])
    params = {"a": PARAMS["first"]["kernel"], "b": jnp.ones((8, M)) + jnp.eye(8, M)}
    fn = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2, axis=0)

    def step(form, params, x):
        jacobian = jaxjd.value_and_jacobian(fn, form=form)(params, x)[1]
        gramian = jaxjd.gramian(jacobian)
        return gramian, jaxjd.combine(jnp.arange(1.0, M + 1), jacobian)

    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    sharded = {"a": put(params["a"], spec), "b": put(params["b"], P())}
    found = jax.jit(functools.partial(step, "factored"))(sharded, put(x, batch_spec))
    expected = jax.jit(functools.partial(step, "dense"))(params, x)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5)


@pytest.mark.parametrize("varying", [True, False])
def test_inside_shard_map(varying):
    """Parameters are the same on all devices; their Jacobian is summed over the devices."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    x = jnp.concatenate([X, X[:1]])
    kernels = [jnp.ones(8), jnp.arange(8.0)]
    factored = []

    def step(params, kernels, x):
        if varying:
            vary = lambda leaf: jax.lax.pcast(leaf, "d", to="varying")
            params, kernels = jax.tree.map(vary, (params, kernels))
        jacobian = jaxjd.value_and_jacobian(losses_fn, form="factored")(params, x)[1]
        factored.append(isinstance(jacobian["first"]["kernel"], FactoredLeaf))
        jacobian = jaxjd.materialize(jacobian)
        _, (trunk_rows, _) = jaxjd.mtl_value_and_jacobian(trunk, [head, head])(
            params["first"], kernels, x
        )
        rows = (jacobian, trunk_rows)
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, "d"), rows) if varying else rows

    in_specs = (P(), P(), P("d"))
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=P()))
    jacobian, trunk_rows = step(PARAMS, kernels, x)
    # Each half of the batch has a mean of its own.
    dense = jax.jit(lambda x: jaxjd.value_and_jacobian(losses_fn)(PARAMS, x)[1])
    expected = jax.tree.map(jnp.add, dense(x[:3]), dense(x[3:]))
    chex.assert_trees_all_close(jacobian, expected, rtol=1e-5, atol=1e-6)
    assert trunk_rows["kernel"].shape == (2, 6, 8)
    # Where JAX sums over the devices by itself, a leaf of local factors would be wrong.
    assert factored == [varying]


def refused():
    adam = optax.adam(1e-3)
    jacobian = {"w": LEAF}
    return {
        "2 * leaf": lambda: jax.tree.map(lambda leaf: 2 * leaf, jacobian),
        "array * leaf": lambda: jax.tree.map(lambda leaf: jnp.float32(2) * leaf, jacobian),
        "leaf + leaf": lambda: jax.tree.map(lambda a, b: a + b, jacobian, jacobian),
        "-leaf": lambda: jax.tree.map(lambda leaf: -leaf, jacobian),
        "leaf == leaf": lambda: LEAF == LEAF,
        "leaf[0]": lambda: LEAF[0],
        "len(leaf)": lambda: len(LEAF),
        "iteration": lambda: list(LEAF),
        "leaf.T": lambda: LEAF.T,
        "jnp.asarray": lambda: jnp.asarray(LEAF),
        "np.asarray": lambda: np.asarray(LEAF),
        "jnp.sum": lambda: jnp.sum(LEAF),
        "optax.clip": lambda: optax.clip(1.0).update(jacobian, optax.EmptyState()),
        "optax.tree.norm": lambda: optax.tree.norm(jacobian),
        "optax.adam": lambda: adam.update(jacobian, adam.init({"w": jnp.ones((6, 8))})),
        "apply_updates": lambda: optax.apply_updates({"w": jnp.ones((6, 8))}, jacobian),
        "pmean": lambda: jax.vmap(lambda _: jax.lax.pmean(jacobian, "i"), axis_name="i")(X),
        "jit argument": lambda: jax.jit(lambda leaf: 1)(LEAF),
        "jit result": lambda: jax.jit(lambda: jacobian_of("factored"))(),
        "scan output": lambda: jax.lax.scan(lambda c, _: (c, LEAF), 0, None, length=2),
        "vmap result": lambda: jax.vmap(lambda _: LEAF)(X),
    }


@pytest.mark.parametrize("name", refused())
def test_a_factored_leaf_is_opaque(name):
    with pytest.raises((TypeError, AttributeError)) as error:
        refused()[name]()
    assert "jaxjd.materialize" in str(error.value)
    assert "form='dense'" in str(error.value)


def test_it_is_no_pytree_and_no_array():
    assert jax.tree.leaves(LEAF) == [LEAF] or jax.tree.leaves(LEAF)[0] is LEAF
    assert not hasattr(type(LEAF), "__jax_array__")
    assert "float32[3,6,8]" in repr(LEAF)


def sizes_in(fn, *args):
    """The shapes of all arrays in a function's jaxpr."""
    return {var.aval.shape for e in jaxprs.equations(fn, *args) for var in e.outvars}


def test_nothing_has_the_size_of_the_jacobian():
    def step(params, x):
        _, jacobian = jaxjd.value_and_jacobian(losses_fn, form="factored")(params, x)
        gramian = jaxjd.gramian(jacobian)
        return jaxjd.combine(gramian[0], jacobian)

    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    wide["first"]["kernel"] = jax.ShapeDtypeStruct((100, 8), jnp.float32)
    shapes = sizes_in(step, wide, jnp.ones((5, 100)))
    assert (100, 8) in shapes
    assert all(np.prod(shape, dtype=int) < M * 100 * 8 for shape in shapes)


def test_the_forward_pass_runs_once():
    count = lambda fn: sum(e.primitive.name == "tanh" for e in jaxprs.equations(fn, PARAMS, X))
    for method in ("auto", "factored", "dense", "products"):
        step = lambda params, x, method=method: jaxjd.value_and_gramian(losses_fn, form=method)(
            params, x
        )[:2]
        assert count(step) == 1


def test_products_are_in_full_precision():
    fn = lambda: jaxjd.combine(jaxjd.gramian(FACTORED)[0], FACTORED)
    dots = [e for e in jaxprs.equations(fn) if e.primitive.name == "dot_general"]
    assert len(dots) >= 6
    for dot in dots:
        assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST}
        assert dot.params["preferred_element_type"] == jnp.float32


@pytest.mark.slow
def test_bfloat16_factors_accumulate_in_float32():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    jacobian = jacobian_of("factored", low, X.astype(jnp.bfloat16))
    gramian = jaxjd.gramian(jacobian)
    assert gramian.dtype == jnp.float32
    combined = jaxjd.combine(jnp.ones(M), jacobian)
    assert combined["first"]["kernel"].dtype == jnp.bfloat16
    # The factors are rounded, their products are not.
    rows = LEAF.layer.pull_all(
        jacobian["first"]["kernel"].inputs.astype(jnp.float32),
        jacobian["first"]["kernel"].cotangents.astype(jnp.float32),
    )
    exact = jnp.einsum("ipq,jpq->ij", rows, rows)
    found = jaxjd.gramian(jacobian["first"]["kernel"])
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def wide_losses(params, x):
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return jnp.mean(x[:, :4] ** 2, axis=0)


def test_auto_takes_the_cheaper_form():
    forms = {}
    for width, batch in itertools.product((16, 128), (4, 4096)):
        params = [jnp.zeros((width, width))] * 2
        leaves = jaxjd.diagnostics.explain_jacobian(
            wide_losses, params, jnp.zeros((batch, width)), quiet=True
        )
        forms[width, batch] = {leaf.form for leaf in leaves}
    assert forms[128, 4] == {"factored"}
    assert forms[16, 4096] == forms[128, 4096] == {"dense"}


def test_explanation_tells_what_the_engine_does(capsys):
    leaves = jaxjd.diagnostics.explain_jacobian(losses_fn, PARAMS, X, form="factored")
    found = {leaf.path: leaf.form for leaf in leaves}
    assert found == {
        "first/bias": "dense",
        "first/kernel": "factored",
        "second/kernel": "factored",
    }
    kernel = leaves[1]
    assert kernel.factored_bytes == 4 * (LEAF.inputs.size + LEAF.cotangents.size)
    assert kernel.dense_bytes == 4 * M * 6 * 8
    sizes = LEAF.sizes
    assert (kernel.dense_flops, kernel.factored_flops) == (
        dense_cost(sizes).flops,
        factored_cost(sizes).flops,
    )
    printed = capsys.readouterr().out
    assert "first/kernel   6x8" in printed
    assert "used by broadcast_in_dim" in printed or "used by add" in printed


def test_explanation_of_a_loss_per_example():
    loss = lambda params, x: losses_fn(params, x[None]).sum()
    leaves = jaxjd.diagnostics.explain_jacobian(loss, PARAMS, X, per_example=True, quiet=True)
    assert {leaf.path: leaf.form for leaf in leaves}["first/kernel"] == "factored"
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert leaves == jaxjd.diagnostics.explain_jacobian(
        loss, PARAMS, shapes, per_example=True, quiet=True
    )


METHODS = ("auto", "dense", "factored", "products")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_value_and_gramian(method, chunk_size):
    def fn(params, x):
        losses = losses_fn(params, x)
        return {"a": losses[:2], "b": losses[2]}, {"x": x}

    weights = jnp.array([1.0, -2.0, 0.5])
    labels = {"first": "trunk", "second": "head"}
    options = {"has_aux": True, "chunk_size": chunk_size, "form": method}

    @jax.jit
    def run(params):
        together = jaxjd.value_and_gramian(fn, **options)(params, X)
        apart = jaxjd.value_and_gramian(fn, labels=labels, **options)(params, X)
        both = {"trunk": weights, "head": 2 * weights}
        return together[:2], together[2](weights), apart[1], apart[2](both), apart[2](weights)

    ((losses, aux), gramian), gradient, gramians, gradients, same = run(PARAMS)
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=2e-5, atol=2e-5)
    close(losses, {"a": losses_fn(PARAMS, X)[:2], "b": losses_fn(PARAMS, X)[2]})
    chex.assert_trees_all_equal(aux, {"x": X})
    close(gramian, jaxjd.gramian(DENSE))
    expected = jaxjd.combine(weights, DENSE)
    close(gradient, expected)
    close(same, expected)
    close(
        gramians, {"trunk": jaxjd.gramian(DENSE["first"]), "head": jaxjd.gramian(DENSE["second"])}
    )
    close(gradients, {**expected, "second": jax.tree.map(lambda g: 2 * g, expected["second"])})


def test_argnums_of_value_and_gramian():
    def fn(scale, params, x):
        return scale * losses_fn(params, x)

    for method in METHODS:
        engine = jaxjd.value_and_gramian(fn, argnums=(0, 1), form=method)
        _, gramian, pullback = jax.jit(lambda s, p, engine=engine: (*engine(s, p, X)[:2], None))(
            jnp.float32(2.0), PARAMS
        )
        expected = 4 * jaxjd.gramian(DENSE) + jnp.outer(*[losses_fn(PARAMS, X)] * 2)
        np.testing.assert_allclose(gramian, expected, rtol=2e-5)
        del pullback
        gradient = engine(jnp.float32(2.0), PARAMS, X)[2](jnp.ones(M))
        assert isinstance(gradient, tuple)
        np.testing.assert_allclose(gradient[0], losses_fn(PARAMS, X).sum(), rtol=1e-5)


def trunk(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None])


def head(kernel, features, x):
    return jnp.mean((features @ kernel) ** 2)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.slow
def test_gramian_at_the_features(single):
    m = 4
    kernels = [jax.random.normal(jax.random.key(10 + n), (8,)) for n in range(m)]
    heads = [head] * m
    if single:
        heads = lambda kernels, features, x: [head(k, features, x) for k in kernels]
    weights = jnp.arange(1.0, m + 1)

    def step(params, kernels):
        losses, gramian, pullback = jaxjd.mtl_value_and_gramian(trunk, heads)(params, kernels, X)
        return losses, gramian, pullback(weights)

    losses, gramian, (trunk_gradient, heads_gradients) = jax.jit(step)(PARAMS["first"], kernels)
    features = trunk(PARAMS["first"], X)
    rows = jax.jacrev(lambda z: jnp.stack([head(k, z, X) for k in kernels]))(features)
    np.testing.assert_allclose(gramian, jnp.einsum("ibd,jbd->ij", rows, rows), rtol=1e-5)
    total = lambda params: sum(
        w * head(k, trunk(params, X), X) for w, k in zip(weights, kernels, strict=True)
    )
    chex.assert_trees_all_close(
        trunk_gradient, jax.grad(total)(PARAMS["first"]), rtol=1e-5, atol=1e-6
    )
    expected = [jax.grad(head)(k, features, X) for k in kernels]
    chex.assert_trees_all_close(heads_gradients, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, [head(k, features, X) for k in kernels], rtol=1e-6)

    # The trunk's kernel is multiplied three times, as in a gradient step, whatever m is.
    large = {"kernel": jnp.zeros((6, 64)), "bias": jnp.zeros(64)}
    large_kernels = [jnp.zeros(64)] * m
    products = [
        e
        for e in jaxprs.equations(step, large, large_kernels)
        if e.primitive.name == "dot_general"
        and (6, 64) in {tuple(sorted(v.aval.shape)) for v in (*e.invars, *e.outvars)}
    ]
    assert len(products) == 2  # Forward, and the weights' gradient; X has no cotangent.


def test_per_example_losses_have_no_pass_per_example():
    width, batch = 40, 7

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2

    def step(params, x):
        _, gramian, pullback = jaxjd.per_example_value_and_gramian(loss)(params, x)
        return pullback(gramian[0])

    params = {"a": jnp.ones((width, width)), "b": jnp.ones((width, width))}
    shapes = sizes_in(step, params, jnp.ones((batch, width)))
    assert all(np.prod(shape, dtype=int) <= width * width for shape in shapes)

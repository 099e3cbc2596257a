"""The dense engines against JAX's own Jacobians, and what they promise about the forward pass."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from tests import jaxprs
from tests.registry import NAMED, by_name

PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (3, 2)),
    "b": jax.random.normal(jax.random.key(1), (2,)),
    "scale": jnp.asarray(0.7),
}
X = jax.random.normal(jax.random.key(2), (4, 3))


def features(params, x):
    return params["scale"] * jnp.tanh(x @ params["w"] + params["b"][None, :])


# Losses in every structure; the order of the tasks is that of the pytree, row-major within a leaf.
STRUCTURES = {
    "vector": lambda f: jnp.sum(f**2, axis=1),
    "matrix": lambda f: f**2,
    "list": lambda f: [f[0, 0], jnp.sum(f), f[1, 1] ** 2],
    "tuple": lambda f: (f[0, 0], f[1]),
    "dict": lambda f: {"z": f[0, 0], "a": jnp.sum(f), "m": f[1]},
    "nested": lambda f: {"first": [f[0, 0], (f[1, 1],)], "second": f[2:, :]},
    "one loss": lambda f: jnp.sum(f),
}


def stacked(losses):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(losses)])


def primitives(fn, *args):
    """Counts the primitives of a function's jaxpr, the inner ones too."""
    return collections.Counter(e.primitive.name for e in jaxprs.equations(fn, *args))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_equals_jacrev_and_jacfwd(structure):
    fn = lambda params, x: STRUCTURES[structure](features(params, x))
    flat = lambda params: stacked(fn(params, X))

    @jax.jit
    def everything(params):
        return (
            jaxjd.value_and_jacobian(fn)(params, X),
            (fn(params, X), jax.jacrev(flat)(params)),
            jax.jacfwd(flat)(params),
            jaxjd.stack_tasks(jax.jacrev(fn)(params, X), fn(params, X)),
        )

    (losses, jacobian), (values, reverse), forward, stacks = everything(PARAMS)
    assert jax.tree.structure(losses) == jax.tree.structure(values)
    chex.assert_trees_all_close(losses, values, rtol=1e-6)
    m = stacked(values).size
    for leaf, param in zip(jax.tree.leaves(jacobian), jax.tree.leaves(PARAMS), strict=True):
        assert leaf.shape == (m, *param.shape)
    assert jax.tree.structure(jacobian) == jax.tree.structure(PARAMS)
    for other in (reverse, forward, stacks):
        chex.assert_trees_all_close(jacobian, other, rtol=1e-5, atol=1e-6)


def test_stack_tasks_needs_only_the_shapes_of_the_losses():
    fn = lambda params: STRUCTURES["nested"](features(params, X))
    jacobian = jax.eval_shape(jax.jacrev(fn), PARAMS)
    losses = jax.eval_shape(fn, PARAMS)
    found = jax.eval_shape(lambda jacobian: jaxjd.stack_tasks(jacobian, losses), jacobian)
    assert jax.tree.map(jnp.shape, found) == {"w": (6, 3, 2), "b": (6, 2), "scale": (6,)}


def losses_of(params, x):
    return jnp.sum(features(params, x) ** 2, axis=0)


def test_jacrev_of_a_vector_of_losses_is_a_jacobian_as_it_is():
    chex.assert_trees_all_close(
        jax.jit(jax.jacrev(losses_of))(PARAMS, X),
        jax.jit(jaxjd.value_and_jacobian(losses_of))(PARAMS, X)[1],
        rtol=1e-6,
    )


@pytest.mark.parametrize("method", NAMED, ids=by_name)
def test_every_aggregator_takes_what_jacrev_returns(method):
    losses = lambda params: jnp.sum(features(params, X)[:3] ** 2, axis=1)
    aggregator = method.aggregator(3)

    def step(params):
        jacobian = jax.jacrev(losses)(params)
        state = aggregator.init(params)
        extra = method.extra_args(jacobian)
        return aggregator.update(jacobian, state, params, **extra)[0]

    updates = jax.eval_shape(step, PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_has_aux():
    def fn(params, x):
        f = features(params, x)
        return {"a": f[0, 0], "b": jnp.sum(f)}, {"features": f, "count": jnp.arange(3)}

    (losses, aux), jacobian = jax.jit(jaxjd.value_and_jacobian(fn, has_aux=True))(PARAMS, X)
    without = lambda params, x: fn(params, x)[0]
    expected, expected_jacobian = jax.jit(jaxjd.value_and_jacobian(without))(PARAMS, X)
    chex.assert_trees_all_equal(losses, expected)
    chex.assert_trees_all_equal(jacobian, expected_jacobian)
    chex.assert_trees_all_close(aux["features"], features(PARAMS, X), rtol=1e-6)
    np.testing.assert_array_equal(aux["count"], np.arange(3))


@pytest.mark.parametrize("argnums", [0, 1, -1, -2, (0,), (0, 1), (1, 0), [-1, 0]], ids=str)
def test_argnums(argnums):
    found = jaxjd.value_and_jacobian(losses_of, argnums=argnums)(PARAMS, X)[1]
    positive = jax.tree.map(lambda number: number % 2, argnums)
    expected = jax.jacrev(losses_of, tuple(positive) if argnums == [-1, 0] else positive)(PARAMS, X)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_keyword_arguments_reach_the_function():
    def fn(params, x, *, factor, shift=0.0):
        return factor * losses_of(params, x) + shift

    engine = jax.jit(jaxjd.value_and_jacobian(fn))
    losses, jacobian = engine(PARAMS, X, factor=2.0, shift=1.0)
    plain, plain_jacobian = jax.jit(jaxjd.value_and_jacobian(losses_of))(PARAMS, X)
    np.testing.assert_allclose(losses, 2 * plain + 1, rtol=1e-6)
    chex.assert_trees_all_close(jacobian, jax.tree.map(lambda j: 2 * j, plain_jacobian), rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 9])
def test_chunk_size_changes_nothing(chunk_size):
    fn = lambda params, x: {"rows": jnp.sum(features(params, x) ** 2, axis=1)}
    plain, expected = jax.jit(jaxjd.value_and_jacobian(fn))(PARAMS, X)
    engine = jax.jit(jaxjd.value_and_jacobian(fn, chunk_size=chunk_size))
    losses, jacobian = engine(PARAMS, X)
    chex.assert_trees_all_equal(losses, plain)
    chex.assert_trees_all_close(jacobian, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"w": "bfloat16", "b": "bfloat16", "scale": "bfloat16"},
        {"w": "float32", "b": "float32", "scale": "float32"},
        {"w": "float64", "b": "float64", "scale": "float64"},
        {"w": "float64", "b": "bfloat16", "scale": "float32"},
    ],
    ids=lambda dtypes: "-".join(dtypes.values()),
)
def test_every_leaf_keeps_the_dtype_of_its_parameter(dtypes):
    with jax.enable_x64(True):
        params = {name: PARAMS[name].astype(dtype) for name, dtype in dtypes.items()}
        x = X.astype(dtypes["w"])
        fn = lambda params: (features(params, x)[0, 0], jnp.sum(features(params, x), axis=0))
        losses, jacobian = jax.jit(jaxjd.value_and_jacobian(fn))(params)
        assert {name: str(leaf.dtype) for name, leaf in jacobian.items()} == dtypes
        assert jax.tree.map(jnp.shape, jacobian) == {"w": (3, 3, 2), "b": (3, 2), "scale": (3,)}
        chex.assert_trees_all_equal(losses, jax.jit(fn)(params))
        reference = jax.jit(jax.jacrev(lambda params: stacked(fn(params))))(params)
        tolerance = 2e-2 if "bfloat16" in dtypes.values() else 1e-5
        chex.assert_trees_all_close(jacobian, reference, rtol=tolerance, atol=tolerance)


def test_losses_of_different_dtypes_share_one_task_axis():
    fn = lambda w: {"half": jnp.sum(w).astype(jnp.bfloat16), "single": w**2}
    losses, jacobian = jaxjd.value_and_jacobian(fn)(jnp.array([1.0, 3.0]))
    assert losses["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(jacobian, [[1.0, 1.0], [2.0, 0.0], [0.0, 6.0]])


def test_under_vmap():
    engine = jaxjd.value_and_jacobian(losses_of)
    batch = jnp.stack([X, 2 * X, X[::-1]])
    losses, jacobian = jax.jit(jax.vmap(engine, in_axes=(None, 0)))(PARAMS, batch)
    for i in range(3):
        expected = jax.jit(engine)(PARAMS, batch[i])
        found = (losses[i], jax.tree.map(lambda leaf, i=i: leaf[i], jacobian))
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_under_scan():
    engine = jaxjd.value_and_jacobian(losses_of, chunk_size=1)
    tx = optax.chain(jaxjd.sum(), optax.sgd(0.01))

    def step(carry, x):
        params, state = carry
        losses, jacobian = engine(params, x)
        updates, state = tx.update(jacobian, state, params)
        return (optax.apply_updates(params, updates), state), losses

    xs = jnp.stack([X, X[::-1], 0.5 * X])
    carry = (PARAMS, tx.init(PARAMS))
    (params, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, xs))(carry)
    expected, gradient = PARAMS, jax.jit(jax.grad(lambda p, x: jnp.sum(losses_of(p, x))))
    for i in range(3):
        np.testing.assert_allclose(losses[i], losses_of(expected, xs[i]), rtol=1e-5)
        expected = jax.tree.map(lambda p, g: p - 0.01 * g, expected, gradient(expected, xs[i]))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_can_be_differentiated_again():
    engine = jaxjd.value_and_jacobian(lambda w: w**3)
    hessian = jax.jacfwd(lambda w: engine(w)[1])(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(hessian[1, 1], [0.0, 12.0], rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("structure", ["vector", "dict"])
def test_the_forward_pass_runs_once(structure, chunk_size):
    plain = lambda params: STRUCTURES[structure](features(params, X))
    assert primitives(lambda p: (plain(p), jax.jacrev(plain)(p)), PARAMS)["tanh"] == 2
    calls = []

    def fn(params, x):
        calls.append(None)
        return STRUCTURES[structure](features(params, x))

    engine = jaxjd.value_and_jacobian(fn, chunk_size=chunk_size)
    assert primitives(engine, PARAMS, X)["tanh"] == 1
    assert len(calls) == 1


# A trunk and its heads

TRUNK = {"w": PARAMS["w"], "b": PARAMS["b"]}
HEAD_NAMES = ("left", "middle", "right")
HEAD_PARAMS = {
    name: {"v": jax.random.normal(jax.random.key(10 + i), (2,)), "c": jnp.asarray(0.1 * i)}
    for i, name in enumerate(HEAD_NAMES)
}
TARGET = jax.random.normal(jax.random.key(3), (4,))


def trunk_fn(params, x, target):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None, :])
    return {"hidden": hidden, "sum": jnp.sum(hidden, axis=0)}


def head_fn(params, feats, x, target):
    prediction = jax.lax.logistic(feats["hidden"] @ params["v"] + params["c"])
    return jnp.mean((prediction - target) ** 2) + 0.1 * feats["sum"] @ params["v"]


def in_form(form, values):
    """The three heads' values in a list, a tuple or a dict."""
    return {"list": list(values), "tuple": tuple(values)}.get(
        form, dict(zip(HEAD_NAMES, values, strict=True))
    )


def heads_of(form, with_aux=False):
    def head(params, feats, x, target):
        loss = head_fn(params, feats, x, target)
        return (loss, {"loss": 2 * loss}) if with_aux else loss

    if form != "callable":
        return in_form(form, [head] * 3)

    def heads(heads_params, feats, x, target):
        results = {name: head(heads_params[name], feats, x, target) for name in HEAD_NAMES}
        if not with_aux:
            return results
        return {n: r[0] for n, r in results.items()}, {n: r[1] for n, r in results.items()}

    return heads


@jax.jit
def mtl_reference(trunk, heads):
    """The whole Jacobian of the trunk, and every head's own gradient, one by one."""

    def vector(trunk, heads):
        feats = trunk_fn(trunk, X, TARGET)
        return jnp.stack([head_fn(heads[name], feats, X, TARGET) for name in HEAD_NAMES])

    feats = trunk_fn(trunk, X, TARGET)
    own = {name: jax.grad(head_fn)(heads[name], feats, X, TARGET) for name in HEAD_NAMES}
    return vector(trunk, heads), jax.jacrev(vector)(trunk, heads), own


FORMS = ["list", "tuple", "dict", "callable"]


def check_mtl(form, losses, jacobian, gradients):
    values, reference, own = mtl_reference(TRUNK, HEAD_PARAMS)
    # The names are in sorted order, so that all forms have the same order of tasks.
    expected = in_form(form, list(values))
    assert jax.tree.structure(losses) == jax.tree.structure(expected)
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)
    chex.assert_trees_all_close(jacobian, reference, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(gradients, in_form(form, list(own.values())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_mtl_equals_the_full_jacobian(form, chunk_size):
    engine = jax.jit(jaxjd.mtl_value_and_jacobian(trunk_fn, heads_of(form), chunk_size=chunk_size))
    heads_params = in_form(form, list(HEAD_PARAMS.values()))
    losses, (jacobian, gradients) = engine(TRUNK, heads_params, X, TARGET)
    check_mtl(form, losses, jacobian, gradients)


@pytest.mark.parametrize("form", ["list", "callable"])
def test_mtl_has_aux(form):
    def trunk_with_aux(params, x, target):
        feats = trunk_fn(params, x, target)
        return feats, {"mean": jnp.mean(feats["hidden"]), "step": jnp.arange(2)}

    heads = heads_of(form, with_aux=True)
    engine = jax.jit(jaxjd.mtl_value_and_jacobian(trunk_with_aux, heads, has_aux=True))
    heads_params = in_form(form, list(HEAD_PARAMS.values()))
    (losses, (trunk_aux, heads_aux)), (jacobian, gradients) = engine(TRUNK, heads_params, X, TARGET)
    check_mtl(form, losses, jacobian, gradients)
    expected = jnp.mean(trunk_fn(TRUNK, X, TARGET)["hidden"])
    np.testing.assert_allclose(trunk_aux["mean"], expected, rtol=1e-5)
    np.testing.assert_array_equal(trunk_aux["step"], [0, 1])
    doubled = jax.tree.map(lambda loss: {"loss": 2 * loss}, losses)
    chex.assert_trees_all_close(heads_aux, doubled, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_mtl_runs_the_trunk_once_and_every_head_once(form):
    engine = jaxjd.mtl_value_and_jacobian(trunk_fn, heads_of(form))
    heads_params = in_form(form, list(HEAD_PARAMS.values()))
    counts = primitives(engine, TRUNK, heads_params, X, TARGET)
    assert counts["tanh"] == 1
    assert counts["logistic"] == 3


def test_mtl_with_features_that_are_not_differentiable():
    """Features may hold integers, such as positions that travel along with them."""

    def trunk(w, x):
        return {"hidden": jnp.tanh(x @ w), "positions": jnp.arange(2)}

    def head(v, feats, x):
        return jnp.mean(feats["hidden"][:, feats["positions"]] @ v)

    engine = jaxjd.mtl_value_and_jacobian(trunk, [head, head])
    heads_params = [jnp.ones(2), -jnp.ones(2)]
    _, (jacobian, gradients) = engine(TRUNK["w"], heads_params, X)
    np.testing.assert_allclose(jacobian[0], -jacobian[1], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-6)


def test_mtl_heads_of_different_kinds():
    heads = {"norm": lambda p, f: f @ f + 0.0 * p, "shift": lambda p, f: jnp.sum(f) + p[0] * p[1]}
    engine = jaxjd.mtl_value_and_jacobian(lambda w: w**2, heads)
    losses, (jacobian, gradients) = engine(
        jnp.array([1.0, 2.0]), {"norm": jnp.asarray(3.0), "shift": jnp.array([4.0, 5.0])}
    )
    assert losses == {"norm": 17.0, "shift": 25.0}
    np.testing.assert_allclose(jacobian, [[4.0, 32.0], [2.0, 4.0]])
    np.testing.assert_allclose(gradients["norm"], 0.0)
    np.testing.assert_allclose(gradients["shift"], [5.0, 4.0])

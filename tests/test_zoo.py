"""The engines agree with ``jax.jacrev`` on a zoo of models, in every form and method."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxjd
from jaxjd import labels
from jaxjd.linalg import factored, owned
from jaxjd.linalg.algebra import count_tasks
from jaxjd.linalg.layers import ConvolutionLayer
from tests import zoo
from tests.registry import slow_but
from tests.zoo import ZOO, by_name, paths

WEIGHTS = jnp.array([0.7, -0.4, 1.3, 0.2, 0.9])
FORMS = ("auto", "factored")
by_model = lambda model: model.name


def assert_close(found, expected, tolerance, what):
    """Compares relative to the largest entry of a leaf, or a hundredth of that of all leaves.

    Some leaves have gradients that are zero but for rounding: a bias before a normalization.
    """
    assert jax.tree.structure(found) == jax.tree.structure(expected), what
    pairs = [
        [np.asarray(leaf, np.float64) for leaf in pair]
        for pair in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    largest = max(np.max(np.abs(wanted)) for _, wanted in pairs)
    assert 0 < largest < np.inf, what
    for path, (leaf, wanted) in zip(paths(expected), pairs, strict=True):
        assert leaf.shape == wanted.shape, (what, path)
        scale = max(np.max(np.abs(wanted)), largest / 100)
        error = np.max(np.abs(leaf - wanted)) / scale
        assert error <= tolerance, f"{what}, leaf '{path}': {error:.1e} of the largest entry"


class Oracle:
    """The Jacobian by ``jax.jacrev``, and what follows from it, in NumPy at double precision."""

    def __init__(self, losses, jacobian, tolerance):
        self.losses, self.tolerance = losses, tolerance
        self.jacobian = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jacobian)
        self.rows = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(self.jacobian)]
        self.gramians = [rows @ rows.T for rows in self.rows]
        self.m = len(self.rows[0])

    def combination(self, weights):
        weights = np.asarray(weights, np.float64)[: self.m]
        return jax.tree.map(lambda leaf: np.tensordot(weights, leaf, 1), self.jacobian)

    def check(self, found, what):
        """Checks a dict of what an engine gave."""
        expected = {
            "losses": self.losses,
            "gramian": sum(self.gramians),
            "gradient": self.combination(WEIGHTS),
            "jacobian": self.jacobian,
        }
        for name, value in found.items():
            assert_close(value, expected[name], self.tolerance, f"{name} of {what}")


def jacrev(fn, has_aux=False):
    """The oracle as a function of the parameters."""

    def losses_and_jacobian(params):
        found, jacobian = fn(params), jax.jacrev(fn, has_aux=has_aux)(params)
        losses, jacobian = (found[0], jacobian[0]) if has_aux else (found, jacobian)
        return losses, jaxjd.stack_tasks(jacobian, losses)

    return losses_and_jacobian


def results_of_jacobian(losses, jacobian):
    m = jax.tree.leaves(jacobian)[0].shape[0]
    return {
        "losses": losses,
        "gramian": jaxjd.gramian(jacobian),
        "gradient": jaxjd.combine(WEIGHTS[:m], jacobian),
        "jacobian": jaxjd.materialize(jacobian),
    }


def results_of_gramian(losses, gramian, pullback):
    gradient = pullback(WEIGHTS[: gramian.shape[0]])
    return {"losses": losses, "gramian": gramian, "gradient": gradient}


def is_factored(leaf):
    return isinstance(leaf, factored.FactoredLeaf)


def by_products(leaf):
    """A factored leaf's Gramian from its factors, whichever way is cheaper."""
    return leaf.layer.gramian(leaf, jnp.float32)


def check_kinds(model, params, leaves):
    """Every leaf that the row names is factored or owned, and every other one is dense."""
    for expressions, kinds in (
        (model.factored, factored.FactoredLeaf),
        (model.owned, (owned.RowsLeaf, owned.BlocksLeaf)),
    ):
        matched = {
            expression: {path for path in paths(params) if re.fullmatch(expression, path)}
            for expression in expressions
        }
        assert all(matched.values()), matched
        pairs = zip(paths(params), leaves, strict=True)
        which = {path for path, leaf in pairs if isinstance(leaf, kinds)}
        assert which == set().union(*matched.values())


@pytest.mark.parametrize("model", ZOO, ids=by_model)
def test_which_leaves_are_factored(model):
    """A primitive that JAX renames turns this red, and no leaf dense. Nothing is compiled."""
    losses_fn, params, x = model.build()
    leaves = []

    def trace(params):
        fn = lambda params: losses_fn(params, x)
        engine = jaxjd.value_and_jacobian(fn, form="factored", has_aux=model.has_aux)
        leaves.extend(jax.tree.leaves(engine(params)[1]))
        return ()

    jax.eval_shape(trace, params)
    check_kinds(model, params, leaves)


# One of each mechanism of the pass; nothing that takes seconds to compile.
QUICK = {
    "checkpoint with a policy",
    "custom rule with a parameter",
    "embeddings with indices of all kinds",
    "linen cnn",
    "low rank adapters",
    "parameters of mixed precision",
    "rnn",
    "views of parameters",
}


@pytest.mark.parametrize("model", slow_but(QUICK, ZOO), ids=by_model)
def test_equals_jacrev(model):
    losses_fn, params, x = model.build()
    fn = lambda params: losses_fn(params, x)
    options = {"has_aux": model.has_aux}
    without_aux = lambda losses: losses[0] if model.has_aux else losses
    leaves = []

    @jax.jit
    def everything(params):
        found = {}
        for form in FORMS:
            losses, jacobian = jaxjd.value_and_jacobian(fn, form=form, **options)(params)
            found[form] = results_of_jacobian(without_aux(losses), jacobian)
        leaves.extend(jax.tree.leaves(jacobian))
        own = [by_products(leaf) for leaf in jax.tree.leaves(jacobian) if is_factored(leaf)]
        # The other methods are these forms with the same Gramian; `test_options` has them.
        engine = jaxjd.value_and_gramian(fn, form="products", **options)
        losses, *rest = engine(params)
        found["vector products"] = results_of_gramian(without_aux(losses), *rest)
        return jacrev(fn, model.has_aux)(params), found, own

    (losses, jacobian), found, own = everything(params)
    assert 3 <= count_tasks(jacobian, params) <= 4
    oracle = Oracle(losses, jacobian, model.tolerance)
    for what, results in found.items():
        oracle.check(results, what)
    pairs = zip(oracle.gramians, leaves, strict=True)
    expected = [g for g, leaf in pairs if is_factored(leaf)]
    if expected:
        assert_close(own, expected, model.tolerance, "Gramian by products")

    check_kinds(model, params, leaves)


# Inside vmap and scan


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param("rnn", "factored", marks=pytest.mark.slow),
        pytest.param("linen cnn", "auto", marks=pytest.mark.slow),
        pytest.param("linen transformer", "factored", marks=pytest.mark.slow),
        pytest.param("scan over rematerialized layers", "factored", marks=pytest.mark.slow),
        pytest.param("embeddings with indices of all kinds", "auto", marks=pytest.mark.slow),
        pytest.param("mixture of experts", "factored", marks=pytest.mark.slow),
    ],
)
def test_steps_under_vmap_over_seeds_and_scan(name, form):
    losses_fn, params, x = by_name(name).build()
    tx = optax.chain(jaxjd.upgrad(), optax.sgd(0.05))
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.8 * leaf[..., ::-1]]), params)
    batches = jnp.stack([x, x[::-1], jnp.roll(x, 1, -1)])

    def train(engine_of):
        def step(params, x):
            losses, jacobian = engine_of(lambda params: losses_fn(params, x))(params)
            updates, _ = tx.update(jacobian, tx.init(params), params)
            return optax.apply_updates(params, updates), losses

        return jax.vmap(lambda params: lax.scan(step, params, batches))

    @jax.jit
    def everything(seeds):
        engine = lambda fn: jaxjd.value_and_jacobian(fn, form=form)
        return train(engine)(seeds), train(jacrev)(seeds)

    found, expected = everything(seeds)
    for leaf, start in zip(jax.tree.leaves(found[0]), jax.tree.leaves(seeds), strict=True):
        assert leaf.shape == start.shape
    assert_close(found[0], expected[0], 1e-5, "parameters")
    assert_close(found[1], expected[1], 1e-5, "losses")


# One loss per example


def loss_of_an_example(losses_fn):
    def loss(params, example):
        return sum(map(jnp.sum, jax.tree.leaves(losses_fn(params, example[None]))))

    return loss


def gradients_of_examples(loss, params, x):
    return jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(params, x)


@pytest.mark.parametrize(
    "name",
    slow_but(
        {"rnn"},
        [
            "linen mlp",
            "linen transformer",
            "linen language model with tied embedding",
            "linen group norm",
            "linen scanned layers",
            "equinox cnn with channels first",
            "rnn",
            "scan within a scan",
            "embeddings with indices of all kinds",
            "mixture of experts",
        ],
    ),
)
def test_losses_of_examples(name):
    model = by_name(name)
    losses_fn, params, x = model.build()
    loss = loss_of_an_example(losses_fn)
    kinds = []

    @jax.jit
    def everything(params):
        found = {}
        for form in ("dense", *FORMS):
            engine = jaxjd.per_example_value_and_jacobian(loss, form=form)
            losses, jacobian = engine(params, x)
            found[form] = results_of_jacobian(losses, jacobian)
            engine = jaxjd.per_example_value_and_gramian(loss, form=form)
            found["Gramian, " + form] = results_of_gramian(*engine(params, x))
        kinds.extend(map(is_factored, jax.tree.leaves(jacobian)))
        own = [by_products(leaf) for leaf in jax.tree.leaves(jacobian) if is_factored(leaf)]
        return gradients_of_examples(loss, params, x), found, own

    expected, found, own = everything(params)
    oracle = Oracle(*expected, model.tolerance)
    assert oracle.m == zoo.BATCH
    for what, results in found.items():
        oracle.check(results, what)
    expected = [g for g, kind in zip(oracle.gramians, kinds, strict=True) if kind]
    assert_close(own, expected, model.tolerance, "Gramian by products")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", *FORMS])
@pytest.mark.parametrize("name", ["linen cnn", "scan over rematerialized layers"])
def test_losses_of_examples_in_chunks(name, form):
    losses_fn, params, x = by_name(name).build()
    loss = loss_of_an_example(losses_fn)
    options = {"form": form, "chunk_size": 2}

    @jax.jit
    def everything(params):
        return (
            gradients_of_examples(loss, params, x),
            results_of_jacobian(*jaxjd.per_example_value_and_jacobian(loss, **options)(params, x)),
            results_of_gramian(*jaxjd.per_example_value_and_gramian(loss, **options)(params, x)),
        )

    expected, jacobian, gramian = everything(params)
    oracle = Oracle(*expected, 1e-5)
    oracle.check(jacobian, "Jacobian")
    oracle.check(gramian, "Gramian")


# Options


@pytest.mark.parametrize("form", slow_but({"factored"}, FORMS))
@pytest.mark.parametrize(
    "name",
    slow_but(
        {"linen batch norm in training"},
        ["linen cnn", "linen batch norm in training", "scan over rematerialized layers"],
    ),
)
def test_options(name, form):
    """Chunks of tasks, groups of parameters, auxiliary output and the numbers of arguments."""
    model = by_name(name)
    losses_fn, params, x = model.build()
    options = {"has_aux": model.has_aux, "argnums": (2, 0), "chunk_size": 2}
    label = lambda pair: (labels.by_layer(pair[0]), "scale")
    scale = jnp.asarray(1.2)
    groups = jax.tree.leaves(label((params, scale)))
    assert len(set(groups)) >= 3
    of_group = {
        group: jnp.roll(WEIGHTS, number) for number, group in enumerate(sorted(set(groups)))
    }

    def fn(scale, unused, params, x):
        return losses_fn(params, scale * x)

    @jax.jit
    def everything(params, scale):
        args = (scale, None, params, x)
        losses, jacobian = jaxjd.value_and_jacobian(fn, form=form, **options)(*args)
        losses, aux = losses if model.has_aux else (losses, ())
        m = jaxjd.gramian(jacobian).shape[0]
        weights = {group: weights[:m] for group, weights in of_group.items()}
        grouped = {}
        for method in (form, "products"):
            engine = jaxjd.value_and_gramian(fn, form=method, labels=label, **options)
            _, gramians, pullback = engine(*args)
            grouped[method] = gramians, pullback(weights)
        plain = lambda pair: fn(pair[1], None, pair[0], x)
        expected = jacrev(plain, model.has_aux)((params, scale))
        wanted_aux = fn(*args)[1] if model.has_aux else ()
        return expected, wanted_aux, results_of_jacobian(losses, jacobian), aux, grouped

    expected, wanted_aux, found, aux, grouped = everything(params, scale)
    oracle = Oracle(*expected, model.tolerance)
    oracle.check(found, form)
    if model.has_aux:
        assert_close(aux, wanted_aux, 1e-6, "auxiliary output")
    for method, (gramians, gradient) in grouped.items():
        wanted = dict.fromkeys(groups, 0)
        for group, product in zip(groups, oracle.gramians, strict=True):
            wanted[group] = wanted[group] + product
        assert_close(gramians, wanted, model.tolerance, f"Gramians of {method}")
        combinations = {
            group: jax.tree.leaves(oracle.combination(of_group[group])) for group in groups
        }
        wanted = [combinations[group][place] for place, group in enumerate(groups)]
        found = jax.tree.leaves(gradient)
        assert_close(found, wanted, model.tolerance, f"gradient of {method}")


@pytest.mark.parametrize(
    "name",
    slow_but({"linen group norm"}, ["linen convolutions of all kinds", "linen group norm"]),
)
def test_patches_of_some_examples_at_a_time(name, monkeypatch):
    monkeypatch.setattr(ConvolutionLayer, "_PATCH_BYTES", 1)
    losses_fn, params, x = by_name(name).build()
    loss = loss_of_an_example(losses_fn)

    @jax.jit
    def everything(params):
        fn = lambda params: losses_fn(params, x)
        engine = jaxjd.per_example_value_and_jacobian(loss, form="factored")
        return (
            results_of_jacobian(*jaxjd.value_and_jacobian(fn, form="factored")(params)),
            jacrev(fn)(params),
            results_of_jacobian(*engine(params, x)),
            gradients_of_examples(loss, params, x),
        )

    found, expected, per_example, expected_per_example = everything(params)
    Oracle(*expected, 1e-5).check(found, "tasks")
    Oracle(*expected_per_example, 1e-5).check(per_example, "examples")


@pytest.mark.parametrize(
    "name",
    slow_but(
        {"views of parameters"},
        [
            "linen convolutions of all kinds",
            "embeddings with indices of all kinds",
            "scan within a scan",
            "views of parameters",
        ],
    ),
)
def test_cross_gramian_of_two_batches(name):
    losses_fn, params, x = by_name(name).build()
    batches = (x, jnp.roll(x, 1, -1)[:3])
    own = []

    @jax.jit
    def everything(params):
        fns = [lambda params, x=x: losses_fn(params, x) for x in batches]
        pair = [jaxjd.value_and_jacobian(fn, form="factored")(params)[1] for fn in fns]
        leaves = list(zip(*map(jax.tree.leaves, pair), strict=True))
        own.extend(is_factored(leaf) for leaf, _ in leaves)
        by_products = [
            one.layer.cross_gramian(one, other, jnp.float32)
            for one, other in leaves
            if is_factored(one)
        ]
        return jaxjd.cross_gramian(*pair), by_products, [jacrev(fn)(params) for fn in fns]

    found, by_products, expected = everything(params)
    first, second = (Oracle(*pair, 1e-5).rows for pair in expected)
    products = [a @ b.T for a, b in zip(first, second, strict=True)]
    assert_close(found, sum(products), 1e-5, "cross-Gramian")
    products = [product for product, kind in zip(products, own, strict=True) if kind]
    assert_close(by_products, products, 1e-5, "cross-Gramian by products")


@pytest.mark.parametrize(
    "name",
    slow_but({"rnn"}, ["linen group norm", "rnn", "embeddings with indices of all kinds"]),
)
def test_a_factored_step_can_be_differentiated(name):
    """Both ways, as for hyper-parameters that are learned or in MAML."""
    losses_fn, params, x = by_name(name).build()
    direction = jax.tree.map(lambda leaf: jnp.sin(100 * leaf), params)

    def sharpness(engine_of):
        def fn(params):
            losses, jacobian = engine_of(lambda params: losses_fn(params, x))(params)
            gramian = jaxjd.gramian(jacobian)
            gradient = jaxjd.combine(jnp.mean(gramian, axis=0), jacobian)
            return jnp.sum(losses) + optax.tree.vdot(gradient, direction)

        return fn

    @jax.jit
    def everything(params):
        found = []
        for engine_of in (lambda fn: jaxjd.value_and_jacobian(fn, form="factored"), jacrev):
            fn = sharpness(engine_of)
            found.append((jax.grad(fn)(params), jax.jvp(fn, (params,), (direction,))))
        return found

    found, expected = everything(params)
    assert_close(found, expected, 1e-5, "derivative of a step")

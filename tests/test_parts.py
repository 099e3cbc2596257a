"""What each loss owns is pulled back once in all: the Jacobians of `jax.jacrev` at less cost."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests.jaxprs import multiplications

WIDTH = 12


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(WIDTH)


def net(kernels, x):
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return x


def trunk(depth=2, seed=0):
    return [normal(seed + place, WIDTH, WIDTH) for place in range(depth)]


def batches(*sizes):
    return [normal(50 + place, size, WIDTH) for place, size in enumerate(sizes)]


def own_batches():
    """Of unequal sizes."""

    def losses(params, xs):
        return jnp.stack([jnp.mean(net(params, x)[:, n] ** 2) for n, x in enumerate(xs)])

    return losses, trunk(), batches(3, 5, 4)


def points_of_three_kinds():
    def losses(params, points):
        inside, border, start = points
        value = lambda x: net(params, x[None])[0] @ jnp.ones(WIDTH)
        return {
            "equation": jnp.mean(jax.vmap(lambda x: jnp.sum(jax.grad(value)(x)) ** 2)(inside)),
            "border": jnp.mean(jax.vmap(value)(border) ** 2),
            "start": [jnp.mean((jax.vmap(value)(start) - 1) ** 2)],
        }

    return losses, trunk(), batches(6, 3, 2)


def heads_on_a_trunk():
    params = {"trunk": trunk(), "heads": [[normal(80 + n, WIDTH, 3)] for n in range(3)]}

    def losses(params, x):
        features = net(params["trunk"], x)
        return {str(n): jnp.var(net(head, features)) for n, head in enumerate(params["heads"])}

    return losses, params, normal(70, 5, WIDTH)


def heads_that_are_indexed():
    params = {"trunk": trunk(), "heads": normal(80, 3, WIDTH, WIDTH)}

    def losses(params, x):
        features = net(params["trunk"], x)
        return [jnp.var(net([params["heads"][n]] * 2, features)) for n in range(3)]

    return losses, params, normal(70, 5, WIDTH)


def tasks_on_an_axis():
    params = {"kernels": trunk(), "bias": normal(3, WIDTH), "scales": normal(4, 3)}

    def losses(params, xs):
        def one(x, scale):
            return scale * jnp.var(net(params["kernels"], x) + params["bias"][None])

        return jax.vmap(one)(xs, params["scales"]) * jnp.array([1.0, 2.0, 3.0])

    return losses, params, normal(70, 3, 5, WIDTH)


def classification_of_tasks_on_an_axis():
    def losses(params, data):
        def one(x, labels):
            logs = jax.nn.log_softmax(net(params, x))
            return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1))

        return jax.vmap(one)(*data)

    return losses, trunk(), (normal(70, 3, 5, WIDTH), jnp.arange(15).reshape(3, 5) % WIDTH)


def embeddings_of_tasks_on_an_axis():
    params = {"table": normal(5, 9, WIDTH), "kernels": trunk()}

    def losses(params, tokens):
        return jax.vmap(lambda ids: jnp.var(net(params["kernels"], params["table"][ids])))(tokens)

    return losses, params, jnp.arange(15).reshape(3, 5) % 9


def losses_that_are_set():
    def losses(params, xs):
        found = jnp.zeros(4)
        for place, x in zip((0, 1, 3), xs, strict=True):
            found = found.at[place].set(jnp.var(net(params[: place + 1], x)))
        return found * 2

    return losses, trunk(3), batches(5, 5, 5)


def two_trunks():
    params = {"first": trunk(), "second": trunk(seed=30)}

    def losses(params, x):
        first, second = net(params["first"], x), net(params["second"], x)
        return [jnp.var(first), jnp.mean(first), jnp.mean(first * second), jnp.var(second)]

    return losses, params, normal(70, 5, WIDTH)


def auxiliary_losses_at_several_depths():
    return (
        lambda params, x: [jnp.var(net(params[:n], x)[:, n]) for n in (1, 2, 3)],
        trunk(3),
        normal(70, 5, WIDTH),
    )


def decay_and_a_constant_loss():
    def losses(params, x):
        decay = sum(jnp.sum(kernel**2) for kernel in params)
        return [jnp.var(net(params, x)), decay, jnp.var(net(params[:1], x)), jnp.zeros(())]

    return losses, trunk(), normal(70, 5, WIDTH)


def weights_without_a_gradient():
    """One loss scales another, through what no gradient passes, and a mask is shared."""

    def losses(params, xs):
        first, second = (net(params, x) for x in xs)
        size = jax.lax.stop_gradient(jnp.var(second))
        return [size * jnp.var(jnp.where(second > 0, first, 0.1)), jnp.var(second)]

    return losses, trunk(), batches(5, 5)


def towers_that_share_kernels():
    def losses(params, xs):
        left, right, other = (net(params, x) for x in xs)
        return [jnp.mean(left * right), jnp.var(right), jnp.var(other)]

    return losses, trunk(), batches(5, 5, 5)


def jitted_networks():
    apply = jax.jit(net)

    def losses(params, xs):
        return jnp.concatenate([jnp.var(apply(params, x))[None] for x in xs])

    return losses, trunk(), batches(5, 5, 4)


def columns_of_a_tied_table():
    """Some losses own columns of what is a table of all in another place."""
    params = {"table": normal(5, 9, WIDTH), "trunk": trunk()}

    def losses(params, data):
        tokens, x = data
        features = net(params["trunk"], params["table"][tokens])
        logits = features @ params["table"].T
        return {
            "columns": jnp.var(logits, axis=0)[:3],
            "some": jnp.var(logits[:, 3:6]),
            "view": [jnp.var(jnp.sin(params["table"].T[:, n : n + 4])) for n in (0, 4)],
            "features": jnp.var(features),
            "other": jnp.var(net(params["trunk"], x)),
        }

    return losses, params, (jnp.arange(5), normal(70, 5, WIDTH))


PROBLEMS = (
    own_batches,
    points_of_three_kinds,
    heads_on_a_trunk,
    heads_that_are_indexed,
    tasks_on_an_axis,
    classification_of_tasks_on_an_axis,
    embeddings_of_tasks_on_an_axis,
    losses_that_are_set,
    two_trunks,
    auxiliary_losses_at_several_depths,
    decay_and_a_constant_loss,
    weights_without_a_gradient,
    towers_that_share_kernels,
    jitted_networks,
    columns_of_a_tied_table,
)


# One of each way to own something; random programs have the others, too.
QUICK = (
    own_batches,
    tasks_on_an_axis,
    embeddings_of_tasks_on_an_axis,
    losses_that_are_set,
    columns_of_a_tied_table,
)


def some_are_slow(problems):
    return [
        make if make in QUICK else pytest.param(make, marks=pytest.mark.slow) for make in problems
    ]


def assert_close(found, expected):
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-10, atol=1e-12)


def everything(losses, params, data, **options):
    """The losses, the dense Jacobian, the Gramian and a combination."""
    values, jacobian = jaxjd.value_and_jacobian(losses, **options)(params, data)
    gramian = jaxjd.gramian(jacobian)
    weights = jnp.arange(1.0, 1 + len(gramian))
    return values, jaxjd.materialize(jacobian), gramian, jaxjd.combine(weights, jacobian)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "auto"},
        pytest.param({"form": "factored"}, marks=pytest.mark.slow),
        pytest.param({"form": "auto", "chunk_size": 1}, marks=pytest.mark.slow),
    ],
    ids=["auto", "factored", "one at a time"],
)
@pytest.mark.parametrize("make", some_are_slow(PROBLEMS), ids=lambda make: make.__name__)
def test_equals_jacrev(make, options):
    with jax.enable_x64(True):
        losses, params, data = make()
        run = jax.jit(lambda params, data: everything(losses, params, data, **options))
        found = run(params, data)
        values = losses(params, data)
        rows = jaxjd.stack_tasks(jax.jacrev(losses)(params, data), values)
        gramian = jaxjd.gramian(rows)
        weights = jnp.arange(1.0, 1 + len(gramian))
        expected = (values, rows, gramian, jaxjd.combine(weights, rows))
        assert_close(found, expected)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (own_batches, 1.3),
        (points_of_three_kinds, 1.3),
        (heads_on_a_trunk, 1.9),
        (tasks_on_an_axis, 1.4),
        (towers_that_share_kernels, 1.6),
        (jitted_networks, 1.3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_work_in_units_of_a_plain_step(make, most):
    losses, params, data = make()

    def plain(params, data):
        return jax.grad(lambda params: sum(map(jnp.sum, jax.tree.leaves(losses(params, data)))))(
            params
        )

    def jacobian(params, data):
        values, jacobian = jaxjd.value_and_jacobian(losses, form="auto")(params, data)
        return values, [leaf.arrays for leaf in map(as_opaque, jax.tree.leaves(jacobian))]

    def as_opaque(leaf):
        return leaf if hasattr(leaf, "arrays") else jaxjd.linalg.owned.RowsLeaf((0,), leaf, 1)

    counts = [multiplications(jax.make_jaxpr(fn)(params, data).jaxpr) for fn in (plain, jacobian)]
    assert counts[1] <= most * counts[0]


@pytest.mark.parametrize(
    ("form", "as_one"),
    [
        ("auto", True),
        pytest.param("auto", False, marks=pytest.mark.slow),
        pytest.param("factored", True, marks=pytest.mark.slow),
    ],
)
def test_trunk_and_heads_by_parts(form, as_one):
    """The engines for a trunk with heads give the same with a form, however heads are written."""
    with jax.enable_x64(True):
        params = {"trunk": trunk(), "heads": [normal(80 + n, WIDTH, 3) for n in range(3)]}
        x = normal(70, 5, WIDTH)

        def features(kernels, x):
            y = net(kernels, x)
            return {"y": y, "mask": y > 0, "name": "trunk"}, {"mean": jnp.mean(y), "name": "aux"}

        def head(kernel, features, x):
            assert features["name"] == "trunk"
            loss = jnp.var(jnp.where(features["mask"], features["y"], 0.1) @ kernel)
            return loss, {"twice": 2 * loss}

        def together(kernels, features, x):
            found = [head(kernel, features, x) for kernel in kernels]
            return jnp.stack([loss for loss, _ in found]), [aux for _, aux in found]

        def results(heads_fn, params, x, **options):
            options["has_aux"] = True
            args = (params["trunk"], params["heads"], x)
            engine = jaxjd.mtl_value_and_jacobian(features, heads_fn, **options)
            (losses, aux), (jacobian, gradients) = engine(*args)
            weights = jnp.arange(1.0, 4)
            engine = jaxjd.mtl_value_and_gramian(features, heads_fn, **options)
            (again, _), at_features, pullback = engine(*args)
            assert aux[0].pop("name") == "aux"
            return (
                *(losses, aux, jaxjd.materialize(jacobian), jaxjd.gramian(jacobian), gradients),
                *(again, at_features, pullback(weights)),
            )

        heads_fn = together if as_one else [head] * 3
        options = {"form": form, "chunk_size": 1 if as_one else None}
        run = jax.jit(
            lambda params, x: (
                results(heads_fn, params, x, **options),
                results(heads_fn, params, x),
            )
        )
        assert_close(*run(params, x))
        with pytest.raises(ValueError, match="`form` must be one of"):
            jaxjd.mtl_value_and_jacobian(features, together, form="products")


def test_work_of_one_function_for_all_heads():
    _, params, x = heads_on_a_trunk()
    head = lambda kernels, features, x: jnp.var(net(kernels, features))
    each = lambda heads, features, x: [head(kernels, features, x) for kernels in heads]
    counts = {}
    for name, heads_fn in (("each", [head] * 3), ("together", each)):
        for engine in (jaxjd.mtl_value_and_jacobian, jaxjd.mtl_value_and_gramian):

            def run(params, x, engine=engine, heads_fn=heads_fn):
                run_fn = engine(net, heads_fn, form="auto")
                losses, *_ = run_fn(params["trunk"], params["heads"], x)
                return losses, []

            jaxpr = jax.make_jaxpr(run)(params, x)
            counts[name, engine] = multiplications(jaxpr.jaxpr)
    for engine in (jaxjd.mtl_value_and_jacobian, jaxjd.mtl_value_and_gramian):
        assert counts["each", engine] == counts["together", engine]


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_printed_is_printed_once(ordered, capsys):
    def losses(params, xs):
        found = []
        for place, x in enumerate(xs):
            y = net(params, x)
            jax.debug.print("loss {} {}", place, jnp.round(jnp.sum(0 * y)), ordered=ordered)
            found.append(jnp.var(y))
        jax.debug.print("zero {}", jnp.round(0 * found[0]), ordered=ordered)
        jax.debug.print("{}", params[1], ordered=ordered)
        jax.debug.print("end", ordered=ordered)
        return found

    params, xs = [trunk()[0], jnp.ones((WIDTH, 1))], batches(5, 5)
    _, jacobian = jaxjd.value_and_jacobian(losses, form="factored")(params, xs)
    assert ordered or hasattr(jacobian[1], "arrays")  # What is printed is not used.
    jax.effects_barrier()
    lines = capsys.readouterr().out.replace("-", "").splitlines()
    expected = ["loss 0 0.0", "loss 1 0.0", "zero 0.0", *str(params[1]).splitlines(), "end"]
    assert (lines if ordered else sorted(lines)) == (expected if ordered else sorted(expected))


def test_leaves_of_some_losses():
    losses, params, data = heads_on_a_trunk()
    losses_of = jaxjd.value_and_jacobian(losses, form="auto")
    jacobian = losses_of(params, data)[1]
    head = jacobian["heads"][1][0]
    assert head.shape == (3, WIDTH, 3)
    assert sum(array.size for array in head.arrays) < 3 * WIDTH * 3  # The dense leaf.
    with pytest.raises(TypeError, match="materialize"):
        head + 1
    rows = jaxjd.materialize(jacobian)["heads"][1][0]
    assert not rows[0].any()
    assert rows[1].any()
    assert not rows[2].any()
    reports = jaxjd.diagnostics.explain_jacobian(losses, params, data, quiet=True)
    assert reports[0].reason.endswith("for losses 0 only")

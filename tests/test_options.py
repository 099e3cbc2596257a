"""One core of options: every engine takes the same words, and they mean the same."""

from __future__ import annotations

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxjd
from jaxjd import sharding
from jaxjd.integrations import nnx as nnx_engines
from tests import random_losses
from tests.matrices import gaussian
from tests.test_cost_of_shapes import array, cost, fit, net

JACOBIANS = [
    jaxjd.value_and_jacobian,
    jaxjd.mtl_value_and_jacobian,
    jaxjd.per_example_value_and_jacobian,
]
GRAMIANS = [
    jaxjd.value_and_gramian,
    jaxjd.mtl_value_and_gramian,
    jaxjd.per_example_value_and_gramian,
]
FRONT = jaxjd.aggregated_value_and_grad
DEFAULTS = {"argnums": 0, "has_aux": False, "chunk_size": None, "labels": None}
M = 3
WEIGHTS = jnp.array([1.0, -2.0, 0.5])


def documentation(engine):
    """What a docstring says about each argument, without line breaks."""
    (text,) = re.findall(r"\nArgs:\n(.*?)\n\n", inspect.getdoc(engine), re.DOTALL)
    entries = re.findall(r"^  (\w+): (.*?)(?=^  \w|\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(entry.split()) for name, entry in entries}


@pytest.mark.parametrize("engine", [*JACOBIANS, *GRAMIANS, FRONT], ids=lambda e: e.__name__)
def test_words_defaults_and_documentation(engine):
    options = inspect.signature(engine).parameters
    wanted = {"argnums", "has_aux", "chunk_size", "form", "labels"}
    if "mtl" in engine.__name__:
        wanted -= {"argnums"}
    if engine in JACOBIANS:
        wanted -= {"labels"}
    assert wanted == set(options) & {*wanted, *DEFAULTS}
    defaults = DEFAULTS | {"form": "dense" if engine in JACOBIANS else "auto"}
    for name in wanted:
        assert options[name].default == defaults[name], name
    same = documentation(jaxjd.value_and_jacobian)
    for name in ("has_aux", "chunk_size", "form"):
        assert documentation(engine)[name] == same[name], name
    for form in ("auto", "dense", "factored", "products"):
        assert f'``"{form}"``' in same["form"]


def test_parallel_asks_for_nothing_that_the_engine_knows():
    assert [*inspect.signature(sharding.parallel).parameters] == [
        *("engine", "axis_name", "param_specs")
    ]

    def losses(x, w, b):
        y = x @ w["w"] + b
        return [jnp.mean(y), jnp.mean(y**2)], jnp.sum(x)

    engine = jaxjd.value_and_jacobian(losses, argnums=(-1, 1), has_aux=True)
    x, w, b = jnp.asarray(gaussian(0, 2, 3, 4)), {"w": jnp.ones(4)}, jnp.ones(())
    (expected, _), rows = engine(x.reshape(6, 4), w, b)
    for wrapped in (engine, jax.jit(engine)):
        run = jax.jit(jax.vmap(sharding.parallel(wrapped, "d"), (0, None, None), axis_name="d"))
        (found, aux), jacobian = jax.tree.map(lambda leaf: leaf[1], run(x, w, b))
        chex.assert_trees_all_close((found, jacobian), (expected, rows), rtol=1e-5)
        np.testing.assert_allclose(aux, jnp.sum(x[1]), rtol=1e-5)
    trunk_engine = jaxjd.mtl_value_and_jacobian(
        lambda w, x: x * w[None], lambda v, z, x: v * z.mean(0)
    )
    run = jax.jit(jax.vmap(sharding.parallel(trunk_engine, "d"), (None, None, 0), axis_name="d"))
    _, found = run(jnp.ones(4), jnp.ones(4), x)
    expected = trunk_engine(jnp.ones(4), jnp.ones(4), x.reshape(6, 4))[1]
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], found), expected, rtol=1e-5)


@pytest.mark.parametrize("engine", JACOBIANS, ids=lambda e: e.__name__)
def test_products_hold_no_jacobian(engine):
    other = {jaxjd.mtl_value_and_jacobian: abs}.get(engine)
    with pytest.raises(ValueError, match=r"holds no Jacobian.*value_and_gramian"):
        engine(abs, *(() if other is None else (other,)), form="products")


@pytest.mark.parametrize(
    ("labels", "every"), [(None, 2), ({"w": "a", "b": "b"}, 1), ({"w": "a", "b": "b"}, 2)]
)
def test_products_behind_the_front_door(labels, every):
    params = {"w": jnp.asarray(gaussian(0, 4, M)), "b": jnp.asarray(gaussian(1, M))}
    x = jnp.asarray(gaussian(2, 5, 4))
    losses = lambda params, x: (jnp.mean((x @ params["w"] + params["b"][None]) ** 2, 0), x)
    weighting = jaxjd.weightings.cr_mogm(jaxjd.weightings.mgda("loss"))
    options = {"num_tasks": M, "has_aux": True, "labels": labels, "every": every}

    def run(form, params, x):
        init, apply = FRONT(losses, weighting, form=form, **options)
        state, found = init(params), []
        for _ in range(2):
            result, state = apply(state, params, x)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, result[1])
            found.append(result)
        return found, state

    found, expected = (
        jax.jit(functools.partial(run, form))(params, x) for form in ("products", "dense")
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def features_of(params, x, *, shift):
    """Two features, one of which is no float."""
    y = jnp.tanh(x @ params["a"] + shift)
    return {"y": jnp.tanh(y @ params["b"]), "skip": y, "ids": jnp.arange(4)}


def own_heads(heads, z, x, *, shift):
    """A head per task, of which one looks at the other feature too."""
    found = [jnp.var(z["y"] @ kernel + shift) for kernel in heads["own"]]
    return [*found[:-1], found[-1] + jnp.mean(z["skip"] ** 3)]


def sharing_heads(heads, z, x, *, shift):
    """Heads with a common layer, which a vector of losses shares, and a scale from parameters."""
    common = jnp.tanh(z["y"] @ heads["common"]) * jnp.exp(heads["scale"])
    return jnp.stack([jnp.var(common @ kernel) + shift for kernel in heads["own"]])


def stacked_heads(heads, z, x, *, shift):
    """All heads in one product, and a loss of the heads' parameters only."""
    y = jnp.einsum("bd,tdk->tbk", z["y"], jnp.stack(heads["own"][:2]))
    y = y + (z["skip"] @ heads["common"])[None, :, :1]
    size = jnp.sum(jnp.tanh(heads["scale"] * heads["common"]) ** 2)
    return {"fit": jnp.mean((y - shift) ** 2, axis=(1, 2)), "size": size}


def looking_heads(heads, z, x, *, shift):
    """Heads that look at values."""
    found = own_heads(heads, z, x, shift=shift)
    return found if found[0] > 0 else found[::-1]


def calling_heads(heads, z, x, *, shift):
    """Heads with an effect in an order, which is not cut into parts."""
    jax.debug.callback(lambda: None, ordered=True)
    return sharing_heads(heads, z, x, shift=shift)


def draw(seed, *shape):
    return jnp.asarray(gaussian(seed, *shape), "float64")


def problem():
    params = {"a": draw(0, 4, 4), "b": draw(1, 4, 4)}
    heads = {
        "own": [draw(2 + n, 4, 2) for n in range(M)],
        "common": draw(6, 4, 4),
        "scale": draw(7),
        "not used": draw(8, 2),
    }
    return params, heads, draw(9, 5, 4)


def vector(losses):
    return jnp.concatenate([jnp.ravel(loss) for loss in jax.tree.leaves(losses)])


CASES = {
    "own": (own_heads, ("auto", None)),
    "sharing": (sharing_heads, ("dense", None)),
    "stacked": (stacked_heads, ("factored", 1)),
    "values": (looking_heads, ("dense", 2)),
    "calling": (calling_heads, ("auto", 2)),
}


def run_of(case):
    """Calls a function, compiled where that works."""
    return lambda fn, *args: fn(*args) if case == "values" else jax.jit(fn)(*args)


@functools.cache
def by_jacrev(case):
    """Losses, Jacobians of trunk and heads, and those at the features, once for all options."""
    heads_fn, run = CASES[case][0], run_of(case)
    params, heads, x = problem()
    shift = jnp.asarray(0.1)

    def losses(params, heads):
        features = features_of(params, x, shift=shift)
        return vector(heads_fn(heads, features, x, shift=shift))

    features = features_of(params, x, shift=shift)
    ids = features.pop("ids")
    of_features = lambda z: vector(heads_fn(heads, {**z, "ids": ids}, x, shift=shift))
    rows, by_loss = run(jax.jacrev(losses, (0, 1)), params, heads)
    gradients = jax.tree.map(lambda leaf: leaf.sum(0), by_loss)
    return losses(params, heads), rows, gradients, run(jax.jacrev(of_features), features)


@pytest.mark.parametrize(
    ("case", "form", "chunk_size"),
    [(name, *options) for name, (_, options) in CASES.items()]
    + [
        pytest.param(name, form, chunk_size, marks=pytest.mark.slow)
        for name, (_, done) in CASES.items()
        for form in ("dense", "auto", "factored")
        for chunk_size in (None, 1, 2)
        if (form, chunk_size) != done and (name != "values" or form == "dense")
    ],
)
def test_trunk_and_heads_in_every_form(case, form, chunk_size):
    with jax.enable_x64(True):
        heads_fn = CASES[case][0]
        params, heads, x = problem()
        shift = jnp.asarray(0.1)

        run = run_of(case)
        losses, rows, gradients, at_features = by_jacrev(case)
        engine = jaxjd.mtl_value_and_jacobian(
            features_of, heads_fn, chunk_size=chunk_size, form=form
        )

        def whole(params, heads):
            values, (found, sums) = engine(params, heads, x, shift=shift)
            if form == "dense":
                assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
            return values, jaxjd.materialize(found), sums

        values, found, sums = run(whole, params, heads)
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
        close(vector(values), losses)
        close((found, sums), (rows, gradients))

        labels = {"y": "late", "skip": "early", "ids": None}
        given = labels if form == "auto" else None
        for how in (form, "products") if chunk_size is None and form == "dense" else (form,):
            gramian_engine = jaxjd.mtl_value_and_gramian(
                features_of, heads_fn, chunk_size=chunk_size, form=how, labels=given
            )

            def parts(params, heads, engine=gramian_engine):
                _, gramian, pullback = engine(params, heads, x, shift=shift)
                found = [pullback(WEIGHTS)]
                if given is not None:
                    found.append(pullback({"late": WEIGHTS, "early": -WEIGHTS}))
                return gramian, found

            gramian, pulled = run(parts, params, heads)
            close(pulled[0], (jaxjd.combine(WEIGHTS, rows), gradients))
            total = gramian if given is None else gramian["late"] + gramian["early"]
            close(total, jaxjd.gramian(at_features))
        if form == "auto":
            close(gramian["late"], jaxjd.gramian(at_features["y"]))
            _, back = jax.vjp(lambda p: features_of(p, x, shift=shift), params)
            weighted = {
                "y": jaxjd.combine(WEIGHTS, at_features["y"]),
                "skip": jaxjd.combine(-WEIGHTS, at_features["skip"]),
                "ids": np.zeros(4, jax.dtypes.float0),
            }
            close(pulled[1][0], back(weighted)[0])


KERNELS = [array(64, 64)] * 3
HEADS = [array(64, 10)] * 4
INPUTS = array(32, 64)


def trunk(kernels, x):
    return jnp.tanh(net(kernels, x))


def one_head(kernel, z, x):
    return fit(z @ kernel)


def each_head(kernels, z, x):
    return [one_head(kernel, z, x) for kernel in kernels]


def on_a_layer(kernels, z, x):
    common = jnp.tanh(z @ kernels[0])
    return [fit(common @ kernel[:10]) for kernel in kernels]


@pytest.mark.parametrize(
    ("form", "heads_fn", "most"),
    [
        ("dense", {str(n): one_head for n in range(4)}, 0.9),
        ("dense", each_head, 0.9),
        ("auto", [one_head] * 4, 1.05),
        pytest.param("dense", on_a_layer, 1.0, marks=pytest.mark.slow),
        pytest.param("auto", each_head, 1.05, marks=pytest.mark.slow),
        pytest.param("auto", on_a_layer, 1.05, marks=pytest.mark.slow),
        pytest.param("factored", (one_head,) * 4, 1.05, marks=pytest.mark.slow),
    ],
)
def test_trunk_and_heads_cost_no_more_than_the_whole_jacobian(form, heads_fn, most):
    heads = dict(zip(heads_fn, HEADS, strict=True)) if isinstance(heads_fn, dict) else HEADS
    if isinstance(heads_fn, tuple):
        heads = tuple(heads)
    weights = jnp.arange(1.0, 5)

    def step(rows, losses):
        update = jaxjd.combine(weights, rows)
        return losses, jaxjd.gramian(rows), update

    def whole(heads_fn, params, x):
        def losses(kernels, heads):
            z = trunk(kernels, x)
            together = each_head if not callable(heads_fn) else heads_fn
            return together(jax.tree.leaves(heads), z, x)

        values, (rows, by_loss) = jaxjd.value_and_jacobian(losses, (0, 1), form=form)(*params)
        return step(rows, values), jaxjd.combine(jnp.ones(4), by_loss)

    def engine(heads_fn, params, x):
        values, (rows, sums) = jaxjd.mtl_value_and_jacobian(trunk, heads_fn, form=form)(*params, x)
        return step(rows, values), sums

    def features(heads_fn, params, x):
        found = jaxjd.mtl_value_and_gramian(trunk, heads_fn, form=form)(*params, x)
        return *found[:2], found[2](weights)

    (limit, _), (flops, _), (at_features, _) = (
        cost(fn, (heads_fn, (KERNELS, heads), INPUTS)) for fn in (whole, engine, features)
    )
    assert flops <= most * limit, flops / limit
    assert at_features <= flops


def loss(w, x, b, y=0.0):
    return jnp.sum((jnp.tanh(x @ w["w"]) * b - y) ** 2)


@pytest.mark.parametrize("argnums", [pytest.param(0, marks=pytest.mark.slow), (2, 0)])
def test_arguments_of_one_loss_per_example(argnums):
    w, b = {"w": jnp.asarray(gaussian(0, 4, 2))}, jnp.asarray(gaussian(1, 2))
    x, y = jnp.asarray(gaussian(2, M, 4)), jnp.asarray(gaussian(3, M, 2))
    if argnums == 0:  # What is not differentiated is the batch.
        b = jnp.stack([b] * M)
    axes = (None, 0, 0 if argnums == 0 else None, 0)
    losses = lambda *args: jax.vmap(loss, axes)(*args, y)
    expected = jax.jacrev(losses, argnums)(w, x, b)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
    cases = [("dense", None), ("factored", 1)] + [("auto", 2)] * (argnums == 0)
    for form, chunk_size in cases:
        options = {"argnums": argnums, "form": form, "chunk_size": chunk_size}
        values, rows = jaxjd.per_example_value_and_jacobian(loss, **options)(w, x, b, y=y)
        close((values, jaxjd.materialize(rows)), (losses(w, x, b), expected))
        if form == "factored":
            options["form"] = "products"
        engine = jaxjd.per_example_value_and_gramian(loss, **options)
        _, gramian, pullback = engine(w, x, b, y=y)
        close(gramian, jaxjd.gramian(expected))
        close(pullback(WEIGHTS), jaxjd.combine(WEIGHTS, expected))
    with pytest.raises(ValueError, match=r"Batch leaf '2/y'.*found shape"):
        jaxjd.per_example_value_and_jacobian(loss)(w, x, x[:, :2], y=y[:2])
    with pytest.raises(ValueError, match="`argnums` has 3"):
        jaxjd.per_example_value_and_gramian(loss, argnums=3)(w, x, b, y=y)


def test_one_example_is_not_batched():
    """`lax.ragged_dot` with a row as the axis that is batched has no rule for it."""
    sizes = jnp.array([1, 1], jnp.int32)
    one = lambda w, x: jnp.sum(jnp.tanh(lax.ragged_dot(x, w, sizes)))
    w, x = jnp.asarray(gaussian(0, 2, 3, 2)), jnp.asarray(gaussian(1, 1, 2, 3))
    expected = jax.grad(one)(w, x[0])
    for options in ({"chunk_size": 1}, {"form": "products"}):
        run = lambda w, x, o=options: jaxjd.per_example_value_and_gramian(one, **o)(w, x)[1]
        batched = [
            equation.primitive.name
            for equation in jax.make_jaxpr(run)(w, x).eqns
            if equation.primitive.name.startswith("ragged")
        ]
        assert not batched
        np.testing.assert_allclose(run(w, x)[0, 0], jnp.sum(expected**2), rtol=1e-5)


def test_arguments_of_one_loss_per_example_for_modules():
    left, right = (nnx.Linear(4, 2, rngs=nnx.Rngs(seed)) for seed in range(2))
    x, y = jnp.asarray(gaussian(2, M, 4)), jnp.asarray(gaussian(3, M, 2))

    def of_modules(left, x, right, *, y):
        return jnp.sum((left(x) * right(x) - y) ** 2)

    def expected(number):
        positional = lambda left, x, right, y: of_modules(left, x, right, y=y)
        grad = lambda x, y: nnx.grad(positional, argnums=number)(left, x, right, y)
        rows = [grad(*pair) for pair in zip(x, y, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    engine = nnx_engines.per_example_value_and_jacobian(of_modules, argnums=(2, 0))
    _, (of_right, of_left) = engine(left, x, right, y=y)
    close(nnx.to_pure_dict(of_right), nnx.to_pure_dict(expected(2)))
    close(nnx.to_pure_dict(of_left), nnx.to_pure_dict(expected(0)))
    engine = nnx_engines.per_example_value_and_gramian(of_modules, argnums=(0, 2))
    _, gramian, pullback = engine(left, x, right, y=y)
    rows = [jax.tree.leaves(part) for part in (of_left, of_right)]
    close(gramian, jaxjd.gramian(rows))
    close([jax.tree.leaves(part) for part in pullback(WEIGHTS)], jaxjd.combine(WEIGHTS, rows))
    with pytest.raises(ValueError, match="names an argument twice"):
        nnx_engines.per_example_value_and_jacobian(of_modules, argnums=(0, 0))(left, x, right, y=y)


@pytest.mark.parametrize(
    "seed",
    [
        seed if seed in (15, 36) else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(60)
    ],
)
def test_random_trunks_and_heads(seed):
    """Any of the parameters may be the trunk's, in functions of all kinds."""
    with jax.enable_x64(True):
        params, data, _ = random_losses.arguments(seed, "float64")
        fn = random_losses.losses_of(seed)
        leaves, treedef = jax.tree.flatten(params)
        is_head = np.random.default_rng(seed).integers(0, 2, len(leaves)).astype(bool)
        is_head[:2] = [seed % 2, 1 - seed % 2]
        pick = lambda which: [
            leaf for leaf, own in zip(leaves, is_head, strict=True) if own == which
        ]
        form = ("dense", "auto", "factored")[seed % 3]
        options = {"form": form, "chunk_size": (None, 1, 2)[seed // 3 % 3]}

        def heads_fn(heads, trunk, data):
            rest = {True: iter(heads), False: iter(trunk)}
            full = [next(rest[bool(own)]) for own in is_head]
            return fn(jax.tree.unflatten(treedef, full), data)[0]

        def run(trunk, heads, data):
            trunk_fn = lambda trunk, data: jax.tree.map(lambda leaf: 2.0 * leaf, trunk)
            engine = jaxjd.mtl_value_and_jacobian(trunk_fn, heads_fn, **options)
            values, (rows, sums) = engine(trunk, heads, data)
            weights = jnp.arange(1.0, 1 + jaxjd.gramian(rows).shape[0])
            engine = jaxjd.mtl_value_and_gramian(trunk_fn, heads_fn, **options)
            _, gramian, pullback = engine(trunk, heads, data)
            found = jaxjd.materialize(rows), sums, gramian, pullback(weights)
            losses = lambda trunk, heads: heads_fn(heads, trunk_fn(trunk, data), data)
            by_losses = jax.jacrev(losses, (0, 1))(trunk, heads)
            wanted, by_heads = jaxjd.stack_tasks(by_losses, values)
            gradients = jax.tree.map(lambda leaf: leaf.sum(0), by_heads)
            update = jaxjd.combine(weights, wanted), gradients
            # The features are twice the trunk's parameters.
            return found, (wanted, gradients, jaxjd.gramian(wanted) / 4, update)

        found, wanted = jax.jit(run)(pick(False), pick(True), data)
        chex.assert_trees_all_close(found, wanted, rtol=1e-8, atol=1e-8)

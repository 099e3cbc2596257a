"""What an engine takes is what `jax.value_and_grad` takes, in every form and chunk size."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxjd

FORMS = ("dense", "auto", "factored")
CHUNK_SIZES = (None, 1, 2)
X = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0], [2.0, -2.0, 1.0]])
PARAMS = {"w": jnp.array([[1.0, -1.0], [0.5, 2.0], [-1.5, 1.0]]), "b": jnp.ones(())}
WEIGHTS = jnp.array([1.0, -2.0, 0.5])


def loss(params, x):
    """The loss of one example, or of one task."""
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def losses_of(params, x):
    """One loss per row of `x`."""
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2, axis=1)


def close(found, expected, name=""):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5, err_msg=str(name))
    jax.tree.map(compare, found, expected)


def results(fn, one, params, x, has_aux=False, chunk_sizes=CHUNK_SIZES):
    """What every engine gives, by name: losses, the Gramian and a combination of the rows."""
    found = {}
    options = {"has_aux": has_aux}

    def add(name, values, gramian, gradient):
        assert name not in found
        found[name] = values, gramian, gradient

    for chunk_size in chunk_sizes:
        for form in (*FORMS, "products"):
            engine = jaxjd.value_and_gramian(fn, chunk_size=chunk_size, form=form, **options)
            values, gramian, pullback = engine(params, x)
            add(f"gramian-{form}-{chunk_size}", values, gramian, pullback(WEIGHTS))
            if form == "products":
                continue
            engine = jaxjd.value_and_jacobian(fn, chunk_size=chunk_size, form=form, **options)
            values, rows = engine(params, x)
            gradient = jaxjd.combine(WEIGHTS, rows)
            add(f"jacobian-{form}-{chunk_size}", values, jaxjd.gramian(rows), gradient)
            engine = jaxjd.per_example_value_and_jacobian(
                one, chunk_size=chunk_size, form=form, **options
            )
            values, rows = engine(params, x)
            gradient = jaxjd.combine(WEIGHTS, rows)
            add(f"examples-{form}-{chunk_size}", values, jaxjd.gramian(rows), gradient)
            engine = jaxjd.per_example_value_and_gramian(
                one, chunk_size=chunk_size, form=form, **options
            )
            values, gramian, pullback = engine(params, x)
            add(f"examples_gramian-{form}-{chunk_size}", values, gramian, pullback(WEIGHTS))
    return found


def check(found, expected):
    """Compares with the dense Jacobian of `jax.jacrev`."""
    for name, (_, gramian, gradient) in found.items():
        close(gramian, jaxjd.gramian(expected), name)
        close(gradient, jaxjd.combine(WEIGHTS, expected), name)


@jax.custom_vjp
def unbatchable(y):
    return jnp.sum(y**2)


def _forward(y):
    return unbatchable(y), y


def _backward(y, cotangent):
    # A call of the host has no rule for batching by default, and none for differentiation.
    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return (jax.pure_callback(lambda y, c: 2 * np.asarray(y) * np.asarray(c), shape, y, cotangent),)


unbatchable.defvjp(_forward, _backward)


def test_one_loss_at_a_time_is_not_batched():
    def one(params, x):
        return unbatchable(jnp.tanh(x @ params["w"] + params["b"]))

    def fn(params, x):
        return [one(params, row) for row in x]

    def once(params, x):  # One use of the matrix, which is tapped.
        y = jnp.tanh(x @ params["w"] + params["b"])
        return {str(task): unbatchable(row) for task, row in enumerate(y)}

    expected = jax.jacrev(losses_of)(PARAMS, X)
    for losses in (fn, once):
        check(jax.jit(lambda p, f=losses: results(f, one, p, X, False, (1,)))(PARAMS), expected)

    shared_of = lambda found: [found, 2.0 * found, 3.0 * found]
    shared = lambda params, x: shared_of(one(params, x[0]))

    for form in FORMS:
        if form in ("auto", "factored"):  # What each loss owns is never batched.
            jaxjd.value_and_jacobian(fn, form=form)(PARAMS, X)
        for engine in (
            jaxjd.value_and_jacobian(shared, form=form),
            jaxjd.value_and_jacobian(shared, form=form, chunk_size=2),
            jaxjd.per_example_value_and_jacobian(one, form=form),
            jaxjd.per_example_value_and_gramian(one, form=form, chunk_size=2),
        ):
            with pytest.raises(ValueError, match="chunk_size=1") as error:
                engine(PARAMS, X)
            assert isinstance(error.value.__cause__, NotImplementedError)
    trunk = lambda params, x: jnp.tanh(x @ params["w"] + params["b"])
    heads = lambda _, features, x: [unbatchable(row) for row in features]
    again = lambda _, features, x: shared_of(unbatchable(features[0]))
    for engine in (jaxjd.mtl_value_and_jacobian, jaxjd.mtl_value_and_gramian):
        with pytest.raises(ValueError, match="chunk_size=1"):
            engine(trunk, again)(PARAMS, [], X)
    close(jaxjd.mtl_value_and_jacobian(trunk, heads)(PARAMS, [], X)[1][0], expected)
    _, (rows, _) = jaxjd.mtl_value_and_jacobian(trunk, heads, chunk_size=1)(PARAMS, [], X)
    close(rows, expected)
    _, gramian, pullback = jaxjd.mtl_value_and_gramian(trunk, heads, chunk_size=1)(PARAMS, [], X)
    close(pullback(WEIGHTS)[0], jaxjd.combine(WEIGHTS, expected))
    assert gramian.shape == (3, 3)


def test_a_mixture_of_experts():
    """`lax.ragged_dot` has a rule for the leading axis only."""
    experts = jax.random.normal(jax.random.key(0), (2, 3, 4))
    sizes = jnp.array([1, 2], jnp.int32)

    def fn(params, x):
        y = lax.ragged_dot(x, params, sizes)
        return jnp.stack([jnp.sum(jnp.tanh(y) ** power) for power in (1, 2, 3)])

    expected = jax.jacrev(lambda p: jnp.stack([fn(p, X)[i] for i in range(3)]))
    with pytest.raises(NotImplementedError):
        expected(experts)
    rows = jnp.stack([jax.grad(lambda p, i=i: fn(p, X)[i])(experts) for i in range(3)])
    for form in FORMS:
        close(jaxjd.value_and_jacobian(fn, form=form, chunk_size=1)(experts, X)[1], rows)
    _, gramian, pullback = jaxjd.value_and_gramian(fn, form="products")(experts, X)
    close(gramian, jaxjd.gramian(rows))
    close(pullback(WEIGHTS), jaxjd.combine(WEIGHTS, rows))


def test_errors_of_the_function_stay_its_own():
    @jax.custom_vjp
    def broken(y):
        return jnp.sum(y)

    def backward(_, cotangent):
        raise KeyError("mine")

    broken.defvjp(lambda y: (broken(y), None), backward)
    with pytest.raises(KeyError, match="mine"):
        jaxjd.value_and_jacobian(lambda w: [broken(w), broken(w)])(jnp.ones(3))


def test_no_basis_of_all_tasks():
    """With one task at a time nothing of size ``(m, m)`` is there but the Gramian."""
    m = 5000
    fn = lambda w, x: w * x
    engine = jaxjd.value_and_jacobian(fn, chunk_size=1)
    run = jax.jit(lambda w, x: engine(w, x)[1])
    memory = run.lower(jnp.float32(2.0), jnp.ones(m)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * m * 20


@pytest.mark.slow
def test_leaves_without_entries():
    params = {**PARAMS, "empty": jnp.zeros((0,)), "rows": jnp.zeros((0, 2))}

    def one(params, x):
        return loss(params, x) + jnp.sum(params["empty"]) + jnp.sum(x[:0] @ params["rows"])

    def fn(params, x):
        rest = jnp.sum(x[:, :0] @ params["rows"], axis=1)
        return losses_of(params, x) + jnp.sum(params["empty"]) + rest

    found = jax.jit(lambda params: results(fn, one, params, X))(params)
    check(found, jax.jacrev(fn)(params, X))
    for name, (_, _, gradient) in found.items():
        assert gradient["empty"].shape == (0,), name
        assert gradient["rows"].shape == (0, 2), name
    tables = lambda table, ids: [jnp.sum(table[ids]), jnp.sum(jnp.tanh(table[ids]))]
    for form in FORMS:
        for width, ids in ((0, jnp.array([1, 2])), (3, jnp.zeros((0,), int))):
            engine = jaxjd.value_and_jacobian(tables, form=form, chunk_size=1)
            rows = jaxjd.materialize(engine(jnp.ones((4, width)), ids)[1])
            assert rows.shape == (2, 4, width)
            assert not rows.any()


@pytest.mark.slow
def test_losses_that_are_numbers():
    for off in (0.0, 0, jnp.zeros(())):

        def fn(params, x, off=off):
            return {"a": loss(params, x[0]), "b": off, "c": loss(params, x[2])}

        def rows_of(params, fn=fn):
            rows = [jax.grad(lambda p, k=k: fn(p, X)[k])(params) for k in "ac"]
            return jax.tree.map(lambda a, c: jnp.stack([a, 0 * a, c]), *rows)

        jax.value_and_grad(lambda params: sum(fn(params, X).values()))(PARAMS)
        expected = rows_of(PARAMS)
        for form in (*FORMS, "products"):
            engine = jaxjd.value_and_gramian(fn, form=form)
            values, gramian, pullback = engine(PARAMS, X)
            assert values["b"].dtype == jnp.float32
            assert values["b"] == 0
            close(gramian, jaxjd.gramian(expected), form)
            close(pullback(WEIGHTS), jaxjd.combine(WEIGHTS, expected), form)
            if form != "products":
                _, rows = jaxjd.value_and_jacobian(fn, form=form, chunk_size=1)(PARAMS, X)
                close(jaxjd.materialize(rows), expected)
    off = lambda params, x: 0.0
    for form in FORMS:
        for chunk_size in CHUNK_SIZES:
            options = {"form": form, "chunk_size": chunk_size}
            values, rows = jaxjd.per_example_value_and_jacobian(off, **options)(PARAMS, X)
            assert values.shape == (3,)
            assert not jaxjd.gramian(rows).any()
            engine = jaxjd.per_example_value_and_gramian(off, **options)
            _, gramian, pullback = engine(PARAMS, X)
            assert not gramian.any()
            assert not pullback(WEIGHTS)["b"].any()
    trunk = lambda params, x: x @ params["w"]
    heads = {"on": lambda b, y, x: jnp.sum(y[0] * b), "off": lambda b, y, x: 0.0}
    both = lambda b, y, x: {key: head(b[key], y, x) for key, head in heads.items()}
    each = {"on": jnp.ones(2), "off": jnp.ones(2)}
    for heads_fn in (heads, both):
        values, (rows, gradients) = jaxjd.mtl_value_and_jacobian(trunk, heads_fn)(PARAMS, each, X)
        assert values["off"] == 0
        assert not rows["w"][0].any()
        assert not gradients["off"].any()
        close(rows["w"][1], jnp.outer(X[0], jnp.ones(2)))
        gramian = jaxjd.mtl_value_and_gramian(trunk, heads_fn)(PARAMS, each, X)[1]
        close(gramian, jnp.array([[0.0, 0.0], [0.0, 2.0]]))


@dataclasses.dataclass
class Report:
    """Auxiliary output that JAX knows nothing of."""

    name: str
    steps: int


@pytest.mark.slow
def test_auxiliary_output_of_any_kind():
    report = Report("run", 3)

    def aux(x):
        return {"text": "a", "none": None, "object": report, "twice": 2 * x, "dtype": jnp.float32}

    fn = lambda params, x: (losses_of(params, x), aux(x))
    one = lambda params, x: (loss(params, x), aux(x))
    total = lambda params, x: (jnp.sum(losses_of(params, x)), aux(x))
    wanted = jax.value_and_grad(total, has_aux=True)(PARAMS, X)[0][1]
    found = results(fn, one, PARAMS, X, has_aux=True)
    check(found, jax.jacrev(losses_of)(PARAMS, X))
    for name, ((losses, got), _, _) in found.items():
        close(losses, losses_of(PARAMS, X), name)
        assert got.keys() == wanted.keys(), name
        assert got["object"] is report, name
        assert (got["text"], got["none"], got["dtype"]) == ("a", None, jnp.float32), name
        np.testing.assert_array_equal(got["twice"], 2 * X, err_msg=name)

    trunk = lambda params, x: (x @ params["w"], aux(x))
    heads = [lambda b, y, x: (jnp.sum(y @ b), aux(x))] * 3
    whole = lambda b, y, x: ([jnp.sum(y @ b[task]) for task in range(3)], aux(x))
    for heads_fn in (heads, whole):
        for engine in (jaxjd.mtl_value_and_jacobian, jaxjd.mtl_value_and_gramian):
            (_, (first, second)), *_ = engine(trunk, heads_fn, has_aux=True)(
                PARAMS, [jnp.ones(2)] * 3, X
            )
            assert first["object"] is report
            assert (second[1] if heads_fn is heads else second)["text"] == "a"


def test_control_flow_on_values():
    def fn(params, x):
        y = losses_of(params, x)
        return y if y.sum() > 0 else -y

    expected = jax.jacrev(losses_of)(PARAMS, X)
    close(jaxjd.value_and_jacobian(fn, form="dense")(PARAMS, X)[1], expected)
    for form in ("dense", "products"):
        close(jaxjd.value_and_gramian(fn, form=form)(PARAMS, X)[1], jaxjd.gramian(expected))
    for engine in (jaxjd.value_and_jacobian, jaxjd.value_and_gramian):
        for form in ("auto", "factored"):
            with pytest.raises(ValueError, match="form='dense'") as error:
                engine(fn, form=form)(PARAMS, X)
            assert isinstance(error.value.__cause__, jax.errors.TracerBoolConversionError)
    one = lambda params, x: loss(params, x) if float(x.sum()) > 0 else 0.0
    for engine in (jaxjd.per_example_value_and_jacobian, jaxjd.per_example_value_and_gramian):
        with pytest.raises(ValueError, match="all examples") as error:
            engine(one)(PARAMS, X)
        assert isinstance(error.value.__cause__, jax.errors.ConcretizationTypeError)


@pytest.mark.slow
def test_features_that_are_not_differentiable():
    mask = jnp.array([True, False, True])

    def trunk(params, x):
        features = jnp.tanh(x @ params["w"] + params["b"])
        return {"y": features, "mask": mask, "ids": jnp.arange(3), "key": jax.random.key(0),
                "name": "trunk", "scale": 2.0, "cut": (features > 0)}  # fmt: skip

    def head(b, features, x, task):
        assert features["name"] == "trunk"
        noise = jax.random.normal(features["key"], (3,))
        rows = jnp.where(features["mask"], features["y"] @ b, 0) * features["cut"][:, 0] + noise
        return features["scale"] * jnp.sum(jnp.tanh(rows)[features["ids"][task]])

    heads = [functools.partial(head, task=task) for task in range(3)]
    params = [jnp.array([1.0, task]) for task in range(3)]
    whole = lambda b, features, x: [f(p, features, x) for f, p in zip(heads, b, strict=True)]
    together = lambda p, b: jnp.stack(whole(b, trunk(p, X), X))
    expected, by_head = jax.jacrev(together, argnums=(0, 1))(PARAMS, params)
    for heads_fn in (heads, whole):
        for chunk_size in CHUNK_SIZES:
            options = {"chunk_size": chunk_size}
            engine = jaxjd.mtl_value_and_jacobian(trunk, heads_fn, **options)
            _, (rows, gradients) = engine(PARAMS, params, X)
            close(rows, expected)
            close(gradients, jax.tree.map(lambda g: g.sum(0), by_head))
            engine = jaxjd.mtl_value_and_gramian(trunk, heads_fn, **options)
            _, gramian, pullback = engine(PARAMS, params, X)
            assert gramian.shape == (3, 3)
            close(pullback(WEIGHTS)[0], jaxjd.combine(WEIGHTS, expected))
    with pytest.raises(ValueError, match="floating point"):
        jaxjd.mtl_value_and_jacobian(lambda p, x: mask, heads)(PARAMS, params, X)


def test_the_pullback_of_chunks_is_summed_in_float32():
    """1,024 gradients of one in bfloat16, whose sum stays at 256 when it is rounded every time."""
    loss = lambda w, x: jnp.sum(w * x)
    x = jnp.ones((1024, 1), jnp.bfloat16)
    for form in FORMS:
        for chunk_size in (1, 8):
            engine = jaxjd.per_example_value_and_gramian(loss, form=form, chunk_size=chunk_size)
            gradient = jax.jit(lambda w, e=engine: e(w, x)[2](jnp.ones(1024)))(jnp.bfloat16(1.0))
            assert gradient == 1024
            assert gradient.dtype == jnp.bfloat16

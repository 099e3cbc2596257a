"""The engines for whole models of flax nnx change a model as `nnx.value_and_grad` does."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxjd
from jaxjd.integrations import nnx as engines
from tests.matrices import gaussian

X = jnp.asarray(gaussian(0, 4, 16))
TARGETS = jnp.asarray(gaussian(1, 4, 2))


class Net(nnx.Module):
    """With statistics, a random stream, intermediates and plain Python state."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.trunk = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=1))
        self.head = nnx.Linear(16, 2, rngs=rngs)

    def features(self, x):
        return self.dropout(jnp.tanh(self.norm(self.trunk(x))))

    def __call__(self, x):
        return self.head(self.features(x))


def losses_of(model, x, targets):
    return jnp.mean((model(x) - targets) ** 2, axis=0)


def mean_of(model, x, targets):
    return jnp.mean(losses_of(model, x, targets))


def optimizer_of(model, *links):
    return nnx.Optimizer(model, optax.chain(*links, optax.sgd(0.1, momentum=0.9)), wrt=nnx.Param)


def plain_step(model, optimizer, x, targets):
    value, gradient = nnx.value_and_grad(mean_of)(model, x, targets)
    optimizer.update(model, gradient)
    return value


def jacobian_step(form, model, optimizer, x, targets):
    engine = engines.value_and_jacobian(losses_of, form=form or "auto")
    losses, jacobian = engine(model, x, targets)
    assert type(jacobian) is nnx.State
    kernel = jacobian["trunk"]["kernel"]
    assert type(kernel) is nnx.Param
    assert form is None or isinstance(kernel.get_raw_value(), jax.Array) == (form == "dense")
    optimizer.update(model, jacobian)
    return jnp.mean(losses)


def gramian_step(model, optimizer, x, targets):
    losses, gramian, pullback = engines.value_and_gramian(losses_of)(model, x, targets)
    weights, _ = jaxjd.weightings.mean().update(gramian, ())
    optimizer.update(model, pullback(weights))
    return jnp.mean(losses)


def of_trunk(net, x):
    return net["dropout"](jnp.tanh(net["norm"](net["trunk"](x))))


def mtl_step(engine, model, optimizer, x, targets):
    """The head is one function of all losses, so its gradients are those of the sum."""
    net = {"trunk": model.trunk, "norm": model.norm, "dropout": model.dropout}
    head_fn = lambda head, z, x: jnp.mean((head(z) - targets) ** 2, axis=0)
    run = engine(of_trunk, head_fn)
    if engine is engines.mtl_value_and_jacobian:
        losses, (trunk, head) = run(net, model.head, x)
        trunk = {name: jax.tree.map(lambda j: jnp.mean(j, 0), part) for name, part in trunk.items()}
    else:
        losses, gramian, pullback = run(net, model.head, x)
        trunk, head = pullback(jaxjd.weightings.mean().update(gramian, ())[0])
    head = jax.tree.map(lambda g: g / 2, head)
    optimizer.update(model, nnx.State({**trunk, "head": head}))
    return jnp.mean(losses)


STEPS = {
    "dense": (functools.partial(jacobian_step, "dense"), jaxjd.mean()),
    "auto": (functools.partial(jacobian_step, "auto"), jaxjd.mean()),
    "gramian": (gramian_step, optax.identity()),
    "mtl": (functools.partial(mtl_step, engines.mtl_value_and_jacobian), optax.identity()),
    "mtl gramian": (functools.partial(mtl_step, engines.mtl_value_and_gramian), optax.identity()),
}


def train(step, link, steps, jit=True):
    """The models and the losses after every step, and the loss in evaluation after the last."""
    model = Net()
    optimizer = optimizer_of(model, link)
    run = nnx.jit(step) if jit else step
    history = []
    for _ in range(steps):
        value = run(model, optimizer, X, TARGETS)
        history.append(jax.tree.map(np.asarray, (value, numbers(model))))
    model.eval()
    return history, mean_of(model, X, TARGETS)


def numbers(model):
    """All state, keys as numbers."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(raw, nnx.to_pure_dict(nnx.state(model)))


@pytest.fixture(scope="module")
def plain():
    return train(plain_step, optax.identity(), 12)


@pytest.mark.parametrize("name", STEPS)
def test_training_is_that_of_nnx_step_by_step(name, plain):
    history, evaluated = train(*STEPS[name], 12)
    # Rounding of float32, which twelve steps of momentum carry on.
    for found, wanted in zip(history, plain[0], strict=True):
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evaluated, plain[1], rtol=1e-4)
    last = history[-1][1]
    assert last["dropout"]["rngs"]["count"] == 12
    assert np.all(last["norm"]["mean"] != 0)
    assert history[-1][0] < history[0][0]


@pytest.mark.slow
def test_training_without_jit(plain):
    history, _ = train(*STEPS["auto"], 2, jit=False)
    for found, wanted in zip(history, plain[0][:2], strict=True):
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)


class Wrapped(Net):
    """With transformations of nnx inside: a checkpoint, and a scan over stacked layers."""

    def __init__(self):
        super().__init__()

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            layer = nnx.Linear(16, 16, rngs=rngs)
            return nnx.List([layer, nnx.BatchNorm(16, rngs=rngs)])

        self.layers = make(nnx.Rngs(2))

    def features(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(layer[1](layer[0](x)))

        return run(self.layers, nnx.remat(Net.features)(self, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "partial"), [(Net, nnx.cached_partial), (Wrapped, functools.partial)]
)
def test_transformations_of_nnx_inside_and_outside(make, partial):
    models = make(), make()
    steps = plain_step, functools.partial(jacobian_step, None)
    for model, step, links in zip(models, steps, [[], [jaxjd.mean()]], strict=True):
        run = partial(nnx.jit(step), model, optimizer_of(model, *links))
        for _ in range(2):
            run(X, TARGETS)
    chex.assert_trees_all_close(*map(numbers, models), rtol=1e-4, atol=1e-5)


class Linear(nnx.Module):
    """A linear map whose structure changes when it is called."""

    def __init__(self, seed=0):
        self.map = nnx.Linear(2, 2, rngs=nnx.Rngs(seed))
        self.calls = nnx.Variable(jnp.zeros(()))
        self.seen = 0

    def __call__(self, x):
        self.calls[...] += 1
        self.seen += 1
        y = self.map(x)
        self.last = nnx.Intermediate(y)
        return y


POINT = jnp.array([1.0, -2.0])


def shapes(tree):
    return [
        (jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def compare(fn, *make, **options):
    """Our engine and that of nnx on models made alike; returns ours after the call."""
    args, others = [[one() for one in make] for _ in range(2)]
    total = lambda *args, **kwargs: jnp.sum(fn(*args, **kwargs))
    argnums = options.get("argnums", 0)
    value, gradient = nnx.value_and_grad(total, argnums=argnums)(*others)
    losses, jacobian = engines.value_and_jacobian(fn, **options)(*args)
    np.testing.assert_allclose(jnp.sum(losses), value, rtol=1e-6)
    summed = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jacobian)
    assert jax.tree.structure(summed) == jax.tree.structure(gradient)
    chex.assert_trees_all_close(summed, gradient, rtol=1e-5, atol=1e-6)
    for one, other in zip(args, others, strict=True):
        if isinstance(one, nnx.Module):
            assert nnx.graphdef(one) == nnx.graphdef(other)
            chex.assert_trees_all_close(numbers(one), numbers(other), rtol=1e-6)
    return args


def test_new_variables_and_python_state_come_back():
    (model,) = compare(lambda model: model(POINT), Linear)
    assert model.seen == 1
    assert model.last[...].shape == (2,)


def test_several_arguments_and_pytrees_of_models():
    second = functools.partial(Linear, 1)
    fn = lambda a, x, b: a(x) * b["one"][0](x)
    make = (Linear, lambda: POINT, lambda: {"one": [second()]})
    compare(fn, *make, argnums=(2, 0))
    compare(fn, *make, argnums=1)
    bias = nnx.DiffState(0, nnx.PathContains("bias"))
    compare(fn, *make, argnums=(bias, 2))


def test_shared_variables_have_one_leaf():
    shared = Linear()
    copies = iter([shared, shared, *[other := Linear(), other]])
    ours, theirs = [[next(copies) for _ in range(2)] for _ in range(2)]
    fn = lambda a, b: a(POINT) + b(2 * POINT)
    _, gradient = nnx.value_and_grad(lambda *args: fn(*args).sum(), argnums=(0, 1))(*theirs)
    _, jacobian = engines.value_and_jacobian(fn, argnums=(0, 1))(*ours)
    assert jacobian[1] == nnx.State({})
    summed = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jacobian)
    chex.assert_trees_all_close(summed, gradient, rtol=1e-5)
    assert shared.seen == other.seen == 2
    with pytest.raises(ValueError, match=r"'map/bias' of argument 0 is differentiated.*constant"):
        engines.value_and_jacobian(fn)(*ours)


def test_filters_choose_what_is_differentiated():
    model = nnx.LoRALinear(3, 2, lora_rank=1, rngs=nnx.Rngs(0))
    fn = lambda model: model(jnp.ones(3))
    _, jacobian = engines.value_and_jacobian(fn, wrt=nnx.LoRAParam)(model)
    assert [name for name, _ in shapes(jacobian)] == [
        "['lora']['lora_a'].value",
        "['lora']['lora_b'].value",
    ]
    optimizer = nnx.Optimizer(model, optax.chain(jaxjd.mean(), optax.sgd(0.1)), wrt=nnx.LoRAParam)
    before = jnp.array(model.kernel[...])
    optimizer.update(model, jacobian)
    np.testing.assert_array_equal(model.kernel[...], before)
    # Any other type of variable, too, which the engine of the core refuses.
    counted = Linear()
    _, jacobian = engines.value_and_jacobian(
        lambda model: model.calls[...] * POINT, wrt=lambda path, _: "calls" in path
    )(counted)
    np.testing.assert_array_equal(jacobian["calls"][...], POINT)


@pytest.mark.slow
def test_states_and_variables_as_arguments():
    graphdef, state = nnx.split(Net())
    fn = lambda state: losses_of(nnx.merge(graphdef, state), X, TARGETS)
    losses, jacobian = engines.value_and_jacobian(fn)(state)
    wanted = engines.value_and_jacobian(losses_of)(model := Net(), X, TARGETS)
    chex.assert_trees_all_equal(numbers(nnx.merge(graphdef, state)), numbers(model))
    assert shapes(jacobian) == shapes(wanted[1])
    leaves = [jax.tree.leaves(found) for found in ((losses, jacobian), wanted)]
    chex.assert_trees_all_close(*leaves, rtol=1e-5, atol=1e-6)
    optimizer_of(model, jaxjd.mean()).update(model, jacobian)
    compare(lambda v: v * POINT, lambda: nnx.Param(POINT))


def test_factored_leaves_survive_the_states_of_nnx():
    def run(model):
        _, jacobian = engines.value_and_jacobian(losses_of, form="auto")(model, X, TARGETS)
        leaf = jacobian["trunk"]["kernel"].get_raw_value()
        parts = nnx.split_state(jacobian, nnx.PathContains("kernel"), ...)
        merged = nnx.merge_state(*parts)
        assert merged["trunk"]["kernel"].get_raw_value() is leaf
        assert nnx.to_pure_dict(nnx.state(merged, nnx.Param))["trunk"]["kernel"] is leaf
        with pytest.raises(TypeError, match="materialize"):
            jacobian["trunk"]["kernel"] + 1.0
        dense = jaxjd.materialize(jacobian)
        assert type(dense["trunk"]["kernel"]) is nnx.Param
        return dense["trunk"]["kernel"][...]

    assert nnx.eval_shape(run, Net()).shape == (2, 16, 16)


def test_auxiliary_output_may_hold_models():
    def fn(model, x, *, scale):
        y = model(x) * scale
        return {"a": y[0], "b": y[1]}, {"model": model, "y": y}

    model = Linear()
    engine = engines.value_and_jacobian(fn, has_aux=True, chunk_size=1)
    (losses, aux), jacobian = engine(model, POINT, scale=2.0)
    assert aux["model"] is model
    np.testing.assert_array_equal(aux["y"], jnp.stack([losses["a"], losses["b"]]))
    np.testing.assert_array_equal(jacobian["map"]["bias"][...], 2 * jnp.eye(2))


def test_a_random_stream_as_an_argument_moves_on():
    rngs, dropout = nnx.Rngs(dropout=3), nnx.Dropout(0.5)
    fn = lambda model, rngs: dropout(model(POINT), rngs=rngs)
    engines.value_and_jacobian(fn)(Linear(), rngs)
    assert rngs.dropout.count[...] == 1


def test_labels_and_groups_of_the_gramian():
    model = Linear()
    fn = lambda model: model(POINT)
    engine = engines.value_and_gramian(fn, labels=jaxjd.labels.by_tensor)
    _, gramians, pullback = engine(model)
    assert sorted(gramians) == ["map/bias", "map/kernel"]
    np.testing.assert_allclose(gramians["map/kernel"], 5 * np.eye(2), rtol=1e-6)
    gradient = pullback(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(gradient["map"]["bias"][...], [1.0, 2.0], rtol=1e-6)


HEAD = lambda head, z: jnp.sum(head(z) ** 2)


def test_every_head_has_its_own_gradient_and_state():
    trunk, heads = Linear(), {"a": Linear(1), "b": Linear(2)}
    fns = {"a": HEAD, "b": lambda head, z: 3 * HEAD(head, z)}
    engine = engines.mtl_value_and_jacobian(lambda trunk: trunk(POINT), fns)
    losses, (jacobian, gradients) = engine(trunk, heads)
    whole = lambda trunk, heads: jnp.stack([fns[name](heads[name], trunk(POINT)) for name in "ab"])
    wanted, (trunk_part, heads_part) = engines.value_and_jacobian(whole, argnums=(0, 1))(
        Linear(), {"a": Linear(1), "b": Linear(2)}
    )
    np.testing.assert_allclose([losses["a"], losses["b"]], wanted, rtol=1e-6)
    chex.assert_trees_all_close(jacobian, trunk_part, rtol=1e-5)
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), heads_part)
    chex.assert_trees_all_close(gradients, total, rtol=1e-5)
    assert [part.calls[...] for part in (trunk, *heads.values())] == [1, 1, 1]
    assert heads["b"].last[...].shape == (2,)


def test_heads_with_auxiliary_output():
    pair = lambda head, z: (HEAD(head, z), z)
    engine = engines.mtl_value_and_gramian(
        lambda trunk: (trunk(POINT), {"depth": 1}), [pair, pair], has_aux=True
    )
    (_, (trunk_aux, heads_aux)), gramian, _ = engine(Linear(), [Linear(1), Linear(2)])
    assert gramian.shape == (2, 2)
    assert trunk_aux == {"depth": 1}
    np.testing.assert_array_equal(*heads_aux)


@pytest.mark.parametrize("form", ["dense", "auto"])
@pytest.mark.slow
def test_per_example_losses(form):
    model = Net()
    model.eval()
    loss = lambda model, x, y: jnp.sum((model(x) - y) ** 2)
    engine = engines.per_example_value_and_jacobian(loss, form=form)
    losses, jacobian = engine(model, X, TARGETS)
    _, gramian, pullback = engines.per_example_value_and_gramian(loss)(model, X, TARGETS)
    batch = lambda model: jax.vmap(functools.partial(loss, model))(X, TARGETS)
    wanted, rows = engines.value_and_jacobian(batch)(model)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    chex.assert_trees_all_close(jaxjd.materialize(jacobian), rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gramian, jaxjd.gramian(rows), rtol=1e-4, atol=1e-4)
    combined = jax.tree.map(lambda row: jnp.sum(row, axis=0), rows)
    chex.assert_trees_all_close(pullback(jnp.ones(4)), combined, rtol=1e-4, atol=1e-5)


def test_per_example_dropout_takes_a_key_per_example():
    dropout = nnx.Dropout(0.5)
    loss = lambda model, x, key: (jnp.sum(dropout(model.map(x), rngs=nnx.Rngs(key))), model.map(x))
    engine = engines.per_example_value_and_jacobian(loss, has_aux=True)
    keys = jax.random.split(jax.random.key(0), 16)
    (_, aux), jacobian = engine(Linear(), jnp.ones((16, 2)), keys)
    assert aux.shape == (16, 2)
    assert len(np.unique(jacobian["map"]["bias"][...], axis=0)) > 1


# What the engines of the core refuse; test_errors.py has what those of this module refuse


@pytest.mark.parametrize(
    ("engine", "args"),
    [
        (lambda: jaxjd.value_and_jacobian(losses_of), (X, TARGETS)),
        (lambda: jaxjd.value_and_jacobian(losses_of, form="auto"), (X, TARGETS)),
        (lambda: jaxjd.value_and_gramian(losses_of), (X, TARGETS)),
        (lambda: jaxjd.mtl_value_and_jacobian(losses_of, []), ({}, X, TARGETS)),
        (lambda: jaxjd.per_example_value_and_gramian(losses_of), (X, TARGETS)),
    ],
)
@pytest.mark.parametrize("part", ["norm", "dropout"])
@pytest.mark.parametrize("kind", [lambda model: model, nnx.state])
def test_the_core_refuses_mutable_state(engine, args, part, kind):
    model = Net()
    delattr(model, "dropout" if part == "norm" else "norm")
    name = {"norm": "norm/mean", "dropout": "dropout/rngs/count"}[part]
    with pytest.raises(ValueError, match=rf"'{name}'.*integrations\.nnx.*nnx\.split"):
        engine()(kind(model), *args)


def test_the_core_takes_models_of_parameters_only():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    _, jacobian = jaxjd.value_and_jacobian(lambda model: model(POINT))(model)
    np.testing.assert_array_equal(jacobian.bias[...], jnp.eye(2))
    _, jacobian = jaxjd.value_and_jacobian(lambda state: state["bias"][...])(nnx.state(model))
    np.testing.assert_array_equal(jacobian["bias"][...], jnp.eye(2))


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_gradient_trains_as_the_plain_one_does(every):
    """With equal weights it is `nnx.value_and_grad` of the mean, statistics and keys included."""
    init, apply = engines.aggregated_value_and_grad(
        losses_of, jaxjd.weightings.mean(), num_tasks=2, every=every
    )
    model, plain = Net(), Net()
    optimizer, plain_optimizer = optimizer_of(model), optimizer_of(plain)

    @nnx.jit
    def step(model, optimizer, state, x, targets):
        (losses, gradient), state = apply(state, model, x, targets)
        assert type(gradient) is nnx.State
        optimizer.update(model, gradient)
        return losses.mean(), state

    expected_step, state = nnx.jit(plain_step), init(model)
    for _ in range(4):
        value, state = step(model, optimizer, state, X, TARGETS)
        expected = expected_step(plain, plain_optimizer, X, TARGETS)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        states = [jax.tree.leaves(nnx.state(each, nnx.Not(nnx.RngKey))) for each in (model, plain)]
        chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-6)

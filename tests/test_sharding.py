"""Training on many devices equals training on one, and only what must crosses them."""

from __future__ import annotations

import functools
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxjd
from jaxjd import labels, sharding, weightings
from jaxjd.linalg import reduction
from tests.benchmarks import communication
from tests.collectives import collectives
from tests.registry import slow_but

M, STEPS = 4, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (8, 16)) / 3, "bias": jnp.zeros((1, 16))},
        "second": {"kernel": jax.random.normal(keys[1], (16, 8)) / 4, "bias": jnp.ones((1, 8))},
        "heads": jax.random.normal(keys[2], (8, M)),
    }


PARAMS = _params()
X = jax.random.normal(jax.random.key(1), (STEPS, 16, 8))
Y = jax.random.normal(jax.random.key(2), (STEPS, 16, M)) * jnp.arange(1.0, M + 1)[None, None]


def forward(params, x, *, whole=lambda params: params, add=lambda x: x, dot=jnp.dot):
    """A perceptron; the functions are what a parallel program does in between."""
    params = whole(params)
    first, second = params["first"], params["second"]
    h = jnp.tanh(dot(x, first["kernel"]) + first["bias"])
    h = jnp.tanh(add(dot(h, second["kernel"])) + second["bias"])
    return dot(h, params["heads"])


def losses_fn(params, x, y, **parallel):
    return jnp.mean((forward(params, x, **parallel) - y) ** 2, axis=0)


def sgd(aggregator):
    # Scale matters: an optimizer that is invariant to it would hide a wrong factor.
    return optax.chain(aggregator, optax.sgd(0.05))


def train(engine, tx, params, x, y):
    """Some steps; what every method needs is passed to all of them."""

    def step(carry, batch):
        params, state = carry
        losses, jacobian = engine(params, *batch)
        extra = {"losses": losses, "cross_jacobians": (jacobian, jacobian)}
        updates, state = tx.update(jacobian, state, params, **extra)
        return (optax.apply_updates(params, updates), state), losses

    (params, _), losses = lax.scan(step, (params, tx.init(params)), (x, y))
    return params, losses


METHODS = {
    "upgrad": lambda: jaxjd.upgrad(num_tasks=M),
    "modo": lambda: jaxjd.modo(gamma=0.1, num_tasks=M),
    "excess_mtl": lambda: jaxjd.excess_mtl(num_tasks=M),
    "moco": lambda: jaxjd.moco(num_tasks=M),
    "db_mtl": lambda: jaxjd.db_mtl(num_tasks=M),
    "gradnorm": lambda: jaxjd.gradnorm(num_tasks=M),
    "momentum_conflict_free": lambda: jaxjd.momentum_conflict_free(num_tasks=M),
    "trimmed_mean": lambda: jaxjd.trimmed_mean(1),
    "aligned_mtl": lambda: jaxjd.aligned_mtl(),
    "grouped": lambda: jaxjd.grouped(weightings.aligned_mtl(), labels.by_layer, num_tasks=M),
    "partition": lambda: jaxjd.partition(
        {
            "first": jaxjd.aligned_mtl(),
            "second": jaxjd.modo(gamma=0.1, num_tasks=M),
            "heads": jaxjd.trimmed_mean(1),
        },
        labels.by_network,
    ),
}


def train_all(engine, names, params, x, y):
    """Several methods in one program: compiling is what takes the time."""
    return {name: train(engine, sgd(METHODS[name]()), params, x, y) for name in names}


@functools.cache
def expected(names):
    """One program for the methods of a test; most tests have one and the same method."""
    engine = jaxjd.value_and_jacobian(losses_fn)
    return jax.jit(functools.partial(train_all, engine, names))(PARAMS, X, Y)


def check(found):
    wanted = expected(tuple(found))
    for name in found:
        chex.assert_trees_all_close(found[name], wanted[name], **CLOSE, custom_message=name)


# How the parameters are split over the mesh ("data", "model").
LAYOUTS = {
    "data": jax.tree.map(lambda _: P(), PARAMS),
    "fsdp_rows": {
        "first": {"kernel": P("data", None), "bias": P(None, "data")},
        "second": {"kernel": P("data", None), "bias": P()},
        "heads": P("data", None),
    },
    "fsdp_columns": {
        "first": {"kernel": P(None, "data"), "bias": P()},
        "second": {"kernel": P(None, "data"), "bias": P(None, "data")},
        "heads": P(None, "data"),
    },
    "tensor": {
        "first": {"kernel": P(None, "model"), "bias": P(None, "model")},
        "second": {"kernel": P("model", None), "bias": P()},
        "heads": P(),
    },
    "both": {
        "first": {"kernel": P("data", "model"), "bias": P(None, "model")},
        "second": {"kernel": P("model", "data"), "bias": P(None, "data")},
        "heads": P(("data",), None),
    },
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def put(mesh, tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def whole(params, specs):
    """All-gathers what is split over the data axis, as in FSDP, and not over the other."""

    def gather(leaf, spec):
        for axis, entry in enumerate(spec):
            if "data" in ((entry,) if isinstance(entry, str) else entry or ()):
                leaf = lax.all_gather(leaf, "data", axis=axis, tiled=True)
        return leaf

    return jax.tree.map(gather, params, specs)


# Under jit


@pytest.mark.parametrize("layout", slow_but({"both"}, list(LAYOUTS)))
def test_jit_on_an_auto_mesh(layout):
    mesh = mesh_of()
    names = ["excess_mtl" if layout == "both" else "aligned_mtl"]
    form = "dense" if layout in ("fsdp_rows", "both") else "auto"
    engine = jaxjd.value_and_jacobian(losses_fn, form=form)
    params = put(mesh, PARAMS, LAYOUTS[layout])
    batch = (jax.device_put(array, NamedSharding(mesh, P(None, "data"))) for array in (X, Y))
    found = jax.jit(functools.partial(train_all, engine, names))(params, *batch)
    check(found)
    kernel = found[names[0]][0]["first"]["kernel"]
    wanted = NamedSharding(mesh, LAYOUTS[layout]["first"]["kernel"])
    assert kernel.sharding.is_equivalent_to(wanted, 2)


def test_jit_with_the_task_axis_split():
    mesh = mesh_of()

    def engine(params, x, y):
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(params, x, y)
        split = NamedSharding(mesh, P("data"))
        return losses, jax.tree.map(
            lambda leaf: lax.with_sharding_constraint(leaf, split), jacobian
        )

    params = put(mesh, PARAMS, LAYOUTS["data"])
    check(jax.jit(functools.partial(train_all, engine, ["aligned_mtl"]))(params, X, Y))


@pytest.mark.parametrize("layout", slow_but({"tensor"}, ["data", "fsdp_rows", "tensor"]))
def test_jit_on_an_explicit_mesh(layout):
    mesh, specs = mesh_of(AxisType.Explicit), LAYOUTS[layout]

    def unsplit(params):
        if layout == "tensor":
            return params
        return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)

    def dot(x, kernel):
        columns = jax.typeof(kernel).sharding.spec[1]
        return jnp.einsum("bi,ij->bj", x, kernel, out_sharding=P("data", columns))

    fn = functools.partial(losses_fn, whole=unsplit, dot=dot)
    engine = jaxjd.value_and_jacobian(fn, form="auto")
    with jax.set_mesh(mesh):
        params = put(mesh, PARAMS, specs)
        batch = (jax.device_put(array, NamedSharding(mesh, P(None, "data"))) for array in (X, Y))
        found = jax.jit(functools.partial(train_all, engine, ["aligned_mtl"]))(params, *batch)
        check(found)
    kernel = found["aligned_mtl"][0]["first"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, specs["first"]["kernel"]), 2)


# Inside shard_map and pmap


def run_in_shard_map(layout, names, checked, form="auto"):
    mesh, specs = mesh_of(), LAYOUTS[layout]
    fn = functools.partial(
        losses_fn,
        whole=lambda params: whole(params, specs),
        add=(lambda x: lax.psum(x, "model")) if layout in ("tensor", "both") else lambda x: x,
    )
    engine = sharding.parallel(jaxjd.value_and_jacobian(fn, form=form), "data", specs)
    run = jax.shard_map(
        functools.partial(train_all, engine, names),
        mesh=mesh,
        in_specs=(specs, P(None, "data"), P(None, "data")),
        out_specs=dict.fromkeys(names, (specs, P())),
        check_vma=checked,
    )
    return jax.jit(run)(put(mesh, PARAMS, specs), X, Y)


@pytest.mark.parametrize("checked", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout", slow_but({"fsdp_rows", "tensor"}, ["data", "fsdp_rows", "fsdp_columns", "tensor"])
)
def test_shard_map(layout, checked):
    form = "factored" if layout in ("data", "tensor") else "auto"
    check(run_in_shard_map(layout, ["aligned_mtl"], checked, form))


@pytest.mark.parametrize(
    ("names", "checked"),
    [
        (("moco", "trimmed_mean"), False),
        pytest.param(tuple(METHODS), True, marks=pytest.mark.slow),
        pytest.param(
            ("excess_mtl", "moco", "db_mtl", "momentum_conflict_free", "trimmed_mean"),
            False,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two", "all", "entrywise"],
)
@pytest.mark.slow
def test_methods_on_a_mesh_of_data_and_model(names, checked):
    check(run_in_shard_map("both", list(names), checked))


BATCH = (X[0], Y[0])
TRUE = jax.jit(jaxjd.value_and_jacobian(losses_fn))(PARAMS, *BATCH)


def in_every_setting(fn):
    """What a function of parameters and a batch gives in all ways to run it on all devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    for checked in (True, False):
        run = jax.shard_map(fn, mesh=mesh, check_vma=checked, **specs)
        yield jax.jit(run)(PARAMS, *BATCH)
    cut = [array.reshape(8, -1, *array.shape[1:]) for array in BATCH]
    for run in (jax.pmap, lambda fn, **kwargs: jax.jit(jax.vmap(fn, **kwargs))):
        found = run(fn, axis_name="data", in_axes=(None, 0, 0))(PARAMS, *cut)
        yield jax.tree.map(lambda leaf: leaf[3], found)


@pytest.mark.slow
def test_the_recipe_is_one_line_in_every_setting():
    def averaged(params, x, y):
        return lax.pmean(losses_fn(params, x, y), "data")

    for fn, form in ((losses_fn, "factored"), (averaged, "dense")):

        def run(params, x, y, fn=fn, form=form):
            engine = sharding.parallel(jaxjd.value_and_jacobian(fn, form=form), "data")
            losses, jacobian = engine(params, x, y)
            return losses, jaxjd.materialize(jacobian)

        for found in in_every_setting(run):
            chex.assert_trees_all_close(found, TRUE, **CLOSE)


@pytest.mark.slow
def test_the_recipe_in_steps():
    def run(params, x, y):
        params = sharding.vary(sharding.vary(params, "data"), ("data",))
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn, form="auto")(params, x, y)
        jacobian = sharding.pmean_jacobian(jacobian, "data")
        return lax.pmean(losses, "data"), jaxjd.materialize(jacobian)

    for found in in_every_setting(run):
        chex.assert_trees_all_close(found, TRUE, **CLOSE)


@pytest.mark.slow
def test_factors_of_views():
    """Transposed, sliced and reshaped kernels and an embedding keep the types of what varies."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (5, 16)),
        "transposed": jax.random.normal(keys[1], (16, 8)),
        "viewed": jax.random.normal(keys[2], (2, 8, 16)),
    }
    x = jax.random.normal(keys[3], (8, 8))
    tokens = jnp.arange(8) % 5

    def fn(params, x, tokens):
        h = jnp.tanh(x @ params["transposed"].T) + params["embedding"][tokens]
        h = jnp.tanh(h @ params["viewed"][0].T) @ params["viewed"].reshape(16, 16)[:8]
        return jnp.mean(h**2, axis=0)[:3]

    def run(params, x, tokens, wrap=lambda engine: sharding.parallel(engine, "data")):
        engine = wrap(jaxjd.value_and_jacobian(fn, form="factored"))
        _, jacobian = engine(params, x, tokens)
        return jaxjd.gramian(jacobian), jaxjd.combine(jnp.arange(1.0, 4), jacobian)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    found = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(params, x, tokens)
    wanted = jax.jit(functools.partial(run, wrap=lambda engine: engine))(params, x, tokens)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_tasks_with_heads_and_auxiliary_output():
    def trunk(params, x, y):
        return jnp.tanh(x @ params["kernel"] + params["bias"]), jnp.sum(x)

    def head(kernel, features, x, y):
        return jnp.mean((features @ kernel - y[:, :1]) ** 2), ()

    column = 0.1 * jnp.arange(1.0, 17.0)[:, None]
    heads = {"a": column, "b": -column}
    engine = jaxjd.mtl_value_and_jacobian(trunk, {"a": head, "b": head}, has_aux=True)
    (losses, _), gradients = jax.jit(engine)(PARAMS["first"], heads, *BATCH)

    def run(params, x, y):
        parallel = sharding.parallel(engine, "data")
        (losses, (total, _)), gradients = parallel(params["first"], heads, x, y)
        return losses, gradients, lax.psum(total, "data")

    for found in in_every_setting(run):
        chex.assert_trees_all_close(found, (losses, gradients, jnp.sum(X[0])), **CLOSE)


@pytest.mark.parametrize("form", slow_but({"factored"}, ["dense", "factored"]))
@pytest.mark.slow
def test_a_task_for_each_example(form):
    def loss(params, x, y):
        return losses_fn(params, x[None], y[None]).sum()

    engine = jaxjd.per_example_value_and_jacobian(loss, form=form)
    losses, jacobian = jax.jit(jaxjd.per_example_value_and_jacobian(loss))(PARAMS, *BATCH)

    def run(params, x, y):
        found = engine(sharding.vary(params, "data"), x, y)
        losses, jacobian = sharding.gather_tasks(found, "data")
        return losses, jaxjd.materialize(jacobian)

    for found in in_every_setting(run):
        chex.assert_trees_all_close(found, (losses, jacobian), **CLOSE)


@pytest.mark.slow
def test_pmap_trains_as_one_device_does():
    engine = sharding.parallel(jaxjd.value_and_jacobian(losses_fn, form="auto"), "data")
    run = functools.partial(train_all, engine, ["aligned_mtl"])
    cut = [array.reshape(STEPS, 8, -1, *array.shape[2:]) for array in (X, Y)]
    found = jax.pmap(run, axis_name="data", in_axes=(None, 1, 1))(PARAMS, *cut)
    check(jax.tree.map(lambda leaf: leaf[5], found))


# What crosses devices


WIDE = {
    "first": {"kernel": (64, 128), "bias": (1, 128)},
    "second": {"kernel": (128, 64), "bias": (1, 64)},
    "heads": (64, 32),
}
IS_SHAPE = {"is_leaf": lambda node: isinstance(node, tuple)}
ENTRYWISE = ("excess_mtl", "moco", "db_mtl", "momentum_conflict_free", "trimmed_mean")


def update_all(names, jacobian, params):
    extra = {"losses": jnp.ones(M), "cross_jacobians": (jacobian, jacobian)}
    found = {}
    for name in names:
        tx = METHODS[name]() if name in METHODS else jaxjd.graddrop()
        found[name] = tx.update(jacobian, tx.init(params), params, **extra)[0]
    return found


@pytest.mark.parametrize("layout", slow_but({"tensor"}, ["both", "tensor"]))
def test_only_gramians_cross_devices_under_jit(layout):
    mesh, specs = mesh_of(), LAYOUTS[layout]
    names = ["modo", "grouped", "partition", "graddrop", *ENTRYWISE]

    def shapes(*lead):
        return jax.tree.map(
            lambda shape, spec: jax.ShapeDtypeStruct(
                (*lead, *shape),
                "float32",
                sharding=NamedSharding(mesh, P(*(None,) * len(lead), *spec)),
            ),
            WIDE,
            specs,
            **IS_SHAPE,
        )

    update = functools.partial(update_all, names if layout == "both" else ["upgrad", "moco"])
    compiled = jax.jit(update).lower(shapes(M), shapes()).compile()
    found = collectives(compiled)
    assert found
    assert {one.kind for one in found} == {"all-reduce"}
    assert all(np.prod(shape) <= M * M for one in found for _, shape in one.shapes), found


@pytest.mark.parametrize("checked", [pytest.param(True, marks=pytest.mark.slow), False])
def test_only_gramians_cross_devices_in_shard_map(checked):
    mesh, specs = mesh_of(), LAYOUTS["both"]

    def compiled(names):
        def update(jacobian, params):
            return update_all(names, sharding.sharded(jacobian, specs), params)

        shape = lambda *lead: jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct((*lead, *shape), "float32"), WIDE, **IS_SHAPE
        )
        rows = jax.tree.map(lambda spec: P(None, *spec), specs)
        run = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(rows, specs),
            out_specs=dict.fromkeys(names, specs),
            check_vma=checked,
        )
        return collectives(jax.jit(run).lower(shape(M), shape()).compile())

    # One sum for each set of axes: both, the model's, and the data's.
    found = compiled(["upgrad" if checked else "aligned_mtl"])
    assert sum(one.entries for one in found) == 3 * M * M
    found = compiled([*ENTRYWISE, "modo", "grouped"] if checked else ["modo", "moco"])
    assert {one.kind for one in found} == {"all-reduce"}
    assert all(np.prod(shape) <= M * M for one in found for _, shape in one.shapes), found


@pytest.mark.slow
def test_a_factored_leaf_is_sent_in_the_cheaper_way():
    devices, rows = 8, 2
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(3), 2)
    params = [jax.random.normal(keys[0], (256, 128)) / 16, jax.random.normal(keys[1], (128, 4))]
    x = jax.random.normal(jax.random.key(4), (devices * rows, 256))

    def losses_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params[0]) @ params[1], axis=0)

    engine = jaxjd.value_and_jacobian(losses_fn, form="factored")
    forms = []

    def run(params, x):
        _, jacobian = sharding.parallel(engine, "data")(params, x)
        forms.append([type(leaf).__name__ for leaf in jacobian])
        return jaxjd.gramian(jacobian), jaxjd.combine(jnp.arange(4.0), jacobian)

    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    gathered = run.lower(params, x).compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "prefers_rows", lambda *_: False)
        jax.clear_caches()
        dense = run.lower(params, x).compile()
    assert forms[0][0] == "FactoredLeaf"
    assert "FactoredLeaf" not in forms[-1]
    _, jacobian = jax.jit(jaxjd.value_and_jacobian(losses_fn))(params, x)
    wanted = jaxjd.gramian(jacobian), jaxjd.combine(jnp.arange(4.0), jacobian)
    chex.assert_trees_all_close(gathered(params, x), wanted, **CLOSE)
    chex.assert_trees_all_close(dense(params, x), wanted, **CLOSE)

    # The bytes that the rule counts are those of the compiled program.
    sent = sum(one.sent for one in collectives(dense))
    losses = 2 * (devices - 1) / devices * 4 * 4
    counted = sum(reduction.reduced_bytes(4 * leaf.size, devices, 4) for leaf in params)
    assert sent - losses in (counted, counted - losses)  # Unused, the losses may not be averaged.
    (factors,) = ([one for one in collectives(gathered) if one.kind == "all-gather"],)
    kinds = zip(forms[0], ((256, 128), (128, 4)), strict=True)
    factor_bytes = sum(4 * rows * (p + 4 * q) for kind, (p, q) in kinds if kind == "FactoredLeaf")
    assert sum(one.sent for one in factors) == reduction.gathered_bytes(factor_bytes, devices)
    assert sum(one.sent for one in collectives(gathered)) < sent / 2


@pytest.mark.slow
def test_the_formulas_of_the_page_are_those_of_compiled_programs():
    for name, (counted, found) in communication.measure().items():
        assert found == counted, name
    page = pathlib.Path(__file__).parent.parent / "docs" / "distributed.md"
    text = page.read_text()
    for rows in (8, 2048):
        for cells in communication.table(rows):
            assert "| " + " | ".join(cells) + " |" in text


# Mistakes


def raises(message, fn, specs=None, *, checked=True):
    mesh = mesh_of()
    specs = specs or (P(), P("data"), P("data"))
    run = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, PARAMS, *BATCH)


def test_mistakes_are_reported():
    engine = jaxjd.value_and_jacobian(losses_fn)
    raises("no mesh axis 'batch'", sharding.parallel(engine, "batch"))
    with pytest.raises(ValueError, match="no mesh axis 'data' here"):
        sharding.parallel(engine, "data")(PARAMS, *BATCH)
    raises(
        "'first/bias' is the same on all devices",
        lambda *args: sharding.pmean_jacobian(engine(*args)[1], "data"),
    )
    raises(
        "is the same on all devices", lambda *args: sharding.gather_tasks(engine(*args)[1], "data")
    )
    raises(
        "'first/bias' is the same on all devices",
        sharding.parallel(engine, "data", LAYOUTS["tensor"]),
    )
    raises(
        "'first/bias' varies over",
        lambda params, *batch: sharding.parallel(engine, ("data", "model"))(
            sharding.vary(params, "model"), *batch
        ),
    )
    raises(
        "expected a jax.sharding.PartitionSpec, found str",
        sharding.parallel(engine, "data", {**LAYOUTS["data"], "heads": "data"}),
    )
    raises(
        "structure of the parameters or a prefix", sharding.parallel(engine, "data", {"first": P()})
    )
    raises("no mean of Gramians", sharding.parallel(jaxjd.value_and_gramian(losses_fn), "data"))
    another = lambda argnums: jaxjd.value_and_jacobian(losses_fn, argnums)
    raises("has 3, but there are 3", sharding.parallel(another(3), "data"))
    raises(
        "one entry per differentiated argument",
        sharding.parallel(another((0, 1)), "data", (P(),)),
    )
    raises("functools.wraps", sharding.parallel(lambda *args: engine(*args), "data"))
    raises("pass `param_specs`", lambda params, *_: sharding.sharded(params), checked=False)


def test_shards_are_opaque():
    def marked(use):
        def run(params, *_):
            rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * M), params)
            use(sharding.sharded(rows), params)

        return run

    specs = (LAYOUTS["both"], P(), P())
    use = marked(lambda rows, params: jaxjd.materialize(rows))
    raises("'first/bias' is split over the mesh axes .'model',.", use, specs)
    use = marked(lambda rows, params: jaxjd.graddrop().update(rows, jaxjd.graddrop().init(params)))
    raises("draws depend on the place", use, specs)
    use = marked(lambda rows, params: sharding.sharded(rows))
    raises("already marked", use, specs)
    use = marked(lambda rows, params: sharding.pmean_jacobian(rows, "model"))
    raises("have no mean over", use, specs)

    def mixed(rows, params):
        other = jax.tree.map(
            lambda leaf: sharding.vary(jnp.stack([leaf] * M), ("data", "model")), params
        )
        jaxjd.cross_gramian(rows, sharding.sharded(other))

    raises("split over the same mesh axes", marked(mixed), specs)
    refuse = lambda rows, params: rows["heads"] + 1.0
    mesh = mesh_of()
    run = jax.shard_map(marked(refuse), mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(TypeError, match="split over devices; only jaxjd"):
        jax.eval_shape(run, PARAMS, *BATCH)


# Several processes


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if "device_count" not in flag]
    root = pathlib.Path(__file__).parent.parent
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=2"]),
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.two_processes"),
                *(str(port), str(process), "2", str(tmp_path / f"{process}.npz")),
            ],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
            process.wait()
    wanted = jax.tree.leaves(expected(("aligned_mtl",)))
    for process in range(2):
        with np.load(tmp_path / f"{process}.npz") as found:
            assert len(found) == 2 * len(wanted)
            for kind in ("jit", "shard_map"):
                for number, leaf in enumerate(wanted):
                    np.testing.assert_allclose(found[f"{kind}{number}"], leaf, **CLOSE)


@pytest.mark.parametrize(
    ("every", "microbatches"),
    [
        (1, 1),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_one_gradient_of_all_devices(every, microbatches):
    """`parallel` of losses to a gradient in one call: that of the whole batch."""
    plain = jaxjd.aggregated_value_and_grad(
        losses_fn, weightings.upgrad(), num_tasks=M, every=every
    )
    front = jaxjd.aggregated_value_and_grad(
        losses_fn, weightings.upgrad(), num_tasks=M, every=every, microbatches=microbatches
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    init, apply = sharding.parallel(front, "data")
    specs = (P(), P(), P("data"), P("data"))
    step = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=specs, out_specs=P()))
    whole = jax.jit(plain.apply)
    state, expected_state = init(PARAMS), plain.init(PARAMS)
    for _ in range(every):
        found, state = step(state, PARAMS, X[0], Y[0])
        expected, expected_state = whole(expected_state, PARAMS, X[0], Y[0])
        chex.assert_trees_all_close((found, state), (expected, expected_state), **CLOSE)

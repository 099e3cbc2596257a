"""Bad input is a `ValueError` while tracing that says what was looked at, expected and found."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxjd
from jaxjd import labels, linalg, scalarizers, weightings
from jaxjd.integrations import nnx as nnx_engines
from jaxjd.integrations.flax import JDTrainState
from tests.registry import NAMED, UNWEIGHTED, by_name, slow_but

PARAMS = {"a": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, "c": jnp.zeros(3)}
JACOBIAN = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), PARAMS)
EYE = jnp.eye(3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
      name: The test id.
      run: Triggers it, without running anything on a device.
      message: What the message must say, as regular expressions.
    """

    name: str
    run: Callable[[], Any]
    message: tuple[str, ...]


def case(name, run, *message):
    return Case(name, run, message)


def trace(fn, *args):
    """Traces a function under jit; nothing is compiled, so nothing can run."""
    return jax.eval_shape(jax.jit(fn), *args)


def update(aggregator, jacobian=JACOBIAN, params=PARAMS, init=PARAMS, **extra_args):
    """Traces an update under jit, from a state for `init`."""
    state = aggregator.init(init)
    return trace(
        lambda j, s, p, e: aggregator.update(j, s, p, **e), jacobian, state, params, extra_args
    )


def weigh(weighting, stat=EYE, state=(), **extra_args):
    return trace(lambda x, s, e: weighting.update(x, s, **e), stat, state, extra_args)


FORM = {}
"""The form that `engine` asks for."""


def engine(fn, params=PARAMS, **options):
    return trace(jaxjd.value_and_jacobian(fn, **{**FORM, **options}), params)


def gramians(fn=None, weights=None, **options):
    """Traces a Gramian and, with weights, a pullback."""

    def run(params):
        _, gramian, pullback = jaxjd.value_and_gramian(fn or norms, **options)(params)
        return gramian if weights is None else pullback(weights)

    return trace(run, PARAMS)


def per_example(loss, *batch, params=1.0, **options):
    return trace(jaxjd.per_example_value_and_jacobian(loss, **options), params, *batch)


def subset(weighting, num_tasks=5, num_present=3):
    return jaxjd.subset(weighting, num_tasks=num_tasks, num_present=num_present)


def replaced(leaf, key="c"):
    """The Jacobian with another leaf in one place."""
    return {**JACOBIAN, key: leaf}


def norms(params):
    return jnp.stack([jnp.sum(params["c"] ** 2), jnp.sum(params["a"]["w"])])


@jax.custom_vjp
def on_host(x):
    """A number whose backward pass calls the host and has no rule for batches."""
    return 2 * x


on_host.defvjp(
    lambda x: (2 * x, None),
    lambda _, c: (jax.pure_callback(lambda c: 2 * c, jax.ShapeDtypeStruct((), "float32"), c),),
)


def mtl(heads_fn, heads_params, trunk_params=None, **options):
    fn = jaxjd.mtl_value_and_jacobian(lambda w: jnp.tanh(w), heads_fn, **options)
    return trace(fn, jnp.zeros(2) if trunk_params is None else trunk_params, heads_params)


def head(v, features):
    return v * jnp.sum(features)


def partitioned(tree, *names):
    return jaxjd.partition({name: jaxjd.sum() for name in names}, tree)


def rows_for(num_tasks):
    return jax.tree.map(lambda leaf: jnp.ones((num_tasks, *leaf.shape)), PARAMS)


TWO = rows_for(2)
MOCO = weightings.moco()
NO_TASK_AXIS = jax.tree.map(lambda leaf: leaf[0], JACOBIAN)

JACOBIANS = [
    case(
        "gradient without a task axis, with params",
        lambda: update(jaxjd.upgrad(), NO_TASK_AXIS),
        "leaf 'c'",
        "size 2 as in leaf 'a/b'",
        r"found shape \(3,\)",
        "gradient without a task axis",
        "value_and_jacobian",
    ),
    case(
        "gradients of a dict of losses, as jacrev returns them",
        lambda: update(jaxjd.upgrad(), {"one": NO_TASK_AXIS, "two": NO_TASK_AXIS}),
        "leaf 'one/c'",
        "2 gradients without a task axis",
        "jaxjd.stack_tasks",
    ),
    case(
        "gradient without a task axis, no params",
        lambda: update(jaxjd.upgrad(), {"a": jnp.ones(3), "b": jnp.ones((4, 2))}, None),
        "leaf 'b'",
        "size 3 as in leaf 'a'",
        r"found shape \(4, 2\)",
        "gradient without a task axis",
    ),
    case(
        "gradient of a scalar parameter",
        lambda: update(jaxjd.mean(), {"scale": jnp.ones(())}, None, {"scale": jnp.ones(())}),
        "leaf 'scale'",
        "leading task axis",
        r"found shape \(\)",
    ),
    case(
        "bare gradient of one parameter",
        lambda: update(jaxjd.mean(), jnp.ones(3), jnp.zeros(3), jnp.zeros(3)),
        "leaf '<root>'",
        r"\(m, \*\(3,\)\)",
        r"found \(3,\)",
        "no task axis",
    ),
    case(
        "aggregator after an aggregator",
        lambda: update(optax.chain(jaxjd.upgrad(), jaxjd.mean())),
        "leaf 'a/b'",
        "size 2|no task axis",
    ),
    case(
        "leaves with different numbers of tasks",
        lambda: update(jaxjd.upgrad(), replaced(jnp.ones((4, 3)))),
        "leaf 'c'",
        "size 3 as in leaf 'a/b'",
        r"found shape \(4, 3\)",
    ),
    case(
        "no tasks",
        lambda: update(jaxjd.upgrad(), rows_for(0)),
        "leaf 'a/b'",
        "task axis",
        r"found shape \(0, 2\)",
    ),
    case(
        "leaf of another shape than its parameter",
        lambda: update(jaxjd.upgrad(), replaced(jnp.ones((3, 4)))),
        "leaf 'c'",
        r"\(m, \*\(3,\)\)",
        r"found \(3, 4\)",
    ),
    case(
        "fewer leaves than parameters",
        lambda: update(jaxjd.upgrad(), {"c": JACOBIAN["c"]}),
        "1 leaves",
        "parameters have 3",
    ),
    case(
        "num_tasks disagrees",
        lambda: update(jaxjd.upgrad(num_tasks=2)),
        "num_tasks=2",
        "3 rows",
    ),
    case(
        "num_tasks disagrees in groups",
        lambda: update(jaxjd.grouped(weightings.upgrad(), "all", num_tasks=2)),
        "num_tasks=2",
        "3 rows",
    ),
    case(
        "integer leaf",
        lambda: update(jaxjd.upgrad(), replaced(jnp.ones((3, 3), int))),
        "leaf 'c'",
        "floating point",
        r"found int32\[3,3\]",
    ),
    case(
        "complex leaf of a real parameter",
        lambda: update(jaxjd.upgrad(), replaced(jnp.ones((3, 3), complex))),
        "leaf 'c': expected a real dtype",
        r"found complex64\[3,3\]",
    ),
    case(
        "complex leaf with a real state",
        lambda: MOCO.update(replaced(jnp.ones((3, 3), complex)), MOCO.init(3, PARAMS)),
        "The Jacobian is complex",
        "`moco` was initialized with real leaves",
    ),
    *(
        case(
            f"complex leaf: {name}",
            lambda tx=tx: update(
                tx, replaced(jnp.ones((3, 3), complex)), {**PARAMS, "c": jnp.ones(3, complex)}
            ),
            f"leaf 'c': `{name}` looks at single entries",
            r"found complex64\[3",
        )
        for name, tx in (
            ("graddrop", jaxjd.graddrop(key=0)),
            ("trimmed_mean", jaxjd.trimmed_mean(trim_number=1)),
            ("excess_mtl", jaxjd.excess_mtl(num_tasks=3)),
            ("momentum_conflict_free", jaxjd.momentum_conflict_free(num_tasks=3)),
        )
    ),
    case(
        "leaf that is no array",
        lambda: jaxjd.gramian(replaced(1.0)),
        "leaf 'c'",
        "expected an array",
        "found float",
    ),
    case("Gramian of nothing", lambda: jaxjd.gramian({}), "`jacobian`", "no leaves"),
    case(
        "weights of another length",
        lambda: trace(jaxjd.combine, jnp.ones(2), JACOBIAN),
        "`weights` has 2 entries",
        "3 tasks",
    ),
    case(
        "weights of another rank",
        lambda: trace(jaxjd.combine, jnp.ones((3, 1)), JACOBIAN),
        "`weights`",
        r"shape \(m,\)",
        r"got float32\[3,1\]",
    ),
    case(
        "weights that are a list",
        lambda: jaxjd.combine([1.0, 2.0, 3.0], JACOBIAN),
        "`weights`",
        "got list",
    ),
    case(
        "materialize something else",
        lambda: jaxjd.materialize({"a": jnp.ones(())}),
        "leaf 'a'",
        "task axis",
    ),
]

# Factories: what they need to know, and what they take.

NEEDS_NUM_TASKS = {
    "db_mtl": weightings.db_mtl,
    "gradnorm": weightings.gradnorm,
    "gradvac": weightings.gradvac,
    "moco": weightings.moco,
    "pcd": weightings.pcd,
    "sdmgrad": weightings.sdmgrad,
    "modo": weightings.modo,
    "excess_mtl": weightings.excess_mtl,
    "cr_mogm": lambda: weightings.cr_mogm(weightings.upgrad()),
}

FACTORIES = [
    *(
        case(
            f"missing num_tasks: {name}",
            lambda make=make: jaxjd.weighted(make()),
            "num_tasks=",
            f"`{name}`",
            "depends on the number of tasks",
        )
        for name, make in NEEDS_NUM_TASKS.items()
    ),
    *(
        case(
            f"missing num_tasks in init: {name}",
            lambda make=make: make().init(None, PARAMS),
            "num_tasks=",
            f"`{name}`",
        )
        for name, make in NEEDS_NUM_TASKS.items()
    ),
    *(
        case(
            f"missing num_tasks of an aggregator: {name}",
            lambda name=name: getattr(jaxjd, name)(),
            "num_tasks=",
        )
        for name in NEEDS_NUM_TASKS
        if hasattr(jaxjd, name)
    ),
    case(
        "missing num_tasks in groups",
        lambda: jaxjd.grouped(weightings.gradvac(), labels.by_layer),
        "num_tasks=",
        "`gradvac`",
    ),
    case("missing params", lambda: weightings.excess_mtl().init(2), "`excess_mtl`", "params"),
    case(
        "num_tasks of zero", lambda: jaxjd.upgrad(num_tasks=0), "`num_tasks` must be >= 1", "got 0"
    ),
    case(
        "num_tasks that is no int",
        lambda: jaxjd.upgrad(num_tasks=2.0),
        "`num_tasks` must be a static int",
        "got float",
    ),
    case(
        "traced num_tasks",
        lambda: optax.inject_hyperparams(jaxjd.upgrad)(num_tasks=2).init(PARAMS),
        "`num_tasks` must be a static int",
        "static_args",
    ),
    case(
        "traced n_iter",
        lambda: optax.inject_hyperparams(jaxjd.sdmgrad, static_args=("num_tasks", "pref_vector"))(
            num_tasks=2, n_iter=5
        ).init(PARAMS),
        "`n_iter` must be a static int",
        "static_args",
    ),
    case(
        "traced n_warmup_steps",
        lambda: trace(lambda n: weightings.excess_mtl(n_warmup_steps=n).init(2, PARAMS), 3),
        "`n_warmup_steps` must be a static int",
        "static_args",
    ),
    case(
        "weighting factory that was not called",
        lambda: jaxjd.weighted(weightings.upgrad),
        "`weighting` must be a jaxjd.Weighting",
        "called first",
        "got function",
    ),
    case(
        "aggregator for a weighting",
        lambda: jaxjd.weighted(jaxjd.upgrad()),
        "`weighting` must be a jaxjd.Weighting",
        "got Aggregator",
        "from jaxjd.weightings",
    ),
    case(
        "solver_residual of a factory",
        lambda: jaxjd.diagnostics.solver_residual(weightings.mean, EYE),
        "`weighting` must be a weighting or an aggregator",
        "called first",
        "got function",
    ),
    case(
        "cr_mogm of a factory",
        lambda: weightings.cr_mogm(weightings.mean),
        "`weighting` must be a jaxjd.Weighting",
        "got function",
    ),
    case(
        "grouped with a factory",
        lambda: jaxjd.grouped(weightings.mean, "all"),
        "`weighting` must be a jaxjd.Weighting",
        "got function",
    ),
    case(
        "aggregator factory in a partition",
        lambda: jaxjd.partition({"all": jaxjd.mean}, "all"),
        "'all'",
        "aggregator",
        "function",
    ),
    case(
        "partition of nothing", lambda: jaxjd.partition({}, "all"), "`aggregators`", "at least one"
    ),
    case(
        "flattening of a Jacobian weighting",
        lambda: weightings.flattening(weightings.excess_mtl()),
        "`flattening` takes a weighting of the Gramian",
        "got JacobianWeighting",
    ),
    case(
        "flattening of a cross-Gramian weighting",
        lambda: weightings.flattening(weightings.modo()),
        "`flattening` takes a weighting of the Gramian",
        "got CrossGramianWeighting",
    ),
    case(
        "flattening of a factory",
        lambda: weightings.flattening(weightings.mean),
        "`flattening` takes a weighting",
        "got function",
    ),
    case(
        "grouped with a Jacobian weighting",
        lambda: jaxjd.grouped(weightings.excess_mtl(), "all", num_tasks=2),
        "`grouped`",
        "jaxjd.partition",
    ),
    case(
        "missing num_tasks: stch with a warm-up",
        lambda: jaxjd.stch(warmup_steps=3),
        "num_tasks=",
        "`stch`",
    ),
    case(
        "missing num_tasks: nash_mtl that keeps its weights",
        lambda: jaxjd.nash_mtl(update_weights_every=2),
        "num_tasks=",
        "`nash_mtl`",
    ),
    case(
        "missing num_tasks: momentum_conflict_free",
        jaxjd.momentum_conflict_free,
        "num_tasks=",
        "`momentum_conflict_free`",
    ),
    *(
        case(
            f"missing params in init: {name}",
            lambda name=name: getattr(weightings, name)().init(3),
            f"`{name}`",
            "pass params",
        )
        for name in ("db_mtl", "excess_mtl", "moco")
    ),
    case("graddrop with a bad key", lambda: jaxjd.graddrop(key=0.5), "`key` must be", "got float"),
    case(
        "graddrop with no function",
        lambda: jaxjd.graddrop(f=0.5),
        "`f` must be a function",
        "got 0.5",
    ),
    case("key: a float", lambda: weightings.pcgrad(key=0.5), "`key` must be", "got float"),
    case("key: a string", lambda: weightings.random(key="seed"), "`key` must be", "got str"),
    case("key: None", lambda: weightings.random(key=None), "`key` must be", "got NoneType"),
    case("key: negative", lambda: weightings.gradvac(key=-1), "`key` must be >= 0", "got -1"),
    case(
        "key: a float array",
        lambda: weightings.gradvac(key=jnp.ones(2)),
        "`key` must be an int or a jax.random.key",
        r"got float32\[2\]",
    ),
    case(
        "key: raw data of another size",
        lambda: weightings.pcgrad(key=jnp.ones(3, "uint32")),
        "`key` must be",
        r"uint32\[3\]",
    ),
    case(
        "key: several keys",
        lambda: weightings.pcgrad(key=jax.random.split(jax.random.key(0), 3)),
        "`key` must be",
        r"\[3\]",
    ),
    case(
        "key: several raw keys",
        lambda: weightings.pcgrad(key=jnp.ones((3, 2), "uint32")),
        "`key` must be",
        r"uint32\[3,\s?2\]",
    ),
]

# Hyper-parameters out of range: factory, bad values, wanted range.

UPGRAD = weightings.upgrad()
KRUM = functools.partial(weightings.krum, n_byzantine=1)
MOMENTUM = functools.partial(jaxjd.momentum_conflict_free, num_tasks=3)
RANGES = [
    ("cagrad", weightings.cagrad, {"c": (-0.1, -1)}, ">= 0"),
    ("gradvac", weightings.gradvac, {"beta": (-0.1, 1.1)}, ">= 0 and <= 1"),
    ("gradvac", weightings.gradvac, {"eps": (-1e-8,)}, ">= 0"),
    ("excess_mtl", weightings.excess_mtl, {"robust_step_size": (0.0, -1.0)}, "> 0"),
    ("excess_mtl", weightings.excess_mtl, {"n_warmup_steps": (-1,)}, ">= 0"),
    ("sdmgrad", weightings.sdmgrad, {"lr": (0.0, -1.0)}, "> 0"),
    ("sdmgrad", weightings.sdmgrad, {"momentum": (-0.1, 1.0)}, ">= 0 and < 1"),
    ("sdmgrad", weightings.sdmgrad, {"lambda_": (-0.1,)}, ">= 0"),
    ("sdmgrad", weightings.sdmgrad, {"n_iter": (0, -1)}, ">= 1"),
    ("modo", weightings.modo, {"gamma": (0.0, -1.0)}, "> 0"),
    ("modo", weightings.modo, {"rho": (-0.1,)}, ">= 0"),
    ("cr_mogm", lambda alpha: weightings.cr_mogm(UPGRAD, alpha), {"alpha": (-0.1, 1.1)}, "<= 1"),
    ("krum", KRUM, {"n_byzantine": (-1,)}, ">= 0"),
    ("krum", KRUM, {"n_selected": (0, -1)}, ">= 1"),
    ("trimmed_mean", jaxjd.trimmed_mean, {"trim_number": (-1,)}, ">= 0"),
    ("stch", weightings.stch, {"mu": (0.0, -1.0)}, "> 0"),
    ("stch", weightings.stch, {"warmup_steps": (0, -1)}, ">= 1"),
    ("moco", weightings.moco, {"beta": (0.0, 1.1)}, "> 0 and <= 1"),
    ("moco", weightings.moco, {"gamma": (0.0, -0.1)}, "> 0"),
    (
        "moco",
        weightings.moco,
        {"beta_sigma": (-0.1,), "gamma_sigma": (-0.1,), "rho": (-0.1,), "max_norm": (-0.1,)},
        ">= 0",
    ),
    ("db_mtl", weightings.db_mtl, {"beta": (-0.1, 1.0)}, ">= 0 and < 1"),
    ("db_mtl", weightings.db_mtl, {"beta_sigma": (-0.1,)}, ">= 0"),
    ("gradnorm", weightings.gradnorm, {"alpha": (-0.1,)}, ">= 0"),
    ("gradnorm", weightings.gradnorm, {"lr": (0.0, -0.1)}, "> 0"),
    ("fairgrad", weightings.fairgrad, {"alpha": (-0.1, -1)}, ">= 0"),
    ("nash_mtl", weightings.nash_mtl, {"max_norm": (-0.1,)}, ">= 0"),
    ("nash_mtl", weightings.nash_mtl, {"update_weights_every": (0, -1)}, ">= 1"),
    ("pcd", weightings.pcd, {"tau": (-0.1, 1.1)}, ">= 0 and <= 1"),
    ("pcd", weightings.pcd, {"beta": (-0.1, 1.0)}, ">= 0 and < 1"),
    ("pcd", weightings.pcd, {"eps": (-1e-8,)}, ">= 0"),
    ("momentum_conflict_free", MOMENTUM, {"b1": (-0.1, 1.0), "b2": (-0.1, 1.0)}, ">= 0 and < 1"),
    ("momentum_conflict_free", MOMENTUM, {"eps": (-0.1,)}, ">= 0"),
    ("projector", linalg.regularized_projector, {"norm_eps": (-1.0,)}, ">= 0"),
    ("projector", linalg.regularized_projector, {"reg_eps": (-1.0,)}, ">= 0"),
]
SCALARS = [
    ("cagrad", weightings.cagrad, "c"),
    ("gradvac", weightings.gradvac, "beta"),
    ("gradvac", weightings.gradvac, "eps"),
    ("excess_mtl", weightings.excess_mtl, "robust_step_size"),
    ("sdmgrad", weightings.sdmgrad, "lr"),
    ("sdmgrad", weightings.sdmgrad, "momentum"),
    ("sdmgrad", weightings.sdmgrad, "lambda_"),
    ("modo", weightings.modo, "gamma"),
    ("modo", weightings.modo, "rho"),
    ("stch", weightings.stch, "mu"),
    *(
        ("moco", weightings.moco, parameter)
        for parameter in ("beta", "beta_sigma", "gamma", "gamma_sigma", "rho")
    ),
    ("db_mtl", weightings.db_mtl, "beta"),
    ("db_mtl", weightings.db_mtl, "beta_sigma"),
    ("gradnorm", weightings.gradnorm, "alpha"),
    ("gradnorm", weightings.gradnorm, "lr"),
    ("fairgrad", weightings.fairgrad, "alpha"),
    ("nash_mtl", weightings.nash_mtl, "max_norm"),
    ("pcd", weightings.pcd, "beta"),
    ("pcd", weightings.pcd, "eps"),
    *(("momentum_conflict_free", MOMENTUM, parameter) for parameter in ("b1", "b2", "eps")),
    ("cr_mogm", lambda alpha: weightings.cr_mogm(UPGRAD, alpha), "alpha"),
    ("projector", linalg.regularized_projector, "reg_eps"),
]

HYPERPARAMETERS = [
    *(
        case(
            f"out of range: {name}({parameter}={value})",
            lambda make=make, parameter=parameter, value=value: make(**{parameter: value}),
            f"`{parameter}` must be",
            re.escape(wanted),
            f"got {value}",
        )
        for name, make, values, wanted in RANGES
        for parameter, bad in values.items()
        for value in (*bad, *((float("nan"),) if isinstance(bad[0], float) else ()))
    ),
    *(
        case(
            f"no number: {name}({parameter})",
            lambda make=make, parameter=parameter: make(**{parameter: "large"}),
            f"`{parameter}` must be a number",
            "got 'large'",
        )
        for name, make, parameter in SCALARS
    ),
    *(
        case(
            f"no scalar: {name}({parameter})",
            lambda make=make, parameter=parameter: make(**{parameter: jnp.ones(2)}),
            f"`{parameter}` must be a scalar",
            r"got float32\[2\]",
        )
        for name, make, parameter in SCALARS
    ),
    case(
        "unknown scale_mode",
        lambda: weightings.aligned_mtl(scale_mode="max"),
        "`scale_mode` must be one of",
        "'min'.*'median'.*'rmse'",
        "got 'max'",
    ),
    case(
        "unknown projection",
        lambda: weightings.moco(projection="ball"),
        "`projection` must be one of",
        "'softmax'.*'simplex'",
        "got 'ball'",
    ),
    *(
        case(
            f"update_weights_every of nash_mtl: {every!r}",
            lambda every=every: weightings.nash_mtl(update_weights_every=every),
            "`update_weights_every` must be a static int",
            f"got {kind}",
        )
        for every, kind in ((2.0, "float"), (True, "bool"), (jnp.ones((), int), "int32"))
    ),
    case(
        "one entry of tau out of range",
        lambda: weightings.pcd(tau=[0.5, -0.1]),
        r"`tau\[1\]` must be >= 0 and <= 1",
        "got -0.1",
    ),
    case(
        "tau of another rank",
        lambda: weightings.pcd(tau=jnp.ones((2, 1))),
        "`tau` must be a vector",
        r"got shape \(2, 1\)",
    ),
    case("tau that is no number", lambda: weightings.pcd(tau="large"), "`tau` must be", "'large'"),
    case(
        "tau of another length, at init",
        lambda: weightings.pcd(tau=[0.5, 0.5, 0.5]).init(3),
        "`tau` has 3 entries",
        "2 secondary tasks",
    ),
    case(
        "weights of another length, at init",
        lambda: weightings.constant([0.5, 0.5, 0.5]).init(2),
        "`weights` has 3 entries, but there are 2 tasks",
    ),
    case(
        "tau of another length",
        lambda: weigh(weightings.pcd(tau=[0.5, 0.5, 0.5]), EYE, weightings.pcd().init(3)),
        "`tau` has 3 entries",
        "2 secondary tasks",
    ),
    case(
        "leak of another rank",
        lambda: jaxjd.graddrop(leak=0.5),
        "`leak` must be a vector",
        r"got shape \(\)",
    ),
    case(
        "leak of another length",
        lambda: update(jaxjd.graddrop(leak=[0.5, 0.5])),
        "`leak` has 2 entries",
        "3 tasks",
    ),
    case(
        "leak of another length than num_tasks",
        lambda: jaxjd.graddrop(leak=[0.5, 0.5], num_tasks=3),
        "`leak` has 2 entries",
        "3 tasks",
    ),
    case(
        "too few tasks to trim",
        lambda: update(jaxjd.trimmed_mean(2)),
        r"trimmed_mean\(trim_number=2\) needs at least 5 tasks",
        "found 3",
    ),
    case(
        "too small a num_tasks to trim",
        lambda: jaxjd.trimmed_mean(2, num_tasks=4),
        r"trimmed_mean\(trim_number=2\) needs at least 5 tasks",
        "found 4",
    ),
    case(
        "too few tasks for krum",
        lambda: weigh(weightings.krum(1)),
        r"krum\(n_byzantine=1, n_selected=1\) needs at least 4 tasks",
        "found 3",
    ),
    *(
        case(
            f"pref_vector of another rank: {name}",
            lambda name=name: getattr(weightings, name)(pref_vector=jnp.ones((3, 1))),
            "`pref_vector` must be a vector",
            r"got shape \(3, 1\)",
        )
        for name in ("aligned_mtl", "conflict_free", "dualproj", "sdmgrad", "upgrad")
    ),
    *(
        case(
            f"pref_vector of another length: {name}",
            lambda name=name: weigh(getattr(weightings, name)(pref_vector=[0.5, 0.5])),
            "`pref_vector` has 2 entries",
            "3 tasks",
        )
        for name in ("aligned_mtl", "conflict_free", "dualproj", "upgrad")
    ),
    case(
        "pref_vector of another length: sdmgrad",
        lambda: weigh(
            weightings.sdmgrad(pref_vector=[0.5, 0.5]), EYE, weightings.sdmgrad().init(3)
        ),
        "`pref_vector` has 2 entries",
        "3 tasks",
    ),
    case(
        "constant weights of another rank",
        lambda: weightings.constant(1.0),
        "`weights` must be a vector",
        r"got shape \(\)",
    ),
    case(
        "constant weights of another length",
        lambda: weigh(weightings.constant([1.0, 2.0])),
        "`weights` has 2 entries",
        "3 tasks",
    ),
    case(
        "initial weights of another length",
        lambda: weightings.cr_mogm(UPGRAD, initial_weights=[0.5, 0.5]).init(3),
        r"`initial_weights` must have shape \(3,\)",
        r"got \(2,\)",
    ),
    case(
        "initial weights of another rank",
        lambda: weightings.cr_mogm(UPGRAD, initial_weights=jnp.ones((3, 1))).init(3),
        r"`initial_weights` must have shape \(3,\)",
        r"got \(3, 1\)",
    ),
]

# Statistics and states

LOSSES = jnp.ones(3)
NASH_EVERY_2 = weightings.nash_mtl(update_weights_every=2)
READS_JACOBIAN = {
    "db_mtl": weightings.db_mtl,
    "excess_mtl": weightings.excess_mtl,
    "moco": weightings.moco,
}


def update_task(task, gradient=NO_TASK_AXIS):
    """Traces an update of M-ConFIG; a Python number stays one."""
    state = MOMENTUM().init(PARAMS)
    if isinstance(task, jax.Array):
        return trace(lambda g, s, t: MOMENTUM().update(g, s, task=t), gradient, state, task)
    return trace(lambda g, s: MOMENTUM().update(g, s, task=task), gradient, state)


STATS = [
    *(
        case(
            f"{kind}: {name}",
            lambda make=make, stat=stat: weigh(make(), stat, make().init(3, PARAMS)),
            r"ramian` must be",
            message,
            re.escape(f"got {stat.dtype}[{','.join(map(str, stat.shape))}]"),
        )
        for name, make in (("upgrad", weightings.upgrad), ("modo", weightings.modo))
        for kind, stat, message in (
            ("Gramian that is not square", jnp.ones((3, 2)), r"shape \(m, m\)"),
            ("Gramian of another rank", jnp.ones(3), r"shape \(m, m\)"),
            ("empty Gramian", jnp.ones((0, 0)), r"shape \(m, m\)"),
            ("integer Gramian", jnp.ones((3, 3), int), "floating point"),
        )
    ),
    case(
        "generalized Gramian that is not a palindrome",
        lambda: weigh(weightings.flattening(UPGRAD), jnp.ones((2, 3, 2, 3))),
        r"\(m1, .., mk, mk, .., m1\)",
        r"got float32\[2,3,2,3\]",
    ),
    case(
        "generalized Gramian of odd rank",
        lambda: weigh(weightings.flattening(UPGRAD), jnp.ones((2, 3, 2))),
        r"\(m1, .., mk, mk, .., m1\)",
        r"got float32\[2,3,2\]",
    ),
    *(
        case(
            f"state of another number of tasks: {name}",
            lambda make=make: weigh(make(), EYE, make().init(2)),
            r"2 entries.*3 tasks|\(2,\).*\(3,\)",
        )
        for name, make in NEEDS_NUM_TASKS.items()
        if name not in READS_JACOBIAN
    ),
    *(
        case(
            f"state of another number of tasks: {name}",
            lambda make=make: weigh(make(), JACOBIAN, make().init(2, PARAMS)),
            "2 entries",
            "3 tasks",
        )
        for name, make in READS_JACOBIAN.items()
    ),
    *(
        case(
            f"state of other parameters: {name}",
            lambda make=make: weigh(make(), JACOBIAN, make().init(3, PARAMS["a"]), losses=LOSSES),
            f"`{name}`",
            r"expected shapes \[\(3, 2\), \(3, 2, 2\)\]",
            r"found \[\(3, 2\), \(3, 2, 2\), \(3, 3\)\]",
        )
        for name, make in READS_JACOBIAN.items()
    ),
    case(
        "state of another number of tasks: stch",
        lambda: weigh(weightings.stch(warmup_steps=2), EYE, weightings.stch(1.0, 2).init(2)),
        "2 entries",
        "3 tasks",
    ),
    case(
        "state of another number of tasks: nash_mtl",
        lambda: weigh(NASH_EVERY_2, EYE, NASH_EVERY_2.init(2)),
        "2 entries",
        "3 tasks",
    ),
    *(
        case(
            f"losses: missing for {name}",
            lambda name=name: update(getattr(jaxjd, name)(num_tasks=3)),
            f"`{name}` reads the losses",
            "losses=",
        )
        for name in ("db_mtl", "gradnorm")
    ),
    *(
        case(
            f"losses: {kind} for {name}",
            lambda name=name, losses=losses: update(
                getattr(jaxjd, name)(num_tasks=3), losses=losses
            ),
            *message,
        )
        for name in ("db_mtl", "gradnorm", "moco")
        for kind, losses, message in (
            ("two", jnp.ones(2), ("`losses` has 2 entries", "3 tasks")),
            ("none in a dict", {}, ("`losses` has 0 entries", "3 tasks")),
            (
                "a dict of too many",
                {"fit": jnp.ones(()), "size": jnp.ones(3)},
                ("`losses` has 4 entries", "3 tasks"),
            ),
            (
                "integers",
                {"fit": jnp.ones(2), "size": jnp.arange(3)[0]},
                ("`losses`, leaf 'size'", "floating point", r"found int32\[\]"),
            ),
        )
    ),
    case(
        "task: too large",
        lambda: update_task(3),
        "`task` must be < 3, the number of tasks",
        "got 3",
    ),
    case("task: negative", lambda: update_task(-1), "`task` must be >= 0", "got -1"),
    case("task: a float", lambda: update_task(0.0), "`task` must be a static int", "got float"),
    case(
        "task: several",
        lambda: update_task(jnp.arange(2)),
        "`task` must be the index of one task",
        r"got int32\[2\]",
    ),
    case(
        "task: a traced float",
        lambda: update_task(jnp.ones(())),
        "`task` must be the index of one task",
        r"got float32\[\]",
    ),
    case(
        "task with a Jacobian",
        lambda: update_task(0, JACOBIAN),
        "Leaf 'a/b'",
        r"expected shape \(2,\) in the gradient of one task",
        r"found float32\[3,2\]",
    ),
    case(
        "task with the gradient of other parameters",
        lambda: update_task(0, {"c": NO_TASK_AXIS["c"]}),
        "initialized with 3 leaves",
        "found 1",
    ),
    case(
        "momentum_conflict_free: state of other parameters",
        lambda: update(MOMENTUM(), JACOBIAN, None, {**PARAMS, "c": jnp.zeros(4)}),
        "Leaf 'c'",
        r"expected shape \(3, 4\) in the Jacobian",
        r"found float32\[3,3\]",
    ),
    *(
        case(
            f"another number of tasks than num_tasks: {name}",
            lambda aggregator=aggregator: update(aggregator, TWO, losses=jnp.ones(2)),
            "num_tasks=3",
            "has 2 rows",
        )
        for name, aggregator in (
            ("db_mtl", jaxjd.db_mtl(num_tasks=3)),
            ("graddrop", jaxjd.graddrop(num_tasks=3)),
            ("moco", jaxjd.moco(num_tasks=3)),
            ("momentum_conflict_free", jaxjd.momentum_conflict_free(num_tasks=3)),
            ("trimmed_mean", jaxjd.trimmed_mean(0, num_tasks=3)),
        )
    ),
    case(
        "state of another number of groups",
        lambda: trace(
            jaxjd.grouped(UPGRAD, labels.by_layer, num_tasks=3).update,
            JACOBIAN,
            jaxjd.grouped(UPGRAD, labels.together, num_tasks=3).init(PARAMS),
            PARAMS,
        ),
        "1 groups",
        r"\['a', 'root'\]",
    ),
    *(
        case(
            f"cross_jacobians: {kind}",
            lambda extra=extra: update(jaxjd.modo(num_tasks=3), **extra),
            "cross_jacobians=",
            f"got {found}",
        )
        for kind, extra, found in (
            ("missing", {}, "NoneType"),
            ("a single Jacobian", {"cross_jacobians": JACOBIAN}, "dict"),
            ("three of them", {"cross_jacobians": (JACOBIAN,) * 3}, "tuple"),
        )
    ),
    case(
        "combine_pair without a pair",
        lambda: jaxjd.weighted(weightings.mean(), combine_pair=True),
        "`combine_pair` is for a CrossGramianWeighting",
        "got Weighting",
    ),
    case(
        "cross_jacobians: of different structures",
        lambda: update(jaxjd.modo(num_tasks=3), cross_jacobians=(JACOBIAN, {"c": JACOBIAN["c"]})),
        "same structure",
        "'a'",
    ),
    case(
        "cross_jacobians: of different shapes",
        lambda: update(
            jaxjd.modo(num_tasks=3), cross_jacobians=(JACOBIAN, replaced(jnp.ones((3, 4))))
        ),
        "leaf 'c'",
        r"\(3, 3\) and \(3, 4\)",
    ),
    case(
        "cross_jacobians: of different numbers of tasks",
        lambda: update(jaxjd.sdmgrad(num_tasks=3), cross_jacobians=(JACOBIAN, TWO)),
        r"`cross-Gramian` must be a matrix of shape \(m, m\)",
        r"got float32\[3,2\]",
    ),
    case(
        "cross_jacobians: of another number of tasks than the Jacobian",
        lambda: update(jaxjd.modo(num_tasks=3), cross_jacobians=(TWO, TWO)),
        "3 entries",
        "2 tasks",
    ),
    case(
        "cross_jacobians: of another structure than the groups",
        lambda: update(
            jaxjd.grouped(weightings.modo(), labels.by_layer, num_tasks=3),
            cross_jacobians=(JACOBIAN, {"c": JACOBIAN["c"]}),
        ),
        "`cross_jacobians`",
        "structure",
        "'a'",
    ),
]

# Labels

LABELS = [
    case(
        "leaf without a label",
        lambda: partitioned({"a": "one"}, "one").init(PARAMS),
        "leaf 'c' has no label",
        r"\['a'\]",
    ),
    case(
        "leaf without a label: grouped",
        lambda: jaxjd.grouped(UPGRAD, {"a": "one"}).init(PARAMS),
        "leaf 'c' has no label",
    ),
    case(
        "label of no leaf",
        lambda: partitioned({"a": "one", "c": "one", "d": "one"}, "one").init(PARAMS),
        "label of 'd'",
        "no parameter leaf",
    ),
    case(
        "label without an aggregator",
        lambda: partitioned(labels.by_network, "a").init(PARAMS),
        r"labels \['c'\] have no aggregator",
        r"\['a'\]",
    ),
    case(
        "aggregator without a leaf",
        lambda: partitioned(labels.by_network, "a", "c", "d").init(PARAMS),
        r"aggregators of \['d'\] have no parameter",
        r"\['a', 'c'\]",
    ),
    case(
        "labels that are no strings",
        lambda: partitioned({"a": 1, "c": "one"}, "one").init(PARAMS),
        "Label 'a'",
        "expected a string",
        "found int",
    ),
    case(
        "rule that matches nothing",
        lambda: labels.by_rules([("^a", "one"), ("^d", "two"), ("", "rest")])(PARAMS),
        r"rule '\^d'",
        "labels no leaf",
    ),
    case(
        "rule behind a rule that takes all",
        lambda: labels.by_rules([("", "rest"), ("^a", "one")])(PARAMS),
        r"rule '\^a'",
        "labels no leaf",
    ),
    case(
        "leaf that no rule matches",
        lambda: labels.by_rules([("^a", "one")])(PARAMS),
        "leaf 'c'",
        "no rule matches",
        r"\['\^a'\]",
    ),
    case(
        "rules that are no pairs",
        lambda: labels.by_rules(["^a"]),
        "`rules` must hold pairs",
        r"got '\^a'",
    ),
    case(
        "rule with a broken expression",
        lambda: labels.by_rules([("(", "one")]),
        "`rules`",
        "invalid expression",
        r"'\('",
    ),
    *(
        case(
            f"set_to_zero for a group with a Jacobian{suffix}",
            lambda params=params: update(
                jaxjd.partition({"a": jaxjd.mean(), "c": optax.set_to_zero()}, labels.by_network),
                params=params,
            ),
            "'c' in group 'c'",
            r"\(3, 3\)",
            "needs an aggregator",
        )
        for suffix, params in (("", PARAMS), (", no params", None))
    ),
    case(
        "identity for a group with a Jacobian",
        lambda: update(
            jaxjd.partition({"a": optax.identity(), "c": jaxjd.mean()}, labels.by_network)
        ),
        "'a/b' in group 'a'",
        r"expected an update of shape \(2,\)",
        r"found \(3, 2\)",
    ),
    case(
        "a group's plain gradients for an aggregator",
        lambda: update(
            jaxjd.partition({"a": jaxjd.mean(), "c": jaxjd.mean()}, labels.by_network),
            replaced(jnp.ones(3)),
        ),
        "leaf 'c'",
        "no task axis",
    ),
]

# Engines

ENGINES = [
    case(
        "aggregated_value_and_grad: no functions",
        lambda: jaxjd.aggregated_value_and_grad({}, UPGRAD),
        "`fn` must be a function",
    ),
    case(
        "aggregated_value_and_grad: a dict with something else",
        lambda: jaxjd.aggregated_value_and_grad({"a": jnp.sum, "b": 1.0}, UPGRAD),
        r"`fn\[1\]` must be a function",
    ),
    case(
        "aggregated_value_and_grad: a factory",
        lambda: jaxjd.aggregated_value_and_grad(jnp.sum, weightings.upgrad),
        "`weighting` must be a jaxjd.Weighting or an aggregator",
    ),
    case(
        "aggregated_value_and_grad: `every` without num_tasks",
        lambda: jaxjd.aggregated_value_and_grad(jnp.sum, UPGRAD, every=2),
        "pass `num_tasks=`",
    ),
    case(
        "aggregated_value_and_grad: labels for an aggregator",
        lambda: jaxjd.aggregated_value_and_grad(jnp.sum, jaxjd.upgrad(), labels="all"),
        "`labels` and `every` are for a weighting",
    ),
    case(
        "aggregated_value_and_grad: no microbatches",
        lambda: jaxjd.aggregated_value_and_grad(jnp.sum, UPGRAD, microbatches=0),
        "`microbatches` must be >= 1",
    ),
    case(
        "aggregated_value_and_grad: microbatches of a batch that they do not divide",
        lambda: trace(
            jaxjd.aggregated_value_and_grad(lambda w, x: w * x, UPGRAD, microbatches=2).apply,
            jaxjd.AggregatedGradState((), jaxjd.AggregatorState((), ())),
            jnp.ones(3),
            jnp.ones(3),
        ),
        "expected a first axis that `microbatches`=2 divides",
    ),
    case(
        "aggregated_value_and_grad: microbatches without a batch",
        lambda: trace(
            jaxjd.aggregated_value_and_grad(lambda w: w, UPGRAD, microbatches=2).apply,
            jaxjd.AggregatedGradState((), jaxjd.AggregatorState((), ())),
            jnp.ones(3),
        ),
        "needs arguments with a batch axis",
    ),
    case(
        "aggregated_value_and_grad: microbatches by products",
        lambda: jaxjd.aggregated_value_and_grad(jnp.sum, UPGRAD, microbatches=2, form="products"),
        "takes a batch whole",
    ),
    case(
        "aggregated_value_and_grad: one batch for a weighting of two",
        lambda: trace(
            jaxjd.aggregated_value_and_grad(lambda p: p["c"], weightings.modo(), num_tasks=3).apply,
            jaxjd.AggregatedGradState((), jaxjd.modo(num_tasks=3).init(PARAMS)),
            PARAMS,
        ),
        "cross_args",
    ),
    case(
        "integer parameter",
        lambda: engine(norms, {**PARAMS, "step": jnp.zeros((), int)}),
        "leaf 'step'",
        "floating point",
        r"found int32\[\]",
    ),
    case(
        "parameter that is no array",
        lambda: jaxjd.value_and_jacobian(norms)({**PARAMS, "activation": jnp.tanh}),
        "leaf 'activation'",
        "floating point",
    ),
    case(
        "integer loss",
        lambda: engine(lambda p: {"fit": jnp.sum(p["c"]).astype(int), "size": jnp.sum(p["c"])}),
        "Loss 'fit'",
        "floating point",
        r"found int32\[\]",
    ),
    case(
        "complex loss",
        lambda: engine(lambda p: jnp.sum(p["c"]).astype(complex)),
        "Loss '<root>'",
        r"found complex64\[\]",
    ),
    case("no losses", lambda: engine(lambda p: {}), "no losses"),
    case("forgotten return", lambda: engine(lambda p: None), "no losses"),
    case("empty vector of losses", lambda: engine(lambda p: jnp.zeros(0)), "no losses"),
    case(
        "auxiliary output without has_aux",
        lambda: engine(lambda p: (norms(p), {"step": jnp.arange(2)})),
        "Loss '1/step'",
        "has_aux=True",
    ),
    case(
        "argnums out of range",
        lambda: engine(norms, argnums=1),
        "`argnums` has 1",
        "1 positional arguments",
    ),
    case(
        "negative argnums out of range",
        lambda: engine(norms, argnums=(0, -2)),
        "`argnums` has -2",
        "1 positional arguments",
    ),
    case("argnums that is no int", lambda: engine(norms, argnums=0.0), "`argnums`", "got 0.0"),
    case("no argnums", lambda: engine(norms, argnums=()), "`argnums`"),
    case(
        "chunk_size of zero",
        lambda: engine(norms, chunk_size=0),
        "`chunk_size` must be >= 1",
        "got 0",
    ),
    case(
        "chunk_size that is no int",
        lambda: engine(norms, chunk_size=1.5),
        "`chunk_size` must be a static int",
        "got float",
    ),
    case("unknown form", lambda: engine(norms, form="banana"), "`form`", "got 'banana'"),
    *(
        case(
            f"form without a Jacobian for {name}",
            lambda w=w: jaxjd.aggregated_value_and_grad(norms, w, num_tasks=2, form="products"),
            "form='products' holds no Jacobian",
            "got (JacobianWeighting|CrossGramianWeighting|Aggregator)",
        )
        for name, w in (
            ("a weighting of the Jacobian", weightings.moco()),
            ("a weighting of two batches", weightings.modo()),
            ("an aggregator", jaxjd.upgrad()),
        )
    ),
    case(
        "form without a Jacobian",
        lambda: engine(norms, form="products"),
        "got 'products', which holds no Jacobian",
        "value_and_gramian",
    ),
    case(
        "values in a function that is traced",
        lambda: engine(lambda p: norms(p) if jnp.sum(p["c"]) > 0 else -norms(p), form="auto"),
        "needs values",
        "form='dense'",
    ),
    case(
        "losses that cannot be batched",
        lambda: engine(lambda p: norms(p) * on_host(jnp.sum(p["c"]))),
        "cannot be batched",
        "chunk_size=1",
    ),
    case(
        "unknown form of a Gramian",
        lambda: jaxjd.value_and_gramian(norms, form="jvp"),
        "`form` must be one of",
        "products",
        "got 'jvp'",
    ),
    case("chunk_size of a Gramian", lambda: gramians(chunk_size=0), "`chunk_size`", "got 0"),
    case("argnums of a Gramian", lambda: gramians(argnums=3), "`argnums` has 3"),
    case(
        "labels of a Gramian that miss a leaf",
        lambda: gramians(labels={"a": "trunk"}),
        "leaf 'c' has no label",
        "'a'",
    ),
    case(
        "too few weights for a pullback",
        lambda: gramians(weights=jnp.ones(3)),
        "`weights` has 3 entries",
        "2 tasks",
    ),
    case(
        "weights of a pullback that are no vector",
        lambda: gramians(weights=jnp.ones((2, 2)), form="products"),
        r"`weights` must have shape \(m,\)",
        r"got float32\[2,2\]",
    ),
    case(
        "weights for other groups",
        lambda: gramians(weights={"trunk": jnp.ones(2)}, labels={"a": "trunk", "c": "head"}),
        "one entry per group",
        "'head', 'trunk'",
        "found .'trunk'.",
    ),
    case(
        "too few weights for a group",
        lambda: gramians(weights={"all": jnp.ones(1)}, labels="all"),
        r"`weights\['all'\]` has 1 entries",
    ),
    case(
        "no batch",
        lambda: per_example(lambda w: w),
        "no batch",
    ),
    case(
        "batch leaves that disagree",
        lambda: per_example(lambda w, x, y: w, jnp.ones((3, 2)), {"y": jnp.ones(4)}),
        "Batch leaf '1/y'",
        "size 3 as in leaf '0'",
        r"found shape \(4,\)",
    ),
    case(
        "batch leaf without an axis",
        lambda: per_example(lambda w, x, key: w, jnp.ones(3), jnp.ones(())),
        "Batch leaf '1'",
        "leading batch axis",
        r"found float32\[\]",
    ),
    case(
        "loss of an example that is no scalar",
        lambda: per_example(lambda w, x: w * x, jnp.ones((3, 2))),
        "loss of an example must be a scalar",
        r"found float32\[2\]",
    ),
    case(
        "loss of an example with auxiliary output",
        lambda: per_example(lambda w, x: (w * x, x), jnp.ones(3)),
        "loss of an example must be a scalar",
        "has_aux=True",
    ),
    case(
        "loss of a task that is no scalar",
        lambda: trace(jaxjd.per_task_value_and_gramian(lambda w, x: w * x), 1.0, jnp.ones((3, 2))),
        "loss of a task must be a scalar",
        r"found float32\[2\]",
    ),
    case(
        "integer loss of an example",
        lambda: per_example(lambda w, x: x, jnp.arange(3)),
        "floating point",
        r"found int32\[\]",
    ),
    case(
        "integer parameter of a loss per example",
        lambda: per_example(lambda w, x: 1.0 * w * x, jnp.ones(3), params=jnp.arange(2)),
        "floating point",
        r"found int32\[2\]",
    ),
    case(
        "form of a loss per example",
        lambda: per_example(lambda w, x: w * x, jnp.ones(3), form="sparse"),
        "`form`",
        "got 'sparse'",
    ),
    *(
        case(
            f"{what} for a bound on gradients",
            lambda value=value: jaxjd.per_example_value_and_clipped_grad(norms, value),
            "`clip_norm` must be",
            wanted,
            f"got {found}",
        )
        for what, value, wanted, found in (
            ("zero", 0.0, "> 0", "0.0"),
            ("a number below zero", -1, "> 0", "-1"),
            ("NaN", float("nan"), "> 0", "nan"),
            ("a string", "1", "a number", "'1'"),
            ("a vector", jnp.ones(2), "a scalar", r"float32\[2\]"),
        )
    ),
    *(
        case(
            f"form of an explanation: {explain.__name__}",
            lambda explain=explain: explain(norms, PARAMS, form="sparse"),
            "`form`",
            "got 'sparse'",
        )
        for explain in (jaxjd.diagnostics.explain_jacobian, jaxjd.diagnostics.explain_step)
    ),
    case(
        "explanation of a step that is no function",
        lambda: jaxjd.diagnostics.explain_step(norms, PARAMS, step=3),
        "`step` must be a function",
        "got int",
    ),
    case(
        "stack_tasks of another structure",
        lambda: jaxjd.stack_tasks([jnp.ones(3)], {"a": 1.0}),
        "start with the structure of the losses",
        "'a'",
    ),
    case(
        "stack_tasks of other shapes",
        lambda: jaxjd.stack_tasks({"w": jnp.ones((4, 3))}, jnp.ones(2)),
        "leaf 'w'",
        r"starts with the losses' \(2,\)",
        r"found \(4, 3\)",
    ),
    case(
        "heads_params of another structure",
        lambda: mtl({"one": head, "two": head}, {"one": 1.0}),
        "`heads_params`",
        "'two'",
        r"found PyTreeDef\(\{'one': \*\}\)",
    ),
    case(
        "heads_params in a list for a dict",
        lambda: mtl({"one": head}, [1.0]),
        "`heads_params`",
        "expected .*'one'",
        r"found PyTreeDef\(\[\*\]\)",
    ),
    case(
        "no heads",
        lambda: mtl([], []),
        "`heads_fn` must be a function or a list, tuple or dict",
        r"got \[\]",
    ),
    case(
        "heads that are no functions", lambda: mtl([1.0], [1.0]), "`heads_fn` must be", "got .1.0"
    ),
    case(
        "head with a vector loss",
        lambda: mtl([head, lambda v, f: v * f], [1.0, 1.0]),
        "Head 1",
        "scalar loss",
        r"found float32\[2\]",
    ),
    case(
        "head with an integer loss",
        lambda: mtl([lambda v, f: jnp.zeros((), int)], [1.0]),
        "Head 0",
        "floating point scalar",
        r"found int32\[\]",
    ),
    case(
        "features that are all integers",
        lambda: trace(
            jaxjd.mtl_value_and_jacobian(lambda w: jnp.arange(2), [head]), jnp.zeros(2), [1.0]
        ),
        "`trunk_fn`",
        "floating point",
        r"found int32\[2\]",
    ),
    case(
        "one function of the heads without losses",
        lambda: mtl(lambda v, f: [], 1.0),
        "no losses",
    ),
    case(
        "integer parameter of a head",
        lambda: mtl([head], [{"v": jnp.ones(2), "step": jnp.zeros((), int)}]),
        "leaf '0/step'",
        r"found int32\[\]",
    ),
    case(
        "integer parameter of a trunk",
        lambda: mtl([head], [1.0], {"w": jnp.ones(2), "step": jnp.zeros((), int)}),
        "leaf 'step'",
        r"found int32\[\]",
    ),
    case(
        "chunk_size of zero for heads",
        lambda: mtl([head], [1.0], chunk_size=0),
        "`chunk_size`",
        "got 0",
    ),
]

SOLVERS = [
    case(
        "integers onto the simplex",
        lambda: linalg.project_onto_simplex(jnp.arange(3)),
        "`x` must be floating point",
        r"got int32\[3\]",
    ),
    case(
        "a scalar onto the simplex",
        lambda: linalg.project_onto_simplex(jnp.asarray(1.0)),
        r"shape \(..., m\)",
        r"got float32\[\]",
    ),
    case(
        "minimum norm of no square",
        lambda: trace(linalg.min_norm_weights, jnp.ones((3, 2))),
        "`G` must be a matrix",
        r"got float32\[3,2\]",
    ),
    case(
        "rows of another length onto the dual cone",
        lambda: trace(linalg.project_onto_dual_cone, jnp.ones((4, 2)), EYE),
        "`U` has 2 entries",
        "3 tasks",
    ),
    case(
        "a scalar onto the dual cone",
        lambda: trace(linalg.project_onto_dual_cone, jnp.ones(()), EYE),
        r"`U` must have shape \(..., m\)",
        r"got float32\[\]",
    ),
]

# States, functions and numbers of the wrong kind

LINKS = [
    *(
        case(
            f"factory instead of a transformation: {link.__name__}",
            lambda link=link, rest=rest: link(optax.adam, *rest),
            "`tx` must be an optax transformation",
            "called first",
            "found function",
        )
        for link, rest in (
            (jaxjd.per_task, (2,)),
            (jaxjd.ensure_aggregated, ()),
            (jaxjd.multi_steps, (2, 2)),
            (jaxjd.skip_if_not_finite, ()),
        )
    ),
    case(
        "subset: more present tasks than tasks",
        lambda: subset(UPGRAD, num_tasks=2),
        "`num_present` must be <= 2, the number of tasks, got 3",
    ),
    *(
        case(
            f"subset: {name}",
            lambda given=given: subset(given),
            "`weighting` must be a jaxjd.Weighting, a jaxjd.Scalarizer, or a function of one "
            "argument `tasks`",
            f"got {kind}",
        )
        for name, given, kind in (
            ("a factory", weightings.upgrad, "function"),
            ("an aggregator for a number of tasks", jaxjd.upgrad(), "Aggregator"),
        )
    ),
    case(
        "subset: a function that returns something else",
        lambda: subset(lambda tasks: weightings.upgrad),
        "must return a jaxjd.Weighting, an aggregator or a jaxjd.Scalarizer, got function",
    ),
    *(
        case(
            f"subset: numbers of all tasks in {name}",
            run,
            "`subset` makes the method for 6 tasks",
            "lambda tasks: jaxjd.weightings.upgrad",
            f"`{argument}`",
        )
        for name, argument, run in (
            (
                "upgrad",
                "pref_vector",
                lambda: subset(weightings.upgrad(pref_vector=jnp.ones(5))).init(PARAMS),
            ),
            ("constant", "weights", lambda: subset(weightings.constant([1.0] * 5)).init(PARAMS)),
            ("the scalarizer constant", "weights", lambda: subset(scalarizers.constant([1.0] * 5))),
        )
    ),
    case(
        "subset: a state with another axis than tasks",
        lambda: subset(
            jaxjd.Weighting(lambda m, params=None: jnp.zeros(m * (m - 1)), UPGRAD.update)
        ).init(PARAMS),
        "State leaf 'weighting'",
        r"found the shape \(20,\) for 5 tasks and \(30,\) for 6",
    ),
    case(
        "subset: a state with an entry per task in its structure",
        lambda: subset(
            jaxjd.Weighting(lambda m, params=None: [jnp.zeros(())] * m, UPGRAD.update)
        ).init(PARAMS),
        "structure does not depend on the number of tasks",
    ),
    case(
        "subset: no tasks",
        lambda: update(subset(UPGRAD)),
        r"`tasks` must be the indices of the 3 tasks of the step, integers of shape \(3,\)",
        "got NoneType",
    ),
    case(
        "subset: a mask",
        lambda: update(subset(UPGRAD), tasks=jnp.ones(5, bool)),
        r"got bool\[5\]",
    ),
    case(
        "subset: a task twice",
        lambda: subset(UPGRAD).update(JACOBIAN, subset(UPGRAD).init(PARAMS), tasks=[0, 1, 0]),
        r"`tasks` must be different integers from 0 to 4, got \[0, 1, 0\]",
    ),
    case(
        "subset: rows of other tasks",
        lambda: update(subset(UPGRAD, num_present=2), tasks=jnp.arange(2)),
        "num_present=2, but the Jacobian has 3 rows",
    ),
    case(
        "subset: the state of another number of tasks",
        lambda: subset(UPGRAD).update(
            JACOBIAN, subset(UPGRAD, num_tasks=4).init(PARAMS), tasks=[0, 1, 2]
        ),
        r"State leaf 'weights': expected the shape \(5,\) for 5 tasks, found \(4,\)",
    ),
    case(
        "subset: the state of something else",
        lambda: subset(UPGRAD).update(JACOBIAN, (), tasks=[0, 1, 2]),
        "state of `subset` must be what its `init` returns",
    ),
    case(
        "subset: losses of all tasks for a scalarizer",
        lambda: subset(scalarizers.mean()).apply(jnp.ones(5), (), tasks=[0, 1, 2]),
        "`losses` has 5 entries, but there are 3 tasks",
    ),
    case(
        "subset: a scalarizer for another number of tasks",
        lambda: subset(scalarizers.mean()).init(3),
        "made with num_tasks=5, got 3",
    ),
    case(
        "per_task without tasks",
        lambda: jaxjd.per_task(optax.clip(1.0), 0),
        "`num_tasks` must be >= 1",
        "got 0",
    ),
    case(
        "number of tasks of the link",
        lambda: update(jaxjd.per_task(optax.clip(1.0), 2)),
        "`the Jacobian` has 3 entries, but there are 2 tasks",
    ),
    case(
        "gradient for a link",
        lambda: update(jaxjd.per_task(optax.clip(1.0), 3), NO_TASK_AXIS),
        "leaf 'c'",
        r"found shape \(3,\)",
    ),
    case(
        "an aggregator inside of per_task",
        lambda: update(jaxjd.per_task(jaxjd.sum(), 3)),
        "leaf 'c'",
        "expected a task axis of size 2 as in leaf 'a/b'",
    ),
    case(
        "transformation that changes a shape",
        lambda: update(jaxjd.per_task(optax.stateless(lambda u, _: jax.tree.map(jnp.sum, u)), 3)),
        "leaf 'a/b'|Leaf 'a/b'",
        r"keeps the shape \(2,\)",
        r"found \(\)",
    ),
    case(
        "frozen leaf of another shape",
        lambda: update(jaxjd.freeze(), replaced(jnp.zeros((3, 5)))),
        "leaf 'c'",
        r"expected shape \(m, \*\(3,\)\) or \(3,\)",
        r"found \(3, 5\)",
    ),
    case(
        "Jacobian that no aggregator takes",
        lambda: update(optax.chain(optax.sgd(0.1), jaxjd.ensure_aggregated())),
        "leaf 'a/b'",
        r"expected the shape \(2,\)",
        r"found \(3, 2\) with a task axis",
    ),
    case(
        "Jacobian under a mask of optax",
        lambda: update(
            optax.chain(
                optax.masked(jaxjd.sum(), {"a": True, "c": False}), jaxjd.ensure_aggregated()
            )
        ),
        "leaf 'c'",
        r"expected the shape \(3,\)",
        r"found \(3, 3\)",
    ),
    case(
        "set_to_zero instead of freeze",
        lambda: update(
            optax.chain(
                optax.partition({"a": jaxjd.sum(), "c": optax.set_to_zero()}, {"a": "a", "c": "c"}),
                jaxjd.ensure_aggregated(),
            )
        ),
        "leaf 'c'",
        "jaxjd.freeze",
    ),
    case(
        "an optimizer before the aggregator",
        lambda: _update_with_broadcasting(
            jaxjd.ensure_aggregated(optax.chain(optax.adam(0.1), jaxjd.upgrad()))
        ),
        "State leaf '0/0/mu/a/b'",
        r"expected float32\[2\]",
        r"found float32\[3,2\]",
        "jaxjd.per_task",
    ),
    case(
        "updates that no parameters are there for",
        lambda: update(jaxjd.ensure_aggregated(), NO_TASK_AXIS, None),
        "`ensure_aggregated` compares",
        "pass `params`",
    ),
    case(
        "updates of another structure",
        lambda: update(jaxjd.ensure_aggregated(), {"a": NO_TASK_AXIS["a"], "d": jnp.ones(3)}),
        "leaf 'd'",
        "the leaf 'c' in its place",
    ),
    case(
        "updates that are not all there",
        lambda: update(jaxjd.ensure_aggregated(), {"a": NO_TASK_AXIS["a"]}),
        "2 leaves",
        "the parameters have 3",
    ),
    case(
        "names of extra arguments as one string",
        lambda: jaxjd.partition({"a": jaxjd.sum()}, labels.together, cut_args="noise"),
        "`cut_args` must be a sequence of names",
        "'noise'",
    ),
    case(
        "an extra argument that is cut, of another structure",
        lambda: update(
            jaxjd.partition({"all": jaxjd.sum()}, labels.together, cut_args=("noise",)),
            noise={"a": jnp.ones(3)},
        ),
        "`noise` must have the structure of the Jacobian",
    ),
    case(
        "names of dropped arguments as one string",
        lambda: jaxjd.drop_extra_args(optax.lbfgs(), "losses"),
        "`names` must be a sequence of strings",
    ),
    case(
        "no microbatches",
        lambda: jaxjd.multi_steps(jaxjd.sum(), 0, 2),
        "`k` must be >= 1",
        "got 0",
    ),
    case(
        "half a microbatch",
        lambda: jaxjd.multi_steps(jaxjd.sum(), 2.5, 2),
        "`k` must be a static int",
    ),
    case(
        "accumulated losses of another number",
        lambda: update(jaxjd.multi_steps(jaxjd.sum(), 2, 3), losses=jnp.ones(2)),
        "`losses` has 2 entries",
        "3 tasks",
    ),
    case(
        "cross_jacobians that are not accumulated",
        lambda: update(
            jaxjd.multi_steps(jaxjd.modo(num_tasks=3), 2, 3), cross_jacobians=(JACOBIAN, JACOBIAN)
        ),
        "does not accumulate",
        "cross_jacobians=True",
    ),
    case(
        "accumulated cross_jacobians that are missing",
        lambda: update(jaxjd.multi_steps(jaxjd.modo(num_tasks=3), 2, 3, cross_jacobians=True)),
        "accumulates `cross_jacobians`: pass them",
    ),
    case(
        "one cross-Jacobian to accumulate",
        lambda: update(
            jaxjd.multi_steps(jaxjd.modo(num_tasks=3), 2, 3, cross_jacobians=True),
            cross_jacobians=JACOBIAN,
        ),
        "must be a pair of Jacobians",
        "found dict",
    ),
    case(
        "Jacobian applied without an aggregator to JDTrainState",
        lambda: JDTrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1)).apply_jacobian(
            JACOBIAN
        ),
        "leaf 'a/b'",
        r"expected the shape \(2,\)",
    ),
    case(
        "parameters that their gradients overwrite",
        lambda: JDTrainState.create(
            apply_fn=None,
            params={"params": PARAMS, "_overwrite_with_gradient": {"scale": jnp.ones(1)}},
            tx=optax.sgd(0.1),
        ).apply_jacobian(JACOBIAN),
        "'_overwrite_with_gradient'",
        "Keep it out",
    ),
]


def _update_with_broadcasting(tx):
    # JAX's default, under which nothing else reports it.
    with jax.numpy_rank_promotion("allow"):
        return update(tx)


STATES = [
    *(
        case(
            f"state of another method: {name}",
            lambda make=make, stat=stat: weigh(make(), stat, (EYE,), losses=LOSSES),
            f"The state of `{name}` must be what its `init` returns",
            "State, got tuple",
        )
        for name, make, stat in (
            *(
                (name, make, EYE)
                for name, make in NEEDS_NUM_TASKS.items()
                if name not in READS_JACOBIAN
            ),
            *((name, make, JACOBIAN) for name, make in READS_JACOBIAN.items()),
            ("nash_mtl", lambda: NASH_EVERY_2, EYE),
            ("stch", lambda: weightings.stch(warmup_steps=2), EYE),
            ("random", weightings.random, EYE),
            ("pcgrad", weightings.pcgrad, EYE),
        )
    ),
    case(
        "state of the whole chain for an aggregator",
        lambda: trace(
            jaxjd.upgrad().update,
            JACOBIAN,
            optax.chain(jaxjd.upgrad(), optax.adam(1e-3)).init(PARAMS),
            PARAMS,
        ),
        "The state of an aggregator must be what its `init` returns, AggregatorState, got tuple",
    ),
    *(
        case(
            f"state of another aggregator: {name}",
            lambda aggregator=aggregator: trace(
                aggregator.update, JACOBIAN, optax.sgd(1.0, 0.9).init(PARAMS), PARAMS
            ),
            f"The state of `{name}` must be what its `init` returns",
            "got tuple",
        )
        for name, aggregator in (
            ("graddrop", jaxjd.graddrop()),
            ("grouped", jaxjd.grouped(UPGRAD, "all")),
            ("moco", jaxjd.moco(num_tasks=3)),
            ("momentum_conflict_free", jaxjd.momentum_conflict_free(num_tasks=3)),
            ("partition", jaxjd.partition({"all": jaxjd.mean()}, "all")),
        )
    ),
    *(
        case(
            f"state made with another num_tasks: {name}",
            lambda aggregator=aggregator, other=other: trace(
                aggregator.update, JACOBIAN, other.init(PARAMS), PARAMS
            ),
            "The state's `weights` must have shape",
            "another `num_tasks`",
        )
        for name, aggregator, other in (
            ("two for three", jaxjd.upgrad(num_tasks=3), jaxjd.upgrad(num_tasks=2)),
            ("none for three", jaxjd.upgrad(num_tasks=3), jaxjd.upgrad()),
            ("three for none", jaxjd.upgrad(), jaxjd.upgrad(num_tasks=3)),
            (
                "grouped, none for three",
                jaxjd.grouped(UPGRAD, "all", num_tasks=3),
                jaxjd.grouped(UPGRAD, "all"),
            ),
        )
    ),
    case(
        "state of a partition with other labels",
        lambda: trace(
            partitioned("one", "one").update,
            JACOBIAN,
            partitioned("two", "two").init(PARAMS),
            PARAMS,
        ),
        r"The state has the labels \['two'\]",
        r"aggregators for \['one'\]",
    ),
    case(
        "weighting in an optax chain",
        lambda: optax.chain(weightings.upgrad(), optax.sgd(1.0)).init(PARAMS),
        "`num_tasks` must be a static int, got dict",
        "jaxjd.weighted",
    ),
    case(
        "weighting with a state in an optax chain",
        lambda: optax.chain(weightings.gradvac(), optax.sgd(1.0)).init(PARAMS),
        "`num_tasks` must be a static int, got dict",
        "jaxjd.weighted",
    ),
    case(
        "weighting that returns a list",
        lambda: update(jaxjd.weighted(jaxjd.Weighting(UPGRAD.init, lambda *_, **__: ([1.0], ())))),
        r"Expected weights of shape \(3,\), found list",
    ),
    case(
        "Jacobian without the parameters' leaves",
        lambda: update(jaxjd.upgrad(), {}),
        "0 leaves",
        "parameters have 3",
    ),
    case(
        "parameters of another structure",
        lambda: update(jaxjd.mean(), JACOBIAN, {"a": PARAMS["a"], "d": PARAMS["c"]}),
        "leaf 'c'",
        "have the leaf 'd' in its place",
    ),
    case(
        "Jacobian of eight bits",
        lambda: jaxjd.gramian(replaced(jnp.ones((3, 3), "float8_e5m2"))),
        "leaf 'c'",
        "16, 32 or 64 bits",
        r"float8_e5m2\[3,3\]",
    ),
    case(
        "Jacobian of Booleans",
        lambda: jaxjd.gramian(replaced(jnp.ones((3, 3), bool))),
        "leaf 'c'",
        "floating point",
        r"bool\[3,3\]",
    ),
    case(
        "shapes for a Jacobian",
        lambda: jaxjd.gramian(replaced(jax.ShapeDtypeStruct((3, 3), jnp.float32))),
        "leaf 'c'",
        "expected an array",
        "found float32",
    ),
    *(
        case(
            f"weights of another kind: {kind}",
            lambda weights=weights: jaxjd.combine(weights, JACOBIAN),
            "`weights` must be real numbers",
            found,
        )
        for kind, weights, found in (
            ("complex", jnp.ones(3, complex), r"got complex64\[3\]"),
            ("Boolean", jnp.ones(3, bool), r"got bool\[3\]"),
            ("words", np.array(["a", "b", "c"]), "got <U1"),
        )
    ),
    *(
        case(
            f"vector of another kind: {name}",
            run,
            f"`{name}` must hold real numbers",
            "got complex64",
        )
        for name, run in (
            ("pref_vector", lambda: weightings.upgrad(pref_vector=[1j, 1.0])),
            ("weights", lambda: weightings.constant([1j, 1.0])),
            ("leak", lambda: jaxjd.graddrop(leak=jnp.ones(2, complex))),
            ("initial_weights", lambda: weightings.cr_mogm(UPGRAD, 0.5, jnp.ones(2, complex))),
        )
    ),
    case(
        "initial weights that are words",
        lambda: weightings.cr_mogm(UPGRAD, initial_weights="equal"),
        "`initial_weights` must be an array of numbers",
        "got 'equal'",
    ),
    case(
        "one entry of leak out of range",
        lambda: jaxjd.graddrop(leak=[0.5, 1.5, 0.0]),
        r"`leak\[1\]` must be >= 0 and <= 1",
        "got 1.5",
    ),
    case(
        "schedule of alpha that returns a vector",
        lambda: weigh(
            weightings.cr_mogm(UPGRAD, lambda count: jnp.ones(2)),
            EYE,
            weightings.cr_mogm(UPGRAD).init(3),
        ),
        "`alpha` must be a scalar",
        r"got float32\[2\]",
    ),
    case(
        "projector that was not made",
        lambda: weightings.upgrad(projector=linalg.exact_projector),
        "`projector` must be a function of",
    ),
    case(
        "projector with another result",
        lambda: weigh(weightings.upgrad(projector=lambda U, G: G[0])),
        r"`projector` must return weights of the shape \(3, 3\)",
        r"got float32\[3\]",
    ),
    case(
        "function of graddrop that changes the shape",
        lambda: update(jaxjd.graddrop(f=lambda purity: purity[..., None])),
        r"`f` must keep the shape \(2,\)",
        r"got float32\[2,1\]",
    ),
    case(
        "parameters that are no arrays",
        lambda: jaxjd.excess_mtl(num_tasks=2).init({"a": {"activation": "relu"}}),
        "leaf 'a/activation'",
        "expected an array",
        "found str",
    ),
    case(
        "unknown rescale",
        lambda: weightings.cagrad(0.5, rescale="none at all"),
        "`rescale` must be one of",
        "got 'none at all'",
    ),
    case(
        "unknown normalization",
        lambda: weightings.mgda("l1"),
        "`normalization` must be one of",
        "got 'l1'",
    ),
    case("no rules", lambda: labels.by_rules(None), "`rules` must be a sequence", "got None"),
    case(
        "default label that is no string",
        lambda: labels.by_rules([("", "all")], default=0),
        "`default` must be a label",
        "got 0",
    ),
    *(
        case(
            f"no function: {name}",
            lambda make=make: make(None),
            f"`{argument}` must be a function, got NoneType",
        )
        for name, argument, make in (
            ("value_and_jacobian", "fn", jaxjd.value_and_jacobian),
            ("value_and_gramian", "fn", jaxjd.value_and_gramian),
            ("per_example_value_and_jacobian", "fn", jaxjd.per_example_value_and_jacobian),
            ("per_example_value_and_gramian", "fn", jaxjd.per_example_value_and_gramian),
            (
                "per_example_value_and_clipped_grad",
                "fn",
                lambda f: jaxjd.per_example_value_and_clipped_grad(f, 1.0),
            ),
            (
                "mtl_value_and_jacobian",
                "trunk_fn",
                lambda f: jaxjd.mtl_value_and_jacobian(f, [head]),
            ),
            ("mtl_value_and_gramian", "trunk_fn", lambda f: jaxjd.mtl_value_and_gramian(f, [head])),
            (
                "explain_jacobian",
                "fn",
                lambda f: jaxjd.diagnostics.explain_jacobian(f, PARAMS),
            ),
            ("explain_step", "fn", lambda f: jaxjd.diagnostics.explain_step(f, PARAMS)),
        )
    ),
    *(
        case(
            f"has_aux without auxiliary output: {name}",
            run,
            "With has_aux=True the function must return a pair",
            found,
        )
        for name, run, found in (
            (
                "value_and_jacobian",
                lambda: engine(norms, has_aux=True),
                r"found float32\[2\]",
            ),
            (
                "three results",
                lambda: engine(lambda p: (norms(p), 1, 2), has_aux=True),
                "found tuple of 3",
            ),
            ("value_and_gramian", lambda: gramians(has_aux=True), r"found float32\[2\]"),
            (
                "per_example_value_and_jacobian",
                lambda: per_example(lambda w, x: w * x, jnp.ones(3), has_aux=True),
                r"found float32\[\]",
            ),
            ("mtl_value_and_jacobian", lambda: mtl([head], [1.0], has_aux=True), r"found float32"),
        )
    ),
    case(
        "complex weights for a pullback",
        lambda: gramians(weights=jnp.ones(2, complex)),
        "`weights` must be real numbers",
        r"got complex64\[2\]",
    ),
    case(
        "stack_tasks of what is no array",
        lambda: jaxjd.stack_tasks({"w": "x"}, jnp.ones(2)),
        "leaf 'w'",
        "found str",
    ),
    case(
        "complex rows onto the dual cone",
        lambda: trace(linalg.project_onto_dual_cone, jnp.ones(3, complex), EYE),
        "`U` must be real numbers",
        r"got complex64\[3\]",
    ),
    *(
        case(
            f"state of another scalarizer: {name}",
            lambda scalarizer=scalarizer: scalarizer.apply(LOSSES, ()),
            f"The state of `{name}` must be what its `init` returns",
            "got tuple",
        )
        for name, scalarizer in (
            ("dwa", scalarizers.dwa()),
            ("famo", scalarizers.famo()),
            ("random", scalarizers.random()),
            ("stch", scalarizers.stch(1.0, warmup_steps=1)),
        )
    ),
    *(
        case(f"scalarizer: {name}", run, message)
        for name, run, message in (
            ("integer losses", lambda: scalarizers.mean().apply({"a": jnp.arange(3)}, ()), "'a'"),
            ("no losses", lambda: scalarizers.mean().apply({}, ()), "no losses"),
            ("missing num_tasks", lambda: scalarizers.uw().init(), "`uw`.*num_tasks="),
            ("parameters for num_tasks", lambda: scalarizers.uw().init(PARAMS), "got dict"),
            (
                "weights of other losses",
                lambda: scalarizers.constant([1.0, 2.0]).apply(LOSSES, ()),
                "`weights` must have one entry per task",
            ),
            ("mu of zero", lambda: scalarizers.stch(0.0), "`mu` must be > 0"),
        )
    ),
]


def linear(*_, seed=0):
    return nnx.Linear(3, 3, rngs=nnx.Rngs(seed))


def call_twice(model, *args):
    """Losses of a model that changes one of its variables."""
    model.calls = nnx.Variable(jnp.zeros(()))
    return model(*args)


def nnx_losses(*args, fn=lambda model, *_: model(jnp.ones(3)), **options):
    """Traces the engine for models of nnx."""
    return nnx.eval_shape(
        lambda: nnx_engines.value_and_jacobian(fn, **options)(*(args or (linear(),)))
    )


def nnx_heads(trunk_fn, head_fn, heads, *args):
    """Traces the multi-task engine for models of nnx with two heads."""
    engine = nnx_engines.mtl_value_and_jacobian(trunk_fn, [head_fn, head_fn])
    return nnx.eval_shape(lambda: engine(linear(), heads(), *(make() for make in args)))


def nnx_step(change, *args, argnums=0, **more):
    """Traces a step that calls a function of models several times."""

    def losses(model, *_):
        change(model)
        return jnp.ones(2) * model.kernel.sum()

    def step():
        parts = 1 if more else 2
        pair = nnx_engines.aggregated_value_and_grad(
            losses, weightings.sum(), microbatches=parts, argnums=argnums
        )
        state = jaxjd.AggregatedGradState((), jaxjd.AggregatorState((), ()))
        return pair.apply(state, linear(), *(args or (jnp.ones(2),)), **more)

    return nnx.eval_shape(lambda: step()[0])


NNX = [
    case(
        "a model that is differentiated and changed, in microbatches",
        lambda: nnx_step(lambda model: model.bias.set_value(jnp.zeros(3))),
        "'bias' is differentiated, but the function changes it",
        "called several times in a step",
    ),
    case(
        "a variable that the first microbatch makes",
        lambda: nnx_step(lambda model: setattr(model, "kept", nnx.Variable(jnp.zeros(3)))),
        r"'kept': a call leaves float32\[3\] where it found nothing",
        "collect values in the auxiliary output",
    ),
    case(
        "a number of a model that is no variable, in microbatches",
        lambda: nnx_step(lambda model: setattr(model, "count", 1)),
        "attributes of a module that are no variables",
        "keep them in an nnx.Variable",
    ),
    case(
        "cross_args of a model that is not the first argument",
        lambda: nnx_step(lambda _: None, jnp.ones(2), argnums=(0, 1), cross_args=((), ())),
        "`argnums` must be 0",
    ),
    case(
        "cross_args that are not laid out as the batch of a model",
        lambda: nnx_step(lambda _: None, jnp.ones(2), cross_args=((), ())),
        "must be laid out as the arguments after the first",
    ),
    case(
        "cross_args with another model",
        lambda: nnx_step(
            lambda _: None, linear(), cross_args=[(linear(seed=1),), (linear(seed=2),)]
        ),
        "A module in `cross_args` must be the one that the call has there",
    ),
    case(
        "a model with statistics, whole",
        lambda: engine(
            lambda model: model(jnp.ones((2, 3)))[0], nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        ),
        "leaf 'mean'",
        "expected an nnx.Param",
        "found BatchStat",
        r"`jaxjd\.integrations\.nnx\.value_and_jacobian`",
        r"nnx\.split",
    ),
    case(
        "a model with a random stream, whole",
        lambda: engine(lambda model: model(jnp.ones(3)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
        "leaf 'rngs/count'",
        "found RngCount",
        r"nnx\.split",
    ),
    case(
        "a method of a model",
        lambda: nnx_losses(fn=linear().__call__),
        "`fn` is the method Linear.__call__ of a module",
        "Pass Linear.__call__",
    ),
    case(
        "a filter that selects nothing", lambda: nnx_losses(wrt=nnx.BatchStat), "`wrt` selects no"
    ),
    case("argnums of a model out of range", lambda: nnx_losses(argnums=2), "`argnums` has 2"),
    case("argnums of a model that is no int", lambda: nnx_losses(argnums="0"), "`argnums`", "'0'"),
    case("argnums with an argument twice", lambda: nnx_losses(argnums=(0, -1)), "argument twice"),
    case(
        "a variable that is differentiated and constant",
        lambda: nnx_losses(shared := linear(), shared),
        "'bias' of argument 0 is differentiated",
        "also 'bias' of argument 1, where it is constant",
    ),
    case(
        "auxiliary output of a model without has_aux",
        lambda: nnx_losses(fn=lambda model: (model(jnp.ones(3)), jnp.arange(2))),
        "Loss '1'",
        "has_aux=True",
    ),
    case(
        "a model that is changed by the loss of an example",
        lambda: nnx.eval_shape(
            lambda: nnx_engines.per_example_value_and_jacobian(call_twice)(
                linear(), jnp.ones((2, 3))
            )
        ),
        "Variable 'calls'",
        "the loss of an example changes it",
        "a key per example",
    ),
    case(
        "a head that two tasks share",
        lambda: nnx_heads(
            lambda trunk: trunk(jnp.ones(3)),
            lambda head, z: jnp.sum(head(z)),
            lambda: [head := linear(seed=1), head],
        ),
        "'bias' of argument 0 of one function is also",
        "value_and_jacobian",
    ),
    case(
        "a random stream that two heads draw from",
        lambda: nnx_heads(
            lambda trunk, rngs: trunk(jnp.ones(3)),
            lambda head, z, rngs: jnp.sum(head(z)) + rngs.uniform(),
            lambda: [linear(seed=1), linear(seed=2)],
            lambda: nnx.Rngs(0),
        ),
        "Variable 'default/count' is changed by two of the functions",
        "Give each one of its own",
    ),
    case(
        "heads of a model that do not fit",
        lambda: nnx_heads(lambda trunk: trunk(jnp.ones(3)), lambda head, z: jnp.sum(head(z)), dict),
        "outer structure of `heads_fn`",
        "found dict",
    ),
]

CASES = [
    *JACOBIANS,
    *STATES,
    *FACTORIES,
    *HYPERPARAMETERS,
    *STATS,
    *LABELS,
    *ENGINES,
    *SOLVERS,
    *LINKS,
    *NNX,
]


@pytest.mark.parametrize("bad", ENGINES, ids=lambda bad: bad.name)
def test_every_form_of_the_jacobian_has_the_same_errors(bad, monkeypatch):
    monkeypatch.setitem(FORM, "form", "auto")
    test_bad_input_is_a_value_error_at_trace_time(bad)


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_input_is_a_value_error_at_trace_time(bad):
    first, *others = bad.message
    with pytest.raises(ValueError, match=first) as caught:
        bad.run()
    for message in others:
        assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_every_kind_of_bad_input_has_one_row():
    names = [bad.name for bad in CASES]
    assert len(set(names)) == len(names) > 100


@pytest.mark.parametrize(
    ("make", "parameter"),
    [pytest.param(make, parameter, id=f"{n}-{parameter}") for n, make, parameter in SCALARS],
)
def test_traced_hyperparameters_pass_unchecked(make, parameter):
    """Their values are not known while tracing: a sweep by vmap, or optax.inject_hyperparams."""
    made = []
    trace(lambda value: made.append(make(**{parameter: value})), -1.0)
    assert len(made) == 1


# Numbers that are not finite: they propagate, nothing hangs and nothing raises.

FINITE = jax.tree.map(
    lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), JACOBIAN
)
READS_NO_GRADIENT = {"constant", "mean", "random", "sum", "excess_mtl", "graddrop"}
PROPAGATES = [method for method in NAMED + UNWEIGHTED if method.name != "trimmed_mean"]
"""A trimmed mean drops what is not finite: see its values."""
# Long to compile; UPGrad and Nash-MTL are not among them.
WITH_SOLVERS = {"aligned_mtl", "cagrad", "conflict_free", "dualproj", "fairgrad", "mgda", "pcd"}


@pytest.mark.parametrize(
    "method", slow_but(set(map(by_name, PROPAGATES)) - WITH_SOLVERS, PROPAGATES)
)
def test_what_is_not_finite_propagates(method):
    aggregator = method.aggregator(3)

    @jax.jit
    def run(jacobian):
        state = aggregator.init(PARAMS)
        return aggregator.update(jacobian, state, PARAMS, **method.extra_args(jacobian))

    def is_finite(state):
        numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        return all(np.isfinite(x).all() for x in numbers)

    kept = []
    chex.assert_tree_all_finite(run(FINITE)[0])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        update, state = run({**FINITE, "c": FINITE["c"].at[1, 2].set(bad)})
        # What is logged does not matter to the next call.
        kept.append(is_finite(getattr(state, "weighting", state)))
        assert not np.isfinite(update["c"][2])
        if method.name in READS_NO_GRADIENT:
            # One entry is bad, and the weights, which do not depend on it, keep it there.
            chex.assert_tree_all_finite((update["a"], update["c"][:2]))
        else:
            # The weights are not numbers any more, so nothing of the update is.
            assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(update))
    # A call with a state of its own is not affected by the last one.
    chex.assert_tree_all_finite(run(FINITE)[0])
    state = jax.eval_shape(aggregator.init, PARAMS)
    if not jax.tree.leaves(getattr(state, "weighting", state)):
        outcome = "has none"
    elif all(kept):
        outcome = "stays finite"
    else:
        outcome = "not finite: lost"
    assert outcome == documented_outcomes()[method.name]


@functools.cache
def documented_outcomes():
    """What docs/errors.md says about the next state, by method."""
    text = pathlib.Path(__file__).parents[1].joinpath("docs", "errors.md").read_text()
    (section,) = re.findall(r"## Numbers that are not finite\n(.*?)\n## ", text, re.DOTALL)
    rows = re.findall(r"^\| (`.*?) \| (.*) \| (.*) \|$", section, re.MULTILINE)
    outcomes = {name: state for names, _, state in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(outcomes) == {method.name for method in NAMED + UNWEIGHTED}
    for names, update, _ in rows:
        for name in re.findall(r"`(\w+)`", names):
            everywhere = name not in READS_NO_GRADIENT and name != "trimmed_mean"
            assert (update == "NaN everywhere") == everywhere, name
    return outcomes


# What raises nothing, or another error: docs/errors.md says what to do instead


def adam_first():
    """A chain with the optimizer and the aggregator in the wrong order, and its first step."""
    tx = optax.chain(optax.scale_by_adam(), jaxjd.mean())

    def step(state, _=None):
        updates, state = tx.update(JACOBIAN, state, PARAMS)
        return state, updates

    return tx, step


@pytest.mark.slow
def test_an_optimizer_before_the_aggregator_changes_its_state():
    tx, step = adam_first()
    with jax.numpy_rank_promotion("allow"):  # As in a user's program.
        state = tx.init(PARAMS)
        after, _ = jax.eval_shape(step, state)
        assert state[0].mu["c"].shape == (3,)
        assert after[0].mu["c"].shape == (3, 3)
        with pytest.raises(TypeError, match="carry"):
            jax.eval_shape(lambda s: jax.lax.scan(step, s, length=2), state)
        # From then on it is Adam for every task, as jaxjd.per_task makes it from the start.
        right = optax.chain(jaxjd.per_task(optax.scale_by_adam(), 3), jaxjd.mean())
        chex.assert_trees_all_close(
            step(state)[1], right.update(JACOBIAN, right.init(PARAMS), PARAMS)[0]
        )


def test_no_aggregator_broadcasts_the_parameters():
    tx = optax.sgd(1.0)
    with jax.numpy_rank_promotion("allow"):
        updates, _ = tx.update(JACOBIAN, tx.init(PARAMS), PARAMS)
        assert optax.apply_updates(PARAMS, updates)["c"].shape == (3, 3)


def test_unknown_extra_arguments_are_ignored_unless_one_is_missing():
    found = update(jaxjd.mgda(), loss=LOSSES)
    assert jax.tree.structure(found[0]) == jax.tree.structure(PARAMS)
    with pytest.raises(ValueError, match="pass `losses=`"):
        update(jaxjd.gradnorm(num_tasks=3), loss=LOSSES)


def test_the_page_has_the_text_of_every_kind_of_error():
    from tests import error_page

    _, tables, _ = error_page.parts(error_page.PAGE.read_text())
    rendered = error_page.render()
    assert rendered.count("\n| ") > 150
    assert tables.strip() == rendered.strip(), "run python -m tests.error_page"

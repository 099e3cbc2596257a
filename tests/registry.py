"""One row per method: the conformance battery runs on every row.

A new method is tested by adding a row here. The flags say what the method promises; the property
tests read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd import weightings
from tests.matrices import gaussian

M = 3
"""The number of tasks in the conformance battery."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A weighting with its aggregator.

    Attributes:
      name: The public name, and the test id.
      weighting: Makes the weighting with the hyper-parameters of the test, or None.
      aggregator: Makes the aggregator for `num_tasks` tasks.
      stat: What the weighting reads: "gramian", "jacobian" or "cross".
      losses: Whether it reads the extra argument `losses`.
      random: Whether it draws random numbers.
      stateful: Whether its weighting's state depends on the number of tasks.
      homogeneous: Whether the aggregation scales with the Jacobian, ``A(cJ) = c A(J)``.
      equivariant: Whether permuting the tasks permutes the weights.
      non_conflicting: Whether the aggregation never conflicts with a row.
      unit: Whether the weight of a single row is one (but for CAGrad's factor).
      min_tasks: The number of tasks that it needs.
      hyperparameters: Scalar arguments of the public factory that optax may inject.
      required: Other arguments of the public factory.
    """

    name: str
    weighting: Callable[[], jaxjd.Weighting] | None
    aggregator: Callable[[int], optax.GradientTransformationExtraArgs]
    stat: str = "gramian"
    losses: bool = False
    random: bool = False
    stateful: bool = False
    homogeneous: bool = True
    equivariant: bool = True
    non_conflicting: bool = False
    unit: bool = True
    min_tasks: int = 1
    hyperparameters: dict[str, float] = dataclasses.field(default_factory=dict)
    required: dict[str, Any] = dataclasses.field(default_factory=dict)

    def extra_args(self, jacobian: Any) -> dict[str, Any]:
        """The extra arguments that `update` needs."""
        extra = {}
        if self.stat == "cross":
            extra["cross_jacobians"] = (jacobian, jacobian)
        if self.losses:
            extra["losses"] = losses_of(jacobian)
        return extra

    def stat_of(self, jacobian: Any) -> Any:
        """What the weighting reads of a Jacobian."""
        return jacobian if self.stat == "jacobian" else jaxjd.gramian(jacobian)


def _method(name: str, *, kwargs: dict[str, Any] | None = None, **flags: Any) -> Method:
    """A row for a name that is both a weighting and an aggregator."""
    kwargs = kwargs or {}
    factory = getattr(jaxjd, name)
    return Method(
        name=name,
        weighting=lambda: getattr(weightings, name)(**kwargs),
        aggregator=lambda num_tasks: factory(**kwargs, num_tasks=num_tasks),
        required=kwargs,
        **flags,
    )


def _wrapped(name: str, make: Callable[[], jaxjd.Weighting], **flags: Any) -> Method:
    """A row for a weighting that has no name of its own."""
    return Method(
        name=name,
        weighting=make,
        aggregator=lambda num_tasks: jaxjd.weighted(make(), num_tasks=num_tasks),
        stateful=True,
        **flags,
    )


def losses_of(jacobian: Any) -> jax.Array:
    """Positive losses that belong to the rows, whatever their order, scale and sharding."""
    largest = squares = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(jacobian):
        axes = tuple(range(1, leaf.ndim))
        square = jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
        largest = jnp.maximum(largest, jnp.max(square, axis=axes, initial=0))
        squares = squares + jnp.sum(square, axis=axes)
    if squares.ndim == 0:
        return jnp.ones(M)
    return 1 + largest / jnp.where(squares == 0, 1, squares)


NAMED = (
    _method("aligned_mtl"),
    _method("cagrad", kwargs={"c": 0.5}, hyperparameters={"c": 0.5}),
    _method("constant", kwargs={"weights": [0.2, 0.3, 0.5]}, equivariant=False),
    _method("conflict_free"),
    _method(
        "db_mtl",
        stat="jacobian",
        losses=True,
        stateful=True,
        unit=False,
        hyperparameters={"beta": 0.9, "beta_sigma": 0.5},
    ),
    _method("dualproj", non_conflicting=True),
    _method(
        "excess_mtl", stat="jacobian", stateful=True, hyperparameters={"robust_step_size": 1.0}
    ),
    _method(
        "fairgrad",
        kwargs={"alpha": 1.0},
        homogeneous=False,
        unit=False,
        hyperparameters={"alpha": 1.0},
    ),
    _method("gradnorm", losses=True, stateful=True, hyperparameters={"alpha": 1.5, "lr": 0.025}),
    _method("gradvac", random=True, stateful=True, hyperparameters={"beta": 0.5, "eps": 1e-8}),
    _method("imtl_g"),
    _method("krum", kwargs={"n_byzantine": 0, "n_selected": 2}, min_tasks=3),
    _method("mean"),
    _method("mgda", non_conflicting=True),
    _method(
        "moco",
        stat="jacobian",
        losses=True,
        stateful=True,
        homogeneous=False,
        unit=False,
        hyperparameters={
            "max_norm": 2.0,
            "beta": 0.5,
            "beta_sigma": 0.5,
            "gamma": 0.1,
            "gamma_sigma": 0.5,
            "rho": 0.1,
        },
    ),
    _method(
        "modo",
        stat="cross",
        stateful=True,
        homogeneous=False,
        hyperparameters={"gamma": 0.1, "rho": 0.1},
    ),
    _method("nash_mtl", homogeneous=False, unit=False, hyperparameters={"max_norm": 1.0}),
    _method(
        "pcd",
        stateful=True,
        equivariant=False,
        hyperparameters={"tau": 0.02, "beta": 0.999, "eps": 1e-8},
    ),
    _method("pcgrad", random=True),
    _method("random", random=True),
    _method(
        "sdmgrad",
        stat="cross",
        stateful=True,
        kwargs={"lr": 0.5},
        hyperparameters={"lr": 0.5, "momentum": 0.5, "lambda_": 0.3},
    ),
    _method("stch", hyperparameters={"mu": 1.0}),
    _method("sum"),
    _method("upgrad", non_conflicting=True),
)
"""Every method of the public catalogue, by its public name."""

UNWEIGHTED = (
    Method(
        "graddrop",
        None,
        lambda num_tasks: jaxjd.graddrop(num_tasks=num_tasks),
        random=True,
    ),
    Method(
        "momentum_conflict_free",
        None,
        lambda num_tasks: jaxjd.momentum_conflict_free(num_tasks=num_tasks),
        stateful=True,
        homogeneous=False,
        hyperparameters={"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    ),
    Method(
        "trimmed_mean",
        None,
        lambda num_tasks: jaxjd.trimmed_mean(trim_number=1, num_tasks=num_tasks),
        min_tasks=3,
        required={"trim_number": 1},
    ),
)
"""The methods that are aggregators only, by their public names."""

VARIANTS = (
    _wrapped("cagrad(rescale)", lambda: weightings.cagrad(0.5, rescale="square"), unit=False),
    _wrapped("mgda(loss+)", lambda: weightings.mgda("loss+"), losses=True),
    _wrapped(
        "nash_mtl(every 2)",
        lambda: weightings.nash_mtl(update_weights_every=2),
        homogeneous=False,
        unit=False,
    ),
    _wrapped("stch(warmup)", lambda: weightings.stch(warmup_steps=2)),
    _wrapped(
        "moco(simplex)",
        lambda: weightings.moco(rho=0.1, projection="simplex"),
        stat="jacobian",
        losses=True,
        homogeneous=False,
        unit=False,
    ),
)
"""Methods with arguments that change the code or the state."""

WRAPPED = (
    _wrapped("cr_mogm(upgrad)", lambda: weightings.cr_mogm(weightings.upgrad())),
    _wrapped(
        "cr_mogm(mean, schedule)",
        lambda: weightings.cr_mogm(
            weightings.mean(), optax.linear_schedule(0.0, 0.9, 5), jnp.array([0.2, 0.3, 0.5])
        ),
        equivariant=False,
    ),
    _wrapped(
        "cr_mogm(excess_mtl)",
        lambda: weightings.cr_mogm(weightings.excess_mtl(n_warmup_steps=2)),
        stat="jacobian",
    ),
    _wrapped("cr_mogm(sdmgrad)", lambda: weightings.cr_mogm(weightings.sdmgrad()), stat="cross"),
    _wrapped(
        "flattening(gradnorm)", lambda: weightings.flattening(weightings.gradnorm()), losses=True
    ),
    _wrapped("flattening(upgrad)", lambda: weightings.flattening(weightings.upgrad())),
    _wrapped(
        "flattening(gradvac)", lambda: weightings.flattening(weightings.gradvac()), random=True
    ),
)
"""Wrappers around weightings of every kind."""

GROUPINGS = (
    Method(
        "grouped(upgrad)",
        None,
        lambda num_tasks: jaxjd.grouped(
            weightings.upgrad(), jaxjd.labels.by_layer, num_tasks=num_tasks
        ),
        non_conflicting=True,
    ),
    Method(
        "grouped(gradvac)",
        None,
        lambda num_tasks: jaxjd.grouped(
            weightings.gradvac(), jaxjd.labels.by_tensor, num_tasks=num_tasks
        ),
        random=True,
        stateful=True,
    ),
    Method(
        "grouped(modo)",
        None,
        lambda num_tasks: jaxjd.grouped(
            weightings.modo(), jaxjd.labels.by_layer, num_tasks=num_tasks
        ),
        stat="cross",
        stateful=True,
        homogeneous=False,
    ),
    Method(
        "partition(upgrad, excess_mtl)",
        None,
        lambda num_tasks: jaxjd.partition(
            {
                "first": jaxjd.upgrad(num_tasks=num_tasks),
                "second": jaxjd.excess_mtl(num_tasks=num_tasks),
            },
            {"first": "first", "second": "second"},
        ),
        stateful=True,
    ),
)
"""Aggregators that work group by group, on the parameters of `example_params`."""

LINKS = (
    Method(
        "per_task(ema)",
        None,
        lambda num_tasks: optax.chain(
            jaxjd.per_task(optax.ema(0.9), num_tasks), jaxjd.imtl_g(num_tasks=num_tasks)
        ),
        stateful=True,
    ),
    Method(
        "multi_steps(excess_mtl)",
        None,
        lambda num_tasks: jaxjd.multi_steps(jaxjd.excess_mtl(num_tasks=num_tasks), 2, num_tasks),
        stateful=True,
    ),
    Method(
        "multi_steps(modo)",
        None,
        lambda num_tasks: jaxjd.multi_steps(
            jaxjd.modo(num_tasks=num_tasks), 2, num_tasks, cross_jacobians=True
        ),
        stat="cross",
        stateful=True,
    ),
    Method(
        "skip_if_not_finite(gradvac)",
        None,
        lambda num_tasks: jaxjd.skip_if_not_finite(jaxjd.gradvac(num_tasks=num_tasks)),
        random=True,
        stateful=True,
    ),
)
"""Aggregators among chain links."""

WEIGHTINGS = NAMED + VARIANTS + WRAPPED
AGGREGATORS = NAMED + UNWEIGHTED + VARIANTS + WRAPPED + GROUPINGS


def example_params(dtype: Any = jnp.float32) -> Any:
    """Parameters of two layers; a tensor, vectors and a scalar."""
    draws = [
        jnp.asarray(gaussian(seed, *shape), dtype)
        for seed, shape in enumerate(((2, 3), (3,), (3,)))
    ]
    return {
        "first": {"kernel": draws[0], "bias": draws[1]},
        "second": {"kernel": draws[2], "scale": jnp.asarray(np.ones(()), dtype)},
    }


def example_losses(params: Any) -> jax.Array:
    """Three conflicting losses of `example_params`, in the dtype of the parameters."""
    leaves = jax.tree.leaves(params)
    size = jax.tree.reduce(lambda a, b: a + b, [jnp.sum(leaf * leaf) for leaf in leaves])
    shift = jax.tree.reduce(lambda a, b: a + b, [jnp.sum(leaf) for leaf in leaves])
    first = params["first"]["kernel"]
    return jnp.stack([size, size - 4 * shift, jnp.sum(first[0] * first[1]) + 2 * shift])


def by_name(method: Method) -> str:
    """The test id of a row."""
    return method.name


def slow_but(quick: Any, params: Any) -> list:
    """Parameters of a test: those that are named in `quick` run by default, the others are slow."""
    name = lambda param: getattr(param, "name", param)
    unknown = set(quick) - set(map(name, params))
    assert not unknown, f"no such parameters: {unknown}"
    slow = lambda param: pytest.param(param, marks=pytest.mark.slow, id=str(name(param)))
    return [param if name(param) in quick else slow(param) for param in params]

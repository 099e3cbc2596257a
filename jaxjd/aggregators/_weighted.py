"""From a weighting to an aggregator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import (
    Aggregator,
    AggregatorState,
    Certified,
    CrossGramianWeighting,
    Jacobian,
    JacobianWeighting,
    PyTree,
    Weighting,
    check_weighting,
    solve,
    weight_dtype,
)
from jaxjd.checks import check_state, check_static_int, type_name
from jaxjd.linalg.algebra import combine, count_tasks, cross_gramian, gramian, wide_combination


def weighted(
    weighting: Weighting, *, num_tasks: int | None = None, combine_pair: bool = False
) -> Aggregator:
    r"""Makes an aggregator from a weighting: :math:`A(J) = w(J)^\top J`.

    Args:
      weighting: Any weighting. One of the Gramian gets :math:`J J^\top`, a `JacobianWeighting` the
        Jacobian, and a `CrossGramianWeighting` gets :math:`J_1 J_2^\top` of the extra argument
        ``cross_jacobians=(J1, J2)``, while the Jacobian passed as updates is what is combined.
      num_tasks: The number of tasks ``m``. Needed if the weighting's state depends on it; with it
        the state also holds the last weights.
      combine_pair: For a `CrossGramianWeighting`: combine the means of the rows of `J1` and `J2`,
        :math:`\tfrac12 w^\top (J_1 + J_2)`, and not those of the updates, which are then only
        looked at for their shapes: pass either of the two. Leaves may be factored.

    Returns:
      An `Aggregator` with state `AggregatorState`. It runs anywhere an optax gradient
      transformation does; as the first link of a chain it turns a Jacobian into an update.

    Raises:
      ValueError: If `weighting` is none, or needs a missing `num_tasks`, or with `combine_pair` is
        no `CrossGramianWeighting`; in `update`, if the
        Jacobian is malformed, does not fit the parameters or `num_tasks`, or if
        `cross_jacobians` is missing or malformed.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> smoothed = jaxjd.weightings.cr_mogm(jaxjd.weightings.upgrad())
      >>> tx = optax.chain(jaxjd.weighted(smoothed, num_tasks=2), optax.sgd(1.0))
      >>> params = jnp.zeros(3)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> updates, state = tx.update(jacobian, tx.init(params), params)
      >>> print(jnp.round(updates, 4))
      [-0.2924 -1.9006 -1.9006]
      >>> print(jnp.round(state[0].weights, 4))
      [1.1111 0.7895]
    """
    check_weighting(weighting)
    if combine_pair and not isinstance(weighting, CrossGramianWeighting):
        raise ValueError(
            "`combine_pair` is for a CrossGramianWeighting, which reads a pair of Jacobians, got "
            f"{type_name(weighting)}."
        )
    if num_tasks is None:
        _check_stateless(weighting)
    else:
        num_tasks = check_static_int("num_tasks", num_tasks, at_least=1)

    def init(params: PyTree) -> AggregatorState:
        weights = () if num_tasks is None else jnp.zeros((num_tasks,), weight_dtype(params))
        return AggregatorState(weights=weights, weighting=weighting.init(num_tasks, params))

    return Aggregator(init, WeightedUpdate(weighting, num_tasks, combine_pair))  # type: ignore[arg-type]


class WeightedUpdate(Certified):
    """The `update` of `weighted`, whose steps `jaxjd.partition` takes for many groups at once.

    Args:
      weighting: As for `weighted`.
      num_tasks: As there.
      combine_pair: As there.
    """

    def __init__(self, weighting: Weighting, num_tasks: int | None, combine_pair: bool) -> None:
        """Makes the `update` of an aggregator."""
        super().__init__(self._update)
        self.weighting = weighting
        self.num_tasks = num_tasks
        self.combine_pair = combine_pair

    def _update(
        self,
        updates: Jacobian,
        state: AggregatorState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple:
        m = count_tasks(updates, params)
        if m is None:
            return updates, state, None
        weights, next_state, certificate = self.weigh(
            lambda: read_stat(self.weighting, updates, extra_args), m, state, extra_args
        )
        return self.combine(weights, updates, extra_args), next_state, certificate

    def weigh(
        self,
        stat_of: Callable[[], Any],
        m: int,
        state: AggregatorState,
        extra_args: Mapping[str, Any],
    ) -> tuple[jax.Array, AggregatorState, Any]:
        """Returns the weights, the next state, and the certificate."""
        return weigh(self.weighting, self.num_tasks, stat_of, m, state, extra_args)

    def combine(
        self, weights: jax.Array, updates: Jacobian, extra_args: Mapping[str, Any]
    ) -> PyTree:
        """Returns what the weights make of the rows."""
        if not self.combine_pair:
            return combine(weights, updates)
        # Combined one by one: leaves may be factored, which cannot be added.
        first, second = (
            wide_combination(weights, jacobian) for jacobian in extra_args["cross_jacobians"]
        )
        return jax.tree.map(
            lambda leaf, one, other: ((one + other) / 2).astype(leaf.dtype), updates, first, second
        )


def weigh(
    weighting: Weighting,
    num_tasks: int | None,
    stat_of: Callable[[], Any],
    m: int,
    state: AggregatorState,
    extra_args: Mapping[str, Any],
) -> tuple[jax.Array, AggregatorState, Any]:
    """What `weighted` does with the statistic of ``m`` tasks.

    Returns:
      The weights, the next state of the aggregator, and the certificate.
    """
    check_num_tasks(m, num_tasks)
    check_state("an aggregator", state, AggregatorState)
    check_logged(state.weights, () if num_tasks is None else (m,))
    weights, inner, certificate = solve(weighting.update, stat_of(), state.weighting, **extra_args)
    if getattr(weights, "shape", None) != (m,):
        raise ValueError(f"Expected weights of shape {(m,)}, found {type_name(weights)}.")
    logged = () if num_tasks is None else weights.astype(jnp.asarray(state.weights).dtype)
    return weights, AggregatorState(weights=logged, weighting=inner), certificate


def check_num_tasks(found: int, num_tasks: int | None) -> None:
    """Checks a Jacobian's number of tasks against the one that an aggregator was made with.

    Raises:
      ValueError: If they differ.
    """
    if num_tasks is not None and found != num_tasks:
        raise ValueError(
            f"The aggregator was made with num_tasks={num_tasks}, but the Jacobian has {found} "
            "rows (the size of its leading task axis)."
        )


def check_logged(weights: Any, shape: tuple[int, ...]) -> None:
    """Checks the shape of the weights that a state logs; ``()`` if it logs none.

    Raises:
      ValueError: If they have another one.
    """
    if getattr(weights, "shape", ()) != shape:
        raise ValueError(
            f"The state's `weights` must have shape {shape}, found {type_name(weights)}: was the "
            "state made with another `num_tasks`?"
        )


def read_stat(weighting: Weighting, jacobian: Jacobian, extra_args: dict[str, Any]) -> Any:
    """Computes the statistic that a weighting reads.

    Raises:
      ValueError: If it needs `cross_jacobians`, and they are missing or malformed.
    """
    if isinstance(weighting, JacobianWeighting):
        return jacobian
    if isinstance(weighting, CrossGramianWeighting):
        pair = extra_args.get("cross_jacobians")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(
                "This weighting reads A = J1 J2^T of two independent batches: pass "
                "`cross_jacobians=(J1, J2)` to update, two Jacobians like the first argument; got "
                f"{type(pair).__name__}."
            )
        return cross_gramian(*pair)
    return gramian(jacobian)


def _check_stateless(weighting: Weighting) -> None:
    placeholder = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        jax.eval_shape(lambda params: weighting.init(None, params), placeholder)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "The state of this weighting depends on the number of tasks, which optax does not pass "
            f"to init: pass `num_tasks=` to the aggregator. ({error})"
        ) from error

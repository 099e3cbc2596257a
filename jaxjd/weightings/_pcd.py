"""Primary-constrained descent (PCD): one main objective, the others as constraints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import Certificate, Certified, PyTree, Weighting, require_num_tasks, weight_dtype
from jaxjd.checks import (
    as_vector,
    check_entries,
    check_length,
    check_range,
    check_square,
    check_state,
)
from jaxjd.solvers.min_norm import min_norm_weights
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.primary import meet_constraints
from jaxjd.solvers.scaling import unit_diagonal


class PCDState(NamedTuple):
    """The state of `pcd`.

    Attributes:
      count: The number of calls with finite gradients, shape ``()``, int32.
      squares: The moving average of the rows' squared lengths, shape ``(m,)``, zeros at first and
        not yet corrected for that.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.pcd().init(3).squares.shape
      (3,)
    """

    count: jax.Array
    squares: jax.Array


def pcd(tau: PyTree = 0.02, beta: float = 0.999, eps: float = 1e-8) -> Weighting:
    r"""PCD: follows the first task as closely as progress on all others allows.

    With the rows :math:`\tilde g_i = g_i / \sqrt{\hat v_i}`, where :math:`\hat v_i` is the
    bias-corrected moving average of :math:`\|g_i\|^2`,

    .. math:: d = \arg\min_d \tfrac12 \|d - \tilde g_1\|^2 \quad \text{subject to} \quad
              \tilde g_j^\top d \ge \tau_j \|\tilde g_j\|^2 \text{ for } j \ge 2, \qquad
              J^\top w = \frac{\|g_1\|}{\|d\|} d

    From "Primary-constrained descent" (2026, https://arxiv.org/abs/2606.29521). The quadratic
    program is solved exactly. Where no `d` satisfies the constraints the update is :math:`g_1`;
    where :math:`g_1 = 0` it is zero. A zero row constrains nothing.

    Args:
      tau: The progress :math:`\tau` wanted on the secondary tasks, in [0, 1]: a number, or one per
        secondary task, shape ``(m - 1,)`` or laid out as their losses.
      beta: The rate of the moving average, in [0, 1).
      eps: Added to :math:`\hat v`, relative to its mean over the tasks, so that the update scales
        with the gradients; non-negative.

    Returns:
      A `Weighting` with state `PCDState`. Non-finite gradients give NaN weights and leave the state
      as it is.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks` or if `tau`
        belongs to another number of tasks; in `update`, if the state does.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.pcd()
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> weights, state = weighting.update(G, weighting.init(2))
      >>> print([round(float(x), 3) for x in weights])
      [1.848, 1.095]
    """
    tau = _check_tau(tau)
    check_range("beta", beta, at_least=0, below=1)
    check_range("eps", eps, at_least=0)

    def init(num_tasks: int, params: PyTree | None = None) -> PCDState:
        m = require_num_tasks(num_tasks, "pcd")
        _check_levels(tau, m)
        return PCDState(jnp.zeros((), jnp.int32), jnp.zeros((m,), weight_dtype(params)))

    def update(stat: jax.Array, state: PCDState, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        check_state("`pcd`", state, PCDState)
        check_length("state.squares", state.squares.shape[0], m)
        dtype = stat.dtype
        rate = jnp.asarray(beta, dtype)
        count = jnp.asarray(optax.safe_increment(state.count))
        squares = rate * state.squares.astype(dtype) + (1 - rate) * jnp.diagonal(stat)
        corrected = squares / (1 - rate**count)
        corrected = corrected + jnp.asarray(eps, dtype) * jnp.mean(corrected)
        scales = jnp.where(corrected > 0, 1 / jnp.sqrt(jnp.where(corrected > 0, corrected, 1)), 0)
        _check_levels(tau, m)
        levels = jnp.asarray(tau, dtype)
        weights, certificate = _closest(stat, scales, jnp.broadcast_to(levels, (m - 1,)))
        finite = jnp.isfinite(stat).all()
        state = PCDState(
            count=jnp.where(finite, count, state.count),
            squares=jnp.where(finite, squares.astype(state.squares.dtype), state.squares),
        )
        return jnp.where(finite, weights, jnp.nan), state, certificate

    return Weighting(init, Certified(update))


def _closest(
    gramian: jax.Array, scales: jax.Array, levels: jax.Array
) -> tuple[jax.Array, Certificate]:
    """Returns the weights of the direction, at the length of the first row, and a certificate."""
    m = gramian.shape[0]
    unit = unit_diagonal(gramian)
    primary = jnp.zeros((m,), gramian.dtype).at[0].set(unit.nonzero[0].astype(gramian.dtype))
    if m == 1:
        return primary, None
    # d = g~_1 + sum x_j g_j / |g_j| over the secondary rows, with x >= 0.
    cosines, products = unit.cosines[1:, 1:], unit.cosines[1:, 0]
    lengths = unit.lengths * scales
    products, bounds = products * lengths[0], levels * lengths[1:]
    linear = products - bounds
    x, met = meet_constraints(cosines, linear)
    # In units of unit rows; a length below rounding is zero.
    eps = jnp.finfo(gramian.dtype).eps
    relative = jnp.concatenate([lengths[:1], x])
    square = matmul(relative, matmul(unit.cosines, relative))
    some = square > 4 * eps * jnp.square(jnp.sum(relative))
    factor = jnp.where(some, unit.lengths[0] / jnp.sqrt(jnp.where(some, square, 1)), 0)
    found = jnp.concatenate([scales[:1], x * unit.inverse_lengths[1:]]) * factor
    weights = jnp.where(met & unit.nonzero[0], found, primary)
    return weights, jax.tree_util.Partial(_residual, weights, gramian, lengths[0], bounds, x)


def _residual(
    weights: jax.Array, gramian: jax.Array, length: jax.Array, bounds: jax.Array, x: jax.Array
) -> jax.Array:
    """By how much `x` misses the program's conditions, and the weights the direction of `x`.

    Weights of the first row alone are right as well, as far as zero is in the hull of the others.
    """
    unit = unit_diagonal(gramian)
    cosines, eps = unit.cosines[1:, 1:], jnp.finfo(gramian.dtype).eps

    def square(y: jax.Array) -> jax.Array:
        # Without what rounding leaves of nothing.
        level = 8 * y.size * eps * jnp.sum(y * y)
        return jnp.maximum(matmul(y, matmul(unit.cosines, y)) - level, 0)

    scale = jnp.maximum(length, jnp.max(bounds))
    scale = jnp.where(scale > 0, scale, 1)
    slack = matmul(cosines, x) + unit.cosines[1:, 0] * length - bounds
    unmet = jnp.max(jnp.abs(jnp.minimum(x, slack))) / scale
    # In units of unit rows: the direction, and what the weights make of the rows.
    direction = jnp.concatenate([length[None], x]) / scale
    made = weights * unit.lengths / jnp.where(unit.nonzero[0], unit.lengths[0], 1)
    largest = jnp.max(jnp.abs(made))
    factor = made[0] * scale / jnp.where(length > 0, length, 1)
    aside = jnp.max(jnp.abs(made - factor * direction)) / jnp.where(largest > 0, largest, 1)
    too_long = jnp.abs(matmul(made, matmul(unit.cosines, made)) - 1) / jnp.maximum(
        matmul(made, made), 1
    )
    wrong = jnp.where(largest > 0, jnp.maximum(aside, too_long), jnp.sqrt(square(direction)))
    solved = jnp.maximum(unmet, wrong)

    combination = min_norm_weights(cosines)
    distance = jnp.sqrt(square(jnp.concatenate([jnp.zeros_like(length)[None], combination])))
    alone = jnp.max(jnp.abs(weights.at[0].add(-1)))
    contradiction = matmul(combination, bounds) > 0
    infeasible = jnp.where(contradiction, jnp.maximum(alone, distance), solved)
    residual = jnp.minimum(solved, infeasible)
    nothing = (largest > 0).astype(gramian.dtype)
    residual = jnp.where(unit.nonzero[0], residual, nothing)
    return jnp.where(jnp.isfinite(gramian).all() & jnp.isfinite(weights).all(), residual, jnp.nan)


def _check_levels(tau: Any, num_tasks: int) -> None:
    if jnp.ndim(tau) == 1 and tau.size != num_tasks - 1:
        raise ValueError(
            f"`tau` has {tau.size} entries, but there are {num_tasks - 1} secondary tasks."
        )


def _check_tau(tau: Any) -> Any:
    check_entries("tau", tau, at_least=0, at_most=1)
    if getattr(tau, "shape", None) == () or not hasattr(tau, "__len__"):
        check_range("tau", tau, at_least=0, at_most=1)
        return tau
    return as_vector("tau", tau)

"""Smooth Tchebycheff weights of the gradient norms (STCH, norm-based)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import PyTree, Weighting, require_num_tasks, stateless, weight_dtype
from jaxjd.checks import check_length, check_range, check_square, check_state, check_static_int
from jaxjd.solvers.scaling import safe_sqrt


class STCHState(NamedTuple):
    """The state of `stch` with `warmup_steps`.

    Attributes:
      count: The number of calls, shape ``()``, int32.
      nadir: The norms that later ones are relative to, shape ``(m,)``: the sum of those of the
        warm-up calls so far, divided by `warmup_steps`.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.stch(warmup_steps=10).init(2).nadir.shape
      (2,)
    """

    count: jax.Array
    nadir: jax.Array


def stch(mu: float = 1.0, warmup_steps: int | None = None) -> Weighting:
    r"""STCH on gradient norms: more weight to the tasks with the longer gradients.

    .. math:: w = \operatorname{softmax}\big(\log(\|g\| / z) / \mu\big), \qquad
              w_i \propto (\|g_i\| / z_i)^{1 / \mu}

    The nadir :math:`z` is the mean norm of the warm-up calls, in which the weights are uniform;
    without a warm-up it is 1. This puts gradient norms where the paper has losses: Lin et al.,
    "Smooth Tchebycheff Scalarization for Multi-Objective Optimization" (ICML 2024,
    https://arxiv.org/abs/2402.19078). The method of the paper weighs by losses and needs no
    Jacobian: it is `jaxjd.scalarizers.stch`.

    Args:
      mu: The smoothing, positive: towards 0, all the weight is on the longest gradient; towards
        infinity, the weights are uniform.
      warmup_steps: The number of first calls that only collect the nadir, positive and static, or
        None for none.

    Returns:
      A `Weighting`, stateless without `warmup_steps`, otherwise with state `STCHState`. A zero
      gradient has no weight; if all are zero, the weights are uniform.

    Raises:
      ValueError: If an argument is out of range; in `init`, with `warmup_steps` but without
        `num_tasks`; in `update`, if the state belongs to another number of tasks.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.stch()
      >>> print(weighting.update(jnp.diag(jnp.array([1.0, 9.0])), weighting.init(2))[0])
      [0.25 0.75]
    """
    check_range("mu", mu, above=0)
    if warmup_steps is not None:
        warmup_steps = check_static_int("warmup_steps", warmup_steps, at_least=1)

    def weigh(norms: jax.Array) -> jax.Array:
        m, dtype = norms.shape[0], norms.dtype
        largest = jnp.max(norms)
        relative = norms / jnp.where(largest > 0, largest, 1)
        known = ~(relative <= 0)
        logits = jnp.log(jnp.where(known, relative, 1)) / jnp.asarray(mu, dtype)
        powers = jnp.where(known, jnp.exp(logits), 0)
        total = jnp.sum(powers)
        return jnp.where(total == 0, jnp.full((m,), 1 / m, dtype), powers / jnp.maximum(total, 1))

    def plain(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        check_square("gramian", stat)
        return weigh(safe_sqrt(jnp.diagonal(stat))), state

    if warmup_steps is None:
        return Weighting(stateless, plain)

    def init(num_tasks: int, params: PyTree | None = None) -> STCHState:
        m = require_num_tasks(num_tasks, "stch")
        return STCHState(
            count=jnp.zeros((), jnp.int32), nadir=jnp.zeros((m,), weight_dtype(params))
        )

    def update(stat: jax.Array, state: STCHState, **extra_args: Any) -> tuple[jax.Array, STCHState]:
        m = check_square("gramian", stat)
        check_state("`stch`", state, STCHState)
        check_length("state.nadir", state.nadir.shape[0], m)
        norms = safe_sqrt(jnp.diagonal(stat))
        collecting = state.count < warmup_steps
        nadir = state.nadir.astype(stat.dtype)
        # A task without a gradient in the warm-up is relative to its first one.
        reference = jnp.where(nadir == 0, norms, nadir)
        relative = norms / jnp.where(reference == 0, 1, reference)
        weights = weigh(jnp.where(collecting, jnp.ones_like(norms), relative))
        weights = jnp.where(jnp.isfinite(norms).all(), weights, jnp.nan)
        nadir = jnp.where(collecting, nadir + norms / warmup_steps, reference)
        return weights, STCHState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            nadir=nadir.astype(state.nadir.dtype),
        )

    return Weighting(init, update)

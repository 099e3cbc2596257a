"""Robust multi-task learning with excess risks (ExcessMTL)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import Jacobian, JacobianWeighting, PyTree, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_state, check_static_int
from jaxjd.linalg.algebra import count_tasks, refuse_complex
from jaxjd.linalg.sharded import sum_leaves
from jaxjd.weightings._rows import paired_leaves, zero_rows


class ExcessMTLState(NamedTuple):
    """The state of `excess_mtl`.

    Attributes:
      count: The number of calls, shape ``()``, int32.
      log_weights: The logarithms of the weights, shape ``(m,)``, ``-log m`` each at first.
      baseline: The risks that later ones are relative to, shape ``(m,)``; a running mean until the
        warm-up is over.
      squares: The sums of the squared entries of all Jacobians so far: a pytree like the
        parameters whose leaves have shape ``(m, *param.shape)``; at least float32.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> state = jaxjd.weightings.excess_mtl().init(2, {"w": jnp.zeros(3)})
      >>> state.squares["w"].shape
      (2, 3)
    """

    count: jax.Array
    log_weights: jax.Array
    baseline: jax.Array
    squares: PyTree


def excess_mtl(robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> JacobianWeighting:
    r"""ExcessMTL: gives more weight to tasks that are far from their optimum, not to noisy ones.

    The excess risk of a task is estimated with a diagonal, AdaGrad-like curvature,

    .. math:: S \leftarrow S + J \odot J, \qquad r_i = \sum_k J_{ik}^2 / \sqrt{S_{ik}},

    and the weights follow an exponentiated gradient step on the risks relative to their baseline,

    .. math:: w \leftarrow \operatorname{softmax}(\log w + \eta \, r / r^{(0)}).

    From He et al., "Robust Multi-Task Learning with Excess Risks" (ICML 2024,
    https://arxiv.org/abs/2402.02009). The baseline :math:`r^{(0)}` is the mean risk of the warm-up
    calls; without a warm-up it is the risk of the first call, as in the authors' code. Weights are
    uniform in all of those calls, so ``n_warmup_steps=0`` and ``1`` are the same. (TorchJD 0.18
    steps with the unscaled risk in its first call, which drives the weights to one task for good.)
    Risks are relative, so nothing depends on the scale of the losses. Memory is one Jacobian.

    Args:
      robust_step_size: The step size :math:`\eta` of the weights, positive.
      n_warmup_steps: The number of first calls that only collect statistics, non-negative and
        static. The paper recommends three epochs.

    Returns:
      A `JacobianWeighting` with state `ExcessMTLState`.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks` or `params`; in
        `update`, if the Jacobian does not fit the state.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.excess_mtl()
      >>> state = weighting.init(2, jnp.zeros(2))
      >>> weights, state = weighting.update(jnp.array([[2.0, 0.0], [1.0, 0.0]]), state)
      >>> print(weights)
      [0.5 0.5]
      >>> weights, state = weighting.update(jnp.array([[2.0, 0.0], [0.1, 0.0]]), state)
      >>> print(jnp.round(weights, 3))
      [0.668 0.332]
    """
    check_range("robust_step_size", robust_step_size, above=0)
    n_warmup_steps = check_static_int("n_warmup_steps", n_warmup_steps, at_least=0)
    baseline_calls = max(1, n_warmup_steps)

    def init(num_tasks: int, params: PyTree | None = None) -> ExcessMTLState:
        m = require_num_tasks(num_tasks, "excess_mtl")
        squares = zero_rows(params, m, "excess_mtl")
        dtype = weight_dtype(params)
        return ExcessMTLState(
            count=jnp.zeros((), jnp.int32),
            log_weights=jnp.full((m,), -jnp.log(jnp.asarray(m, dtype)), dtype),
            baseline=jnp.zeros((m,), dtype),
            squares=squares,
        )

    def update(
        stat: Jacobian, state: ExcessMTLState, **extra_args: Any
    ) -> tuple[jax.Array, ExcessMTLState]:
        check_state("`excess_mtl`", state, ExcessMTLState)
        m = count_tasks(stat)
        if m is None:
            return jnp.exp(state.log_weights), state
        check_length("state.log_weights", state.log_weights.shape[0], m)
        refuse_complex(stat, "excess_mtl")
        dtype = weight_dtype(stat)
        squares, risks = [], []
        for leaf, total in paired_leaves(stat, state.squares, "excess_mtl"):
            square = jnp.square(leaf)
            total = total + square
            squares.append(total)
            known = total > 0
            terms = jnp.where(known, square / jnp.sqrt(jnp.where(known, total, 1)), 0)
            risks.append(jnp.sum(terms, axis=tuple(range(1, terms.ndim))).astype(dtype))
        risk = sum_leaves(risks, jax.tree.leaves(stat))

        collecting = state.count < baseline_calls
        baseline = state.baseline.astype(dtype)
        # A task without a gradient so far is relative to its first risk.
        reference = jnp.where(baseline == 0, risk, baseline)
        relative = risk / jnp.where(reference == 0, 1, reference)
        log_weights = state.log_weights.astype(dtype)
        moved = jax.nn.log_softmax(log_weights + robust_step_size * relative)
        log_weights = jnp.where(collecting, log_weights, moved)
        baseline = jnp.where(collecting, baseline + risk / baseline_calls, reference)
        next_state = ExcessMTLState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            log_weights=log_weights.astype(state.log_weights.dtype),
            baseline=baseline.astype(state.baseline.dtype),
            squares=jax.tree.unflatten(jax.tree.structure(state.squares), squares),
        )
        return jnp.exp(log_weights).astype(dtype), next_state

    return JacobianWeighting(init, update)

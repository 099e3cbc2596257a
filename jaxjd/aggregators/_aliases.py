"""The aggregators that are weightings: one line each on `weighted`.

The formulas, the arguments and the states are documented at the weightings of the same names.
"""

from __future__ import annotations

from typing import Literal

import jax

from jaxjd import weightings
from jaxjd.aggregators._weighted import weighted
from jaxjd.base import Aggregator, PyTree
from jaxjd.solvers.dual_cone import DualConeProjector

__all__ = [
    "aligned_mtl",
    "cagrad",
    "conflict_free",
    "constant",
    "dualproj",
    "excess_mtl",
    "fairgrad",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "modo",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "random",
    "sdmgrad",
    "stch",
    "sum",
    "upgrad",
]


def aligned_mtl(
    pref_vector: PyTree | None = None,
    scale_mode: Literal["min", "median", "rmse"] = "min",
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""Aligned-MTL: makes the principal components of the rows equally long.

    See `jaxjd.weightings.aligned_mtl` (Senushkin et al., CVPR 2023).

    Args:
      pref_vector: The preferences, shape ``(m,)`` or laid out as the losses; ``1 / m`` each by
        default.
      scale_mode: ``"min"``, ``"median"`` or ``"rmse"`` of the non-zero eigenvalues.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.aligned_mtl()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 4) for x in update])
      [0.2133, 0.9673, 0.9673]
    """
    return weighted(weightings.aligned_mtl(pref_vector, scale_mode), num_tasks=num_tasks)


def cagrad(
    c: float, rescale: Literal["none", "square", "linear"] = "none", *, num_tasks: int | None = None
) -> Aggregator:
    r"""CAGrad: the best worst-case improvement in a ball around the mean row.

    See `jaxjd.weightings.cagrad` (Liu et al., NeurIPS 2021).

    Args:
      c: The radius of the ball, relative to the mean row, non-negative.
      rescale: Divides the update by ``1 + c ** 2`` (``"square"``) or ``1 + c`` (``"linear"``).
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.cagrad(c=0.5)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 4) for x in update])
      [0.1835, 1.2041, 1.2041]
    """
    return weighted(weightings.cagrad(c, rescale), num_tasks=num_tasks)


def conflict_free(pref_vector: PyTree | None = None, *, num_tasks: int | None = None) -> Aggregator:
    r"""ConFIG: the direction with equal cosines to all rows, as long as their projections on it.

    See `jaxjd.weightings.conflict_free` (Liu, Chu and Thuerey, ICLR 2025).

    Args:
      pref_vector: The wanted cosines up to a factor, shape ``(m,)`` or laid out as the losses; ones
        by default.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.conflict_free()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 3) for x in update])
      [0.159, 2.071, 2.071]
    """
    return weighted(weightings.conflict_free(pref_vector), num_tasks=num_tasks)


def constant(weights: PyTree, *, num_tasks: int | None = None) -> Aggregator:
    r"""A constant combination of the rows, :math:`w^\top J`.

    See `jaxjd.weightings.constant`.

    Args:
      weights: One number per task, shape ``(m,)`` or laid out as the losses.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.constant([1.0, 2.0])
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(update)
      [8. 3. 3.]
    """
    return weighted(weightings.constant(weights), num_tasks=num_tasks)


def dualproj(
    pref_vector: PyTree | None = None,
    projector: DualConeProjector | None = None,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""DualProj: projects the weighted sum of the rows onto their dual cone.

    See `jaxjd.weightings.dualproj` (Lopez-Paz and Ranzato, NeurIPS 2017).

    Args:
      pref_vector: The preferences, shape ``(m,)`` or laid out as the losses; ``1 / m`` each by
        default.
      projector: How to project, exact by default (`jaxjd.linalg`).
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.dualproj()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 4))
      [0.5556 1.1111 1.1111]
    """
    return weighted(weightings.dualproj(pref_vector, projector), num_tasks=num_tasks)


def excess_mtl(
    robust_step_size: float = 1.0,
    n_warmup_steps: int = 0,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""ExcessMTL: more weight to the tasks that are far from their optimum.

    See `jaxjd.weightings.excess_mtl` (He et al., ICML 2024). The state holds one Jacobian.

    Args:
      robust_step_size: The step size of the weights, positive.
      n_warmup_steps: The number of first calls with uniform weights, non-negative.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.excess_mtl(num_tasks=2)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(update)
      [1. 1. 1.]
    """
    return weighted(weightings.excess_mtl(robust_step_size, n_warmup_steps), num_tasks=num_tasks)


def fairgrad(alpha: float, *, num_tasks: int | None = None) -> Aggregator:
    r"""FairGrad: divides the improvement among the tasks by alpha-fairness.

    See `jaxjd.weightings.fairgrad` (Ban and Ji, ICML 2024).

    Args:
      alpha: The fairness, non-negative: 0 for the mean, 1 for proportional fairness.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If `alpha` is negative; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.fairgrad(alpha=1.0)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 3) for x in update])
      [0.077, 0.999, 0.999]
    """
    return weighted(weightings.fairgrad(alpha), num_tasks=num_tasks)


def gradnorm(alpha: float = 1.5, lr: float = 0.025, *, num_tasks: int | None = None) -> Aggregator:
    r"""GradNorm: learns weights with which tasks that lag behind have longer gradients.

    `update` needs ``losses=``, one positive number per task as a vector or a pytree.
    See `jaxjd.weightings.gradnorm` (Chen et al., ICML 2018).

    Args:
      alpha: The strength of the pull towards a common training rate, non-negative.
      lr: The step size of the logits of the weights, positive.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed, or without losses.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.gradnorm(num_tasks=2)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> state = aggregator.init(jnp.zeros(3))
      >>> update, state = aggregator.update(jacobian, state, losses=jnp.array([3.0, 0.5]))
      >>> print(update, state.weights)
      [2. 2. 2.] [1. 1.]
    """
    return weighted(weightings.gradnorm(alpha, lr), num_tasks=num_tasks)


def gradvac(
    beta: float = 0.5,
    eps: float = 1e-8,
    key: jax.Array | int = 0,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""GradVac: pulls every pair of rows up to the cosine that it has had so far.

    See `jaxjd.weightings.gradvac` (Wang et al., ICLR 2021).

    Args:
      beta: The rate of the moving average of the cosines, in [0, 1].
      eps: Added to a denominator, for unit rows, non-negative.
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of an aggregator with a key of its own.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.gradvac(num_tasks=2)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 4))
      [0.5848 3.8012 3.8012]
    """
    return weighted(weightings.gradvac(beta, eps, key), num_tasks=num_tasks)


def imtl_g(*, num_tasks: int | None = None) -> Aggregator:
    r"""IMTL-G: the combination with equal projections onto all rows.

    See `jaxjd.weightings.imtl_g` (Liu et al., ICLR 2021).

    Args:
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.imtl_g()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 4))
      [0.0767 1.     1.    ]
    """
    return weighted(weightings.imtl_g(), num_tasks=num_tasks)


def krum(
    n_byzantine: int,
    n_selected: int = 1,
    squared: bool = False,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""Krum and Multi-Krum: the mean of the rows that are closest to their neighbours.

    See `jaxjd.weightings.krum` (Blanchard et al., NeurIPS 2017).

    Args:
      n_byzantine: The number of rows that may be anything, non-negative and static.
      n_selected: The number of rows to select, positive and static.
      squared: Whether to sum squared distances, as the paper does, instead of distances.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed or has
        too few rows.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.krum(n_byzantine=1, n_selected=2)
      >>> jacobian = jnp.array([[1.0, 1.0], [1.0, 0.9], [75.0, -66.0], [1.0, 1.2]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(2)))
      >>> print(update)
      [1.   0.95]
    """
    return weighted(weightings.krum(n_byzantine, n_selected, squared), num_tasks=num_tasks)


def mean(*, num_tasks: int | None = None) -> Aggregator:
    r"""The mean of the rows: plain training on the mean of the losses.

    See `jaxjd.weightings.mean`.

    Args:
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.mean()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(update)
      [1. 1. 1.]
    """
    return weighted(weightings.mean(), num_tasks=num_tasks)


def mgda(
    normalization: Literal["none", "l2", "loss", "loss+"] = "none",
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""MGDA: the point of smallest norm in the convex hull of the rows.

    See `jaxjd.weightings.mgda` (Désidéri, 2012).

    Args:
      normalization: What the rows are divided by to find the weights: ``"none"``, ``"l2"``,
        ``"loss"`` or ``"loss+"``; the last two read the extra argument ``losses``.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.mgda()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 4))
      [0. 1. 1.]
    """
    return weighted(weightings.mgda(normalization), num_tasks=num_tasks)


def modo(
    gamma: float = 0.1,
    rho: float = 0.1,
    *,
    num_tasks: int | None = None,
    combine_pair: bool = False,
) -> Aggregator:
    r"""MoDo: one projected gradient step on the weights per call, from two independent batches.

    `update` needs ``cross_jacobians=(J1, J2)``, the Jacobians of two independent batches. The
    paper applies the weights to both of them: that is ``combine_pair=True``. Without it the rows
    combined are those of the first argument, for example of a third batch.
    See `jaxjd.weightings.modo` (Chen et al., NeurIPS 2023).

    Args:
      gamma: The step size of the weights, positive.
      rho: The regularization of the weights, non-negative.
      num_tasks: The number of tasks ``m``, required: the state depends on it.
      combine_pair: Whether to combine the means of the rows of `J1` and `J2`, as
        `jaxjd.weighted` does it, in the place of the rows of the first argument.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.modo(gamma=0.001, num_tasks=2, combine_pair=True)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> state = aggregator.init(jnp.zeros(3))
      >>> pair = (jacobian, jacobian)  # In training: of two independent batches.
      >>> update, state = aggregator.update(jacobian, state, cross_jacobians=pair)
      >>> print(jnp.round(update, 4))
      [0.95 1.   1.  ]
    """
    return weighted(weightings.modo(gamma, rho), num_tasks=num_tasks, combine_pair=combine_pair)


def nash_mtl(
    max_norm: float = 1.0, update_weights_every: int = 1, *, num_tasks: int | None = None
) -> Aggregator:
    r"""Nash-MTL: the Nash bargaining solution of the tasks.

    See `jaxjd.weightings.nash_mtl` (Navon et al., ICML 2022).

    Args:
      max_norm: The largest norm of the update, non-negative; 0 for no limit.
      update_weights_every: The problem is solved every this many calls, positive and static.
      num_tasks: The number of tasks ``m``; needed if ``update_weights_every > 1``. With it the
        state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.nash_mtl()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 3) for x in update])
      [0.054, 0.706, 0.706]
    """
    weighting = weightings.nash_mtl(max_norm, update_weights_every)
    return weighted(weighting, num_tasks=num_tasks)


def pcd(
    tau: PyTree = 0.02,
    beta: float = 0.999,
    eps: float = 1e-8,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""PCD: follows the first row as closely as progress on all others allows.

    See `jaxjd.weightings.pcd` (https://arxiv.org/abs/2606.29521).

    Args:
      tau: The progress wanted on the secondary tasks, in [0, 1]: a number, or shape ``(m - 1,)``.
      beta: The rate of the moving average of the squared lengths, in [0, 1).
      eps: Added to that average, relative to its mean over the tasks, non-negative.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If `num_tasks` is missing or an argument is out of range; in `update`, if the
        Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.pcd(num_tasks=2)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 3) for x in update])
      [-0.82, 2.943, 2.943]
    """
    return weighted(weightings.pcd(tau, beta, eps), num_tasks=num_tasks)


def pcgrad(key: jax.Array | int = 0, *, num_tasks: int | None = None) -> Aggregator:
    r"""PCGrad: removes from every row its conflicts with the others, then sums.

    See `jaxjd.weightings.pcgrad` (Yu et al., NeurIPS 2020).

    Args:
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of an aggregator with a key of its own.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.pcgrad()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 4))
      [0.5848 3.8012 3.8012]
    """
    return weighted(weightings.pcgrad(key), num_tasks=num_tasks)


def random(key: jax.Array | int = 0, *, num_tasks: int | None = None) -> Aggregator:
    r"""Random loss weighting: softmax of normal noise, new at every call.

    See `jaxjd.weightings.random` (Lin et al., TMLR 2022).

    Args:
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of an aggregator with a key of its own.
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.random()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(update.shape)
      (3,)
    """
    return weighted(weightings.random(key), num_tasks=num_tasks)


def sdmgrad(
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
    lambda_: float = 0.3,
    pref_vector: PyTree | None = None,
    *,
    num_tasks: int | None = None,
    combine_pair: bool = False,
) -> Aggregator:
    r"""SDMGrad: the minimum-norm direction, pulled towards a preferred one.

    `update` needs ``cross_jacobians=(J1, J2)``, the Jacobians of two independent batches; the rows
    combined are those of the first argument, from a third batch.
    See `jaxjd.weightings.sdmgrad` (Xiao, Ban and Ji, NeurIPS 2023).

    Args:
      lr: The learning rate of the inner steps, positive.
      momentum: The momentum of the inner steps, in [0, 1).
      n_iter: The number of inner steps, positive and static.
      lambda_: The pull towards the preferred direction, non-negative.
      pref_vector: The preferences, shape ``(m,)`` or laid out as the losses; ``1 / m`` each by
        default.
      num_tasks: The number of tasks ``m``, required: the state depends on it.
      combine_pair: Whether to combine the means of the rows of `J1` and `J2`, which saves the third
        batch but is biased; as for `jaxjd.weighted`.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.sdmgrad(num_tasks=2)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> state = aggregator.init(jnp.zeros(3))
      >>> pair = (jacobian, jacobian)  # In training: of two independent batches.
      >>> update, state = aggregator.update(jacobian, state, cross_jacobians=pair)
      >>> print(jnp.round(update, 4))
      [4.8462 1.     1.    ]
    """
    return weighted(
        weightings.sdmgrad(lr, momentum, n_iter, lambda_, pref_vector),
        num_tasks=num_tasks,
        combine_pair=combine_pair,
    )


def stch(
    mu: float = 1.0, warmup_steps: int | None = None, *, num_tasks: int | None = None
) -> Aggregator:
    r"""STCH on gradient norms: more weight to the longer rows.

    See `jaxjd.weightings.stch`. The method of Lin et al. (ICML 2024) weighs by losses instead: that
    is `jaxjd.scalarizers.stch`.

    Args:
      mu: The smoothing, positive.
      warmup_steps: The number of first calls that only collect norms, positive and static, or None.
      num_tasks: The number of tasks ``m``, required with `warmup_steps`; with it the state holds
        the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.stch()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print([round(float(x), 3) for x in update])
      [1.923, 1.0, 1.0]
    """
    return weighted(weightings.stch(mu, warmup_steps), num_tasks=num_tasks)


def sum(*, num_tasks: int | None = None) -> Aggregator:  # noqa: A001
    r"""The sum of the rows: plain training on the sum of the losses.

    See `jaxjd.weightings.sum`.

    Args:
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.sum()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(update)
      [2. 2. 2.]
    """
    return weighted(weightings.sum(), num_tasks=num_tasks)


def upgrad(
    pref_vector: PyTree | None = None,
    projector: DualConeProjector | None = None,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""UPGrad: projects every row onto the dual cone of all rows, then sums.

    See `jaxjd.weightings.upgrad` (Quinton and Rey, 2024).

    Args:
      pref_vector: The preferences, shape ``(m,)`` or laid out as the losses; ``1 / m`` each by
        default.
      projector: How to project, exact by default (`jaxjd.linalg`).
      num_tasks: The number of tasks ``m``; with it the state holds the last weights.

    Returns:
      An `Aggregator` with state `AggregatorState`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.upgrad()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 4))
      [0.2924 1.9006 1.9006]
    """
    return weighted(weightings.upgrad(pref_vector, projector), num_tasks=num_tasks)

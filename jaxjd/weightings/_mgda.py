"""The multiple-gradient descent algorithm (MGDA)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxjd.base import Certified, PyTree, Weighting, stateless
from jaxjd.checks import check_square
from jaxjd.solvers.min_norm import min_norm_weights, min_norm_weights_of
from jaxjd.solvers.residuals import min_norm_residual
from jaxjd.solvers.scaling import unit_diagonal
from jaxjd.weightings._losses import read_losses

_NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def mgda(normalization: Literal["none", "l2", "loss", "loss+"] = "none") -> Weighting:
    r"""MGDA: the point of smallest norm in the convex hull of the gradients.

    .. math:: w = \arg\min_{w \in \Delta} \Big\| \sum_i w_i \frac{g_i}{c_i} \Big\|^2,
              \qquad c_i = 1 \text{ unless normalized}

    From Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization"
    (C. R. Math. 2012). Stateless. The point is exact: there are no `epsilon` and `max_iters`, as
    TorchJD has them for its Frank-Wolfe iteration. Short gradients get the most weight; the
    normalizations of Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization"
    (NeurIPS 2018, https://arxiv.org/abs/1810.04650) change that. As in their code, the weights are
    those of the normalized gradients and are applied to the gradients as they are.

    Args:
      normalization: What the gradients are divided by to find the weights: nothing (``"none"``),
        their lengths (``"l2"``), the losses (``"loss"``) or both (``"loss+"``). The last two read
        the extra argument ``losses``, shape ``(m,)`` or a pytree of `m` scalars, positive. A
        task whose loss is exactly zero, as one without labels in a batch, gets no weight: its
        normalized gradient is infinitely long. If all are zero, none is divided. Static.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `normalization` is none of the four; in `update`, if the Gramian is not an
        ``(m, m)`` floating point array, or if losses are needed and missing or malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.mgda()
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.6 0.4]
    """
    if normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"`normalization` must be one of {_NORMALIZATIONS}, got {normalization!r}."
        )

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        if normalization in ("l2", "loss+"):
            unit = unit_diagonal(stat)
            stat = jnp.where(jnp.diag(~unit.nonzero), 0, unit.cosines)
        if normalization in ("loss", "loss+"):
            losses = read_losses(extra_args, "mgda", m, stat.dtype)
            # A loss of zero makes its row infinitely long, so that it gets no weight.
            counts = (losses != 0) | jnp.all(losses == 0)
            # Relative to the smallest, so that nothing overflows.
            sizes = jnp.where(losses == 0, jnp.max(jnp.abs(losses)), jnp.abs(losses))
            unit_loss = jnp.where(jnp.min(sizes) == 0, 1, jnp.min(sizes))
            inverse = jnp.where(losses == 0, 1, unit_loss / jnp.where(losses == 0, 1, losses))
            stat = stat * inverse[:, None] * inverse[None, :]
            weights = min_norm_weights_of(stat, counts)
            # What does not count asks for nothing, as another copy of a row with weight does.
            places = jnp.where(counts, jnp.arange(m), jnp.argmax(weights))
            stat = stat[places][:, places]
        else:
            weights = min_norm_weights(stat)
        return weights, state, jax.tree_util.Partial(min_norm_residual, weights, stat)

    return Weighting(stateless, Certified(update))

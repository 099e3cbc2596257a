"""Independent component alignment (Aligned-MTL)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Weighting, stateless
from jaxjd.checks import check_square
from jaxjd.linalg.precision import matmul
from jaxjd.weightings._preference import check_preference, preference

_SCALE_MODES = ("min", "median", "rmse")


def aligned_mtl(
    pref_vector: jax.typing.ArrayLike | None = None,
    scale_mode: Literal["min", "median", "rmse"] = "min",
) -> Weighting:
    r"""Aligned-MTL: makes the principal components of the gradients equally long.

    With the eigenvectors `V` and the eigenvalues :math:`\lambda` of the Gramian that are not zero
    to rounding,

    .. math:: w = \sqrt{s} \, V \operatorname{diag}(\lambda)^{-1/2} V^\top p

    From Senushkin et al., "Independent Component Alignment for Multi-Task Learning" (CVPR 2023,
    https://arxiv.org/abs/2305.19000). Stateless. An eigenvalue counts as zero below
    :math:`m \epsilon \lambda_{max}`; for a zero Gramian `w = p`.

    Args:
      pref_vector: The preferences :math:`p`, shape ``(m,)``; ``1 / m`` each by default.
      scale_mode: The scale `s`: the smallest of the eigenvalues kept (``"min"``), their lower
        median (``"median"``), or their mean (``"rmse"``).

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `scale_mode` is unknown or `pref_vector` is not a vector; in `update`, if it
        has not one entry per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.aligned_mtl()
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.5591 0.4083]
    """
    pref_vector = check_preference(pref_vector)
    if scale_mode not in _SCALE_MODES:
        raise ValueError(f"`scale_mode` must be one of {_SCALE_MODES}, got {scale_mode!r}.")

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        m = check_square("gramian", stat)
        p = preference(pref_vector, m, stat.dtype)
        # The weights do not depend on the common scale; a unit scale cannot overflow.
        scale = jnp.max(jnp.diagonal(stat))
        zero = scale <= 0
        values, vectors = jnp.linalg.eigh(stat / jnp.where(zero, 1, scale))
        kept = values > values[-1] * m * jnp.finfo(stat.dtype).eps
        rank = jnp.sum(kept)
        if scale_mode == "rmse":
            s = jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1)
        else:
            # Eigenvalues are ascending: those kept are the last `rank`.
            offset = (rank - 1) // 2 if scale_mode == "median" else 0
            s = values[jnp.clip(m - rank + offset, 0, m - 1)]
        ratios = jnp.where(kept, jnp.sqrt(s / jnp.where(kept, values, 1)), 0)
        weights = matmul(vectors, ratios * matmul(vectors.T, p))
        return jnp.where(zero, p, weights), state

    return Weighting(stateless, update)

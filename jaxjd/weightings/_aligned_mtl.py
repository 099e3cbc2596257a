"""Independent component alignment (Aligned-MTL)."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Weighting, stateless_with
from jaxjd.checks import check_square
from jaxjd.solvers.precision import matmul
from jaxjd.weightings._preference import check_preference, preference

_SCALE_MODES = ("min", "median", "rmse")


def aligned_mtl(
    pref_vector: PyTree | None = None,
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
      pref_vector: The preferences :math:`p`, shape ``(m,)`` or laid out as the losses; ``1 / m``
        each by default.
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
        normalized = stat / jnp.where(zero, 1, scale)
        return jnp.where(zero, p, _align(normalized, p, scale_mode)), state

    return Weighting(stateless_with(pref_vector=pref_vector), update)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _align(gramian: jax.Array, p: jax.Array, scale_mode: str) -> jax.Array:
    """Returns the weights for a Gramian that is not zero."""
    values, vectors, kept, chosen = _decompose(gramian, scale_mode)
    scale = jnp.sum(chosen * values)
    ratios = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1)), 0)
    return matmul(vectors, ratios * matmul(vectors.T, p))


@_align.defjvp
def _align_jvp(scale_mode: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The derivative of a matrix function by divided differences, which equal eigenvalues do not
    # harm (Daleckii and Krein). Differentiating the eigenvectors would divide by zero there.
    gramian, p = primals
    gramian_dot, p_dot = tangents
    values, vectors, kept, chosen = _decompose(gramian, scale_mode)
    roots = jnp.sqrt(jnp.where(kept, values, 1))
    f = jnp.where(kept, 1 / roots, 0)
    gaps = values[:, None] - values[None, :]
    mixed = kept[:, None] != kept[None, :]
    slopes = (f[:, None] - f[None, :]) / jnp.where(mixed, gaps, 1)
    smooth = -1 / (roots[:, None] * roots[None, :] * (roots[:, None] + roots[None, :]))
    both = kept[:, None] & kept[None, :]
    slopes = jnp.where(both, smooth, jnp.where(mixed, slopes, 0))
    turned = matmul(vectors.T, matmul((gramian_dot + gramian_dot.T) / 2, vectors))
    scale = jnp.sum(chosen * values)
    scale_dot = jnp.sum(chosen * jnp.diagonal(turned))
    coordinates, coordinates_dot = matmul(vectors.T, p), matmul(vectors.T, p_dot)
    moved = matmul(slopes * turned, coordinates) + f * coordinates_dot
    root, unscaled = jnp.sqrt(scale), f * coordinates
    weights = matmul(vectors, root * unscaled)
    return weights, matmul(vectors, root * moved + scale_dot / (2 * root) * unscaled)


def _decompose(gramian: jax.Array, scale_mode: str) -> tuple[jax.Array, ...]:
    """Returns eigenvalues, eigenvectors, which are kept, and each one's part in the scale."""
    m = gramian.shape[0]
    values, vectors = jnp.linalg.eigh(gramian)
    kept = values > values[-1] * m * jnp.finfo(gramian.dtype).eps
    rank = jnp.maximum(jnp.sum(kept), 1)
    if scale_mode == "rmse":
        chosen = kept / rank
    else:
        # Eigenvalues are ascending: those kept are the last `rank`.
        offset = (rank - 1) // 2 if scale_mode == "median" else 0
        chosen = jnp.arange(m) == m - rank + offset
    return values, vectors, kept, chosen.astype(gramian.dtype)

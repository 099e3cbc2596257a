"""How many independent directions the tasks' gradients take."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import Gramian
from jaxjd.checks import check_square


def effective_rank(gramian: Gramian) -> jax.Array:
    r"""The effective rank of the Gramian: the exponential of the entropy of its eigenvalues.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \lambda_k / \sum_l \lambda_l

    It is 1 for parallel gradients and ``m`` for orthogonal ones of one length. From Roy and
    Vetterli, "The effective rank: A measure of effective dimensionality" (EUSIPCO 2007), with the
    Gramian as the matrix: its eigenvalues are the squared singular values of the Jacobian.

    Args:
      gramian: The Gramian, shape ``(m, m)``; with `cosine_matrix` of it the lengths of the
        gradients do not count.

    Returns:
      A scalar from 1 to ``m`` in the dtype of `gramian`, 0 if all gradients are zero, NaN if one is
      not finite. Multiplying the Gramian by a number does not change it.

    Raises:
      ValueError: If `gramian` is not a floating point square matrix.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> print(round(float(jaxjd.diagnostics.effective_rank(jnp.diag(jnp.array([3.0, 1.0])))), 4))
      1.7548
      >>> print(round(float(jaxjd.diagnostics.effective_rank(jnp.ones((3, 3)))), 4))
      1.0
    """
    check_square("gramian", gramian)
    largest = jnp.max(jnp.diagonal(gramian))
    scaled = gramian / jnp.where(largest == 0, 1, largest)
    finite = jnp.all(jnp.isfinite(scaled))
    # Rounding makes the smallest ones negative.
    values = jnp.maximum(jnp.linalg.eigvalsh(jnp.where(finite, scaled, 0)), 0)
    total = jnp.sum(values)
    shares = values / jnp.where(total == 0, 1, total)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares == 0, 1, shares)))
    # The entropy is at least zero, too.
    rank = jnp.where(total == 0, 0, jnp.exp(jnp.maximum(entropy, 0)))
    return jnp.where(finite, rank, jnp.nan)

"""The pseudo-inverse of a positive semi-definite matrix with a unit diagonal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.loops import unless
from jaxjd.solvers.precision import matmul


@jax.custom_jvp
def pseudo_inverse(cosines: jax.Array) -> jax.Array:
    r"""Computes :math:`C^{+}`, with eigenvalues below :math:`m \epsilon \lambda_{max}` as zero.

    A Cholesky factorization serves wherever it proves that no eigenvalue is near that bound,
    :math:`\lambda_{min} \ge 1 / \operatorname{tr} C^{-1}`; an eigendecomposition, an order of
    magnitude slower, wherever it does not.

    Args:
      cosines: `C`, positive semi-definite with a unit diagonal, shape ``(m, m)``.

    Returns:
      The pseudo-inverse, shape ``(m, m)``; NaN for non-finite input. Differentiable where the rank
      is locally constant.
    """
    return _invert(cosines)


@pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # Golub and Pereyra (1973), for a symmetric matrix of locally constant rank.
    (cosines,), (change,) = primals, tangents
    inverse = pseudo_inverse(cosines)
    outside = jnp.eye(cosines.shape[0], dtype=cosines.dtype) - matmul(inverse, cosines)
    inside = -matmul(inverse, matmul(change, inverse))
    turn = matmul(matmul(inverse, inverse), matmul(change.T, outside.T))
    turned = matmul(outside, matmul(change.T, matmul(inverse, inverse)))
    return inverse, inside + turn + turned


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def _invert(cosines: jax.Array) -> jax.Array:
    m = cosines.shape[0]
    cutoff = m * jnp.finfo(cosines.dtype).eps
    eye = jnp.eye(m, dtype=cosines.dtype)
    factor = lax.linalg.cholesky(cosines)
    root = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    # The largest row sum bounds the largest eigenvalue. NaN, from a matrix that is not positive
    # definite, fails the comparison.
    largest = jnp.max(jnp.sum(jnp.abs(cosines), axis=1))
    regular = jnp.sum(root * root) * (10 * cutoff * largest) <= 1

    def decompose(matrix: jax.Array, _: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(matrix)
        kept = values > cutoff * values[-1]
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return matmul(vectors * inverse[None, :], vectors.T)

    start = jnp.where(regular, matmul(root.T, root), cosines)
    inverse = unless(regular, decompose, start)
    return jnp.where(jnp.isfinite(cosines).all(), inverse, jnp.nan)


def reaches(cosines: jax.Array, x: jax.Array, right: jax.Array) -> jax.Array:
    """Returns whether ``x = C^+ b`` is more than rounding, a boolean scalar.

    Where `b` is orthogonal to the range of `C`, ``C^+ b`` is zero, and rounding leaves something of
    it that a division by its length or its sum would blow up.
    """
    eps = cosines.shape[0] * jnp.finfo(cosines.dtype).eps
    square = jnp.sum(x * matmul(cosines, x))
    return ~(square <= jnp.square(eps) * jnp.sum(jnp.square(right)))


def solve(cosines: jax.Array, right: jax.Array) -> jax.Array:
    """Returns ``C^+ b``, shape ``(m,)``, refined once."""
    inverse = pseudo_inverse(cosines)
    x = matmul(inverse, right)
    return x + matmul(inverse, right - matmul(cosines, x))

"""The unit-diagonal form of a Gramian: what makes every solver independent of the rows' lengths."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class UnitDiagonal(NamedTuple):
    """``G = D C D`` with ``D = diag(lengths)`` and a unit diagonal in `C`.

    Attributes:
      cosines: `C`, shape ``(m, m)``; a zero row has cosine 0 to the others and 1 to itself.
      lengths: The rows' Euclidean lengths ``sqrt(G_ii)``, shape ``(m,)``.
      inverse_lengths: ``1 / lengths``, and 0 for a zero row, shape ``(m,)``.
      nonzero: Whether a row is not zero, shape ``(m,)``, bool.
    """

    cosines: jax.Array
    lengths: jax.Array
    inverse_lengths: jax.Array
    nonzero: jax.Array


def unit_diagonal(gramian: jax.Array) -> UnitDiagonal:
    """Returns the factors of ``G = D C D``, differentiable where no row is zero."""
    squares = jnp.diagonal(gramian)
    nonzero = ~(squares <= 0)  # NaN counts as non-zero, so that it reaches the result.
    lengths = jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)
    inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, lengths, 1), 0)
    cosines = gramian * inverse[:, None] * inverse[None, :]
    # A finite diagonal is 1 by definition, but a non-finite one must not be hidden.
    diagonal = jnp.where(jnp.isfinite(squares), 1, jnp.nan).astype(gramian.dtype)
    eye = jnp.eye(gramian.shape[0], dtype=bool)
    return UnitDiagonal(jnp.where(eye, diagonal[:, None], cosines), lengths, inverse, nonzero)

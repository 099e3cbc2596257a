"""The unit-diagonal form of a Gramian: what makes every solver independent of the rows' lengths."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns ``sqrt(max(x, 0))``, with a derivative of zero, not infinity, where ``x <= 0``.

    The derivative of a square root at zero is infinite, and times a zero it is NaN: a selection
    behind the root does not hide it. A length has the subgradient zero there. NaN stays NaN.
    """
    positive = ~(x <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


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

    def shortest(self) -> jax.Array:
        """The shortest length that is not zero, shape ``()``; 1 if there is none."""
        bound = jnp.where(self.nonzero, self.lengths, jnp.max(self.lengths))
        shortest = jnp.min(bound)
        return jnp.where(jnp.isfinite(shortest) & (shortest > 0), shortest, 1)


def unit_diagonal(gramian: jax.Array) -> UnitDiagonal:
    """Returns the factors of ``G = D C D``; their derivatives at a zero row are zero."""
    squares = jnp.diagonal(gramian)
    nonzero = ~(squares <= 0)  # NaN counts as non-zero, so that it reaches the result.
    lengths = safe_sqrt(squares)
    inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, lengths, 1), 0)
    cosines = gramian * inverse[:, None] * inverse[None, :]
    # A finite diagonal is 1 by definition, but a non-finite one must not be hidden.
    diagonal = jnp.where(jnp.isfinite(squares), 1, jnp.nan).astype(gramian.dtype)
    eye = jnp.eye(gramian.shape[0], dtype=bool)
    return UnitDiagonal(jnp.where(eye, diagonal[:, None], cosines), lengths, inverse, nonzero)

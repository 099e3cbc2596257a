"""The quality of a set of trade-offs between two losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.checks import type_name


def hypervolume(losses: jax.Array, reference: jax.typing.ArrayLike) -> jax.Array:
    r"""The area that a set of points dominates: the hypervolume of two losses, exactly.

    .. math:: \lambda\Big(\bigcup_k \{x : L^{(k)} \le x \le r\}\Big)

    The larger it is, the closer the points are to the Pareto front and the better they cover it.
    One sort and one sum. From Zitzler and Thiele, "Multiobjective evolutionary algorithms: a
    comparative case study and the strength Pareto approach" (1999,
    https://doi.org/10.1109/4235.797969).

    Args:
      losses: The two losses of every point, shape ``(k, 2)``; smaller is better.
      reference: The worst values that count, shape ``(2,)``. Points that are not below it in both
        losses dominate nothing.

    Returns:
      A scalar in the dtype of `losses`; NaN if a loss is NaN.

    Raises:
      ValueError: If `losses` is not floating point of shape ``(k, 2)``, or `reference` not of shape
        ``(2,)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> points = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
      >>> print(jaxjd.diagnostics.hypervolume(points, jnp.array([2.0, 2.0])))
      3.0
    """
    shape = getattr(losses, "shape", ())
    if len(shape) != 2 or shape[1] != 2 or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"`losses` must be floating point with shape (k, 2), got {type_name(losses)}."
        )
    reference = jnp.asarray(reference, losses.dtype)
    if reference.shape != (2,):
        raise ValueError(f"`reference` must have shape (2,), got {type_name(reference)}.")
    inside = jnp.minimum(losses, reference[None, :])
    order = jnp.argsort(inside[:, 0])
    # From left to right, the lowest point so far dominates the strip up to the next one.
    first, second = inside[order, 0], lax.cummin(inside[order, 1])
    widths = jnp.diff(first, append=reference[:1])
    area = jnp.sum(widths * (reference[1] - second))
    return jnp.where(jnp.any(jnp.isnan(losses)), jnp.nan, area)

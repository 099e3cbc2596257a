"""Certificates: by how much an answer misses the conditions that make it the answer.

Each function reads the problem and the final answer, and nothing of how it was found. Conditions
are taken for unit rows, so that a short row counts as much as a long one, and violations are in
units of the largest term of the sum that the problem is about: 0 is exact, some multiple of the
dtype's epsilon is solved. Non-finite input gives NaN. Derivatives are not meant to be taken.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.checks import check_length, check_square
from jaxjd.solvers.min_norm import min_norm_weights
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.scaling import UnitDiagonal, unit_diagonal


def dual_cone_residual(V: jax.Array, U: jax.Array, G: jax.Array) -> jax.Array:  # noqa: N803
    r"""How far `V` is from the weights of the projection of ``J^T u`` onto the dual cone.

    With the unit rows :math:`\hat g_i`, :math:`x_i = (v_i - u_i) \|g_i\|` and
    :math:`y_i = \langle \hat g_i, J^\top v \rangle`, the projection is where

    .. math:: x \ge 0, \quad y \ge 0, \quad x_i y_i = 0, \qquad \text{that is} \quad
              \min(x_i, y_i) = 0 \text{ for all } i

    Args:
      V: Projected weights, shape ``(..., m)``.
      U: The weights that were projected, shaped like `V`.
      G: The Gramian, shape ``(m, m)``.

    Returns:
      The largest :math:`|\min(x_i, y_i)|` in units of the largest :math:`|u_i| \|g_i\|`, for every
      row of `U`: shape ``(...)``. A zero row has to keep its weight.

    Raises:
      ValueError: If the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> G, U = jnp.array([[18.0, -22.0], [-22.0, 38.0]]), jnp.eye(2) / 2
      >>> V = jaxjd.linalg.project_onto_dual_cone(U, G)
      >>> print(bool((jaxjd.linalg.dual_cone_residual(V, U, G) < 1e-6).all()))
      True
      >>> print(jnp.round(jaxjd.linalg.dual_cone_residual(U, U, G), 2))  # they do conflict
      [0.84 0.84]
    """
    m = check_square("G", G)
    V, U = jnp.asarray(V, G.dtype), jnp.asarray(U, G.dtype)  # noqa: N806
    check_length("V", V.shape[-1], m)
    check_length("U", U.shape[-1], m)
    unit = unit_diagonal(G)
    lengths = jnp.broadcast_to(unit.lengths, V.shape)
    x, y = (V - U) * lengths, matmul(V * lengths, unit.cosines)
    scale = _largest(U * lengths)
    scale = jnp.where(scale > 0, scale, jnp.max(unit.lengths))
    found = _divide(_largest(jnp.minimum(x, y)), scale)
    moved = _divide(_largest(jnp.where(lengths > 0, 0, V - U)), _largest(U))
    return _known(jnp.maximum(found, moved), V, U, G)


def min_norm_residual(w: jax.Array, G: jax.Array) -> jax.Array:  # noqa: N803
    r"""How far `w` is from the weights of the minimum-norm point of the convex hull of the rows.

    With :math:`d = J^\top w` and the unit rows :math:`\hat g_i`, they are where some :math:`\tau`
    (which is then :math:`\|d\|^2`) exists with

    .. math:: w \in \Delta, \qquad \min\big(w_i \|g_i\|, \;
              \langle \hat g_i, d \rangle - \tau / \|g_i\|\big) = 0 \text{ for all } i

    Args:
      w: Weights, shape ``(m,)``.
      G: The Gramian, shape ``(m, m)``.

    Returns:
      The largest of these minima in units of the largest :math:`w_i \|g_i\|`, for the best
      :math:`\tau`; or by how much `w` is outside of the simplex, if that is more. Shape ``()``.

    Raises:
      ValueError: If the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> w = jaxjd.linalg.min_norm_weights(G)
      >>> print(bool(jaxjd.linalg.min_norm_residual(w, G) < 1e-6))
      True
      >>> print(bool(jaxjd.linalg.min_norm_residual(w[::-1], G) > 0.1))
      True
    """
    m = check_square("G", G)
    w = jnp.asarray(w, G.dtype)
    check_length("w", w.shape[0], m)
    unit = unit_diagonal(G)
    coordinates = w * unit.lengths
    scale = jnp.max(jnp.abs(coordinates))
    coordinates = coordinates / jnp.where(scale > 0, scale, 1)
    unmet = jnp.min(_level_residuals(coordinates, matmul(unit.cosines, coordinates), unit))
    outside = jnp.maximum(jnp.abs(jnp.sum(w) - 1), jnp.max(-w))
    return _known(jnp.maximum(unmet, outside), w, G)


def simplex_residual(w: jax.Array, x: jax.Array) -> jax.Array:
    r"""How far `w` is from the projection of `x` onto the probability simplex.

    .. math:: \max_i |w_i - \max(x_i - \tau, 0)| \quad \text{with} \quad
              \tau = \max_i (x_i - w_i), \qquad \text{or} \quad |\textstyle\sum_i w_i - 1|

    Args:
      w: The projections, shape ``(..., m)``.
      x: The vectors that were projected, shaped like `w`.

    Returns:
      The larger of the two for every vector, shape ``(...)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> x = jnp.array([0.5, 0.1, 0.1])
      >>> w = jaxjd.linalg.project_onto_simplex(x)
      >>> print(bool(jaxjd.linalg.simplex_residual(w, x) < 1e-6))
      True
    """
    # Relative to the largest entry, which loses nothing of those that matter.
    shifted = x - jnp.max(x, axis=-1, keepdims=True)
    threshold = jnp.max(shifted - w, axis=-1, keepdims=True)
    found = _largest(w - jnp.maximum(shifted - threshold, 0))
    return _known(jnp.maximum(found, jnp.abs(jnp.sum(w, axis=-1) - 1)), w, x)


def worst_case_residual(w: jax.Array, G: jax.Array, c: jax.typing.ArrayLike) -> jax.Array:  # noqa: N803
    r"""How far `w` is from the weights of CAGrad.

    With ``d = J^T w``, the mean row ``g_0``, :math:`x_i = (w_i - 1 / m) \|g_i\|` and the radius
    :math:`R = c \|g_0\|`, they are where some :math:`\mu` exists with

    .. math:: \min\big(x_i, \; \langle \hat g_i, d \rangle - \mu / \|g_i\|\big) = 0
              \text{ for all } i, \qquad \|d - g_0\| = R

    or, where the convex hull of the rows holds zero, with :math:`\mu = 0` and
    :math:`\|d - g_0\| \le R`. That it does is proved by its minimum-norm point, a problem of its
    own; what is left of that point counts as improvement that was missed.

    Args:
      w: Weights, shape ``(m,)``.
      G: The Gramian, shape ``(m, m)``.
      c: The radius in units of the mean row's length.

    Returns:
      The residual in units of the longest row over `m`, shape ``()``.
    """
    m = check_square("G", G)
    dtype, eps = G.dtype, jnp.finfo(G.dtype).eps
    w = jnp.asarray(w, dtype)
    unit = unit_diagonal(G)
    longest = jnp.max(unit.lengths)
    # In units of the longest row over m.
    relative = unit.lengths / jnp.where(longest > 0, longest, 1)
    x = (m * w - 1) * relative
    y = matmul(unit.cosines, m * w * relative)
    mean = matmul(relative, matmul(unit.cosines, relative))
    square, target = matmul(x, matmul(unit.cosines, x)), jnp.square(jnp.asarray(c, dtype)) * mean
    # A length is the root of a sum that rounding leaves something of.
    level = 8 * m * eps * (jnp.sum(x * x) + jnp.square(jnp.asarray(c, dtype)) * m)
    excess = square - target
    total = jnp.sqrt(jnp.maximum(square, 0)) + jnp.sqrt(jnp.maximum(target, 0))
    seen = jnp.sign(excess) * jnp.maximum(jnp.abs(excess) - level, 0)
    too_long = _divide(seen, total)
    levels = _level_residuals(x, y, unit)
    reached = jnp.maximum(jnp.min(levels), jnp.abs(too_long))
    at_zero = jnp.maximum(_largest(jnp.minimum(x, y)), too_long)
    reach = jnp.sqrt(jnp.maximum(mean, 0)) + jnp.sqrt(jnp.maximum(target, 0))
    # Zero is in the hull if it is a row.
    distance = jnp.where(jnp.all(unit.nonzero), hull_distance(unit.cosines), 0)
    missed = jnp.maximum(at_zero, distance * reach)
    return _known(jnp.minimum(reached, missed), w, G, jnp.asarray(c, dtype))


def fairness_residual(x: jax.Array, G: jax.Array, power: jax.typing.ArrayLike) -> jax.Array:  # noqa: N803
    r"""How far `x` is from solving :math:`G x = x^{-p}`, `x > 0`.

    .. math:: \max_i \frac{|e_i - t_i|}{\max(|e_i|, t_i)}, \qquad
              e_i = \langle \hat g_i, J^\top x \rangle, \quad t_i = x_i^{-p} / \|g_i\|

    Args:
      x: The solution, shape ``(m,)``. A zero row has to have ``x = 0``.
      G: The Gramian, shape ``(m, m)``.
      power: The exponent `p`.

    Returns:
      The relative error of the worst equation, shape ``()``: about 1 where there is no solution. It
      is not in units of the terms that cancel in `e`, so that it shows what the dtype loses where
      rows are nearly opposite.
    """
    check_square("G", G)
    x = jnp.asarray(x, G.dtype)
    unit = unit_diagonal(G)
    e = matmul(unit.cosines, x * unit.lengths)
    positive = unit.nonzero & (x > 0)
    largest = jnp.log(jnp.finfo(G.dtype).max) - 1
    log_t = -jnp.asarray(power, G.dtype) * jnp.log(jnp.where(positive, x, 1))
    log_t = log_t - jnp.log(jnp.where(positive, unit.lengths, 1))
    t = jnp.exp(jnp.clip(log_t, -largest, largest))
    missed = _divide(jnp.abs(e - t), jnp.maximum(jnp.abs(e), t))
    wrong_sign = (unit.nonzero != (x > 0)).astype(G.dtype)
    return _known(jnp.max(jnp.where(positive, missed, wrong_sign)), x, G)


def cosine_residual(w: jax.Array, G: jax.Array, wanted: jax.Array) -> jax.Array:  # noqa: N803
    r"""How far the products of ``J^T w`` with the unit rows are from `wanted`, up to a factor.

    With ``y = C D w``, these products, it is the smaller of

    .. math:: \frac{\|y - t p\|}{|t| \|p\|} \quad \text{and} \quad
              \frac{\|C (y - t p)\|}{\|C y\|}

    in the largest entry and each for its best `t`: the second one is that of the normal equations,
    for a `p` that no combination reaches. Weights of zero are right where ``C p = 0``.

    Args:
      w: Weights, shape ``(m,)``.
      G: The Gramian, shape ``(m, m)``.
      wanted: The wanted products `p`, zero for a zero row, shape ``(m,)``.

    Returns:
      The residual, shape ``()``.
    """
    check_square("G", G)
    unit = unit_diagonal(G)
    coordinates = jnp.asarray(w, G.dtype) * unit.lengths
    scale = jnp.max(jnp.abs(coordinates))
    y = matmul(unit.cosines, coordinates / jnp.where(scale > 0, scale, 1))
    image = matmul(unit.cosines, jnp.where(unit.nonzero, wanted, 0))

    def parallel(a: jax.Array, b: jax.Array) -> jax.Array:
        t = _divide(matmul(a, b), matmul(b, b))
        size = jnp.maximum(_largest(a), _largest(t * b))
        return jnp.where(size > 0, _divide(_largest(a - t * b), size), 1)

    wanted = jnp.where(unit.nonzero, wanted, 0)
    found = jnp.minimum(parallel(y, wanted), parallel(matmul(unit.cosines, y), image))
    none = _divide(_largest(image), _largest(wanted))
    return _known(jnp.where(scale > 0, found, none), w, G, wanted)


def hull_distance(cosines: jax.Array) -> jax.Array:
    """The distance of zero from the convex hull of unit rows, 0 below rounding, shape ``()``."""
    weights = min_norm_weights(cosines)
    square = matmul(weights, matmul(cosines, weights))
    level = 4 * cosines.shape[0] * jnp.finfo(cosines.dtype).eps
    return jnp.sqrt(jnp.maximum(square - level, 0))


def _level_residuals(x: jax.Array, y: jax.Array, unit: UnitDiagonal) -> jax.Array:
    """The largest ``|min(x_i, y_i - level / |g_i|)|``, for the level of every row, shape ``(m,)``.

    A common level of ``|g_i| y_i`` is that of one of the rows where `x` is not zero; which one
    matters to rounding, and the best may be taken.
    """
    ratios = unit.lengths[:, None] * unit.inverse_lengths[None, :]
    levels = y[:, None] * jnp.minimum(ratios, jnp.finfo(y.dtype).eps ** -3)
    # A zero row is at the level zero, whatever `x` is.
    levels = jnp.where(jnp.all(unit.nonzero), levels, jnp.minimum(levels, 0))
    return _largest(jnp.minimum(x[None, :], y[None, :] - levels))


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=-1)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient; `x` where `y` is zero."""
    return x / jnp.where(y == 0, 1, y)


def _known(residual: jax.Array, *data: jax.Array) -> jax.Array:
    finite = [jnp.isfinite(jnp.asarray(array)).all() for array in data]
    return jnp.where(jnp.stack(finite).all(), residual, jnp.nan)

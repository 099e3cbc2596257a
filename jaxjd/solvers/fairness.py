"""The convex problem behind Nash-MTL and FairGrad."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.pivoting import cholesky_solve
from jaxjd.solvers.precision import matmul, ridge
from jaxjd.solvers.scaling import unit_diagonal

_MAX_STEPS = 200
_LONGEST_STEP = 2.0  # In the logarithm of an entry.
_RIDGE = 16.0  # In units of the rounding errors of a Gramian.


def fair_weights(gramian: jax.Array, power: jax.typing.ArrayLike) -> jax.Array:
    r"""Solves :math:`G x = x^{-p}` for `x > 0`, the optimum of a strictly convex function.

    For unit rows, :math:`G = D C D`, and with :math:`x = D^{-1} S u`, where
    :math:`S = D^{(p - 1) / (p + 1)}` is the solution for orthogonal rows, it reads

    .. math:: S C S \, u = S^2 u^{-p}, \quad
              \text{the optimum of } \tfrac12 u^\top S C S u + \sum_i s_i^2 \frac{u_i^{1-p}}{p - 1},

    so `u` is of order one wherever rows do not work together or against each other, whatever the
    rows' lengths. It is found by damped Newton steps in :math:`\log u`.

    Args:
      gramian: `G`, shape ``(m, m)``. A zero row gets ``x = 0``.
      power: The exponent `p`, positive, shape ``()``.

    Returns:
      The solution, shape ``(m,)``; it is differentiable by the implicit function theorem. There is
      none where no direction improves all rows. Then it is a large positive vector whose
      combination vanishes to rounding at a strongly stationary point, and is never long.
    """
    dtype = gramian.dtype
    unit = unit_diagonal(gramian)
    p = jnp.asarray(power, dtype)
    # With lengths in units of 2^e, as long as the longest, x is in units of 2^(-2 e / (1 + p)).
    _, exponent = jnp.frexp(lax.stop_gradient(jnp.max(unit.lengths)))
    relative = jnp.ldexp(unit.lengths, -exponent)
    log_lengths = jnp.log(jnp.where(unit.nonzero, relative, 1))
    power_of_two = exponent * (-2 / (1 + p))
    whole = lax.stop_gradient(jnp.round(power_of_two))
    log_scales = log_lengths * ((p - 1) / (p + 1))
    log_u = _solve(unit.cosines, log_scales, p)
    x = jnp.exp(log_u + log_scales - log_lengths) * jnp.exp2(power_of_two - whole)
    return jnp.where(unit.nonzero, jnp.ldexp(x, whole.astype(jnp.int32)), 0)


def _newton(
    cosines: jax.Array, log_scales: jax.Array, p: jax.Array, log_u: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the factor of the scaled Newton matrix, its scales, the residual, and `a`.

    In units of `u` the matrix is ``H = U S C S U + p S^2 diag(u^(1-p))``. With ``1 / h`` the root
    of its diagonal it is ``diag(1 - a^2) + a C a`` between two factors ``1 / h``, where
    ``a = s u h`` lies between 0 and 1; nothing here over- or underflows.
    """
    log_ratio = jnp.log(p) - (1 + p) * log_u
    log_a = -0.5 * jnp.logaddexp(jnp.zeros_like(log_ratio), log_ratio)
    a = jnp.exp(log_a)
    system = a[:, None] * cosines * a[None, :]
    system += jnp.diag(jnp.exp(log_a * 2 + log_ratio) + ridge(cosines.dtype))
    log_y = log_u + log_scales
    residual = matmul(cosines, jnp.exp(log_y)) - jnp.exp(log_scales - p * log_u)
    return lax.linalg.cholesky(system), jnp.exp(log_a - log_y), residual, a


@jax.custom_jvp
def _solve(cosines: jax.Array, log_scales: jax.Array, p: jax.Array) -> jax.Array:
    """Returns `log u`."""
    return _search(cosines, log_scales, p)


@_solve.defjvp
def _solve_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # With t = log y = log u + log s: C y = exp((1 + p) log s - p t), and dy = y dt.
    cosines, log_scales, p = primals
    cosines_dot, log_scales_dot, p_dot = tangents
    log_u = _solve(cosines, log_scales, p)
    factor, scales, _, a = _newton(cosines, log_scales, p, log_u)
    log_y = log_u + log_scales
    pull = jnp.exp(log_scales - p * log_u)
    moved = pull * ((1 + p) * log_scales_dot - p_dot * log_u)
    moved = moved - matmul(cosines_dot, jnp.exp(log_y))
    log_y_dot = cholesky_solve(factor, a * moved) * scales
    return log_u, log_y_dot - log_scales_dot


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def _search(cosines: jax.Array, log_scales: jax.Array, p: jax.Array) -> jax.Array:
    m = cosines.shape[0]
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps
    ridged = cosines + _RIDGE * m * eps * jnp.eye(m, dtype=dtype)

    def cancels(log_u: jax.Array) -> jax.Array:
        """Whether the combination, of squared length `sum s^2 u^(1 - p)`, is below rounding."""
        square = jnp.sum(jnp.exp(2 * log_scales + (1 - p) * log_u))
        return square < _RIDGE * eps * jnp.square(jnp.sum(jnp.exp(log_scales + log_u)))

    def step(carry: tuple) -> tuple:
        count, log_u, last, singular, _ = carry
        matrix = jnp.where(singular, ridged, cosines)
        factor, scales, residual, a = _newton(matrix, log_scales, p, log_u)
        move = -cholesky_solve(factor, a * residual) * scales
        size = jnp.max(jnp.abs(move))
        # How much the curvature changes depends on the relative size of the step alone.
        log_u = log_u + move * jnp.minimum(1, _LONGEST_STEP / size)
        # Rounding has the last word when steps are small and no longer shrink.
        small = size < 0.2 / (1 + p)
        done = (size < 8 * eps) | (small & (size >= last)) | ~jnp.isfinite(size)
        # At a (weakly) stationary point there is no solution, and rounding makes `C` indefinite.
        # With a ridge above the rounding errors there is one again.
        lost = cancels(log_u)
        return count + 1, log_u, size, singular | lost, done & (singular | ~lost)

    def unfinished(carry: tuple) -> jax.Array:
        count, _, _, _, done = carry
        return ~done & (count < _MAX_STEPS)

    false = jnp.asarray(False)
    start = (0, jnp.zeros_like(log_scales), jnp.asarray(jnp.inf, dtype), false, false)
    _, log_u, _, _, _ = lax.while_loop(unfinished, step, start)
    return log_u

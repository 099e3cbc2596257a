"""What a step does to every loss, to first order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import Gramian, Jacobian, PyTree
from jaxjd.checks import check_range, check_square, check_weights
from jaxjd.linalg.algebra import count_tasks, cross_gramian
from jaxjd.solvers.precision import matmul


def predicted_change(
    gramian: Gramian, weights: jax.Array, learning_rate: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    r"""The change of every loss, to first order, by a gradient step along the combined gradient.

    .. math:: L_i(\theta - \eta J^\top w) - L_i(\theta) \approx -\eta \, (G w)_i

    A method that conflicts with no task has no positive entry here. For what another optimizer
    makes of the combined gradient see `predicted_change_by`.

    Args:
      gramian: The Gramian `G`, shape ``(m, m)``.
      weights: The weights `w`, shape ``(m,)``.
      learning_rate: The learning rate :math:`\eta`, a scalar, which may be traced.

    Returns:
      Shape ``(m,)``, in the dtype of `gramian`. Negative where the loss falls.

    Raises:
      ValueError: If `gramian` is not a floating point square matrix, `weights` has not one entry
        per task, or `learning_rate` is not a scalar.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> print(jaxjd.diagnostics.predicted_change(gramian, jnp.array([0.5, 0.5]), 0.5))
      [ 1. -4.]
    """
    m = check_square("gramian", gramian)
    check_weights("weights", weights, m)
    check_range("learning_rate", learning_rate)
    dtype = gramian.dtype
    return -jnp.asarray(learning_rate, dtype) * matmul(gramian, weights.astype(dtype))


def predicted_change_by(updates: PyTree, jacobian: Jacobian) -> jax.Array:
    r"""The change of every loss, to first order, by any update of the parameters.

    .. math:: L_i(\theta + u) - L_i(\theta) \approx (J u)_i

    Unlike `predicted_change`, it knows what momentum, scaling per parameter, clipping or weight
    decay have made of the combined gradient. Factored leaves stay factored.

    Args:
      updates: What is added to the parameters, as it comes from the last link of a chain: a pytree
        like the parameters. For complex ones, after the conjugate was taken.
      jacobian: The Jacobian at the parameters.

    Returns:
      Shape ``(m,)``, at least float32. Negative where the loss falls.

    Raises:
      ValueError: If `jacobian` is not a Jacobian, or `updates` does not belong to the same
        parameters; the leaf's path is named.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> tx = optax.chain(jaxjd.upgrad(), optax.adam(0.1))
      >>> updates, _ = tx.update(jacobian, tx.init(jnp.zeros(3)))
      >>> print(jnp.round(jaxjd.diagnostics.predicted_change_by(updates, jacobian), 4))
      [ 0.2 -0.8]
    """
    count_tasks(jacobian, updates)
    # A gradient of complex parameters is a conjugate, and what is added to them is none.
    rows = jax.tree.map(lambda leaf: jnp.conj(leaf)[None], updates)
    return cross_gramian(jacobian, rows)[:, 0]

"""Conditioned one-shot multi-objective search (COSMOS)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, stateless
from jaxjd.checks import check_range
from jaxjd.scalarizers._tasks import keep_state, loss_vector, per_task, unit_vector


def cosmos(lambda_: float, weights: PyTree) -> Scalarizer:
    r"""COSMOS: a weighted sum, with a reward for losses in proportion to the weights.

    .. math:: r^\top L - \lambda \frac{r^\top L}{\|r\| \|L\|}

    From Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective
    Learning" (ICDM 2021, https://arxiv.org/abs/2103.13392). There :math:`r` is drawn anew at every
    step from a Dirichlet distribution and is an input of the model as well; `weights` may be traced
    for that. Where all losses or all weights are zero, the cosine counts as zero. Stateless.

    Args:
      lambda_: The reward :math:`\lambda` of a small angle between losses and weights, non-negative.
        The paper uses 0.01 to 8, depending on the data.
      weights: The preferences :math:`r`, shape ``(m,)`` or laid out as the losses.

    Returns:
      A `Scalarizer`.

    Raises:
      ValueError: If `lambda_` is negative or `weights` holds anything but real numbers; in `apply`,
        if there is not one weight per task, or a loss is not floating point.

    Example:
      One preference per step, drawn inside the compiled function:

      >>> import jax, jax.numpy as jnp, jaxjd
      >>> def loss_fn(params, key):
      ...     preference = jax.random.dirichlet(key, jnp.ones(2))
      ...     losses = jnp.stack([jnp.sum((params - 1) ** 2), jnp.sum((params + 1) ** 2)])
      ...     return jaxjd.scalarizers.cosmos(2.0, preference).apply(losses, ())
      >>> gradient = jax.jit(jax.grad(loss_fn))(jnp.zeros(3), jax.random.key(0))
      >>> gradient.shape
      (3,)
      >>> scalarizer = jaxjd.scalarizers.cosmos(1.0, [3.0, 4.0])
      >>> print(scalarizer.apply(jnp.array([3.0, 4.0]), scalarizer.init(2)))
      24.0
    """
    check_range("lambda_", lambda_, at_least=0)
    weights = per_task("weights", weights)

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        vector = loss_vector(losses)
        preference = weights.vector(losses, vector.dtype)
        cosine = jnp.sum(unit_vector(preference) * unit_vector(vector))
        return jnp.sum(preference * vector) - jnp.asarray(lambda_, vector.dtype) * cosine

    return Scalarizer(stateless, apply, keep_state)

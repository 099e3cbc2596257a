"""Jacobians in the training state of flax linen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import optax
from flax.training.train_state import TrainState

from jaxjd.base import Jacobian
from jaxjd.transforms import ensure_aggregated

__all__ = ["JDTrainState"]

# What flax calls the collection of values that their "gradient" replaces (scales of fp8 layers).
_OVERWRITTEN = "_overwrite_with_gradient"


class JDTrainState(TrainState):
    """A flax `TrainState` whose optimizer takes Jacobians and extra arguments.

    ``TrainState.apply_gradients(grads=jacobian)`` already works with a chain that starts with an
    aggregator; what it cannot do is to pass extra arguments on (its keywords are fields to
    replace), and to refuse an update with a task axis, which would broadcast the parameters.

    Attributes:
      step: How many updates there were.
      apply_fn: The model's function, kept here for convenience.
      params: The parameters, any pytree.
      tx: The chain of transformations, aggregator first.
      opt_state: Its state.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> from jaxjd.integrations.flax import JDTrainState
      >>> tx = optax.chain(jaxjd.mgda("l2", num_tasks=2), optax.sgd(0.1))
      >>> state = JDTrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
      >>> losses_fn = lambda params: jnp.stack([jnp.sum(params["w"] ** 2), params["w"][0]])
      >>> losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(state.params)
      >>> state = state.apply_jacobian(jacobian, extra_args={"losses": losses})
      >>> print(int(state.step), state.opt_state[0].weights)
      1 [0. 1.]
    """

    def apply_jacobian(
        self,
        jacobian: Jacobian,
        *,
        extra_args: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Self:
        """Makes one step with a Jacobian.

        Args:
          jacobian: A pytree like `params` whose leaves have shape ``(m, *param.shape)``, dense or
            factored.
          extra_args: What the chain's `update` takes besides, such as ``losses`` or
            ``cross_jacobians``.
          **fields: Fields of this state to replace, such as ``batch_stats``.

        Returns:
          The next state, with `step` one higher.

        Raises:
          ValueError: If an update is not shaped like its parameter (a chain without an aggregator),
            or for parameters with a collection that gradients overwrite.
        """
        if isinstance(self.params, Mapping) and _OVERWRITTEN in self.params:
            raise ValueError(
                f"The parameters have the collection '{_OVERWRITTEN}', whose values are replaced "
                "by their gradient: there is no such thing for several losses. Keep it out of "
                "`params`."
            )
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            jacobian, self.opt_state, self.params, **dict(extra_args or {})
        )
        check = ensure_aggregated()
        updates, _ = check.update(updates, check.init(self.params), self.params)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)

"""An optimizer that does not see the extra arguments of an aggregator before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from jaxjd.base import PyTree
from jaxjd.transforms._arguments import check_transform


def drop_extra_args(
    tx: optax.GradientTransformation, names: Sequence[str] = ("losses", "cross_jacobians")
) -> optax.GradientTransformationExtraArgs:
    """Keeps extra arguments from a transformation that refuses them.

    ``optax.chain`` passes all extra arguments to all of its links. Line searches, and so
    ``optax.lbfgs``, pass what they do not know on to their ``value_fn``, which raises if it does
    not take ``losses``. An aggregator before them may need it.

    Args:
      tx: Any optax transformation.
      names: The extra arguments that it does not get.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of `tx`.

    Raises:
      ValueError: If `tx` is no transformation, or `names` is no sequence of strings.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> def losses_fn(x):
      ...     return jnp.stack([(x - 1.0) @ (x - 1.0), (x + 1.0) @ (x + 1.0)])
      >>> tx = optax.chain(jaxjd.mgda(normalization="loss"), jaxjd.drop_extra_args(optax.lbfgs()))
      >>> x = jnp.array([2.0, 3.0])
      >>> losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(x)
      >>> value_fn = lambda x: losses_fn(x).mean()
      >>> updates, _ = tx.update(
      ...     jacobian,
      ...     tx.init(x),
      ...     x,
      ...     losses=losses,
      ...     value=value_fn(x),
      ...     grad=jax.grad(value_fn)(x),
      ...     value_fn=value_fn,
      ... )
      >>> bool(value_fn(x + updates) < value_fn(x))
      True
    """
    inner = optax.with_extra_args_support(check_transform("tx", tx))
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`names` must be a sequence of strings, got {names!r}.")

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        rest = {name: value for name, value in extra_args.items() if name not in names}
        return inner.update(updates, state, params, **rest)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # type: ignore[arg-type]

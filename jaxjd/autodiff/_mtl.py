"""Multi-task learning: a Jacobian for the shared trunk, plain gradients for the task heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.autodiff._jacobian import check_differentiable, pull_back_tasks, task_basis
from jaxjd.base import Jacobian, PyTree
from jaxjd.checks import check_static_int, type_name

Heads = Callable[..., Any] | Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]]


def mtl_value_and_jacobian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, tuple[Jacobian, PyTree]]]:
    """Returns a function that differentiates a trunk shared by tasks, and the tasks' heads.

    The trunk's forward pass runs once, each head is differentiated once, and the gradients of the
    losses with respect to the features are pulled back through the trunk.

    Args:
      trunk_fn: ``trunk_fn(trunk_params, *args) -> features``, any pytree of arrays.
      heads_fn: A list, tuple or dict with one function per task,
        ``head(head_params, features, *args) -> loss``, a scalar each. Or one function
        ``heads(heads_params, features, *args) -> losses`` with any pytree of losses; that one is
        pulled back once per task, since it cannot be told apart.
      has_aux: Whether the functions return auxiliary output: ``(features, aux)`` and
        ``(loss, aux)``.
      chunk_size: How many tasks are pulled back at once, at least 1; all by default.

    Returns:
      A function ``(trunk_params, heads_params, *args)`` that returns
      ``(losses, (trunk_jacobian, heads_gradients))``; with `has_aux`,
      ``((losses, (trunk_aux, heads_aux)), ...)``. `heads_params` has the outer structure of
      `heads_fn`, and so have the losses. The leaves of `trunk_jacobian` have shape
      ``(m, *param.shape)``, tasks in tree order (a dict's keys are sorted). `heads_gradients` has
      no task axis: it is the gradient of the sum of the losses, for a task's own head that of its
      loss.

    Raises:
      ValueError: If an option is out of range; when called, if the structures differ, a leaf is not
        floating point, or a head's loss is not a scalar.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> trunk = lambda w, x: jnp.tanh(x @ w)
      >>> head = lambda v, features, x: ((features @ v - 1.0) ** 2).mean()
      >>> step_fn = jaxjd.mtl_value_and_jacobian(trunk, {"left": head, "right": head})
      >>> params = {
      ...     "trunk": jnp.ones((2, 3)),
      ...     "heads": {"left": jnp.ones(3), "right": -jnp.ones(3)},
      ... }
      >>> losses, (jacobian, gradients) = step_fn(
      ...     params["trunk"], params["heads"], jnp.ones((4, 2))
      ... )
      >>> jacobian.shape, gradients["left"].shape
      ((2, 2, 3), (3,))

      One optimizer for both: the heads need no aggregation.

      >>> aggregator = jaxjd.partition(
      ...     {"trunk": jaxjd.upgrad(), "heads": optax.identity()},
      ...     {"trunk": "trunk", "heads": "heads"},
      ... )
      >>> tx = optax.chain(aggregator, optax.adam(1e-3))
      >>> grads = {"trunk": jacobian, "heads": gradients}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["trunk"].shape
      (2, 3)
    """
    if chunk_size is not None:
        chunk_size = check_static_int("chunk_size", chunk_size, at_least=1)

    def mtl_fn(
        trunk_params: PyTree, heads_params: PyTree, *args: Any
    ) -> tuple[Any, tuple[Jacobian, PyTree]]:
        check_differentiable(trunk_params)
        check_differentiable(heads_params)

        def trunk(params: PyTree) -> Any:
            return trunk_fn(params, *args)

        trunk_aux = None
        if has_aux:
            features, trunk_back, trunk_aux = jax.vjp(trunk, trunk_params, has_aux=True)
        else:
            features, trunk_back = jax.vjp(trunk, trunk_params)
        differentiate = _whole if callable(heads_fn) else _each
        losses, heads_aux, cotangents, gradients = differentiate(
            heads_fn, heads_params, features, args, has_aux, chunk_size
        )
        (jacobian,) = pull_back_tasks(trunk_back, cotangents, chunk_size)
        values = (losses, (trunk_aux, heads_aux)) if has_aux else losses
        return values, (jacobian, gradients)

    return mtl_fn


def _each(
    heads_fn: Any, heads_params: PyTree, features: Any, args: tuple, has_aux: bool, _: int | None
) -> tuple[Any, Any, Any, PyTree]:
    heads, treedef = jax.tree.flatten(heads_fn)
    if not heads or not all(callable(head) for head in heads):
        raise ValueError(
            "`heads_fn` must be a function or a list, tuple or dict of functions, got "
            f"{heads_fn!r}."
        )
    try:
        params = treedef.flatten_up_to(heads_params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`heads_params` must have the outer structure of `heads_fn`: expected "
            f"{treedef}, found {jax.tree.structure(heads_params)}."
        ) from error
    losses, auxs, cotangents, gradients = [], [], [], []
    for number, (head, head_params) in enumerate(zip(heads, params, strict=True)):

        def loss_of(head_params: PyTree, features: Any, head: Callable = head) -> Any:
            return head(head_params, features, *args)

        aux = None
        if has_aux:
            loss, back, aux = jax.vjp(loss_of, head_params, features, has_aux=True)
        else:
            loss, back = jax.vjp(loss_of, head_params, features)
        if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                f"Head {number} must return a floating point scalar loss, found {type_name(loss)}."
            )
        gradient, cotangent = back(jnp.ones_like(loss))
        losses.append(loss)
        auxs.append(aux)
        cotangents.append(cotangent)
        gradients.append(gradient)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cotangents)
    unflatten = treedef.unflatten
    return unflatten(losses), unflatten(auxs), stacked, unflatten(gradients)


def _whole(
    heads_fn: Any,
    heads_params: PyTree,
    features: Any,
    args: tuple,
    has_aux: bool,
    chunk_size: int | None,
) -> tuple[Any, Any, Any, PyTree]:
    def losses_of(params: PyTree, features: Any) -> Any:
        return heads_fn(params, features, *args)

    aux = None
    if has_aux:
        losses, back, aux = jax.vjp(losses_of, heads_params, features, has_aux=True)
    else:
        losses, back = jax.vjp(losses_of, heads_params, features)
    basis = task_basis(losses)
    cotangents = pull_back_tasks(lambda cotangent: back(cotangent)[1], basis, chunk_size)
    gradients = back(jax.tree.map(jnp.ones_like, losses))[0]
    return losses, aux, cotangents, gradients

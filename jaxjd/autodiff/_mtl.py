"""Multi-task learning: a Jacobian for the shared trunk, plain gradients for the task heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.autodiff._forms import check_form
from jaxjd.autodiff._tapped import tapped_jacobian
from jaxjd.autodiff._tasks import (
    check_chunk_size,
    check_differentiable,
    check_pair,
    count_losses,
    map_in_chunks,
    map_tasks,
    vary_like,
    vjp,
    with_losses,
)
from jaxjd.base import Gramian, Jacobian, PyTree
from jaxjd.checks import check_function, type_name
from jaxjd.linalg.algebra import combine, gramian

Heads = Callable[..., Any] | Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]]


def mtl_value_and_jacobian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "dense",
) -> Callable[..., tuple[Any, tuple[Jacobian, PyTree]]]:
    """Returns a function that differentiates a trunk shared by tasks, and the tasks' heads.

    The trunk's forward pass runs once, each head is differentiated once, and the gradients of the
    losses with respect to the features are pulled back through the trunk.

    Args:
      trunk_fn: ``trunk_fn(trunk_params, *args) -> features``, any pytree; what is no floating
        point array among them, a mask or a key, say, is passed on to the heads.
      heads_fn: A list, tuple or dict with one function per task,
        ``head(head_params, features, *args) -> loss``, a scalar each. Or one function
        ``heads(heads_params, features, *args) -> losses`` with any pytree of losses; with
        ``form="dense"`` that one is pulled back once per task, since it cannot be told apart.
      has_aux: Whether the functions return auxiliary output: ``(features, aux)`` and
        ``(loss, aux)``.
      chunk_size: As for `jaxjd.value_and_jacobian`.
      form: The form of the trunk's leaves, as for `jaxjd.value_and_jacobian`. With ``"auto"`` they
        are kept factored where that is cheaper, which is several times as fast for several tasks
        on a trunk of dense layers; and what each loss owns is looked for, so that it does not
        matter how the heads are written.

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
        floating point, no feature is, or a head's loss is not a scalar.

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
    features_fn = _features(trunk_fn, heads_fn, has_aux, chunk_size, form)

    def tapped(trunk_params: PyTree, heads_params: PyTree, *args: Any) -> tuple[Any, Any]:
        check_differentiable(trunk_params)
        check_differentiable(heads_params)

        def losses_of(trunk_params: PyTree, heads_params: PyTree) -> tuple[Any, Any]:
            features, trunk_aux = _run_trunk(trunk_fn, trunk_params, args, has_aux)
            losses, heads_aux = _run_heads(heads_fn, heads_params, features, args, has_aux)
            return losses, (trunk_aux, heads_aux)

        losses, aux, (jacobian, rows) = tapped_jacobian(
            losses_of, (trunk_params, heads_params), True, chunk_size, form, cut=True
        )
        return ((losses, aux) if has_aux else losses), (jacobian, _sum_of(rows, losses))

    def mtl_fn(
        trunk_params: PyTree, heads_params: PyTree, *args: Any
    ) -> tuple[Any, tuple[Jacobian, PyTree]]:
        values, trunk_back, cotangents, gradients = features_fn(trunk_params, heads_params, *args)
        (jacobian,) = map_in_chunks(trunk_back, cotangents, chunk_size)
        return values, (jacobian, gradients)

    return mtl_fn if form == "dense" else tapped


def mtl_value_and_gramian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "dense",
) -> Callable[..., tuple[Any, Gramian, Callable[[jax.Array], tuple[PyTree, PyTree]]]]:
    r"""Returns a function that computes the Gramian of the tasks at the features, and a pullback.

    .. math:: G_{ij} = \langle \nabla_z \ell_i, \nabla_z \ell_j \rangle

    for the features :math:`z`. The trunk is differentiated once, whatever the number of tasks: a
    step costs about as much as a gradient step. This is MGDA-UB of Sener and Koltun, "Multi-Task
    Learning as Multi-Objective Optimization" (NeurIPS 2018, https://arxiv.org/abs/1810.04650), for
    every weighting.

    What is lost: the trunk's parameters have the Gramian :math:`C C^\top` with rows
    :math:`C_i = \nabla_z \ell_i \, \partial z / \partial \theta`, with the trunk's own Jacobian in
    between. Gradients that agree at the features can conflict at the parameters and the other way
    round, so what a method promises for the parameters (that no loss increases, that the norm is
    minimal) holds for the features only. Where the trunk's Jacobian has full row rank, a
    combination is zero at the features if and only if it is zero at the parameters, so that the
    Pareto stationary points are the same. For exact weights use `jaxjd.value_and_gramian`.

    Args:
      trunk_fn: As for `jaxjd.mtl_value_and_jacobian`.
      heads_fn: As for `jaxjd.mtl_value_and_jacobian`.
      has_aux: As for `jaxjd.mtl_value_and_jacobian`.
      chunk_size: How many tasks a single function `heads_fn` is pulled back for at once.
      form: With ``"auto"`` what each loss owns is looked for in a single function `heads_fn`, too,
        and pulled back once; with ``"dense"`` that is pulled back once per task.

    Returns:
      A function ``(trunk_params, heads_params, *args)`` that returns
      ``(losses, gramian, pullback)``; with `has_aux`, ``((losses, (trunk_aux, heads_aux)), ...)``.
      The Gramian has shape ``(m, m)``, tasks in tree order. ``pullback(weights)`` takes weights of
      shape ``(m,)`` and returns ``(trunk_gradient, heads_gradients)``: the trunk's is weighted, and
      the heads', as in `jaxjd.mtl_value_and_jacobian`, are the gradient of the sum of the losses.

    Raises:
      ValueError: As for `jaxjd.mtl_value_and_jacobian`; by the pullback, if there is not one weight
        per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> trunk = lambda w, x: jnp.tanh(x @ w)
      >>> head = lambda v, features, x: ((features @ v - 1.0) ** 2).mean()
      >>> step_fn = jaxjd.mtl_value_and_gramian(trunk, [head, head])
      >>> losses, gramian, pullback = step_fn(
      ...     jnp.ones((2, 3)), [jnp.ones(3), -jnp.ones(3)], jnp.ones((4, 2))
      ... )
      >>> weights, _ = jaxjd.weightings.mgda().update(gramian, ())
      >>> trunk_gradient, heads_gradients = pullback(weights)
      >>> trunk_gradient.shape, heads_gradients[0].shape
      ((2, 3), (3,))
    """
    features_fn = _features(trunk_fn, heads_fn, has_aux, chunk_size, form)

    def mtl_fn(trunk_params: PyTree, heads_params: PyTree, *args: Any) -> tuple[Any, Any, Any]:
        values, trunk_back, cotangents, gradients = features_fn(trunk_params, heads_params, *args)

        def pullback(weights: jax.Array) -> tuple[PyTree, PyTree]:
            return trunk_back(combine(weights, cotangents))[0], gradients

        return values, gramian(cotangents), pullback

    return mtl_fn


def _run_trunk(trunk_fn: Callable[..., Any], params: PyTree, args: tuple, has_aux: bool) -> Any:
    """The features and the auxiliary output."""
    found = trunk_fn(params, *args)
    features, aux = check_pair(found) if has_aux else (found, None)
    if not any(map(_is_differentiable, jax.tree.leaves(features))):
        raise ValueError(
            "`trunk_fn` must return features, among them a floating point array, found "
            f"{type_name(features)}."
        )
    return features, aux


def _each_head(heads_fn: Any, heads_params: PyTree) -> tuple[list[Any], list[Any], Any]:
    """The heads, the parameters of each, and their structure."""
    heads, treedef = jax.tree.flatten(heads_fn)
    if not heads or not all(callable(head) for head in heads):
        raise ValueError(
            "`heads_fn` must be a function or a list, tuple or dict of functions, got "
            f"{heads_fn!r}."
        )
    try:
        return heads, treedef.flatten_up_to(heads_params), treedef
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`heads_params` must have the outer structure of `heads_fn`: expected "
            f"{treedef}, found {jax.tree.structure(heads_params)}."
        ) from error


def _check_scalar(number: int, loss: Any) -> None:
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"Head {number} must return a floating point scalar loss, found {type_name(loss)}."
        )


def _run_heads(
    heads_fn: Heads, heads_params: PyTree, features: Any, args: tuple, has_aux: bool
) -> tuple[Any, Any]:
    """The losses and the auxiliary output."""
    if callable(heads_fn):
        found = with_losses(heads_fn, has_aux)(heads_params, features, *args)
        return found if has_aux else (found, None)
    heads, params, treedef = _each_head(heads_fn, heads_params)
    losses, auxs = [], []
    for number, (head, head_params) in enumerate(zip(heads, params, strict=True)):
        found = with_losses(head, has_aux)(head_params, features, *args)
        loss, aux = found if has_aux else (found, None)
        _check_scalar(number, loss)
        losses.append(loss)
        auxs.append(aux)
    return treedef.unflatten(losses), treedef.unflatten(auxs)


def _sum_of(rows: Jacobian, losses: PyTree) -> PyTree:
    """The gradient of the sum of the losses."""
    if not jax.tree.leaves(rows):
        return rows
    return combine(jnp.ones(count_losses(losses)), rows)


def _features(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool,
    chunk_size: int | None,
    form: str,
) -> Callable[..., tuple[Any, Callable, Any, PyTree]]:
    """What both engines start with: the heads differentiated, the trunk not yet."""
    check_function("trunk_fn", trunk_fn)
    check_form(form)
    chunk_size = check_chunk_size(chunk_size)

    def features_fn(
        trunk_params: PyTree, heads_params: PyTree, *args: Any
    ) -> tuple[Any, Callable, Any, PyTree]:
        check_differentiable(trunk_params)
        check_differentiable(heads_params)

        def trunk(params: PyTree) -> tuple[list[Any], Any]:
            features, aux = _run_trunk(trunk_fn, params, args, has_aux)
            leaves, treedef = jax.tree.flatten(features)
            differentiated = [leaf for leaf in leaves if _is_differentiable(leaf)]
            rest = [None if _is_differentiable(leaf) else (leaf,) for leaf in leaves]
            return differentiated, (rest, treedef, aux)

        leaves, trunk_back, (rest, treedef, trunk_aux) = jax.vjp(trunk, trunk_params, has_aux=True)

        def join(differentiated: list[Any]) -> Any:
            left = iter(differentiated)
            return jax.tree.unflatten(treedef, [next(left) if r is None else r[0] for r in rest])

        if form != "dense":

            def losses_of(heads_params: PyTree, leaves: list[Any]) -> tuple[Any, Any]:
                return _run_heads(heads_fn, heads_params, join(leaves), args, has_aux)

            losses, heads_aux, (rows, cotangents) = tapped_jacobian(
                losses_of, (heads_params, leaves), True, chunk_size, form, cut=True
            )
            values = (losses, (trunk_aux, heads_aux)) if has_aux else losses
            return values, trunk_back, cotangents, _sum_of(rows, losses)

        differentiate = _whole if callable(heads_fn) else _each
        losses, heads_aux, cotangents, gradients = differentiate(
            heads_fn, heads_params, leaves, join, args, has_aux, chunk_size
        )
        values = (losses, (trunk_aux, heads_aux)) if has_aux else losses
        return values, trunk_back, cotangents, gradients

    return features_fn


def _each(
    heads_fn: Any,
    heads_params: PyTree,
    features: list[Any],
    join: Callable[[list[Any]], Any],
    args: tuple,
    has_aux: bool,
    _: int | None,
) -> tuple[Any, Any, Any, PyTree]:
    heads, params, treedef = _each_head(heads_fn, heads_params)
    losses, auxs, cotangents, gradients = [], [], [], []
    for number, (head, head_params) in enumerate(zip(heads, params, strict=True)):

        def loss_of(head_params: PyTree, features: list[Any], head: Callable = head) -> Any:
            return head(head_params, join(features), *args)

        loss, back, aux = vjp(loss_of, head_params, features, has_aux=has_aux)
        _check_scalar(number, loss)
        gradient, cotangent = back(vary_like(jnp.ones_like(loss), loss))
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
    features: list[Any],
    join: Callable[[list[Any]], Any],
    args: tuple,
    has_aux: bool,
    chunk_size: int | None,
) -> tuple[Any, Any, Any, PyTree]:
    def losses_of(params: PyTree, features: list[Any]) -> Any:
        return heads_fn(params, join(features), *args)

    losses, back, aux = vjp(losses_of, heads_params, features, has_aux=has_aux)
    cotangents = map_tasks(lambda cotangent: back(cotangent)[1], losses, chunk_size)
    ones = jax.tree.map(lambda loss: vary_like(jnp.ones_like(loss), loss), losses)
    gradients = back(ones)[0]
    return losses, aux, cotangents, gradients


def _is_differentiable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)

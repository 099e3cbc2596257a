"""Multi-task learning: a Jacobian for the shared trunk, plain gradients for the task heads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.autodiff._forms import check_form
from jaxjd.autodiff._gramian import Pullback, gramian_of
from jaxjd.autodiff._tapped import differentiate
from jaxjd.autodiff._tasks import check_chunk_size, check_differentiable, check_pair, with_losses
from jaxjd.base import Differentiated, Jacobian, PyTree
from jaxjd.checks import check_function, type_name

Heads = Callable[..., Any] | Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]]


def mtl_value_and_jacobian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "dense",
) -> Callable[..., tuple[Any, tuple[Jacobian, PyTree]]]:
    """Returns a function that differentiates a trunk shared by tasks, and the tasks' heads.

    It is `jaxjd.value_and_jacobian` for parameters of two kinds, and `argnums` has no meaning here:
    the trunk's have a Jacobian, the heads' only the gradient of the sum of the losses, for which
    all heads are pulled back once. What each loss owns is looked for in the function as it is
    written, so that it does not matter whether the heads are one function or many.

    Args:
      trunk_fn: ``trunk_fn(trunk_params, *args, **kwargs) -> features``, any pytree; what is no
        floating point array among them, a mask or a key, say, is passed on to the heads.
      heads_fn: A list, tuple or dict with one function per task,
        ``head(head_params, features, *args, **kwargs) -> loss``, a scalar each. Or one function
        ``heads(heads_params, features, *args, **kwargs) -> losses`` with any pytree of losses.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      chunk_size: How many losses are pulled back at once, at least 1; all by default, and one with
        ``form="products"``. Less memory for more time. With 1 nothing is batched, so that whatever
        ``jax.grad`` of one loss can do works.
      form: How the Jacobian is held. ``"auto"``: leaf by leaf in what is cheaper for its shape.
        ``"dense"``: in arrays of shape ``(m, *param.shape)``, as from ``jax.jacrev``.
        ``"factored"``: in factors wherever there are any. ``"products"``, for Gramians only: not at
        all; losses are pulled back one by one and nothing is batched, for when nothing else fits.
        "Engines" in the guide has more.

    Returns:
      A function ``(trunk_params, heads_params, *args, **kwargs)`` that returns
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
    check_function("trunk_fn", trunk_fn)
    check_form(form)
    chunk_size = check_chunk_size(chunk_size)

    def mtl_fn(
        trunk_params: PyTree, heads_params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, tuple[Jacobian, PyTree]]:
        check_differentiable(trunk_params)
        check_differentiable(heads_params)
        run_trunk, run_heads = _parts(trunk_fn, heads_fn, has_aux, args, kwargs)

        def losses_of(trunk_params: PyTree, heads_params: PyTree) -> tuple[Any, Any]:
            features, trunk_aux = run_trunk(trunk_params)
            losses, heads_aux = run_heads(features, heads_params)
            return losses, (trunk_aux, heads_aux)

        losses, aux, (jacobian,), (gradients,) = differentiate(
            losses_of, [trunk_params], True, chunk_size, form, summed=[heads_params]
        )
        return ((losses, aux) if has_aux else losses), (jacobian, gradients)

    return Differentiated((0, 1), False, has_aux).tell(mtl_fn)


def mtl_value_and_gramian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "auto",
    labels: Any = None,
) -> Callable[..., tuple[Any, Any, Pullback]]:
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
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      chunk_size: How many losses are pulled back at once, at least 1; all by default, and one with
        ``form="products"``. Less memory for more time. With 1 nothing is batched, so that whatever
        ``jax.grad`` of one loss can do works.
      form: How the Jacobian is held. ``"auto"``: leaf by leaf in what is cheaper for its shape.
        ``"dense"``: in arrays of shape ``(m, *param.shape)``, as from ``jax.jacrev``.
        ``"factored"``: in factors wherever there are any. ``"products"``, for Gramians only: not at
        all; losses are pulled back one by one and nothing is batched, for when nothing else fits.
        "Engines" in the guide has more.
      labels: Groups of features, as `jaxjd.partition` has groups of parameters: of those of two
        trunks, say, that have weights of their own.

    Returns:
      A function ``(trunk_params, heads_params, *args, **kwargs)`` that returns
      ``(losses, gramian, pullback)``; with `has_aux`, ``((losses, (trunk_aux, heads_aux)), ...)``.
      The Gramian has shape ``(m, m)``, tasks in tree order; with `labels` it is a dict with one for
      each group. ``pullback(weights)`` takes weights of shape ``(m,)``, with `labels` also a dict
      of such, and returns ``(trunk_gradient, heads_gradients)``: the trunk's is weighted, and
      the heads', as in `jaxjd.mtl_value_and_jacobian`, are the gradient of the sum of the losses.

    Raises:
      ValueError: As for `jaxjd.mtl_value_and_jacobian` and `jaxjd.value_and_gramian`.

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
    check_function("trunk_fn", trunk_fn)
    check_form(form, products=True)
    chunk_size = check_chunk_size(chunk_size)

    def mtl_fn(
        trunk_params: PyTree, heads_params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Pullback]:
        check_differentiable(trunk_params)
        check_differentiable(heads_params)
        run_trunk, run_heads = _parts(trunk_fn, heads_fn, has_aux, args, kwargs)

        def trunk(params: PyTree) -> tuple[PyTree, Any]:
            features, aux = run_trunk(params)
            leaves, treedef = jax.tree.flatten(features)
            rest = [None if _is_differentiable(leaf) else leaf for leaf in leaves]
            hidden = [leaf if _is_differentiable(leaf) else None for leaf in leaves]
            return treedef.unflatten(hidden), (rest, treedef, aux)

        features, trunk_back, (rest, treedef, trunk_aux) = jax.vjp(
            trunk, trunk_params, has_aux=True
        )

        def losses_of(features: PyTree, heads_params: PyTree) -> tuple[Any, Any]:
            leaves = iter(jax.tree.leaves(features))
            full = [next(leaves) if leaf is None else leaf for leaf in rest]
            return run_heads(treedef.unflatten(full), heads_params)

        losses, heads_aux, gramians, features_pullback, (gradients,) = gramian_of(
            *(losses_of, [features], True, True, chunk_size, form, labels), summed=[heads_params]
        )

        def pullback(weights: Any) -> tuple[PyTree, PyTree]:
            return trunk_back(features_pullback(weights))[0], gradients

        aux = (trunk_aux, heads_aux)
        return ((losses, aux) if has_aux else losses), gramians, pullback

    return mtl_fn


def _parts(
    trunk_fn: Callable[..., Any],
    heads_fn: Any,
    has_aux: bool,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[Callable[..., tuple[Any, Any]], Callable[..., tuple[Any, Any]]]:
    """Trunk and heads as functions of parameters and features; both return auxiliary output."""

    def run_trunk(params: PyTree) -> tuple[Any, Any]:
        found = trunk_fn(params, *args, **kwargs)
        features, aux = check_pair(found) if has_aux else (found, None)
        if not any(map(_is_differentiable, jax.tree.leaves(features))):
            raise ValueError(
                "`trunk_fn` must return features, among them a floating point array, found "
                f"{type_name(features)}."
            )
        return features, aux

    def run(head: Callable[..., Any], params: PyTree, features: Any) -> tuple[Any, Any]:
        found = with_losses(functools.partial(head, **kwargs), has_aux)(params, features, *args)
        return found if has_aux else (found, None)

    def run_heads(features: Any, params: PyTree) -> tuple[Any, Any]:
        if callable(heads_fn):
            return run(heads_fn, params, features)
        heads, each, treedef = _each_head(heads_fn, params)
        pairs = [run(*pair, features) for pair in zip(heads, each, strict=True)]
        for number, (loss, _) in enumerate(pairs):
            _check_scalar(number, loss)
        losses, auxs = zip(*pairs, strict=True)
        return treedef.unflatten(losses), treedef.unflatten(auxs)

    return run_trunk, run_heads


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


def _is_differentiable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)

"""Losses, their Gramian, and a pullback: an aggregated step without the Jacobian in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.autodiff._forms import check_form
from jaxjd.autodiff._jacobian import arguments, check_argnums, joined
from jaxjd.autodiff._tapped import differentiate
from jaxjd.autodiff._tasks import (
    check_chunk_size,
    count_losses,
    map_in_chunks,
    map_tasks,
    ones_like,
    spread,
    unit,
    vjp,
)
from jaxjd.base import Gramian, Jacobian, PyTree
from jaxjd.checks import check_function, check_weights
from jaxjd.labels import resolve
from jaxjd.linalg.algebra import combine, count_tasks, cross_gramian, gramian

Pullback = Callable[[Any], PyTree]
"""Takes weights, ``(m,)``, and returns the combination of the gradients."""


def value_and_gramian(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "auto",
    labels: Any = None,
) -> Callable[..., tuple[Any, Any, Pullback]]:
    r"""Returns a function that computes the losses, their Gramian, and a pullback.

    .. math:: G = J J^\top, \qquad \text{pullback}(w) = J^\top w

    With `jaxjd.weightings` in between it is an aggregated training step, in which the Jacobian need
    not exist: for a kernel used as ``y = a @ W`` the Gramian of its gradients :math:`a^\top b_i`
    comes from `a` and the cotangents :math:`b_i` at `y`, and so does their combination. One step
    costs about ``(m + 2) / 3`` gradient steps where the Jacobian costs ``(2 m + 1) / 3`` and `m`
    copies of the parameters. From Novak, Sohl-Dickstein and Schoenholz, "Fast Finite Width Neural
    Tangent Kernel" (ICML 2022, https://arxiv.org/abs/2206.08720), applied to losses.

    Args:
      fn: A function that returns the losses, as for `jaxjd.value_and_jacobian`.
      argnums: Which positional arguments to differentiate, as for `jaxjd.value_and_jacobian`.
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
      labels: Groups of parameters, as for `jaxjd.partition`.

    Returns:
      A function of the arguments of `fn` that returns ``(losses, gramian, pullback)``, with
      ``(losses, aux)`` in the place of the losses if `has_aux`. The Gramian has shape ``(m, m)``;
      with `labels` it is a dict with one for each group. ``pullback(weights)`` takes weights of
      shape ``(m,)``, with `labels` also a dict of such, and returns a pytree like the
      differentiated argument. Like a factored leaf, it lives inside one traced step.

    Raises:
      ValueError: As for `jaxjd.value_and_jacobian`, and if a leaf has no label; by the pullback, if
        the weights have the wrong shape or belong to other groups.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> def losses(params, x):
      ...     y = jnp.tanh(x @ params["hidden"]) @ params["out"]
      ...     return jnp.mean((y - jnp.array([[1.0, -1.0]])) ** 2, axis=0)
      >>> params = {"hidden": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> weighting = jaxjd.weightings.upgrad()
      >>> @jax.jit
      ... def step(params, x):
      ...     values, gramian, pullback = jaxjd.value_and_gramian(losses)(params, x)
      ...     weights, _ = weighting.update(gramian, weighting.init(2))
      ...     return values, gramian, pullback(weights)
      >>> values, gramian, gradient = step(params, jnp.ones((5, 3)))
      >>> gramian.shape, gradient["hidden"].shape
      ((2, 2), (3, 4))
    """
    check_function("fn", fn)
    check_form(form, products=True)
    numbers, single = check_argnums(argnums)
    chunk_size = check_chunk_size(chunk_size)

    def value_and_gramian_fn(*args: Any, **kwargs: Any) -> tuple[Any, Any, Pullback]:
        losses_of, chosen = arguments(fn, numbers, args, kwargs)
        losses, aux, gramians, pullback, _ = gramian_of(
            losses_of, chosen, single, has_aux, chunk_size, form, labels
        )
        return ((losses, aux) if has_aux else losses), gramians, pullback

    return value_and_gramian_fn


def gramian_of(
    losses_of: Callable[..., Any],
    chosen: Sequence[PyTree],
    single: bool,
    has_aux: bool,
    chunk_size: int | None,
    form: str,
    labels: Any,
    summed: Sequence[PyTree] = (),
) -> tuple[Any, Any, Any, Pullback, Sequence[PyTree]]:
    """As `differentiate`, with the Gramian and a pullback in the place of the Jacobian."""
    groups = Groups.of(labels, joined(chosen, single))
    if form == "products":
        return _by_products(losses_of, chosen, single, has_aux, chunk_size or 1, groups, summed)
    losses, aux, jacobians, gradients = differentiate(
        losses_of, chosen, has_aux, chunk_size, form, summed
    )
    jacobian = joined(jacobians, single)
    return losses, aux, groups.apply(gramian, jacobian), groups.pullback(jacobian), gradients


class Groups(NamedTuple):
    """Groups of parameters, each with its own Gramian.

    Attributes:
      found: The label of every leaf, or None without labels.
    """

    found: list[str] | None

    @classmethod
    def of(cls, labels: Any, params: PyTree) -> Groups:
        return cls(None if labels is None else resolve(labels, params))

    @property
    def names(self) -> list[str]:
        return sorted(set(self.found or ()))

    def cut(self, tree: PyTree, name: str, fill: Callable[[Any], Any] | None = None) -> list[Any]:
        """The leaves of one group; with `fill`, all leaves with those of others replaced."""
        pairs = zip(jax.tree.leaves(tree), self.found or (), strict=True)
        if fill is None:
            return [leaf for leaf, label in pairs if label == name]
        return [leaf if label == name else fill(leaf) for leaf, label in pairs]

    def apply(self, fn: Callable[..., Gramian], *jacobians: Jacobian) -> Any:
        """What a function gives for Jacobians, or with groups a dict of what it gives for each."""
        if self.found is None:
            return fn(*jacobians)
        return {
            name: fn(*(self.cut(jacobian, name) for jacobian in jacobians)) for name in self.names
        }

    def weights(self, weights: Any, num_tasks: int | None) -> Any:
        """Checks weights; returns them, or with groups a dict of them."""
        if self.found is None:
            return check_weights("weights", weights, num_tasks)
        if not isinstance(weights, Mapping):
            checked = check_weights("weights", weights, num_tasks)
            return dict.fromkeys(self.names, checked)
        if sorted(weights) != self.names:
            raise ValueError(
                f"`weights` must have one entry per group, {self.names}, found {sorted(weights)}."
            )
        return {
            name: check_weights(f"weights[{name!r}]", value, num_tasks)
            for name, value in weights.items()
        }

    def spread(self, weights: Any, num_tasks: int, pull_back: Callable) -> PyTree:
        """Pulls back the weights of every group, and takes its leaves of the result."""
        checked = self.weights(weights, num_tasks)
        if self.found is None:
            return pull_back(checked)
        gradients = {name: pull_back(value) for name, value in checked.items()}
        treedef = jax.tree.structure(gradients[self.names[0]])
        leaves = {name: jax.tree.leaves(gradient) for name, gradient in gradients.items()}
        chosen = [leaves[label][place] for place, label in enumerate(self.found)]
        return jax.tree.unflatten(treedef, chosen)

    def pullback(self, jacobian: Jacobian) -> Pullback:
        num_tasks = count_tasks(jacobian)

        def pullback(weights: Any) -> PyTree:
            checked = self.weights(weights, num_tasks)
            if self.found is None:
                return combine(checked, jacobian)
            leaves, treedef = jax.tree.flatten(jacobian)
            combined = [
                combine(checked[label], leaf)
                for leaf, label in zip(leaves, self.found, strict=True)
            ]
            return jax.tree.unflatten(treedef, combined)

        return pullback


def _by_products(
    losses_of: Callable[..., Any],
    chosen: Sequence[PyTree],
    single: bool,
    has_aux: bool,
    chunk_size: int,
    groups: Groups,
    summed: Sequence[PyTree],
) -> tuple[Any, Any, Any, Pullback, Sequence[PyTree]]:
    losses, aux, pull_all, pullback = pull_weights(
        losses_of, chosen, single, has_aux, groups, summed
    )

    def pull(cotangents: PyTree) -> PyTree:
        return joined(pull_all(cotangents)[: len(chosen)], single)

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(losses))
    numbers_of_tasks = jnp.arange(count_losses(losses))
    # Not jax.linearize: functions with a rule for the backward pass only have no other.
    transposed = jax.linear_transpose(pull, losses)

    def products(gradient: PyTree) -> jax.Array:
        # The transposed pullback has no conjugate, and its result is real: that is the real part.
        parts = jax.tree.leaves(transposed(jax.tree.map(jnp.conj, gradient)))
        return jnp.concatenate([jnp.ravel(part).astype(dtype) for part in parts])

    def products_one_by_one(gradient: PyTree) -> jax.Array:
        rows = jax.tree.map(lambda leaf: leaf[None], gradient)

        def with_task(task: jax.Array) -> jax.Array:
            other = jax.tree.map(lambda leaf: leaf[None], pull(unit(losses, task)))
            return cross_gramian(other, rows)[0, 0].astype(dtype)

        return map_in_chunks(with_task, numbers_of_tasks, chunk_size)

    # A backward pass that cannot be differentiated, a kernel or a callback, runs m times more.
    if not _runs(transposed, jax.eval_shape(pull, losses)):
        products = products_one_by_one

    def column(cotangent: PyTree) -> Any:
        gradient = pull(cotangent)
        if groups.found is None:
            return products(gradient)
        treedef = jax.tree.structure(gradient)
        return {
            name: products(jax.tree.unflatten(treedef, groups.cut(gradient, name, jnp.zeros_like)))
            for name in groups.names
        }

    gramians = map_tasks(column, losses, chunk_size)
    # The two halves are rounded differently.
    gramians = jax.tree.map(lambda matrix: (matrix + matrix.T) / 2, gramians)
    gradients = pull_all(ones_like(losses))[len(chosen) :] if summed else ()
    return losses, aux, gramians, pullback, gradients


def pull_weights(
    losses_of: Callable[..., Any],
    chosen: Sequence[PyTree],
    single: bool,
    has_aux: bool,
    groups: Groups,
    summed: Sequence[PyTree] = (),
) -> tuple[Any, Any, Callable[[PyTree], Any], Pullback]:
    """Runs a function of the chosen arguments, and of what is summed, once, to be pulled back.

    Returns:
      The losses; the auxiliary output; what takes cotangents of the losses to gradients of all
      arguments; and what takes weights, of every group if there are groups, to one gradient of what
      is chosen.
    """
    losses, pull, aux = vjp(losses_of, *chosen, *summed, has_aux=has_aux)

    def pull_back(weights: jax.Array) -> Any:
        return joined(pull(spread(weights, losses))[: len(chosen)], single)

    def pullback(weights: Any) -> PyTree:
        return groups.spread(weights, count_losses(losses), pull_back)

    return losses, aux, pull, pullback


def _runs(fn: Callable[..., Any], *args: Any) -> bool:
    try:
        jax.eval_shape(fn, *args)
    except Exception:  # Every primitive says in its own way that it has no rule.
        return False
    return True

"""The Jacobian by taps: one forward pass, one backward pass per task without kernels' gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.autodiff._forms import Choice, check_form, choose
from jaxjd.autodiff._taps import Plan, Taps, evaluate, find, prune
from jaxjd.autodiff._tasks import (
    batch_size,
    check_differentiable,
    count_losses,
    pull_back_tasks,
    task_basis,
    vary_like,
)
from jaxjd.base import PyTree
from jaxjd.linalg.factored import FactoredLeaf


class Traced(NamedTuple):
    """A function as a jaxpr of flat arguments.

    Attributes:
      jaxpr: The jaxpr with its constants.
      outputs: The structure of ``(losses, aux)``.
      num_losses: How many of the flat outputs are losses.
    """

    jaxpr: Any
    outputs: Any
    num_losses: int

    @property
    def num_tasks(self) -> int:
        return sum(var.aval.size for var in self.jaxpr.jaxpr.outvars[: self.num_losses])

    def split(self, flat: list[Any]) -> tuple[list[Any], list[Any]]:
        return flat[: self.num_losses], flat[self.num_losses :]


def trace(fn: Callable[..., Any], args: PyTree, has_aux: bool) -> Traced:
    """Traces ``fn(*args)``; the arguments' leaves, flat, are those of the jaxpr."""
    leaves, treedef = jax.tree.flatten(args)
    seen: list[Any] = []

    def flat_fn(*leaves: Any) -> list[Any]:
        found = fn(*jax.tree.unflatten(treedef, leaves))
        losses, aux = found if has_aux else (found, None)
        count_losses(losses)  # Reports what is no loss with its path.
        seen.append((jax.tree.structure((losses, aux)), len(jax.tree.leaves(losses))))
        return jax.tree.leaves((losses, aux))

    jaxpr = jax.make_jaxpr(flat_fn)(*leaves)
    return Traced(jaxpr, *seen[-1])


class Split(NamedTuple):
    """What of a function is tapped, and what is differentiated as usual.

    Attributes:
      taps: Where the parameters are used.
      choices: The form of every leaf.
      plan: The sites that are tapped.
      rest: The numbers of the parameters that are differentiated.
    """

    taps: Taps
    choices: list[Choice]
    plan: Plan
    rest: list[int]

    def zeros(self) -> dict[int, jax.Array]:
        tapped = [n for n in self.taps.sites if n not in self.rest]
        zeros = {}
        for number in tapped:
            site = self.taps.sites[number]
            zero = jnp.zeros(site.output.shape, site.output.dtype)
            zeros[number] = vary_like(zero, site.equation.outvars[0].aval)
        return zeros

    def leaf(
        self, number: int, inputs: jax.Array, cotangents: jax.Array, per_task: bool = False
    ) -> jax.Array | FactoredLeaf:
        leaf = self.taps.sites[number].leaf(inputs, cotangents, per_task)
        return leaf if self.choices[number].form == "factored" else leaf.materialize()


def split(traced: Traced, num_params: int, m: int, form: str, per_task: bool = False) -> Split:
    """Decides about every parameter of a traced function."""
    taps = find(traced.jaxpr.jaxpr, num_params)
    choices = choose(taps, num_params, m, form, per_task)
    rest = [number for number, choice in enumerate(choices) if not choice.tapped]
    tapped = set(range(num_params)) - set(rest)
    return Split(taps, choices, prune(taps.plan, tapped), rest)


def plan_jacobian(
    fn: Callable[..., Any],
    params: PyTree,
    args: tuple,
    has_aux: bool = False,
    form: str = "auto",
    per_example: bool = False,
) -> tuple[list[Choice], dict[int, Any], int]:
    """Returns the form of every leaf, the layers that were found, and the number of tasks."""
    check_form(form)
    check_differentiable(params)
    size = batch_size(args) if per_example else None
    if per_example:
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), args)
    traced = trace(fn, (params, *args), has_aux)
    num_params = len(jax.tree.leaves(params))
    m = traced.num_tasks if size is None else size
    parts = split(traced, num_params, m, form, per_task=per_example)
    return parts.choices, parts.taps.sites, m


def tapped_jacobian(
    losses_of: Callable[..., Any],
    args: tuple[Any, ...],
    has_aux: bool,
    chunk_size: int | None,
    form: str,
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Returns the losses, the auxiliary output and the Jacobian of every argument."""
    traced = trace(losses_of, args, has_aux)
    leaves, treedef = jax.tree.flatten(args)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    parts = split(traced, len(leaves), traced.num_tasks, form)

    def run(rest: dict[int, jax.Array], taps: dict[int, jax.Array]) -> tuple[Any, Any]:
        full = [rest.get(number, leaf) for number, leaf in enumerate(leaves)]
        outputs, inputs = evaluate(traced.jaxpr.jaxpr, traced.jaxpr.consts, full, parts.plan, taps)
        losses, aux = traced.split(outputs)
        return losses, (aux, inputs)

    rest = {number: leaves[number] for number in parts.rest}
    losses, pull_back, (aux, inputs) = jax.vjp(run, rest, parts.zeros(), has_aux=True)
    dense, cotangents = pull_back_tasks(pull_back, task_basis(losses), chunk_size)
    jacobian = [
        dense[number] if number in dense else parts.leaf(number, inputs[number], cotangents[number])
        for number in range(len(leaves))
    ]
    losses, aux = jax.tree.unflatten(traced.outputs, [*losses, *aux])
    return losses, aux, jax.tree.unflatten(treedef, jacobian)

"""The Jacobian by taps: one forward pass, one backward pass per task without kernels' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.autodiff import _parts as parts
from jaxjd.autodiff._forms import Choice, check_form, choose
from jaxjd.autodiff._owners import inline
from jaxjd.autodiff._taps import Plan, Taps, evaluate, find, prune
from jaxjd.autodiff._tasks import (
    batch_size,
    check_differentiable,
    count_losses,
    map_tasks,
    ones_like,
    vary_like,
    vjp,
    with_losses,
)
from jaxjd.base import Jacobian, PyTree
from jaxjd.checks import check_function
from jaxjd.linalg.costs import prefers_factors
from jaxjd.linalg.factored import FactoredLeaf

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Traced(NamedTuple):
    """A function as a jaxpr of flat arguments.

    Attributes:
      jaxpr: The jaxpr with its constants.
      outputs: The structure of ``(losses, aux)``.
      num_losses: How many of the flat outputs are losses.
      objects: What is no output of the jaxpr, by its place in ``(losses, aux)``: what is no array.
    """

    jaxpr: Any
    outputs: Any
    num_losses: int
    objects: dict[int, Any]

    @property
    def num_tasks(self) -> int:
        return sum(var.aval.size for var in self.jaxpr.jaxpr.outvars[: self.num_losses])

    def split(self, flat: list[Any]) -> tuple[list[Any], list[Any]]:
        return flat[: self.num_losses], flat[self.num_losses :]

    def join(self, arrays: list[Any]) -> tuple[Any, Any]:
        """``(losses, aux)`` from the outputs of the jaxpr."""
        rest = iter(arrays)
        leaves = [
            self.objects[place] if place in self.objects else next(rest)
            for place in range(self.outputs.num_leaves)
        ]
        return jax.tree.unflatten(self.outputs, leaves)


def trace(
    fn: Callable[..., Any],
    args: PyTree,
    has_aux: bool,
    is_output: Callable[[Any], bool] = lambda leaf: isinstance(leaf, jax.Array),
    way_out: str = "or pass form='dense' outside of jax.jit, which runs it on values",
) -> Traced:
    """Traces ``fn(*args)``; the arguments' leaves, flat, are those of the jaxpr.

    Args:
      fn: The function.
      args: Its arguments.
      has_aux: Whether it returns auxiliary output.
      is_output: Which leaves of the auxiliary output come out of the jaxpr.
      way_out: What else to do where the function needs values to be traced.

    Raises:
      ValueError: If the function needs values that are known without tracing.
    """
    leaves, treedef = jax.tree.flatten(args)
    seen: list[Any] = []
    losses_fn = with_losses(fn, has_aux)

    def flat_fn(*leaves: Any) -> list[Any]:
        found = losses_fn(*jax.tree.unflatten(treedef, leaves))
        losses, aux = found if has_aux else (found, None)
        count_losses(losses)  # Reports what is no loss with its path.
        num_losses = len(jax.tree.leaves(losses))
        flat, outputs = jax.tree.flatten((losses, aux))
        objects = {
            place: leaf
            for place, leaf in enumerate(flat)
            if place >= num_losses and not is_output(leaf)
        }
        seen.append((outputs, num_losses, objects))
        return [leaf for place, leaf in enumerate(flat) if place not in objects]

    try:
        jaxpr = jax.make_jaxpr(flat_fn)(*leaves)
    except _NEEDS_VALUES as error:
        raise ValueError(
            "The function needs values where it is traced, in an `if` or a conversion to a Python "
            f"number, say ({type(error).__name__}): use jax.lax.cond or jnp.where, {way_out}."
        ) from error
    return Traced(jaxpr, *seen[-1])


class Split(NamedTuple):
    """A function of parameters, some of which are tapped and the rest differentiated as usual.

    Attributes:
      traced: The function; the parameters are its first arguments.
      taps: Where the parameters are used.
      choices: The form of every leaf.
      plan: The sites that are tapped.
      rest: The numbers of the parameters that are differentiated.
    """

    traced: Traced
    taps: Taps
    choices: list[Choice]
    plan: Plan
    rest: list[int]

    def vjp(
        self, leaves: Sequence[jax.Array], others: Sequence[jax.Array] = ()
    ) -> tuple[list[Any], Callable, list[Any], dict[int, jax.Array]]:
        """Runs the function on the parameters and its other arguments.

        Returns:
          The losses; the function that takes their cotangents to ``(gradients, cotangents)``, of
          what is differentiated and at the outputs of what is tapped; the auxiliary output; and the
          inputs of the tapped layers.
        """
        jaxpr = self.traced.jaxpr

        def run(rest: dict[int, jax.Array], taps: dict[int, jax.Array]) -> tuple[Any, Any]:
            full = [rest.get(number, leaf) for number, leaf in enumerate(leaves)]
            outputs, inputs = evaluate(jaxpr.jaxpr, jaxpr.consts, [*full, *others], self.plan, taps)
            losses, aux = self.traced.split(outputs)
            return losses, (aux, inputs)

        rest = {number: leaves[number] for number in self.rest}
        losses, pull_back, (aux, inputs) = jax.vjp(run, rest, self._zeros(), has_aux=True)
        return losses, pull_back, aux, inputs

    def _zeros(self) -> dict[int, jax.Array]:
        zeros = {}
        for number, site in self.taps.sites.items():
            if number not in self.rest:
                zero = jnp.zeros(site.output.shape, site.output.dtype)
                zeros[number] = vary_like(zero, site.equation.outvars[0].aval)
        return zeros

    def jacobian(
        self,
        dense: dict[int, jax.Array],
        inputs: dict[int, jax.Array],
        cotangents: dict[int, jax.Array],
        per_task: bool = False,
    ) -> list[jax.Array | FactoredLeaf]:
        """The leaves, from stacks of what `vjp` gave."""
        found: list[jax.Array | FactoredLeaf] = []
        for number, choice in enumerate(self.choices):
            if number in dense:
                found.append(dense[number])
                continue
            site = self.taps.sites[number]
            leaf = site.leaf(inputs[number], cotangents[number], per_task)
            found.append(leaf if choice.form == "factored" else leaf.materialize())
        return found


def split(
    traced: Traced, num_params: int, m: int, form: str, per_task: bool = False, num_summed: int = 0
) -> Split:
    """Decides about every parameter of a traced function; the last may be summed: no rows."""
    taps = find(traced.jaxpr.jaxpr, num_params)
    choices = choose(taps, num_params, m, form, per_task)
    choices[num_params - num_summed :] = [Choice("dense", False, "summed")] * num_summed
    rest = [number for number, choice in enumerate(choices) if not choice.tapped]
    tapped = set(range(num_params)) - set(rest)
    return Split(traced, taps, choices, prune(taps.plan, tapped), rest)


class JacobianPlan(NamedTuple):
    """What an engine does.

    Attributes:
      choices: The form of every leaf.
      sites: The layers that were found, by the number of the leaf.
      num_tasks: The number of losses.
      shares: What the losses share and own; empty for losses of examples.
      is_cut: Whether what a loss owns is pulled back once in all.
    """

    choices: list[Choice]
    sites: dict[int, Any]
    num_tasks: int
    shares: list[parts.Share]
    is_cut: bool


def plan_jacobian(
    fn: Callable[..., Any],
    params: PyTree,
    args: tuple,
    has_aux: bool = False,
    form: str = "auto",
    per_example: bool = False,
) -> JacobianPlan:
    """Tells what an engine would do with these arguments."""
    check_function("fn", fn)
    check_form(form)
    check_differentiable(params)
    size = batch_size(args) if per_example else None
    if per_example:
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), args)
    traced = trace(fn, (params, *args), has_aux)
    num_params = len(jax.tree.leaves(params))
    m = traced.num_tasks if size is None else size
    shares: list[parts.Share] = []
    if size is None:
        program, _ = inline(traced.jaxpr)
        shares = parts.shares(program, num_params, traced.num_losses)
        cut = parts.cut_losses(program, num_params, traced.num_losses)
        if cut is not None:
            pairs = [_joined(uses, m) for uses in parts.uses(cut, num_params, form)]
            sites = {number: site for number, (_, site) in enumerate(pairs) if site is not None}
            choices = [choice for choice, _ in pairs]
            return JacobianPlan(choices, sites, m, shares, form != "dense")
    whole = split(traced, num_params, m, form, per_task=per_example)
    return JacobianPlan(whole.choices, whole.taps.sites, m, shares, False)


def _joined(uses: Sequence[parts.Use], m: int) -> tuple[Choice, Any]:
    """The form of a leaf that several parts use, and its layer if there is one."""
    if not uses:
        return Choice("dense", False, "not used"), None
    first = uses[0]
    if first.choice is None:
        return Choice("dense", False, "each loss has entries of its own"), None
    tasks = sorted({task for use in uses for task in use.tasks})
    alone = len(uses) > 1 and all(use.site is not None and len(use.tasks) == 1 for use in uses)
    if alone and len(tasks) == len(uses) and first.site is not None:
        sizes = first.site.sizes(len(tasks), per_task=True)
        keep = first.choice.reason == "asked for" or prefers_factors(sizes)
        form, reason = ("factored", first.choice.reason) if keep else ("dense", "cheaper")
        return Choice(form, True, f"{reason}, each loss has inputs of its own"), first.site
    if len(uses) > 1:
        return Choice("dense", False, f"used by {len(uses)} parts"), None
    if len(tasks) == m:
        return first.choice, first.site
    some = ", ".join(map(str, tasks))
    return first.choice._replace(
        reason=f"{first.choice.reason}, for losses {some} only"
    ), first.site


def differentiate(
    losses_of: Callable[..., Any],
    args: Sequence[PyTree],
    has_aux: bool,
    chunk_size: int | None,
    form: str,
    summed: Sequence[PyTree] = (),
) -> tuple[Any, Any, list[Jacobian], list[PyTree]]:
    """The core of the engines for losses of one batch.

    Args:
      losses_of: ``losses_of(*args, *summed)``.
      args: What has a Jacobian.
      has_aux: As for the engines.
      chunk_size: As for the engines.
      form: As for the engines, but ``"products"``.
      summed: What has a gradient only, that of the sum of the losses: it is pulled back once.

    Returns:
      The losses, the auxiliary output, the Jacobians and the gradients.
    """
    full = [*args, *summed]
    if form == "dense" and not summed:
        return _on_values(losses_of, full, has_aux, chunk_size, len(args))
    try:
        traced = trace(losses_of, full, has_aux)
    except ValueError as error:
        if form == "dense" and isinstance(error.__cause__, _NEEDS_VALUES):
            return _on_values(losses_of, full, has_aux, chunk_size, len(args))
        raise
    leaves, treedef = jax.tree.flatten(full)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    num_summed = len(jax.tree.leaves(summed))
    program, consts = inline(traced.jaxpr)
    found = parts.cut_losses(program, len(leaves), traced.num_losses, num_summed)
    if found is not None:
        outputs, results = parts.jacobian(
            found, consts, leaves, (), traced.num_losses, chunk_size, form
        )
        losses, aux = traced.join(outputs)
    else:
        whole = split(traced, len(leaves), traced.num_tasks, form, num_summed=num_summed)
        losses, pull_back, aux, inputs = whole.vjp(leaves)
        num_rows = len(leaves) - num_summed

        def rows_of(cotangents: Any) -> tuple[dict, dict]:
            dense, tapped = pull_back(cotangents)
            return {number: row for number, row in dense.items() if number < num_rows}, tapped

        dense, cotangents = map_tasks(rows_of, losses, chunk_size)
        if num_summed:
            dense = {**pull_back(ones_like(losses))[0], **dense}
        results = whole.jacobian(dense, inputs, cotangents)
        losses, aux = traced.join([*losses, *aux])
    trees = jax.tree.unflatten(treedef, results)
    return losses, aux, trees[: len(args)], trees[len(args) :]


def _on_values(
    losses_of: Callable[..., Any],
    full: Sequence[PyTree],
    has_aux: bool,
    chunk_size: int | None,
    num_args: int,
) -> tuple[Any, Any, list[Jacobian], list[PyTree]]:
    """As `differentiate`, dense: the function is run and not traced."""
    losses, pull_back, aux = vjp(losses_of, *full, has_aux=has_aux)
    jacobians = map_tasks(lambda cotangent: pull_back(cotangent)[:num_args], losses, chunk_size)
    gradients: Sequence[PyTree] = ()
    if len(full) > num_args:
        gradients = pull_back(ones_like(losses))[num_args:]
    return losses, aux, list(jacobians), list(gradients)

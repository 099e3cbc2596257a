"""What a step costs, what its losses share, and which form every leaf of the Jacobian takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.autodiff import (
    JacobianPlan,
    per_example_value_and_gramian,
    plan_jacobian,
    total_multiplications,
    value_and_gramian,
)
from jaxjd.autodiff._jacobian import check_argnums, joined
from jaxjd.autodiff._together import Losses, together
from jaxjd.base import PyTree
from jaxjd.checks import argument_number, check_function, path_name
from jaxjd.linalg.costs import Sizes, dense_cost


class LeafReport(NamedTuple):
    """How one leaf of the Jacobian is computed.

    Attributes:
      path: The leaf's key path.
      shape: The parameter's shape.
      form: ``"factored"`` or ``"dense"``.
      layer: What uses the parameter: ``"matrix"``, ``"convolution"`` or ``"embedding"``, or
        ``"other"`` where the pass found no layer.
      reason: Why it has this form.
      dense_flops: Floating point operations of the dense leaf's rows (where they are one product
        after the backward pass), its part of the Gramian, and a combination of the rows.
      dense_bytes: The memory of the dense leaf.
      factored_flops: The same for the factored leaf, or None.
      factored_bytes: The memory of its two factors, or None.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> losses = lambda w, x: ((x @ w) ** 2).mean(axis=0).cumsum()
      >>> (leaf,) = jaxjd.diagnostics.explain_jacobian(
      ...     losses, jnp.ones((512, 256)), jnp.ones((8, 512)), quiet=True
      ... )
      >>> leaf.form, leaf.layer, leaf.factored_bytes < leaf.dense_bytes
      ('factored', 'matrix', True)
    """

    path: str
    shape: tuple[int, ...]
    form: str
    layer: str
    reason: str
    dense_flops: int
    dense_bytes: int
    factored_flops: int | None
    factored_bytes: int | None


def explain_jacobian(
    fn: Losses,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    form: str = "auto",
    per_example: bool = False,
    per_task: bool = False,
    quiet: bool = False,
) -> list[LeafReport]:
    """Tells, leaf by leaf, which form the Jacobian takes, why, and what it costs.

    A leaf is factored where its Gramian and a combination of its rows are cheaper from the layer's
    inputs and cotangents than from the dense leaf. The costs are counted from static shapes:
    operations, and ten times the bytes that are written and read. Nothing is computed.

    Args:
      fn: The function that `jaxjd.value_and_jacobian` gets, or a dict, list or tuple of functions
        as for `jaxjd.aggregated_value_and_grad`; with `per_example` or `per_task`, the one that
        `jaxjd.per_example_value_and_jacobian` or `jaxjd.per_task_value_and_jacobian` gets.
      *args: Its positional arguments; they may hold `jax.ShapeDtypeStruct` leaves.
      argnums: Which positional arguments to differentiate, as for `jaxjd.value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      form: The form asked for, as for `jaxjd.value_and_jacobian`.
      per_example: Whether `fn` is the loss of one example, and what is not differentiated batches.
      per_task: Whether `fn` is the loss of one task, and what is not differentiated the data of all
        tasks, stacked.
      quiet: Whether to print nothing.

    Returns:
      A `LeafReport` per leaf of what is differentiated, in tree order, which is also printed as a
      table.

    Raises:
      ValueError: As the engines do.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> def losses(params, x):
      ...     y = ((x @ params["kernel"] + params["bias"][None]) ** 2).mean(axis=0)
      ...     return y.cumsum()[:4]
      >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}
      >>> leaves = jaxjd.diagnostics.explain_jacobian(losses, params, jnp.ones((8, 512)))
      leaf    shape    form      layer   why          dense: flops  bytes  factored: flops  bytes
      bias    256      dense     other   used by add  10.2K         4.1K   -                -
      kernel  512x256  factored  matrix  cheaper      13.6M         2.1M   2.38M            49.2K
      total                                           13.6M         2.1M
      chosen                                          2.39M         53.2K
    """
    one = per_example or per_task
    losses_of, params, rest = _arguments(fn, args, argnums, has_aux)
    reports = _leaves(plan_jacobian(losses_of, params, rest, has_aux, form, one), params, one)
    if not quiet:
        print(_leaf_table(reports))  # noqa: T201
    return reports


def _arguments(
    fn: Losses, args: tuple, argnums: int | Sequence[int], has_aux: bool
) -> tuple[Callable[..., Any], PyTree, tuple]:
    """A function of what is differentiated and of the rest, and these."""
    fn = together(fn, has_aux)
    numbers, single = check_argnums(argnums)
    places = [argument_number(number, len(args)) for number in numbers]
    others = [place for place in range(len(args)) if place not in places]

    def losses_of(params: PyTree, *rest: Any) -> Any:
        full = dict(zip(others, rest, strict=True))
        full |= zip(places, (params,) if single else params, strict=True)
        return fn(*(full[place] for place in range(len(args))))

    params = joined([args[place] for place in places], single)
    return losses_of, params, tuple(args[place] for place in others)


def _leaves(plan: JacobianPlan, params: PyTree, per_example: bool = False) -> list[LeafReport]:
    choices, sites, m = plan.choices, plan.sites, plan.num_tasks
    reports = []
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(params)):
        choice = choices[number]
        entries = m * leaf.size
        width = max(4, leaf.dtype.itemsize)
        sizes = sites[number].sizes(m, per_example) if number in sites else None
        # Without a layer the rows come from the backward pass.
        dense = choice.dense or dense_cost(Sizes(m, 1, 0, 1, leaf.size, width))
        reports.append(
            LeafReport(
                path=path_name(path),
                shape=tuple(leaf.shape),
                form=choice.form,
                layer="other" if sizes is None else sites[number].kind,
                reason=choice.reason,
                dense_flops=dense.flops,
                dense_bytes=entries * leaf.dtype.itemsize,
                factored_flops=None if choice.factored is None else choice.factored.flops,
                factored_bytes=None if sizes is None else sizes.factor_entries * width,
            )
        )
    return reports


class Share(NamedTuple):
    """What exactly the same losses depend on, in one forward pass.

    Attributes:
      losses: The losses that share it, or the one that owns it; empty for what no gradient passes.
      equations: How many equations of the function's jaxpr. One whose entries belong to different
        losses, as under `jax.vmap`, is counted for each of them.
      multiplications: Those of their products and convolutions, loops with all their rounds.
      passes: How often a step pulls it back: once for each of the losses, if the engine found that
        taking apart what they own pays; else once for each loss of the function.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> losses = lambda w, x: [jnp.sum(w * x), jnp.sum(w**2)]
      >>> report = jaxjd.diagnostics.explain_step(
      ...     losses, jnp.ones(3), jnp.ones(3), compile=False, quiet=True
      ... )
      >>> [share.losses for share in report.shares]
      [(0,), (1,)]
    """

    losses: tuple[int, ...]
    equations: int
    multiplications: int
    passes: int


class ProgramCost(NamedTuple):
    """What a program costs, or the ratio of two costs; None where a figure is not known.

    Attributes:
      multiplications: Those of products and convolutions in the jaxpr. A scan is counted with all
        its rounds, a `while` loop with one, and a conditional with its larger branch.
      flops: XLA's number of operations in the compiled program, which counts the body of every loop
        once.
      bytes: XLA's number of bytes that its operations read and write, with loops counted likewise.
      temporaries: Bytes of memory besides arguments and results.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> report = jaxjd.diagnostics.explain_step(
      ...     lambda w, x: (x @ w) ** 2, jnp.ones(3), jnp.ones((2, 3)), compile=False, quiet=True
      ... )
      >>> report.plain
      ProgramCost(multiplications=12, flops=None, bytes=None, temporaries=None)
    """

    multiplications: float | None
    flops: float | None
    bytes: float | None
    temporaries: float | None


class StepReport(NamedTuple):
    """What a step costs, and why. It prints as tables.

    Attributes:
      plain: The cost of the losses and the gradient of their sum.
      step: The cost of the step.
      shares: What the losses share and own, from what most of them share on; empty for losses of
        examples or stacked tasks, which own all that they use and are pulled back once.
      leaves: A `LeafReport` for every leaf of the Jacobian.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> report = jaxjd.diagnostics.explain_step(
      ...     lambda w, x: (x @ w) ** 2, jnp.ones(3), jnp.ones((2, 3)), quiet=True
      ... )
      >>> report.ratio.flops == report.step.flops / report.plain.flops
      True
    """

    plain: ProgramCost
    step: ProgramCost
    shares: list[Share]
    leaves: list[LeafReport]

    @property
    def ratio(self) -> ProgramCost:
        """The cost of the step in units of the plain one's."""
        pairs = zip(self.step, self.plain, strict=True)
        return ProgramCost(*(a / b if a is not None and b else None for a, b in pairs))

    def __str__(self) -> str:
        shares = [_share_table(self.shares)] if self.shares else []
        return "\n\n".join([_cost_table(self), *shares, _leaf_table(self.leaves)])


def explain_step(
    fn: Losses,
    *args: Any,
    step: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "auto",
    per_example: bool = False,
    per_task: bool = False,
    compile: bool = True,  # noqa: A002
    quiet: bool = False,
) -> StepReport:
    r"""Tells what a whole step costs, in units of the gradient of the sum of the losses, and why.

    .. math:: \text{ratio} = \frac{\operatorname{cost}(\text{step})}
        {\operatorname{cost}\bigl(\nabla \sum_i f_i\bigr)}

    Both programs are compiled for the same device and the compiler is asked; nothing is computed,
    and no clock is read. The compiler counts the body of a loop once, however often it runs, also
    that of the solver of a weighting: where there are loops, as with `chunk_size`, read
    `multiplications`, which are counted in the jaxpr.

    Args:
      fn: Returns the losses, as for `jaxjd.value_and_jacobian`, or is a dict, list or tuple of
        functions as for `jaxjd.aggregated_value_and_grad`; with `per_example` or `per_task`, the
        loss of one example or task.
      *args: Its positional arguments; they may hold `jax.ShapeDtypeStruct` leaves, whose shardings
        say what to compile for.
      step: The step, a function of the same arguments that `jax.jit` takes. By default
        `jaxjd.value_and_gramian`, or the engine for examples, with a combination of the gradients
        whose weights depend on the Gramian and take no time. For a step of
        `jaxjd.aggregated_value_and_grad`, which returns ``init`` and ``apply``, pass
        ``functools.partial(apply, init(params))``.
      argnums: Which positional arguments to differentiate, as for `jaxjd.value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      chunk_size: How many losses the default step pulls back at once.
      form: The form asked for, of the default step and for the leaves.
      per_example: As for `explain_jacobian`.
      per_task: As for `explain_jacobian`.
      compile: Whether to compile. Without, only what is known from tracing is told.
      quiet: Whether to print nothing.

    Returns:
      A `StepReport`, which is also printed.

    Raises:
      ValueError: As the engines do, and if `step` is no function.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxjd
      >>> def losses(params, x):
      ...     features = jnp.tanh(x @ params["trunk"])
      ...     return [jnp.mean((features @ head) ** 2) for head in params["heads"]]
      >>> array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> params = {"trunk": array(64, 128), "heads": [array(128, 8)] * 2}
      >>> init, apply = jaxjd.aggregated_value_and_grad(losses, jaxjd.weightings.sum())
      >>> step = functools.partial(apply, init(params))
      >>> report = jaxjd.diagnostics.explain_step(
      ...     losses, params, array(32, 64), step=step, compile=False, quiet=True
      ... )
      >>> for share in report.shares:
      ...     print(share.losses, share.multiplications, share.passes)
      (0, 1) 262144 2
      (0,) 32768 1
      (1,) 32768 1
    """
    one = per_example or per_task
    losses_of, params, rest = _arguments(fn, args, argnums, has_aux)
    plan = plan_jacobian(losses_of, params, rest, has_aux, form, one)
    if step is not None:
        check_function("step", step)

    def arrays(aux: Any) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(aux) if isinstance(leaf, jax.Array)]

    def losses_and_arrays(params: PyTree, *rest: Any) -> tuple[Any, list[Any]]:
        found = losses_of(params, *rest)
        losses, aux = found if has_aux else (found, None)
        return losses, arrays(aux)

    def plain(params: PyTree, rest: tuple) -> Any:
        def total(params: PyTree) -> tuple[Any, Any]:
            each = functools.partial(losses_and_arrays, params)
            losses, aux = jax.vmap(each)(*rest) if one else each(*rest)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(losses)), (losses, aux)

        return jax.value_and_grad(total, has_aux=True)(params)

    def whole(params: PyTree, rest: tuple) -> Any:
        engine = per_example_value_and_gramian if one else value_and_gramian
        run = engine(losses_of, has_aux=has_aux, chunk_size=chunk_size, form=form)
        values, gramian, pullback = run(params, *rest)
        return arrays(values), pullback(1 + gramian.sum(axis=0) / gramian.sum())

    passes = [
        0 if not share.losses else len(share.losses) if plan.is_cut else plan.num_tasks
        for share in plan.shares
    ]
    report = StepReport(
        plain=_cost(plain, (params, rest), compile),
        step=_cost(*((step, args) if step else (whole, (params, rest))), compile),
        shares=[Share(*pair[0], pair[1]) for pair in zip(plan.shares, passes, strict=True)],
        leaves=_leaves(plan, params, one),
    )
    if not quiet:
        print(report)  # noqa: T201
    return report


def _cost(fn: Callable[..., Any], args: tuple[Any, ...], compiled: bool) -> ProgramCost:
    traced = jax.jit(fn).trace(*args)
    multiplications = total_multiplications(traced.jaxpr)
    if not compiled:
        return ProgramCost(multiplications, None, None, None)
    return ProgramCost(multiplications, *_figures(traced.lower().compile()))


def _figures(program: Any) -> tuple[float | None, float | None, float | None]:
    """What a compiled program tells of itself; no backend has to tell anything."""
    analysis, memory = program.cost_analysis() or {}, program.memory_analysis()
    found = (
        analysis.get("flops"),
        analysis.get("bytes accessed"),
        getattr(memory, "temp_size_in_bytes", None),
    )
    flops, moved, held = (None if x is None or x < 0 else x for x in found)  # -1: not known.
    return flops, moved, held


def _cost_table(report: StepReport) -> str:
    rows = [["program", *ProgramCost._fields]]
    for name, cost in (("plain step", report.plain), ("this step", report.step)):
        rows.append([name, *map(_short, cost)])
    ratio = ["-" if figure is None else f"{figure:.2f}" for figure in report.ratio]
    return _aligned([*rows, ["ratio", *ratio]])


def _share_table(shares: Sequence[Share]) -> str:
    rows = [["losses", "equations", "multiplications", "pulled back"]]
    same: dict[Any, list[int]] = {}
    for share in shares:  # What is alike is one line.
        alone = share.losses if len(share.losses) == 1 else ()
        same.setdefault((() if alone else share.losses, *share[1:]), []).extend(alone)
    for (losses, equations, multiplications, passes), alone in same.items():
        names = f"{'each of ' if len(alone) > 1 else ''}{_names(losses or alone)}" or "none"
        often = f"{passes} times" if passes > 1 else "once" if passes else "never"
        rows.append([names, str(equations), _short(multiplications), often])
    return _aligned(rows)


def _names(losses: Sequence[int]) -> str:
    if len(losses) > 3 and losses[-1] - losses[0] == len(losses) - 1:
        return f"{losses[0]} to {losses[-1]}"
    return ", ".join(map(str, losses))


def _leaf_table(reports: list[LeafReport]) -> str:
    header = ("leaf", "shape", "form", "layer", "why")
    rows = [[*header, "dense: flops", "bytes", "factored: flops", "bytes"]]
    for report in reports:
        shape = "x".join(map(str, report.shape)) or "scalar"
        costs = (report.dense_flops, report.dense_bytes)
        factored = (report.factored_flops, report.factored_bytes)
        rows.append(
            [
                *(report.path, shape, report.form, report.layer, report.reason),
                *(_short(number) for number in (*costs, *factored)),
            ]
        )
    chosen = [
        (r.factored_flops or 0, r.factored_bytes or 0)
        if r.form == "factored"
        else (r.dense_flops, r.dense_bytes)
        for r in reports
    ]
    dense = (sum(r.dense_flops for r in reports), sum(r.dense_bytes for r in reports))
    kept = (sum(flops for flops, _ in chosen), sum(size for _, size in chosen))
    for name, (flops, size) in (("total", dense), ("chosen", kept)):
        rows.append([name, "", "", "", "", _short(flops), _short(size), "", ""])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _short(number: float | None) -> str:
    if number is None:
        return "-"
    size = float(number)
    for suffix in ("", "K", "M", "G", "T"):
        if size < 1000 or suffix == "T":
            return f"{size:.3g}{suffix}"
        size /= 1000
    raise AssertionError

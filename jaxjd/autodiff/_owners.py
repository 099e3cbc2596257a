"""Which losses depend on what: what they share, and what each of them owns.

The cotangents of different losses never meet in what one loss alone depends on, so that all of it
is pulled back in one pass; only what several losses share has to be pulled back once for each. The
analysis walks a jaxpr backwards from the losses. A variable may be one loss's as a whole, or have
an axis whose entries are the losses' own, as what a `jax.vmap` over tasks makes. What is not
understood is shared: then the answer is the same, and costs more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util

from jaxjd.autodiff._taps import CALLS, constants_of, inner_of, live


class Owners(NamedTuple):
    """The losses that a variable reaches.

    Attributes:
      tasks: Without `axis` the losses that any entry may reach, sorted. With it, the loss that each
        entry along the axis reaches; -1 if it reaches none.
      axis: The axis whose entries are apart.
    """

    tasks: tuple[int, ...]
    axis: int | None = None

    @property
    def all(self) -> tuple[int, ...]:
        """The losses, sorted."""
        return tuple(sorted(set(self.tasks) - {-1}))

    @property
    def are_apart(self) -> bool:
        """Whether each entry reaches one loss only, so that their cotangents cannot meet."""
        return self.axis is not None or len(self.tasks) <= 1


def along(axis: int, tasks: Sequence[int]) -> Owners:
    """Owners of the entries along an axis, or of the whole if that is one loss."""
    owners = Owners(tuple(tasks), axis)
    return Owners(owners.all) if len(owners.all) <= 1 else owners


def join(first: Owners | None, second: Owners) -> Owners:
    """The owners of a variable with two uses."""
    if first is None or first == second:
        return second
    if first.axis is not None and first.axis == second.axis:
        pairs = list(zip(first.tasks, second.tasks, strict=True))
        if all(a == b or -1 in (a, b) for a, b in pairs):
            return along(first.axis, [max(pair) for pair in pairs])
    return Owners(tuple(sorted({*first.all, *second.all})))


class Variable:
    """A variable of an inlined jaxpr; a jaxpr that is called twice has other ones in each call."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        self.aval = aval


class Program(NamedTuple):
    """Equations with their arguments and results, read as a jaxpr is.

    Attributes:
      constvars: The variables of constants.
      invars: The variables of arguments.
      outvars: What is returned.
      eqns: The equations, in order.
    """

    constvars: list[Any]
    invars: list[Any]
    outvars: list[Any]
    eqns: list[Any]


def inline(closed: Any) -> tuple[Program, list[Any]]:
    """Returns a closed jaxpr with the calls in it that do nothing else put in place, and constants.

    What different losses own inside of a call is then seen.
    """
    constvars = list(closed.jaxpr.constvars)
    consts = list(closed.consts)
    equations: list[Any] = []

    def walk(jaxpr: Any, values: dict[Any, Any], names: Any, source: Any = None) -> list[Any]:
        def read(var: Any) -> Any:
            return var if isinstance(var, jex.Literal) else values.get(var, var)

        alive = live(jaxpr)
        for number, equation in enumerate(jaxpr.eqns):
            if number not in alive:
                continue
            operands = [read(var) for var in equation.invars]
            info = source or equation.source_info
            info = info.replace(name_stack=names + info.name_stack)
            if equation.primitive.name in CALLS:
                inner = inner_of(equation)
                inside = dict(zip(inner.invars, operands, strict=True))
                for var, value in zip(inner.constvars, constants_of(equation), strict=True):
                    inside[var] = Variable(var.aval)
                    constvars.append(inside[var])
                    consts.append(value)
                values.update(
                    zip(equation.outvars, walk(inner, inside, info.name_stack), strict=True)
                )
                continue
            if equation.primitive.name == "unstack":
                inner = _slices(equation)
                inside = dict(zip(inner.invars, operands, strict=True))
                found = walk(inner, inside, source_info_util.NameStack(), info)
                values.update(zip(equation.outvars, found, strict=True))
                continue
            results = [Variable(var.aval) for var in equation.outvars]
            values.update(zip(equation.outvars, results, strict=True))
            equations.append(equation.replace(invars=operands, outvars=results, source_info=info))
        return [read(var) for var in jaxpr.outvars]

    outvars = walk(closed.jaxpr, {}, source_info_util.NameStack())
    return Program(constvars, list(closed.jaxpr.invars), outvars, equations), consts


def _slices(equation: Any) -> Any:
    """The jaxpr of what takes an array apart by several equations, each of which has one result.

    Newer versions of JAX have one for it, as when a program loops over the rows of an array.
    """
    (var,), axis = equation.invars, equation.params["axis"]

    def rows(array: jax.Array) -> list[jax.Array]:
        size = array.shape[axis]
        return [lax.index_in_dim(array, place, axis, keepdims=False) for place in range(size)]

    return jax.make_jaxpr(rows)(var.aval).jaxpr


def multiplications(equation: Any) -> int:
    """The multiplications of an equation's products and convolutions.

    Those of a scan are counted as often as it runs them, those of a `while` loop once, and of a
    conditional the branch with most of them.
    """
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return math.prod(shape[axis] for axis in contract) * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return math.prod(kernel) // max(outputs, 1) * equation.outvars[0].aval.size
    if name == "cond":
        return max(map(total_multiplications, params["branches"]))
    inner = [value for value in params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
    times = params["length"] if name == "scan" else 1
    return times * sum(map(total_multiplications, inner))


def total_multiplications(jaxpr: Any) -> int:
    """The multiplications of everything in a jaxpr, closed or open, that an output depends on."""
    if hasattr(jaxpr, "consts"):
        jaxpr, _ = inline(jaxpr)
    return sum(multiplications(jaxpr.eqns[number]) for number in live(jaxpr))


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Leaves out literals."""
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def differentiable(program: Program, num_params: int) -> set[Any]:
    """The floating point variables that depend on the first arguments, these included."""
    found = set(program.invars[:num_params])
    for equation in program.eqns:
        if any(var in found for var in variables(equation.invars)):
            for var in equation.outvars:
                if jnp.issubdtype(var.aval.dtype, jnp.inexact):
                    found.add(var)
    return found


def owners_of(
    program: Program, wanted: set[Any], losses: Mapping[Any, Owners], made: Mapping[Any, Any]
) -> tuple[dict[Any, Owners], dict[int, Owners]]:
    """Finds the owners of variables and of equations, by their number.

    Args:
      program: The equations.
      wanted: The variables to look at.
      losses: The owners of variables that are losses.
      made: The equation that makes each variable.
    """
    known = dict(losses)
    equations: dict[int, Owners] = {}
    for number in reversed(range(len(program.eqns))):
        equation = program.eqns[number]
        reached = [known[var] for var in equation.outvars if var in wanted and var in known]
        if not reached:
            continue
        owners = reached[0]
        for other in reached[1:]:
            owners = Owners(tuple(sorted({*owners.all, *other.all})))
        if len(owners.all) <= 1:  # What nobody owns along an axis has no cotangents.
            owners = Owners(owners.all)
        parts = None
        if owners.are_apart and len(equation.outvars) == 1:
            parts = _operands(equation, owners, made)
        if parts is None and owners.axis is not None:
            owners = Owners(owners.all)
        equations[number] = owners
        for place, var in enumerate(equation.invars):
            if isinstance(var, jex.Literal) or var not in wanted:
                continue
            part = parts[place] if parts else None
            known[var] = join(known.get(var), Owners(owners.all) if part is None else part)
    return known, equations


_Parts = list[Owners | None] | None
"""What each operand's use belongs to; None where it has no such axis. None if not understood."""

ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "custom_jvp_call",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "integer_pow",
        "lgamma",
        "digamma",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "mul",
        "name",
        "neg",
        "nextafter",
        "optimization_barrier",
        "pow",
        "reduce_precision",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
    ]
)
_CUMULATIVE = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])


def _operands(equation: Any, owners: Owners, made: Mapping[Any, Any]) -> _Parts:
    name = equation.primitive.name
    if owners.axis is None:
        return _slice_of_one(equation, owners) if name == "slice" else None
    if name == "custom_jvp_call" and not _is_elementwise(equation.params["call_jaxpr"].jaxpr):
        return None
    if name in ELEMENTWISE:
        return _elementwise(equation, owners)
    if name in _CUMULATIVE:
        return [owners] if equation.params["axis"] != owners.axis else None
    if name.startswith("reduce_") and "axes" in equation.params:
        return _keeping(equation, owners, equation.params["axes"])
    if name == "scatter":
        return _scatter(equation, owners, made)
    rule = _RULES.get(name)
    return None if rule is None else rule(equation, owners, owners.axis)


def operand_parts(
    equation: Any, owners: Owners, made: Mapping[Any, Any]
) -> Sequence[Owners | None]:
    """What each operand's use belongs to; None where every entry needs the operand whole."""
    return _operands(equation, owners, made) or [None] * len(equation.invars)


def _is_elementwise(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in CALLS or name == "custom_jvp_call":
            inner = equation.params.get("call_jaxpr") or equation.params["jaxpr"]
            if not _is_elementwise(inner.jaxpr):
                return False
        elif name == "broadcast_in_dim":  # Of a scalar.
            if math.prod(equation.invars[0].aval.shape) != 1:
                return False
        elif name not in ELEMENTWISE and name not in ("gt", "lt", "ge", "le", "eq", "ne", "and"):
            return False
    return True


def _elementwise(equation: Any, owners: Owners) -> _Parts:
    shape, axis = equation.outvars[0].aval.shape, owners.axis or 0
    parts: list[Owners | None] = []
    for var in equation.invars:
        own = var.aval.shape
        if own and (
            len(own) != len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True))
        ):
            return None
        parts.append(owners if own and own[axis] == shape[axis] else None)
    return parts


def _keeping(equation: Any, owners: Owners, removed: Sequence[int]) -> _Parts:
    """The one operand has some axes more."""
    ndim = len(equation.invars[0].aval.shape)
    kept = [axis for axis in range(ndim) if axis not in set(map(int, removed))]
    return [along(kept[owners.axis or 0], owners.tasks)]


def _slice_of_one(equation: Any, owners: Owners) -> _Parts:
    """One loss takes a part of an operand: the rest of it may be other losses'."""
    shape = equation.invars[0].aval.shape
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    cut = [axis for axis, size in enumerate(shape) if limits[axis] - starts[axis] < size]
    if not cut or not owners.tasks:
        return None
    axis = cut[0]
    inside = range(starts[axis], limits[axis])
    tasks = tuple(owners.tasks[0] if place in inside else -1 for place in range(shape[axis]))
    return [Owners(tasks, axis)]


def _slice(equation: Any, owners: Owners, axis: int) -> _Parts:
    size = equation.invars[0].aval.shape[axis]
    start = equation.params["start_indices"][axis]
    step = (equation.params["strides"] or (1,) * (axis + 1))[axis]
    tasks = [-1] * size
    for number, task in enumerate(owners.tasks):
        tasks[start + number * step] = task
    return [Owners(tuple(tasks), axis)]


def _broadcast_in_dim(equation: Any, owners: Owners, axis: int) -> _Parts:
    dimensions = list(equation.params["broadcast_dimensions"])
    shape = equation.invars[0].aval.shape
    if axis in dimensions and shape[dimensions.index(axis)] == len(owners.tasks):
        return [along(dimensions.index(axis), owners.tasks)]
    return [None]


def _reshape(equation: Any, owners: Owners, axis: int) -> _Parts:
    source, target = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    before, size, tasks = math.prod(target[:axis]), target[axis], owners.tasks
    for place, length in enumerate(source):
        if math.prod(source[:place]) != before or length == 1:
            continue
        if length % size == 0:  # The operand's axis is cut.
            return [along(place, [task for task in tasks for _ in range(length // size)])]
        if size % length == 0:  # The operand's axes are joined.
            block = size // length
            parts = [tasks[start : start + block] for start in range(0, size, block)]
            if all(len(set(part)) == 1 for part in parts):
                return [along(place, [part[0] for part in parts])]
    return None


def _transpose(equation: Any, owners: Owners, axis: int) -> _Parts:
    return [Owners(owners.tasks, equation.params["permutation"][axis])]


def _squeeze(equation: Any, owners: Owners, axis: int) -> _Parts:
    return _keeping(equation, owners, equation.params["dimensions"])


def _concatenate(equation: Any, owners: Owners, axis: int) -> _Parts:
    if equation.params["dimension"] != axis:
        return [owners for _ in equation.invars]
    parts, start = [], 0
    for var in equation.invars:
        size = var.aval.shape[axis]
        parts.append(along(axis, owners.tasks[start : start + size]))
        start += size
    return parts


def _stack(equation: Any, owners: Owners, axis: int) -> _Parts:
    place = equation.params["axis"]
    if place == axis:
        return [Owners(() if task < 0 else (task,)) for task in owners.tasks]
    return [Owners(owners.tasks, axis - (place < axis)) for _ in equation.invars]


def _dot_general(equation: Any, owners: Owners, axis: int) -> _Parts:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]
    if axis < len(lhs_batch):
        pair = (lhs_batch[axis], rhs_batch[axis])
        return [Owners(owners.tasks, place) for place in pair]
    lhs, rhs = (len(var.aval.shape) for var in equation.invars)
    free = [n for n in range(lhs) if n not in (*lhs_contract, *lhs_batch)]
    number = axis - len(lhs_batch)
    if number < len(free):
        return [Owners(owners.tasks, free[number]), None]
    free_rhs = [n for n in range(rhs) if n not in (*rhs_contract, *rhs_batch)]
    return [None, Owners(owners.tasks, free_rhs[number - len(free)])]


def _gather(equation: Any, owners: Owners, axis: int) -> _Parts:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape = equation.invars[0].aval.shape
    if axis in numbers.offset_dims:
        left_out = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [n for n in range(len(shape)) if n not in left_out]
        place = kept[list(numbers.offset_dims).index(axis)]
        if sizes[place] == shape[place] and place not in numbers.start_index_map:
            return [Owners(owners.tasks, place), None]
        return None
    number = axis - sum(offset < axis for offset in numbers.offset_dims)
    batching = list(numbers.start_indices_batching_dims)
    if number in batching:
        place = numbers.operand_batching_dims[batching.index(number)]
        return [Owners(owners.tasks, place), Owners(owners.tasks, number)]
    return [None, Owners(owners.tasks, number)]


def _scatter(equation: Any, owners: Owners, made: Mapping[Any, Any]) -> _Parts:
    """``x.at[i].set(loss)`` of a vector, with a number `i`."""
    operand, indices, updates = equation.invars
    source = made.get(indices)
    if updates.aval.shape or len(operand.aval.shape) != 1 or source is None:
        return None
    if source.primitive.name != "broadcast_in_dim" or not isinstance(source.invars[0], jex.Literal):
        return None
    place = int(source.invars[0].val)
    if not 0 <= place < len(owners.tasks):
        return None
    rest = [-1 if number == place else task for number, task in enumerate(owners.tasks)]
    task = owners.tasks[place]
    return [along(0, rest), None, Owners(() if task < 0 else (task,))]


_RULES: dict[str, Callable[[Any, Owners, int], _Parts]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "gather": _gather,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}

"""The jaxpr pass: where a function uses each parameter, and running it with taps there.

A parameter that is used once, as the matrix of a layer ``y = a @ W``, needs no differentiation of
its own: with a zero "tap" added to `y`, the cotangent of the tap is that of `y`, and `a` is at
hand when the function runs. `find` looks for such sites; `evaluate` runs a jaxpr with taps and
records the layers' inputs. What is not understood is no site, and is differentiated as usual.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.sharding import AxisType

from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.layers import ConvolutionLayer, EmbeddingLayer, Layer

# Calls that run in place: nothing hangs on their boundary but how XLA cuts its functions.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CHECKPOINTS = {"remat", "remat2", "checkpoint"}
# Linear functions of one array that keep inner products, if they keep the number of entries or
# leave some out.
_VIEWS = {
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "name",
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "squeeze",
    "transpose",
}

# Those of them that change no entry but for its dtype; some cannot be transposed.
_SAME = {"convert_element_type", "copy", "copy_p", "name"}

Plan = dict[int, Any]  # By the equation's number: a site or the plan of what the equation calls.


class View(NamedTuple):
    """What a variable is in terms of a parameter.

    Attributes:
      leaf: The parameter's number.
      steps: The equations that lead to the variable, each with the number of scans over the
        parameter that it is in.
      lead: The scans that the variable is in, outermost first: their length, and whether they scan
        over the parameter.
    """

    leaf: int
    steps: tuple[tuple[Any, int], ...] = ()
    lead: tuple[tuple[int, bool], ...] = ()

    def step(self, equation: Any) -> View:
        depth = sum(scanned for _, scanned in self.lead)
        return self._replace(steps=(*self.steps, (equation, depth)))

    def inside(self, length: int, scanned: bool) -> View:
        return self._replace(lead=(*self.lead, (length, scanned)))

    def undo(self, gradient: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Brings a gradient of the variable into the parameter's shape, in its own dtype."""
        steps = [pair for pair in self.steps if pair[0].primitive.name not in _SAME]
        if not steps:
            return gradient

        def view(array: jax.Array) -> jax.Array:
            for equation, depth in steps:

                def one(part: jax.Array, equation: Any = equation) -> jax.Array:
                    return bind(equation, [part])[0]

                for _ in range(depth):
                    one = jax.vmap(one)
                array = one(array)
            return array

        parameter = jax.ShapeDtypeStruct(shape, gradient.dtype)
        return jax.linear_transpose(view, parameter)(gradient)[0]

    @property
    def key(self) -> Any:
        steps = tuple((e.primitive.name, str(sorted(e.params.items()))) for e, _ in self.steps)
        return steps, tuple(scanned for _, scanned in self.lead)


class Site(NamedTuple):
    """The one place where a parameter is used, as the matrix of a layer.

    Attributes:
      kind: ``"matrix"``, ``"convolution"`` or ``"embedding"``.
      equation: The equation.
      position: Which operand is the parameter.
      view: What that operand is in terms of the parameter.
      shape: The parameter's shape.
      dtype: The parameter's dtype.
    """

    kind: str
    equation: Any
    position: int
    view: View
    shape: tuple[int, ...]
    dtype: Any

    @property
    def _lead(self) -> tuple[int, ...]:
        return tuple(length for length, _ in self.view.lead)

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        """The layer's output, stacked over the scans it is in."""
        aval = self.equation.outvars[0].aval
        return jax.ShapeDtypeStruct((*self._lead, *aval.shape), aval.dtype)

    @property
    def input(self) -> jax.ShapeDtypeStruct:
        """The layer's inputs, stacked over the scans it is in."""
        aval = self.equation.invars[1 - self.position].aval
        return jax.ShapeDtypeStruct((*self._lead, *aval.shape), aval.dtype)

    @property
    def is_explicitly_sharded(self) -> bool:
        """Whether the layer's shardings are part of its types."""
        avals = [var.aval for var in (*self.equation.invars, *self.equation.outvars)]
        return any(map(is_explicit, avals))

    def leaf(
        self, inputs: jax.Array, cotangents: jax.Array, per_task: bool = False
    ) -> FactoredLeaf:
        """The parameter's Jacobian, from recorded inputs and the cotangents of the tap."""
        make = {"matrix": _matrix, "convolution": _convolution, "embedding": _embedding}[self.kind]
        layer, order_inputs, order_outputs = make(self)
        if self.kind == "embedding":
            inputs, cotangents = _valid(self, inputs, cotangents, per_task)
        return FactoredLeaf(
            layer,
            jax.vmap(order_inputs)(inputs) if per_task else order_inputs(inputs),
            jax.vmap(order_outputs)(cotangents),
            (cotangents.shape[0], *self.shape),
            self.dtype,
            per_task,
        )

    def sizes(self, num_tasks: int, per_task: bool = False) -> Any:
        """The leaf's sizes, without computing it."""
        inputs = self.input
        if per_task:
            inputs = jax.ShapeDtypeStruct((num_tasks, *inputs.shape), inputs.dtype)
        cotangents = jax.ShapeDtypeStruct((num_tasks, *self.output.shape), self.output.dtype)
        found = []

        def look(inputs: jax.Array, cotangents: jax.Array) -> None:
            found.append(self.leaf(inputs, cotangents, per_task).sizes)

        jax.eval_shape(look, inputs, cotangents)
        return found[0]


class Recorder(NamedTuple):
    """An equation with a tap whose operands are recorded, whatever it is.

    Attributes:
      key: The tap's name.
    """

    key: Hashable


def is_explicit(aval: Any) -> bool:
    """Whether the sharding over an explicit mesh is part of a type."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


class Taps(NamedTuple):
    """What `find` found.

    Attributes:
      sites: The site of every parameter that has one, by its number.
      reasons: Why the others have none, by number.
      plan: Where the sites are.
    """

    sites: dict[int, Site]
    reasons: dict[int, str]
    plan: Plan


def find(jaxpr: Any, num_params: int) -> Taps:
    """Finds where a jaxpr uses its first `num_params` arguments."""
    params = jaxpr.invars[:num_params]
    uses: dict[int, list[Site | str]] = {number: [] for number in range(num_params)}
    views = {var: View(number) for number, var in enumerate(params)}
    plan = _find(jaxpr, views, [var.aval for var in params], uses)
    sites, reasons = {}, {}
    for number, places in uses.items():
        if math.prod(params[number].aval.shape) == 0:
            reasons[number] = "empty"
        elif len(places) == 1 and isinstance(places[0], Site):
            sites[number] = places[0]
        elif not places:
            reasons[number] = "not used"
        elif len(places) > 1:
            reasons[number] = f"used {len(places)} times"
        else:
            reasons[number] = str(places[0])
    return Taps(sites, reasons, plan)


def prune(plan: Plan, leaves: Any) -> Plan:
    """Leaves out the sites of other leaves, and what is empty then."""
    kept: Plan = {}
    for number, entry in plan.items():
        if isinstance(entry, Site):
            if entry.view.leaf in leaves:
                kept[number] = entry
        elif inner := prune(entry, leaves):
            kept[number] = inner
    return kept


def _find(jaxpr: Any, views: dict[Any, View], params: Any, uses: dict[int, list]) -> Plan:
    plan: Plan = {}
    alive = live(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
        operands = [None if isinstance(v, jex.Literal) else views.get(v) for v in equation.invars]
        if number not in alive or not any(view is not None for view in operands):
            continue
        if not equation.outvars:  # It is printed.
            continue
        name = equation.primitive.name
        if is_view(equation):
            views[equation.outvars[0]] = operands[0].step(equation)  # type: ignore[union-attr]
        elif name in CALLS or name in _CHECKPOINTS or name == "scan":
            plan[number] = _find_inside(equation, operands, params, uses)
        else:
            known = [(place, view) for place, view in enumerate(operands) if view is not None]
            for place, view in known:
                kind = _layer_kind(equation, place, view) if len(known) == 1 else None
                if kind is None:
                    uses[view.leaf].append(f"used by {name}")
                    continue
                param = params[view.leaf]
                site = Site(kind, equation, place, view, param.shape, param.dtype)
                uses[view.leaf].append(site)
                plan[number] = site
    for var in jaxpr.outvars:
        if not isinstance(var, jex.Literal) and var in views:
            uses[views[var].leaf].append("returned")
    return plan


def _find_inside(equation: Any, operands: list, params: Any, uses: dict[int, list]) -> Plan:
    inner = inner_of(equation)
    views = {}
    scan = _scan(equation)
    for place, (var, view) in enumerate(zip(inner.invars, operands, strict=True)):
        if view is None:
            continue
        if scan is None:
            views[var] = view
        elif scan.first_carry <= place < scan.first_scanned:
            uses[view.leaf].append("carried through a scan")
        else:
            views[var] = view.inside(scan.length, place >= scan.first_scanned)
    return _find(inner, views, params, uses)


class _Scan(NamedTuple):
    """Where a scan's carry and what it scans over start among its operands."""

    first_carry: int
    first_scanned: int
    length: int

    @property
    def num_carry(self) -> int:
        return self.first_scanned - self.first_carry


def _scan(equation: Any) -> _Scan | None:
    """How a scan splits its operands; None for another equation."""
    params = equation.params
    if equation.primitive.name != "scan":
        return None
    if "ft_in" in params:  # JAX 0.12: three groups of operands.
        consts, carry, _ = map(len, params["ft_in"].unpack())
    else:
        consts, carry = params["num_consts"], params["num_carry"]
    return _Scan(consts, consts + carry, params["length"])


def inner_of(equation: Any) -> Any:
    """The jaxpr that an equation calls, without its constants."""
    name = equation.primitive.name
    inner = equation.params[CALLS.get(name, "jaxpr")]
    return getattr(inner, "jaxpr", inner)


def constants_of(equation: Any) -> Sequence[Any]:
    return getattr(equation.params[CALLS.get(equation.primitive.name, "jaxpr")], "consts", ())


def live(jaxpr: Any) -> set[int]:
    """The equations that an output or an effect depends on."""
    needed = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}
    alive = set()
    for number in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[number]
        if equation.effects or any(var in needed for var in equation.outvars):
            alive.add(number)
            needed.update(var for var in equation.invars if not isinstance(var, jex.Literal))
    return alive


def is_view(equation: Any) -> bool:
    if len(equation.invars) != 1 or len(equation.outvars) != 1:
        return False
    name = equation.primitive.name
    source, target = equation.invars[0].aval, equation.outvars[0].aval
    if name == "convert_element_type":
        return jnp.issubdtype(target.dtype, jnp.floating)
    if name == "broadcast_in_dim":  # Axes of size one are added.
        return math.prod(source.shape) == math.prod(target.shape)
    return name in _VIEWS


def _layer_kind(equation: Any, place: int, view: View) -> str | None:
    name = equation.primitive.name
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return None
    if name == "dot_general":
        return "matrix"
    if name == "conv_general_dilated" and place == 1:
        return "convolution" if equation.params["batch_group_count"] == 1 else None
    if name == "gather" and place == 0 and not any(scanned for _, scanned in view.lead):
        return "embedding" if _is_lookup(equation) else None
    return None


def _is_lookup(equation: Any) -> bool:
    """Whether a gather takes whole entries along the first axis."""
    table, indices = (var.aval for var in equation.invars)
    numbers = equation.params["dimension_numbers"]
    rest = len(table.shape) - 1
    ndim = len(equation.outvars[0].aval.shape)
    return (
        tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(ndim - rest, ndim))
        and tuple(equation.params["slice_sizes"]) == (1, *table.shape[1:])
        and indices.shape[-1] == 1
    )


def _ordered(roles: Sequence[tuple[str, int]], order: str) -> list[int]:
    """The axes, sorted by their roles."""
    return sorted(range(len(roles)), key=lambda axis: (order.index(roles[axis][0]), roles[axis][1]))


def _lead_roles(site: Site) -> list[tuple[str, int]]:
    # Before all others of their kind.
    return [("S" if scanned else "R", n - 1000) for n, (_, scanned) in enumerate(site.view.lead)]


def _matrix(site: Site) -> tuple[Layer, Callable, Callable]:
    (lhs_c, rhs_c), (lhs_b, rhs_b) = site.equation.params["dimension_numbers"]
    contract, batch = ((lhs_c, lhs_b), (rhs_c, rhs_b))[1 - site.position]
    own_contract, own_batch = ((lhs_c, lhs_b), (rhs_c, rhs_b))[site.position]
    lead = _lead_roles(site)

    def roles(ndim: int, batch: Any, contract: Any, free: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        for axis in range(ndim):
            if axis in batch:
                found.append(("S", list(batch).index(axis)))
            elif axis in contract:
                found.append(("P", list(contract).index(axis)))
            else:
                found.append((free, axis))
        return found

    other, own = (site.equation.invars[place].aval for place in (1 - site.position, site.position))
    inputs = roles(len(other.shape), batch, contract, "R")
    matrix = roles(len(own.shape), own_batch, own_contract, "Q")
    free_inputs = [role for role in inputs if role[0] == "R"]
    free_matrix = [role for role in matrix if role[0] == "Q"]
    free = [free_inputs, free_matrix] if site.position == 1 else [free_matrix, free_inputs]
    outputs = [("S", place) for place in range(len(batch))] + free[0] + free[1]

    order_a = _ordered(lead + inputs, "SRP")
    order_b = _ordered(lead + outputs, "SRQ")
    scanned = [role for role in lead if role[0] == "S"]
    order_w = _ordered(scanned + matrix, "SPQ")
    inverse = sorted(range(len(order_w)), key=order_w.__getitem__)
    layer = Layer(
        batch=len(scanned) + len(batch),
        rows=len(lead) - len(scanned) + len(free_inputs),
        restore=lambda gradient: site.view.undo(gradient.transpose(inverse), site.shape),
        key=(tuple(inverse), site.view.key),
    )
    return layer, lambda a: a.transpose(order_a), lambda b: b.transpose(order_b)


def _convolution(site: Site) -> tuple[Layer, Callable, Callable]:
    params = site.equation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    lead = _lead_roles(site)
    scanned = sum(role == "S" for role, _ in lead)
    kernel = site.equation.invars[1].aval.shape
    kernel_spatial = [kernel[axis] for axis in numbers.rhs_spec[2:]]

    def canonical(array: jax.Array, spec: Sequence[int]) -> jax.Array:
        # spec: the axes of examples, channels and space.
        roles = [*lead, *([("", 0)] * len(spec))]
        for place, axis in enumerate(spec):
            roles[len(lead) + axis] = ("C", 0) if place == 1 else ("R", place)
        array = array.transpose(_ordered(roles, "SRC"))
        if groups > 1:
            array = array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)
            array = jnp.moveaxis(array, -2, scanned)
        return array

    def restore(gradient: jax.Array) -> jax.Array:
        # (*scans, [groups,] patch, channels, outputs)
        if groups > 1:
            gradient = jnp.moveaxis(gradient, scanned, -2)
            shape = gradient.shape
            gradient = gradient.reshape(*shape[:-2], shape[-2] * shape[-1])
        start = gradient.shape[:scanned]
        gradient = gradient.reshape(*start, *kernel_spatial, *gradient.shape[-2:])
        # Now (*scans, *spatial, in, out); the kernel has (out, in, *spatial) at rhs_spec.
        place = {axis: n for n, axis in enumerate([*numbers.rhs_spec[2:], numbers.rhs_spec[1]])}
        place[numbers.rhs_spec[0]] = len(kernel) - 1
        order = [*range(scanned), *(scanned + place[axis] for axis in range(len(kernel)))]
        return site.view.undo(gradient.transpose(order), site.shape)

    layer = ConvolutionLayer(
        batch=scanned + (groups > 1),
        rows=len(lead) - scanned + 1 + len(kernel_spatial),
        restore=restore,
        kernel_shape=kernel_spatial,
        strides=params["window_strides"],
        padding=params["padding"],
        input_dilation=params["lhs_dilation"],
        kernel_dilation=params["rhs_dilation"],
        key=(tuple(numbers.rhs_spec), groups, site.view.key),
    )
    return (
        layer,
        lambda inputs: canonical(inputs, numbers.lhs_spec),
        lambda outputs: canonical(outputs, numbers.out_spec),
    )


def _embedding(site: Site) -> tuple[Layer, Callable, Callable]:
    layer = EmbeddingLayer(
        rows=len(site.input.shape) - 1,
        restore=lambda gradient: site.view.undo(gradient, site.shape),
        size=site.equation.invars[0].aval.shape[0],
        key=site.view.key,
    )
    return layer, lambda indices: indices, lambda outputs: outputs


def _valid(
    site: Site, indices: jax.Array, cotangents: jax.Array, per_task: bool
) -> tuple[jax.Array, jax.Array]:
    """Indices within the table, and no cotangents for those that were not."""
    indices = indices[..., 0]
    # In a narrow dtype the last row may have no index.
    last = min(site.equation.invars[0].aval.shape[0] - 1, jnp.iinfo(indices.dtype).max)
    clipped = jnp.clip(indices, 0, last)
    # The backward pass of a gather drops what is outside, unless it clips.
    if site.equation.params["mode"] != lax.GatherScatterMode.CLIP:
        inside = clipped == indices
        if not per_task:
            inside = inside[None]
        inside = jnp.expand_dims(inside, range(inside.ndim, cotangents.ndim))
        cotangents = jnp.where(inside, cotangents, 0)
    return clipped.astype(jnp.int32), cotangents


def bind(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluates one equation."""
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    functions: Sequence[Any] = ()
    if isinstance(params, tuple):  # Some versions of JAX keep functions apart.
        functions, params = params
    with context_of(equation):
        results = primitive.bind(*functions, *operands, **params)
    return results if primitive.multiple_results else [results]


@contextlib.contextmanager
def context_of(equation: Any) -> Generator[None]:
    """What was set where an equation was traced: the line, the names of scopes, options of JAX."""
    info, context = equation.source_info, getattr(equation, "ctx", None)
    names = source_info_util.current_name_stack() + info.name_stack
    with (
        source_info_util.user_context(info.traceback, name_stack=names),
        contextlib.nullcontext() if context is None else context.manager,
    ):
        yield


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    plan: Plan,
    taps: Mapping[Any, jax.Array],
    run: Callable[[Any, Sequence[Any]], Sequence[Any]] = bind,
) -> tuple[list[Any], dict[Any, Any]]:
    """Runs a jaxpr with taps added at the sites of a plan, and the other equations by `run`.

    Returns:
      The outputs, and the inputs of every tapped layer, by the number of its parameter.
    """
    values: dict[Any, Any] = {}
    inputs: dict[Any, Any] = {}
    alive = live(jaxpr)

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else values[var]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for number, equation in enumerate(jaxpr.eqns):
        if number not in alive:
            continue
        operands = [read(var) for var in equation.invars]
        entry = plan.get(number)
        if entry is None:
            results = run(equation, operands)
        elif isinstance(entry, Recorder):
            inputs[entry.key] = operands
            (output,) = bind(equation, operands)
            with context_of(equation):
                results = [output + taps[entry.key]]
        elif isinstance(entry, Site):
            leaf = entry.view.leaf
            inputs[leaf] = operands[1 - entry.position]
            (output,) = bind(equation, operands)
            with context_of(equation):
                results = [output + taps[leaf]]
        else:
            inner = {leaf: taps[leaf] for leaf in _leaves(entry)}
            with context_of(equation):
                results, found = _evaluate_inside(equation, operands, entry, inner)
            inputs |= found
        values.update(zip(equation.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars], inputs


def _leaves(plan: Plan) -> set[int]:
    found: set[int] = set()
    for entry in plan.values():
        found |= {entry.view.leaf} if isinstance(entry, Site) else _leaves(entry)
    return found


def _evaluate_inside(
    equation: Any, operands: Sequence[Any], plan: Plan, taps: dict[int, jax.Array]
) -> tuple[list[Any], dict[int, jax.Array]]:
    name, params = equation.primitive.name, equation.params
    inner, consts = inner_of(equation), constants_of(equation)

    def run(operands: Sequence[Any], taps: dict[int, jax.Array]) -> tuple[list, dict]:
        return evaluate(inner, consts, operands, plan, taps)

    if name in _CHECKPOINTS:
        prevent_cse = params["prevent_cse"]  # Since JAX 0.12 also one per operand.
        if not isinstance(prevent_cse, bool):
            prevent_cse = any(prevent_cse)
        run = jax.checkpoint(run, prevent_cse=prevent_cse, policy=params["policy"])
        return run(operands, taps)
    scan = _scan(equation)
    if scan is None:
        return run(operands, taps)
    constant = operands[: scan.first_carry]

    def body(carry: list, parts: tuple) -> tuple[list, tuple]:
        scanned, taps = parts
        results, inputs = run([*constant, *carry, *scanned], taps)
        return results[: scan.num_carry], (results[scan.num_carry :], inputs)

    carry, (stacked, inputs) = lax.scan(
        body,
        list(operands[scan.first_carry : scan.first_scanned]),
        (list(operands[scan.first_scanned :]), taps),
        length=scan.length,
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked], inputs

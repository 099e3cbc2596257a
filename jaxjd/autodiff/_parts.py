"""The Jacobian by parts: what each loss owns is pulled back once in all, what is shared per task.

`_owners` tells which losses each equation reaches. Equations that reach the same several losses are
a part that is pulled back once for each of them; those that one loss alone reaches, or whose
entries along an axis the losses have to themselves, are one part together, pulled back once with
ones in the place of all cotangents. Parts run in the order of fewer and fewer losses, and are
pulled back the other way round. Of what is *summed* only the gradient of the sum of all losses is
wanted: it has one cotangent, the sum of theirs, and is pulled back once in every part.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxjd.autodiff._forms import Choice, choose
from jaxjd.autodiff._owners import (
    ELEMENTWISE,
    Owners,
    Program,
    Variable,
    along,
    differentiable,
    multiplications,
    operand_parts,
    owners_of,
    variables,
)
from jaxjd.autodiff._taps import (
    Plan,
    Recorder,
    Site,
    Taps,
    bind,
    evaluate,
    find,
    is_explicit,
    is_view,
    live,
    prune,
)
from jaxjd.autodiff._tasks import map_in_chunks, vary_like
from jaxjd.linalg.costs import prefers_factors
from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.owned import BlocksLeaf, RowsLeaf, scatter
from jaxjd.linalg.sharded import local_rows

Tasks = tuple[int, ...]


class Rows(NamedTuple):
    """Some rows of a Jacobian: of a parameter, or of a variable between two parts.

    Attributes:
      tasks: Which rows.
      rows: An array or a factored leaf, one entry per row.
    """

    tasks: Tasks
    rows: Any


class Gradient(NamedTuple):
    """The gradient of the sum of the losses: of a parameter, or of a variable between two parts."""

    array: jax.Array


_Reached = Rows | BlocksLeaf | Gradient


class Probe(NamedTuple):
    """An operand that the losses share, of an equation whose entries along an axis are their own.

    Attributes:
      number: The equation's number in its part.
      place: Which operand it is.
      source: What the losses share: a parameter, or a variable of another part.
      views: The views that lead from it to the operand.
      axis: The axis of the equation's output.
      tasks: The losses that its entries belong to.
      axes: The axis of each operand that goes with it, None for one that each entry needs whole.
      reached: The losses that the operand reaches; all of `tasks` if each entry needs it whole.
      whole: Whether each entry needs it whole.
    """

    number: int
    place: int
    source: Any
    views: tuple[Any, ...]
    axis: int
    tasks: Tasks
    axes: tuple[int | None, ...]
    reached: Tasks
    whole: bool


class Part(NamedTuple):
    """Equations that are pulled back together.

    Attributes:
      program: The equations. Its arguments are copies of the sources, then the others.
      tasks: The losses that share it; empty for what they own.
      sources: What is differentiated, parameters first: variables of the whole program, each with
        the loss whose copy it is; None without copies.
      num_params: How many of the sources are parameters.
      others: The variables of the whole program that are not differentiated.
      probes: What the losses share in the middle of what they own.
    """

    program: Program
    tasks: Tasks
    sources: list[tuple[Any, int | None]]
    num_params: int
    others: list[Any]
    probes: list[Probe]


class Cut(NamedTuple):
    """A program cut into parts.

    Attributes:
      program: The whole.
      parts: In the order in which they run.
      before: The equations that come before all parts: views, and what depends on no parameter.
      owners: The owners of variables.
      made: The equation that makes each variable.
      summed: The variables that depend on no parameters but those whose gradients are summed.
    """

    program: Program
    parts: list[Part]
    before: list[Any]
    owners: dict[Any, Owners]
    made: dict[Any, Any]
    summed: set[Any]


def cut(
    program: Program,
    num_params: int,
    losses: Sequence[Any],
    sizes: Sequence[int],
    num_summed: int = 0,
) -> Cut:
    """Cuts a program into what losses share and what they own.

    Args:
      program: An inlined program.
      num_params: How many of its first arguments are differentiated.
      losses: Its outputs that are losses.
      sizes: How many losses each of them holds.
      num_summed: Of how many of the parameters, the last, the gradient of the sum is wanted only.
    """
    wanted, roots, made, owners, equations = _owned(program, num_params, losses, sizes)
    summed = wanted - differentiable(program, num_params - num_summed) if num_summed else set()

    # A view of a parameter belongs to whichever part needs it: there it can be undone.
    params = set(program.invars[:num_params])
    views: dict[Any, Any] = {}
    for equation in program.eqns:
        if not is_view(equation):
            continue
        (source,), (result,) = equation.invars, equation.outvars
        is_of_param = not isinstance(source, jex.Literal) and (source in params or source in views)
        if is_of_param and result not in roots:
            views[result] = equation
    shared = {owners.all for owners in equations.values() if not owners.are_apart}
    order = [*sorted(shared, key=lambda tasks: (-len(tasks), tasks)), ()]
    ranks = {tasks: rank for rank, tasks in enumerate(order)}
    numbers: list[list[int]] = [[] for _ in order]
    before = []
    homes: dict[Any, int] = {}
    for number, equation in enumerate(program.eqns):
        reached = equations.get(number)
        if any(var in views for var in equation.outvars):
            rank = -1
        elif reached is not None and reached.all:
            rank = ranks[() if reached.are_apart else reached.all]
        else:  # No gradient passes: it runs with what it reads.
            rank = max([homes.get(var, -1) for var in variables(equation.invars)], default=-1)
        homes.update(dict.fromkeys(equation.outvars, rank))
        if rank < 0:
            before.append(equation)
        else:
            numbers[rank].append(number)
    builder = _Builder(program, wanted, params, views, owners, equations, made, summed)
    parts = [builder.build(own, tasks) for own, tasks in zip(numbers, order, strict=True) if own]
    return Cut(program, parts, before, owners, made, summed)


def _owned(
    program: Program, num_params: int, losses: Sequence[Any], sizes: Sequence[int]
) -> tuple[set[Any], dict[Any, Owners], dict[Any, Any], dict[Any, Owners], dict[int, Owners]]:
    """What is differentiated, the losses among it, what makes each variable, and the owners."""
    wanted = differentiable(program, num_params)
    roots: dict[Any, Owners] = {}
    for atom, tasks in _numbered(losses, sizes):
        if not isinstance(atom, jex.Literal) and atom in wanted:
            owners = along(0, tasks) if len(atom.aval.shape) == 1 else Owners(tasks)
            other = roots.get(atom)
            roots[atom] = Owners(tuple(sorted({*other.all, *tasks}))) if other else owners
    made = {var: equation for equation in program.eqns for var in equation.outvars}
    return wanted, roots, made, *owners_of(program, wanted, roots, made)


class Share(NamedTuple):
    """What exactly the same losses depend on, of one forward pass.

    Attributes:
      losses: The losses; empty for what no gradient passes.
      equations: How many equations of the jaxpr; one whose entries belong to different losses is
        counted for each of them.
      multiplications: Those of their products and convolutions.
    """

    losses: Tasks
    equations: int
    multiplications: int


def shares(program: Program, num_params: int, num_losses: int) -> list[Share]:
    """What losses share and what they own, from what most of them share on."""
    atoms = program.outvars[:num_losses]
    *_, equations = _owned(program, num_params, atoms, [atom.aval.size for atom in atoms])
    found: dict[Tasks, tuple[int, int]] = {}
    for number in sorted(live(program)):
        owners = equations.get(number, Owners(()))
        # Entries along an axis have the same number of multiplications each.
        along_axis = ((task,) if task >= 0 else () for task in owners.tasks)
        sets = Counter([owners.all] if owners.axis is None else along_axis)
        work = multiplications(program.eqns[number]) // sets.total()
        for tasks, entries in sets.items():
            count, total = found.get(tasks, (0, 0))
            found[tasks] = (count + 1, total + entries * work)
    order = sorted(found, key=lambda tasks: (-len(tasks), tasks))
    return [Share(tasks, *found[tasks]) for tasks in order]


def _only(task: int | None) -> Tasks:
    return () if task is None else (task,)


def _numbered(atoms: Sequence[Any], sizes: Sequence[int]) -> list[tuple[Any, Tasks]]:
    """Every loss output with the numbers of its losses."""
    found, start = [], 0
    for atom, size in zip(atoms, sizes, strict=True):
        found.append((atom, tuple(range(start, start + size))))
        start += size
    return found


class _Builder(NamedTuple):
    """What is needed to make a part of some equations."""

    program: Program
    wanted: set[Any]
    params: set[Any]
    views: dict[Any, Any]
    owners: dict[Any, Owners]
    equations: dict[int, Owners]
    made: dict[Any, Any]
    summed: set[Any]

    def root(self, var: Any) -> tuple[Any, tuple[Any, ...]]:
        """What a variable is a view of, and the views from there."""
        chain: list[Any] = []
        while var in self.views:
            chain.append(self.views[var])
            (var,) = variables(chain[-1].invars)
        return var, tuple(reversed(chain))

    def _reaches(self, var: Any) -> bool:
        return var in self.owners and bool(self.owners[var].all)

    def build(self, numbers: Sequence[int], tasks: Tasks) -> Part:
        inside = {var for number in numbers for var in self.program.eqns[number].outvars}
        copies: dict[tuple[Any, int | None], Variable] = {}
        others: dict[Any, None] = {}
        equations: list[Any] = []
        probes: list[Probe] = []

        def copy(var: Any, key: int | None) -> Any:
            if (var, key) not in copies:
                copies[var, key] = Variable(var.aval)
                if var in self.views:
                    view = self.views[var]
                    operands = [
                        atom if isinstance(atom, jex.Literal) else copy(atom, key)
                        for atom in view.invars
                    ]
                    equations.append(view.replace(invars=operands, outvars=[copies[var, key]]))
            return copies[var, key]

        for number in numbers:
            equation = self.program.eqns[number]
            owners = self.equations.get(number, Owners(()))
            operands, shares = [], []
            for place, var in enumerate(equation.invars):
                if isinstance(var, jex.Literal) or var in inside:
                    operands.append(var)
                    continue
                if not owners.all or var not in self.wanted or not self._reaches(var):
                    others[var] = None
                    operands.append(var)
                    continue
                root, chain = self.root(var)
                if tasks or root in self.summed or self.owners[root].axis is not None:
                    operands.append(copy(var, None))
                elif owners.axis is None:
                    operands.append(copy(var, owners.tasks[0]))
                elif len(self.owners[var].all) == 1:
                    operands.append(copy(var, self.owners[var].all[0]))
                else:  # Its cotangents would meet: they are made from those of the output.
                    others[var] = None
                    operands.append(var)
                    shares.append((place, root, chain))
            parts = operand_parts(equation, owners, self.made) if shares else ()
            axes = tuple(None if part is None else part.axis for part in parts)
            for place, root, chain in shares:
                part = parts[place]
                probes.append(
                    Probe(
                        number=len(equations),
                        place=place,
                        source=root,
                        views=chain,
                        axis=owners.axis or 0,
                        tasks=owners.tasks,
                        axes=axes,
                        reached=owners.all if part is None else part.all,
                        whole=part is None,
                    )
                )
            equations.append(equation.replace(invars=operands))

        def order(source: tuple[Any, int | None]) -> int:
            var, key = source
            has_rows = var not in self.summed and (tasks or key is not None)
            return 0 if var in self.params and has_rows else 1

        sources = sorted((pair for pair in copies if pair[0] not in self.views), key=order)
        arguments = [copies[pair] for pair in sources]
        outputs = self._outputs(set(numbers), inside)
        program = Program([], [*arguments, *others], outputs, equations)
        return Part(
            program,
            tasks,
            sources,
            sum(order(pair) == 0 for pair in sources),
            list(others),
            probes,
        )

    def _outputs(self, numbers: set[int], inside: set[Any]) -> list[Any]:
        """What is made inside and used outside of some equations."""
        used = dict.fromkeys(variables(self.program.outvars))
        for number, equation in enumerate(self.program.eqns):
            if number not in numbers:
                used.update(dict.fromkeys(variables(equation.invars)))
        return [var for var in used if var in inside]


class _Run(NamedTuple):
    """A part that has run.

    Attributes:
      part: The part.
      taps: Where it uses the parameters.
      tapped: The numbers of the sources that are tapped instead of differentiated.
      results: The variables that are pulled back from, and their values.
      pull_back: Takes their cotangents to those of the sources, and of the taps.
      inputs: What was recorded at the taps.
    """

    part: Part
    taps: Taps
    choices: list[Choice]
    results: dict[Any, jax.Array]
    pull_back: Callable[[list], tuple[dict, dict]]
    inputs: dict[Any, Any]


def _value(var: Any, values: dict[Any, Any], made: Mapping[Any, Any]) -> Any:
    """A value; computed on its own if the part that makes it has not run yet."""
    if isinstance(var, jex.Literal):
        return var.val
    if var not in values:
        # No gradient passes here, so that it does not matter that it is computed twice.
        equation = made[var]
        operands = [_value(operand, values, made) for operand in equation.invars]
        values.update(zip(equation.outvars, bind(equation, operands), strict=True))
    return values[var]


def _layers(part: Part, form: str) -> tuple[Taps, list[Choice]]:
    """Where a part uses its parameters, and the form of each of their leaves."""
    taps = find(part.program, part.num_params)
    own = not part.tasks
    return taps, choose(taps, part.num_params, len(part.tasks) or 1, form, per_task=own)


def _run(
    part: Part, values: dict[Any, Any], made: Mapping[Any, Any], results: set[Any], form: str
) -> _Run:
    """Runs a part on the values that there are, and adds its own."""
    taps, choices = _layers(part, form)
    tapped = {number for number, choice in enumerate(choices) if choice.tapped}
    plan: Plan = prune(taps.plan, tapped)
    plan |= {probe.number: Recorder(~probe.number) for probe in part.probes}
    zeros: dict[int, Any] = {}  # Sites by their source, probes by ~number.
    for number in tapped:
        site = taps.sites[number]
        zero = jnp.zeros(site.output.shape, site.output.dtype)
        zeros[number] = vary_like(zero, site.equation.outvars[0].aval)
    for probe in part.probes:
        aval = part.program.eqns[probe.number].outvars[0].aval
        zero = jnp.zeros(aval.shape, aval.dtype)
        zeros[~probe.number] = vary_like(zero, aval)
    arguments = [values[var] for var, _ in part.sources]
    others = [_value(var, values, made) for var in part.others]
    outputs = part.program.outvars
    pulled = [number for number, var in enumerate(outputs) if var in results]

    def run(rest: dict[int, jax.Array], taps: dict[Any, jax.Array]) -> tuple[list, tuple]:
        full = [rest.get(number, argument) for number, argument in enumerate(arguments)]
        found, inputs = evaluate(part.program, (), [*full, *others], plan, taps)
        return [found[number] for number in pulled], (found, inputs)

    rest = {number: arg for number, arg in enumerate(arguments) if number not in tapped}
    primals, pull_back, (found, inputs) = jax.vjp(run, rest, zeros, has_aux=True)
    values.update(zip(outputs, found, strict=True))
    named = dict(zip([outputs[number] for number in pulled], primals, strict=True))
    return _Run(part, taps, choices, named, pull_back, inputs)


def can_cut(program: Program, num_losses: int) -> bool:
    """Whether a program can be cut.

    No loss is itself a parameter, no mesh is explicit, and what has effects is neither needed for
    a value, which might be computed twice, nor in an order, which parts do not keep.
    """
    for equation in program.eqns:
        kinds = [type(effect).__name__ for effect in equation.effects]
        if kinds and (equation.outvars or any("Ordered" in kind for kind in kinds)):
            return False
    atoms = variables(program.outvars[:num_losses])
    avals = [var.aval for equation in program.eqns for var in equation.outvars]
    return set(atoms).isdisjoint(program.invars) and not any(map(is_explicit, avals))


def pays(found: Cut, num_params: int, m: int) -> bool:
    """Whether cutting saves a hundredth of the work of a backward pass per task, or more."""
    params = set(found.program.invars[:num_params])
    total = saved = 0.0
    for part in found.parts:
        # Their cotangents are made one by one anyway.
        shared = {probe.number for probe in part.probes if probe.source not in params}
        share = len(part.tasks) / m if part.tasks else 1 / m
        for number, equation in enumerate(part.program.eqns):
            work = multiplications(equation)
            total += work
            saved += 0 if number in shared else (1 - share) * work
    return saved > total / 100


class Use(NamedTuple):
    """What a part does with a parameter.

    Attributes:
      tasks: The losses.
      choice: The form of their rows; None where the parameter's entries are the losses' own.
      site: The layer, if there is one.
    """

    tasks: Tasks
    choice: Choice | None
    site: Site | None


def uses(found: Cut, num_params: int, form: str) -> list[list[Use]]:
    """What the parts do with every parameter."""
    result: dict[Any, list[Use]] = {var: [] for var in found.program.invars[:num_params]}
    for part in found.parts:
        taps, choices = _layers(part, form)
        for number, (var, key) in enumerate(part.sources):
            if var not in result:
                continue
            if number >= part.num_params:
                result[var].append(Use(found.owners[var].all, None, None))
                continue
            tasks = part.tasks or _only(key)
            result[var].append(Use(tasks, choices[number], taps.sites.get(number)))
        for probe in part.probes:
            if probe.source in result:
                result[probe.source].append(_use_of(probe, part, form))
    return list(result.values())


def _use_of(probe: Probe, part: Part, form: str) -> Use:
    equation = part.program.eqns[probe.number]
    tasks = probe.reached
    size = len(probe.tasks) // len(tasks)
    apart = probe.whole and _blocks(probe.tasks)
    resized = _resized(equation, probe, size) if apart else None
    site = None if resized is None else _site(probe, resized, probe.source.aval)
    own = "each loss has inputs of its own"
    if site is None:
        return Use(tasks, Choice("dense", False, f"used by {equation.primitive.name}, {own}"), None)
    sizes = site.sizes(len(tasks), per_task=True)
    keep = form == "factored" or prefers_factors(sizes)
    why = "asked for" if form == "factored" else "cheaper"
    choice = Choice("factored" if keep else "dense", True, f"{why}, {own}")
    return Use(tasks, choice, site)


def cut_losses(
    program: Program, num_params: int, num_losses: int, num_summed: int = 0
) -> Cut | None:
    """Cuts a program by its first outputs, the losses; None where that saves nothing."""
    if not can_cut(program, num_losses):
        return None
    atoms = program.outvars[:num_losses]
    sizes = [atom.aval.size for atom in atoms]
    found = cut(program, num_params, atoms, sizes, num_summed)
    return found if num_summed or pays(found, num_params, sum(sizes)) else None


def jacobian(
    found: Cut,
    consts: Sequence[Any],
    params: Sequence[jax.Array],
    others: Sequence[Any],
    num_losses: int,
    chunk_size: int | None,
    form: str,
) -> tuple[list[Any], list[Any]]:
    """Runs a program on parameters and other arguments.

    Returns:
      Its outputs, and the leaves of the Jacobian of its first `num_losses` outputs; of what is
      summed the gradients.
    """
    program = found.program
    atoms = program.outvars[:num_losses]
    sizes = [atom.aval.size for atom in atoms]
    values: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    values.update(zip(program.invars, [*params, *others], strict=True))

    for equation in found.before:
        results = bind(equation, [_value(var, values, found.made) for var in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    losses = set(variables(atoms))
    crossing = losses | {var for part in found.parts for var, _ in part.sources}
    crossing |= {probe.source for part in found.parts for probe in part.probes}
    runs = [
        _run(part, values, found.made, crossing if part.tasks else losses, form)
        for part in found.parts
    ]

    # What reaches a variable from the parts that have been pulled back so far.
    rows: dict[Any, list[Any]] = {var: [] for var in crossing}
    for atom, tasks in _numbered(atoms, sizes):
        if not isinstance(atom, jex.Literal) and _is_shared(found, atom):
            basis = jnp.eye(len(tasks), dtype=atom.aval.dtype)
            basis = vary_like(basis.reshape(len(tasks), *atom.aval.shape), values[atom])
            rows[atom].append(Rows(tasks, basis))
    m = sum(sizes)
    for run in reversed(runs):
        for var, part in _pulled(run, rows, found, values, m, chunk_size):
            rows[var].append(part)
    leaves = [
        _sum(rows.get(var, []), param)
        if var in found.summed
        else _leaf(rows.get(var, []), param, m, form)
        for var, param in zip(program.invars, params, strict=False)
    ]
    return [_value(atom, values, found.made) for atom in program.outvars], leaves


def _is_shared(found: Cut, atom: Any) -> bool:
    return any(part.tasks and atom in part.program.outvars for part in found.parts)


def _pulled(
    run: _Run,
    rows: Mapping[Any, Sequence[Any]],
    found: Cut,
    values: Mapping[Any, Any],
    m: int,
    chunk_size: int | None,
) -> list[tuple[Any, _Reached]]:
    """Pulls a part back: what reaches its sources, each with the variable that it is."""
    part, tasks = run.part, run.part.tasks
    reached: list[tuple[Any, _Reached]] = []
    if tasks:
        dense, tapped, gradients = _pulled_per_task(run, rows, found.summed, chunk_size)
    else:
        ones = [vary_like(jnp.ones_like(value), value) for value in run.results.values()]
        dense, tapped = run.pull_back(ones)
        gradients = dense
    for number, (var, key) in enumerate(part.sources):
        if var in found.summed:
            reached.append((var, Gradient(gradients[number])))
            continue
        if number in dense:
            if tasks:
                reached.append((var, Rows(tasks, dense[number])))
            elif key is None:
                owners = found.owners[var]
                reached.append((var, BlocksLeaf(owners.axis or 0, owners.tasks, dense[number], m)))
            else:
                reached.append((var, Rows(_only(key), dense[number][None])))
            continue
        site = run.taps.sites[number]
        cotangents = tapped[number] if tasks else tapped[number][None]
        leaf = site.leaf(run.inputs[number], cotangents)
        keep = run.choices[number].form == "factored" or not tasks
        reached.append((var, Rows(tasks or _only(key), leaf if keep else leaf.materialize())))
    for probe in part.probes:
        operands, cotangent = run.inputs[~probe.number], tapped[~probe.number]
        equation = part.program.eqns[probe.number]
        reached.append((probe.source, _probed(probe, equation, operands, cotangent, values)))
    return reached


def _pulled_per_task(
    run: _Run, rows: Mapping[Any, Sequence[Any]], summed: set[Any], chunk_size: int | None
) -> tuple[dict, dict, dict]:
    """Pulls what losses share back: once for each of them, and once for what is summed.

    Returns:
      The rows of the sources and the cotangents at the taps, one per task, and the gradients of the
      sources that are summed.
    """
    tasks, sources, results = run.part.tasks, run.part.sources, run.results
    own = [var for var in results if var not in summed]
    rows_of = [_gather(rows.get(var, []), tasks, results[var]) for var in own]

    def pull_back(cotangents: Sequence[jax.Array], to: Sequence[Any]) -> tuple[dict, dict]:
        given = dict(zip(to, cotangents, strict=True))
        zeros = (vary_like(jnp.zeros_like(value), value) for value in results.values())
        full = [given.get(var, zero) for var, zero in zip(results, zeros, strict=True)]
        return run.pull_back(full)

    def pull(cotangents: Sequence[jax.Array]) -> tuple[dict, dict]:
        dense, tapped = pull_back(cotangents, own)
        return {n: row for n, row in dense.items() if sources[n][0] not in summed}, tapped

    dense, tapped, gradients = {}, {}, {}
    if own:
        dense, tapped = map_in_chunks(pull, rows_of, chunk_size)
    if any(var in summed for var, _ in sources):
        parts = {var: [Rows(tasks, array)] for var, array in zip(own, rows_of, strict=True)}
        total = [_sum(parts.get(var, rows.get(var, [])), value) for var, value in results.items()]
        gradients = pull_back(total, list(results))[0]
    return dense, tapped, gradients


def _probed(
    probe: Probe,
    equation: Any,
    operands: Sequence[Any],
    cotangent: jax.Array,
    values: Mapping[Any, Any],
) -> Rows:
    """The rows of what losses share in the middle of what they own.

    Each loss has the equation to itself for its own entries along the axis.
    """
    root = values[probe.source]
    blocks = _blocks(probe.tasks) if probe.whole else None
    size = 0 if blocks is None else len(probe.tasks) // len(blocks)
    equation_of = None if blocks is None else _resized(equation, probe, size)

    def through(root: jax.Array, rest: Sequence[Any], equation: Any) -> jax.Array:
        for view in probe.views:
            (root,) = bind(view, [root])
        full = list(rest)
        full[probe.place] = root
        return bind(equation, full)[0]

    def pull(rest: Sequence[Any], cotangent: jax.Array, equation: Any) -> jax.Array:
        return jax.vjp(lambda root: through(root, rest, equation), root)[1](cotangent)[0]

    if blocks is None or equation_of is None:
        tasks = probe.reached
        owned = jnp.asarray(probe.tasks)[None, :] == jnp.asarray(tasks)[:, None]
        others = [1 + axis for axis in range(cotangent.ndim) if axis != probe.axis]
        apart = jnp.where(jnp.expand_dims(owned, others), cotangent[None], 0)
        return Rows(tasks, jax.vmap(lambda part: pull(operands, part, equation))(apart))

    def by_task(array: jax.Array, axis: int) -> jax.Array:
        shape = (*array.shape[:axis], len(blocks), size, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    cotangents = by_task(cotangent, probe.axis)
    split = [
        operand if axis is None else by_task(operand, axis)
        for operand, axis in zip(operands, probe.axes, strict=True)
    ]
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    tasks = tuple(sorted(blocks))
    if order != list(range(len(blocks))):
        index = jnp.asarray(order)
        cotangents = cotangents[index]
        split = [
            operand if axis is None else operand[index]
            for operand, axis in zip(split, probe.axes, strict=True)
        ]
    site = _site(probe, equation_of, jax.typeof(root))
    if site is not None:
        inputs = split[1 - site.position]
        return Rows(tasks, site.leaf(inputs, cotangents, per_task=True))
    in_axes = ([None if axis is None else 0 for axis in probe.axes], 0)
    pull_each = jax.vmap(lambda rest, part: pull(rest, part, equation_of), in_axes)
    return Rows(tasks, pull_each(split, cotangents))


def _blocks(tasks: Tasks) -> list[int] | None:
    """The losses of equal stretches of entries; None if each has not one stretch."""
    found = [task for place, task in enumerate(tasks) if place == 0 or tasks[place - 1] != task]
    size = len(tasks) // len(found)
    equal = tasks == tuple(task for task in found for _ in range(size))
    return found if equal and -1 not in found and len(set(found)) == len(found) else None


def _resized(equation: Any, probe: Probe, size: int) -> Any | None:
    """An equation for `size` entries along the axis; None where it is not known how."""
    name, params = equation.primitive.name, dict(equation.params)
    if params.get("sharding") is not None or params.get("out_sharding") is not None:
        return None
    if name == "broadcast_in_dim":
        if probe.axis in params["broadcast_dimensions"]:
            return None
        shape = list(params["shape"])
        shape[probe.axis] = size
        params["shape"] = tuple(shape)
    elif name not in ("dot_general", "gather") and name not in ELEMENTWISE:
        return None

    def part_of(var: Any, axis: int | None) -> Any:
        if axis is None or isinstance(var, jex.Literal):
            return var
        shape = list(var.aval.shape)
        shape[axis] = size
        return Variable(jax.ShapeDtypeStruct(tuple(shape), var.aval.dtype))

    invars = [part_of(*pair) for pair in zip(equation.invars, probe.axes, strict=True)]
    outvars = [part_of(equation.outvars[0], probe.axis)]
    return equation.replace(params=params, invars=invars, outvars=outvars)


def _site(probe: Probe, equation: Any, root: Any) -> Site | None:
    """The place of a parameter as the matrix of a layer with inputs of each loss's own."""
    source = Variable(root)
    var: Any = source
    equations = []
    for view in probe.views:
        result = Variable(view.outvars[0].aval)
        equations.append(view.replace(invars=[var], outvars=[result]))
        var = result
    invars = list(equation.invars)
    invars[probe.place] = var
    equations.append(equation.replace(invars=invars))
    rest = [atom for atom in variables(invars) if atom is not var]
    program = Program([], [source, *rest], list(equation.outvars), equations)
    return find(program, 1).sites.get(0)


def _sum(parts: Sequence[_Reached], like: jax.Array) -> jax.Array:
    """The sum of what reaches a variable over all losses."""
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    arrays = [
        part.array.astype(dtype)
        if isinstance(part, Gradient)
        else jnp.sum(part.rows, axis=0, dtype=dtype)
        for part in parts
    ]
    if not arrays:
        return vary_like(jnp.zeros_like(like), like)
    return functools.reduce(jnp.add, arrays).astype(like.dtype)


def _gather(parts: Sequence[Rows | BlocksLeaf], tasks: Tasks, like: jax.Array) -> jax.Array:
    """The sum of what reaches a variable, one entry per task."""
    total = None
    single: dict[int, jax.Array] = {}
    for part in parts:
        if isinstance(part, BlocksLeaf):
            part = Rows(tasks, part.materialize()[jnp.asarray(tasks)])
        rows = local_rows(part.rows)
        if len(part.tasks) == 1:
            (task,) = part.tasks
            single[task] = single[task] + rows[0] if task in single else rows[0]
            continue
        placed = scatter(rows, tuple(tasks.index(task) for task in part.tasks), len(tasks), 0)
        total = placed if total is None else total + placed
    if single:
        zero = vary_like(jnp.zeros(like.shape, like.dtype), like)
        stacked = jnp.stack([single.get(task, zero) for task in tasks])
        total = stacked if total is None else total + stacked
    if total is None:
        total = vary_like(jnp.zeros((len(tasks), *like.shape), like.dtype), like)
    return total


def _leaf(parts: Sequence[Rows | BlocksLeaf], param: jax.Array, m: int, form: str) -> Any:
    """One leaf of the Jacobian."""
    every = tuple(range(m))
    if len(parts) == 1 and isinstance(parts[0], BlocksLeaf):
        return parts[0].materialize() if form == "dense" else parts[0]
    joined = _joined(parts, param, form)
    rows = joined.rows
    if joined.tasks == every:
        return rows
    if form == "dense":
        return scatter(rows, joined.tasks, m, 0)
    return RowsLeaf(joined.tasks, rows, m)


def _joined(parts: Sequence[Rows | BlocksLeaf], param: jax.Array, form: str) -> Rows:
    """All rows of a leaf together; factored if that is cheaper or asked for."""
    if not parts:
        return Rows((), jnp.zeros((0, *param.shape), param.dtype))
    tasks = tuple(sorted({task for part in parts for task in part.tasks if task >= 0}))
    leaf = parts[0].rows if len(parts) == 1 else _stacked(parts)
    if isinstance(leaf, FactoredLeaf):
        keep = form == "factored" or (form == "auto" and prefers_factors(leaf.sizes))
        return Rows(tasks, leaf if keep else leaf.materialize())
    return Rows(tasks, _gather(parts, tasks, param))


def _stacked(parts: Sequence[Rows | BlocksLeaf]) -> FactoredLeaf | None:
    """Factors of single tasks as those of a leaf whose tasks have inputs of their own."""
    ordered = sorted(parts, key=lambda part: part.tasks)
    leaves = [part.rows for part in ordered if isinstance(part, Rows)]
    alone = [part.tasks for part in ordered if len(part.tasks) == 1]
    if len(leaves) < len(parts) or len(set(alone)) < len(parts):
        return None
    if not all(isinstance(leaf, FactoredLeaf) and not leaf.per_task for leaf in leaves):
        return None
    first = leaves[0]
    if not all(first.layer.like(leaf.layer) for leaf in leaves):
        return None
    inputs = _padded([leaf.inputs for leaf in leaves], first.layer.batch)
    cotangents = _padded([leaf.cotangents[0] for leaf in leaves], first.layer.batch)
    if inputs is None or cotangents is None:
        return None
    shape = (len(leaves), *first.shape[1:])
    return FactoredLeaf(first.layer, inputs, cotangents, shape, first.dtype, per_task=True)


def _padded(arrays: Sequence[jax.Array], axis: int) -> jax.Array | None:
    """Stacks arrays that differ along one axis at most, filled up with zeros."""
    shapes = {(*array.shape[:axis], *array.shape[axis + 1 :]) for array in arrays}
    if len(shapes) > 1 or len({array.ndim for array in arrays}) > 1:
        return None
    if arrays[0].ndim <= axis:
        return jnp.stack(arrays)
    size = max(array.shape[axis] for array in arrays)

    def pad(array: jax.Array) -> jax.Array:
        config = [(0, 0)] * array.ndim
        config[axis] = (0, size - array.shape[axis])
        return jnp.pad(array, config) if array.shape[axis] < size else array

    return jnp.stack([pad(array) for array in arrays])

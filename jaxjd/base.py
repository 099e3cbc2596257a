"""The vocabulary: weightings, scalarizers, aggregators, and the types they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxjd.checks import check_length, check_static_int, type_name

# optax's experimental protocol for transformations of stacked gradients, where optax has it.
_AggregatorBase: Any = getattr(
    getattr(getattr(optax, "experimental", None), "aggregating", None),
    "Aggregator",
    optax.GradientTransformationExtraArgs,
)

PyTree: TypeAlias = Any
"""Any JAX pytree."""

Jacobian: TypeAlias = Any
"""A pytree like the parameters; every leaf has a leading task axis: ``(m, *param.shape)``."""

Gramian: TypeAlias = jax.Array
"""The ``(m, m)`` matrix of the inner products of the rows of a Jacobian."""

Certificate: TypeAlias = Any
"""A ``jax.tree_util.Partial`` that returns a residual, a pytree of such, or None."""


class Differentiated(NamedTuple):
    """What an engine for Jacobians differentiates, as the function tells that it returned.

    Attributes:
      argnums: The numbers of the positional arguments.
      single: Whether there is one Jacobian, and no tuple of them.
      has_aux: Whether the losses come in a pair with auxiliary output.
    """

    argnums: tuple[int, ...]
    single: bool
    has_aux: bool

    def tell(self, fn: Any) -> Callable[..., Any]:
        """Returns a function that tells it, in an attribute that ``functools.wraps`` copies."""
        fn.differentiated = self
        return fn


class WeightingInit(Protocol):
    """The type of `Weighting.init`."""

    def __call__(self, num_tasks: Any, params: PyTree | None = None) -> PyTree:
        """Returns the initial state for `num_tasks` tasks."""
        ...


class WeightingUpdate(Protocol):
    """The type of `Weighting.update`."""

    def __call__(self, stat: Any, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        """Returns the weights and the next state."""
        ...


class Certified:
    """An `update` that can also tell how well its answer solves the problem behind it.

    It is called like any other `update` and returns the answer and the next state; the certificate
    is then not even traced. `jaxjd.diagnostics.solver_residual` and `jaxjd.diagnostics.monitored`
    ask for it, and whatever is made of a certified weighting passes it on.

    Args:
      solve: A function of the arguments of `update` that returns the answer, the next state, and
        the certificate: a ``jax.tree_util.Partial`` of a module's function and arrays that returns
        the residual of the answer, a non-negative scalar or array (the largest entry counts), or
        None where no problem is solved.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> from jaxjd.linalg import min_norm_residual, min_norm_weights
      >>> @jaxjd.Certified
      ... def update(gramian, state, **extra_args):
      ...     weights = min_norm_weights(gramian)
      ...     return weights, state, jax.tree_util.Partial(min_norm_residual, weights, gramian)
      >>> weighting = jaxjd.Weighting(lambda num_tasks, params=None: (), update)
      >>> weights, _ = weighting.update(jnp.eye(2), ())
      >>> print(weights, jaxjd.diagnostics.solver_residual(weighting, jnp.eye(2)))
      [0.5 0.5] 0.0
    """

    def __init__(self, solve: Callable[..., tuple[Any, PyTree, Certificate]]):
        """Makes an `update` of a function that returns a certificate as well."""
        functools.update_wrapper(self, solve)
        self.solve = solve

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        """Returns the answer and the next state."""
        answer, state, _ = self.solve(*args, **kwargs)
        return answer, state


def solve(update: Callable, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Certificate]:
    """Calls an `update`, and returns the certificate as well; None if it has none."""
    if isinstance(update, Certified):
        return update.solve(*args, **kwargs)
    return (*update(*args, **kwargs), None)


def largest_residual(certificates: PyTree, dtype: jnp.dtype) -> jax.Array:
    """Returns the largest residual of a pytree of certificates, -1 if there are none."""
    # Nobody differentiates it, and a derivative of zero must not become NaN on the way.
    found = jax.lax.stop_gradient(certificates)
    found = jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, jax.tree_util.Partial))
    residuals = [jnp.max(certificate()).astype(dtype) for certificate in found]
    return functools.reduce(jnp.maximum, residuals, jnp.asarray(-1, dtype))


class Weighting(NamedTuple):
    """A pair of pure functions that turn a statistic of the Jacobian into one weight per task.

    The statistic of this class is the Gramian ``G = J J^T``, an ``(m, m)`` array. The two marker
    subclasses `JacobianWeighting` and `CrossGramianWeighting` read something else; they add no
    field, so each weighting unpacks as a pair.

    Attributes:
      init: ``init(num_tasks, params=None) -> state``. `num_tasks` is a static int; `params` may
        hold `jax.ShapeDtypeStruct` leaves. A weighting whose state does not depend on the number
        of tasks accepts ``None`` for it.
      update: ``update(stat, state, **extra_args) -> (weights, state)``, with weights of shape
        ``(m,)`` in the dtype of the statistic. Unknown extra arguments are ignored.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> init, update = jaxjd.weightings.mean()
      >>> weights, state = update(jnp.eye(4), init(4))
      >>> print(weights)
      [0.25 0.25 0.25 0.25]
    """

    init: WeightingInit
    update: WeightingUpdate


class JacobianWeighting(Weighting):
    """A `Weighting` whose statistic is the Jacobian pytree itself (for example ExcessMTL).

    Example:
      >>> import jaxjd
      >>> isinstance(jaxjd.weightings.excess_mtl(), jaxjd.JacobianWeighting)
      True
    """

    __slots__ = ()


class CrossGramianWeighting(Weighting):
    """A `Weighting` whose statistic is ``A = J1 J2^T``, from two independent batches.

    `A` has shape ``(m, m)``; it is neither symmetric nor positive semi-definite in general.

    Example:
      >>> import jaxjd
      >>> isinstance(jaxjd.weightings.modo(), jaxjd.CrossGramianWeighting)
      True
    """

    __slots__ = ()


class ScalarizerInit(Protocol):
    """The type of `Scalarizer.init`."""

    def __call__(self, num_tasks: Any = None) -> PyTree:
        """Returns the initial state for `num_tasks` tasks."""
        ...


class ScalarizerApply(Protocol):
    """The type of `Scalarizer.apply`."""

    def __call__(self, losses: PyTree, state: PyTree) -> jax.Array:
        """Returns the losses combined to one."""
        ...


class ScalarizerUpdate(Protocol):
    """The type of `Scalarizer.update`."""

    def __call__(self, losses: PyTree, state: PyTree, **extra_args: Any) -> PyTree:
        """Returns the next state."""
        ...


class Scalarizer(NamedTuple):
    """Three pure functions that combine the losses to one loss, without a Jacobian.

    The losses are a pytree of real floating point arrays of any shapes; the tasks are their entries
    in the order of the tree. What depends on the task, in the state or in a hyper-parameter, is a
    vector in that order; a hyper-parameter may be laid out as the losses instead.

    Attributes:
      init: ``init(num_tasks) -> state``. `num_tasks` is a static int; a scalarizer whose state does
        not depend on it accepts ``None``.
      apply: ``apply(losses, state) -> loss``, a scalar in the dtype of the losses, at least
        float32; this is what is differentiated. It leaves the state as it is.
      update: ``update(losses, state, **extra_args) -> state``, once per training step. It returns
        the state unchanged where no rule changes it. Unknown extra arguments are ignored.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> init, apply, update = jaxjd.scalarizers.mean()
      >>> state = init(3)
      >>> losses = {"left": jnp.array([1.0, 2.0]), "right": jnp.array(6.0)}
      >>> print(apply(losses, state))
      3.0
      >>> state = update(losses, state)
    """

    init: ScalarizerInit
    apply: ScalarizerApply
    update: ScalarizerUpdate


class Aggregator(_AggregatorBase):
    """An optax gradient transformation that takes a Jacobian and returns an update.

    ``init(params)`` returns the state, ``update(jacobian, state, params=None, **extra_args)``
    returns updates with the shapes and dtypes of the parameters, and the next state. Where optax
    has ``optax.experimental.aggregating.Aggregator``, this is a subclass of it.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.sum()
      >>> jacobian = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, _ = aggregator.update(jacobian, aggregator.init({"w": jnp.zeros(3)}))
      >>> print(update["w"])
      [2. 2. 2.]
    """

    __slots__ = ()


class AggregatorState(NamedTuple):
    """The state of an aggregator made by `jaxjd.weighted`.

    Attributes:
      weights: The weights of the last call, shape ``(m,)``, zeros before the first one; the empty
        tuple when the aggregator was made without `num_tasks`.
      weighting: The state of the weighting.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> print(jaxjd.mean(num_tasks=2).init(jnp.zeros(3)))
      AggregatorState(weights=Array([0., 0.], dtype=float32), weighting=())
    """

    weights: jax.Array | tuple[()]
    weighting: PyTree


def stateless(num_tasks: Any = None, params: PyTree | None = None) -> tuple[()]:
    """The `init` of every weighting without state.

    Raises:
      ValueError: If it gets parameters, as an optax transformation would.
    """
    # The weights of `flattening` have a shape.
    if num_tasks is not None and not isinstance(num_tasks, tuple):
        _check_num_tasks(num_tasks)
    del params
    return ()


def stateless_with(**vectors: Any) -> Callable[..., tuple[()]]:
    """`stateless` for methods with arguments that hold one number per task, or None.

    Their sizes are checked as soon as the number of tasks is known.
    """

    def init(num_tasks: Any = None, params: PyTree | None = None) -> tuple[()]:
        state = stateless(num_tasks, params)
        if num_tasks is not None and not isinstance(num_tasks, tuple):
            check_sizes(num_tasks, **vectors)
        return state

    return init


def check_sizes(num_tasks: int, **vectors: Any) -> None:
    """Checks arguments that hold one number per task; None is one without.

    Raises:
      ValueError: If one has another size.
    """
    for name, vector in vectors.items():
        if vector is not None:
            check_length(name, vector.size, num_tasks)


def require_num_tasks(num_tasks: Any, name: str) -> int:
    """Checks the number of tasks that the state of `name` is sized by.

    Raises:
      ValueError: If it is missing or not a positive static int.
    """
    if num_tasks is None:
        raise ValueError(
            f"The state of `{name}` depends on the number of tasks: pass `num_tasks=`."
        )
    return _check_num_tasks(num_tasks)


def check_weighting(weighting: Any) -> None:
    """Checks the `weighting` of something that is made from one.

    Raises:
      ValueError: If it is anything else.
    """
    if isinstance(weighting, Weighting):
        return
    hint = (
        "take the weighting of the same name from jaxjd.weightings"
        if isinstance(weighting, Aggregator)
        else "a factory has to be called first"
    )
    raise ValueError(
        f"`weighting` must be a jaxjd.Weighting, got {type(weighting).__name__} ({hint})."
    )


def _check_num_tasks(num_tasks: Any) -> int:
    if not jax.tree_util.all_leaves([num_tasks]):
        raise ValueError(
            f"`num_tasks` must be a static int, got {type_name(num_tasks)}. (Parameters are for "
            "aggregators: `jaxjd.weighted` makes one from a weighting.)"
        )
    return check_static_int("num_tasks", num_tasks, at_least=1)


def weight_dtype(tree: PyTree | None) -> jnp.dtype:
    """Returns the real dtype in which weights of this tree are computed: at least float32.

    Without leaves to go by it is JAX's default float dtype.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    floats = [jnp.finfo(dtype).dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    if not floats:
        return jnp.asarray(0.0).dtype
    return jnp.dtype(jnp.result_type(jnp.float32, *floats))


def stack_states(state: PyTree, size: int) -> PyTree:
    """Returns `size` copies of a state along a new leading axis, each with keys of its own."""
    return jax.tree.map(lambda leaf: _stack(leaf, size), state)


def _stack(leaf: jax.Array, size: int) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.vmap(lambda number: jax.random.fold_in(leaf, number))(jnp.arange(size))
    # Broadcasting keeps the sharding in the type.
    return jnp.broadcast_to(leaf, (size, *leaf.shape))


def fresh_key(key: jax.Array | int) -> jax.Array:
    """Returns a typed key that shares no buffer with `key`, so that a state may be donated.

    Raises:
      ValueError: If `key` is neither an int, nor a typed key, nor raw key data.
    """
    if not isinstance(key, jax.Array):
        return jax.random.key(check_static_int("key", key, at_least=0))
    if key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jnp.copy(jax.random.key_data(key))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    if key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
        return jax.random.key(key)
    if key.dtype == jnp.uint32 and key.shape == jax.random.key_data(jax.random.key(0)).shape:
        return jax.random.wrap_key_data(jnp.copy(key))
    raise ValueError(f"`key` must be an int or a jax.random.key, got {type_name(key)}.")

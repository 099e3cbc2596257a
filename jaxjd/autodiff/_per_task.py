"""Tasks of one shape, stacked on an axis: all gradients in one backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxjd.autodiff._gramian import Pullback
from jaxjd.autodiff._per_example import (
    per_example_value_and_gramian,
    per_example_value_and_jacobian,
)
from jaxjd.base import Jacobian
from jaxjd.checks import check_function, type_name


def per_task_value_and_jacobian(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "dense",
) -> Callable[..., tuple[Any, Jacobian]]:
    r"""Returns a function that computes the losses of stacked tasks and the Jacobian of all.

    .. math:: L_i(\theta) = f(\theta, x_i), \qquad J_i = \nabla_\theta f(\theta, x_i), \qquad
              i = 1, \dots, m

    The tasks share the parameters and one loss function, and each has data of its own: a batch, a
    one-hot vector or an index that names the task, targets. They are stacked on a leading axis of
    size ``m``, as environments of multi-task reinforcement learning are (Yu et al., "Meta-World: A
    Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning", CoRL 2019,
    https://arxiv.org/abs/1910.10897). Each task's loss touches its own activations only, so one
    backward pass gives the cotangents of all tasks, and each layer's part of the Jacobian is one
    batched product: no pass per task. It is `jaxjd.per_example_value_and_jacobian` with a task's
    data in the place of an example.

    Args:
      fn: ``fn(params, *data) -> loss``, a scalar, for the data of one task, without the task axis.
      argnums: Which positional arguments to differentiate, as for `jaxjd.value_and_jacobian`.
        Everything else, keyword arguments included, is the tasks' data.
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
      A function ``(params, *data)``, where every leaf of `data` has a leading axis of size `m`, of
      any dtype. It returns ``(losses, jacobian)`` with losses of shape ``(m,)`` and one row per
      task in the order of the axis, or ``((losses, aux), jacobian)``, where the arrays of `aux`
      have a leading axis of size `m`. Losses and rows have the dtypes of the loss and of the
      parameters.

    Raises:
      ValueError: If an option is out of range; when called, if a parameter is not floating point,
        the leaves of the data disagree about `m`, or the loss of a task is not a floating point
        scalar.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # of one task
      >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
      >>> y = jnp.array([[0.0, 1.0], [0.0, 0.0]])
      >>> losses, jacobian = jaxjd.per_task_value_and_jacobian(loss)(jnp.ones(2), x, y)
      >>> print(losses)
      [0.5 2. ]
      >>> print(jacobian)
      [[1. 0.]
       [4. 0.]]
    """
    loss_fn = _of_one_task(fn, has_aux)
    return per_example_value_and_jacobian(loss_fn, argnums, has_aux, chunk_size, form)


def per_task_value_and_gramian(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "auto",
    labels: Any = None,
) -> Callable[..., tuple[Any, Any, Pullback]]:
    r"""Returns a function that computes the losses of stacked tasks, their Gramian and a pullback.

    .. math:: G_{ij} = \langle \nabla_\theta f(\theta, x_i), \nabla_\theta f(\theta, x_j) \rangle,
              \qquad \operatorname{pullback}(w) = \sum_i w_i \nabla_\theta f(\theta, x_i)

    It is `jaxjd.value_and_gramian` for tasks that are stacked on an axis, as for
    `jaxjd.per_task_value_and_jacobian`, at about the cost of a gradient step: one backward pass for
    all tasks. With `k` chunks there are ``k (k + 1) / 2`` backward passes over a chunk, since every
    pair of tasks has an inner product. It is `jaxjd.per_example_value_and_gramian` with a task's
    data in the place of an example.

    Args:
      fn: As for `jaxjd.per_task_value_and_jacobian`.
      argnums: As for `jaxjd.per_task_value_and_jacobian`.
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
      labels: Groups of parameters, as for `jaxjd.value_and_gramian`.

    Returns:
      A function ``(params, *data)`` that returns ``(losses, gramian, pullback)``, or
      ``((losses, aux), gramian, pullback)``: losses of shape ``(m,)``, a Gramian of shape
      ``(m, m)``, at least float32, or a dict of them, and ``pullback(weights)``, a pytree like
      `params`.

    Raises:
      ValueError: As for `jaxjd.per_task_value_and_jacobian` and `jaxjd.value_and_gramian`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # of one task
      >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
      >>> y = jnp.array([[0.0, 1.0], [0.0, 0.0]])
      >>> step_fn = jaxjd.per_task_value_and_gramian(loss)
      >>> losses, gramian, pullback = step_fn(jnp.ones(2), x, y)
      >>> print(gramian)
      [[ 1.  4.]
       [ 4. 16.]]
      >>> print(pullback(jnp.array([1.0, 0.5])))
      [3. 0.]
    """
    loss_fn = _of_one_task(fn, has_aux)
    return per_example_value_and_gramian(loss_fn, argnums, has_aux, chunk_size, form, labels)


def _of_one_task(fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The same function, with a message about tasks where its loss is no scalar."""
    check_function("fn", fn)

    @functools.wraps(fn)
    def loss_fn(*args: Any, **kwargs: Any) -> Any:
        found = fn(*args, **kwargs)
        loss = found[0] if has_aux and isinstance(found, tuple) and found else found
        if getattr(loss, "shape", ()) != () or isinstance(loss, (tuple, list, dict)):
            raise ValueError(
                f"The loss of a task must be a scalar, found {type_name(loss)}: `fn` gets the data "
                "of one task, without the task axis."
                + ("" if has_aux else " With auxiliary output, pass has_aux=True.")
            )
        return found

    return loss_fn

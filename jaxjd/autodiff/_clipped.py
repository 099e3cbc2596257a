"""Clipped gradients of single examples, summed: ghost clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.autodiff._jacobian import check_argnums
from jaxjd.autodiff._loops import looped
from jaxjd.autodiff._per_example import _by_example, _Engine
from jaxjd.autodiff._tasks import check_chunk_size, equal_chunks, join_chunks, vary_like
from jaxjd.autodiff._untied import untied_run
from jaxjd.base import PyTree, weight_dtype
from jaxjd.checks import check_function, check_range
from jaxjd.linalg.algebra import keep_smaller, squared_norms, wide_combination


def per_example_value_and_clipped_grad(
    fn: Callable[..., Any],
    clip_norm: Any,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, PyTree, jax.Array]]:
    r"""Returns a function that computes one loss per example and the sum of the clipped gradients.

    With the gradient :math:`g_i` of example `i` with respect to all parameters and the bound `C`,

    .. math:: \sum_i \min\left(1, \frac{C}{\lVert g_i \rVert}\right) g_i .

    No :math:`g_i` is written out where that is avoidable. A kernel that is used as ``y = a @ W``
    has the gradient :math:`a_i^\top b_i`, with the layer's input and the cotangent at its output,
    and so :math:`\lVert a_i^\top b_i \rVert^2 = \lVert a_i \rVert^2 \lVert b_i \rVert^2`; where an
    example has several rows, as in a sequence, it is
    :math:`\langle a_i a_i^\top, b_i b_i^\top \rangle`, unless the gradient itself is smaller than
    its factors. One forward and one backward pass for all examples give the factors, and the sum is
    one product per kernel: about the cost of the gradient of the mean. What is no such kernel, or
    is used more than once, has one gradient per example.

    Private training (DP-SGD) adds noise to the sum. Noise and accounting are the caller's.

    Args:
      fn: ``fn(params, *example) -> loss``, a scalar, for one example without a batch axis.
      clip_norm: The bound `C`, a positive number or scalar array; infinity clips nothing. What
        is in an array is not checked.
      argnums: As for `jaxjd.per_example_value_and_jacobian`; a gradient is that with respect to
        all chosen arguments together.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      chunk_size: How many examples are differentiated at once, at least 1; all by default. The
        batch is cut into chunks of one size, filled up with copies that do not count, and there is
        still one pass over each. With 1 nothing is batched.

    Returns:
      A function of the arguments of `fn`, as for `jaxjd.per_example_value_and_jacobian`, that
      returns ``(losses, gradient, norms)``, or ``((losses, aux), gradient, norms)``. `gradient` is
      a pytree like what is differentiated, summed in at least float32 and then rounded. `norms`, of
      shape ``(B,)`` and at least float32, are the lengths of the gradients before they are clipped.
      An example whose gradient is zero adds nothing.

    Raises:
      ValueError: If an option is out of range; when called, as for
        `jaxjd.per_example_value_and_jacobian`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> loss = lambda w, x, y: 0.5 * (x @ w - y) ** 2
      >>> x, y = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([2.0, 0.5])
      >>> engine = jaxjd.per_example_value_and_clipped_grad(loss, 1.0)
      >>> losses, gradient, norms = engine(jnp.zeros(2), x, y)
      >>> print(norms)
      [10.   0.5]
      >>> print(gradient)  # [-6, -8] / 10 + [0, -0.5]
      [-0.6 -1.3]

    References:
      Goodfellow, `Efficient Per-Example Gradient Computations <https://arxiv.org/abs/1510.01799>`_,
      2015. Li et al., `Large Language Models Can Be Strong Differentially Private Learners
      <https://arxiv.org/abs/2110.05679>`_, ICLR 2022.
    """
    check_function("fn", fn)
    check_range("clip_norm", clip_norm, above=0)
    numbers, single = check_argnums(argnums)
    chunk_size = check_chunk_size(chunk_size)

    def per_example_fn(*args: Any, **kwargs: Any) -> tuple[Any, PyTree, jax.Array]:
        loss_of, params, batch = _by_example(fn, numbers, single, args, kwargs)
        # All factors that there are: which are worth it without a Gramian is decided below.
        engine = _Engine(loss_of, params, batch, has_aux, "factored")
        (losses, aux, norms), total = _clipped(engine, batch, clip_norm, chunk_size)
        losses, aux = engine.traced.join([losses, *aux])
        gradient = [
            part.astype(leaf.dtype)
            for part, leaf in zip(jax.tree.leaves(total), engine.leaves, strict=True)
        ]
        gradient = jax.tree.unflatten(engine.treedef, gradient)
        return ((losses, aux) if has_aux else losses), gradient, norms

    return per_example_fn


def _clipped(
    engine: _Engine, batch: tuple, clip_norm: Any, chunk_size: int | None
) -> tuple[tuple, PyTree]:
    """``(losses, flat auxiliary output, norms)`` and the sum before it is rounded."""
    size, at_once = engine.size, 1 if chunk_size == 1 else None
    run_engine = untied_run(engine, batch)

    def run(batch: tuple, counts: Any = True) -> tuple[tuple, PyTree]:
        losses, aux, jacobian = run_engine(batch, at_once)
        jacobian = keep_smaller(jacobian)
        dtype = weight_dtype(jacobian)
        bound = jnp.asarray(clip_norm, dtype)
        norms = jnp.sqrt(squared_norms(jacobian, losses.shape, dtype))
        scales = jnp.where(norms > bound, bound / norms, 1)
        return (losses, aux, norms), wide_combination(jnp.where(counts, scales, 0), jacobian)

    count = 1 if chunk_size is None else -(-size // chunk_size)
    if count == 1:
        return run(batch)
    each = -(-size // count)  # As few copies as can be.

    def step(total: PyTree, chunk: tuple) -> tuple[PyTree, tuple]:
        found, part = run(*chunk)
        return jax.tree.map(jnp.add, total, part), found

    counts = (jnp.arange(count * each) < size).reshape(count, each)
    chunks = (equal_chunks(batch, count, each), counts)
    of_first = lambda chunks: run(*jax.tree.map(lambda array: array[0], chunks))[1]
    like = jax.tree.leaves(jax.eval_shape(of_first, chunks))
    zeros = [
        vary_like(jnp.zeros_like(leaf, dtype=part.dtype), part)
        for leaf, part in zip(engine.leaves, like, strict=True)
    ]
    total, found = lax.scan(looped(step), jax.tree.unflatten(engine.treedef, zeros), chunks)
    return join_chunks(found, size), total

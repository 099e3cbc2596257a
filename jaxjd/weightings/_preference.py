"""Preference vectors: how much each task's direction is wanted, uniform by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree
from jaxjd.checks import as_vector, check_length


def check_preference(pref_vector: PyTree | None) -> jax.Array | None:
    """Returns a preference vector as an array, or None for the uniform one.

    Raises:
      ValueError: If it is not one-dimensional.
    """
    return None if pref_vector is None else as_vector("pref_vector", pref_vector)


def preference(pref_vector: jax.Array | None, num_tasks: int, dtype: jnp.dtype) -> jax.Array:
    """Returns the preferences of `num_tasks` tasks, ``1 / m`` each by default.

    Raises:
      ValueError: If a given vector has not one entry per task.
    """
    if pref_vector is None:
        return jnp.full((num_tasks,), 1 / num_tasks, dtype)
    check_length("pref_vector", pref_vector.shape[0], num_tasks)
    return pref_vector.astype(dtype)

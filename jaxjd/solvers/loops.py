"""Work that is slow and seldom needed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def unless(done: jax.Array, work: Callable, x: jax.Array) -> jax.Array:
    """Returns ``work(x, done)``, shaped like `x`, or `x` where all is done already.

    It is a loop of at most one turn and not a `cond`, of which `vmap` takes both branches; a
    batched loop ends when all lanes are done. Two things turn it into code that always runs:

    * XLA moves what does not depend on the carry in front of the loop. So `work` has to start from
      `x` and `done`, not from what it closes over.
    * XLA unrolls a loop whose number of turns it knows. So `done` has to depend on the data.

    Args:
      done: What needs no work, bool, of any shape.
      work: The function.
      x: What is already found.
    """

    def turn(carry: tuple) -> tuple:
        return work(*carry), jnp.ones_like(carry[1])

    return lax.while_loop(lambda carry: ~jnp.all(carry[1]), turn, (x, done))[0]

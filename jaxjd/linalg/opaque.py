"""Jacobian leaves that refuse arithmetic.

A leaf that is not a plain array is no registered pytree node and converts to no array: arithmetic
on its parts would be silently wrong. Only the algebra of the task axis opens it.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import jax.numpy as jnp

from jaxjd.checks import type_name

_IN_A_CHAIN = (
    "Where a link of an optax chain does this, the aggregator is missing or comes after that link: "
    "put it first, or `jaxjd.per_task` around the link."
)


class _Opaque(type):
    # JAX names the class, not the object, when a function returns something that is no array.
    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__name__}': {getattr(cls, 'WAY_OUT', '')}>"


class OpaqueLeaf(metaclass=_Opaque):
    """A leaf of a Jacobian with the shape and the dtype of an array, and nothing else of it.

    Args:
      shape: ``(m, *param.shape)``.
      dtype: The parameter's dtype.
    """

    __slots__ = ("dtype", "shape")

    WAY_OUT = "an opaque Jacobian leaf"

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape = shape
        self.dtype = jnp.dtype(dtype)

    @property
    def arrays(self) -> list[Any]:
        """What it is made of."""
        raise NotImplementedError

    def materialize(self) -> Any:
        """The dense leaf, shape ``(m, *param.shape)``."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of axes, the task axis included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the dense leaf."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return f"<{type_name(self)}, {self.WAY_OUT}>"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"No arithmetic on {self!r}. {_IN_A_CHAIN}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"No attribute {name!r} of {self!r}. {_IN_A_CHAIN}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __neg__ = __pos__ = __abs__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __array__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = _refuse
    __hash__ = object.__hash__

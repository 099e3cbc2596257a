"""What is known early raises early, and links for what optax refuses."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxjd
from jaxjd import scalarizers, weightings

THREE = [1.0, 2.0, 3.0]
WITH_NUMBERS = [
    *(
        (getattr(weightings, name), {"pref_vector": THREE})
        for name in ("upgrad", "dualproj", "aligned_mtl", "conflict_free", "sdmgrad")
    ),
    (scalarizers.famo, {"min_losses": THREE}),
]


@pytest.mark.parametrize(
    ("factory", "arguments"), WITH_NUMBERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_numbers_of_tasks_are_compared_at_init(factory, arguments):
    method = factory(**arguments)
    method.init(3)
    (name,) = (name for name, value in arguments.items() if value is THREE)
    with pytest.raises(ValueError, match=f"`{name}`.*3"):
        method.init(2)


@pytest.mark.slow
def test_a_line_search_behind_an_aggregator_that_reads_losses():
    def losses_fn(x):
        return jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 4)])

    def value_fn(x):
        return jnp.mean(losses_fn(x))

    x = jnp.array([2.0, 3.0])
    losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(x)
    value, grad = jax.value_and_grad(value_fn)(x)
    extra = {"losses": losses, "value": value, "grad": grad, "value_fn": value_fn}
    aggregator = jaxjd.mgda(normalization="loss")
    refusing = optax.chain(aggregator, optax.lbfgs())
    with pytest.raises(TypeError, match="losses"):
        refusing.update(jacobian, refusing.init(x), x, **extra)
    tx = optax.chain(aggregator, jaxjd.drop_extra_args(optax.lbfgs()))
    updates, _ = tx.update(jacobian, tx.init(x), x, **extra)
    assert value_fn(x + updates) < value


def test_projectors_are_no_schedules():
    make = optax.inject_hyperparams(jaxjd.upgrad, static_args=("projector",))
    tx = make(projector=jaxjd.linalg.regularized_projector())
    jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    found, _ = tx.update(jacobian, tx.init(jnp.zeros(3)))
    expected, _ = jaxjd.upgrad(projector=jaxjd.linalg.regularized_projector()).update(
        jacobian, jaxjd.upgrad().init(jnp.zeros(3))
    )
    assert jnp.array_equal(found, expected)
